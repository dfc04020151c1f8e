"""The commands that look at a model, its neurons and channels: scan, decompose, channels, inspect, words."""

import json
from pathlib import Path

import pyarrow.parquet
import pytest
import torch
from huge_checkpoint import write_huge
from shell import Shell, tiny
from tiny_edits import channel
from tiny_models import save_tiny
from tiny_words import tiny_model, tiny_tokenizer

from rotate_edit.channels.channel_set import save_channels


def test_a_tied_table_is_counted_once(shell: Shell, tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "tied", tied=True, dtype=torch.float32)
    assert shell("inspect", "tied") == 0
    assert "96 rows of the embedding" in shell.out
    assert "rows of the unembedding" not in shell.out


@pytest.mark.parametrize("family", ["gpt2", "granite", "qwen3_moe", "gemma3"])
def test_inspect_in_words_and_as_json(shell: Shell, tmp_path: Path, family: str) -> None:
    tiny(tmp_path / "base", family)
    assert shell("inspect", "base") == 0
    assert "are two tables (untied)" in shell.out
    assert "an edit can reach" in shell.out
    for word in ("None", "True", "["):
        assert word not in shell.out
    assert shell("inspect", "base", "--json") == 0
    assert json.loads(shell.out)["layers"] == 2


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"model_type": "gpt_oss"}, "MXFP4"),
        ({"model_type": "llama", "quantization_config": {"quant_method": "gptq"}}, '"gptq"'),
        ({"model_type": "mamba"}, "a row in models/architectures.py"),
    ],
)
def test_what_cannot_be_edited_is_refused_by_name(shell: Shell, tmp_path: Path, config: dict, words: str) -> None:
    base = tiny(tmp_path / "base")
    (base / "config.json").write_text(json.dumps(config))
    for command in ("inspect", "scan", "decompose"):
        assert shell(command, "base") == 2
        assert words in shell.error


def test_a_scan_is_one_table(shell: Shell, tmp_path: Path) -> None:
    tiny_model(0).save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    assert shell("scan", "base", "--matrix", "out", "--layer", "1", "--top", "3", "--output", "s.parquet") == 0
    assert "24 neuron vectors in s.parquet" in shell.out
    rows = pyarrow.parquet.read_table(tmp_path / "s.parquet").to_pylist()
    assert [(row["layer"], row["neuron"], row["matrix"]) for row in rows] == [
        (1, neuron, "out") for neuron in range(24)
    ]
    assert shell("scan", "base", "--output", "s.parquet") == 2
    assert "exists already" in shell.error


def test_channels_are_decomposed_printed_and_searched(shell: Shell, tmp_path: Path) -> None:
    tiny_model(0).save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    chosen = ("--layer", "0", "--channels", "1", "--all-tokens", "--workers", "1", "--device", "cpu")
    assert shell("decompose", "base", "--output", "set", *chosen) == 0
    assert "24 channels in set" in shell.out
    assert shell("channels", "set", "--limit", "5") == 0
    assert "5 channels" in shell.out
    assert shell("channels", "set", "--neuron", "L0.N3", "--json") == 0
    (found,) = [json.loads(line) for line in shell.out.splitlines()]
    assert (found["layer"], found["neuron"], found["matrix"]) == (0, 3, "out")
    assert found["name"].startswith("L0.N3.out#")
    assert "vector" not in found


def test_channels_of_a_run_folder_are_those_inside_it(shell: Shell, tmp_path: Path) -> None:
    found = [channel("in", ("cat",), torch.ones(16), 0), channel("in", ("dog",), torch.ones(16), 1)]
    save_channels(found, tmp_path / "run" / "channels", base={}, settings={})
    for folder in ("run", "run/channels"):
        assert shell("channels", folder, "--token", "cat") == 0
        assert "1 channel" in shell.out
        assert "L0.N3.in#0" in shell.out


def test_a_model_that_does_not_fit_is_refused_before_it_is_read(shell: Shell, tmp_path: Path) -> None:
    write_huge(tmp_path / "huge")
    for arguments in (("scan", "huge"), ("decompose", "huge", "--no-vectors")):
        assert shell(*arguments) == 2
        assert "GB of memory" in shell.error
    assert shell("decompose", "huge", "--no-vectors", "--estimate") == 2
    assert "time" in shell.out
    assert "GB of memory" in shell.error
    assert [path.name for path in tmp_path.iterdir()] == ["huge"]


def test_words_shows_how_each_word_is_followed(shell: Shell, tmp_path: Path) -> None:
    assert shell("words", "demo", "dog", "dogfight", "--plurals") == 0
    assert "1 word of 2 is one token" in shell.out
    assert "' dog'" in shell.out
    assert "sequence" in shell.out
    assert shell("words", "demo", "dogfight", "--json") == 0
    found = json.loads(shell.out)
    assert (found["word"], found["followed"], found["tokens"]) == ("dogfight", "sequence", [])
    assert found["sequences"]
    assert not list(tmp_path.iterdir())
