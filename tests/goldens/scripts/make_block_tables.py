"""Write pallas_kernels/blocks/tables.py: the grids of the IQ1, IQ2 and IQ3 formats, as gguf-py holds them.

A grid row lists the 8 (IQ3: 4) magnitudes of neighboring weights. Each magnitude is one of a few levels, so a row is
8 codes of 2 bits (IQ3: 4 of 3), first weight lowest: one uint16. Run it from the repository's root.
"""

import base64
from pathlib import Path

import gguf.quants
import numpy as np

GRIDS = ("IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ1_S")
HEADER = '''"""Grids of the IQ1, IQ2 and IQ3 formats; written by tests/goldens/scripts/make_block_tables.py.

A row of a grid is a uint16 (here little-endian, base64): the codes of 8 neighboring weights, 2 bits each, or for IQ3
of 4 weights, 3 bits each, the first weight lowest. What a code stands for is said by the format that uses the grid.
"""

import base64

import numpy as np


def _grid(*lines: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode("".join(lines)), dtype="<u2").astype(np.uint16)


'''


def packed(name: str) -> np.ndarray:
    """The grid of format `name`: uint16 [rows]."""
    quant = getattr(gguf.quants, name)
    quant.init_grid()
    levels = np.array(quant.grid_map, np.float32)
    grid = quant.grid.reshape(quant.grid_shape)
    codes = np.searchsorted(levels, grid)
    assert (levels[codes] == grid).all()
    bits = 3 if len(levels) > 4 else 2
    return (codes << (bits * np.arange(grid.shape[1]))).sum(axis=1).astype("<u2")


def main() -> None:
    parts = []
    for name in GRIDS:
        text = base64.b64encode(packed(name).tobytes()).decode()
        lines = [f'    "{text[i : i + 112]}",\n' for i in range(0, len(text), 112)]
        parts.append(f"{name}_GRID = _grid(\n{''.join(lines)})\n")
    Path("pallas_kernels/blocks/tables.py").write_text(HEADER + "\n".join(parts))


if __name__ == "__main__":
    main()
