"""The registry of metrics and the gates that are made of it."""

import pytest

from rotate_edit.errors import BadInput
from rotate_edit.evaluation.compare import Plan
from rotate_edit.evaluation.metrics import HIGHER, LOWER, MeasuredModel, Metric, all_metrics, failed_gates, find_metric
from rotate_edit.reporting.content import tiles


def test_every_metric_says_what_it_is() -> None:
    names = [metric.name for metric in all_metrics()]
    assert len(set(names)) == len(names)
    for metric in all_metrics():
        assert find_metric(metric.name) is metric
        assert metric.title
        assert metric.note
        assert metric.better in (HIGHER, LOWER, "")
    headline = [metric.name for metric in all_metrics() if metric.headline]
    assert headline == ["efficacy", "specificity", "harmonic", "first_token_kl"]


def test_an_unknown_metric_is_named_beside_those_that_there_are() -> None:
    with pytest.raises(BadInput, match="there is no metric 'effikacy'; there are efficacy, specificity"):
        find_metric("effikacy")


def test_gates() -> None:
    found = {"efficacy": {"value": 0.95}, "first_token_kl": {"value": 0.01}, "harmonic": {"value": None}}
    assert failed_gates(found, {"efficacy": 0.9, "first_token_kl": 0.02}) == []
    assert failed_gates(found, {"efficacy": 0.95, "first_token_kl": 0.01}) == []
    assert failed_gates(found, {"efficacy": 0.96}) == ["efficacy is 0.95, and at least 0.96 is asked for."]
    assert failed_gates(found, {"first_token_kl": 0.001}) == ["first_token_kl is 0.01, and at most 0.001 is asked for."]
    assert failed_gates(found, {"harmonic": 0.1}) == ["harmonic was not measured, and at least 0.1 is asked for."]
    assert failed_gates(found, {"collateral_kl": 1}) == ["collateral_kl was not measured, and at most 1 is asked for."]
    both = failed_gates(found, {"efficacy": 0.96, "first_token_kl": 0.001})
    assert [sentence.split()[0] for sentence in both] == ["efficacy", "first_token_kl"]


@pytest.mark.parametrize(
    ("name", "words"),
    [("unknown", "there is no metric"), ("distinct_2", "has no better side"), ("amplification", "has no better side")],
)
def test_what_can_be_no_gate(name: str, words: str) -> None:
    with pytest.raises(BadInput, match=words):
        failed_gates({"efficacy": {"value": 1.0}, name: {"value": 1.0}}, {"efficacy": 0.9, name: 0.5})


@pytest.mark.parametrize("bound", [float("nan"), float("inf")])
def test_a_bound_that_is_no_number_is_refused(bound: float) -> None:
    with pytest.raises(BadInput, match="finite"):
        failed_gates({"efficacy": {"value": 0.1}}, {"efficacy": bound})


def test_every_measure_has_a_tile_in_the_order_of_the_metrics() -> None:
    value = {"value": 0.5, "low": 0.4, "high": 0.6, "n": 9, "baseline": 1.0}
    names = [metric.name for metric in all_metrics()]
    shown = [metric.name for metric in all_metrics() if metric.tile]
    measures = dict.fromkeys(reversed(names), value)
    found = tiles({"variants": {"edited": {"measures": measures}}})
    assert [tile["name"] for tile in found] == shown
    for tile in found:
        about = find_metric(tile["name"])
        assert (tile["title"], tile["note"], tile["share"]) == (about.title, about.note, about.unit == "share")
    without = {**measures, "efficacy": {**value, "value": None}}
    assert len(tiles({"variants": {"edited": {"measures": without}}})) == len(shown) - 1


def test_a_value_is_computed_once() -> None:
    model, asked = MeasuredModel(Plan(()), {}), []
    for _ in range(3):
        assert model.once("a", lambda: asked.append(1) or 7) == 7
    assert model.once("b", lambda: 8) == 8
    assert asked == [1]


def test_a_metric_that_measures_nothing_says_so() -> None:
    nothing = Metric()
    nothing.name = "nothing"
    assert nothing.prepare(MeasuredModel(Plan(()), {})) is None
    with pytest.raises(TypeError, match="the metric nothing measures nothing"):
        nothing.measure(MeasuredModel(Plan(()), {}), MeasuredModel(Plan(()), {}), None)
