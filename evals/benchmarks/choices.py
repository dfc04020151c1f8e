"""Ways the solver could go, each against the way it goes: products, loss, time. What loses lives in this file alone.

python evals/benchmarks/choices.py [--planted 8192 ...] [--model FOLDER ...] [--neurons 64] [--json FILE]

Every variant replaces one piece of the shipped solver and runs on the same problems (those of `solver.py`). `worse` is
the share of neurons whose loss lies more than 1e-3 above the shipped solver's, `better` the share below by as much.
Later channels depend on what the earlier ones claimed, so for them the mean loss and the supported share are compared.
Since it replaces pieces of the solver, it imports the solver's own modules, which are no part of the public API.
"""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, fields
from pathlib import Path
from unittest.mock import patch

import torch
from measure import machine, parser, show, side_by_side, write_figures
from solver import WORSE, model_problem, planted_problem, share_worse
from torch import Tensor
from torch.nn.functional import normalize

from rotate_edit import FoundChannels, SolverSettings, find_channels, token_weights
from rotate_edit.channels import batch, objective
from rotate_edit.channels import great_circle as circle
from rotate_edit.channels import solver as rotate

PAIRS = 6
LATER = 4
NEWTON_STEPS = 3


def main() -> None:
    """Run every variant on every problem; print one table."""
    options = parser(__doc__.splitlines()[0])
    options.add_argument("--model", action="append", default=[], help="checkpoint folder, Hub id or demo; repeatable")
    options.add_argument("--planted", action="append", type=int, default=[], help="planted vocabulary size; repeatable")
    options.add_argument("--size", type=int, default=256, help="d of the planted vocabularies")
    options.add_argument("--layer", type=int, help="layer of the models' neurons (default: one past the middle)")
    options.add_argument("--neurons", type=int, default=64)
    options.add_argument("--moments", choices=objective.MOMENTS, help="default: the solver's own")
    options.add_argument("--repeats", type=int, default=3)
    choice = options.parse_args()
    if choice.threads:
        torch.set_num_threads(choice.threads)
    if not choice.model and not choice.planted:
        choice.model, choice.planted = ["demo"], [8192]
    problems = {f"planted V {size:,}": planted_problem(size, choice) for size in choice.planted}
    problems |= {Path(model).name: model_problem(model, choice) for model in choice.model}
    measured = {name: compare(*problem, choice) for name, problem in problems.items()}
    columns = ["problem", "variant", "products a channel", "loss", "worse", "better", "supported", "ms a channel"]
    rows = [[name, what, *one.values()] for name, found in measured.items() for what, one in found.items()]
    title = f"Variants of the solver, {choice.neurons} neurons; first channel, or {LATER} where it says later"
    show(f"{title}\n{machine(choice.device)}", columns, rows)
    write_figures(choice.json, {"machine": machine(choice.device), "variants": measured})


def compare(neurons: Tensor, unembedding: Tensor, choice) -> dict[str, dict[str, float]]:
    """The figures of every variant on one problem."""
    neurons, unembedding = neurons.to(choice.device), unembedding.to(choice.device)
    weights = token_weights(unembedding)
    found: dict[str, FoundChannels] = {}
    calls: dict[str, Callable[[], None]] = {}
    for name, (channels, patches) in VARIANTS.items():
        settings = SolverSettings(channels=channels, moments=choice.moments, unsupported_limit=channels)

        def call(name: str = name, settings: SolverSettings = settings, patches: list = patches) -> None:
            with ExitStack() as replaced:
                for room, attribute, value in patches:
                    replaced.enter_context(patch.object(room, attribute, value))
                found[name] = find_channels(neurons, unembedding, weights, settings)

        calls[name] = call
    seconds = side_by_side(calls, choice.repeats, choice.device)
    figures = {}
    for name, (channels, _) in VARIANTS.items():
        ours, shipped = found[name], found[SHIPPED if channels == 1 else SHIPPED_LATER]
        figures[name] = {
            "products": ours.products / (len(neurons) * channels),
            "loss": float(ours.loss.mean()),
            "worse": share_worse(ours, shipped),
            "better": float((ours.loss[:, 0] < shipped.loss[:, 0] - WORSE).float().mean()),
            "supported": float((ours.support >= SolverSettings.support_threshold).float().mean()),
            "ms": 1e3 * seconds[name] / (len(neurons) * channels),
        }
    return figures


@dataclass
class History(batch.Search):
    """A search with the last steps and the changes of the gradient of each row, [capacity, PAIRS, d], newest last."""

    steps: Tensor | None = None
    changes: Tensor | None = None

    def carried(self) -> list[Tensor]:
        """Everything that moves with its row."""
        return [*super().carried(), self.steps, self.changes]


def search_with_history(problem: objective.Objective, capacity: int, plain=batch.new_search) -> History:
    """Room for a search by L-BFGS."""
    search = plain(problem, capacity)
    pairs = search.point.new_zeros(2, capacity, PAIRS, search.point.shape[1])
    return History(
        **{field.name: getattr(search, field.name) for field in fields(search)}, steps=pairs[0], changes=pairs[1]
    )


def quasi_newton(search: History, problem: objective.Objective, angle: Tensor, back: Tensor, first: Tensor) -> None:
    """The next direction by L-BFGS on the sphere: pairs carried along by parallel transport, H₀ the preconditioner."""
    n, tiny = search.count, torch.finfo(back.dtype).tiny
    cos, sin = torch.cos(angle).to(back)[:, None], torch.sin(angle).to(back)[:, None]
    point, direction = search.point[:n], search.direction[:n]
    along = cos * direction - sin * point

    def transport(vectors: Tensor) -> Tensor:
        return vectors + (vectors * direction[:, None]).sum(-1, keepdim=True) * (along - direction)[:, None]

    old = transport(search.gradient[:n, None])[:, 0]
    steps, changes = transport(search.steps[:n, 1:]), transport(search.changes[:n, 1:])
    point[:] = normalize(cos * point + sin * direction, dim=1)
    gradient = batch._tangent(back - problem.fidelity * search.neuron[:n], point)
    steps = torch.cat([steps, (angle.to(back)[:, None] * along)[:, None]], dim=1)
    changes = torch.cat([changes, (gradient - old)[:, None]], dim=1)
    curvature = (steps * changes).sum(-1, keepdim=True)
    fresh = first | (search.iterations[:n] == search.plain[:n] + 1)
    keep = (curvature > 0) & ~fresh[:, None, None]
    steps, changes = torch.where(keep, steps, 0.0), torch.where(keep, changes, 0.0)
    rates = torch.where(keep, 1 / curvature.clamp_min(tiny), 0.0)
    turned, shares = gradient, []
    for pair in reversed(range(PAIRS)):
        shares.append(rates[:, pair] * (steps[:, pair] * turned).sum(1, keepdim=True))
        turned = turned - shares[-1] * changes[:, pair]
    plain = (search.iterations[:n] <= search.plain[:n])[:, None]

    def precondition(vectors: Tensor) -> Tensor:
        return batch._tangent(torch.where(plain, vectors, vectors @ problem.preconditioner), point)

    newest = changes[:, -1]
    scale = curvature[:, -1] / (newest * precondition(newest)).sum(1, keepdim=True).clamp_min(tiny)
    turned = precondition(turned) * torch.where(keep[:, -1], scale, 1.0)
    for pair, share in zip(range(PAIRS), reversed(shares)):
        turned = turned + (share - rates[:, pair] * (changes[:, pair] * turned).sum(1, keepdim=True)) * steps[:, pair]
    proposal = -batch._tangent(turned, point)
    uphill = (proposal * gradient).sum(1, keepdim=True) >= 0
    proposal = torch.where(uphill, -precondition(gradient), proposal)
    search.gradient[:n], search.steps[:n], search.changes[:n] = gradient, steps, changes
    direction[:] = normalize(proposal, dim=1)


def identity_preconditioner(matrix: Tensor, weights: Tensor) -> Tensor:
    """No preconditioner."""
    return torch.eye(matrix.shape[1], dtype=matrix.dtype, device=matrix.device)


def grid_alone(mixed, cosines, problem, grid, forced, points=6):
    """The best angle of the shipped grid, taken as it is."""
    angle = grid[circle.circle_loss(circle.central_polynomials(mixed), grid, cosines, problem).argmin(dim=1)]
    angle = torch.where(forced, torch.pi / 2, angle)
    return angle, *circle._arrive(mixed, angle, cosines, problem, forced)


def equal_grid(mixed, cosines, problem, grid, forced, points=6):
    """The best of 128 equal angles."""
    angles = torch.arange(-63, 65, dtype=grid.dtype, device=grid.device) * (torch.pi / 128)
    return grid_alone(mixed, cosines, problem, angles[:-1], forced)


def newton(mixed, cosines, problem, grid, forced, points=6):
    """The best angle of the shipped grid, improved by Newton's method with exact derivatives between its neighbours."""
    losses = circle.circle_loss(circle.central_polynomials(mixed), grid, cosines, problem)
    index = losses.argmin(dim=1)
    low, start, high = grid[torch.stack([index - 1, index, index + 1]).clamp(0, len(grid) - 1)]
    angle = start
    for _ in range(NEWTON_STEPS):
        slope, bend = derivatives(mixed, angle, cosines, problem)
        away = torch.where(bend > 0, -slope / bend.clamp_min(1e-12), -slope.sign() * 0.25 * (high - low))
        angle = torch.minimum(torch.maximum(angle + away, low), high)
    angle = torch.where(forced, torch.pi / 2, angle)
    loss = circle._arrive(mixed, angle, cosines, problem, forced)[1]
    worse = (loss > losses.gather(1, index[:, None])[:, 0]) & ~forced
    angle = torch.where(worse, start, angle)
    return angle, *circle._arrive(mixed, angle, cosines, problem, forced)


def derivatives(mixed: Tensor, angle: Tensor, cosines: Tensor, problem: objective.Objective) -> tuple[Tensor, Tensor]:
    """First and second derivative of the loss by θ, [n] each, from polynomials in τ = tan θ: `K + 3 = F(τ)/v(τ)²`."""
    variance, fourth = circle.central_polynomials(mixed)
    tangent = torch.tan(angle)
    f, f1, f2 = (value(fourth, tangent, order) for order in range(3))
    v, v1, v2 = (value(variance, tangent, order) for order in range(3))
    kurtosis = f / v**2 - 3
    by_tangent = f1 / v**2 - 2 * f * v1 / v**3
    twice = f2 / v**2 - 4 * f1 * v1 / v**3 - 2 * f * v2 / v**3 + 6 * f * v1**2 / v**4
    stretch = 1 + tangent**2
    first, second = by_tangent * stretch, twice * stretch**2 + 2 * by_tangent * tangent * stretch
    damping = 1 + kurtosis.abs()
    cos, sin = torch.cos(angle), torch.sin(angle)
    slope = -problem.sharpness * first / damping + problem.fidelity * (cosines[:, 0] * sin - cosines[:, 1] * cos)
    bend = -problem.sharpness * (second / damping - kurtosis.sign() * (first / damping) ** 2)
    return slope, bend + problem.fidelity * (cosines[:, 0] * cos + cosines[:, 1] * sin)


def value(polynomial: Tensor, at: Tensor, order: int) -> Tensor:
    """The derivative of some order of polynomials [n, k] at points [n]."""
    for _ in range(order):
        polynomial = polynomial[:, 1:] * torch.arange(1, polynomial.shape[1]).to(polynomial)
    return circle.evaluate(polynomial, at[:, None])[:, 0]


def starts_from(neuron: bool, tails: bool, random: int = 0) -> list[tuple]:
    """Patches for a first channel that starts from the neuron, its tails and random tilts, as asked."""

    def starts(work, neurons):
        unit, lean = work.unit[list(neurons)], work.settings.start_tilt
        generator = torch.Generator().manual_seed(int(neurons[0]))
        lines = rotate._tails(work, neurons) if tails else []
        lines += [torch.randn(unit.shape, generator=generator).to(unit) for _ in range(random)]
        points = [normalize(unit + lean * normalize(line, dim=1), dim=1) for line in lines] + [unit] * neuron
        plain = torch.zeros(len(unit), len(points), dtype=torch.int64, device=unit.device)
        if neuron:
            plain[:, -1] = rotate.PLAIN_STEPS
        return torch.stack(points, dim=1), plain

    return [(rotate, "STARTS", neuron + 2 * tails + random), (rotate, "_starts", starts)]


def later_from(share: float) -> list[tuple]:
    """Patches under which a later channel starts at the neuron plus `share` of the channel before."""
    shipped = rotate._starts

    def starts(work, neurons):
        points, plain = shipped(work, neurons)
        found = torch.tensor([work.found[neuron] for neuron in neurons], device=points.device)
        before = normalize(work.results["vectors"][list(neurons), (found - 1).clamp_min(0)], dim=1)
        mixed = normalize((1 - share) * work.unit[list(neurons)] + share * before, dim=1)
        points[:, -1] = torch.where((found > 0)[:, None], mixed, points[:, -1])
        return points, plain

    return [(rotate, "_starts", starts)]


SHIPPED, SHIPPED_LATER = "shipped", "later: shipped, halfway to the channel before"
LBFGS = [(batch, "new_search", search_with_history), (batch, "_next_direction", quasi_newton)]
PLAIN = [(objective, "make_preconditioner", identity_preconditioner)]
VARIANTS: dict[str, tuple[int, list[tuple]]] = {
    SHIPPED: (1, []),
    "CG, no preconditioner": (1, PLAIN),
    "L-BFGS, preconditioned": (1, LBFGS),
    "L-BFGS, no preconditioner": (1, LBFGS + PLAIN),
    "start: w alone": (1, starts_from(True, False)),
    "start: tails alone": (1, starts_from(False, True)),
    "start: w and two random": (1, starts_from(True, False, 2)),
    "start: w, tails, two random": (1, starts_from(True, True, 2)),
    "angle: shipped grid, not refined": (1, [(batch, "best_angle", grid_alone)]),
    "angle: 127 equal angles": (1, [(batch, "best_angle", equal_grid)]),
    "angle: grid, then Newton": (1, [(batch, "best_angle", newton)]),
    SHIPPED_LATER: (LATER, []),
    "later: from w": (LATER, later_from(0.0)),
    "later: from the channel before": (LATER, later_from(1.0)),
}


if __name__ == "__main__":
    main()
