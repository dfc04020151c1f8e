"""rotate_edit: edit what a causal language model knows and says, neuron channel by neuron channel.

The names below are the public ones. Each is imported when it is first used, so that nothing heavy is loaded for a
command that does not need it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rotate_edit.channels.channel_set import Channel, channel_size, load_channels, search_channels
    from rotate_edit.channels.decompose import claim_threshold, decompose_neurons
    from rotate_edit.channels.locators import MatrixView, locator
    from rotate_edit.channels.scan import scan_checkpoint
    from rotate_edit.channels.solver import FoundChannels, SolverSettings, find_channels
    from rotate_edit.edits.apply import applied
    from rotate_edit.edits.directions import Direction, subtract_direction
    from rotate_edit.edits.edit import Clamp, Edit, MatrixChange
    from rotate_edit.edits.edit_file import load_edit, save_edit
    from rotate_edit.edits.material import Concept, Material
    from rotate_edit.edits.methods import EditMethod, Target, edit_method, make_method, method_names, style_of
    from rotate_edit.edits.strength import Goal, cross
    from rotate_edit.edits.writing.adapter import write_adapter
    from rotate_edit.edits.writing.patch import revert, verify, write_checkpoint
    from rotate_edit.errors import BadInput, Failure
    from rotate_edit.evaluation.commands import evaluate_models
    from rotate_edit.evaluation.compare import Plan
    from rotate_edit.evaluation.faithfulness import faithfulness
    from rotate_edit.evaluation.faithfulness import figure as faithfulness_figure
    from rotate_edit.evaluation.faithfulness import table as faithfulness_table
    from rotate_edit.evaluation.generations import repetition
    from rotate_edit.evaluation.matched import Proof, kept_ratio, perplexity_rise
    from rotate_edit.evaluation.matched import describe as count_vectors
    from rotate_edit.evaluation.matched import prepare as prepare_proof
    from rotate_edit.evaluation.matched import texts_of as proof_texts
    from rotate_edit.evaluation.matched import trace as trace_removal
    from rotate_edit.evaluation.matching import document_weights, log_damage_at, pooled_ratio
    from rotate_edit.evaluation.measures import (
        Reference,
        collateral_kl,
        curve_point,
        last_position,
        log_likelihood_by_text,
        mass_by_text,
    )
    from rotate_edit.evaluation.metrics import MeasuredModel, Metric, all_metrics, metric
    from rotate_edit.evaluation.relearn import Training, relearn
    from rotate_edit.evaluation.statistics import Measure, paired_log_ratio
    from rotate_edit.evaluation.strength import solve_strength
    from rotate_edit.evaluation.tasks import Items, open_items
    from rotate_edit.evaluation.text_tasks import passages as split_passages
    from rotate_edit.evaluation.text_tasks import read_documents, sentences_together
    from rotate_edit.evaluation.variants import Variant
    from rotate_edit.models.architectures import Architecture, Neuron, Place, add_architecture, gated, ungated
    from rotate_edit.models.batches import Passages, tokenise
    from rotate_edit.models.checkpoint import (
        Checkpoint,
        load_model,
        load_tokenizer,
        open_checkpoint,
        read_matrix,
        read_unembedding,
    )
    from rotate_edit.models.checkpoint import identity as checkpoint_identity
    from rotate_edit.models.demo.world import concepts as demo_concepts
    from rotate_edit.models.generation import generate
    from rotate_edit.models.gguf import import_gguf
    from rotate_edit.models.hooks import record
    from rotate_edit.pipeline import edit_only, run
    from rotate_edit.recipe import Recipe, parse_recipe, read_recipe
    from rotate_edit.reporting.drawing import LIGHT as LIGHT_COLOURS
    from rotate_edit.reporting.report import write_report
    from rotate_edit.search.tune import search as tune
    from rotate_edit.session import Session
    from rotate_edit.session import open_session as open
    from rotate_edit.vocabulary.concept import find_tokens, token_texts
    from rotate_edit.vocabulary.projection import VocabularyRules, read_projections, read_vocabulary
    from rotate_edit.vocabulary.tokens import token_weights

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
    "FoundChannels": "channels.solver",
    "Goal": "edits.strength",
    "Items": "evaluation.tasks",
    "LIGHT_COLOURS": "reporting.drawing",
    "Material": "edits.material",
    "MatrixChange": "edits.edit",
    "MatrixView": "channels.locators",
    "Measure": "evaluation.statistics",
    "MeasuredModel": "evaluation.metrics",
    "Metric": "evaluation.metrics",
    "Neuron": "models.architectures",
    "Passages": "models.batches",
    "Place": "models.architectures",
    "Plan": "evaluation.compare",
    "Proof": "evaluation.matched",
    "Recipe": "recipe",
    "Reference": "evaluation.measures",
    "Session": "session",
    "SolverSettings": "channels.solver",
    "Target": "edits.methods",
    "Training": "evaluation.relearn",
    "Variant": "evaluation.variants",
    "VocabularyRules": "vocabulary.projection",
    "add_architecture": "models.architectures",
    "all_metrics": "evaluation.metrics",
    "applied": "edits.apply",
    "channel_size": "channels.channel_set",
    "checkpoint_identity": "models.checkpoint",
    "claim_threshold": "channels.decompose",
    "collateral_kl": "evaluation.measures",
    "count_vectors": "evaluation.matched",
    "cross": "edits.strength",
    "curve_point": "evaluation.measures",
    "decompose_neurons": "channels.decompose",
    "demo_concepts": "models.demo.world",
    "document_weights": "evaluation.matching",
    "edit_method": "edits.methods",
    "edit_only": "pipeline",
    "evaluate_models": "evaluation.commands",
    "faithfulness": "evaluation.faithfulness",
    "faithfulness_figure": "evaluation.faithfulness",
    "faithfulness_table": "evaluation.faithfulness",
    "find_channels": "channels.solver",
    "find_tokens": "vocabulary.concept",
    "gated": "models.architectures",
    "generate": "models.generation",
    "import_gguf": "models.gguf",
    "kept_ratio": "evaluation.matched",
    "last_position": "evaluation.measures",
    "load_channels": "channels.channel_set",
    "load_edit": "edits.edit_file",
    "load_model": "models.checkpoint",
    "load_tokenizer": "models.checkpoint",
    "locator": "channels.locators",
    "log_damage_at": "evaluation.matching",
    "log_likelihood_by_text": "evaluation.measures",
    "make_method": "edits.methods",
    "mass_by_text": "evaluation.measures",
    "method_names": "edits.methods",
    "metric": "evaluation.metrics",
    "open": "session",
    "open_checkpoint": "models.checkpoint",
    "open_items": "evaluation.tasks",
    "paired_log_ratio": "evaluation.statistics",
    "parse_recipe": "recipe",
    "perplexity_rise": "evaluation.matched",
    "pooled_ratio": "evaluation.matching",
    "prepare_proof": "evaluation.matched",
    "proof_texts": "evaluation.matched",
    "read_documents": "evaluation.text_tasks",
    "read_matrix": "models.checkpoint",
    "read_projections": "vocabulary.projection",
    "read_recipe": "recipe",
    "read_unembedding": "models.checkpoint",
    "read_vocabulary": "vocabulary.projection",
    "record": "models.hooks",
    "relearn": "evaluation.relearn",
    "repetition": "evaluation.generations",
    "revert": "edits.writing.patch",
    "run": "pipeline",
    "save_edit": "edits.edit_file",
    "scan_checkpoint": "channels.scan",
    "search_channels": "channels.channel_set",
    "sentences_together": "evaluation.text_tasks",
    "solve_strength": "evaluation.strength",
    "split_passages": "evaluation.text_tasks",
    "style_of": "edits.methods",
    "subtract_direction": "edits.directions",
    "token_texts": "vocabulary.concept",
    "token_weights": "vocabulary.tokens",
    "tokenise": "models.batches",
    "trace_removal": "evaluation.matched",
    "tune": "search.tune",
    "ungated": "models.architectures",
    "verify": "edits.writing.patch",
    "write_adapter": "edits.writing.adapter",
    "write_checkpoint": "edits.writing.patch",
    "write_report": "reporting.report",
}
# Public names that their module knows under another one.
_INSIDE = {
    "LIGHT_COLOURS": "LIGHT",
    "checkpoint_identity": "identity",
    "count_vectors": "describe",
    "demo_concepts": "concepts",
    "faithfulness_figure": "figure",
    "faithfulness_table": "table",
    "open": "open_session",
    "prepare_proof": "prepare",
    "proof_texts": "texts_of",
    "split_passages": "passages",
    "trace_removal": "trace",
    "tune": "search",
}

__all__ = sorted(_MODULES)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'rotate_edit' has no attribute {name!r}")
    return getattr(import_module(f"rotate_edit.{_MODULES[name]}"), _INSIDE.get(name, name))


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
