"""Threads that no interrupt reaches.

Python runs signal handlers in the main thread alone, between any two of its instructions: what the main thread does can be
left half done, with a lock held, a page counted twice or a context of JAX open. So an engine's work is done by threads of
its own, and the caller only waits for it. An interrupt ends the waiting; the work goes on to its end. The caller's side holds
no lock, and what it hands over and gets back passes through a `SimpleQueue`, whose operations are single steps of C.
"""

from __future__ import annotations

import _thread
import atexit
import contextlib
import contextvars
import os
import threading
import weakref
from collections.abc import Callable
from functools import partial
from queue import SimpleQueue
from typing import Any

_workers: weakref.WeakSet[Worker] = weakref.WeakSet()
_inside: set[int] = set()  # identities of the threads
_ending = threading.Event()  # the interpreter is


class Job:
    """Something to do in the context variables of its maker; `then` is called once it is done."""

    def __init__(self, work: Callable[[], Any], then: Callable[[], object] = lambda: None):
        self._context, self._work, self._then = contextvars.copy_context(), work, then
        self._value: Any = None
        self._error: BaseException | None = None
        self.succeeded = False

    def run(self) -> None:
        try:
            self._value = self._context.run(self._work)
            self.succeeded = True
        except BaseException as error:
            self._error = error
        with contextlib.suppress(RuntimeError):  # an event loop that is closed
            self._then()

    def result(self) -> Any:
        """What came of it once it is done, or the error that it raised."""
        if self._error is not None:
            try:
                raise self._error
            finally:
                self._error = None  # its traceback leads back to here
        return self._value


class Worker:
    """A thread that does jobs one after the other. It starts with the first one, and ends with this object. `ending`: is set
    when the interpreter ends."""

    def __init__(self, name: str):
        self._name, self.ending = name, _ending
        self._begin()
        _workers.add(self)

    def _begin(self) -> None:
        self._jobs: SimpleQueue[Job | None] = SimpleQueue()
        self._alive = threading.Lock()  # held by the thread as long as it lives
        weakref.finalize(self, self._jobs.put, None)

    def post(self, job: Job) -> None:
        """Hands a job over and does not wait for it."""
        if not self._alive.locked():  # a thread too many ends at once
            thread = threading.Thread(target=_work, args=(self._jobs, self._alive), name=self._name, daemon=True)
            _thread.start_new_thread(thread.start, ())  # `start` waits in Python: an interrupt there could hold up the thread
        self._jobs.put(job)

    def call(self, work: Callable[[], Any], undo: Callable[[Any], object] | None = None) -> Any:
        """What `work` gives or raises in the thread. Where the caller is interrupted, the work goes on to its end, and `undo`
        then gets what it gave."""
        if _ending.is_set():  # the threads have ended, and nothing else runs
            return work()
        if is_inside():
            raise RuntimeError("a thread of an engine must not wait for an engine")
        done: SimpleQueue[None] = SimpleQueue()
        job = Job(work, partial(done.put, None))
        try:
            self.post(job)
            done.get()
            return job.result()
        except BaseException:
            if undo is not None:
                self.post(Job(lambda: job.succeeded and undo(job.result())))
            raise


def is_inside() -> bool:
    """Whether this thread is one of a worker's. It may come to call an engine: the garbage collector runs anything there."""
    return threading.get_ident() in _inside


def _work(jobs: SimpleQueue[Job | None], alive: threading.Lock) -> None:
    if not alive.acquire(blocking=False):
        return
    _inside.add(threading.get_ident())
    try:
        while (job := jobs.get()) is not None and not _ending.is_set():
            job.run()
            del job  # it may be all that holds the engine
    finally:
        _inside.discard(threading.get_ident())
        alive.release()


@atexit.register
def _end() -> None:
    """Lets what is being done come to its end: a thread must not be inside XLA when the interpreter goes away."""
    _ending.set()
    for worker in list(_workers):
        worker._jobs.put(None)
        worker._alive.acquire()


def _after_fork() -> None:
    """The child has the objects, and none of the threads."""
    _inside.clear()
    for worker in list(_workers):
        worker._begin()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
