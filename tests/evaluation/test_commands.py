"""The measuring commands from end to end on a tiny model in a folder: settings reach the model, backends, variants."""

import importlib.util
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from tiny_folder import write_folder

from rotate_edit.edits.edit_file import load_edit, save_edit
from rotate_edit.edits.writing.patch import write_checkpoint
from rotate_edit.errors import BadInput
from rotate_edit.evaluation.commands import (
    check_run,
    continue_prompts,
    edited_concepts,
    evaluate_models,
    measure_faithfulness,
    relearn_models,
)
from rotate_edit.evaluation.compare import Plan
from rotate_edit.evaluation.harness import Settings
from rotate_edit.evaluation.variants import Variant
from rotate_edit.machine import Cost
from rotate_edit.models.checkpoint import open_checkpoint
from rotate_edit.models.cost import estimate_live

PLAN = Plan(concepts=("cat",), neighbours=("mat",), items=12, new_tokens=5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("commands"))


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
        relearn_models(str(folder / "base"), [folder / "edited"], (), str(folder / "items"), inside)
    with pytest.raises(BadInput, match="the base's folder lie one inside the other"):
        measure_faithfulness(str(folder / "base"), folder, "demo", inside)
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


def test_an_edit_that_amplifies_its_concept_is_not_asked_for_removal(folder: Path, tmp_path: Path) -> None:
    edit = load_edit(folder / "edited")
    amplifying = replace(edit, changes=tuple(replace(change, strength=-change.strength) for change in edit.changes))
    save_edit(amplifying, tmp_path / "amplifying")
    items = str(folder / "items")
    found = evaluate_models(str(folder / "base"), [tmp_path / "amplifying"], PLAN, items=items)
    assert found["plan"]["only_amplifies"] is True
    assert found["summary"]["efficacy"]["value"] is None
    both = evaluate_models(str(folder / "base"), [folder / "edited", tmp_path / "amplifying"], PLAN, items=items)
    assert both["plan"]["only_amplifies"] is False


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
    found = continue_prompts(
        str(folder / "base"), [str(folder / "edited"), str(folder / "other")], asked, new_tokens=6
    ).rows
    assert [prompt for prompt, _ in found] == asked
    assert {len(texts) for _, texts in found} == {3}
    for _, texts in found:
        assert "cat" not in texts[str(folder / "edited")].split()
    again = continue_prompts(str(folder / "base"), [], asked, new_tokens=6).rows
    assert [texts["base"] for _, texts in again] == [texts["base"] for _, texts in found]


def test_prompts_stand_in_the_chat_template_where_there_is_one(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "base", tmp_path / "base")
    (tmp_path / "base" / "chat_template.jinja").write_text("the {{ messages[0]['content'] }} saw the")
    base = str(tmp_path / "base")
    chat, plain = (continue_prompts(base, [], ["cat"], new_tokens=6, plain=plain) for plain in (False, True))
    by_hand = continue_prompts(base, [], ["the cat saw the"], new_tokens=6, plain=True)
    assert (chat.chat, plain.chat) == (True, False)
    assert chat.rows[0][1] == by_hand.rows[0][1]
    assert chat.rows[0][0] == "cat"
    assert not continue_prompts(str(folder / "base"), [], ["cat"], new_tokens=1).chat
    (tmp_path / "base" / "chat_template.jinja").write_text("{{ raise_exception('no') }}")
    with pytest.raises(BadInput, match=r"chat template cannot be filled in .*with --plain"):
        continue_prompts(base, [], ["cat"])


def test_a_whole_checkpoint_beside_the_base_counts_as_memory(folder: Path) -> None:
    seen: list[int] = []

    def check(cost: Cost, _output: Path) -> None:
        seen.append(cost.memory)

    base, plan = str(folder / "base"), Plan(concepts=("cat",), items=4)
    for edited in ("edited", "other"):
        continue_prompts(base, [str(folder / edited)], ["it was"], new_tokens=2, check=check)
        evaluate_models(base, [folder / edited], plan, items=str(folder / "items"), device="cpu", check=check)
    one, two = (estimate_live(open_checkpoint(base), size).memory for size in (4, 8))
    assert seen == [one, one, two, two]
    assert one < two


def test_a_model_that_does_not_fit_is_refused_before_it_is_loaded(folder: Path) -> None:
    class Refused(Exception):
        pass

    def check(_cost: Cost, _output: Path) -> None:
        raise Refused

    with pytest.raises(Refused):
        continue_prompts(str(folder / "base"), [], ["it was"], check=check)
    with pytest.raises(Refused):
        evaluate_models(str(folder / "base"), [folder / "edited"], PLAN, items=str(folder / "items"), check=check)


def test_gates_are_of_every_metric_of_the_first_model(tmp_path: Path) -> None:
    result = {
        "summary": {"efficacy": {"value": 0.95}, "first_token_kl": {"value": None}},
        "variants": {
            "edited": {"measures": {"leak_rate_asked": {"value": 0.05}, "collateral_kl": {"value": 0.002}}},
            "other": {"measures": {"collateral_kl": {"value": 9.0}}},
        },
    }
    (tmp_path / "evaluation.json").write_text(json.dumps(result))
    assert check_run(tmp_path, {"efficacy": 0.9, "leak_rate_asked": 0.1, "collateral_kl": 0.01}) == []
    assert len(check_run(tmp_path, {"efficacy": 0.96, "first_token_kl": 1, "collateral_kl": 0.001})) == 3
    with pytest.raises(BadInput, match="at least one gate"):
        check_run(tmp_path, {})
    with pytest.raises(BadInput, match=r"no readable evaluation\.json"):
        check_run(tmp_path / "nowhere", {"efficacy": 0.9})
