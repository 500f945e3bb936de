"""Damaged scales of GGUF's blocks are detected while they are read: those that gguf-py unpacks to infinity or NaN, and no
others."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest

import ferrum_jax as fj
from ferrum_jax.weights import ggml_types
from ferrum_jax.weights.block_scales import read_blocks
from ferrum_jax.weights.gguf import open_gguf
from support.tiny_gguf import write_tiny_llama

INFINITY, NAN, LARGEST = 0x7C00, 0xFE01, 0x7BFF


def write(path: Path, format: str, place: int | None = None, half: int = 0) -> np.ndarray:
    """Three rows of zero blocks, in one of them a half; what gguf-py makes of them."""
    kind = ggml_types.BY_NAME[format]
    blocks = np.zeros((3, 2, kind.block_bytes), np.uint8)
    if place is not None:
        blocks[1, 1, place : place + 2] = half & 255, half >> 8
        blocks[1, 1, : place if place > 2 else 0] = 1
        blocks[1, 1, place + 2 :] = np.where(blocks[1, 1, place + 2 :] == 0, 1, blocks[1, 1, place + 2 :])
    raw = blocks.reshape(3, -1)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("a.weight", raw, raw_dtype=gguf.GGMLQuantizationType[format])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with np.errstate(all="ignore"):
        return gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[format])


def read(path: Path) -> None:
    with open_gguf(path) as file:
        info = file.tensors["a.weight"]
        read_blocks(file, info, out := np.empty(info.nbytes, np.uint8))
        assert (out == file.read(info)).all()


@pytest.mark.parametrize("format", ggml_types.HALVES)
def test_every_half_of_a_block(format: str, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    for place in ggml_types.HALVES[format]:
        for half in (INFINITY, NAN):
            assert not np.isfinite(write(path, format, place, half)).all()
            with pytest.raises(fj.ModelFileError) as caught:
                read(path)
            assert f"model.gguf: tensor 'a.weight': block 3 ({format}) has a scale that is not finite" in str(caught.value)
        assert np.isfinite(write(path, format, place, LARGEST)).all()
        read(path)


@pytest.mark.parametrize("format", ["Q8_0", "Q4_0", "Q4_1"])
def test_a_model_with_a_damaged_block(format: str, tmp_path: Path) -> None:
    path = write_tiny_llama(tmp_path / "model.gguf", tensor_type=format)
    with open_gguf(path) as file:
        info = file.tensors["blk.1.ffn_up.weight"]
    raw = bytearray(path.read_bytes())
    at = info.offset + 5 * ggml_types.BY_NAME[format].block_bytes
    raw[at : at + 2] = NAN.to_bytes(2, "little")
    path.write_bytes(raw)
    with pytest.raises(fj.ModelFileError, match=rf"tensor 'blk\.1\.ffn_up\.weight': block 5 \({format}\) has a scale"):
        fj.load(path)
