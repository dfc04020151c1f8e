"""Vocabulary channels: what is stored of each and how a set of them is written, read and searched.

A channel set is a folder that is useful without this package: `channels.parquet` (one row a channel; `datasets` opens
it), `vectors.safetensors` (optional; its row is the channel's `row`) and `channels.json` (what it was made from,
how, and the size and SHA-256 of the other two).
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rotate_edit.errors import BadInput
from rotate_edit.files import whole_folder
from rotate_edit.models.architectures import Neuron, parse_neuron
from rotate_edit.models.safetensors_file import read_header, read_stored_rows

if TYPE_CHECKING:
    import numpy
    import pyarrow.parquet

FORMAT = "rotate_edit channel set"
VERSION = 1
MANIFEST = "channels.json"
TABLE = "channels.parquet"
VECTORS = "vectors.safetensors"
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
FIGURES = ("kurtosis", "skewness", "cosine", "loss", "support")
ROW_GROUP = 1 << 17
LARGEST_MANIFEST = 50_000_000


@dataclass(frozen=True)
class Channel:
    """One vocabulary channel of one neuron vector.

    layer, expert (None in dense layers), neuron: which neuron; matrix: "gate", "in" or "out"; index: 0 for the
    first channel found; sign: +1 or -1, the tail of the projection on which the tokens stand; token_ids: the
    strongest tokens on that side, strongest first; tokens: the same as text; z_scores: their z-scores in the
    channel's own projection (sign included); kurtosis (excess), skewness: of the unweighted projection; cosine:
    with the neuron's vector; loss: the objective reached; support: mean z-score, in the neuron's own projection
    and times `sign`, of the strongest tokens; claimed: how many tokens it took from later channels; vector:
    float32 [d_model] with the neuron's norm, or None when the set was written without vectors.
    """

    layer: int
    expert: int | None
    neuron: int
    matrix: str
    index: int
    sign: int
    token_ids: tuple[int, ...]
    tokens: tuple[str, ...]
    z_scores: tuple[float, ...]
    kurtosis: float
    skewness: float
    cosine: float
    loss: float
    support: float
    claimed: int
    vector: Tensor | None = None

    @property
    def name(self) -> str:
        """For instance "L3.N12.out#0", or "L10.E3.N123.gate#1" in a mixture of experts."""
        expert = "" if self.expert is None else f"E{self.expert}."
        return f"L{self.layer}.{expert}N{self.neuron}.{self.matrix}#{self.index}"


@dataclass(frozen=True)
class ChannelSet:
    """A channel set on disk, its manifest read and its files' sizes, columns and counts checked.

    folder: where it lies; base: identity of the checkpoint it was made from; settings: how it was made (solver,
    projection, token weights), plain JSON; channels: how many rows; hidden_size: d_model; vectors: "bfloat16",
    "float32", or None when only the table was written; files: size in bytes and SHA-256 of each file.
    """

    folder: Path
    base: dict
    settings: dict
    channels: int
    hidden_size: int
    vectors: str | None
    files: dict[str, dict]


def channel_size(channels: int, hidden_size: int, vectors: str | None = "bfloat16", top: int = 10) -> int:
    """About how many bytes one neuron vector takes in a channel set: `channels` rows and, if kept, their vectors.

    The vectors are exact (2 or 4 bytes a component). A row of the table takes about 25 bytes and 5 to 8 for each of its
    `top` tokens (id, text and z-score, compressed), more the larger the vocabulary; 71 and 77 bytes were measured
    on models with 512 and 8,192 tokens.
    """
    width = {None: 0, "bfloat16": 2, "float32": 4}[vectors]
    return channels * (25 + 6 * top + width * hidden_size)


def channel_schema() -> "pyarrow.Schema":
    """The columns of channels.parquet; `row` is the row of vectors.safetensors, the others are those of Channel."""
    import pyarrow

    whole, real, text = pyarrow.int32(), pyarrow.float32(), pyarrow.string()
    lists = [("token_ids", pyarrow.list_(whole)), ("tokens", pyarrow.list_(text)), ("z_scores", pyarrow.list_(real))]
    return pyarrow.schema(
        [
            pyarrow.field("row", pyarrow.int64()),
            *(pyarrow.field(name, whole) for name in ("layer", "expert", "neuron")),
            pyarrow.field("matrix", text),
            *(pyarrow.field(name, whole) for name in ("index", "sign")),
            *(pyarrow.field(name, kind) for name, kind in lists),
            *(pyarrow.field(name, real) for name in ("kurtosis", "skewness", "cosine", "loss", "support")),
            pyarrow.field("claimed", whole),
        ]
    )


def save_channels(
    channels: Sequence[Channel],
    output: Path,
    *,
    base: dict,
    settings: dict,
    vectors: str | None = "float32",
    overwrite: bool = False,
) -> ChannelSet:
    """Write channels held in memory as a channel set, whole or not at all.

    vectors: the dtype to keep them in ("float32" or "bfloat16"), None to leave them out. Raises BadInput when `output`
    exists, and ValueError when vectors are wanted and some channel has none.
    """
    import pyarrow

    names = [name for name in channel_schema().names if name != "row"]
    table = pyarrow.Table.from_pylist(
        [{"row": row, **{name: getattr(channel, name) for name in names}} for row, channel in enumerate(channels)],
        schema=channel_schema(),
    )
    kept = [channel.vector for channel in channels if channel.vector is not None]
    if vectors is not None and len(kept) < len(channels):
        raise ValueError("some channels have no vector, so a set with vectors cannot be written from them")
    rows = torch.stack(kept) if kept and vectors is not None else torch.empty(0, 0)
    return write_channel_set(
        [(table, rows)], output, base=base, settings=settings, hidden_size=rows.shape[1], vectors=vectors,
        overwrite=overwrite,
    )  # fmt: skip


def write_channel_set(
    batches: "Iterable[tuple[pyarrow.Table, Tensor]]",
    output: Path,
    *,
    base: dict,
    settings: dict,
    hidden_size: int,
    vectors: str | None,
    overwrite: bool = False,
) -> ChannelSet:
    """Write a channel set from a stream of (rows of `channel_schema`, vectors [rows, d_model]), one batch at a time.

    The batches' `row` column must count on from 0. The vectors are ignored when `vectors` is None. The folder
    appears whole. Raises BadInput when `output` exists.
    """
    with whole_folder(output, overwrite=overwrite) as folder:
        count = _write_files(batches, folder, hidden_size, vectors)
        files = {name: _describe(folder / name) for name in ((TABLE,) if vectors is None else (TABLE, VECTORS))}
        manifest = {
            "format": FORMAT,
            "version": VERSION,
            "base": base,
            "settings": settings,
            "channels": count,
            "hidden_size": hidden_size,
            "vectors": vectors,
            "files": files,
        }
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    return ChannelSet(output, base, settings, count, hidden_size, vectors, files)


def _write_files(
    batches: "Iterable[tuple[pyarrow.Table, Tensor]]", folder: Path, hidden_size: int, vectors: str | None
) -> int:
    """Write the table and the vectors of a set as they come in and return how many rows there were."""
    import pyarrow.parquet

    listed = [f"{name}.list.element" for name in ("token_ids", "tokens")]
    options = {
        "compression": "zstd",
        "use_dictionary": ["layer", "expert", "matrix", "index", "sign", *listed],
        "column_encoding": dict.fromkeys([*FIGURES, "z_scores.list.element"], "BYTE_STREAM_SPLIT"),
        "dictionary_pagesize_limit": 1 << 24,
    }
    count = 0
    with ExitStack() as stack:
        writer = stack.enter_context(pyarrow.parquet.ParquetWriter(folder / TABLE, channel_schema(), **options))
        stream = stack.enter_context(open(folder / VECTORS, "wb")) if vectors is not None else None
        if stream is not None:
            stream.write(_vector_header(0, hidden_size, str(vectors)))
        # Each row group repeats the words that occur in it, so small batches are held back and written together.
        held = channel_schema().empty_table()
        for table, rows in batches:
            held = pyarrow.concat_tables([held, table])
            count += table.num_rows
            if held.num_rows >= ROW_GROUP:
                writer.write_table(held, row_group_size=ROW_GROUP)
                held = channel_schema().empty_table()
            if stream is not None:
                stream.write(as_bytes(rows.to(DTYPES[str(vectors)])))
        writer.write_table(held, row_group_size=ROW_GROUP)
        if stream is not None:
            # Only now is the number of rows known, and the header was written at its full length.
            stream.seek(0)
            stream.write(_vector_header(count, hidden_size, str(vectors)))
    return count


def open_channels(folder: Path) -> ChannelSet:
    """Read a channel set's manifest and check its files' sizes, columns and counts; nothing else is read.

    Raises BadInput, in one sentence, when something is missing, damaged or of another version.
    """
    manifest = _read_manifest(folder)
    found = ChannelSet(
        folder,
        *(manifest[key] for key in ("base", "settings", "channels", "hidden_size", "vectors", "files")),
    )
    for name, described in found.files.items():
        size = (folder / name).stat().st_size if (folder / name).is_file() else None
        if size != described["bytes"]:
            raise BadInput(f"{folder.name}/{name} is damaged: its size is not the one that {MANIFEST} states.")
    with _opened(found) as table:
        columns, rows = table.schema.to_arrow_schema().remove_metadata(), table.metadata.num_rows
        if columns != channel_schema() or rows != found.channels:
            raise BadInput(f"{folder.name}/{TABLE} does not have the columns and rows that {MANIFEST} states.")
    if found.vectors is not None:
        stored = read_header(folder / VECTORS).tensors.get("vectors")
        shape, dtype = (found.channels, found.hidden_size), DTYPES[found.vectors]
        if stored is None or stored.shape != shape or stored.torch_dtype != dtype:
            raise BadInput(f"{folder.name}/{VECTORS} does not hold the {shape[0]} vectors that {MANIFEST} states.")
    return found


def load_channels(folder: Path, *, vectors: bool = True) -> list[Channel]:
    """All channels of a set, in their order, after checking every file against its SHA-256.

    vectors: also read the vectors, when the set has them. Raises BadInput for a damaged set.
    """
    found = open_channels(folder)
    for name, described in found.files.items():
        if _describe(folder / name) != described:
            raise BadInput(f"{folder.name}/{name} is damaged: its content is not what {MANIFEST} states.")
    with _opened(found) as table:
        return _channels(found, table.read(), vectors)


def search(
    folder: Path,
    *,
    token: str | None = None,
    substring: bool = False,
    neuron: str | None = None,
    matrix: str | None = None,
    min_support: float | None = None,
    min_kurtosis: float | None = None,
    limit: int | None = 20,
    vectors: bool = False,
) -> list[Channel]:
    """The channels of a set that meet every condition given, at most `limit`; the table is read a part at a time.

    token: one of the channel's tokens is this text, or contains it when `substring`; upper case and the spaces
    around a token do not count. neuron: an address such as "L3.N12". Channels come in the set's order, or
    with the best supported first when a token is looked for. Raises BadInput for a damaged set or address.
    """
    found = open_channels(folder)
    wanted = None if neuron is None else parse_neuron(neuron)
    columns = ["layer", "expert", "neuron", "matrix", "support", "kurtosis"] + (["tokens"] if token is not None else [])
    hits: list[tuple[float, int, int]] = []
    with _opened(found) as table:
        for group in range(table.num_row_groups):
            rows = table.read_row_group(group, columns=columns)
            mask = _matches(rows, wanted, matrix, min_support, min_kurtosis)
            if token is not None:
                mask &= _holds_token(rows["tokens"], token, substring)
            places = mask.nonzero()[0]
            if token is None:
                hits += [(0.0, group, int(place)) for place in places]
            else:
                support = rows["support"].to_numpy()[places]
                hits += [(-float(strength), group, int(place)) for strength, place in zip(support, places)]
                hits.sort()
            del hits[limit if limit is not None else len(hits) :]
            if token is None and len(hits) == limit:
                break
        results: dict[tuple[int, int], Channel] = {}
        for group in sorted({group for _, group, _ in hits}):
            chosen = [place for _, other, place in hits if other == group]
            channels = _channels(found, table.read_row_group(group).take(chosen), vectors)
            results.update({(group, place): channel for place, channel in zip(chosen, channels)})
    return [results[group, place] for _, group, place in hits]


def as_bytes(values: Tensor) -> bytes:
    """A tensor's bytes, row by row, as safetensors stores them."""
    return values.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def _vector_header(count: int, hidden_size: int, vectors: str) -> bytes:
    """The head of a safetensors file of one tensor, of a length that does not depend on the count."""
    size = count * hidden_size * DTYPES[vectors].itemsize
    entry = {"dtype": {"bfloat16": "BF16", "float32": "F32"}[vectors], "shape": [count, hidden_size]}
    header = json.dumps({"vectors": {**entry, "data_offsets": [0, size]}}).encode().ljust(248)
    return len(header).to_bytes(8, "little") + header


def _describe(path: Path) -> dict:
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while content := stream.read(1 << 20):
            digest.update(content)
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}


def _read_manifest(folder: Path) -> dict:
    wrong = BadInput(f"{folder.name}/{MANIFEST} is not the manifest of a channel set of version {VERSION}.")
    path = folder / MANIFEST
    if not path.is_file():
        raise BadInput(f"{folder.name} is not a channel set: it has no {MANIFEST}.")
    if path.stat().st_size > LARGEST_MANIFEST:
        raise wrong
    try:
        manifest = json.loads(path.read_bytes().decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise wrong from error
    kinds = {"base": dict, "settings": dict, "channels": int, "hidden_size": int, "files": dict}
    if not isinstance(manifest, dict) or (manifest.get("format"), manifest.get("version")) != (FORMAT, VERSION):
        raise wrong
    if not all(type(manifest.get(key)) is kind for key, kind in kinds.items()):
        raise wrong
    if manifest.get("vectors") not in (None, *DTYPES) or manifest["channels"] < 0 or manifest["hidden_size"] < 0:
        raise wrong
    if set(manifest["files"]) != ({TABLE} if manifest["vectors"] is None else {TABLE, VECTORS}):
        raise wrong
    if not all(isinstance(entry, dict) and set(entry) == {"bytes", "sha256"} for entry in manifest["files"].values()):
        raise wrong
    return manifest


@contextmanager
def _opened(found: ChannelSet) -> "Iterator[pyarrow.parquet.ParquetFile]":
    """The table, opened; whatever Arrow finds wrong with it while it is read becomes one sentence."""
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(found.folder / TABLE, read_dictionary=["tokens.list.element"]) as table:
            yield table
    except (pyarrow.ArrowException, OSError) as error:
        raise BadInput(f"{found.folder.name}/{TABLE} is damaged and cannot be read as Parquet.") from error


def _matches(
    rows: "pyarrow.Table",
    neuron: Neuron | None,
    matrix: str | None,
    min_support: float | None,
    min_kurtosis: float | None,
) -> "numpy.ndarray":
    """Which rows meet the conditions on neuron, matrix and figures, bool [rows]; a missing figure meets none."""
    import numpy

    mask = numpy.ones(rows.num_rows, dtype=bool)
    if neuron is not None:
        expert = -1 if neuron.expert is None else neuron.expert
        for column, value in (("layer", neuron.layer), ("neuron", neuron.neuron), ("expert", expert)):
            mask &= rows[column].fill_null(-1).to_numpy() == value
    if matrix is not None:
        mask &= rows["matrix"].fill_null("").to_numpy() == matrix
    for column, least in (("support", min_support), ("kurtosis", min_kurtosis)):
        if least is not None:
            mask &= rows[column].fill_null(float("nan")).to_numpy().astype(numpy.float64) >= least
    return mask


def _holds_token(tokens: "pyarrow.ChunkedArray", token: str, substring: bool) -> "numpy.ndarray":
    """Which rows have the token among theirs, bool [rows]; compared over the dictionary, not over the rows."""
    import numpy
    import pyarrow

    column = tokens.combine_chunks()
    column = column.chunk(0) if isinstance(column, pyarrow.ChunkedArray) else column
    wanted = token.strip().casefold()
    texts = [(text or "").strip().casefold() for text in column.values.dictionary.to_pylist()]
    hits = numpy.array([wanted in text if substring else wanted == text for text in texts] or [False])
    members = hits[column.values.indices.fill_null(0).to_numpy()]
    ends = numpy.concatenate([[0], numpy.cumsum(members)])[column.offsets.to_numpy()]
    return numpy.diff(ends) > 0


def _channels(found: ChannelSet, table: "pyarrow.Table", vectors: bool) -> list[Channel]:
    """Arrow rows as channels, with their vectors read row by row from the file when wanted and there."""
    entries = table.to_pylist()
    path = found.folder / VECTORS
    damaged = BadInput(f"{found.folder.name}/{TABLE} holds a row that is no channel.")
    for entry in entries:
        sizes = {None if entry[key] is None else len(entry[key]) for key in ("token_ids", "tokens", "z_scores")}
        if len(sizes) > 1 or any(value is None for key, value in entry.items() if key != "expert"):
            raise damaged
        for key in ("token_ids", "tokens", "z_scores"):
            entry[key] = tuple(entry[key])
            if None in entry[key]:
                raise damaged
    rows = [entry.pop("row") for entry in entries]
    if not vectors or found.vectors is None or not rows:
        return [Channel(**entry) for entry in entries]
    stored = read_header(path).tensors["vectors"]
    kept = read_stored_rows(path, stored, torch.tensor(rows, dtype=torch.int64)).float()
    return [Channel(**entry, vector=vector) for entry, vector in zip(entries, kept)]
