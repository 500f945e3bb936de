"""The parameters of one generation, checked when they are created."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Integral, Real
from typing import Any

import numpy as np

from ferrum_jax import checks
from ferrum_jax.structured import Structured

MAX_LOGPROBS = 64
MAX_CHOICES = 128  # completions of one prompt, as in OpenAI's API
_LARGEST = 1e30  # limit of a bias, within float32
MAX_BIAS = 1024  # limit of the ids that one request can bias or ban
_OF_AN_ENGINE: dict[str, Any] = {
    "logit_bias": None, "min_tokens": 0, "bad_words": (), "n": 1, "prompt_logprobs": None,
    "structured": None,
}  # fmt: skip


@dataclass(frozen=True)
class SamplingParams:
    """How to continue one prompt.

    Attributes:
      max_tokens: limit of the output in tokens, including the end token; at least 1.
      temperature: at least 0; 0 chooses the likeliest token and ignores top_k, top_p, min_p and seed.
      top_k: sample from the k likeliest tokens; 0 or -1 (stored as 0): from all.
      top_p: sample from the smallest set of likeliest tokens whose probabilities sum to at least this; in (0, 1].
      min_p: sample from the tokens with at least min_p times the probability of the likeliest; in [0, 1].
      repetition_penalty: greater than 0; the logit of an id that occurs in prompt or output is divided by it if positive and
        multiplied by it if negative, once for each id.
      seed: seed of the noise. Any integer, stored modulo 2**32; None or -1 (stored as None): a new one each time.
      stop: a text or a sequence of texts that end the generation, stored as a tuple.
      ignore_eos: continue after an end token.
      logprobs: the number of best tokens to report in addition to the sampled one, at most 64; None for no log-probabilities.
      presence_penalty: in [-2, 2]; subtracted from the logit of every id that occurs in the output.
      frequency_penalty: in [-2, 2]; subtracted from a logit once for each occurrence of the id in the output.
      logit_bias: numbers to add to the logits of some ids, -inf to ban one: a mapping from id to number, stored as pairs; or
        None.
      min_tokens: end tokens are not sampled before the output has this many tokens; in [0, max_tokens].
      bad_words: a text or a sequence of texts that the output never completes, stored as a tuple.
      special_tokens: the ids of control tokens whose names are part of the text, stored as a tuple, or True for all of them;
        others have no text, and the token that ends the output has none in any case.
      n: the number of completions of the prompt, at most 128; each has a different seed (seed, seed + 1, ...).
      prompt_logprobs: like logprobs, for the tokens of the prompt.
      structured: what the output has to be (`Structured`, or a dict of its fields). Tokens that cannot lead to it are not
        sampled, and end tokens only where it is complete; this is stronger than min_tokens, logit_bias and bad_words.

    Raises:
      ValueError: for a wrong type or value, naming the field and what would be right.
    """

    max_tokens: int = 16
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: str | Sequence[str] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | None = None
    min_tokens: int = 0
    bad_words: str | Sequence[str] = ()
    n: int = 1
    special_tokens: bool | Sequence[int] = ()
    prompt_logprobs: int | None = None
    structured: Structured | Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        self._integer("max_tokens", lambda v: v >= 1, "an integer >= 1")
        self._number("temperature", lambda v: v >= 0, "a finite number >= 0 (0 is greedy)")
        self._integer("top_k", lambda v: v >= -1, "an integer >= 1, or 0 or -1 for no limit")
        self._number("top_p", lambda v: 0 < v <= 1, "a number in (0, 1] (1 keeps every token)")
        self._number("min_p", lambda v: 0 <= v <= 1, "a number in [0, 1] (0 keeps every token)")
        self._number("repetition_penalty", lambda v: v > 0, "a finite number > 0 (1 is no penalty)")
        if self.seed is not None:
            self._integer("seed", lambda v: True, "None or an integer")
            object.__setattr__(self, "seed", None if self.seed == -1 else self.seed % 2**32)
        for field in ("logprobs", "prompt_logprobs"):
            if getattr(self, field) is not None:
                self._integer(field, lambda v: 0 <= v <= MAX_LOGPROBS, f"None or an integer in [0, {MAX_LOGPROBS}]")
        for field in ("presence_penalty", "frequency_penalty"):
            self._number(field, lambda v: -2 <= v <= 2, "a number in [-2, 2] (0 is no penalty)")
        self._integer("min_tokens", lambda v: 0 <= v <= self.max_tokens, "an integer in [0, max_tokens]")
        self._integer("n", lambda v: 1 <= v <= MAX_CHOICES, f"an integer in [1, {MAX_CHOICES}]")
        object.__setattr__(self, "top_k", max(self.top_k, 0))
        if not isinstance(self.ignore_eos, bool | np.bool_):
            raise self._error("ignore_eos", "True or False")
        object.__setattr__(self, "ignore_eos", bool(self.ignore_eos))
        self._ids("special_tokens")
        self._texts("stop")
        self._texts("bad_words")
        object.__setattr__(self, "logit_bias", self._pairs())
        if isinstance(self.structured, Mapping):
            try:
                object.__setattr__(self, "structured", Structured(**self.structured))
            except TypeError:
                raise self._error("structured", "a Structured or a dict of its fields") from None
        elif not isinstance(self.structured, Structured | None):
            raise self._error("structured", "None, a Structured or a dict of its fields")

    @property
    def of_an_engine(self) -> list[str]:
        """The fields in use that only an engine supports, because they need more than one row of numbers in each step."""
        return [field for field, plain in _OF_AN_ENGINE.items() if getattr(self, field) != plain]

    def row(self, seed: int, max_tokens: int) -> SamplingParams:
        """The part of the parameters that the sampler handles, without the fields that an engine handles."""
        return replace(self, **_OF_AN_ENGINE, seed=seed, max_tokens=max_tokens)

    def _error(self, field: str, right: str) -> ValueError:
        return ValueError(f"SamplingParams.{field} must be {right}; got {getattr(self, field)!r}")

    def _texts(self, field: str) -> None:
        texts = getattr(self, field)
        texts = (texts,) if isinstance(texts, str) else texts
        if not isinstance(texts, Sequence) or not all(isinstance(text, str) and text for text in texts):
            raise self._error(field, "a non-empty text or a sequence of non-empty texts")
        object.__setattr__(self, field, tuple(texts))

    def _ids(self, field: str) -> None:
        ids = getattr(self, field)
        if ids is True:
            return
        ids = () if ids is False else ids
        whole = isinstance(ids, Sequence) and all(isinstance(id, Integral) and not isinstance(id, bool) for id in ids)
        if not whole or any(id < 0 for id in ids):
            raise self._error(field, "True, or a sequence of token ids")
        object.__setattr__(self, field, tuple(map(int, ids)))

    def _pairs(self) -> tuple[tuple[int, float], ...] | None:
        """`logit_bias` as pairs, sorted by id. Stored pairs are accepted too, so that copies of the parameters work."""
        if self.logit_bias is None:
            return None
        try:
            pairs = sorted((operator.index(id), float(value)) for id, value in dict(self.logit_bias).items())
        except (TypeError, ValueError):
            pairs = [(-1, 0.0)]
        if len(pairs) > MAX_BIAS or any(id < 0 or not (value == -math.inf or abs(value) <= _LARGEST) for id, value in pairs):
            right = f"None or a mapping of at most {MAX_BIAS} token ids to numbers (-inf bans a token)"
            raise self._error("logit_bias", right)
        return tuple(pairs)

    def _integer(self, field: str, valid: Callable[[int], bool], right: str) -> None:
        value = getattr(self, field)
        if isinstance(value, bool) or not isinstance(value, Integral) or not valid(int(value)):
            raise self._error(field, right)
        object.__setattr__(self, field, int(value))

    def _number(self, field: str, valid: Callable[[float], bool], right: str) -> None:
        value = getattr(self, field)
        number = isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
        if not number or not valid(float(value)):
            raise self._error(field, right)
        object.__setattr__(self, field, float(value))


def one_sampling_params(value: object) -> SamplingParams:
    """One SamplingParams."""
    if not isinstance(value, SamplingParams):
        raise ValueError(f"params must be SamplingParams, as in SamplingParams(max_tokens=100), not {checks.kind(value)}")
    return value


def each_sampling_params(value: Any, count: int) -> list[SamplingParams]:
    """The parameters of each of `count` prompts, from one for all or a list with one for each."""
    if isinstance(value, SamplingParams):
        return [value] * count
    if not isinstance(value, Sequence) or isinstance(value, str) or not all(isinstance(p, SamplingParams) for p in value):
        raise ValueError(
            "params must be SamplingParams, one for all prompts or a list with one for each, as in "
            f"SamplingParams(max_tokens=100), not {checks.kind(value)}"
        )
    if len(value) != count:
        raise ValueError(f"{count} prompts and {len(value)} sampling parameters; give one for all or one for each")
    return list(value)
