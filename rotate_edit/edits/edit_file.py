"""An edit as two files, `edit.json` and `edit.safetensors`: written whole, read back as untrusted input."""

import hashlib
import json
import math
from dataclasses import asdict, fields
from pathlib import Path

import torch
from torch import Tensor

from rotate_edit.edits.edit import MATRICES, Edit, EditedVector, MatrixChange
from rotate_edit.errors import BadInput
from rotate_edit.files import file_inside, read_json, whole_folder
from rotate_edit.models.safetensors_file import LARGEST_DIMENSION, Header, read_header, read_stored

EDIT_JSON = "edit.json"
EDIT_TENSORS = "edit.safetensors"
FORMAT = "rotate-edit edit"
VERSION = 1


def edit_identity(edit: Edit) -> str:
    """Hash an edit.

    Two edits share the hash exactly when they change the same rows by the same amounts.

    Args:
        edit: The edit.

    Returns:
        SHA-256 as 64 hexadecimal digits.
    """
    digest = hashlib.sha256()
    for change in edit.changes:
        head = [change.matrix, change.layer, change.expert, float(change.strength).hex(), list(change.left.shape)]
        digest.update(json.dumps(head).encode())
        for tensor in (change.rows.long(), change.left.float(), change.right.float()):
            digest.update(tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def refuse_clamps(edit: Edit) -> None:
    """Refuse an edit that holds activations at fixed values, which no file of weights can express.

    Args:
        edit: The edit.

    Raises:
        BadInput: When the edit has clamps.
    """
    if edit.clamps:
        raise BadInput(
            f"an edit by {edit.method} works while the model runs and cannot be written; choose another method."
        )


def save_edit(edit: Edit, folder: Path, *, overwrite: bool = False) -> None:
    """Write `edit.json` and `edit.safetensors` into a new folder, which appears whole or not at all.

    Args:
        edit: The edit.
        folder: The folder to write.
        overwrite: Replace a folder that exists.

    Raises:
        BadInput: When the folder exists (unless `overwrite`) or may not be written. When a figure is not a finite
            number, or the edit has clamps.
        Failure: When the disk is full or fails.
    """
    refuse_clamps(edit)
    from safetensors.torch import save

    tensors: dict[str, Tensor] = {}
    changes = []
    for number, change in enumerate(edit.changes):
        # Copies, because changes may share one direction and safetensors refuses tensors that share memory.
        tensors[f"{number}.rows"] = change.rows.long().cpu().clone().contiguous()
        tensors[f"{number}.left"] = change.left.float().cpu().clone().contiguous()
        tensors[f"{number}.right"] = change.right.float().cpu().clone().contiguous()
        changes.append(
            {key: getattr(change, key) for key in ("matrix", "layer", "expert", "concept")}
            | {"strength": float(change.strength), "rows": len(change.rows), "rank": len(change.right)}
            | ({"most": float(change.most)} if change.most < math.inf else {})
        )
    weights = save(tensors, metadata={"format": "pt"})
    content = {
        "format": FORMAT,
        "version": VERSION,
        "identity": edit_identity(edit),
        "method": edit.method,
        "settings": edit.settings,
        "base": edit.base,
        "changes": changes,
        "notes": list(edit.notes),
        "vectors": [asdict(vector) for vector in edit.vectors],
        "sha256": {EDIT_TENSORS: hashlib.sha256(weights).hexdigest()},
    }
    try:
        text = json.dumps(content, indent=1, allow_nan=False, ensure_ascii=False)
    except ValueError as error:
        raise BadInput("the edit has a figure that is not a finite number, so it is not saved.") from error
    with whole_folder(folder, overwrite=overwrite) as temporary:
        (temporary / EDIT_JSON).write_text(text + "\n", encoding="utf-8")
        (temporary / EDIT_TENSORS).write_bytes(weights)


def load_edit(folder: Path) -> Edit:
    """Read an edit folder back.

    Args:
        folder: The edit's folder.

    Returns:
        The edit.

    Raises:
        BadInput: For anything that is not a consistent edit.
    """
    if not folder.is_dir():
        raise BadInput(f'the edit folder "{folder}" does not exist.')
    content = read_json(folder, EDIT_JSON, strict=True)
    if content.get("format") != FORMAT or content.get("version") != VERSION:
        raise BadInput(f"{EDIT_JSON} is not an edit of version {VERSION}, the only one that can be read.")
    path = file_inside(folder, EDIT_TENSORS)
    header = read_header(path, EDIT_TENSORS)
    hashes = content.get("sha256")
    if not isinstance(hashes, dict) or hashes.get(EDIT_TENSORS) != hashlib.sha256(path.read_bytes()).hexdigest():
        raise BadInput(f"{EDIT_TENSORS} is not the file that {EDIT_JSON} was written with: its SHA-256 differs.")
    changes, vectors = content.get("changes"), content.get("vectors")
    method, base, settings = content.get("method"), content.get("base"), content.get("settings")
    if not (isinstance(changes, list) and isinstance(vectors, list) and isinstance(method, str)):
        raise BadInput(f"{EDIT_JSON} lacks its list of changes, its list of vectors or its method.")
    notes = content.get("notes", [])
    if not (isinstance(notes, list) and all(isinstance(note, str) for note in notes)):
        raise BadInput(f"{EDIT_JSON} has notes that are not sentences.")
    if not (isinstance(base, dict) and isinstance(settings, dict)):
        raise BadInput(f"{EDIT_JSON} lacks the identity of its base model or its settings.")
    if len(header.tensors) != 3 * len(changes):
        raise BadInput(f"{EDIT_TENSORS} does not hold three tensors for each change that {EDIT_JSON} lists.")
    edit = Edit(
        method,
        tuple(_change(number, entry, header, path) for number, entry in enumerate(changes)),
        tuple(_vector(entry) for entry in vectors),
        base,
        settings,
        notes=tuple(notes),
    )
    if content.get("identity") != edit_identity(edit):
        raise BadInput(f"{EDIT_JSON} was changed after it was written: the edit's identity differs.")
    return edit


def _is_finite(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _change(number: int, entry: object, header: Header, path: Path) -> MatrixChange:
    wrong = BadInput(f"change {number} of {EDIT_JSON} is not a possible change of a matrix.")
    if not isinstance(entry, dict) or entry.get("matrix") not in MATRICES or not isinstance(entry.get("concept"), str):
        raise wrong
    layer, expert = entry.get("layer"), entry.get("expert")
    if not _is_finite(entry.get("strength")):
        raise BadInput(f"change {number} of {EDIT_JSON} has a strength that is not a finite number.")
    if "most" in entry and not _is_finite(entry["most"]):
        raise wrong
    for position in (layer, expert):
        if position is not None and not (type(position) is int and 0 <= position <= LARGEST_DIMENSION):
            raise wrong
    if (layer is None) != (entry["matrix"] in ("embedding", "unembedding")):
        raise wrong
    tensors = []
    for name, dtype in (("rows", "I64"), ("left", "F32"), ("right", "F32")):
        stored = header.tensors.get(f"{number}.{name}")
        if stored is None or stored.dtype != dtype or len(stored.shape) != (1 if name == "rows" else 2):
            raise wrong
        tensors.append(read_stored(path, stored))
    rows, left, right = tensors
    if len(rows) == 0 or left.shape != (len(rows), len(right)) or right.shape[1] == 0:
        raise wrong
    if int(rows[0]) < 0 or bool((rows[1:] <= rows[:-1]).any()):
        raise wrong
    if not (torch.isfinite(left).all() and torch.isfinite(right).all()):
        raise BadInput(f"change {number} of {EDIT_TENSORS} holds a number that is not finite.")
    strength, most = float(entry["strength"]), float(entry.get("most", math.inf))
    return MatrixChange(entry["matrix"], layer, expert, rows, left, right, strength, entry["concept"], most)


def _vector(entry: object) -> EditedVector:
    names = [field.name for field in fields(EditedVector)]
    texts, numbers = ("address", "matrix", "concept"), ("score", "cosine", "norm_before", "norm_after")
    if not (
        isinstance(entry, dict)
        and sorted(entry) == sorted(names)
        and all(isinstance(entry[name], str) for name in texts)
        and all(_is_finite(entry[name]) for name in numbers)
        and isinstance(entry["channels"], list)
        and all(isinstance(channel, str) for channel in entry["channels"])
    ):
        raise BadInput(f"{EDIT_JSON} describes an edited vector in a way that cannot be read.")
    return EditedVector(**{**entry, "channels": tuple(entry["channels"])})
