"""What limits an edit of the last layer: a free low-rank fit beside edits that know less and more, at one removal.

`python evals/limits.py --model ../shared/models/bookworm --concepts evals/bookworm/concepts.yaml --half dev
--texts ../shared/corpora/books --output evals/results/limits-bookworm`. These edits change the last layer
alone, so every row is computed exactly from what that layer's neurons and the residual stream hold on the texts. It
takes the package's own fit and closed forms apart, so it imports them where they are: `edits.low_rank`,
`edits.directions` and `models.output_head` are no part of the public API.
"""

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from matched import proof_of
from material import Material, add_arguments, materials, open_recipe, provenance, write_result
from torch import Tensor

from rotate_edit import Passages, cross, load_model, make_method, parse_recipe, record
from rotate_edit.edits.directions import concept_mean, key_coefficients, token_covariance
from rotate_edit.edits.low_rank import FitAim, fit_change, whitened
from rotate_edit.models.output_head import OutputHead, Positions, predicted

TARGET, RIDGE = 0.1, 0.03
OURS, FLOOR = "the whole matrix, fitted", "the concept's own logits lowered everywhere"
GIVEN = "the concept's direction, a key that is given its probability"
RANK_ONE, LONGER = "one key, one direction (rank-one)", "the key from twice the text"


@dataclass(frozen=True)
class LastLayerTexts:
    """What the last layer holds on texts, and how they go on.

    Attributes:
        neurons: Activations of its neurons, float32 [n, neurons].
        residual: The residual stream before the final norm, float32 [n, d_model].
        following: The next token at each position, int64 [n]; -1 at a text's end.
    """

    neurons: Tensor
    residual: Tensor
    following: Tensor

    def only(self, mask: Tensor) -> "LastLayerTexts":
        """The positions of a mask."""
        return LastLayerTexts(self.neurons[mask], self.residual[mask], self.following[mask])


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


METHOD = make_method("silence-words")
Variant = Callable[[LastLayerTexts, float], Tensor]


def last_layer(model: Any, passages: Passages) -> LastLayerTexts:
    """What the last layer holds on texts."""
    last, parts = model.config.num_hidden_layers - 1, []
    held = record(model, passages, [last], None)[last]
    for batch, lengths in zip(passages.batches, passages.lengths):
        real = torch.arange(batch.shape[1]) < lengths[:, None]
        following = torch.full_like(batch, -1)
        following[:, :-1] = torch.where(real[:, 1:], batch[:, 1:], -1)
        parts.append(following[real])
    return LastLayerTexts(held.neurons, held.residual, torch.cat(parts))


def variants(
    head: Head,
    output_head: OutputHead,
    own: Positions,
    more: Positions,
    aim: FitAim,
    direction: Tensor,
    metric: Tensor,
    steps: int = METHOD.settings["steps"],
) -> dict[str, Variant]:
    """Every edit by name: from positions and a strength to log-probabilities.

    Args:
        head: The head as two tensors.
        output_head: The same as the fit takes it.
        own: What the last layer holds on self-generated text.
        more: The same on twice as much of it.
        aim: What the fit is for.
        direction: Of the concept, float64 [d_model].
        metric: The inverse cost that the direction minimises, with what is to be kept projected out, float64 [d_model,
            d_model].
        steps: How many steps the fit has.
    """
    ids = aim.ids
    found: dict[str, Tensor] = {}
    rows = (head.unembedding * head.gain).double()
    rows = rows - rows.mean(0)

    def moments(where: Positions) -> tuple[Tensor, Tensor]:
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
    start = (size * key(second, mean), direction)
    (fitted,) = fit_change(
        whitened(own, ridge=RIDGE), output_head, predicted(own, output_head), start, aim, proximal_weight=0.0,
        seed=0, steps=steps,
    )  # fmt: skip
    left, right = fitted.factors(METHOD.settings["rank"])
    found[OURS] = -(left.double() @ right.double())
    found[RANK_ONE] = key(second, mean)[:, None] * direction
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

    def given(where: LastLayerTexts, strength: float) -> Tensor:
        known = head(where.residual)[:, ids].exp().sum(1)
        pushed = strength * known / (known + 0.1) * head.size(where.residual)
        return head(where.residual - pushed[:, None] * direction.float())

    def lowered(where: LastLayerTexts, strength: float) -> Tensor:
        logits = head(where.residual).clone()
        logits[:, ids] -= strength
        return logits.log_softmax(1)

    named = {name: linear(change) for name, change in found.items()}
    return named | {GIVEN: given, FLOOR: lowered}


def at_target(
    variant: Variant, head: Head, texts: dict[str, LastLayerTexts], ids: Tensor, near_ids: Tensor
) -> dict[str, Any]:
    """Collateral KL, perplexity rise and neighbours' mass at the strength that leaves the target; None out of reach."""
    concept = texts["concept"].only(torch.isin(texts["concept"].following, ids))
    base = float(head(concept.residual)[:, ids].exp().sum())

    def left(strength: float) -> float:
        return float(variant(concept, strength)[:, ids].exp().sum()) / base

    found = cross(left, TARGET, start=0.5, steps=9)
    if not found.reached:
        return {"kl": None, "perplexity": None, "near": None}
    others = texts["others"]
    before, after = head(others.residual), variant(others, found.high)
    predicted = others.following >= 0
    lost = (before - after)[predicted].gather(1, others.following[predicted][:, None]).mean()
    near = texts["near"].only(torch.isin(texts["near"].following, near_ids))
    mass = [values[:, near_ids].exp().sum() for values in (variant(near, found.high), head(near.residual))]
    return {
        "kl": float((before.exp() * (before - after)).sum(1).mean()),
        "perplexity": math.expm1(float(lost)),
        "near": float(mass[0] / mass[1]),
    }


def measure(model: Any, material: Material, name: str, head: Head, read: dict[int, Positions]) -> dict[str, Any]:
    """One concept: every variant at the target.

    read: what the last layer holds on self-generated text, by its tokens; filled where it is empty."""
    concept = {"name": material.name, "words": material.words, "strength": 1.0, "neighbour_words": material.near_words}
    recipe = parse_recipe({"model": name, "concepts": [concept | {"plurals": material.plurals}]})
    session = open_recipe(recipe, model, material.items)
    groups, tokens = session.locate(), recipe.edit.self_text
    made = session.material(groups)
    for size in (tokens, 2 * tokens):
        if size not in read:
            read[size] = session.with_settings({"edit.self_text": size}).material(groups).positions
    proof, ids = proof_of(model, session, material), session.tokens[0].ids
    assert proof.near is not None
    assert proof.near_ids is not None
    assert made.last_written is not None
    usable, near = ~session.vocabulary.untrained, made.concepts[0].kept
    projection = head.unembedding * head.gain
    covariance = token_covariance(projection[usable])
    rows = torch.stack([concept_mean(projection, words, usable) for words in near]) if near else None
    direction = made.direction(made.concepts[0], groups[0], made.last_written)
    texts = {
        "concept": last_layer(model, proof.concept.passages),
        "others": last_layer(model, proof.others.passages),
        "near": last_layer(model, proof.near.passages),
    }
    close = torch.cat(near).unique() if near else ids[:0]
    aim = FitAim(ids, TARGET, close[~torch.isin(close, ids)], rows)
    found = variants(
        head, made.output_head, read[tokens], read[2 * tokens], aim, direction.write.double(),
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
        "| edit | concepts | KL, times the fit's | perplexity, mean | at most +1 % | neighbours at least 90 % |",
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
    model = load_model(arguments.model).requires_grad_(False)
    norm = model.model.norm
    head = Head(norm.weight.float(), model.get_output_embeddings().weight.float(), norm.variance_epsilon)
    about = provenance("limits.py", parser, arguments)
    results: list[dict[str, Any]] = []
    read: dict[int, Positions] = {}
    for material in materials(arguments):
        results.append(measure(model, material, arguments.model, head, read))
        print(material.name, {name: row["kl"] for name, row in results[-1]["rows"].items()}, flush=True)
    words = (
        f"{len(results)} concepts, every edit at the strength that leaves {TARGET:.0%} of the concept's mass in "
        "held-out text. KL: over all positions of text without the concept, geometric mean over concepts."
    )
    title = "What limits an edit of the last layer"
    write_result(arguments.output, about, {"results": results}, title, words, table(results))


if __name__ == "__main__":
    main()
