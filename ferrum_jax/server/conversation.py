"""From the messages of a request to the tokens of a prompt."""

from __future__ import annotations

from typing import Any

from ferrum_jax.server.errors import ApiError
from ferrum_jax.server.service import Service
from ferrum_jax.tokenizer import TextStream


def with_roles(service: Service, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages as the model's template takes them: a developer is a system, unless the template has that role."""
    if "developer" in (service.engine.model.tokenizer.chat_template or ""):
        return messages
    return [message | {"role": "system"} if message.get("role") == "developer" else message for message in messages]


def text_of(content: str | list[dict[str, Any]], field: str) -> str:
    """The text of a message's content. ApiError for a part that is not text."""
    if isinstance(content, str):
        return content
    for i, part in enumerate(content):
        if not isinstance(part, dict):
            raise ApiError(400, f'{field}.{i}: a part is an object, such as {{"type": "text", ...}}', param=f"{field}.{i}")
        if part.get("type") not in ("text", "input_text", "output_text") or not isinstance(part.get("text"), str):
            raise ApiError(
                400, f"{field}.{i}: {part.get('type')!r:.40} is not supported here; only text is", param=f"{field}.{i}"
            )
    return "".join(part["text"] for part in content)


def encode(
    service: Service, messages: list[dict[str, Any]], template: dict[str, Any], *, goes_on: bool = False, tools: Any = None
) -> list[int]:
    """The tokens of a conversation, ready for an answer.

    Args:
      messages: as `Model.render_chat` takes them.
      template: variables of the chat template.
      goes_on: the last message is not complete; the answer goes on after its text.
      tools: JSON schemas of functions.

    Raises:
      ValueError: for messages that the template does not take.
    """
    model, messages = service.engine.model, with_roles(service, messages)
    if not goes_on:
        return model.encode_chat(messages, tools, **template)
    begun = messages[-1].get("content") if messages else None
    if not isinstance(begun, str) or not (begun := begun.rstrip()):
        raise ValueError("messages: the last one has no text to go on from")
    text = model.render_chat(messages, tools, **template | {"add_generation_prompt": False})
    at = text.rfind(begun)
    if at < 0:
        raise ValueError("messages: the chat template changes the last one, so that the answer cannot go on from it")
    return model.encode_rendered(text[: at + len(begun)])


def room(service: Service, ids: list[int]) -> int:
    """The tokens that an answer may have: as many as are left of the context."""
    return max(1, service.engine.context - len(ids))


def begun(service: Service, ids: list[int]) -> list[int]:
    """Tokens that an answer begins with, checked. Raises ValueError for one that the model could not go on after."""
    tokenizer = service.engine.model.tokenizer
    for id in ids:
        if not 0 <= id < tokenizer.vocab_size:
            raise ValueError(f"answer_token_ids: {id} is not the id of a token; there are {tokenizer.vocab_size}")
        if id in tokenizer.eos_ids:
            raise ValueError(f"answer_token_ids: the token {id} ends an answer, so that it cannot go on")
    return ids


def text_of_last(service: Service, ids: list[int], count: int) -> str:
    """The text of the last `count` tokens of a prompt, as if the model had made them; without an unfinished character."""
    first = len(ids) - count
    stream = TextStream(service.engine.model.tokenizer, before=ids[:first])
    return "".join(map(stream.push, ids[first:]))
