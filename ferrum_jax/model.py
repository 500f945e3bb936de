"""A loaded model: its parameters as one value, and the host's side of generation.

`generate` runs prefill and the whole loop as one compiled program. `stream`, `chat` in the terminal and requests with
stop strings use the stepping driver: the same `start` and `advance`, a few tokens a dispatch, each dispatch's results read
while the next one runs. More prompts than one program takes, and parameters that need a state of their own, go through an
engine. All give the same tokens.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from ferrum_jax import functional
from ferrum_jax.completion import Completion
from ferrum_jax.config import require_experts
from ferrum_jax.driver import Driver, Inputs, Stream, Watcher, bucket, made, padded, power_of_two, stream
from ferrum_jax.engine import Engine, EngineConfig, Request
from ferrum_jax.kv_cache import bytes_per_token
from ferrum_jax.prompts import Prompt, Prompts
from ferrum_jax.runtime import PAGE
from ferrum_jax.sampling import SamplingParams
from ferrum_jax.weights.stream import bytes_by_format

_ROWS = 32  # rows of one program at most
_CACHE_BYTES = 2 << 30  # KV cache of one program at most, where more than one row asks for it


class Routing(NamedTuple):
    """Which experts the tokens of a text went to: tokens int32 [tokens]; layers int32 [layers], the numbers of those that
    have experts; ids int32 and weights float32 [layers, tokens, top_k], by falling probability and as the model uses them;
    num_experts of each layer. All on the host."""

    tokens: np.ndarray
    layers: np.ndarray
    ids: np.ndarray
    weights: np.ndarray
    num_experts: int


class Model(Prompts):
    """Made by `ferrum_jax.load`. `params` is a pytree of arrays, every weight once; `config` is static."""

    # Text in and out

    def generate(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] = SamplingParams(),
        adapter: str | Sequence[str | None] | None = None,
    ) -> list[Completion]:
        """Completions in the order of the prompts, which are texts or lists of token ids, mixed; `params` is one for all
        or one for each, and so is `adapter`, the name of a LoRA adapter that the model was loaded with; with n > 1 a prompt
        has so many completions, one after the other. ValueError for an empty prompt, an id out of range, a prompt that
        fills the context or an unknown adapter."""
        if isinstance(prompts, str | bytes) or any(isinstance(prompt, int | np.integer) for prompt in prompts):
            raise ValueError("prompts must be a list of prompts; for one prompt write [prompt]")
        encoded = [self.encode(prompt) for prompt in prompts]
        each = [params] * len(encoded) if isinstance(params, SamplingParams) else list(params or ())
        if not all(isinstance(p, SamplingParams) for p in each):
            raise ValueError("params must be SamplingParams, one for all prompts or a list with one for each")
        if len(each) != len(encoded):
            raise ValueError(f"{len(encoded)} prompts and {len(each)} sampling parameters; give one for all or one for each")
        names: list[Any] = list(adapter) if isinstance(adapter, list | tuple) else [adapter] * len(encoded)
        if len(names) != len(encoded):
            raise ValueError(f"{len(encoded)} prompts and {len(names)} adapters; give one for all or one for each")
        places = [self.place_of(name) for name in names]
        if not encoded:
            return []
        if any(p.of_an_engine for p in each) or len({p.logprobs for p in each}) > 1 or not self._fit_one_program(encoded, each):
            return self._complete_in_engine(encoded, each, names)
        return self._complete(encoded, each, places)

    def stream(self, prompt: Prompt, params: SamplingParams = SamplingParams(), adapter: str | None = None) -> Stream:
        """An iterator of (text piece, token ids): the same tokens as `generate`, as they are made. ValueError for
        parameters that a stream cannot meet (n > 1, prompt_logprobs)."""
        if params.n > 1 or params.prompt_logprobs is not None:
            raise ValueError("SamplingParams.n and prompt_logprobs: a stream is of one completion's output; use generate")
        ids, place = self.encode(prompt), self.place_of(adapter)
        if not params.of_an_engine:
            return stream(self, ids, params, place)
        engine = self._engine([ids], [params])
        request = engine.submit(ids, params, adapter)
        return Stream(ids, request._watcher, _pieces(engine, request))

    def chat(
        self,
        messages: list[dict],
        params: SamplingParams = SamplingParams(),
        tools=None,
        adapter: str | None = None,
        **template_kwargs,
    ) -> Completion:
        """The answer to a conversation, rendered by the model's chat template: one `Completion`."""
        return self.generate([self.encode_chat(messages, tools, **template_kwargs)], params, adapter)[0]

    # Scores

    def logits(self, batch: Sequence[Sequence[int]], adapter: str | None = None) -> list[np.ndarray]:
        """Teacher-forced float32 logits [length, vocab_size] of each list of token ids, on the host."""
        if not batch:
            return []
        checked = self.checked(batch)
        results = [np.empty((len(ids), self.config.vocab_size), np.float32) for ids in checked]
        for row, position, hidden in self._chunks(functional.hidden_chunk, checked, adapter):
            for first in range(0, hidden.shape[0], functional.ROWS):
                block = hidden[first : first + functional.ROWS]
                logits = self.programs.fetch(self.programs.run(functional.unembed, self.params, block, config=self.config))
                for source in range(first, min(first + functional.ROWS, len(row))):
                    results[row[source]][position[source]] = logits[source - first]
        return results

    def perplexity(self, text_or_ids: Prompt, window: int | None = None, adapter: str | None = None) -> float:
        """exp of the mean negative log-probability of every token but the first of its window.

        No beginning-of-text token is added and special tokens in a text are not parsed. `window=None` is one window, else
        windows of so many tokens, independent of each other; a last partial one is dropped.
        """
        ids = text_or_ids
        if isinstance(ids, str):
            ids = self.tokenizer.encode(ids, add_special=False, parse_special=False)
        size = len(ids) if window is None else window
        if size < 2 or len(ids) < size:
            raise ValueError(f"a window needs at least two tokens and no more than the text has ({len(ids)}), not {size}")
        windows = [list(ids[i : i + size]) for i in range(0, len(ids) - size + 1, size)]
        total, rows = 0.0, max(1, functional.CHUNK // size)
        for first in range(0, len(windows), rows):
            part = self.checked(windows[first : first + rows])
            for row, position, hidden in self._chunks(functional.hidden_chunk, part, adapter):
                scored = position < size - 1
                targets = np.zeros(hidden.shape[0], np.int32)
                targets[: len(row)][scored] = [part[r][p + 1] for r, p in zip(row[scored], position[scored], strict=True)]
                logprobs = self.programs.run(functional.logprobs_of, self.params, hidden, targets, config=self.config)
                total += np.asarray(self.programs.fetch(logprobs), np.float64)[: len(row)][scored].sum()
        return float(np.exp(-total / (len(windows) * (size - 1))))

    def trace_routing(self, prompt: Prompt, adapter: str | None = None) -> Routing:
        """The experts that each token of a prompt, read as `generate` reads it, goes to in each layer that has some.
        UnsupportedModelError for a model without experts, ValueError as of `generate`."""
        require_experts(self.config)
        ids = self.encode(prompt)
        parts = [
            [array[:, : len(row)] for array in self.programs.fetch(chosen)]
            for row, _, chosen in self._chunks(functional.routing_chunk, [ids], adapter)
        ]
        experts, weights = (np.concatenate(arrays, axis=1) for arrays in zip(*parts, strict=True))
        layers = np.asarray(self.config.expert_layers, np.int32)
        return Routing(np.asarray(ids, np.int32), layers, experts, weights, self.config.num_experts)

    # Facts

    def memory(self) -> dict:
        """Bytes: parameters by block format and in all, KV cache a token."""
        formats = bytes_by_format(self.params)
        per_token = bytes_per_token(self.config, self.kv_dtype)
        return {"parameters": formats, "parameters_total": sum(formats.values()), "kv_bytes_per_token": per_token}

    # Inside

    def _fit_one_program(self, encoded: list[list[int]], params: list[SamplingParams]) -> bool:
        """Whether one program's rows and cache hold all prompts."""
        longest = max(len(ids) + min(p.max_tokens, self.max_seq_len - len(ids)) for ids, p in zip(encoded, params, strict=True))
        size = power_of_two(len(encoded)) * bucket(longest) * self.memory()["kv_bytes_per_token"]
        return len(encoded) == 1 or (len(encoded) <= _ROWS and size <= _CACHE_BYTES)

    def _complete_in_engine(
        self, prompts: list[list[int]], params: list[SamplingParams], adapters: list[str | None]
    ) -> list[Completion]:
        """Completions of any number of prompts; n a prompt."""
        engine = self._engine(prompts, params)
        requests = [engine.submit(*each) for each in zip(prompts, params, adapters, strict=True)]
        results = [completion for request in requests for completion in request.results()]
        failed = next((request.error for request in requests if request.error), "")
        if failed:
            raise RuntimeError(f"generation failed: {failed}")
        metrics = engine.metrics()
        self.count("prefill", int(metrics["prompt_tokens"]), 0.0)
        self.count("decode", int(metrics["generated_tokens"]), metrics["device_seconds"])
        return results

    def _engine(self, prompts: list[list[int]], params: list[SamplingParams]) -> Engine:
        """An engine for some prompts, with as many rows as the cache of one program holds."""
        longest = max(min(len(ids) + p.max_tokens, self.max_seq_len) for ids, p in zip(prompts, params, strict=True))
        pages = -(-bucket(longest) // PAGE)
        rows = min(_ROWS, power_of_two(sum(p.n for p in params)))
        fitting = max(1, _CACHE_BYTES // (pages * PAGE * self.memory()["kv_bytes_per_token"]))
        rows = min(rows, 1 << (fitting.bit_length() - 1))
        return Engine(self, EngineConfig(num_pages=rows * pages, max_seqs=rows))

    def _complete(self, prompts: list[list[int]], params: list[SamplingParams], adapters: list[int]) -> list[Completion]:
        """Completions of one program's rows: one dispatch, or the stepping driver where stop strings are watched."""
        watchers = [Watcher(self.tokenizer, p) for p in params]
        if any(p.stop for p in params):
            driver = Driver(self, prompts, params, adapters)
            for sampled in driver:
                for row, watcher in enumerate(watchers):
                    watcher.push(sampled, row)
                driver.cancel([watcher.finish_reason is not None for watcher in watchers])
        else:
            sampled = self._generate(Inputs(self, prompts, params, adapters))
            for row, watcher in enumerate(watchers):
                watcher.push(sampled, row)
        for watcher in watchers:
            watcher.flush()
        return [
            Completion(w.text, w.token_ids, w.finish_reason or "length", w.logprobs, prompt)
            for w, prompt in zip(watchers, prompts, strict=True)
        ]

    def _generate(self, inputs: Inputs) -> functional.Sampled:
        """Prefill and all tokens in one program."""
        width, max_tokens = bucket(inputs.longest_prompt), bucket(inputs.max_tokens)
        arguments = inputs.arguments(width, width + max_tokens)
        static = {"config": self.config, "max_tokens": max_tokens, "logprobs": inputs.logprobs}
        program = self.programs.get(_generate, *arguments, donate=(1,), **static)
        begin = time.perf_counter()
        _, result = program(*arguments)
        sampled = self.programs.fetch(result)
        self.count("prefill", inputs.tokens, 0.0)
        self.count("decode", made(sampled), time.perf_counter() - begin)
        return sampled

    def _chunks(
        self, function: Callable, batch: list[list[int]], adapter: str | None
    ) -> Iterator[tuple[np.ndarray, np.ndarray, Any]]:
        """What functional.hidden_chunk or routing_chunk gives of all tokens, chunk by chunk: (row of each token, its
        position, result); the result may have more tokens than there are."""
        prompts, lengths = padded(batch, bucket(max(map(len, batch))))
        rows, longest = prompts.shape
        chunk = min(functional.CHUNK, rows * longest)
        cache = self.new_cache(rows * -(-longest // PAGE))
        adapters = None if adapter is None else np.full(rows, self.place_of(adapter), np.int32)
        row = np.repeat(np.arange(rows), lengths)
        position = np.concatenate([np.arange(n) for n in lengths])
        for i in range(-(-len(row) // chunk)):
            inputs = (self.params, cache, prompts, lengths, np.int32(i), adapters)
            result, cache = self.programs.run(function, *inputs, donate=(1,), chunk=chunk, config=self.config)
            yield row[i * chunk : (i + 1) * chunk], position[i * chunk : (i + 1) * chunk], result


def _pieces(engine: Engine, request: Request) -> Generator[tuple[str, list[int]], None, None]:
    """The outputs of a request, which is aborted when nobody wants any more."""
    try:
        yield from request
    finally:
        engine.abort(request)


def _generate(params, cache, prompts, lengths, sampling, key, adapters, *, config, max_tokens, logprobs):
    """functional.generate, returning the cache first (so that it aliases) and everything sampled."""
    static = {"config": config, "max_tokens": max_tokens, "logprobs": logprobs}
    result = functional.generate(params, cache, prompts, lengths, sampling, key, **static, adapters=adapters)
    tokens, _, cache, *sampled = result
    nothing = jnp.zeros((*tokens.shape, 0))
    return cache, sampled[0] if sampled else functional.Sampled(tokens, nothing.astype(jnp.int32), nothing)
