"""Open a checkpoint folder or a Hub model and read single tensors, matrices and rows.

No model is built for this.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rotate_edit.errors import BadInput, quoted
from rotate_edit.files import file_inside, read_json
from rotate_edit.models import hub
from rotate_edit.models.architectures import (
    NEURON_MATRICES,
    PUBLISHED_SWITCHES,
    Architecture,
    Place,
    architecture_of,
    locate,
)
from rotate_edit.models.companions import CHAT_TEMPLATES, EDIT_RECORD, INDEX, TOKENIZER_FILES, WEIGHTS, may_be_copied
from rotate_edit.models.hub import HubModel
from rotate_edit.models.layout import expert_slice, matrix_shape, neuron_rows
from rotate_edit.models.safetensors_file import (
    EDITABLE,
    Header,
    Stored,
    parse_header,
    read_bytes,
    read_header,
    read_stored,
    read_stored_rows,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MOST_LAYERS = 10_000
SMALL = 1 << 30


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint on disk: every header is read and checked, and no weight is read.

    Attributes:
        folder: Folder of its files.
        source: A name safe to print: "demo", the Hub id, or the folder's own name.
        config: Content of `config.json`.
        architecture: Its row of the table of model families.
        stored: Where every tensor lies, by its name.
        headers: SHA-256 of each shard's header, by the shard's name.
        revision: The Hub commit; None for a folder.
        hub: The Hub model; None for a folder.
        record: What an earlier edit by this package left in the folder (see `rotate_edit.edits.writing.patch`); None if
            there was none.
    """

    folder: Path
    source: str
    config: dict[str, Any]
    architecture: Architecture
    stored: dict[str, Stored]
    headers: dict[str, str]
    revision: str | None = None
    hub: HubModel | None = None
    record: dict[str, Any] | None = None

    @property
    def text_config(self) -> dict[str, Any]:
        """The language model's part of the config: all of it, unless the model is multimodal."""
        key = self.architecture.text_config
        return self.config if key is None else self.config[key]

    @property
    def size(self) -> int:
        """Size of all its tensors in bytes."""
        return sum(stored.end - stored.start for stored in self.stored.values())

    @property
    def layers(self) -> int:
        """Number of transformer blocks."""
        return int(self.text_config[self.architecture.layers_key])

    @property
    def hidden_size(self) -> int:
        """The width d_model of the residual stream."""
        projection = self._projection(self.architecture.embedding_projection)
        if projection is not None:
            return self.stored[projection].shape[0]
        return self.stored[self.place("embedding").name].shape[1]

    @property
    def vocabulary_size(self) -> int:
        """Number of rows of the embedding table, often a few more than the tokenizer has tokens."""
        return self.stored[self.place("embedding").name].shape[0]

    @cached_property
    def tied(self) -> bool:
        """Whether the head is the embedding table itself."""
        says = self.config.get("tie_word_embeddings", self.text_config.get("tie_word_embeddings"))
        tied = self.architecture.tied_by_default if says is None else bool(says)
        head = locate(self.architecture, self.stored, "unembedding")
        if head is None:
            return True
        # transformers ties only tables that are equal when a file holds both.
        return tied and read_equal(self, head.name, self.place("embedding").name)

    @property
    def published_switch(self) -> int | None:
        """The first layer that a study of this very model projects with the unembedding.

        It is None if there is no study. It is 0 for a tied head, whose two tables are one.
        """
        if self.tied:
            return 0
        return next((row.layer for row in PUBLISHED_SWITCHES if row.describes(self.text_config)), None)

    @property
    def matrices(self) -> tuple[str, ...]:
        """Which of "gate", "in" and "out" its neurons have."""
        expert = None if self.experts_in(0) is None else 0
        return tuple(name for name in NEURON_MATRICES if self._find(name, 0, expert) is not None)

    @property
    def experts(self) -> int | None:
        """Number of experts in a mixture-of-experts layer; None in a dense model."""
        counts = [count for count in map(self.experts_in, range(self.layers)) if count is not None]
        return max(counts, default=None)

    @property
    def neurons(self) -> int:
        """Number of neurons in one layer or one expert; the largest number if layers differ."""
        return max(self.neurons_in(layer) for layer in range(self.layers))

    def experts_in(self, layer: int) -> int | None:
        """Count the experts of a layer.

        Args:
            layer: Index of the layer.

        Returns:
            The number of experts; None if the layer is dense.
        """
        if not self.architecture.experts or self._find("out", layer, None) is not None:
            return None
        return next(int(self.text_config[key]) for key in self.architecture.experts_keys if key in self.text_config)

    def neurons_in(self, layer: int) -> int:
        """Count the neurons of a layer, or of each of its experts.

        Args:
            layer: Index of the layer.

        Returns:
            The number of neurons.

        Raises:
            BadInput: If the model has no such layer.
        """
        place = self.place("out", layer, None if self.experts_in(layer) is None else 0)
        return matrix_shape(self.stored[place.name], place)[0]

    def has(self, matrix: str, layer: int | None = None, expert: int | None = None) -> bool:
        """Tell whether the files hold a matrix of their own; a tied head is not one.

        Args:
            matrix: A name as in `architectures.locate`.
            layer: Index of the layer; None for the tables.
            expert: Index of the expert; None in a dense layer.

        Returns:
            True if the files hold it.
        """
        return self._find(matrix, layer, expert) is not None

    def has_file(self, file: str) -> bool:
        """Tell whether the folder or the Hub model has a file.

        Args:
            file: Name of the file.

        Returns:
            True if it is there.
        """
        return file in self.hub.files if self.hub else (self.folder / file).is_file()

    def place(self, matrix: str, layer: int | None = None, expert: int | None = None) -> Place:
        """Find where a matrix lies in the files.

        Args:
            matrix: A name as in `architectures.locate`. "unembedding" gives the embedding when the head is tied.
            layer: Index of the layer; None for the tables.
            expert: Index of the expert; None in a dense layer.

        Returns:
            The place with the tensor's full name.

        Raises:
            BadInput: If the model has no such matrix, layer or expert.
        """
        if layer is not None and not 0 <= layer < self.layers:
            raise BadInput(f"{self.source} has no layer {layer}; its layers are 0 to {self.layers - 1}.")
        experts = None if layer is None or matrix not in NEURON_MATRICES else self.experts_in(layer)
        if experts is not None and (expert is None or not 0 <= expert < experts):
            raise BadInput(
                f"layer {layer} of {self.source} has experts 0 to {experts - 1}, so expert {expert} is none."
            )
        if experts is None and expert is not None:
            raise BadInput(f"layer {layer} of {self.source} is dense, so it has no expert {expert}.")
        place = self._find(matrix, layer, expert)
        if place is None and matrix == "unembedding":
            return self.place("embedding")
        if place is None:
            where = "" if layer is None else f" in layer {layer}"
            raise BadInput(f'{self.source} ({self.architecture.family}) has no matrix "{matrix}"{where}.')
        return place

    @property
    def edits(self) -> list[dict[str, Any]]:
        """Records of the edits that this package has already written into it, oldest first.

        Raises:
            BadInput: If the folder's record is not a record of edits.
        """
        edits = [] if self.record is None else self.record.get("edits")
        if not isinstance(edits, list) or not all(
            isinstance(edit, dict) and isinstance(edit.get("edit"), str) and isinstance(edit.get("tensors"), dict)
            for edit in edits
        ):
            raise BadInput(f"{EDIT_RECORD} of {self.source} is not a record of edits; remove it to take it as a base.")
        return edits

    def path(self, file: str) -> Path:
        """Return the path of one of its files, and fetch it from the Hub when it is not there yet.

        Args:
            file: Name of the file.

        Returns:
            The file's path.

        Raises:
            BadInput: If the Hub model has no such file, or the name leads out of the folder.
            Failure: If the download fails.
        """
        if self.hub is not None:
            hub.fetch(self.hub, file)
        folder, template = self.folder, file.removeprefix(f"{CHAT_TEMPLATES}/")
        if template != file:
            # Of all subfolders this one alone is looked into.
            folder = file_inside(folder, CHAT_TEMPLATES)
        return file_inside(folder, template)

    def _find(self, matrix: str, layer: int | None, expert: int | None) -> Place | None:
        return locate(self.architecture, self.stored, matrix, layer, expert)

    def _projection(self, name: str | None) -> str | None:
        full = None if name is None else self.place("embedding").name.replace(self.architecture.embedding, name)
        return full if full in self.stored else None


def open_checkpoint(model: str | Path, revision: str | None = None) -> Checkpoint:
    """Open a checkpoint without reading its weights.

    Only config, index and headers are read. From the Hub only they are fetched.

    Args:
        model: "demo" (the bundled model), a folder, a Hub id, or a GGUF file. That is written out once, into the cache
            folder.
        revision: Branch, tag or commit of a Hub model; None for its main branch.

    Returns:
        The opened checkpoint.

    Raises:
        BadInput: If the folder is missing, the weights are pickled, the model is unsupported or quantised, or a file is
            damaged. The message is one sentence.
        Failure: If the Hub cannot be read.
    """
    found: HubModel | None = None
    model = os.path.expanduser(model)
    if model == "demo":
        from rotate_edit.models.demo import demo_model_folder

        folder, source = Path(demo_model_folder()), "demo"
    elif model and Path(model).is_dir():
        folder, source = Path(model), Path(model).resolve().name
        if not (folder / "config.json").exists() and (folder / "model" / "config.json").is_file():
            raise BadInput(f'"{model}" is a run folder; its checkpoint is "{folder / "model"}".')
    elif model.lower().endswith(".gguf"):
        from rotate_edit.models.gguf import imported_folder

        folder, source = imported_folder(Path(model)), Path(model).name
    elif hub.looks_like_hub_id(model):
        found = hub.find_model(model, revision)
        folder, source = found.folder, found.name
    else:
        raise BadInput(
            f'the model "{model}" is neither a folder nor a Hub id such as openai-community/gpt2, nor a .gguf file.'
        )
    if revision is not None and found is None:
        raise BadInput(f'a revision was given, but "{source}" lies here and is not a Hub id.')
    names = set(found.files) if found else {entry.name for entry in folder.iterdir() if entry.is_file()}
    _refuse_without_weights(names, source)
    config = _read_json(folder, "config.json", found)
    architecture = architecture_of(config)
    stored, headers = _read_headers(folder, names, found)
    record = _read_json(folder, EDIT_RECORD, found) if EDIT_RECORD in names else None
    revision = found.revision if found else None
    checkpoint = Checkpoint(folder, source, config, architecture, stored, headers, revision, found, record)
    _check(checkpoint)
    return checkpoint


def _refuse_without_weights(names: set[str], source: str) -> None:
    if "adapter_config.json" in names:
        raise BadInput(f"{source} holds a PEFT adapter; merge it into its base model first.")
    if "config.json" not in names and any(name.lower().endswith(".gguf") for name in names):
        raise BadInput(f"{source} holds GGUF files; name the .gguf file itself, on this disk, as the model.")
    if "config.json" not in names:
        raise BadInput(f"{source} has no config.json, so it is not a checkpoint in the Hugging Face layout.")
    if WEIGHTS in names or INDEX in names:
        return
    pickled = sorted(name for name in names if name.endswith((".bin", ".pt", ".pth", ".pkl", ".ckpt")))
    if pickled:
        raise BadInput(
            f"{source} has only pickled weights ({pickled[0]}), which are never opened; save it again with "
            "save_pretrained, which writes safetensors."
        )
    raise BadInput(f"{source} has neither {WEIGHTS} nor {INDEX}.")


def _read_json(folder: Path, file: str, found: HubModel | None) -> dict[str, Any]:
    if found is not None:
        hub.fetch(found, file)
    return read_json(folder, file)


def _read_headers(folder: Path, names: set[str], found: HubModel | None) -> tuple[dict[str, Stored], dict[str, str]]:
    """Where every tensor lies, and the SHA-256 of each shard's header."""
    # transformers takes the single file when there are both, so the index counts only without it.
    index = {} if WEIGHTS in names else _read_json(folder, INDEX, found).get("weight_map")
    if not isinstance(index, dict) or not all(isinstance(file, str) for file in index.values()):
        raise BadInput(f"{INDEX} has no weight_map that names a shard for each tensor.")
    stored: dict[str, Stored] = {}
    headers: dict[str, str] = {}
    for file in [WEIGHTS] if WEIGHTS in names else sorted(set(index.values())):
        if not file.endswith(".safetensors"):
            raise BadInput(f"{INDEX} names {quoted(file)}, which is not a safetensors file.")
        header = _header(folder, file, found)
        headers[file] = hashlib.sha256(header.raw).hexdigest()
        for name, tensor in header.tensors.items():
            if name in stored:
                raise BadInput(f'the tensor "{name}" stands in {stored[name].file} and in {file}; one must go.')
            stored[name] = tensor
    for name, file in index.items():
        if name not in stored or stored[name].file != file:
            raise BadInput(f"{INDEX} says that {quoted(name)} is in {quoted(file)}, but it is not there.")
    return stored, headers


def _header(folder: Path, file: str, found: HubModel | None) -> Header:
    if found is not None and not hub.is_here(found, file):
        raw, size = hub.fetch_header(found, file)
        return parse_header(raw, size, file)
    path = file_inside(folder, file)
    if not path.is_file():
        raise BadInput(f"the shard {file} is missing from {folder.name}.")
    return read_header(path, file)


def _check(checkpoint: Checkpoint) -> None:
    """Refuse a checkpoint whose matrices are not where or what its family's row says. Raises BadInput."""
    architecture = checkpoint.architecture
    key = architecture.text_config
    if key is not None and not isinstance(checkpoint.config.get(key), dict):
        raise BadInput(f'config.json has no "{key}", which a {architecture.model_type} model has.')
    config = checkpoint.text_config
    _check_tables(checkpoint)
    for keys in ((architecture.layers_key,), architecture.experts_keys):
        key = next((key for key in keys if key in config), keys[0] if keys else "")
        number = config.get(key) if keys else 1
        if type(number) is not int or not 0 < number <= MOST_LAYERS:
            raise BadInput(f"config.json has {key} = {json.dumps(number)[:40]}, which is not a possible number.")
    width = checkpoint.hidden_size
    for layer in range(checkpoint.layers):
        experts = checkpoint.experts_in(layer)
        for expert in [None] if experts is None else range(experts):
            neurons = set()
            for matrix in {*NEURON_MATRICES} & {*_matrices_of(architecture, expert)}:
                place = checkpoint.place(matrix, layer, expert)
                stored = checkpoint.stored[place.name]
                if stored.dtype not in EDITABLE:
                    raise BadInput(
                        f"{place.name} is stored as {stored.dtype}; only {', '.join(EDITABLE)} can be edited."
                    )
                if place.stacked and (len(stored.shape) != 3 or stored.shape[0] != experts):
                    raise BadInput(f"{place.name} has shape {list(stored.shape)}, which is not one matrix an expert.")
                count, columns = matrix_shape(stored, place)
                neurons.add(count)
                if columns != width:
                    raise BadInput(f"{place.name} has vectors of length {columns}, but the model's width is {width}.")
            if len(neurons) != 1:
                raise BadInput(
                    f"the MLP matrices of layer {layer} of {checkpoint.source} differ in their number of neurons."
                )
    _check_layers(checkpoint)


def _check_tables(checkpoint: Checkpoint) -> None:
    """Refuse tables that do not fit the config, on which loading would go on with random weights. Raises BadInput."""
    architecture = checkpoint.architecture
    says = checkpoint.config.get("tie_word_embeddings", checkpoint.text_config.get("tie_word_embeddings"))
    tied = architecture.tied_by_default if says is None else bool(says)
    if not tied and locate(architecture, checkpoint.stored, "unembedding") is None:
        raise BadInput(
            f"{checkpoint.source} has no output head ({' or '.join(architecture.heads)}), and its config.json does not "
            "say that the embedding is the head; add the tensor, or set tie_word_embeddings to true."
        )
    rows, known = checkpoint.vocabulary_size, checkpoint.text_config.get("vocab_size")
    if type(known) is int and known != rows:
        name = checkpoint.place("embedding").name
        raise BadInput(
            f"{name} of {checkpoint.source} has {rows} rows, but config.json says vocab_size = {known}; one of them is "
            "of another model."
        )


def _check_layers(checkpoint: Checkpoint) -> None:
    """Refuse a dense model one of whose layers lacks a tensor that all others have. Raises BadInput."""
    if checkpoint.architecture.experts:
        return
    by_layer: dict[int, set[str]] = {}
    for name in checkpoint.stored:
        found = re.search(r"\.(\d+)\.", name)
        if found:
            by_layer.setdefault(int(found[1]), set()).add(name[: found.start()] + ".{}." + name[found.end() :])
    layers = [by_layer.get(layer, set()) for layer in range(checkpoint.layers)]
    for layer, names in enumerate(layers):
        missing = [name for name in sorted(set().union(*layers) - names) if _in_most(name, layers)]
        if missing:
            raise BadInput(
                f"{checkpoint.source} lacks {missing[0].format(layer)}, which its other layers have; loading would put "
                "random numbers in its place."
            )


def _in_most(name: str, layers: list[set[str]]) -> bool:
    return 2 * sum(name in names for names in layers) > len(layers)


def _matrices_of(architecture: Architecture, expert: int | None) -> Iterable[str]:
    return architecture.dense if expert is None else architecture.experts[0]


def read_tensor(checkpoint: Checkpoint, name: str) -> Tensor:
    """Read a whole tensor.

    Args:
        checkpoint: The opened checkpoint.
        name: Full name of the tensor.

    Returns:
        The tensor in its stored dtype and shape.

    Raises:
        BadInput: If there is no tensor of this name, or it cannot be read.
    """
    stored = _named(checkpoint, name)
    return _finite(read_stored(checkpoint.path(stored.file), stored), name, checkpoint)


def _finite(values: Tensor, name: str, checkpoint: Checkpoint) -> Tensor:
    """The values, if every one of them is a number. Raises BadInput that names the tensor."""
    if values.is_floating_point() and not bool(torch.isfinite(values).all()):
        raise BadInput(f"{name} of {checkpoint.source} holds a number that is not finite, so it cannot be edited.")
    return values


def read_rows(checkpoint: Checkpoint, name: str, rows: Tensor) -> Tensor:
    """Read some rows of a tensor; the others are not read.

    Args:
        checkpoint: The opened checkpoint.
        name: Full name of the tensor.
        rows: Indices of the rows, int64 [n].

    Returns:
        The rows [n, ...] in the stored dtype.

    Raises:
        BadInput: If there is no such tensor or row, or it cannot be read.
    """
    stored = _named(checkpoint, name)
    return read_stored_rows(checkpoint.path(stored.file), stored, rows)


def _named(checkpoint: Checkpoint, name: str) -> Stored:
    if name not in checkpoint.stored:
        raise BadInput(f'{checkpoint.source} has no tensor "{name}".')
    return checkpoint.stored[name]


def read_matrix(
    checkpoint: Checkpoint, layer: int, matrix: str, expert: int | None = None, neurons: Tensor | None = None
) -> Tensor:
    """Read neuron vectors as rows.

    Args:
        checkpoint: The opened checkpoint.
        layer: Index of the layer.
        matrix: "gate", "in", "out" or "attention_out" (a row is what one channel of the heads writes).
        expert: Index of the expert; None in a dense layer.
        neurons: Indices of the wanted neurons, int64 [n]; None for all.

    Returns:
        The vectors, float32 [n, d_model].

    Raises:
        BadInput: If the model does not have the layer, expert, matrix or neuron.
    """
    return read_place(checkpoint, checkpoint.place(matrix, layer, expert), expert, neurons).float().contiguous()


def read_place(checkpoint: Checkpoint, place: Place, expert: int | None, neurons: Tensor | None = None) -> Tensor:
    """Read neuron vectors as rows from a matrix whose place is known.

    Args:
        checkpoint: The opened checkpoint.
        place: Where the matrix lies.
        expert: Index of the expert; None in a dense layer.
        neurons: Indices of the wanted neurons, int64 [n]; None for all.

    Returns:
        The vectors [n, d_model] in the stored dtype.

    Raises:
        BadInput: If there is no such tensor or neuron, or it cannot be read.
    """
    whole = _named(checkpoint, place.name)
    count, width = matrix_shape(whole, place)
    if neurons is not None and len(neurons) and not (int(neurons.min()) >= 0 and int(neurons.max()) < count):
        raise BadInput(f"{place.name} of {checkpoint.source} has neurons 0 to {count - 1} only.")
    stored = expert_slice(whole, place, expert)
    path = checkpoint.path(stored.file)
    if neurons is not None and place.neurons == "rows":
        matrix = replace(stored, shape=(count * place.parts, width))
        return _finite(read_stored_rows(path, matrix, neurons + place.part * count), place.name, checkpoint)
    rows = neuron_rows(read_stored(path, stored), replace(place, stacked=False))
    return _finite(rows if neurons is None else rows[neurons], place.name, checkpoint)


def read_embedding(checkpoint: Checkpoint) -> Tensor:
    """Read the input embedding as it enters the residual stream, apart from its scale.

    Args:
        checkpoint: The opened checkpoint.

    Returns:
        The table, float32 [vocabulary, d_model].

    Raises:
        BadInput: If the table cannot be read.
    """
    table = read_tensor(checkpoint, checkpoint.place("embedding").name).float()
    projection = checkpoint._projection(checkpoint.architecture.embedding_projection)
    return table if projection is None else table @ read_tensor(checkpoint, projection).float().T


def read_unembedding(checkpoint: Checkpoint) -> Tensor:
    """Read the unembedding; it is the embedding when the head is tied.

    Args:
        checkpoint: The opened checkpoint.

    Returns:
        The table, float32 [vocabulary, d_model]. Rows are tokens.

    Raises:
        BadInput: If the table cannot be read.
    """
    table = read_tensor(checkpoint, checkpoint.place("unembedding").name).float()
    projection = checkpoint._projection(checkpoint.architecture.head_projection)
    return table if projection is None else table @ read_tensor(checkpoint, projection).float()


def read_norm(checkpoint: Checkpoint, which: str | tuple[str, int]) -> Tensor | None:
    """Read the gain of a norm. Gemma's 1 is added.

    Args:
        checkpoint: The opened checkpoint.
        which: "final", ("mlp", layer) for the norm before the MLP, or ("after mlp", layer).

    Returns:
        The gain, float32 [d_model]; None if the model has no such norm.

    Raises:
        BadInput: If the gain cannot be read.
    """
    architecture = checkpoint.architecture
    kind, layer = (which, None) if isinstance(which, str) else which
    names = {
        "final": (architecture.final_norm,),
        "mlp": architecture.pre_mlp_norms,
        "after mlp": (architecture.post_mlp_norm,),
    }[kind]
    for name in names:
        full = checkpoint._projection(name and name.format(layer=layer))
        if full is not None:
            return read_tensor(checkpoint, full).float() + architecture.norm_offset
    return None


def read_equal(checkpoint: Checkpoint, first: str, second: str) -> bool:
    """Tell whether two tensors hold the same bytes.

    Args:
        checkpoint: The opened checkpoint.
        first: Full name of one tensor.
        second: Full name of the other.

    Returns:
        True if dtype, shape and bytes are the same.
    """
    left, right = checkpoint.stored[first], checkpoint.stored[second]
    if (left.dtype, left.shape) != (right.dtype, right.shape):
        return False
    return tensor_hash(checkpoint, first) == tensor_hash(checkpoint, second)


def tensor_hash(checkpoint: Checkpoint, name: str) -> str:
    """Hash a tensor's stored bytes.

    Args:
        checkpoint: The opened checkpoint.
        name: Full name of the tensor.

    Returns:
        The SHA-256 in hexadecimal.

    Raises:
        BadInput: If there is no such tensor, or it cannot be read.
    """
    stored = _named(checkpoint, name)
    path = checkpoint.path(stored.file)
    digest = hashlib.sha256()
    for start in range(stored.start, stored.end, 1 << 24):
        digest.update(read_bytes(path, start, min(start + (1 << 24), stored.end)).numpy().data)
    return digest.hexdigest()


def identity(checkpoint: Checkpoint, tensors: Iterable[str] = (), full: bool | None = None) -> dict[str, Any]:
    """Describe what tells this checkpoint from any other.

    The keys are: source; revision (the Hub commit); hub (the Hub's own file hashes); files (SHA-256 of `config.json`
    and the tokenizer files); headers (SHA-256 of each shard's header); tensors (SHA-256 of tensors' bytes); edits (ids
    of the edits that this package has already written into it, oldest first).

    Args:
        checkpoint: The opened checkpoint.
        tensors: Names of the tensors to hash.
        full: Whether to hash every tensor. None hashes them all when they fill at most 1 GiB and the model is a
            folder.

    Returns:
        Plain JSON without paths or user names.

    Raises:
        BadInput: If a file or tensor cannot be read, or the folder's record is not a record of edits.
    """
    files = {}
    for file in ("config.json", *TOKENIZER_FILES):
        if checkpoint.has_file(file):
            files[file] = hashlib.sha256(checkpoint.path(file).read_bytes()).hexdigest()
    if full is None:
        full = checkpoint.hub is None and checkpoint.size <= SMALL
    names = sorted(checkpoint.stored) if full else sorted(set(tensors))
    return {
        "source": checkpoint.source,
        "revision": checkpoint.revision,
        "hub": {name: entry.sha256 for name, entry in sorted(checkpoint.hub.files.items()) if entry.sha256}
        if checkpoint.hub
        else {},
        "files": files,
        "headers": dict(checkpoint.headers),
        "tensors": {name: tensor_hash(checkpoint, name) for name in names},
        "edits": [entry["edit"] for entry in checkpoint.edits],
    }


def companions(checkpoint: Checkpoint) -> dict[str, bool]:
    """List the files beside the shards.

    Args:
        checkpoint: The opened checkpoint.

    Returns:
        For each file name, whether it may go into a patched checkpoint. An allow-list decides.
    """
    names = set(checkpoint.hub.files) if checkpoint.hub else _file_names(checkpoint.folder)
    return {name: may_be_copied(name) for name in sorted(names - set(checkpoint.headers) - {EDIT_RECORD})}


def _file_names(folder: Path) -> set[str]:
    """The names in a folder, with those in its folder of chat templates."""
    names = {entry.name for entry in folder.iterdir()}
    if CHAT_TEMPLATES in names:
        names.remove(CHAT_TEMPLATES)
        names |= {f"{CHAT_TEMPLATES}/{entry.name}" for entry in (folder / CHAT_TEMPLATES).iterdir()}
    return names


def complete(checkpoint: Checkpoint) -> Path:
    """Fetch everything that loading needs from the Hub where it is missing.

    Args:
        checkpoint: The opened checkpoint.

    Returns:
        The complete folder.

    Raises:
        BadInput: If the Hub model lacks a file.
        Failure: If a download fails.
    """
    if checkpoint.hub is not None:
        allowed = [name for name, may in companions(checkpoint).items() if may]
        hub.fetch_all(checkpoint.hub, [*checkpoint.headers, *allowed])
    return checkpoint.folder


def load_model(
    model: Checkpoint | str | Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> "PreTrainedModel":
    """Load a checkpoint as a transformers model in evaluation mode.

    Only safetensors files are read, and no remote code runs.

    Args:
        model: An opened checkpoint, or what `open_checkpoint` takes.
        device: Device of the model.
        dtype: Dtype of the parameters.

    Returns:
        The loaded model.

    Raises:
        BadInput: If the checkpoint cannot be opened.
        Failure: If a download fails.
    """
    from transformers import AutoModelForCausalLM

    from rotate_edit.console import without_foreign_bars

    checkpoint = model if isinstance(model, Checkpoint) else open_checkpoint(model)
    read: Any = AutoModelForCausalLM.from_pretrained
    with without_foreign_bars():
        loaded, told = read(
            complete(checkpoint),
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=True,
        )
    _check_loaded(checkpoint, loaded, told)
    torch.nn.Module.to(loaded, device)
    return loaded.eval()


def _check_loaded(checkpoint: Checkpoint, loaded: Any, told: Mapping[str, Any]) -> None:
    """Refuse a model that was not loaded whole, or that holds numbers that are none. Raises BadInput."""
    missing = sorted(map(str, told.get("missing_keys") or ()))
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise BadInput(
            f"{checkpoint.source} does not hold {missing[0]}{more}; loading would put random numbers in their place."
        )
    for name, parameter in loaded.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            raise BadInput(f"{name} of {checkpoint.source} holds a number that is not finite.")


def load_tokenizer(model: Checkpoint | str | Path) -> "PreTrainedTokenizerBase":
    """Load the tokenizer of a checkpoint, without remote code.

    Args:
        model: An opened checkpoint, or what `open_checkpoint` takes.

    Returns:
        The tokenizer.

    Raises:
        BadInput: If the checkpoint has no tokenizer that works.
        Failure: If a download fails.
    """
    from transformers import AutoTokenizer

    checkpoint = model if isinstance(model, Checkpoint) else open_checkpoint(model)
    for file in (*TOKENIZER_FILES, "chat_template.jinja"):
        if checkpoint.hub is not None and file in checkpoint.hub.files:
            hub.fetch(checkpoint.hub, file)
    try:
        tokenizer = AutoTokenizer.from_pretrained(checkpoint.folder, trust_remote_code=False, local_files_only=True)
    except (ValueError, OSError, KeyError, TypeError, AttributeError) as error:
        found = any(checkpoint.has_file(file) for file in TOKENIZER_FILES)
        state = "a tokenizer that cannot be read" if found else "no tokenizer files"
        raise BadInput(
            f"{checkpoint.source} has {state}; put tokenizer.json and tokenizer_config.json of its model into it."
        ) from error
    _check_tokenizer(checkpoint, tokenizer)
    return tokenizer


def _check_tokenizer(checkpoint: Checkpoint, tokenizer: "PreTrainedTokenizerBase") -> None:
    """Refuse a tokenizer with tokens beyond the table. Added ones may be: no text holds them. Raises BadInput."""
    added = set(tokenizer.get_added_vocab())
    beyond = [
        piece
        for piece, index in tokenizer.get_vocab().items()
        if index >= checkpoint.vocabulary_size and piece not in added
    ]
    if beyond:
        raise BadInput(
            f"the tokenizer of {checkpoint.source} has {len(beyond)} tokens beyond the {checkpoint.vocabulary_size} "
            f"rows of the embedding, such as {quoted(beyond[0])}; it belongs to another model."
        )
