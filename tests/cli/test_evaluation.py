"""The commands that measure models: evaluate, compare, check, relearn, faithfulness."""

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from huge_checkpoint import write_huge
from shell import Shell
from tiny_edits import channel
from tiny_folder import write_folder

from rotate_edit.channels.channel_set import save_channels
from rotate_edit.cli.evaluation import check, faithfulness, relearn
from rotate_edit.cli.evaluation import evaluate as command
from rotate_edit.errors import BadInput, Failure
from rotate_edit.machine import pick_device


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("evaluation"))


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


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


@pytest.mark.parametrize(
    ("gates", "problem"),
    [
        (["--gate", "efficacy=0.9", "--gate", "first_token_kl=0.02", "--gate", "leak_rate_asked=0.1"], None),
        (["--gate", "efficacy=0.96"], "efficacy is 0.95, and at least 0.96 is asked for"),
        (["--gate", "leak_rate_asked=0.01"], "leak_rate_asked is 0.05, and at most 0.01 is asked for"),
        (["--gate", "collateral_kl=1"], "collateral_kl was not measured"),
        (["--gate", "wit=1"], "there is no metric 'wit'; there are efficacy"),
        (["--gate", "distinct_2=1"], "has no better side"),
        (["--gate", "efficacy"], "write METRIC=BOUND"),
        (["--gate", "efficacy=much"], "write METRIC=BOUND"),
        (["--gate", "efficacy=nan"], "not a finite number"),
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
        CliRunner().invoke(check, [str(tmp_path), "--gate", "first_token_kl=0.1"], catch_exceptions=False)


def test_what_comes_back_is_a_table(folder: Path, tmp_path: Path) -> None:
    arguments = [str(folder / "base"), str(folder / "edited"), "--items", str(folder / "items")]
    output = tmp_path / "r.json"
    result = CliRunner(env={"COLUMNS": "200"}).invoke(
        relearn, [*arguments, "--output", str(output)], catch_exceptions=False
    )
    assert result.exit_code == 0
    assert "after epoch 2" in result.output
    assert "after epoch 3" not in result.output
    models = json.loads(output.read_text())["models"]
    assert list(models) == ["base", "edited"]
    printed = " ".join(result.output.split())
    for name, model in models.items():
        cells = [
            f"{asked['value']:.3g} ({asked['low']:.3g} to {asked['high']:.3g})"
            for asked in (model["before"], *model["epochs"])
        ]
        assert f"{name} │ {' │ '.join(cells)}" in printed


def test_prompts_stand_side_by_side(folder: Path) -> None:
    from rotate_edit.cli.evaluation import compare

    asked = ["--prompt", "the big cat saw the", "--prompt", "it was", "--new-tokens", "4"]
    said = CliRunner(env={"COLUMNS": "200"}).invoke(
        compare, [str(folder / "base"), str(folder / "edited"), *asked], catch_exceptions=False
    )
    assert said.exit_code == 0
    for prompt in ("the big cat saw the", "it was"):
        assert prompt in said.output
    assert said.output.count("base") == 2


def test_models_that_do_not_fit_are_refused(shell: Shell, tmp_path: Path) -> None:
    write_huge(tmp_path / "huge")
    for arguments in (
        ("evaluate", "huge", "huge", "--task", "arc_easy"), ("compare", "huge", "huge", "--prompt", "A dog"),
        ("relearn", "huge", "huge", "--concept", "dogs"), ("faithfulness", "huge", "nowhere", "--text", "demo"),
    ):  # fmt: skip
        assert shell(*arguments) == 2
        assert "GB of memory" in shell.error
    assert [path.name for path in tmp_path.iterdir()] == ["huge"]
