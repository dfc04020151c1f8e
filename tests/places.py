"""Where tests find things: the repository, its tests, and the material beside it that may be absent."""

import os
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
SHARED = ROOT.parent / "shared"

REAL_MODELS = Path(os.environ.get("ROTATE_EDIT_MODELS") or Path.home() / ".cache" / "rotate-edit-models")
"""Where the real models lie, each a checkpoint folder under its own name."""


def real_model(name: str) -> Path:
    """The folder of a real model, or a skipped test where it is absent.

    Args:
        name: The folder's name: "smollm2", "gemma3" or "qwen".
    """
    folder = REAL_MODELS / name
    if not (folder / "config.json").is_file():
        pytest.skip(f"no real model {name} in the folder ROTATE_EDIT_MODELS, by default ~/.cache/rotate-edit-models")
    return folder
