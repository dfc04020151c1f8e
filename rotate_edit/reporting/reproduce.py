"""What a run needs to be done again, and what came of it.

Both are in reproduce.json. This module also finds how a second run differs from the first.
"""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from rotate_edit.edits.edit_file import EDIT_JSON
from rotate_edit.edits.writing.patch import PATCH_JSON, base_differences
from rotate_edit.errors import BadInput, quoted
from rotate_edit.evaluation.provenance import hardware
from rotate_edit.files import read_json, write_atomically
from rotate_edit.models.checkpoint import Checkpoint

REPRODUCE = "reproduce.json"
FORMAT, VERSION = "rotate-edit reproduction", 1
SEVERITIES = ("serious", "minor", "note")
ADAPTER = "adapter/adapter_model.safetensors"


@dataclass(frozen=True)
class Difference:
    """One difference of a second run.

    Attributes:
        severity: One of `SEVERITIES`.
        what: What differs.
        before: What it was.
        now: What it is now.
    """

    severity: str
    what: str
    before: str
    now: str


def write_reproduction(folder: Path, recipe: str, result: Mapping[str, Any]) -> dict[str, Any]:
    """Write reproduce.json into a run folder: recipe, hashes, numbers, versions, hardware and seeds.

    The home folder of whoever ran it is `~` in it.

    Args:
        folder: The run folder.
        recipe: The run's recipe as YAML, with every default filled in.
        result: Content of evaluation.json.

    Returns:
        The content of reproduce.json.

    Raises:
        BadInput: When a file of the run cannot be read or the folder cannot be written.
        Failure: When the disk is full or fails.
    """
    known, content_of = result["provenance"], yaml.safe_load(recipe)
    seed = content_of["seed"]
    edited = (folder / "edit" / EDIT_JSON).is_file()
    content = {
        "format": FORMAT,
        "version": VERSION,
        "recipe": content_of,
        "seeds": {"recipe": seed, "bootstrap": seed, "sampling": seed},
        # The edit knows the hash of every tensor that it changed, however large the base is.
        "base": read_json(folder / "edit", EDIT_JSON)["base"] if edited else known["base"],
        "hashes": hashes(folder),
        "items": {name: task.get("content") for name, task in (result.get("definitions") or {}).items()},
        "numbers": dict(numbers(result)),
        "versions": {"rotate_edit": known["rotate_edit"], "python": known["python"], **known["versions"]},
        "hardware": hardware() | {"device": known["device"], "threads": known["threads"]},
    }
    write_atomically(folder / REPRODUCE, json.dumps(content, indent=1, allow_nan=False) + "\n")
    return content


def hashes(folder: Path) -> dict[str, str]:
    """Collect the hashes of what a run has made.

    Args:
        folder: The run folder.

    Returns:
        The identity of its edit, the SHA-256 of every tensor it changed and of its adapter, by name. What is not there
        is left out.

    Raises:
        BadInput: When a file of the edit cannot be read.
    """
    found = {}
    if (folder / "edit" / EDIT_JSON).is_file():
        found["edit"] = str(read_json(folder / "edit", EDIT_JSON).get("identity"))
    if (folder / "edit" / PATCH_JSON).is_file():
        tensors = read_json(folder / "edit", PATCH_JSON).get("tensors") or []
        found |= {f"tensor {tensor['name']}": str(tensor["after"]) for tensor in tensors}
    if (folder / ADAPTER).is_file():
        found["adapter"] = hashlib.sha256((folder / ADAPTER).read_bytes()).hexdigest()
    return found


def numbers(result: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """List every number of an evaluation with its interval.

    These are the strengths, the summary, the measures, and base and edited by item. The damage of every method where a
    tenth of a concept is left is listed too.

    Args:
        result: Content of evaluation.json.

    Yields:
        A name, and `value`, `low`, `high` and `n` (None where there is none).
    """
    for concept in result.get("concepts") or []:
        if isinstance(concept.get("strength"), int | float):
            yield f"strength of {concept['name']}", _number(concept["strength"])
    for name, measure in (result.get("summary") or {}).items():
        yield name, _number(**_parts(measure))
    for variant in (result.get("variants") or {}).values():
        for name, measure in variant["measures"].items():
            yield name, _number(**_parts(measure))
        for row in variant["rows"]:
            for side in ("base", "edited"):
                yield f"{row['title']}, {row['metric']}, {side}", _number(**_parts(row[side]))
    for name, table in (result.get("matched") or {}).items():
        for row in table["rows"]:
            yield f"damage of {row['method']} at equal removal of {name}", _number(row["collateral_kl"])


def _parts(measure: Mapping[str, Any]) -> dict[str, Any]:
    return {key: measure.get(key) for key in ("value", "low", "high", "n")}


def _number(
    value: float | None, low: float | None = None, high: float | None = None, n: int | None = None
) -> dict[str, Any]:
    return {"value": value, "low": low, "high": high, "n": n}


def read_reproduction(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read a reproduce.json as untrusted input.

    Args:
        path: The file.

    Returns:
        The recipe as it stands in the file, not checked yet, and the whole content.

    Raises:
        BadInput: When the file cannot be read, lacks a part, or holds a number or a recipe that cannot be used.
    """
    content = read_json(path.parent, path.name, strict=True)
    if content.get("format") != FORMAT or content.get("version") != VERSION:
        raise BadInput(f"{path.name} is not a reproduce.json of version {VERSION}, the only one that can be read.")
    recipe = content.get("recipe")
    parts = [content.get(name) for name in ("base", "hashes", "items", "numbers", "versions", "hardware")]
    if not isinstance(recipe, dict) or not all(isinstance(part, dict) for part in parts):
        raise BadInput(f"{path.name} lacks its recipe, hashes, numbers, versions or hardware.")
    if not all(isinstance(number, dict) and set(number) == set(_number(0)) for number in content["numbers"].values()):
        raise BadInput(f"{path.name} holds a number that cannot be read.")
    values = [value for number in content["numbers"].values() for value in number.values() if value is not None]
    if not all(isinstance(value, int | float) and math.isfinite(value) for value in values):
        raise BadInput(f"{path.name} holds a number that cannot be read.")
    return recipe, content


def check_same_base(content: Mapping[str, Any], checkpoint: Checkpoint) -> None:
    """Refuse to repeat a run on another base.

    Args:
        content: Content of reproduce.json.
        checkpoint: The base at hand.

    Raises:
        BadInput: When the base differs. It names what differs.
    """
    differences = base_differences(dict(content["base"]), checkpoint)
    if differences:
        named = ", ".join(differences[:4]) + (f" and {len(differences) - 4} more" if len(differences) > 4 else "")
        raise BadInput(
            f"{checkpoint.source} is not the base of that run (different: {named}); name the right one with --model."
        )


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[Difference]:
    """Find how a second run differs from the first.

    On the same hardware with the same versions everything must be identical. Elsewhere hashes may differ by rounding
    (minor). A number there must lie in the first run's interval (minor), or it is serious. Other versions and other
    hardware are notes.

    Args:
        before: Content of the first run's reproduce.json.
        now: Content of the second run's.

    Returns:
        The differences, the worst first.
    """
    found = []
    for part in ("versions", "hardware"):
        for name in _names(before[part], now[part]):
            if before[part].get(name) != now[part].get(name):
                found.append(_difference("note", name, before[part].get(name), now[part].get(name)))
    elsewhere = bool(found)
    for name in _names(before["items"], now["items"]):
        if before["items"].get(name) != now["items"].get(name):
            found.append(_difference("serious", f"items {name}", before["items"].get(name), now["items"].get(name)))
    for name in _names(before["hashes"], now["hashes"]):
        was, is_now = before["hashes"].get(name), now["hashes"].get(name)
        if was != is_now:
            missing = was is None or is_now is None
            found.append(_difference("minor" if elsewhere and not missing else "serious", name, was, is_now))
    for name in _names(before["numbers"], now["numbers"]):
        was, is_now = before["numbers"].get(name), now["numbers"].get(name)
        if was != is_now:
            severity = "minor" if elsewhere and _agree(was, is_now) else "serious"
            found.append(_difference(severity, name, (was or {}).get("value"), (is_now or {}).get("value")))
    return sorted(found, key=lambda difference: SEVERITIES.index(difference.severity))


def _agree(before: Mapping[str, Any] | None, now: Mapping[str, Any] | None) -> bool:
    """Whether a number of a run elsewhere lies in the interval of the first, or there is none to lie in."""
    if before is None or now is None or before["n"] != now["n"]:
        return False
    value, low, high = now["value"], before["low"], before["high"]
    if value is None or before["value"] is None:
        return bool(value == before["value"])
    return low is None or high is None or bool(low <= value <= high)


def _names(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    return sorted({*before, *now})


def _difference(severity: str, what: str, before: Any, now: Any) -> Difference:
    return Difference(severity, what, *(_told(value) for value in (before, now)))


def _told(value: Any) -> str:
    if value is None:
        return "missing"
    if isinstance(value, float):
        return f"{value:.6g}"
    text = str(value)
    return f"{text[:12]}…" if len(text) == 64 else quoted(text).strip('"')
