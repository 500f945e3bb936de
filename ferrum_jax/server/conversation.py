"""From the messages of a request to the tokens of a prompt, and from its answers to reasoning, content and calls."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Sequence
from typing import Any

from ferrum_jax.engine import Request
from ferrum_jax.errors import ChatTemplateError
from ferrum_jax.parsing import Parser, Tools, grammars, told
from ferrum_jax.server.bodies import SamplingBody
from ferrum_jax.server.calling import NO_TOOLS, Calling, prepare, with_objects
from ferrum_jax.server.errors import ApiError
from ferrum_jax.server.service import Service
from ferrum_jax.structured import Structured
from ferrum_jax.tokenizer import TextStream


def text_of(content: Any, field: str) -> str:
    """The text of a message's content. ApiError for a part that is not text."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise ApiError(400, f"{field}: must be a text or a list of parts", param=field)
    for i, part in enumerate(content):
        if not isinstance(part, dict):
            raise ApiError(400, f'{field}.{i}: a part is an object, such as {{"type": "text", ...}}', param=f"{field}.{i}")
        if part.get("type") not in ("text", "input_text", "output_text") or not isinstance(part.get("text"), str):
            raise ApiError(
                400, f"{field}.{i}: {part.get('type')!r:.40} is not supported here; only text is", param=f"{field}.{i}"
            )
    return "".join(part["text"] for part in content)


class Turn:
    """The prompt for one turn of a conversation, and how the answers to it are read.

    Args:
      messages: as `Model.render_chat` takes them; the arguments of calls may be JSON texts.
      template: variables of the chat template.
      calling: the functions that may be called.
      goes_on: the last message is not complete; the answer goes on after its text.
      beginning: the ids of tokens that the answer begins with.

    Attributes:
      prompt: the text of the prompt.
      begun: the text of the last message, if the answer goes on from it.
      beginning: the text of the tokens that the answer begins with.
    """

    def __init__(
        self,
        service: Service,
        messages: list[dict[str, Any]],
        template: dict[str, Any],
        calling: Calling = NO_TOOLS,
        *,
        goes_on: bool = False,
        beginning: Sequence[int] = (),
    ):
        self.service, self.messages, self.template, self.calling, self.goes_on = service, messages, template, calling, goes_on
        self.dialect = service.dialect(bool(calling.tools))
        self._told = bool(calling.tools) and service.tells_tools
        if self._told:
            self.dialect = dataclasses.replace(self.dialect, calls=told.PARSER)
        if calling.tools and self.dialect.calls == "none":
            message = "tools: the model's chat template does not show how it calls functions; --tool-parser can say so"
            raise ApiError(400, message, param="tools", code="unsupported_parameter")
        self.prompt = self.begun = self.beginning = ""
        self._beginning = beginning

    def encode(self) -> list[int]:
        """The tokens of the prompt. Raises ValueError for messages that the template does not take."""
        template = dict(self.template)
        if self.goes_on:
            content = self.messages[-1].get("content") if self.messages else None
            self.begun = content.rstrip() if isinstance(content, str) else ""
            if not self.begun:
                raise ValueError("messages: the last one has no text to go on from")
            template["add_generation_prompt"] = False
        self.prompt = self._render(template)
        if self.goes_on:
            at = self.prompt.rfind(self.begun)
            if at < 0:
                raise ValueError("messages: the chat template changes the last one, so that the answer cannot go on from it")
            self.prompt = self.prompt[: at + len(self.begun)]
        ids = self.service.engine.model.encode_rendered(self.prompt)
        return ids + self._begin(ids) if self._beginning else ids

    def _render(self, template: dict[str, Any]) -> str:
        if not self._told:
            return render(self.service, self.messages, list(self.calling.tools) or None, template)
        how, messages = told.instructions(self.calling.tools), told.as_texts(prepare(self.messages), text_of)
        with contextlib.suppress(ChatTemplateError):  # a template that does not take a message of the system
            prompt = render(self.service, told.with_instructions(messages, how, system=True), None, template)
            if how in prompt:
                return prompt
        return render(self.service, told.with_instructions(messages, how, system=False), None, template)

    def submit(self, body: SamplingBody, limit: int | None, **given: Any) -> list[Request]:
        """Submits the prompt. `limit`: of the answer's tokens; None: as many as are left of the context."""
        ids = self.encode()
        if (self.calling.forced or self.calling.strict) and (grammar := self._grammar()):
            if "structured" in given:
                raise ValueError("tool_choice: a call that is forced or strict does not go with another format of the answer")
            given["structured"] = grammar
        elif "structured" in given:
            given["structured"] = self._after_reasoning(given["structured"])
        given["max_tokens"] = max(1, self.service.engine.context - len(ids)) if limit is None else limit
        if body.skip_special_tokens is not False:
            given["special_tokens"] = self.service.shown(self.dialect)
        params, adapter = body.sampling(**given), self.service.adapter(body.model)
        return self.service.engine.submit(ids, params, adapter, begun=len(self._beginning)).choices

    def parser(self) -> Parser:
        """For one answer, with its beginning as the first text."""
        tools = Tools.of(self.calling.callable, self.dialect.new_id) if self.calling.tools else None
        return Parser(self.dialect, tools, prompt=self.prompt, begun=self.begun, parallel=self.calling.parallel)

    def _grammar(self) -> Structured | None:
        """What the answer has to be, so that it calls a function, or calls functions only as their schemas say."""
        calling = self.calling
        if self.begun:
            if not calling.forced:
                return None
            raise ValueError("tool_choice: a call cannot be forced in an answer that has begun")
        lark = grammars.answer(
            self.dialect,
            {tool["function"]["name"]: tool["function"]["parameters"] for tool in calling.callable},
            self._controls(),
            forced=calling.forced,
            parallel=calling.parallel and not (calling.forced and calling.named),
            **self._thinks(),
        )
        if lark is None and calling.forced:
            raise ValueError(f"tool_choice: there is no grammar for the calls of this model ({self.dialect.calls})")
        return None if lark is None else Structured(lark=lark)

    def _after_reasoning(self, given: Structured) -> Structured:
        """What the answer has to be, if only its content has a format, and the model may think before it."""
        lark = None if self.begun else grammars.after_reasoning(self.dialect, given.rule, self._controls(), **self._thinks())
        return given if lark is None else Structured(lark=lark)

    def _controls(self) -> dict[str, int]:
        """The control tokens among the marks, by their texts."""
        tokenizer = self.service.engine.model.tokenizer
        return {tokenizer.token_bytes(token).decode(): token for token in self.service.shown(self.dialect)}

    def _thinks(self) -> dict[str, bool]:
        """Whether the answer may begin with reasoning, and whether the prompt has opened it."""
        thinking, end = self.dialect.thinking, self.prompt.rstrip()
        opened = thinking is not None and end.endswith(thinking.open.rstrip())
        return {"opened": opened, "thinks": thinking is None or not end.endswith(thinking.close)}

    def _begin(self, prompt: list[int]) -> list[int]:
        """The tokens that the answer begins with."""
        ids, tokenizer = begun(self.service, self._beginning), self.service.engine.model.tokenizer
        stream = TextStream(tokenizer, before=prompt, shown=self.service.shown(self.dialect))
        self.beginning = "".join(map(stream.push, ids))  # without an unfinished character, which comes with the answer
        return ids


def begun(service: Service, ids: Sequence[int]) -> list[int]:
    """Tokens that an answer begins with, checked. Raises ValueError for one that the model could not go on after."""
    tokenizer = service.engine.model.tokenizer
    for id in ids:
        if not 0 <= id < tokenizer.vocab_size:
            raise ValueError(f"answer_token_ids: {id} is not the id of a token; there are {tokenizer.vocab_size}")
        if id in tokenizer.eos_ids:
            raise ValueError(f"answer_token_ids: the token {id} ends an answer, so that it cannot go on")
    return list(ids)


def render(service: Service, messages: list[dict[str, Any]], tools: Any, template: dict[str, Any]) -> str:
    """The text of a conversation. Most templates take the arguments of calls as objects, some as texts."""
    model, prepared = service.engine.model, prepare(messages)
    if "developer" not in (model.tokenizer.chat_template or ""):
        prepared = [message | {"role": "system"} if message.get("role") == "developer" else message for message in prepared]
    try:
        return model.render_chat(with_objects(prepared), tools, **template)
    except ChatTemplateError:
        if not any("tool_calls" in message for message in prepared):
            raise
        with contextlib.suppress(ChatTemplateError):
            return model.render_chat(prepared, tools, **template)
        raise
