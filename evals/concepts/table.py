"""What edits do to a concept and to everything else, at one damage: models by concepts by methods.

`python evals/concepts/table.py --choose --models ../models --data ../evals --only smollm2 --output
evals/results/concepts-choose-smollm2` measures the concepts that methods are chosen on, `--final` those of the final
table (protocol.json). MODELS holds one folder for each model of the protocol, DATA the evaluation data.

A method is a registered name, or a name with recipe sections after it:
`--method rank-one --method 'silence-words {"edit": {"self_text": 6000}}'`. Every edit gets the largest strength whose
KL divergence on neutral sentences stays within the protocol's budget. What the output file holds already is not
measured again, so a run that was stopped goes on where it was.
"""

import argparse
import json
import math
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
from data import ConceptData, SharedData, protocol, read_concept, read_shared
from pooled import markdown

import rotate_edit
from rotate_edit import (
    Edit,
    applied,
    collateral_kl,
    cross,
    find_tokens,
    load_model,
    log_likelihood_by_text,
    make_method,
    mass_by_text,
    parse_recipe,
    tokenise,
)
from rotate_edit.evaluation import attacks, comprehension, knowledge, measures, statistics
from rotate_edit.evaluation.comprehension import Losses, MarkedTexts
from rotate_edit.evaluation.knowledge import Answers
from rotate_edit.evaluation.questions import FORMS, Question, reworded
from rotate_edit.evaluation.unlisted import halves, mass_left
from rotate_edit.files import write_atomically
from rotate_edit.models.batches import Passages

PARTS = ("knowledge", "reading", "wording", "general", "unlisted", "hints", "relearning")
# A strength is near enough when its divergence is within this factor of the budget.
NEAR = 1.05
STEERED_AT = (0.2, 0.4, 0.6, 0.8)
MOST_ASKED_AGAIN = 40


@dataclass
class Bench:
    """One model and one concept: what is asked, and the base's answers, each read when it is first needed."""

    model: Any
    tokenizer: Any
    data: ConceptData
    shared: SharedData
    steps: tuple[int, ...]
    tokens: int
    kept: dict[str, Any] = field(default_factory=dict)

    def once(self, name: str, read: Callable[[], Any]) -> Any:
        """A reading of the base, taken once. Nothing may be switched on the first time."""
        if name not in self.kept:
            self.kept[name] = read()
        return self.kept[name]

    def answers(self, questions: Sequence[Question], before: str = "") -> Answers:
        """The model's answers as it stands now."""
        return knowledge.read_answers(self.model, self.tokenizer, questions, before=before)

    def passages(self, texts: Sequence[str]) -> Passages:
        """Texts as the model reads them."""
        size = self.model.config.get_text_config().vocab_size
        return tokenise(self.tokenizer, texts, vocabulary_size=size, longest=256, token_limit=self.tokens)

    def marked(self, texts: Sequence[str]) -> MarkedTexts:
        """Texts with the concept's words marked."""
        size = self.model.config.get_text_config().vocab_size
        return comprehension.mark_words(
            self.tokenizer, texts, self.data.words, vocabulary_size=size, longest=256, token_limit=self.tokens
        )

    # What is asked. The base's side of each is read before any edit is made.

    def known(self) -> tuple[Question, ...]:
        """The questions that the base knows by the protocol's margin."""
        read: Answers | None = self.kept.get("base knowledge", {}).get("asked")
        base = read if read is not None else self.once("asked", lambda: self.answers(self.data.asked))
        places = knowledge.known_places(base, protocol()["least_margin"])
        return tuple(self.data.asked[place] for place in places)

    def again(self) -> tuple[Question, ...]:
        """The known questions that are asked again under attacks: at most forty."""
        return self.known()[:MOST_ASKED_AGAIN]

    def readings(self, part: str) -> dict[str, Callable[[], Any]]:
        """By name, what a part reads off the model as it stands now."""
        data, shared = self.data, self.shared
        if part == "knowledge":
            examples = knowledge.examples_text(shared.examples)
            return {
                "asked": lambda: self.answers(data.asked),
                "five shots": lambda: self.answers(data.asked, examples),
                "neighbours": lambda: self.answers(data.neighbours),
            }
        if part == "reading":
            sets = {"about": data.texts, "near": data.near_texts, "others": shared.neutral_test}
            marked = self.once("marked", lambda: {name: self.marked(texts) for name, texts in sets.items()})
            return {name: lambda texts=texts: comprehension.read_losses(self.model, texts)
                    for name, texts in marked.items()}  # fmt: skip
        if part == "wording":
            again = self.again()
            forms = {
                f"form {place}": [reworded(one, form) for one in again] for place, form in enumerate(FORMS[1:], start=1)
            }
            return {
                name: lambda questions=questions: self.answers(questions)
                for name, questions in {**forms, **data.facts}.items()
                if questions
            }
        assert part == "general"
        return {
            **{name: lambda asked=asked: self.answers(asked) for name, asked in shared.general.items()},
            "LAMBADA": self.last_words,
            "perplexity": lambda: log_likelihood_by_text(self.model, self.passages(shared.neutral_test)),
        }

    def base(self, part: str) -> dict[str, Any]:
        """The base's readings of a part."""
        return self.once(f"base {part}", lambda: {name: read() for name, read in self.readings(part).items()})

    def last_words(self) -> list[float]:
        """The log-likelihood of each LAMBADA passage's last word."""
        asked = [Question(context, (" " + word, " the"), 0) for context, word in self.shared.lambada]
        return self.answers(asked).totals[:, 0].tolist()

    def neutral(self, test: bool) -> tuple[Passages, Any]:
        """Neutral passages and the base's predictions on them."""
        texts = self.shared.neutral_test if test else self.shared.neutral
        passages = self.once(f"neutral {test}", lambda: self.passages(texts))
        return passages, self.once(f"neutral base {test}", lambda: measures.every_position(self.model, passages))

    def openings(self) -> tuple[Passages, Any]:
        """The first six words of neutral sentences, and the base's next token after them."""
        prompts = [" ".join(text.split()[:6]) for text in self.shared.neutral_test[:60]]
        passages = self.once("openings", lambda: self.passages(prompts))
        return passages, self.once("openings base", lambda: measures.last_position(self.model, passages))


# One edit.


def session_of(bench: Bench, model_folder: str, words: Sequence[str], sections: dict[str, Any]) -> Any:
    """A session that makes edits of the concept from these words."""
    recipe = parse_recipe(
        {
            "model": model_folder,
            "concepts": [{"name": "concept", "words": list(words), "strength": 1.0}],
            **{name: dict(values) for name, values in sections.items()},
        }
    )
    items = replace(bench.data, name="concept").items(bench.shared.neutral)
    return replace(rotate_edit.open(recipe), items=items, kept={"model": bench.model})


def make_edit(session: Any, method: str, sections: dict[str, Any]) -> Edit:
    """The method's edit at strength 1."""
    made = make_method(method, sections.get("edit", {}).get("settings", {}))
    return session.build([made], session.locate([made]))[method]


def solve(bench: Bench, edit: Edit, budget: float) -> tuple[float, float]:
    """The largest strength within the budget, and the divergence there."""
    passages, base = bench.neutral(test=False)

    def nats(strength: float) -> float:
        with applied(bench.model, edit.at(strength)):
            found = collateral_kl(bench.model, passages, base, draws=1).value
        return found if math.isfinite(found) else math.inf

    seen: dict[float, float] = {}

    def measured(strength: float) -> float:
        seen[strength] = nats(strength)
        return min(seen[strength], 1e6)

    cross(measured, budget, falling=False, near=NEAR, steps=12)
    within = [strength for strength, found in seen.items() if found <= NEAR * budget]
    if not within:
        return 0.0, 0.0
    return max(within), seen[max(within)]


# What is measured of it.


def rounded(values: Any) -> list[float]:
    """Numbers short enough to be kept for every item."""
    return [float(f"{value:.4g}") for value in np.asarray(values, dtype=float).tolist()]


def compared(base: Answers, edited: Answers) -> dict[str, Any]:
    """Two models' answers: on all questions right or wrong, on the known ones the fall of the log-odds."""
    known = knowledge.known_places(base, protocol()["least_margin"])
    found: dict[str, Any] = {
        "n": len(base),
        "known": len(known),
        "chance": base.chance,
        "base accuracy": float(base.right().mean()),
        "accuracy": float(edited.right().mean()),
        "kept of all": knowledge.accuracy_kept(base, edited).plain(),
    }
    if len(known):
        before, after = base.of(known), edited.of(known)
        found |= {
            "known chance": before.chance,
            "kept": knowledge.accuracy_kept(before, after).plain(),
            "drop": knowledge.log_odds_drop(before, after).plain(),
            "drop a character": knowledge.log_odds_drop(before, after, "character").plain(),
            "right": [int(one) for one in after.right()],
            "drops": rounded(before.log_odds() - after.log_odds()),
        }
    return found


def rises(base: dict[str, Losses], edited: dict[str, Losses]) -> dict[str, Any]:
    """How far losses rose, by texts."""
    found: dict[str, Any] = {}
    estimates = {name: comprehension.rise(base[name], edited[name], seed=seed) for seed, name in enumerate(base)}
    for name, estimate in estimates.items():
        found[name] = statistics.measure(estimate).plain()
    found["words"] = statistics.measure(comprehension.rise(base["about"], edited["about"], listed=True)).plain()
    found["selectivity"] = comprehension.selectivity(estimates["about"], estimates["others"]).plain()
    found["against neighbours"] = comprehension.selectivity(estimates["about"], estimates["near"]).plain()
    return found


def measure_part(bench: Bench, part: str) -> dict[str, Any]:
    """One part of the measures, with the edit switched on."""
    base = bench.base(part)
    edited = {name: read() for name, read in bench.readings(part).items()}
    if part == "reading":
        return rises(base, edited)
    if part != "general":
        return {name: compared(base[name], edited[name]) for name in edited}
    found: dict[str, Any] = {
        name: compared(base[name], edited[name]) for name in edited if name not in ("LAMBADA", "perplexity")
    }
    change = np.array(edited["LAMBADA"]) - np.array(base["LAMBADA"])
    found["LAMBADA log-likelihood"] = statistics.mean(change).against(0).plain()
    (before, counts), (after, _) = base["perplexity"], edited["perplexity"]
    rise = statistics.ratio_of_sums((before - after).numpy(), counts.numpy())
    found["log perplexity"] = rise.against(0).plain()
    passages, known = bench.neutral(test=True)
    found["neutral KL"] = collateral_kl(bench.model, passages, known).plain()
    prompts, first = bench.openings()
    found["first-token KL"] = measures.first_token_kl(bench.model, prompts, first).plain()
    return found


def ready(bench: Bench, part: str) -> None:
    """Read what a part needs of the base, before an edit is switched on."""
    if part in ("knowledge", "reading", "wording", "general"):
        bench.base(part)
    if part == "general":
        bench.neutral(test=True)
        bench.openings()
    if part == "hints" and "base attacked none" not in bench.kept:
        attacked(bench, "base")
    if part == "relearning" and not any(name.startswith("base attacked full") for name in bench.kept):
        relearned(bench, "base")


def drop_after(bench: Bench, name: str, edited: Answers) -> dict[str, Any]:
    """The fall of the log-odds under an attack, against the base under the same attack."""
    base: Answers = bench.kept[f"base attacked {name}"]
    return {
        "drop": knowledge.log_odds_drop(base, edited).plain(),
        "accuracy": float(edited.right().mean()),
        "base accuracy": float(base.right().mean()),
        "drops": rounded(base.log_odds() - edited.log_odds()),
    }


def noted(bench: Bench, who: str, name: str, answers: Answers, found: dict[str, Any]) -> None:
    """Keep the base's answers under an attack, or compare the edited model's with them."""
    if who == "base":
        bench.kept[f"base attacked {name}"] = answers
    else:
        found[name] = drop_after(bench, name, answers)


def attacked(bench: Bench, who: str) -> dict[str, Any]:
    """The attacks that take no training. For the base it only keeps the answers."""
    found: dict[str, Any] = {}
    if not bench.again():
        return found
    noted(bench, who, "none", bench.answers(bench.again()), found)
    noted(bench, who, "definition", bench.answers(bench.again(), bench.data.definition + "\n\n"), found)
    with attacks.quantised(bench.model):
        noted(bench, who, "4 bits", bench.answers(bench.again()), found)
    count = bench.model.config.get_text_config().num_hidden_layers
    layers = sorted({int(share * count) for share in STEERED_AT})
    prompts = bench.passages(bench.data.validation)
    means = attacks.residual_means(bench.model, prompts, layers)
    if who == "base":
        bench.kept["residual means"] = means
        bench.kept["base attacked steering"] = bench.kept["base attacked none"]
        return found
    vectors = {layer: bench.kept["residual means"][layer] - means[layer] for layer in layers}

    def loss() -> float:
        sums, counts = log_likelihood_by_text(bench.model, prompts)
        return -float(sums.sum() / counts.sum())

    layer = attacks.best_layer(bench.model, vectors, loss)
    with attacks.steered(bench.model, layer, vectors[layer]):
        noted(bench, who, "steering", bench.answers(bench.again()), found)
    found["steering"]["layer"] = layer
    return found


def relearned(bench: Bench, who: str) -> dict[str, Any]:
    """Relearning, full and by LoRA, after each number of steps."""
    found: dict[str, Any] = {}
    if not bench.again():
        return found
    for name, how in (("full", attacks.FULL), ("LoRA", attacks.LORA)):
        answers = attacks.relearn_steps(
            bench.model, bench.tokenizer, bench.data.paragraphs, replace(how, steps=bench.steps),
            lambda: bench.answers(bench.again()),
        )  # fmt: skip
        for step, one in answers.items():
            noted(bench, who, f"{name} {step}", one, found)
    return found


def unlisted(bench: Bench, folder: str, method: str, sections: dict[str, Any], budget: float) -> list[dict[str, Any]]:
    """The mass that an edit of one half of the words leaves of the other half's, both ways."""
    found = []
    texts = bench.passages([*bench.data.texts, *bench.data.near_texts])
    for half, (given, others) in enumerate(halves(bench.data.words)):
        session = session_of(bench, folder, given, sections)
        held_out = find_tokens(
            "held-out words", others, session.tokenizer, list(session.vocabulary.texts), required=False
        ).ids
        held_out = held_out[~torch.isin(held_out, session.tokens[0].ids)]
        before = mass_by_text(bench.model, texts, held_out)
        if not len(held_out) or not float(before[1].sum()):
            continue
        edit = make_edit(session, method, sections)
        strength, _ = solve(bench, edit, budget)
        with applied(bench.model, edit.at(strength)):
            left = mass_left(bench.model, texts, held_out, before)
        found.append({"half": half, "strength": strength, "left": left.plain()})
    return found


def measure(
    bench: Bench, folder: str, label: str, parts: Sequence[str], budget: float, cell: dict[str, Any]
) -> Iterator[None]:
    """Fill a cell with its strength and the parts that it lacks; stops after each, so that it can be kept."""
    method, _, text = label.partition(" ")
    sections = json.loads(text) if text else {}
    missing = [part for part in parts if part not in cell]
    if not missing:
        return
    bench.neutral(test=False)
    started = time.monotonic()
    edit = make_edit(session_of(bench, folder, bench.data.words, sections), method, sections)
    cell.setdefault("seconds to make", round(time.monotonic() - started, 1))
    if "strength" not in cell:
        cell["strength"], cell["KL"] = solve(bench, edit, budget)
        yield
    for part in missing:
        ready(bench, part)
        started = time.monotonic()
        if part == "unlisted":
            cell[part] = unlisted(bench, folder, method, sections, budget)
        else:
            with applied(bench.model, edit.at(cell["strength"])):
                if part == "hints":
                    cell[part] = attacked(bench, "edited")
                elif part == "relearning":
                    cell[part] = relearned(bench, "edited")
                else:
                    cell[part] = measure_part(bench, part)
        cell.setdefault("seconds", {})[part] = round(time.monotonic() - started, 1)
        yield


@contextmanager
def told(what: str) -> Iterator[None]:
    """Say how long something took."""
    started = time.monotonic()
    yield
    print(f"{what}: {time.monotonic() - started:.0f} s", flush=True)


def main() -> None:
    """Measure what is missing, and write the JSON and the Markdown after every part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--choose", action="store_true", help="the concepts that methods are chosen on")
    which.add_argument("--final", action="store_true", help="the concepts of the final table")
    parser.add_argument("--models", type=Path, required=True, help="a folder with one folder for each model")
    parser.add_argument("--data", type=Path, required=True, help="the folder of evaluation data")
    parser.add_argument("--only", default="", help="names of models, separated by commas")
    parser.add_argument("--concepts", default="", help="names of concepts, separated by commas")
    parser.add_argument(
        "--method", action="append", required=True, help="a name, or a name and recipe sections as JSON"
    )
    parser.add_argument("--against", help="the method that the table compares with all others")
    parser.add_argument("--parts", default=",".join(PARTS), help=f"of {', '.join(PARTS)}")
    parser.add_argument("--general", type=int, default=100, help="items of each general task")
    parser.add_argument("--questions", type=int, default=100, help="questions of each kind about a concept")
    parser.add_argument("--tokens", type=int, default=2000, help="tokens of each set of texts")
    parser.add_argument("--steps", default="", help="steps of relearning; the protocol's when left out")
    parser.add_argument("--output", type=Path, required=True, help="file name without its ending")
    options = parser.parse_args()
    fixed = protocol()
    names = fixed["choose" if options.choose else "final"]
    wanted = [name for name in names if not options.concepts or name in options.concepts.split(",")]
    steps = tuple(int(step) for step in options.steps.split(",")) if options.steps else fixed["relearning_steps"]
    file = options.output.with_suffix(".json")
    content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {"cells": {}}
    content |= {
        "date": date.today().isoformat(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "table": "choosing" if options.choose else "final",
        "budget": fixed["budget"],
        "against": options.against or options.method[0],
        "questions": options.questions,
        "general": options.general,
        "tokens": options.tokens,
    }
    shared = read_shared(options.data, options.general, fixed["seed"])
    for key in [key for key in fixed["models"] if not options.only or key in options.only.split(",")]:
        folder = str(options.models / key)
        model, tokenizer = load_model(folder), rotate_edit.load_tokenizer(rotate_edit.open_checkpoint(folder))
        for name in wanted:
            bench = Bench(
                model,
                tokenizer,
                read_concept(options.data, name, options.questions, fixed["seed"]),
                shared,
                tuple(steps),
                options.tokens,
            )
            for label in options.method:
                cell = content["cells"].setdefault(f"{key} | {name} | {label}", {})
                with told(f"{key}, {name}, {label}"):
                    for _ in measure(bench, folder, label, options.parts.split(","), fixed["budget"], cell):
                        write_atomically(file, json.dumps(content, indent=1) + "\n")
                        write_atomically(options.output.with_suffix(".md"), markdown(content))
    write_atomically(options.output.with_suffix(".md"), markdown(content))


if __name__ == "__main__":
    main()
