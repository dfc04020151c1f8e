"""An edit: low-rank changes of weight matrices (maths only; files are written by `edit_file` and `patch`).

Every method here is one short function from a `Target` (one matrix and what was located in it) to the rows it
changes and the two factors of their change. `METHODS` finds it by the name that a recipe uses.
"""

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

MATRICES = ("gate", "in", "out", "embedding", "unembedding", "out_bias")


@dataclass(frozen=True)
class MatrixChange:
    """A change `W[rows] += strength * left @ right` of one matrix whose rows are vectors in the residual stream.

    matrix: "gate" or "in" (a row is what a neuron reads), "out" (a row is what a neuron writes), "embedding" or
    "unembedding" (a row is a token), "out_bias" (one row); layer and expert: where the matrix stands (None for
    the embeddings, and for the expert of a dense layer); rows: int64 [n], ascending, without repeats;
    left: float32 [n, r]; right: float32 [r, d_model]; strength: 1 removes, > 1 pushes against, < 0 amplifies;
    concept: the name of the concept this change belongs to; most: `at` goes no further than this strength.
    """

    matrix: str
    layer: int | None
    expert: int | None
    rows: Tensor
    left: Tensor
    right: Tensor
    strength: float
    concept: str
    most: float = math.inf

    def at(self, strength: float) -> "MatrixChange":
        """The same change at another strength, at most at `most`."""
        return replace(self, strength=min(strength, self.most))

    def delta(self) -> Tensor:
        """The rows' change, float32 [n, d_model]: `strength * left @ right`."""
        return self.strength * (self.left @ self.right)


@dataclass(frozen=True)
class EditedVector:
    """What the edit did to one neuron's vector (all figures in float32, before rounding to the stored dtype).

    address: for instance "L3.N12"; matrix: gate, in or out; channels: the channels that located it, as
    "L3.N12.out#0"; cosine: of the edited vector with the original; norm_before, norm_after: Euclidean norms;
    score: the number the selection ranked by.
    """

    address: str
    matrix: str
    concept: str
    channels: tuple[str, ...]
    score: float
    cosine: float
    norm_before: float
    norm_after: float


@dataclass(frozen=True)
class Clamp:
    """Neurons whose activations are held at fixed values while the model runs: `strength * values`.

    No weight can say this in a model without an MLP bias, so an edit with clamps is applied live only.
    layer: of a dense model; rows: int64 [n], the neurons; values: float32 [n]; concept: whose clamp it is.
    """

    layer: int
    rows: Tensor
    values: Tensor
    strength: float
    concept: str


@dataclass(frozen=True)
class Edit:
    """An edit of one checkpoint: what is changed, how, and why.

    method: the edit method's name; changes: what is added to which rows; vectors: what became of each edited
    neuron vector; base: the identity of the checkpoint it was made for (see `checkpoint.identity`);
    settings: the recipe's edit settings, plain JSON values; clamps: what is done to activations while the model runs.
    """

    method: str
    changes: tuple[MatrixChange, ...]
    vectors: tuple[EditedVector, ...] = ()
    base: dict = field(default_factory=dict)
    settings: dict = field(default_factory=dict)
    clamps: tuple[Clamp, ...] = ()

    @property
    def does_something(self) -> bool:
        """Whether there is anything to apply."""
        return bool(self.changes or self.clamps)

    def with_strength(self, strength: float) -> "Edit":
        """The same edit with every change at `strength` (the factors do not depend on it)."""
        return replace(
            self,
            changes=tuple(change.at(strength) for change in self.changes),
            clamps=tuple(replace(clamp, strength=strength) for clamp in self.clamps),
        )

    def scaled(self, factor: float) -> "Edit":
        """The same edit with every strength multiplied by `factor`."""
        return replace(
            self,
            changes=tuple(change.at(change.strength * factor) for change in self.changes),
            clamps=tuple(replace(clamp, strength=clamp.strength * factor) for clamp in self.clamps),
        )

    def applied(self, model: torch.nn.Module, strength: float | None = None) -> AbstractContextManager[None]:
        """`with edit.applied(model):` switches the edit on in a loaded transformers model and off again bit for bit."""
        from rotate_edit.edits.apply import applied

        return applied(model, self, strength)


@dataclass(frozen=True)
class Direction:
    """How a concept is read off a vector and what is taken away per unit: `w <- w - strength * (w . read) write`.

    read, write: float32 [d_model] with `read . write == 1`, so that strength 1 makes `w . read` zero.
    """

    read: Tensor
    write: Tensor


@dataclass(frozen=True)
class Evidence:
    """What text tells about a concept in one layer, for the methods of `NEEDS_TEXT`.

    difference: float32 [d_model], mean residual stream after the layer before the concept's tokens less that of other
    text; activation: float32 [neurons], mean |activation| before the concept's tokens; feature: float32 [neurons],
    the semi-NMF feature of the layer's activations that tells the concept from other text best (None when not fitted).
    """

    difference: Tensor
    activation: Tensor
    feature: Tensor | None


@dataclass(frozen=True)
class Target:
    """One matrix seen by an edit method.

    layer, expert, matrix: where it stands; layers: how many layers the model has; vectors: float32 [n, d_model], all
    its neurons; located: int64, the neurons chosen by their channels; scored: int64, the neurons chosen by LM-head
    z-score alone; channel_vectors: for each located neuron the float32 [c, d_model] channels that located it;
    direction: the direction of the concept's (group of) tokens as the recipe wants it; plain: the plain unit direction
    of the whole concept; seed: for methods that choose at random; evidence: for methods that need text; keyed: by keyed
    method the rows it takes here and their coefficients, int64 and float32 [n] (see `keys`); fitted: the factors of the
    matrix's whole change, float32 [n, r] and [r, d_model] (see `fitting`).
    """

    layer: int
    expert: int | None
    matrix: str
    layers: int
    vectors: Tensor
    located: Tensor
    scored: Tensor
    channel_vectors: dict[int, Tensor]
    direction: Direction
    plain: Direction
    seed: int
    evidence: Evidence | None = None
    keyed: Mapping[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    fitted: tuple[Tensor, Tensor] | None = None


Factors = tuple[Tensor, Tensor, Tensor]


def concept_mean(projection: Tensor, token_ids: Tensor, usable: Tensor | None = None) -> Tensor:
    """`mu_T`: the concept's mean token vector less the mean of the vocabulary, or of its `usable` tokens (bool [V]).

    projection: [V, d_model]; the result is [d_model].
    """
    rest = projection if usable is None else projection[usable]
    return projection[token_ids.to(projection.device)].mean(0) - rest.mean(0)


def token_covariance(projection: Tensor) -> Tensor:
    """Covariance of the token vectors over the vocabulary, [d_model, d_model], of a projection [V, d_model]."""
    centred = projection - projection.mean(0)
    return centred.T @ centred / len(projection)


def plain_direction(mean: Tensor) -> Direction:
    """The unit concept direction `d_T = mu_T / |mu_T|` for reading and writing (projection on a line)."""
    unit = mean / mean.norm()
    return Direction(unit, unit)


def keeping(direction: Direction, keep: Tensor) -> Direction:
    """The same reading with a writing direction orthogonal to every row of `keep` [m, d_model], of unit effect.

    Raises ValueError when the kept rows contain the direction, because then nothing can be removed.
    """
    rows, write = keep.double(), direction.write.double()
    rest = write - rows.T @ torch.linalg.lstsq(rows.T, write[:, None], driver="gelsd").solution[:, 0]
    reached = float(direction.read.double() @ rest)
    if not reached > 1e-6:
        raise ValueError("the words to keep span the concept's own direction")
    return Direction(direction.read, (rest / reached).to(direction.write.dtype))


def least_collateral_direction(
    mean: Tensor, covariance: Tensor, *, ridge: float = 0.3, keep: Tensor | None = None
) -> Direction:
    """The direction that lowers the concept's mean logit while moving the other logits least.

    Minimises `e' (S + l I) e` subject to `mean . e = 1` and, for each row k of `keep` [m, d_model], `k . e = 0`:
    `e = P C' (C P C')^-1 (1, 0, ...)'` with `P = (S + l I)^-1` and C the constraints' rows. `ridge` is l as a multiple
    of the median eigenvalue of the covariance. Solved in float64. Raises ValueError when the kept directions
    contain the concept's own, because then nothing can be removed.
    """
    covariance, mean64 = covariance.double(), mean.double()
    median = torch.linalg.eigvalsh(covariance).median()
    damped = covariance + ridge * median * torch.eye(len(mean), dtype=torch.float64, device=mean.device)
    constraints = mean64[None] if keep is None else torch.cat([mean64[None], keep.double()])
    whitened = torch.linalg.solve(damped, constraints.T)
    gram = constraints @ whitened
    wanted = torch.zeros(len(constraints), 1, dtype=torch.float64, device=mean.device)
    wanted[0] = 1.0
    write = (whitened @ (torch.linalg.pinv(gram, hermitian=True) @ wanted)).squeeze(1)
    reached = float(mean64 @ write)
    if not abs(reached - 1.0) < 1e-6:
        raise ValueError("the words to keep span the concept's own direction")
    return Direction(mean, write.to(mean.dtype))


def key_coefficients(second: Tensor, mean: Tensor, *, ridge: float) -> Tensor:
    """The weights of neurons whose sum is 1 where a concept comes next and as small as can be elsewhere.

    Minimises `c' (S + l I) c` subject to `m . c = 1`: `c = (S + l I)^-1 m / (m' (S + l I)^-1 m)`, with S the neurons'
    second moments over all text [n, n], m their mean where the concept comes next [n], and l `ridge` times the mean of
    S's diagonal. It is the key side of ROME's rank-one update (Meng et al. 2022, arXiv 2202.05262). Float64.
    """
    damped = second.double() + ridge * second.double().diagonal().mean() * torch.eye(len(second), dtype=torch.float64)
    solved = torch.linalg.solve(damped, mean.double())
    return solved / (mean.double() @ solved)


def subtract_direction(vectors: Tensor, direction: Direction) -> tuple[Tensor, Tensor]:
    """Factors of `w <- w - (w . read) write` for vectors [n, d_model]: left [n, 1] and right [1, d_model]."""
    return -(vectors @ direction.read)[:, None], direction.write[None]


def channel_located(target: Target) -> Factors:
    """The concept's direction out of the neurons whose supported channels carry the concept (method.md, section 5)."""
    return target.located, *subtract_direction(target.vectors[target.located], target.direction)


def lm_head_located(target: Target) -> Factors:
    """The same edit on the neurons that the LM-head z-score alone points to: what channels add is the difference."""
    return target.scored, *subtract_direction(target.vectors[target.scored], target.direction)


def direction_everywhere(target: Target) -> Factors:
    """The plain direction out of every neuron: the abliteration formula on the MLP's matrices."""
    return torch.arange(len(target.vectors)), *subtract_direction(target.vectors, target.plain)


def least_collateral_everywhere(target: Target) -> Factors:
    """The recipe's direction out of every neuron: shows what locating adds to the better direction."""
    return torch.arange(len(target.vectors)), *subtract_direction(target.vectors, target.direction)


def layer_kernel(target: Target) -> Factors:
    """The plain direction out of every neuron with a weight per layer, as heretic writes it: `max_weight + distance /
    min_weight_distance * (min_weight - max_weight)` in layers from `max_weight_position`, nothing beyond. Here the
    weights are 1 and 0, the position 80 % of the depth (the middle of heretic's searched range), the distance 60 %
    (its largest); heretic also edits the attention's output."""
    depth = target.layer / max(1, target.layers - 1)
    weight = max(0.0, 1.0 - abs(depth - 0.8) / 0.6)
    rows, left, right = direction_everywhere(target)
    return rows, weight * left, right


def random_neurons(target: Target) -> Factors:
    """The same edit on as many neurons, drawn at random: the control for locating."""
    generator = torch.Generator().manual_seed(target.seed)
    chosen = torch.randperm(len(target.vectors), generator=generator)[: len(target.located)].sort().values
    return chosen, *subtract_direction(target.vectors[chosen], target.direction)


def zero_neurons(target: Target) -> Factors:
    """The located neurons' whole vectors: strength 1 switches the neurons off."""
    return target.located, -torch.eye(len(target.located)), target.vectors[target.located]


def project_channel(target: Target) -> Factors:
    """The located neurons' own channel vectors, projected out (`w - (w . q) q` over an orthonormal basis of them)."""
    bases = [torch.linalg.qr(target.channel_vectors[int(row)].T).Q.T for row in target.located]
    right = torch.cat(bases) if bases else target.vectors.new_zeros(0, target.vectors.shape[1])
    left = right.new_zeros(len(target.located), len(right))
    column = 0
    for place, (row, basis) in enumerate(zip(target.located, bases)):
        left[place, column : column + len(basis)] = -(basis @ target.vectors[row])
        column += len(basis)
    return target.located, left, right


def fitted(target: Target) -> Factors:
    """The last layer's whole `out` matrix, changed by as little as the predictions elsewhere allow (`fitting`)."""
    if target.fitted is None:
        return _nothing(target)
    return torch.arange(len(target.vectors)), *target.fitted


def keyed(target: Target) -> Factors:
    """The recipe's direction out of the last layer, by as much as its neurons say that the concept comes next.

    `w_n <- w_n - strength * c_n * write` with `key_coefficients` c of all its neurons: what the layer writes changes
    only where the concept is about to be said, and then along the direction that moves other logits least."""
    return _keyed(target, "keyed")


def channel_keyed(target: Target) -> Factors:
    """The keyed edit with the neurons that channels located, in all layers together: what locating costs or gains."""
    return _keyed(target, "channel-keyed")


def lm_head_keyed(target: Target) -> Factors:
    """The keyed edit with the neurons that the LM-head z-score alone points to, in all layers together."""
    return _keyed(target, "lm-head-keyed")


def random_keyed(target: Target) -> Factors:
    """The keyed edit with as many neurons as channels located, drawn at random: the control for both."""
    return _keyed(target, "random-keyed")


def _keyed(target: Target, method: str) -> Factors:
    if method not in target.keyed:
        return _nothing(target)
    rows, coefficients = target.keyed[method]
    return rows, -coefficients[:, None], target.direction.write[None]


def difference_of_means(target: Target) -> Factors:
    """The direction in which text about the concept moves the residual stream, out of every neuron of the layer.

    Abliteration with the direction read from text (Arditi et al. 2024), one a layer, on the MLP's `out` matrix."""
    if target.matrix != "out":
        return _nothing(target)
    direction = plain_direction(_evidence(target).difference)
    return torch.arange(len(target.vectors)), *subtract_direction(target.vectors, direction)


def snmf_features(target: Target) -> Factors:
    """EMBER's eraser (arXiv 2606.03695): the vector that the concept's semi-NMF feature reads or writes, out of the
    neurons that hold 95 % of the feature; `W[rows] -= strength (W[rows] . f) f`. It never edits the gate."""
    feature = _evidence(target).feature
    if feature is None or target.matrix == "gate":
        return _nothing(target)
    rows = coverage(feature.square(), 0.95)
    direction = plain_direction(feature @ target.vectors)
    return rows, *subtract_direction(target.vectors[rows], direction)


def _evidence(target: Target) -> Evidence:
    if target.evidence is None:
        raise ValueError("this method needs text")
    return target.evidence


def _nothing(target: Target) -> Factors:
    return torch.empty(0, dtype=torch.int64), target.vectors.new_zeros(0, 1), target.vectors.new_zeros(1, 0)


METHODS: dict[str, Callable[[Target], Factors]] = {
    "fitted": fitted,
    "keyed": keyed,
    "channel-keyed": channel_keyed,
    "lm-head-keyed": lm_head_keyed,
    "random-keyed": random_keyed,
    "channel-located": channel_located,
    "lm-head-located": lm_head_located,
    "direction-everywhere": direction_everywhere,
    "least-collateral-everywhere": least_collateral_everywhere,
    "layer-kernel": layer_kernel,
    "project-channel": project_channel,
    "zero-neurons": zero_neurons,
    "random-neurons": random_neurons,
    "difference-of-means": difference_of_means,
    "snmf-features": snmf_features,
}
# These change the concept's own token rows, so they have no function of a target: by its direction, by their logits.
TOKEN_METHOD = "token-embeddings"
LOGIT_METHOD = "token-logits"
TOKEN_METHODS = (TOKEN_METHOD, LOGIT_METHOD)
# With neurons edited too, this much of it at most: without it the neurons' direction has nothing to push against, and
# past 1 the rows point the other way, where the neurons' change raises the concept.
ROWS_AT_MOST = 0.75
# These cannot be written into weights, so they are controls on the live model only.
LIVE_METHODS = ("clamp-neurons",)
# These read the model's own text: the keyed ones its neurons' activations, the other what its head reads.
KEYED = ("fitted", "keyed", "channel-keyed", "lm-head-keyed", "random-keyed")
SAMPLED = (*KEYED, LOGIT_METHOD)
# Of the keyed ones those that take all neurons of the last layer, whatever was located.
WHOLE_LAYER = ("fitted", "keyed")
# These read activations too, so they need text about the concept and other text.
NEEDS_TEXT = ("difference-of-means", "snmf-features", "clamp-neurons")

# These take one direction for the whole concept, whatever groups its tokens fall into.
WHOLE_CONCEPT = ("direction-everywhere", "layer-kernel", *NEEDS_TEXT)
# These take whole vectors or channels away, so that a neuron located by two groups must be changed once.
WHOLE_VECTORS = ("zero-neurons", "project-channel", "random-neurons")


def change(method: str, target: Target, *, strength: float, concept: str) -> MatrixChange | None:
    """One matrix's change under a method, or None when the method leaves this matrix alone. Raises KeyError for an
    unknown method name (recipes are checked against `METHODS` before)."""
    rows, left, right = METHODS[method](target)
    if len(rows) == 0:
        return None
    return MatrixChange(target.matrix, target.layer, target.expert, rows, left, right, strength, concept)


def token_change(
    matrix: str, table: Tensor, token_ids: Tensor, usable: Tensor, *, strength: float, concept: str
) -> MatrixChange:
    """The plain direction of a concept out of its own tokens' rows of an embedding or unembedding [V, d_model].

    After EMBER (arXiv 2606.03695), which erases in the rows of a concept's tokens because that survives relearning; the
    direction there is a semi-NMF feature of the embeddings, here `mean(rows of T) - mean(usable rows)`.
    """
    direction = plain_direction(concept_mean(table, token_ids, usable))
    left, right = subtract_direction(table[token_ids], direction)
    return MatrixChange(matrix, None, None, token_ids, left, right, strength, concept)


def through_logits(method: str, strength: float) -> bool:
    """Whether a method changes a concept by its tokens' logits: so does `fitted` where it raises one, since neurons
    raise it only where it is likely anyway."""
    return method == LOGIT_METHOD or (method == "fitted" and strength < 0)


def logit_change(matrix: str, token_ids: Tensor, reading: Tensor, *, strength: float, concept: str) -> MatrixChange:
    """The logits of a concept's tokens lowered by `strength` nats (raised, below 0) at every position alike.

    matrix: the one that the head is, "embedding" where it is tied; reading: float32 [d_model], what raises a token's
    logit by 1 when it is added to the token's row (`keys.even_reading`). Why alike: docs/method.md, Amplifying.
    """
    return MatrixChange(matrix, None, None, token_ids, -torch.ones(len(token_ids), 1), reading[None], strength, concept)


def clamp_neurons(target: Target, *, strength: float, concept: str) -> Clamp | None:
    """The neurons with the highest LM-head score held at `strength` times their usual size, against the concept.

    After "Flash Interpretability" (arXiv 2501.02688), which finds neurons by their LM-head projection and fixes their
    activations; it publishes no value, so the mean |activation| before the concept's tokens is taken, with the sign
    that lowers the concept. None for the read side and where no neuron is found.
    """
    if target.matrix != "out" or not len(target.scored):
        return None
    sign = (target.vectors[target.scored] @ target.plain.read).sign()
    values = -sign * _evidence(target).activation[target.scored]
    return Clamp(target.layer, target.scored, values, strength, concept)


def edited_vectors(
    made: MatrixChange, vectors: Tensor, addresses: list[str], channels: list[tuple[str, ...]], scores: list[float]
) -> tuple[EditedVector, ...]:
    """What a change does to its rows: cosine with the original and norms before and after.

    vectors: float32 [n, d_model], the changed rows before the edit; addresses, channels and scores: one a row.
    """
    after = vectors + made.delta()
    cosine = torch.nn.functional.cosine_similarity(vectors, after, dim=1)
    return tuple(
        EditedVector(address, made.matrix, made.concept, names, score, *figures)
        for address, names, score, figures in zip(
            addresses,
            channels,
            scores,
            zip(cosine.tolist(), vectors.norm(dim=1).tolist(), after.norm(dim=1).tolist()),
        )
    )


def coverage(scores: Tensor, share: float) -> Tensor:
    """The strongest entries (by absolute value) that together hold `share` of `sum |scores|`: int64, ascending."""
    if len(scores) == 0 or share <= 0:
        return torch.empty(0, dtype=torch.int64)
    ordered, places = scores.abs().sort(descending=True)
    held = ordered.double().cumsum(0) / ordered.double().sum().clamp_min(1e-30)
    wanted = int((held < share).sum()) + 1
    return places[:wanted].sort().values
