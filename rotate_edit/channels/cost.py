"""What searching channels and scanning a model take."""

import math
import os

from rotate_edit.channels.solver import SolverSettings, memory_bound
from rotate_edit.machine import PROCESS_WITH_TOKENIZER, Cost, available_memory
from rotate_edit.models.checkpoint import Checkpoint
from rotate_edit.models.cost import table_memory, to_download

# Products of one vector with the vocabulary matrix for one channel (circle: 48 to 57 measured; adamw: two a step).
PRODUCTS = {"circle": 57, "adamw": 12_000}


# Seconds of a search over the seconds of its products alone: 2.6 to 4.6 measured.
SEARCH_OVERHEAD = 3.0


# The share of a vocabulary that are beginnings of words: 0.57 and 0.69 measured.
WORDS_SHARE = 0.65


# Bytes of a channel in a shard beside its vector, and again in the table.
CHANNEL_BYTES = 250


# Bytes of one strong token in a scan's table: its id, z-score and text.
TOKEN_BYTES = 20


def decompose_cost(
    checkpoint: Checkpoint,
    settings: SolverSettings,
    *,
    matrices: tuple[str, ...],
    layers: tuple[int, ...] | None = None,
    words_only: bool = True,
    vectors: str | None = "bfloat16",
    block: int = 512,
    threads: int = 1,
    workers: int | None = None,
    device: str = "cpu",
) -> Cost:
    """What `decompose.decompose` takes with these settings, when every neuron has all its channels."""
    chosen = range(checkpoint.layers) if layers is None else [one for one in layers if 0 <= one < checkpoint.layers]
    neurons = len(matrices) * sum(checkpoint.neurons_in(one) * (checkpoint.experts_in(one) or 1) for one in chosen)
    shards = math.ceil(neurons / block)
    one = shard_memory(checkpoint, settings, block)
    tables = table_memory(checkpoint)
    on_gpu = device != "cpu"
    running = 1 if on_gpu else (workers or shard_workers(shards, one, threads))
    width = {"bfloat16": 2, "float32": 4}.get(vectors or "", 0) * checkpoint.hidden_size
    channels = neurons * settings.channels
    return Cost(
        operations=search_operations(checkpoint, settings, channels, words_only),
        read=checkpoint.size,
        memory=PROCESS_WITH_TOKENIZER + tables + (0 if on_gpu else running * one),
        gpu_memory=tables + one if on_gpu else 0,
        # The shards stay until the channel set that is made of them is complete.
        disk=channels * (2 * width + CHANNEL_BYTES),
        download=to_download(checkpoint),
    )


def scan_cost(checkpoint: Checkpoint, matrices: int, top: int) -> Cost:
    """What a scan of so many matrices of every layer takes, with `top` tokens kept on either side of a vector."""
    layers = range(checkpoint.layers)
    vectors = matrices * sum(checkpoint.neurons_in(one) * (checkpoint.experts_in(one) or 1) for one in layers)
    return Cost(
        operations=vectors * 2 * checkpoint.vocabulary_size * checkpoint.hidden_size,
        read=checkpoint.size,
        memory=PROCESS_WITH_TOKENIZER + table_memory(checkpoint),
        disk=vectors * (2 * top * TOKEN_BYTES + CHANNEL_BYTES),
    )


def shard_memory(checkpoint: Checkpoint, settings: SolverSettings, block: int) -> int:
    """Bytes that one shard needs at most while it is searched, beside the tables that all shards share."""
    vocabulary = checkpoint.vocabulary_size
    needed = memory_bound(block, vocabulary, checkpoint.hidden_size, settings)
    # The AdamW procedure keeps its projections for the backward pass, about eight of them a row.
    return needed + (32 * settings.rows * vocabulary if settings.solver == "adamw" else 0)


def shard_workers(shards: int, memory: int, threads: int) -> int:
    """How many shards run at once on the CPU: as many as cores and free memory allow."""
    return max(1, min(shards, available_memory() // memory, (os.cpu_count() or 1) // threads))


def search_operations(checkpoint: Checkpoint, settings: SolverSettings, channels: float, words_only: bool) -> float:
    """Operations to search so many channels: each product of a vector with the vocabulary is 2 V d."""
    tokens = checkpoint.vocabulary_size * (WORDS_SHARE if words_only else 1)
    return SEARCH_OVERHEAD * channels * PRODUCTS[settings.solver] * 2 * tokens * checkpoint.hidden_size
