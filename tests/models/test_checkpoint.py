"""Opening checkpoints and reading single tensors, against transformers and safetensors themselves."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from places import SHARED
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_models import FAMILIES, save_tiny

from rotate_edit.errors import BadInput
from rotate_edit.models.checkpoint import (
    identity,
    load_model,
    load_tokenizer,
    open_checkpoint,
    read_embedding,
    read_matrix,
    read_norm,
    read_rows,
    read_tensor,
    read_unembedding,
)

MODELS = SHARED / "models"


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return save_tiny("llama", tmp_path / "llama", tied=False, dtype=torch.bfloat16)


def write_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    config.update(changes)
    (folder / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value != "drop"}))


@pytest.mark.parametrize("family", FAMILIES)
def test_sizes_and_tables_are_those_of_the_live_model(family: str, tmp_path: Path) -> None:
    folder = save_tiny(family, tmp_path / "model", tied=False, dtype=torch.float32)
    checkpoint, live = open_checkpoint(folder), load_model(folder)
    config = live.config.get_text_config()
    assert checkpoint.layers == config.num_hidden_layers == 2
    assert checkpoint.hidden_size == config.hidden_size == 32
    assert checkpoint.vocabulary_size == config.vocab_size == 96
    assert checkpoint.source == "model"
    assert checkpoint.published_switch == (0 if checkpoint.tied else None)
    assert checkpoint.size == sum(parameter.numel() for parameter in live.parameters()) * 4 or family == "gemma3"
    moe = family.startswith(("mixtral", "qwen3_moe", "olmoe"))
    assert checkpoint.experts == (4 if moe else None)
    assert checkpoint.neurons == {"gpt2": 128, "bloom": 128, "qwen3_moe": 24}.get(family, 48)
    assert ("gate" in checkpoint.matrices) == (not family.startswith(("gpt", "opt", "bloom")))
    scale = getattr(live.get_input_embeddings(), "embed_scale", 1.0)
    tokens = torch.arange(96)
    embedded = live.get_input_embeddings()(tokens) / scale
    unembedding = live.get_output_embeddings().weight
    if family == "opt-350m":
        embedded = live.model.decoder.project_in(embedded)
        unembedding = unembedding @ live.model.decoder.project_out.weight
    assert torch.allclose(read_embedding(checkpoint), embedded, rtol=1e-6)
    assert torch.allclose(read_unembedding(checkpoint), unembedding, rtol=1e-6, atol=1e-7)
    for dtype in (read_embedding(checkpoint).dtype, read_unembedding(checkpoint).dtype):
        assert dtype == torch.float32


@pytest.mark.parametrize("family", FAMILIES)
def test_final_norm_is_what_the_head_reads_through(family: str, tmp_path: Path) -> None:
    """The norm's output, over its input at unit scale, is the gain that `read_norm` returns."""
    folder = save_tiny(family, tmp_path / "model", tied=False, dtype=torch.float32)
    checkpoint, live = open_checkpoint(folder), load_model(folder)
    gain = read_norm(checkpoint, "final")
    norms = [name for name, _ in live.named_modules() if name.split(".")[-1] in ("norm", "ln_f", "final_layer_norm")]
    names = [name for name in norms if ".layers." not in name and "vision" not in name]
    if family == "opt-350m":
        assert gain is None
        assert names == []
        return
    norm = live.get_submodule(names[0])
    hidden = torch.randn(4, 32)
    centred = hidden - hidden.mean(-1, keepdim=True) if checkpoint.architecture.norm_kind == "layer" else hidden
    expected = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + 1e-5)
    bias = getattr(norm, "bias", None)
    found = norm(hidden) - (0 if bias is None else bias)
    assert gain is not None
    assert torch.allclose(found, expected * gain, atol=1e-3)


def test_pre_mlp_norms(tmp_path: Path) -> None:
    for family, name in (
        ("llama", "post_attention_layernorm"),
        ("gemma2", "pre_feedforward_layernorm"),
        ("stablelm-parallel", "input_layernorm"),
        ("cohere", "input_layernorm"),
    ):
        folder = save_tiny(family, tmp_path / family, tied=False, dtype=torch.float32)
        checkpoint = open_checkpoint(folder)
        gain = read_norm(checkpoint, ("mlp", 1))
        stored = read_tensor(checkpoint, f"model.layers.1.{name}.weight")
        assert gain is not None
        assert torch.equal(gain, stored + (1 if family == "gemma2" else 0))
    olmo = open_checkpoint(save_tiny("olmo2", tmp_path / "olmo2", tied=False, dtype=torch.float32))
    assert read_norm(olmo, ("mlp", 1)) is None
    assert read_norm(olmo, ("after mlp", 1)) is not None


def test_parts_are_read_without_the_rest(llama: Path) -> None:
    checkpoint = open_checkpoint(llama)
    whole = {name: tensor for file in llama.glob("*.safetensors") for name, tensor in load_file(file).items()}
    for name, tensor in whole.items():
        assert torch.equal(read_tensor(checkpoint, name), tensor)
    rows = torch.tensor([40, 3, 3])
    assert torch.equal(read_rows(checkpoint, "lm_head.weight", rows), whole["lm_head.weight"][rows])
    down = whole["model.layers.1.mlp.down_proj.weight"].float().T
    assert torch.equal(read_matrix(checkpoint, 1, "out"), down)
    assert torch.equal(read_matrix(checkpoint, 1, "out", neurons=torch.tensor([7, 2])), down[[7, 2]])
    assert read_matrix(checkpoint, 1, "out").is_contiguous()
    attention = whole["model.layers.0.self_attn.o_proj.weight"].float().T
    assert torch.equal(read_matrix(checkpoint, 0, "attention_out"), attention)


def test_the_hubs_names_without_prefix(tmp_path: Path) -> None:
    for family, prefix in (("gpt2", "transformer."), ("bloom", "transformer."), ("opt", "model.")):
        folder = save_tiny(family, tmp_path / family, tied=True, dtype=torch.float32, shard="1GB")
        expected = read_matrix(open_checkpoint(folder), 1, "in")
        tensors = load_file(folder / "model.safetensors")
        save_file(
            {name.removeprefix(prefix): tensor for name, tensor in tensors.items()},
            folder / "model.safetensors",
            metadata={"format": "pt"},
        )
        checkpoint = open_checkpoint(folder)
        assert checkpoint.tied
        assert torch.equal(read_matrix(checkpoint, 1, "in"), expected)


def test_a_tied_head_stored_twice_and_one_that_differs(tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path / "model", tied=True, dtype=torch.float32, shard="1GB")
    tensors = load_file(folder / "model.safetensors")
    table = tensors["model.embed_tokens.weight"]
    for head, tied in ((table.clone(), True), (table * 2, False)):
        save_file(tensors | {"lm_head.weight": head}, folder / "model.safetensors", metadata={"format": "pt"})
        assert open_checkpoint(folder).tied == tied
        live = load_model(folder)
        assert torch.equal(live.get_output_embeddings().weight, head)
    write_config(folder, tie_word_embeddings=False)
    save_file(tensors | {"lm_head.weight": table.clone()}, folder / "model.safetensors", metadata={"format": "pt"})
    assert not open_checkpoint(folder).tied


@pytest.mark.skipif(not MODELS.is_dir(), reason="the shared checkpoints are not here")
@pytest.mark.parametrize("name", ["stories260K", "gpt280k", "bookworm"])
def test_real_checkpoints(name: str) -> None:
    checkpoint = open_checkpoint(MODELS / name)
    with safe_open(MODELS / name / "model.safetensors", "pt") as file:
        assert set(checkpoint.stored) == set(file.keys())
        assert all(torch.equal(read_tensor(checkpoint, key), file.get_tensor(key)) for key in file.keys())  # noqa: SIM118
    assert checkpoint.layers == 5
    assert len(load_tokenizer(checkpoint)) <= checkpoint.vocabulary_size


def test_identity_names_bytes_and_no_paths(llama: Path) -> None:
    first = identity(open_checkpoint(llama), full=False)
    assert first["source"] == "llama"
    assert str(llama.parent) not in json.dumps(first)
    assert first["tensors"] == {}
    full = identity(open_checkpoint(llama))
    assert set(full["tensors"]) == set(open_checkpoint(llama).stored)
    shard = sorted(llama.glob("*.safetensors"))[-1]
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    changed = identity(open_checkpoint(llama))
    assert changed["headers"] == full["headers"]
    differing = [name for name, digest in full["tensors"].items() if changed["tensors"][name] != digest]
    assert len(differing) == 1
    write_config(llama, rope_theta=5.0)
    assert identity(open_checkpoint(llama), full=False)["files"]["config.json"] != first["files"]["config.json"]


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda folder: (folder / "config.json").unlink(), "no config.json"),
        (lambda folder: (folder / "config.json").write_text("{"), "not valid JSON"),
        (lambda folder: (folder / "config.json").write_text("[]"), "not a JSON object"),
        (lambda folder: (folder / "adapter_config.json").write_text("{}"), "PEFT adapter"),
        (lambda folder: (folder / "config.json").rename(folder / "adapter_config.json"), "PEFT adapter"),
        (lambda folder: write_config(folder, model_type="mamba"), '"mamba"'),
        (lambda folder: write_config(folder, quantization_config={"quant_method": "gptq"}), "gptq"),
        (lambda folder: write_config(folder, num_hidden_layers=0), "num_hidden_layers"),
        (lambda folder: write_config(folder, num_hidden_layers=True), "num_hidden_layers"),
        (lambda folder: write_config(folder, num_hidden_layers="drop"), "num_hidden_layers"),
        (lambda folder: write_config(folder, num_hidden_layers=3), 'no matrix "(gate|in|out)" in layer 2'),
        (lambda folder: write_config(folder, model_type="gpt_neox"), "layout is unknown"),
        (lambda folder: sorted(folder.glob("*.safetensors"))[0].unlink(), "is missing"),
        (lambda folder: [file.unlink() for file in folder.glob("*.safetensors*")], "has neither"),
    ],
)
def test_damaged_checkpoints_are_refused_in_one_sentence(llama: Path, damage, words: str) -> None:  # type: ignore[no-untyped-def]
    damage(llama)
    with pytest.raises(BadInput, match=words) as caught:
        open_checkpoint(llama)
    assert "\n" not in str(caught.value)


def test_a_run_folder_names_its_checkpoint(llama: Path, tmp_path: Path) -> None:
    llama.rename(tmp_path / "aside")
    (tmp_path / "run").mkdir()
    (tmp_path / "aside").rename(tmp_path / "run" / "model")
    with pytest.raises(BadInput, match=r'run" is a run folder; its checkpoint is ".*/run/model"'):
        open_checkpoint(tmp_path / "run")


def test_pickled_weights_are_never_opened(llama: Path) -> None:
    for file in llama.glob("*.safetensors*"):
        file.unlink()
    (llama / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(BadInput, match=r"pytorch_model\.bin"):
        open_checkpoint(llama)


@pytest.mark.parametrize("model", ["/no/such/folder", "./nowhere", "a/b/c", "", "..", "a b", "x" * 200])
def test_what_is_neither_folder_nor_hub_id(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    if model == "..":
        with pytest.raises(BadInput, match=r"no config\.json"):
            open_checkpoint(model)
        return
    with pytest.raises(BadInput, match="neither a folder nor a Hub id"):
        open_checkpoint(model)


def test_revision_of_a_folder(llama: Path) -> None:
    with pytest.raises(BadInput, match="revision"):
        open_checkpoint(llama, revision="main")


@pytest.mark.parametrize(
    ("shard", "words"),
    [
        ("../outside.safetensors", "not the plain name"),
        ("/etc/passwd.safetensors", "not the plain name"),
        ("sub/x.safetensors", "not the plain name"),
        ("link.safetensors", "leads out"),
        ("model.bin", "not a safetensors file"),
        ("config.json", "not a safetensors file"),
        ("absent.safetensors", "missing"),
    ],
)
def test_index_names_stay_in_the_folder(llama: Path, shard: str, words: str) -> None:
    outside = llama.parent / "outside.safetensors"
    shutil.copy(sorted(llama.glob("*.safetensors"))[0], outside)
    (llama / "link.safetensors").symlink_to(outside)
    index = llama / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["lm_head.weight"] = shard
    index.write_text(json.dumps(content))
    with pytest.raises(BadInput, match=words):
        open_checkpoint(llama)


def test_index_that_disagrees_with_the_shards(llama: Path) -> None:
    index = llama / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    shards = sorted(set(content["weight_map"].values()))
    other = next(shard for shard in shards if shard != content["weight_map"]["lm_head.weight"])
    for changes, words in (
        ({"lm_head.weight": other}, "not there"),
        ({"made.up": other}, "not there"),
        ({"lm_head.weight": 3}, "weight_map"),
    ):
        index.write_text(json.dumps({"weight_map": content["weight_map"] | changes}))
        with pytest.raises(BadInput, match=words):
            open_checkpoint(llama)
    twice = llama / other
    save_file(load_file(twice) | {"lm_head.weight": torch.zeros(2)}, twice, metadata={"format": "pt"})
    index.write_text(json.dumps(content))
    with pytest.raises(BadInput, match="one must go"):
        open_checkpoint(llama)


def test_matrices_that_do_not_fit(tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path / "model", tied=False, dtype=torch.float32, shard="1GB")
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    for tensor, words in (
        (torch.zeros(32, 47), "differ in their number of neurons"),
        (torch.zeros(31, 48), "width is 32"),
        (torch.zeros(32, 48, dtype=torch.int8), "only F16, BF16, F32, F64"),
        (torch.zeros(2, 32, 48), "not a matrix"),
        (torch.zeros(()), "not a matrix"),
    ):
        save_file(tensors | {name: tensor}, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(BadInput, match=words):
            open_checkpoint(folder)


def test_asking_for_what_is_not_there(llama: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(llama)
    moe = open_checkpoint(save_tiny("mixtral", tmp_path / "moe", tied=False, dtype=torch.float32))
    for call, words in (
        (lambda: read_matrix(checkpoint, 2, "out"), "layers are 0 to 1"),
        (lambda: read_matrix(checkpoint, -1, "out"), "layers are 0 to 1"),
        (lambda: read_matrix(checkpoint, 0, "out", expert=0), "dense"),
        (lambda: read_matrix(checkpoint, 0, "out", neurons=torch.tensor([48])), "0 to 47"),
        (lambda: read_matrix(checkpoint, 0, "gate", neurons=torch.tensor([-1])), "0 to 47"),
        (lambda: read_matrix(checkpoint, 0, "out_bias"), 'no matrix "out_bias"'),
        (lambda: read_tensor(checkpoint, "made.up"), "no tensor"),
        (lambda: read_rows(checkpoint, "lm_head.weight", torch.tensor([96])), "no such row"),
        (lambda: read_matrix(moe, 0, "out"), "experts 0 to 3"),
        (lambda: read_matrix(moe, 0, "out", expert=4), "experts 0 to 3"),
    ):
        with pytest.raises(BadInput, match=words):
            call()
