"""Checks arguments. An error says in one sentence what was given and what would be right.

The one idea: each kind of argument (token ids, a prompt, a batch, a path) has one function here, so that all methods raise the
same errors for it. All raise ValueError.
"""

from __future__ import annotations

import contextlib
import operator
import os
from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Any

import numpy as np


def kind(value: object) -> str:
    """Describes a value in an error message."""
    return "None" if value is None else f"{type(value).__name__} ({value!r:.40})"


def _is_list(value: object) -> bool:
    """Whether a value has ordered items: a list, an array with at least one axis, an iterator; but not a text."""
    has_items = isinstance(value, Iterable) and not isinstance(value, str | bytes | Mapping | Set)
    return has_items and getattr(value, "ndim", 1) > 0


def text(value: object) -> str:
    """One text."""
    if not isinstance(value, str):
        hint = "; encode_batch takes several" if isinstance(value, list | tuple) else ""
        raise ValueError(f"a text must be a str, not {kind(value)}{hint}")
    return value


def texts(value: Any) -> list[str]:
    """A list of texts."""
    if not _is_list(value):
        raise ValueError(f"texts must be a list of texts, not {kind(value)}; for one text write [text]")
    return [text(part) for part in value]


def path(value: object, what: str) -> str:
    """A path or a name; `what` names the argument."""
    if not isinstance(value, str | os.PathLike):
        raise ValueError(f"{what} must be a path or a name, not {kind(value)}")
    return os.fspath(value)


def token_ids(value: Any) -> list[int]:
    """A list of integers, from integers of any type or an array with one axis. Booleans and floats are errors."""
    if not _is_list(value):
        hint = f"; for one id write [{value}]" if isinstance(value, int) else ""
        raise ValueError(f"token ids must be a list of integers, not {kind(value)}{hint}")
    ids: list[int] = []
    for item in value.tolist() if hasattr(value, "tolist") else value:
        if isinstance(item, bool | np.bool_):
            raise ValueError(f"token ids must be integers, not bool ({item})")
        try:
            ids.append(operator.index(item))
        except TypeError:
            raise ValueError(f"token ids must be integers, not {kind(item)}") from None
    return ids


def prompt(value: Any) -> str | list[int]:
    """One prompt: a text or its token ids."""
    if isinstance(value, str):
        return value
    if isinstance(value, Mapping) or (isinstance(value, list | tuple) and any(isinstance(part, Mapping) for part in value)):
        raise ValueError("a prompt must be a text or a list of token ids, not messages; a conversation goes to chat(messages)")
    if isinstance(value, list | tuple) and any(isinstance(part, str) for part in value):
        raise ValueError(
            "a prompt must be one text or one list of token ids, not a list of texts; generate(prompts) takes several"
        )
    if not _is_list(value):
        raise ValueError(f"a prompt must be a text or a list of token ids, not {kind(value)}")
    return token_ids(value)


def prompts(value: Any) -> list[Any]:
    """A list of prompts, which `prompt` checks one by one."""
    if isinstance(value, Mapping) or (isinstance(value, list | tuple) and any(isinstance(part, Mapping) for part in value)):
        raise ValueError("prompts must be texts or lists of token ids, not messages; a conversation goes to chat(messages)")
    if isinstance(value, str | bytes):
        raise ValueError("prompts must be a list of prompts; for one prompt write [prompt]")
    if not _is_list(value):
        raise ValueError(f"prompts must be a list of texts or of lists of token ids, not {kind(value)}")
    listed = list(value)
    if any(isinstance(part, int | np.integer) or getattr(part, "ndim", 1) == 0 for part in listed):
        raise ValueError("prompts must be a list of prompts; for one prompt write [prompt]")
    return listed


def batch(value: Any) -> list[list[int]]:
    """A list of lists of token ids."""
    if isinstance(value, str) or (isinstance(value, Sequence) and any(isinstance(part, str) for part in value)):
        raise ValueError("a batch must be lists of token ids, not texts; tokenizer.encode(text) gives the ids of a text")
    if not _is_list(value):
        raise ValueError(f"a batch must be lists of token ids, not {kind(value)}")
    return [token_ids(part) for part in value]


def window(value: Any, length: int, context: int) -> int:
    """The tokens of a window over a text of `length` tokens; None means one window."""
    if length < 2:
        raise ValueError(f"the text has {length or 'no'} token{'s' * (length != 1)}; a window needs at least two tokens")
    try:
        size = length if value is None else operator.index(value)
    except TypeError:
        size = 0
    if isinstance(value, bool) or size < 2:
        raise ValueError(f"window must be None or an integer; a window needs at least two tokens, not {kind(value)}")
    if size > length:
        raise ValueError(f"a window needs at least two tokens and no more than the text has ({length}), not {size}")
    if size > context:
        what = f"the text of {length} tokens" if value is None else f"a window of {size} tokens"
        raise ValueError(f"{what} does not fit into a context of {context}; give a window of at most that")
    return size


def dtype_name(value: Any) -> Any:
    """The name of a NumPy or JAX dtype or scalar type. An array is described in words, anything else is returned as it is."""
    if isinstance(value, type | np.dtype):
        with contextlib.suppress(TypeError):
            return np.dtype(value).name
    return kind(value) if hasattr(value, "ndim") else value
