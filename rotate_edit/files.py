"""Files and folders that appear whole or not at all."""

import errno
import json
import math
import os
import shutil
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

from rotate_edit.errors import BadInput, Failure, quoted

# The Linux request to let two files share their blocks until one of them is written to, and the ways it is refused.
FICLONE = 0x40049409
CANNOT_SHARE = (errno.EOPNOTSUPP, errno.ENOTTY, errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EBADF, errno.EPERM)

FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)
DISK_FAILED = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)

LARGEST_JSON = 500_000_000
PARTIAL_PREFIX = ".rotate-edit-partial-"
REPLACED_PREFIX = ".rotate-edit-replaced-"


def sync_folder(folder: Path) -> None:
    """Ask the kernel to put a folder's own entries on disk, so that a rename inside it survives a crash.

    Args:
        folder: The folder.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_file(path: Path) -> None:
    """Ask the kernel to put a file's bytes on disk, and wait until they are there.

    Args:
        path: The file.
    """
    with open(path, "rb") as stream:
        os.fsync(stream.fileno())


@contextmanager
def _clear_errors(output: Path) -> Iterator[None]:
    """Turn what a disk may answer while it is written to into one sentence for a person."""
    try:
        yield
    except OSError as error:
        if error.errno in FORBIDDEN:
            raise _cannot_write(output, error) from error
        if error.errno in DISK_FAILED:
            raise Failure(f"writing {output} failed ({error.strerror}); nothing was left behind.") from error
        raise


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a small file so that readers see the old content or the new one, never a part.

    Args:
        path: The file.
        content: The new content. Text is written as UTF-8.

    Raises:
        BadInput: When the file may not be written.
        Failure: When the disk is full or fails.
    """
    temporary = path.with_name(_partial_name())
    data = content.encode() if isinstance(content, str) else content
    with _clear_errors(path):
        try:
            with open(temporary, "wb") as stream:
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        sync_folder(path.parent)


@contextmanager
def whole_file(output: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Write a large file that appears whole or not at all.

    The temporary file is flushed and renamed when the block ends without an error.

    Args:
        output: The file.
        overwrite: Replace a file that exists.

    Yields:
        A temporary sibling of `output` to write to.

    Raises:
        BadInput: When `output` exists (without `overwrite`) or its folder may not be written.
        Failure: When the disk is full or fails.
    """
    check_output_free(output, overwrite=overwrite)
    temporary = output.with_name(_partial_name())
    try:
        output.absolute().parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(output.absolute().parent)
        temporary.touch()
    except OSError as error:
        raise _cannot_write(output, error) from error
    try:
        with _clear_errors(output):
            with _held(temporary):
                yield temporary
            sync_file(temporary)
            if overwrite:
                os.replace(temporary, output)
            else:
                _rename_new(temporary, output)
            sync_folder(output.absolute().parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def whole_folder(output: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Write a folder that appears whole or not at all.

    The temporary folder is renamed to `output` when the block ends without an error. Every file in it is flushed to
    disk before the rename. With `overwrite`, an existing `output` is moved aside first. It is removed only after the
    new one stands in its place.

    Args:
        output: The folder.
        overwrite: Replace a folder that exists.

    Yields:
        A temporary sibling of `output` to write into.

    Raises:
        BadInput: When `output` exists (without `overwrite`) or may not be written. With `overwrite`, also when it is
            not a folder or contains the working directory.
        Failure: When the disk is full or fails.
    """
    check_output_free(output, overwrite=overwrite)
    parent = output.absolute().parent
    if overwrite and output.exists() and (not output.is_dir() or Path.cwd().is_relative_to(output.resolve())):
        raise BadInput(f"the output {output} is not a folder, or the one you are in; name another one.")
    try:
        parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(parent)
        temporary = parent / _partial_name()
        temporary.mkdir()
    except OSError as error:
        raise _cannot_write(output, error) from error
    try:
        with _clear_errors(output), _held(temporary):
            yield temporary
            for path in sorted(temporary.rglob("*")):
                if path.is_file():
                    sync_file(path)
                elif path.is_dir():
                    sync_folder(path)
            sync_folder(temporary)
            if overwrite and output.exists():
                aside = parent / f"{REPLACED_PREFIX}{output.name}-{uuid.uuid4().hex}-{os.getpid()}"
                os.rename(output, aside)
                os.rename(temporary, output)
                shutil.rmtree(aside)
            else:
                _rename_new(temporary, output)
            sync_folder(parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _rename_new(temporary: Path, output: Path) -> None:
    """Rename to a name that nobody else has taken meanwhile.

    Raises Failure when it was taken; the result is then kept beside it, under a name that the message tells."""
    try:
        if temporary.is_dir():
            # A new folder first: rename replaces an empty folder alone, so two can never take one another's place.
            output.mkdir()
            os.rename(temporary, output)
        else:
            _link(temporary, output)
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
            raise
        kept = output.with_name(f"{output.name}-{uuid.uuid4().hex[:8]}")
        os.rename(temporary, kept)
        raise Failure(f"{output} was made by another run meanwhile; this result is kept as {kept.name}.") from error


def _link(temporary: Path, output: Path) -> None:
    """Give a file a second name, which fails when the name is taken; rename it where no second names are possible."""
    try:
        os.link(temporary, output)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK):
            raise
        if output.exists():
            raise FileExistsError(errno.EEXIST, "exists", str(output)) from error
        os.rename(temporary, output)


def _partial_name() -> str:
    return f"{PARTIAL_PREFIX}{uuid.uuid4().hex}-{os.getpid()}"


def _cannot_write(output: Path, error: OSError) -> BadInput:
    return BadInput(f"the output {output} cannot be written ({error.strerror}); choose another one.")


@contextmanager
def _held(path: Path) -> Iterator[None]:
    """Hold a lock on a temporary file or folder.

    So a run in another container does not take it for a leftover.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        _lock(descriptor)
        yield
    finally:
        os.close(descriptor)


def _lock(descriptor: int) -> bool:
    """Take an exclusive lock without waiting; False when somebody else has it."""
    import fcntl

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        # A filesystem without locks: only the process number can show whether the owner lives.
        if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):
            raise
    return True


def remove_leftovers(parent: Path) -> list[Path]:
    """Clear away what killed runs left in a folder.

    Temporary files and folders whose process is gone are removed. A folder that was moved aside to be overwritten is
    put back when the new one did not yet stand in its place.

    Args:
        parent: The folder.

    Returns:
        The paths removed or put back.
    """
    cleared = []
    for entry in [*parent.glob(f"{PARTIAL_PREFIX}*-*"), *parent.glob(f"{REPLACED_PREFIX}*-*-*")]:
        owner = entry.name.rsplit("-", 1)[1]
        if not owner.isdigit() or entry.is_symlink() or _process_is_alive(int(owner)) or _is_held(entry):
            continue
        original = parent / entry.name.removeprefix(REPLACED_PREFIX).rsplit("-", 2)[0]
        if entry.name.startswith(REPLACED_PREFIX) and not original.exists():
            os.rename(entry, original)
        elif entry.is_dir():
            shutil.rmtree(entry, ignore_errors=True)
        else:
            entry.unlink(missing_ok=True)
        cleared.append(entry)
    return cleared


def _is_held(entry: Path) -> bool:
    try:
        descriptor = os.open(entry, os.O_RDONLY)
    except OSError:
        # Gone already, or not permitted to be opened and so not to be removed.
        return True
    try:
        return not _lock(descriptor)
    finally:
        os.close(descriptor)


def _process_is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


def check_output_free(output: Path, *, overwrite: bool = False) -> None:
    """Refuse an output path that something already occupies, before any work is done.

    Args:
        output: The path.
        overwrite: Allow a path that exists, unless it is a link.

    Raises:
        BadInput: When the path is occupied.
    """
    # Both calls return False, without an error, for a path that may not be read; writing there is refused later.
    if os.path.islink(output) or (os.path.exists(output) and not overwrite):
        raise BadInput(f"the output {output} exists already; name another one or pass --overwrite.")


def check_output_outside(output: Path, folder: Path, what: str = "the base's folder", *, inside: bool = False) -> None:
    """Refuse an output that is or contains a folder that is only to be read. `overwrite` would remove that folder.

    Args:
        output: The output path.
        folder: The folder that is only to be read.
        what: The folder in words, for the message.
        inside: Allow an output inside the folder.

    Raises:
        BadInput: When the two lie one inside the other.
    """
    kept, target = folder.resolve(), output.absolute().resolve()
    if target == kept or target in kept.parents or (kept in target.parents and not inside):
        raise BadInput(f"the output {output} and {what} lie one inside the other; name another output.")


def free_space(output: Path) -> int:
    """Find how much space is free on the disk on which `output` would lie.

    Args:
        output: The output path. It need not exist.

    Returns:
        The free bytes.
    """
    parent = output.absolute().parent
    while not os.path.exists(parent):
        parent = parent.parent
    return shutil.disk_usage(parent).free


def check_free_space(output: Path, needed: int) -> None:
    """Refuse to begin when the disk of `output` has too little free space.

    Args:
        output: The output path. It need not exist.
        needed: The bytes needed.

    Raises:
        BadInput: When fewer bytes are free.
    """
    free = free_space(output)
    if free < needed:
        raise BadInput(
            f"{output} needs {needed / 1e9:.2f} GB and its disk has {free / 1e9:.2f} GB free; name an output elsewhere."
        )


def data_folder(name: str) -> Path:
    """Find the package's folder of evaluation items or recipes.

    It lies inside the installed package, or beside it in a source tree.

    Args:
        name: "evals" or "recipes".

    Returns:
        The folder. It is not checked that it exists.
    """
    package = Path(__file__).resolve().parent
    installed = package / f"_{name}"
    return installed if installed.is_dir() else package.parent / name


def file_inside(folder: Path, name: str) -> Path:
    """Find the real path of a file that an index or archive names.

    Links are followed inside the folder. From a Hub snapshot they are also followed into the same cache entry's
    `blobs`, of which every snapshot is made. They are followed nowhere else.

    Args:
        folder: The folder.
        name: The plain name of a file in it, as untrusted text.

    Returns:
        The resolved path.

    Raises:
        BadInput: When the name is not a plain one, or the path would leave the folder.
    """
    if not name or name in (".", "..") or "/" in name or "\\" in name or "\0" in name:
        raise BadInput(f"{quoted(name)} is not the plain name of a file, so it is not opened.")
    root = folder.resolve()
    try:
        path = (folder / name).resolve()
    except (OSError, RuntimeError, ValueError) as error:
        raise BadInput(f"{quoted(name)} cannot be the name of a file, or it is a link to itself.") from error
    allowed = [root, root.parent.parent / "blobs"] if root.parent.name == "snapshots" else [root]
    if not any(path.is_relative_to(parent) for parent in allowed):
        raise BadInput(f"{name} is a link that leads out of {root.name}, so it is not opened.")
    return path


def copy_file(source: Path, target: Path) -> None:
    """Copy a file's bytes into a new regular file, by the kernel.

    It is a shared copy where the filesystem can make one.

    Args:
        source: The file to copy.
        target: The new file.

    Raises:
        OSError: As the system raises it, for instance when the disk is full or, on Linux, `target` exists.
    """
    if not sys.platform.startswith("linux"):
        shutil.copyfile(source, target)
        return
    import fcntl

    with open(source, "rb") as reader, open(target, "xb") as writer:
        try:
            fcntl.ioctl(writer.fileno(), FICLONE, reader.fileno())
            return
        except OSError as error:
            if error.errno not in CANNOT_SHARE:
                raise
        remaining = os.fstat(reader.fileno()).st_size
        while remaining > 0:
            try:
                count = os.copy_file_range(reader.fileno(), writer.fileno(), remaining)
            except OSError as error:
                if error.errno not in CANNOT_SHARE or writer.tell():
                    raise
                shutil.copyfileobj(reader, writer, 1 << 24)
                return
            if count == 0:
                raise OSError(errno.EIO, f"{source.name} became shorter while it was copied")
            remaining -= count


def read_json(folder: Path, name: str, *, strict: bool = False) -> dict[str, Any]:
    """Read a JSON object out of a folder, as untrusted input.

    Args:
        folder: The folder.
        name: The file's plain name.
        strict: Refuse NaN and Infinity, which JSON does not have.

    Returns:
        The object.

    Raises:
        BadInput: When the file is missing, too large, not JSON or not an object.
    """
    path = file_inside(folder, name)
    try:
        if path.stat().st_size > LARGEST_JSON:
            raise BadInput(f"{name} is larger than any such file can be.")
        constant = _no_constant if strict else float
        content = json.loads(path.read_text("utf-8"), parse_int=_integer, parse_constant=constant)
    except OSError as error:
        raise BadInput(f"{folder.name} has no readable {name} ({error.strerror}).") from error
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{name} of {folder.name} is not valid JSON.") from error
    if not isinstance(content, dict):
        raise BadInput(f"{name} of {folder.name} is not a JSON object.")
    return content


def _no_constant(text: str) -> float:
    raise ValueError(f"{text} is no JSON number")


def _integer(text: str) -> int:
    if len(text) > 20:
        raise ValueError("an integer that no count or index can be")
    return int(text)


def cache_folder() -> Path:
    """Find where baselines and model-written text are kept between runs: the user's cache folder.

    Returns:
        The folder. It is not checked that it exists.
    """
    root = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(root) / "rotate-edit"


def plain(value: Any) -> Any:
    """Replace not-a-number and infinity by null in JSON values.

    Args:
        value: A JSON value, with lists and dictionaries of any depth.

    Returns:
        A copy with None in their place. Keys become text, and tuples become lists.
    """
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    return value


@cache
def _unique_keys() -> Any:
    """The loader of YAML's own tags alone, with no key twice: the last of two would win without a word."""
    # The channel search reads no YAML and runs where it is not installed.
    import yaml

    class UniqueKeys(yaml.SafeLoader):
        """Its tables are its own, or a tag that other code registers would be inherited."""

        yaml_constructors: ClassVar[dict[Any, Any]] = {
            tag: build
            for tag, build in yaml.SafeLoader.yaml_constructors.items()
            if tag is None or tag.startswith("tag:yaml.org,2002:")
        }
        yaml_multi_constructors: ClassVar[dict[Any, Any]] = {}

        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
            """A mapping. Raises MarkedYAMLError for a key that stands twice."""
            seen: set[str] = set()
            for key, _ in node.value:
                if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                    if key.value in seen:
                        raise yaml.MarkedYAMLError(
                            problem=f"the key {key.value!r} stands twice, the second time", problem_mark=key.start_mark
                        )
                    seen.add(key.value)
            return super().construct_mapping(node, deep)

    return UniqueKeys


def read_yaml(text: str) -> Any:
    """Read YAML as untrusted input: plain data, and no key twice.

    Args:
        text: The YAML.

    Returns:
        The data.

    Raises:
        yaml.YAMLError: When it is not valid, holds a tag of its own, or a key twice.
    """
    import yaml

    # The loader is yaml.SafeLoader with a check added: it builds plain data only.
    return yaml.load(text, Loader=_unique_keys())
