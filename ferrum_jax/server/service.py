"""The engine as the routes use it: what is asked of it, how much at once, and whether it still takes requests."""

from __future__ import annotations

import asyncio
import contextlib
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import Any, TypeVar

from pydantic import ValidationError
from starlette.requests import Request as HttpRequest

from ferrum_jax import chat
from ferrum_jax.embedding import EmbeddingModel
from ferrum_jax.engine import Engine, Request
from ferrum_jax.errors import FerrumError
from ferrum_jax.model import Model
from ferrum_jax.parsing import Dialect, told
from ferrum_jax.server.answers import Answers, Bridge
from ferrum_jax.server.bodies import Body
from ferrum_jax.server.errors import ApiError, invalid, refused
from ferrum_jax.server.metrics import Metrics
from ferrum_jax.server.settings import Settings
from ferrum_jax.server.store import Store

_BODY_SECONDS = 60  # in which a body must arrive
_SMALL = 1 << 16  # bytes of a body that is parsed in the event loop
B = TypeVar("B", bound=Body)


class Service:
    """An engine behind HTTP.

    `pool` runs what may take longer than a moment: parsing large bodies, templates, tokenization, submitting. `unfinished`: the
    completions that the engine has to do. `store`: what the Responses API keeps. `draining`: no new requests are taken.
    """

    def __init__(self, engine: Engine, settings: Settings, embedder: EmbeddingModel | None = None):
        self.engine, self.settings, self.embedder = engine, settings, embedder
        self.created = int(time.time())
        self.fingerprint = f"fj_{engine.identity.split()[2][:12]}"
        self.draining = False
        self.unfinished = 0
        self.metrics = Metrics(engine, settings.name)
        self.store = Store(settings.store)
        self.pool = ThreadPoolExecutor(max(4, min(32, engine.config.max_seqs)), "ferrum_jax server")
        self._apart = ThreadPoolExecutor(1, "ferrum_jax apart")
        self._shown: dict[Dialect, tuple[int, ...]] = {}
        self._answers: weakref.WeakSet[Answers] = weakref.WeakSet()
        self._bridge: Bridge | None = None
        self._owns_loop = False
        self._seconds = 1.0  # that a completion takes, a moving average

    # Its life

    def start(self) -> None:
        """Starts the engine's background loop, unless it runs."""
        if not self.engine.serving:
            self.engine.__enter__()
            self._owns_loop = True

    def stop(self) -> None:
        """Ends the background loop, if `start` has started it."""
        if self._owns_loop:
            self.engine.__exit__()
        self.store.close()
        self.pool.shutdown(wait=False)
        self._apart.shutdown(wait=False)

    def health(self) -> str:
        """Why no request can be served, or ""."""
        if self.draining:
            return "the server is stopping"
        return self.engine.failure or ("" if self.engine.serving else "the engine does not run")

    # Requests

    async def read(self, request: HttpRequest, kind: type[B]) -> B:
        """The body of a request, checked."""
        try:
            async with asyncio.timeout(_BODY_SECONDS):
                raw = await request.body()
        except TimeoutError:
            raise ApiError(408, f"the body did not arrive within {_BODY_SECONDS} seconds") from None
        try:
            body = kind.model_validate_json(raw) if len(raw) < _SMALL else await self.run(lambda: kind.model_validate_json(raw))
        except ValidationError as error:
            raise invalid(error) from None
        body.require_supported()
        return body

    def adapter(self, model: str | None) -> str | None:
        """The adapter that a model's name stands for; None for the model alone."""
        if model is None or model == self.settings.name:
            return None
        if model not in self.engine.model.adapters:
            known = ", ".join(self.names)
            raise ApiError(
                404, f"the model {model!r:.200} does not exist here; there is {known}", param="model", code="model_not_found"
            )
        return model

    @property
    def names(self) -> list[str]:
        """The names of the model, alone and with each adapter."""
        return [self.settings.name, *self.engine.model.adapters]

    def template_variables(self, given: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
        """Those variables that a chat template of the model reads, and the names of the others."""
        if reserved := given.keys() & {"messages", "tools", "limits", "add_generation_prompt"}:
            raise ApiError(400, f"chat_template_kwargs: {min(reserved)} cannot be set here", param="chat_template_kwargs")
        known = self._reads() | {"chat_template"}
        return {name: given[name] for name in given if name in known}, [name for name in given if name not in known]

    def thinking(self, thinks: bool, field: str, effort: str | None = None) -> dict[str, Any]:
        """The variables of a chat template that switch reasoning on or off, or set its effort. `field`: what asks for it."""
        reads = self._reads()
        if effort is not None and "reasoning_effort" in reads:
            return {"reasoning_effort": effort}
        switch = next((name for name in ("enable_thinking", "thinking") if name in reads), None)
        if switch is None and thinks and (effort is not None or self.dialect().reasoning == "none"):
            message = f"{field}: the model's chat template does not have a switch for it; leave it out"
            raise ApiError(400, message, param=field, code="unsupported_parameter")
        return {} if switch is None else {switch: thinks}

    def dialect(self, tools: bool = False) -> Dialect:
        """How the model writes reasoning and calls. `tools`: whether a request has tools, for which there may be a template."""
        template = chat.choose(self.engine.model.tokenizer.chat_templates, tools=tools)
        return Dialect.of(template, self.settings.tool_parser, self.settings.reasoning_parser)

    @property
    def tells_tools(self) -> bool:
        """Whether a message has to say what functions there are, because the chat template does not have a place for them."""
        template = chat.choose(self.engine.model.tokenizer.chat_templates, tools=True)
        if template is None or self.settings.tool_parser not in (None, told.PARSER):
            return False
        return Dialect.of(template).calls == "none" and "tools" not in chat.variables(template)

    def shown(self, dialect: Dialect) -> tuple[int, ...]:
        """The control tokens that a parser has to see in the text."""
        if dialect not in self._shown:
            tokenizer = self.engine.model.tokenizer
            tokens = {
                token for mark in dialect.marks for token in tokenizer.encode(mark, add_special=False, parse_special=True)
            }
            self._shown[dialect] = tuple(sorted(token for token in tokens - tokenizer.eos_ids if tokenizer.is_control(token)))
        return self._shown[dialect]

    async def run(self, work: Callable[[], Any]) -> Any:
        """The result of work that is not done in the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self.pool, work)

    async def alone(self, work: Callable[[], Any]) -> Any:
        """The result of work on the device that is not the engine's, one piece after the other."""
        return await asyncio.get_running_loop().run_in_executor(self._apart, work)

    @cached_property
    def tracer(self) -> Model:
        """The model outside the engine, with the same parameters."""
        model = self.engine.model
        facts = (
            model.config,
            model.params,
            model.tokenizer,
            model.placement,
            model.kv_dtype,
            model.max_seq_len,
            model.adapters,
        )
        return Model(*facts)

    async def submit(self, request: HttpRequest, make: Callable[[], list[Request]], count: int, param: str) -> Answers:
        """The answers to the requests that `make` submits, as many as `count`. It runs in the pool.
        `param`: the field that has the prompt.

        Raises ApiError if there are too many, or the engine refuses them.
        """
        self._require_room(count)
        if not self.engine.serving:
            await self.run(self.start)
        self.unfinished += count
        work = asyncio.ensure_future(self.run(make))
        try:
            with refusals(param):
                requests = await asyncio.shield(work)
        except BaseException:
            self.unfinished -= count
            work.add_done_callback(self._abort_all)  # if this was cancelled, it may still submit something
            raise
        loop = asyncio.get_running_loop()
        if self._bridge is None or self._bridge.loop is not loop:
            self._bridge = Bridge(loop)
        settings = self.settings
        request.scope["ferrum"]["requests"] = requests  # for the log
        answers = Answers(
            requests, request.receive, self._bridge, abort=self.abort, ended=self._ended, paused=self.metrics.paused,
            ping=settings.ping_seconds, timeout=settings.request_timeout,
        )  # fmt: skip
        self._answers.add(answers)
        return answers

    def abort(self, request: Request) -> None:
        """Ends a request without waiting for the engine."""
        with contextlib.suppress(RuntimeError):  # the pool is closed, and the engine with it
            self.pool.submit(self.engine.abort, request)

    def end_all(self) -> None:
        """Ends all requests, because the server stops."""
        self.draining = True
        for answers in list(self._answers):
            answers.end(_stopping())

    def submit_all(self, *makers: Callable[[], Request]) -> list[Request]:
        """The completions of several prompts: all of them, or none."""
        requests: list[Request] = []
        try:
            for make in makers:
                requests += make().choices
        except BaseException:
            for request in requests:
                self.engine.abort(request)
            raise
        return requests

    # Inside

    def _reads(self) -> frozenset[str]:
        """The variables that the model's chat templates read."""
        return frozenset[str]().union(*map(chat.variables, self.engine.model.tokenizer.chat_templates.values()))

    def _require_room(self, count: int) -> None:
        if self.draining:
            raise _stopping()
        room = self.engine.config.max_seqs + self.settings.max_queue
        if count > room:
            raise ApiError(400, f"n: {count} completions in one request; at most {room} may run and wait", param="n")
        if self.unfinished + count > room:
            turns = self.unfinished / self.engine.config.max_seqs
            message = f"{self.unfinished} completions run and wait; try again later"
            raise ApiError(429, message, code="rate_limit_exceeded", retry_after=self._seconds * turns / 2)

    def _ended(self, request: Request) -> None:
        self.unfinished -= 1
        self._seconds += 0.1 * (time.perf_counter() - request.times.arrived - self._seconds)
        self.metrics.ended(request)

    def _abort_all(self, work: asyncio.Future[list[Request]]) -> None:
        if not work.cancelled() and work.exception() is None:
            for request in work.result():
                self.abort(request)


def _stopping() -> ApiError:
    return ApiError(503, "the server is stopping", retry_after=5)


@contextlib.contextmanager
def refusals(param: str) -> Iterator[None]:
    """What the engine refuses is the client's mistake, in the field `param` unless it names another one."""
    try:
        yield
    except (ValueError, TypeError, FerrumError) as error:
        raise refused(error, param) from None


def service_of(request: HttpRequest) -> Service:
    """The service of the application that a request has reached."""
    return request.app.state.service
