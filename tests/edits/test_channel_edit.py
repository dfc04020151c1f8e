"""Turning chosen channels: exact on planted vectors, linear in the strength, nothing taken twice."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rotate_edit.channels.channel_set import Channel
from rotate_edit.channels.chosen import Chosen
from rotate_edit.channels.locate import Site
from rotate_edit.edits.channel_edit import channel_edit, coefficients, turned_neurons
from rotate_edit.edits.edit import Edit

WIDTH, NEURONS = 24, 6
MATRICES = {
    (layer, kind): torch.randn(NEURONS, WIDTH, generator=torch.Generator().manual_seed(10 * layer + place))
    for layer in range(2)
    for place, kind in enumerate(("gate", "in", "out"))
}


def read(site: Site, rows: Tensor) -> Tensor:
    return MATRICES[site.layer, site.matrix][rows]


def channel(neuron: int, vector: Tensor, index: int = 0, *, matrix: str = "out", layer: int = 0) -> Channel:
    figures = {"kurtosis": 9.0, "skewness": 1.0, "cosine": 0.5, "loss": -1.0, "support": 3.0, "claimed": 2}
    return Channel(layer, None, neuron, matrix, index, 1, (1, 2), (" a", " b"), (9.0, 8.0), vector=vector, **figures)


def drawn(seed: int) -> Tensor:
    return torch.randn(WIDTH, generator=torch.Generator().manual_seed(seed))


def wish(*channels: Channel, strength: float = 1.0, name: str = "it", beside: tuple[Channel, ...] = ()) -> Chosen:
    return Chosen(name, strength, channels, beside)


def after(edit: Edit, layer: int = 0, matrix: str = "out") -> Tensor:
    vectors = MATRICES[layer, matrix].clone()
    for change in edit.changes:
        if (change.layer, change.matrix) == (layer, matrix):
            vectors[change.rows] += change.delta()
    return vectors


@pytest.mark.parametrize(("strength", "left"), [(1.0, 0.0), (-1.0, 2.0), (2.0, -1.0), (0.25, 0.75)])
def test_a_channel_alone_is_scaled_and_the_rest_of_its_neuron_stays(strength: float, left: float) -> None:
    vector = drawn(1)
    unit = vector / vector.norm()
    before, now = MATRICES[0, "out"], after(channel_edit([wish(channel(3, vector), strength=strength)], read))
    torch.testing.assert_close(now[3] @ unit, left * (before[3] @ unit), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(now[3] - (now[3] @ unit) * unit, before[3] - (before[3] @ unit) * unit)
    others = [row for row in range(NEURONS) if row != 3]
    assert torch.equal(now[others], before[others])


@settings(max_examples=30, deadline=None)
@given(count=st.integers(1, 5), seed=st.integers(0, 99))
def test_strength_one_for_all_takes_out_their_span_and_nothing_else(count: int, seed: int) -> None:
    vectors = [drawn(1000 * seed + place) for place in range(count)]
    wishes = [wish(channel(2, vector, place), name=f"w{place}") for place, vector in enumerate(vectors)]
    now = after(channel_edit(wishes, read))[2]
    basis = torch.linalg.qr(torch.stack(vectors).T.double()).Q
    before = MATRICES[0, "out"][2].double()
    torch.testing.assert_close(now.double(), before - basis @ (basis.T @ before), rtol=1e-5, atol=1e-5)


def test_channels_of_one_neuron_with_strengths_of_their_own_have_the_coefficients_of_least_squares() -> None:
    vectors = [drawn(5), drawn(6)]
    units = torch.stack([vector / vector.norm() for vector in vectors])
    before = MATRICES[0, "out"][1]
    own = torch.linalg.lstsq(units.T, before[:, None]).solution[:, 0]
    torch.testing.assert_close(coefficients(before, units), own, rtol=1e-4, atol=1e-5)
    wishes = [
        wish(channel(1, vectors[0]), name="one"),
        wish(channel(1, vectors[1], 1), name="two", strength=-0.5),
    ]
    expected = before - own[0] * units[0] + 0.5 * own[1] * units[1]
    torch.testing.assert_close(after(channel_edit(wishes, read))[1], expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(after(channel_edit(wishes[::-1], read))[1], expected, rtol=1e-4, atol=1e-5)


def test_a_channel_that_was_found_twice_is_taken_once() -> None:
    vector = drawn(8)
    twice = wish(channel(0, vector), channel(0, vector + 1e-5 * drawn(9), 1))
    once = wish(channel(0, vector))
    torch.testing.assert_close(
        after(channel_edit([twice], read)), after(channel_edit([once], read)), rtol=1e-3, atol=1e-4
    )
    units = torch.stack([vector, vector]) / vector.norm()
    shares = coefficients(MATRICES[0, "out"][0], units)
    torch.testing.assert_close(shares[0], shares[1])


def test_a_wish_may_reach_over_neurons_matrices_and_layers() -> None:
    found = [channel(4, drawn(11)), channel(1, drawn(12)), channel(1, drawn(13), matrix="gate", layer=1)]
    edit = channel_edit([wish(*found)], read)
    assert [(change.layer, change.matrix, change.rows.tolist()) for change in edit.changes] == [
        (0, "out", [1, 4]),
        (1, "gate", [1]),
    ]
    for one in found:
        assert one.vector is not None
        vectors = after(edit, one.layer, one.matrix)
        assert abs(float(vectors[one.neuron] @ one.vector)) < 1e-4
    assert {vector.address for vector in edit.vectors} == {"L0.N4", "L0.N1", "L1.N1"}
    assert len(edit.notes) == 3


def test_what_is_told_of_a_neuron_is_what_became_of_it() -> None:
    chosen, other = channel(5, drawn(20)), channel(5, drawn(21), 1)
    made = wish(chosen, beside=(other,))
    (neuron,) = turned_neurons([made], read)
    before, now = MATRICES[0, "out"][5], after(channel_edit([made], read))[5]
    assert neuron.cosine == pytest.approx(float(torch.nn.functional.cosine_similarity(before, now, dim=0)), abs=1e-5)
    assert (neuron.norm_before, neuron.norm_after) == pytest.approx((float(before.norm()), float(now.norm())), rel=1e-5)
    assert [(told.name, told.strength) for told in neuron.channels] == [(chosen.name, 1.0), (other.name, 0.0)]
    for told, one in zip(neuron.channels, (chosen, other), strict=True):
        assert one.vector is not None
        unit = one.vector / one.vector.norm()
        assert told.before == pytest.approx(float(before @ unit / before.norm()), abs=1e-5)
        assert told.after == pytest.approx(float(now @ unit / before.norm()), abs=1e-5)
