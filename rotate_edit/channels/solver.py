"""ROTATE: the vocabulary channels of neuron vectors (method.md §2 to §4).

This is maths only: tensors in, tensors out. For each vector the solver finds directions of the same length, one after
another. Each has a sharp vocabulary projection (large kurtosis) and stays close to the vector. After each channel its
tokens are masked: they get a small weight in later searches, so that the next channel finds other tokens. In the code,
masked tokens are called claimed.
"""

import importlib.util
import math
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import normalize

from rotate_edit.channels import batch
from rotate_edit.channels.adamw import search_adamw
from rotate_edit.channels.great_circle import angle_grid
from rotate_edit.channels.objective import MOMENTS, Objective, claimed_weights, loss_of, make_objective, shape_of
from rotate_edit.errors import BadInput, Failure

SOLVERS = ("circle", "adamw")
KERNELS, PRECISIONS = ("auto", "torch", "triton"), ("tf32", "float32")
SKEW_LIMIT = 10.0
"""A channel with skewness beyond this masks tokens on one side only (published reference settings)."""
STARTS = 3
ASKING_REACH = 0.5
"""Longest step, in radians, of a search that asks for one concept.

With longer steps it leaps to stronger channels.
"""
PLAIN_STEPS = 2
"""Number of first steps from the neuron itself that follow the plain gradient.

The preconditioned gradient leaps to worse optima there.
"""


@dataclass(frozen=True)
class SolverSettings:
    """How channels are searched. The defaults are the recommended values.

    Attributes:
        solver: "circle" (exact search along great circles) or "adamw" (the published procedure).
        channels: Most channels of a neuron.
        moments: "weighted" leaves ignored tokens out, and "zeroed" keeps them as zeros (the paper). None is "zeroed"
            for adamw and "weighted" for circle.
        sharpness: Factor λk of the loss.
        fidelity: Factor λf of the loss.
        claim_threshold: z-score t from which a channel's tokens are masked (4 for Gemma, 6 for Llama).
        claim_minimum: Least number of tokens that a channel masks.
        claimed_weight: Weight of a masked token in later searches.
        top_tokens: Number of tokens that describe a channel and carry its support.
        support_threshold: Support below which a channel is unsupported, a mean z-score.
        unsupported_limit: Number of unsupported channels in a row after which a neuron ends.
        start_tilt: How far the tilted starts lean: `v ∝ ŵ + start_tilt · d̂`.
        only_tilt: Whether the given tilt is the only start. The channel is then the concept's, or an unsupported one
            where the neuron does not have the concept.
        tolerance: Gain in loss below which an iteration is the last of its search.
        iterations: Most iterations of one search.
        rows: Number of searches worked on at once, which bounds the memory.
        kernels: "triton", "torch" or "auto" (Triton on a CUDA device that has it).
        precision: Precision of a search's products on a CUDA device, "tf32" or "float32". Reported numbers are always
            float32.
        steps: Most steps of AdamW.
        seed: Base of the seeds of the neurons.
    """

    solver: str = "circle"
    channels: int = 10
    moments: str | None = None
    sharpness: float = 0.3
    fidelity: float = 1.0
    claim_threshold: float = 4.0
    claim_minimum: int = 10
    claimed_weight: float = 0.01
    top_tokens: int = 10
    support_threshold: float = 3.0
    unsupported_limit: int = 3
    start_tilt: float = 2.0
    only_tilt: bool = False
    tolerance: float = 1e-5
    iterations: int = 300
    rows: int = 192
    kernels: str = "auto"
    precision: str = "tf32"
    steps: int = 10_000
    seed: int = 0


@dataclass(frozen=True)
class FoundChannels:
    """The channels of N neurons, with C = settings.channels places for each.

    Beyond `found[n]` vectors and numbers are 0. With "weighted" moments every projection is taken over the tokens of
    weight above 0, with "zeroed" over all.

    Attributes:
        vectors: Channel vectors with the neuron's norm, float [N, C, d].
        token_ids: Strongest tokens on the channel's side, strongest first, int64 [N, C, k]; -1 where there is none.
        z_scores: Their z-scores with their sign, float [N, C, k].
        kurtosis: Excess kurtosis of the unweighted projection, float [N, C].
        skewness: Skewness of the unweighted projection, float [N, C].
        cosine: Cosine with the neuron, float [N, C].
        loss: Loss reached, float [N, C].
        support: Mean z-score of these tokens in the neuron's own projection, times `sign`, float [N, C].
        sign: Side of the channel, +1 or -1, int64 [N, C].
        claimed: Number of tokens that the channel masked, int64 [N, C].
        found: Number of channels of each neuron, int64 [N].
        products: Number of vectors multiplied with the vocabulary matrix in all.
    """

    vectors: Tensor
    token_ids: Tensor
    z_scores: Tensor
    kurtosis: Tensor
    skewness: Tensor
    cosine: Tensor
    loss: Tensor
    support: Tensor
    sign: Tensor
    claimed: Tensor
    found: Tensor
    products: int


Progress = Callable[[int], None]


def find_channels(
    neurons: Tensor,
    unembedding: Tensor,
    token_weights: Tensor,
    settings: SolverSettings,
    *,
    tilt: Tensor | None = None,
    seeds: Sequence[int] | None = None,
    progress: Progress | None = None,
) -> FoundChannels:
    """Decompose neuron vectors into channels over a vocabulary.

    Everything runs in the dtype and on the device of `unembedding`. When the device runs out of memory, the search
    starts again with half the rows and warns.

    Args:
        neurons: Neuron vectors, float [N, d].
        unembedding: The vocabulary, float [V, d]; rows are tokens.
        token_weights: Weight of each token, [V] (`tokens.token_weights`).
        settings: How channels are searched.
        tilt: Direction, [d] or [N, d], that asks whether a concept is in the neuron. One more start leans towards it,
            on the side where the neuron already lies.
        seeds: Seed of each neuron for adamw; None for settings.seed + index. The circle solver draws nothing.
        progress: Function called with the number of neurons just finished.

    Returns:
        The channels.

    Raises:
        BadInput: If shapes do not fit, a name is unknown, a value is not finite, or a neuron has length 0.
        Failure: If one row does not fit in memory.
    """
    _check(neurons, unembedding, token_weights, settings, tilt)
    neurons = neurons.to(unembedding)
    if tilt is not None:
        tilt = tilt.to(unembedding).expand_as(neurons)
    seeds = list(seeds) if seeds is not None else [settings.seed + index for index in range(len(neurons))]
    while True:
        try:
            work = _new_work(neurons, unembedding, token_weights, settings, tilt)
            with _products(work.unit, settings.precision if settings.solver == "circle" else "float32"):
                (_run_circle if settings.solver == "circle" else _run_adamw)(work, seeds, progress or _silent)
            found = torch.tensor(work.found, device=neurons.device)
            return FoundChannels(**work.results, found=found, products=work.products)
        except torch.OutOfMemoryError as error:
            if settings.rows < 2:
                raise Failure("The device has no memory for a single neuron of this vocabulary.") from error
            settings = replace(settings, rows=settings.rows // 2)
            warnings.warn(f"Out of memory: going on with {settings.rows} searches at once.", stacklevel=2)


def _silent(_count: int) -> None:
    """Ignore a report of progress."""


@contextmanager
def _products(unit: Tensor, precision: str) -> Iterator[None]:
    """Let a CUDA device multiply float32 matrices in `precision` within this block; elsewhere nothing changes."""
    before = torch.get_float32_matmul_precision()
    if unit.device.type == "cuda":
        torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _use_kernels(settings: SolverSettings, unembedding: Tensor) -> bool:
    """Tell whether the Triton kernels run: on request, or by default on a CUDA device where Triton is installed."""
    if settings.kernels == "auto":
        here = unembedding.device.type == "cuda" and unembedding.dtype == torch.float32
        return here and importlib.util.find_spec("triton") is not None
    return settings.kernels == "triton"


def memory_bound(
    neurons: int, vocabulary: int, size: int, settings: SolverSettings, *, claimed: int = 0, width: int = 4
) -> int:
    """Bound the memory that the circle solver takes on the CPU beside its arguments.

    The bound is `width · [3/2 V d + r (2 V + 8 d) + 10 max(2¹⁸, 8 V) + N (1 + C) d] + 24 N C k + 48 r · claimed`. There
    r = settings.rows rows are searched at once, but no more than the neurons have starts. C is the number of channels
    and k that of top tokens.

    The first term is a copy of the vocabulary matrix, and half of one for what the matrix library packs. The next are
    two projections and a few vectors for each row, the temporaries of one chunk, and the results.

    Args:
        neurons: Number N of neurons.
        vocabulary: Number V of tokens.
        size: The width d.
        settings: How channels are searched.
        claimed: Number of tokens that a neuron's channels have masked so far.
        width: Bytes of a number.

    Returns:
        The bound in bytes.
    """
    rows = min(settings.rows, STARTS * neurons)
    numbers = vocabulary * size * 3 // 2 + rows * (2 * vocabulary + 8 * size)
    numbers += 10 * max(batch.CPU_CHUNK, batch.PRODUCT_ROWS * vocabulary)
    numbers += neurons * (1 + settings.channels) * size
    return width * numbers + 24 * neurons * settings.channels * settings.top_tokens + 48 * rows * claimed


def _check(
    neurons: Tensor, unembedding: Tensor, token_weights: Tensor, settings: SolverSettings, tilt: Tensor | None
) -> None:
    if neurons.dim() != 2 or unembedding.dim() != 2 or neurons.shape[1] != unembedding.shape[1]:
        raise BadInput(
            f"Neurons {list(neurons.shape)} and vocabulary {list(unembedding.shape)} must have rows of one length."
        )
    if token_weights.shape != unembedding.shape[:1]:
        raise BadInput(f"There are {token_weights.numel()} token weights for {len(unembedding)} tokens.")
    if tilt is not None and tilt.shape not in (neurons.shape, neurons.shape[1:]):
        raise BadInput(f"The tilt has shape {list(tilt.shape)}, the neurons have {list(neurons.shape)}.")
    if settings.solver not in SOLVERS:
        raise BadInput(f"The solver must be one of {', '.join(SOLVERS)}, not {settings.solver!r}.")
    if settings.kernels not in KERNELS or settings.precision not in PRECISIONS:
        raise BadInput(f"Kernels must be one of {', '.join(KERNELS)}, the precision one of {', '.join(PRECISIONS)}.")
    if settings.moments not in (None, *MOMENTS):
        raise BadInput(f"The moments must be one of {', '.join(MOMENTS)}, not {settings.moments!r}.")
    if settings.only_tilt and (tilt is None or settings.solver != "circle"):
        raise BadInput("A search from the tilt alone needs a tilt and the circle solver.")
    counts = (settings.channels, settings.rows, settings.iterations, settings.steps, settings.top_tokens)
    if min(*counts, settings.unsupported_limit) < 1:
        raise BadInput("Channels, rows, iterations, steps, top tokens and the unsupported limit must be at least 1.")
    if not bool((token_weights > 0).any()):
        raise BadInput("No token of the vocabulary counts: every token weight is 0.")
    # A sum is finite only when all its terms are, and costs no mask as large as the matrix.
    if not bool(neurons.sum().isfinite()) or not bool(unembedding.sum().isfinite()):
        raise BadInput("The neurons or the vocabulary matrix hold a value that is not finite.")
    if bool((neurons == 0).all(dim=1).any()):
        raise BadInput("A neuron vector of length 0 has no channels; leave it out.")


@dataclass
class _Work:
    """What one call of `find_channels` keeps: the input and the results so far.

    It also keeps each neuron's masked places, and the mean and spread of the neuron's own projection.
    """

    neurons: Tensor
    unit: Tensor
    objective: Objective
    settings: SolverSettings
    tilt: Tensor | None
    results: dict[str, Tensor]
    claims: list[Tensor]
    nothing: Tensor
    unsupported: list[int]
    found: list[int]
    own: Tensor
    products: int = 0


def _new_work(
    neurons: Tensor, unembedding: Tensor, token_weights: Tensor, settings: SolverSettings, tilt: Tensor | None
) -> _Work:
    objective = make_objective(
        unembedding,
        token_weights,
        settings.moments or ("zeroed" if settings.solver == "adamw" else "weighted"),
        sharpness=settings.sharpness,
        fidelity=settings.fidelity,
        claimed_weight=settings.claimed_weight,
        fused=_use_kernels(settings, unembedding),
    )
    count, size = neurons.shape
    channels, device = settings.channels, neurons.device
    results = {
        name: torch.zeros(count, channels, dtype=neurons.dtype, device=device)
        for name in ("kurtosis", "skewness", "cosine", "loss", "support")
    }
    results |= {name: torch.zeros(count, channels, dtype=torch.int64, device=device) for name in ("sign", "claimed")}
    results["vectors"] = torch.zeros(count, channels, size, dtype=neurons.dtype, device=device)
    results["token_ids"] = torch.full((count, channels, settings.top_tokens), -1, dtype=torch.int64, device=device)
    results["z_scores"] = torch.zeros(count, channels, settings.top_tokens, dtype=neurons.dtype, device=device)
    nothing = torch.zeros(0, dtype=torch.int64, device=device)
    return _Work(
        neurons=neurons,
        unit=normalize(neurons, dim=1),
        objective=objective,
        settings=settings,
        tilt=tilt,
        results=results,
        claims=[nothing] * count,
        nothing=nothing,
        unsupported=[0] * count,
        found=[0] * count,
        own=neurons.new_zeros(count, 2),
    )


def _run_adamw(work: _Work, seeds: Sequence[int], progress: Progress) -> None:
    """Search blocks of neurons one after another, and in each block the channels one after another (published code)."""
    for low in range(0, len(work.neurons), work.settings.rows):
        live = list(range(low, min(low + work.settings.rows, len(work.neurons))))
        while live:
            vectors, steps = search_adamw(
                work.unit[live],
                work.objective,
                [work.claims[neuron] for neuron in live],
                [seeds[neuron] for neuron in live],
                work.settings.steps,
            )
            work.products += 2 * steps * len(live)
            for neuron, vector in zip(live, vectors):
                work.results["vectors"][neuron, work.found[neuron]] = vector
            going_on = _record(work, live)
            progress(len(live) - len(going_on))
            live = going_on


def _run_circle(work: _Work, _seeds: Sequence[int], progress: Progress) -> None:
    """Search every start of every neuron as one row; rows that are done leave and waiting ones enter.

    Neurons are recorded and begun in groups, since a group costs hardly more than a single one.
    """
    settings = work.settings
    starts = 1 if settings.only_tilt else STARTS + (work.tilt is not None)
    capacity = max(starts, min(settings.rows, starts * len(work.neurons)))
    group = max(1, capacity // (2 * starts))
    search, claims = batch.new_search(work.objective, capacity), None
    grid = angle_grid(work.objective, ASKING_REACH if settings.only_tilt else torch.pi)
    waiting = deque(range(len(work.neurons)))
    best = torch.full((len(work.neurons),), torch.inf, dtype=work.objective.exact, device=work.neurons.device)
    missing: dict[int, int] = {}
    reached: dict[int, float] = {}
    complete: list[int] = []
    changed = True
    while waiting or complete or search.count:
        if len(complete) >= group or (complete and not search.count):
            going_on = _record(work, complete)
            progress(len(complete) - len(going_on))
            waiting.extendleft(reversed(going_on))
            complete = []
        room = (capacity - search.count) // starts
        if waiting and (room >= group or not search.count):
            begun = [waiting.popleft() for _ in range(min(room, len(waiting)))]
            points, plain = _starts(work, begun)
            for column in range(starts):
                batch.enter(search, work.unit[begun], points[:, column], begun, plain[:, column])
            missing |= dict.fromkeys(begun, starts)
            best[begun] = torch.inf
            changed = True
        if not search.count:
            break
        if changed:
            claims = batch.pad_claims([work.claims[neuron] for neuron in search.owner], work.objective)
        batch.step(search, work.objective, claims, grid, settings.tolerance)
        owners = torch.tensor(search.owner, device=best.device)
        best.scatter_reduce_(0, owners, search.loss[: search.count], "amin")
        done = batch.finished(search, best[owners], owners, settings.iterations)
        changed = bool(done)
        leading: dict[int, int] = {}
        for row, loss in zip(done, search.loss[done].tolist()):
            neuron = search.owner[row]
            if loss < reached.get(neuron, math.inf):
                reached[neuron], leading[neuron] = loss, row
            missing[neuron] -= 1
            if not missing[neuron]:
                complete.append(neuron)
                del reached[neuron]
        if leading:
            places = list(leading), [work.found[neuron] for neuron in leading]
            work.results["vectors"][places] = search.point[list(leading.values())]
        batch.leave(search, done)
    work.products += search.products


def _starts(work: _Work, neurons: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Compute unit starting points [n, starts, d] and how many plain steps each begins with, int64 [n, starts].

    The starts are ŵ, ŵ tilted towards the upper and the lower side of its projection, and ŵ tilted towards `tilt`. With
    `only_tilt` only the last is used. From the second channel on, the first start lies halfway between ŵ and the
    channel before.
    """
    unit, lean = work.unit[list(neurons)], work.settings.start_tilt
    found = torch.tensor([work.found[neuron] for neuron in neurons], device=unit.device)
    tilted = []
    if work.tilt is not None:
        tilt = work.tilt[list(neurons)]
        tilted.append(torch.where((tilt * unit).sum(dim=1, keepdim=True) < 0, -tilt, tilt))
    if not work.settings.only_tilt:
        tilted += _tails(work, neurons)
    points = [normalize(unit + lean * normalize(line, dim=1), dim=1) for line in tilted]
    if not work.settings.only_tilt:
        before = work.results["vectors"][list(neurons), (found - 1).clamp_min(0)]
        points.append(normalize(unit + normalize(before, dim=1), dim=1))
    plain = found.new_zeros(len(found), len(points))
    plain[:, -1] = torch.where((found == 0) & (not work.settings.only_tilt), PLAIN_STEPS, 0)
    return torch.stack(points, dim=1), plain


def _tails(work: _Work, neurons: Sequence[int]) -> list[Tensor]:
    """Compute the mean rows of ŵ's ten strongest unmasked tokens on the upper and the lower side, [n, d] each."""
    unit, matrix = work.unit[list(neurons)], work.objective.matrix
    work.products += len(unit)
    count = min(work.settings.top_tokens, len(matrix))
    tails = [torch.empty_like(unit), torch.empty_like(unit)]
    ignored = work.objective.token_weights <= work.objective.claimed_weight
    for rows in batch.chunks(len(unit), len(matrix), matrix.device, batch.PRODUCT_ROWS):
        values = unit[rows] @ matrix.T
        for tail, sign in zip(tails, (1, -1)):
            values.masked_fill_(ignored, -sign * torch.inf)
            for row, neuron in enumerate(neurons[rows]):
                if len(work.claims[neuron]):
                    values[row, work.claims[neuron]] = -sign * torch.inf
            tail[rows] = sign * matrix[values.topk(count, dim=1, largest=sign > 0).indices].mean(dim=1)
    return tails


def _record(work: _Work, neurons: Sequence[int]) -> list[int]:
    """Describe one more channel of each neuron, whose vector is there already; return the neurons that go on."""
    going_on = []
    for rows in batch.chunks(len(neurons), len(work.objective.reading), work.unit.device, batch.PRODUCT_ROWS):
        some = list(neurons[rows])
        with _products(work.unit, "float32"):
            supports = _describe(work, some)
        for neuron, support in zip(some, supports):
            work.found[neuron] += 1
            unsupported = 0 if support >= work.settings.support_threshold else work.unsupported[neuron] + 1
            work.unsupported[neuron] = unsupported
            if work.found[neuron] < work.settings.channels and unsupported < work.settings.unsupported_limit:
                going_on.append(neuron)
            else:
                work.claims[neuron] = work.nothing
    return going_on


def _describe(work: _Work, neurons: list[int]) -> list[float]:
    """Fill in the next channel of each neuron from its vector, mask its tokens, and return the supports.

    The loss is computed again from the definition, in the dtype of the vocabulary matrix.
    """
    objective, settings, results = work.objective, work.settings, work.results
    unit, index = work.unit[neurons], torch.tensor([work.found[neuron] for neuron in neurons])
    vectors = normalize(results["vectors"][neurons, index], dim=1)
    values = vectors @ objective.reading.T
    work.products += len(unit)
    cosine = (vectors * unit).sum(dim=1)
    weights = claimed_weights(objective, [work.claims[neuron] for neuron in neurons])
    loss = loss_of(values, weights, cosine, objective)
    mean, spread, skewness, kurtosis = shape_of(values)
    z_scores = values.sub_(mean[:, None]).div_(spread[:, None])
    sign = torch.where(skewness < 0, -1, 1)
    top = (z_scores * sign[:, None]).topk(min(settings.top_tokens, z_scores.shape[1]), dim=1).indices
    support = _own_z_scores(work, neurons, top).mean(dim=1) * sign
    top_z_scores = z_scores.gather(1, top)
    claimed = _claim(work, neurons, z_scores, skewness)
    numbers = {"kurtosis": kurtosis, "skewness": skewness, "cosine": cosine, "loss": loss, "support": support}
    numbers |= {"sign": sign, "claimed": torch.tensor(claimed, device=sign.device)}
    for name, column in numbers.items():
        results[name][neurons, index] = column
    results["vectors"][neurons, index] = vectors * work.neurons[neurons].norm(dim=1, keepdim=True)
    results["token_ids"][neurons, index, : top.shape[1]] = objective.tokens[top]
    results["z_scores"][neurons, index, : top.shape[1]] = top_z_scores
    return support.tolist()


def _own_z_scores(work: _Work, neurons: list[int], places: Tensor) -> Tensor:
    """Compute z-scores of places [n, k] in each neuron's own projection; mean and spread are taken once a neuron."""
    new = [neuron for neuron in neurons if work.found[neuron] == 0]
    if new:
        work.products += len(new)
        spread, mean = torch.std_mean(work.unit[new] @ work.objective.reading.T, dim=1, correction=0)
        work.own[new] = torch.stack([mean, spread], dim=1)
    mean, spread = work.own[neurons].unbind(dim=1)
    values = (work.objective.reading[places] @ work.unit[neurons][:, :, None])[:, :, 0]
    return (values - mean[:, None]) / spread.clamp_min(torch.finfo(values.dtype).tiny)[:, None]


def _claim(work: _Work, neurons: list[int], z_scores: Tensor, skewness: Tensor) -> list[int]:
    """Mask the tokens of each channel for later searches of its neuron, and return how many each channel masked.

    With skewness above +10 these are the tokens with z > t, and below −10 those with z < −t. Otherwise both sides
    count. When fewer than ten new tokens pass, the ten strongest that are not yet masked are taken. So a cluster too
    large ever to pass t does not come back for ever.
    """
    side = (skewness > SKEW_LIMIT).to(skewness) - (skewness < -SKEW_LIMIT).to(skewness)
    strength = torch.where(side[:, None] == 0, z_scores.abs(), z_scores * side[:, None])
    for row, neuron in enumerate(neurons):
        if len(work.claims[neuron]):
            strength[row, work.claims[neuron]] = -torch.inf
    passed = strength > work.settings.claim_threshold
    counts = passed.sum(dim=1).tolist()
    minimum = min(work.settings.claim_minimum, strength.shape[1])
    strongest = strength.topk(minimum, dim=1).indices
    taken = []
    for row, neuron in enumerate(neurons):
        new = passed[row].nonzero()[:, 0] if counts[row] >= minimum else strongest[row]
        work.claims[neuron] = torch.cat([work.claims[neuron], new])
        taken.append(len(new))
    return taken
