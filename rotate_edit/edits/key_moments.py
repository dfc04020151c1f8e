"""Where a concept is written: what neurons do in self-generated text where the concept comes next.

Edit methods that read activations need it. The text is drawn from the model itself, so no corpus is needed. A position
counts by the probability that the model gives the concept there, so no label is needed.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rotate_edit.edits.directions import key_coefficients
from rotate_edit.models.batches import Passages, head_inputs, real_positions
from rotate_edit.models.hooks import recorded
from rotate_edit.models.output_head import OutputHead, Positions, live_logits, logit_factor, rows_at_once

# There are many more positions than features that a head reads, so that hardly any is needed.
EVEN_RIDGE = 1e-3


@dataclass(frozen=True)
class KeyMoments:
    """Moments of neurons' activations over texts. The activations are the inputs of the MLP's last matrix.

    The n neurons are those of all layers, one layer after another.

    Attributes:
        rows: By layer the neurons looked at, int64, ascending.
        second: The mean product of two activations over all positions, float64 [n, n].
        means: The mean activation weighted by the probability of the group's tokens as the next one, float64 [groups,
            n].
        size: The residual stream's root mean square before the final norm, weighted likewise, float64 [groups].
        metric: float64 [d_model, d_model]. `e' metric e` is twice the mean KL divergence of a small step e of the
            residual stream, gain left out. None when no head was given.
    """

    rows: Mapping[int, Tensor]
    second: Tensor
    means: Tensor
    size: Tensor
    metric: Tensor | None = None


def key_moments(
    model: Any,
    texts: Passages,
    rows: Mapping[int, Tensor],
    groups: Sequence[Tensor],
    head: Tensor | None = None,
    *,
    chance: Tensor | None = None,
) -> KeyMoments:
    """Measure the moments in one pass over texts.

    Args:
        model: A loaded transformers model.
        texts: The tokenised texts.
        rows: By layer the neurons wanted, int64.
        groups: Token ids of each group, int64.
        head: The unembedding, float32 [V, d_model], for the metric of the predictions. None for no metric.
        chance: The probability of each group at every real position, float32 [groups, n], where it is known. Nothing
            is predicted then, unless for the metric.

    Returns:
        The moments.

    Raises:
        BadInput: For a model whose layers are mixtures of experts.
    """
    return _moments(_read(model, texts, rows, predict=chance is None or head is not None), rows, groups, head, chance)


def last_moments(
    seen: Positions,
    tail: OutputHead,
    layer: int,
    groups: Sequence[Tensor],
    head: Tensor | None = None,
    *,
    chance: Tensor | None = None,
) -> KeyMoments:
    """Measure the moments of all neurons of the last layer, from positions that are read already.

    Args:
        seen: What the last layer holds at positions of texts.
        tail: The output head.
        layer: Index of the last layer.
        groups: Token ids of each group, int64.
        head: The unembedding, float32 [V, d_model], for the metric of the predictions. None for no metric.
        chance: The probability of each group at every position, float32 [groups, n], where it is known.

    Returns:
        The moments.
    """
    step = rows_at_once(tail.head(tail.norm(seen.residual[:1])).shape[1])
    predict = chance is None or head is not None

    def read() -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
        for neurons, residual in zip(seen.neurons.split(step), seen.residual.split(step)):
            yield neurons, residual, tail.log_probabilities(residual) if predict else None

    return _moments(read(), {layer: torch.arange(seen.neurons.shape[1])}, groups, head, chance)


def _read(
    model: Any, texts: Passages, rows: Mapping[int, Tensor], *, predict: bool
) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
    """By batch the neurons looked at, the last residual stream, and the log-probabilities, at every real position."""
    last = model.config.get_text_config().num_hidden_layers - 1
    logits, size = live_logits(model), model.config.get_text_config().vocab_size
    with recorded(model, sorted({*rows, last})) as kept:
        for index, read in enumerate(head_inputs(model, texts)):
            shape = texts.batches[index].shape
            real = real_positions(texts.batches[index], texts.lengths[index]).to(read.device)
            seen = torch.cat(
                [kept[layer]["neurons"].reshape(*shape, -1)[real][:, rows[layer]] for layer in sorted(rows)], 1
            )
            parts = zip(
                *(every.split(rows_at_once(size)) for every in (seen, kept[last]["residual"][real], read[real]))
            )
            for neurons, residual, given in parts:
                found = logits(given).float().log_softmax(-1) if predict else None
                yield neurons.float(), residual.float(), found


def _moments(
    read: Iterable[tuple[Tensor, Tensor, Tensor | None]],
    rows: Mapping[int, Tensor],
    groups: Sequence[Tensor],
    head: Tensor | None,
    known: Tensor | None,
) -> KeyMoments:
    total = sum(len(wanted) for wanted in rows.values())
    second = torch.zeros(total, total, dtype=torch.float64)
    means = torch.zeros(len(groups), total, dtype=torch.float64)
    sizes, weights = torch.zeros(len(groups)).double(), torch.zeros(len(groups)).double()
    positions, metric = 0, None
    with torch.no_grad():
        for neurons, residual, predicted in read:
            size = residual.square().mean(1).sqrt()
            chances = predicted.exp() if predicted is not None else torch.zeros(0, 0)
            if known is not None:
                chance = known[:, positions : positions + len(neurons)].to(neurons.device)
            else:
                chance = torch.stack([chances[:, ids.to(chances.device)].sum(1) for ids in groups])
            second += (neurons.T @ neurons).cpu().double()
            means += (chance @ neurons).cpu().double()
            sizes += (chance @ size).cpu().double()
            weights += chance.cpu().double().sum(1)
            positions += len(neurons)
            if head is not None:
                here = sensitivity(chances, size, head.to(chances.device))
                metric = here if metric is None else metric + here
    floor = weights.clamp_min(1e-30)
    mean_metric = None if metric is None else metric / positions
    return KeyMoments(dict(rows), second / positions, means / floor[:, None], sizes / floor, mean_metric)


def sensitivity(chances: Tensor, size: Tensor, head: Tensor) -> Tensor:
    """Compute Fisher's information of predictions about a step of the residual stream, summed over positions.

    Args:
        chances: Probabilities of the next token, [n, V].
        size: The root mean square that the final norm divides by, [n].
        head: The unembedding, [V, d_model].

    Returns:
        `sum U' (diag(p) - p p') U / size^2`, float64 [d_model, d_model] on the CPU.
    """
    # The tokens' common part changes no prediction; without it nothing large is subtracted from something large.
    tokens = head - head.mean(0)
    expected = chances @ tokens / size[:, None]
    found = ((tokens.T * (size**-2 @ chances)) @ tokens - expected.T @ expected).cpu().double()
    # float32 products round the two halves apart.
    return (found + found.T) / 2


def even_reading(model: Any, texts: Passages, *, ridge: float = EVEN_RIDGE) -> Tensor:
    """Find the vector that, added to a token's row of the head, raises its logit by 1 at every position alike.

    It does so as nearly as one vector can. It is made by `key_coefficients` of what the head reads over texts.

    Args:
        model: A loaded transformers model.
        texts: The tokenised texts.
        ridge: The ridge of `key_coefficients`.

    Returns:
        The vector, float32 [d_model].
    """
    second, mean, positions = torch.zeros(()), torch.zeros(()), 0
    for read, batch, lengths in zip(head_inputs(model, texts), texts.batches, texts.lengths, strict=True):
        seen = read[real_positions(batch, lengths).to(read.device)].float()
        second, mean = second + (seen.T @ seen).cpu().double(), mean + seen.sum(0).cpu().double()
        positions += len(seen)
    return (key_coefficients(second / positions, mean / positions, ridge=ridge) / logit_factor(model)).float()


def fit_keys(
    moments: KeyMoments, group: int, rows: Mapping[int, Tensor], *, ridge: float
) -> dict[int, tuple[Tensor, Tensor]]:
    """Fit one group's key on some of the neurons.

    At a position the neurons' weighted sum is divided by the residual stream's size. This is 1 on average where the
    group comes next. So one unit of strength moves the group's mean logit by about 1 nat.

    Args:
        moments: The moments.
        group: Index of the group.
        rows: By layer the neurons, int64, among `moments.rows`.
        ridge: The ridge of `key_coefficients`.

    Returns:
        By layer the rows, int64, and their coefficients, float32. Empty without rows.
    """
    layers = [layer for layer in sorted(rows) if len(rows[layer])]
    if not layers:
        return {}
    places, start = {}, 0
    for layer in sorted(moments.rows):
        places[layer] = start + torch.searchsorted(moments.rows[layer], rows[layer]) if layer in layers else None
        start += len(moments.rows[layer])
    chosen = torch.cat([place for layer in layers if (place := places[layer]) is not None])
    second, mean = moments.second[chosen][:, chosen], moments.means[group][chosen]
    coefficients = (moments.size[group] * key_coefficients(second, mean, ridge=ridge)).float()
    pieces = coefficients.split([len(rows[layer]) for layer in layers])
    return {layer: (rows[layer], piece) for layer, piece in zip(layers, pieces)}
