"""Turns a user's input (texts, lists of token ids, conversations) into token ids, and checks them against the model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ferrum_jax import chat, checks
from ferrum_jax.errors import UnsupportedModelError
from ferrum_jax.runtime import Runtime

if TYPE_CHECKING:
    from ferrum_jax.templates import Limits

Prompt = str | Sequence[int]


class Prompts(Runtime):
    """A runtime that understands prompts. template_limits: the time and memory for rendering a chat template."""

    template_limits: Limits | None = None

    def render_chat(
        self,
        messages: list[dict],
        tools: list[dict] | None = None,
        add_generation_prompt: bool = True,
        chat_template: str | None = None,
        **template_kwargs: Any,
    ) -> str:
        """See `Model.render_chat`."""
        if isinstance(messages, list | tuple) and not messages:
            raise ValueError("messages: a conversation needs at least one message")
        templates = self.tokenizer.chat_templates
        template = chat.choose(templates, chat_template, tools=tools is not None)
        if template is None:
            raise UnsupportedModelError("this model does not have a chat template; give it plain text instead")
        given = {
            f"{name}_token": "" if id is None else self.tokenizer.token_bytes(id).decode("utf-8", "replace")
            for name, id in (("bos", self.tokenizer.bos_id), ("eos", self.tokenizer.eos_id))
        } | template_kwargs
        unknown = given.keys() - {"bos_token", "eos_token", "documents"} - chat.variables(template)
        if unknown and (unknown := unknown.difference(*map(chat.variables, templates.values()))):
            raise ValueError(f"{min(unknown)}: no chat template of this model reads a variable with this name")
        asked: dict[str, Any] = {"tools": tools, "add_generation_prompt": add_generation_prompt}
        asked["limits"] = self.template_limits
        return chat.render(template, messages, **asked, **given)

    def encode_chat(self, messages: list[dict], tools: list[dict] | None = None, **template_kwargs: Any) -> list[int]:
        """The token ids of a conversation, rendered for an answer."""
        return self.encode_rendered(self.render_chat(messages, tools, **template_kwargs))

    def encode_rendered(self, text: str) -> list[int]:
        """The token ids of a text from `render_chat`, with only one beginning-of-text token if both the template and the
        tokenizer add one."""
        ids = self.encode(text)
        doubled = len(ids) > 1 and ids[0] == ids[1] == self.tokenizer.bos_id
        return ids[1:] if doubled else ids

    def encode(self, prompt: Prompt) -> list[int]:
        """The token ids of a prompt. Raises ValueError if it is empty, fills the context or has an id out of range."""
        ids = checks.prompt(prompt)
        if isinstance(ids, str):
            ids = self.tokenizer.encode(ids, add_special=True, parse_special=True) if ids else []
        (ids,) = self.checked([ids])
        if len(ids) >= self.max_seq_len:
            raise ValueError(f"the prompt has {len(ids)} tokens and leaves no room in a context of {self.max_seq_len}")
        return ids

    def checked(self, batch: Sequence[Sequence[int]]) -> list[list[int]]:
        """The batch as lists of int. Raises ValueError if one is empty or longer than the context or has an id out of range."""
        lists = checks.batch(batch)
        for ids in lists:
            if not ids:
                raise ValueError("an empty prompt: at least one token is needed")
            if len(ids) > self.max_seq_len:
                raise ValueError(f"{len(ids)} tokens do not fit into a context of {self.max_seq_len}")
            wrong = next((i for i in ids if not 0 <= i < self.config.vocab_size), None)
            if wrong is not None:
                raise ValueError(f"token id {wrong} is out of range: the vocabulary has {self.config.vocab_size} ids")
        return lists
