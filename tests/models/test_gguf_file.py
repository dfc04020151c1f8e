"""The header of a GGUF file is untrusted: whatever it says, it is read, or refused in one sentence."""

import struct
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as some
from tiny_gguf import tiny_model, write_gguf

from rotate_edit.errors import BadInput
from rotate_edit.models.gguf import import_gguf
from rotate_edit.models.gguf_file import read_gguf_header

F32, F16, Q4_0, Q8_K = 0, 1, 2, 15
HUGE = 2**63


def text(value: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(value) if length is None else length) + value


def word(key: str, value: bytes) -> bytes:
    return text(key.encode()) + struct.pack("<I", 8) + text(value)


def number(key: str, value: int) -> bytes:
    return text(key.encode()) + struct.pack("<II", 4, value)


def array(key: str, kind: int, count: int, content: bytes = b"") -> bytes:
    return text(key.encode()) + struct.pack("<IIQ", 9, kind, count) + content


def tensor(
    name: bytes = b"a.weight", shape: tuple[int, ...] = (4, 2), kind: int = F32, offset: int = 0, dimensions: Any = None
) -> bytes:
    count = len(shape) if dimensions is None else dimensions
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", count, *shape, kind, offset)


LLAMA = word("general.architecture", b"llama")


def file_of(
    keys: tuple[bytes, ...] = (LLAMA,),
    tensors: tuple[bytes, ...] = (tensor(),),
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
    counts: tuple[int, int] | None = None,
    data: int = 64,
) -> bytes:
    tensor_count, key_count = counts or (len(tensors), len(keys))
    header = magic + struct.pack("<IQQ", version, tensor_count, key_count) + b"".join(keys) + b"".join(tensors)
    return header + bytes(-len(header) % 32 + data)


def test_a_sound_header_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(file_of((LLAMA, array("numbers", 4, 2, bytes(8)))))
    header = read_gguf_header(tmp_path / "a.gguf")
    assert header.keys == {"general.architecture": "llama", "numbers": (2,)}
    (found,) = header.tensors.values()
    assert (found.shape, found.kind, found.end - found.start) == ((2, 4), "F32", 32)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "no GGUF file"),
        (file_of(magic=b"GGML"), "no GGUF file"),
        (file_of(version=1), "version 1"),
        (file_of(version=3 << 24), "version 50331648"),
        (file_of(counts=(0, 1)), "0 tensors"),
        (file_of(counts=(HUGE, 1)), "9,223,372,036,854,775,808 tensors"),
        (file_of(counts=(1, HUGE)), "keys; no model does"),
        (file_of(counts=(99_999, 1)), "not a plain tensor name"),
        (file_of((text(b"key", HUGE),)), "the name of a key of 9,223"),
        (file_of((text(b"\xff\xfe") + bytes(64),)), "not valid UTF-8"),
        (file_of((LLAMA, LLAMA)), 'key "general.architecture" twice'),
        (file_of((text(b"key") + struct.pack("<I", 13),)), "unknown type 13"),
        (file_of((text(b"key") + struct.pack("<IQ", 8, HUGE),)), "of 9,223"),
        (file_of((text(b"key") + struct.pack("<IQ", 8, 4_000_000),)), "cut short"),
        (file_of((array("key", 4, HUGE),)), "9,223,372,036,854,775,808 entries"),
        (file_of((array("key", 4, 4_000_000),)), "cut short"),
        (file_of((array("key", 8, 1, text(b"", 5_000)),)), "an entry"),
        (file_of((array("key", 8, 4_000_000),)), "entr"),
        (file_of((array("key", 9, 1, bytes(40)),)), "array of the unknown type 9"),
        (file_of((word("general.type", b"adapter"), LLAMA)), '"adapter"'),
        (file_of((number("split.count", 2), LLAMA)), "one of 2 parts"),
        (file_of((number("general.alignment", 0), LLAMA)), "power of two"),
        (file_of((number("general.alignment", 48), LLAMA)), "power of two"),
        (file_of((number("general.alignment", 1 << 31), LLAMA)), "power of two"),
        (file_of((word("general.alignment", b"32"), LLAMA)), "power of two"),
        (file_of(()), "general.architecture"),
        (file_of((number("general.architecture", 4),)), "general.architecture"),
        (file_of(tensors=(tensor(b"../../etc/passwd"),)), "not a plain tensor name"),
        (file_of(tensors=(tensor(b"a/b"),)), "not a plain tensor name"),
        (file_of(tensors=(tensor(b"..weight"),)), "not a plain tensor name"),
        (file_of(tensors=(tensor(b""),)), "not a plain tensor name"),
        (file_of(tensors=(tensor(b"a\x1b[31m"),)), "not a plain tensor name"),
        (file_of(tensors=(tensor("größe".encode()),)), "not a plain tensor name"),
        (file_of(tensors=(tensor(b"a" * 400),)), "400 bytes"),
        (file_of(tensors=(tensor(), tensor(offset=32))), "a.weight twice"),
        (file_of(tensors=(tensor(dimensions=0),)), "0 dimensions"),
        (file_of(tensors=(tensor(dimensions=2**32 - 1),)), "4,294,967,295 dimensions"),
        (file_of(tensors=(tensor(shape=(4, 0)),)), "not a possible one"),
        (file_of(tensors=(tensor(shape=(HUGE, 2)),)), "not a possible one"),
        # As the bit pattern of a NaN in 64 bits.
        (file_of(tensors=(tensor(shape=(0x7FF8000000000000, 2)),)), "not a possible one"),
        (file_of(tensors=(tensor(shape=(2**32, 2**32, 2**32, 2**32)),)), "after the end of the file"),
        (file_of(tensors=(tensor(kind=4),)), "type 4, which is not known"),
        (file_of(tensors=(tensor(kind=4_000),)), "type 4000, which is not known"),
        (file_of(tensors=(tensor(kind=Q8_K),)), "Q8_K, which cannot be unpacked"),
        (file_of(tensors=(tensor(kind=26),)), "I32, which cannot be unpacked"),
        (file_of(tensors=(tensor(kind=Q4_0),)), "blocks of 32 (Q4_0)"),
        (file_of(tensors=(tensor(offset=64),)), "after the end of the file"),
        (file_of(tensors=(tensor(offset=HUGE),)), "after the end of the file"),
        (file_of(tensors=(tensor(offset=8),)), "multiple of 32"),
        (file_of(tensors=(tensor(), tensor(b"b.weight"))), "overlap"),
        (file_of(data=31), "after the end of the file"),
        (file_of()[:40], "cut short"),
    ],
)
def test_impossible_headers_are_refused(content: bytes, sentence: str, tmp_path: Path) -> None:
    file = tmp_path / "a.gguf"
    file.write_bytes(content)
    with pytest.raises(BadInput) as error:
        read_gguf_header(file)
    assert sentence in str(error.value)
    assert str(error.value).isprintable()


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    file = write_gguf(tmp_path_factory.mktemp("hostile") / "model.gguf", tiny_model("llama"), "llama")
    return file, file.read_bytes()


def refused_or_read(file: Path, use: Callable[[Path], object]) -> None:
    with suppress(BadInput):
        use(file)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(some.data())
def test_damaged_headers_end_in_a_sentence(sound: tuple[Path, bytes], data: some.DataObject) -> None:
    file, content = sound
    end = min(tensor.start for tensor in read_sound(content, file).values())
    damaged = bytearray(content)
    for _ in range(data.draw(some.integers(1, 3))):
        place = data.draw(some.integers(0, end - 8))
        values = data.draw(some.sampled_from([b"\xff" * 8, bytes(8), b"\x01", b"\xff", b"\x80\0\0\0", b"../../.."]))
        damaged[place : place + len(values)] = values
    cut = data.draw(some.sampled_from([None, None, data.draw(some.integers(0, len(content)))]))
    hostile = file.with_name("hostile.gguf")
    hostile.write_bytes(damaged[:cut])
    refused_or_read(hostile, read_gguf_header)


def read_sound(content: bytes, file: Path) -> dict[str, Any]:
    file.write_bytes(content)
    return read_gguf_header(file).tensors


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=some.integers(24, 10_000), value=some.sampled_from([0, 1, 127, 128, 255]))
def test_an_import_of_a_damaged_file_ends_in_a_sentence(sound: tuple[Path, bytes], place: int, value: int) -> None:
    file, content = sound
    damaged = bytearray(content)
    damaged[place % len(content)] = value
    hostile = file.with_name("damaged.gguf")
    hostile.write_bytes(damaged)
    refused_or_read(hostile, lambda path: import_gguf(path, path.with_name("out"), overwrite=True))
