"""A KL-optimised low-rank change of the last layer's `out` matrix, fitted on self-generated text (maths only).

A rank-one edit has one key and one direction, both in closed form. That one direction is pushed along wherever the
concept is somewhat likely. This is most of the edit's cost. Here the whole matrix is free, and the divergence itself is
minimised.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rotate_edit.edits.strength import STRONGEST, cross
from rotate_edit.models.output_head import Function, OutputHead, Positions, Predicted, chances, rows_at_once

STEPS = 120
# Positions of one step.
DRAWN = 1000
# Positions are drawn by three weights at once: the concept's probability, its square, and all alike.
SHARES = (0.4, 0.3, 0.3)
# Of Adam's first step, as a multiple of the mean entry of the change that it starts from. Each further round of steps
# has half the rate of the one before; at small rates half the positions do as well.
LEARNING_RATE = 0.04
DRAWN_LATER = DRAWN // 2
# Only positions that together hold so much of the concept's probability are looked at for related tokens.
MASS_LOOKED_AT = 0.999
# A step predicts the tokens that together are expected this often, and all others as one.
TOKENS_SHARE = 0.99
# No set of tokens is less likely than this, as a logarithm.
LEAST = -30.0
# How many related tokens there may be for each token of the concept.
MOST_RELATED = 2


@dataclass(frozen=True)
class FitAim:
    """What a fit is for.

    Attributes:
        ids: The tokens to lower, int64.
        remaining: The share of their probability mass to leave.
        near: Tokens whose probability is to stay, int64.
        keep: Vectors that nothing written may move along, [m, d_model]. None for none.
    """

    ids: Tensor
    remaining: float
    near: Tensor
    keep: Tensor | None


@dataclass(frozen=True)
class Whitened:
    """Positions whose `neurons` are in coordinates in which their second moments are the identity.

    Attributes:
        positions: The positions. They hold the neurons times `whiten`.
        whiten: `(S + l I)^-1/2`, [neurons, neurons].
        unwhiten: Its inverse, [neurons, neurons].
    """

    positions: Positions
    whiten: Tensor
    unwhiten: Tensor


def whitened(seen: Positions, *, ridge: float) -> Whitened:
    """Bring positions into whitened coordinates. This is solved in float64.

    Args:
        seen: What the last layer holds at positions of texts.
        ridge: The l of `Whitened`, as a multiple of the neurons' mean square.

    Returns:
        The positions in whitened coordinates.
    """
    device, products = seen.neurons.device, seen.neurons.T @ seen.neurons
    # Apple's GPUs have no float64.
    second = (products.cpu() if device.type == "mps" else products).double() / len(seen.neurons)
    second += ridge * second.diagonal().mean() * torch.eye(len(second), dtype=second.dtype, device=second.device)
    values, vectors = torch.linalg.eigh(second)
    whiten, unwhiten = (((vectors * values**power) @ vectors.T).float().to(device) for power in (-0.5, 0.5))
    return Whitened(Positions(seen.neurons @ whiten, seen.residual, seen.written), whiten, unwhiten)


def related_tokens(seen: Positions, head: OutputHead, known: Predicted, ids: Tensor, apart: Tensor) -> Tensor:
    """Find tokens that no word names but that are predicted where the concept is.

    A fit would take care to keep them there. A token's lift is a ratio of two means of its probability. The first
    weights positions by the concept's probability, the second is over all positions alike. A token is related when its
    lift is at least half the median lift of the concept's own tokens. Each own token's lift is weighted by the others.
    More than twice as many tokens as the concept has may pass. Predictions are then too unsure to tell, and none is
    related. Nor is any to a single token.

    Args:
        seen: What the last layer holds at positions of self-generated text.
        head: What follows the last MLP.
        known: What is predicted at the positions.
        ids: The concept's tokens, int64.
        apart: Tokens that are not of it, int64.

    Returns:
        int64, ascending.
    """
    own, often = chances(seen, head, known, ids), known.often
    # Positions without the concept add nothing, and most positions are without it.
    order = own.sum(1).cpu().double().argsort(descending=True)
    mass = own.sum(1).cpu().double()[order].cumsum(0)
    places = order[: int((mass < MASS_LOOKED_AT * mass[-1]).sum()) + 1].to(own.device)
    # The products of the concept's tokens with all tokens, [n, V].
    together = torch.zeros(len(ids), len(often), dtype=torch.float64)
    with torch.no_grad():
        for some in places.split(rows_at_once(len(often))):
            together += (own[some].T @ head.log_probabilities(seen.residual[some]).exp_()).cpu().double()
    among = together[:, ids]
    of_others = often[ids].sum() - often[ids]
    own_lift = (among.sum(0) - among.diagonal()) / (often[ids] * of_others)
    lift = together.sum(0) / (often * often[ids].sum())
    lift[torch.cat((ids, apart))] = 0
    found = (lift >= own_lift.median() / 2).nonzero()[:, 0]
    return found if len(found) <= MOST_RELATED * len(ids) else ids[:0]


@dataclass(frozen=True)
class _Cut:
    """The vocabulary as a fit sees it: some tokens, and all others as one, which has their mean row.

    The others are expected less than once in a hundred tokens together, so what a step does among them counts little.
    """

    tokens: Tensor
    logits: Function

    def places(self, ids: Tensor) -> Tensor:
        """Where tokens stand among those of the cut, int64."""
        return torch.searchsorted(self.tokens, ids)

    def log_probabilities(self, normed: Tensor, lift: Tensor) -> Tensor:
        """Log-probabilities of the tokens and of all others, [n, k + 1]; `lift` [n] makes up for their number."""
        return self.normalised(self.logits(normed), lift)

    def normalised(self, logits: Tensor, lift: Tensor) -> Tensor:
        """The same from the logits that `logits` gives."""
        return torch.cat((logits[:, :-1], logits[:, -1:] + lift[:, None]), dim=1).log_softmax(-1)


def _cut(head: OutputHead, often: Tensor, always: Tensor) -> _Cut:
    order = often.argsort(descending=True)
    share = often[order].cumsum(0) / often.sum()
    tokens = torch.cat((order[: int((share < TOKENS_SHARE).sum()) + 1], always)).unique()
    weights = often.clone()
    weights[tokens] = 0
    return _Cut(tokens, head.few(tokens, (weights / weights.sum().clamp_min(1e-30)).float()))


@dataclass(frozen=True)
class _Drawn:
    """Positions of one step: the base's log-probabilities there (see `_Cut`) and what each counts, for a mean over all
    positions and for the concept's and the neighbours' mass."""

    positions: Positions
    base: Tensor
    lift: Tensor
    everywhere: Tensor
    concept: Tensor
    near: Tensor


@dataclass(frozen=True)
class LowRankFit:
    """A fitted change of the last `out` matrix as its singular value decomposition in whitened coordinates.

    Attributes:
        outer: float32 [neurons, k].
        sizes: float32 [k], descending.
        inner: float32 [k, d_model].
        whiten: float32 [neurons, neurons], from whitened coordinates back.
        strength: The strength that the change was fitted at.
    """

    outer: Tensor
    sizes: Tensor
    inner: Tensor
    whiten: Tensor
    strength: float

    def factors(self, rank: int) -> tuple[Tensor, Tensor]:
        """Compute what is added to the `out` vectors at strength 1, cut to so many directions.

        Args:
            rank: How many directions are kept, the largest first.

        Returns:
            left [neurons, rank] and right [rank, d_model], float32 on the CPU.
        """
        left = self.whiten @ (self.outer[:, :rank] * self.sizes[:rank]) / self.strength
        return left.cpu(), self.inner[:rank].cpu()


def fit_change(
    seen: Whitened,
    head: OutputHead,
    known: Predicted,
    start: tuple[Tensor, Tensor],
    aim: FitAim,
    *,
    proximal_weight: float,
    seed: int,
    rounds: int = 1,
    steps: int = STEPS,
) -> list[LowRankFit]:
    """Fit the change of the last `out` matrix that removes a concept for the least divergence elsewhere.

    Adam minimises `mean KL(base || edited) + price * (mass left + what neighbours moved + weight * |moved|^2 /
    |start|^2)`.

    Mass left is `sum p p' / sum p^2`. Here p is the concept's probability as the next token before the change, and p'
    the one after it. |.| is the Frobenius norm in whitened coordinates. |moved| is of what is added to the start, and
    |start| of the start at its strength.

    The price is the one at which the start would stop at the target. It assumes damage that grows with the square of
    the strength, and log mass that falls with the strength.

    A strength means what it means for the start. The change is fitted for the strength at which the start leaves the
    target.

    Args:
        seen: The positions to fit on, in whitened coordinates.
        head: What follows the last MLP.
        known: What is predicted at the positions.
        start: A rank-one change: coefficients [neurons] and direction [d_model].
        aim: What the fit is for.
        proximal_weight: What it costs to move as far from the start as the start is from nothing. Few positions tell of
            the concept. A fit that goes wherever they lead does more damage elsewhere. It also says less of held-out
            words.
        seed: Of the positions that are drawn.
        rounds: How many rounds of steps. Each goes on from the one before with smaller steps.
        steps: How many steps a round has.

    Returns:
        The fit as it is after each round.
    """
    cut = _cut(head, known.often, torch.cat((aim.ids, aim.near)))
    draw = _draws(seen.positions, head, known, cut, aim, torch.Generator().manual_seed(seed))
    coefficients, write = (part.float().to(seen.positions.residual.device) for part in start)
    begin = torch.outer(seen.unwhiten @ coefficients, write)
    strength, price = _start(draw(DRAWN), head, cut, begin, aim)
    outside = _outside(aim.keep, write)
    entry = strength * float(begin.norm()) / begin.numel() ** 0.5
    moved = torch.zeros_like(begin).requires_grad_()
    found = []
    for number in range(rounds):
        optimiser = torch.optim.Adam([moved], lr=LEARNING_RATE * entry / 2**number)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
        with torch.enable_grad():
            for _ in range(steps):
                drawn = draw(DRAWN_LATER if number else DRAWN)
                change = -strength * begin + moved @ outside
                divergence, left, shifted = _effects(drawn, head, cut, change, aim)
                held = moved.square().sum() / (strength * begin.norm()).square()
                loss = divergence + price * (left + shifted + proximal_weight * held)
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
                scheduler.step()
        change = -strength * begin + moved.detach() @ outside
        outer, sizes, inner = torch.linalg.svd(change, full_matrices=False)
        found.append(LowRankFit(outer, sizes, inner, seen.whiten, strength))
    return found


def _draws(
    positions: Positions, head: OutputHead, known: Predicted, cut: _Cut, aim: FitAim, generator: torch.Generator
) -> Callable[[int], _Drawn]:
    """What draws so many of the positions, each as often as what it tells of the concept and the neighbours asks."""
    groups = [aim.ids, aim.near] if len(aim.near) else [aim.ids]
    weights = [mass.square() for mass in _masses(positions, head, known, groups)]
    shares, device = _shares(weights), positions.residual.device

    def draw(number: int) -> _Drawn:
        # Few positions tell of the concept, so that many are drawn again and again: each is predicted once.
        places, times = torch.multinomial(shares, number, replacement=True, generator=generator).unique(
            return_counts=True
        )
        factor = times * (len(places) / number) / (shares[places] * len(shares))
        chosen = positions.at(places.to(device))
        with torch.no_grad():
            logits = cut.logits(head.norm(chosen.residual))
            normaliser = known.normaliser[places.to(device)][:, None]
            named = (logits[:, :-1] - normaliser).exp().sum(1).double()
            rest = torch.log1p(-named).nan_to_num(LEAST, LEAST, LEAST).clamp_min(LEAST).float()
            lift = rest - logits[:, -1] + normaliser[:, 0]
            base = cut.normalised(logits, lift)
        own, near = (factor * weight[places] / weight.mean() for weight in (weights[0], weights[-1]))
        # Where the concept is about to be said its loss is the aim: what counts is a text that goes on without it.
        without = factor * (1 - weights[0][places].sqrt())
        return _Drawn(chosen, base, lift, *(part.float().to(device) for part in (without, own, near)))

    return draw


def _effects(drawn: _Drawn, head: OutputHead, cut: _Cut, change: Tensor, aim: FitAim) -> tuple[Tensor, Tensor, Tensor]:
    """Mean divergence in nats, the share of the concept's mass that is left, and how far neighbours moved (squared)."""
    residual = head.moved(drawn.positions, drawn.positions.neurons @ change)
    after = cut.log_probabilities(head.norm(residual), drawn.lift)
    ids, near = cut.places(aim.ids), cut.places(aim.near)
    divergence = (drawn.everywhere * (drawn.base.exp() * (drawn.base - after)).sum(1)).mean()
    ratio = after[:, ids].logsumexp(1) - drawn.base[:, ids].logsumexp(1)
    left = (drawn.concept * ratio.exp()).mean()
    if not len(aim.near):
        return divergence, left, torch.zeros_like(left)
    shift = after[:, near].logsumexp(1) - drawn.base[:, near].logsumexp(1)
    return divergence, left, (drawn.near * shift.square()).mean()


def _start(drawn: _Drawn, head: OutputHead, cut: _Cut, begin: Tensor, aim: FitAim) -> tuple[float, float]:
    """The strength at which the start leaves the target, and the price that makes this strength the cheapest.

    With damage `a s^2` and mass `exp(-b s)` the sum `a s^2 + price * exp(-b s)` is least at s where the price is
    `2 damage / (left log(1 / left))`.
    """

    def at(strength: float) -> tuple[float, float]:
        with torch.no_grad():
            damage, left, _ = _effects(drawn, head, cut, -strength * begin, aim)
        return float(damage), float(left)

    found = cross(lambda strength: at(strength)[1], aim.remaining)
    strength = found.high if found.reached else STRONGEST
    return strength, 2 * at(strength)[0] / (aim.remaining * math.log(1 / aim.remaining))


def _masses(positions: Positions, head: OutputHead, known: Predicted, groups: Sequence[Tensor]) -> list[Tensor]:
    """The probability of each group of tokens at every position, float64 [n] each on the CPU."""
    return [chances(positions, head, known, ids).sum(1).cpu().double() for ids in groups]


def _shares(weights: Sequence[Tensor]) -> Tensor:
    """How often each position is drawn, float64 [n]: every group by its probability, by its square, and all alike."""
    by_mass, by_square, alike = SHARES
    drawn = torch.full_like(weights[0], alike / len(weights[0]))
    for weight in weights:
        mass = weight.sqrt()
        drawn += (by_mass * mass / mass.sum() + by_square * weight / weight.sum()) / len(weights)
    return drawn


def _outside(keep: Tensor | None, like: Tensor) -> Tensor:
    """The projection [d_model, d_model] off the rows that nothing written may move along."""
    whole = torch.eye(len(like), device=like.device)
    if keep is None or not len(keep):
        return whole
    rows = keep.cpu().double()
    return whole - (torch.linalg.pinv(rows) @ rows).float().to(like.device)
