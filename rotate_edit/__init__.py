"""rotate_edit: edit what a causal language model knows and says, neuron channel by neuron channel.

The names below are the public ones. Each is imported when it is first used, so that a room that needs little (the
solver, the scan) can be used where the heavy packages are not installed.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_ROOMS = {
    "BadInput": "errors",
    "Failure": "errors",
    "Channel": "channels.channel_set",
    "load_channels": "channels.channel_set",
    "search_channels": "channels.channel_set",
    "Checkpoint": "models.checkpoint",
    "open_checkpoint": "models.checkpoint",
    "load_model": "models.checkpoint",
    "load_tokenizer": "models.checkpoint",
    "SolverSettings": "channels.solver",
    "find_channels": "channels.solver",
    "scan_checkpoint": "channels.scan",
    "Edit": "edits.edit",
    "load_edit": "edits.edit_file",
    "save_edit": "edits.edit_file",
    "write_checkpoint": "edits.writing.patch",
    "write_adapter": "edits.writing.adapter",
    "verify": "edits.writing.patch",
    "applied": "edits.apply",
    "find_tokens": "vocabulary.concept",
    "write_report": "reporting.report",
    "revert": "edits.writing.patch",
    "read_recipe": "recipe",
    "run": "pipeline",
}

__all__ = sorted(_ROOMS)


def __getattr__(name: str) -> Any:
    if name not in _ROOMS:
        raise AttributeError(f"module 'rotate_edit' has no attribute {name!r}")
    return getattr(import_module(f"rotate_edit.{_ROOMS[name]}"), name)
