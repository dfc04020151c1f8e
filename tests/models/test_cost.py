"""What reading and loading a model takes."""

from dataclasses import replace
from pathlib import Path

import torch
from tiny_models import FAMILIES, save_tiny

from rotate_edit.machine import described
from rotate_edit.models.checkpoint import open_checkpoint
from rotate_edit.models.cost import estimate_live, parameters, size_of, table_memory, to_download
from rotate_edit.models.hub import HubFile, HubModel


def test_live_memory_is_on_the_device_that_holds_the_model(tmp_path: Path) -> None:
    base = open_checkpoint(save_tiny("llama", tmp_path / "base", tied=False, dtype=torch.bfloat16))
    parameters = base.size // 2
    cpu, gpu = estimate_live(base), estimate_live(base, 2, gpu=True)
    assert cpu.gpu_memory == 0
    assert cpu.memory > 4 * parameters
    assert 2 * parameters <= gpu.gpu_memory <= 3 * parameters


def test_what_the_hub_cache_lacks_is_downloaded(tmp_path: Path) -> None:
    base = open_checkpoint(save_tiny("llama", tmp_path / "base", tied=False, dtype=torch.float32))
    first, *others = base.headers
    cache = tmp_path / "cache"
    cache.mkdir()
    (cache / first).write_bytes(base.path(first).read_bytes())
    files = {shard: HubFile(base.path(shard).stat().st_size, None) for shard in base.headers}
    remote = replace(base, hub=HubModel("someone/tiny", "c0ffee", cache, files))
    wanted = sum(base.path(shard).stat().st_size for shard in others)
    assert estimate_live(remote).download == to_download(remote) == wanted
    assert estimate_live(base).download == 0
    assert any(row[0] == "download" for row in described(estimate_live(remote), tmp_path))


def test_a_models_sizes_are_its_own(tmp_path: Path) -> None:
    base = open_checkpoint(save_tiny("llama", tmp_path / "base", tied=False, dtype=torch.bfloat16))
    model = FAMILIES["llama"].build(tied=False)
    assert parameters(base) == sum(parameter.numel() for parameter in model.parameters())
    size = size_of(base)
    assert (size.layers, size.neurons, size.hidden_size, size.vocabulary_size) == (2, 48, 32, 96)
    assert size.parameters == parameters(base)


def test_two_tables_take_more_than_one(tmp_path: Path) -> None:
    untied = open_checkpoint(save_tiny("llama", tmp_path / "untied", tied=False, dtype=torch.float32))
    tied = open_checkpoint(save_tiny("llama", tmp_path / "tied", tied=True, dtype=torch.float32))
    assert table_memory(untied) > table_memory(tied) > 2 * 96 * 32 * 4
