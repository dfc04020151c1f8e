"""Measures on a live model: texts and tensors go in, measures with intervals come out.

Nothing here switches an edit on. The caller measures the base first (`reference`). Then it measures each variant inside
`with applied(model, edit, strength)`. The base model's answers are kept, so that a variant costs one forward pass.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rotate_edit.errors import BadInput
from rotate_edit.evaluation import statistics
from rotate_edit.evaluation.statistics import Measure
from rotate_edit.models.batches import Passages, real_positions, tokenise
from rotate_edit.models.output_head import predictions

# The base model's log-probabilities that are kept hold at most this many numbers (1 GiB of float32).
CELLS_KEPT = 2**28
CURVE_DRAWS = 1000


def _by_text(passages: Passages, pieces: Iterable[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Add up one number a position: of each batch the positions counted, bool [rows, length'], and their values [n]."""
    sums, counts = torch.zeros(passages.texts).double(), torch.zeros(passages.texts).double()
    for order, (counted, values) in zip(passages.order, pieces, strict=True):
        text = order[counted.nonzero()[:, 0]]
        sums.index_add_(0, text, values.cpu().double())
        counts.index_add_(0, text, torch.ones(len(text)).double())
    return sums, counts


def _real(passages: Passages) -> list[Tensor]:
    """Of each batch the positions that are no padding, bool [rows, length]."""
    return [real_positions(batch, lengths) for batch, lengths in zip(passages.batches, passages.lengths)]


def _chances_by_text(passages: Passages, chances: Iterable[Tensor]) -> Tensor:
    """One probability a real position, [positions] for each batch, summed over each text: float64 [texts]."""
    return _by_text(passages, zip(_real(passages), chances, strict=True))[0]


def _concept_chances(model: Any, passages: Passages, wanted: Sequence[Tensor], concept_ids: Tensor) -> Iterator[Tensor]:
    """The probability of the concept's tokens at the wanted positions of each batch, float32 [n]."""
    for pieces in predictions(model, passages, wanted):
        found = [values[:, concept_ids.to(values.device)].exp().sum(dim=-1) for _, values in pieces]
        yield torch.cat(found) if found else torch.zeros(0)


# KL divergence over all positions, and of the first generated token.


def every_position(model: Any, passages: Passages) -> tuple[Tensor, ...]:
    """Compute the log-probabilities that `kl_by_text` compares with.

    Args:
        model: A loaded model.
        passages: The tokenised texts.

    Returns:
        Log-probabilities in nats at all real positions, float32 [positions, V] for each batch.
    """
    kept, size = [], model.config.get_text_config().vocab_size
    device = next(model.parameters()).device
    for real, pieces in zip(_real(passages), predictions(model, passages, _real(passages)), strict=True):
        # What is kept is made once at its whole size, since it is large.
        values = torch.empty(int(real.sum()), size, device=device)
        for part, found in pieces:
            values[part] = found
        kept.append(values)
    return tuple(kept)


def kl_by_text(model: Any, passages: Passages, base: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Sum KL(base || model) over the positions of each text.

    Args:
        model: A loaded model.
        passages: The tokenised texts.
        base: From `every_position` of the base model on the same passages.

    Returns:
        The sums in nats and the numbers of positions, both float64 [texts].
    """
    return damage_by_text(model, passages, base)[:2]


def damage_by_text(model: Any, passages: Passages, base: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute `kl_by_text` and `log_likelihood_by_text` in one forward pass.

    Args:
        model: A loaded model.
        passages: The tokenised texts.
        base: From `every_position` of the base model on the same passages.

    Returns:
        The divergence's sums in nats and its counts, then the log-likelihood's sums in nats and its counts. All are
        float64 [texts].
    """
    likelihoods: list[tuple[Tensor, Tensor]] = []
    wanted = _real(passages)

    def pieces() -> Iterator[tuple[Tensor, Tensor]]:
        for index, found in enumerate(predictions(model, passages, wanted)):
            batch, real = passages.batches[index], wanted[index]
            following = torch.nn.functional.pad(batch[:, 1:], (0, 1))[real].to(base[index].device)
            divergence, likelihood = [], []
            for part, values in found:
                divergence.append(kl_divergence(base[index][part], values))
                likelihood.append(values.gather(1, following[part, None])[:, 0])
            predicted = torch.nn.functional.pad(real[:, 1:], (0, 1))
            likelihoods.append((predicted, torch.cat(likelihood)[predicted[real].to(following.device)]))
            yield real, torch.cat(divergence)

    divergence = _by_text(passages, pieces())
    return *divergence, *_by_text(passages, likelihoods)


def kl_divergence(base: Tensor, other: Tensor) -> Tensor:
    """Compute KL(base || other), which is `sum exp(base) (base - other)`.

    Args:
        base: Log-probabilities of the base, [n, V].
        other: Log-probabilities of the other model, [n, V].

    Returns:
        The divergences in nats, float32 [n].
    """
    return (base.exp() * (base - other)).sum(dim=-1)


def collateral_kl(model: Any, passages: Passages, base: Sequence[Tensor], *, draws: int = statistics.DRAWS) -> Measure:
    """Measure the mean KL(base || model) over all positions of texts.

    Args:
        model: A loaded model.
        passages: The tokenised texts.
        base: From `every_position` of the base model on the same passages.
        draws: Number of bootstrap draws.

    Returns:
        The mean in nats. Its interval resamples whole texts.
    """
    sums, counts = kl_by_text(model, passages, base)
    return statistics.ratio_of_sums(sums.numpy(), counts.numpy(), draws=draws).against(0)


def last_position(model: Any, prompts: Passages) -> Tensor:
    """Compute the log-probabilities of the first token generated after each prompt.

    Args:
        model: A loaded model.
        prompts: The tokenised prompts.

    Returns:
        Log-probabilities in nats, float32 [prompts, V], in the order given.
    """
    wanted = []
    for batch, lengths in zip(prompts.batches, prompts.lengths):
        wanted.append(torch.arange(batch.shape[1])[None, :] == lengths[:, None] - 1)
    size, device = model.config.get_text_config().vocab_size, next(model.parameters()).device
    result = torch.empty(prompts.texts, size, device=device)
    for order, pieces in zip(prompts.order, predictions(model, prompts, wanted), strict=True):
        for part, values in pieces:
            result[order[part].to(device)] = values
    return result


def first_token_kl(model: Any, prompts: Passages, base: Tensor, *, draws: int = statistics.DRAWS) -> Measure:
    """Measure KL(base || model) of the first generated token, from raw logits.

    This is the measure of heretic's evaluator.

    Args:
        model: A loaded model.
        prompts: The tokenised prompts.
        base: From `last_position` of the base model, float32 [prompts, V].
        draws: Number of bootstrap draws.

    Returns:
        The mean over prompts, in nats.
    """
    divergence = kl_divergence(base, last_position(model, prompts)).cpu().double().numpy()
    return statistics.mean(divergence, draws=draws).against(0)


# The concept's probability mass.


def mass_by_text(model: Any, passages: Passages, concept_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Sum the probability of the concept's tokens where the text goes on with one of them.

    Args:
        model: A loaded model.
        passages: The tokenised texts.
        concept_ids: The concept's tokens, int64 [k].

    Returns:
        The sums over each text's such positions, and the numbers of these positions. Both are float64 [texts].
    """

    wanted = []
    for batch, lengths in zip(passages.batches, passages.lengths):
        # Padding is no token of the text, also where a concept's token has the padding's number.
        goes_on = torch.isin(batch, concept_ids.cpu())[:, 1:] & real_positions(batch, lengths)[:, 1:]
        wanted.append(torch.nn.functional.pad(goes_on, (0, 1)))
    found = _concept_chances(model, passages, wanted, concept_ids)
    return _by_text(passages, zip(wanted, found, strict=True))


def concept_mass(model: Any, passages: Passages, concept_ids: Tensor, base: tuple[Tensor, Tensor]) -> Measure:
    """Measure the mean probability mass on the concept where the text has one.

    Args:
        model: A loaded model.
        passages: The tokenised texts.
        concept_ids: The concept's tokens, int64 [k].
        base: From `mass_by_text` of the base model on the same passages.

    Returns:
        The mean mass, with the base model's mean beside it.
    """
    sums, counts = mass_by_text(model, passages, concept_ids)
    return statistics.ratio_of_sums(sums.numpy(), counts.numpy()).against(float(base[0].sum() / base[1].sum()))


def concept_probability(model: Any, prompts: Passages, concept_ids: Tensor, base: Tensor) -> Measure:
    """Measure the mean probability of the concept's tokens as the first token after neutral prompts.

    Args:
        model: A loaded model.
        prompts: The tokenised prompts.
        concept_ids: The concept's tokens, int64 [k].
        base: From `last_position` of the base model, float32 [prompts, V].

    Returns:
        The mean probability, with the base model's mean beside it.
    """
    now = last_position(model, prompts)[:, concept_ids.to(base.device)].exp().sum(dim=-1)
    before = base[:, concept_ids.to(base.device)].exp().sum(dim=-1)
    return statistics.mean(now.cpu().double().numpy()).against(float(before.cpu().double().mean()))


def log_likelihood_by_text(model: Any, passages: Passages) -> tuple[Tensor, Tensor]:
    """Sum the log-likelihood of each text's tokens after its first.

    Args:
        model: A loaded model.
        passages: The tokenised texts.

    Returns:
        The sums in nats and the numbers of these tokens, both float64 [texts].
    """

    wanted = []
    for batch, lengths in zip(passages.batches, passages.lengths):
        wanted.append(torch.nn.functional.pad(real_positions(batch, lengths)[:, 1:], (0, 1)))

    def found() -> Iterator[tuple[Tensor, Tensor]]:
        for index, pieces in enumerate(predictions(model, passages, wanted)):
            following = torch.nn.functional.pad(passages.batches[index][:, 1:], (0, 1))[wanted[index]]
            rows = [values.gather(1, following[part, None].to(values.device))[:, 0] for part, values in pieces]
            yield wanted[index], torch.cat(rows) if rows else torch.zeros(0)

    return _by_text(passages, found())


def perplexity(model: Any, passages: Passages) -> Measure:
    """Measure the perplexity per token, `exp(- mean log-likelihood)`.

    Args:
        model: A loaded model.
        passages: The tokenised texts.

    Returns:
        The perplexity. Its interval resamples whole texts.
    """
    sums, counts = log_likelihood_by_text(model, passages)
    columns = torch.stack([sums, counts], dim=1).numpy()
    return statistics.measure(statistics.bootstrap(columns, lambda means: np.exp(-means[:, 0] / means[:, 1])))


def mean_log_odds(predicted: Iterable[Tensor], concept_ids: Tensor) -> float:
    """Compute the mean over positions of the log-odds that the next token is one of the concept's.

    A constant added to the logits of these tokens at every position raises it by as much, exactly.

    Args:
        predicted: Log-probabilities of each batch at its real positions, [positions, V] (`every_position`).
        concept_ids: The concept's tokens, int64 [k].

    Returns:
        The mean log-odds in nats.
    """
    total, count = 0.0, 0
    for values in predicted:
        log_mass = values[:, concept_ids.to(values.device)].logsumexp(dim=-1).double().clamp_max(-1e-9)
        total += float((log_mass - torch.log1p(-log_mass.exp())).sum())
        count += len(values)
    return total / count


# Many variants against one base.


@dataclass(frozen=True)
class Reference:
    """The base model's answers on fixed texts.

    Attributes:
        concept_ids: The concept's tokens, int64 [k].
        concept: Texts that hold the concept.
        concept_mass: From `mass_by_text` on `concept`.
        others: Texts without the concept.
        others_base: Their log-probabilities from `every_position`.
        prompts: Neutral prompts. None when none were given.
        prompts_base: Their log-probabilities from `last_position`. None without prompts.
    """

    concept_ids: Tensor
    concept: Passages
    concept_mass: tuple[Tensor, Tensor]
    others: Passages
    others_base: tuple[Tensor, ...]
    prompts: Passages | None = None
    prompts_base: Tensor | None = None

    def starting_at(self, layer: int) -> "Reference":
        """The same, for an edit that changes nothing below a layer: passes start there.

        Args:
            layer: The first layer that the edit changes (see `edits.apply.first_changed_layer`).
        """
        prompts = self.prompts.starting_at(layer) if self.prompts else None
        concept, others = self.concept.starting_at(layer), self.others.starting_at(layer)
        return replace(self, concept=concept, others=others, prompts=prompts)


def reference(
    model: Any,
    tokenizer: Any,
    concept_ids: Tensor,
    *,
    concept_texts: Sequence[str],
    other_texts: Sequence[str],
    prompts: Sequence[str] = (),
    longest: int | None = None,
    token_limit: int = 4096,
    damage: bool = True,
) -> Reference:
    """Measure the base model on fixed texts, once for all variants.

    Args:
        model: The loaded base model, nothing switched on.
        tokenizer: The model's tokenizer.
        concept_ids: The concept's tokens, int64 [k].
        concept_texts: Texts that hold the concept.
        other_texts: Texts without it.
        prompts: Neutral prompts.
        longest: At most this many tokens of each text. None for no limit of its own.
        token_limit: How many tokens of other_texts are used, and half as many of concept_texts. A large vocabulary
            lowers it, so that what is kept stays below 1 GiB.
        damage: Whether damage will be measured. Without it the base's predictions on other texts and after prompts are
            left out, which take most of the time.

    Returns:
        The base model's answers.

    Raises:
        BadInput: When the concept texts hold none of the concept's tokens.
    """
    vocabulary = model.config.get_text_config().vocab_size
    sizes: dict[str, Any] = {"vocabulary_size": vocabulary, "longest": longest}
    limit = max(256, min(token_limit, CELLS_KEPT // vocabulary))
    concept = tokenise(tokenizer, concept_texts, token_limit=limit // 2, **sizes)
    mass = mass_by_text(model, concept, concept_ids)
    if not float(mass[1].sum()):
        raise BadInput(
            "the concept's texts hold none of its tokens, so its probability cannot be measured; give other texts."
        )
    others = tokenise(tokenizer, other_texts, token_limit=limit, **sizes)
    asked = tokenise(tokenizer, prompts, **sizes) if prompts and damage else None
    return Reference(
        concept_ids=concept_ids,
        concept=concept,
        concept_mass=mass,
        others=others,
        others_base=every_position(model, others) if damage else (),
        prompts=asked,
        prompts_base=last_position(model, asked) if asked else None,
    )


@dataclass(frozen=True)
class CurvePoint:
    """One strength of one method: what is left of the concept, and the damage.

    Attributes:
        strength: The strength.
        mass: The concept's probability mass as a multiple of the base's, where texts have it. Where the edit amplifies,
            it is over all positions of texts without the concept.
        collateral_kl: In nats.
        first_token_kl: In nats. None without prompts.
    """

    strength: float
    mass: Measure
    collateral_kl: Measure
    first_token_kl: Measure | None


def curve_point(model: Any, known: Reference, strength: float, *, draws: int = CURVE_DRAWS) -> CurvePoint:
    """Compare the model as it stands now with the base's answers.

    Args:
        model: A loaded model, the edit switched on.
        known: The base model's answers.
        strength: The strength that is switched on. One below 0 amplifies.
        draws: Number of bootstrap draws.

    Returns:
        What is left of the concept, and the damage.
    """
    if strength < 0:
        # Where texts have the concept it is likely already and can hardly rise.
        ids = known.concept_ids
        chances = _concept_chances(model, known.others, _real(known.others), ids)
        now = _chances_by_text(known.others, chances)
        before = _chances_by_text(
            known.others, (rows[:, ids.to(rows.device)].exp().sum(-1) for rows in known.others_base)
        )
    else:
        now, before = mass_by_text(model, known.concept, known.concept_ids)[0], known.concept_mass[0]
    mass = statistics.ratio_of_sums(now.numpy(), before.numpy(), draws=draws)
    first = None
    if known.prompts is not None and known.prompts_base is not None:
        first = first_token_kl(model, known.prompts, known.prompts_base, draws=draws)
    return CurvePoint(
        strength=strength,
        mass=mass,
        collateral_kl=collateral_kl(model, known.others, known.others_base, draws=draws),
        first_token_kl=first,
    )


def removal_curve(
    model: Any,
    known: Reference,
    strengths: Sequence[float],
    switched_on: Callable[[float], AbstractContextManager[Any]],
) -> list[CurvePoint]:
    """Measure removal against damage of one method over its strengths.

    Args:
        model: The loaded base model.
        known: The base model's answers.
        strengths: The strengths.
        switched_on: Switches the edit on at a strength, for instance `lambda strength: applied(model, edit, strength)`.

    Returns:
        One point for each strength, in the order given.
    """
    points = []
    for strength in strengths:
        with switched_on(strength):
            points.append(curve_point(model, known, strength))
    return points


def at_matched_removal(points: Sequence[CurvePoint], *, target: float = 0.1) -> statistics.Crossing | None:
    """Find the damage of a method where it has removed all but `target` of the concept's mass.

    Args:
        points: The method's curve.
        target: The wanted mass, as a fraction of the base's.

    Returns:
        The crossing. None if the method never gets there.
    """
    ordered = sorted(points, key=lambda point: point.strength)
    return statistics.matched_removal(
        [point.strength for point in ordered],
        [point.mass.value for point in ordered],
        [point.collateral_kl.value for point in ordered],
        target=target,
    )
