"""A request as a directory: what it has said, what was asked of it, and the KV pages of its text, as one orbax checkpoint.

Restoring puts full pages into the prefix cache and lets the request wait like any other; it finds them there, computes the
few tokens behind the last full page again, and goes on with the same tokens, because noise depends on seed and position.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import orbax.checkpoint as ocp

from ferrum_jax.engine.request import Request
from ferrum_jax.engine.sequence import Sequence
from ferrum_jax.errors import ModelFileError
from ferrum_jax.kv_cache import KVCache
from ferrum_jax.sampling_params import SamplingParams

if TYPE_CHECKING:
    from ferrum_jax.engine.engine import Engine

_VERSION = 1


def save(engine: Engine, request: Request, path: Path) -> None:
    """Writes a request to a new directory. FileExistsError where there is something."""
    path = path.absolute()
    if path.exists():
        raise FileExistsError(f"{path} exists; a snapshot needs a new directory")
    with engine._driving:  # nothing is started meanwhile; what runs already writes behind the text that is known
        with engine._lock:
            sequence, pool = request._sequence, engine._scheduler.pool
            facts = {
                "version": _VERSION,
                "identity": engine.identity,
                "params": dataclasses.asdict(request.params),
                "seed": request._seed,
                "prompt": request.prompt_token_ids,
                "output": list(request.token_ids),
                "logprobs": request.logprobs,
                "prompt_logprobs": request.prompt_logprobs,
                "finish_reason": request.finish_reason,
            }
            pages = sequence.pages[: sequence.written // pool.page_size] if sequence.state == "running" else []
            if not pages:
                pages, _ = pool.find_prefix([*request.prompt_token_ids, *request.token_ids])
            pages = [] if -1 in pages else pages
            for page in pages:
                pool.share(page)
        try:
            content = engine._device.read_pages(pages) if pages else None
        finally:
            with engine._lock:
                for page in reversed(pages):
                    pool.give_back(page)
    tree: dict[str, Any] = {"facts": np.frombuffer(json.dumps(facts).encode(), np.uint8)}
    if content is not None:
        tree["pages"] = content.pages
        if content.scales is not None:
            tree["scales"] = content.scales
    with ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(path, tree)


def load(engine: Engine, path: Path) -> Request:
    """The request of a directory, waiting in the engine or finished as it was."""
    path = path.absolute()
    try:
        with ocp.PyTreeCheckpointer() as checkpointer:
            tree = checkpointer.restore(path)
        facts = json.loads(bytes(np.asarray(tree["facts"], np.uint8)))
        version = facts["version"]
    except Exception as error:
        raise ModelFileError(f"{path}: is not a snapshot of a request ({type(error).__name__}: {error})") from error
    if version != _VERSION or facts["identity"] != engine.identity:
        raise ValueError(
            f"{path}: is a snapshot of another model or engine: {facts['identity']} (version {version}), "
            f"not {engine.identity} (version {_VERSION})"
        )
    params = SamplingParams(**{**facts["params"], "n": 1})
    text = [*facts["prompt"], *facts["output"]]
    limit = engine._check(len(facts["prompt"]), params)
    if engine.config.prefix_cache and "pages" in tree:
        content = KVCache(tree["pages"], tree.get("scales"), engine._device.kv_dtype)
        _fill_prefix_cache(engine, text, content)
    with engine._lock:
        sequence = Sequence(engine._take_number(), text, len(facts["prompt"]), limit)
        request = Request(engine, sequence, params, facts["seed"], engine._extras(params))
        sequence.owner, sequence.cacheable = request, params.prompt_logprobs is None
        request.prompt_logprobs = _pairs(facts["prompt_logprobs"])
        request._watcher.take(facts["output"], _pairs(facts["logprobs"]) or [])
        if facts["finish_reason"] is None:
            engine._scheduler.add(sequence)
            engine._lock.notify_all()
        else:
            request._watcher.flush()
            request._watcher.finish_reason, sequence.state = facts["finish_reason"], "finished"
    return request


def _fill_prefix_cache(engine: Engine, text: list[int], content: KVCache) -> None:
    """Puts the pages of a text that are not cached yet into free ones."""
    pool = engine._scheduler.pool
    size = pool.page_size
    with engine._driving:
        with engine._lock:
            taken: list[tuple[int, int]] = []
            parent = pool.root
            for number in range(content.num_pages):
                tokens = text[number * size : (number + 1) * size]
                found = pool.find(parent, tokens)
                if found is None:
                    if not pool.free:
                        break
                    taken.append((number, pool.take()))
                    parent = pool.register(taken[-1][1], parent, tokens)
                else:
                    parent = found[1]
        if taken:
            numbers = np.asarray([number for number, _ in taken])
            part = KVCache(content.pages[:, numbers], _rows(content.scales, numbers), content.dtype)
            engine._device.write_pages([page for _, page in taken], part)
        with engine._lock:
            for _, page in reversed(taken):
                pool.give_back(page)


def _rows(array: Any, numbers: np.ndarray) -> Any:
    return None if array is None else array[:, numbers]


def _pairs(found: list | None) -> list | None:
    """Log-probabilities with tuples again where JSON has lists."""
    return None if found is None else [None if row is None else [tuple(pair) for pair in row] for row in found]
