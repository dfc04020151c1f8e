"""The cost of reading and loading a model: time, memory, disk and download."""

from dataclasses import dataclass

from rotate_edit.machine import PROCESS_WITH_TRANSFORMERS, START_WITH_TRANSFORMERS, Cost
from rotate_edit.models import hub
from rotate_edit.models.checkpoint import Checkpoint

# Number of vocabulary tables in memory while they are read and prepared. 1.6 (tied) and 4.5 (untied) were measured.
# Removing the token-frequency direction takes two more.
TABLES, TABLES_UNTIED = 4, 6
# Of models with more parameters less is measured, since it takes long.
SMALL_MODEL = 20_000_000


@dataclass(frozen=True)
class ModelSize:
    """The sizes of a model that a cost is counted from.

    Attributes:
        layers: How many layers it has.
        neurons: How many neurons a layer has.
        hidden_size: The width of the residual stream, d_model.
        vocabulary_size: How many tokens there are.
        parameters: How many numbers its tensors hold.
    """

    layers: int
    neurons: int
    hidden_size: int
    vocabulary_size: int
    parameters: int


def size_of(checkpoint: Checkpoint) -> ModelSize:
    """Read the sizes of a checkpoint.

    Args:
        checkpoint: The opened checkpoint.

    Returns:
        Its sizes.
    """
    return ModelSize(
        checkpoint.layers,
        checkpoint.neurons,
        checkpoint.hidden_size,
        checkpoint.vocabulary_size,
        parameters(checkpoint),
    )


def estimate_live(checkpoint: Checkpoint, itemsize: int = 4, *, gpu: bool = False) -> Cost:
    """Estimate the cost of loading a model.

    Args:
        checkpoint: The opened checkpoint.
        itemsize: Bytes of one parameter.
        gpu: Whether the model is loaded onto a GPU.

    Returns:
        The cost. Sizes are in bytes.
    """
    model = parameters(checkpoint) * itemsize
    # A tenth more for activations and for the tensors on their way from the file.
    held = model + model // 10
    return Cost(
        start=START_WITH_TRANSFORMERS,
        read=checkpoint.size,
        memory=PROCESS_WITH_TRANSFORMERS + (checkpoint.size if gpu else held),
        gpu_memory=held if gpu else 0,
        download=to_download(checkpoint),
    )


def table_memory(checkpoint: Checkpoint) -> int:
    """Estimate the memory of the vocabulary's tables while they are read and prepared.

    Args:
        checkpoint: The opened checkpoint.

    Returns:
        The number of bytes.
    """
    copies = TABLES if checkpoint.tied else TABLES_UNTIED
    return copies * checkpoint.vocabulary_size * checkpoint.hidden_size * 4


def to_download(checkpoint: Checkpoint) -> int:
    """Count the bytes of its shards that the Hub's cache does not hold yet.

    Args:
        checkpoint: The opened checkpoint.

    Returns:
        The number of bytes; 0 for a folder.
    """
    found = checkpoint.hub
    if found is None:
        return 0
    return sum(found.files[shard].size or 0 for shard in checkpoint.headers if not hub.is_here(found, shard))


def parameters(checkpoint: Checkpoint) -> int:
    """Count the numbers that its tensors hold.

    Args:
        checkpoint: The opened checkpoint.

    Returns:
        The number of parameters.
    """
    return sum(stored.elements for stored in checkpoint.stored.values())
