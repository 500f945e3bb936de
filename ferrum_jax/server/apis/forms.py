"""What OpenAI's answers share: their head and the end of a stream, usage, timings, log-probabilities."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import Any

from ferrum_jax.engine import Request
from ferrum_jax.server.bodies import OpenAiBody
from ferrum_jax.server.errors import ApiError
from ferrum_jax.server.events import event
from ferrum_jax.server.service import Service
from ferrum_jax.tokenizer import Tokenizer

Scored = list[tuple[int, float]]  # a token's log-probability, then those of the best ones
_LEAST = -9999.0  # stands for minus infinity, which JSON does not have


class OpenAiAnswer:
    """The base of answers. `prompts`: one request for each prompt."""

    def __init__(self, service: Service, body: OpenAiBody, prompts: Sequence[Request], kind: str, prefix: str):
        self.prompts, self.tokenizer = prompts, service.engine.model.tokenizer
        self.head: dict[str, Any] = {
            "id": f"{prefix}-{uuid.uuid4().hex}",
            "object": kind,
            "created": int(time.time()),
            "model": body.model or service.settings.name,
            "system_fingerprint": service.fingerprint,
        }
        self.wants_usage, self.wants_ids = body.wants_usage, bool(body.return_token_ids)
        self.as_ids = bool(body.return_tokens_as_token_ids)
        if self.wants_usage:
            self.head["usage"] = None

    def counts(self, requests: Sequence[Request]) -> dict[str, Any]:
        found = usage(self.prompts, requests)
        if reasoning := count_tokens(self.tokenizer, self.reasoning()):
            found["completion_tokens_details"] = {"reasoning_tokens": reasoning}
        return {"usage": found, "timings": timings(requests[0])}

    def reasoning(self) -> str:
        """The reasoning in the answers."""
        return ""

    def ids(self, **lists: Sequence[int]) -> dict[str, Any]:
        """Lists of token ids, if the client asks for them."""
        return lists if self.wants_ids else {}

    def end(self, requests: Sequence[Request]) -> bytes:
        """The end of a stream."""
        counts = event(self.head | {"choices": []} | self.counts(requests)) if self.wants_usage else b""
        return counts + b"data: [DONE]\n\n"

    def failed(self, error: ApiError) -> bytes:
        """OpenAI's client raises an error only from a data line."""
        return event(error.body())


def count_tokens(tokenizer: Tokenizer, text: str) -> int:
    """The tokens of a part of an answer, as many as it would have alone."""
    return len(tokenizer.encode(text, add_special=False)) if text else 0


def usage(prompts: Sequence[Request], requests: Sequence[Request]) -> dict[str, Any]:
    """The tokens of some completions. `prompts`: one request for each prompt, because `n` completions share theirs."""
    prompt = sum(len(request.prompt_token_ids) for request in prompts)
    made = sum(len(request.token_ids) for request in requests)
    cached = sum(request.cached_tokens for request in prompts)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": made,
        "total_tokens": prompt + made,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


def timings(request: Request) -> dict[str, Any]:
    """How long one completion took, under llama.cpp's names. Reading the prompt includes the choice of the first token."""
    times, made = request.times, len(request.token_ids)
    computed = len(request.prompt_token_ids) - request.cached_tokens
    reading, writing = times.first_token - times.admitted, times.last_token - times.first_token
    return {
        "queue_ms": round(1e3 * (times.admitted - times.arrived), 3),
        "cache_n": request.cached_tokens,
        "prompt_n": computed,
        "prompt_ms": round(1e3 * reading, 3),
        "prompt_per_second": round(computed / reading, 3) if reading > 0 else None,
        "predicted_n": made,
        "predicted_ms": round(1e3 * writing, 3),
        "predicted_per_second": round((made - 1) / writing, 3) if writing > 0 else None,
    }


def token_text(tokenizer: Tokenizer, token: int, as_id: bool = False) -> tuple[str, list[int]]:
    """The text of a token as far as it is one, or instead its id, and its bytes."""
    piece = tokenizer.token_bytes(token) if token < tokenizer.vocab_size else b""
    return f"token_id:{token}" if as_id else piece.decode("utf-8", "replace"), list(piece)


def chat_logprobs(tokenizer: Tokenizer, scored: Sequence[Scored], best: int, as_ids: bool = False) -> dict[str, Any]:
    """The log-probabilities of some tokens, as in a chat completion, with those of the `best` alternatives."""

    def entry(token: int, logprob: float) -> dict[str, Any]:
        text, piece = token_text(tokenizer, token, as_ids)
        return {"token": text, "logprob": max(logprob, _LEAST), "bytes": piece}

    content = [entry(*found[0]) | {"top_logprobs": [entry(*pair) for pair in found[1 : best + 1]]} for found in scored]
    return {"content": content, "refusal": None}


def prompt_logprobs(tokenizer: Tokenizer, scored: Sequence[Scored | None]) -> list[dict[str, Any] | None]:
    """The log-probabilities of a prompt, as vLLM writes them: for each token a mapping from ids."""
    return [
        None
        if found is None
        else {str(id): {"logprob": max(value, _LEAST), "decoded_token": token_text(tokenizer, id)[0]} for id, value in found}
        for found in scored
    ]


class TextLogprobs:
    """Log-probabilities as in a text completion, whose tokens have offsets in the text. `add` gives those of further tokens."""

    def __init__(self, tokenizer: Tokenizer, as_ids: bool = False):
        self._tokenizer, self._offset, self._as_ids = tokenizer, 0, as_ids

    def add(self, token_ids: Sequence[int], scored: Sequence[Scored | None]) -> dict[str, Any]:
        """scored: None for a token without, the first one of a prompt."""
        tokens, offsets, chosen, best = [], [], [], []
        for token, found in zip(token_ids, scored, strict=True):
            text = token_text(self._tokenizer, token)[0]
            tokens.append(self._name(token))
            offsets.append(self._offset)
            self._offset += 0 if self._tokenizer.is_control(token) else len(text)
            chosen.append(None if found is None else max(found[0][1], _LEAST))
            top = {} if found is None else {self._name(id): max(value, _LEAST) for id, value in found[1:]}
            best.append(None if found is None else top)
        return {"tokens": tokens, "token_logprobs": chosen, "top_logprobs": best, "text_offset": offsets}

    def _name(self, token: int) -> str:
        return token_text(self._tokenizer, token, self._as_ids)[0]
