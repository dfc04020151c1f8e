"""What searching channels and scanning a model take."""

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_models import save_tiny

from rotate_edit.channels.cost import decompose_cost, scan_cost, shard_memory, shard_workers
from rotate_edit.channels.solver import SolverSettings
from rotate_edit.machine import available_memory
from rotate_edit.models.checkpoint import open_checkpoint


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


def test_a_scan_grows_with_its_matrices_and_with_what_it_keeps(tmp_path: Path) -> None:
    base = open_checkpoint(save_tiny("mixtral", tmp_path / "base", tied=False, dtype=torch.float32))
    one, every = scan_cost(base, 1, 10), scan_cost(base, 3, 10)
    # Two layers of four experts with 48 neurons, each projected on 96 tokens of width 32.
    assert one.operations == 2 * 4 * 48 * 2 * 96 * 32
    assert every.operations == 3 * one.operations
    assert every.disk == 3 * one.disk < scan_cost(base, 3, 50).disk
    assert every.memory == one.memory
    assert one.read == base.size


def test_shards_run_at_once_as_cores_and_memory_allow(tmp_path: Path) -> None:
    base = open_checkpoint(save_tiny("llama", tmp_path / "base", tied=False, dtype=torch.float32))
    settings = SolverSettings(channels=2)
    circle = shard_memory(base, settings, 64)
    assert 0 < circle < shard_memory(base, settings, 512)
    assert shard_memory(base, replace(settings, solver="adamw"), 64) > circle
    cores = os.cpu_count() or 1
    assert shard_workers(1000, 1, threads=1) == cores
    assert shard_workers(1000, 1, threads=cores) == 1
    assert shard_workers(1, 1, threads=1) == 1
    assert shard_workers(1000, 2 * available_memory(), threads=1) == 1
