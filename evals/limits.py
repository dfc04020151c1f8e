"""What limits an edit of the last layer: a fit without a leash beside edits that know less and more, at one removal.

`python evals/limits.py --model ../shared/models/bookworm --concepts evals/bookworm/concepts.yaml --half dev
--texts ../shared/corpora/books --output evals/results/limits-bookworm`. These edits change the last layer
alone, so every row is computed exactly from what that layer's neurons and the residual stream hold on the texts.
"""

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from matched import load, proof_of
from material import Material, add_arguments, materials, provenance, write_result
from torch import Tensor

from rotate_edit.edits import edit as edits
from rotate_edit.edits.build import neighbours
from rotate_edit.edits.edit import key_coefficients
from rotate_edit.edits.low_rank import Wanted, fit_change, whitened
from rotate_edit.models.batches import Passages, log_probabilities, real_positions
from rotate_edit.models.hooks import recorded
from rotate_edit.models.output_head import OutputHead, Positions, output_head_of
from rotate_edit.models.self_text import write_samples
from rotate_edit.recipe import EditRecipe, parse_recipe
from rotate_edit.session import open_recipe

TARGET, TOKENS, RIDGE = 0.1, 48000, 0.03
OURS, FLOOR = "the whole matrix, fitted", "the concept's own logits lowered everywhere"
KEYED, LONGER = "one key, one direction (keyed)", "the key from twice the text"


@dataclass(frozen=True)
class LayerActivations:
    """Positions of texts: neurons float32 [n, neurons], residual float32 [n, d_model] before the final norm, following
    int64 [n] (-1 at a text's end)."""

    neurons: Tensor
    residual: Tensor
    following: Tensor

    def only(self, mask: Tensor) -> "LayerActivations":
        """The positions of a mask."""
        return LayerActivations(self.neurons[mask], self.residual[mask], self.following[mask])


@dataclass(frozen=True)
class Head:
    """The final norm's gain [d_model] and the unembedding [V, d_model]: from a residual stream to the prediction."""

    gain: Tensor
    unembedding: Tensor
    epsilon: float

    def size(self, residual: Tensor) -> Tensor:
        """The root mean square that the final norm divides by, [n]."""
        return (residual.square().mean(1) + self.epsilon).sqrt()

    def __call__(self, residual: Tensor) -> Tensor:
        """Log-probabilities [n, V]."""
        return (residual / self.size(residual)[:, None] * self.gain @ self.unembedding.T).log_softmax(1)


RANK = EditRecipe().fit_rank
Variant = Callable[[LayerActivations, float], Tensor]


def seen(model: Any, passages: Passages) -> LayerActivations:
    """What the last layer holds on texts."""
    last, parts = model.config.num_hidden_layers - 1, []
    with recorded(model, [last]) as kept:
        for index, _ in enumerate(log_probabilities(model, passages)):
            batch, lengths = passages.batches[index], passages.lengths[index]
            real = real_positions(batch, lengths)
            following = torch.full_like(batch, -1)
            following[:, :-1] = torch.where(real[:, 1:], batch[:, 1:], -1)
            held = [kept[last][name].reshape(*batch.shape, -1)[real].float() for name in ("neurons", "residual")]
            parts.append((*held, following[real]))
    return LayerActivations(*(torch.cat(column) for column in zip(*parts)))


def variants(
    head: Head, tail: OutputHead, own: LayerActivations, more: LayerActivations, wanted: Wanted, direction: Tensor, metric: Tensor
) -> dict[str, Variant]:
    """Every edit by name: from positions and a strength to log-probabilities.

    direction: [d_model] of the concept; metric: [d_model, d_model], the inverse cost that it minimises, with what is to
    be kept projected out.
    """
    ids = wanted.ids
    found: dict[str, Tensor] = {}
    rows = (head.unembedding * head.gain).double()
    rows = rows - rows.mean(0)

    def moments(where: LayerActivations) -> tuple[Tensor, Tensor]:
        felt = (where.neurons / head.size(where.residual)[:, None]).double()
        return felt, head(where.residual).exp()

    felt, chance = moments(own)
    words = chance[:, ids].double()
    concept = words.sum(1)
    second, mean = felt.T @ felt / len(felt), concept @ felt / concept.sum()

    def key(second: Tensor, mean: Tensor) -> Tensor:
        return key_coefficients(second, mean, ridge=RIDGE)

    # The start of the fit, as the package scales it: by the residual stream's size where the concept comes next.
    size = concept @ head.size(own.residual).double() / concept.sum()
    seen_by_fit = whitened(Positions(own.neurons, own.residual, None), ridge=RIDGE)
    start = (size * key(second, mean), direction)
    ((left, right),) = fit_change(seen_by_fit, tail, start, wanted, rank=RANK, leash=0.0, seed=0)
    found[OURS] = -(left.double() @ right.double())
    found[KEYED] = key(second, mean)[:, None] * direction
    felt_more, chance_more = moments(more)
    concept_more = chance_more[:, ids].sum(1).double()
    mean_more = concept_more @ felt_more / concept_more.sum()
    longer = key(felt_more.T @ felt_more / len(felt_more), mean_more)
    found[LONGER] = longer[:, None] * direction
    moved = (rows @ direction).float()
    cost = (chance @ moved.square() - (chance @ moved).square()).double()
    found["places weighted by what moving the concept costs there"] = (
        key((felt * (cost / cost.mean())[:, None]).T @ felt / len(felt), mean)[:, None] * direction
    )
    often = words.sum(0)
    kept = often > 1e-4 * often.sum()
    keys = torch.stack([key(second, place) for place in (words.T @ felt / often[:, None])[kept]])
    directions = rows[ids[kept]] @ metric
    directions = directions / (directions * rows[ids[kept]]).sum(1, keepdim=True)
    found["a key and a direction for every word"] = (keys * (often[kept] / often.sum())[:, None]).T @ directions

    def linear(change: Tensor) -> Variant:
        return lambda where, strength: head(where.residual - strength * (where.neurons @ change.float()))

    def told(where: LayerActivations, strength: float) -> Tensor:
        known = head(where.residual)[:, ids].exp().sum(1)
        pushed = strength * known / (known + 0.1) * head.size(where.residual)
        return head(where.residual - pushed[:, None] * direction.float())

    def lowered(where: LayerActivations, strength: float) -> Tensor:
        logits = head(where.residual).clone()
        logits[:, ids] -= strength
        return logits.log_softmax(1)

    named = {name: linear(change) for name, change in found.items()}
    return named | {"our direction, a key that is told the concept's probability": told, FLOOR: lowered}


def at_target(variant: Variant, head: Head, texts: dict[str, LayerActivations], ids: Tensor, near_ids: Tensor) -> dict[str, Any]:
    """Collateral KL, perplexity rise and neighbours' mass at the strength that leaves the target; None out of reach."""
    concept = texts["concept"].only(torch.isin(texts["concept"].following, ids))
    base = float(head(concept.residual)[:, ids].exp().sum())

    def left(strength: float) -> float:
        return float(variant(concept, strength)[:, ids].exp().sum()) / base

    low, high = 0.0, 0.5
    while left(high) > TARGET:
        low, high = high, 2 * high
        if high > 64:
            return {"kl": None, "perplexity": None, "near": None}
    for _ in range(9):
        middle = (low + high) / 2
        low, high = (middle, high) if left(middle) > TARGET else (low, middle)
    others = texts["others"]
    before, after = head(others.residual), variant(others, high)
    predicted = others.following >= 0
    lost = (before - after)[predicted].gather(1, others.following[predicted][:, None]).mean()
    near = texts["near"].only(torch.isin(texts["near"].following, near_ids))
    mass = [values[:, near_ids].exp().sum() for values in (variant(near, high), head(near.residual))]
    return {
        "kl": float((before.exp() * (before - after)).sum(1).mean()),
        "perplexity": math.expm1(float(lost)),
        "near": float(mass[0] / mass[1]),
    }


def measure(model: Any, material: Material, name: str, samples: dict[int, LayerActivations], head: Head) -> dict[str, Any]:
    """One concept: every variant at the target."""
    concept = {"name": material.name, "words": material.words, "strength": 1.0, "neighbour_words": material.near_words}
    recipe = parse_recipe({"model": name, "concepts": [concept | {"plurals": material.plurals}]})
    opened = replace(open_recipe(recipe), items=material.items)
    for size in (TOKENS, 2 * TOKENS):
        if size not in samples:
            samples[size] = seen(model, write_samples(model, opened.tokenizer, tokens=size, seed=0))
    proof, ids = proof_of(model, opened, material), opened.tokens[0].ids
    assert proof.near is not None
    assert proof.near_ids is not None
    usable = ~opened.vocabulary.untrained
    projection = head.unembedding * head.gain
    near = neighbours(opened, recipe.concepts[0], ids)
    keep = [edits.concept_mean(projection, words, usable) for words in near]
    covariance = edits.token_covariance(projection[usable])
    mean = edits.concept_mean(projection, ids, usable)
    rows = torch.stack(keep) if keep else None
    direction = edits.least_collateral_direction(mean, covariance, ridge=recipe.edit.ridge, keep=rows)
    texts = {
        "concept": seen(model, proof.concept.passages),
        "others": seen(model, proof.others.passages),
        "near": seen(model, proof.near.passages),
    }
    close = torch.cat(near).unique() if near else ids[:0]
    wanted = Wanted(ids, TARGET, close[~torch.isin(close, ids)], rows)
    found = variants(
        head, output_head_of(model), samples[TOKENS], samples[2 * TOKENS], wanted, direction.write.double(),
        _inverse(covariance.double(), recipe.edit.ridge, rows),
    )  # fmt: skip
    return {
        "concept": material.name,
        "rows": {label: at_target(variant, head, texts, ids, proof.near_ids) for label, variant in found.items()},
    }


def _inverse(covariance: Tensor, ridge: float, keep: Tensor | None) -> Tensor:
    damped = covariance + ridge * torch.linalg.eigvalsh(covariance).median() * torch.eye(len(covariance)).double()
    inverse = torch.linalg.inv(damped)
    if keep is None:
        return inverse
    across = inverse @ keep.double().T
    return inverse - across @ torch.linalg.pinv(keep.double() @ across, hermitian=True) @ across.T


def table(results: list[dict[str, Any]]) -> str:
    """By variant: damage as a multiple of the default's (geometric mean), and on how many concepts each limit holds."""
    lines = [
        "| edit | concepts | KL, times fitted | perplexity, mean | at most +1 % | neighbours at least 90 % |",
        "|---|---|---|---|---|---|",
    ]
    for name in results[0]["rows"]:
        pairs = [(result["rows"][name], result["rows"][OURS]) for result in results]
        both = [(row, ours) for row, ours in pairs if row["kl"] is not None and ours["kl"] is not None]
        ratio = math.exp(sum(math.log(row["kl"] / ours["kl"]) for row, ours in both) / len(both))
        rise = sum(row["perplexity"] for row, _ in both) / len(both)
        held = sum(row["perplexity"] <= 0.01 for row, _ in both)
        near = sum(row["near"] >= 0.9 for row, _ in both)
        lines.append(f"| {name} | {len(both)} | {ratio:.2f} | {rise:+.2%} | {held} | {near} |")
    return "\n".join(lines)


def main() -> None:
    """Measure the concepts, print the table, write the JSON and the Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--output", type=Path, required=True, help="path without its ending")
    arguments = parser.parse_args()
    model = load(arguments.model).requires_grad_(False)
    norm = model.model.norm
    head = Head(norm.weight.float(), model.get_output_embeddings().weight.float(), norm.variance_epsilon)
    about = provenance("limits.py", parser, arguments)
    results: list[dict[str, Any]] = []
    samples: dict[int, LayerActivations] = {}
    for material in materials(arguments):
        results.append(measure(model, material, arguments.model, samples, head))
        print(material.name, {name: row["kl"] for name, row in results[-1]["rows"].items()}, flush=True)
    words = (
        f"{len(results)} concepts, every edit at the strength that leaves {TARGET:.0%} of the concept's mass in "
        "held-out text. KL: over all positions of text without the concept, geometric mean over concepts."
    )
    title = "What limits an edit of the last layer"
    write_result(arguments.output, about, {"results": results}, title, words, table(results))


if __name__ == "__main__":
    main()
