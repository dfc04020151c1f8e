"""The model card: metadata that the Hub reads, numbers with intervals, inherited licence, hostile text as text."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from tiny_run import result_of, tiny_run

from rotate_edit.edits.writing.patch import revert
from rotate_edit.errors import BadInput
from rotate_edit.models.checkpoint import load_model, open_checkpoint
from rotate_edit.reporting.card import base_metadata, card_metadata, write_cards


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return tiny_run(tmp_path / "run")


def test_the_hub_reads_the_metadata(run: Path) -> None:
    write_cards(run, "owner/base", "me/edited")
    data = ModelCard((run / "model" / "README.md").read_text()).data
    assert (data.base_model, data.to_dict()["base_model_relation"]) == ("owner/base", "finetune")
    assert (data.license, data.language, data.library_name) == ("mit", "en", "transformers")
    assert "secret-tag" not in data.tags
    assert {"rotate-edit", "concept-suppressed"} <= set(data.tags)
    assert data.model_name == "me/edited"
    results = {(found.dataset_config, found.metric_type): found for found in data.eval_results}
    assert results[None, "efficacy"].metric_value == 0.9
    assert results[None, "efficacy"].metric_name.endswith("above chance (0.9 (0.8 to 1); base 1, n = 40)")
    accuracy = results["dogs: words (type A)", "accuracy"]
    assert accuracy.metric_value == 0.2
    assert accuracy.metric_name == "acc (0.2 (0.1 to 0.3); base 0.9, n = 40)"
    adapter = ModelCard((run / "adapter" / "README.md").read_text()).data.to_dict()
    assert (adapter["base_model_relation"], adapter["library_name"]) == ("adapter", "peft")


def test_without_a_hub_id_no_base_is_claimed(run: Path) -> None:
    text = (run / "model" / "README.md").read_text()
    assert "base_model" not in card_metadata(text)
    assert "push --base-model" in text


def test_numbers_limits_recipe_and_undo_are_told(run: Path) -> None:
    text = (run / "model" / "README.md").read_text()
    for part in (
        "| efficacy | of what the base knew of it above chance | 0.9 (0.8 to 1) | 1 | 40 |",
        "-0.7 (-0.8 to -0.6)",
        "strength 1.7",
        "This edit alone is no safety measure.",
        "rotate-edit verify FOLDER --base BASE",
        "rotate-edit reproduce FOLDER/reproduce.json",
        "rotate-edit revert",
        "words:\n  - dog\n",
        "Every other byte of its weights is the base's.",
    ):
        assert part in text
    assert (run / "model" / "README.base.md").read_text().endswith("# The base\n")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_the_lines_of_both_cards_load_one_model(tmp_path: Path, tied: bool, dtype: torch.dtype) -> None:
    """Adapter and checkpoint differ by what rounding does, not by what the edit does."""
    run = tiny_run(tmp_path / "run", tied=tied, dtype=dtype)

    def logits(model: Any) -> torch.Tensor:
        with torch.no_grad():
            return model.eval()(input_ids=torch.tensor([[3, 17, 40, 5, 95, 1, 60, 33]])).logits.double()

    def loaded(kind: str) -> torch.Tensor:
        (lines,) = re.findall(r"```python\n(.*?)```", (run / kind / "README.md").read_text(), re.DOTALL)
        names: dict[str, Any] = {}
        exec(
            lines.replace('"BASE"', repr(str(tmp_path / "base"))).replace('"THIS_FOLDER"', repr(str(run / kind))), names
        )
        assert next(names["model"].parameters()).dtype == dtype
        return logits(names["model"])

    base, edited = open_checkpoint(tmp_path / "base"), open_checkpoint(run / "model")
    checkpoint, adapter = loaded("model"), loaded("adapter")
    # What the dtype does to the numbers of the edited model, whose logits are larger than the base's.
    noise = (checkpoint - logits(load_model(edited, dtype=torch.float64))).abs().max()
    assert (checkpoint - logits(load_model(base, dtype=dtype))).abs().max() > 20 * noise
    assert (adapter - checkpoint).abs().max() <= 4 * noise


def test_an_edit_that_was_not_measured_says_so(run: Path) -> None:
    (run / "evaluation.json").unlink()
    write_cards(run)
    text = (run / "model" / "README.md").read_text()
    assert "Nothing was measured" in text
    assert "reproduce.json" not in text
    assert "model-index" not in card_metadata(text)


def test_hostile_text_is_text(tmp_path: Path) -> None:
    bad = "x\n---\n# Owned <script>alert(1)</script> | [a](http://e.vil) `b` \x1b[31m"
    result = result_of(bad)
    result["concepts"][0]["words"] = [bad, "dog"]
    run = tiny_run(tmp_path / "run", result=result)
    text = (run / "model" / "README.md").read_text()
    head, body = text.removeprefix("---\n").split("\n---\n", 1)
    assert yaml.safe_load(head)["license"] == "mit"
    assert "<script>" not in body
    assert "\x1b" not in text
    assert "\n# Owned" not in body
    assert "[a](" not in body


def test_a_recipe_cannot_leave_its_block(run: Path) -> None:
    recipe = (run / "recipe.yaml").read_text()
    (run / "recipe.yaml").write_text(recipe + "# ```\n# [a](http://e.vil)\n")
    write_cards(run)
    assert "\n````yaml\n" in (run / "model" / "README.md").read_text()


def test_the_home_folder_is_not_told(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(run.parent))
    write_cards(run)
    for kind in ("model", "adapter"):
        assert str(run.parent) not in (run / kind / "README.md").read_text()


@pytest.mark.parametrize("text", ["", "no block", "---\n[1, 2]\n---\n", "---\n: : :\n---\n", "---\nlicense: 3\n---\n"])
def test_a_base_whose_card_says_nothing_hands_nothing_down(tmp_path: Path, text: str) -> None:
    (tmp_path / "README.base.md").write_text(text)
    assert base_metadata(tmp_path / "README.base.md") == {}
    assert base_metadata(tmp_path / "absent.md") == {}


def test_a_folder_without_a_recipe_has_no_card(run: Path) -> None:
    (run / "recipe.yaml").unlink()
    with pytest.raises(BadInput, match=r"recipe.yaml"):
        write_cards(run)


def test_reverting_gives_the_base_its_own_card_back(run: Path, tmp_path: Path) -> None:
    revert(open_checkpoint(run / "model"), run / "edit", tmp_path / "back")
    allowed = {path.name for path in (tmp_path / "base").iterdir()} - {"pytorch_model.bin", ".token", "code.py"}
    assert {path.name for path in (tmp_path / "back").iterdir()} == allowed
    for name in allowed:
        assert (tmp_path / "back" / name).read_bytes() == (tmp_path / "base" / name).read_bytes()


def test_reverting_leaves_no_card_where_the_base_had_none(tmp_path: Path) -> None:
    run = tiny_run(tmp_path / "run")
    (run / "model" / "README.base.md").unlink()
    revert(open_checkpoint(run / "model"), run / "edit", tmp_path / "back")
    assert not list((tmp_path / "back").glob("README*"))
