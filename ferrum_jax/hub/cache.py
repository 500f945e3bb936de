"""The directories models are kept in, and how a file gets there whole.

The idea: bytes are written under `tmp/` while a lock of the same name is held, checked, flushed, and moved into place
by one `os.replace`. What lies in place is therefore whole, and what lies in `tmp/` without its lock held was left by a
process that died.

    <root>/hub/<owner>--<repo>/<commit>/<file>      from the hub
    <root>/wheels/<package>-<version>/<file>        out of a wheel
    <root>/tmp/<key>/  <root>/locks/<key>.lock      work in progress

The root is $FERRUM_JAX_CACHE, else $XDG_CACHE_HOME/ferrum_jax, else ~/.cache/ferrum_jax.
"""

import errno
import hashlib
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

try:
    import fcntl
except ImportError:  # Windows: without locks two processes may spoil each other's download; size and sha256 tell
    fcntl = None  # type: ignore[assignment]

Report = Callable[[int, int | None, str], None]  # bytes done, bytes in all if known, what is being done

_PARTIAL_DAYS = 14  # a partial hub download is kept this long for resuming


class SourceError(Exception):
    """One source does not give the model. The message says why, in one line."""


def cache_root() -> Path:
    """The cache's directory; it need not exist."""
    if own := os.environ.get("FERRUM_JAX_CACHE"):
        return Path(own).expanduser().absolute()
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared) if shared and os.path.isabs(shared) else Path("~/.cache").expanduser()) / "ferrum_jax"


def hub_home() -> Path:
    """The directory of the huggingface_hub package: $HF_HOME, else under the user's cache directory."""
    home = os.environ.get("HF_HOME") or os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    return Path(os.path.expandvars(home)).expanduser()


def shared_hub_cache() -> Path:
    """The cache of the huggingface_hub package, which is read and never written."""
    if own := os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE"):
        return Path(os.path.expandvars(own)).expanduser()
    return hub_home() / "hub"


def is_whole(path: Path, size: int | None, sha256: str | None) -> bool:
    """Whether `path` is a file of this size and hash, where they are known."""
    if not path.is_file() or (size is not None and path.stat().st_size != size):
        return False
    if sha256 is None:
        return True
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == sha256


def move_into_place(file: IO[bytes], part: Path, target: Path) -> None:
    """Flush and close `file`, which is open on `part`, and make it `target` in one step."""
    file.flush()
    os.fsync(file.fileno())
    file.close()
    target.parent.mkdir(parents=True, exist_ok=True)
    os.replace(part, target)


def require_space(directory: Path, needed: int) -> None:
    """OSError(ENOSPC) before anything is written, if `needed` bytes do not fit."""
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise OSError(errno.ENOSPC, f"{needed / 1e6:.1f} MB are needed and {free / 1e6:.1f} MB are free")


def _try_lock(file: IO[str]) -> bool:
    if fcntl is None:
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in (errno.EWOULDBLOCK, errno.EACCES)  # other errors: a file system without locks
    return True


@contextmanager
def work_directory(key: str, report: Report) -> Iterator[Path]:
    """`<root>/tmp/<key>`, made, for one process at a time; what earlier processes left in others is swept away."""
    root = cache_root()
    lock_path = root / "locks" / f"{key}.lock"
    lock_path.parent.mkdir(parents=True, exist_ok=True)
    with lock_path.open("a") as lock:
        while not _try_lock(lock):
            report(0, None, "waiting for another process that is fetching this model")
            time.sleep(0.2)
        directory = root / "tmp" / key
        directory.mkdir(parents=True, exist_ok=True)
        _sweep(root, key)
        yield directory


def _sweep(root: Path, mine: str) -> None:
    for directory in (root / "tmp").iterdir():
        if directory.name == mine:
            continue
        try:
            with (root / "locks" / f"{directory.name}.lock").open("a") as lock:
                recent = time.time() - directory.stat().st_mtime < _PARTIAL_DAYS * 86_400
                keep = recent and (fcntl is None or directory.name.startswith("hub-"))
                if not keep and _try_lock(lock):
                    shutil.rmtree(directory, ignore_errors=True)
        except OSError:
            continue  # another process swept it first, or it is not ours to remove
