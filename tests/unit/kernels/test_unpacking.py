"""Unpacking the planes of a device layout gives the blocks that were packed."""

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.blocks import FORMATS, gpu, tpu, unpack
from pallas_kernels.blocks.layouts import LAYOUTS
from pallas_kernels.blocks.synthetic import random_blocks
from pallas_kernels.blocks.unpacking import unpack_blocks

CASES = [(layout.NAME, format) for layout in (gpu, tpu) for format in layout.PACKINGS]


@pytest.mark.parametrize(("layout", "format"), CASES)
def test_blocks_come_back(layout: str, format: str):
    rows, columns = 200, 512
    blocks = random_blocks(format, rows, columns, np.random.default_rng(rows), 1.0)
    planes = [np.asarray(plane) for plane in LAYOUTS[layout].pack(jnp.asarray(blocks), format)]
    back = unpack_blocks(planes, format, layout, rows, columns)
    if format == "MXFP4":  # the layout of TPUs makes its negative zeros positive
        assert np.array_equal(unpack(back, format), unpack(blocks, format))
        assert np.array_equal(np.asarray(LAYOUTS[layout].pack(jnp.asarray(back), format)[0]), planes[0])
    else:
        assert np.array_equal(back, blocks)


@pytest.mark.parametrize(("layout", "format", "columns"), [("gpu", "Q8_0", 64), ("gpu", "Q5_1", 192), ("tpu", "Q5_0", 384)])
def test_rows_that_are_no_whole_units(layout: str, format: str, columns: int):
    blocks = random_blocks(format, 130, columns, np.random.default_rng(1), 1.0)
    planes = [np.asarray(plane) for plane in LAYOUTS[layout].pack(jnp.asarray(blocks), format)]
    assert np.array_equal(unpack_blocks(planes, format, layout, 130, columns), blocks)


def test_the_layout_of_files_is_the_blocks_themselves():
    stored = random_blocks("BF16", 3, 64, np.random.default_rng(2), 1.0)
    plane = stored.view(FORMATS["BF16"].storage)
    assert np.array_equal(unpack_blocks([plane], "BF16", "ggml", 3, 64), stored)
