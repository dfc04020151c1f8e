"""What a result was made with, so that it can be told from another and made again; nothing here names a person."""

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
from rotate_edit.machine import held_memory
from rotate_edit.models.checkpoint import Checkpoint, identity

REPORTED_VERSIONS = ("torch", "transformers", "lm_eval", "peft", "safetensors", "datasets", "numpy")


def provenance(checkpoint: Checkpoint, seed: int, device: str) -> dict[str, Any]:
    """Versions, the base's identity, seed, device and time, as plain JSON."""
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
    """What a result was computed on, in kinds and sizes; no name of a machine or a person."""
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
    """One hash of all weights, or None when they are too many to be hashed as a matter of course."""
    tensors = identity(checkpoint)["tensors"]
    if set(tensors) != set(checkpoint.stored):
        return None
    return hashlib.sha256(json.dumps(tensors, sort_keys=True).encode()).hexdigest()


def peak_memory() -> float:
    """The largest memory this process has used, in megabytes."""
    return held_memory() / 1024**2
