"""Sampling the next token on the device, with different parameters for every row.

The one idea: every filter (min-p, top-k, top-p) keeps a prefix of the stable descending order of a row's logits. So its
result is two numbers: the smallest kept logit, and the largest kept id among those equal to it. They are found without
sorting, by bisection on the logit. The number of passes over the vocabulary depends only on the row's own logits.

Order, as in vLLM: repetition, frequency and presence penalty, temperature, min-p, top-k, top-p, then Gumbel-max. All is
float32 and pure, and works inside jit, loops and vmap. The result for a row depends neither on the other rows nor on how
many there are.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ferrum_jax.sampling_params import MAX_LOGPROBS, SamplingParams
from pallas_kernels import dispatch
from pallas_kernels.reductions import exp, log

__all__ = ["MAX_LOGPROBS", "Sampling", "SamplingParams", "filtered_logits", "is_end", "occurred", "sample", "token_logprobs"]

# Rows are padded to whole blocks, so that each starts at the same lane of a vector register in every batch.
_BLOCK = 128
# The kept logits are usually in few blocks. This many, those with the greatest maxima, are searched first.
_BEST_BLOCKS = 128
_CHUNK = 512  # partial sums that are computed in parallel
_ID_BITS = 24  # weights of 1 are summed exactly up to here
# The first bisection steps halve the interval of values; later ones halve the interval of bit patterns, at most 32 times.
_VALUE_STEPS = 16
_MAX = float(np.finfo(np.float32).max)
_TINY = float(np.finfo(np.float32).tiny)
_INT32_MAX = 2**31 - 1
_SUBNORMALS = 2**23 - 1

_Weigh = Callable[[jax.Array], jax.Array]


class Sampling(NamedTuple):
    """The parameters of a batch of B rows as arrays: a pytree that goes into a compiled step."""

    temperature: jax.Array  # float32 [B]; 0 is greedy
    top_k: jax.Array  # int32 [B]; 0 is off
    top_p: jax.Array  # float32 [B]; 1 is off
    min_p: jax.Array  # float32 [B]; 0 is off
    repetition_penalty: jax.Array  # float32 [B]; 1 is off
    presence_penalty: jax.Array  # float32 [B]; 0 is off
    frequency_penalty: jax.Array  # float32 [B]; 0 is off
    seed: jax.Array  # uint32 [B]
    max_tokens: jax.Array  # int32 [B]; 0 in padding rows
    ignore_eos: jax.Array  # bool [B]
    vocab_limit: jax.Array  # int32 []; this id and all greater ones are never sampled
    eos: jax.Array  # int32 [E]; end ids, padded with -1

    @classmethod
    def from_params(
        cls,
        params: Sequence[SamplingParams],
        *,
        eos_ids: Sequence[int],
        vocab_limit: int,
        pad_to: int | None = None,
        default_seeds: Sequence[int] | None = None,
    ) -> Sampling:
        """Puts the parameters of a batch into NumPy arrays.

        Args:
          params: one for each row.
          eos_ids: the end tokens; padded to a multiple of 8, so that models share compiled shapes.
          vocab_limit: this id and all greater ones (the padding of a vocabulary) are never sampled; at least 1.
          pad_to: the number of rows; those after `params` are greedy and have max_tokens 0.
          default_seeds: one for each row of `params`, used modulo 2**32 if the row's seed is None; None: 0, 1, ...

        Raises:
          ValueError: if pad_to is less than the number of rows, default_seeds has another length, vocab_limit is less than 1,
            or a field is set that only an engine supports.
        """
        rows = len(params) if pad_to is None else pad_to
        if rows < len(params):
            raise ValueError(f"pad_to must be at least the number of rows, {len(params)}; got {pad_to}")
        default_seeds = range(len(params)) if default_seeds is None else default_seeds
        if len(default_seeds) != len(params):
            raise ValueError(f"default_seeds must have one seed for each row, {len(params)}; got {len(default_seeds)}")
        for field in (field for p in params for field in p.of_an_engine):
            raise ValueError(f"SamplingParams.{field} needs an engine: use fj.Engine or Model.generate")
        if vocab_limit < 1:
            raise ValueError(f"vocab_limit must be at least 1; got {vocab_limit}")

        def column(values: list, padding: float, dtype: type) -> Any:
            array: np.ndarray = np.full(rows, padding, dtype)
            array[: len(values)] = values
            return array

        def finite(value: float) -> float:  # within float32, neither infinite nor flushed to zero
            return min(max(value, _TINY), _MAX)

        limit: Any = np.asarray(vocab_limit, np.int32)
        unique = sorted({int(token) for token in eos_ids})
        ends: Any = np.full(max(8, -(-len(unique) // 8) * 8), -1, np.int32)
        ends[: len(unique)] = unique
        seeds = [int(d) if p.seed is None else p.seed for p, d in zip(params, default_seeds, strict=True)]
        return cls(
            temperature=column([finite(p.temperature) if p.temperature else 0.0 for p in params], 0.0, np.float32),
            top_k=column([min(p.top_k, _INT32_MAX) for p in params], 0, np.int32),
            top_p=column([finite(p.top_p) for p in params], 1.0, np.float32),
            min_p=column([p.min_p for p in params], 0.0, np.float32),
            repetition_penalty=column([finite(p.repetition_penalty) for p in params], 1.0, np.float32),
            presence_penalty=column([p.presence_penalty for p in params], 0.0, np.float32),
            frequency_penalty=column([p.frequency_penalty for p in params], 0.0, np.float32),
            seed=column([seed % 2**32 for seed in seeds], 0, np.uint32),
            max_tokens=column([min(p.max_tokens, _INT32_MAX) for p in params], 0, np.int32),
            ignore_eos=column([p.ignore_eos for p in params], False, np.bool_),
            vocab_limit=limit,
            eos=ends,
        )

    def take(self, rows: jax.Array) -> Sampling:
        """The parameters of some rows, int32 [R]. An index out of range gives those of any row."""
        return self._replace(**{name: jnp.asarray(getattr(self, name)).at[rows].get(mode="clip") for name in PER_ROW})


PER_ROW = tuple(name for name in Sampling._fields if name not in ("vocab_limit", "eos"))


def sample(logits: jax.Array, sampling: Sampling, seen: jax.Array, positions: jax.Array, key: jax.Array) -> jax.Array:
    """Samples one token for each row.

    The noise of a token depends only on (key, seed, position, token id). NaN counts as -inf and +inf as the largest float32. A
    row without any finite logit below `vocab_limit` gives id 0. Of equal greedy candidates, the smallest id is chosen.

    Args:
      logits: float32 [B, V].
      sampling: the parameters of the B rows.
      seen: int32 [B, V], twice the number of times that an id occurs in the row's output so far, plus 1 if it occurs in the
        prompt (`occurred` updates it). It can be bool if no row has a presence or frequency penalty.
      positions: int32 [B], the index in its sequence of the token being sampled.
      key: a JAX random key, typed or raw.

    Returns:
      int32 [B], token ids.
    """
    with jax.named_scope("sample"):
        sampling = Sampling(*map(jnp.asarray, sampling))
        x = _penalized(logits, sampling, seen)
        return lax.cond(
            jnp.any(sampling.temperature > 0),
            lambda: _draw(x, sampling, jnp.asarray(positions), key),
            lambda: _argmax(x),
        )


def occurred(seen: jax.Array, rows: jax.Array, tokens: jax.Array) -> jax.Array:
    """`seen` after tokens int32 [R] were sampled in rows int32 [R]. A row out of range changes nothing."""
    return seen.at[rows, tokens].add(2, mode="drop")


def filtered_logits(logits: jax.Array, sampling: Sampling, seen: jax.Array) -> jax.Array:
    """The numbers to which `sample` adds its noise: float32 [B, V], -inf for every id that cannot be sampled. Of the same
    arguments as `sample`.

    In a row with a temperature, the others are log-probabilities plus a constant of the row (the greatest is 0). In a greedy
    row they are the penalized logits, and only ids from `vocab_limit` on are removed.
    """
    sampling = Sampling(*map(jnp.asarray, sampling))
    x = _penalized(logits, sampling, seen)
    return _Rows.of(x, sampling).filtered(_everything(x))[:, : logits.shape[1]]


def token_logprobs(logits: jax.Array, sampled: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """Log-probabilities of the sampled and the k best tokens, before penalties, temperature and filters.

    Args:
      logits: float32 [B, V]; NaN gives NaN.
      sampled: int32 [B].
      k: the number of best tokens, in [0, V]; of equal ones the smaller id comes first.

    Returns:
      ids int32 [B, k + 1] and logprobs float32 [B, k + 1]: the sampled token, then the k best.

    Raises:
      ValueError: if k is outside [0, V].
    """
    vocab = logits.shape[1]
    if not 0 <= k <= vocab:
        raise ValueError(f"token_logprobs: k must be in [0, {vocab}], the vocabulary's size; got {k}")
    with jax.named_scope("token_logprobs"):
        x = logits.astype(jnp.float32)
        x = jnp.where(x == 0, 0.0, x)  # -0 and +0 are equal, but not to top_k
        top = jnp.maximum(jnp.max(x, axis=1, keepdims=True), -_MAX)
        padded = _pad(x, -jnp.inf)
        log_total = log(_sum(exp(padded - top)))[:, None]
        ids = sampled.astype(jnp.int32)[:, None]
        values = jnp.take_along_axis(x, ids, axis=1, mode="clip")
        if k:
            best_values, best_ids = _best(padded, k)
            ids = jnp.concatenate([ids, best_ids], axis=1)
            values = jnp.concatenate([values, best_values], axis=1)
        return ids, (values - top) - log_total


def _best(x: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """The k greatest of each row of float32 [B, whole blocks] and their ids. They are in the k blocks with the greatest maxima,
    so the vocabulary need not be sorted."""
    blocks = x.reshape(x.shape[0], -1, _BLOCK)
    _, found = lax.top_k(jnp.max(blocks, axis=2), min(k, blocks.shape[1]))
    found = jnp.sort(found.astype(jnp.int32), axis=1)  # of equal logits the smaller id is first
    among = jax.vmap(operator.getitem)(blocks, found).reshape(x.shape[0], -1)
    values, places = lax.top_k(among, k)
    return values, jnp.take_along_axis(found, places // _BLOCK, axis=1) * _BLOCK + places.astype(jnp.int32) % _BLOCK


def is_end(tokens: jax.Array, sampling: Sampling) -> jax.Array:
    """bool [B]: whether tokens int32 [B] end their rows: they are end tokens, and the row does not ignore those."""
    eos, ignored = jnp.asarray(sampling.eos), jnp.asarray(sampling.ignore_eos)
    return jnp.any((jnp.asarray(tokens)[:, None] == eos) & (eos >= 0), axis=1) & ~ignored


class _Candidates(NamedTuple):
    """Some logits of every row, including all above a bound. Of equal ones the smaller id comes first."""

    logits: jax.Array  # float32 [B, whole blocks]
    ids: jax.Array  # int32 [B or 1, whole blocks]
    bound: jax.Array  # float32 [B]


class _Cut(NamedTuple):
    """A prefix of the stable descending order: x > smallest, and x == smallest with an id of at most last_id."""

    smallest: jax.Array  # float32 [B]
    last_id: jax.Array  # int32 [B]

    def keeps(self, among: _Candidates) -> jax.Array:
        smallest, last_id = self.smallest[:, None], self.last_id[:, None]
        return (among.logits > smallest) | ((among.logits == smallest) & (among.ids <= last_id))


def _pad(x: jax.Array, value: float) -> jax.Array:
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % _BLOCK)), constant_values=value)


def _sum(x: jax.Array) -> jax.Array:
    """float32 [B] from [B, whole blocks]: chunk by chunk, then by halves. Written out for CPUs, where the order of XLA's
    reductions depends on the number of rows."""
    if dispatch.target().platform != "cpu":
        return jnp.sum(x, axis=1)
    count = -(-x.shape[1] // _CHUNK)
    chunks = jnp.pad(x, ((0, 0), (0, count * _CHUNK - x.shape[1]))).reshape(x.shape[0], count, _CHUNK)
    total = lax.fori_loop(0, count, lambda i, total: total + chunks[:, i], jnp.zeros((x.shape[0], _CHUNK)))
    while total.shape[1] > 1:
        half = total.shape[1] // 2
        total = total[:, :half] + total[:, half:]
    return total[:, 0]


def _argmax(x: jax.Array) -> jax.Array:
    """int32 [B], the first index of the greatest, by way of the best block (on CPUs faster than XLA's own argmax)."""
    blocks = x.reshape(x.shape[0], -1, _BLOCK)
    block = jnp.argmax(jnp.max(blocks, axis=2), axis=1).astype(jnp.int32)
    inside = jax.vmap(operator.getitem)(blocks, block)
    return block * _BLOCK + jnp.argmax(inside, axis=1).astype(jnp.int32)


def _penalized(logits: jax.Array, sampling: Sampling, seen: jax.Array) -> jax.Array:
    """float32 [B, whole blocks]: the logits without NaN, +inf and subnormals, penalized; -inf from `vocab_limit` on."""
    x = logits.astype(jnp.float32)
    x = jnp.where(jnp.isnan(x), -jnp.inf, jnp.minimum(x, _MAX))
    penalty = sampling.repetition_penalty[:, None]

    def penalize(x: jax.Array) -> jax.Array:
        scaled = jnp.clip(jnp.where(x > 0, x / penalty, x * penalty), -_MAX, _MAX)
        return jnp.where((seen != 0) & (x > -jnp.inf) & (penalty != 1), scaled, x)

    def subtract(x: jax.Array) -> jax.Array:
        count = seen.astype(jnp.int32) >> 1
        less = x - sampling.frequency_penalty[:, None] * count - jnp.where(count > 0, sampling.presence_penalty[:, None], 0)
        return jnp.where((count > 0) & (x > -jnp.inf), jnp.clip(less, -_MAX, _MAX), x)

    counted = (sampling.presence_penalty != 0) | (sampling.frequency_penalty != 0)
    x = lax.cond(jnp.any(penalty != 1), penalize, lambda x: x, x)
    x = lax.cond(jnp.any(counted), subtract, lambda x: x, x)
    x = jnp.where(jnp.abs(x) < _TINY, 0.0, x)
    return _pad(jnp.where(lax.iota(jnp.int32, x.shape[1]) < sampling.vocab_limit, x, -jnp.inf), -jnp.inf)


def _everything(x: jax.Array) -> _Candidates:
    return _Candidates(x, lax.broadcasted_iota(jnp.int32, (1, x.shape[1]), 1), jnp.full(x.shape[0], -jnp.inf))


def _best_blocks(everything: _Candidates) -> _Candidates:
    """The blocks of 128 ids with the greatest maxima, a small array that usually has all kept logits."""
    x = everything.logits
    blocks = x.reshape(x.shape[0], -1, _BLOCK)
    if blocks.shape[1] <= _BEST_BLOCKS:
        return everything
    maxima, indices = lax.top_k(jnp.max(blocks, axis=2), _BEST_BLOCKS)
    chosen = jax.vmap(operator.getitem)(blocks, indices)
    ids = indices.astype(jnp.int32)[:, :, None] * _BLOCK + lax.iota(jnp.int32, _BLOCK)
    return _Candidates(chosen.reshape(x.shape[0], -1), ids.reshape(x.shape[0], -1), jnp.min(maxima, axis=1))


class _Rows(NamedTuple):
    """The temperature and the filters of each row."""

    stochastic: jax.Array  # bool [B]; other rows stay as they are
    top: jax.Array  # float32 [B], the greatest logit
    temperature: jax.Array  # float32 [B]
    cut: _Cut

    @classmethod
    def of(cls, x: jax.Array, sampling: Sampling) -> _Rows:
        everything = _everything(x)
        best = _best_blocks(everything)
        stochastic = sampling.temperature > 0
        temperature = jnp.clip(jnp.where(stochastic, sampling.temperature, 1.0), 1e-30, 1e30)
        top = jnp.maximum(jnp.max(x, axis=1), -_MAX)

        use_top_k = stochastic & (sampling.top_k > 0) & (sampling.top_k < x.shape[1])
        used = jnp.stack([use_top_k, stochastic & (sampling.top_p < 1)])

        def shorten(stage: jax.Array, within: _Cut) -> _Cut:
            """Top-k (stage 0: every logit weighs 1) or top-p (stage 1: its probability), in one function that compiles once."""

            def weigh(logits: jax.Array) -> jax.Array:
                shape = (-1,) + (1,) * (logits.ndim - 1)
                scaled = (logits - top.reshape(shape)) / temperature.reshape(shape)
                return jnp.where(stage == 0, 1.0, exp(scaled))

            def mass() -> jax.Array:
                total = _sum(jnp.where(within.keeps(everything), weigh(x), 0.0))
                return jnp.maximum(sampling.top_p * total, _TINY)

            target = lax.cond(stage == 0, lambda: sampling.top_k.astype(jnp.float32), mass)
            short, reached = _prefix(best, within, top, used[stage], target, weigh)
            if best is everything:
                return short
            missed = used[stage] & ~reached
            return lax.cond(
                jnp.any(missed),
                lambda: _prefix(everything, short, top, missed, target, weigh)[0],
                lambda: short,
            )

        cut = _Cut(
            jnp.where(stochastic, top + temperature * jnp.log(sampling.min_p), -jnp.inf),
            jnp.full(x.shape[0], _INT32_MAX),
        )
        with jax.named_scope("top_k_top_p"):
            cut = lax.fori_loop(0, 2, lambda i, cut: lax.cond(jnp.any(used[i]), lambda: shorten(i, cut), lambda: cut), cut)
        return cls(stochastic, top, temperature, cut)

    def filtered(self, among: _Candidates) -> jax.Array:
        scaled = (among.logits - self.top[:, None]) / self.temperature[:, None]  # <= 0: nothing overflows
        kept = jnp.where(self.cut.keeps(among), scaled, -jnp.inf)
        return jnp.where(self.stochastic[:, None], kept, among.logits)


def _draw(x: jax.Array, sampling: Sampling, positions: jax.Array, key: jax.Array) -> jax.Array:
    """int32 [B]: Gumbel-max over the filtered logits, only over the best blocks if they have all kept logits."""
    rows = _Rows.of(x, sampling)
    everything = _everything(x)
    best = _best_blocks(everything)

    def among(candidates: _Candidates) -> jax.Array:
        noise = _gumbel(sampling.seed, positions, key, candidates.ids)
        scores = rows.filtered(candidates) + jnp.where(rows.stochastic[:, None], noise, 0.0)
        index = _argmax(lax.optimization_barrier(scores))
        ids = jnp.broadcast_to(candidates.ids, scores.shape)
        return jnp.take_along_axis(ids, index[:, None], axis=1)[:, 0]

    if best is everything:
        return among(everything)
    enough = ~rows.stochastic | (rows.cut.smallest > best.bound)
    return lax.cond(jnp.all(enough), lambda: among(best), lambda: among(everything))


class _Search(NamedTuple):
    """The search for the end of a prefix: arrays [B], but for the step."""

    step: jax.Array
    low: jax.Array  # float32: the logits from here on reach the target
    high: jax.Array  # float32: those from here on do not
    weight: jax.Array  # float32, of the prefix that ends at `low` and `last`
    before: jax.Array  # int32: of equal logits, the ids up to here do not reach the target
    last: jax.Array  # int32: those up to here do
    going: jax.Array  # bool


def _prefix(
    among: _Candidates, within: _Cut, top: jax.Array, used: jax.Array, target: jax.Array, weigh: _Weigh
) -> tuple[_Cut, jax.Array]:
    """The shortest prefix whose weight reaches the target.

    The weight from a lower bound on reaches the target, that from an upper bound on does not. The interval between them is
    halved until the excess is less than the lightest member. Where only equal logits are left in it, their ids are halved.

    Args:
      among: the candidates; logits up to their bound are ignored.
      within: the prefix to shorten.
      top: float32 [B], the greatest logit.
      used: bool [B]; other rows stay at `within`.
      target: float32 [B], > 0.
      weigh: from logits [B, ...] to their weights, which never fall as the logit grows, 0 or 1 at -inf.

    Returns:
      the cut, and bool [B], whether the target was reached; otherwise the cut is `within`.
    """
    x = jnp.where(within.keeps(among), among.logits, -jnp.inf)
    weights = weigh(x)

    def halve(state: _Search) -> _Search:
        step, low, high, weight, before, last, going = state
        # From the top downwards in doubling strides while there is no lower bound, then halfway between the two.
        middle = jnp.where(low == -_MAX, top - 2 * (top - high) - 4, 0.5 * low + 0.5 * high)
        low_order, high_order = _order(low), _order(high)
        half_order = (low_order >> 1) + (high_order >> 1) + (low_order & high_order & 1)
        order = jnp.where(step < _VALUE_STEPS, _order(middle), half_order)
        by_value = (low_order + 1 < high_order) & (step > 0)  # the first step weighs what there is from `low` on
        middle = jnp.where(by_value, _value(jnp.clip(order, low_order + 1, high_order - 1)), low)
        by_id = (low_order + 1 >= high_order) & (step > 0)
        middle_id = jnp.where(by_id, (before + last) >> 1, last)
        found = _sum(jnp.where(_Cut(middle, middle_id).keeps(among._replace(logits=x)), weights, 0.0))
        up, down = going & (found >= target), going & (found < target)
        low, high = jnp.where(up, middle, low), jnp.where(down & by_value, middle, high)
        last, before = jnp.where(up, middle_id, last), jnp.where(down & by_id, middle_id, before)
        weight = jnp.where(up | (step == 0), found, weight)
        divisible = (_order(low) + 1 < _order(high)) | (before + 1 < last)
        return _Search(step + 1, low, high, weight, before, last, used & divisible & (weight - target >= weigh(low)))

    zeros = jnp.zeros_like(within.last_id)
    low, high = _value(_order(among.bound) + 1), _value(_order(top) + 1)
    state = _Search(jnp.int32(0), low, high, jnp.zeros_like(top), zeros - 1, zeros + ((1 << _ID_BITS) - 1), used)
    found = lax.while_loop(lambda state: jnp.any(state.going), halve, state)

    reached = used & (found.weight >= target)
    last_id = jnp.where(found.low > within.smallest, found.last, jnp.minimum(found.last, within.last_id))
    cut = _Cut(jnp.maximum(found.low, within.smallest), last_id)
    return _Cut(*(jnp.where(reached, a, b) for a, b in zip(cut, within, strict=True))), reached


def _order(x: jax.Array) -> jax.Array:
    """int32, ordered as the float32 from whose bits they are made: one step to the next normal number, 0 for zeros."""
    bits = lax.bitcast_convert_type(x, jnp.int32)
    magnitude = jnp.maximum((bits & _INT32_MAX) - _SUBNORMALS, 0)
    return jnp.where(bits < 0, -magnitude, magnitude)


def _value(order: jax.Array) -> jax.Array:
    """The inverse of `_order`."""
    magnitude = jnp.where(order == 0, 0, jnp.abs(order) + _SUBNORMALS)
    x = lax.bitcast_convert_type(magnitude, jnp.float32)
    return jnp.where(order < 0, -x, x)


def _gumbel(seed: jax.Array, positions: jax.Array, key: jax.Array, ids: jax.Array) -> jax.Array:
    """Standard Gumbel noise float32 [B, N], between -2.9 and 22.9. It depends only on (key, seed, position, id)."""
    words = jax.random.key_data(key) if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) else key
    words = jnp.asarray(words, jnp.uint32).reshape(-1)
    row = seed, positions.astype(jnp.uint32)
    for i in range(0, words.shape[0], 2):
        row = _threefry(words[i], words[i + 1], *row)
    row = lax.optimization_barrier(row)  # otherwise XLA repeats the rounds above for every id
    bits, _ = _threefry(row[0][:, None], row[1][:, None], ids.astype(jnp.uint32), jnp.zeros_like(ids, jnp.uint32))
    # A uniform number with a float's full resolution near 0, where the large values of the noise come from.
    uniform = jnp.minimum((bits.astype(jnp.float32) + 0.5) * 2.0**-32, 1 - 2.0**-24)
    return -jnp.log(-jnp.log1p(-uniform))


def _threefry(key0: jax.Array, key1: jax.Array, x0: jax.Array, x1: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Threefry-2x32 with 20 rounds (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), on uint32.

    Written out so that its bits do not depend on JAX's settings or on the number of ids, and so that the unrolled rounds fuse
    with the code after it.
    """
    keys = (key0, key1, key0 ^ key1 ^ jnp.uint32(0x1BD11BDA))
    x0, x1 = x0 + keys[0], x1 + keys[1]
    for group in range(5):
        for shift in ((13, 15, 26, 6), (17, 29, 16, 24))[group % 2]:
            x0 = x0 + x1
            x1 = ((x1 << shift) | (x1 >> (32 - shift))) ^ x0
        x0, x1 = x0 + keys[(group + 1) % 3], x1 + keys[(group + 2) % 3] + jnp.uint32(group + 1)
    return x0, x1
