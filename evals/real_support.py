"""How many neurons of real models hold concepts named beforehand, at a false-discovery rate.

python evals/real_support.py --models FOLDER [--only smollm2] [--concepts dogs,golf] [--matrices out] [--candidates 300]
    --output evals/results/real-support

FOLDER holds the models. Each concept is searched as `rotate-edit locate` does, in one matrix kind at a time. The output
holds one entry for each model, matrix kind and concept. It is written after each, so a run goes on where it stopped.
"""

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from rotate_edit.channels.locate import ConceptGroup, carries, choose_channels, locate_concept, null_of, site_of
from rotate_edit.files import write_atomically
from rotate_edit.recipe import Recipe
from rotate_edit.session import Session, open_session
from rotate_edit.vocabulary.concept import TokenSet

# Named before anything was searched.
CONCEPTS = {
    "dogs": ["dog", "dogs", "puppy", "puppies", "hound", "terrier", "poodle", "kennel", "canine", "leash"],
    "golf": ["golf", "golfer", "golfers", "golfing", "putter", "fairway", "birdie", "bogey", "caddie"],
    "Paris": ["Paris", "Parisian", "Eiffel", "Louvre", "Seine", "Montmartre", "Notre"],
    "cooking": ["cooking", "cook", "recipe", "recipes", "oven", "bake", "baked", "boil", "fry", "simmer", "roast"],
    "uranium": ["uranium", "plutonium", "fission", "isotope", "isotopes", "radioactive", "enrichment", "reactor"],
    "chess": ["chess", "pawn", "checkmate", "grandmaster", "rook", "bishop", "knight"],
    "music": ["music", "song", "songs", "melody", "guitar", "piano", "violin", "orchestra", "singer", "concert"],
    "money": ["money", "cash", "dollar", "dollars", "bank", "loan", "loans", "coin", "coins", "currency"],
    "water": ["water", "river", "rivers", "lake", "ocean", "rain", "flood", "pond", "stream", "waves"],
    "school": ["school", "schools", "teacher", "teachers", "student", "students", "classroom", "pupil", "pupils"],
}
MODELS = ("smollm2", "gemma3", "qwen")
RATES = (0.05, 0.2)
LEAST = 2.0  # the support that counted before there was a null


def main() -> None:
    """Search what the output does not hold yet, and write it with its table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--only", default=",".join(MODELS))
    parser.add_argument("--concepts", default=",".join(CONCEPTS))
    parser.add_argument("--matrices", default="out")
    parser.add_argument("--candidates", type=int, default=300)
    parser.add_argument("--output", type=Path, required=True)
    choice = parser.parse_args()
    file = choice.output.with_suffix(".json")
    entries: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    for model in choice.only.split(","):
        for matrix in choice.matrices.split(","):
            keys = {name: f"{model} {matrix} {name} {choice.candidates}" for name in choice.concepts.split(",")}
            missing = [name for name, key in keys.items() if key not in entries]
            if not missing:
                continue
            session = opened(choice.models / model, matrix, missing, choice.candidates)
            for name, tokens in zip(missing, session.tokens):
                entries[keys[name]] = searched(session, tokens)
                print(keys[name], entries[keys[name]]["neurons"], entries[keys[name]]["seconds"], flush=True)
                write_atomically(file, json.dumps(entries, indent=1, ensure_ascii=False) + "\n")
                write_atomically(choice.output.with_suffix(".md"), page(entries))


def opened(folder: Path, matrix: str, concepts: list[str], candidates: int) -> Session:
    """A model and the tokens of the concepts."""
    recipe = {
        "model": str(folder),
        "concepts": [{"name": name, "words": CONCEPTS[name], "strength": 1.0} for name in concepts],
        "locate": {"matrices": [matrix], "candidates": candidates},
        "edit": {"method": "channel-located"},
    }
    return open_session(Recipe.model_validate(recipe))


def searched(session: Session, tokens: TokenSet) -> dict[str, Any]:
    """One concept in one matrix kind of one model."""
    seconds = {}
    started = time.process_time()
    what = (session.checkpoint, session.sites, session.projections, session.vocabulary)
    groups, settings = [ConceptGroup(tokens, 0, tokens.ids, {}, {})], session.search_settings
    (group,) = locate_concept(*what, groups, settings, channels=False)
    seconds["scan"] = time.process_time() - started
    started = time.process_time()
    null = null_of(group, session.checkpoint, session.projections, session.vocabulary, settings)
    seconds["null"] = time.process_time() - started
    started = time.process_time()
    (group,) = locate_concept(*what, groups, settings)
    seconds["scan and search"] = time.process_time() - started
    carrying = [c for c in group.channels if c.p_value is not None and carries(c, group.tokens, group.ids, settings)]
    chosen = {rate: passing(group, replace(settings, fdr=rate)) for rate in RATES}
    return {
        "tokens": [session.vocabulary.texts[index] for index in group.ids.tolist()],
        "layers": session.checkpoint.layers,
        "searched": sum(len(scores) for scores in group.scores.values()),
        "carrying": len({(site_of(c), c.neuron) for c in carrying}),
        "above 2": len({(site_of(c), c.neuron) for c in carrying if c.support >= LEAST}),
        "null": {"count": null.count, "carrying": len(null.supports), "largest": list(null.supports[:5])},
        "null above 2": sum(support >= LEAST for support in null.supports) / settings.draws,
        "neurons": {str(rate): len(found) for rate, found in chosen.items()},
        "channels": [
            {"name": c.name, "support": round(c.support, 2), "p": c.p_value, "tokens": list(c.tokens[:6])}
            for c in sorted(carrying, key=lambda c: -c.support)[: max(3, len(chosen[RATES[-1]]))][:40]
        ],
        "by layer": {str(rate): layers_of(found) for rate, found in chosen.items()},
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
    }


def passing(group: ConceptGroup, settings: Any) -> set[tuple[int, int]]:
    """Layers and rows of the neurons that pass."""
    return {(c.layer, c.neuron) for c in choose_channels(group.channels, group.tokens, group.ids, settings)}


def layers_of(found: set[tuple[int, int]]) -> dict[str, int]:
    """How many of them are in each layer."""
    layers = sorted({layer for layer, _ in found})
    return {str(layer): sum(one == layer for one, _ in found) for layer in layers}


def page(entries: dict[str, Any]) -> str:
    """The table, as Markdown."""
    columns = [
        "model", "matrix", "concept", "tokens", "candidates", "carry it", "support 2 or more", "the same by chance",
        "neurons at 5 %", "at 20 %", "layers at 20 %", "best channel", "its support", "its p", "processor s, null",
    ]  # fmt: skip
    lines = ["# Neurons of real models that hold a concept", "", TEXT, "", f"| {' | '.join(columns)} |"]
    lines.append("|" + "---|" * len(columns))
    for key, one in entries.items():
        model, matrix, concept, candidates = key.split()
        best = one["channels"][0] if one["channels"] else {"name": "–", "support": "–", "p": float("nan")}
        layers = " ".join(f"L{layer}: {count}" for layer, count in one["by layer"]["0.2"].items()) or "–"
        cells = [
            model, matrix, concept, len(one["tokens"]), candidates, one["carrying"], one["above 2"],
            f"{one['null above 2']:g}", one["neurons"]["0.05"], one["neurons"]["0.2"], layers,
            best["name"].split("#")[0], best["support"], f"{best['p']:.1e}", one["seconds"]["null"],
        ]  # fmt: skip
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"


TEXT = """`python evals/real_support.py --models FOLDER --output evals/results/real-support`. The words of each
concept stand in the script; they were written before anything was searched. Candidates are the neurons of all layers
with the strongest LM-head score. *Carry it*: candidates whose channel, searched from the concept's direction, has at
least half of its strongest tokens in the concept. *The same by chance*: candidates that would count by the rule of
earlier versions (support of 2 and more) among as many neurons drawn at random, the mean of two draws. *Neurons at 5
%* and *at 20 %*: those that pass a false-discovery rate of so much. Seconds are processor time on a shared machine."""


if __name__ == "__main__":
    main()
