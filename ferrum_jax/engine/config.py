"""What an engine is asked to be, and the few shapes it compiles for."""

from __future__ import annotations

import dataclasses

from ferrum_jax.kv_cache import kv_dtype

MAX_STEPS = 16  # decode steps of one dispatch at most, where the engine chooses


@dataclasses.dataclass(frozen=True)
class EngineConfig:
    """Sizes of an engine.

    page_size: tokens of a page. num_pages: pages of the KV cache; None: as many as `max_seqs` sequences of the model's
    longest context fill, within the memory there is. max_seqs: sequences that run at once. token_budget: tokens of a
    step at most, decodes first; at least one prompt token always finds a place beside them. steps_per_dispatch: decode
    steps that one dispatch makes while nothing waits; None: so many that a dispatch takes about 50 ms. prefix_cache:
    whether pages are found again by their text. kv_dtype: of the KV cache; None: the model's. speculation: tokens to
    draft from the sequence's own text and verify at once; 0: none.
    """

    page_size: int = 16
    num_pages: int | None = None
    max_seqs: int = 32
    token_budget: int = 512
    steps_per_dispatch: int | None = None
    prefix_cache: bool = True
    kv_dtype: str | None = None
    speculation: int = 0

    def __post_init__(self) -> None:
        for field in ("page_size", "num_pages", "max_seqs", "token_budget", "steps_per_dispatch", "speculation"):
            value, least = getattr(self, field), 0 if field == "speculation" else 1
            if value is None and field in ("num_pages", "steps_per_dispatch"):
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"EngineConfig.{field} must be an integer of at least {least}, not {value!r}")
        if not isinstance(self.prefix_cache, bool):
            raise ValueError(f"EngineConfig.prefix_cache must be True or False, not {self.prefix_cache!r}")
        if self.kv_dtype is not None:
            object.__setattr__(self, "kv_dtype", kv_dtype(self.kv_dtype))

    @property
    def steps(self) -> int:
        """Decode steps of one dispatch at most."""
        return self.steps_per_dispatch or MAX_STEPS

    def decode_rows(self) -> list[int]:
        """Numbers of rows that decoding is compiled for: 1, 4, 16, ... and max_seqs."""
        return _ladder(1, self.max_seqs)

    def mixed_rows(self) -> list[int]:
        """Numbers of rows that steps with prompt tokens are compiled for."""
        return sorted({min(4, self.max_seqs), self.max_seqs})

    def mixed_tokens(self) -> list[int]:
        """Numbers of tokens that steps with prompt tokens are compiled for."""
        longest = max(self.token_budget, self.max_seqs + 1)
        return sorted({min(64, longest), longest})


def _ladder(first: int, last: int) -> list[int]:
    """first, 4 * first, ... below last, and last."""
    sizes = []
    while first < last:
        sizes.append(first)
        first *= 4
    return [*sizes, last]


def at_least(sizes: list[int], wanted: int) -> int:
    """The smallest of the sizes that is not below `wanted`."""
    return next(size for size in sizes if size >= wanted)
