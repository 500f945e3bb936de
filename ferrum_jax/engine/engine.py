"""The engine: many requests on one device, without waiting for each other.

One thread drives: it gets the next dispatch from the scheduler, starts it, and then reads the results of the one before, so the
device always has work while the host decides. Another thread does what takes microseconds, so submitting and aborting never
wait for the device. The caller's thread only checks arguments, hands over a job and waits, so an interrupt loses nothing
(worker.py). The work of the engine's threads is in core.py.
"""

from __future__ import annotations

import itertools
import secrets
import shutil
import threading
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Protocol, cast

from ferrum_jax import checks
from ferrum_jax.engine import snapshot, steps, worker
from ferrum_jax.engine.config import EngineConfig, config_of
from ferrum_jax.engine.core import Core
from ferrum_jax.engine.executor import Executor, choose_num_pages
from ferrum_jax.engine.ledger import Ledger, pool_sizes
from ferrum_jax.engine.request import Request
from ferrum_jax.engine.scheduler import Scheduler
from ferrum_jax.engine.sequence import Extras, Sequence
from ferrum_jax.engine.worker import Job, Worker
from ferrum_jax.errors import ModelFileError
from ferrum_jax.progress import task
from ferrum_jax.prompts import Prompt, Prompts
from ferrum_jax.sampling_params import MAX_BIAS, SamplingParams
from ferrum_jax.state import page_kinds, recurrent_kinds
from ferrum_jax.structured import Structured
from ferrum_jax.structured.grammar import Follower

_REHEARSED = 128  # tokens of the longest prompt of a rehearsal


class Loaded(Protocol):
    """The part of a model (`ferrum_jax.Model`) that an engine uses."""

    @property
    def _runtime(self) -> Prompts: ...


class Engine(Core):
    """Runs requests of one model together.

    `with Engine(model) as engine:` compiles and serves in the background, and logs its shapes and how far it has compiled
    (logger "ferrum_jax.engine.engine", level INFO). Without `with`, a thread that waits for a request, or calls `step` or
    `run`, drives the engine. All methods may be called from any thread, and interrupted at any moment.

    Args:
      model: from `ferrum_jax.load`.
      config: an EngineConfig, or a dict of its fields.

    Attributes:
      model (Prompts): what `model` runs with: its tokenizer, `encode`, `encode_chat`, `render_chat`, `adapters`.
      config (EngineConfig): its configuration.
      context (int): limit of a request's tokens, prompt and output.
      serving (bool): whether the background loop runs.
      failure (str): the error because of which the background loop ended all requests; "" once a step has succeeded again.

    Raises:
      ValueError: for anything else.
      OutOfMemoryError: if the KV cache does not fit.
    """

    def __init__(self, model: Loaded | Prompts, config: EngineConfig | Mapping[str, Any] = EngineConfig()):
        if not hasattr(model, "max_seq_len"):  # anything that behaves like a model is accepted
            raise ValueError(f"an engine runs a Model, as ferrum_jax.load gives it, not {checks.kind(model)}")
        self.model = cast(Prompts, getattr(model, "_runtime", model))
        self.config = config_of(config)
        self.serving, self.failure = False, ""
        self.warmed_up = 0, 1  # programs that are ready, and all that warming up compiles
        self._driver, self._desk, self._compiler, self._files = (
            Worker(f"ferrum_jax engine {part}") for part in ("driver", "desk", "compiler", "files")
        )
        self._lock = threading.Lock()
        self._numbers = itertools.count()
        self._flight, self._looping, self._kept = None, False, []
        self._busy_until = self._waited = 0.0

        def set_up() -> None:
            config = self.config = self.config.of_model(self.model.config)
            num_pages, self.context = config.num_pages or choose_num_pages(self.model, config), self.model.max_seq_len
            self._kinds = page_kinds(self.model.config)
            if not all(kind.window for kind in self._kinds):
                self.context = min(self.context, num_pages * config.page_size)
            self._executor = Executor(self.model, config, self._pool_sizes(num_pages), self.context)
            self.identity = f"{self.model.fingerprint()} kv {self._executor.kv_dtype}, pages of {config.page_size}"
            self._scheduler = Scheduler(config, self._new_ledger(num_pages))
            self.num_pages = sum(self._executor.num_pages)
            self._count_anew()
            self._choose_steps()

        self._driver.call(set_up)

    def __repr__(self) -> str:
        return (
            f"<Engine of {self.model!r}, {self.config.max_seqs} sequences, {self.num_pages} pages of {self.config.page_size}>"
        )

    # Requests

    def submit(
        self,
        prompt: Prompt | list[dict],
        params: SamplingParams = SamplingParams(),
        adapter: str | None = None,
        *,
        tools: list[dict] | None = None,
        begun: int = 0,
        **template_kwargs: Any,
    ) -> Request:
        """A request for one prompt, which waits until the engine admits it.

        Args:
          prompt: a text, a list of token ids or a conversation (a list of messages).
          params: how to continue it.
          adapter: the name of a LoRA adapter that the model was loaded with; None: the model alone.
          tools: for a conversation: JSON schemas of functions that the model may call.
          begun: the number of tokens at the end of the prompt that belong to the output's grammar (`params.structured`).
          template_kwargs: for a conversation: variables of the chat template, such as `enable_thinking=False`.

        Raises:
          ValueError: for a prompt that is empty or too long, for parameters that cannot be met, for an unknown adapter, and for
            a request that needs more pages than there are.
        """
        is_chat = isinstance(prompt, list) and bool(prompt) and isinstance(prompt[0], dict)
        if is_chat:
            tokens = self.model.encode_chat(prompt, tools, **template_kwargs)  # type: ignore[arg-type]
        elif tools is not None or template_kwargs:
            name = "tools" if tools is not None else next(iter(template_kwargs))
            raise ValueError(f"{name}: is for a conversation (a list of messages), not for a prompt that is text or token ids")
        else:
            tokens = self.model.encode(prompt)  # type: ignore[arg-type]
        if not 0 <= begun <= len(tokens):
            raise ValueError(f"begun must be a number of tokens of the prompt, 0 to {len(tokens)}, not {begun}")
        return self._submit(tokens, params, adapter, begun=begun)

    def abort(self, request: Request) -> None:
        """Ends a request and its choices with finish_reason "abort"; finished ones are not changed.

        Args:
          request: of this engine.

        Raises:
          ValueError: for a request of another engine.
        """
        if self._desk.ending.is_set():  # a stream still open at the interpreter's exit: modules may be gone
            return
        self._own(request)
        self._do(self._end_choices, request)

    def reset(self) -> None:
        """Empties the prefix cache; running requests continue."""
        self._do(self._forget)

    def snapshot(self, request: Request, path: str | Path) -> None:
        """Writes a request, its text, its parameters and its KV pages, as an orbax checkpoint. The request continues. If this
        is interrupted, the directory is removed again.

        Args:
          request: of this engine.
          path: a directory that does not exist yet.

        Raises:
          FileExistsError: if there is something at `path`.
          ValueError: for a request of another engine.
        """
        self._own(request)
        path = snapshot.free(Path(checks.path(path, "path")))
        facts, content = self._driver.call(partial(self._read, request))
        write = partial(snapshot.save, path, self.identity, facts, content)
        self._files.call(write, undo=lambda _: shutil.rmtree(path))

    def restore(self, path: str | Path) -> Request:
        """The request that `snapshot` wrote, ready to continue with the same tokens as if it had never stopped: its full pages
        are put into the prefix cache, where it finds them.

        Args:
          path: the directory of the snapshot.

        Raises:
          ModelFileError: for a directory that is not a snapshot, or is damaged.
          ValueError: for a snapshot of another model, and for a request that does not fit into this engine.
        """
        path, vocab = Path(checks.path(path, "path")).absolute(), self.model.config.vocab_size
        saved = self._files.call(lambda: snapshot.load(path, self.identity, vocab, self._executor.abstract_state()))
        text = [*saved.prompt, *saved.output]
        try:
            index, extras = self.model.adapter_index(saved.adapter), self._extras(saved.params)
            follower = self._follower(saved.params, text, len(saved.prompt) - saved.begun)
        except ValueError as error:
            raise ModelFileError(f"{path}: is a damaged snapshot: {error}") from error
        limit = self._check(len(saved.prompt), saved.params)
        if saved.finish_reason is None and len(text) >= limit:
            raise ValueError(f"the request's {len(text)} tokens leave no room in a context of {self.model.max_seq_len}")
        sequence = Sequence(next(self._numbers), text, len(saved.prompt), limit, adapter=index, follower=follower)
        request = Request(self, sequence, saved.params, saved.seed, extras, saved.adapter, saved.begun)
        sequence.owner, sequence.cacheable = request, saved.params.prompt_logprobs is None
        request._resume(saved, path)
        if self.config.prefix_cache and saved.content is not None:
            self._driver.call(partial(self._fill_prefix_cache, text, saved.full_pages, saved.content, index))
        if request.state != "finished":
            self._do(self._add, [request], undo=partial(self._end_choices, request))
        return request

    # Driving

    def step(self) -> bool:
        """Starts the next dispatch and processes the results of the one before. Returns whether anything is left to do."""
        return self._driver.call(self._advance)

    def run(self) -> None:
        """Drives until every request is finished, including one whose submission was interrupted."""
        while self.step() or self._do(self._busy):
            pass

    def warm_up(self, progress: Callable[[int, int, str], None] | None = None, *, essential: bool = False) -> None:
        """Compiles everything that may be needed; then nothing compiles while serving.

        Args:
          essential: only the few programs that can serve any request, some of them slower. The background loop uses these until
            it has compiled the others.
          progress: called with the number of programs that are ready, the number of all, and the name of the next one.
        """
        programs = self._executor.programs()
        if essential:
            programs = [(name, self._executor.pages) for name in self._executor.essential()]
            self._executor.substitutes = True
        with task("warming up, program", len(programs)) as update:
            for number, (name, pages) in enumerate(programs):
                self.warmed_up = number, len(programs)
                update(number + 1)
                if progress is not None:
                    progress(number, len(programs), str(name))
                self._compiler.call(partial(self._executor.compile, name, pages))
        self.warmed_up = len(programs), len(programs)
        if progress is not None:
            progress(len(programs), len(programs), "ready")

    def rehearse(self) -> None:
        """Runs a few short requests and forgets them. Afterwards every kind of step has run once and its time is known, so the
        first requests are as fast as later ones. For an engine that has no requests yet.

        Raises:
          RuntimeError: if a request fails.
        """
        params = SamplingParams(max_tokens=2, temperature=0.0, ignore_eos=True)
        rows = sorted(bucket.rows for bucket in self.config.buckets if not bucket.tokens)
        longest = min(_REHEARSED, self.config.token_budget, self.context - params.max_tokens)
        for prompts in (*([[0]] * count for count in rows), [[0] * max(1, longest)]):
            requests = [self.submit(prompt, params) for prompt in prompts]
            self.run()
            for request in requests:
                if request.error:
                    raise RuntimeError(f"the first request failed: {request.error}")
        self._do(self._count_anew)

    def __enter__(self) -> Engine:
        self._do(self._open, undo=self._halt)
        return self

    def __exit__(self, *_: object) -> None:
        """Stops the background loop. Unfinished requests end with "abort"."""
        self._driver.call(self._close)
        self._compiler.call(lambda: None)  # after the program that is being compiled

    # Facts

    def buckets(self) -> list[str]:
        """The shapes that are compiled, in words."""
        return [str(bucket) for bucket in self._executor.buckets()]

    def metrics(self) -> dict[str, float]:
        """Counts since the engine was made, and its current state.

        compiles; steps of the model (a dispatch of N steps counts N); prompt_tokens that were computed; generated_tokens;
        prefix_lookups, prefix_hit_pages, prefix_saved_tokens, prefix_evictions; preemptions; pages_free, pages_cached (all
        others are held) of all pools together, and of each pool if there are several, such as pages_free_full and
        pages_free_window_4096; for a model with layers that recur checkpoints_free, checkpoints_cached, state_checkpoints (made
        so far), state_hits (requests that began from one), state_evictions;
        requests_waiting, requests_running; host_seconds: processor time of the driving threads for deciding, launching and
        processing results; device_seconds: wall time from a launch, or from the previous results, to its results.
        """
        return self._do(self._measure)

    # Inside

    def _retire(self) -> None:
        """Gives the state on the device back, for good, and ends the threads. Requests refer to each other and to the engine,
        which therefore stays until Python collects cycles; meanwhile the C library would keep memory for each thread."""
        self._driver.call(self._release)
        for thread in (self._driver, self._desk, self._compiler, self._files):
            thread.end()

    def _pool_sizes(self, num_pages: int) -> list[int]:
        return pool_sizes([kind.window for kind in self._kinds], num_pages, self.config)

    def _new_ledger(self, num_pages: int) -> Ledger:
        windows = [kind.window for kind in self._kinds]
        recurs = bool(recurrent_kinds(self.model.config))
        return Ledger(self.config, windows, self._pool_sizes(num_pages), self.context, self.identity.encode(), recurs)

    def _do(self, work: Callable[..., Any], *args: Any, undo: Callable[[], object] | None = None) -> Any:
        """Does short work on the host's state under the lock, and returns its result."""
        guarded = partial(self._guarded, work, *args)
        if not worker.is_inside():
            return self._desk.call(guarded, None if undo is None else lambda _: self._guarded(undo))
        # The garbage collector runs a finalizer in one of the engine's threads, which may hold the lock.
        if not self._lock.acquire(blocking=False):
            return self._desk.post(Job(guarded))
        try:
            return work(*args)
        finally:
            self._lock.release()

    def _guarded(self, work: Callable[..., Any], *args: Any) -> Any:
        with self._lock:
            return work(*args)

    def _step_soon(self, then: Callable[[], object]) -> Job:
        """Requests a step without waiting for it; `then` is called after it."""
        step = Job(self._advance, then)
        self._driver.post(step)
        return step

    def _own(self, request: Request) -> None:
        if not isinstance(request, Request):
            raise ValueError(f"expected a Request, as `submit` returns it, not {type(request).__name__}")
        if request._engine is not self:
            raise ValueError(f"request {request.id} is of another engine")

    def _submit(
        self, tokens: list[int], params: SamplingParams, adapter: str | None, origin: Sequence | None = None, begun: int = 0
    ) -> Request:
        """begun: the last tokens of the prompt that belong to the grammar already."""
        if not isinstance(params, SamplingParams):
            raise ValueError(f"params must be SamplingParams, not {type(params).__name__}")
        index = self.model.adapter_index(adapter)
        limit = self._check(len(tokens), params)
        extras = self._extras(params)
        seed = secrets.randbits(32) if params.seed is None else params.seed
        choices: list[Request] = []
        followers = [self._follower(params, tokens, len(tokens) - begun) for _ in range(params.n)]
        for i, follower in enumerate(followers):
            number = next(self._numbers)
            sequence = Sequence(number, list(tokens), len(tokens), limit, origin=origin, adapter=index, follower=follower)
            sequence.owner = request = Request(self, sequence, params, (seed + i) % 2**32, extras, adapter, begun)
            sequence.cacheable = params.prompt_logprobs is None or i > 0
            if i > 0:
                request.prompt_logprobs = choices[0].prompt_logprobs  # computed once
            origin = origin or sequence
            choices.append(request)
        choices[0].choices = choices
        self._do(self._add, choices, undo=partial(self._end_choices, choices[0]))
        return choices[0]

    def _fork(self, request: Request, params: SamplingParams) -> Request:
        tokens = [*request.prompt_token_ids, *request.token_ids]
        goes_on = params.structured == request.params.structured and not request._watcher.at_end_token
        begun = request._begun + len(tokens) - len(request.prompt_token_ids) if goes_on else 0
        return self._submit(tokens, params, request.adapter, request._sequence, begun)

    def _follower(self, params: SamplingParams, text: list[int], begin: int) -> Follower | None:
        """Where a text is in the grammar of its output, which begins at token `begin`."""
        if params.structured is None:
            return None
        assert isinstance(params.structured, Structured)
        follower = self.model.grammars.follower(params.structured, begin)
        follower.follow(text)
        if follower.error:
            raise ValueError(follower.error)
        return follower

    def _check(self, length: int, params: SamplingParams) -> int:
        """The limit of the request's tokens, or a ValueError that says why it is impossible."""
        if length >= self.model.max_seq_len:
            raise ValueError(f"the prompt has {length} tokens and leaves no room in a context of {self.model.max_seq_len}")
        limit = min(length + params.max_tokens, self.model.max_seq_len)
        ledger = self._scheduler.ledger
        for needed, pool in zip(ledger.pages_needed(limit), ledger.pools, strict=True):
            if needed > pool.num_pages:
                raise ValueError(
                    f"a prompt of {length} tokens with max_tokens={params.max_tokens} needs {needed} pages of "
                    f"{self.config.page_size} tokens; the engine has {pool.num_pages}"
                )
        return limit

    def _extras(self, params: SamplingParams) -> Extras:
        """Biases and banned words as token ids; a word of a single token becomes a bias of -inf."""
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
