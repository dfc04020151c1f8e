"""GGUF files become checkpoint folders whose weights are exactly the unpacked ones."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from gguf import GGMLQuantizationType
from tiny_gguf import CONFIGS, SMALLER_NORMS, TEMPLATE, converted, tiny_model, unpacked, vocabulary, write_gguf

from rotate_edit.errors import BadInput
from rotate_edit.models.checkpoint import load_model, load_tokenizer, open_checkpoint, read_tensor
from rotate_edit.models.gguf import MODEL_TYPES, import_gguf
from rotate_edit.models.gguf_file import read_gguf_header

TEXT = "the cat, the cat12 and   a naïve cat\n\tthe"


def logits(model: Any) -> torch.Tensor:
    ids = torch.tensor([[1, *range(40, 75)]])
    with torch.no_grad():
        return model(ids).logits


def folder_of(tmp_path: Path, kind: str = "llama", **how: Any) -> Path:
    write_gguf(tmp_path / "model.gguf", tiny_model(kind), kind, **how)
    import_gguf(tmp_path / "model.gguf", tmp_path / "folder", dtype="float32")
    return tmp_path / "folder"


@pytest.mark.parametrize(
    ("kind", "tied"),
    [*((kind, True) for kind in MODEL_TYPES), *((kind, False) for kind in MODEL_TYPES if kind not in SMALLER_NORMS)],
)
def test_a_model_comes_back_as_it_went(kind: str, tied: bool, tmp_path: Path) -> None:
    model = tiny_model(kind, tied=tied)
    file = write_gguf(tmp_path / "model.gguf", model, kind)
    told: list[tuple[int, int]] = []
    imported = import_gguf(
        file, tmp_path / "folder", dtype="float32", progress=lambda step, done, total: told.append((done, total))
    )
    checkpoint = open_checkpoint(tmp_path / "folder")
    again = load_model(checkpoint)
    assert checkpoint.tied is tied
    assert imported.tensors == len(checkpoint.stored) == told[-1][0] == told[-1][1]
    assert imported.bytes == checkpoint.size
    for name, values in model.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], values, rtol=0, atol=2e-7, msg=name)
    torch.testing.assert_close(logits(again), logits(model), rtol=0, atol=1e-5)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_positions_are_scaled_as_in_llama_3(factor: float, tmp_path: Path) -> None:
    plain = tiny_model("llama", rope_parameters={"rope_type": "default", "rope_theta": 500000.0}, head_dim=64)
    scaling = {"factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    positions = {"rope_type": "llama3", "rope_theta": 500000.0, "original_max_position_embeddings": 8192, **scaling}
    model = tiny_model("llama", rope_parameters=positions, head_dim=64)
    divisors = plain.model.rotary_emb.inv_freq / model.model.rotary_emb.inv_freq
    assert 1 < len(divisors[divisors > 1].unique()) < len(divisors)
    tensors = {**converted(model, "llama"), "rope_freqs.weight": divisors}
    file = write_gguf(tmp_path / "model.gguf", model, "llama", tensors=tensors, keys={"llama.rope.freq_base": 500000.0})
    import_gguf(file, tmp_path / "folder", dtype="float32")
    again = load_model(tmp_path / "folder")
    assert torch.equal(again.model.rotary_emb.inv_freq, model.model.rotary_emb.inv_freq)
    torch.testing.assert_close(logits(again), logits(model), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "gemma3", "qwen2"])
def test_what_is_written_is_what_transformers_reads_from_the_file(kind: str, tmp_path: Path) -> None:
    assert kind in CONFIGS
    folder = folder_of(tmp_path, kind, matrices=GGMLQuantizationType.Q8_0)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path,
        gguf_file="model.gguf",
        dtype=torch.float32,
        quantization_config=transformers.GgufConfig(gguf_file="model.gguf", dequantize=True),
    )
    ours = load_model(folder)
    for name, values in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], values), name
    if kind != "gemma3":  # transformers leaves out by what this model's attention is divided
        torch.testing.assert_close(logits(ours), logits(theirs), rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("matrices", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_weights_are_exactly_the_unpacked_ones(matrices: str, dtype: str, tmp_path: Path) -> None:
    kind = GGMLQuantizationType[matrices]
    model = tiny_model("qwen2")
    file = write_gguf(tmp_path / "model.gguf", model, "qwen2", matrices=kind)
    import_gguf(file, tmp_path / "folder", dtype=dtype)
    checkpoint = open_checkpoint(tmp_path / "folder")
    for name, values in model.state_dict().items():
        if name == "lm_head.weight":
            continue
        wanted = unpacked(values, kind) if values.ndim == 2 else values
        assert torch.equal(read_tensor(checkpoint, name), wanted.to(getattr(torch, dtype))), name


def test_large_weights_are_written_in_shards(tmp_path: Path) -> None:
    model = tiny_model("llama")
    file = write_gguf(tmp_path / "model.gguf", model, "llama")
    import_gguf(file, tmp_path / "folder", dtype="float32", shard_bytes=30_000)
    checkpoint = open_checkpoint(tmp_path / "folder")
    assert len(checkpoint.headers) > 3
    assert torch.equal(load_model(checkpoint).get_input_embeddings().weight, model.get_input_embeddings().weight)


def test_the_tokenizer_and_the_chat_template_come_along(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, keys={"tokenizer.chat_template.tool_use": "tools", "tokenizer.ggml.eot_token_id": 0})
    ours = load_tokenizer(folder)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf")
    assert ours(TEXT).input_ids == theirs(TEXT).input_ids
    assert ours.decode(ours(TEXT).input_ids) == TEXT
    assert (ours.bos_token, ours.eos_token, ours.pad_token) == ("<s>", "</s>", "</s>")
    assert (folder / "chat_template.jinja").read_text() == TEMPLATE
    assert (folder / "additional_chat_templates" / "tool_use.jinja").read_text() == "tools"
    assert ours.apply_chat_template([{"role": "user", "content": "the cat"}], tokenize=False) == "<s>the cat</s>"
    assert transformers.GenerationConfig.from_pretrained(folder).eos_token_id == [2, 0]


@pytest.mark.parametrize(("split", "digits"), [("smollm", 4), ("gpt-2", 1)])
def test_digits_are_split_as_the_file_says(split: str, digits: int, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(folder_of(tmp_path, split=split))
    pieces = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("2026")
    assert len(pieces) == digits


def test_unknown_rules_of_splitting_are_said(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "model.gguf", tiny_model("llama"), "llama", split="newest")
    (warning,) = import_gguf(file, tmp_path / "folder").warnings
    assert '"newest"' in warning


def test_the_file_itself_is_a_model_and_is_written_out_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file = write_gguf(tmp_path / "my model.gguf", tiny_model("llama"), "llama")
    first = open_checkpoint(file)
    assert first.source == "my model.gguf"
    assert first.folder.parent == tmp_path / "cache" / "rotate-edit" / "gguf"
    assert "once" in capsys.readouterr().err
    before = (first.folder / "config.json").stat()
    assert open_checkpoint(str(file)).folder == first.folder
    assert (first.folder / "config.json").stat() == before
    assert capsys.readouterr().err == ""
    os.utime(file, ns=(5, 5))
    assert open_checkpoint(file).folder != first.folder


def changed(**keys: Any) -> dict[str, Any]:
    return {f"llama.{key.replace('__', '.')}": value for key, value in keys.items()}


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        (changed(block_count=None), "does not say llama.block_count"),
        (changed(block_count=3), "lacks the tensor blk.2"),
        (changed(block_count=1), "has the tensor blk.1"),
        (changed(block_count=4_000_000_000), "llama.block_count"),
        (changed(block_count=9999), "fewer tensors"),
        (changed(embedding_length="many"), "not a possible number"),
        (changed(embedding_length=64), "its config asks for"),
        (changed(attention__head_count=0), "not a possible number"),
        (changed(attention__head_count=3), "model.gguf "),
        (changed(rope__freq_base=float("nan")), "not a possible number"),
        (changed(rope__freq_base=-1.0), "not a possible number"),
        (changed(attention__layer_norm_rms_epsilon=float("inf")), "not a possible number"),
        (changed(attention__key_length=2**31), "not a possible number"),
        (changed(rope__dimension_count=4), "cannot be imported"),
        (changed(rope__scaling__type="yarn"), "scales positions"),
        ({"tokenizer.ggml.unknown_token_id": 9_999}, "but its tokens are 0 to"),
        ({"split.count": 3}, "one of 3 parts"),
        ({"general.type": "adapter"}, 'holds "adapter"'),
    ],
)
def test_what_a_config_cannot_be_is_refused(keys: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "model.gguf", tiny_model("llama"), "llama", keys=keys)
    refused(file, sentence)


def refused(file: Path, sentence: str) -> None:
    with pytest.raises(BadInput) as error:
        import_gguf(file, file.parent / "folder")
    assert sentence in str(error.value)
    assert str(error.value).isprintable()
    assert [path.name for path in file.parent.iterdir()] == [file.name]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"blk.0.attn_q.weight": None}, "lacks the tensor blk.0.attn_q.weight"),
        ({"token_embd.weight": None}, "no tensor token_embd.weight"),
        ({"blk.0.attn_q.weight": torch.zeros(32, 16)}, "asks for [32, 32]"),
        ({"rope_freqs.weight": torch.full((4,), 3.0)}, "rope_freqs.weight that is not Llama 3's"),
        ({"rope_freqs.weight": torch.ones(3)}, "rope_freqs.weight that is not Llama 3's"),
        ({"blk.0.ffn_gate_exps.weight": torch.ones(4, 32)}, "has the tensor blk.0.ffn_gate_exps.weight"),
        ({"blk.0.attn_norm.weight": torch.full((32,), torch.nan)}, "blk.0.attn_norm.weight of model.gguf holds"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(change: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    model = tiny_model("llama")
    tensors = {key: value for key, value in (converted(model, "llama") | change).items() if value is not None}
    refused(write_gguf(tmp_path / "model.gguf", model, "llama", tensors=tensors), sentence)


def test_other_refusals(tmp_path: Path) -> None:
    model = tiny_model("llama")
    file = write_gguf(tmp_path / "model.gguf", model, "llama", tokenizer=False)
    refused(file, "holds no tokenizer")
    content = file.read_bytes()
    file.write_bytes(content.replace(b"general.architecture\x08\0\0\0\x05\0\0\0\0\0\0\0llama",
                                     b"general.architecture\x08\0\0\0\x05\0\0\0\0\0\0\0mamba"))  # fmt: skip
    refused(file, 'architecture "mamba"')
    with pytest.raises(BadInput, match='dtype "int8"'):
        import_gguf(file, tmp_path / "folder", dtype="int8")
    with pytest.raises(BadInput, match="lie one inside the other"):
        import_gguf(file, tmp_path)
    with pytest.raises(BadInput, match="there is no file"):
        open_checkpoint(tmp_path / "missing.gguf")
    with pytest.raises(BadInput, match="holds GGUF files; name the"):
        open_checkpoint(tmp_path)


def test_a_number_too_large_for_the_dtype_is_refused(tmp_path: Path) -> None:
    model = tiny_model("llama")
    tensors = converted(model, "llama")
    tensors["output_norm.weight"][3] = 1e6
    file = write_gguf(tmp_path / "model.gguf", model, "llama", tensors=tensors)
    with pytest.raises(BadInput, match=r"output_norm\.weight .* not finite in float16"):
        import_gguf(file, tmp_path / "folder", dtype="float16")
    import_gguf(file, tmp_path / "folder")


def test_the_header_tells_what_the_file_holds(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "model.gguf", tiny_model("llama"), "llama", matrices=GGMLQuantizationType.Q4_0)
    header = read_gguf_header(file)
    assert header.architecture == "llama"
    assert header.keys["tokenizer.ggml.tokens"] == (len(vocabulary()),)
    assert header.tensors["blk.1.ffn_down.weight"].shape == (32, 64)
    assert header.tensors["blk.1.ffn_down.weight"].kind == "Q4_0"
    assert max(tensor.end for tensor in header.tensors.values()) <= file.stat().st_size
