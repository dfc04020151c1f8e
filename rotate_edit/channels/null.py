"""What support is worth: neurons drawn at random in place of a model's, and p-values against them.

A search for a concept finds it with some support in any vector. How much of it chance gives is read off vectors that
are drawn with the mean and covariance of a matrix's neurons and searched in the same way. `draw_neurons`, `p_values`
and `largest_p_value` are maths. `kept_null` reads and writes one small file of the cache.
"""

import hashlib
import json
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from rotate_edit.errors import BadInput
from rotate_edit.files import cache_folder, write_atomically

VERSION = 2
TAIL = 0.1
"""Share of the null candidates whose supports the tail of the null is fitted to."""
LARGEST_FILE = 10_000_000


@dataclass(frozen=True)
class Null:
    """What the search for a concept finds in neurons drawn at random.

    Attributes:
        count: Number of null candidates, those with a channel of the concept and those without.
        supports: Support of the best channel that carries the concept, for each null candidate that has one, largest
            first.
        every: Support of the best channel of each null candidate, whether it carries the concept or not, largest first.
    """

    count: int
    supports: tuple[float, ...]
    every: tuple[float, ...] = ()


def draw_neurons(vectors: Tensor, generator: torch.Generator) -> Tensor:
    """Draw as many Gaussian vectors as there are neurons, with the mean and covariance of the neurons' directions.

    Scores and support do not depend on a vector's length, so directions are compared: a few long neurons would decide
    the covariance otherwise. Neurons of length 0 do not count.

    Args:
        vectors: The neurons of one matrix, float [N, d_model].
        generator: Source of randomness, on the CPU.

    Returns:
        The vectors, float32 [N, d_model].
    """
    unit = normalize(vectors[(vectors != 0).any(dim=1)].double(), dim=1)
    if not len(unit):
        return torch.zeros_like(vectors, dtype=torch.float32)
    mean = unit.mean(dim=0)
    covariance = (unit - mean).T @ (unit - mean) / len(unit)
    # Fewer neurons than components leave the covariance without full rank.
    floor = (1e-6 * covariance.diagonal().mean() + 1e-30) * torch.eye(len(mean), dtype=covariance.dtype)
    factor = torch.linalg.cholesky(covariance + floor).float()
    return mean.float() + torch.randn(vectors.shape, generator=generator) @ factor.T


def p_values(null: Null, supports: Tensor) -> Tensor:
    """Compute how probable a channel of the concept with at least these supports is in a null candidate.

    Two numbers bound it, and the smaller counts. One is read off the null channels that carry the concept. The other is
    read off all null channels: to carry the concept with so much support is no likelier than to have so much support.
    The second is needed in large vocabularies, where chance hardly ever gives a channel that carries the concept.

    Args:
        null: The null.
        supports: Supports s, float [n].

    Returns:
        The p-values, float64 [n].
    """
    carrying = _exceeded(null.supports, null.count, supports)
    return torch.minimum(carrying, _exceeded(null.every, null.count, supports)) if null.every else carrying


def _exceeded(values: Sequence[float], count: int, supports: Tensor) -> Tensor:
    """How probable a value of at least these supports is, float64 [n].

    Among the values it is the rank, `(1 + #{value >= s}) / (count + 1)`. Beyond the largest tenth the tail is continued
    as an exponential, which falls slower than the tail of a support (a mean of projections) does. With the k largest
    values above u, and S the sum of their excesses,

        p(s) = (k + 1) / (count + 1) * (1 + (s - u) / S)^-k

    is the probability itself when the tail is exponential: the k excesses and a new one are then exchangeable, and the
    formula has the uncertainty of the fit in it.
    """
    known, found = torch.tensor(values, dtype=torch.float64), supports.double()
    ranks = (1 + (known >= found[:, None]).sum(dim=1).double()) / (count + 1)
    tail = min(max(1, math.ceil(TAIL * count)), len(known) - 1)
    if tail < 1:
        return ranks
    edge = known[tail]
    excesses = (known[:tail] - edge).sum().clamp_min(torch.finfo(torch.float64).tiny)
    beyond = (tail + 1) / (count + 1) * (1 + (found - edge).clamp_min(0) / excesses) ** -tail
    return torch.where(found > edge, beyond, ranks)


def largest_p_value(p: Tensor, rate: float) -> float:
    """Find the largest p-value that counts at a false-discovery rate (Benjamini and Hochberg 1995).

    Args:
        p: p-values of everything that was tested, float [n].
        rate: The share of false ones among those that count, in the mean.

    Returns:
        The p-value; -1 when none counts.
    """
    from scipy.stats import false_discovery_control

    counts = torch.from_numpy(false_discovery_control(p.double().numpy())) <= rate if len(p) else p > 0
    return float(p[counts].max()) if bool(counts.any()) else -1.0


def kept_null(parts: dict[str, Any], candidates: int, make: Callable[[], Null]) -> Null:
    """Return a null from the cache folder, or make it and keep it there.

    Args:
        parts: Everything that decides the null, as plain JSON.
        candidates: Number of candidates that the null must have.
        make: Makes it.

    Returns:
        The null.
    """
    key = hashlib.sha256(json.dumps({"version": VERSION, **parts}, sort_keys=True).encode()).hexdigest()
    file = cache_folder() / f"null-{key}.json"
    kept = _read(file, candidates)
    if kept is not None:
        return kept
    null = make()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, json.dumps(asdict(null)))
    except (OSError, BadInput):
        logging.getLogger(__name__).warning("the null that support is compared with cannot be kept in the cache")
    return null


def _read(file: Any, candidates: int) -> Null | None:
    """Read a null; None when there is none or the file is damaged, as a cache may always be."""
    try:
        if file.stat().st_size > LARGEST_FILE:
            return None
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(content, dict) or content.get("count") != candidates:
        return None
    lists: list[list[float]] = []
    for name in ("supports", "every"):
        values = content.get(name)
        if not isinstance(values, list) or len(values) > candidates:
            return None
        if not all(type(one) is float and math.isfinite(one) for one in values):
            return None
        lists.append(values)
    return Null(candidates, *(tuple(sorted(values, reverse=True)) for values in lists))
