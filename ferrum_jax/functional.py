"""The functional surface: pure functions of parameters, cache and inputs, ready for `jax.jit`, nothing hidden.

`forward` runs one ragged batch. `generate` is prefill and the whole sampling loop as one program: `start` reads the
prompts in chunks and samples once, `advance` decodes until every row has stopped. Whoever looks in between (a stream, stop
strings, a server) uses the engine and gets the same tokens. Donate the cache: every program aliases it whole.

Rows of a batch own equal runs of pages: row b has pages b * P .. (b + 1) * P - 1, P = num_pages // rows.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import export, lax

from ferrum_jax.choice import NOT_FINITE, Choice, choose
from ferrum_jax.config import ModelConfig, require_experts
from ferrum_jax.kv_cache import KVCache, new_cache
from ferrum_jax.models.decoder import Decoder, RaggedBatch
from ferrum_jax.models.layers import ROUTING
from ferrum_jax.quantized import grouped_linear, linear
from ferrum_jax.sampling import Sampling

__all__ = [
    "NOT_FINITE",
    "KVCache",
    "RaggedBatch",
    "Sampled",
    "Sampling",
    "State",
    "advance",
    "forward",
    "generate",
    "grouped_linear",
    "hidden",
    "hidden_chunk",
    "linear",
    "logprobs_of",
    "new_cache",
    "routing",
    "routing_chunk",
    "start",
    "unembed",
]

CHUNK = 512  # tokens of a prefill step: bounds its temporaries, and XLA keeps a row's bits for up to 512 rows
ROWS = 64  # rows of logits computed at a time where only their summary is wanted


class Sampled(NamedTuple):
    """What was sampled: tokens int32 [B, N], -1 behind a row's end; with k logprobs asked for, ids int32 and logprobs
    float32 [B, N, k + 1] of the raw distribution, the chosen token first (k + 1 is 0 where none were asked for)."""

    tokens: jax.Array
    ids: jax.Array
    logprobs: jax.Array


class State(NamedTuple):
    """Where each row of a generation stands. token int32 [B]: sampled, not yet in the cache; position int32 [B]: its
    place in the sequence; generated int32 [B]: tokens made; done bool [B]; seen int32 [B, vocab]: what `sample`
    counts of prompt and output."""

    token: jax.Array
    position: jax.Array
    generated: jax.Array
    done: jax.Array
    seen: jax.Array


for _kind in (RaggedBatch, Sampled, Sampling, State):  # so that programs over them survive jax.export
    export.register_namedtuple_serialization(_kind, serialized_name=f"ferrum_jax.{_kind.__name__}")


def forward(params, cache: KVCache, batch: RaggedBatch, *, config: ModelConfig) -> tuple[jax.Array, KVCache]:
    """One step over a ragged batch.

    Args:
      params (dict): of the model.
      cache: goes in, to be donated, and comes out.
      batch: the tokens.
      config: of the model; static.

    Returns:
      float32 logits [R, vocab_size] of `batch.logits_rows`, and the new cache.
    """
    return _apply(params, config, cache, batch)


def _apply(params, config: ModelConfig, *args, method: str = "__call__") -> Any:
    return Decoder(config).apply({"params": params}, *args, method=method)


def hidden(params, cache: KVCache, batch: RaggedBatch, *, config: ModelConfig) -> tuple[jax.Array, KVCache]:
    """`forward` without the output matrix.

    Args:
      params (dict): of the model.
      cache: goes in, to be donated, and comes out.
      batch: the tokens.
      config: of the model; static.

    Returns:
      Final hidden states float32 [T, hidden_size], and the new cache.
    """
    return _apply(params, config, cache, batch, method="hidden")


def routing(params, cache: KVCache, batch: RaggedBatch, *, config: ModelConfig) -> tuple[tuple[jax.Array, jax.Array], KVCache]:
    """The experts that `forward` computes with.

    Args:
      params (dict): of the model.
      cache: goes in, to be donated, and comes out.
      batch: the tokens.
      config: of the model; static.

    Returns:
      Ids int32 and weights float32, both [layers, T, top_k], of the layers `config.expert_layers`, by falling probability
      (the id `num_experts` is padding's; weights are as the sum over experts has them, normalized and scaled where the
      model does so), and the new cache.

    Raises:
      UnsupportedModelError: for a model without experts.
    """
    require_experts(config)
    decoder = Decoder(config)
    (_, cache), recorded = decoder.apply({"params": params}, cache, batch, method="hidden", mutable=[ROUTING])
    return recorded[ROUTING]["chosen"][0], cache


def unembed(params, hidden: jax.Array, *, config: ModelConfig) -> jax.Array:
    """Logits of hidden states.

    Args:
      params (dict): of the model.
      hidden: [R, hidden_size].
      config: of the model; static.

    Returns:
      float32 [R, vocab_size].
    """
    return _apply(params, config, hidden, method="logits")


def generate(
    params,
    cache: KVCache,
    prompts: jax.Array,
    prompt_lengths: jax.Array,
    sampling: Sampling,
    key: jax.Array,
    *,
    config: ModelConfig,
    max_tokens: int,
    logprobs: int | None = None,
    adapters: jax.Array | None = None,
):
    """Prefill and the whole loop in one program. It stops when every row has stopped: by an end token, its own
    `sampling.max_tokens`, `max_tokens`, or logits that are not finite, which put `NOT_FINITE` (-2) in the place of a token
    and do not count in lengths.

    Args:
      params (dict): of the model.
      cache: goes in, to be donated, and comes out.
      prompts: int32 [B, L], right-padded.
      prompt_lengths: int32 [B], 0 for a row that is padding.
      sampling: parameters of each row.
      key: a PRNG key; the noise of a row depends on it, the row's seed and the position.
      config: of the model; static.
      max_tokens: tokens of a row at most; static.
      logprobs: how many of the best alternatives to give as well; static.
      adapters: int32 [B], each row's adapter by its place among those of `params`, -1 for none.

    Returns:
      tuple: tokens int32 [B, max_tokens], -1 after the end; lengths int32 [B]; the new cache; with `logprobs` a fourth
        value, `Sampled`, which has the alternatives.

    Raises:
      ValueError: where the cache is too small, and where `adapters` has another shape or `params` have none.
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
    params,
    cache: KVCache,
    prompts,
    prompt_lengths,
    sampling: Sampling,
    key,
    adapters: jax.Array | None = None,
    *,
    config: ModelConfig,
    chunk=None,
    logprobs=None,
) -> tuple[KVCache, State, Sampled]:
    """Reads the prompts into the cache, `chunk` tokens at a time (None: as many as there can be, at most `CHUNK`), and
    samples each row's first token: `Sampled` with N = 1."""
    prompts, prompt_lengths = jnp.asarray(prompts), jnp.asarray(prompt_lengths)
    rows, longest = prompts.shape
    chunk = min(chunk or CHUNK, rows * longest)
    ends = jnp.cumsum(prompt_lengths)

    def read(i, carry):
        cache, last = carry
        hidden, cache = hidden_chunk(params, cache, prompts, prompt_lengths, i, adapters, chunk=chunk, config=config)
        place = ends - 1 - i * chunk
        here = (place >= 0) & (place < chunk) & (prompt_lengths > 0)
        return cache, jnp.where(here[:, None], hidden[jnp.clip(place, 0, chunk - 1)], last)

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
    params,
    cache: KVCache,
    state: State,
    sampling: Sampling,
    key,
    limit,
    adapters: jax.Array | None = None,
    *,
    config: ModelConfig,
    steps: int,
    logprobs=None,
) -> tuple[KVCache, State, Sampled]:
    """Decodes up to min(limit, steps) further tokens of every row that is not done: `Sampled` with N = steps."""
    rows = state.token.shape[0]
    per_row = cache.num_pages // rows
    page_table = jnp.arange(rows * per_row, dtype=jnp.int32).reshape(rows, per_row)

    def step(carry):
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


def _sample(params, hidden, state: State, sampling: Sampling, key, config, logprobs) -> tuple[State, Sampled]:
    """Samples the token after `state.position` for every row that is not done."""
    logits = unembed(params, hidden, config=config)
    before = Choice(state.position + 1, state.generated, state.done, state.seen)
    choice, (token, *scores) = choose(logits, before, sampling, key, ~state.done, logprobs=logprobs)
    newest = jnp.where(token >= 0, token, state.token)
    state = State(newest, choice.length - 1, choice.generated, choice.done, choice.seen)
    return state, Sampled(token[:, None], *(array[:, None] for array in scores))


def hidden_chunk(params, cache: KVCache, prompts, lengths, i, adapters=None, *, chunk: int, config: ModelConfig):
    """Chunk i of the prompts' tokens, laid end to end: their final hidden states float32 [chunk, hidden_size] (those
    behind the last token are of no meaning) and the cache with them written."""
    return hidden(params, cache, _chunk(cache, prompts, lengths, i, adapters, chunk), config=config)


def routing_chunk(params, cache: KVCache, prompts, lengths, i, adapters=None, *, chunk: int, config: ModelConfig):
    """`routing` of chunk i of the prompts' tokens, laid end to end."""
    return routing(params, cache, _chunk(cache, prompts, lengths, i, adapters, chunk), config=config)


def _chunk(cache: KVCache, prompts, lengths, i, adapters, chunk: int) -> RaggedBatch:
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


def logprobs_of(params, hidden: jax.Array, targets: jax.Array, *, config: ModelConfig) -> jax.Array:
    """Log-probability of targets int32 [T] after hidden [T, hidden_size]: float32 [T], `ROWS` rows of logits at a time."""
    count = hidden.shape[0]
    blocks = -(-count // ROWS)
    padding = blocks * ROWS - count
    hidden = jnp.pad(hidden, ((0, padding), (0, 0))).reshape(blocks, ROWS, -1)
    targets = jnp.pad(targets, (0, padding)).reshape(blocks, ROWS)

    def block(inputs):
        hidden, targets = inputs
        logits = unembed(params, hidden, config=config)
        return jnp.take_along_axis(logits, targets[:, None], axis=1)[:, 0] - jax.nn.logsumexp(logits, axis=1)

    return lax.map(block, (hidden, targets)).reshape(-1)[:count]
