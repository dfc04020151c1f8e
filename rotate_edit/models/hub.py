"""Fetch single files of a model from the Hugging Face Hub or from its cache.

Everything goes through `huggingface_hub`. It brings its cache and layout, its store of tokens, its offline mode and its
resuming of broken downloads.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from rotate_edit.errors import BadInput, Failure, quoted

CONFIG = "config.json"


@dataclass(frozen=True)
class HubFile:
    """One file of a Hub model.

    Attributes:
        size: Size in bytes as the Hub states it; None where it does not.
        sha256: SHA-256 as the Hub states it; None where it does not.
    """

    size: int | None
    sha256: str | None


@dataclass(frozen=True)
class HubModel:
    """A model on the Hub at one commit.

    Attributes:
        name: The Hub id.
        revision: The commit.
        folder: Its snapshot in the local cache, filled file by file.
        files: Its files by name.
    """

    name: str
    revision: str
    folder: Path
    files: dict[str, HubFile]


def looks_like_hub_id(text: str) -> bool:
    """Tell whether a text has the form of a Hub id: "owner/name" or an old single name.

    Args:
        text: The text.

    Returns:
        True if it has that form.
    """
    part = r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9])?"
    return re.fullmatch(rf"{part}(?:/{part})?", text, flags=re.ASCII) is not None and ".." not in text


def find_model(name: str, revision: str | None = None) -> HubModel:
    """Ask the Hub which commit is meant and which files it has.

    Without a network the local cache answers.

    Args:
        name: The Hub id.
        revision: Branch, tag or commit; None for the main branch.

    Returns:
        The model at that commit.

    Raises:
        BadInput: If there is no such model or revision, it may not be read, or neither Hub nor cache has it.
        Failure: If its config cannot be downloaded.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError, HTTPError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        info = HfApi().model_info(name, revision=revision, files_metadata=True)
    except HFValidationError as error:
        raise BadInput(f'"{name}" is neither a folder nor a possible Hub id.') from error
    except RevisionNotFoundError as error:
        raise BadInput(f"the Hub model {name} has no revision {quoted(revision)}.") from error
    except RepositoryNotFoundError as error:
        raise BadInput(
            f'"{name}" is not a folder here, and the Hub has no such model or it may not be read without a token; '
            "log in with `hf auth login` and accept its licence if it is gated."
        ) from error
    except (OSError, HTTPError):
        # There is no network, the Hub fails, or HF_HUB_OFFLINE is set. An earlier download may be enough.
        return _find_in_cache(name, revision)
    # The branch is asked for by name, so that the cache notes its commit and finds it offline.
    folder = _download(name, revision or "main", CONFIG).parent
    if folder.name != info.sha:
        info = HfApi().model_info(name, revision=folder.name, files_metadata=True)
    files = {
        entry.rfilename: HubFile(entry.size, entry.lfs.sha256 if entry.lfs else None) for entry in info.siblings or ()
    }
    return HubModel(name, folder.name, folder, files)


def _find_in_cache(name: str, revision: str | None) -> HubModel:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = Path(hf_hub_download(name, CONFIG, revision=revision, local_files_only=True)).parent
    except LocalEntryNotFoundError as error:
        wanted = name if revision is None else f"{name} at {revision}"
        raise BadInput(
            f'"{name}" is not a folder here; the Hub cannot be reached, and {wanted} is not in its local cache.'
        ) from error
    files = {}
    for path in folder.iterdir():
        if path.is_file():
            # A large file's entry in `blobs` is named by its SHA-256, a small one's by its git hash.
            blob = path.resolve().name
            files[path.name] = HubFile(path.stat().st_size, blob if re.fullmatch("[0-9a-f]{64}", blob) else None)
    return HubModel(name, folder.name, folder, files)


def is_here(model: HubModel, file: str) -> bool:
    """Tell whether a file is in the cache already.

    Args:
        model: The Hub model.
        file: Name of the file.

    Returns:
        True if it is there.
    """
    return (model.folder / file).is_file()


def fetch(model: HubModel, file: str) -> None:
    """Download a file into the snapshot folder when it is not there yet.

    Args:
        model: The Hub model.
        file: Name of the file.

    Raises:
        BadInput: If the model has no such file, it may not be read, or the Hub cannot be reached.
        Failure: If the download fails.
    """
    if is_here(model, file):
        return
    if file not in model.files:
        raise BadInput(f"the Hub model {model.name} has no file {quoted(file)}.")
    _download(model.name, model.revision, file)


def _download(name: str, revision: str, file: str) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, HTTPError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(name, file, revision=revision))
    except GatedRepoError as error:
        raise BadInput(f"{name} is gated: accept its licence on the Hub and log in with `hf auth login`.") from error
    except LocalEntryNotFoundError as error:
        raise BadInput(f"{file} of {name} is not in the local cache and the Hub cannot be reached.") from error
    except EntryNotFoundError as error:
        raise BadInput(f"the Hub model {name} has no file {file}.") from error
    except (OSError, HTTPError) as error:
        raise Failure(f"{file} of {name} could not be downloaded; run the command again to resume.") from error


def fetch_header(model: HubModel, file: str) -> tuple[bytes, int]:
    """Read the header of a safetensors file on the Hub, without its weights.

    Args:
        model: The Hub model.
        file: Name of the file.

    Returns:
        The length word and the header as bytes, and the file's size in bytes.

    Raises:
        BadInput: If the file is not there.
        Failure: If the Hub cannot be read.
    """
    from huggingface_hub import HfFileSystem
    from huggingface_hub.errors import HTTPError

    from rotate_edit.models.safetensors_file import LARGEST_HEADER

    entry = model.files.get(file)
    if entry is None or entry.size is None:
        raise BadInput(f"the Hub model {model.name} has no file {quoted(file)}.")
    path = f"{model.name}@{model.revision}/{file}"
    try:
        system = HfFileSystem()
        length = system.cat_file(path, start=0, end=8)
        count = int.from_bytes(length, "little")
        if count > min(LARGEST_HEADER, entry.size - 8):
            return length, entry.size
        return length + system.cat_file(path, start=8, end=8 + count), entry.size
    except (OSError, HTTPError) as error:
        raise Failure(f"the header of {file} of {model.name} could not be read from the Hub.") from error


def fetch_all(model: HubModel, files: Iterable[str]) -> None:
    """Download the files that are missing from the snapshot folder, several at a time.

    Args:
        model: The Hub model.
        files: Names of the files.

    Raises:
        BadInput: If the model has no such file.
        Failure: If a download fails.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HTTPError

    missing = [file for file in files if not is_here(model, file)]
    if not missing:
        return
    absent = [file for file in missing if file not in model.files]
    if absent:
        raise BadInput(f"the Hub model {model.name} has no file {quoted(absent[0])}.")
    try:
        snapshot_download(model.name, revision=model.revision, allow_patterns=missing)
    except (OSError, HTTPError) as error:
        raise Failure(f"{model.name} could not be downloaded; run the command again to resume.") from error


def publish(
    name: str, files: Mapping[str, Path], *, message: str, private: bool = False, overwrite: bool = False
) -> str:
    """Commit files to a model repository on the Hub, which is made if it is not there.

    Args:
        name: The Hub id of the repository.
        files: Local paths by the files' names in the repository.
        message: The commit message.
        private: Whether a new repository is private.
        overwrite: Whether the repository may hold files already.

    Returns:
        The commit.

    Raises:
        BadInput: If no token may write there, or the repository holds files already and `overwrite` is False.
        Failure: If the Hub cannot be reached or fails.
    """
    from huggingface_hub import CommitOperationAdd, HfApi, get_token
    from huggingface_hub.errors import HfHubHTTPError, HTTPError, OfflineModeIsEnabled

    if get_token() is None:
        raise BadInput("publishing needs a token; log in with `hf auth login`.")
    api = HfApi()
    try:
        api.create_repo(name, private=private, exist_ok=True)
        there = [file for file in api.list_repo_files(name) if file != ".gitattributes"]
        if there and not overwrite:
            raise BadInput(f"the Hub model {name} has files already; name another one or pass --overwrite.")
        operations = [CommitOperationAdd(path_in_repo=file, path_or_fileobj=path) for file, path in files.items()]
        return str(api.create_commit(name, operations, commit_message=message).oid)
    except HfHubHTTPError as error:
        if error.response.status_code in (401, 403):
            raise BadInput(
                f"the Hub does not let this token write to {name}; log in with `hf auth login` as somebody who may."
            ) from error
        raise Failure(f"publishing {name} failed: the Hub answered {error.response.status_code}.") from error
    except (OSError, HTTPError, OfflineModeIsEnabled) as error:
        raise Failure(f"publishing {name} failed, because the Hub cannot be reached.") from error
