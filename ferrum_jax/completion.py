"""What a generation gives back."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Completion:
    """What was generated for one prompt.

    Attributes:
      text: without the end token. The prompt's text and it are the decoding of the whole: a character that the prompt
        began is given out here.
      token_ids: with the end token.
      finish_reason: "stop" (end token or stop string), "length", "error" (`error` says why), or from an engine "abort".
      logprobs: for each token a list of (id, logprob), the chosen token first; None where none were asked for.
      prompt_token_ids: the prompt.
      prompt_logprobs: as logprobs, for the tokens of the prompt, None for the first.
      error: what went wrong.
    """

    text: str
    token_ids: list[int]
    finish_reason: str
    logprobs: list[list[tuple[int, float]]] | None
    prompt_token_ids: list[int]
    prompt_logprobs: list[list[tuple[int, float]] | None] | None = None
    error: str = ""
