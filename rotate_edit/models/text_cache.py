"""What a model wrote, kept between runs: writing it takes longer than most of the work that then reads it."""

import hashlib
import importlib.metadata
import json
import logging
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch

from rotate_edit.files import cache_folder, write_atomically
from rotate_edit.models.fingerprint import model_hash

Written = TypeVar("Written")


def kept_text(
    kind: str,
    model: Any,
    parts: Mapping[str, Any],
    write: Callable[[], Written],
    is_sound: Callable[[Any], bool],
) -> Written:
    """Return what a model wrote, from the cache folder if it is there.

    The cache is used when the same weights wrote under the same settings. Device, number of threads and versions must
    be the same as well.

    Args:
        kind: What the files' names begin with.
        model: A loaded transformers model.
        parts: Everything else that the text depends on, as plain data.
        write: Writes it, as plain data.
        is_sound: Tells whether content of the cache can be used. A damaged file is written again.

    Returns:
        What was written, now or before.
    """
    every = {
        **parts,
        "weights": model_hash(model),
        "device": next(model.parameters()).device.type,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": importlib.metadata.version("transformers"),
    }
    key = hashlib.sha256(json.dumps(every, sort_keys=True).encode()).hexdigest()
    file = cache_folder() / f"{kind}-{key}.json"
    try:
        known: Written = json.loads(file.read_text(encoding="utf-8"))
        if is_sound(known):
            return known
    except (OSError, ValueError, RecursionError):
        pass  # nothing is kept, or the file is damaged
    written = write()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, json.dumps(written))
    except OSError:
        logging.getLogger(__name__).warning("the text that the model wrote cannot be kept in the cache")
    return written
