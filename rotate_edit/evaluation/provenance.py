"""What a result was made with, so that it can be identified and made again.

Nothing here names a person.
"""

import hashlib
import importlib.metadata
import json
import os
import platform
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from rotate_edit import __version__
from rotate_edit.models.checkpoint import Checkpoint, identity

REPORTED_VERSIONS = ("torch", "transformers", "lm_eval", "peft", "safetensors", "datasets", "numpy")


def provenance(checkpoint: Checkpoint, seed: int, device: str) -> dict[str, Any]:
    """Collect versions, the base's identity, seed, device and time.

    Args:
        checkpoint: The base.
        seed: The run's seed.
        device: The device, for instance "cpu".

    Returns:
        Plain JSON values by name. The time is UTC in ISO format.
    """
    return {
        "rotate_edit": __version__,
        "versions": {name: importlib.metadata.version(name) for name in REPORTED_VERSIONS},
        "python": platform.python_version(),
        "base": identity(checkpoint),
        "seed": seed,
        "device": device,
        "threads": torch.get_num_threads(),
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def hardware() -> dict[str, Any]:
    """Describe what a result was computed on, in kinds and sizes.

    There is no name of a machine or a person in it.

    Returns:
        System, machine type, processor, number of cores, and names of the GPU models.
    """
    gpus = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    return {
        "system": platform.system(),
        "machine": platform.machine(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "gpus": gpus,
    }


def _processor() -> str:
    information = Path("/proc/cpuinfo")
    if information.is_file():
        for line in information.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor()


def weights_hash(checkpoint: Checkpoint) -> str | None:
    """Hash all weights of a checkpoint.

    Args:
        checkpoint: The checkpoint.

    Returns:
        SHA-256 as 64 hexadecimal digits. None when the weights are too many to be hashed as a matter of course.
    """
    tensors = identity(checkpoint)["tensors"]
    if set(tensors) != set(checkpoint.stored):
        return None
    return hashlib.sha256(json.dumps(tensors, sort_keys=True).encode()).hexdigest()
