"""A run done again: what is compared, how bad a difference is, and what a stranger's reproduce.json may not do."""

import contextlib
import copy
import json
import subprocess
import sys
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
import yaml
from fake_hub import TOKEN, Hub, environment
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_models import save_tiny
from tiny_run import tiny_run

from rotate_edit.errors import BadInput
from rotate_edit.models.checkpoint import open_checkpoint
from rotate_edit.pipeline import repeat
from rotate_edit.recipe import parse_recipe
from rotate_edit.reporting.reproduce import check_same_base, differences, hashes, numbers, read_reproduction
from rotate_edit.session import open_session

RECIPE = {
    "model": "demo",
    "concepts": [
        {
            "name": "dogs",
            "words": ["dog", "collie", "poodle", "beagle", "terrier", "spaniel", "hound", "puppy", "kennel", "leash"],
            "plurals": True,
            "strength": 6,
        }
    ],
    "locate": {"group_distance": 2.0},
    "decompose": {"channels": 1},
    "edit": {"self_text": 4000},
    "evaluate": {"items": "demo", "controls": [], "strengths": [2, 8], "tokens": 300, "limit": 5},
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run(tmp_path_factory.mktemp("runs") / "run")


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that no run here was made with."""
    return save_tiny("qwen2", tmp_path_factory.mktemp("other") / "base", tied=True, dtype=torch.bfloat16)


@pytest.fixture
def content(run: Path) -> dict[str, Any]:
    return json.loads((run / "reproduce.json").read_text())


def found(before: dict[str, Any], now: dict[str, Any]) -> dict[str, str]:
    return {one.what: one.severity for one in differences(before, now)}


def test_everything_that_is_needed_is_there(run: Path, content: dict[str, Any]) -> None:
    recipe, read = read_reproduction(run / "reproduce.json")
    assert parse_recipe(recipe).concepts[0].words == ["dog", "puppy"]
    assert read == content
    assert set(content["seeds"]) == {"recipe", "bootstrap", "sampling"}
    changed = json.loads((run / "edit" / "patch.json").read_text())["tensors"]
    assert set(content["hashes"]) == {"edit", "adapter", *(f"tensor {tensor['name']}" for tensor in changed)}
    assert {"torch", "transformers", "rotate_edit", "python"} <= set(content["versions"])
    accuracy = content["numbers"]["dogs: words (type A), acc, edited"]
    assert accuracy == {"value": 0.2, "low": pytest.approx(0.1), "high": pytest.approx(0.3), "n": 40}
    assert content["numbers"]["strength of test"]["value"] == 1.7


def test_the_damage_of_every_control_is_one_of_the_numbers() -> None:
    rows = [{"method": "silence-words", "collateral_kl": 0.001}, {"method": "random-neurons", "collateral_kl": None}]
    told = dict(numbers({"matched": {"dogs": {"rows": rows}}}))
    assert told["damage of silence-words at equal removal of dogs"]["value"] == 0.001
    assert told["damage of random-neurons at equal removal of dogs"]["value"] is None


def test_the_same_on_the_same_machine_is_no_difference(content: dict[str, Any]) -> None:
    assert differences(content, copy.deepcopy(content)) == []


def test_on_the_same_machine_any_other_number_or_hash_is_serious(content: dict[str, Any]) -> None:
    now = copy.deepcopy(content)
    now["numbers"]["efficacy"]["value"] += 1e-9
    now["hashes"]["edit"] = "f" * 64
    del now["numbers"]["collateral_kl"]
    assert found(content, now) == {"efficacy": "serious", "edit": "serious", "collateral_kl": "serious"}
    told = {one.what: (one.before, one.now) for one in differences(content, now)}
    assert told["edit"][1] == "ffffffffffff…"
    assert told["collateral_kl"] == ("0.25", "missing")


def test_elsewhere_a_number_may_lie_in_its_interval(content: dict[str, Any]) -> None:
    now = copy.deepcopy(content)
    now["versions"]["torch"] = "3.0"
    now["hardware"]["processor"] = "another"
    now["numbers"]["efficacy"]["value"] += 0.05
    now["numbers"]["first_token_kl"]["value"] += 0.2
    now["numbers"]["strength of test"]["value"] = 1.71
    now["hashes"]["edit"] = "f" * 64
    now["hashes"].pop("adapter")
    severities = found(content, now)
    assert severities == {
        "torch": "note",
        "processor": "note",
        "efficacy": "minor",
        "strength of test": "minor",
        "edit": "minor",
        "first_token_kl": "serious",
        "adapter": "serious",
    }
    order = [one.severity for one in differences(content, now)]
    assert order == sorted(order, key=["serious", "minor", "note"].index)


def test_other_questions_or_fewer_of_them_are_serious_anywhere(content: dict[str, Any]) -> None:
    now = copy.deepcopy(content)
    now["versions"]["torch"] = "3.0"
    now["items"]["demo_choice"] = "1" * 64
    now["numbers"]["efficacy"]["n"] = 39
    assert found(content, now) == {"torch": "note", "items demo_choice": "serious", "efficacy": "serious"}


def test_another_base_is_refused(content: dict[str, Any]) -> None:
    with pytest.raises(BadInput, match="is not the base of that run"):
        check_same_base(content, open_checkpoint("demo"))


def test_the_base_may_lie_elsewhere(run: Path, content: dict[str, Any], tmp_path: Path) -> None:
    check_same_base(content, open_checkpoint(run.with_name("base")))
    content["recipe"]["model"] = str(tmp_path / "gone")
    (tmp_path / "reproduce.json").write_text(json.dumps(content))
    with pytest.raises(BadInput, match="gone"):
        repeat(tmp_path / "reproduce.json", tmp_path / "out")
    # Found where it is said to lie here, it is another one.
    with pytest.raises(BadInput, match="demo is not the base of that run"):
        repeat(tmp_path / "reproduce.json", tmp_path / "out", model="demo")


@pytest.mark.parametrize(
    "change",
    [
        {"format": "x"},
        {"version": 2},
        {"recipe": None},
        {"recipe": {"model": "demo"}},
        {"recipe": {"model": "demo", "concepts": [{"name": "a", "words": ["dog"], "strength": 1}], "one\ntwo": 1}},
        {"hashes": []},
        {"numbers": {"a": 1}},
        {"numbers": {"a": {"value": "x", "low": None, "high": None, "n": 1}}},
        {"base": None},
        {"base": {}},
        {"hardware": 3},
    ],
)
def test_strangers_files_are_refused_in_a_sentence(
    run: Path, content: dict[str, Any], tmp_path: Path, change: dict[str, Any]
) -> None:
    path = tmp_path / "reproduce.json"
    path.write_text(json.dumps(content | change))
    with pytest.raises(BadInput) as caught:
        repeat(path, tmp_path / "out", model=str(run.with_name("base")))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_damage_is_read_or_refused(
    content: dict[str, Any], other: Path, tmp_path: Path, data: st.DataObject
) -> None:
    damaged = copy.deepcopy(content)
    place: Any = damaged
    for _ in range(data.draw(st.integers(0, 3))):
        inner = [key for key, value in place.items() if isinstance(value, dict) and value]
        if not inner:
            break
        place = place[data.draw(st.sampled_from(inner))]
    place[data.draw(st.sampled_from(sorted(place)))] = data.draw(JSON)
    path = tmp_path / "reproduce.json"
    path.write_text(json.dumps(damaged))
    with contextlib.suppress(BadInput):
        _, read = read_reproduction(path)
        assert isinstance(differences(read, content), list)
    # The other model is not its base, so that nothing is run; and what refuses it is one sentence.
    with pytest.raises(BadInput) as caught:
        repeat(path, tmp_path / "out", model=str(other))
    assert "\n" not in str(caught.value)


def test_numbers_that_are_not_finite_are_refused(content: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "reproduce.json"
    path.write_text(json.dumps(content).replace("1.7", "NaN"))
    with pytest.raises(BadInput, match="not valid JSON"):
        read_reproduction(path)


def test_code_of_a_stranger_runs_only_when_allowed(tmp_path: Path) -> None:
    items = tmp_path / "items"
    items.mkdir()
    (items / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\ndef text(row):\n    return 'x'\n")
    (items / "task.yaml").write_text(
        "task: mine\ndataset_path: json\ndataset_kwargs: {data_files: {test: rows.jsonl}}\ntest_split: test\n"
        "output_type: loglikelihood\ndoc_to_text: !function code.text\ndoc_to_target: b\n"
    )
    (items / "rows.jsonl").write_text('{"a": "x", "b": "y"}\n')
    recipe = RECIPE | {"evaluate": {"items": str(items)}}
    base = json.loads(json.dumps({"base": _identity()}))
    content = base | {"format": "rotate-edit reproduction", "version": 1, "recipe": recipe}
    content |= {key: {} for key in ("hashes", "items", "numbers", "versions", "hardware")}
    (tmp_path / "reproduce.json").write_text(json.dumps(content))
    with pytest.raises(BadInput, match="allow-code"):
        repeat(tmp_path / "reproduce.json", tmp_path / "out")
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "out").exists()
    read, _ = read_reproduction(tmp_path / "reproduce.json")
    assert open_session(parse_recipe(read), allow_code=True).items
    assert (tmp_path / "ran").exists()


def _identity() -> dict[str, Any]:
    from rotate_edit.models.checkpoint import identity

    return identity(open_checkpoint("demo"))


@pytest.mark.slow
def test_pushed_downloaded_verified_reproduced(tmp_path: Path) -> None:
    hub = Hub()
    Thread(target=hub.serve_forever, daemon=True).start()
    shell = environment(hub.endpoint, tmp_path / "hub-cache", token=TOKEN) | {"OMP_NUM_THREADS": "1"}
    shell |= {"XDG_CACHE_HOME": str(tmp_path / "cache"), "COLUMNS": "200"}

    def call(*arguments: object) -> str:
        command = [sys.executable, "-W", "ignore", *map(str, arguments)]
        done = subprocess.run(command, cwd=tmp_path, env=shell, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    (tmp_path / "dogs.yaml").write_text(yaml.safe_dump(RECIPE))
    call("-m", "rotate_edit", "run", "dogs.yaml", "--output", "run")
    assert "published as me/dogs" in call("-m", "rotate_edit", "push", "run", "me/dogs")
    assert "edit/undo.safetensors" not in hub.models["me/dogs"]
    download = "from huggingface_hub import snapshot_download; snapshot_download('me/dogs', local_dir='down')"
    call("-c", download)
    hub.shutdown()
    hub.server_close()
    assert "tensors are as they should be." in call("-m", "rotate_edit", "verify", "down", "--base", "demo")
    told = call("-m", "rotate_edit", "reproduce", "down/reproduce.json", "--output", "again")
    assert "Reproduced" in told
    assert "difference" not in told
    assert hashes(tmp_path / "run") == hashes(tmp_path / "again")
