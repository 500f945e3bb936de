"""Real signals at random moments: whatever they interrupt, every request has the same output as without them, every page is
accounted for, and the engine continues.

ENGINE_STORM=60 in the environment storms for 60 seconds with a new random seed.
"""

import asyncio
import contextlib
import dataclasses
import gc
import os
import random
import signal
import subprocess
import sys
import textwrap
import threading
import time
from functools import partial

import pytest

import ferrum_jax as fj
from ferrum_jax.engine import EngineConfig, worker
from ferrum_jax.engine.worker import Worker
from support import environment
from support.engine_stand_in import ADAPTERS, Model, check, expected, use
from support.tiny_gguf import write_tiny_llama

SECONDS = float(os.environ.get("ENGINE_STORM", "0"))
SIGNALS = (signal.SIGINT, signal.SIGUSR1)
SMALL = EngineConfig(page_size=3, num_pages=16, max_seqs=3, token_budget=6, steps_per_dispatch=2)


class Struck(BaseException):
    """The exception of a user's own handler."""


@contextlib.contextmanager
def signals(act, dice):
    """Sends signals to this thread all the time; each raises some exception if it interrupts `act`."""
    struck, over, main = [], threading.Event(), threading.get_ident()

    def strike(number, frame):
        while frame is not None and frame.f_code is not act.__code__:
            frame = frame.f_back
        if frame is not None:
            struck.append(number)
            raise random.choice([KeyboardInterrupt, Struck, TimeoutError, ValueError])("a signal")

    def send():
        while not over.is_set():
            time.sleep(dice.choice([2e-5, 2e-4, 2e-3, 1e-2]) * dice.random())
            for _ in range(dice.choice([1, 1, 1, 2, 5])):  # several in a row
                signal.pthread_kill(main, dice.choice(SIGNALS))

    before, hook = {number: signal.signal(number, strike) for number in SIGNALS}, sys.unraisablehook
    sys.unraisablehook = id  # a signal may interrupt a finalizer, and the next one pytest's handling of that
    sender = threading.Thread(target=send)
    sender.start()
    try:
        yield struck
    finally:
        over.set()
        sender.join()
        for number, handler in before.items():
            signal.signal(number, handler)
        sys.unraisablehook = hook


def storm(act, seconds, seed):
    """Calls `act` again and again in a storm of signals; returns how many interrupted it."""
    end = time.monotonic() + (SECONDS or seconds)
    with signals(act, random.Random((SECONDS and time.time()) or seed)) as struck:
        while time.monotonic() < end:
            with contextlib.suppress(KeyboardInterrupt, Struck, ValueError, OSError, fj.ModelFileError):
                act()
    return len(struck)


class Life:
    """Everything that can be done to an engine, at random. `requests`: with prompt, parameters and seed."""

    def __init__(self, engine, dice, folder, prompt_of, params_of):
        self.engine, self.dice, self.folder = engine, dice, folder
        self.prompt_of, self.params_of = prompt_of, params_of
        self.requests, self.read, self.restored = [], {}, {}

    def act(self):
        engine, dice = self.engine, self.dice
        request = dice.choice(self.requests[-6:])[0] if self.requests else None
        moves = {"submit": 20, "step": 20, "metrics": 2}
        if request is not None:
            moves |= {"fork": 6, "abort": 3, "reset": 1, "read": 12, "result": 12, "run": 2, "serve": 3}
            moves |= {"snapshot": 1, "restore": 2}
        (move,) = dice.choices(list(moves), list(moves.values()))
        path = self.folder / str(dice.randrange(8))
        if move == "submit":
            prompt, params = self.prompt_of(dice), self.params_of(dice)
            adapter = dice.choice([None, *engine.model.adapters])
            self.known(engine.submit(prompt, params, adapter), prompt, params)
        elif move == "fork":
            params = self.params_of(dice)
            branch = request.fork(params)
            self.known(branch, branch.prompt_token_ids, params)
        elif move == "abort":
            engine.abort(request)
        elif move == "read":
            for output in request:
                self.read.setdefault(request, []).append(output)
        elif move == "result":
            request.results()
        elif move == "serve":
            with engine:
                engine.submit([1, 2], self.params_of(dice))
                request.result()
        elif move == "snapshot":
            engine.snapshot(request, path)
        elif move == "restore" and path.exists():
            copy = engine.restore(path)
            self.known(copy, copy.prompt_token_ids, copy.params, copy._seed)
        elif move in ("step", "metrics", "reset", "run"):
            getattr(engine, move)()

    def known(self, request, prompt, params, seed=None):
        for i, choice in enumerate(request.choices):
            self.requests.append((choice, prompt, params, (params.seed if seed is None else seed) + i))

    def settled(self, right_of):
        """Checks the state after the storm. `right_of`: the undisturbed completion of a request."""
        while self.engine.serving:  # a with block whose end was interrupted
            self.engine.__exit__()
        self.engine.run()
        ended = 0
        for request, prompt, params, seed in self.requests:
            result, right = request.result(), right_of(request, prompt, params, seed)
            assert result.finish_reason in (right.finish_reason, "abort"), request.error
            if result.finish_reason != "abort":
                ended += 1
                assert (result.token_ids, result.text) == (right.token_ids, right.text)
            assert result.token_ids == right.token_ids[: len(result.token_ids)]
        for request, outputs in self.read.items():
            outputs += list(request)
            assert "".join(output.text for output in outputs) == request.text[-sum(len(output.text) for output in outputs) :]
        found = self.engine.metrics()
        assert found["pages_free"] + found["pages_cached"] == self.engine.num_pages
        assert found["requests_waiting"] == found["requests_running"] == 0
        return ended


def stand_in(config=SMALL):
    model = Model(60)
    model.adapters = ADAPTERS
    return use(model, config)


def letters(dice):
    return [1 + i * i % 5 for i in range(dice.randint(1, 12))]


def chosen(dice):
    stop = dice.choice([(), (), ("ab",)])
    return fj.SamplingParams(max_tokens=dice.randint(1, 24), seed=dice.randint(0, 3), n=dice.choice([1, 1, 2]), stop=stop)


def undisturbed(engine):
    def right(request, prompt, params, seed):
        return expected(prompt, params, seed, engine.model.max_seq_len, engine.model.adapter_index(request.adapter))

    return right


@pytest.mark.parametrize("seed", [0, 1])
def test_a_storm_of_signals_changes_no_token_and_loses_no_page(tmp_path, seed):
    engine = stand_in()
    life = Life(engine, random.Random(seed), tmp_path, letters, chosen)
    errors = []

    def others():
        """Another thread, which gets no signals, must not wait forever."""
        dice = random.Random(seed + 100)
        try:
            for _ in range(20):
                prompt, params = letters(dice), chosen(dice)
                result = engine.submit(prompt, params).result()
                right = expected(prompt, params, params.seed, 60)
                assert result.finish_reason == "abort" or (result.token_ids, result.text) == (right.token_ids, right.text)
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=others, daemon=True)
    thread.start()
    struck = storm(life.act, 2.5, seed)
    thread.join(60)
    assert not thread.is_alive() and not errors, errors
    ended = life.settled(undisturbed(engine))
    check(engine)
    print(f"{struck} signals, {len(life.requests)} requests, {ended} to their end")
    assert struck > 50 and ended > 20


@pytest.mark.slow
def test_a_storm_over_a_real_model(tmp_path):
    model = fj.load(write_tiny_llama(tmp_path / "tiny.gguf", context=64), dtype="float32")
    engine = fj.Engine(model, EngineConfig(page_size=4, num_pages=24, max_seqs=3, token_budget=8, steps_per_dispatch=2))
    engine.warm_up()

    def prompt_of(dice):
        return [3 + i * i % 29 for i in range(dice.choice([1, 4, 9]))]

    def params_of(dice):
        return fj.SamplingParams(max_tokens=dice.choice([4, 12]), seed=dice.randint(0, 1), ignore_eos=True)

    life = Life(engine, random.Random(0), tmp_path, prompt_of, params_of)
    struck = storm(life.act, 1.5, 0)
    quiet, right = fj.Engine(model, engine.config), {}
    for request, prompt, params, seed in life.requests:
        right[request] = quiet.submit(prompt, dataclasses.replace(params, seed=seed))
    quiet.run()
    ended = life.settled(lambda request, *_: right[request].result())
    print(f"{struck} signals, {len(life.requests)} requests, {ended} to their end")
    assert struck > 20 and ended > 5


def test_an_interrupted_task_leaves_the_request_to_the_next():
    engine = stand_in()
    read = []

    async def follow(request, timer):
        timer.start()
        async for output in request:
            read.extend(output.token_ids)

    for seed in range(30):
        params = fj.SamplingParams(max_tokens=40, seed=seed, ignore_eos=True)
        request = engine.submit([1, 2, 3], params)
        timer = threading.Timer(random.Random(seed).random() * 0.01, lambda: signal.raise_signal(signal.SIGINT))
        with contextlib.suppress(KeyboardInterrupt):
            asyncio.run(follow(request, timer))
            timer.join()
        assert request.result().token_ids == expected([1, 2, 3], params, seed, 60).token_ids
        assert read == request.token_ids[: len(read)]
        read.clear()
    check(engine)


def test_an_interrupt_between_taking_in_and_handing_out_loses_nothing():
    engine, main = stand_in(), threading.main_thread().ident
    params = fj.SamplingParams(max_tokens=8, ignore_eos=True, seed=0)
    request = engine.submit([1, 2, 3], params)
    take = request._watcher.take

    def interrupted(*args):
        found = take(*args)
        signal.pthread_kill(main, signal.SIGINT)
        time.sleep(0.02)  # the signal reaches the caller now
        return found

    request._watcher.take = interrupted
    while request.state != "finished":
        with contextlib.suppress(KeyboardInterrupt):
            engine.step()
    right = expected([1, 2, 3], params, 0, 60).token_ids
    assert request.token_ids == right == [id for output in request for id in output.token_ids]


def test_a_loop_that_is_left_loses_no_output():
    engine = stand_in()
    request = engine.submit([1, 2, 3], fj.SamplingParams(max_tokens=20, ignore_eos=True, seed=0))
    engine.run()
    first = next(iter(request))
    assert [id for output in (first, *request) for id in output.token_ids] == request.token_ids


def test_what_is_interrupted_is_done_or_taken_back():
    engine = stand_in()
    request = engine.submit([1, 2], fj.SamplingParams(n=2))
    strike = partial(signal.pthread_kill, threading.main_thread().ident, signal.SIGINT)
    for interrupted in (lambda: engine.abort(request), lambda: engine.submit([1, 2], fj.SamplingParams(n=3))):
        with engine._lock, pytest.raises(KeyboardInterrupt):  # the work cannot begin
            threading.Timer(0.1, strike).start()
            interrupted()
    assert engine.metrics()["requests_waiting"] == 0 and request.finish_reason == "abort"


def test_a_block_whose_beginning_is_interrupted_leaves_no_reader_waiting():
    engine = stand_in()
    request = engine.submit([1, 2], fj.SamplingParams(max_tokens=9, seed=0, ignore_eos=True))
    engine.serving = True  # a reader waits for the loop
    reader = threading.Thread(target=request.result, daemon=True)
    reader.start()
    strike = partial(signal.pthread_kill, threading.main_thread().ident, signal.SIGINT)
    with engine._lock, pytest.raises(KeyboardInterrupt):
        threading.Timer(0.1, strike).start()
        engine.__enter__()
    reader.join(60)
    assert not reader.is_alive() and not engine.serving and len(request.token_ids) == 9


def test_a_snapshot_that_is_interrupted_leaves_nothing(tmp_path, monkeypatch):
    from ferrum_jax.engine import snapshot

    engine = stand_in()
    request = engine.submit([1, 2, 3, 4], fj.SamplingParams(max_tokens=20, ignore_eos=True, seed=0))
    engine.step()
    save, begun = snapshot.save, threading.Event()

    def slowly(*args):
        begun.set()
        time.sleep(0.2)
        save(*args)

    def strike():
        begun.wait()
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    monkeypatch.setattr(snapshot, "save", slowly)
    threading.Thread(target=strike).start()
    with pytest.raises(KeyboardInterrupt):
        engine.snapshot(request, tmp_path / "one")
    monkeypatch.undo()
    engine.snapshot(request, tmp_path / "one")  # after the first one, and removed again
    assert engine.restore(tmp_path / "one").result() == request.result()
    assert [path.name for path in tmp_path.iterdir()] == ["one"]


def test_the_threads_end_with_their_engine():
    engine = stand_in()
    with engine:
        engine.submit([1, 2], fj.SamplingParams(seed=0)).result()
    alive = engine._driver._alive
    assert alive.locked()
    del engine
    gc.collect()
    assert alive.acquire(timeout=10)


def test_a_finalizer_in_a_thread_of_the_engine_waits_for_nothing():
    """The garbage collector may end a stream anywhere, also during short work under the lock."""
    engine = stand_in()
    first, second = (engine.submit([1, 2], fj.SamplingParams(seed=0)) for _ in range(2))
    engine._driver.call(lambda: engine.abort(first))
    assert first.state == "finished"
    engine._do(engine.abort, second)
    assert engine.metrics()["requests_waiting"] == 0 and second.state == "finished"


def test_an_error_and_a_context_pass_through_a_thread():
    doing = Worker("one of a test")
    with pytest.raises(ZeroDivisionError):
        doing.call(lambda: 1 // 0)
    assert doing.call(worker.is_inside) and not worker.is_inside()
    with pytest.raises(RuntimeError, match="must not wait"):
        doing.call(lambda: doing.call(int))
    assert doing.call(int) == 0


def test_the_interpreter_ends_in_the_middle_of_anything():
    """A background loop that was not ended, a step that was interrupted, a stream that is still open."""
    program = """
        import signal, sys, threading, time
        from support.engine_stand_in import Model, use
        import ferrum_jax as fj
        engine = use(Model(4000), fj.EngineConfig(page_size=16, num_pages=400, steps_per_dispatch=1))
        def stream(engine=engine):
            request = engine.submit([1, 2], fj.SamplingParams(max_tokens=3000, ignore_eos=True))
            try:
                yield from request
            finally:
                engine.abort(request)
        opened = stream()
        next(opened)
        engine.__enter__()
        requests = [engine.submit([1, 2, i % 5], fj.SamplingParams(max_tokens=3000, ignore_eos=True)) for i in range(20)]
        def interrupt():
            while len(requests[0].token_ids) < 20:
                time.sleep(0.001)
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)  # as Ctrl-C: it wakes what waits
        try:
            threading.Thread(target=interrupt, daemon=True).start()
            requests[0].result()
        except KeyboardInterrupt:
            print("interrupted")
            sys.exit(3)
    """
    command, pipes = [sys.executable, "-c", textwrap.dedent(program)], {"capture_output": True, "text": True}
    found = subprocess.run(command, **pipes, env=environment(), timeout=120, check=False)
    assert (found.returncode, found.stdout, found.stderr) == (3, "interrupted\n", ""), found.stderr
