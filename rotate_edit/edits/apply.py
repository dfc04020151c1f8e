"""Switch an edit on and off in a live transformers model, without touching a file."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from rotate_edit.edits.edit import Clamp, Edit
from rotate_edit.edits.totals import Total, rounded, total_changes
from rotate_edit.errors import BadInput
from rotate_edit.models.layout import neuron_rows
from rotate_edit.models.parameters import live_parameter


@contextmanager
def applied(model: torch.nn.Module, edit: Edit) -> Iterator[None]:
    """Add an edit to the model's weights inside a `with` block, and take it away again bit for bit.

    Every matrix is computed in float64 and rounded once to its dtype, exactly as a patched checkpoint is written. So
    the live weights equal the written ones. The original rows are put back when the block ends, also by an exception.
    `with applied(model, edit):` uses the edit's own strength. `applied(model, edit.at(2))` takes another one.

    Args:
        model: A loaded transformers model.
        edit: The edit.

    Raises:
        BadInput: The model has no such matrix, or its vectors have another number or length.
    """
    saved: list[tuple[Tensor, Tensor, Tensor]] = []
    handles: list[RemovableHandle] = []
    try:
        handles += [_clamped(model, clamp) for clamp in edit.clamps]
        with torch.no_grad():
            for total in live_totals(model, edit):
                view = _rows_of(model, total)
                rows = total.rows.to(view.device)
                original = view[rows].clone()
                saved.append((view, rows, original))
                view[rows] = _changed(original, total)
        yield
    finally:
        for handle in handles:
            handle.remove()
        with torch.no_grad():
            for view, rows, original in reversed(saved):
                view[rows] = original


def first_changed_layer(model: torch.nn.Module, edit: Edit) -> int:
    """Find the first layer that an edit changes, so that passes over known texts may start there.

    Args:
        model: A loaded transformers model.
        edit: The edit.

    Returns:
        The index of the layer. 0 where the edit changes what enters the first layer. The last layer where it changes
        the head alone, or nothing.
    """
    layers = [model.config.get_text_config().num_hidden_layers - 1]  # type: ignore[operator,union-attr]
    layers += [clamp.layer for clamp in edit.clamps]
    layers += [change.layer for change in edit.changes if change.layer is not None]
    tables = {change.matrix for change in edit.changes if change.layer is None}
    if "unembedding" in tables and live_parameter(model, "unembedding")[0] is live_parameter(model, "embedding")[0]:
        tables.add("embedding")
    return 0 if "embedding" in tables else min(layers)


def _clamped(model: torch.nn.Module, clamp: Clamp) -> RemovableHandle:
    """Hold neurons at fixed activations until the handle is removed."""
    _, place = live_parameter(model, "out", clamp.layer)

    def hold(_module: torch.nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        held = inputs[0].clone()
        held[..., clamp.rows.to(held.device)] = (clamp.strength * clamp.values).to(held.device, held.dtype)
        return (held, *inputs[1:])

    return model.get_submodule(place.name.rsplit(".", 1)[0]).register_forward_pre_hook(hold)


def live_totals(model: torch.nn.Module, edit: Edit) -> list[Total]:
    """Compute the edit's totals for this model.

    When the head is the embedding itself, both are one matrix.

    Args:
        model: A loaded transformers model.
        edit: The edit.

    Returns:
        The totals, one for each matrix that changes.
    """
    changes = edit.changes
    if any(change.matrix == "unembedding" for change in changes):
        head, _ = live_parameter(model, "unembedding")
        embedding, _ = live_parameter(model, "embedding")
        if head is embedding:
            changes = tuple(
                replace(change, matrix="embedding") if change.matrix == "unembedding" else change for change in changes
            )
    return total_changes(changes)


def _rows_of(model: torch.nn.Module, total: Total) -> Tensor:
    parameter, place = live_parameter(model, total.matrix, total.layer, total.expert)
    view = neuron_rows(parameter.data, place, total.expert)
    if view.shape[1] != total.right.shape[1] or (len(total.rows) and int(total.rows[-1]) >= len(view)):
        raise BadInput(
            f"the edit changes row {int(total.rows[-1])} of vectors of length {total.right.shape[1]}, but "
            f"{place.name} has {len(view)} vectors of length {view.shape[1]}; it was made for another model."
        )
    return view


def _changed(original: Tensor, total: Total) -> Tensor:
    # MPS has no float64, so there the sum is taken on the CPU.
    device = torch.device("cpu") if original.device.type == "mps" else original.device
    delta = total.left.to(device) @ total.right.to(device)
    return rounded(original.to(device).double() + delta, original.dtype).to(original.device)
