"""The device side of the engine: the state and the slots as donated values, the compiled steps, and the transfers.

Programs are few (`Executor.buckets`), compiled before they are needed if there is time, and kept by the model. The results of a
dispatch are fetched after the next one has started, so that the device does not wait for the host.
"""

from __future__ import annotations

import bisect
import contextlib
import operator
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ferrum_jax import memory
from ferrum_jax.engine import steps
from ferrum_jax.engine.config import Bucket, EngineConfig
from ferrum_jax.engine.ledger import pool_sizes
from ferrum_jax.engine.sequence import Dispatch, Extras, Sequence
from ferrum_jax.runtime import Runtime
from ferrum_jax.sampling import Sampling
from ferrum_jax.sampling_params import MAX_BIAS, SamplingParams
from ferrum_jax.state import DecodeState, copy_places, grow, page_kinds, read_places, write_places
from ferrum_jax.units import readable_bytes

_COPIES = 8  # places per part and copy
_MASKS = 16  # rows of grammars that are sent together
_HOST_CACHE_BYTES = 1 << 30  # default limit of the KV cache on a CPU
_FREE_FRACTION = 0.9  # of an accelerator's free memory


class Executor:
    """Runs the programs of an engine. `num_pages`: limit for each pool; `pages`: current size of the largest. `context`: limit
    of tokens in a sequence."""

    def __init__(self, model: Runtime, config: EngineConfig, num_pages: Iterable[int], context: int):
        self.model, self.config, self.num_pages = model, config, tuple(num_pages)
        self.kv_dtype = config.kv_dtype or model.kv_dtype
        self.most = max(self.num_pages)
        self.pages = min(config.initial_pages or self.most, self.most)
        self.pages_a_sequence = -(-context // config.page_size)
        self.compiles = 0
        self.substitutes = False  # a dispatch may have a larger shape than it needs, while the right one is being compiled
        self.shape: Bucket | None = None  # of the newest dispatch
        self._locks: dict[Any, threading.Lock] = {}
        self._programs = model.programs.table((config, self.num_pages, context, self.kv_dtype))
        self._guard = threading.Lock()
        self.reset()

    def release(self) -> None:
        """Gives up what is on the device, for an engine that is not used any more or that is reset."""
        self._placed_key: Any = None
        self._arrays: Any = None
        self.state: Any = None
        self.slots: Any = None

    def reset(self) -> None:
        """Empties the state and all slots; compiled programs stay. OutOfMemoryError if the state does not fit."""
        self.release()
        with self._room(self.pages):
            self.state = self.model.placement.zeros(self.abstract_state(self.pages))
            sampling = self._sampling([], self.config.max_seqs)
            self.slots = self.model.programs.run(steps.new_slots, sampling, **self._slot_sizes())

    # What the engine calls

    def buckets(self) -> list[Bucket]:
        """All shapes that can occur, in the order in which they are first needed."""
        return sorted(self.config.buckets, key=lambda bucket: bucket.rows)

    def programs(self) -> list[tuple[Bucket | str, int]]:
        """All programs that can occur, each with its number of pages, in the order in which they are first needed."""
        sizes = [self.pages]
        while sizes[-1] < self.most:
            sizes.append(min(4 * sizes[-1], self.most))
        names: list[Bucket | str] = ["copy", *self.buckets()]
        growth = [("grow", pages) for pages in sizes[:-1]]
        return [("admit", self.pages), ("mask", self.pages), *((name, pages) for pages in sizes for name in names), *growth]

    def essential(self) -> list[Bucket | str]:
        """The programs that can serve any request, with the help of `substitutes`."""
        largest = (Bucket(tokens, self.config.max_seqs) for tokens in (0, self.config.longest))
        return ["admit", "mask", "copy", *largest]

    def compile(self, bucket: Bucket | str, pages: int | None = None) -> Callable:
        """The program of a bucket, or "admit", "mask", "copy" or "grow", for `pages` pages (None: the current number), compiled
        if necessary. Any thread may call it."""
        pages = pages or self.pages
        key = bucket, 0 if bucket in ("admit", "mask") else pages
        with self._guard:
            lock = self._locks.setdefault(key, threading.Lock())
        with lock:
            if key not in self._programs:
                before = self.model.programs.compiled
                self._programs[key] = self._compile(bucket, pages)
                self.compiles += self.model.programs.compiled > before
        return self._programs[key]

    def admit(self, sequence: Sequence, slot: int, params: SamplingParams, seed: int, extras: Extras) -> None:
        """Fills a slot for a sequence."""
        admission = self._admission(sequence, slot, params, seed, extras)
        self.slots = self.compile("admit")(self.slots, admission)

    def mask(self, rows: list[int], forced: list[tuple[int, ...]], masks: np.ndarray) -> None:
        """Appends the tokens that grammars force in some slots, and sets what they admit next: int32 [rows, words]."""
        most = min(_MASKS, self.config.max_seqs)
        for first in range(0, len(rows), most):
            some = rows[first : first + most]
            chosen = np.full(most, self.config.max_seqs, np.int32)
            chosen[: len(some)] = some
            tokens = np.full((most, steps.MOST_FORCED), -1, np.int32)
            for row, made in zip(tokens, forced[first : first + most], strict=False):
                row[: len(made)] = made
            bits = np.zeros((most, masks.shape[1]), np.int32)
            bits[: len(some)] = masks[first : first + most]
            self.slots = self.compile("mask")(self.slots, chosen, tokens, bits)

    def ready(self, dispatch: Dispatch) -> bool:
        """Whether a dispatch can be started at once: its program is compiled and its pages exist."""
        return self._pages(dispatch) <= self.pages and (self._bucket(dispatch), self.pages) in self._programs

    def prepare(self, dispatch: Dispatch) -> None:
        """Does the work for a dispatch that may take long, once: compiles its program, and grows the state to its pages."""
        self._grow(self._pages(dispatch))
        self.compile(self._bucket(dispatch))

    def launch(self, dispatch: Dispatch) -> steps.Results:
        """Starts a dispatch. Its results stay on the device, in the order of its rows."""
        self._grow(self._pages(dispatch))
        self.shape = bucket = self._bucket(dispatch)
        program = self.compile(bucket)
        if dispatch.copies:
            self.copy(dispatch.copies)
        rows, table, ends = self._placed(dispatch, bucket.rows)
        last: tuple[Any, ...] = ends, np.int32(dispatch.steps)
        if bucket.tokens:
            starts = np.full(bucket.rows, -1, np.int32)
            counts = np.zeros(bucket.rows + 1, np.int32)
            samples = np.zeros(bucket.rows, bool)
            keeps = np.full((2, bucket.rows), -1, np.int32)
            for i, row in enumerate(dispatch.rows):
                starts[i], counts[i + 1], samples[i], keeps[:, i] = row.start, row.length, row.samples, row.keeps
            last = starts, counts.cumsum(dtype=np.int32), samples, keeps
        self.state, self.slots, results = program(self.model.params, self.state, self.slots, rows, table, *last)
        return results

    def fetch(self, results: steps.Results, scored: bool, scored_prompt: bool) -> steps.Results:
        """Waits for results and copies them to the host; log-probabilities only if requested."""
        nothing = results._replace(ids=None, logprobs=None) if not scored else results
        return self.model.programs.fetch(nothing if scored_prompt else nothing._replace(prompt_ids=None, prompt_logprobs=None))

    def read(self, places: list[list[int]]) -> DecodeState:
        """The contents of some places of each part, on the host."""
        arguments = self.state, _arrays(places)
        return self.model.programs.fetch(self.model.programs.get(read_places, *arguments)(*arguments))

    def write(self, places: list[list[int]], content: DecodeState) -> None:
        """Writes the result of `read` to some places."""
        self._grow(1 + max(max(pages, default=-1) for pages in places[: len(self.num_pages)]))
        arguments = self.state, _arrays(places), content
        self.state = self.model.programs.get(write_places, *arguments, donate=(0,))(*arguments)

    def abstract_state(self, pages: int = 1) -> DecodeState:
        """The state as `jax.ShapeDtypeStruct`s, with `pages` pages in the largest pool."""
        sizes = self._state_sizes(pages)
        return memory.abstract_state(self.model.config, placement=self.model.placement, **sizes)

    # Inside

    def _bucket(self, dispatch: Dispatch) -> Bucket:
        """The smallest shape for a dispatch; with `substitutes` the smallest that is compiled, if there is one."""
        fitting = self.config.fitting(dispatch.tokens, len(dispatch.rows))
        compiled = (bucket for bucket in fitting if self.substitutes and (bucket, self.pages) in self._programs)
        return next(compiled, fitting[0])

    def _pages(self, dispatch: Dispatch) -> int:
        """The number of pages that a dispatch needs, or 0 if the state cannot grow any more."""
        if self.pages == self.most:
            return 0
        used = (page for row in dispatch.rows for pages in row.held.pages for page in pages)
        return 1 + max(*used, *(target for part, _, target in dispatch.copies if part < len(self.num_pages)), -1, -1)

    def copy(self, copies: list[tuple[int, int, int]]) -> None:
        """Copies places, given as (part, source, target), in this order."""
        parts: list[list[tuple[int, int]]] = [[] for _ in self.state.parts]
        for part, source, target in copies:
            parts[part].append((source, target))
        for first in range(0, max(map(len, parts)), _COPIES):
            pairs = np.full((len(parts), _COPIES, 2), np.iinfo(np.int32).max, np.int32)
            for row, pairs_of in zip(pairs, parts, strict=True):
                some = pairs_of[first : first + _COPIES]
                row[: len(some)] = np.asarray(some, np.int32).reshape(-1, 2)
            self.state = self.compile("copy")(self.state, pairs[..., 0], pairs[..., 1])

    def _grow(self, pages: int) -> None:
        """Grows the state to at least this many pages: 4, 16, ... times the initial number."""
        while self.pages < pages:
            size = min(4 * self.pages, self.most)
            with self._room(size):
                self.state = self.compile("grow")(self.state)
            self.pages = size

    @contextlib.contextmanager
    def _room(self, pages: int) -> Iterator[None]:
        """A block that makes a state with `pages` pages; OutOfMemoryError with its size if it does not fit."""
        size, placement = memory.nbytes(self.abstract_state(pages)), self.model.placement
        tokens = pages * self.config.page_size
        count = f"a KV cache of {pages:,} pages ({tokens:,} tokens, {self.kv_dtype}) takes {readable_bytes(size)}"
        memory.require(size, placement, count)
        with placement.as_default(), memory.explained(placement, lambda: count):
            yield

    def _placed(self, dispatch: Dispatch, count: int) -> tuple:
        """Slots, pages and limits of a dispatch's rows on the device; the same arrays while nothing changes."""
        key = count, *[(row.sequence.number, row.epoch, row.slot, row.held.count) for row in dispatch.rows]
        if key != self._placed_key:
            rows = np.full(count, -1, np.int32)
            table = np.zeros((len(self.num_pages), count, self.pages_a_sequence), np.int32)
            ends = np.zeros(count, np.int32)
            for i, row in enumerate(dispatch.rows):
                rows[i], table[:, i], ends[i] = row.slot, row.held.table, row.sequence.limit
            arrays = rows, table.reshape(-1, table.shape[2]), ends
            self._placed_key, self._arrays = key, self.model.placement.put(arrays)
        return self._arrays

    def _compile(self, bucket: Bucket | str, pages: int) -> Callable:
        programs, config = self.model.programs, self.model.config
        state, slots = self.abstract_state(pages), self.model.placement.everywhere(jax.eval_shape(self._new_slots))
        if bucket == "admit":
            return programs.get(steps.admit, slots, jax.eval_shape(self._example), donate=(0,))
        if bucket == "mask":
            most = min(_MASKS, self.config.max_seqs)
            forced, masks = (np.zeros((most, width), np.int32) for width in (steps.MOST_FORCED, slots.mask.shape[1]))
            return programs.get(steps.mask, slots, np.zeros(most, np.int32), forced, masks, donate=(0,))
        if bucket == "copy":
            places = np.zeros((len(state.parts), _COPIES), np.int32)
            return programs.get(copy_places, state, places, places, donate=(0,))
        if bucket == "grow":
            return programs.get(grow, state, pages=self._sizes_of_pools(min(4 * pages, self.most)))
        assert isinstance(bucket, Bucket)
        number = np.zeros(bucket.rows, np.int32)
        rows = number, np.zeros((len(self.num_pages) * bucket.rows, self.pages_a_sequence), np.int32), number
        if bucket.tokens:
            arguments = (
                *rows,
                np.zeros(bucket.rows + 1, np.int32),
                np.zeros(bucket.rows, bool),
                np.zeros((2, bucket.rows), np.int32),
            )
            static = {"tokens": bucket.tokens, "config": config}
            return programs.get(steps.mixed, self.model.params, state, slots, *arguments, donate=(1, 2), **static)
        static = {"steps": self.config.steps, "speculation": self.config.speculation, "config": config}
        return programs.get(steps.decode, self.model.params, state, slots, *rows, np.int32(0), donate=(1, 2), **static)

    def _sizes_of_pools(self, pages: int) -> tuple[int, ...]:
        return tuple(min(pages, most) for most in self.num_pages)

    def _state_sizes(self, pages: int) -> dict[str, Any]:
        sizes = {"pages": self._sizes_of_pools(pages), "page_size": self.config.page_size, "dtype": self.kv_dtype}
        return {**sizes, "num_states": self.config.num_states}

    def _sampling(self, params: list[SamplingParams], rows: int) -> Sampling:
        tokenizer = self.model.tokenizer
        return Sampling.from_params(
            params,
            eos_ids=sorted(tokenizer.eos_ids),
            vocab_limit=min(tokenizer.vocab_size, self.model.config.vocab_size),
            pad_to=rows,
        )

    def _slot_sizes(self) -> dict[str, Any]:
        capacity = self.pages_a_sequence * self.config.page_size
        return {"slots": self.config.max_seqs, "capacity": capacity, "vocab": self.model.config.vocab_size}

    def _new_slots(self) -> steps.Slots:
        return steps.new_slots(self._sampling([], self.config.max_seqs), **self._slot_sizes())

    def _example(self) -> steps.Admission:
        return jax.tree.map(jnp.asarray, self._admission(Sequence(0, [0], 1, 2), 0, SamplingParams(), 0, Extras([], [])))

    def _admission(self, sequence: Sequence, slot: int, params: SamplingParams, seed: int, extras: Extras) -> steps.Admission:
        text = np.zeros(self.pages_a_sequence * self.config.page_size, np.int32)
        text[: len(sequence.tokens)] = sequence.tokens
        ids = np.full(MAX_BIAS, self.model.config.vocab_size, np.int32)
        bias = np.zeros(MAX_BIAS, np.float32)
        ids[: len(extras.bias)] = [id for id, _ in extras.bias]
        bias[: len(extras.bias)] = [value for _, value in extras.bias]
        banned = np.full((steps.BAD_WORDS, steps.BAD_WORD_TOKENS), -1, np.int32)
        for row, word in zip(banned, extras.banned, strict=False):
            row[-len(word) :] = word
        room = sequence.limit - sequence.prompt_length  # its max_tokens, limited by the context
        return steps.Admission(
            slot=np.int32(slot),
            text=text,
            length=np.int32(len(sequence.tokens)),
            prompt_length=np.int32(sequence.prompt_length),
            bias_ids=ids,
            bias=bias,
            banned=banned,
            min_tokens=np.int32(params.min_tokens),
            constrained=np.bool_(params.structured is not None),
            scored=np.bool_(params.logprobs is not None),
            scored_prompt=np.bool_(params.prompt_logprobs is not None),
            adapter=np.int32(sequence.adapter),
            sampling=self._sampling([params.row(seed, room)], 1),
        )


def _arrays(places: list[list[int]]) -> tuple[np.ndarray, ...]:
    return tuple(np.asarray(ids, np.int32) for ids in places)


def choose_num_pages(model: Runtime, config: EngineConfig) -> int:
    """Pages for `max_seqs` sequences with the full context, or as many as fit the memory; at least those of one sequence."""
    dtype = config.kv_dtype or model.kv_dtype  # first, because an embedding model raises its error here
    windows = [kind.window for kind in page_kinds(model.config)]
    one = memory.abstract_state(model.config, 1, config.page_size, dtype, model.placement)
    sizes = [memory.nbytes(pool) for pool in one.pools]

    def nbytes(pages: int) -> int:
        return sum(map(operator.mul, sizes, pool_sizes(windows, pages, config)))

    context = -(-model.max_seq_len // config.page_size)
    limit = memory.limit(model.placement)
    most = _HOST_CACHE_BYTES
    if model.placement.platform != "cpu" and limit is not None:
        most = int(limit.free * _FREE_FRACTION)
    most -= config.num_states * memory.nbytes(one.recurrent)
    fitting = bisect.bisect(range(1, config.max_seqs * context + 1), most, key=nbytes)
    return max(1, min(config.max_seqs * context, max(fitting, min(context, 64))))
