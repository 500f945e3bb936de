"""The engine: many requests, one device, nobody waits for anybody.

One thread at a time drives: it asks the scheduler for the next dispatch, starts it, and then reads the results of the one
before, so the device always has work while the host decides. Everything on the host is guarded by one lock, which is
never held while the device is waited for or a program is compiled; submitting and aborting take microseconds.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import secrets
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from ferrum_jax.engine import snapshot, steps
from ferrum_jax.engine.config import EngineConfig
from ferrum_jax.engine.device import Device, choose_num_pages
from ferrum_jax.engine.pages import PagePool
from ferrum_jax.engine.request import Output, Request
from ferrum_jax.engine.scheduler import Scheduler
from ferrum_jax.engine.sequence import Dispatch, Extras, Row, Sequence
from ferrum_jax.engine.watcher import listed
from ferrum_jax.kv_cache import KVCache
from ferrum_jax.prompts import Prompt, Prompts
from ferrum_jax.sampling_params import MAX_BIAS, SamplingParams

_DISPATCH_SECONDS = 0.05  # what a dispatch of several decode steps aims at


_LOG = logging.getLogger(__name__)


class _Stopped(Exception):
    """The engine was closed while it compiled."""


class _Flight(NamedTuple):
    """A dispatch that was started."""

    dispatch: Dispatch
    results: Any
    scored: bool
    scored_prompt: bool
    begin: float


class Engine:
    """Runs requests of one model together. Errors: ValueError for a request that can never be run, OutOfMemoryError where
    the KV cache does not fit.

    `with Engine(model) as engine:` compiles and serves in the background, and logs its shapes and how far it has compiled
    (logger "ferrum_jax.engine.engine", level INFO). Without, whoever waits for a request drives the
    engine, or calls `step` or `run`. All methods may be called from any thread.
    """

    def __init__(self, model: Prompts, config: EngineConfig = EngineConfig()):
        self.model, self.config = model, config
        num_pages = config.num_pages or choose_num_pages(model, config)
        window = model.config.sliding_window
        self.context = model.max_seq_len
        if not window:
            self.context = min(self.context, num_pages * config.page_size)
        self.num_pages = num_pages
        self.serving = False
        self._device = Device(model, config, num_pages, self.context)
        self.identity = f"{model.fingerprint()} kv {self._device.kv_dtype}, pages of {config.page_size}"
        pool = PagePool(num_pages, config.page_size, self.identity.encode())
        self._scheduler = Scheduler(config, pool, self.context, window)
        self._lock = threading.Condition()  # guards all that follows
        self._driving = threading.Lock()
        self._flight: _Flight | None = None
        self._threads: list[threading.Thread] = []
        self._number = 0
        self._steps_at_once = config.steps_per_dispatch or 1
        self._busy_until = 0.0
        self._counts = dict.fromkeys(("steps", "prompt_tokens", "generated_tokens"), 0)
        self._seconds = dict.fromkeys(("host_seconds", "device_seconds"), 0.0)

    # Requests

    def submit(
        self, prompt: Prompt | list[dict], params: SamplingParams = SamplingParams(), adapter: str | None = None
    ) -> Request:
        """A request for a text, a list of token ids or a conversation (a list of messages); `adapter`: the name of one that
        the model was loaded with. ValueError for a prompt that is empty or too long, for parameters that cannot be met, for
        an unknown adapter, and for a request that needs more pages than there are."""
        is_chat = isinstance(prompt, list) and bool(prompt) and isinstance(prompt[0], dict)
        tokens = self.model.encode_chat(prompt) if is_chat else self.model.encode(prompt)  # type: ignore[arg-type]
        return self._submit(tokens, params, adapter)

    def abort(self, request: Request) -> None:
        """Ends a request and its choices with finish_reason "abort"; nothing happens to those that are finished."""
        with self._lock:
            for choice in request.choices:
                self._end(choice, "abort")
            self._lock.notify_all()

    def reset(self) -> None:
        """Forgets the prefix cache; running requests go on."""
        with self._lock:
            self._scheduler.pool.reset()
            for sequence in self._scheduler.running:
                sequence.digests = []

    def snapshot(self, request: Request, path: str | Path) -> None:
        """Writes a request, its text, its parameters and its KV pages, as an orbax checkpoint into the directory `path`,
        which must not exist. The request goes on."""
        with self._driving:  # nothing is started meanwhile; what runs already writes behind the text that is known
            with self._lock:
                sequence, pool = request._sequence, self._scheduler.pool
                facts = {
                    "params": dataclasses.asdict(request.params),
                    "seed": request._seed,
                    "adapter": request.adapter,
                    "prompt": request.prompt_token_ids,
                    "output": list(request.token_ids),
                    "logprobs": request.logprobs,
                    "prompt_logprobs": request.prompt_logprobs,
                    "finish_reason": request.finish_reason,
                }
                pages = sequence.pages[: sequence.written // pool.page_size] if sequence.state == "running" else []
                if not pages:
                    pages, _ = pool.find_prefix([*request.prompt_token_ids, *request.token_ids], sequence.adapter)
                pages = [] if -1 in pages else pages
                for page in pages:
                    pool.share(page)
            try:
                content = self._device.read_pages(pages) if pages else None
            finally:
                with self._lock:
                    for page in reversed(pages):
                        pool.give_back(page)
        snapshot.save(Path(path), self.identity, facts, content)

    def restore(self, path: str | Path) -> Request:
        """The request that `snapshot` wrote, ready to go on with the same tokens as if nothing had been: its full pages are
        put into the prefix cache, where it finds them. ModelFileError for a directory that is none, ValueError for one of
        another model."""
        facts, content = snapshot.load(Path(path), self.identity, self._device.kv_dtype)
        params = SamplingParams(**{**facts["params"], "n": 1})
        text = [*facts["prompt"], *facts["output"]]
        limit = self._check(len(facts["prompt"]), params)
        place = self.model.place_of(facts["adapter"])
        if self.config.prefix_cache and content is not None:
            self._fill_prefix_cache(text, content, place)
        with self._lock:
            sequence = Sequence(self._take_number(), text, len(facts["prompt"]), limit, adapter=place)
            request = Request(self, sequence, params, facts["seed"], self._extras(params), facts["adapter"])
            sequence.owner, sequence.cacheable = request, params.prompt_logprobs is None
            request.prompt_logprobs = _pairs(facts["prompt_logprobs"])
            request._watcher.take(facts["output"], _pairs(facts["logprobs"]) or [])
            if facts["finish_reason"] is None:
                self._scheduler.add(sequence)
                self._lock.notify_all()
            else:
                request._watcher.flush()
                request._watcher.finish_reason, sequence.state = facts["finish_reason"], "finished"
        return request

    # Driving

    def step(self) -> bool:
        """Starts the next dispatch and takes in the results of the one before; whether anything is left to do."""
        with self._driving:
            try:
                self._step()
            except BaseException:  # an interrupt: what was on its way is asked for again
                with self._lock:
                    self._start_over()
                raise
            with self._lock:
                return self._flight is not None or bool(self._scheduler.waiting or self._scheduler.running)

    def run(self) -> None:
        """Drives until every request is finished."""
        while self.step():
            pass

    def warm_up(self, progress: Callable[[int, int, str], None] | None = None) -> None:
        """Compiles whatever may be needed; then nothing compiles while serving. progress: called with (programs ready, in
        all, what comes next)."""
        programs = self._device.programs()
        for number, (name, pages) in enumerate(programs):
            if progress is not None:
                progress(number, len(programs), str(name))
            self._device.compile(name, pages)
        if progress is not None:
            progress(len(programs), len(programs), "ready")

    def __enter__(self) -> Engine:
        self.serving = True
        for work in (self._warm_up_quietly, self._serve):
            thread = threading.Thread(target=work, name=f"ferrum_jax engine {work.__name__.strip('_')}", daemon=True)
            thread.start()
            self._threads.append(thread)
        return self

    def __exit__(self, *_: object) -> None:
        """Stops the background loop. Requests that are not finished end with "abort"."""
        with self._lock:
            self.serving = False
            self._lock.notify_all()
        for thread in self._threads:
            thread.join()
        self._threads.clear()
        with self._lock:
            for sequence in [*self._scheduler.waiting, *self._scheduler.running]:
                self._end(sequence.owner, "abort")
            self._lock.notify_all()
        self.run()

    # Facts

    def buckets(self) -> list[str]:
        """The shapes that are compiled, in words."""
        return [str(bucket) for bucket in self._device.buckets()]

    def metrics(self) -> dict[str, float]:
        """Counts since the engine was made, and how things stand.

        compiles; steps of the model (each of a dispatch of N counts); prompt_tokens that were computed; generated_tokens;
        prefix_lookups, prefix_hit_pages, prefix_saved_tokens, prefix_evictions; preemptions; pages_free, pages_cached (what
        is left is held); requests_waiting, requests_running; host_seconds: processor time of the driving threads, deciding,
        launching and taking in; device_seconds: wall time from a launch, or the results before, to its results.
        """
        with self._lock:
            scheduler, pool = self._scheduler, self._scheduler.pool
            return {
                "compiles": self._device.compiles,
                **self._counts,
                "prefix_lookups": scheduler.lookups,
                "prefix_hit_pages": scheduler.hit_pages,
                "prefix_saved_tokens": scheduler.saved_tokens,
                "prefix_evictions": pool.evictions,
                "preemptions": scheduler.preemptions,
                "pages_free": pool.free,
                "pages_cached": pool.cached,
                "requests_waiting": len(scheduler.waiting),
                "requests_running": len(scheduler.running),
                **self._seconds,
            }

    # Inside: requests

    def _submit(
        self, tokens: list[int], params: SamplingParams, adapter: str | None, origin: Sequence | None = None
    ) -> Request:
        place = self.model.place_of(adapter)
        limit = self._check(len(tokens), params)
        extras = self._extras(params)
        seed = secrets.randbits(32) if params.seed is None else params.seed
        with self._lock:
            choices: list[Request] = []
            for i in range(params.n):
                sequence = Sequence(self._take_number(), list(tokens), len(tokens), limit, origin=origin, adapter=place)
                sequence.owner = request = Request(self, sequence, params, (seed + i) % 2**32, extras, adapter)
                sequence.cacheable = params.prompt_logprobs is None or i > 0
                if i > 0:
                    request.prompt_logprobs = choices[0].prompt_logprobs  # computed once
                origin = origin or sequence
                choices.append(request)
                self._scheduler.add(sequence)
            choices[0].choices = choices
            self._lock.notify_all()
        return choices[0]

    def _take_number(self) -> int:
        self._number += 1
        return self._number - 1

    def _fork(self, request: Request, params: SamplingParams) -> Request:
        with self._lock:
            sequence = request._sequence
            tokens = [*request.prompt_token_ids, *request.token_ids]
        return self._submit(tokens, params, request.adapter, sequence)

    def _check(self, length: int, params: SamplingParams) -> int:
        """Tokens of the request in all at most, or a ValueError that says why it cannot be."""
        if length >= self.model.max_seq_len:
            raise ValueError(f"the prompt has {length} tokens and leaves no room in a context of {self.model.max_seq_len}")
        limit = min(length + params.max_tokens, self.model.max_seq_len)
        needed = self._scheduler.pages_needed(limit)
        if needed > self.num_pages:
            raise ValueError(
                f"a prompt of {length} tokens with max_tokens={params.max_tokens} needs {needed} pages of "
                f"{self.config.page_size} tokens; the engine has {self.num_pages}"
            )
        return limit

    def _extras(self, params: SamplingParams) -> Extras:
        """Biases and banned words as token ids; a word of one token is a bias of -inf."""
        vocab, tokenizer = self.model.config.vocab_size, self.model.tokenizer
        bias = dict(params.logit_bias or ())
        wrong = next((id for id in bias if id >= vocab), None)
        if wrong is not None:
            raise ValueError(f"SamplingParams.logit_bias: token id {wrong} is out of range; the vocabulary has {vocab} ids")
        banned: list[list[int]] = []
        for word in params.bad_words:
            for text in dict.fromkeys((word.lstrip() or word, " " + word.lstrip())):
                ids = tokenizer.encode(text, add_special=False, parse_special=False)
                if len(ids) == 1:
                    bias[ids[0]] = float("-inf")
                elif ids not in banned:
                    banned.append(ids)
        if len(bias) > MAX_BIAS or len(banned) > steps.BAD_WORDS or any(len(w) > steps.BAD_WORD_TOKENS for w in banned):
            raise ValueError(
                f"SamplingParams.bad_words: at most {steps.BAD_WORDS} spellings of several tokens, each of at most "
                f"{steps.BAD_WORD_TOKENS}, and {MAX_BIAS} single tokens together with logit_bias"
            )
        return Extras(sorted(bias.items()), banned)

    def _end(self, request: Request, reason: str, error: str = "") -> None:
        """Ends a request that is not finished. The lock is held; whoever waits is told by the caller."""
        if request.state == "finished":
            return
        rest, request.error = request._watcher.flush(), error
        if reason in ("abort", "error"):
            request._watcher.finish_reason = reason
        self._scheduler.finish(request._sequence)
        self._deliver(request, Output(rest, []) if rest else None)

    def _deliver(self, request: Request, output: Output | None) -> None:
        if output is not None:
            request._outputs.append(output)
        for wake in request._wake:
            with contextlib.suppress(RuntimeError):  # an event loop that is closed: nobody is left to be woken
                wake()
        request._wake.clear()

    def _fill_prefix_cache(self, text: list[int], content: KVCache, adapter: int) -> None:
        """Puts the pages of a text that are not cached yet into free ones."""
        pool = self._scheduler.pool
        size = pool.page_size
        with self._driving:
            taken: list[tuple[int, int]] = []
            with self._lock:
                parent = pool.root(adapter)
                for number in range(content.num_pages):
                    tokens = text[number * size : (number + 1) * size]
                    found = pool.find(parent, tokens)
                    if found is None:
                        if not pool.free:
                            break
                        taken.append((number, pool.take()))
                        parent = pool.register(taken[-1][1], parent, tokens)
                    else:
                        parent = found[1]
            if taken:
                numbers = np.asarray([number for number, _ in taken])
                part = jax.tree.map(lambda array: array[:, numbers], content)
                self._device.write_pages([page for _, page in taken], part)
            with self._lock:
                for _, page in reversed(taken):
                    pool.give_back(page)

    # Inside: waiting

    def _poll(self, request: Request, wake: Callable[[], object]) -> tuple[Output | None, bool]:
        """The next output if there is one, and whether the request is finished; else `wake` is called when that changes."""
        with self._lock:
            if request._outputs:
                return request._outputs.popleft(), False
            if request.state != "finished":
                request._wake.append(wake)
            return None, request.state == "finished"

    def _unpoll(self, request: Request, wake: Callable[[], object]) -> None:
        """Takes back a `wake` that was not called: its reader is gone."""
        with self._lock:
            if wake in request._wake:
                request._wake.remove(wake)

    def _next_output(self, request: Request) -> Output | None:
        """The next output, None after the last."""
        self._drive(lambda: bool(request._outputs) or request.state == "finished")
        with self._lock:
            return request._outputs.popleft() if request._outputs else None

    def _wait(self, request: Request) -> None:
        self._drive(lambda: request.state == "finished")

    def _drive(self, reached: Callable[[], bool]) -> None:
        """Waits for a condition, driving the engine where nobody else does."""
        while True:
            with self._lock:
                while self.serving and not reached():
                    self._lock.wait()
                if reached():
                    return
            self.step()

    def _serve(self) -> None:
        while True:
            with self._lock:
                while self.serving and not (self._flight or self._scheduler.waiting or self._scheduler.running):
                    self._lock.wait()
                if not self.serving:
                    return
            try:
                self.step()
            except Exception as error:  # nothing can be run any more, a new cache does not fit: nobody may wait for ever
                with self._lock:
                    for sequence in [*self._scheduler.waiting, *self._scheduler.running]:
                        self._end(sequence.owner, "error", f"{type(error).__name__}: {error}")
                    self._lock.notify_all()

    def _warm_up_quietly(self) -> None:
        """Compiles in the background, in the order in which programs are met; the log says how far it is."""

        def progress(ready: int, programs: int, following: str) -> None:
            _LOG.info("%d of %d programs, now: %s", ready, programs, following)
            if not self.serving:
                raise _Stopped

        _LOG.info("%d pages of %d tokens; shapes: %s", self.num_pages, self.config.page_size, ", ".join(self.buckets()))
        try:
            self.warm_up(progress)
        except _Stopped:
            return
        except Exception:  # whoever needs the program meets the error
            _LOG.exception("compiling in the background failed")

    # Inside: a dispatch

    def _step(self) -> None:
        begin = time.thread_time()  # of this thread alone: neither waiting for the device nor for a core is the host's work
        with self._lock:
            dispatch = self._scheduler.next(self._steps_at_once)
        before, flight = self._flight, None
        if dispatch is not None:
            try:
                flight = self._launch(dispatch)
            except Exception as error:  # whatever it is, it must not take the engine along
                return self._fail(error, dispatch)
        if before is not None:
            try:
                results = self._device.fetch(before.results, before.scored, before.scored_prompt)
            except Exception as error:
                return self._fail(error, before.dispatch)
            self._take_in(before, results)
        self._flight = flight
        with self._lock:
            self._seconds["host_seconds"] += time.thread_time() - begin

    def _launch(self, dispatch: Dispatch) -> _Flight:
        for sequence, slot in dispatch.admitted:
            request = sequence.owner
            self._device.admit(sequence, slot, request.params, request._seed, request._extras)
        self._device.prepare(dispatch)  # compiling is not the device's time
        begin = time.perf_counter()
        results = self._device.launch(dispatch)
        scored = any(row.sequence.owner.logprobs is not None for row in dispatch.rows)
        prompts = any(row.start >= 0 and row.sequence.owner.prompt_logprobs is not None for row in dispatch.rows)
        return _Flight(dispatch, results, scored, prompts, begin)

    def _take_in(self, flight: _Flight, results: steps.Results) -> None:
        """Gives every row what it has got."""
        begin = time.perf_counter()
        dispatch = flight.dispatch
        tokens = results.tokens.tolist()
        with self._lock:
            taken = begin - max(flight.begin, self._busy_until)
            self._busy_until = begin
            self._seconds["device_seconds"] += taken
            made = read = place = 0
            for i, row in enumerate(dispatch.rows):
                if row.valid:
                    if results.prompt_ids is not None:
                        self._take_prompt_logprobs(row, place, results)
                    made += self._take_row(row, i, tokens[i], results, dispatch)
                place += row.length
                read += row.length if row.start >= 0 else 0
            self._lock.notify_all()
            self._counts["prompt_tokens"] += read
            self._counts["generated_tokens"] += made
            self.model.count("prefill", read, 0.0 if dispatch.steps else taken)
            self.model.count("decode", made, taken if dispatch.steps else 0.0)
            self._counts["steps"] += max(1, dispatch.steps)
            if dispatch.steps and self.config.steps_per_dispatch is None:
                aim = _DISPATCH_SECONDS / (taken / dispatch.steps) if taken > 0 else self.config.steps
                self._steps_at_once = int(min(max(aim, 1), self.config.steps))

    def _take_row(self, row: Row, i: int, tokens: list[int], results: steps.Results, dispatch: Dispatch) -> int:
        """Takes in the tokens of one row; how many there were."""
        request: Request = row.sequence.owner
        made = [token for token in tokens if token >= 0]
        self._scheduler.received(row, made, dispatch)
        if made:
            logprobs = []
            if request.params.logprobs is not None:
                k = request.params.logprobs + 1
                logprobs = listed(results.ids[i, :, :k], results.logprobs[i, :, :k], len(made))
            output = Output(*request._watcher.take(made, logprobs))
            self._deliver(request, output if output.text or output.token_ids else None)
        if steps.NOT_FINITE in tokens or request._has_nan:
            self._end(request, "error", "the model's logits are not finite")
        elif request._watcher.finish_reason is not None:
            self._end(request, "stop")
        elif len(row.sequence.tokens) >= row.sequence.limit:
            self._end(request, "length")
        return len(made)

    def _take_prompt_logprobs(self, row: Row, place: int, results: steps.Results) -> None:
        request: Request = row.sequence.owner
        found, best = request.prompt_logprobs, request.params.prompt_logprobs
        if found is None or best is None or row.start < 0:
            return
        for i in range(row.length):
            position = row.start + i + 1
            if position == len(found) and position < row.sequence.prompt_length:
                ids, values = (array[place + i, : best + 1].tolist() for array in (results.prompt_ids, results.prompt_logprobs))
                request._has_nan |= any(map(math.isnan, values))
                found.append(list(zip(ids, values, strict=True)))

    def _fail(self, error: Exception, dispatch: Dispatch) -> None:
        """Ends the requests of a dispatch that could not be run; all others are computed again in a new cache."""
        with self._lock:
            for row in dispatch.rows:
                if row.valid:
                    row.sequence.owner._cause = error
                    self._end(row.sequence.owner, "error", f"{type(error).__name__}: {error}")
            self._start_over()
            self._lock.notify_all()

    def _start_over(self) -> None:
        """Gives up what is on its way and on the device; running requests are computed again. The lock is held."""
        self._flight = None
        for sequence in list(self._scheduler.running):
            self._scheduler.preempt(sequence)
        self._scheduler.pool.reset()
        self._device.reset()


def _pairs(found: list | None) -> list | None:
    """Log-probabilities with tuples again where JSON has lists."""
    return None if found is None else [None if row is None else [tuple(pair) for pair in row] for row in found]
