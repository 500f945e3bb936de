"""Threads that interrupts do not reach.

Python runs signal handlers only in the main thread, between any two of its instructions: work of the main thread can be left
half done, with a lock held, a page counted twice or a context of JAX open. So the engine's own threads do its work, and the
caller only waits. An interrupt ends the waiting; the work continues to its end. The caller does not hold a lock, and jobs and
results pass through a `SimpleQueue`, whose operations are atomic in C.
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
_inside: set[int] = set()  # idents of the threads
_ending = threading.Event()  # the interpreter is exiting


class Job:
    """Work to be done with the context variables of the thread that made it; `then` is called when it is done."""

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
        with contextlib.suppress(RuntimeError):  # the event loop is closed
            self._then()

    def result(self) -> Any:
        """Waits until it is done; returns its result or raises its error."""
        if self._error is not None:
            try:
                raise self._error
            finally:
                self._error = None  # its traceback refers back to this object
        return self._value


class Worker:
    """A thread that does jobs one after the other. It starts with the first job and ends with this object. `ending`: is set
    when the interpreter exits."""

    def __init__(self, name: str):
        self._name, self.ending = name, _ending
        self._begin()
        _workers.add(self)

    def _begin(self) -> None:
        self._jobs: SimpleQueue[Job | None] = SimpleQueue()
        self._alive = threading.Lock()  # held by the thread while it lives
        weakref.finalize(self, self._jobs.put, None)

    def post(self, job: Job) -> None:
        """Hands over a job without waiting for it."""
        if not self._alive.locked():  # a superfluous thread ends at once
            thread = threading.Thread(target=_work, args=(self._jobs, self._alive), name=self._name, daemon=True)
            _thread.start_new_thread(thread.start, ())  # `start` waits in Python, where an interrupt could stop it
        self._jobs.put(job)

    def end(self) -> None:
        """Ends the thread, once the jobs before are done; a later job starts another one."""
        if self._alive.locked() and not is_inside():
            self._jobs.put(None)
            with self._alive:
                pass

    def call(self, work: Callable[[], Any], undo: Callable[[Any], object] | None = None) -> Any:
        """The result of `work` in the thread, or its error. If the caller is interrupted, the work continues to its end, and
        `undo` is then called with the result."""
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
    """Whether this thread belongs to a worker. Such a thread may call an engine, because the garbage collector runs finalizers
    in any thread."""
    return threading.get_ident() in _inside


def _work(jobs: SimpleQueue[Job | None], alive: threading.Lock) -> None:
    if not alive.acquire(blocking=False):
        return
    _inside.add(threading.get_ident())
    try:
        while (job := jobs.get()) is not None and not _ending.is_set():
            job.run()
            del job  # it may hold the last reference to the engine
    finally:
        _inside.discard(threading.get_ident())
        alive.release()


@atexit.register
def _end() -> None:
    """Waits for the current jobs: a thread must not be inside XLA when the interpreter exits."""
    _ending.set()
    for worker in list(_workers):
        worker._jobs.put(None)
        worker._alive.acquire()


def _after_fork() -> None:
    """The child process has the objects but not the threads."""
    _inside.clear()
    for worker in list(_workers):
        worker._begin()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
