"""Damaged and hostile GGUF files: each gives a ModelFileError that says what is wrong, at once and in little memory."""

from __future__ import annotations

import os
import re
import shutil
import struct
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest

from ferrum_jax.errors import FerrumError, ModelFileError, UnsupportedModelError
from ferrum_jax.weights import gguf_header
from ferrum_jax.weights.gguf import open_gguf
from support.tiny_gguf import write_tiny_llama

MAX_SECONDS = 1.0
MAX_BYTES = 4 << 20
UINT8, UINT32, FLOAT32, BOOL, STRING, ARRAY = 0, 4, 6, 7, 8, 9
F32, Q4_0, Q4_K = 0, 2, 12


def string(text: bytes | str, length: int | None = None) -> bytes:
    raw = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(raw) if length is None else length) + raw


def entry(key: bytes | str, value_type: int, payload: bytes) -> bytes:
    return string(key) + struct.pack("<I", value_type) + payload


def array(key: str, element_type: int, count: int, payload: bytes = b"") -> bytes:
    return entry(key, ARRAY, struct.pack("<IQ", element_type, count) + payload)


def integer(key: str, value: int) -> bytes:
    return entry(key, UINT32, struct.pack("<I", value))


def tensor(name: bytes | str, dims: tuple[int, ...] = (4,), type_id: int = F32, offset: int = 0) -> bytes:
    return string(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, type_id, offset)


def model(*parts: bytes, entries: int = 0, tensors: int = 0, version: int = 3, magic: bytes = b"GGUF", data: int = 64) -> bytes:
    """A file of the given pieces and `data` zero bytes from the next multiple of 32."""
    raw = magic + struct.pack("<IQQ", version, tensors, entries) + b"".join(parts)
    return raw + bytes(-len(raw) % 32) + bytes(data)


CASES: dict[str, tuple[bytes, str]] = {
    "empty file": (b"", r"the file is empty"),
    "magic only": (b"GGUF", r"truncated: it ends after 4 bytes"),
    "wrong magic": (model(magic=b"GGUX"), r"not a GGUF file: it begins with b'GGUX"),
    "web page": (b"\n<!DOCTYPE html><html><body>Sign in</body></html>", r"a web page \(HTML\) in place of the model"),
    "LFS pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", r"git-LFS pointer"),
    "old GGML": (model(magic=b"tjgg"), r"from before GGUF"),
    "zip": (model(magic=b"PK\x03\x04"), r"zip archive or PyTorch checkpoint"),
    "safetensors": (struct.pack("<Q", 99) + b'{"a":{"dtype":"F32"}}' + bytes(80), r"safetensors.*directory"),
    "byte-swapped magic": (model(magic=b"FUGG"), r"big-endian"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0) + bytes(64), r"big-endian.*little-endian"),
    "version 0": (model(version=0), r"GGUF version 0; only versions 2 and 3"),
    "version 1": (model(version=1), r"GGUF version 1; only versions 2 and 3"),
    "version 4": (model(version=4), r"GGUF version 4; only versions 2 and 3"),
    "tensor count beyond the limit": (model(tensors=2**40), r"claims 1099511627776 tensors; at most"),
    "tensor count beyond the file": (model(tensors=1000), r"claims 1000 tensors, but only 72 bytes follow"),
    "entry count beyond the limit": (model(entries=2**64 - 1), r"claims 18446744073709551615 metadata entries"),
    "entry count beyond the file": (model(entries=1000), r"claims 1000 metadata entries, but only 72 bytes"),
    "key longer than the file": (
        model(string("key", length=1000), entries=1),
        r"key of metadata entry 1 of 1 needs 1000 bytes at byte 32, but the file ends after 128 bytes",
    ),
    "key longer than the limit": (model(string("key", length=2**63), entries=1), r"claims 9223372036854775808 bytes"),
    "key not UTF-8": (
        model(entry(b"ab\xffc", BOOL, b"\1"), entries=1),
        r"key of metadata entry 1 of 1 is not valid UTF-8 at byte 34 of the file: b'ab\\xffc'",
    ),
    "duplicate key": (model(integer("a.b", 1), integer("a.b", 2), entries=2), r"key 'a\.b' appears twice"),
    "unknown value type": (model(entry("k", 13, bytes(8)), entries=1), r"'k' has the unknown value type 13"),
    "bool of 2": (model(entry("k", BOOL, b"\2"), entries=1), r"'k' is a bool of value 2; it must be 0 or 1"),
    "string longer than the file": (
        model(entry("general.name", STRING, string("x", length=2**20)), entries=1),
        r"'general\.name' needs 1048576 bytes",
    ),
    "string of 2**63 bytes": (model(entry("n", STRING, string("", length=2**63)), entries=1), r"'n' claims 922337"),
    "string not UTF-8": (model(entry("n", STRING, string(b"\xc3(")), entries=1), r"'n' is not valid UTF-8 at byte"),
    "array of 2**40 numbers": (
        model(array("tokenizer.ggml.scores", FLOAT32, 2**40), entries=1),
        r"'tokenizer\.ggml\.scores' claims an array of 1099511627776 elements \(float32, at least 4398046511104 bytes",
    ),
    "array of 2**40 strings": (model(array("t", STRING, 2**40), entries=1), r"'t' claims an array of 1099511627776"),
    "array of 2**64 - 1 bytes": (model(array("t", UINT8, 2**64 - 1), entries=1), r"array of 18446744073709551615"),
    "string array cut short": (
        model(array("t", STRING, 9, string("aa") + string("b", length=10**6)), entries=1),
        r"'t', string 1 needs 1000000 bytes",
    ),
    "string array ends inside a length": (
        model(array("t", STRING, 8, string("x" * 60)), entries=1, data=7)[:-9],
        r"'t', string 2, its length needs 8 bytes at byte 125, but the file ends after 126 bytes",
    ),
    "token not UTF-8": (
        model(array("t", STRING, 2, string("a") + string(b"\xe2\x82")), entries=1),
        r"'t', string 1 is not valid UTF-8: b'\\xe2\\x82'",
    ),
    "array of arrays": (
        model(array("deep", ARRAY, 1, struct.pack("<IQ", ARRAY, 1) * 4), entries=1),
        r"'deep' is an array of arrays",
    ),
    "deeply nested arrays": (
        model(array("deep", ARRAY, 1, struct.pack("<IQ", ARRAY, 1) * 200_000), entries=1),
        r"'deep' is an array of arrays",
    ),
    "array of unknown type": (model(array("a", 99, 1), entries=1), r"'a' is an array of the unknown value type 99"),
    "bool array with 7": (model(array("a", BOOL, 3, b"\0\1\7"), entries=1), r"array of bools with the value 7"),
    "alignment 0": (model(integer("general.alignment", 0), entries=1), r"'general\.alignment' is 0; .*power of two"),
    "alignment 48": (model(integer("general.alignment", 48), entries=1), r"'general\.alignment' is 48"),
    "alignment 4": (model(integer("general.alignment", 4), entries=1), r"'general\.alignment' is 4;"),
    "alignment 2**31": (model(integer("general.alignment", 2**31), entries=1), r"is 2147483648; .*to 1048576"),
    "alignment as text": (
        model(entry("general.alignment", STRING, string("32")), entries=1),
        r"'general\.alignment' is a str; it must be a power of two",
    ),
    "tensor name too long": (model(tensor("n" * 300), tensors=1), r"name of tensor 1 of 1 claims 300 bytes; at most"),
    "tensor name of 2**60 bytes": (model(string("n", length=2**60) + bytes(40), tensors=1), r"claims 1152921504606846"),
    "tensor name empty": (model(tensor(""), tensors=1), r"tensor 1 of 1 has an empty name"),
    "tensor name not UTF-8": (
        model(tensor(b"\xff"), tensors=1),
        r"name of tensor 1 of 1 is not valid UTF-8 at byte 32",
    ),
    "no dimensions": (model(tensor("x", ()), bytes(16), tensors=1), r"'x' claims 0 dimensions; it must have 1 to 4"),
    "five dimensions": (model(tensor("x", (1,) * 5), tensors=1), r"'x' claims 5 dimensions"),
    "2**32 - 1 dimensions": (
        model(string("x") + struct.pack("<I", 2**32 - 1) + bytes(40), tensors=1),
        r"'x' claims 4294967295 dimensions",
    ),
    "dimension 0": (model(tensor("x", (4, 0)), tensors=1), r"'x' has the dimensions \[4, 0\]; each must be at least 1"),
    "dimensions overflow 64 bits": (model(tensor("x", (2**33, 2**33)), tensors=1), r"'x'.*they overflow"),
    "dimensions overflow to 0": (model(tensor("x", (2**32, 2**32)), tensors=1), r"'x'.*they overflow"),
    "dimension 2**64 - 1": (model(tensor("x", (2**64 - 1,)), tensors=1), r"'x'.*they overflow"),
    "unknown tensor type": (model(tensor("x", (32,), 77), tensors=1), r"'x' has the unknown ggml type 77"),
    "withdrawn tensor type": (model(tensor("x", (32,), 4), tensors=1), r"'x' has the unknown ggml type 4"),
    "row no multiple of a block": (
        model(tensor("x", (320, 2), Q4_K), tensors=1, data=999),
        r"'x' is Q4_K with rows of 320 values; a row must be a multiple of 256",
    ),
    "whole blocks only in sum": (model(tensor("x", (16, 2), Q4_0), tensors=1), r"'x' is Q4_0 with rows of 16"),
    "offset misaligned": (
        model(tensor("x", offset=16), tensors=1),
        r"'x' lies at offset 16, not a multiple of the alignment 32",
    ),
    "offset beyond the file": (
        model(tensor("x", offset=2**63), tensors=1),
        r"'x' \(F32, 16 bytes at byte 9223372036854775872\) ends beyond the file's 128 bytes",
    ),
    "offset 2**64 - 32": (model(tensor("x", offset=2**64 - 32), tensors=1), r"'x'.*ends beyond the file"),
    "tensor larger than the file": (model(tensor("x", (17,)), tensors=1), r"'x' \(F32, 68 bytes at byte 64\) ends"),
    "no tensor data at all": (model(tensor("x"), tensors=1, data=0), r"'x'.*ends beyond the file's 64 bytes"),
    "tensors overlap": (
        model(tensor("one", (9,)), tensor("two", offset=32), tensors=2),
        r"'two' begins at byte 128, inside tensor 'one' \(bytes 96 to 132\)",
    ),
    "tensors coincide": (model(tensor("one"), tensor("two"), tensors=2), r"inside tensor"),
    "duplicate tensor": (model(tensor("x"), tensor("x", offset=32), tensors=2), r"'x' appears twice"),
    "split number without a split": (model(integer("split.no", 3), entries=1), r"'split\.no' is not 0"),
    "split count as text": (
        model(entry("split.count", STRING, string("3")), entries=1),
        r"'split\.count' is a str, not an integer",
    ),
    "part of a split under another name": (
        model(integer("split.count", 65535), entries=1),
        r"'split\.count' is 65535.*must be named NAME-00001-of-65535\.gguf",
    ),
    "wrong total of tensors": (
        model(integer("split.tensors.count", 9), tensor("x"), entries=1, tensors=1),
        r"'split\.tensors\.count' is 9, but the 1 parts hold 1 tensors",
    ),
}


def assert_refused(path: Path, message: str, kind: type[FerrumError] = ModelFileError) -> None:
    tracemalloc.start()
    start = time.perf_counter()
    try:
        with pytest.raises(FerrumError) as caught:
            open_gguf(path)
        seconds = time.perf_counter() - start
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    text = str(caught.value)
    assert caught.type is kind, text
    assert str(path.parent) in text
    assert re.search(message, text, re.DOTALL), text
    assert "\n" not in text
    assert seconds <= MAX_SECONDS
    assert peak <= MAX_BYTES + 2 * min(path.stat().st_size if path.is_file() else 0, MAX_BYTES)


@pytest.mark.parametrize("case", CASES)
def test_hostile_header(tmp_path: Path, case: str) -> None:
    raw, message = CASES[case]
    path = tmp_path / "bad.gguf"
    path.write_bytes(raw)
    assert_refused(path, r"bad\.gguf: .*" + message)


def test_the_builder_makes_sound_files(tmp_path: Path) -> None:
    """The cases above fail for the reason they name, not because the builder writes nonsense."""
    path = tmp_path / "good.gguf"
    pieces = (integer("general.alignment", 32), array("a", BOOL, 2, b"\0\1"), tensor("one"), tensor("two", offset=32))
    path.write_bytes(model(*pieces, entries=2, tensors=2))
    with open_gguf(path) as opened:
        assert list(opened.metadata) == ["general.alignment", "a"]
        assert [info.offset for info in opened.tensors.values()] == [160, 192]


@pytest.mark.parametrize(("type_id", "name"), [(9, "Q8_1"), (15, "Q8_K"), (24, "I8"), (26, "I32"), (28, "F64")])
def test_types_that_are_no_weights(tmp_path: Path, type_id: int, name: str) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(model(tensor("x", (256,), type_id), tensors=1, data=4096))
    assert_refused(path, f"'x' has the unsupported tensor type {name}; .*Q4_K", UnsupportedModelError)


@pytest.mark.parametrize(
    ("piece", "message"),
    [
        (array("huge", UINT8, 2**36), r"'huge' needs 68719476736 bytes.* at most 67108864 bytes"),
        (array("huge", STRING, 2**32), r"'huge' claims 4294967296 strings.* 2097152"),
        (entry("huge", STRING, string("", length=2**36)), r"'huge' claims 68719476736 bytes"),
    ],
)
def test_huge_lengths_in_a_huge_sparse_file(tmp_path: Path, piece: bytes, message: str) -> None:
    """Where the file is as long as it claims, the fixed limits hold."""
    path = tmp_path / "sparse.gguf"
    path.write_bytes(model(piece, entries=1))
    os.truncate(path, 2**37)
    assert_refused(path, message)


def test_strings_of_all_arrays_are_counted_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_header, "MAX_STRINGS", 5)
    path = tmp_path / "many.gguf"
    path.write_bytes(model(array("a", STRING, 3, bytes(24)), array("b", STRING, 3, bytes(24)), entries=2))
    assert_refused(path, r"'b' claims 3 strings, with earlier ones more than the 5")


def test_every_truncation_of_the_header(tmp_path: Path) -> None:
    raw = write_tiny_llama(tmp_path / "tiny.gguf").read_bytes()
    with open_gguf(tmp_path / "tiny.gguf") as whole:
        data_start = min(info.offset for info in whole.tensors.values())
        data_end = max(info.offset + info.nbytes for info in whole.tensors.values())
    path = tmp_path / "cut.gguf"
    path.write_bytes(raw)
    lengths = [data_end - 1, (data_start + data_end) // 2, *range(data_start, -1, -1)]
    for length in lengths:
        os.truncate(path, length)
        with pytest.raises(ModelFileError, match=r"cut\.gguf: "):
            open_gguf(path)


def test_not_a_readable_regular_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_refused(tmp_path, r"this is a directory")
    pipe = tmp_path / "pipe.gguf"
    os.mkfifo(pipe)
    assert_refused(pipe, r"pipe\.gguf: this is not a regular file")
    loop = tmp_path / "loop.gguf"
    loop.symlink_to(loop)
    assert_refused(loop, r"loop\.gguf: the file cannot be opened: .*symbolic links")
    locked = write_tiny_llama(tmp_path / "locked.gguf")

    def refuse(path: object, flags: int) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("ferrum_jax.files.os.open", refuse)  # as root, chmod would refuse nothing
    assert_refused(locked, r"locked\.gguf: the file cannot be opened: Permission denied")


def test_nothing_stays_open_after_a_failure(tmp_path: Path) -> None:
    parts = split_model(tmp_path)
    parts[2].unlink()
    before = len(os.listdir("/proc/self/fd"))
    assert_refused(parts[0], "is missing")
    assert len(os.listdir("/proc/self/fd")) == before


def split_model(directory: Path, stem: str = "m") -> list[Path]:
    """A sound model in 4 parts."""
    write_tiny_llama(directory / f"{stem}.gguf", split_max_tensors=6)
    parts = sorted(directory.glob(f"{stem}-*.gguf"))
    assert len(parts) == 4
    return parts


def set_integer(path: Path, key: str, value: int) -> None:
    raw = bytearray(path.read_bytes())
    at = raw.index(key.encode()) + len(key)
    (value_type,) = struct.unpack_from("<I", raw, at)
    struct.pack_into({2: "<H", 5: "<i"}[value_type], raw, at + 4, value)
    path.write_bytes(raw)


def link(source: Path, target: Path) -> None:
    target.unlink()
    target.symlink_to(source)


def swap_for_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


SPLITS: dict[str, tuple[Callable[[list[Path]], object], int, str]] = {
    "part missing": (lambda p: p[2].unlink(), 0, r"m-00003-of-00004\.gguf: part 3 of 4 is missing"),
    "first part missing": (lambda p: p[0].unlink(), 3, r"m-00001-of-00004\.gguf: part 1 of 4 is missing"),
    "cyclic: part 3 is a link to part 1": (lambda p: link(p[0], p[2]), 0, r"m-00003-.*same file as m-00001-.*cyclic"),
    "cyclic: part 1 is a link to part 2": (
        lambda p: link(p[1], p[0]),
        1,
        r"m-00001-.*'split\.no' is 1, but .* must be 0",
    ),
    "part is a link to itself": (lambda p: link(p[1], p[1]), 0, r"m-00002-.*cannot be opened"),
    "part repeated": (lambda p: shutil.copy(p[1], p[2]), 0, r"m-00003-.*'split\.no' is 1, but .* must be 2"),
    "part of another split": (lambda p: set_integer(p[1], "split.count", 7), 0, r"m-00002-.*'split\.count' is 7"),
    "numbering from one": (lambda p: set_integer(p[0], "split.no", 1), 0, r"'split\.no' is 1, but .* must be 0"),
    "tensor total": (
        lambda p: set_integer(p[3], "split.tensors.count", 20),
        0,
        r"m-00004-.*'split\.tensors\.count' is 20, but the 4 parts hold 21 tensors",
    ),
    "negative total": (lambda p: set_integer(p[0], "split.tensors.count", -1), 0, r"'split\.tensors\.count' is -1"),
    "count of the opened part": (lambda p: set_integer(p[0], "split.count", 3), 0, r"'split\.count' is 3.*-of-00003"),
    "count 0 in the opened part": (lambda p: set_integer(p[0], "split.count", 0), 0, r"'split\.count' is 0"),
    "damaged part": (lambda p: p[1].write_bytes(b"GGUF"), 0, r"m-00002-.*truncated"),
    "directory for a part": (lambda p: swap_for_directory(p[1]), 0, r"m-00002-.*directory"),
}


@pytest.mark.parametrize("case", SPLITS)
def test_hostile_split(tmp_path: Path, case: str) -> None:
    damage, opened, message = SPLITS[case]
    parts = split_model(tmp_path)
    damage(parts)
    assert_refused(parts[opened], message)


def test_part_renamed_away(tmp_path: Path) -> None:
    part = split_model(tmp_path)[0]
    assert_refused(part.rename(tmp_path / "model.gguf"), r"must be named NAME-00001-of-00004\.gguf")


def test_parts_named_of_another_count(tmp_path: Path) -> None:
    parts = [part.rename(tmp_path / part.name.replace("of-00004", "of-00005")) for part in split_model(tmp_path)]
    assert_refused(parts[0], r"m-00001-of-00005\.gguf: .*'split\.count' is 4: .*NAME-00001-of-00004\.gguf")


def test_part_number_beyond_the_count(tmp_path: Path) -> None:
    part = split_model(tmp_path)[0]
    assert_refused(part.rename(tmp_path / "m-00009-of-00004.gguf"), r"'split\.count' is 4: .*one part of several")


def test_named_as_a_part_without_split_keys(tmp_path: Path) -> None:
    path = write_tiny_llama(tmp_path / "m-00002-of-00003.gguf")
    assert_refused(path, r"'split\.count' is missing")


def test_same_tensor_in_two_parts(tmp_path: Path) -> None:
    parts = split_model(tmp_path)
    raw = parts[1].read_bytes()
    assert b"blk.1.attn_norm.weight" in raw
    parts[1].write_bytes(raw.replace(b"blk.1.attn_norm.weight", b"blk.0.attn_norm.weight"))
    assert_refused(parts[0], r"tensor 'blk\.0\.attn_norm\.weight' is also in m-0000")


def test_split_of_one_part_is_an_ordinary_file(tmp_path: Path) -> None:
    path = write_tiny_llama(tmp_path / "m-00001-of-00001.gguf", metadata={"split.count": 1, "split.no": 0})
    with open_gguf(path) as opened:
        assert opened.parts == (path,)
