"""Examples from a JSONL file: plain texts, prompts with completions, and conversations.

A text is tokenized whole, and which bytes are to be learned decides which tokens are. Of a conversation it is what the chat
template marks with `{% generation %}`. A template without such marks is rendered before and after each of the assistant's
messages, and what it adds for one is learned. Where it renders a message in another way once others follow (without its
reasoning, say), that is learned only if it is the last one.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ferrum_jax.errors import FerrumError
from ferrum_jax.finetune.packing import Example
from ferrum_jax.templates import marking

if TYPE_CHECKING:
    from ferrum_jax.model import Model

_FORMS = 'an object with "text", with "prompt" and "completion", or with "messages"'
Span = tuple[int, int]  # of characters


def read_examples(path: str | Path, model: Model, length: int) -> tuple[list[Example], int]:
    """The examples of a file, one of these objects a line: {"text"}, {"prompt", "completion"}, {"messages", "tools"}.

    Args:
      path: the file, UTF-8.
      model: whose tokenizer and chat template are used.
      length: the most tokens of an example; a longer text becomes several, others are cut at the end.

    Returns:
      The examples, and how many were cut.

    Raises:
      ValueError: for a line that is none of these or cannot be used; it is named.
    """
    examples: list[Example] = []
    cut = 0
    with open(path, encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                found = example_of(_object(line), model)
            except (ValueError, FerrumError) as error:
                raise ValueError(f"{path}: line {number}: {error}") from error
            pieces = list(_pieces(found, length))
            cut += len(found.tokens) > length and found.learned is not None
            examples += pieces
    if not examples:
        raise ValueError(f"{path}: has no examples; each line must be {_FORMS}")
    return examples, cut


def example_of(record: Mapping[str, Any], model: Model) -> Example:
    """The example of one object.

    Raises ValueError if it is none of the known ones."""
    if "messages" in record:
        text, spans = _conversation(record, model)
        return _spanned(model.encode_rendered(text), text, spans, model)
    texts = [record.get(name) for name in (("text",) if "text" in record else ("prompt", "completion"))]
    if not all(isinstance(text, str) for text in texts) or not texts[-1]:
        raise ValueError(f"must be {_FORMS}; texts must be strings, and the last one not empty")
    whole = "".join(map(str, texts))
    tokenizer = model.tokenizer
    ids = tokenizer.encode(whole, add_special=True, parse_special=len(texts) > 1)
    eos = tokenizer.eos_id
    end = [] if eos is None or ids[-1] == eos else [eos]
    if len(texts) == 1:
        return Example([*ids, *end])
    found = _spanned(ids, whole, [(len(str(texts[0])), len(whole))], model)
    return Example([*found.tokens, *end], [*(found.learned or ()), *(True for _ in end)])


def _object(line: str) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        raise ValueError(f"is not JSON; it must be {_FORMS}") from None
    if not isinstance(found, dict):
        raise ValueError(f"must be {_FORMS}")
    return found


def _conversation(record: Mapping[str, Any], model: Model) -> tuple[str, list[Span]]:
    """The rendered messages, and where the assistant's are."""
    messages, tools = record["messages"], record.get("tools")
    if not isinstance(messages, list) or not messages or not all(isinstance(message, dict) for message in messages):
        raise ValueError("messages must be a list of objects with role and content")
    whole = model.render_chat(messages, tools, add_generation_prompt=False)
    with marking() as marks:
        marked = model.render_chat(messages, tools, add_generation_prompt=False)
    if spans := _between(marked, marks, whole):
        return whole, spans
    for number, message in enumerate(messages):
        if message.get("role") == "assistant" and number:
            before = model.render_chat(messages[:number], tools, add_generation_prompt=True)
            after = model.render_chat(messages[: number + 1], tools, add_generation_prompt=False)
            if after.startswith(before) and whole.startswith(after):
                spans.append((len(before), len(after)))
    if not spans:
        raise ValueError(
            "there is no message of the assistant to learn: it must come after another message, and the chat template must not "
            "change what it rendered before it"
        )
    return whole, spans


def _between(marked: str, marks: tuple[str, str], whole: str) -> list[Span]:
    """What is between marks, as places in the text without them; nothing if they changed the text."""
    parts = re.split("|".join(map(re.escape, marks)), marked)
    ends = list(itertools.accumulate(map(len, parts)))
    spans = zip(ends[0::2], ends[1::2], strict=False)
    return [(start, end) for start, end in spans if end > start] if "".join(parts) == whole else []


def _spanned(ids: Sequence[int], text: str, spans: Sequence[Span], model: Model) -> Example:
    """The tokens of a text; those that begin inside the spans are learned."""
    ends = []
    at = 0
    for id in ids:
        at += len(model.tokenizer.token_bytes(id))
        ends.append(at)
    size = len(text.encode())
    surplus = at - size  # a token that begins the text, or a space before it
    if surplus < 0:
        raise ValueError("the tokenizer changes this text, so its parts cannot be told apart")
    inside = [(len(text[:start].encode()), len(text[:end].encode())) for start, end in spans]
    begins = [end - surplus for end in (0, *ends[:-1])]
    return Example(list(ids), [any(start <= begin < end for start, end in inside) for begin in begins])


def _pieces(example: Example, length: int) -> Iterator[Example]:
    """The example in pieces of up to `length` tokens that have a target; only the first one if parts of it are not learned."""
    count = 1 if example.learned is not None else len(example.tokens)
    for start in range(0, count, length):
        part = slice(start, start + length)
        piece = Example(example.tokens[part], example.learned and example.learned[part])
        if piece.targets.any():
            yield piece
