"""A loaded model as its users see it: generate, score, measure.

The one idea: every method that generates makes an engine for the call. `generate` submits all prompts to it, `stream` follows
one request, `chat` renders a conversation first. So there is one loop, and all of them give the same tokens. What the engine
needs of a model is in `Model._runtime`. The pure program that needs no host is `functional.generate`.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np

from ferrum_jax import checks, functional
from ferrum_jax.completion import Completion
from ferrum_jax.config import ModelConfig, require_experts
from ferrum_jax.distributed import Placement
from ferrum_jax.engine import Engine, EngineConfig, Request
from ferrum_jax.errors import NotFiniteError
from ferrum_jax.progress import track
from ferrum_jax.prompts import Prompt, Prompts
from ferrum_jax.runtime import PAGE
from ferrum_jax.sampling_params import SamplingParams, each_sampling_params, one_sampling_params
from ferrum_jax.shapes import bucket, by_fours, padded, power_of_two
from ferrum_jax.state import bytes_per_token
from ferrum_jax.tokenizer import Tokenizer
from ferrum_jax.weights.stream import bytes_by_format

if TYPE_CHECKING:
    from ferrum_jax.templates import Limits

_ROWS = 32  # sequences that run together, at most
_CACHE_BYTES = 2 << 30  # limit of the KV cache for more than one sequence
_SHORT = 256  # tokens of the smallest cache for a single sequence
_UNWATCHED = 0.5  # seconds that a dispatch may take if no text is shown before the end
_AHEAD = 512  # tokens of output that the cache of a single sequence can hold at first


class Routing(NamedTuple):
    """The experts that the tokens of a text were routed to, as NumPy arrays.

    Attributes:
      tokens: int32 [tokens], the token ids of the text.
      layers: int32 [layers], the numbers of the layers that have experts.
      expert_ids: int32 [layers, tokens, top_k], the experts chosen for each token, the one with the best score first.
      expert_weights: float32 [layers, tokens, top_k], their weights, as the model uses them.
      num_experts: experts in each of these layers.
    """

    tokens: np.ndarray
    layers: np.ndarray
    expert_ids: np.ndarray
    expert_weights: np.ndarray
    num_experts: int

    @property
    def ids(self) -> np.ndarray:
        """The old name of expert_ids, with a DeprecationWarning."""
        return _renamed("ids", "expert_ids", self.expert_ids)

    @property
    def weights(self) -> np.ndarray:
        """The old name of expert_weights, with a DeprecationWarning."""
        return _renamed("weights", "expert_weights", self.expert_weights)


def _renamed(old: str, new: str, value: np.ndarray) -> np.ndarray:
    warnings.warn(
        f"Routing.{old} is called {new} now; the old name goes with the next version", DeprecationWarning, stacklevel=3
    )
    return value


class Stream:
    """Iterator over (text piece, token ids) of one request. The properties describe what has been generated so far."""

    def __init__(self, request: Request, pieces: Generator[tuple[str, list[int]], None, None]):
        self.prompt_token_ids, self._request, self._pieces = request.prompt_token_ids, request, pieces

    def __repr__(self) -> str:
        return f"<Stream of {self._request!r}>"

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> tuple[str, list[int]]:
        return next(self._pieces)

    def close(self) -> None:
        """Stops generating. What was generated so far can still be read."""
        self._pieces.close()

    @property
    def finish_reason(self) -> str | None:
        """As of `Completion`; None until the end."""
        return self._request.finish_reason

    @property
    def error(self) -> str:
        """What went wrong, if finish_reason is "error"."""
        return self._request.error

    @property
    def token_ids(self) -> list[int]:
        """All token ids so far."""
        return self._request.token_ids

    @property
    def text(self) -> str:
        """All text so far."""
        return self._request.text

    @property
    def logprobs(self) -> list[list[tuple[int, float]]] | None:
        """As of `Completion`, for the tokens so far."""
        return self._request.logprobs


def _shared(name: str) -> Any:
    """An attribute that a model shares with its runtime."""
    return property(lambda self: getattr(self._runtime, name), lambda self, value: setattr(self._runtime, name, value))


class Model:
    """A model that generates text, as `ferrum_jax.load` returns it.

    Attributes:
      params (dict): a pytree of arrays that holds every weight once.
      config (ModelConfig): what the model is; static and hashable.
      tokenizer (Tokenizer): from the same file or directory.
      device (jax.Device): where the parameters are.
      kv_dtype (str): the dtype of KV caches.
      max_seq_len (int): tokens of prompt and output together, at most.
      adapters (Mapping[str, str]): the LoRA adapters that can be used: a digest of each by its name.
      template_limits (Limits | None): the time and memory for rendering a chat template (`ferrum_jax.templates.Limits`); None:
        one second of processor time and 64 MiB.
    """

    def __init__(
        self,
        config: ModelConfig,
        params: Any,
        tokenizer: Tokenizer,
        device: jax.Device | Placement,
        kv_dtype: str,
        max_seq_len: int,
        adapters: Mapping[str, str] | None = None,
    ):
        """device: where `params` are. adapters: a digest for each LoRA adapter in `params`, by name and in their order."""
        placement = device if isinstance(device, Placement) else Placement.of(device)
        self._runtime = Prompts(config, params, tokenizer, placement, kv_dtype, max_seq_len, adapters)

    def __repr__(self) -> str:
        return repr(self._runtime)

    params: dict[str, Any] = _shared("params")
    config: ModelConfig = _shared("config")
    tokenizer: Tokenizer = _shared("tokenizer")
    kv_dtype: str = _shared("kv_dtype")
    max_seq_len: int = _shared("max_seq_len")
    adapters: Mapping[str, str] = _shared("adapters")
    template_limits: Limits | None = _shared("template_limits")

    @property
    def device(self) -> jax.Device:
        """Where the parameters are."""
        return self._runtime.placement.device

    # Text in and out

    def generate(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] = SamplingParams(),
        adapter: str | Sequence[str | None] | None = None,
    ) -> list[Completion]:
        """Continues all prompts, in batches.

        Args:
          prompts: texts or lists of token ids, also mixed.
          params: one for all prompts, or a list with one for each.
          adapter: the name of a LoRA adapter that the model was loaded with, or None for the model alone; one for all prompts
            or a list with one for each.

        Returns:
          The completions in the order of the prompts. With n > 1, each prompt has n completions in a row.

        Raises:
          ValueError: if a prompt is empty or fills the context, a token id is out of range, or an adapter is unknown.
          OutOfMemoryError: if the KV cache does not fit.
        """
        encoded = [self._runtime.encode(prompt) for prompt in checks.prompts(prompts)]
        each = each_sampling_params(params, len(encoded))
        names: list[Any] = list(adapter) if isinstance(adapter, list | tuple) else [adapter] * len(encoded)
        if len(names) != len(encoded):
            raise ValueError(f"{len(encoded)} prompts and {len(names)} adapters; give one for all or one for each")
        if not encoded:
            return []
        engine = self._engine(encoded, each, dispatch_seconds=_UNWATCHED)
        requests = [engine.submit(*each) for each in zip(encoded, each, names, strict=True)]
        completions = [completion for request in track(requests, "generating, prompt") for completion in request.results()]
        engine._retire()
        for choice in (choice for request in requests for choice in request.choices):
            _raise_cause(choice)
        return completions

    def stream(self, prompt: Prompt, params: SamplingParams = SamplingParams(), adapter: str | None = None) -> Stream:
        """Continues one prompt step by step, with the same tokens as `generate`.

        Args:
          prompt: a text or a list of token ids.
          params: how to continue.
          adapter: the name of a LoRA adapter that the model was loaded with; None: the model alone.

        Returns:
          An iterator over (text piece, token ids).

        Raises:
          ValueError: as for `generate`, and for parameters that do not work with a stream (n > 1, prompt_logprobs).
        """
        one_sampling_params(params)
        if params.n > 1 or params.prompt_logprobs is not None:
            raise ValueError("SamplingParams.n and prompt_logprobs: a stream gives the output of one completion; use generate")
        ids = self._runtime.encode(prompt)
        engine = self._engine([ids], [params])
        request = engine.submit(ids, params, adapter)
        return Stream(request, _pieces(engine, request))

    def chat(
        self,
        messages: list[dict],
        params: SamplingParams = SamplingParams(),
        tools: list[dict] | None = None,
        adapter: str | None = None,
        **template_kwargs: Any,
    ) -> Completion:
        """Answers a conversation.

        Args:
          messages: the conversation, dicts with "role" and "content".
          params: how to answer.
          tools: JSON schemas of functions that the model may call.
          adapter: the name of a LoRA adapter that the model was loaded with; None: the model alone.
          template_kwargs: as for `render_chat`.

        Raises:
          UnsupportedModelError: if the model has no chat template.
          ChatTemplateError: if the template rejects the messages or fails on them.
          ValueError: as for `generate` and `render_chat`.
        """
        return self.generate([self._runtime.encode_chat(messages, tools, **template_kwargs)], params, adapter)[0]

    def render_chat(
        self,
        messages: list[dict],
        tools: list[dict] | None = None,
        add_generation_prompt: bool = True,
        chat_template: str | None = None,
        **template_kwargs: Any,
    ) -> str:
        """The prompt that the model's chat template makes of a conversation.

        Args:
          messages: the conversation, dicts with "role" and "content".
          tools: JSON schemas of functions that the model may call.
          add_generation_prompt: end with the words that begin an answer.
          chat_template: the name of one of the model's templates; None: "tool_use" if there are tools and the model has such
            a template, otherwise the default.
          template_kwargs: further variables of the template, such as enable_thinking.

        Raises:
          UnsupportedModelError: if the model has no chat template.
          ChatTemplateError: if the template rejects the messages or fails on them.
          ValueError: for an unknown template, a variable that none of the model's templates reads, or content that is not text.
        """
        return self._runtime.render_chat(messages, tools, add_generation_prompt, chat_template, **template_kwargs)

    def encode_chat(self, messages: list[dict], tools: list[dict] | None = None, **template_kwargs: Any) -> list[int]:
        """The token ids of a conversation, as `chat` gives them to the model.

        Args:
          messages: the conversation, dicts with "role" and "content".
          tools: JSON schemas of functions that the model may call.
          template_kwargs: as for `render_chat`.

        Raises:
          ValueError: as for `chat`, as are the other errors.
        """
        return self._runtime.encode_chat(messages, tools, **template_kwargs)

    def encode_rendered(self, text: str) -> list[int]:
        """The token ids of a text from `render_chat`.

        Args:
          text: the rendered conversation. If both the template and the tokenizer add a beginning-of-text token, one is kept.

        Raises:
          ValueError: as for `Tokenizer.encode`.
        """
        return self._runtime.encode_rendered(text)

    # Scores

    def logits(self, batch: Sequence[Sequence[int]], adapter: str | None = None) -> list[np.ndarray]:
        """The logits after each token of some texts (teacher-forced), as NumPy arrays.

        Args:
          batch: the texts as lists of token ids.
          adapter: the name of a LoRA adapter that the model was loaded with; None: the model alone.

        Returns:
          For each text float32 [length, vocab_size].

        Raises:
          ValueError: if a list is empty or longer than the context, or a token id is out of range.
        """
        checked = self._runtime.checked(batch)
        if not checked:
            return []
        results = [np.empty((len(ids), self.config.vocab_size), np.float32) for ids in checked]
        for row, position, hidden in self._chunks(functional.hidden_chunk, checked, adapter):
            for first in range(0, hidden.shape[0], functional.ROWS):
                block = hidden[first : first + functional.ROWS]
                logits = self._runtime.programs.fetch(
                    self._runtime.programs.run(functional.unembed, self.params, block, config=self.config)
                )
                for source in range(first, min(first + functional.ROWS, len(row))):
                    results[row[source]][position[source]] = logits[source - first]
        return results

    def perplexity(self, text_or_ids: Prompt, window: int | None = None, adapter: str | None = None) -> float:
        """The exponential of the mean negative log-probability of every token, except the first of each window.

        Args:
          text_or_ids: token ids, or a text, which is encoded without a start token and without parsing special tokens.
          window: split the text into independent windows of this many tokens and drop a last partial one; None: one window.
          adapter: the name of a LoRA adapter that the model was loaded with; None: the model alone.

        Raises:
          ValueError: if the window has fewer than 2 tokens, is longer than the text or does not fit the context.
          NotFiniteError: if a log-probability is not finite.
        """
        if isinstance(text_or_ids, str):
            text_or_ids = self.tokenizer.encode(text_or_ids, add_special=False, parse_special=False)
        ids = checks.token_ids(text_or_ids)
        size = checks.window(window, len(ids), self.max_seq_len)
        windows = [list(ids[i : i + size]) for i in range(0, len(ids) - size + 1, size)]
        total, rows = 0.0, max(1, functional.CHUNK // size)
        for first in track(range(0, len(windows), rows), "scoring, part"):
            part = self._runtime.checked(windows[first : first + rows])
            for row, position, hidden in self._chunks(functional.hidden_chunk, part, adapter):
                scored = position < size - 1
                targets = np.zeros(hidden.shape[0], np.int32)
                targets[: len(row)][scored] = [part[r][p + 1] for r, p in zip(row[scored], position[scored], strict=True)]
                logprobs = self._runtime.programs.run(functional.logprobs_of, self.params, hidden, targets, config=self.config)
                total += np.asarray(self._runtime.programs.fetch(logprobs), np.float64)[: len(row)][scored].sum()
        if not np.isfinite(total):
            raise NotFiniteError("the model's log-probabilities are not finite, so this text has no perplexity")
        return float(np.exp(-total / (len(windows) * (size - 1))))

    def trace_routing(self, prompt: Prompt, adapter: str | None = None) -> Routing:
        """The experts that each token of a prompt is routed to.

        Args:
          prompt: a text or a list of token ids, encoded as by `generate`.
          adapter: the name of a LoRA adapter that the model was loaded with; None: the model alone.

        Raises:
          UnsupportedModelError: if the model has no experts.
          NotFiniteError: if the weights of the experts are not finite.
          ValueError: as for `generate`.
        """
        require_experts(self.config)
        ids = self._runtime.encode(prompt)
        parts = [
            [array[:, : len(row)] for array in self._runtime.programs.fetch(routing)]
            for row, _, routing in self._chunks(functional.routing_chunk, [ids], adapter)
        ]
        expert_ids, expert_weights = (np.concatenate(arrays, axis=1) for arrays in zip(*parts, strict=True))
        if not np.isfinite(expert_weights).all():
            raise NotFiniteError("the weights of the experts are not finite, so this text has no routing")
        layers = np.asarray(self.config.expert_layers, np.int32)
        return Routing(np.asarray(ids, np.int32), layers, expert_ids, expert_weights, self.config.num_experts)

    # Facts

    def memory(self) -> dict:
        """Sizes in bytes.

        Returns:
          "parameters": bytes by block format; "parameters_total": their sum; "kv_bytes_per_token": the KV cache of a token;
          for a model with layers that recur "state_bytes": what they keep of a sequence.
        """
        formats = bytes_by_format(self.params)
        sizes = {"parameters_total": sum(formats.values()), "kv_bytes_per_token": bytes_per_token(self.config, self.kv_dtype)}
        recurrent = {"state_bytes": size} if (size := self.config.bytes_per_state) else {}
        return {"parameters": formats, **sizes, **recurrent}

    def timings(self) -> dict[str, float]:
        """What has been done since the model was loaded.

        Returns:
          The seconds load_s, compile_s, prefill_s and decode_s, and the numbers of tokens prefill_tokens and decode_tokens.
          A step that reads a prompt counts as prefill, including the rows that decode in it.
        """
        return self._runtime.timings()

    # Inside

    def _engine(self, prompts: list[list[int]], params: list[SamplingParams], **fields: Any) -> Engine:
        """An engine for some prompts. It has as many rows as the prompts and the limit of the cache allow, and pages for each
        row's whole output. A single sequence starts with fewer pages, since most end early."""
        longest = max(min(len(ids) + p.max_tokens, self.max_seq_len) for ids, p in zip(prompts, params, strict=True))
        rows = min(_ROWS, power_of_two(sum(p.n for p in params)))
        if rows == 1:
            pages = min(by_fours(longest, _SHORT), self.max_seq_len + -self.max_seq_len % PAGE) // PAGE
            initial = by_fours(min(longest, len(prompts[0]) + _AHEAD), _SHORT) // PAGE
            return Engine(self._runtime, EngineConfig(num_pages=pages, initial_pages=min(initial, pages), max_seqs=1, **fields))
        pages = -(-bucket(longest) // PAGE)
        fitting = max(1, _CACHE_BYTES // max(1, pages * PAGE * self.memory()["kv_bytes_per_token"]))
        rows = min(rows, 1 << (fitting.bit_length() - 1))
        return Engine(self._runtime, EngineConfig(num_pages=rows * pages, max_seqs=rows, **fields))

    def _chunks(
        self, function: Callable, batch: list[list[int]], adapter: str | None
    ) -> Iterator[tuple[np.ndarray, np.ndarray, Any]]:
        """Calls functional.hidden_chunk or routing_chunk for all tokens, chunk by chunk. Yields (row of each token, position of
        each token, result); the last result may cover more tokens than there are."""
        prompts, lengths = padded(batch, bucket(max(map(len, batch))))
        rows, longest = prompts.shape
        chunk = min(functional.CHUNK, rows * longest)
        cache = self._runtime.new_cache(rows * -(-longest // PAGE), rows)
        adapters = None if adapter is None else np.full(rows, self._runtime.adapter_index(adapter), np.int32)
        row = np.repeat(np.arange(rows), lengths)
        position = np.concatenate([np.arange(n) for n in lengths])
        for i in range(-(-len(row) // chunk)):
            inputs = (self.params, cache, prompts, lengths, np.int32(i), adapters)
            result, cache = self._runtime.programs.run(function, *inputs, donate=(1,), chunk=chunk, config=self.config)
            yield row[i * chunk : (i + 1) * chunk], position[i * chunk : (i + 1) * chunk], result


def _pieces(engine: Engine, request: Request) -> Generator[tuple[str, list[int]], None, None]:
    """The outputs of a request. If its reader stops early, the request is aborted and the engine finishes its step."""
    at_exit = sys.is_finalizing  # at exit, the module's globals may be gone
    try:
        yield from request
        _raise_cause(request)
    finally:
        if not at_exit():
            engine.abort(request)
            engine.run()
            engine._retire()


def _raise_cause(request: Request) -> None:
    """Raises the exception that ended a request, if one did."""
    if request._cause is not None:
        raise request._cause
