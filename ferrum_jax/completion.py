"""What a generation gives back."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Completion:
    """What was generated for one prompt. `token_ids` includes the end token, `text` does not: the prompt's text and it are
    the decoding of the whole (a character that the prompt began is given out here). finish_reason is "stop" (end token or
    stop string), "length", "error" (then `error` says what went wrong), or from an engine "abort"; logprobs: per token a
    list of (id, logprob), the chosen token first; prompt_logprobs: the same for the tokens of the prompt, None for the
    first."""

    text: str
    token_ids: list[int]
    finish_reason: str
    logprobs: list[list[tuple[int, float]]] | None
    prompt_token_ids: list[int]
    prompt_logprobs: list[list[tuple[int, float]] | None] | None = None
    error: str = ""
