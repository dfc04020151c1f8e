"""What writing a patched checkpoint takes."""

from dataclasses import replace
from pathlib import Path

import torch
from tiny_models import random_edit, save_tiny

from rotate_edit.edits.edit_file import save_edit
from rotate_edit.edits.writing.cost import estimate_patch
from rotate_edit.edits.writing.patch import write_checkpoint
from rotate_edit.models.checkpoint import identity, open_checkpoint
from rotate_edit.models.cost import estimate_live
from rotate_edit.models.hub import HubFile, HubModel


def test_disk_is_what_is_then_written(tmp_path: Path) -> None:
    base = open_checkpoint(save_tiny("llama", tmp_path / "base", tied=False, dtype=torch.float32))
    edit = random_edit(base)
    save_edit(edit, tmp_path / "edit")
    cost = estimate_patch(base, edit)
    write_checkpoint(base, edit, tmp_path / "out", edit_folder=tmp_path / "edit")
    shards = sum(file.stat().st_size for file in (tmp_path / "out").glob("*.safetensors"))
    undo = (tmp_path / "edit" / "undo.safetensors").stat().st_size
    assert cost.disk <= shards + undo <= cost.disk + 20_000
    few = replace(edit, changes=edit.changes[:1], base=identity(base))
    assert estimate_patch(base, few, link=True).disk < cost.disk / 2
    assert estimate_patch(base).disk == base.size


def test_what_the_hub_cache_lacks_is_downloaded(tmp_path: Path) -> None:
    base = open_checkpoint(save_tiny("llama", tmp_path / "base", tied=False, dtype=torch.float32))
    first, *others = base.headers
    cache = tmp_path / "cache"
    cache.mkdir()
    (cache / first).write_bytes(base.path(first).read_bytes())
    files = {shard: HubFile(base.path(shard).stat().st_size, None) for shard in base.headers}
    remote = replace(base, hub=HubModel("someone/tiny", "c0ffee", cache, files))
    wanted = sum(base.path(shard).stat().st_size for shard in others)
    assert estimate_patch(remote).download == estimate_live(remote).download == wanted
    assert estimate_patch(base).download == 0
