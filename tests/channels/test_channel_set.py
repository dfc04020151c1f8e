"""Channel sets: what is written is read back, found again, opened by others, and refused when it was tampered with."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rotate_edit.channels.channel_set import (
    MANIFEST,
    TABLE,
    VECTORS,
    Channel,
    channel_schema,
    channel_size,
    load_channels,
    open_channels,
    save_channels,
    search_channels,
    write_channel_set,
)
from rotate_edit.errors import BadInput

WORDS = [" dog", " Dog", "dogs", " cat", "\u202e\x1b[31m", "", " the", " time", "ß", " été"]


def channel(row: int, *, support: float = 0.0, tokens: tuple[int, ...] = (0, 3), expert: int | None = None) -> Channel:
    generator = torch.Generator().manual_seed(row)
    return Channel(
        layer=row // 6,
        expert=expert,
        neuron=row // 2 % 3,
        matrix="out",
        index=row % 2,
        sign=1 if row % 3 else -1,
        token_ids=tokens,
        tokens=tuple(WORDS[token] for token in tokens),
        z_scores=tuple(float(torch.tensor(9.5 - place)) for place in range(len(tokens))),
        kurtosis=float(row),
        skewness=-1.5,
        cosine=0.75,
        loss=-1.25,
        support=support,
        claimed=row,
        vector=torch.randn(8, generator=generator),
    )


def same(left: Channel, right: Channel, *, tolerance: float = 0.0) -> bool:
    if (left.vector is None) != (right.vector is None):
        return False
    if left.vector is not None and right.vector is not None:
        close = torch.allclose(left.vector, right.vector, rtol=tolerance, atol=tolerance)
    else:
        close = True
    return close and replace(left, vector=None) == replace(right, vector=None)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    channels = [channel(row, support=row / 4, tokens=(row % 10, (row + 1) % 10)) for row in range(24)]
    save_channels(channels, tmp_path / "set", base={"source": "demo"}, settings={"solver": "circle"})
    return tmp_path / "set"


@pytest.mark.parametrize("vectors", ["float32", "bfloat16", None])
def test_a_set_is_read_back_as_it_was_written(tmp_path: Path, vectors: str | None) -> None:
    channels = [channel(row, tokens=tuple(range(row % 4)), expert=row if row % 2 else None) for row in range(30)]
    written = save_channels(channels, tmp_path / "a", base={"b": 1}, settings={"s": [1.5]}, vectors=vectors)
    assert open_channels(tmp_path / "a") == written
    assert (written.channels, written.base, written.settings) == (30, {"b": 1}, {"s": [1.5]})
    tolerance = {"float32": 0.0, "bfloat16": 2**-8, None: 0.0}[vectors]
    expected = channels if vectors else [replace(one, vector=None) for one in channels]
    loaded = load_channels(tmp_path / "a")
    assert len(loaded) == 30
    assert all(same(one, other, tolerance=tolerance) for one, other in zip(loaded, expected))
    assert all(one.vector is None for one in load_channels(tmp_path / "a", vectors=False))
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["a"]


def test_a_p_value_is_kept_where_there_is_one(tmp_path: Path) -> None:
    channels = [replace(channel(0), p_value=1e-60), channel(1)]
    save_channels(channels, tmp_path / "a", base={}, settings={})
    assert [one.p_value for one in load_channels(tmp_path / "a")] == [1e-60, None]


def test_a_set_of_an_earlier_version_has_no_p_values(folder: Path) -> None:
    import hashlib

    import pyarrow.parquet

    table = pyarrow.parquet.read_table(folder / TABLE).drop_columns("p_value")
    pyarrow.parquet.write_table(table, folder / TABLE)
    content, manifest = (folder / TABLE).read_bytes(), json.loads((folder / MANIFEST).read_text())
    manifest["files"][TABLE] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (folder / MANIFEST).write_text(json.dumps(manifest))
    assert [one.p_value for one in load_channels(folder)] == [None] * 24
    assert search_channels(folder, min_support=5.0)[0].p_value is None


def test_an_empty_set_is_a_set(tmp_path: Path) -> None:
    save_channels([], tmp_path / "none", base={}, settings={})
    assert load_channels(tmp_path / "none") == []
    assert search_channels(tmp_path / "none", token="dog") == []


def test_the_same_channels_give_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        save_channels([channel(row) for row in range(5)], tmp_path / name, base={}, settings={})
    for file in (MANIFEST, TABLE, VECTORS):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_others_open_the_files(folder: Path, tmp_path: Path) -> None:
    import datasets
    from safetensors import safe_open

    cache = str(tmp_path / "cache")
    opened = datasets.load_dataset("parquet", data_files=str(folder / TABLE), split="train", cache_dir=cache)
    assert opened.num_rows == 24
    assert opened[5]["tokens"] == [WORDS[5], WORDS[6]]
    assert opened[5]["row"] == 5
    with safe_open(folder / VECTORS, "pt") as stored:
        assert torch.equal(stored.get_tensor("vectors")[7], channel(7).vector)


def test_search_by_token_neuron_and_figures(folder: Path) -> None:
    dogs = search_channels(folder, token="DOG ")
    assert [one.support for one in dogs] == sorted((one.support for one in dogs), reverse=True)
    assert {" dog", " Dog"} & set(dogs[0].tokens)
    assert len(dogs) == 8
    assert len(search_channels(folder, token="dog", substring=True)) == 11
    assert search_channels(folder, token="do") == []
    assert [one.claimed for one in search_channels(folder, token="SS")] == [18, 17, 8, 7]
    assert len(search_channels(folder, token="dog", limit=3)) == 3
    assert search_channels(folder, token="dog", limit=1)[0].support == max(one.support for one in dogs)
    found = search_channels(folder, neuron="L2.N1", vectors=True)
    assert [(one.layer, one.neuron, one.index) for one in found] == [(2, 1, 0), (2, 1, 1)]
    assert torch.equal(found[0].vector, channel(14).vector)
    assert search_channels(folder, neuron="L2.E0.N1") == []
    assert [one.kurtosis for one in search_channels(folder, min_kurtosis=22)] == [22, 23]
    assert len(search_channels(folder, min_support=5.0, limit=None)) == 4
    assert len(search_channels(folder, limit=5)) == 5
    assert search_channels(folder, matrix="gate") == []
    with pytest.raises(BadInput, match="address"):
        search_channels(folder, neuron="layer 3")


@settings(max_examples=25, deadline=None)
@given(
    rows=st.lists(st.tuples(st.integers(0, 9), st.floats(-3, 3, width=32)), min_size=1, max_size=40),
    token=st.sampled_from(["dog", "cat", "ss", "ÉTÉ", "the"]),
    least=st.floats(-3, 3),
    limit=st.integers(1, 9),
)
def test_search_agrees_with_filtering_in_memory(
    tmp_path_factory: pytest.TempPathFactory,
    rows: list[tuple[int, float]],
    token: str,
    least: float,
    limit: int,
) -> None:
    folder = tmp_path_factory.mktemp("search") / "set"
    channels = [channel(row, support=support, tokens=(word,)) for row, (word, support) in enumerate(rows)]
    save_channels(channels, folder, base={}, settings={}, vectors=None)
    expected = [
        one for one in channels if one.tokens[0].strip().casefold() == token.casefold() and one.support >= least
    ]
    expected.sort(key=lambda one: -one.support)
    found = search_channels(folder, token=token, min_support=least, limit=limit)
    assert [one.name for one in found] == [one.name for one in expected[:limit]]


def test_many_row_groups_are_searched(tmp_path: Path) -> None:
    import pyarrow.parquet

    table = pyarrow.Table.from_pylist(
        [
            {name: getattr(channel(row), name) for name in channel_schema().names if name != "row"} | {"row": row}
            for row in range(300)
        ],
        schema=channel_schema(),
    )
    batches = [(table.slice(first, 100), torch.full((100, 4), float(first))) for first in (0, 100, 200)]
    written = write_channel_set(
        batches, tmp_path / "set", base={}, settings={}, hidden_size=4, vectors="bfloat16", row_group=150
    )
    assert written.channels == 300
    assert pyarrow.parquet.read_metadata(tmp_path / "set" / TABLE).num_row_groups == 3
    found = search_channels(tmp_path / "set", min_kurtosis=250, vectors=True, limit=None)
    assert len(found) == 50
    assert all(torch.equal(one.vector, torch.full((4,), 200.0)) for one in found)


def test_the_stated_size_holds(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    ids = (torch.rand(5000, 10, generator=generator) ** 3 * 8000).long()
    channels = [
        replace(
            channel(row),
            token_ids=tuple(tokens),
            tokens=tuple(f" word{token}" for token in tokens),
            z_scores=tuple(torch.randn(10, generator=generator).tolist()),
            **{name: float(torch.randn(1, generator=generator)) for name in ("kurtosis", "loss", "support", "cosine")},
        )
        for row, tokens in enumerate(ids.tolist())
    ]
    for vectors in ("bfloat16", None):
        written = save_channels(channels, tmp_path / str(vectors), base={}, settings={}, vectors=vectors)
        actual = sum(described["bytes"] for described in written.files.values()) / 500
        assert actual == pytest.approx(channel_size(10, 8, vectors), rel=0.35)


def edit_manifest(**changes: object) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        manifest = json.loads((folder / MANIFEST).read_text())
        (folder / MANIFEST).write_text(json.dumps(manifest | changes))

    return damage


def flip(file: str, place: int) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        content = bytearray((folder / file).read_bytes())
        content[place] ^= 0xFF
        (folder / file).write_bytes(bytes(content))

    return damage


def cut(file: str) -> Callable[[Path], None]:
    return lambda folder: (folder / file).write_bytes((folder / file).read_bytes()[:-5])


DAMAGES: dict[str, Callable[[Path], None]] = {
    "version": edit_manifest(version=2),
    "format": edit_manifest(format="something"),
    "files outside": edit_manifest(files={"../secret": {"bytes": 1, "sha256": ""}}),
    "count": edit_manifest(channels=23),
    "negative": edit_manifest(channels=-1),
    "boolean": edit_manifest(channels=True),
    "size": edit_manifest(hidden_size=7),
    "dtype": edit_manifest(vectors="bfloat16"),
    "no json": lambda folder: (folder / MANIFEST).write_text("{"),
    "deep json": lambda folder: (folder / MANIFEST).write_text("[" * 100_000),
    "a list": lambda folder: (folder / MANIFEST).write_text("[]"),
    "no manifest": lambda folder: (folder / MANIFEST).unlink(),
    "no table": lambda folder: (folder / TABLE).unlink(),
    "cut table": cut(TABLE),
    "cut vectors": cut(VECTORS),
    "flipped table": flip(TABLE, 300),
    "flipped footer": flip(TABLE, -12),
    "flipped vectors": flip(VECTORS, -1),
    "flipped vector header": flip(VECTORS, 12),
    "vectors gone": lambda folder: (folder / VECTORS).unlink(),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_one_sentence(folder: Path, name: str) -> None:
    assert len(load_channels(folder)) == 24
    DAMAGES[name](folder)
    with pytest.raises(BadInput) as caught:
        load_channels(folder)
    assert str(caught.value).endswith(".")
    assert "\n" not in str(caught.value)


def rewritten(folder: Path, **columns: object) -> None:
    """Replace columns of the table and make the manifest agree with the forgery."""
    import hashlib

    import pyarrow
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(folder / TABLE)
    for name, values in columns.items():
        field = channel_schema().field(name)
        table = table.set_column(table.schema.names.index(name), field, pyarrow.array(values, field.type))
    pyarrow.parquet.write_table(table, folder / TABLE)
    content = (folder / TABLE).read_bytes()
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["files"][TABLE] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (folder / MANIFEST).write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    "columns",
    [
        {"row": [99] * 24},
        {"row": [-1] * 24},
        {"neuron": [None] * 24},
        {"tokens": [["a"]] * 24},
        {"tokens": [None] * 24},
        {"tokens": [[None, "a"]] * 24},
        {"z_scores": [[1.0, None]] * 24},
    ],
)
def test_a_forged_table_is_refused(folder: Path, columns: dict[str, object]) -> None:
    rewritten(folder, **columns)
    with pytest.raises(BadInput):
        load_channels(folder)
    search_channels(folder, token="dog", limit=0)


def test_an_existing_output_and_missing_vectors_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="exists already"):
        save_channels([channel(0)], folder, base={}, settings={})
    with pytest.raises(ValueError, match="no vector"):
        save_channels([replace(channel(0), vector=None)], tmp_path / "x", base={}, settings={})
    assert not (tmp_path / "x").exists()
