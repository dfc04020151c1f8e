"""What a report says, as plain data.

An evaluation.json goes in and the parts of a page come out. There are no files and no markup.
"""

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from rotate_edit.channels.locators import find_locator
from rotate_edit.edits.methods import declaration, method_names
from rotate_edit.errors import BadInput
from rotate_edit.evaluation.metrics import all_metrics
from rotate_edit.models.architectures import parse_neuron
from rotate_edit.reporting.figures import EditedNeuron, ForestRow

CLEAR = 0.05
CHIP_SIZES = 5
UNITS = {
    "accuracy": ("accuracy, points", 100.0),
    "probability": ("probability of the right word, points", 100.0),
    "perplexity": ("perplexity (lower is better)", 1.0),
}


def variant_of(result: Mapping[str, Any]) -> dict[str, Any]:
    """Find the run's own edit among the variants.

    Args:
        result: The content of an evaluation.json.

    Returns:
        The variant. Empty when nothing was measured.
    """
    return next(iter((result.get("variants") or {}).values()), {})


def headline(result: Mapping[str, Any]) -> str:
    """Say what happened, in a sentence or two.

    Args:
        result: The content of an evaluation.json.

    Returns:
        The sentences.
    """
    if result.get("failure"):
        return str(result["failure"])
    names = ", ".join(concept["name"] for concept in result["concepts"])
    return " ".join([f"Edited: {names}.", *variant_of(result).get("words", [])])


def title(result: Mapping[str, Any]) -> str:
    """Say what was done, in a few words.

    Args:
        result: The content of an evaluation.json.

    Returns:
        The title.
    """
    if result.get("failure"):
        return "Nothing was edited"
    parts = []
    for concept in result["concepts"]:
        strength = concept["strength"]
        verb = "amplified" if isinstance(strength, int | float) and strength < 0 else "suppressed"
        parts.append(f"{concept['name']} {verb}")
    return ", ".join(parts)


def tiles(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """List the measures that exist, in the order of the metrics.

    Args:
        result: The content of an evaluation.json.

    Returns:
        For each its `name`, `title`, `note`, the `measure` itself, and whether it is a `share`.
    """
    measures = {**variant_of(result).get("measures", {}), **(result.get("summary") or {})}
    return [
        {
            "name": metric.name,
            "title": metric.title,
            "note": metric.note,
            "measure": measures[metric.name],
            "share": metric.unit == "share",
        }
        for metric in all_metrics()
        if metric.tile and (measures.get(metric.name) or {}).get("value") is not None
    ]


def outcome(result: Mapping[str, Any]) -> list[dict[str, str]]:
    """Say what an edit that suppresses did: to the knowledge, to the words, to reading, and to everything else.

    "Removed" is said of knowledge alone, and only where less than half is left with its whole interval. "Silenced" is
    said of words alone.

    Args:
        result: The content of an evaluation.json.

    Returns:
        For each of the four a `name`, a `verdict` in a few words, and a `sentence` with the figures. Empty where
        nothing was measured, or every concept was amplified.
    """
    plan, measures = result.get("plan") or {}, variant_of(result).get("measures") or {}
    if not measures or plan.get("only_amplifies"):
        return []
    measured = {name: value for name, value in measures.items() if value.get("value") is not None}
    parts = [_knowledge(measured), _words(measured), _reading(measured), _rest(measured)]
    names = ("knowledge", "words", "reading", "everything else")
    return [{"name": name, "verdict": verdict, "sentence": sentence} for name, (verdict, sentence) in zip(names, parts)]


NOT_MEASURED = "not measured"


def _knowledge(measures: Mapping[str, Any]) -> tuple[str, str]:
    kept, drop = measures.get("knowledge_kept"), measures.get("knowledge_drop")
    if kept is None or drop is None:
        return NOT_MEASURED, "The base knew too few questions about the concept by a margin, or none were asked."
    if kept["high"] < 0.5:
        verdict = "removed"
    elif kept["high"] < 1 or drop["low"] > 0:
        verdict = "weakened, not removed"
    else:
        verdict = "no change shown"
    return verdict, (
        f"Of {kept['n']} questions that the base knew, {_percent(kept)} of the accuracy above chance is left. The "
        f"right answers lost {_nats(drop)} of log-odds."
    )


def _words(measures: Mapping[str, Any]) -> tuple[str, str]:
    left = measures.get("concept_mass_fraction")
    if left is None:
        return NOT_MEASURED, "No text names the concept by a word that is one token."
    verdict = "silenced" if left["high"] <= 0.2 else "lowered" if left["high"] < 1 else "no change shown"
    return verdict, f"Where texts have one of its words, {_percent(left)} of the words' probability is left."


def _reading(measures: Mapping[str, Any]) -> tuple[str, str]:
    own, rest = measures.get("comprehension_rise"), measures.get("comprehension_elsewhere")
    apart = measures.get("comprehension_selectivity")
    if own is None or rest is None or apart is None:
        return NOT_MEASURED, "There are no texts with and without the concept."
    verdict = "harder on its subject" if apart["low"] > 0 else "no harder on its subject than elsewhere"
    return verdict, (
        f"The loss on text about it, outside its words, rose by {_nats(own)} a token; on other text by {_nats(rest)}."
    )


def _rest(measures: Mapping[str, Any]) -> tuple[str, str]:
    damage, kept = measures.get("collateral_kl"), measures.get("general_kept")
    near = measures.get("neighbours_kept")
    if damage is None and kept is None:
        return NOT_MEASURED, "Nothing else was asked."
    said = []
    if kept is not None:
        said.append(f"{_percent(kept)} of other knowledge is left.")
    if near is not None:
        said.append(f"{_percent(near)} of what it knew of neighbouring concepts is left.")
    if damage is not None:
        said.append(f"Predictions on other text moved by a KL divergence of {_nats(damage)}.")
    worst = min([1.0, *(found["low"] for found in (kept, near) if found is not None)])
    return "kept" if worst >= 0.9 else "some was lost, or too little was asked", " ".join(said)


def _percent(measure: Mapping[str, Any]) -> str:
    value, low, high = (_small(100 * measure[key]) for key in ("value", "low", "high"))
    return f"{value} % ({low} to {high})"


def _small(percent: float) -> str:
    return "under 0.01" if 0 < percent < 0.01 else f"{percent:.3g}"


def _nats(measure: Mapping[str, Any]) -> str:
    return f"{measure['value']:.2g} nats ({measure['low']:.2g} to {measure['high']:.2g})"


def method_sentence(result: Mapping[str, Any]) -> str:
    """Say what the run's edit method does, in a sentence or two.

    Args:
        result: The content of an evaluation.json.

    Returns:
        The sentences. Empty for a method that is not known here.
    """
    name = str(result.get("chosen_method") or "")
    if name not in method_names():
        return ""
    about = declaration(name)
    told = f"The edit is {name}: {about.title}."
    if find_locator(about.locator).reads:
        return told
    return f"{told} It does not ask which channels carry the concept: they are shown, and do not decide."


def forest_rows(result: Mapping[str, Any]) -> list[ForestRow]:
    """List the tasks' differences for the forest plot.

    Only differences that were used are listed. The concept's own are on a scale of their own.

    Args:
        result: The content of an evaluation.json.

    Returns:
        The rows, those of the concept first.
    """
    rows = []
    for row in variant_of(result).get("rows") or []:
        change = row["difference"]
        unit, factor = UNITS.get(row.get("scale", "accuracy"), UNITS["accuracy"])
        bounds = [change.get(key) for key in ("value", "low", "high")]
        if row.get("used", True) and all(isinstance(bound, int | float) and math.isfinite(bound) for bound in bounds):
            group = row.get("group", "general")
            value, low, high = (bound * factor for bound in bounds)
            rows.append(
                ForestRow(
                    label=str(row["title"]),
                    group=group,
                    panel=f"{'the concept' if group == 'concept' else 'the rest'}: {unit}",
                    value=value,
                    low=low,
                    high=high,
                    values=f"{row['base']['value']:.3g} → {row['edited']['value']:.3g}, n {row['n']}",
                    clear=(row.get("p_holm") if row.get("p_holm") is not None else 1.0) < CLEAR,
                )
            )
    return sorted(rows, key=lambda row: (row.group != "concept", row.panel))


def edited_neurons(result: Mapping[str, Any], concept: str) -> list[EditedNeuron]:
    """Find where the vectors edited for a concept stand.

    What is no neuron (a token's row) is left out.

    Args:
        result: The content of an evaluation.json.
        concept: The concept's name.

    Returns:
        The edited neurons.
    """
    width = int((result.get("model") or {}).get("neurons") or 0)
    found = []
    for vector in result.get("neurons") or []:
        if vector.get("concept") == concept:
            try:
                neuron = parse_neuron(str(vector.get("address")))
            except BadInput:
                continue
            place = (neuron.expert or 0) * width + neuron.neuron
            found.append(EditedNeuron(neuron.layer, place, str(vector.get("matrix"))))
    return found


def layer_counts(neurons: Sequence[EditedNeuron]) -> dict[int, int]:
    """Count the vectors that were edited in each layer that has one.

    Args:
        neurons: The edited neurons.

    Returns:
        The counts by layer, ascending.
    """
    layers = sorted({neuron.layer for neuron in neurons})
    return {layer: sum(neuron.layer == layer for neuron in neurons) for layer in layers}


def channel_rows(result: Mapping[str, Any], concept: Mapping[str, Any]) -> list[dict[str, Any]]:
    """List the channels that located a concept, each with its tokens as sized chips.

    Args:
        result: The content of an evaluation.json.
        concept: The concept, one of the result's.

    Returns:
        One row for each channel, the best supported first.
    """
    own = {str(token) for token in concept.get("tokens") or []}
    rows: dict[Any, dict[str, Any]] = {}
    for channel in result.get("selected_channels") or []:
        if channel.get("concept", concept["name"]) == concept["name"]:
            tokens = [str(token) for token in channel.get("tokens") or []]
            scores = [abs(float(score)) for score in channel.get("z_scores") or []]
            scores += [0.0] * (len(tokens) - len(scores))
            largest = max([1e-9, *scores])
            chips = [
                {"text": token, "z": score, "own": token in own, "size": max(1, round(CHIP_SIZES * score / largest))}
                for token, score in zip(tokens, scores)
            ]
            found = {**channel, "chips": chips}
            place = (str(channel.get("name")).split("#")[0], tuple(tokens))
            # Two starts of the search may end in the same channel: it is shown once, under both names.
            if place in rows:
                found["name"] = f"{rows[place]['name']}, #{str(channel.get('name')).split('#')[-1]}"
            rows[place] = found
    return sorted(rows.values(), key=lambda row: -float(row.get("support") or 0))


def pieces(text: str, pattern: re.Pattern[str] | None) -> list[tuple[str, bool]]:
    """Cut a text where a word of the concept stands.

    Args:
        text: The text.
        pattern: Matches the words of the concept. None for no words.

    Returns:
        Pairs of a piece and whether it is such a word.
    """
    if pattern is None:
        return [(text, False)]
    found, start = [], 0
    for match in pattern.finditer(text):
        found += [(text[start : match.start()], False), (match.group(), True)]
        start = match.end()
    return [piece for piece in [*found, (text[start:], False)] if piece[0]]


def concept_words(result: Mapping[str, Any]) -> list[str]:
    """List all words of all concepts.

    Args:
        result: The content of an evaluation.json.

    Returns:
        The words as a recipe gave them, and in the plural when it asked for that.
    """
    return [str(word) for concept in result["concepts"] for word in concept.get("words") or [] if str(word).strip()]


def cost(result: Mapping[str, Any]) -> dict[str, Any]:
    """Summarise what a run took.

    Args:
        result: The content of an evaluation.json.

    Returns:
        `steps` has the seconds of every step with their share of the whole. `seconds` is all of them together. `memory`
        is the peak memory in megabytes. `models` has the seconds of each model by its name.
    """
    seconds = {str(name): float(value) for name, value in (result.get("cost") or {}).get("seconds", {}).items()}
    whole = sum(seconds.values())
    return {
        "steps": [(name, value, value / whole if whole else 0.0) for name, value in seconds.items()],
        "seconds": whole,
        "memory": (result.get("cost") or {}).get("peak_memory_mb"),
        "models": {str(name): float(value) for name, value in (result.get("seconds") or {}).items()},
    }


def provenance(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    """List where the numbers come from.

    Args:
        result: The content of an evaluation.json.

    Returns:
        Pairs (name, value) that are all text.
    """
    known = result.get("provenance") or {}
    base, model = known.get("base") or {}, result.get("model") or {}
    tensors = base.get("tensors") or {}
    rows = [
        ("base model", base.get("source") or model.get("source")),
        ("revision", base.get("revision")),
        ("family", model.get("family")),
        ("shape", _shape(model)),
        (f"weights, SHA-256 of the hashes of {len(tensors)} tensors", _digest(tensors) if tensors else None),
        *((f"{name}, SHA-256", value) for name, value in (base.get("files") or {}).items()),
        *((f"{name}, SHA-256 of the header", value) for name, value in (base.get("headers") or {}).items()),
        ("rotate_edit", known.get("rotate_edit")),
        ("Python", known.get("python")),
        *(known.get("versions") or {}).items(),
        ("seed", known.get("seed")),
        ("device", known.get("device")),
        ("threads", known.get("threads")),
        ("made", known.get("created")),
        *(
            (f"items {name}, version {task.get('version')}, SHA-256", task.get("content"))
            for name, task in (result.get("definitions") or {}).items()
        ),
    ]
    return [(str(name), str(value)) for name, value in rows if value is not None and value != ""]


def _shape(model: Mapping[str, Any]) -> str | None:
    if not model.get("layers"):
        return None
    tied = "tied" if model.get("tied") else "untied"
    return (
        f"{model['layers']} layers of {model['neurons']} neurons, width {model['hidden_size']}, "
        f"{model['vocabulary_size']} tokens, {tied} embeddings"
    )


def _digest(tensors: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(dict(tensors), sort_keys=True).encode()).hexdigest()
