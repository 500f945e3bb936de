"""A request as a directory: its output, its parameters, and the KV pages of its text, in one orbax checkpoint.

The contents are checked before they reach an engine, like those of a model file: a request that cannot run would block others.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from ferrum_jax.errors import ModelFileError
from ferrum_jax.sampling_params import SamplingParams
from ferrum_jax.state import DecodeState, KVCache

_VERSION = 4
_MAX_FACTS = 1 << 28  # bytes
_REASONS = (None, "stop", "length", "abort", "error")


class Saved(NamedTuple):
    """A snapshot: `content`, on the host, is the part of the text's first `full_pages` pages that layers look at from there on:
    the last ones of each pool."""

    params: SamplingParams
    seed: int
    adapter: str | None
    prompt: list[int]
    begun: int  # the last tokens of the prompt that belong to the output's grammar
    output: list[int]
    logprobs: list | None
    prompt_logprobs: list | None
    finish_reason: str | None
    full_pages: int
    content: DecodeState | None


def free(path: Path) -> Path:
    """The absolute path of a new directory; FileExistsError if it exists."""
    path = path.absolute()
    if path.exists():
        raise FileExistsError(f"{path} exists; a snapshot needs a new directory")
    return path


def save(path: Path, identity: str, facts: dict[str, Any], content: DecodeState | None) -> None:
    """Writes a new directory. identity: of the model and engine that made it; facts: data for JSON; content: full pages, on the
    host."""
    header = {"version": _VERSION, "identity": identity, **facts}
    tree: dict[str, Any] = {"facts": np.frombuffer(json.dumps(header).encode(), np.uint8)}
    if content is not None:
        tree |= _arrays(content)
    with _checkpointer() as checkpointer:
        checkpointer.save(free(path), tree)


def load(path: Path, identity: str, vocab: int, like: DecodeState) -> Saved:
    """Reads a directory. `vocab`: the number of token ids; `like`: a state whose pages have the required shape. ModelFileError
    if it is not a snapshot or is damaged, ValueError if it belongs to another model or engine."""
    try:
        if not (path / "_METADATA").is_file():
            raise FileNotFoundError("it has no _METADATA")
        with _checkpointer() as checkpointer:
            parts = dict(checkpointer.metadata(path).item_metadata.tree)
            if np.prod(parts["facts"].shape, dtype=float) > _MAX_FACTS:
                raise ValueError("its facts are too large")
            facts = json.loads(bytes(_part(checkpointer, path, {"facts": parts.pop("facts")})["facts"].astype(np.uint8)))
            found = facts["identity"], facts["version"]
    except Exception as error:
        raise ModelFileError(f"{path}: is not a snapshot of a request ({type(error).__name__}: {error})") from error
    if found != (identity, _VERSION):
        raise ValueError(
            f"{path}: is a snapshot of another model or engine: {found[0]} (version {found[1]}), not {identity} "
            f"(version {_VERSION})"
        )
    try:
        saved = _checked(facts, vocab)
        if not parts:
            return saved
        _check_pages(parts, like, saved.full_pages, len(saved.prompt) + len(saved.output))
        with _checkpointer() as checkpointer:
            content = _part(checkpointer, path, parts)
        return saved._replace(content=_state(content, like))
    except Exception as error:
        raise ModelFileError(f"{path}: is a damaged snapshot: {error}") from error


# Inside


def _checked(facts: dict[str, Any], vocab: int) -> Saved:
    """The checked facts; an error says which one is impossible."""
    for field in ("prompt", "output"):
        ids = facts[field]
        if not isinstance(ids, list) or not all(type(id) is int and 0 <= id < vocab for id in ids):
            raise ValueError(f"{field} must be a list of token ids below {vocab}")
    prompt, output = facts["prompt"], facts["output"]
    if not prompt:
        raise ValueError("prompt is empty")
    if type(facts["begun"]) is not int or not 0 <= facts["begun"] <= len(prompt):
        raise ValueError(f"begun must be a number of the prompt's tokens, not {facts['begun']!r}")
    params = dataclasses.replace(SamplingParams(**facts["params"]), n=1)  # a snapshot has one of its choices
    if type(facts["seed"]) is not int or not 0 <= facts["seed"] < 2**32:
        raise ValueError(f"seed must be an integer below 2**32, not {facts['seed']!r}")
    reason = facts["finish_reason"]
    if reason not in _REASONS:
        raise ValueError(f"finish_reason must be one of {_REASONS}, not {reason!r}")
    if len(output) > params.max_tokens - (reason is None):
        raise ValueError(f"output has {len(output)} tokens where max_tokens is {params.max_tokens}")
    logprobs = _pairs("logprobs", facts["logprobs"], params.logprobs, range(len(output), len(output) + 1), vocab)
    rows = facts["prompt_logprobs"]
    if params.prompt_logprobs is not None:
        if not isinstance(rows, list) or rows[:1] != [None]:
            raise ValueError("prompt_logprobs must be a list that begins with null")
        rows = rows[1:]
    prompt_logprobs = _pairs("prompt_logprobs", rows, params.prompt_logprobs, range(len(prompt)), vocab)
    if prompt_logprobs is not None:
        prompt_logprobs = [None, *prompt_logprobs]
    known = prompt, facts["begun"], output, logprobs, prompt_logprobs, reason, facts["full_pages"]
    return Saved(params, facts["seed"], facts["adapter"], *known, None)


def _pairs(field: str, rows: Any, best: int | None, lengths: range, vocab: int) -> list | None:
    """Rows of (id, log-probability), the chosen one and the `best`, as tuples instead of JSON's lists."""
    if best is None and rows is None:
        return None
    if best is None or not isinstance(rows, list) or len(rows) not in lengths:
        raise ValueError(f"{field} do not go with the tokens")
    width = 1 + min(best, vocab)
    pairs = [[(id, value) for id, value in row] for row in rows]
    if not all(
        len(row) == width and all(type(i) is int and 0 <= i < vocab and type(x) is float for i, x in row) for row in pairs
    ):
        raise ValueError(f"{field} must be lists of {width} pairs of a token id and a number")
    return pairs


def _check_pages(parts: dict[str, Any], like: DecodeState, full: int, tokens: int) -> None:
    """Checks that the arrays hold pages like those of a state, in each pool at most `full`, the number that these tokens
    fill."""
    expected = _arrays(like)
    if parts.keys() != expected.keys():
        raise ValueError(f"it has {', '.join(parts)} where this engine has {', '.join(expected)}")
    if type(full) is not int or not 0 < full <= tokens // like.page_size:
        raise ValueError(f"{full} full pages of {like.page_size} tokens where the text has {tokens}")
    for name, right in expected.items():
        shape, dtype = parts[name].shape, np.dtype(parts[name].dtype)
        if (shape[:1], shape[2:], dtype) != (right.shape[:1], right.shape[2:], right.dtype):
            raise ValueError(f"{name} {dtype}{list(shape)} are not pages of this engine, {right.dtype}{list(right.shape)}")
    state = _state(parts, like)
    for part, most in zip(state.parts, [*[full] * len(like.pools), 1], strict=False):
        counts = {array.shape[1] for array in jax.tree.leaves(part, is_leaf=lambda node: hasattr(node, "shape"))}
        if len(counts) > 1 or max(counts) > most:
            raise ValueError(f"{' and '.join(map(str, counts))} pages or states where there are {most}")


def _names(pool: int) -> tuple[str, str]:
    """The names of the arrays of a pool."""
    return ("pages", "scales") if pool == 0 else (f"pages_{pool}", f"scales_{pool}")


def _arrays(state: DecodeState) -> dict[str, Any]:
    """The arrays of a state, by name."""
    arrays: dict[str, Any] = {}
    for number, pool in enumerate(state.pools):
        arrays |= dict(zip(_names(number), (pool.pages, pool.scales), strict=True))
    for number, kept in enumerate(state.recurrent):
        arrays |= {f"recurrent_{number}_{name}": array for name, array in kept.items()}
    return {name: array for name, array in arrays.items() if array is not None}


def _state(arrays: dict[str, Any], like: DecodeState) -> DecodeState:
    """The state with these arrays, by the names of `_arrays`."""
    pools = []
    for number, pool in enumerate(like.pools):
        pages, scales = _names(number)
        pools.append(KVCache(arrays[pages], arrays.get(scales), pool.dtype))
    kept = ({name: arrays[f"recurrent_{number}_{name}"] for name in kind} for number, kind in enumerate(like.recurrent))
    return DecodeState(tuple(pools), tuple(kept))


def _part(checkpointer: Any, path: Path, parts: dict[str, Any]) -> dict[str, Any]:
    return checkpointer.restore(path, item=parts, partial_restore=True)


def _checkpointer() -> Any:
    import orbax.checkpoint  # takes a second, and few programs write snapshots

    return orbax.checkpoint.PyTreeCheckpointer()
