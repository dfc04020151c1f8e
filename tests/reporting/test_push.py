"""Publishing on a Hub of our own: what goes there, what never does, and what is refused."""

import json
from collections.abc import Iterator
from pathlib import Path
from threading import Thread

import pytest
from fake_hub import READ_ONLY, TOKEN, Hub
from huggingface_hub import constants
from tiny_run import tiny_run

from rotate_edit.errors import BadInput, Failure
from rotate_edit.reporting.card import card_metadata
from rotate_edit.reporting.push import files_to_push, push

CHECKPOINT = {"README.md", "README.base.md", "config.json", "generation_config.json", "rotate_edit.json"} | {
    "tokenizer.json", "tokenizer_config.json",
}  # fmt: skip
EDIT = {"edit/edit.json", "edit/edit.safetensors"}
RUN = {"recipe.yaml", "reproduce.json", "evaluation.json", "report.md"}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return tiny_run(tmp_path / "run")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    server = Hub()
    Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield server
    server.shutdown()
    server.server_close()


def weights(names: set[str]) -> set[str]:
    return {name for name in names if name.startswith("model")}


def test_a_checkpoint_goes_with_its_edit_and_without_its_undo(run: Path, hub: Hub) -> None:
    pushed = push(run, "me/edited", base_model="owner/base")
    there = set(hub.models["me/edited"]) - {".gitattributes"}
    assert there == set(pushed.files)
    assert there - weights(there) == CHECKPOINT | EDIT | RUN | {"edit/patch.json"}
    local = {path.name for path in (run / "model").iterdir()}
    assert weights(there) == weights(local)
    for name in weights(there):
        assert hub.models["me/edited"][name] == (run / "model" / name).read_bytes()
    metadata = card_metadata(hub.models["me/edited"]["README.md"].decode())
    assert metadata["base_model"] == "owner/base"
    assert metadata["model-index"][0]["name"] == "me/edited"
    assert not hub.private
    everything = b"".join(hub.models["me/edited"].values())
    assert b"never published" not in everything


def test_undo_and_private_on_request(run: Path, hub: Hub) -> None:
    push(run, "me/edited", undo=True, private=True)
    assert "edit/undo.safetensors" in hub.models["me/edited"]
    assert hub.private == {"me/edited"}


def test_an_adapter_beside_its_checkpoint(run: Path, hub: Hub) -> None:
    push(run, "me/edited")
    pushed = push(run, "me/edited-adapter", adapter=True)
    assert set(pushed.files) == {"adapter_config.json", "adapter_model.safetensors", "README.md"} | EDIT | RUN
    assert card_metadata(hub.models["me/edited-adapter"]["README.md"].decode())["library_name"] == "peft"
    assert card_metadata(hub.models["me/edited"]["README.md"].decode())["library_name"] == "transformers"


def test_what_stands_there_is_not_overwritten(run: Path, hub: Hub) -> None:
    hub.models["me/edited"] = {"model.safetensors": b"precious"}
    with pytest.raises(BadInput, match="has files already"):
        push(run, "me/edited")
    assert hub.models["me/edited"] == {"model.safetensors": b"precious"}
    push(run, "me/edited", overwrite=True)
    assert "README.md" in hub.models["me/edited"]


@pytest.mark.parametrize(("token", "words"), [("hf_wrong", "does not let this token"), (READ_ONLY, "does not let")])
def test_who_may_not_write(run: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch, token: str, words: str) -> None:
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(BadInput, match=words) as caught:
        push(run, "me/edited")
    assert token not in str(caught.value)
    assert hub.models == {}


def test_without_a_token_nothing_is_asked(run: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(run / "no-token"))
    with pytest.raises(BadInput, match="hf auth login"):
        push(run, "me/edited")
    assert hub.requests == []


def test_a_hub_that_is_not_there(run: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(Failure, match="cannot be reached"):
        push(run, "me/edited")


@pytest.mark.parametrize("name", ["edited", "me/edited/more", "../edited", "me/", ""])
def test_names_that_are_no_repositories(run: Path, hub: Hub, name: str) -> None:
    with pytest.raises(BadInput, match="owner/name"):
        push(run, name)
    assert hub.requests == []


def test_a_checkpoint_that_is_not_its_edit_is_not_published(run: Path, hub: Hub) -> None:
    shard = next((run / "model").glob("*.safetensors"))
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with pytest.raises(BadInput, match="not what its edit says"):
        push(run, "me/edited")
    assert hub.requests == []


def test_an_adapter_that_is_not_the_runs_is_not_published(run: Path, hub: Hub) -> None:
    weights = run / "adapter" / "adapter_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(BadInput, match=r"not what reproduce\.json says"):
        push(run, "me/adapter", adapter=True)
    assert "me/adapter" not in hub.models


def test_a_published_adapter_names_its_base(run: Path, hub: Hub) -> None:
    push(run, "me/adapter", adapter=True, base_model="owner/base")
    config = json.loads(hub.models["me/adapter"]["adapter_config.json"])
    assert config["base_model_name_or_path"] == "owner/base"
    assert config["peft_type"] == "LORA"


def test_links_and_missing_parts_are_not_published(run: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    (run / "report.md").unlink()
    (run / "report.md").symlink_to(tmp_path / "secret")
    with pytest.raises(BadInput, match="a link"):
        files_to_push(run)
    (run / "report.md").unlink()
    assert "report.md" not in files_to_push(run)
    (run / "edit" / "undo.safetensors").unlink()
    with pytest.raises(BadInput, match="missing"):
        files_to_push(run, undo=True)
    with pytest.raises(BadInput, match="holds no model/"):
        files_to_push(tmp_path / "base")


def test_nothing_private_is_in_what_is_published(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(run.parent))
    content = json.loads((run / "reproduce.json").read_text())
    assert "hostname" not in json.dumps(content).lower()
    assert set(content["hardware"]) == {"system", "machine", "processor", "cores", "gpus", "device", "threads"}
