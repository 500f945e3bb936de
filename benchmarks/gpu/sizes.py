"""The sizes at which things are measured, and the goals for the results."""

from __future__ import annotations

import dataclasses

from ferrum_jax import headers
from ferrum_jax.config import ModelConfig

TARGET = "h200"  # what the rehearsal compiles for


@dataclasses.dataclass(frozen=True)
class Goal:
    """What a figure should reach: `must` at least, `aim` at best; `floor` is the limit of any program (None: not known). All in
    `unit`."""

    unit: str
    floor: float | None
    must: float
    aim: float
    higher: bool = True

    def row(self, value: float) -> dict:
        """The goal and the measured value, as part of a result."""
        met = value >= self.must if self.higher else value <= self.must
        fields = {"unit": self.unit, "floor": self.floor, "must": self.must, "aim": self.aim}
        return {"value": value, **fields, "must_met": bool(met)}


GOALS = {
    "decode, batch 1": Goal("tokens/s", 2400, 600, 1200),
    "decode, batch 32": Goal("tokens/s", 9000, 3600, 6000),
    "prefill": Goal("tokens/s", 160_000, 15_000, 40_000),
    "experts, batch 1": Goal("of copy bandwidth", 1.0, 0.45, 0.70),
    "experts, batch 32": Goal("of copy bandwidth", 1.0, 0.45, 0.70),
    "attention, batch 32": Goal("of copy bandwidth", 1.0, 0.60, 0.80),
    "cold compile": Goal("s", None, 120, 40, higher=False),
    "warm start": Goal("s", None, 15, 5, higher=False),
}


def goal(name: str, value: float, sizes: Sizes) -> dict:
    """The fields of a result row for a figure with a goal; at small shapes the figure alone."""
    return GOALS[name].row(value) if sizes.real else {"value": value, "unit": GOALS[name].unit}


@dataclasses.dataclass(frozen=True)
class Sizes:
    """`config`: the model; `context`: tokens in the cache when decoding starts; `steps`: tokens a dispatch."""

    config: ModelConfig
    real: bool
    context: int
    batch: int
    prompt: int
    chunks: tuple[int, ...]  # prefill chunks that are compiled
    steps: int
    rounds: int  # samples of each time
    check_rows: tuple[int, ...]  # rows of the products that are checked
    check_tokens: tuple[int, ...]  # tokens of the mixtures that are checked
    check_lengths: tuple[int, ...]  # contexts of the attention that is checked
    kernel_layers: int  # different weights that a kernel is timed on
    long_context: int
    copy_bytes: int
    product: int  # rows and columns of the matrix product that is the arithmetic ceiling

    @property
    def capacity(self) -> int:
        """Tokens a row of the cache holds."""
        return max(self.context, self.prompt) + 64


_HEADER = headers.bundled("qwen3:30b-a3b")
assert _HEADER is not None
REAL = Sizes(
    config=dataclasses.replace(_HEADER.config(), dtype="bfloat16"),
    real=True,
    context=1024,
    batch=32,
    prompt=2048,
    chunks=(64, 512),
    steps=16,
    rounds=7,
    check_rows=(1, 17, 130),
    check_tokens=(1, 33, 300),
    check_lengths=(1, 16, 17, 300, 3000),
    kernel_layers=12,
    long_context=8192,
    copy_bytes=2 << 30,
    product=8192,
)
SMALL = dataclasses.replace(
    REAL,
    config=dataclasses.replace(
        REAL.config,
        num_layers=3,
        hidden_size=256,
        num_heads=4,
        num_kv_heads=2,
        head_dim=64,
        rope_dim=64,
        vocab_size=512,
        num_experts=8,
        experts_per_token=2,
        expert_intermediate_size=256,
    ),
    real=False,
    context=40,
    batch=4,
    prompt=96,
    chunks=(32,),
    steps=3,
    rounds=2,
    check_rows=(1, 17),
    check_tokens=(1, 9),
    check_lengths=(1, 17, 70),
    kernel_layers=2,
    long_context=128,
    copy_bytes=1 << 16,
    product=64,
)
