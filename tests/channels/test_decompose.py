"""Decomposing neurons in memory and whole models in shards: right vectors, same bytes, nothing lost, nothing mixed."""

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from places import SHARED, TESTS
from small_checkpoint import LAYERS, NEURONS, VOCABULARY, write_checkpoint

from rotate_edit.channels.channel_set import ChannelSet, load_channels, search_channels
from rotate_edit.channels.decompose import claim_threshold, decompose, decompose_neurons
from rotate_edit.channels.shards import Targets, finished_shards, job_shards, make_job, work_shard
from rotate_edit.channels.solver import SolverSettings, find_channels
from rotate_edit.errors import BadInput, Failure
from rotate_edit.models.architectures import Neuron
from rotate_edit.models.checkpoint import (
    Checkpoint,
    open_checkpoint,
    read_matrix,
    read_unembedding,
)
from rotate_edit.vocabulary.projection import (
    Vocabulary,
    VocabularyRules,
    read_projections,
    read_vocabulary,
)
from rotate_edit.vocabulary.tokens import token_weights

SETTINGS = SolverSettings(channels=2, rows=16)
RULES = VocabularyRules(words_only=False, ignore_undertrained=False)


def vocabulary(rules: VocabularyRules = RULES) -> Vocabulary:
    ignored = torch.zeros(VOCABULARY, dtype=torch.bool)
    ignored[:5] = True
    return Vocabulary(rules, tuple(f" t{index}" for index in range(VOCABULARY)), ignored, torch.zeros_like(ignored))


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """What is compared with a job's shards is computed like them, because rounding differs with the threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    return open_checkpoint(write_checkpoint(tmp_path / "model", dead=3))


def run(checkpoint: Checkpoint, output: Path, **changes: object) -> ChannelSet:
    choices: dict = {"targets": Targets(("out",)), "vocabulary": vocabulary(), "settings": SETTINGS}
    choices |= {"block": 8, "device": "cpu", "keep_shards": True}
    return decompose(checkpoint, output, **(choices | changes))


def shard_files(output: Path) -> dict[str, bytes]:
    folder = output.with_name(f"{output.name}.shards")
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


def test_a_model_becomes_one_channel_set_that_agrees_with_the_solver(checkpoint: Checkpoint, tmp_path: Path) -> None:
    steps: list[tuple[str, int, int]] = []
    made = run(
        checkpoint,
        tmp_path / "atlas",
        targets=Targets(("out", "gate")),
        progress=lambda *step: steps.append(step),
        vectors="float32",
    )
    channels = load_channels(tmp_path / "atlas")
    assert made.channels == len(channels)
    total = 2 * LAYERS * NEURONS
    assert steps[0] == ("decompose", 0, total)
    assert steps[-1] == ("decompose", total, total)
    places = [(one.layer, ("out", "gate").index(one.matrix), one.neuron, one.index) for one in channels]
    assert places == sorted(places)
    assert {place[:3] for place in places} == {
        (layer, kind, neuron) for layer in range(LAYERS) for kind in range(2) for neuron in range(NEURONS)
    } - {(0, 0, 3)}
    unembedding = read_unembedding(checkpoint)
    vectors = read_matrix(checkpoint, 1, "gate")[8:16]
    weights = token_weights(unembedding, ignored=vocabulary().ignored)
    found = find_channels(vectors, unembedding, weights, SETTINGS)
    for row in range(8):
        own = [one for one in channels if (one.layer, one.matrix, one.neuron) == (1, "gate", 8 + row)]
        assert len(own) == found.found[row]
        for one in own:
            assert one.vector is not None
            assert torch.allclose(one.vector, found.vectors[row, one.index], atol=1e-4)
            assert one.token_ids == tuple(found.token_ids[row, one.index].tolist())
            assert one.tokens == tuple(f" t{index}" for index in one.token_ids)
            assert one.loss == pytest.approx(float(found.loss[row, one.index]), abs=1e-5)
            assert one.vector.norm() == pytest.approx(float(vectors[row].norm()), rel=1e-5)
    assert not {index for one in channels for index in one.token_ids} & set(range(5))
    assert search_channels(tmp_path / "atlas", token=channels[40].tokens[0], limit=None)


def test_the_same_job_gives_the_same_bytes_whatever_runs_at_once(checkpoint: Checkpoint, tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    for name, workers in (("a", 1), ("b", 3)):
        run(checkpoint, tmp_path / name, workers=workers)
    assert shard_files(tmp_path / "a") == shard_files(tmp_path / "b")
    assert len(shard_files(tmp_path / "a")) == LAYERS * 3
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()
    assert torch.get_num_threads() == threads


def test_only_missing_and_damaged_shards_are_done_again(checkpoint: Checkpoint, tmp_path: Path) -> None:
    run(checkpoint, tmp_path / "whole")
    whole = shard_files(tmp_path / "whole")
    (tmp_path / "whole.shards").rename(tmp_path / "part.shards")
    names = sorted(whole)
    (tmp_path / "part.shards" / names[2]).unlink()
    (tmp_path / "part.shards" / names[5]).write_bytes(whole[names[5]][:-1] + b"\x00")
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "part.shards").glob("*.safetensors")}
    run(checkpoint, tmp_path / "part")
    assert shard_files(tmp_path / "part") == whole
    after = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "part.shards").glob("*.safetensors")}
    assert {name for name in after if after[name] != before.get(name)} == {names[2], names[5]}


def test_a_finished_output_is_returned_and_another_one_refused(checkpoint: Checkpoint, tmp_path: Path) -> None:
    first = run(checkpoint, tmp_path / "atlas", keep_shards=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["atlas", "model"]
    stamp = (tmp_path / "atlas" / "channels.json").stat().st_mtime_ns
    assert run(checkpoint, tmp_path / "atlas") == first
    assert (tmp_path / "atlas" / "channels.json").stat().st_mtime_ns == stamp
    with pytest.raises(BadInput, match="exists already"):
        run(checkpoint, tmp_path / "atlas", block=9)


def test_unfinished_work_of_another_job_is_refused(checkpoint: Checkpoint, tmp_path: Path) -> None:
    run(checkpoint, tmp_path / "atlas")
    (tmp_path / "atlas").rename(tmp_path / "elsewhere")
    with pytest.raises(BadInput, match="differs in threads"):
        run(checkpoint, tmp_path / "atlas", threads=2)
    with pytest.raises(BadInput, match="differs in solver"):
        run(checkpoint, tmp_path / "atlas", settings=replace(SETTINGS, claim_threshold=5.0))
    other = open_checkpoint(write_checkpoint(tmp_path / "other", seed=1))
    with pytest.raises(BadInput, match="differs in base"):
        run(other, tmp_path / "atlas")


def test_a_worker_refuses_another_checkpoint(checkpoint: Checkpoint, tmp_path: Path) -> None:
    run(checkpoint, tmp_path / "atlas")
    job = (tmp_path / "atlas.shards" / "job.json").read_text()
    shard = job_shards(checkpoint, json.loads(job))[0]
    other = write_checkpoint(tmp_path / "other", seed=1)
    with pytest.raises(Failure, match="not the one"):
        work_shard(str(other), None, job, str(tmp_path / "atlas.shards"), shard)


def test_a_worker_without_the_folder_returns_the_file(checkpoint: Checkpoint, tmp_path: Path) -> None:
    run(checkpoint, tmp_path / "atlas")
    job = (tmp_path / "atlas.shards" / "job.json").read_text()
    shard = job_shards(checkpoint, json.loads(job))[4]
    _, name, content = work_shard(str(checkpoint.folder), None, job, str(tmp_path / "nowhere"), shard)
    assert content == shard_files(tmp_path / "atlas")[name]
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"targets": Targets(("out",), (7,))}, "layer 7"),
        ({"targets": Targets(("bias",))}, "bias"),
        ({"targets": Targets(())}, "at least one"),
        ({"block": 0}, "at least one"),
        ({"vectors": "float8"}, "float8"),
        ({"engine": "slurm"}, "slurm"),
        ({"device": "tpu"}, "tpu"),
        ({"vocabulary": vocabulary(replace(RULES, projection="both"))}, "both"),
        ({"settings": replace(SETTINGS, channels=0)}, "Channels"),
    ],
)
def test_bad_requests_write_nothing(
    checkpoint: Checkpoint, tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(BadInput, match=message):
        run(checkpoint, tmp_path / "atlas", **changes)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_nothing_is_written_into_the_model(checkpoint: Checkpoint) -> None:
    before = sorted(path.name for path in checkpoint.folder.iterdir())
    with pytest.raises(BadInput, match="the base's folder lie one inside the other"):
        run(checkpoint, checkpoint.folder / "atlas")
    assert sorted(path.name for path in checkpoint.folder.iterdir()) == before


def test_neurons_in_memory_are_those_of_the_whole_model(checkpoint: Checkpoint, tmp_path: Path) -> None:
    run(checkpoint, tmp_path / "atlas", targets=Targets(("out", "gate")), vectors="float32", block=NEURONS)
    atlas = {one.name: one for one in load_channels(tmp_path / "atlas")}
    words = vocabulary()
    projections = read_projections(checkpoint, words)
    wanted = [(Neuron(1, 5), "out"), (Neuron(0, 3), "out"), (Neuron(0, 20), "gate"), (Neuron(1, 2), "out")]
    counts: list[int] = []
    channels = decompose_neurons(
        wanted, projections, words.texts, SETTINGS, progress=lambda step, done, total: counts.append(done)
    )
    assert counts[-1] == 4
    order = list(dict.fromkeys(one.name.split("#")[0] for one in channels))
    assert order == ["L1.N5.out", "L0.N20.gate", "L1.N2.out"]
    for one in channels:
        # Another batch rounds differently, which may lead later channels elsewhere, but not the first.
        if one.index == 0:
            assert one.loss == pytest.approx(atlas[one.name].loss, abs=1e-4)
            assert len(set(one.token_ids) & set(atlas[one.name].token_ids)) >= 8


def test_a_tilt_asks_for_its_own_direction(checkpoint: Checkpoint) -> None:
    words = vocabulary()
    projections = read_projections(checkpoint, words)
    unembedding = read_unembedding(checkpoint)
    direction = unembedding[100:120].mean(0) - unembedding.mean(0)
    vectors = read_matrix(checkpoint, 1, "out")
    strongest = int((vectors @ direction / vectors.norm(dim=1)).argmax())
    asked: list[tuple[int, str]] = []

    def tilt(layer: int, matrix: str) -> torch.Tensor:
        asked.append((layer, matrix))
        return direction

    settings = replace(SETTINGS, channels=1)
    tilted = decompose_neurons([(Neuron(1, strongest), "out")], projections, words.texts, settings, tilt=tilt)
    plain = decompose_neurons([(Neuron(1, strongest), "out")], projections, words.texts, settings)
    assert asked == [(1, "out")]
    assert tilted[0].loss <= plain[0].loss + 1e-6


def test_a_job_says_which_tables_auto_stands_for(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_checkpoint(tmp_path / "untied", tied=False))
    job = make_job(
        checkpoint, Targets(("out",)), vocabulary(), SETTINGS, block=8, threads=1, device="cpu", vectors=None
    )
    assert job["vocabulary"]["projection"] == 2
    assert job["projection"] == {"embedding": [0, 1]}


def test_a_folded_norm_is_each_layers_own(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_checkpoint(tmp_path / "model"))
    words = vocabulary(replace(RULES, fold_norm=True))
    projections = read_projections(checkpoint, words)
    wanted = [(Neuron(layer, 4), "gate") for layer in (0, 1)]
    channels = decompose_neurons(wanted, projections, words.texts, SETTINGS)
    for layer in (0, 1):
        table, weights = projections.of(layer, "gate")
        found = find_channels(read_matrix(checkpoint, layer, "gate")[4:5], table, weights, SETTINGS)
        losses = [one.loss for one in channels if one.layer == layer]
        assert losses == pytest.approx(found.loss[0, : int(found.found[0])].tolist(), abs=1e-5)


def test_every_expert_is_decomposed(tmp_path: Path) -> None:
    from tiny_models import FAMILIES

    FAMILIES["mixtral"].build(tied=False).save_pretrained(tmp_path / "model")
    checkpoint = open_checkpoint(tmp_path / "model")
    size = checkpoint.vocabulary_size
    words = Vocabulary(
        RULES,
        tuple(f"t{index}" for index in range(size)),
        torch.zeros(size, dtype=torch.bool),
        torch.zeros(size, dtype=torch.bool),
    )
    settings = replace(SETTINGS, channels=1)
    run(checkpoint, tmp_path / "atlas", vocabulary=words, settings=settings, block=100, vectors="float32")
    channels = load_channels(tmp_path / "atlas")
    experts = checkpoint.experts or 0
    assert [(one.layer, one.expert, one.neuron) for one in channels] == [
        (layer, expert, neuron)
        for layer in range(checkpoint.layers)
        for expert in range(experts)
        for neuron in range(checkpoint.neurons)
    ]
    assert experts > 1
    found = search_channels(tmp_path / "atlas", neuron="L1.E1.N7", vectors=True)[0]
    assert found.vector is not None
    assert found.vector.norm() == pytest.approx(float(read_matrix(checkpoint, 1, "out", 1)[7].norm()), rel=1e-5)
    assert decompose_neurons([(Neuron(1, 7, 1), "out")], read_projections(checkpoint, words), words.texts, settings)[
        0
    ].loss == pytest.approx(found.loss, abs=1e-4)


@pytest.mark.skipif(not (SHARED / "models").is_dir(), reason="the shared checkpoints are not here")
def test_a_real_vocabulary_is_read_with_its_masks() -> None:
    checkpoint = open_checkpoint(SHARED / "models" / "bookworm")
    words = read_vocabulary(checkpoint, VocabularyRules())
    kept = [text for text, ignored in zip(words.texts, words.ignored.tolist()) if not ignored]
    assert len(words.texts) == checkpoint.vocabulary_size == len(words.ignored)
    assert 4000 < len(kept) < 6500
    assert all(text.startswith(" ") and text[1:].isalpha() for text in kept)
    assert " time" in kept
    everything = read_vocabulary(checkpoint, VocabularyRules(words_only=False, ignore_undertrained=False))
    assert int(everything.ignored.sum()) < 20
    assert claim_threshold(checkpoint) == 6.0


KILLED_RUN = """
import sys, torch
from pathlib import Path
from typing import Any
sys.path[:0] = sys.argv[3].split(":")
from test_decompose import RULES, SETTINGS, run
from rotate_edit.models.checkpoint import open_checkpoint
run(open_checkpoint(sys.argv[1]), Path(sys.argv[2]), block=int(sys.argv[4]), workers=1)
"""


def start(checkpoint: Checkpoint, output: Path, block: int = 2) -> subprocess.Popen:
    here = os.pathsep.join((str(TESTS), str(TESTS / "channels")))
    words = [sys.executable, "-c", KILLED_RUN, str(checkpoint.folder), str(output), here, str(block)]
    return subprocess.Popen(words)


def wait_for_shards(output: Path, process: subprocess.Popen, count: int = 1) -> None:
    limit = time.monotonic() + 60
    while len(shard_files(output)) < count and process.poll() is None and time.monotonic() < limit:
        time.sleep(0.002)


def test_a_killed_run_is_resumed_to_the_same_bytes(checkpoint: Checkpoint, tmp_path: Path) -> None:
    run(checkpoint, tmp_path / "calm", block=2, workers=1)
    process = start(checkpoint, tmp_path / "killed")
    wait_for_shards(tmp_path / "killed", process)
    process.kill()
    process.wait()
    assert not (tmp_path / "killed").exists()
    left = shard_files(tmp_path / "killed")
    calm = shard_files(tmp_path / "calm")
    assert left
    assert left.items() <= calm.items()
    run(checkpoint, tmp_path / "killed", block=2, workers=1)
    assert shard_files(tmp_path / "killed") == calm
    for file in (tmp_path / "calm").iterdir():
        assert file.read_bytes() == (tmp_path / "killed" / file.name).read_bytes()


@pytest.mark.slow
def test_twenty_kills_at_random_moments_change_nothing(checkpoint: Checkpoint, tmp_path: Path) -> None:
    assert start(checkpoint, tmp_path / "calm", block=1).wait() == 0
    calm = shard_files(tmp_path / "calm")
    chance = random.Random(20)
    finished = [0]
    for attempt in range(20):
        process = start(checkpoint, tmp_path / "killed", block=1)
        # A moment of the start, or one a little after so many more shards.
        more = chance.randrange(4)
        if more:
            wait_for_shards(tmp_path / "killed", process, finished[-1] + more)
        time.sleep(chance.uniform(0, 0.02 if more else 3))
        process.send_signal(signal.SIGKILL)
        process.wait()
        left = shard_files(tmp_path / "killed")
        assert left.items() <= calm.items(), attempt
        finished.append(len(left))
    assert 0 < finished[10] < len(calm)
    assert start(checkpoint, tmp_path / "killed", block=1).wait() == 0
    assert shard_files(tmp_path / "killed") == calm
    for file in (tmp_path / "calm").iterdir():
        assert file.read_bytes() == (tmp_path / "killed" / file.name).read_bytes()
    print(f"decompose: killed 20 times, with {finished[1:]} of {len(calm)} shards finished; resumed to the same bytes")


def ray_workers() -> Iterator[int]:
    """Process ids of the Ray workers that are busy with a shard."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and (entry / "cmdline").is_file():
            try:
                if (entry / "cmdline").read_bytes().startswith(b"ray::work_shard"):
                    yield int(entry.name)
            except OSError:
                # The process ended while it was being looked at.
                continue


@pytest.mark.slow
def test_a_ray_worker_dies_and_nothing_is_lost(checkpoint: Checkpoint, tmp_path: Path) -> None:
    ray = pytest.importorskip("ray")
    run(checkpoint, tmp_path / "calm", block=2)
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    killed: list[int] = []

    def kill_one() -> None:
        limit = time.monotonic() + 120
        while not killed and time.monotonic() < limit:
            if shard_files(tmp_path / "ray"):
                for process in ray_workers():
                    os.kill(process, signal.SIGKILL)
                    killed.append(process)
                    break
            time.sleep(0.001)

    killer = threading.Thread(target=kill_one)
    killer.start()
    try:
        run(checkpoint, tmp_path / "ray", block=2, engine="ray", address="auto")
    finally:
        killer.join()
        ray.shutdown()
    assert killed
    print(f"decompose on Ray: one of two workers killed among {len(shard_files(tmp_path / 'calm'))} shards; same bytes")
    assert shard_files(tmp_path / "ray") == shard_files(tmp_path / "calm")
    assert (tmp_path / "ray" / "channels.parquet").read_bytes() == (tmp_path / "calm" / "channels.parquet").read_bytes()


def test_names_that_are_no_shards_are_left_alone(checkpoint: Checkpoint, tmp_path: Path) -> None:
    run(checkpoint, tmp_path / "atlas")
    folder = tmp_path / "atlas.shards"
    (folder / "L000.out.000000-000008.aa.safetensors").write_bytes(b"x")
    (folder / "other.aa.safetensors").write_bytes(b"x")
    shards = job_shards(checkpoint, json.loads((folder / "job.json").read_text()))
    ready = finished_shards(folder, shards)
    assert set(ready) == {shard.name for shard in shards}
    assert (folder / "other.aa.safetensors").exists()
    assert not (folder / "L000.out.000000-000008.aa.safetensors").exists()
