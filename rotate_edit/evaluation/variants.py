"""Edited models of one base.

Edits and adapters are switched on in the base's loaded weights. Whole checkpoints are loaded in turn.
"""

import json
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rotate_edit.edits.apply import applied
from rotate_edit.edits.edit import Edit
from rotate_edit.errors import BadInput


@dataclass(frozen=True)
class Variant:
    """One edited model: an edit, a LoRA adapter or a checkpoint.

    Attributes:
        name: Name of the model.
        edit: The edit, or None.
        strength: Strength of the edit. None takes the edit's own strength.
        adapter: Folder of the LoRA adapter, or None.
        checkpoint: Folder of the checkpoint, or None.
    """

    name: str
    edit: Edit | None = None
    strength: float | None = None
    adapter: Path | None = None
    checkpoint: Path | None = None


def read_variants(folders: list[Path]) -> list[Variant]:
    """Read what each folder holds: a run folder (its edit), an edit, an adapter or a checkpoint.

    A variant's name is that of its folder. Where two would be the same, the parent's name stands before it.

    Args:
        folders: The folders.

    Returns:
        One variant per folder, under different names.

    Raises:
        BadInput: When two variants have the same name, or a folder holds none of these.
    """
    plain = [folder.resolve().name for folder in folders]
    names = [
        f"{folder.resolve().parent.name}/{name}" if plain.count(name) > 1 else name
        for folder, name in zip(folders, plain, strict=True)
    ]
    repeated = {name for name in names if names.count(name) > 1}
    if repeated:
        raise BadInput(f"two of the models are called {sorted(repeated)[0]}; give each of them once.")
    return [_read_variant(folder, name) for folder, name in zip(folders, names, strict=True)]


def _read_variant(folder: Path, name: str) -> Variant:
    from rotate_edit.edits.edit_file import load_edit

    if (folder / "edit.json").is_file():
        return Variant(name, edit=load_edit(folder))
    if (folder / "edit" / "edit.json").is_file():
        return Variant(name, edit=load_edit(folder / "edit"))
    if (folder / "adapter_config.json").is_file():
        return Variant(name, adapter=folder)
    if (folder / "config.json").is_file():
        return Variant(name, checkpoint=folder)
    raise BadInput(f"{folder} is no run folder, edit, adapter or checkpoint.")


@contextmanager
def opened(model: Any, variant: Variant) -> Iterator[Any]:
    """Yield the variant as a loaded model. The base is as it was before when the block ends.

    Args:
        model: The loaded base model.
        variant: The variant.

    Yields:
        The loaded model. It is `model` itself for an edit or an adapter.

    Raises:
        BadInput: When the variant does not fit the base.
    """
    if variant.edit is not None:
        edit = variant.edit if variant.strength is None else variant.edit.at(variant.strength)
        with applied(model, edit):
            yield model
    elif variant.adapter is not None:
        with _adapted(model, variant.adapter):
            yield model
    elif variant.checkpoint is not None:
        from rotate_edit.models.checkpoint import load_model

        parameter = next(model.parameters())
        yield load_model(variant.checkpoint, device=parameter.device, dtype=parameter.dtype)
    else:
        raise BadInput(f"the variant {variant.name} has neither an edit nor an adapter nor a checkpoint.")


@contextmanager
def _adapted(model: Any, folder: Path) -> Iterator[None]:
    # PEFT would unpickle an adapter_model.bin when there are no safetensors.
    if not (folder / "adapter_model.safetensors").is_file():
        raise BadInput(f"the adapter {folder.name} has no adapter_model.safetensors; other formats are not opened.")
    _refuse_code(folder)
    from peft import PeftModel

    try:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            wrapped = PeftModel.from_pretrained(model, str(folder), local_files_only=True)
    except (ValueError, RuntimeError, KeyError, TypeError, OSError) as error:
        reason = " ".join(str(error).split())[:300]
        raise BadInput(f"the adapter {folder.name} does not fit the base model: {reason}.") from error
    # Wrapped tables share their weights already, and to tie them once more, as lm-eval does, ends in a KeyError.
    model.tie_weights = _nothing
    try:
        _refuse_untied(model, folder, [str(warning.message) for warning in told])
        yield
    finally:
        del model.tie_weights
        # The base's own modules and weights come back untouched: the adapter was added beside them, never merged.
        wrapped.unload()


def _nothing(*_: Any, **__: Any) -> None:
    pass


def _refuse_untied(model: Any, folder: Path, told: Sequence[str]) -> None:
    # PEFT ties an adapter's factors of a tied table in float32 alone; in a smaller dtype the head's stay random.
    if model.dtype.itemsize < 4 and any("missing adapter keys" in sentence for sentence in told):
        raise BadInput(
            f"the adapter {folder.name} lacks factors that PEFT ties in float32 alone; load the base in float32, or "
            "write the adapter again with rotate-edit apply --adapter."
        )


def _refuse_code(folder: Path) -> None:
    try:
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise BadInput(f"adapter_config.json of {folder.name} is not valid JSON.") from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA" or config.get("auto_mapping"):
        raise BadInput(f"the adapter {folder.name} is not a plain LoRA adapter; no other kind is opened.")
