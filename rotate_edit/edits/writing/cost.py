"""What writing a patched checkpoint takes."""

from rotate_edit.edits.edit import Edit
from rotate_edit.edits.writing.rewrite import BLOCK_ELEMENTS, plan_edit
from rotate_edit.machine import PROCESS, Cost
from rotate_edit.models.checkpoint import Checkpoint
from rotate_edit.models.cost import to_download


def estimate_patch(checkpoint: Checkpoint, edit: Edit | None = None, *, link: bool = False) -> Cost:
    """Estimate what writing a patched checkpoint takes.

    Args:
        checkpoint: The base.
        edit: The edit. Without one, all shards are taken to be touched, and no undo file is counted.
        link: Untouched shards become hard links and are not written.

    Returns:
        The cost: bytes read, bytes of memory, new bytes on the disk and bytes to download.

    Raises:
        BadInput: When the edit does not fit the checkpoint.
    """
    sizes = dict.fromkeys(checkpoint.headers, 0)
    for stored in checkpoint.stored.values():
        sizes[stored.file] += stored.end - stored.start
    written, undo, memory = set(sizes), 0, 0
    if edit is not None:
        touched = plan_edit(checkpoint, edit)
        for name, parts in touched.items():
            stored = checkpoint.stored[name]
            for part in parts:
                undo += len(part.rows) * (checkpoint.hidden_size * stored.itemsize + 8)
            # To keep the originals for the undo, one tensor is read whole where neurons are its columns.
            memory = max(memory, stored.end - stored.start)
        if link:
            written = {checkpoint.stored[name].file for name in touched}
    disk = sum(sizes[shard] for shard in written) + undo
    # A block is held in its own dtype, twice, and in float64, three times.
    return Cost(
        read=disk, memory=PROCESS + memory + BLOCK_ELEMENTS * (2 * 4 + 3 * 8), disk=disk,
        download=to_download(checkpoint),
    )  # fmt: skip
