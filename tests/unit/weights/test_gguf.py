"""Reading sound GGUF files: everything agrees with gguf-py, which shares no code with our parser."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFValueType

from ferrum_jax.errors import ModelFileError, ModelNotFoundError
from ferrum_jax.weights import ggml_types
from ferrum_jax.weights.gguf import GGUFFile, open_gguf
from support import environment
from support.tiny_gguf import write_tiny_llama

SCALARS = {
    "UINT8": 255,
    "INT8": -128,
    "UINT16": 65535,
    "INT16": -32768,
    "UINT32": 2**32 - 1,
    "INT32": -(2**31),
    "UINT64": 2**64 - 1,
    "INT64": -(2**63),
    "FLOAT32": float(np.float32(0.1)),
    "FLOAT64": 0.1,
    "BOOL": True,
    "STRING": "Straße 東京 🧪\n",
}
ARRAYS = {
    "UINT8": [0, 255],
    "INT8": [-128, 127],
    "UINT16": [0, 65535, 7],
    "INT16": [-32768, 32767],
    "UINT32": [2**32 - 1],
    "INT32": [-(2**31), 2**31 - 1],
    "UINT64": [2**64 - 1, 0],
    "INT64": [-(2**63), 2**63 - 1],
    "FLOAT32": [0.5, -1.25, float("inf")],
    "FLOAT64": [0.1, 1e300],
    "BOOL": [True, False, True],
    "STRING": ["", "a", "Ġthe", "\x00nul", "東京", "x" * 70_000],
}


def write_all_kinds(path: Path, split_max_tensors: int = 0) -> Path:
    """Every metadata type and array type, and tensors of every type that gguf-py can make, of one to four axes."""
    rng = np.random.default_rng(1)
    writer = gguf.GGUFWriter(path, "llama", split_max_tensors=split_max_tensors)
    for name, value in SCALARS.items():
        writer.add_key_value(f"scalar.{name}", value, GGUFValueType[name])
    for name, values in ARRAYS.items():
        writer.add_key_value(f"array.{name}", values, GGUFValueType.ARRAY, GGUFValueType[name])
    for kind in ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "TQ1_0", "TQ2_0"):
        raw_type = GGMLQuantizationType[kind]
        array = rng.standard_normal((3, 256)).astype(np.float32)
        writer.add_tensor(f"{kind}.weight", gguf.quants.quantize(array, raw_type), raw_dtype=raw_type)
    for ggml_type in ggml_types.TYPES:
        if ggml_type.holds_weights:
            shape = (2, 3, 2 * ggml_type.block_bytes)
            writer.add_tensor(
                f"experts.{ggml_type.name}",
                rng.integers(0, 256, shape, np.uint8),
                raw_dtype=GGMLQuantizationType(ggml_type.type_id),
            )
    writer.add_tensor("one", np.ones(5, np.float32))
    writer.add_tensor("four", rng.standard_normal((2, 3, 4, 5)).astype(np.float32))
    parts = writer.format_shard_names(path)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return parts[0]


def assert_agrees(model: GGUFFile, readers: list[gguf.GGUFReader]) -> None:
    fields = {key: field for key, field in readers[0].fields.items() if not key.startswith("GGUF.")}
    assert list(model.metadata) == list(fields)
    for key, field in fields.items():
        value, expected = model.metadata[key], field.contents()
        if isinstance(value, np.ndarray):
            assert value.dtype == readers[0].gguf_scalar_to_np[field.types[-1]]
            assert value.tolist() == expected
        else:
            assert type(value) is type(expected)
            assert value == expected, key
    tensors = [tensor for reader in readers for tensor in reader.tensors]
    assert list(model.tensors) == [tensor.name for tensor in tensors]
    assert model.tensor_bytes == sum(tensor.n_bytes for tensor in tensors)
    for tensor in tensors:
        info = model.tensors[tensor.name]
        assert info.format == tensor.tensor_type.name
        assert info.shape == tuple(reversed(tensor.shape.tolist()))
        assert (info.offset, info.nbytes) == (tensor.data_offset, tensor.n_bytes)
        assert np.array_equal(model.read(info), tensor.data.reshape(-1).view(np.uint8))


def test_every_type_agrees_with_gguf_py(tmp_path: Path) -> None:
    path = write_all_kinds(tmp_path / "all.gguf")
    with open_gguf(path) as model:
        assert model.path == path
        assert model.parts == (path,)
        assert_agrees(model, [gguf.GGUFReader(path)])
        assert model.metadata["array.STRING"] == ARRAYS["STRING"]
        assert model.metadata["scalar.STRING"] == SCALARS["STRING"]
        assert model.metadata["scalar.FLOAT32"] == SCALARS["FLOAT32"]
        assert model.tensors["four"].shape == (2, 3, 4, 5)


@pytest.mark.parametrize("alignment", [8, 64, 4096])
def test_custom_alignment(tmp_path: Path, alignment: int) -> None:
    path = tmp_path / "aligned.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_custom_alignment(alignment)
    writer.add_tensor("a", np.arange(3, dtype=np.float32))
    writer.add_tensor("b", np.arange(5, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with open_gguf(path) as model:
        assert_agrees(model, [gguf.GGUFReader(path)])
        assert all(info.offset % alignment == 0 for info in model.tensors.values())


def test_version_2_and_trailing_bytes(tmp_path: Path) -> None:
    raw = write_tiny_llama(tmp_path / "tiny.gguf").read_bytes()
    path = tmp_path / "v2.gguf"
    path.write_bytes(raw[:4] + (2).to_bytes(4, "little") + raw[8:] + b"trailing")
    with open_gguf(path) as model:
        assert_agrees(model, [gguf.GGUFReader(path)])


def test_split_file_opens_from_any_part(tmp_path: Path) -> None:
    write_all_kinds(tmp_path / "model.gguf", split_max_tensors=7)
    parts = sorted(tmp_path.glob("model-*.gguf"))
    assert len(parts) > 3
    readers = [gguf.GGUFReader(part) for part in parts]
    for part in parts:
        with open_gguf(part) as model:
            assert model.parts == tuple(parts)
            assert model.path == parts[0]
            assert_agrees(model, readers)


def test_split_file_with_metadata_alone_in_the_first_part(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama", split_max_tensors=1, small_first_shard=True)
    for name in ("a", "b"):
        writer.add_tensor(name, np.ones(4, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    parts = sorted(tmp_path.glob("model-*.gguf"))
    with open_gguf(parts[1]) as model:
        assert_agrees(model, [gguf.GGUFReader(part) for part in parts])
        assert [info.path for info in model.tensors.values()] == parts[1:]


def test_read_into_reads_any_range(tmp_path: Path) -> None:
    with open_gguf(write_tiny_llama(tmp_path / "tiny.gguf")) as model:
        info = model.tensors["blk.1.ffn_down.weight"]
        whole = model.read(info)
        assert whole.shape == (info.nbytes,)
        out = np.zeros((2, 50), np.uint8)
        model.read_into(info, out, start=123)
        assert np.array_equal(out.reshape(-1), whole[123:223])
        model.read_into(info, out, start=info.nbytes - 100)
        assert np.array_equal(out.reshape(-1), whole[-100:])
        model.read_into(info, np.empty(0, np.uint8), start=info.nbytes)
        for bad_out, start in (
            (out, -1),
            (out, info.nbytes - 99),
            (out.view(np.int8), 0),
            (out[:, ::2], 0),
        ):
            with pytest.raises(ValueError, match=r"read_into|not within"):
                model.read_into(info, bad_out, start)
    with pytest.raises(ValueError, match="closed"):
        model.read(info)


def test_reads_longer_than_one_chunk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ferrum_jax.weights.opened._READ_BYTES", 1000)
    path = write_tiny_llama(tmp_path / "tiny.gguf")
    with open_gguf(path) as model:
        assert_agrees(model, [gguf.GGUFReader(path)])


def test_a_file_cut_after_opening_is_reported(tmp_path: Path) -> None:
    path = write_tiny_llama(tmp_path / "tiny.gguf")
    with open_gguf(path) as model:
        info = model.tensors["output.weight"]
        with path.open("r+b") as file:
            file.truncate(info.offset + 100)
        with pytest.raises(ModelFileError, match=r"tiny\.gguf.*ends inside tensor 'output\.weight', after 100 of"):
            model.read(info)


def test_missing_file_is_not_a_bad_file(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match=r"absent\.gguf: no such file"):
        open_gguf(tmp_path / "absent.gguf")


def test_large_vocabulary_is_fast(tmp_path: Path) -> None:
    """Qwen's size. It takes 0.1 s on an idle core; the bound is for a busy one, and item-by-item reads take seconds."""
    path = tmp_path / "vocabulary.gguf"
    tokens = [f"Ġtoken{i}" for i in range(151_936)]
    merges = [f"Ġtok en{i}" for i in range(151_387)]
    writer = gguf.GGUFWriter(path, "qwen2")
    writer.add_array("tokenizer.ggml.tokens", tokens)
    writer.add_key_value("tokenizer.ggml.merges", merges, GGUFValueType.ARRAY)
    writer.add_key_value("tokenizer.ggml.scores", [0.0] * 151_936, GGUFValueType.ARRAY)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        with open_gguf(path) as model:
            seconds.append(time.perf_counter() - start)
    assert model.metadata["tokenizer.ggml.tokens"] == tokens
    assert model.metadata["tokenizer.ggml.merges"] == merges
    assert min(seconds) <= 0.5


def test_type_table_agrees_with_gguf_py() -> None:
    theirs = {(kind.value, kind.name, *size) for kind, size in gguf.GGML_QUANT_SIZES.items()}
    assert {tuple(ggml_type) for ggml_type in ggml_types.TYPES} >= theirs
    known_to_gguf_py = {kind.value for kind in GGMLQuantizationType}
    assert {tuple(t) for t in ggml_types.TYPES if t.type_id in known_to_gguf_py} == theirs
    can_dequantize = {kind.name for kind in gguf.quants._type_traits} | {"F32", "F16"}
    assert {t.name for t in ggml_types.TYPES if t.holds_weights} == can_dequantize


def test_type_table_agrees_with_the_kernels() -> None:
    from pallas_kernels.blocks import FORMATS

    ours = {t.name: (t.block_size, t.block_bytes) for t in ggml_types.TYPES if t.holds_weights}
    assert {name: (spec.block_size, spec.block_bytes) for name, spec in FORMATS.items()} == ours


def test_reading_headers_does_not_import_jax() -> None:
    code = "import sys, ferrum_jax.weights.gguf; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env=environment(), check=False).returncode == 0
