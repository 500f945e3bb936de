"""The configuration of an engine, and the few shapes that it compiles."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

from ferrum_jax.config import ModelConfig
from ferrum_jax.state import kv_dtype

MAX_SEQS = 1 << 16  # limit of sequences that run at once
MAX_STEPS = 64  # limit of decode steps in a dispatch if the engine chooses
_DRAFTING_STEPS = 16  # the same with drafts, whose results need more room
_MOST = {
    "page_size": 1 << 16, "max_seqs": MAX_SEQS, "token_budget": 1 << 20, "speculation": 1 << 10, "num_pages": 2**31 - 1,
    "steps_per_dispatch": 1 << 12, "initial_pages": 2**31 - 1, "checkpoints": 1 << 20,
    "checkpoint_bytes": 1 << 50,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class EngineConfig:
    """The configuration of an engine.

    Attributes:
      page_size: tokens per page; 1 to 65,536.
      num_pages: pages of the KV cache, 1 to 2**31 - 1; None: enough for `max_seqs` sequences of the model's full context, or as
        many as fit the free memory. If layers have different windows, this is the pool of the layers that see most.
      initial_pages: pages at the beginning, 1 to 2**31 - 1. When they are used up, the cache grows by a factor of four, up to
        `num_pages`, and steps are compiled for the new size. None: all pages from the beginning.
      max_seqs: sequences that run together; 1 to 65,536.
      token_budget: limit of the tokens in a step, 1 to 1,048,576. Decoding rows come first; there is always room for at least
        one prompt token. While others decode, a step has fewer (pace.py).
      steps_per_dispatch: decode steps of one dispatch while no request waits, 1 to 4,096; None: as many as take
        `dispatch_seconds`.
      dispatch_seconds: duration of a dispatch with several decode steps, greater than 0. Shorter is smoother, longer is faster.
      prefix_cache: whether requests share the pages of equal beginnings.
      kv_dtype: dtype of the KV cache; None: the model's.
      checkpoints: for a model with layers that recur, the number of states kept at beginnings of texts, from which another
        request may continue, 0 to 1,048,576; None: `max_seqs`. With more than `max_seqs`, long prompts leave states on their
        way, as many tokens apart as lets `max_seqs` texts of the model's full context fit.
      checkpoint_bytes: the bytes that these states may take, instead of their number; 0 to 2**50.
      speculation: number of tokens to draft from the sequence's own text and verify in one step, 0 to 1,024; 0: off.

    Raises:
      ValueError: for a wrong value; it names the field and what would be right.
    """

    page_size: int = 16
    num_pages: int | None = None
    max_seqs: int = 32
    token_budget: int = 512
    steps_per_dispatch: int | None = None
    prefix_cache: bool = True
    kv_dtype: str | None = None
    speculation: int = 0
    initial_pages: int | None = None
    checkpoints: int | None = None
    checkpoint_bytes: int | None = None
    dispatch_seconds: float = 0.05

    def __post_init__(self) -> None:
        optional = ("num_pages", "steps_per_dispatch", "initial_pages", "checkpoints", "checkpoint_bytes")
        for field, most in _MOST.items():
            value, least = getattr(self, field), 0 if field in ("speculation", "checkpoints", "checkpoint_bytes") else 1
            if value is None and field in optional:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
                raise ValueError(
                    f"EngineConfig.{field} must be an integer of at least {least} and at most {most}, not {value!r:.40}"
                )
        if self.checkpoints is not None and self.checkpoint_bytes is not None:
            raise ValueError("EngineConfig.checkpoint_bytes is given in place of checkpoints, not in addition to it")
        seconds = self.dispatch_seconds
        if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 < seconds < float("inf"):
            raise ValueError(f"EngineConfig.dispatch_seconds must be a number above 0, not {self.dispatch_seconds!r}")
        if not isinstance(self.prefix_cache, bool):
            raise ValueError(f"EngineConfig.prefix_cache must be True or False, not {self.prefix_cache!r}")
        if self.kv_dtype is not None:
            object.__setattr__(self, "kv_dtype", kv_dtype(self.kv_dtype))

    def of_model(self, model: ModelConfig) -> EngineConfig:
        """This configuration with the number of a model's states that fit `checkpoint_bytes`."""
        if self.checkpoint_bytes is None:
            return self
        count = min(self.checkpoint_bytes // max(1, model.bytes_per_state), _MOST["checkpoints"])
        return dataclasses.replace(self, checkpoints=count, checkpoint_bytes=None)

    def stride(self, context: int) -> int:
        """How many pages apart a prompt leaves states on its way, for texts of up to `context` tokens; 0: it leaves none. Not
        less than a step reads, which passes one such place."""
        if (rest := self.num_checkpoints - self.max_seqs) <= 0:
            return 0
        return -(-max(-(-context * self.max_seqs // rest), self.token_budget) // self.page_size)

    @property
    def steps(self) -> int:
        """Limit of decode steps in a dispatch."""
        return self.steps_per_dispatch or (_DRAFTING_STEPS if self.speculation else MAX_STEPS)

    @property
    def longest(self) -> int:
        """Limit of tokens in a mixed step."""
        return max(self.token_budget, self.max_seqs + 1)

    @property
    def num_checkpoints(self) -> int:
        """States that are kept in addition to those of running sequences."""
        return self.max_seqs if self.checkpoints is None else self.checkpoints

    @property
    def num_states(self) -> int:
        """Places for states: one per slot, the checkpoints, and with speculation one for each token of a verification."""
        width = 1 + self.speculation if self.speculation else 0
        return self.max_seqs * (1 + width) + self.num_checkpoints

    @property
    def at_once(self) -> int:
        """Limit of tokens that a step adds to a sequence."""
        return max(self.longest, 1 + self.speculation)

    @functools.cached_property
    def buckets(self) -> list[Bucket]:
        """All shapes that are compiled, smaller ones first. Decoding: 1, 4, 16, ... and `max_seqs` rows. Steps with prompt
        tokens: 16 tokens (the end of a cached prompt) and `longest` (a long prompt) for a few rows, and 64, 128, 256, ... for
        all rows, because a step costs as much as its shape."""
        few = min(4, self.max_seqs)
        tokens = [size for size in (16, *_ladder(64, self.longest, 2)) if size < self.longest] + [self.longest]
        mixed = {Bucket(size, self.max_seqs) for size in tokens[1:]} | {Bucket(tokens[0], few), Bucket(self.longest, few)}
        if len(tokens) == 1:
            mixed.add(Bucket(self.longest, self.max_seqs))
        return sorted({Bucket(0, rows) for rows in _ladder(1, self.max_seqs, 4)} | mixed)

    def bucket(self, tokens: int, rows: int) -> Bucket:
        """The smallest shape for this many tokens (0: only decoding) and rows."""
        return self.fitting(tokens, rows)[0]

    def fitting(self, tokens: int, rows: int) -> list[Bucket]:
        """All shapes for this many tokens and rows, smaller ones first."""
        return [b for b in self.buckets if bool(b.tokens) == bool(tokens) and b.tokens >= tokens and b.rows >= rows]


def config_of(config: EngineConfig | Mapping[str, Any]) -> EngineConfig:
    """The configuration, or one made from a dict of its fields; ValueError for anything else."""
    if isinstance(config, EngineConfig):
        return config
    if not isinstance(config, Mapping):
        raise ValueError(f"config must be an EngineConfig or a dict of its fields, not {type(config).__name__}")
    fields = [field.name for field in dataclasses.fields(EngineConfig)]
    if unknown := [name for name in config if name not in fields]:
        raise ValueError(f"EngineConfig has no field {unknown[0]!r}; its fields are {', '.join(fields)}")
    return EngineConfig(**config)


class Bucket(NamedTuple):
    """The shape of a program: `tokens` on the ragged axis (0 for only decoding), and rows."""

    tokens: int
    rows: int

    def __str__(self) -> str:
        return f"{self.tokens} tokens of {self.rows} rows" if self.tokens else f"decoding {self.rows} rows"


def _ladder(first: int, last: int, factor: int) -> list[int]:
    """first, first * factor, ... while below last, and last."""
    sizes = []
    while first < last:
        sizes.append(first)
        first *= factor
    return [*sizes, last]
