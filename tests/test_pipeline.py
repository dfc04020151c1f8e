"""The whole pipeline on the bundled demo model, once, small; every promise about its run folder is checked on it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from demo_session import session_of, words_of
from places import SHARED
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from rotate_edit import applied, load_edit, open_checkpoint, pipeline, verify
from rotate_edit.channels.channel_set import load_channels
from rotate_edit.edits.methods import make_method
from rotate_edit.edits.writing.patch import revert
from rotate_edit.errors import BadInput, Failure
from rotate_edit.evaluation import measures
from rotate_edit.evaluation.tasks import open_items
from rotate_edit.models import batches
from rotate_edit.models.demo import demo_model_folder
from rotate_edit.models.demo.world import concepts
from rotate_edit.recipe import Recipe, parse_recipe


def recipe(**changes: Any) -> Recipe:
    dogs = words_of("dogs", strength=6.5, neighbours=["cats"])
    small: dict[str, Any] = {
        "model": "demo",
        "concepts": [dogs | changes.pop("concept", {})],
        "locate": {"group_distance": 2.0, "candidates": 120},
        "decompose": {"channels": 1},
        "select": {"fdr": 0.3},
        "edit": {"self_text": 3000},
        "evaluate": {
            "items": "demo",
            "controls": ["direction-everywhere", "random-neurons", "channel-located"],
            "strengths": [2, 8],
            "tokens": 500,
            "limit": 60,
        },
    }
    return parse_recipe(small | changes)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("runs") / "run"
    pipeline.run(recipe(), output)
    return output


@pytest.fixture(scope="module")
def result(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "evaluation.json").read_text())


def test_the_run_folder_is_complete_and_nothing_else_is_left(folder: Path) -> None:
    names = {path.name for path in folder.iterdir()}
    assert names >= {
        "recipe.yaml",
        "channels",
        "edit",
        "model",
        "adapter",
        "evaluation.json",
        "report.md",
        "report.html",
    }
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_the_demo_meets_its_promise(result: dict[str, Any]) -> None:
    summary = result["summary"]
    assert summary["efficacy"]["value"] >= 0.90
    assert summary["specificity"]["value"] >= 0.95
    assert summary["first_token_kl"]["value"] <= 0.02
    assert all(summary[name].keys() >= {"value", "low", "high", "n"} for name in summary)


def test_sampled_text_says_how_often_the_concept_leaks(result: dict[str, Any]) -> None:
    asked, neutral = (result["variants"]["edited"]["measures"][f"leak_rate_{about}"] for about in ("asked", "neutral"))
    prompts = [row["about"] for row in result["generations"]]
    assert asked["n"] == 20 * sum(about == "dogs" for about in prompts)
    assert neutral["n"] == 20 * sum(about is None for about in prompts)
    assert asked["value"] < asked["baseline"]
    assert 0 <= asked["low"] <= asked["value"] <= asked["high"] <= 1


def test_every_control_is_on_the_curve(result: dict[str, Any]) -> None:
    assert set(result["curves"]["dogs"]) == {
        "silence-words",
        "direction-everywhere",
        "random-neurons",
        "channel-located",
    }
    strengths = [point["strength"] for point in result["curves"]["dogs"]["silence-words"]]
    # It ends where a tenth is left.
    assert strengths == [2, 6.5]


def test_located_channels_carry_the_concept(result: dict[str, Any], folder: Path) -> None:
    words = set(concepts()["dogs"].words) | set(concepts()["dogs"].plurals.values())
    assert len(result["selected_channels"]) >= 10
    for channel in result["selected_channels"]:
        assert channel["p_value"] is None or channel["p_value"] < 0.3
        inside = sum(token.strip().lower() in words for token in channel["tokens"])
        assert inside >= 5
    stored = {channel.name for channel in load_channels(folder / "channels")}
    assert stored >= {channel["name"] for channel in result["selected_channels"]}


def test_the_filled_in_recipe_runs_again(folder: Path) -> None:
    assert parse_recipe(yaml.safe_load((folder / "recipe.yaml").read_text())) == recipe()


def test_the_patched_checkpoint_is_the_edit_and_nothing_else(folder: Path) -> None:
    checked = verify(open_checkpoint(folder / "model"), load_edit(folder / "edit"), open_checkpoint("demo"))
    assert checked.problems == ()
    assert checked.compared == len(open_checkpoint("demo").stored)


def test_live_edit_patched_checkpoint_and_adapter_are_one_model(folder: Path) -> None:
    from peft import PeftModel

    base = AutoModelForCausalLM.from_pretrained(demo_model_folder(), dtype=torch.bfloat16)
    patched = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.bfloat16)
    edit = load_edit(folder / "edit")
    before = {name: value.clone() for name, value in base.state_dict().items()}
    with applied(base, edit):
        for name, value in base.state_dict().items():
            assert torch.equal(value, patched.state_dict()[name]), name
    assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items())
    ids = torch.tensor([[1, 300, 400, 500, 600]])
    exact = AutoModelForCausalLM.from_pretrained(demo_model_folder(), dtype=torch.float64)
    with torch.no_grad(), applied(exact, edit):
        live = exact(ids).logits
    adapted = PeftModel.from_pretrained(exact, folder / "adapter").double()
    with torch.no_grad():
        assert (adapted(ids).logits - live).abs().max() <= 1e-10 * live.abs().max()


def test_revert_gives_the_base_back_bit_for_bit(folder: Path, tmp_path: Path) -> None:
    revert(open_checkpoint(folder / "model"), folder / "edit", tmp_path / "back")
    original = load_file(demo_model_folder() / "model.safetensors")
    restored = load_file(tmp_path / "back" / "model.safetensors")
    assert original.keys() == restored.keys()
    assert all(torch.equal(original[name], restored[name]) for name in original)


def test_amplifying_raises_the_concept_alike_after_every_opening() -> None:
    wanted = recipe(concept={"strength": -1.5})
    assert wanted.edit.method == "token-logits"
    session = session_of(wanted)
    assert session.items is not None
    model, size = session.model, session.checkpoint.vocabulary_size
    free = [row["text"] for row in session.items.texts["test"] if "dogs" not in (row["concept"], *row["contains"])]
    openings = [" ".join(text.split()[:8]) for text in free[:300]]
    asked = batches.tokenise(session.tokenizer, openings, vocabulary_size=size)
    others = batches.tokenise(session.tokenizer, free[300:], vocabulary_size=size, token_limit=4000)

    def measured() -> tuple[torch.Tensor, float]:
        chances = measures.last_position(model, asked)[:, session.tokens[0].ids].exp().sum(dim=1)
        sums, counts = measures.log_likelihood_by_text(model, others)
        return torch.logit(chances.double()), float(sums.sum() / counts.sum())

    before, likelihood = measured()
    edit = session.edit()
    assert {change.strength for change in edit.changes} == {-1.5}
    assert [(change.matrix, len(change.rows)) for change in edit.changes] == [("embedding", len(session.tokens[0].ids))]
    with applied(model, edit):
        after, louder = measured()
    raised = after - before
    assert 1.3 < float(raised.median()) < 1.7
    assert likelihood - louder < 0.01


def test_a_rank_one_edit_changes_the_last_layer_and_repeats() -> None:
    session = session_of(recipe(edit={"method": "rank-one", "self_text": 2000}))
    groups = session.locate()
    edit = session.build([session.method], groups)["rank-one"]
    assert [(change.matrix, change.layer) for change in edit.changes] == [("out", session.checkpoint.layers - 1)]
    assert len(edit.changes[0].rows) == session.checkpoint.neurons
    # Nothing that was kept is taken again.
    again = session.build([session.method], groups, {})["rank-one"]
    assert torch.equal(edit.changes[0].delta(), again.changes[0].delta())
    least = session.with_settings({"edit.direction": "least-divergence"})
    (other,) = least.build([least.method], groups)["rank-one"].changes
    assert torch.equal(other.left, edit.changes[0].left)
    assert 0.3 < float(torch.cosine_similarity(other.right, edit.changes[0].right)) < 0.999


def test_silence_words_changes_the_last_layer_once_a_concept_and_repeats() -> None:
    settings = {"self_text": 2000, "settings": {"rank": 4, "steps": 3}}
    session = session_of(recipe(locate={"group_distance": 0.5, "candidates": 20}, edit=settings))
    groups = session.locate()
    assert len(groups) > 1
    edit = session.described(session.build([session.method], groups)["silence-words"], groups)
    (change,) = edit.changes
    assert (change.matrix, change.layer) == ("out", session.checkpoint.layers - 1)
    assert len(change.rows) == len(edit.vectors) == session.checkpoint.neurons
    assert change.right.shape == (4, session.checkpoint.hidden_size)
    (again,) = session.build([session.method], groups, {})["silence-words"].changes
    assert torch.equal(change.delta(), again.delta())


def test_silence_words_needs_the_last_layer() -> None:
    edit = {"method": "silence-words", "self_text": 1000}
    with pytest.raises(BadInput, match=r"silence-words rewrite the last layer, 4, which locate\.layers leaves out"):
        session_of(recipe(locate={"layers": [1, 2], "candidates": 20}, edit=edit))


def test_groups_are_edited_together_and_the_whole_concept_is_covered() -> None:
    session = session_of(
        recipe(locate={"group_distance": 0.5, "candidates": 60}, edit={"method": "rank-one", "self_text": 2000})
    )
    methods = [make_method(name) for name in ("rank-one", "channel-located", "direction-everywhere", "zero-neurons")]
    groups = session.locate(methods)
    together = torch.cat([group.ids for group in groups]).sort().values
    assert len(groups) > 3
    assert torch.equal(together, session.tokens[0].ids)
    edits = session.build(methods, groups)
    layers = [change.layer for change in edits["direction-everywhere"].changes]
    assert layers == sorted(set(layers))
    zeroed = [(change.layer, int(row)) for change in edits["zero-neurons"].changes for row in change.rows]
    assert len(zeroed) == len(set(zeroed))


def test_without_channels_nothing_is_searched_and_no_channels_are_written(tmp_path: Path) -> None:
    reported: list[str] = []
    wanted = recipe(edit={"method": "rank-one", "self_text": 2000})
    edit = pipeline.edit_only(
        wanted, tmp_path / "out", checkpoint=False, report=lambda step, done, total: reported.append(step)
    ).edit
    assert [(change.matrix, change.strength) for change in edit.changes] == [("out", 6.5)]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"recipe.yaml", "edit"}
    assert "scan" not in {step.split()[0] for step in reported}
    told = [step for step in reported if "strength" not in step]
    assert list(dict.fromkeys(told)) == ["build edits", "describe the edit", "write edit"]


def test_nothing_located_is_a_failure_with_a_report_and_no_checkpoint(tmp_path: Path) -> None:
    nothing = recipe(
        select={"fdr": 1e-9},
        locate={"candidates": 20, "group_distance": 2.0},
        edit={"method": "channel-located"},
    )
    with pytest.raises(Failure, match=r"No channel of the 20 candidate neurons carries dogs"):
        pipeline.run(nothing, tmp_path / "run")
    assert "No channel" in (tmp_path / "run" / "report.md").read_text().replace("\\", "")
    assert not (tmp_path / "run" / "model").exists()
    assert not (tmp_path / "run" / "edit").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"locate": {"layers": [9]}}, r"locate\.layers: layer 9 is out of range"),
        ({"concept": {"words": ["qqqq", "zzzz"]}}, "none of its words"),
        ({"model": "nowhere/at all/this"}, "neither a folder nor a Hub id"),
        ({"evaluate": {"items": "no-such-items"}}, "no folder of evaluation items"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_written(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(BadInput, match=message):
        pipeline.run(recipe(**changes), tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("job", [pipeline.run, pipeline.edit_only])
@pytest.mark.parametrize("output", ["base", "base/inside", "."])
def test_overwriting_does_not_take_the_base_away(tmp_path: Path, job: Callable[..., object], output: str) -> None:
    shutil.copytree(demo_model_folder(), tmp_path / "base")
    before = {path.name: path.read_bytes() for path in (tmp_path / "base").iterdir()}
    with pytest.raises(BadInput, match="the base's folder lie one inside the other"):
        job(recipe(model=str(tmp_path / "base")), tmp_path / output, overwrite=True)
    assert {path.name: path.read_bytes() for path in (tmp_path / "base").iterdir()} == before


def test_an_existing_output_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine").write_text("x")
    with pytest.raises(BadInput, match="exists already"):
        pipeline.run(recipe(), tmp_path / "run")
    assert (tmp_path / "run" / "mine").read_text() == "x"


@pytest.mark.parametrize("name", ["stories260K", "gpt280k"])
def test_real_checkpoints_run_with_plain_text(tmp_path: Path, name: str) -> None:
    if not SHARED.is_dir():
        pytest.skip("the shared checkpoints are not here")
    words = parse_recipe(
        {
            "model": str(SHARED / "models" / name),
            "concepts": [{"name": "things", "words": ["mom", "friend", "dog"], "strength": 1.0}],
            "decompose": {"channels": 1, "words_only": False},
            "select": {"top": 5, "share": 0.2, "fdr": 0.5},
            "edit": {"self_text": 2000},
            "evaluate": {
                "text": str(SHARED / "corpora" / "tinystories_1000.json"),
                "controls": ["direction-everywhere"],
                "strengths": [1, 2],
                "tokens": 600,
            },
        }
    )
    told: list[str] = []
    result = pipeline.run(words, tmp_path / "run", tell=told.extend)
    assert any("is split into" in warning for warning in result["concepts"][0]["warnings"])
    assert set(result["concepts"][0]["warnings"]) <= set(told)
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()
    assert result["curves"]["things"]["silence-words"][0]["mass"]["value"] > 0
    # The items made from the text lie beside the numbers, in a folder that an evaluation can be given.
    items = open_items(tmp_path / "run" / "items")
    cloze = next(task for task in items.tasks if task.name == "text_cloze")
    asked = next(row for row in result["tasks"] if row["task"] == "text_cloze")
    assert asked["n"] == len(cloze.rows) > 20
    assert {row["concept"] for row in cloze.rows} == {"things"}
    assert not {row["text"] for row in items.texts["validation"]} & {row["text"] for row in items.texts["test"]}
