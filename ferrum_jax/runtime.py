"""What it takes to run a model: its parameters on a device, its compiled programs, and counters of what they did."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from ferrum_jax import memory
from ferrum_jax.config import ModelConfig
from ferrum_jax.kv_cache import KVCache, bytes_per_token, new_cache
from ferrum_jax.programs import Programs
from ferrum_jax.tokenizer import Tokenizer
from ferrum_jax.units import readable_bytes, shown_dtype
from pallas_kernels.dispatch import target_of

PAGE = 16  # tokens


class Runtime:
    """`params` is a pytree of arrays, every weight once; `config` is static; `max_seq_len` counts prompt and output;
    `adapters`: a digest of each LoRA adapter beside the weights by its name, in the order in which `params` has them."""

    def __init__(
        self,
        config: ModelConfig,
        params: Any,
        tokenizer: Tokenizer,
        device: jax.Device,
        kv_dtype: str,
        max_seq_len: int,
        adapters: Mapping[str, str] | None = None,
    ):
        self.config, self.params, self.tokenizer = config, params, tokenizer
        self.device, self.kv_dtype, self.max_seq_len = device, kv_dtype, max_seq_len
        self.adapters = dict(adapters or {})
        self.programs = Programs(device)
        self.load_s = 0.0
        self.step_seconds = 0.0  # of the decode steps that an engine has timed last; 0: none yet
        self._fingerprint = ""
        self._counters: dict[str, float] = {f"{kind}_{unit}": 0 for kind in ("prefill", "decode") for unit in ("tokens", "s")}

    def new_cache(self, num_pages: int) -> KVCache:
        """An empty cache of `num_pages` pages of 16 tokens on the model's device; OutOfMemoryError where it does not fit."""
        tokens = num_pages * PAGE
        cache = memory.abstract_cache(self.config, num_pages, PAGE, self.kv_dtype, target_of(self.device))
        count = (
            f"the KV cache for {tokens:,} tokens ({shown_dtype(self.kv_dtype)}) takes {readable_bytes(memory.nbytes(cache))}"
        )
        memory.require(memory.nbytes(cache), self.device, count)
        with jax.default_device(self.device), memory.explained(self.device, lambda: count):
            return new_cache(self.config, num_pages=num_pages, page_size=PAGE, dtype=self.kv_dtype)

    def room(self) -> int:
        """Tokens of the longest row that may be asked for without asking what it takes: the context, or as much of it as a
        quarter of the free memory holds keys and values of."""
        limit = memory.device_limit(self.device)
        fitting = limit.free // 4 // bytes_per_token(self.config, self.kv_dtype) if limit else self.max_seq_len
        return max(1, min(self.max_seq_len, fitting))

    def place_of(self, adapter: str | None) -> int:
        """Where the adapter of this name is among those of `params`; -1 for None. ValueError for another name."""
        if adapter is None:
            return -1
        if not isinstance(adapter, str) or adapter not in self.adapters:
            known = ", ".join(self.adapters) or "none"
            raise ValueError(f"adapter {adapter!r} is not loaded; loaded: {known}")
        return list(self.adapters).index(adapter)

    def fingerprint(self) -> str:
        """A few words that differ between models: architecture, dtype, and a digest of their shapes and of some weights."""
        if self._fingerprint:
            return self._fingerprint
        digest = hashlib.blake2b(repr((self.config, self.adapters)).encode(), digest_size=16)
        for leaf in jax.tree.leaves(self.params):
            digest.update(f"{leaf.shape} {leaf.dtype}".encode())
            leaf = np.asarray(leaf) if self.device.platform == "cpu" else leaf  # there without a copy and a program
            digest.update(np.asarray(leaf[(0,) * (leaf.ndim - 1)][:64] if leaf.ndim else leaf).tobytes())
        self._fingerprint = f"{self.config.architecture} {self.config.dtype} {digest.hexdigest()}"
        return self._fingerprint

    def count(self, kind: str, tokens: int, seconds: float) -> None:
        """Adds to `timings`: kind is "prefill" or "decode"."""
        self._counters[f"{kind}_tokens"] += tokens
        self._counters[f"{kind}_s"] += seconds

    def timings(self) -> dict[str, float]:
        """Seconds and tokens since the model was made: load_s, compile_s, prefill_tokens, prefill_s, decode_tokens,
        decode_s. A step that reads prompts counts as prefill, with all that decode in it."""
        return {"load_s": self.load_s, "compile_s": self.programs.compile_s, **self._counters}
