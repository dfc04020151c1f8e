"""What reading and loading a model takes."""

from rotate_edit.machine import PROCESS_WITH_TRANSFORMERS, START_WITH_TRANSFORMERS, Cost
from rotate_edit.models import hub
from rotate_edit.models.checkpoint import Checkpoint

# Vocabulary tables in memory while they are read and prepared: 1.6 (tied) and 4.5 measured, two more when levelled.
TABLES, TABLES_UNTIED = 4, 6


def estimate_live(checkpoint: Checkpoint, itemsize: int = 4, *, gpu: bool = False) -> Cost:
    """What loading the live model takes, with `itemsize` bytes a parameter."""
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
    """Bytes of the vocabulary's tables while they are read and prepared."""
    copies = TABLES if checkpoint.tied else TABLES_UNTIED
    return copies * checkpoint.vocabulary_size * checkpoint.hidden_size * 4


def to_download(checkpoint: Checkpoint) -> int:
    """Bytes of its shards that the Hub's cache does not hold yet; 0 for a folder."""
    found = checkpoint.hub
    if found is None:
        return 0
    return sum(found.files[shard].size or 0 for shard in checkpoint.headers if not hub.is_here(found, shard))


def parameters(checkpoint: Checkpoint) -> int:
    """How many numbers its tensors hold."""
    return sum(stored.elements for stored in checkpoint.stored.values())
