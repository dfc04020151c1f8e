"""Write an edit into a checkpoint as a patched folder, and verify or revert such a folder."""

import errno
import hashlib
import json
import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from rotate_edit.edits.edit import Edit
from rotate_edit.edits.edit_file import EDIT_JSON, EDIT_TENSORS, edit_identity, refuse_clamps
from rotate_edit.edits.writing.cost import estimate_patch
from rotate_edit.edits.writing.rewrite import Rounding, Touched, plan_edit, rewritten
from rotate_edit.edits.writing.undo import UNDO, plan_undo, read_undo, write_undo
from rotate_edit.errors import BadInput, Failure, counted, quoted
from rotate_edit.files import (
    check_free_space,
    check_output_free,
    check_output_outside,
    copy_file,
    read_json,
    sync_file,
    whole_folder,
    write_atomically,
)
from rotate_edit.machine import check_cost
from rotate_edit.models.checkpoint import Checkpoint, companions, complete, identity, tensor_hash
from rotate_edit.models.companions import EDIT_RECORD
from rotate_edit.models.safetensors_file import read_bytes

PATCH_JSON = "patch.json"
# More tensors than this that lose most of their changes are told in one sentence.
MOST_NAMED = 3
RECORD_FORMAT = "rotate-edit record"
MODEL_CARD, BASE_CARD = "README.md", "README.base.md"
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class PatchedTensor:
    """One tensor that was changed.

    Attributes:
        name: Name of the tensor.
        shard: Name of its shard file.
        dtype: Its dtype, as safetensors names it.
        matrices: Which matrices of it were changed.
        rows: How many of their vectors were changed.
        rank: In how many directions they were changed.
        before: SHA-256 of its bytes before, 64 hexadecimal digits.
        after: SHA-256 of its bytes after.
        rounding: What rounding to its dtype did.
    """

    name: str
    shard: str
    dtype: str
    matrices: tuple[str, ...]
    rows: int
    rank: int
    before: str
    after: str
    rounding: Rounding


@dataclass(frozen=True)
class Patch:
    """What was written.

    Attributes:
        edit: Identity of the edit.
        tensors: The tensors changed.
        copied: Names of the files copied beside the shards.
        linked: Names of the shards that are hard links.
        left_out: Names of the files left out.
        warnings: Warnings, one sentence each.
    """

    edit: str
    tensors: tuple[PatchedTensor, ...]
    copied: tuple[str, ...]
    linked: tuple[str, ...]
    left_out: tuple[str, ...]
    warnings: tuple[str, ...]

    def plain(self) -> dict[str, Any]:
        """Return the same as JSON values."""
        return asdict(self)

    def rounding(self) -> Rounding:
        """Return what rounding did to all its tensors together."""
        return sum((tensor.rounding for tensor in self.tensors), Rounding())

    def sentences(self) -> list[str]:
        """Describe for a person what was written, what rounding did and what was left out.

        Returns:
            One sentence per line.
        """
        rounding = self.rounding()
        touched = counted(len({tensor.shard for tensor in self.tensors}), "shard")
        lines = []
        if self.tensors:
            lines.append(
                f"{counted(len(self.tensors), 'tensor')} changed in {touched}: {rounding.elements:,} numbers, of which "
                f"{rounding.unchanged:,} stayed as they were because the change is too small for "
                f"{' and '.join(sorted({tensor.dtype for tensor in self.tensors}))}; "
                f"the largest rounding error is {rounding.largest_error:.2g}, the largest change "
                f"{rounding.largest_change:.2g}."
            )
        if self.left_out:
            lines.append(f"Left out, since only named kinds of files are copied: {', '.join(self.left_out)}.")
        return lines


def base_differences(base: dict[str, Any], checkpoint: Checkpoint) -> list[str]:
    """Find in which hashes a checkpoint differs from the base an edit was made for.

    Names and paths are not compared, only bytes.

    Args:
        base: What `checkpoint.identity` returned for the base.
        checkpoint: The checkpoint at hand.

    Returns:
        Each difference as a few words. Empty when there is none.
    """
    parts = {key: base.get(key) for key in ("files", "headers", "tensors")}
    if not all(isinstance(part, dict) for part in parts.values()):
        return ["the edit does not say which base it was made for"]
    own = identity(checkpoint, [name for name in parts["tensors"] or {} if name in checkpoint.stored], full=False)
    words = {"files": "", "headers": "the header of ", "tensors": "the tensor "}
    differences = [] if base.get("edits", []) == own["edits"] else ["the edits already written into it"]
    for part, text in words.items():
        wanted, found = parts[part] or {}, own[part]
        names = sorted(wanted) if part == "tensors" else sorted({*wanted, *found})
        differences += [text + _plain_name(name) for name in names if wanted.get(name) != found.get(name)]
    return differences


def _plain_name(name: str) -> str:
    """A name out of an edit file as it is, or in quotes when it is not plain."""
    return name if name.isprintable() and len(name) <= 60 else quoted(name)


def write_checkpoint(
    checkpoint: Checkpoint,
    edit: Edit,
    output: Path,
    *,
    edit_folder: Path | None = None,
    undo: bool = True,
    link: bool = False,
    force_base: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Patch:
    """Write the checkpoint with the edit in it as a new folder.

    `from_pretrained` loads the folder without this package. Shards are copied by the kernel. Then the byte ranges of
    the touched tensors are overwritten in the copy. So headers, tensor order and every other byte stay. Changes are
    computed in float64 and rounded once, to nearest even. An error leaves nothing behind.

    Args:
        checkpoint: The base.
        edit: The edit.
        output: The folder to write.
        edit_folder: Where `patch.json` and, with `undo`, `undo.safetensors` go.
        undo: Keep the original vectors. They hold what was removed.
        link: Make untouched shards hard links, except out of the Hub cache.
        force_base: Write even though the checkpoint's hashes are not those of the edit's base.
        overwrite: Replace an output that exists.
        progress: Called with the step, the shards done and the shards in all.

    Returns:
        What was written.

    Raises:
        BadInput: When the base differs or the edit does not fit. When the output exists (without `overwrite`) or lies
            inside the base. When there is not enough disk space or memory, or the edit folder holds the undo file of
            another base.
        Failure: When the disk fails on the way.
    """
    refuse_clamps(edit)
    warnings = check_base(edit, checkpoint, force_base)
    check_output_outside(output, checkpoint.folder)
    check_output_free(output, overwrite=overwrite)
    if edit_folder is not None:
        _check_edit_folder(edit_folder, checkpoint, output, forced=bool(warnings))
    touched = plan_edit(checkpoint, edit)
    complete(checkpoint)
    shards = {checkpoint.stored[name].file for name in touched}
    check_cost(estimate_patch(checkpoint, edit, link=link), output)
    links = {shard for shard in checkpoint.headers if link and shard not in shards and _may_link(checkpoint, shard)}
    check_free_space(output, _needed_bytes(checkpoint, set(checkpoint.headers) - links))
    with whole_folder(output, overwrite=overwrite) as folder:
        linked, tensors = _write_shards(checkpoint, touched, folder, links, progress)
        copied, left_out = copy_companions(checkpoint, folder)
        warnings += _lost_in_rounding(tensors)
        if not tensors:
            warnings.append("the edit changes nothing, so what is written is a copy of its base.")
        if link:
            warnings.append(_about_links(len(linked), len(checkpoint.headers) - len(shards)))
        patch = Patch(edit_identity(edit), tensors, copied, linked, left_out, tuple(warnings))
        write_record(folder, [*checkpoint.edits, _record_entry(checkpoint, edit, patch)])
        if edit_folder is not None:
            if undo:
                write_undo(checkpoint, touched, patch_hashes(patch), patch.edit, edit_folder)
            write_atomically(edit_folder / PATCH_JSON, json.dumps(patch.plain(), indent=1) + "\n")
    return patch


def _check_edit_folder(edit_folder: Path, checkpoint: Checkpoint, output: Path, *, forced: bool) -> None:
    """Refuse to take an edit's folder away, or the undo file in it that belongs to another base.

    Raises:
        BadInput: In both cases, and when the folder does not exist.
    """
    if not edit_folder.is_dir():
        raise BadInput(f'the edit folder "{edit_folder}" does not exist.')
    check_output_outside(output, edit_folder, "the edit's folder", inside=True)
    foreign = forced and ((edit_folder / UNDO).exists() or (edit_folder / PATCH_JSON).exists())
    if not forced and (edit_folder / UNDO).exists():
        # The edit may have been forced into another base before it is written into its own.
        before = {name: hashes["before"] for name, hashes in read_undo(edit_folder).hashes.items()}
        foreign = any(
            name not in checkpoint.stored or tensor_hash(checkpoint, name) != digest for name, digest in before.items()
        )
    if foreign:
        raise BadInput(
            f'"{edit_folder}" holds what undoes the edit of another base; copy {EDIT_JSON} and {EDIT_TENSORS} to '
            "another folder to write the edit into this one."
        )


def check_base(edit: Edit, checkpoint: Checkpoint, force_base: bool = False) -> list[str]:
    """Refuse a checkpoint that is not the edit's base.

    Args:
        edit: The edit.
        checkpoint: The checkpoint at hand.
        force_base: Return a warning instead of refusing.

    Returns:
        Warnings, at most one. It names the hashes that differ.

    Raises:
        BadInput: When the base differs, without `force_base`. It names the hashes that differ.
    """
    differences = base_differences(edit.base, checkpoint)
    if not differences:
        return []
    named = ", ".join(differences[:4]) + (f" and {len(differences) - 4} more" if len(differences) > 4 else "")
    if force_base:
        return [f"{checkpoint.source} is not the base the edit was made for; different: {named}."]
    raise BadInput(
        f"{checkpoint.source} is not the base the edit was made for (different: {named}); pass --force-base to write "
        "the edit into it all the same."
    )


def _needed_bytes(checkpoint: Checkpoint, shards: set[str]) -> int:
    return sum(checkpoint.path(shard).stat().st_size for shard in shards) + (32 << 20)


def _write_shards(
    checkpoint: Checkpoint, touched: dict[str, list[Touched]], folder: Path, links: set[str], progress: Progress | None
) -> tuple[tuple[str, ...], tuple[PatchedTensor, ...]]:
    """Copy every shard, or link it where it is among `links`, and write the new values into the copies.

    Returns:
        The shards that were linked, and the tensors that were changed.
    """
    linked, tensors = [], []
    # The disk takes one shard while the next is copied in memory; an error of its own comes out in the end.
    with ThreadPoolExecutor(max_workers=1) as disk:
        flushed = []
        for done, shard in enumerate(checkpoint.headers):
            source, target = checkpoint.path(shard), folder / shard
            if shard in links and _linked(source, target):
                linked.append(shard)
            else:
                copy_file(source, target)
                names = [name for name in touched if checkpoint.stored[name].file == shard]
                tensors += [_patch_tensor(checkpoint, name, touched[name], folder) for name in names]
                flushed.append(disk.submit(sync_file, target))
            if progress is not None:
                progress("write checkpoint", done + 1, len(checkpoint.headers))
        for flush in flushed:
            flush.result()
    order = {name: position for position, name in enumerate(touched)}
    return tuple(linked), tuple(sorted(tensors, key=lambda tensor: order[tensor.name]))


def _may_link(checkpoint: Checkpoint, shard: str) -> bool:
    """Tell whether a shard may become a hard link.

    It may not out of the Hub's cache, which others read too. Where the cache cannot make links, its snapshots hold the
    files.
    """
    source = checkpoint.path(shard)
    return source.parent.name != "blobs" and source.parent.parent.name != "snapshots"


def _about_links(linked: int, untouched: int) -> str:
    if linked:
        links = "1 shard is a hard link" if linked == 1 else f"{linked} shards are hard links"
        return f"{links}: writing into one in place changes the base too."
    if not untouched:
        return "nothing was linked, because the edit changes every shard."
    return (
        "nothing was linked, since the base lies in the Hub's cache or where the output cannot link to; it was copied."
    )


def _linked(source: Path, target: Path) -> bool:
    try:
        os.link(source, target)
    except OSError as error:
        # Another filesystem, one without hard links, or a file that may not be linked: it is copied instead.
        if error.errno in (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP, errno.EACCES):
            return False
        raise
    return True


def _patch_tensor(checkpoint: Checkpoint, name: str, touched: list[Touched], folder: Path) -> PatchedTensor:
    stored = checkpoint.stored[name]
    before, after, rounding = hashlib.sha256(), hashlib.sha256(), Rounding()
    with open(folder / stored.file, "r+b", buffering=0) as stream:
        for block in rewritten(checkpoint, name, touched):
            before.update(block.old.numpy().data)
            after.update(block.new.numpy().data)
            rounding += block.rounding
            if block.new is not block.old:
                _write_at(stream.fileno(), block.new.numpy().data, block.start)
    totals = [entry.total for entry in touched if entry.total is not None]
    return PatchedTensor(
        name,
        stored.file,
        stored.dtype,
        tuple(dict.fromkeys(total.matrix for total in totals)),
        sum(len(total.rows) for total in totals),
        sum(len(total.right) for total in totals),
        before.hexdigest(),
        after.hexdigest(),
        rounding,
    )


def _write_at(descriptor: int, content: memoryview, start: int) -> None:
    done = 0
    while done < len(content):
        done += os.pwrite(descriptor, content[done:], start + done)


def _lost_in_rounding(tensors: Sequence[PatchedTensor]) -> list[str]:
    """One sentence for each tensor that loses most of its changes, or one for all where they are many."""
    poor = [tensor for tensor in tensors if 0 < tensor.rounding.elements <= 2 * tensor.rounding.unchanged]
    if len(poor) <= MOST_NAMED:
        return [_vanishing(tensor) for tensor in poor]
    whole = sum((tensor.rounding for tensor in tensors), Rounding())
    error = math.sqrt(whole.error_squares / whole.change_squares)
    return [
        f"the edit largely vanishes in {len(poor)} of {len(tensors)} tensors, such as {poor[0].name}: most of their "
        f"changes are too small for {poor[0].dtype}. Over all tensors the error of rounding is {error:.0%} of the "
        "edit's size; the adapter keeps the edit as it is."
    ]


def _vanishing(tensor: PatchedTensor) -> str:
    rounding = tensor.rounding
    share = 100 * rounding.unchanged / rounding.elements
    what = "vanishes" if rounding.unchanged == rounding.elements else "largely vanishes"
    return f"the edit {what} in {tensor.name}: {share:.0f} % of its changes are too small for {tensor.dtype}."


def copy_companions(checkpoint: Checkpoint, folder: Path) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Copy config, tokenizer, licence and the like by a list of allowed files.

    The model card becomes `README.base.md`, since it describes the base.

    Args:
        checkpoint: The checkpoint.
        folder: The folder to copy to.

    Returns:
        The names of the files copied, and of those left out.
    """
    copied, left_out = [], []
    for name, allowed in companions(checkpoint).items():
        target = folder / (BASE_CARD if name == MODEL_CARD else name)
        if allowed and checkpoint.path(name).is_file() and not target.exists():
            target.parent.mkdir(exist_ok=True)
            copy_file(checkpoint.path(name), target)
            copied.append(name)
        else:
            left_out.append(name)
    return tuple(copied), tuple(left_out)


def patch_hashes(patch: Patch) -> dict[str, dict[str, str]]:
    """Return the SHA-256 before and after of each tensor.

    Args:
        patch: What was written.

    Returns:
        {"before", "after"} by tensor name.
    """
    return {tensor.name: {"before": tensor.before, "after": tensor.after} for tensor in patch.tensors}


def _record_entry(checkpoint: Checkpoint, edit: Edit, patch: Patch) -> dict[str, Any]:
    return {
        "edit": patch.edit,
        "method": edit.method,
        "concepts": sorted({change.concept for change in edit.changes}),
        "base": {"source": checkpoint.source, "revision": checkpoint.revision},
        "tensors": patch_hashes(patch),
    }


def write_record(folder: Path, edits: list[dict[str, Any]]) -> None:
    """Leave in a patched folder a record of what has been written into it.

    Args:
        folder: The patched folder.
        edits: One entry per edit, oldest first. Nothing is written when there is none.
    """
    if edits:
        content = {"format": RECORD_FORMAT, "version": 1, "edits": edits}
        (folder / EDIT_RECORD).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def revert(
    checkpoint: Checkpoint,
    edit_folder: Path,
    output: Path,
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> tuple[str, ...]:
    """Write a patched checkpoint with its last edit taken back, bit for bit, as a new folder.

    An error leaves nothing behind.

    Args:
        checkpoint: The patched checkpoint.
        edit_folder: Where the edit's `undo.safetensors` is.
        output: The folder to write.
        overwrite: Replace an output that exists.
        progress: Called with the step, the shards done and the shards in all.

    Returns:
        The names of the tensors that got their originals back.

    Raises:
        BadInput: When that edit is not the last one written into the checkpoint, or a tensor is not as the edit left
            it. When the output cannot be written or there is not enough disk space.
        Failure: When the disk fails, or the result is not what it was before the edit.
    """
    undo = read_undo(edit_folder)
    edits = checkpoint.edits
    if edits and edits[-1]["edit"] != undo.edit:
        later = [entry for entry in edits if entry["edit"] == undo.edit]
        which = "a later edit must be reverted first" if later else "this edit was never written into it"
        raise BadInput(f"{checkpoint.source} cannot be reverted with this undo file: {which}.")
    check_output_outside(output, checkpoint.folder)
    check_output_outside(output, edit_folder, "the edit's folder", inside=True)
    check_output_free(output, overwrite=overwrite)
    touched = plan_undo(checkpoint, undo)
    for name, hashes in undo.hashes.items():
        if tensor_hash(checkpoint, name) != hashes["after"]:
            raise BadInput(f"{name} of {checkpoint.source} is not as the edit left it, so the edit is not taken back.")
    check_free_space(output, _needed_bytes(checkpoint, set(checkpoint.headers)))
    with whole_folder(output, overwrite=overwrite) as folder:
        for tensor in _write_shards(checkpoint, touched, folder, set(), progress)[1]:
            if tensor.after != undo.hashes[tensor.name]["before"]:
                raise Failure(f"{tensor.name} did not become what it was before the edit; the undo file is damaged.")
        copy_companions(checkpoint, folder)
        if BASE_CARD not in companions(checkpoint):
            # The base had no card, so what became README.base.md is the edited model's own.
            (folder / BASE_CARD).unlink(missing_ok=True)
        elif len(edits) <= 1:
            os.replace(folder / BASE_CARD, folder / MODEL_CARD)
        write_record(folder, edits[:-1])
    return tuple(touched)


@dataclass(frozen=True)
class Verification:
    """What `verify` found.

    Attributes:
        problems: Each a sentence that names a file or a tensor.
        compared: How many tensors were compared.
        not_compared: Names of the tensors that nothing could be compared with.
    """

    problems: tuple[str, ...]
    compared: int
    not_compared: tuple[str, ...]


def verify(
    checkpoint: Checkpoint, edit: Edit, base: Checkpoint | None = None, *, edit_folder: Path | None = None
) -> Verification:
    """Check whether a patched checkpoint is its base with the edit in it and nothing else.

    With `base` at hand every tensor is computed again and compared byte for byte. Without it, hashes are compared:
    those in the edit (`edit.base`) and those in `patch.json`. That leaves out tensors whose hash was not taken.

    Args:
        checkpoint: The patched checkpoint.
        edit: The edit.
        base: The base, when it is at hand.
        edit_folder: The edit's folder, which holds `patch.json`. Needed without the base.

    Returns:
        What was found.

    Raises:
        BadInput: When neither base nor edit folder is given, or `patch.json` cannot be used. With a base, when the edit
            does not fit it.
    """
    if base is not None:
        return _verify_against(checkpoint, edit, base)
    after = _hashes_after(edit_folder, edit)
    before = edit.base.get("tensors", {})
    problems = _record_problems(checkpoint, edit) + _file_problems(checkpoint, edit.base)
    missing = []
    expected = {**before, **after}
    for name in checkpoint.stored:
        if name not in expected:
            missing.append(name)
        elif tensor_hash(checkpoint, name) != expected[name]:
            state = "as the edit leaves it" if name in after else "that of the base"
            problems.append(f"{name} in {checkpoint.stored[name].file} is not {state}.")
    return Verification(tuple(problems), len(checkpoint.stored) - len(missing), tuple(missing))


def _hashes_after(edit_folder: Path | None, edit: Edit) -> dict[str, str]:
    if edit_folder is None:
        raise BadInput("without the base, the edit's folder is needed to verify a patched checkpoint.")
    patch = read_json(edit_folder, PATCH_JSON)
    tensors = patch.get("tensors")
    if patch.get("edit") != edit_identity(edit) or not isinstance(tensors, list):
        raise BadInput(f"{PATCH_JSON} belongs to another edit than the one beside it.")
    if not all(isinstance(entry, dict) and {"name", "after"} <= set(entry) for entry in tensors):
        raise BadInput(f"{PATCH_JSON} lists a tensor without its hash.")
    return {str(entry["name"]): str(entry["after"]) for entry in tensors}


def _record_problems(checkpoint: Checkpoint, edit: Edit) -> list[str]:
    """Return what the checkpoint's own record says against this edit being the last one.

    Empty when there is no record.
    """
    written, wanted = [entry["edit"] for entry in checkpoint.edits], edit_identity(edit)
    if not written or written[-1] == wanted:
        return []
    if wanted in written:
        return [f"{checkpoint.source} has a later edit in it ({quoted(written[-1][:12])})."]
    return [f"this edit was never written into {checkpoint.source}; the last one there is {quoted(written[-1][:12])}."]


def _file_problems(checkpoint: Checkpoint, base: dict[str, Any]) -> list[str]:
    """Find config, tokenizer files and shard headers that are not those of the base.

    `base` is the base's identity.
    """
    own = identity(checkpoint, full=False)
    return [
        f"{'the header of ' if part == 'headers' else ''}{_plain_name(name)} is not that of the base."
        for part in ("files", "headers")
        for name in sorted({*base.get(part, {}), *own[part]})
        if base.get(part, {}).get(name) != own[part].get(name)
    ]


def _verify_against(checkpoint: Checkpoint, edit: Edit, base: Checkpoint) -> Verification:
    touched = plan_edit(base, edit)
    problems = _file_problems(checkpoint, identity(base, full=False))
    later = _record_problems(checkpoint, edit)
    for name in [] if problems else base.stored:
        stored = base.stored[name]
        path = checkpoint.path(stored.file)
        for block in rewritten(base, name, touched.get(name, [])):
            if not torch.equal(read_bytes(path, block.start, block.start + len(block.new)), block.new):
                state = "the base with the edit in it" if name in touched else "that of the base"
                problems.append(f"{name} in {stored.file} is not {state}.")
                break
    return Verification((*later, *problems), len(base.stored), ())
