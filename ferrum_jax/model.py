"""A loaded model: its parameters as one value, and the host's side of generation.

Everything that generates goes through an engine, made for the call: `generate` submits all prompts to it, `stream` follows
one request, `chat` renders a conversation first. So there is one loop, and every way gives the same tokens. The pure
program without a host is `functional.generate`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from ferrum_jax import checks, functional
from ferrum_jax.completion import Completion
from ferrum_jax.config import require_experts
from ferrum_jax.engine import Engine, EngineConfig, Request
from ferrum_jax.errors import NotFiniteError
from ferrum_jax.kv_cache import bytes_per_token
from ferrum_jax.memory import nbytes
from ferrum_jax.progress import track
from ferrum_jax.prompts import Prompt, Prompts
from ferrum_jax.runtime import PAGE
from ferrum_jax.sampling_params import SamplingParams
from ferrum_jax.shapes import bucket, by_fours, padded, power_of_two
from ferrum_jax.units import readable_bytes
from ferrum_jax.weights.stream import bytes_by_format

_ROWS = 32  # sequences that run at once at most
_CACHE_BYTES = 2 << 30  # KV cache at most, where more than one sequence asks for it
_SHORT = 256  # tokens of the smallest cache of a single sequence
_UNWATCHED = 0.25  # seconds that a dispatch may take where no text is shown before the end
_AHEAD = 512  # tokens of output that a single sequence's cache has room for from the beginning


class Routing(NamedTuple):
    """Which experts the tokens of a text went to; all on the host.

    Attributes:
      tokens: int32 [tokens], the ids of the text.
      layers: int32 [layers], the numbers of the layers that have experts.
      ids: int32 [layers, tokens, top_k], the chosen experts by falling probability.
      weights: float32 [layers, tokens, top_k], as the model uses them.
      num_experts: of each layer.
    """

    tokens: np.ndarray
    layers: np.ndarray
    ids: np.ndarray
    weights: np.ndarray
    num_experts: int


class Stream:
    """Iterator of (text piece, token ids) of one request. `finish_reason`, `error`, `token_ids`, `text`, `logprobs`: of
    what has come so far."""

    def __init__(self, request: Request, pieces: Generator[tuple[str, list[int]], None, None]):
        self.prompt_token_ids, self._request, self._pieces = request.prompt_token_ids, request, pieces

    def __repr__(self) -> str:
        return f"<Stream of {self._request!r}>"

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> tuple[str, list[int]]:
        return next(self._pieces)

    def close(self) -> None:
        """Stops generating; what was generated so far stays readable."""
        self._pieces.close()

    @property
    def finish_reason(self) -> str | None:
        return self._request.finish_reason

    @property
    def error(self) -> str:
        return self._request.error

    @property
    def token_ids(self) -> list[int]:
        return self._request.token_ids

    @property
    def text(self) -> str:
        return self._request.text

    @property
    def logprobs(self) -> list[list[tuple[int, float]]] | None:
        return self._request.logprobs


class Model(Prompts):
    """Made by `ferrum_jax.load`.

    Attributes:
      params (dict): a pytree of arrays, every weight once.
      config (ModelConfig): the static configuration.
      tokenizer (Tokenizer): from the same file.
    """

    def __repr__(self) -> str:
        config = self.config
        size = readable_bytes(nbytes(self.params))
        return (
            f"<Model {config.architecture}, {config.num_layers} layers, {size}, {config.dtype}, context {self.max_seq_len:,}, "
            f"{self.device}>"
        )

    # Text in and out

    def generate(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] = SamplingParams(),
        adapter: str | Sequence[str | None] | None = None,
    ) -> list[Completion]:
        """Completions in the order of the prompts; with n > 1 a prompt has n completions, one after the other.

        Args:
          prompts: texts or lists of token ids, mixed.
          params: one for all prompts or one for each.
          adapter: one for all prompts or one for each: the name of a LoRA adapter that the model was loaded with; None: the
            model alone.

        Raises:
          ValueError: for an empty prompt, an id out of range, a prompt that fills the context or an unknown adapter.
        """
        encoded = [self.encode(prompt) for prompt in checks.prompts(prompts)]
        each = checks.each_sampling_params(params, len(encoded))
        names: list[Any] = list(adapter) if isinstance(adapter, list | tuple) else [adapter] * len(encoded)
        if len(names) != len(encoded):
            raise ValueError(f"{len(encoded)} prompts and {len(names)} adapters; give one for all or one for each")
        if not encoded:
            return []
        engine = self._engine(encoded, each, dispatch_seconds=_UNWATCHED)
        requests = [engine.submit(*each) for each in zip(encoded, each, names, strict=True)]
        completions = [completion for request in track(requests, "generating, prompt") for completion in request.results()]
        for choice in (choice for request in requests for choice in request.choices):
            _raise_cause(choice)
        return completions

    def stream(self, prompt: Prompt, params: SamplingParams = SamplingParams(), adapter: str | None = None) -> Stream:
        """An iterator of (text piece, token ids): the same tokens as `generate`, as they are made.

        Args:
          prompt: a text or a list of token ids.
          params: how to go on.
          adapter: the name of a LoRA adapter that the model was loaded with; None: the model alone.

        Raises:
          ValueError: as of `generate`, and for parameters that a stream cannot meet (n > 1, prompt_logprobs).
        """
        checks.sampling_params(params)
        if params.n > 1 or params.prompt_logprobs is not None:
            raise ValueError("SamplingParams.n and prompt_logprobs: a stream is of one completion's output; use generate")
        ids = self.encode(prompt)
        engine = self._engine([ids], [params])
        request = engine.submit(ids, params, adapter)
        return Stream(request, _pieces(engine, request))

    def chat(
        self,
        messages: list[dict],
        params: SamplingParams = SamplingParams(),
        tools=None,
        adapter: str | None = None,
        **template_kwargs,
    ) -> Completion:
        """The answer to a conversation, rendered by the model's chat template.

        Args:
          messages: the conversation: dicts with "role" and "content".
          params: how to answer.
          tools (list[dict] | None): descriptions of functions, as the template takes them.
          adapter: the name of a LoRA adapter that the model was loaded with; None: the model alone.
          template_kwargs (Any): variables of the template, such as enable_thinking.
        """
        return self.generate([self.encode_chat(messages, tools, **template_kwargs)], params, adapter)[0]

    # Scores

    def logits(self, batch: Sequence[Sequence[int]], adapter: str | None = None) -> list[np.ndarray]:
        """Teacher-forced logits of each list of token ids, on the host.

        Args:
          batch: lists of token ids.
          adapter: the name of a LoRA adapter that the model was loaded with; None: the model alone.

        Returns:
          For each list float32 [length, vocab_size].
        """
        checked = self.checked(batch)
        if not checked:
            return []
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

        Args:
          text_or_ids: a text, in which special tokens are not parsed and before which none is added, or token ids.
          window: tokens of each window, independent of the others, a last partial one dropped; None: one window.
          adapter: the name of a LoRA adapter that the model was loaded with; None: the model alone.
        """
        if isinstance(text_or_ids, str):
            text_or_ids = self.tokenizer.encode(text_or_ids, add_special=False, parse_special=False)
        ids = checks.token_ids(text_or_ids)
        size = checks.window(window, len(ids), self.max_seq_len)
        windows = [list(ids[i : i + size]) for i in range(0, len(ids) - size + 1, size)]
        total, rows = 0.0, max(1, functional.CHUNK // size)
        for first in track(range(0, len(windows), rows), "scoring, part"):
            part = self.checked(windows[first : first + rows])
            for row, position, hidden in self._chunks(functional.hidden_chunk, part, adapter):
                scored = position < size - 1
                targets = np.zeros(hidden.shape[0], np.int32)
                targets[: len(row)][scored] = [part[r][p + 1] for r, p in zip(row[scored], position[scored], strict=True)]
                logprobs = self.programs.run(functional.logprobs_of, self.params, hidden, targets, config=self.config)
                total += np.asarray(self.programs.fetch(logprobs), np.float64)[: len(row)][scored].sum()
        if not np.isfinite(total):
            raise NotFiniteError("the model's log-probabilities are not finite: it has no perplexity on this text")
        return float(np.exp(-total / (len(windows) * (size - 1))))

    def trace_routing(self, prompt: Prompt, adapter: str | None = None) -> Routing:
        """The experts that each token of a prompt goes to in each layer that has some.

        Args:
          prompt: a text or a list of token ids, read as `generate` reads it.
          adapter: the name of a LoRA adapter that the model was loaded with; None: the model alone.

        Raises:
          UnsupportedModelError: for a model without experts.
          NotFiniteError: where the router gives no numbers.
          ValueError: as of `generate`.
        """
        require_experts(self.config)
        ids = self.encode(prompt)
        parts = [
            [array[:, : len(row)] for array in self.programs.fetch(chosen)]
            for row, _, chosen in self._chunks(functional.routing_chunk, [ids], adapter)
        ]
        experts, weights = (np.concatenate(arrays, axis=1) for arrays in zip(*parts, strict=True))
        if not np.isfinite(weights).all():
            raise NotFiniteError("the model's router is not finite: no expert is the right one on this text")
        layers = np.asarray(self.config.expert_layers, np.int32)
        return Routing(np.asarray(ids, np.int32), layers, experts, weights, self.config.num_experts)

    # Facts

    def memory(self) -> dict:
        """Bytes: parameters by block format and in all, KV cache a token."""
        formats = bytes_by_format(self.params)
        per_token = bytes_per_token(self.config, self.kv_dtype)
        return {"parameters": formats, "parameters_total": sum(formats.values()), "kv_bytes_per_token": per_token}

    # Inside

    def _engine(self, prompts: list[list[int]], params: list[SamplingParams], **fields: Any) -> Engine:
        """An engine for some prompts: as many rows as their number and the cache's bytes allow, with pages for each to its
        end; a single sequence begins with fewer, since most end early."""
        longest = max(min(len(ids) + p.max_tokens, self.max_seq_len) for ids, p in zip(prompts, params, strict=True))
        rows = min(_ROWS, power_of_two(sum(p.n for p in params)))
        if rows == 1:
            pages = min(by_fours(longest, _SHORT), self.max_seq_len + -self.max_seq_len % PAGE) // PAGE
            initial = by_fours(min(longest, len(prompts[0]) + _AHEAD), _SHORT) // PAGE
            return Engine(self, EngineConfig(num_pages=pages, initial_pages=min(initial, pages), max_seqs=1, **fields))
        pages = -(-bucket(longest) // PAGE)
        fitting = max(1, _CACHE_BYTES // (pages * PAGE * self.memory()["kv_bytes_per_token"]))
        rows = min(rows, 1 << (fitting.bit_length() - 1))
        return Engine(self, EngineConfig(num_pages=rows * pages, max_seqs=rows, **fields))

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
    """The outputs of a request, which is aborted when its reader goes away; nothing is left running then."""
    at_exit = sys.is_finalizing  # the module may be gone by then
    try:
        yield from request
        _raise_cause(request)
    finally:
        if not at_exit():
            engine.abort(request)
            engine.run()


def _raise_cause(request: Request) -> None:
    """Raises the exception that ended a request, if one did."""
    if request._cause is not None:
        raise request._cause
