"""What it takes to run a model: its parameters on a device, its compiled programs, and counters of their work.

The internals of a `Model`, which the engine works with.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from ferrum_jax import memory
from ferrum_jax.config import ModelConfig
from ferrum_jax.distributed import Placement
from ferrum_jax.programs import Programs
from ferrum_jax.state import DecodeState, KVCache, bytes_per_token
from ferrum_jax.structured.grammar import Grammars
from ferrum_jax.tokenizer import Tokenizer
from ferrum_jax.units import readable_bytes, shown_dtype

PAGE = 16  # tokens


class Runtime:
    """The attributes that `Model` describes, and load_s, seconds that loading took, and step_seconds, duration of
    the decode steps that an engine timed last (0 before)."""

    def __init__(
        self,
        config: ModelConfig,
        params: Any,
        tokenizer: Tokenizer,
        placement: Placement,
        kv_dtype: str,
        max_seq_len: int,
        adapters: Mapping[str, str] | None = None,
    ):
        self.config, self.params, self.tokenizer = config, params, tokenizer
        self.placement, self.kv_dtype, self.max_seq_len = placement, kv_dtype, max_seq_len
        self.adapters = dict(adapters or {})
        self.programs = Programs(placement)
        self.load_s = 0.0
        self.step_seconds = 0.0
        self._fingerprint = ""
        self._grammars: Grammars | None = None
        self._counters: dict[str, float] = {f"{kind}_{unit}": 0 for kind in ("prefill", "decode") for unit in ("tokens", "s")}

    def __repr__(self) -> str:
        config, size = self.config, readable_bytes(memory.nbytes(self.params))
        return (
            f"<Model {config.architecture}, {config.num_layers} layers, {size}, {config.dtype}, context {self.max_seq_len:,}, "
            f"{self.placement}>"
        )

    def new_cache(self, num_pages: int, rows: int) -> KVCache | DecodeState:
        """An empty cache of `num_pages` pages of 16 tokens on the device, with the states of `rows` sequences. Raises
        OutOfMemoryError if it does not fit."""
        tokens = num_pages * PAGE
        abstract = memory.abstract_state(self.config, num_pages, PAGE, self.kv_dtype, self.placement, rows)
        size = memory.nbytes(abstract)
        count = f"the KV cache for {tokens:,} tokens ({shown_dtype(self.kv_dtype)}) takes {readable_bytes(size)}"
        memory.require(size, self.placement, count)
        with memory.explained(self.placement, lambda: count):
            state = self.placement.zeros(abstract)
        return state if len(state.parts) > 1 else state.pools[0]

    def room(self) -> int:
        """The longest row that is offered by default, in tokens: the context, or as much of it as fits its keys and values into
        a quarter of the free memory."""
        limit = memory.limit(self.placement)
        fitting = limit.free // 4 // bytes_per_token(self.config, self.kv_dtype) if limit else self.max_seq_len
        return max(1, min(self.max_seq_len, fitting))

    def adapter_index(self, adapter: str | None) -> int:
        """The index of the adapter with this name in `params`; -1 for None. Raises ValueError for an unknown name."""
        if adapter is None:
            return -1
        if not isinstance(adapter, str) or adapter not in self.adapters:
            known = ", ".join(self.adapters) or "none"
            raise ValueError(f"adapter {adapter!r} is not loaded; loaded: {known}")
        return list(self.adapters).index(adapter)

    @property
    def grammars(self) -> Grammars:
        """The grammars for the tokenizer. Raises ImportError if their library is not installed."""
        if self._grammars is None or self._grammars.tokenizer is not self.tokenizer:
            self._grammars = Grammars(self.tokenizer)
        return self._grammars

    def fingerprint(self) -> str:
        """A short text that identifies the model: architecture, dtype, and a digest of its shapes and of some weights."""
        if self._fingerprint:
            return self._fingerprint
        digest = hashlib.blake2b(repr((self.config, self.adapters)).encode(), digest_size=16)
        if self.placement.size > 1:  # whose states are cut in another way
            digest.update(repr(self.placement.mesh.shape).encode())
        for leaf in jax.tree.leaves(self.params):
            digest.update(f"{leaf.shape} {leaf.dtype}".encode())
            leaf = np.asarray(leaf) if self.placement.platform == "cpu" else leaf  # without a copy or a program
            digest.update(np.asarray(leaf[(0,) * (leaf.ndim - 1)][:64] if leaf.ndim else leaf).tobytes())
        self._fingerprint = f"{self.config.architecture} {self.config.dtype} {digest.hexdigest()}"
        return self._fingerprint

    def count(self, kind: str, tokens: int, seconds: float) -> None:
        """Adds to `timings`: kind is "prefill" or "decode"."""
        self._counters[f"{kind}_tokens"] += tokens
        self._counters[f"{kind}_s"] += seconds

    def timings(self) -> dict[str, float]:
        """See `Model.timings`."""
        return {"load_s": self.load_s, "compile_s": self.programs.compile_s, **self._counters}
