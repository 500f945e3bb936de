"""The operations that change an engine: starting dispatches, processing their results, ending requests, filling the prefix
cache.

All of them run in the engine's threads (worker.py), which interrupts do not reach. One of these threads drives the device.
Another may do short work on the host's state at the same time, so both hold the lock while they touch that state, and never
while they wait for the device or compile a program.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import threading
import time
from typing import Any, NamedTuple

import numpy as np

from ferrum_jax.engine import steps
from ferrum_jax.engine.config import Bucket, EngineConfig
from ferrum_jax.engine.executor import Executor
from ferrum_jax.engine.request import Output, Request
from ferrum_jax.engine.scheduler import Scheduler
from ferrum_jax.engine.sequence import Dispatch, Row
from ferrum_jax.engine.watcher import listed
from ferrum_jax.engine.worker import Job, Worker
from ferrum_jax.prompts import Prompts
from ferrum_jax.state import DecodeState, PageKind, kind_names, read_places
from ferrum_jax.structured.grammar import Follower

_LOG = logging.getLogger("ferrum_jax.engine.engine")


_LOSS = 0.05  # of a decode step, that the others may wait for grammars


class _Flight(NamedTuple):
    """A started dispatch."""

    dispatch: Dispatch
    results: Any
    scored: bool
    scored_prompt: bool
    begin: float
    shape: Bucket | None


class Core:
    """The state of an engine. `_driver` drives the device; `_lock` guards all attributes after it."""

    model: Prompts
    config: EngineConfig
    num_pages: int
    serving: bool
    warmed_up: tuple[int, int]
    failure: str
    _executor: Executor
    _kinds: tuple[PageKind, ...]
    _driver: Worker
    _compiler: Worker
    _lock: threading.Lock
    _scheduler: Scheduler
    _flight: _Flight | None
    _looping: bool
    _stale: bool = False
    _kept: list[tuple[int, int, int]]
    _steps_at_once: int
    _busy_until: float
    _waited: float
    _counts: dict[str, int]
    _seconds: dict[str, float]

    # Requests; the lock is held

    def _add(self, requests: list[Request]) -> None:
        for request in requests:
            self._scheduler.add(request._sequence)
        self._keep_serving()

    def _end(self, request: Request, reason: str, error: str = "") -> None:
        """Ends a request, unless it is finished."""
        if request.state == "finished":
            return
        try:
            rest = request._watcher.flush()
        except Exception as fault:
            rest, reason, error = "", "error", error or _said(fault)
        request.error = error
        if reason in ("abort", "error"):
            request._watcher.finish_reason = reason
        if rest:
            request._outputs.append(Output(rest, []))
        self._scheduler.finish(request._sequence)
        request._wake_readers()

    def _end_choices(self, request: Request) -> None:
        for choice in request.choices:
            self._end(choice, "abort")

    def _end_all(self, reason: str, error: str = "") -> None:
        for sequence in [*self._scheduler.waiting, *self._scheduler.running]:
            self._end(sequence.owner, reason, error)

    def _forget(self) -> None:
        self._scheduler.ledger.forget()
        for sequence in self._scheduler.running:
            sequence.held.digests, sequence.held.settles_at = [], 0

    def _count_anew(self) -> None:
        """Empties the prefix cache and sets all counts to 0."""
        self._forget()
        self._counts = dict.fromkeys(("steps", "prompt_tokens", "generated_tokens"), 0)
        self._seconds = dict.fromkeys(("host_seconds", "device_seconds"), 0.0)
        self._scheduler.forget_counts()

    def _start_over(self) -> None:
        """Drops the results in flight and the state on the device; running requests are computed again."""
        self._flight, self._stale, self._kept = None, True, []
        self._scheduler.start_over()
        self._executor.reset()
        self._stale = False

    def _release(self) -> None:
        self._flight, self._kept = None, []
        self._executor.release()

    def _measure(self) -> dict[str, float]:
        scheduler, ledger = self._scheduler, self._scheduler.ledger
        return {
            "compiles": self._executor.compiles,
            **self._counts,
            "prefix_lookups": scheduler.lookups,
            "prefix_hit_pages": scheduler.hit_pages,
            "prefix_saved_tokens": scheduler.saved_tokens,
            "prefix_evictions": ledger.evictions,
            "preemptions": scheduler.preemptions,
            "pages_free": ledger.free,
            "pages_cached": ledger.cached,
            **self._measure_pools(),
            "requests_waiting": len(scheduler.waiting),
            "requests_running": len(scheduler.running),
            **self._seconds,
        }

    def _measure_pools(self) -> dict[str, float]:
        """The metrics of each pool, if there are several, and of checkpoints, if there are any."""
        ledger, found = self._scheduler.ledger, dict[str, float]()
        pools, checkpoints = ledger.pools, ledger.checkpoints
        if checkpoints is not None:
            found = {"checkpoints_free": checkpoints.free, "checkpoints_cached": checkpoints.cached}
            found |= {"state_checkpoints": ledger.made, "state_hits": ledger.hits, "state_evictions": checkpoints.evictions}
        for name, pool in zip(kind_names(self._kinds), pools, strict=True) if len(pools) > 1 else ():
            found |= {f"pages_free_{name}": pool.free, f"pages_cached_{name}": pool.cached}
        return found

    # Serving in the background

    def _open(self) -> None:
        self.serving = self._executor.substitutes = True
        self._keep_serving()
        self._compiler.post(Job(self._warm_up_quietly))

    def _keep_serving(self) -> None:
        """Posts the next step of the background loop, if there is anything to do. The lock is held."""
        if self.serving and self._busy() and not self._looping:
            self._looping = True
            self._driver.post(Job(self._serve))

    def _serve(self) -> None:
        try:
            if self.serving:
                self._advance()
                self.failure = ""
        except BaseException as error:  # nothing can run any more because a new cache does not fit: no reader may wait forever
            with self._lock:
                self.failure = _said(error)
                self._end_all("error", self.failure)
        with self._lock:
            self._looping = False
            self._keep_serving()

    def _halt(self) -> None:
        """Ends the loop; waiting readers drive the engine from now on. The lock is held."""
        self.serving = False
        for sequence in [*self._scheduler.waiting, *self._scheduler.running]:
            sequence.owner._wake_readers()

    def _close(self) -> None:
        with self._lock:
            self._end_all("abort")
            self._halt()
        while self._advance():
            pass

    def _warm_up_quietly(self, number: int = 0) -> None:
        """Compiles one program after the other, in the order in which they are needed, and logs the progress."""
        if not number:
            shapes = ", ".join(map(str, self._executor.buckets()))
            _LOG.info("%d pages of %d tokens; shapes: %s", self.num_pages, self.config.page_size, shapes)
        programs = self._executor.programs()
        self.warmed_up = number, len(programs)
        following, pages = programs[number] if number < len(programs) else ("ready", None)
        _LOG.info("%d of %d programs, now: %s", number, len(programs), following)
        if not self.serving or number == len(programs):
            self._executor.substitutes = False  # all are there, or serving has ended and with it their compilation
            return
        try:
            self._executor.compile(following, pages)
        except Exception:  # the request that needs the program gets the error
            _LOG.exception("compiling in the background failed")
        else:
            self._compiler.post(Job(lambda: self._warm_up_quietly(number + 1)))

    # Driving; the lock is not held

    def _busy(self) -> bool:
        return self._flight is not None or bool(self._scheduler.waiting or self._scheduler.running)

    def _advance(self) -> bool:
        """Does a step and returns whether anything is left to do."""
        try:
            self._renew()
            self._step()
        except BaseException:  # the results in flight are computed again
            with self._lock:
                self._start_over()
            raise
        with self._lock:
            return self._busy()

    def _renew(self) -> None:
        """Starts over, if that has failed before: a cache that did not fit may fit now."""
        if self._stale:
            with self._lock:
                self._start_over()

    def _step(self) -> None:
        begin = time.thread_time()  # of this thread only: waiting for the device or for a core is not the host's work
        with self._lock:
            try:
                dispatch = self._scheduler.next(self._steps_at_once, self._turns())
            except Exception as error:  # it ends only the request that caused it
                if self._scheduler.current is None:
                    raise
                return self._fail({self._scheduler.current.owner: error})
        before, self._flight = self._flight, None
        results = None
        if before is not None and dispatch is not None:
            if not self._executor.ready(dispatch):
                if not self._land(before):  # finished tokens do not wait for the compiler
                    return
                before = None
            elif dispatch.waits and (results := self._collect(before)) is None:
                return
        arrived = time.perf_counter()
        if dispatch is not None:  # even if its rows were aborted meanwhile, because the pages it writes are registered
            try:
                self._flight = self._launch(dispatch)
            except Exception as error:  # whatever it is, the engine must survive it
                return self._fail_dispatch(error, dispatch)
        if results is not None:
            self._waited += 0.2 * (time.perf_counter() - arrived - self._waited)
        if (before is not None and not self._land(before, results)) or not self._keep():
            return
        with self._lock:
            self._seconds["host_seconds"] += time.thread_time() - begin

    def _turns(self) -> int:
        """The steps that others make while grammars have to know the newest tokens; 0: all wait for that, because it takes
        little of a step."""
        step = self.model.step_seconds
        return 0 if not step or self._waited <= _LOSS * step else math.ceil(self._waited / step)

    def _collect(self, flight: _Flight) -> steps.Results | None:
        """Waits for the results of a dispatch and shows them to the grammars; None if the dispatch failed."""
        try:
            results = self._executor.fetch(flight.results, flight.scored, flight.scored_prompt)
            for i, row in enumerate(flight.dispatch.rows):
                if row.sequence.follower is not None and row.valid:
                    row.sequence.follower.follow(row.sequence.tokens, _made(row, results.tokens[i].tolist()))
        except Exception as error:
            self._fail_dispatch(error, flight.dispatch)
            return None
        return results

    def _land(self, flight: _Flight, results: steps.Results | None = None) -> bool:
        """Processes the results of a dispatch, for which it waits if they are not given. Returns whether that succeeded."""
        results = self._collect(flight) if results is None else results
        if results is not None:
            self._take_in(flight, results)
        return results is not None

    def _keep(self) -> bool:
        """Makes the copies of the states of requests that have ended; whether that went well. Not before a dispatch that was
        chosen earlier is launched, because it may copy what is in their places."""
        copies, self._kept = {target: (part, source, target) for part, source, target in self._kept}, []
        try:
            if copies:  # to each place the newest
                self._executor.copy([*copies.values()])
        except Exception:
            _LOG.exception("the states of requests that have ended could not be kept")
            with self._lock:
                self._start_over()
            return False
        return True

    def _launch(self, dispatch: Dispatch) -> _Flight:
        now = time.perf_counter()
        for sequence, slot in dispatch.admitted:
            request = sequence.owner
            request.times.admitted = request.times.admitted or now
            self._executor.admit(sequence, slot, request.params, request._seed, request._extras)
        dispatch = self._force(dispatch)
        self._executor.prepare(dispatch)  # compiling does not count as the device's time
        self._mask(dispatch)
        begin = time.perf_counter()
        results = self._executor.launch(dispatch)
        scored = any(row.sequence.owner.logprobs is not None for row in dispatch.rows)
        prompts = any(row.start >= 0 and row.sequence.owner.prompt_logprobs is not None for row in dispatch.rows)
        return _Flight(dispatch, results, scored, prompts, begin, self._executor.shape)

    def _force(self, dispatch: Dispatch) -> Dispatch:
        """A dispatch that also reads the tokens that grammars force next, if that is faster than choosing one after the other,
        and no program has to be compiled for it. No text and no log-probability depends on it: rows with log-probabilities
        choose each token."""
        rows, forced = dispatch.rows, dict[int, list[int]]()
        room = self.config.longest - (dispatch.tokens or len(rows))
        for i, follower in _followers(dispatch):
            if rows[i].start >= 0:
                follower.follow(rows[i].sequence.tokens)  # not further, if results were lost
            most = min(room, steps.MOST_FORCED, rows[i].sequence.limit - 1 - follower.end)
            scored = rows[i].sequence.owner.params.logprobs is not None
            if not scored and (tokens := follower.forced(most, self.model.tokenizer.eos_ids)):
                forced[i], room = tokens, room - len(tokens)
        if not forced or not self._scheduler.pace.gains(dispatch, sum(map(len, forced.values()))):
            return dispatch
        with self._lock:
            return self._scheduler.force(dispatch, forced, self._executor.ready)

    def _mask(self, dispatch: Dispatch) -> None:
        """Sends what the grammars force and admit next. A row without it stays as it is."""
        found = _followers(dispatch)
        if found:
            masks = self.model.grammars.masks([follower for _, follower in found], self.model.config.vocab_size)
            sent = [i for i, (_, follower) in enumerate(found) if not follower.error]
            rows = [dispatch.rows[found[i][0]] for i in sent]
            self._executor.mask([row.slot for row in rows], [row.forced for row in rows], masks[sent])

    def _take_in(self, flight: _Flight, results: steps.Results) -> None:
        """Gives every row its results."""
        begin = time.perf_counter()
        dispatch = flight.dispatch
        tokens = results.tokens.tolist()
        with self._lock:
            taken = begin - max(flight.begin, self._busy_until)
            self._busy_until = begin
            self._seconds["device_seconds"] += taken
            made = read = place = 0
            errors: dict[Request, Exception] = {}
            for i, row in enumerate(dispatch.rows):
                if row.valid:
                    try:
                        if results.prompt_ids is not None:
                            self._take_prompt_logprobs(row, place, results)
                        made += self._take_row(row, i, tokens[i], results, dispatch)
                    except Exception as error:  # affects only this row
                        errors[row.sequence.owner] = error
                place += row.length
                read += row.length - len(row.forced) if row.start >= 0 else 0
            self._counts["prompt_tokens"] += read
            self._counts["generated_tokens"] += made
            self.model.count("prefill", read, taken if read else 0.0)
            self.model.count("decode", made, 0.0 if read else taken)
            self._counts["steps"] += max(1, dispatch.steps)
            if not dispatch.steps or any(row[dispatch.steps - 1] >= 0 for row in tokens):  # none of its steps was left out
                self._scheduler.pace.took(dispatch, taken, flight.shape)
            if dispatch.steps and taken > 0:
                self.model.step_seconds = taken / dispatch.steps
                self._choose_steps()
            if errors:
                self._fail(errors)

    def _choose_steps(self) -> None:
        """The decode steps per dispatch: as many as configured, or as fit into its time, according to the last timed steps."""
        aim = self.config.dispatch_seconds / self.model.step_seconds if self.model.step_seconds else 1
        self._steps_at_once = self.config.steps_per_dispatch or int(min(max(aim, 1), self.config.steps))

    def _take_row(self, row: Row, i: int, tokens: list[int], results: steps.Results, dispatch: Dispatch) -> int:
        """Processes the tokens of one row and returns their number."""
        request: Request = row.sequence.owner
        made = _made(row, tokens)
        self._scheduler.received(row, made, dispatch)
        if made:
            logprobs = []
            if request.params.logprobs is not None:
                k = request.params.logprobs + 1
                logprobs = listed(results.ids[i, :, :k], results.logprobs[i, :, :k], len(made))
            output = Output(*request._watcher.take(made, logprobs))
            request.times.took_tokens(self._busy_until)
            if output.text or output.token_ids:
                request._outputs.append(output)
                request._wake_readers()
        sequence, watcher = row.sequence, request._watcher
        full = len(sequence.tokens) >= sequence.limit
        if steps.NOT_FINITE in tokens or request._has_nan:
            self._end(request, "error", "the model's logits are not finite")
        elif sequence.follower is not None and sequence.follower.error and watcher.finish_reason is None:
            self._end(request, "error", sequence.follower.error)
        elif full or watcher.finish_reason is not None:
            if full or watcher.at_end_token:  # else the device goes on
                self._kept += self._scheduler.keep(sequence)
            self._end(request, "length" if watcher.finish_reason is None else "stop")
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

    def _fail(self, errors: dict[Request, Exception]) -> None:
        """Ends requests that caused an error; all others are computed again in a new cache. The lock is held."""
        for request, error in errors.items():
            request._cause = error
            self._end(request, "error", _said(error))
        self._start_over()

    def _fail_dispatch(self, error: Exception, dispatch: Dispatch) -> None:
        """The same for the requests of a dispatch that failed."""
        with self._lock:
            self._fail({row.sequence.owner: error for row in dispatch.rows if row.valid})

    # Snapshots

    def _read(self, request: Request) -> tuple[dict[str, Any], DecodeState | None]:
        """The contents of a snapshot: facts for JSON, and the full pages. Dispatches in flight only write after the known
        text."""
        with self._lock:
            sequence, ledger = request._sequence, self._scheduler.ledger
            facts = {
                "params": dataclasses.asdict(request.params),
                "seed": request._seed,
                "adapter": request.adapter,
                "prompt": request.prompt_token_ids,
                "begun": request._begun,
                "output": list(request.token_ids),
                "logprobs": request.logprobs and list(request.logprobs),
                "prompt_logprobs": request.prompt_logprobs and list(request.prompt_logprobs),
                "finish_reason": request.finish_reason,
            }
            found = ledger.written(sequence.held, sequence.written) if sequence.state == "running" else ledger.nothing()
            if not found.full:
                found = ledger.find([*request.prompt_token_ids, *request.token_ids], sequence.adapter, inside=False)
            facts["full_pages"] = found.full
            ledger.share(found)
        try:
            return facts, self._executor.read(ledger.places(found)) if found.full else None
        finally:
            with self._lock:
                ledger.release(found)

    def _fill_prefix_cache(self, text: list[int], full: int, content: DecodeState, adapter: int) -> None:
        """Writes those of the first `full` pages of a text that are not cached yet to free places, and then registers them."""
        self._renew()
        ledger = self._scheduler.ledger
        with self._lock:
            reserved = ledger.reserve(text, full, content.counts, adapter)
        if not any(reserved):
            return
        try:
            part = read_places(content, [np.asarray([place for _, place, _ in pages], np.int32) for pages in reserved])
            self._executor.write([[page for page, *_ in pages] for pages in reserved], part)
        except BaseException:  # the state was donated
            with self._lock:
                self._start_over()
            raise
        with self._lock:
            ledger.publish(reserved)


def _followers(dispatch: Dispatch) -> list[tuple[int, Follower]]:
    """The indices of the rows whose next token a grammar admits, and where these are in their grammars."""
    return [
        (i, row.sequence.follower)
        for i, row in enumerate(dispatch.rows)
        if row.samples and row.valid and row.sequence.follower is not None
    ]


def _made(row: Row, tokens: list[int]) -> list[int]:
    """The new tokens of a row, given its results."""
    return [*row.forced, *(token for token in tokens if token >= 0)]


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"
