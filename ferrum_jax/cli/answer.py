"""From messages to an answer: the one way for a prompt and for JSON lines, and what the chat's are told in.

Messages become token ids by the model's chat template or as they are, and ids become text piece by piece.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from typing import Any

from ferrum_jax.cli import common
from ferrum_jax.cli.writer import say


@dataclasses.dataclass
class Answer:
    """What one generation gave. `finish_reason` is "stop", "length", "abort" when it was interrupted, or "error" with what
    went wrong."""

    text: str
    finish_reason: str
    usage: dict[str, int]
    timings: dict[str, float | None]
    error: str = ""


def answer(model: Any, ids: list[int], params: Any, emit: Callable[[str, list[int]], None]) -> Answer:
    """Stream the continuation of `ids` into `emit(text, token_ids)` until it ends."""
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
    """One line on standard error with the figures that JSON lines end with."""
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
    """Token ids of a conversation by the chat template with these arguments; with None, of its last message as it is.

    ValueError where the template refuses the messages, or when no room is left in the context for an answer.
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
