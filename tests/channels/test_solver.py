"""The solver: exactness of the circle, gradients, planted truth, invariances, claims, determinism."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import hypothesis
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from places import ROOT
from planted import planted
from torch.nn.functional import normalize
from torch.overrides import TorchFunctionMode

from rotate_edit.channels import batch
from rotate_edit.channels import great_circle as circle
from rotate_edit.channels.objective import claimed_weights, loss_of, make_objective
from rotate_edit.channels.solver import SolverSettings, _claim, _new_work, find_channels
from rotate_edit.errors import BadInput, Failure
from rotate_edit.vocabulary.tokens import token_weights


def small_problem(moments: str, seed: int = 0, rows: int = 5, size: int = 12, vocabulary: int = 150):
    """An anisotropic float64 objective with zero, tiny and full weights, some claims, unit neurons and points."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    unembedding = draw(vocabulary, size) ** 3 + draw(size)
    weights = torch.ones(vocabulary, dtype=torch.float64)
    weights[::7], weights[3::11] = 0.0, 1e-4
    objective = make_objective(unembedding, weights, moments)
    places = len(objective.tokens)
    claims = [torch.randperm(places, generator=generator)[: 9 * (row % 3)] for row in range(rows)]
    neurons, points = normalize(draw(rows, size), dim=1), normalize(draw(rows, size), dim=1)
    return unembedding, objective, claims, neurons, points


def direct_loss(objective, claims, neurons, points):
    """The loss straight from its definition, through the reference in `objective.py`."""
    weights = claimed_weights(objective, claims)
    return loss_of(points @ objective.reading.T, weights, (points * neurons).sum(dim=1), objective)


def entered(objective, claims, neurons, points):
    """A search that has taken its first step, so that it stands at `points` with gradient and direction."""
    search = batch.new_search(objective, len(points))
    batch.enter(search, neurons, points, list(range(len(points))))
    padded, grid = batch.pad_claims(claims, objective), circle.angle_grid(objective)
    batch.step(search, objective, padded, grid, 0.0)
    return search, padded, grid


@pytest.mark.parametrize("moments", ["weighted", "zeroed"])
def test_loss_on_the_circle_is_exact(moments):
    _, objective, claims, neurons, points = small_problem(moments)
    search, padded, _ = entered(objective, claims, neurons, points)
    n = search.count
    search.other[:n] = search.direction[:n] @ objective.matrix.T
    mixed = batch._mixed_on_batch(search, objective, padded)
    angles = torch.linspace(-3.1, 3.1, 23, dtype=torch.float64)
    cosines = torch.stack([(search.point * neurons).sum(1), (search.direction * neurons).sum(1)], dim=1)
    fast = circle.circle_loss(circle.central_polynomials(mixed), angles, cosines, objective)
    for column, angle in enumerate(angles):
        turned = search.point * angle.cos() + search.direction * angle.sin()
        assert torch.allclose(fast[:, column], direct_loss(objective, claims, neurons, turned), rtol=0, atol=1e-10)


@pytest.mark.parametrize("moments", ["weighted", "zeroed"])
def test_gradient_agrees_with_autograd(moments):
    _, objective, claims, neurons, points = small_problem(moments, seed=1)
    search, _, _ = entered(objective, claims, neurons, points)
    free = search.point.clone().requires_grad_(True)
    unit = free / free.norm(dim=1, keepdim=True)
    direct_loss(objective, claims, neurons, unit).sum().backward()
    assert torch.allclose(search.gradient, free.grad, rtol=0, atol=1e-10)
    assert torch.allclose(search.loss, direct_loss(objective, claims, neurons, points), rtol=0, atol=1e-10)


@pytest.mark.parametrize("moments", ["weighted", "zeroed"])
def test_the_loss_never_rises_and_the_kept_projection_stays_true(moments):
    _, objective, claims, neurons, points = small_problem(moments, seed=2)
    search, padded, grid = entered(objective, claims, neurons, points)
    before = search.loss.clone()
    for _ in range(150):
        batch.step(search, objective, padded, grid, 0.0)
        assert bool((search.loss <= before + 1e-9).all())
        before = search.loss.clone()
    assert torch.allclose(search.loss, direct_loss(objective, claims, neurons, search.point), rtol=0, atol=1e-9)
    assert torch.allclose(search.gradient, torch.zeros_like(search.gradient), atol=1e-4)


def test_planted_concepts_are_found_first():
    truth = planted(neurons=8, size=128, vocabulary=3000, clusters=60)
    weights = token_weights(truth.unembedding)
    found = find_channels(truth.neurons, truth.unembedding, weights, SolverSettings(channels=3))
    assert found.found.tolist() == [3] * 8
    for neuron in range(8):
        for channel in range(3):
            shares = [
                torch.isin(found.token_ids[neuron, channel], truth.clusters[concept]).float().mean().item()
                for concept in truth.concepts[neuron]
            ]
            assert max(shares) >= 0.9


def small_truth(neurons: int = 8, **changes):
    """A planted vocabulary that the whole search takes a moment for, and its token weights."""
    truth = planted(neurons=neurons, size=64, vocabulary=1500, clusters=30, **changes)
    return truth, token_weights(truth.unembedding)


@pytest.mark.parametrize("moments", ["weighted", "zeroed"])
def test_injected_channels_fall_below_the_support_threshold(moments):
    truth = planted(neurons=16)
    settings = SolverSettings(channels=7, moments=moments, unsupported_limit=7)
    found = find_channels(truth.neurons, truth.unembedding, token_weights(truth.unembedding), settings)
    planted_tokens = truth.clusters[truth.concepts].flatten(1)
    real = torch.stack(
        [torch.isin(found.token_ids[row], planted_tokens[row]).float().mean(dim=1) >= 0.5 for row in range(16)]
    )
    assert int((~real).sum()) > 40
    assert float((found.support[~real] < settings.support_threshold).float().mean()) >= 0.95
    assert float((found.support[real] >= settings.support_threshold).float().mean()) >= 0.95


def test_the_search_ends_after_unsupported_channels_in_a_row():
    truth, weights = small_truth()
    few = SolverSettings(channels=9, unsupported_limit=2, support_threshold=1e9)
    assert find_channels(truth.neurons, truth.unembedding, weights, few).found.tolist() == [2] * 8
    all_of_them = SolverSettings(channels=4, unsupported_limit=2, support_threshold=-1e9)
    found = find_channels(truth.neurons, truth.unembedding, weights, all_of_them)
    assert found.found.tolist() == [4] * 8
    stopped = find_channels(truth.neurons, truth.unembedding, weights, few)
    assert not stopped.vectors[:, 2:].any()
    assert bool((stopped.token_ids[:, 2:] == -1).all())


def test_every_number_of_a_channel_is_what_its_vector_says():
    truth, weights = small_truth()
    weights[::9] = 0.0
    found = find_channels(truth.neurons, truth.unembedding, weights, SolverSettings(channels=1))
    counted = weights > 0
    ids = counted.nonzero()[:, 0]

    def z_scores(vectors):
        values = (vectors @ truth.unembedding.T)[:, counted].double()
        return (values - values.mean(1, keepdim=True)) / values.std(1, correction=0, keepdim=True)

    vectors, sign = found.vectors[:, 0], found.sign[:, 0]
    assert torch.allclose(vectors.norm(dim=1), truth.neurons.norm(dim=1), rtol=1e-5)
    assert torch.allclose(found.cosine[:, 0], torch.cosine_similarity(vectors, truth.neurons), atol=1e-5)
    own, channel = z_scores(truth.neurons), z_scores(vectors)
    assert torch.allclose(found.kurtosis[:, 0].double(), (channel**4).mean(1) - 3, rtol=1e-4)
    assert torch.allclose(found.skewness[:, 0].double(), (channel**3).mean(1), rtol=1e-4, atol=1e-4)
    assert bool((sign == torch.where((channel**3).mean(1) < 0, -1, 1)).all())
    top = (channel * sign[:, None]).topk(10, dim=1).indices
    assert bool((found.token_ids[:, 0] == ids[top]).all())
    assert torch.allclose(found.z_scores[:, 0].double(), channel.gather(1, top), atol=1e-3)
    assert torch.allclose(found.support[:, 0].double(), own.gather(1, top).mean(1) * sign, atol=1e-4)


@pytest.mark.parametrize("moments", ["weighted", "zeroed"])
def test_no_channel_is_worse_than_any_start(moments):
    truth, weights = small_truth()
    unembedding, neurons = truth.unembedding.double(), truth.neurons.double()
    found = find_channels(neurons, unembedding, weights, SolverSettings(channels=1, moments=moments))
    objective = make_objective(unembedding, weights.double(), moments)
    unit, none = normalize(neurons, dim=1), [torch.zeros(0, dtype=torch.int64)] * 8
    directions = [torch.zeros_like(unit)]
    for sign in (1, -1):
        strongest = (sign * unit @ objective.matrix[: objective.full].T).topk(10, dim=1).indices
        directions.append(2 * sign * normalize(objective.matrix[strongest].mean(dim=1), dim=1))
    for direction in directions:
        start = direct_loss(objective, none, unit, normalize(unit + direction, dim=1))
        assert bool((found.loss[:, 0] <= start + 1e-9).all())
    assert torch.allclose(
        found.loss[:, 0], direct_loss(objective, none, unit, normalize(found.vectors[:, 0], dim=1)), atol=1e-9
    )


def test_turning_the_residual_stream_turns_the_channels():
    truth, weights = small_truth()
    rotation, _ = torch.linalg.qr(torch.randn(64, 64, generator=torch.Generator().manual_seed(3), dtype=torch.float64))
    unembedding, neurons = truth.unembedding.double(), truth.neurons.double()
    settings = SolverSettings(channels=2)
    plain = find_channels(neurons, unembedding, weights, settings)
    turned = find_channels(neurons @ rotation, unembedding @ rotation, weights, settings)
    assert torch.allclose(plain.loss, turned.loss, atol=1e-7)
    assert torch.allclose(plain.vectors @ rotation, turned.vectors, atol=1e-3)
    assert bool((plain.token_ids == turned.token_ids).all())


@given(scale=st.floats(min_value=1e-3, max_value=1e3))
@hypothesis.settings(max_examples=5, deadline=None)
def test_a_longer_neuron_has_longer_channels_and_nothing_else_changes(scale):
    truth, weights = small_truth(4)
    unembedding, neurons = truth.unembedding.double(), truth.neurons.double()
    settings = SolverSettings(channels=2)
    plain = find_channels(neurons, unembedding, weights, settings)
    scaled = find_channels(neurons * scale, unembedding, weights, settings)
    assert torch.allclose(scaled.vectors, plain.vectors * scale, rtol=1e-6, atol=1e-6 * scale)
    assert torch.allclose(scaled.loss, plain.loss, atol=1e-9)
    assert bool((scaled.token_ids == plain.token_ids).all())


def test_the_order_of_the_tokens_does_not_matter():
    truth, weights = small_truth()
    weights[::9] = 0.0
    order = torch.randperm(1500, generator=torch.Generator().manual_seed(5))
    unembedding, neurons = truth.unembedding.double(), truth.neurons.double()
    settings = SolverSettings(channels=2)
    plain = find_channels(neurons, unembedding, weights, settings)
    shuffled = find_channels(neurons, unembedding[order], weights[order], settings)
    assert torch.allclose(plain.loss, shuffled.loss, atol=1e-9)
    assert bool((order[shuffled.token_ids] == plain.token_ids).all())


def test_claims_lower_weights_to_the_smallest_that_applies():
    _, objective, claims, _, _ = small_problem("zeroed")
    weights = claimed_weights(objective, claims)
    for row, places in enumerate(claims):
        expected = objective.token_weights.clone()
        expected[places] = expected[places].clamp_max(0.01)
        assert torch.equal(weights[row], expected)


def test_claims_take_the_side_of_the_skew_and_at_least_ten_new_tokens():
    places = 4000
    z_scores = torch.zeros(4, places)
    z_scores[:, :12] = torch.linspace(9, 5, 12)
    z_scores[:, 20:35] = -torch.linspace(9, 5, 15)
    z_scores[3] = torch.linspace(-1, 1, places)
    skewness = torch.tensor([10.5, -10.5, 10.0, 0.0])
    work = _work_of(places, 4)
    assert _claim(work, [0, 1, 2, 3], z_scores.clone(), skewness) == [12, 15, 27, 10]
    assert sorted(work.claims[0].tolist()) == list(range(12))
    assert sorted(work.claims[1].tolist()) == list(range(20, 35))
    assert sorted(work.claims[2].tolist()) == [*range(12), *range(20, 35)]
    assert set(work.claims[3].tolist()) == {*range(5), *range(places - 5, places)}
    # The same tokens again: none of them passes twice, so the ten strongest of the rest are taken.
    before = set(work.claims[0].tolist())
    assert _claim(work, [0], z_scores[:1].clone(), skewness[:1]) == [10]
    assert len(set(work.claims[0].tolist()) - before) == 10


def _work_of(places: int, neurons: int):
    matrix = torch.randn(places, 4, generator=torch.Generator().manual_seed(0))
    return _new_work(torch.ones(neurons, 4), matrix, torch.ones(places), SolverSettings(), None)


def test_adamw_keeps_the_candidate_of_largest_kurtosis():
    truth, weights = small_truth(3)
    settings = SolverSettings(solver="adamw", channels=1, steps=250)
    found = find_channels(truth.neurons, truth.unembedding, weights, settings)
    kept = [
        find_channels(truth.neurons, truth.unembedding, weights, replace(settings, steps=steps)).kurtosis[:, 0].abs()
        for steps in (100, 200)
    ]
    assert torch.allclose(found.kurtosis[:, 0].abs(), torch.maximum(*kept))
    assert found.products == 3 * (2 * 250 + 2)


def test_adamw_draws_from_each_neurons_own_seed():
    truth, weights = small_truth(4)
    settings = SolverSettings(solver="adamw", channels=1, steps=100)
    whole = find_channels(truth.neurons, truth.unembedding, weights, settings, seeds=[5, 6, 7, 8])
    part = find_channels(truth.neurons[2:], truth.unembedding, weights, settings, seeds=[7, 8])
    assert torch.allclose(whole.vectors[2:], part.vectors, atol=1e-5)
    other = find_channels(truth.neurons[2:], truth.unembedding, weights, settings, seeds=[9, 10])
    assert not torch.allclose(other.vectors, part.vectors, atol=1e-5)


def test_the_same_call_gives_the_same_bits():
    truth, weights = small_truth()
    first, second = (
        find_channels(truth.neurons, truth.unembedding, weights, SolverSettings(channels=3)) for _ in range(2)
    )
    assert torch.equal(first.vectors, second.vectors)
    assert torch.equal(first.loss, second.loss)
    assert torch.equal(first.token_ids, second.token_ids)


def test_batch_size_does_not_change_the_channels():
    truth = planted(neurons=120, size=32, vocabulary=600, clusters=12)
    weights = token_weights(truth.unembedding)
    losses = [
        find_channels(truth.neurons, truth.unembedding, weights, SolverSettings(channels=1, rows=rows)).loss
        for rows in (360, 100, 24)
    ]
    for loss in losses[1:]:
        assert float(((loss[:, 0] - losses[0][:, 0]).abs() <= 1e-5).float().mean()) >= 0.99


def test_a_tilt_asks_for_a_concept():
    truth = planted(neurons=16)
    weights, clusters = token_weights(truth.unembedding), truth.concepts[:, 3]
    tilt = torch.stack([truth.unembedding[truth.clusters[cluster]].mean(dim=0) for cluster in clusters])
    asked = SolverSettings(channels=1, only_tilt=True)
    found = find_channels(truth.neurons, truth.unembedding, weights, asked, tilt=tilt)
    inside = [
        torch.isin(found.token_ids[row, 0], truth.clusters[cluster]).float().mean().item()
        for row, cluster in enumerate(clusters)
    ]
    there = torch.tensor(inside) >= 0.8
    # The weakest of a neuron's four concepts, which none of the other starts ends in.
    assert int(there.sum()) >= 12
    assert bool((found.sign[there, 0] == torch.sign(truth.strengths[there, 3])).all())
    assert bool((found.support[there, 0] > SolverSettings().support_threshold).float().mean() > 0.9)


def test_one_more_start_does_no_harm():
    truth, weights = small_truth()
    settings = SolverSettings(channels=1)
    without = find_channels(truth.neurons, truth.unembedding, weights, settings)
    with_tilt = find_channels(truth.neurons, truth.unembedding, weights, settings, tilt=torch.ones(64))
    assert bool((with_tilt.loss[:, 0] <= without.loss[:, 0] + 1e-5).all())


def test_progress_counts_every_neuron_once():
    truth, weights = small_truth()
    for solver in ("circle", "adamw"):
        told: list[int] = []
        settings = SolverSettings(solver=solver, channels=2, rows=9, steps=20)
        find_channels(truth.neurons, truth.unembedding, weights, settings, progress=told.append)
        assert sum(told) == 8


def test_no_neurons_have_no_channels():
    truth, weights = small_truth()
    for solver in ("circle", "adamw"):
        found = find_channels(truth.neurons[:0], truth.unembedding, weights, SolverSettings(solver=solver))
        assert found.found.shape == (0,)


class SmallMemory(TorchFunctionMode):
    """A device that has no room for more than so many rows of numbers for each token."""

    def __init__(self, rows, tokens):
        super().__init__()
        self.rows, self.tokens = rows, tokens

    def __torch_function__(self, function, types, arguments=(), options=None):
        if function is torch.zeros and len(arguments) == 2 and arguments[1] == self.tokens and arguments[0] > self.rows:
            raise torch.OutOfMemoryError("no memory")
        return function(*arguments, **(options or {}))


def test_running_out_of_memory_halves_the_rows_and_says_so():
    truth, weights = small_truth()
    tokens = int((weights > 0).sum())
    settings = SolverSettings(channels=1, rows=24)
    with pytest.warns(UserWarning, match="going on with 6"), SmallMemory(10, tokens):
        halved = find_channels(truth.neurons, truth.unembedding, weights, settings)
    whole = find_channels(truth.neurons, truth.unembedding, weights, settings)
    assert torch.allclose(halved.loss, whole.loss, atol=1e-5)
    with pytest.raises(Failure), pytest.warns(UserWarning, match="Out of memory"), SmallMemory(0, tokens):
        find_channels(truth.neurons, truth.unembedding, weights, settings)


MEMORY = """
import sys, torch
from rotate_edit.channels.solver import SolverSettings, find_channels, memory_bound

def resident(name):
    lines = open("/proc/self/status").read().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(name)).split()[1])

torch.set_num_threads(1)
neurons, vocabulary, size = (int(word) for word in sys.argv[1:])
generator = torch.Generator().manual_seed(0)
unembedding = torch.randn(vocabulary, size, generator=generator)
vectors, weights = torch.randn(neurons, size, generator=generator), torch.ones(vocabulary)
settings = SolverSettings(channels=1, iterations=3)
find_channels(vectors[:2], unembedding[:1000].contiguous(), weights[:1000], settings)
before = resident("VmRSS")
find_channels(vectors, unembedding, weights, settings)
peak = resident("VmHWM") - before
print(peak / memory_bound(neurons, vocabulary, size, settings))
"""


def memory_share(neurons: int, vocabulary: int, size: int) -> float:
    """The peak memory of a search in a process of its own over the stated bound."""
    root = ROOT
    words = [sys.executable, "-c", MEMORY, str(neurons), str(vocabulary), str(size)]
    done = subprocess.run(
        words, capture_output=True, text=True, check=True, cwd=root, env=os.environ | {"PYTHONPATH": "."}
    )
    return float(done.stdout)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the memory from /proc")
@pytest.mark.parametrize("neurons", [64, 256, *(pytest.param(many, marks=pytest.mark.slow) for many in (1024, 16_384))])
def test_peak_memory_follows_the_stated_bound(neurons):
    share = memory_share(neurons, 24_000, 256)
    print(f"peak memory of {neurons} neurons, V 24,000, d 256: {share:.3f} of the stated bound")
    assert 0.8 <= share <= 1.2


def test_bad_input_is_refused_in_one_sentence():
    neurons, matrix, weights = torch.randn(3, 8), torch.randn(20, 8), torch.ones(20)
    for arguments, settings in [
        ((torch.randn(3, 7), matrix, weights), SolverSettings()),
        ((neurons, matrix, torch.ones(19)), SolverSettings()),
        ((neurons, matrix, torch.zeros(20)), SolverSettings()),
        ((torch.zeros(3, 8), matrix, weights), SolverSettings()),
        ((neurons * torch.nan, matrix, weights), SolverSettings()),
        ((neurons, matrix, weights), SolverSettings(solver="newton")),
        ((neurons, matrix, weights), SolverSettings(moments="none")),
        ((neurons, matrix, weights), SolverSettings(channels=0)),
        ((neurons, matrix, weights), SolverSettings(only_tilt=True)),
    ]:
        with pytest.raises(BadInput):
            find_channels(*arguments, settings)
