"""rotate_edit: edit what a causal language model knows and says, neuron channel by neuron channel.

The names below are the public ones. Each is imported when it is first used, so that nothing heavy is loaded for a
command that does not need it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rotate_edit.channels.channel_set import Channel, load_channels, search_channels
    from rotate_edit.channels.locators import MatrixView, locator
    from rotate_edit.channels.scan import scan_checkpoint
    from rotate_edit.channels.solver import SolverSettings, find_channels
    from rotate_edit.edits.apply import applied
    from rotate_edit.edits.directions import Direction, subtract_direction
    from rotate_edit.edits.edit import Clamp, Edit, MatrixChange
    from rotate_edit.edits.edit_file import load_edit, save_edit
    from rotate_edit.edits.material import Concept, Material
    from rotate_edit.edits.methods import EditMethod, Target, edit_method, make_method, method_names
    from rotate_edit.edits.strength import Goal
    from rotate_edit.edits.writing.adapter import write_adapter
    from rotate_edit.edits.writing.patch import revert, verify, write_checkpoint
    from rotate_edit.errors import BadInput, Failure
    from rotate_edit.evaluation.measures import Reference
    from rotate_edit.evaluation.metrics import MeasuredModel, Metric, all_metrics, metric
    from rotate_edit.evaluation.statistics import Measure
    from rotate_edit.models.architectures import Architecture, Place, add_architecture, gated, ungated
    from rotate_edit.models.checkpoint import Checkpoint, load_model, load_tokenizer, open_checkpoint
    from rotate_edit.models.generation import generate
    from rotate_edit.pipeline import run
    from rotate_edit.recipe import Recipe, parse_recipe, read_recipe
    from rotate_edit.reporting.report import write_report
    from rotate_edit.session import Session
    from rotate_edit.session import open_session as open
    from rotate_edit.vocabulary.concept import find_tokens

__version__ = "0.1.0"

_MODULES = {
    "Architecture": "models.architectures",
    "BadInput": "errors",
    "Channel": "channels.channel_set",
    "Checkpoint": "models.checkpoint",
    "Clamp": "edits.edit",
    "Concept": "edits.material",
    "Direction": "edits.directions",
    "Edit": "edits.edit",
    "EditMethod": "edits.methods",
    "Failure": "errors",
    "Goal": "edits.strength",
    "Material": "edits.material",
    "MatrixChange": "edits.edit",
    "MatrixView": "channels.locators",
    "Measure": "evaluation.statistics",
    "MeasuredModel": "evaluation.metrics",
    "Metric": "evaluation.metrics",
    "Place": "models.architectures",
    "Recipe": "recipe",
    "Reference": "evaluation.measures",
    "Session": "session",
    "SolverSettings": "channels.solver",
    "Target": "edits.methods",
    "add_architecture": "models.architectures",
    "all_metrics": "evaluation.metrics",
    "applied": "edits.apply",
    "edit_method": "edits.methods",
    "find_channels": "channels.solver",
    "find_tokens": "vocabulary.concept",
    "gated": "models.architectures",
    "generate": "models.generation",
    "load_channels": "channels.channel_set",
    "load_edit": "edits.edit_file",
    "load_model": "models.checkpoint",
    "load_tokenizer": "models.checkpoint",
    "locator": "channels.locators",
    "make_method": "edits.methods",
    "method_names": "edits.methods",
    "metric": "evaluation.metrics",
    "open": "session",
    "open_checkpoint": "models.checkpoint",
    "parse_recipe": "recipe",
    "read_recipe": "recipe",
    "revert": "edits.writing.patch",
    "run": "pipeline",
    "save_edit": "edits.edit_file",
    "scan_checkpoint": "channels.scan",
    "search_channels": "channels.channel_set",
    "subtract_direction": "edits.directions",
    "ungated": "models.architectures",
    "verify": "edits.writing.patch",
    "write_adapter": "edits.writing.adapter",
    "write_checkpoint": "edits.writing.patch",
    "write_report": "reporting.report",
}
# Public names that their module knows under another one.
_INSIDE = {"open": "open_session"}

__all__ = sorted(_MODULES)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'rotate_edit' has no attribute {name!r}")
    return getattr(import_module(f"rotate_edit.{_MODULES[name]}"), _INSIDE.get(name, name))


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
