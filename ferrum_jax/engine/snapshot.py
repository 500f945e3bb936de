"""A request as a directory: what it has said, what was asked of it, and the KV pages of its text, as one orbax checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from ferrum_jax.errors import ModelFileError
from ferrum_jax.kv_cache import KVCache

_VERSION = 2


def save(path: Path, identity: str, facts: dict[str, Any], content: KVCache | None) -> None:
    """Writes a new directory. identity: of the model and engine that made it; facts: what JSON can hold; content: full
    pages, on the host. FileExistsError where there is something."""
    path = path.absolute()
    if path.exists():
        raise FileExistsError(f"{path} exists; a snapshot needs a new directory")
    header = {"version": _VERSION, "identity": identity, **facts}
    tree: dict[str, Any] = {"facts": np.frombuffer(json.dumps(header).encode(), np.uint8)}
    if content is not None:
        tree["pages"] = content.pages
        if content.scales is not None:
            tree["scales"] = content.scales
    with _checkpointer() as checkpointer:
        checkpointer.save(path, tree)


def load(path: Path, identity: str, kv_dtype: str) -> tuple[dict[str, Any], KVCache | None]:
    """The facts and the pages of a directory. ModelFileError where it is no snapshot, ValueError where it is of another
    model or engine."""
    path = path.absolute()
    try:
        with _checkpointer() as checkpointer:
            tree = checkpointer.restore(path)
        facts = json.loads(bytes(np.asarray(tree["facts"], np.uint8)))
        found = facts["identity"], facts["version"]
    except Exception as error:
        raise ModelFileError(f"{path}: is not a snapshot of a request ({type(error).__name__}: {error})") from error
    if found != (identity, _VERSION):
        raise ValueError(
            f"{path}: is a snapshot of another model or engine: {found[0]} (version {found[1]}), not {identity} "
            f"(version {_VERSION})"
        )
    return facts, KVCache(tree["pages"], tree.get("scales"), kv_dtype) if "pages" in tree else None


def _checkpointer() -> Any:
    import orbax.checkpoint  # takes a second, and most programs never write a snapshot

    return orbax.checkpoint.PyTreeCheckpointer()
