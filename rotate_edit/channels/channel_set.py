"""Vocabulary channels: what is stored of each channel, and how a set of them is written, read and searched.

A channel set is a folder that is useful without this package. It holds up to three files. `channels.parquet` has one
row for each channel, and `datasets` opens it. `vectors.safetensors` is optional; its row is the channel's `row`.
`channels.json` says what the set was made from and how. It also has the size and SHA-256 of the other two files.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rotate_edit.errors import BadInput, quoted
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
TESTED = "p_value"
"""The column that sets of earlier versions do not have."""
ROW_GROUP = 1 << 17
LARGEST_MANIFEST = 50_000_000
# The number of the channel that a search finds from the first concept's first group; its groups count on, and every
# further concept begins with the next multiple.
ASKED = 1000


@dataclass(frozen=True)
class Channel:
    """One vocabulary channel of one neuron vector.

    Attributes:
        layer: Index of the layer.
        expert: Index of the expert; None in dense layers.
        neuron: Index of the neuron.
        matrix: "gate", "in" or "out".
        index: 0 for the first channel found, then 1, and so on.
        sign: +1 or -1: the side of the projection on which the tokens stand.
        token_ids: The strongest tokens on that side, strongest first.
        tokens: The same tokens as text.
        z_scores: Their z-scores in the channel's own projection, with their sign.
        kurtosis: Excess kurtosis of the unweighted projection.
        skewness: Skewness of the unweighted projection.
        cosine: Cosine with the neuron's vector.
        loss: The value of the objective that was reached.
        support: Mean z-score of the strongest tokens in the neuron's own projection, times `sign`.
        claimed: Number of tokens that this channel masked: they get a small weight in later searches.
        p_value: How probable a channel of the concept with so much support is in a candidate drawn at random. None
            where the channel was not tested for a concept.
        vector: The channel's vector with the neuron's norm, float32 [d_model]. None if the set was written without
            vectors.
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
    p_value: float | None = None
    vector: Tensor | None = None

    @property
    def name(self) -> str:
        """The channel's address, for instance "L3.N12.out#0", or "L10.E3.N123.gate#1" in a mixture of experts."""
        expert = "" if self.expert is None else f"E{self.expert}."
        return f"L{self.layer}.{expert}N{self.neuron}.{self.matrix}#{self.index}"


def parse_channel(text: str) -> tuple[Neuron, str, int]:
    """Read a channel's name from text.

    Args:
        text: A name such as "L3.N12.out#0" or "L10.E3.N123.gate#1". Spaces around it are ignored.

    Returns:
        The neuron, the matrix and the number of the channel.

    Raises:
        BadInput: If the text is not such a name.
    """
    found = re.fullmatch(r"(.+)\.(gate|in|out)#(\d{1,9})", text.strip(), flags=re.ASCII)
    if found is None:
        raise BadInput(f"{quoted(text)} is not the name of a channel; write it as L3.N12.out#0.")
    return parse_neuron(found[1]), found[2], int(found[3])


@dataclass(frozen=True)
class ChannelSet:
    """A channel set on disk. Its manifest is read, and the sizes, columns and counts of its files are checked.

    Attributes:
        folder: Folder of the set.
        base: Identity of the checkpoint from which it was made.
        settings: How it was made (solver, projection, token weights), as plain JSON.
        channels: Number of rows.
        hidden_size: The width d_model.
        vectors: Dtype of the vectors, "bfloat16" or "float32"; None if only the table was written.
        files: Size in bytes and SHA-256 of each file.
    """

    folder: Path
    base: dict[str, Any]
    settings: dict[str, Any]
    channels: int
    hidden_size: int
    vectors: str | None
    files: dict[str, dict[str, Any]]


def channel_size(channels: int, hidden_size: int, vectors: str | None = "bfloat16", top: int = 10) -> int:
    """Estimate how many bytes the channels of one neuron vector take in a channel set.

    The vectors are exact (2 or 4 bytes a component). A row of the table takes about 25 bytes, and 5 to 8 for each of
    its tokens (id, text and z-score, compressed). It takes more for a larger vocabulary. 71 and 77 bytes were measured
    on models with 512 and 8,192 tokens.

    Args:
        channels: Number of rows, that is channels of the neuron vector.
        hidden_size: The width d_model.
        vectors: Dtype of the vectors, "bfloat16" or "float32"; None if they are not kept.
        top: Number of tokens in a row.

    Returns:
        The number of bytes.
    """
    width = {None: 0, "bfloat16": 2, "float32": 4}[vectors]
    return channels * (25 + 6 * top + width * hidden_size)


def channel_schema() -> "pyarrow.Schema":
    """Return the columns of channels.parquet.

    `row` is the row of vectors.safetensors. The other columns are the fields of `Channel`. `expert` and `p_value` may
    be null.
    """
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
            pyarrow.field(TESTED, pyarrow.float64()),
        ]
    )


def save_channels(
    channels: Sequence[Channel],
    output: Path,
    *,
    base: dict[str, Any],
    settings: dict[str, Any],
    vectors: str | None = "float32",
    overwrite: bool = False,
) -> ChannelSet:
    """Write channels held in memory as a channel set, whole or not at all.

    Args:
        channels: The channels.
        output: Folder of the set.
        base: Identity of the checkpoint from which they were made.
        settings: How they were made, as plain JSON.
        vectors: Dtype in which vectors are kept, "float32" or "bfloat16"; None leaves them out.
        overwrite: Whether an existing output is replaced.

    Returns:
        The written set.

    Raises:
        BadInput: If `output` exists and `overwrite` is False.
        ValueError: If vectors are wanted and some channel has none.
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
    base: dict[str, Any],
    settings: dict[str, Any],
    hidden_size: int,
    vectors: str | None,
    overwrite: bool = False,
    row_group: int = ROW_GROUP,
) -> ChannelSet:
    """Write a channel set from a stream, one batch at a time.

    The folder appears whole.

    Args:
        batches: Pairs of rows of `channel_schema` and vectors [rows, d_model]. The `row` column must count on from 0.
            The vectors are ignored when `vectors` is None.
        output: Folder of the set.
        base: Identity of the checkpoint from which the channels were made.
        settings: How they were made, as plain JSON.
        hidden_size: The width d_model.
        vectors: Dtype in which vectors are kept, "float32" or "bfloat16"; None leaves them out.
        overwrite: Whether an existing output is replaced.
        row_group: Most rows of a row group of the table.

    Returns:
        The written set.

    Raises:
        BadInput: If `output` exists and `overwrite` is False.
    """
    with whole_folder(output, overwrite=overwrite) as folder:
        count = _write_files(batches, folder, hidden_size, vectors, row_group)
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
    batches: "Iterable[tuple[pyarrow.Table, Tensor]]",
    folder: Path,
    hidden_size: int,
    vectors: str | None,
    row_group: int,
) -> int:
    """Write the table and the vectors of a set as they come in, and return the number of rows."""
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
            if held.num_rows >= row_group:
                writer.write_table(held, row_group_size=row_group)
                held = channel_schema().empty_table()
            if stream is not None:
                stream.write(as_bytes(rows.to(DTYPES[str(vectors)])))
        writer.write_table(held, row_group_size=row_group)
        if stream is not None:
            # Only now is the number of rows known, and the header was written at its full length.
            stream.seek(0)
            stream.write(_vector_header(count, hidden_size, str(vectors)))
    return count


def open_channels(folder: Path) -> ChannelSet:
    """Open a channel set and check the sizes, columns and counts of its files.

    Only the manifest and the headers are read.

    Args:
        folder: Folder of the set.

    Returns:
        The opened set.

    Raises:
        BadInput: If something is missing, damaged or of another version. The message is one sentence.
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
        known = [field for field in channel_schema() if field.name != TESTED or TESTED in columns.names]
        if list(columns) != known or rows != found.channels:
            raise BadInput(f"{folder.name}/{TABLE} does not have the columns and rows that {MANIFEST} states.")
    if found.vectors is not None:
        stored = read_header(folder / VECTORS).tensors.get("vectors")
        shape, dtype = (found.channels, found.hidden_size), DTYPES[found.vectors]
        if stored is None or stored.shape != shape or stored.torch_dtype != dtype:
            raise BadInput(f"{folder.name}/{VECTORS} does not hold the {shape[0]} vectors that {MANIFEST} states.")
    return found


def load_channels(folder: Path, *, vectors: bool = True) -> list[Channel]:
    """Load all channels of a set in their order.

    Every file is first checked against its SHA-256.

    Args:
        folder: Folder of the set.
        vectors: Whether to read the vectors too, when the set has them.

    Returns:
        The channels.

    Raises:
        BadInput: If the set is damaged.
    """
    found = open_channels(folder)
    for name, described in found.files.items():
        if _describe(folder / name) != described:
            raise BadInput(f"{folder.name}/{name} is damaged: its content is not what {MANIFEST} states.")
    with _opened(found) as table:
        return _channels(found, table.read(), vectors)


def search_channels(
    folder: Path,
    *,
    token: str | None = None,
    substring: bool = False,
    neuron: str | None = None,
    matrix: str | None = None,
    layers: Sequence[int] = (),
    min_support: float | None = None,
    min_kurtosis: float | None = None,
    limit: int | None = 20,
    vectors: bool = False,
) -> list[Channel]:
    """Search a set for the channels that meet every condition given.

    The table is read a part at a time. Channels come in the set's order, or with the best supported first when a token
    is looked for.

    Args:
        folder: Folder of the set.
        token: Text of one of the channel's tokens. Case and the spaces around a token do not count.
        substring: Whether it is enough that a token contains `token`.
        neuron: Address of a neuron, such as "L3.N12".
        matrix: "gate", "in" or "out".
        layers: The layers. All when empty.
        min_support: Least support, a mean z-score.
        min_kurtosis: Least excess kurtosis.
        limit: Most channels to return; None for no limit.
        vectors: Whether to read the vectors too, when the set has them.

    Returns:
        The channels.

    Raises:
        BadInput: If the set is damaged or the address is not one.
    """
    import numpy

    found = open_channels(folder)
    wanted = None if neuron is None else parse_neuron(neuron)
    columns = ["layer", "expert", "neuron", "matrix", "support", "kurtosis"] + (["tokens"] if token is not None else [])
    hits: list[tuple[float, int, int]] = []
    with _opened(found) as table:
        for group in range(table.num_row_groups):
            rows = table.read_row_group(group, columns=columns)
            mask = _matches(rows, wanted, matrix, min_support, min_kurtosis)
            if layers:
                mask &= numpy.isin(rows["layer"].fill_null(-1).to_numpy(), list(layers))
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
    """Return a tensor's bytes, row by row, as safetensors stores them.

    Args:
        values: A tensor on the CPU.

    Returns:
        The bytes.
    """
    return values.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def _vector_header(count: int, hidden_size: int, vectors: str) -> bytes:
    """Return the header of a safetensors file of one tensor; its length does not depend on the count."""
    size = count * hidden_size * DTYPES[vectors].itemsize
    entry = {"dtype": {"bfloat16": "BF16", "float32": "F32"}[vectors], "shape": [count, hidden_size]}
    header = json.dumps({"vectors": {**entry, "data_offsets": [0, size]}}).encode().ljust(248)
    return len(header).to_bytes(8, "little") + header


def _describe(path: Path) -> dict[str, Any]:
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while content := stream.read(1 << 20):
            digest.update(content)
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}


def _read_manifest(folder: Path) -> dict[str, Any]:
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
    """Open the table. Whatever Arrow finds wrong with it while it is read becomes a BadInput of one sentence."""
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
    """Find the rows that meet the conditions on neuron, matrix and figures, bool [rows]. A missing one meets none."""
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
    """Find the rows that have the token among theirs, bool [rows].

    The comparison runs over the dictionary of tokens and not over the rows.
    """
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
    """Turn Arrow rows into channels; vectors are read row by row from the file when they are wanted and there."""
    entries = table.to_pylist()
    path = found.folder / VECTORS
    damaged = BadInput(f"{found.folder.name}/{TABLE} holds a row that is no channel.")
    for entry in entries:
        sizes = {None if entry[key] is None else len(entry[key]) for key in ("token_ids", "tokens", "z_scores")}
        if len(sizes) > 1 or any(value is None for key, value in entry.items() if key not in ("expert", TESTED)):
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
