"""Pure functions of parameters, cache and inputs, ready for `jax.jit`, without hidden state.

`forward` runs one ragged batch. `generate` is prefill and the whole sampling loop as one program: `start` reads the
prompts in chunks and samples once, `advance` decodes until every row has stopped. What has to look at the tokens in between
(a stream, stop strings, a server) uses the engine, which gives the same tokens. Donate the cache: every program reuses its
whole memory.

In `generate`, the rows of a batch own equal runs of pages: row b has the pages b * P to (b + 1) * P - 1, P = num_pages // rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import export, lax

from ferrum_jax.choice import NOT_FINITE, Choice, choose
from ferrum_jax.config import ModelConfig, require_experts
from ferrum_jax.models.decoder import Cache, Decoder, RaggedBatch
from ferrum_jax.models.layers import ROUTING
from ferrum_jax.quantized import grouped_linear, linear
from ferrum_jax.sampling import Sampling
from ferrum_jax.state import KVCache, new_cache

__all__ = [
    "NOT_FINITE",
    "KVCache",
    "RaggedBatch",
    "Sampled",
    "Sampling",
    "forward",
    "generate",
    "grouped_linear",
    "hidden",
    "linear",
    "new_cache",
    "routing",
    "unembed",
]

Params = Mapping[str, Any]  # a pytree of arrays

CHUNK = 512  # tokens of a prefill step: limits its temporaries, and up to 512 rows XLA's results do not depend on their number
ROWS = 64  # rows of logits that are computed together if only a summary of them is used


class Sampled(NamedTuple):
    """Sampled tokens and their log-probabilities in the raw distribution; k alternatives were requested.

    Attributes:
      tokens: int32 [B, N], -1 after the end of a row.
      ids: int32 [B, N, k + 1], the sampled token, then the k best; [B, N, 0] without log-probabilities.
      logprobs: float32, of the same shape: their log-probabilities.
    """

    tokens: jax.Array
    ids: jax.Array
    logprobs: jax.Array


class State(NamedTuple):
    """The state of each row of a generation. token int32 [B]: sampled, but not in the cache yet; position int32 [B]: its
    position in the sequence; generated int32 [B]: the number of tokens so far; done bool [B]; seen int32 [B, vocab]: which ids
    occurred, as `sampling.sample` counts them."""

    token: jax.Array
    position: jax.Array
    generated: jax.Array
    done: jax.Array
    seen: jax.Array


for _kind in (RaggedBatch, Sampled, Sampling, State):  # so that jax.export can save programs that take or return them
    export.register_namedtuple_serialization(_kind, serialized_name=f"ferrum_jax.{_kind.__name__}")


def forward(params: Params, cache: Cache, batch: RaggedBatch, *, config: ModelConfig) -> tuple[jax.Array, Cache]:
    """One step over a ragged batch.

    Args:
      params: the model's parameters.
      cache: the KV cache, to be donated.
      batch: the tokens.
      config: the model's configuration; static.

    Returns:
      float32 logits [R, vocab_size] of `batch.logits_rows`, and the new cache.

    Raises:
      ValueError: if the cache is not of such a model, or `batch` has adapters and `params` do not.
    """
    return _apply(params, config, cache, batch)


def _apply(params: Params, config: ModelConfig, *args: Any, method: str = "__call__") -> Any:
    return Decoder(config).apply({"params": params}, *args, method=method)


def hidden(params: Params, cache: Cache, batch: RaggedBatch, *, config: ModelConfig) -> tuple[jax.Array, Cache]:
    """`forward` without the output matrix.

    Args:
      params: the model's parameters.
      cache: the KV cache, to be donated.
      batch: the tokens.
      config: the model's configuration; static.

    Returns:
      Final hidden states float32 [T, hidden_size], and the new cache.

    Raises:
      ValueError: as `forward`.
    """
    return _apply(params, config, cache, batch, method="hidden")


def routing(
    params: Params, cache: Cache, batch: RaggedBatch, *, config: ModelConfig
) -> tuple[tuple[jax.Array, jax.Array], Cache]:
    """The experts that `forward` uses.

    Args:
      params: the model's parameters.
      cache: the KV cache, to be donated.
      batch: the tokens.
      config: the model's configuration; static.

    Returns:
      (expert_ids int32, expert_weights float32), both [layers, T, top_k], of the layers `config.expert_layers`, the expert
      with the best score first, and the new cache. Padding tokens have the id `num_experts`. The weights are those of the sum
      over experts: normalized and scaled if the model does so.

    Raises:
      UnsupportedModelError: if the model has no experts.
      ValueError: as `forward`.
    """
    require_experts(config)
    decoder = Decoder(config)
    (_, cache), recorded = decoder.apply({"params": params}, cache, batch, method="hidden", mutable=[ROUTING])
    return recorded[ROUTING]["experts"][0], cache


def unembed(params: Params, hidden: jax.Array, *, config: ModelConfig) -> jax.Array:
    """Logits of hidden states.

    Args:
      params (dict): of the model.
      hidden: float32 [R, hidden_size], as `hidden` gives them.
      config: the model's configuration; static.

    Returns:
      float32 [R, vocab_size].
    """
    return _apply(params, config, hidden, method="logits")


def generate(
    params: Params,
    cache: Cache,
    prompts: jax.Array,
    prompt_lengths: jax.Array,
    sampling: Sampling,
    key: jax.Array,
    *,
    config: ModelConfig,
    max_tokens: int,
    logprobs: int | None = None,
    adapters: jax.Array | None = None,
) -> tuple[Any, ...]:
    """Prefill and the whole decoding loop as one program.

    It ends when every row has ended: with an end token, after its own `sampling.max_tokens` or after `max_tokens`, or when its
    logits are not finite; then it gets `NOT_FINITE` (-2) instead of a token, which does not count in lengths.

    Args:
      params: the model's parameters.
      cache: the KV cache, to be donated.
      prompts: int32 [B, L], right-padded.
      prompt_lengths: int32 [B], 0 for a padding row.
      sampling: the sampling parameters of each row.
      key: a PRNG key; the noise of a row depends on the key, the row's seed and the position.
      config: the model's configuration; static.
      max_tokens: limit of the output of every row; static.
      logprobs: the number of best alternatives to report for each token; None for no log-probabilities; static.
      adapters: int32 [B], the index of each row's LoRA adapter in `params`, -1 for none.

    Returns:
      tokens int32 [B, max_tokens], -1 after the end; lengths int32 [B]; the new cache; with `logprobs` also a `Sampled`,
      which has the alternatives.

    Raises:
      TypeError: if `sampling` is not a `Sampling`.
      ValueError: if the cache is too small, `adapters` has another shape, or `params` have no adapters.
    """
    if not isinstance(sampling, Sampling):
        raise TypeError(f"sampling must be a Sampling, as Sampling.from_params makes it, not {type(sampling).__name__}")
    rows, longest = prompts.shape
    capacity = cache.num_pages // rows * cache.page_size
    if capacity < longest + max_tokens - 1:
        raise ValueError(
            f"generate: {rows} rows of up to {longest} + {max_tokens} tokens do not fit into {cache.num_pages} pages of "
            f"{cache.page_size}; make it {rows * -(-(longest + max_tokens - 1) // cache.page_size)} pages"
        )
    if adapters is not None and jnp.shape(adapters) != (rows,):
        raise ValueError(f"generate: adapters must be int32 [{rows}], one for each row, not {list(jnp.shape(adapters))}")
    same: dict[str, Any] = {"config": config, "logprobs": logprobs}
    cache, state, first = start(params, cache, prompts, prompt_lengths, sampling, key, adapters, **same)
    cache, state, rest = advance(params, cache, state, sampling, key, max_tokens - 1, adapters, steps=max_tokens - 1, **same)
    sampled = Sampled(*(jnp.concatenate(pair, axis=1) for pair in zip(first, rest, strict=True)))
    result = (sampled.tokens, state.generated, cache)
    return result if logprobs is None else (*result, sampled)


def start(
    params: Params,
    cache: Cache,
    prompts: jax.Array,
    prompt_lengths: jax.Array,
    sampling: Sampling,
    key: jax.Array,
    adapters: jax.Array | None = None,
    *,
    config: ModelConfig,
    chunk: int | None = None,
    logprobs: int | None = None,
) -> tuple[Cache, State, Sampled]:
    """Reads the prompts into the cache, `chunk` tokens at a time (None: all at once, up to `CHUNK`), and samples the first
    token of each row: `Sampled` with N = 1."""
    prompts, prompt_lengths = jnp.asarray(prompts), jnp.asarray(prompt_lengths)
    rows, longest = prompts.shape
    chunk = min(chunk or CHUNK, rows * longest)
    ends = jnp.cumsum(prompt_lengths)

    def read(i: jax.Array, carry: tuple[Cache, jax.Array]) -> tuple[Cache, jax.Array]:
        cache, last = carry
        hidden, cache = hidden_chunk(params, cache, prompts, prompt_lengths, i, adapters, chunk=chunk, config=config)
        newest = ends - 1 - i * chunk  # the last token of each row, counted from the start of the chunk
        here = (newest >= 0) & (newest < chunk) & (prompt_lengths > 0)
        return cache, jnp.where(here[:, None], hidden[jnp.clip(newest, 0, chunk - 1)], last)

    with jax.named_scope("prefill"):
        last = jnp.zeros((rows, config.hidden_size), jnp.float32)
        cache, last = lax.fori_loop(0, -(-ends[-1] // chunk), read, (cache, last))
    column = jnp.arange(longest) < prompt_lengths[:, None]
    ids = jnp.where(column, prompts, config.vocab_size)
    seen = jnp.zeros((rows, config.vocab_size), jnp.int32).at[jnp.arange(rows)[:, None], ids].set(1, mode="drop")
    zero = jnp.zeros((rows,), jnp.int32)
    idle = (prompt_lengths == 0) | (sampling.max_tokens <= 0)
    state = State(zero, prompt_lengths - 1, zero, idle, seen)
    state, sampled = _sample(params, last, state, sampling, key, config, logprobs)
    return cache, state, sampled


def advance(
    params: Params,
    cache: Cache,
    state: State,
    sampling: Sampling,
    key: jax.Array,
    limit: jax.typing.ArrayLike,
    adapters: jax.Array | None = None,
    *,
    config: ModelConfig,
    steps: int,
    logprobs: int | None = None,
) -> tuple[Cache, State, Sampled]:
    """Decodes up to min(limit, steps) more tokens of every row that is not done: `Sampled` with N = steps."""
    rows = state.token.shape[0]
    per_row = cache.num_pages // rows
    page_table = jnp.arange(rows * per_row, dtype=jnp.int32).reshape(rows, per_row)

    def step(carry: Any) -> Any:
        i, cache, state, out = carry
        slots = jnp.where(state.done, -1, page_table[:, 0] * cache.page_size + state.position)
        batch = RaggedBatch(
            tokens=state.token,
            positions=state.position,
            slots=slots,
            query_starts=jnp.arange(rows + 1, dtype=jnp.int32),
            kv_lengths=jnp.where(state.done, 0, state.position + 1),
            page_table=page_table,
            logits_rows=jnp.arange(rows, dtype=jnp.int32),
            adapters=adapters,
        )
        hidden, cache = _apply(params, config, cache, batch, method="hidden")
        state, sampled = _sample(params, hidden, state, sampling, key, config, logprobs)
        out = Sampled(*(lax.dynamic_update_slice_in_dim(a, b, i, axis=1) for a, b in zip(out, sampled, strict=True)))
        return i + 1, cache, state, out

    width = 0 if logprobs is None else logprobs + 1
    out = Sampled(
        jnp.full((rows, steps), -1, jnp.int32),
        jnp.zeros((rows, steps, width), jnp.int32),
        jnp.zeros((rows, steps, width), jnp.float32),
    )
    limit = jnp.minimum(jnp.asarray(limit, jnp.int32), steps)
    with jax.named_scope("decode"):
        carry = (jnp.zeros((), jnp.int32), cache, state, out)
        if steps:
            carry = lax.while_loop(lambda carry: (carry[0] < limit) & ~carry[2].done.all(), step, carry)
    return carry[1:]


def _sample(
    params: Params,
    hidden: jax.Array,
    state: State,
    sampling: Sampling,
    key: jax.Array,
    config: ModelConfig,
    logprobs: int | None,
) -> tuple[State, Sampled]:
    """Samples the token after `state.position` in every row that is not done."""
    logits = unembed(params, hidden, config=config)
    before = Choice(state.position + 1, state.generated, state.done, state.seen)
    choice, (token, *scores) = choose(logits, before, sampling, key, ~state.done, logprobs=logprobs)
    newest = jnp.where(token >= 0, token, state.token)
    state = State(newest, choice.length - 1, choice.generated, choice.done, choice.seen)
    return state, Sampled(token[:, None], *(array[:, None] for array in scores))


def hidden_chunk(
    params: Params,
    cache: Cache,
    prompts: jax.Array,
    lengths: jax.Array,
    i: jax.Array,
    adapters: jax.Array | None = None,
    *,
    chunk: int,
    config: ModelConfig,
) -> tuple[jax.Array, Cache]:
    """`hidden` of chunk i of all prompts' tokens, one prompt after the other: float32 [chunk, hidden_size], in which rows
    after the last token mean nothing, and the new cache."""
    return hidden(params, cache, _chunk(cache, prompts, lengths, i, adapters, chunk), config=config)


def routing_chunk(
    params: Params,
    cache: Cache,
    prompts: jax.Array,
    lengths: jax.Array,
    i: jax.Array,
    adapters: jax.Array | None = None,
    *,
    chunk: int,
    config: ModelConfig,
) -> tuple[tuple[jax.Array, jax.Array], Cache]:
    """`routing` of chunk i of all prompts' tokens, one prompt after the other."""
    return routing(params, cache, _chunk(cache, prompts, lengths, i, adapters, chunk), config=config)


def _chunk(
    cache: Cache, prompts: jax.Array, lengths: jax.Array, i: jax.Array, adapters: jax.Array | None, chunk: int
) -> RaggedBatch:
    prompts, lengths = jnp.asarray(prompts), jnp.asarray(lengths)
    rows, longest = prompts.shape
    per_row = cache.num_pages // rows
    starts = jnp.concatenate([jnp.zeros((1,), jnp.int32), jnp.cumsum(lengths).astype(jnp.int32)])
    token = i * chunk + jnp.arange(chunk, dtype=jnp.int32)
    row = jnp.clip(jnp.searchsorted(starts, token, side="right") - 1, 0, rows - 1).astype(jnp.int32)
    position = jnp.clip(token - starts[row], 0, longest - 1)
    return RaggedBatch(
        tokens=prompts[row, position],
        positions=position,
        slots=jnp.where(token < starts[-1], row * per_row * cache.page_size + position, -1),
        query_starts=jnp.clip(starts - i * chunk, 0, chunk),
        kv_lengths=jnp.clip((i + 1) * chunk - starts[:-1], 0, lengths),
        page_table=jnp.arange(rows * per_row, dtype=jnp.int32).reshape(rows, per_row),
        logits_rows=jnp.zeros((0,), jnp.int32),
        adapters=None if adapters is None else jnp.asarray(adapters)[row],
    )


def logprobs_of(params: Params, hidden: jax.Array, targets: jax.Array, *, config: ModelConfig) -> jax.Array:
    """Log-probability of targets int32 [T] after hidden [T, hidden_size]: float32 [T], `ROWS` rows of logits at a time."""
    count = hidden.shape[0]
    blocks = -(-count // ROWS)
    padding = blocks * ROWS - count
    hidden = jnp.pad(hidden, ((0, padding), (0, 0))).reshape(blocks, ROWS, -1)
    targets = jnp.pad(targets, (0, padding)).reshape(blocks, ROWS)

    def block(inputs: tuple[jax.Array, jax.Array]) -> jax.Array:
        hidden, targets = inputs
        logits = unembed(params, hidden, config=config)
        return jnp.take_along_axis(logits, targets[:, None], axis=1)[:, 0] - jax.nn.logsumexp(logits, axis=1)

    return lax.map(block, (hidden, targets)).reshape(-1)[:count]
