"""The result of a generation."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Completion:
    """The continuation of one prompt.

    Attributes:
      text: the generated text, without the end token. Appended to the prompt's text it gives the text of all tokens; a
        character that begins in the prompt's last token is part of it.
      token_ids: the generated tokens, including the end token.
      finish_reason: "stop" (an end token or a stop string), "length", "error" (`error` says why), or from an engine "abort".
      logprobs: for each token a list of (id, logprob), the sampled token first; None if they were not requested.
      prompt_token_ids: the tokens of the prompt.
      prompt_logprobs: like logprobs, for the tokens of the prompt; its first entry is None.
      error: what went wrong, or "".
    """

    text: str
    token_ids: list[int]
    finish_reason: str
    logprobs: list[list[tuple[int, float]]] | None
    prompt_token_ids: list[int]
    prompt_logprobs: list[list[tuple[int, float]] | None] | None = None
    error: str = ""
