"""The measuring commands from end to end on a tiny model in a folder: settings reach the model, backends, variants."""

import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from tiny_edits import channel, silencing
from tiny_items import write_items
from tiny_words import tiny_model, tiny_tokenizer

from rotate_edit.channels.channel_set import save_channels
from rotate_edit.cli.measure import check, faithfulness, relearn
from rotate_edit.cli.measure import evaluate as command
from rotate_edit.edits.edit_file import load_edit, save_edit
from rotate_edit.edits.writing.patch import write_checkpoint
from rotate_edit.errors import BadInput, Failure
from rotate_edit.evaluation import commands as sessions
from rotate_edit.evaluation.commands import continue_prompts, edited_concepts, evaluate_models
from rotate_edit.evaluation.compare import Plan
from rotate_edit.evaluation.harness import Settings
from rotate_edit.evaluation.variants import Variant
from rotate_edit.machine import pick_device
from rotate_edit.models.checkpoint import open_checkpoint

PLAN = Plan(concepts=("cat",), neighbours=("mat",), items=12, new_tokens=5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base, and edited: an edit of it; items: a folder of items; bigger: another checkpoint."""
    where = tmp_path_factory.mktemp("sessions")
    model = tiny_model(0)
    for name, weights in (("base", model), ("other", tiny_model(1))):
        weights.save_pretrained(where / name)
        tiny_tokenizer().save_pretrained(where / name)
    save_edit(silencing(model, "cat"), where / "edited")
    write_items(where / "items")
    return where


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def values(folder: Path, settings: Settings) -> dict[str, float]:
    plan = Plan(concepts=("cat",), items=12, settings=settings)
    found = evaluate_models(str(folder / "base"), [folder / "edited"], plan, items=str(folder / "items"))
    return dict(found["lm_eval"]["edited"]["tiny_cloze"])


def test_an_automatic_batch_size_changes_no_number_and_few_shots_do(folder: Path) -> None:
    plain = values(folder, Settings(batch_size=4))
    automatic = values(folder, Settings(batch_size="auto"))
    # Sums in another order: the last digits of float32 may move.
    assert automatic == pytest.approx(plain, rel=1e-5)
    assert values(folder, Settings(num_fewshot=2)) != pytest.approx(plain, rel=1e-3)


def test_the_dtype_reaches_the_model(folder: Path) -> None:
    found = {
        dtype: evaluate_models(
            str(folder / "base"), [folder / "edited"], PLAN, items=str(folder / "items"), dtype=dtype, device="cpu"
        )["lm_eval"]["base"]["tiny_cloze"]
        for dtype in ("float32", "bfloat16")
    }
    assert found["float32"] != found["bfloat16"]


def test_the_command_says_what_it_found_and_records_its_settings(folder: Path, tmp_path: Path) -> None:
    arguments = [str(folder / "base"), str(folder / "edited"), "--items", str(folder / "items"), "--limit", "9"]
    arguments += ["--num-fewshot", "1", "--batch-size", "auto", "--output", str(tmp_path / "e.json")]
    said = CliRunner().invoke(command, arguments, catch_exceptions=False)
    assert said.exit_code == 0
    assert "Of what the base model knew of the words of cat" in said.output or "was not measured" in said.output
    result = json.loads((tmp_path / "e.json").read_text())
    settings = result["plan"]["settings"]
    assert settings == {"batch_size": "auto", "num_fewshot": 1, "limit": 9, "chat_template": False}
    assert all(row["n"] <= 9 for row in result["tasks"])
    assert "specificity" in said.output
    used = result["provenance"]
    assert (used["device"], used["dtype"], used["backend"]) == (pick_device("auto"), "float32", "hf")
    assert set(used["base"]["tensors"])
    assert str(folder) not in (tmp_path / "e.json").read_text()


def test_a_concept_is_needed_to_divide_items_and_not_for_tasks(folder: Path) -> None:
    checkpoint = [Variant("other", checkpoint=folder / "other")]
    assert edited_concepts(checkpoint, (), required=False) == ()
    assert edited_concepts(checkpoint, ("cat",)) == ("cat",)
    with pytest.raises(BadInput, match="name it with --concept"):
        evaluate_models(str(folder / "base"), [folder / "other"], Plan(()), items=str(folder / "items"))


def test_nothing_is_written_into_the_base(folder: Path) -> None:
    inside = folder / "base" / "result.json"
    with pytest.raises(BadInput, match="the base's folder lie one inside the other"):
        evaluate_models(str(folder / "base"), [folder / "edited"], PLAN, items=str(folder / "items"), output=inside)
    with pytest.raises(BadInput, match="the base's folder lie one inside the other"):
        sessions.relearn_models(str(folder / "base"), [folder / "edited"], (), str(folder / "items"), inside)
    with pytest.raises(BadInput, match="the base's folder lie one inside the other"):
        sessions.measure_faithfulness(str(folder / "base"), folder, "demo", inside)
    assert not inside.exists()


def test_a_patched_checkpoint_names_its_concepts_itself(folder: Path, tmp_path: Path) -> None:
    edit = load_edit(folder / "edited")
    write_checkpoint(open_checkpoint(folder / "base"), edit, tmp_path / "patched", force_base=True)
    named = edited_concepts([Variant("patched", checkpoint=tmp_path / "patched")], ())
    assert named == tuple({change.concept for change in edit.changes})
    record = json.loads((tmp_path / "patched" / "rotate_edit.json").read_text())
    record["edits"][0]["concepts"] = {"cat": 1}
    (tmp_path / "patched" / "rotate_edit.json").write_text(json.dumps(record))
    assert edited_concepts([Variant("patched", checkpoint=tmp_path / "patched")], (), required=False) == ()


def test_an_edit_that_raises_its_concept_is_not_asked_for_removal(folder: Path, tmp_path: Path) -> None:
    edit = load_edit(folder / "edited")
    raising = replace(edit, changes=tuple(replace(change, strength=-change.strength) for change in edit.changes))
    save_edit(raising, tmp_path / "raising")
    items = str(folder / "items")
    found = evaluate_models(str(folder / "base"), [tmp_path / "raising"], PLAN, items=items)
    assert found["plan"]["amplified"] is True
    assert found["summary"]["efficacy"]["value"] is None
    both = evaluate_models(str(folder / "base"), [folder / "edited", tmp_path / "raising"], PLAN, items=items)
    assert both["plan"]["amplified"] is False


def test_faithfulness_is_one_table_of_whole_neurons(folder: Path, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    found = [
        channel("in", (word,), torch.randn(16, generator=generator), index, neuron=neuron)
        for neuron in range(3)
        for index, word in enumerate(("cat", "mat"))
    ]
    save_channels(found, tmp_path / "channels", base={}, settings={})
    (tmp_path / "texts.txt").write_text("\n\n".join(["the big cat saw the mat", "it was the mat and the cat"] * 6))
    arguments = [str(folder / "base"), str(tmp_path / "channels"), "--text", str(tmp_path / "texts.txt")]
    said = CliRunner(env={"COLUMNS": "120"}).invoke(
        faithfulness, [*arguments, "--limit", "3", "--output", str(tmp_path / "f")], catch_exceptions=False
    )
    assert said.exit_code == 0
    assert "random direction" in said.output
    assert "{" not in said.output
    written = json.loads((tmp_path / "f.json").read_text())
    assert {row["channels"] for row in written["rows"]} == {4}
    assert (tmp_path / "f.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch-size", "many"], "neither a positive number nor auto"),
        (["--items", "ITEMS", "--backend", "gguf", "--backend-option", "pretrained=x"], "cannot be used"),
        (["--items", "ITEMS", "--backend", "vllm"], "holds no checkpoint"),
        (["--device", "tpu", "--items", "ITEMS"], "no such device"),
        (["--chat-template", "--items", "ITEMS"], "no chat template"),
        ([], "nothing is asked"),
        (["--data", "EMPTY"], "holds none of"),
    ],
)
def test_what_cannot_work_is_one_sentence(folder: Path, tmp_path: Path, arguments: list[str], message: str) -> None:
    names = {"ITEMS": str(folder / "items"), "EMPTY": str(tmp_path)}
    given = [names.get(argument, argument) for argument in arguments]
    with pytest.raises(BadInput, match=message) as refused:
        CliRunner().invoke(command, [str(folder / "base"), str(folder / "edited"), *given], catch_exceptions=False)
    assert "\n" not in str(refused.value)


def test_another_backend_scores_whole_checkpoints_and_names_itself_when_absent(folder: Path) -> None:
    base, items = str(folder / "base"), str(folder / "items")
    found = evaluate_models(base, [folder / "other"], PLAN, items=items, backend="hf-auto")
    own = evaluate_models(base, [folder / "other"], PLAN, items=items)
    assert found["lm_eval"]["other"] == own["lm_eval"]["other"]
    assert found["definitions"] == own["definitions"]
    assert found["provenance"]["backend"] == "hf-auto"
    if importlib.util.find_spec("vllm") is None:
        with pytest.raises(BadInput, match="the backend vllm is not installed"):
            evaluate_models(base, [folder / "other"], PLAN, items=items, backend="vllm")


def test_prompts_are_continued_by_edits_and_checkpoints(folder: Path) -> None:
    asked = ["the big cat saw the", "it was"]
    found = continue_prompts(str(folder / "base"), [str(folder / "edited"), str(folder / "other")], asked, new_tokens=6)
    assert [prompt for prompt, _ in found] == asked
    assert {len(texts) for _, texts in found} == {3}
    for _, texts in found:
        assert "cat" not in texts[str(folder / "edited")].split()
    again = continue_prompts(str(folder / "base"), [], asked, new_tokens=6)
    assert [texts["base"] for _, texts in again] == [texts["base"] for _, texts in found]


@pytest.mark.parametrize(
    ("gates", "problem"),
    [
        (["--min-efficacy", "0.9", "--max-kl", "0.02", "--max-leak-rate", "0.1"], None),
        (["--min-efficacy", "0.96"], "efficacy is 0.95, and at least 0.96 is asked for"),
        (["--max-leak-rate", "0.01"], "leak_rate_asked is 0.05, and at most 0.01 is asked for"),
        (["--max-collateral-kl", "1"], "collateral_kl was not measured"),
        ([], "at least one gate"),
    ],
)
def test_gates_pass_or_say_which_failed(tmp_path: Path, gates: list[str], problem: str | None) -> None:
    result = {
        "summary": {"efficacy": {"value": 0.95}, "first_token_kl": {"value": 0.01}},
        "variants": {"edited": {"measures": {"leak_rate_asked": {"value": 0.05}}}},
    }
    (tmp_path / "evaluation.json").write_text(json.dumps(result))
    if problem is None:
        said = CliRunner().invoke(check, [str(tmp_path), *gates], catch_exceptions=False)
        assert said.output.strip() == "3 gates passed."
    else:
        with pytest.raises((BadInput, Failure), match=problem):
            CliRunner().invoke(check, [str(tmp_path), *gates], catch_exceptions=False)


@pytest.mark.parametrize(
    "content",
    [
        "[]",
        '{"variants": [1]}',
        '{"summary": 3}',
        '{"summary": {"first_token_kl": {"value": "x"}}}',
        '{"summary": [1]}',
    ],
)
def test_gates_on_what_no_run_wrote_are_one_sentence(tmp_path: Path, content: str) -> None:
    (tmp_path / "evaluation.json").write_text(content)
    with pytest.raises((BadInput, Failure), match="does not have the form"):
        CliRunner().invoke(check, [str(tmp_path), "--max-kl", "0.1"], catch_exceptions=False)


def test_a_whole_checkpoint_beside_the_base_counts_as_memory(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    estimated = sessions.estimate_live
    monkeypatch.setattr(
        sessions, "estimate_live", lambda base, size, **more: seen.append(size) or estimated(base, size, **more)
    )
    base, plan = str(folder / "base"), Plan(concepts=("cat",), items=4)
    for edited in ("edited", "other"):
        continue_prompts(base, [str(folder / edited)], ["it was"], new_tokens=2)
        evaluate_models(base, [folder / edited], plan, items=str(folder / "items"))
    assert seen == [4, 4, 8, 8]


def test_what_comes_back_is_a_table(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {"value": 0.5, "low": 0.25, "high": 0.75}
    model = {"before": asked, "epochs": [asked, asked | {"value": 0.625}]}
    found = {"training": {"epochs": 2}, "models": {"base": model, "edited": model}}
    monkeypatch.setattr(sessions, "relearn_models", lambda *_: found)
    result = CliRunner().invoke(relearn, ["demo", str(folder)], env={"COLUMNS": "200"})
    assert result.exit_code == 0
    assert "after epoch 2" in result.output
    assert result.output.count("0.625 (0.25 to 0.75)") == 2
