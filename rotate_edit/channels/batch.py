"""The batch of great-circle searches: rows enter, step together and leave one by one.

This is maths only. Directions come from Riemannian conjugate gradients (Polak–Ribière+, restarted where it does not
descend). They are preconditioned with the inverse covariance of the token rows. One step is two products with the
vocabulary matrix: the projection of the direction and the back-projection of the gradient. `great_circle.py` computes
how far to go along the direction.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from rotate_edit.channels.great_circle import (
    apply_polynomial,
    best_angle,
    gradient_polynomial,
    join_moments,
    mixed_moments,
)
from rotate_edit.channels.objective import Objective

CPU_CHUNK, DEVICE_CHUNK = 1 << 18, 1 << 26
"""Elements of a projection worked on at once. On the CPU the temporaries then stay in the cache."""
PRODUCT_ROWS = 8
"""Least number of rows that are projected together.

A smaller product takes as long as reading the vocabulary matrix.
"""
HOPELESS, HOPELESS_FROM, MARGIN = 30.0, 5, 1e-3
"""When a start gives up because another start of its neuron leads.

From its fifth iteration on, it gives up when it lies 30 times its last gain and 1e-3 behind the other start.
"""
SAME, SAME_FROM = 0.998, 3
"""When a start gives up because it has met the best start of its neuron.

From its third iteration on, it gives up when its cosine with that start is above this value.
"""
REPROJECT_EVERY = 64


@dataclass(frozen=True)
class ClaimedPlaces:
    """The masked places of the rows of a batch, as padded lists.

    The tokens of earlier channels are masked: they get a small weight in later searches. No tensor here is as wide as
    the vocabulary. Padding repeats the row's first place, so that writing it twice is harmless.

    Attributes:
        places: Masked places, int64 [n, c].
        ratio: Lowered weight over original weight, float [n, c].
        weights: Lowered weight, float [n, c]; 0 for padding.
        real: 1 for a masked place and 0 for padding, float [n, c].
        total: Sum Σω of the weights of each row, float [n, 1].
    """

    places: Tensor
    ratio: Tensor
    weights: Tensor
    real: Tensor
    total: Tensor


def pad_claims(claims: Sequence[Tensor], objective: Objective) -> ClaimedPlaces | None:
    """Pad lists of masked places to a batch.

    The smallest weight counts. So a place keeps its own weight when that is no higher than the masked weight.

    Args:
        claims: Masked places of each row, int64 each.
        objective: The objective.

    Returns:
        The padded lists; None if no row has a masked place.
    """
    if not any(len(places) for places in claims):
        return None
    padded = pad_sequence(list(claims), batch_first=True, padding_value=-1)
    real = padded >= 0
    places = torch.where(real, padded, padded[:, :1].clamp_min(0))
    original = objective.token_weights[places]
    lowered = original.clamp_max(objective.claimed_weight)
    some = real[:, :1]
    ratio = torch.where(some & (original > lowered), lowered / original, 1.0)
    weights = torch.where(real, lowered, 0.0)
    # A row without masked places pads with place 0, which must then count once with its own weight.
    weights[:, :1] = torch.where(some, weights[:, :1], original[:, :1])
    total = torch.full((len(claims), 1), objective.total, dtype=objective.exact, device=places.device)
    if objective.moments == "weighted":
        total -= torch.where(real, original - lowered, 0.0).to(total).sum(dim=1, keepdim=True)
    return ClaimedPlaces(places, ratio, weights, real.to(ratio), total)


@dataclass
class Search:
    """The rows being searched, in the first `count` rows of each tensor. `step` changes them in place.

    n is the number of rows, d the width of a vector, and T the number of places of the objective.

    Attributes:
        count: Number of rows being searched.
        neuron: Neuron ŵ, unit, [n, d].
        point: Current vector v, unit, [n, d]; 0 for a row that has just entered.
        direction: Direction p, unit, [n, d]; the start itself for a row that has just entered.
        gradient: Riemannian gradient at v, [n, d].
        energy: Gradient times preconditioned gradient, [n].
        length: Length of the direction before it was normalised, [n].
        projection: Projection z_v, [n, T].
        other: Projection z_p, and then the gradient in token space, [n, T].
        moments: Raw moments M1..M4 at v, [n, 4].
        loss: Loss at v, [n].
        gain: What the last iteration lowered the loss by, [n].
        quiet: Whether the last iteration gained next to nothing, bool [n].
        plain: Number of iterations to make without the preconditioner, int32 [n].
        iterations: Number of iterations made so far, int32 [n].
        owner: The neuron to which each row belongs.
        products: Number of rows multiplied with the vocabulary matrix so far.
    """

    count: int
    neuron: Tensor
    point: Tensor
    direction: Tensor
    gradient: Tensor
    energy: Tensor
    length: Tensor
    projection: Tensor
    other: Tensor
    moments: Tensor
    loss: Tensor
    gain: Tensor
    quiet: Tensor
    plain: Tensor
    iterations: Tensor
    owner: list[int]
    products: int = 0

    def carried(self) -> list[Tensor]:
        """List the tensors that move with their row, except the projection."""
        vectors = [self.neuron, self.point, self.direction, self.gradient, self.energy, self.length]
        return [*vectors, self.moments, self.loss, self.gain, self.quiet, self.plain, self.iterations]


def new_search(objective: Objective, capacity: int) -> Search:
    """Make an empty search with space for a number of rows.

    Each row takes two projections of T numbers and a few vectors.

    Args:
        objective: The objective.
        capacity: Most rows that can be searched at once.

    Returns:
        The search, without any rows.
    """
    tokens, size = objective.matrix.shape

    def room(*shape: int, dtype: torch.dtype = objective.matrix.dtype) -> Tensor:
        return torch.zeros(capacity, *shape, dtype=dtype, device=objective.matrix.device)

    return Search(
        count=0,
        neuron=room(size),
        point=room(size),
        direction=room(size),
        gradient=room(size),
        energy=room(),
        length=room(),
        projection=room(tokens),
        other=room(tokens),
        moments=room(4, dtype=objective.exact),
        loss=room(dtype=objective.exact),
        gain=room(dtype=objective.exact),
        quiet=room(dtype=torch.bool),
        plain=room(dtype=torch.int32),
        iterations=room(dtype=torch.int32),
        owner=[],
    )


def enter(search: Search, neurons: Tensor, starts: Tensor, owners: Sequence[int], plain: Tensor | int = 0) -> None:
    """Add rows to the search.

    Args:
        search: The search; it is changed in place.
        neurons: Unit neuron vectors, float [k, d].
        starts: Unit starting points, float [k, d].
        owners: The neuron to which each row belongs.
        plain: Number of each row's first iterations without the preconditioner, int [k] or one number.
    """
    rows = slice(search.count, search.count + len(owners))
    for tensor in (*search.carried(), search.projection):
        tensor[rows] = 0
    search.neuron[rows] = neurons
    search.direction[rows] = starts
    search.plain[rows] = plain
    search.owner.extend(owners)
    search.count += len(owners)


def leave(search: Search, rows: Sequence[int]) -> None:
    """Remove rows from the search. The last rows that stay move into the gaps.

    Args:
        search: The search; it is changed in place.
        rows: Indices of the rows that leave.
    """
    leaving = set(rows)
    remaining = search.count - len(leaving)
    gaps = [row for row in rows if row < remaining]
    movers = [row for row in range(remaining, search.count) if row not in leaving]
    if gaps:
        target, source = torch.tensor([gaps, movers], device=search.point.device)
        for tensor in search.carried():
            tensor[target] = tensor[source]
        for some in chunks(len(gaps), search.projection.shape[1], search.projection.device):
            # A copy of all projections that move could be as large as the buffer itself.
            search.projection[target[some]] = search.projection[source[some]]
        for gap, mover in zip(gaps, movers):
            search.owner[gap] = search.owner[mover]
    del search.owner[remaining:]
    search.count = remaining


def step(search: Search, objective: Objective, claims: ClaimedPlaces | None, grid: Tensor, tolerance: float) -> None:
    """Make one iteration of every row.

    The direction is projected, the row moves to the best angle, and the gradient is taken there. A row that has just
    entered has v = 0 and its start as the direction. So a quarter circle is its first step. The same is done every 64
    iterations, because the projection is otherwise carried along and its rounding would add up.

    Args:
        search: The search; it is changed in place.
        objective: The objective.
        claims: Masked places of the rows; None if there are none.
        grid: Angles tried on every circle, in radians, float [G].
        tolerance: Gain in loss below which an iteration is quiet.
    """
    n = search.count
    point, direction, iterations = search.point[:n], search.direction[:n], search.iterations[:n]
    first = iterations % REPROJECT_EVERY == 0
    again = first & (iterations > 0)
    if bool(again.any()):
        direction[again] = point[again]
        for tensor in (search.point, search.projection, search.moments):
            tensor[:n][again] = 0
    torch.mm(direction, objective.matrix.T, out=search.other[:n])
    mixed = _mixed_on_batch(search, objective, claims)
    along, across = (point * search.neuron[:n]).sum(dim=1), (direction * search.neuron[:n]).sum(dim=1)
    cosines = torch.stack([along, across], dim=1).to(mixed)
    angle, moments, loss = best_angle(mixed, cosines, objective, grid, first)
    gain = torch.where(first, torch.inf, search.loss[:n] - loss)
    search.moments[:n], search.loss[:n], search.gain[:n] = moments, loss, gain
    iterations += 1
    search.quiet[:n] = (gain < tolerance) & (iterations > search.plain[:n] + 1)
    back = _turn(search, objective, claims, angle, moments)
    _next_direction(search, objective, angle, back, first)
    search.products += 2 * n


def finished(search: Search, best: Tensor, owners: Tensor, limit: int) -> list[int]:
    """Find the rows that are done.

    A row is done in any of four cases. Its last iteration gained less than the tolerance. Thirty more like it would not
    bring it to the best start of its neuron. It has met that start. Or it has made `limit` iterations.

    Args:
        search: The search.
        best: Least loss that any start of the same neuron has reached, float [n].
        owners: The neuron to which each row belongs, int64 [n].
        limit: Most iterations of a row.

    Returns:
        Indices of the rows that are done.
    """
    n = search.count
    behind = search.loss[:n] - best
    hopeless = (behind > HOPELESS * search.gain[:n]) & (behind > MARGIN) & (search.iterations[:n] >= HOPELESS_FROM)
    done = search.quiet[:n] | hopeless | (search.iterations[:n] >= limit) | _has_met(search, best, owners)
    return done.nonzero()[:, 0].tolist()


def _has_met(search: Search, best: Tensor, owners: Tensor) -> Tensor:
    """Find the rows [n] that stand where the best row of their neuron stands and are not that row."""
    n = search.count
    rows = torch.arange(n, device=best.device)
    leading = torch.where(search.loss[:n] <= best, rows, -1)
    leader = leading.new_full((max(search.owner) + 1,), -1).scatter_reduce_(0, owners, leading, "amax")[owners]
    cosine = (search.point[:n] * search.point[leader.clamp_min(0)]).sum(dim=1)
    return (leader >= 0) & (leader != rows) & (cosine > SAME) & (search.iterations[:n] >= SAME_FROM)


def chunks(rows: int, width: int, device: torch.device, least: int = 1) -> list[slice]:
    """Divide rows into slices of about as many elements as are worked on at once.

    Args:
        rows: Number of rows.
        width: Number of elements in a row.
        device: Device that holds the rows.
        least: Least number of rows in a slice, apart from the last.

    Returns:
        The slices, in order.
    """
    size = max(least, (CPU_CHUNK if device.type == "cpu" else DEVICE_CHUNK) // width)
    return [slice(low, min(low + size, rows)) for low in range(0, rows, size)]


def _mixed_on_batch(search: Search, objective: Objective, claims: ClaimedPlaces | None) -> Tensor:
    """Compute the fourteen mixed moments of every row over its total weight, [n, 14]; corrects masked places."""
    n, full = search.count, objective.full
    a, b = search.projection[:n], search.other[:n]
    if claims is not None:
        b_claimed = b.gather(1, claims.places)
        if objective.moments == "zeroed":
            shift = (search.direction[:n] @ objective.mean)[:, None]
            b.scatter_(1, claims.places, claims.ratio * b_claimed + (claims.ratio - 1) * shift)
        else:
            # With b = 0 a place adds nothing to the ten sums; what it does add is put in afterwards.
            b.scatter_(1, claims.places, 0.0)
    if objective.fused:
        from rotate_edit.channels import kernels

        sums = kernels.mixed_sums(a, b, objective.weights).to(objective.exact)
    else:
        sums = torch.empty(n, 10, dtype=objective.exact, device=a.device)
        for rows in chunks(n, a.shape[1], a.device):
            sums[rows] = mixed_moments(a[rows, :full], b[rows, :full]).to(sums)
            if full < a.shape[1]:
                sums[rows] += mixed_moments(a[rows, full:], b[rows, full:], objective.weights[full:]).to(sums)
    if claims is not None and objective.moments == "weighted":
        sums += mixed_moments(a.gather(1, claims.places), b_claimed, claims.weights).to(sums)
        b.scatter_(1, claims.places, b_claimed)
    return join_moments(search.moments[:n], sums / (objective.total if claims is None else claims.total))


def _turn(search: Search, objective: Objective, claims: ClaimedPlaces | None, angle: Tensor, moments: Tensor) -> Tensor:
    """Move each row's projection to its angle and return the gradient of the kurtosis term there, [n, d]."""
    n, full = search.count, objective.full
    a, b = search.projection[:n], search.other[:n]
    cos, sin = torch.cos(angle).to(a)[:, None], torch.sin(angle).to(a)[:, None]
    total = objective.total if claims is None else claims.total
    polynomial = (gradient_polynomial(moments.unbind(1), objective.sharpness) / total).to(a)
    if objective.fused:
        from rotate_edit.channels import kernels

        kernels.turn_and_slope(a, b, objective.weights, cos, sin, polynomial)
    else:
        for rows in chunks(n, a.shape[1], a.device):
            torch.addcmul(a[rows].mul_(cos[rows]), sin[rows], b[rows], out=a[rows])
            apply_polynomial(a[rows], polynomial[rows], out=b[rows])
            b[rows, full:] *= objective.weights[full:]
    if claims is None:
        return torch.mm(b, objective.matrix)
    slope = b.gather(1, claims.places)
    b.scatter_(1, claims.places, slope * claims.ratio)
    back = torch.mm(b, objective.matrix)
    if objective.moments == "zeroed":
        back += (slope * (claims.ratio - 1) * claims.real).sum(dim=1, keepdim=True) * objective.mean
    return back


def _next_direction(search: Search, objective: Objective, angle: Tensor, back: Tensor, first: Tensor) -> None:
    """Move point and direction by the angle, and compute the Riemannian gradient and the next conjugate direction.

    This is Polak–Ribière+ with a preconditioner P, `h = P g`: `p ← −h + max(0, h·(g − g_old) / g_old·h_old) p_old`. All
    vectors are tangent, and `p_old` is carried along the circle. A row restarts along −h in three cases: where the new
    direction does not descend, after a fresh projection, and where its plain iterations (P = 1) end.
    """
    n, tiny = search.count, torch.finfo(back.dtype).tiny
    cos, sin = torch.cos(angle).to(back)[:, None], torch.sin(angle).to(back)[:, None]
    point, direction, neuron = search.point[:n], search.direction[:n], search.neuron[:n]
    along = cos * direction - sin * point
    point[:] = torch.nn.functional.normalize(cos * point + sin * direction, dim=1)
    gradient = _tangent(back - objective.fidelity * neuron, point)
    steps, plain = search.iterations[:n], search.plain[:n]
    steep = torch.where((steps <= plain)[:, None], gradient, gradient @ objective.preconditioner)
    steep = _tangent(steep, point)
    factor = (steep * (gradient - search.gradient[:n])).sum(dim=1) / search.energy[:n].clamp_min(tiny)
    restart = first | (steps == plain + 1)
    factor = torch.where(restart, 0.0, factor.clamp_min(0) * search.length[:n])
    proposal = _tangent(factor[:, None] * along - steep, point)
    uphill = (proposal * gradient).sum(dim=1, keepdim=True) >= 0
    proposal = torch.where(uphill, -steep, proposal)
    length = proposal.norm(dim=1)
    search.gradient[:n] = gradient
    search.energy[:n] = (gradient * steep).sum(dim=1)
    search.length[:n] = length
    direction[:] = proposal / length.clamp_min(tiny)[:, None]


def _tangent(vectors: Tensor, points: Tensor) -> Tensor:
    """The part of `vectors` [n, d] tangent to the unit sphere at `points` [n, d]."""
    return vectors - (vectors * points).sum(dim=1, keepdim=True) * points
