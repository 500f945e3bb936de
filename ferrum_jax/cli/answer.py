"""Generates one answer, as text or JSON lines, and reports its timings. The chat reports its answers in the same form."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from typing import Any

from ferrum_jax.cli import common
from ferrum_jax.cli.writer import say


@dataclasses.dataclass
class Answer:
    """The result of one generation. `finish_reason` is "stop", "length", "abort" if it was interrupted, or "error", with the
    reason in `error`."""

    text: str
    finish_reason: str
    usage: dict[str, int]
    timings: dict[str, float | None]
    error: str = ""


def answer(model: Any, ids: list[int], params: Any, emit: Callable[[str, list[int]], None]) -> Answer:
    """Streams the continuation of `ids` to `emit(text, token_ids)` until it ends."""
    before = model.timings()
    with common.users_mistake():
        stream = model.stream(ids, params, common.adapter_of(model))
    pieces: list[str] = []
    count = 0
    try:
        for text, tokens in stream:
            pieces.append(text)
            count += len(tokens)
            emit(text, tokens)
    finally:
        stream.close()
    spent = {key: value - before[key] for key, value in model.timings().items()}
    return Answer(
        text="".join(pieces),
        finish_reason=stream.finish_reason,
        usage={"prompt_tokens": len(ids), "completion_tokens": count},
        timings={
            "load_s": round(before["load_s"], 3),
            "compile_s": round(spent["compile_s"], 3),
            "prefill_tok_s": common.rate(spent["prefill_tokens"], spent["prefill_s"]),
            "decode_tok_s": common.rate(spent["decode_tokens"], spent["decode_s"]),
        },
        error=stream.error,
    )


def print_stats(result: Answer) -> None:
    """Prints the numbers at the end of the JSON lines as one line on standard error."""
    timings, usage = result.timings, result.usage
    cached = f" ({usage['cached_tokens']} read before)" if usage.get("cached_tokens") else ""
    say(
        f"finish {result.finish_reason} | prompt {usage['prompt_tokens']} tokens{cached}, "
        f"{common.figure(timings['prefill_tok_s'])} tok/s | generated {usage['completion_tokens']} tokens, "
        f"{common.figure(timings['decode_tok_s'])} tok/s | load {common.figure(timings['load_s'], 2)} s, "
        f"compile {common.figure(timings['compile_s'], 2)} s",
        sys.stderr,
    )


def encode(model: Any, messages: list[dict[str, str]], template: dict[str, Any] | None) -> list[int]:
    """The token ids of a conversation, rendered by the chat template with these arguments. If `template` is None, those of its
    last message as it is. Raises ValueError if the template rejects the messages, or the context has no room for an answer.
    """
    if template is not None:
        ids = model.encode_chat(messages, **template)
    else:
        ids = model.tokenizer.encode(messages[-1]["content"], add_special=True, parse_special=True)
    if not ids:
        raise ValueError("the prompt has no tokens")
    if len(ids) >= model.max_seq_len:
        raise ValueError(f"{len(ids):,} tokens leave no room in a context of {model.max_seq_len:,}")
    return ids
