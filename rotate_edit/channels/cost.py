"""The cost of searching channels and of scanning a model: operations, memory, disk and download."""

import math
import os

from rotate_edit.channels.solver import SolverSettings, memory_bound
from rotate_edit.machine import PROCESS_WITH_TOKENIZER, Cost, available_memory
from rotate_edit.models.checkpoint import Checkpoint
from rotate_edit.models.cost import table_memory, to_download

# Number of products of one vector with the vocabulary matrix for one channel. circle: 48 to 57 were measured.
# adamw: two a step.
PRODUCTS = {"circle": 57, "adamw": 12_000}


# Time of a search over the time of its products alone: 2.6 to 4.6 were measured.
SEARCH_OVERHEAD = 3.0


# Share of a vocabulary's tokens that begin a word: 0.57 and 0.69 were measured.
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
    """Estimate the cost of `decompose.decompose` when every neuron has all its channels.

    Args:
        checkpoint: The opened checkpoint.
        settings: The solver's settings.
        matrices: Matrices whose neurons are decomposed: "gate", "in", "out".
        layers: Indices of the layers; None for all.
        words_only: Whether only tokens count that begin a word and are made of letters.
        vectors: Dtype in which vectors are kept, "bfloat16" or "float32"; None keeps none.
        block: Number of neurons in a shard.
        threads: CPU threads of a shard.
        workers: Number of shards that run at once on the CPU; None for as many as fit.
        device: Device of the search.

    Returns:
        The cost. Sizes are in bytes, operations are floating-point operations.
    """
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
    """Estimate the cost of scanning some matrices of every layer.

    Args:
        checkpoint: The opened checkpoint.
        matrices: Number of matrices in each layer.
        top: Number of tokens kept on either side of a vector.

    Returns:
        The cost. Sizes are in bytes, operations are floating-point operations.
    """
    layers = range(checkpoint.layers)
    vectors = matrices * sum(checkpoint.neurons_in(one) * (checkpoint.experts_in(one) or 1) for one in layers)
    return Cost(
        operations=vectors * 2 * checkpoint.vocabulary_size * checkpoint.hidden_size,
        read=checkpoint.size,
        memory=PROCESS_WITH_TOKENIZER + table_memory(checkpoint),
        disk=vectors * (2 * top * TOKEN_BYTES + CHANNEL_BYTES),
    )


def shard_memory(checkpoint: Checkpoint, settings: SolverSettings, block: int) -> int:
    """Bound the memory that one shard needs while it is searched, beside the tables that all shards share.

    Args:
        checkpoint: The opened checkpoint.
        settings: The solver's settings.
        block: Number of neurons in the shard.

    Returns:
        The number of bytes.
    """
    vocabulary = checkpoint.vocabulary_size
    needed = memory_bound(block, vocabulary, checkpoint.hidden_size, settings)
    # The AdamW procedure keeps its projections for the backward pass, about eight of them a row.
    return needed + (32 * settings.rows * vocabulary if settings.solver == "adamw" else 0)


def shard_workers(shards: int, memory: int, threads: int) -> int:
    """Choose how many shards run at once on the CPU: as many as cores and free memory allow.

    Args:
        shards: Number of shards.
        memory: Bytes that one shard needs.
        threads: CPU threads of a shard.

    Returns:
        The number of shards, at least 1.
    """
    return max(1, min(shards, available_memory() // memory, (os.cpu_count() or 1) // threads))


def search_operations(checkpoint: Checkpoint, settings: SolverSettings, channels: float, words_only: bool) -> float:
    """Estimate the operations of a search. Each product of a vector with the vocabulary takes 2 V d of them.

    Args:
        checkpoint: The opened checkpoint.
        settings: The solver's settings.
        channels: Number of channels.
        words_only: Whether only tokens count that begin a word and are made of letters.

    Returns:
        The number of floating-point operations.
    """
    tokens = checkpoint.vocabulary_size * (WORDS_SHARE if words_only else 1)
    return SEARCH_OVERHEAD * channels * PRODUCTS[settings.solver] * 2 * tokens * checkpoint.hidden_size
