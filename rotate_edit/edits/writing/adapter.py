"""An edit as a LoRA adapter for PEFT: the same change, added to the base model when it is loaded."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rotate_edit.edits.edit import Edit
from rotate_edit.edits.edit_file import refuse_clamps
from rotate_edit.edits.totals import distinct_directions
from rotate_edit.edits.writing.patch import check_base
from rotate_edit.edits.writing.rewrite import Touched, plan_edit
from rotate_edit.errors import BadInput
from rotate_edit.files import check_free_space, check_output_outside, whole_folder
from rotate_edit.models.architectures import locate
from rotate_edit.models.checkpoint import Checkpoint, read_rows

PREFIX = "base_model.model."


@dataclass(frozen=True)
class LoraFactors:
    """The change of one live parameter as PEFT keeps it: `weight += b @ a`.

    Stacked experts have one pair of factors per expert.

    Attributes:
        target: Name of the live module, or of the parameter when `kind` is "stacked".
        kind: "linear", "conv1d", "embedding" or "stacked".
        a: float64 [r, in] or [experts, r, in].
        b: float64 [out, r] or [experts, out, r].
    """

    target: str
    kind: str
    a: Tensor
    b: Tensor

    @property
    def rank(self) -> int:
        """How many directions it has."""
        return self.a.shape[-2]


@dataclass(frozen=True)
class TokenRows:
    """Rows of a tied table as PEFT keeps them: `weight[ids] = values`, in the embedding and in the head.

    Attributes:
        target: Name of the live embedding module.
        ids: int64 [n], ascending.
        values: float64 [n, d_model], the whole rows with the edit in them.
    """

    target: str
    ids: Tensor
    values: Tensor


@dataclass(frozen=True)
class Adapter:
    """What was written.

    Attributes:
        ranks: The rank of each target, by the target's name.
        rows: How many rows of a tied table it replaces.
        dtype: dtype of the factors, float32 or float64.
        warnings: Warnings, one sentence each.
    """

    ranks: dict[str, int]
    rows: int
    dtype: torch.dtype
    warnings: tuple[str, ...]


def write_adapter(
    checkpoint: Checkpoint,
    edit: Edit,
    output: Path,
    *,
    uniform_rank: bool = False,
    dtype: torch.dtype | None = None,
    force_base: bool = False,
    overwrite: bool = False,
) -> Adapter:
    """Write the edit as a LoRA adapter, a new folder that `PeftModel.from_pretrained` loads.

    Every target has as many ranks as it has distinct directions. Its alpha equals its rank, so that the scaling is 1.

    Rows of a table that is embedding and head in one are written whole, as PEFT's `trainable_token_indices`. PEFT ties
    these two in every dtype. Factors of a tied table it ties in float32 alone (0.21): when it casts the embedding's
    factors up from a smaller dtype, the head keeps random ones. It also adds them twice when it merges.

    Args:
        checkpoint: The base.
        edit: The edit.
        output: The folder to write.
        uniform_rank: Pad all targets with zeros to the largest rank, as serving engines want it.
        dtype: float32 or float64. By default float32 where the factors are exact in it, else float64. They are exact at
            strengths 1, 2, 4 and so on. Rows of a tied table are judged by themselves.
        force_base: Write it for a checkpoint whose hashes are not those of the edit's base.
        overwrite: Replace an output that exists.

    Returns:
        What was written.

    Raises:
        BadInput: When the base differs or the edit does not fit the checkpoint. When PEFT cannot express the edit: a
            bias, a dense layer of a mixture-of-experts model, or activations that are held. When the output exists
            (without `overwrite`), or there is too little space for it.
        Failure: When the disk is full or fails.
    """
    refuse_clamps(edit)
    from safetensors.torch import save

    warnings = check_base(edit, checkpoint, force_base)
    check_output_outside(output, checkpoint.folder)
    factors, rows = _with_token_rows(checkpoint, lora_factors(checkpoint, edit))
    if uniform_rank:
        largest = max((part.rank for part in factors), default=0)
        factors = [_padded(part, largest) for part in factors]
    sides = [side for part in factors for side in (part.a, part.b)]
    row_dtype = dtype or _exact_dtype([rows.values] if rows else [])
    dtype = dtype or (_exact_dtype(sides) if sides else row_dtype)
    tensors = {name: side.to(dtype).contiguous() for name, side in _named_tensors(factors)}
    if rows is not None:
        tensors[f"{PREFIX}{rows.target}.token_adapter.trainable_tokens_delta"] = rows.values.to(row_dtype).contiguous()
    check_free_space(output, sum(side.nbytes for side in tensors.values()))
    with whole_folder(output, overwrite=overwrite) as folder:
        (folder / "adapter_model.safetensors").write_bytes(save(tensors, metadata={"format": "pt"}))
        config = json.dumps(_adapter_config(checkpoint, factors, rows), indent=1, sort_keys=True)
        (folder / "adapter_config.json").write_text(config + "\n", encoding="utf-8")
    changed = 0 if rows is None else len(rows.ids)
    return Adapter({part.target: part.rank for part in factors}, changed, dtype, tuple(warnings))


def _exact_dtype(sides: Iterable[Tensor]) -> torch.dtype:
    """float32 where it holds all of these float64 numbers exactly, else float64."""
    exact = all(torch.equal(side.float().double(), side) for side in sides)
    return torch.float32 if exact else torch.float64


def _with_token_rows(checkpoint: Checkpoint, factors: list[LoraFactors]) -> tuple[list[LoraFactors], TokenRows | None]:
    """The factors without those of a tied table, and that table's changed rows in their place."""
    tables = [part for part in factors if part.kind == "embedding"] if checkpoint.tied else []
    if not tables:
        return factors, None
    (table,) = tables
    shapes = live_shapes(checkpoint)
    head = locate(checkpoint.architecture, shapes, "unembedding")
    if head is not None and f"{head.name.removesuffix('.weight')}.bias" in shapes:
        raise BadInput(
            f"PEFT leaves out the bias of {head.name.removesuffix('.weight')} when rows of its tied table change; "
            "write a patched checkpoint."
        )
    ids = table.a.abs().sum(0).nonzero().flatten()
    base = read_rows(checkpoint, checkpoint.place("embedding").name, ids).double()
    values = base + (table.b @ table.a[:, ids]).T
    return [part for part in factors if part is not table], TokenRows(table.target, ids, values)


def lora_factors(checkpoint: Checkpoint, edit: Edit) -> list[LoraFactors]:
    """Turn the edit's changes into one pair of factors for each parameter of the live transformers model.

    Args:
        checkpoint: The base.
        edit: The edit.

    Returns:
        The factors, in the order of the edit's changes.

    Raises:
        BadInput: When the edit changes nothing, PEFT cannot express it, or it does not fit the checkpoint.
    """
    if not edit.changes:
        raise BadInput("the edit changes nothing, so there is no adapter to write.")
    shapes = live_shapes(checkpoint)
    parts: dict[str, list[Touched]] = {}
    for name, touched in plan_edit(checkpoint, edit).items():
        for entry in touched:
            total = entry.total
            if total is None or total.matrix == "out_bias":
                raise BadInput(f"PEFT cannot express a change of {name}, which is a bias; write a patched checkpoint.")
            place = locate(checkpoint.architecture, shapes, total.matrix, total.layer, total.expert)
            if place is None:
                raise BadInput(f"the loaded {checkpoint.architecture.family} model has no parameter for {name}.")
            if checkpoint.experts is not None and total.matrix in ("gate", "in", "out") and total.expert is None:
                raise BadInput(
                    f"PEFT takes {name} for an expert, so it cannot express a change of a dense layer in a "
                    "mixture-of-experts model; write a patched checkpoint."
                )
            live = Touched(place.name, place, total.expert, total.rows, entry.new_values, total)
            if not any(other.total is total for other in parts.setdefault(place.name, [])):
                parts[place.name].append(live)
    return [_factors(name, shapes[name], touched) for name, touched in parts.items()]


def live_shapes(checkpoint: Checkpoint) -> dict[str, tuple[int, ...]]:
    """Find the names and shapes of the parameters that transformers gives this model.

    No weight is loaded. A tied head is listed beside the embedding, under its own name.

    Args:
        checkpoint: The checkpoint.

    Returns:
        The shapes by parameter name.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(checkpoint.folder, trust_remote_code=False, local_files_only=True)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters(remove_duplicate=False)}


def _factors(name: str, shape: tuple[int, ...], touched: list[Touched]) -> LoraFactors:
    first = touched[0].place
    writes = touched[0].total is not None and touched[0].total.matrix == "out"
    if first.stacked:
        experts = [_pair(shape, [part for part in touched if part.expert == e], writes) for e in range(shape[0])]
        rank = max(a.shape[0] for a, _ in experts)
        a = torch.stack([torch.nn.functional.pad(a, (0, 0, 0, rank - len(a))) for a, _ in experts])
        b = torch.stack([torch.nn.functional.pad(b, (0, rank - b.shape[1])) for _, b in experts])
        return LoraFactors(name, "stacked", a, b)
    a, b = _pair(shape, touched, writes)
    module = name.removesuffix(".weight")
    if touched[0].total is not None and touched[0].total.matrix == "embedding":
        return LoraFactors(module, "embedding", b.T, a.T)
    transposed = (first.neurons == "rows") == writes
    return LoraFactors(module, "conv1d" if transposed else "linear", a, b)


def _pair(shape: tuple[int, ...], touched: Iterable[Touched], writes: bool) -> tuple[Tensor, Tensor]:
    """Compute a [r, in] and b [out, r] of one matrix.

    What reads is changed in rows of b, what writes in columns of a.
    """
    rows, lefts, rights = [], [], []
    neurons = 0
    for part in touched:
        place, total = part.place, part.total
        neurons = shape[-2] if place.neurons == "rows" else shape[-1]
        if total is not None:
            rows.append(total.rows + place.part * (neurons // place.parts))
            lefts.append(total.left)
            rights.append(total.right)
    if not rows:
        other = (shape[-1], shape[-2])
        return torch.zeros(0, other[0], dtype=torch.float64), torch.zeros(other[1], 0, dtype=torch.float64)
    left, right = distinct_directions(lefts, rights)
    spread = torch.zeros(neurons, len(right), dtype=torch.float64)
    spread.index_add_(0, torch.cat(rows), left)
    return (spread.T, right.T) if writes else (right, spread)


def _padded(part: LoraFactors, rank: int) -> LoraFactors:
    missing = rank - part.rank
    pad = torch.nn.functional.pad
    return LoraFactors(part.target, part.kind, pad(part.a, (0, 0, 0, missing)), pad(part.b, (0, missing)))


def _named_tensors(factors: list[LoraFactors]) -> Iterable[tuple[str, Tensor]]:
    parameters = {part.target for part in factors if part.kind == "stacked"}
    for part in factors:
        if part.kind == "embedding":
            yield f"{PREFIX}{part.target}.lora_embedding_A", part.a
            yield f"{PREFIX}{part.target}.lora_embedding_B", part.b
            continue
        module, a, b = part.target, part.a, part.b
        if part.kind == "stacked":
            module, _, parameter = part.target.rpartition(".")
            # PEFT wraps the parameters of one module one inside the other, the first of them innermost.
            if parameter == "gate_up_proj" and f"{module}.down_proj" in parameters:
                module += ".base_layer"
            a, b = a.flatten(0, 1), b.permute(1, 2, 0).flatten(1, 2)
        yield f"{PREFIX}{module}.lora_A.weight", a
        yield f"{PREFIX}{module}.lora_B.weight", b


def _adapter_config(checkpoint: Checkpoint, factors: list[LoraFactors], rows: TokenRows | None) -> dict[str, Any]:
    from peft import LoraConfig
    from peft.utils.constants import DUMMY_TARGET_MODULES

    ranks = {part.target: part.rank for part in factors}
    common = max(set(ranks.values()), key=list(ranks.values()).count, default=1)
    pattern = {target: rank for target, rank in ranks.items() if rank != common}
    modules = [part.target for part in factors if part.kind != "stacked"]
    config = LoraConfig(
        base_model_name_or_path=checkpoint.source if checkpoint.hub else None,
        revision=checkpoint.revision,
        task_type="CAUSAL_LM",
        inference_mode=True,
        r=common,
        lora_alpha=common,
        rank_pattern=pattern,
        alpha_pattern=dict(pattern),
        # PEFT takes no empty list; under this name it targets nothing.
        target_modules=modules if factors else DUMMY_TARGET_MODULES,
        target_parameters=[part.target for part in factors if part.kind == "stacked"] or None,
        fan_in_fan_out=any(part.kind == "conv1d" for part in factors),
        trainable_token_indices={rows.target: rows.ids.tolist()} if rows is not None else None,
    ).to_dict()
    return {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
