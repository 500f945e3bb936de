"""The items of a response: how those of a request become messages, and how an answer becomes items."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from typing import Any

from ferrum_jax.parsing import Arguments, Call, CallEnd, Content, Event, Reasoning
from ferrum_jax.server.conversation import text_of
from ferrum_jax.server.errors import ApiError

_ROLES = ("user", "assistant", "system", "developer")


def messages_of(items: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages that items of a request stand for. Reasoning, text and calls that follow each other are one message."""
    found: list[dict[str, Any]] = []
    for i, item in enumerate(items):
        kind, field = item.get("type", "message"), f"input.{i}"
        if kind == "message":
            role, content = item.get("role"), item.get("content")
            if role not in _ROLES or not isinstance(content, str | list):
                raise _wrong(field, f"a message has a role ({', '.join(_ROLES)}) and content")
            part = {"role": role, "content": text_of(content, f"{field}.content")}
        elif kind == "function_call":
            part = {"role": "assistant", "tool_calls": [_call(item, field)]}
        elif kind == "function_call_output":
            output = text_of(item.get("output"), f"{field}.output")
            part = {"role": "tool", "tool_call_id": _text(item, "call_id", field), "content": output}
        elif kind == "reasoning":
            texts = item.get("content") or item.get("summary") or []
            if not isinstance(texts, list) or not all(isinstance(text, dict) for text in texts):
                raise _wrong(field, "the content of reasoning is a list of texts")
            part = {"role": "assistant", "reasoning_content": "".join(str(text.get("text", "")) for text in texts)}
        else:
            raise _wrong(field, f"{kind!r:.40} is not supported here")
        last = found[-1] if found else {}
        if part["role"] == "assistant" == last.get("role") and not ("content" in part and "content" in last):
            last |= part | {"tool_calls": last.get("tool_calls", []) + part.get("tool_calls", [])}
        else:
            found.append(part)
    return [{"content": ""} | message for message in found]


def _call(item: dict[str, Any], field: str) -> dict[str, Any]:
    function = {"name": _text(item, "name", field), "arguments": _text(item, "arguments", field)}
    return {"id": _text(item, "call_id", field), "type": "function", "function": function}


def _text(item: dict[str, Any], key: str, field: str) -> str:
    if not isinstance(item.get(key), str):
        raise _wrong(f"{field}.{key}", "must be a text")
    return item[key]


def _wrong(field: str, message: str) -> ApiError:
    return ApiError(400, f"{field}: {message}", param=field)


class Items:
    """The items of an answer, as its events make them.

    Args:
      send: makes a server-sent event of a type and its content.
      logprobs: writes log-probabilities.
    """

    def __init__(self, send: Callable[..., bytes], logprobs: Callable[[Any], list[dict[str, Any]]]):
        self.items: list[dict[str, Any]] = []
        self._send, self._logprobs, self._open = send, logprobs, ""
        self._scored: list[Any] = []  # of tokens whose text was not told yet

    def take(self, events: Sequence[Event], scored: Sequence[Any] | None) -> bytes:
        """Adds the events of a piece, and the log-probabilities of its tokens. Returns what is sent about them."""
        self._scored += scored or ()
        sent = b""
        for event in events:
            match event:
                case Reasoning(text):
                    sent += self._begin("reasoning") + self._add("reasoning_text", text)
                case Content(text):
                    sent += self._begin("message") + self._add("output_text", text)
                case Call(id, name):
                    sent += self.close() + self._begin("function_call", call_id=id, name=name, arguments="")
                case Arguments(text):
                    self.items[-1]["arguments"] += text
                    sent += self._send("response.function_call_arguments.delta", **self._where(), delta=text)
                case CallEnd(complete):
                    sent += self.close("completed" if complete else "incomplete")
        if self._scored and self._open == "message":
            sent += self._add("output_text", "")
        return sent

    def close(self, status: str = "completed") -> bytes:
        """Ends the item that has begun, if there is one."""
        if not self._open:
            return b""
        item, where, kind = self.items[-1], self._where(), self._open
        item["status"], self._open = status, ""
        if kind == "function_call":
            sent = self._send("response.function_call_arguments.done", **where, name=item["name"], arguments=item["arguments"])
        else:
            part = item["content"][0]
            told = {"text": part["text"]} | ({"logprobs": part["logprobs"]} if "logprobs" in part else {})
            sent = self._send(f"response.{part['type']}.done", **where, content_index=0, **told)
            sent += self._send("response.content_part.done", **where, content_index=0, part=part)
        return sent + self._send("response.output_item.done", output_index=where["output_index"], item=item)

    def end(self, status: str) -> bytes:
        """Ends the answer, which has at least one item."""
        sent = b"" if self.items else self._begin("message")
        if self._scored and self._open == "message":
            sent += self._add("output_text", "")
        return sent + self.close(status)

    def _begin(self, kind: str, **content: Any) -> bytes:
        """Begins an item, unless one of this kind is open."""
        if kind == self._open:
            return b""
        sent, self._open = self.close(), kind
        prefix = {"reasoning": "rs", "message": "msg", "function_call": "fc"}[kind]
        item: dict[str, Any] = {"id": f"{prefix}_{uuid.uuid4().hex}", "type": kind, "status": "in_progress"} | content
        if kind != "function_call":
            item["content"] = []
        if kind == "reasoning":
            item["summary"] = []
        if kind == "message":
            item["role"] = "assistant"
        self.items.append(item)
        sent += self._send("response.output_item.added", output_index=len(self.items) - 1, item=item)
        if kind != "function_call":
            part: dict[str, Any] = {"type": "reasoning_text", "text": ""}
            if kind == "message":
                part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
            sent += self._send("response.content_part.added", **self._where(), content_index=0, part=part)
            item["content"].append(part)
        return sent

    def _add(self, kind: str, text: str) -> bytes:
        """A further piece of text of the item that is open."""
        part, told = self.items[-1]["content"][0], {}
        part["text"] += text
        if kind == "output_text":
            told["logprobs"] = self._logprobs(self._scored)
            part["logprobs"] += told["logprobs"]
        self._scored = []
        return self._send(f"response.{kind}.delta", **self._where(), content_index=0, delta=text, **told)

    def _where(self) -> dict[str, Any]:
        return {"item_id": self.items[-1]["id"], "output_index": len(self.items) - 1}
