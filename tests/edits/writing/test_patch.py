"""Patched folders: byte ranges, companions, stacked edits, verification, undo, and what is refused."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from places import SHARED
from safetensors.torch import load_file, save_file
from tiny_models import random_edit, save_tiny

from rotate_edit.edits.edit import Edit, MatrixChange
from rotate_edit.edits.edit_file import edit_identity, load_edit, save_edit
from rotate_edit.edits.writing.patch import PATCH_JSON, base_differences, revert, verify, write_checkpoint
from rotate_edit.edits.writing.undo import UNDO
from rotate_edit.errors import BadInput, Failure
from rotate_edit.models.checkpoint import Checkpoint, identity, load_model, open_checkpoint, read_matrix

MODELS = SHARED / "models"


@pytest.fixture
def base(tmp_path: Path) -> Checkpoint:
    folder = save_tiny("llama", tmp_path / "base", tied=False, dtype=torch.bfloat16)
    (folder / "README.md").write_text("the base's card")
    (folder / "LICENSE").write_text("licence")
    (folder / "tokenizer.json").write_text("{}")
    for name in ("pytorch_model.bin", "modeling.py", ".token", "training_args.pt", "state.pkl", "notes.txt"):
        (folder / name).write_text("no")
    (folder / "original").mkdir()
    return open_checkpoint(folder)


@pytest.fixture
def edit(base: Checkpoint, tmp_path: Path) -> Edit:
    edit = random_edit(base)
    save_edit(edit, tmp_path / "edit")
    return load_edit(tmp_path / "edit")


def flip(file: Path, position: int) -> None:
    content = bytearray(file.read_bytes())
    content[position] ^= 1
    file.write_bytes(content)


def same_tensors(one: Path, other: Path) -> bool:
    shards = sorted(file.name for file in one.glob("*.safetensors*"))
    return shards == sorted(file.name for file in other.glob("*.safetensors*")) and all(
        (one / name).read_bytes() == (other / name).read_bytes() for name in shards
    )


def test_an_edit_of_nothing_is_byte_identical(base: Checkpoint, tmp_path: Path) -> None:
    patch = write_checkpoint(base, Edit("none", (), base=identity(base)), tmp_path / "out")
    assert patch.tensors == ()
    assert patch.warnings == ("the edit changes nothing, so what is written is a copy of its base.",)
    assert [sentence.split(",")[0] for sentence in patch.sentences()] == ["Left out"]
    assert same_tensors(base.folder, tmp_path / "out")


def test_only_allowed_companions_are_copied(base: Checkpoint, edit: Edit, tmp_path: Path) -> None:
    patch = write_checkpoint(base, edit, tmp_path / "out")
    names = {entry.name for entry in (tmp_path / "out").iterdir()}
    shards = {file.name for file in base.folder.glob("*.safetensors*")}
    assert names == shards | {
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "LICENSE",
        "README.base.md",
        "rotate_edit.json",
    }
    assert set(patch.left_out) == {
        "pytorch_model.bin",
        "modeling.py",
        ".token",
        "training_args.pt",
        "state.pkl",
        "notes.txt",
        "original",
    }
    assert all((tmp_path / "out" / name).stat().st_nlink == 1 for name in names)
    assert not any((tmp_path / "out" / name).is_symlink() for name in names)
    for file in (tmp_path / "out").glob("*.json"):
        assert str(tmp_path) not in file.read_text()


def test_links_for_untouched_shards_alone(base: Checkpoint, tmp_path: Path) -> None:
    change = next(change for change in random_edit(base).changes if change.matrix == "out")
    edit = Edit("test", (change,), base=identity(base))
    patch = write_checkpoint(base, edit, tmp_path / "out", link=True)
    touched = {tensor.shard for tensor in patch.tensors}
    assert set(patch.linked) == set(base.headers) - touched
    assert any("a hard link" in warning or "hard links" in warning for warning in patch.warnings)
    for shard in base.headers:
        same = (tmp_path / "out" / shard).samefile(base.folder / shard)
        assert same == (shard not in touched)
    assert verify(open_checkpoint(tmp_path / "out"), edit, base).problems == ()


def test_a_hub_snapshot_is_read_through_its_links_and_never_linked_into(base: Checkpoint, tmp_path: Path) -> None:
    entry = tmp_path / "models--a--b"
    snapshot = entry / "snapshots" / "c0ffee"
    snapshot.mkdir(parents=True)
    (entry / "blobs").mkdir()
    for number, file in enumerate(file for file in base.folder.iterdir() if file.is_file()):
        (entry / "blobs" / str(number)).write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    cached = open_checkpoint(snapshot)
    edit = random_edit(cached)
    edit = replace(edit, changes=edit.changes[:1], base=identity(cached))
    patch = write_checkpoint(cached, edit, tmp_path / "out", link=True)
    assert patch.linked == ()
    assert any("nothing was linked, since the base lies in the Hub's cache" in warning for warning in patch.warnings)
    assert all(not file.is_symlink() and file.stat().st_nlink == 1 for file in (tmp_path / "out").iterdir())
    assert verify(open_checkpoint(tmp_path / "out"), edit, cached).problems == ()


def test_a_cache_without_links_is_not_linked_into_either(base: Checkpoint, tmp_path: Path) -> None:
    snapshot = tmp_path / "models--a--b" / "snapshots" / "c0ffee"
    shutil.copytree(base.folder, snapshot)
    cached = open_checkpoint(snapshot)
    change = next(change for change in random_edit(cached).changes if change.matrix == "out")
    patch = write_checkpoint(cached, Edit("test", (change,), base=identity(cached)), tmp_path / "out", link=True)
    assert patch.linked == ()
    assert all(file.stat().st_nlink == 1 for file in snapshot.glob("*.safetensors"))


def test_links_that_cannot_be_made_are_said(base: Checkpoint, edit: Edit, tmp_path: Path) -> None:
    patch = write_checkpoint(base, edit, tmp_path / "out", link=True)
    assert {tensor.shard for tensor in patch.tensors} == set(base.headers)
    assert "nothing was linked, because the edit changes every shard." in patch.warnings


@pytest.mark.parametrize("full", [True, False])
def test_every_flipped_byte_is_found_and_named(base: Checkpoint, edit: Edit, tmp_path: Path, full: bool) -> None:
    edit = replace(edit, base=identity(base, full=full))
    write_checkpoint(base, edit, tmp_path / "out", edit_folder=tmp_path / "edit")
    for name, stored in base.stored.items():
        shard = tmp_path / "out" / stored.file
        flip(shard, stored.end - 1)
        out = open_checkpoint(tmp_path / "out")
        for result in (verify(out, edit, base), verify(out, edit, edit_folder=tmp_path / "edit")):
            if result.not_compared and name in result.not_compared:
                assert not full
                continue
            assert len(result.problems) == 1
            assert result.problems[0].startswith(f"{name} in {stored.file}")
        flip(shard, stored.end - 1)
    assert verify(open_checkpoint(tmp_path / "out"), edit, base).problems == ()
    alone = verify(open_checkpoint(tmp_path / "out"), edit, edit_folder=tmp_path / "edit")
    assert alone.problems == ()
    assert bool(alone.not_compared) != full


def test_a_changed_config_or_header_is_found(base: Checkpoint, edit: Edit, tmp_path: Path) -> None:
    write_checkpoint(base, edit, tmp_path / "out", edit_folder=tmp_path / "edit")
    config = tmp_path / "out" / "config.json"
    config.write_text(config.read_text() + " ")
    out = open_checkpoint(tmp_path / "out")
    for result in (verify(out, edit, base), verify(out, edit, edit_folder=tmp_path / "edit")):
        assert result.problems[0].startswith("config.json")
    shard = sorted((tmp_path / "out").glob("*.safetensors"))[0]
    save_file(load_file(shard), shard, metadata={"format": "pt", "more": "x"})
    for result in (verify(open_checkpoint(tmp_path / "out"), edit, base),):
        assert f"the header of {shard.name} is not that of the base." in result.problems


def test_another_base_needs_force(base: Checkpoint, edit: Edit, tmp_path: Path) -> None:
    other = save_tiny("llama", tmp_path / "other", tied=False, dtype=torch.bfloat16)
    (other / "tokenizer.json").write_text("{}")
    name = edit_tensor = "model.layers.1.mlp.down_proj.weight"
    stored = open_checkpoint(other).stored[name]
    flip(other / stored.file, stored.start)
    assert base_differences(edit.base, open_checkpoint(other)) == [f"the tensor {edit_tensor}"]
    (other / "tokenizer.json").write_text("{ }")
    with pytest.raises(BadInput, match=r"tokenizer\.json.*--force-base"):
        write_checkpoint(open_checkpoint(other), edit, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    patch = write_checkpoint(open_checkpoint(other), edit, tmp_path / "out", force_base=True)
    assert "tokenizer.json" in patch.warnings[0]
    write_checkpoint(base, edit, tmp_path / "own", edit_folder=tmp_path / "edit")
    undo = (tmp_path / "edit" / UNDO).read_bytes()
    with pytest.raises(BadInput, match="holds what undoes the edit of another base"):
        write_checkpoint(open_checkpoint(other), edit, tmp_path / "o", edit_folder=tmp_path / "edit", force_base=True)
    assert (tmp_path / "edit" / UNDO).read_bytes() == undo
    with pytest.raises(BadInput, match="does not say"):
        write_checkpoint(base, replace(edit, base={}), tmp_path / "out2")


def test_the_undo_file_of_another_base_is_not_replaced(base: Checkpoint, edit: Edit, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(base.folder, other)
    stored = base.stored[base.place("embedding").name]
    with open(other / stored.file, "r+b") as stream:
        stream.seek(stored.start)
        stream.write(b"\x11\x11")
    write_checkpoint(open_checkpoint(other), edit, tmp_path / "forced", edit_folder=tmp_path / "edit", force_base=True)
    before = (tmp_path / "edit" / "undo.safetensors").read_bytes()
    with pytest.raises(BadInput, match="undoes the edit of another base"):
        write_checkpoint(base, edit, tmp_path / "out", edit_folder=tmp_path / "edit")
    assert (tmp_path / "edit" / "undo.safetensors").read_bytes() == before
    revert(open_checkpoint(tmp_path / "forced"), tmp_path / "edit", tmp_path / "back")
    assert (tmp_path / "back" / stored.file).read_bytes() == (other / stored.file).read_bytes()


def test_edits_stack_and_come_off_in_order(base: Checkpoint, tmp_path: Path) -> None:
    folders = [base.folder]
    edits = []
    for number in (1, 2, 3):
        checkpoint = open_checkpoint(folders[-1])
        edit = random_edit(checkpoint, strength=float(number))
        save_edit(edit, tmp_path / f"edit{number}")
        write_checkpoint(checkpoint, edit, tmp_path / f"out{number}", edit_folder=tmp_path / f"edit{number}")
        folders.append(tmp_path / f"out{number}")
        edits.append(edit)
    top = open_checkpoint(folders[3])
    assert [entry["edit"] for entry in top.edits] == [edit_identity(edit) for edit in edits]
    assert edits[2].base["edits"] == [edit_identity(edit) for edit in edits[:2]]
    with pytest.raises(BadInput, match="a later edit must be reverted first"):
        revert(top, tmp_path / "edit2", tmp_path / "wrong")
    with pytest.raises(BadInput, match="the edits already written into it"):
        write_checkpoint(top, edits[0], tmp_path / "wrong")
    for number in (3, 2, 1):
        source = folders[3] if number == 3 else tmp_path / f"back{number + 1}"
        revert(open_checkpoint(source), tmp_path / f"edit{number}", tmp_path / f"back{number}")
        assert same_tensors(tmp_path / f"back{number}", folders[number - 1])
        record = tmp_path / f"back{number}" / "rotate_edit.json"
        assert record.exists() == (number > 1)
    assert (tmp_path / "back1" / "README.md").read_text() == "the base's card"
    with pytest.raises(BadInput, match="not as the edit left it"):
        revert(open_checkpoint(tmp_path / "back1"), tmp_path / "edit1", tmp_path / "wrong")
    assert not (tmp_path / "wrong").exists()


def test_revert_refuses_what_was_changed_since(base: Checkpoint, edit: Edit, tmp_path: Path) -> None:
    write_checkpoint(base, edit, tmp_path / "out", edit_folder=tmp_path / "edit")
    stored = base.stored["model.layers.1.mlp.down_proj.weight"]
    flip(tmp_path / "out" / stored.file, stored.start)
    with pytest.raises(BadInput, match=r"down_proj\.weight of out is not as the edit left it"):
        revert(open_checkpoint(tmp_path / "out"), tmp_path / "edit", tmp_path / "back")
    flip(tmp_path / "out" / stored.file, stored.start)
    other = replace(edit, changes=edit.changes[:2], base=edit.base)
    save_edit(other, tmp_path / "edit2")
    write_checkpoint(base, other, tmp_path / "out2", edit_folder=tmp_path / "edit2")
    with pytest.raises(BadInput, match="never written into it"):
        revert(open_checkpoint(tmp_path / "out"), tmp_path / "edit2", tmp_path / "back")
    undo = tmp_path / "edit" / UNDO
    flip(undo, undo.stat().st_size - 1)
    with pytest.raises(Failure, match="undo file is damaged"):
        revert(open_checkpoint(tmp_path / "out"), tmp_path / "edit", tmp_path / "back")
    undo.unlink()
    with pytest.raises(BadInput, match="nothing is undone exactly"):
        revert(open_checkpoint(tmp_path / "out"), tmp_path / "edit", tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_without_undo_nothing_of_the_original_is_kept(base: Checkpoint, edit: Edit, tmp_path: Path) -> None:
    write_checkpoint(base, edit, tmp_path / "out", edit_folder=tmp_path / "edit", undo=False)
    assert {entry.name for entry in (tmp_path / "edit").iterdir()} == {"edit.json", "edit.safetensors", PATCH_JSON}


def test_undo_files_are_hostile_input(base: Checkpoint, edit: Edit, tmp_path: Path) -> None:
    write_checkpoint(base, edit, tmp_path / "out", edit_folder=tmp_path / "edit")
    out, undo = open_checkpoint(tmp_path / "out"), tmp_path / "edit" / UNDO
    whole, tensors = undo.read_bytes(), load_file(undo)
    from safetensors import safe_open

    with safe_open(undo, "pt") as file:
        content = json.loads(file.metadata()["rotate_edit"])
    first = content["entries"][0]
    lying = [
        ({}, content | {"format": "x"}),
        ({}, content | {"hashes": {"a": 1}}),
        ({}, content | {"entries": [3]}),
        ({}, content | {"entries": [first | {"matrix": "attention"}]}),
        ({}, content | {"entries": [first | {"layer": 77}]}),
        ({}, content | {"entries": [first | {"layer": "0"}]}),
        ({}, content | {"entries": [first | {"tensor": "model.norm.weight"}]}),
        ({}, content | {"entries": [first | {"tensor": "../x"}]}),
        ({}, content | {"entries": content["entries"][:1]}),
        ({"0.rows": torch.tensor([1, 4, 9, 48])}, content),
        ({"0.rows": torch.tensor([4, 1, 9, 20])}, content),
        ({"0.rows": torch.tensor([1, 4, 9])}, content),
        ({"0.original": torch.zeros(4, 32)}, content),
        ({"0.original": torch.zeros(4, 31, dtype=torch.bfloat16)}, content),
    ]
    for changes, metadata in lying:
        save_file(tensors | changes, undo, metadata={"rotate_edit": json.dumps(metadata)})
        with pytest.raises(BadInput):
            revert(out, tmp_path / "edit", tmp_path / "back")
    for content_bytes in (b"", whole[:-1], whole[:100], b"\xff" * 100):
        undo.write_bytes(content_bytes)
        with pytest.raises(BadInput):
            revert(out, tmp_path / "edit", tmp_path / "back")
    assert not (tmp_path / "back").exists()


@pytest.mark.parametrize("record", ["[]", '{"edits": 3}', '{"edits": [3]}', '{"edits": [{"edit": 3}]}', "{"])
def test_a_foreign_record_is_refused(base: Checkpoint, tmp_path: Path, record: str) -> None:
    (base.folder / "rotate_edit.json").write_text(record)
    with pytest.raises(BadInput, match=r"rotate_edit\.json"):
        identity(open_checkpoint(base.folder))


def test_outputs_that_are_refused(base: Checkpoint, edit: Edit, tmp_path: Path) -> None:
    before = {file: file.stat().st_mtime_ns for file in base.folder.rglob("*")}
    (tmp_path / "there").mkdir()
    for output, words in (
        (base.folder, "one inside the other"),
        (base.folder / "patched", "one inside the other"),
        (tmp_path, "one inside the other"),
        (tmp_path / "there", "exists already"),
    ):
        with pytest.raises(BadInput, match=words):
            write_checkpoint(base, edit, output)
    (tmp_path / "link").symlink_to(base.folder)
    with pytest.raises(BadInput):
        write_checkpoint(base, edit, tmp_path / "link" / "patched")
    with pytest.raises(BadInput):
        write_checkpoint(base, edit, tmp_path / "link", overwrite=True)
    write_checkpoint(base, edit, tmp_path / "there", overwrite=True)
    assert verify(open_checkpoint(tmp_path / "there"), edit, base).problems == ()
    assert {file: file.stat().st_mtime_ns for file in base.folder.rglob("*")} == before


def test_edits_that_do_not_fit(base: Checkpoint, tmp_path: Path) -> None:
    one, width = torch.ones(1, 1), torch.ones(1, 32)
    for change, words in (
        (MatrixChange("out", 1, None, torch.tensor([48]), one, width, 1.0, "c"), "has only 48 rows"),
        (MatrixChange("out", 1, None, torch.tensor([0]), one, torch.ones(1, 31), 1.0, "c"), "have length 32"),
        (MatrixChange("out", 9, None, torch.tensor([0]), one, width, 1.0, "c"), "layers are 0 to 1"),
        (MatrixChange("out", 1, 2, torch.tensor([0]), one, width, 1.0, "c"), "dense"),
        (MatrixChange("embedding", None, None, torch.tensor([96]), one, width, 1.0, "c"), "has only 96 rows"),
        (MatrixChange("out_bias", 1, None, torch.tensor([0]), one, width, 1.0, "c"), "out_bias"),
    ):
        with pytest.raises(BadInput, match=words):
            write_checkpoint(base, Edit("test", (change,), base=identity(base)), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    narrow = open_checkpoint(save_tiny("opt-350m", tmp_path / "opt", tied=True, dtype=torch.float32))
    change = MatrixChange("embedding", None, None, torch.tensor([0]), one, width, 1.0, "c")
    with pytest.raises(BadInput, match="narrower than the residual stream"):
        write_checkpoint(narrow, Edit("test", (change,), base=identity(narrow)), tmp_path / "out")


def test_rounding_is_reported_and_a_vanishing_edit_named(base: Checkpoint, tmp_path: Path) -> None:
    vectors = read_matrix(base, 1, "out")
    rows = torch.arange(48)
    tiny = MatrixChange("out", 1, None, rows, vectors * 1e-4, torch.eye(32), 1.0, "c")
    patch = write_checkpoint(base, Edit("test", (tiny,), base=identity(base)), tmp_path / "out")
    (tensor,) = patch.tensors
    assert tensor.rounding.elements == 48 * 32
    assert tensor.rounding.unchanged == tensor.rounding.elements
    assert tensor.before == tensor.after
    assert "vanishes in model.layers.1.mlp.down_proj.weight: 100 %" in patch.warnings[0]
    large = replace(tiny, left=vectors * 0.3)
    (tensor,) = write_checkpoint(base, Edit("test", (large,), base=identity(base)), tmp_path / "out2").tensors
    assert tensor.rounding.unchanged == 0
    assert tensor.rounding.largest_change == pytest.approx(float((vectors * 0.3).abs().max()), rel=1e-6)
    exact = vectors.double() + (vectors * 0.3).double()
    found = read_matrix(open_checkpoint(tmp_path / "out2"), 1, "out").double()
    assert tensor.rounding.largest_error == pytest.approx(float((found - exact).abs().max()), rel=1e-9)
    assert tensor.rounding.error_squares == pytest.approx(float((found - exact).square().sum()), rel=1e-9)


def test_stacked_experts_on_disk(tmp_path: Path) -> None:
    """A checkpoint that stores its experts fused, as the live model holds them, is edited in the same places."""
    folder = save_tiny("olmoe", tmp_path / "apart", tied=False, dtype=torch.float32, shard="1GB")
    apart = open_checkpoint(folder)
    fused = tmp_path / "fused"
    fused.mkdir()
    (fused / "config.json").write_bytes((folder / "config.json").read_bytes())
    live = load_model(apart)
    save_file({name: p.detach().clone() for name, p in live.named_parameters()}, fused / "model.safetensors")
    together = open_checkpoint(fused)
    for matrix in ("gate", "in", "out"):
        for expert in range(4):
            assert torch.equal(read_matrix(apart, 1, matrix, expert), read_matrix(together, 1, matrix, expert))
            rows = torch.tensor([5, 47, 0])
            part = read_matrix(together, 1, matrix, expert, neurons=rows)
            assert torch.equal(part, read_matrix(apart, 1, matrix, expert)[rows])
    edit = random_edit(together)
    save_edit(edit, tmp_path / "edit")
    write_checkpoint(together, edit, tmp_path / "out", edit_folder=tmp_path / "edit")
    write_checkpoint(apart, replace(edit, base=identity(apart)), tmp_path / "out-apart")
    out, out_apart = open_checkpoint(tmp_path / "out"), open_checkpoint(tmp_path / "out-apart")
    for matrix in ("gate", "in", "out"):
        for expert in range(4):
            assert torch.equal(read_matrix(out, 1, matrix, expert), read_matrix(out_apart, 1, matrix, expert))
    revert(out, tmp_path / "edit", tmp_path / "back")
    assert same_tensors(fused, tmp_path / "back")


@pytest.mark.skipif(not MODELS.is_dir(), reason="the shared checkpoints are not here")
@pytest.mark.parametrize("name", ["stories260K", "gpt280k", "bookworm"])
def test_real_checkpoints(name: str, tmp_path: Path) -> None:
    base = open_checkpoint(MODELS / name)
    edit = random_edit(base)
    save_edit(edit, tmp_path / "edit")
    write_checkpoint(base, edit, tmp_path / "out", edit_folder=tmp_path / "edit")
    out = open_checkpoint(tmp_path / "out")
    assert verify(out, edit, base).problems == ()
    assert not torch.equal(read_matrix(out, 1, "out"), read_matrix(base, 1, "out"))
    revert(out, tmp_path / "edit", tmp_path / "back")
    assert same_tensors(base.folder, tmp_path / "back")


OUTSIDE = """
import sys
sys.modules["rotate_edit"] = None
import torch, transformers
from peft import PeftModel
base, out, adapter = sys.argv[1:]
tokens = torch.tensor([[3, 17, 40, 5]])
load = lambda folder: transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
with torch.no_grad():
    patched = load(out)(tokens).logits
    adapted = PeftModel.from_pretrained(load(base), adapter)(tokens).logits
assert (patched - adapted).abs().max() <= 1e-5 * patched.abs().max()
assert (patched - load(base)(tokens).logits).abs().max() > 1e-3
"""


def test_outputs_load_where_this_package_cannot_be_imported(tmp_path: Path) -> None:
    from rotate_edit.edits.writing.adapter import write_adapter

    base = open_checkpoint(save_tiny("llama", tmp_path / "base", tied=False, dtype=torch.float32))
    edit = random_edit(base)
    write_checkpoint(base, edit, tmp_path / "out")
    write_adapter(base, edit, tmp_path / "adapter")
    arguments = [str(tmp_path / name) for name in ("base", "out", "adapter")]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    finished = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", OUTSIDE, *arguments],
        cwd=tmp_path,
        env=environment | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
