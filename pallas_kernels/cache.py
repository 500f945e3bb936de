"""Where this machine's copies of things are kept: models, built kernels, compiled programs.

The idea: one root for all of it, and for what is run as code (kernels, programs) three rules. A file carries the digest of
its content, so a damaged one is made again and never run. It appears whole or not at all, through a crash too. And a folder
that another user owns or can write to is not taken code from.

    <root>/hub  wheels  records  tmp  locks     models: `ferrum_jax.hub.cache`
    <root>/native                               kernels: `pallas_kernels.native.build`
    <root>/xla  xla/programs                    XLA's cache, and programs: `ferrum_jax.program_store`

The root is $FERRUM_JAX_CACHE, else $XDG_CACHE_HOME/ferrum_jax, else ~/.cache/ferrum_jax.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
import tempfile
import time
from pathlib import Path

_DIGEST = 32  # bytes, after the content
_STALE = 3600.0  # seconds after which what a killed process left is swept away
_FRESH = ".fresh-"


def cache_root() -> Path:
    """The directory that everything is kept under; it need not exist."""
    if own := os.environ.get("FERRUM_JAX_CACHE"):
        return Path(own).expanduser().absolute()
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared) if shared and os.path.isabs(shared) else Path("~/.cache").expanduser()) / "ferrum_jax"


def distrusted(folder: Path) -> str | None:
    """Why no code is loaded from a folder, in words: another user owns it or what it lies in, or can write there. None where
    code is; a folder that is not there yet is judged by what it would lie in."""
    if not hasattr(os, "getuid"):  # Windows: the profile that the cache lies in is its user's own
        return None
    trusted, folder = (0, os.getuid()), Path(os.path.realpath(folder))
    for place in (folder, *folder.parents):
        with contextlib.suppress(FileNotFoundError):
            found = place.stat()
            if found.st_uid not in trusted:
                return f"{place} belongs to another user"
            # Where others may write, only the sticky bit keeps them from putting another folder in this one's place.
            if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and (place == folder or not found.st_mode & stat.S_ISVTX):
                return f"other users can write to {place}"
    return None


def make_private(folder: Path) -> None:
    """Makes a folder for code, writable by its user alone. OSError where that cannot be or code would not be loaded from it."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if reason := distrusted(folder):
        raise PermissionError(f"{reason}; chmod go-w it, or FERRUM_JAX_CACHE sets another place")


def read_sealed(path: Path) -> bytes | None:
    """The content of a file that `write_sealed` wrote; None where it is damaged. FileNotFoundError where there is none."""
    with open(path, "rb") as file:
        sealed = file.read()
    content = sealed[:-_DIGEST]
    return content if hashlib.sha256(content).digest() == sealed[-_DIGEST:] else None


def write_sealed(path: Path, content: bytes) -> None:
    """Content with its digest after it, in place in one step and on disk before it is; leftovers of others are swept away."""
    sweep(path.parent)
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=_FRESH, delete=False) as file:
        try:
            file.write(content + hashlib.sha256(content).digest())
            file.flush()
            os.fsync(file.fileno())
            os.replace(file.name, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(file.name)
            raise


def sweep(folder: Path) -> None:
    """Removes what killed processes left unfinished in a folder."""
    with contextlib.suppress(OSError):
        for entry in os.scandir(folder):
            with contextlib.suppress(OSError):
                if entry.name.startswith((_FRESH, "tmp")) and time.time() - entry.stat(follow_symlinks=False).st_mtime > _STALE:
                    _remove(entry)


def _remove(entry: os.DirEntry) -> None:
    import shutil

    if entry.is_dir(follow_symlinks=False):
        shutil.rmtree(entry.path, ignore_errors=True)
    else:
        os.unlink(entry.path)
