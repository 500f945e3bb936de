"""The header of a safetensors file: a sound one is read, and the claims of a damaged one are checked."""

from __future__ import annotations

import json
import struct
import time
import tracemalloc
from pathlib import Path

import pytest

from ferrum_jax.errors import ModelFileError
from ferrum_jax.weights.huggingface import open_directory
from ferrum_jax.weights.safetensors import MAX_HEADER_BYTES, MAX_TENSORS, parse_header
from support.directories import LLAMA, write


def parsed(path: Path, raw: bytes, header_only: bool = False):
    path.write_bytes(raw)
    with path.open("rb") as file:
        return parse_header(path, file.fileno(), len(raw), header_only=header_only)


def file_of(header: object, data: bytes = b"", pad: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text + pad)) + text + pad + data


def entry(dtype: object = "F32", shape: object = (2, 3), offsets: object = (0, 24), **more: object) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets, **more}


def test_a_sound_header(tmp_path: Path) -> None:
    header = {
        "__metadata__": {"format": "pt"},
        "b": entry("BF16", [3], [24, 30]),
        "a": entry(),
        "empty": entry("I64", [0], [30, 30]),
    }
    raw = file_of(header, bytes(30), b"   ")
    found = parsed(tmp_path / "x.safetensors", raw)
    start = len(raw) - 30
    assert list(found) == ["b", "a", "empty"]
    assert [(t.format, t.shape, t.offset, t.nbytes) for t in found.values()] == [
        ("BF16", (3,), start + 24, 6), ("F32", (2, 3), start, 24), ("I64", (0,), start + 30, 0),
    ]  # fmt: skip
    assert list(parsed(tmp_path / "cut.safetensors", raw[: start + 5], header_only=True)) == list(found)


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (b"", "empty"),
        (b"\0" * 7, "not a safetensors file"),
        (b"GGUF" + bytes(60), "GGUF file"),
        (b"PK\x03\x04" + bytes(60), "pickled"),
        (b"\x80\x02}q\x00" + bytes(60), "pickled"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (b"<!DOCTYPE html><html></html>", "web page"),
        (struct.pack("<Q", 2**63) + b"{}", "at most"),
        (struct.pack("<Q", MAX_HEADER_BYTES + 1) + b"{}", "at most"),
        (struct.pack("<Q", 100) + b"{}", "truncated"),
        (file_of(b"{\xff}"), "UTF-8"),
        (file_of(b'{"a": '), "not valid JSON"),
        (file_of(b'{"a": NaN}'), "NaN is not JSON"),
        (file_of(b'{"a":' + b"[" * 5000 + b"]" * 5000 + b"}"), "not valid JSON"),
        (file_of(b'{"a":' + b"9" * 5000 + b"}"), "not valid JSON"),
        (file_of(b"{" + b"[" * 5 * MAX_TENSORS + b"}"), "more entries"),
        (file_of(b"{" + b"," * 17 * MAX_TENSORS + b"}"), "more entries"),
        (file_of(b'{"a": {}, "a": {}}'), "'a' appears twice"),
        (file_of({"__metadata__": {"a": 1}}), "__metadata__"),
        (file_of({"a": [1]}), "'a' must have the keys"),
        (file_of({"a": entry(more=1)}, bytes(24)), "'a' must have the keys"),
        (file_of({"a": entry("F33")}, bytes(24)), "'a' has the unknown dtype 'F33'"),
        (file_of({"a": entry(["F32"])}, bytes(24)), "'a' has the unknown dtype"),
        (file_of({"a": entry(shape=[2, -3])}, bytes(24)), "'a' has the shape"),
        (file_of({"a": entry(shape=[2, 3.0])}, bytes(24)), "'a' has the shape"),
        (file_of({"a": entry(shape=[True, 6])}, bytes(24)), "'a' has the shape"),
        (file_of({"a": entry(shape=[2**40, 2**40])}, bytes(24)), "'a' has the shape"),
        (file_of({"a": entry(shape=[1] * 9, offsets=[0, 4])}, bytes(4)), "'a' has the shape"),
        (file_of({"a": entry(offsets=[24, 0])}, bytes(24)), "'a' has the data_offsets"),
        (file_of({"a": entry(offsets=[0])}, bytes(24)), "'a' has the data_offsets"),
        (file_of({"a": entry(offsets=[0, 2**70])}, bytes(24)), "'a' has the data_offsets"),
        (file_of({"a": entry("BF16")}, bytes(24)), "'a' is BF16 .* 12 bytes"),
        (file_of({"a": entry(), "b": entry(offsets=[12, 36])}, bytes(36)), "'b' begins .* overlap"),
        (file_of({"a": entry(), "b": entry(offsets=[25, 49])}, bytes(49)), "'b' begins .* gap"),
        (file_of({"a": entry(offsets=[1, 25])}, bytes(25)), "'a' begins .* gap"),
        (file_of({"a": entry()}, bytes(23)), "truncated"),
        (file_of({"a": entry()}, bytes(25)), "damaged"),
        (file_of({"\ud800": entry()}, bytes(24)), "is not text"),
    ],
    ids=range(38),
)
def test_what_cannot_be_is_named(raw: bytes, said: str, tmp_path: Path) -> None:
    begin = time.perf_counter()
    tracemalloc.start()
    with pytest.raises(ModelFileError, match=said) as caught:
        parsed(tmp_path / "bad.safetensors", raw)
    assert tracemalloc.get_traced_memory()[1] <= 8 * len(raw) + (1 << 20)
    tracemalloc.stop()
    assert "bad.safetensors" in str(caught.value)
    assert time.perf_counter() - begin < 5


def test_ranges_are_read_as_whole_tensors_are(tmp_path: Path) -> None:
    import numpy as np

    with open_directory(write(LLAMA, tmp_path / "model")) as model:
        info = model.tensors["blk.0.ffn_down.weight"]
        whole = model.read(info)
        assert whole.nbytes == info.nbytes == 2 * 64 * 64
        part = np.empty(100, np.uint8)
        model.read_into(info, part, 77)
        assert (part == whole[77:177]).all()
        for out, start in ((part, info.nbytes - 99), (part, -1), (part.view(np.int8), 0), (part[::2], 0)):
            with pytest.raises(ValueError, match=r"read_into|are not within"):
                model.read_into(info, out, start)
    with pytest.raises(ValueError):
        model.read(info)
