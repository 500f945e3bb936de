"""The cache on this machine: models, built kernels, compiled programs.

The idea: one root for everything, and three rules for files that are run as code (kernels, programs). A file carries the digest
of its content, so a damaged one is made again and never run. It appears complete or not at all, even after a crash. And code is
not loaded from a folder that another user owns or can write to.

    <root>/hub  wheels  records  tmp  locks     models: `ferrum_jax.hub.cache`
    <root>/native                               kernels: `pallas_kernels.native.build`
    <root>/xla  xla/programs                    XLA's cache, and programs: `ferrum_jax.program_store`

The root is $FERRUM_JAX_CACHE, else $XDG_CACHE_HOME/ferrum_jax, else ~/.cache/ferrum_jax.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_DIGEST = 32  # bytes, after the content
_STALE = 3600.0  # seconds after which unfinished work without a lock counts as abandoned
_WORK = ".work-"
_NOBODY = 65534  # in a sandbox, the owner of files that the system owns outside it
_OTHERS = stat.S_IWGRP | stat.S_IWOTH
_ELSEWHERE = "FERRUM_JAX_CACHE sets another place"


def cache_root() -> Path:
    """The directory that everything is kept under; it need not exist."""
    if own := os.environ.get("FERRUM_JAX_CACHE"):
        return Path(own).expanduser().absolute()
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared) if shared and os.path.isabs(shared) else Path("~/.cache").expanduser()) / "ferrum_jax"


# ---- folders


def distrusted(folder: Path) -> str | None:
    """Why code is not loaded from a folder, in words: another user owns it or a folder above it, or can write there; else None.
    A folder that does not exist yet is judged by the folders above it."""
    if not hasattr(os, "getuid"):  # Windows: the cache is in the user's own profile
        return None
    folder = Path(os.path.realpath(folder))
    for place in (folder, *folder.parents):
        try:
            found = place.stat()
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            return f"{place}: {error.strerror}"
        if found.st_uid not in (0, os.getuid()) and (place == folder or found.st_uid != _NOBODY):
            return f"{place} belongs to another user"
        # Further up, the sticky bit is enough, and so is a group with this user alone, which some systems give every user.
        others = found.st_mode & _OTHERS
        if place != folder and (found.st_mode & stat.S_ISVTX or (others == stat.S_IWGRP and _is_own(found.st_gid))):
            continue
        if others:
            return f"other users can write to {place}"
    return None


def _is_own(gid: int) -> bool:
    """Whether a group is the user's private one."""
    import grp
    import pwd

    try:
        group, user = grp.getgrgid(gid), pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return False
    return group.gr_name == user and set(group.gr_mem) <= {user}


def make_private(folder: Path) -> None:
    """Makes a folder for code that only its user can write to. A folder of the user that others could write to is emptied
    first.

    Raises OSError, which says why and how to choose another place, if that is impossible or code would not be loaded from it.
    """
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise type(error)(f"{folder} cannot be made: {error.strerror} ({_ELSEWHERE})") from error
    found = folder.stat()
    if hasattr(os, "getuid") and found.st_uid == os.getuid() and found.st_mode & _OTHERS:
        folder.chmod(0o700)
        for entry in folder.iterdir():
            _remove(entry)
    if reason := distrusted(folder):
        raise PermissionError(f"{reason}, so no code is kept there ({_ELSEWHERE})")


# ---- files


def read_sealed(path: Path) -> bytes | None:
    """The content of a file that `write_sealed` wrote, or None if it is damaged; FileNotFoundError if there is none."""
    sealed = path.read_bytes()
    content = sealed[:-_DIGEST]
    return content if hashlib.sha256(content).digest() == sealed[-_DIGEST:] else None


def write_sealed(path: Path, content: bytes) -> None:
    """Writes content followed by its digest, in a folder for code."""
    make_private(path.parent)
    with workspace(path.parent) as folder:
        fresh = folder / "content"
        fresh.write_bytes(content + hashlib.sha256(content).digest())
        put(fresh, path)


def put(fresh: Path, path: Path) -> None:
    """Moves a finished file to its place in one step, after all of it has reached the disk."""
    with open(fresh, "rb+") as file:
        os.fsync(file.fileno())
    os.replace(fresh, path)


@contextlib.contextmanager
def workspace(folder: Path) -> Iterator[Path]:
    """A directory in `folder` for unfinished work, removed afterwards; those left by killed processes are removed, too."""
    for entry in folder.iterdir():
        if entry.name.startswith((_WORK, "tmp")) and _is_abandoned(entry):
            _remove(entry)
    made = Path(tempfile.mkdtemp(prefix=_WORK, dir=folder))
    try:
        with open(made / "lock", "w") as lock:
            if _taken(lock):
                lock.write("held while this process lives\n")
                lock.flush()
            yield made
    finally:
        _remove(made)


def _taken(lock: IO[str]) -> bool:
    """Takes a lock, unless another process holds it or locks are not supported here."""
    if fcntl is None:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _is_abandoned(entry: Path) -> bool:
    """Whether the process that worked here is gone. A lock is written to while it is held, so an empty one proves nothing."""
    try:
        with open(entry / "lock", "r+") as lock:
            if lock.read(1):
                return _taken(lock)
    except OSError:
        pass
    with contextlib.suppress(OSError):
        return time.time() - entry.lstat().st_mtime > _STALE
    return False


def _remove(entry: Path) -> None:
    if entry.is_dir() and not entry.is_symlink():
        shutil.rmtree(entry, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            entry.unlink()
