"""The functions that the engine compiles: pure functions of the parameters and of the state of all sequences and the slots,
which are donated.

`mixed` runs prompt tokens and single decodes on one ragged axis, `decode` several steps of only decodes; both end in the same
sampling. A row that has ended, or whose slot is -1, writes nothing and reads nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from ferrum_jax import functional
from ferrum_jax.adapters import COLUMNS
from ferrum_jax.choice import NOT_FINITE, Chosen, choose, if_requested
from ferrum_jax.config import ModelConfig
from ferrum_jax.engine.draft import draft, learn, worth_it
from ferrum_jax.engine.slots import BAD_WORD_TOKENS, BAD_WORDS, MOST_FORCED, Admission, Slots, admit, mask, new_slots
from ferrum_jax.models.decoder import RaggedBatch
from ferrum_jax.sampling import MAX_LOGPROBS, token_logprobs
from ferrum_jax.state import DecodeState

__all__ = [
    "BAD_WORDS",
    "BAD_WORD_TOKENS",
    "MOST_FORCED",
    "NOT_FINITE",
    "Admission",
    "Results",
    "Slots",
    "admit",
    "decode",
    "mask",
    "mixed",
    "new_slots",
]


class Results(NamedTuple):
    """tokens int32 [R, N], -1 for none, NOT_FINITE if the logits were not finite; ids and logprobs [R, N, k + 1] from
    `token_logprobs`, for rows that request them; the same for prompt tokens [T, k + 1] (None without any)."""

    tokens: Any
    ids: Any
    logprobs: Any
    prompt_ids: Any = None
    prompt_logprobs: Any = None


def mixed(
    params: Any,
    state: DecodeState,
    slots: Slots,
    rows: jax.Array,
    table: jax.Array,
    starts: jax.Array,
    query_starts: jax.Array,
    samples: jax.Array,
    keeps: jax.Array,
    *,
    config: ModelConfig,
    tokens: int,
) -> tuple[DecodeState, Slots, Results]:
    """One step over `tokens` tokens of R rows.

    rows int32 [R]: the slot of each, -1 for none; table int32 [pools * R, P]: their pages, pool after pool; starts int32 [R]:
    the position of a row's first token, -1 for its newest ones; query_starts int32 [R + 1]; samples bool [R]: rows that
    choose their next token; keeps int32 [2, R]: after which token of a row, except the last one, the state of layers that recur
    is kept as well, and its place (-1, -1: nowhere).
    """
    live = (rows >= 0) & ((starts >= 0) | (~slots.done[rows] & slots.choosing(rows)))
    first = jnp.where(starts >= 0, starts, slots.length[rows] - jnp.diff(query_starts))

    def after(row: jax.Array, token: jax.Array) -> jax.Array:
        last = jnp.where(token == jnp.diff(query_starts)[row] - 1, rows[row], -1)
        return jnp.where(token == keeps[0, row], keeps[1, row], last)

    hidden, state = _hidden(params, state, slots, rows, table, first, query_starts, live, tokens, config, after)
    last = jnp.clip(query_starts[1:] - 1, 0, tokens - 1)
    logits = functional.unembed(params, hidden[last], config=config)
    scores = _prompt_scores(params, hidden, slots, rows, first, query_starts, config)
    slots, chosen = _choose(logits, slots, rows, live & samples & slots.choosing(rows))
    return state, slots, Results(*(array[:, None] for array in chosen), *scores)


def decode(
    params: Any,
    state: DecodeState,
    slots: Slots,
    rows: jax.Array,
    table: jax.Array,
    ends: jax.Array,
    limit: jax.Array,
    *,
    config: ModelConfig,
    steps: int,
    speculation: int,
) -> tuple[DecodeState, Slots, Results]:
    """Up to min(limit, steps) steps of rows that each continue from their newest token. A row with a grammar takes part in the
    first one.

    rows, table: as in `mixed`; ends int32 [R]: the limit of each row's tokens (drafts stay below). Results have room for steps
    * (speculation + 1) tokens per row; the generated ones come first.
    """
    count, width = rows.shape[0], speculation + 1
    begin = slots.generated[rows]
    wanted = ((rows >= 0) & slots.scored[rows]).any()
    columns, best = steps * width, _best(config.vocab_size) + 1
    results = Results(
        jnp.full((count, columns), -1, jnp.int32),
        jnp.zeros((count, columns, best), jnp.int32),
        jnp.zeros((count, columns, best), jnp.float32),
    )

    def choose(logits: jax.Array, slots: Slots, alive: jax.Array, results: Results) -> tuple[Slots, jax.Array, Results]:
        column = jnp.where(alive, slots.generated[rows] - begin, columns)
        slots, (token, ids, logprobs) = _choose(logits, slots, rows, alive)
        results = results._replace(tokens=results.tokens.at[jnp.arange(count), column].set(token, mode="drop"))

        def keep(results: Results) -> Results:
            at = jnp.arange(count), column
            return results._replace(
                ids=results.ids.at[at].set(ids, mode="drop"),
                logprobs=results.logprobs.at[at].set(logprobs, mode="drop"),
            )

        return slots, token, lax.cond(wanted, keep, lambda results: results, results)

    def single(state: Any, slots: Slots, results: Results, alive: jax.Array) -> tuple[Any, Slots, Results]:
        starts = jnp.arange(count + 1, dtype=jnp.int32)
        first = slots.length[rows] - 1
        hidden, state = _hidden(params, state, slots, rows, table, first, starts, alive, count, config)
        slots, _, results = choose(functional.unembed(params, hidden, config=config), slots, alive, results)
        return state, slots, results

    def verify(state: Any, slots: Slots, results: Results, alive: jax.Array, drafted: jax.Array) -> tuple[Any, Slots, Results]:
        """Runs the newest token and the draft after it as one prompt, then chooses tokens as long as they equal the draft."""
        first, lengths = slots.length[rows] - 1, jnp.where(alive, drafted + 1, 0)
        starts = jnp.concatenate([jnp.zeros((1,), jnp.int32), jnp.cumsum(lengths)])

        def after(row: jax.Array, token: jax.Array) -> jax.Array:
            """The last places of states that recur are those of verification, `width` for each slot."""
            return state.counts[-1] - (slots.length.shape[0] - rows[row]) * width + token

        hidden, state = _hidden(params, state, slots, rows, table, first, starts, alive, count * width, config, after)
        inputs = jnp.clip(starts[:-1, None] + jnp.arange(width), 0, count * width - 1)
        logits = functional.unembed(params, hidden[inputs].reshape(count * width, -1), config=config)
        logits = logits.reshape(count, width, -1)
        text = slots.history[rows[:, None], jnp.clip(first[:, None] + jnp.arange(1, width + 1), 0, slots.history.shape[1] - 1)]

        def one(j: Any, carry: Any) -> Any:
            slots, results, going = carry
            slots, token, results = choose(logits[:, j], slots, going, results)
            going = going & (j < drafted) & (token == text[:, j]) & ~slots.done[rows]
            return slots, results, going

        slots, results, _ = lax.fori_loop(0, width, one, (slots, results, alive))
        made = slots.length[rows] - first - 1
        if state.recurrent:  # the state after the tokens that were right
            target = jnp.where(alive, rows, state.counts[-1])
            state = state.copy_states(after(jnp.arange(count), made - 1), target)
        return state, learn(slots, rows, drafted, made - 1), results

    def step(carry: Any) -> Any:
        i, state, slots, results = carry
        alive = goes_on(slots)
        if not speculation:
            return i + 1, *single(state, slots, results, alive)
        slots, drafted = draft(slots, rows, alive, ends, speculation)
        # Loops of one iteration or none, because XLA copies the whole state around a conditional.
        guessed = worth_it(drafted, alive).astype(jnp.int32)
        after = lax.fori_loop(0, guessed, lambda _, s: verify(*s, alive, drafted), (state, slots, results))  # type: ignore
        return i + 1, *lax.fori_loop(0, 1 - guessed, lambda _, s: single(*s, alive), after)  # type: ignore

    def goes_on(slots: Slots) -> jax.Array:
        return (rows >= 0) & ~slots.done[rows] & slots.choosing(rows)

    def going(carry: Any) -> jax.Array:
        i, _, slots, _ = carry
        return (i < jnp.minimum(limit, steps)) & goes_on(slots).any()

    with jax.named_scope("decode"):
        carry = (jnp.zeros((), jnp.int32), state, slots, results)
        return lax.while_loop(going, step, carry)[1:]


def _hidden(
    params: Any,
    state: DecodeState,
    slots: Slots,
    rows: jax.Array,
    table: jax.Array,
    first: jax.Array,
    query_starts: jax.Array,
    live: jax.Array,
    tokens: int,
    config: ModelConfig,
    after: Callable[[jax.Array, jax.Array], jax.Array] | None = None,
) -> tuple[jax.Array, Any]:
    """Final hidden states [tokens, hidden_size] of the texts of rows from position `first` on, and the state. after: the place
    for the state of layers that recur after a token, -1 for nowhere, given its row and its index there, int32 [tokens] all;
    None: only after the last token, in the row's slot."""
    token = jnp.arange(tokens, dtype=jnp.int32)
    row = jnp.clip(jnp.searchsorted(query_starts, token, side="right") - 1, 0, rows.shape[0] - 1).astype(jnp.int32)
    there = (token < query_starts[-1]) & live[row]
    position = jnp.where(there, first[row] + token - query_starts[row], 0)
    page = table.reshape(-1, rows.shape[0], table.shape[1])[:, row, position // state.page_size]  # [pools, tokens]
    lengths = jnp.diff(query_starts)
    batch = RaggedBatch(
        tokens=slots.history[rows[row], position],
        positions=position,
        slots=jnp.where(there, page * state.page_size + position % state.page_size, -1).reshape(-1),
        query_starts=query_starts,
        kv_lengths=jnp.where(live & (lengths > 0), first + lengths, 0),
        page_table=table,
        logits_rows=jnp.zeros((0,), jnp.int32),
        adapters=slots.adapter[rows[row]] if COLUMNS in params else None,
        states=rows if state.recurrent else None,
        state_writes=after(row, token - query_starts[row]) if state.recurrent and after is not None else None,
    )
    return functional.hidden(params, state, batch, config=config)


def _choose(logits: jax.Array, slots: Slots, rows: jax.Array, alive: jax.Array) -> tuple[Slots, Chosen]:
    """Chooses the next token of the rows int32 [R] that are alive, and appends it to their texts."""
    best, key = _best(logits.shape[1]), jnp.zeros((2,), jnp.uint32)
    wanted = (alive & slots.scored[rows]).any()
    choice, chosen = choose(logits, slots.choice, slots.sampling, key, alive, rows, logprobs=best, requested=wanted)
    slot = jnp.where(alive, rows, slots.length.shape[0])  # out of range: nothing is written
    history = slots.history.at[slot, slots.length[rows]].set(chosen.token, mode="drop")
    masked = slots.masked.at[slot].set(False, mode="drop")
    return slots.with_choice(choice)._replace(history=history, masked=masked), chosen


def _prompt_scores(
    params: Any,
    hidden: jax.Array,
    slots: Slots,
    rows: jax.Array,
    first: jax.Array,
    query_starts: jax.Array,
    config: ModelConfig,
) -> Any:
    """Log-probabilities of the token after each of a step's tokens, if any row requests those of its prompt: ids and logprobs
    [tokens, k + 1]."""
    tokens = hidden.shape[0]
    token = jnp.arange(tokens)
    row = jnp.clip(jnp.searchsorted(query_starts, token, side="right") - 1, 0, rows.shape[0] - 1)
    following = jnp.clip(first[row] + token - query_starts[row] + 1, 0, slots.history.shape[1] - 1)
    target = slots.history[rows[row], following]

    def scores() -> Any:
        block = min(functional.ROWS, tokens)
        padding = -tokens % block
        blocks = jnp.pad(hidden, ((0, padding), (0, 0))).reshape(-1, block, hidden.shape[1])

        def score(inputs: Any) -> Any:
            logits = functional.unembed(params, inputs[0], config=config)
            return token_logprobs(logits, inputs[1], _best(config.vocab_size))

        found = lax.map(score, (blocks, jnp.pad(target, (0, padding)).reshape(-1, block)))
        return tuple(array.reshape(-1, array.shape[-1])[:tokens] for array in found)

    return if_requested(((rows >= 0) & slots.scored_prompt[rows]).any(), scores)


def _best(vocab: int) -> int:
    """The number of best tokens that are reported."""
    return min(MAX_LOGPROBS, vocab)
