"""What a job will take, and the refusal of one that cannot fit."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_models import random_edit, save_tiny

from rotate_edit import machine as estimate
from rotate_edit.channels.cost import decompose_cost
from rotate_edit.channels.solver import SolverSettings
from rotate_edit.edits.edit_file import save_edit
from rotate_edit.edits.writing.cost import estimate_patch
from rotate_edit.edits.writing.patch import write_checkpoint
from rotate_edit.errors import BadInput
from rotate_edit.machine import Cost, available_memory, check_cost, described, disk_speed, product_speed, seconds
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


def test_live_memory_is_on_the_device_that_holds_the_model(tmp_path: Path) -> None:
    base = open_checkpoint(save_tiny("llama", tmp_path / "base", tied=False, dtype=torch.bfloat16))
    parameters = base.size // 2
    cpu, gpu = estimate_live(base), estimate_live(base, 2, gpu=True)
    assert cpu.gpu_memory == 0
    assert cpu.memory > 4 * parameters
    assert 2 * parameters <= gpu.gpu_memory <= 3 * parameters


def test_costs_add_up() -> None:
    total = Cost(1e9, 3.0, 4, 10, 0, 5, 8) + Cost(2e9, 7.0, 5, 7, 3, 6, 8)
    assert total == Cost(3e9, 7.0, 9, 10, 3, 11, 8)


def test_what_the_hub_cache_lacks_is_downloaded(tmp_path: Path) -> None:
    base = open_checkpoint(save_tiny("llama", tmp_path / "base", tied=False, dtype=torch.float32))
    first, *others = base.headers
    cache = tmp_path / "cache"
    cache.mkdir()
    (cache / first).write_bytes(base.path(first).read_bytes())
    files = {shard: HubFile(base.path(shard).stat().st_size, None) for shard in base.headers}
    remote = replace(base, hub=HubModel("someone/tiny", "c0ffee", cache, files))
    wanted = sum(base.path(shard).stat().st_size for shard in others)
    assert estimate_live(remote).download == estimate_patch(remote).download == wanted
    assert estimate_live(base).download == 0
    assert any(row[0] == "download" for row in described(estimate_live(remote), tmp_path))


def test_time_is_work_over_the_speeds_of_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert product_speed() > 1e8
    monkeypatch.setattr(estimate, "product_speed", lambda device: 1e9)
    monkeypatch.setattr(estimate, "disk_speed", lambda output: 1e8)
    assert seconds(Cost(5e9, 3.0, 2_000_000_000, 1, 0, 500_000_000), tmp_path) == pytest.approx(3 + 5 + 2 + 5)
    for operations, words in ((0, "3 seconds"), (600e9, "10 minutes"), (1e13, "3 hours"), (1e15, "12 days")):
        rows = described(Cost(operations, 3.0, 0, 1000, 0, 1000), tmp_path)
        assert [row[0] for row in rows] == ["time", "memory", "GPU memory", "disk"]
        assert rows[0][1] == f"about {words}"


def test_a_decomposition_grows_with_what_is_asked(tmp_path: Path) -> None:
    base = open_checkpoint(save_tiny("mixtral", tmp_path / "base", tied=False, dtype=torch.float32))
    settings = SolverSettings(channels=2)
    one = decompose_cost(base, settings, matrices=("out",), layers=(0,), workers=1)
    both = decompose_cost(base, settings, matrices=("out",), workers=1)
    every = decompose_cost(base, settings, matrices=("gate", "in", "out"), workers=1, vectors=None)
    assert both.operations == 2 * one.operations
    assert every.operations == pytest.approx(3 * both.operations)
    assert both.disk == 2 * one.disk > every.disk / 3
    # Four experts of 48 neurons in each layer, two channels each, 57 products with 96 x 32 numbers each.
    assert one.operations == pytest.approx(3 * 4 * 48 * 2 * 57 * 2 * 0.65 * 96 * 32)
    published = replace(settings, solver="adamw")
    slow = decompose_cost(base, published, matrices=("out",), layers=(0,), workers=1)
    assert slow.operations > 100 * one.operations
    on_gpu = decompose_cost(base, settings, matrices=("out",), workers=1, device="cuda")
    assert on_gpu.gpu_memory > 0 == both.gpu_memory
    two = decompose_cost(base, settings, matrices=("out",), workers=2)
    assert two.memory > both.memory


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    check_cost(Cost(memory=1000, disk=1000), tmp_path / "out")
    for cost, words in (
        (Cost(memory=10**15), "GB of memory"),
        (Cost(gpu_memory=10**15), "GB of GPU memory"),
        (Cost(disk=10**18), "its disk has"),
    ):
        with pytest.raises(BadInput, match=words):
            check_cost(cost, tmp_path / "out")
    assert available_memory() > 10**7
    assert disk_speed(tmp_path / "not" / "there") > 1e5
    assert list(tmp_path.iterdir()) == []
