"""Safetensors headers as hostile input, and reading against safetensors' own reader."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from rotate_edit.errors import BadInput
from rotate_edit.models.safetensors_file import LARGEST_HEADER, parse_header, read_header, read_stored, read_stored_rows

DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
]


def raw_header(entries: object) -> bytes:
    text = json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text


def entry(start: int = 0, end: int = 16, shape: object = (4,), dtype: object = "F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


@given(
    dtypes=st.lists(st.sampled_from(DTYPES), min_size=1, max_size=4),
    shape=st.lists(st.integers(0, 5), max_size=3),
    data=st.data(),
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_tensors_and_rows_are_what_safetensors_wrote(
    tmp_path: Path, dtypes: list[torch.dtype], shape: list[int], data: st.DataObject
) -> None:
    tensors = {f"t{number}": (torch.randn(shape) * 9).to(dtype) for number, dtype in enumerate(dtypes)}
    path = tmp_path / "x.safetensors"
    save_file(tensors, path, metadata={"format": "pt"})
    header = read_header(path)
    assert header.metadata == {"format": "pt"}
    assert header.raw == path.read_bytes()[: len(header.raw)]
    for name, tensor in tensors.items():
        found = read_stored(path, header.tensors[name])
        assert found.dtype == tensor.dtype
        assert torch.equal(found, tensor)
        if shape and shape[0]:
            rows = torch.tensor(data.draw(st.lists(st.integers(0, shape[0] - 1), max_size=6)), dtype=torch.int64)
            assert torch.equal(read_stored_rows(path, header.tensors[name], rows), tensor[rows])


@pytest.mark.parametrize(
    "entries",
    [
        [],
        {"a": 1},
        {"a": {"dtype": "F32", "shape": [4]}},
        {"a": entry() | {"more": 1}},
        {"a": entry(dtype="F5")},
        {"a": entry(dtype=4)},
        {"a": entry(shape=[True, 4])},
        {"a": entry(shape=[4.0])},
        {"a": entry(shape=[-4])},
        {"a": entry(shape=[-2, -2])},
        {"a": entry(shape=[2**49])},
        {"a": entry(shape=[5])},
        {"a": entry(shape="4")},
        {"a": entry(start=-16, end=0)},
        {"a": entry(start=16, end=0)},
        {"a": entry(end=2**60)},
        {"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16, 32]}},
        {"a": entry(4, 20)},
        {"a": entry(), "b": entry()},
        {"a": entry(), "b": entry(8, 24)},
        {"a": entry(), "b": entry(20, 36)},
        {"a": entry(), "__metadata__": {"format": 1}},
        {"a": entry(), "__metadata__": "pt"},
        {},
    ],
)
def test_impossible_headers(entries: object) -> None:
    raw = raw_header(entries)
    with pytest.raises(BadInput):
        parse_header(raw, len(raw) + 16, "x.safetensors")


def test_a_possible_header_passes() -> None:
    raw = raw_header({"a": entry(), "b": entry(16, 16, (0, 3)), "__metadata__": {"format": "pt"}})
    header = parse_header(raw, len(raw) + 16, "x.safetensors")
    assert header.tensors["a"].start == len(raw)
    assert header.tensors["b"].shape == (0, 3)


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"1234567",
        (0).to_bytes(8, "little"),
        (2**63).to_bytes(8, "little") + b"{}",
        (LARGEST_HEADER + 1).to_bytes(8, "little") + b"{}",
        (2).to_bytes(8, "little") + b"\xff\xfe",
        (12).to_bytes(8, "little") + b'{"a":1,"a":2'[:12],
        (200_000).to_bytes(8, "little") + b"[" * 200_000,
    ],
)
def test_damaged_files(tmp_path: Path, raw: bytes) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(raw)
    with pytest.raises(BadInput, match="safetensors"):
        read_header(path)


def test_every_truncation_is_found(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.arange(6.0), "b": torch.arange(3)}, path)
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(BadInput):
            read_header(path)
    path.write_bytes(whole + b"\0")
    with pytest.raises(BadInput):
        read_header(path)


def test_a_repeated_name_is_refused() -> None:
    text = json.dumps({"a": entry()})[:-1].encode() + b', "a": ' + json.dumps(entry()).encode() + b"}"
    raw = len(text).to_bytes(8, "little") + text
    with pytest.raises(BadInput, match="twice"):
        parse_header(raw, len(raw) + 16, "x.safetensors")


def test_reading_past_the_end_or_beyond_the_rows(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.randn(5, 3)}, path)
    stored = read_header(path).tensors["a"]
    for rows in ([5], [-1]):
        with pytest.raises(BadInput, match="no such row"):
            read_stored_rows(path, stored, torch.tensor(rows))
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(BadInput, match="cut short"):
        read_stored(path, stored)
    with pytest.raises(BadInput, match="cut short"):
        read_stored_rows(path, stored, torch.tensor([4]))
    path.unlink()
    for read in (lambda: read_stored(path, stored), lambda: read_stored_rows(path, stored, torch.tensor([0]))):
        with pytest.raises(BadInput, match="cannot be read"):
            read()
