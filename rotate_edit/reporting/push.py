"""Publish a run's edited checkpoint or adapter on the Hugging Face Hub, by a list of allowed files."""

import json
from dataclasses import dataclass
from pathlib import Path

from rotate_edit.edits.edit_file import EDIT_JSON, EDIT_TENSORS, load_edit
from rotate_edit.edits.writing.patch import PATCH_JSON, verify
from rotate_edit.edits.writing.undo import UNDO
from rotate_edit.errors import BadInput
from rotate_edit.files import read_json, write_atomically
from rotate_edit.models import hub
from rotate_edit.models.checkpoint import open_checkpoint
from rotate_edit.models.companions import EDIT_RECORD, may_be_copied
from rotate_edit.reporting.card import write_cards
from rotate_edit.reporting.reproduce import REPRODUCE, hashes

EDIT_FILES = (EDIT_JSON, EDIT_TENSORS, PATCH_JSON)
# What lets others repeat the run, beside the weights.
RUN_FILES = ("recipe.yaml", REPRODUCE, "evaluation.json", "report.md")
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "README.md")


@dataclass(frozen=True)
class Pushed:
    """What was published.

    Attributes:
        repository: Id of the Hub repository.
        commit: Id of its commit.
        files: The files, by their names there.
    """

    repository: str
    commit: str
    files: tuple[str, ...]


def files_to_push(folder: Path, *, adapter: bool = False, undo: bool = False) -> dict[str, Path]:
    """List the files of a run folder that are published. Nothing else may be.

    The checkpoint, or with `adapter` the adapter, stands at the top. The edit is in edit/. What is needed to repeat the
    run stands beside it.

    Args:
        folder: The run folder.
        adapter: Publish the adapter instead of the checkpoint.
        undo: Publish the undo file too, which holds what was removed.

    Returns:
        The files' paths, by their names on the Hub.

    Raises:
        BadInput: When something that has to be there is missing or is a link.
    """
    inner = folder / ("adapter" if adapter else "model")
    if not inner.is_dir():
        other = "adapter: true" if adapter else "checkpoint: true"
        raise BadInput(f"{folder} holds no {inner.name}/; run its recipe with `save: {{{other}}}` first.")
    if adapter:
        found = {name: inner / name for name in ADAPTER_FILES}
    else:
        shards = open_checkpoint(inner).headers
        names = sorted(path.name for path in inner.iterdir())
        found = {name: inner / name for name in names if name in shards or name == EDIT_RECORD or may_be_copied(name)}
    needed = [name for name in EDIT_FILES if name != PATCH_JSON or not adapter]
    found |= {f"edit/{name}": folder / "edit" / name for name in needed}
    if undo:
        found[f"edit/{UNDO}"] = folder / "edit" / UNDO
    found |= {name: folder / name for name in RUN_FILES if (folder / name).is_file()}
    for name, path in found.items():
        if path.is_symlink() or not path.is_file():
            raise BadInput(f"{name} of {folder} is missing, or it is a link, which is never published.")
    return found


def push(
    folder: Path,
    repository: str,
    *,
    private: bool = False,
    adapter: bool = False,
    undo: bool = False,
    base_model: str | None = None,
    overwrite: bool = False,
) -> Pushed:
    """Publish a run folder's checkpoint or adapter as one commit of a Hub repository.

    The repository is made if need be. The card is written again with the repository's name. A checkpoint that is not
    what its edit says is not published. Neither is an adapter that is not the run's.

    Args:
        folder: The run folder.
        repository: Id of the Hub repository, owner/name.
        private: Make a new repository private.
        adapter: Publish the adapter instead of the checkpoint.
        undo: Publish the undo file too, which holds what was removed.
        base_model: The base's Hub id, when the run took the base from a folder.
        overwrite: Publish even when the repository holds files already.

    Returns:
        What was published.

    Raises:
        BadInput: When the folder or a name cannot be used, or there is no token. Also when the repository holds files
            already (unless `overwrite`).
        Failure: When the Hub fails.
    """
    for name in (repository, *([base_model] if base_model else [])):
        if not hub.looks_like_hub_id(name) or "/" not in name:
            raise BadInput(f'"{name}" is not the id of a Hub repository; write it as owner/name.')
    files_to_push(folder, adapter=adapter, undo=undo)
    edit = load_edit(folder / "edit")
    if not adapter:
        checked = verify(open_checkpoint(folder / "model"), edit, edit_folder=folder / "edit")
        if checked.problems:
            raise BadInput(f"{folder / 'model'} is not published, since it is not what its edit says: "
                           f"{checked.problems[0]}")  # fmt: skip
    elif hashes(folder).get("adapter") != _recorded(folder):
        raise BadInput(f"{folder / 'adapter'} is not published, since it is not what {REPRODUCE} says; run it again.")
    if adapter and base_model:
        _name_base(folder / "adapter" / ADAPTER_FILES[0], base_model)
    write_cards(folder, base_model, repository)
    files = files_to_push(folder, adapter=adapter, undo=undo)
    what = "adapter" if adapter else "checkpoint"
    commit = hub.publish(
        repository, files, message=f"Edited {what}, its edit and how to repeat it", private=private, overwrite=overwrite
    )
    return Pushed(repository, commit, tuple(files))


def _recorded(folder: Path) -> str | None:
    """Return the hash of the adapter as the run left it.

    A folder without a record, such as `edit` writes, gives the adapter's present hash.
    """
    if not (folder / REPRODUCE).is_file():
        return hashes(folder).get("adapter")
    known = read_json(folder, REPRODUCE).get("hashes")
    return known.get("adapter") if isinstance(known, dict) else None


def _name_base(path: Path, base_model: str) -> None:
    """Write the base's id into the adapter's configuration, where PEFT looks for it.

    The entry stays empty when a run takes its base from a folder.
    """
    content = read_json(path.parent, path.name) | {"base_model_name_or_path": base_model}
    write_atomically(path, json.dumps(content, indent=1, allow_nan=False) + "\n")
