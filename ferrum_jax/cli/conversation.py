"""A conversation as a sequence in an engine: each turn computes only its new tokens.

Nothing is dropped from a conversation silently. It is rendered again for every turn. As far as the rendered text begins with
the text of earlier turns, the token ids of that part stay the same, and the engine's prefix cache finds them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import signal
import threading
import time
from collections.abc import Callable, Iterator
from queue import SimpleQueue
from typing import Any

from ferrum_jax.cli import common
from ferrum_jax.cli.answer import Answer
from ferrum_jax.engine import Engine, EngineConfig

Message = dict[str, Any]


def open_engine(model: Any) -> Engine:
    """An engine for one conversation up to the model's context, with a cache that grows."""
    return Engine(model, EngineConfig(max_seqs=1, initial_pages=128))


class Transcript:
    """The token ids of a growing conversation. Ids that were read or sampled stay the same, even if the tokenizer would split
    the whole text differently."""

    def __init__(self, model: Any):
        self._model = model
        self._parts: list[tuple[str, list[int]]] = []  # rendered and answered, in turn
        tokenizer = model.tokenizer
        self._joins = tokenizer.encode("") in ([], [tokenizer.bos_id])  # the tokenizer adds nothing at the end of a text

    def encode(self, text: str) -> list[int]:
        """The token ids of a conversation that was rendered for an answer."""
        ends, at = [0], 0
        for part, _ in self._parts:
            if not text.startswith(part, at):
                break
            at += len(part)
            ends.append(at)
        for count in range(len(ends) - 1, 0, -1):
            if (rest := self._apart(text[ends[count] :])) is not None:
                break
        else:
            count, rest = 0, self._model.encode_rendered(text)
        self._parts = [*self._parts[:count], (text[ends[count] :], rest)]
        return [token for _, ids in self._parts for token in ids]

    def said(self, text: str, ids: list[int]) -> None:
        """Adds the answer to the text that was encoded last."""
        tokenizer = self._model.tokenizer
        if ids and ids[-1] in tokenizer.eos_ids:
            ids = ids[:-1]
        if b"".join(map(tokenizer.token_bytes, ids)) == text.encode():  # not equal after a stop string
            self._parts.append((text, ids))

    def _apart(self, text: str) -> list[int] | None:
        """The ids of the end of a longer text, or None if they could depend on the text before. They do not if it begins with a
        control token."""
        tokenizer = self._model.tokenizer
        ids = tokenizer.encode(text, add_special=False, parse_special=True) if self._joins else []
        if not ids:
            return ids if self._joins else None
        begins = tokenizer.is_control(ids[0]) and text.startswith(tokenizer.token_bytes(ids[0]).decode(errors="replace"))
        return ids if begins else None


class Conversation:
    """The `messages` between a user and `model`, and how the next one is answered: with sampling `params`, a `system` message
    and the chat template's arguments `template`. If `template` is None, every message is completed on its own, as it is.

    `asked`: the messages of the last answer, given or attempted; `used`: the tokens of the conversation after it."""

    def __init__(
        self, model: Any, engine: Any, params: Any, *, system: str | None = None, template: dict[str, Any] | None = None
    ):
        self.model, self.engine, self.params, self.system, self.template = model, engine, params, system, template
        self.messages: list[Message] = []
        self.asked: list[Message] = []
        self.used = 0
        self._transcript = Transcript(model)

    def clear(self, messages: list[Message] | None = None) -> None:
        """Replaces the conversation with these messages, or with none."""
        self.messages, self.used = list(messages or ()), 0
        last = max((i for i, message in enumerate(self.messages) if message["role"] == "user"), default=-1)
        self.asked = self.messages[: last + 1]

    def ids(self, messages: list[Message]) -> list[int]:
        """The token ids to continue. Raises ValueError if the template rejects the messages or there is no room for an
        answer."""
        if self.template is None:
            ids = self.model.tokenizer.encode(messages[-1]["content"], add_special=True, parse_special=True)
        else:
            opening = [{"role": "system", "content": self.system}] if self.system is not None else []
            ids = self._transcript.encode(self.model.render_chat([*opening, *messages], **self.template))
        if not ids:
            raise ValueError("the prompt has no tokens")
        if len(ids) >= self.engine.context:
            raise ValueError(f"{len(ids):,} tokens leave no room in a context of {self.engine.context:,}")
        return ids

    def answer(self, messages: list[Message], show: Callable[[str], object]) -> Answer:
        """Answers the last of some messages and passes the text to `show` while it is generated. The messages and the answer
        become part of the conversation together, or not at all. Ctrl-C ends the answer early. Raises what `ids` raises."""
        ids = self.ids(messages)
        room = self.engine.context - len(ids)
        params = dataclasses.replace(self.params, max_tokens=min(self.params.max_tokens or room, room))
        self.asked = messages
        arrived: SimpleQueue[Any] = SimpleQueue()
        with ctrl_c(lambda: arrived.put(_STOP)):
            compiled, before, begin = self.model.timings()["compile_s"], self.engine.metrics(), time.perf_counter()
            request = self.engine.submit(ids, params, common.adapter_of(self.model))
            threading.Thread(target=_follow, args=(request, arrived), daemon=True).start()
            came: list[tuple[float, int]] = []  # seconds, and number of tokens
            try:
                while (output := arrived.get()) is not None:
                    if output is _STOP:
                        self.engine.abort(request)
                        continue
                    came.append((time.perf_counter() - begin, len(output.token_ids)))
                    show(output.text)
            finally:
                self.engine.abort(request)
            kept = request.finish_reason in ("stop", "length") or (request.finish_reason == "abort" and request.text)
            if kept and self.template is not None:
                self.messages = [*messages, {"role": "assistant", "content": request.text}]
                self.used = len(ids) + len(request.token_ids)
                self._transcript.said(request.text, list(request.token_ids))
        computed = int(self.engine.metrics()["prompt_tokens"] - before["prompt_tokens"])
        (first, one), (last, _) = (came[0], came[-1]) if came else ((0.0, 0), (0.0, 0))
        made, timings = len(request.token_ids), self.model.timings()
        waited = timings["compile_s"] - compiled
        return Answer(
            text=request.text,
            finish_reason=request.finish_reason or "error",
            usage={"prompt_tokens": len(ids), "cached_tokens": len(ids) - computed if came else 0, "completion_tokens": made},
            timings={
                "load_s": round(timings["load_s"], 3),
                "compile_s": round(waited, 3),
                "prefill_tok_s": None if waited else common.rate(computed, first),
                "decode_tok_s": None if waited else common.rate(made - one, last - first),
            },
            error=request.error,
        )


_STOP = object()


def _follow(request: Any, arrived: SimpleQueue[Any]) -> None:
    """Puts the outputs of a request into a queue, and None after the last."""
    try:
        for output in request:
            arrived.put(output)
    finally:
        arrived.put(None)


@contextlib.contextmanager
def ctrl_c(action: Callable[[], object]) -> Iterator[None]:
    """While the block runs, Ctrl-C calls `action` and does nothing else."""
    previous = signal.signal(signal.SIGINT, lambda *_: action())
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
