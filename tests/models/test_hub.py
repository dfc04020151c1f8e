"""Models from the Hub, up to the network: a small server of our own answers `huggingface_hub` on this machine."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from threading import Thread

import pytest
import torch
from fake_hub import COMMIT, MODEL, Hub, run
from tiny_models import save_tiny

from rotate_edit.models.checkpoint import identity, open_checkpoint
from rotate_edit.models.hub import looks_like_hub_id


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = save_tiny("llama", tmp_path / "origin", tied=False, dtype=torch.bfloat16)
    (folder / "README.md").write_text("card")
    for name in ("pytorch_model.bin", "modeling_tiny.py", "notes.txt"):
        (folder / name).write_bytes(b"never fetched")
    return folder


@pytest.fixture
def hub(folder: Path) -> Iterator[Hub]:
    server = Hub(folder)
    Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


PRELUDE = f"""
import json, sys, hashlib
from pathlib import Path
from rotate_edit.errors import BadInput, Failure
from rotate_edit.models.checkpoint import *
MODEL = {MODEL!r}
def refused(call):
    try:
        call()
    except (BadInput, Failure) as error:
        return type(error).__name__ + ": " + str(error)
    return "not refused"
"""

LOOK = """
def look(revision=None):
    checkpoint = open_checkpoint(MODEL, revision=revision)
    here = sorted(path.name for path in checkpoint.folder.iterdir())
    matrix = read_matrix(checkpoint, 1, "out")
    after = sorted(path.name for path in checkpoint.folder.iterdir())
    return {"identity": identity(checkpoint), "here": here, "after": after, "sum": float(matrix.sum())}
"""

PATCH = """
from rotate_edit.edits.edit import Edit, MatrixChange
from rotate_edit.edits.writing.patch import write_checkpoint, verify
import torch
def patched(output, live=False):
    checkpoint = open_checkpoint(MODEL)
    change = MatrixChange("out", 1, None, torch.tensor([3]), torch.ones(1, 1), torch.ones(1, 32), 1.0, "c")
    name = checkpoint.place("out", 1).name
    edit = Edit("test", (change,), base=identity(checkpoint, [name]))
    patch = write_checkpoint(checkpoint, edit, Path(output), link=True)
    return {
        "problems": verify(open_checkpoint(output), edit, checkpoint).problems,
        "left_out": patch.left_out, "linked": patch.linked, "source": edit.base["source"],
        "live": type(load_model(checkpoint)).__name__ if live else None,
    }
"""


def test_only_what_is_needed_is_fetched(hub: Hub, folder: Path, tmp_path: Path) -> None:
    found = run(PRELUDE + LOOK + "print(json.dumps(look()))", hub.endpoint, tmp_path / "cache")
    origin = open_checkpoint(folder)
    shards = set(origin.headers)
    needed = origin.stored["model.layers.1.mlp.down_proj.weight"].file
    assert found["here"] == ["config.json", "model.safetensors.index.json"]
    assert set(found["after"]) == {"config.json", "model.safetensors.index.json", needed}
    assert hub.fetched() == {"config.json", "model.safetensors.index.json", needed}
    ranges = {path.rsplit("/", 1)[1] for _, path, part in hub.requests if part}
    assert ranges == shards
    own = identity(origin, full=False)
    assert found["identity"]["headers"] == own["headers"]
    assert found["identity"]["files"] == own["files"]
    assert found["identity"]["revision"] == COMMIT
    assert found["identity"]["source"] == MODEL
    hashes = {shard: hashlib.sha256((folder / shard).read_bytes()).hexdigest() for shard in shards}
    assert {name: found["identity"]["hub"][name] for name in shards} == hashes
    assert str(tmp_path) not in json.dumps(found["identity"])


def test_a_full_patch_fetches_the_rest_and_works_offline_afterwards(hub: Hub, folder: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    code = PRELUDE + PATCH + "print(json.dumps(patched(sys.argv[1])))"
    found = run(code, hub.endpoint, cache, str(tmp_path / "out"))
    assert found["problems"] == []
    assert found["linked"] == []
    assert set(found["left_out"]) == {"pytorch_model.bin", "modeling_tiny.py", "notes.txt"}
    assert not {"pytorch_model.bin", "modeling_tiny.py", "notes.txt"} & hub.fetched()
    assert all(not file.is_symlink() for file in (tmp_path / "out").iterdir())
    assert (tmp_path / "out" / "README.base.md").read_text() == "card"
    asked = len(hub.requests)
    code = PRELUDE + PATCH + LOOK + f"print(json.dumps([patched(sys.argv[1], live=True), look({COMMIT!r})]))"
    again, looked = run(code, hub.endpoint, cache, str(tmp_path / "out2"), offline=True)
    # Importing transformers takes longer than all the rest, so that the model is loaded where no network helps.
    assert again == found | {"left_out": [], "live": "LlamaForCausalLM"}
    assert len(hub.requests) == asked
    assert looked["identity"]["revision"] == COMMIT


def test_a_download_that_breaks_off_is_taken_up_again(hub: Hub, folder: Path, tmp_path: Path) -> None:
    origin = open_checkpoint(folder)
    shard = origin.stored["model.layers.1.mlp.down_proj.weight"].file
    hub.breaking = {shard}
    found = run(PRELUDE + LOOK + "print(json.dumps(look()))", hub.endpoint, tmp_path / "cache")
    assert hub.breaking == set()
    header = {"bytes=0-", "bytes=8-"}
    asked = [part or "" for method, path, part in hub.requests if method == "GET" and path.endswith(shard)]
    assert len([part for part in asked if part[:8] not in header]) >= 2
    (blob,) = (tmp_path / "cache").rglob(f"snapshots/*/{shard}")
    assert blob.read_bytes() == (folder / shard).read_bytes()
    assert shard in found["after"]


REFUSALS = """
print(json.dumps([
    refused(lambda: open_checkpoint("someone/absent")),
    refused(lambda: open_checkpoint(MODEL, revision="nowhere")),
]))
"""


def test_what_the_hub_does_not_have(hub: Hub, tmp_path: Path) -> None:
    absent, revision = run(PRELUDE + REFUSALS, hub.endpoint, tmp_path / "cache")
    assert absent.startswith('BadInput: "someone/absent" is not a folder here')
    assert revision == f'BadInput: the Hub model {MODEL} has no revision "nowhere".'
    offline = run(PRELUDE + REFUSALS, hub.endpoint, tmp_path / "cache", offline=True)
    assert all("the Hub cannot be reached" in sentence for sentence in offline)


def test_a_hub_that_is_not_there(tmp_path: Path) -> None:
    sentences = run(PRELUDE + REFUSALS, "http://127.0.0.1:9", tmp_path / "cache")
    assert all(sentence.startswith("BadInput") and "cannot be reached" in sentence for sentence in sentences)


def test_a_shard_that_is_gone_or_lies(hub: Hub, tmp_path: Path) -> None:
    shard = sorted(name for name in hub.files if name.endswith(".safetensors"))[1]
    whole = hub.files[shard]
    hub.models["someone/lies"] = hub.files | {shard: (2**40).to_bytes(8, "little") + whole[8:]}
    hub.models["someone/gone"] = {name: content for name, content in hub.files.items() if name != shard}
    names = ["someone/lies", "someone/gone"]
    code = f"print(json.dumps([refused(lambda: open_checkpoint(name)) for name in {names!r}]))"
    lies, gone = run(PRELUDE + code, hub.endpoint, tmp_path / "cache")
    assert "not a whole safetensors file" in lies
    assert f'has no file "{shard}"' in gone


@pytest.mark.parametrize(
    ("text", "is_id"),
    [
        ("gpt2", True),
        ("openai-community/gpt2", True),
        ("meta-llama/Llama-3.1-8B", True),
        ("a/b/c", False),
        ("../x", False),
        ("a/..", False),
        ("/a", False),
        ("a b", False),
        ("", False),
        ("a/b\n", False),
        ("ä/b", False),
        ("x" * 200, False),
    ],
)
def test_hub_ids(text: str, is_id: bool) -> None:
    assert looks_like_hub_id(text) == is_id
