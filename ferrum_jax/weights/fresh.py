"""Writes a file or a directory that gets its name only when it is complete."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from ferrum_jax.units import readable_bytes


@contextlib.contextmanager
def fresh(out: Path, needed: int) -> Iterator[Path]:
    """A path next to `out` to write to; the block then moves it into place. Anything left there afterwards is removed, and if
    the block fails, so are the directories that were made for it.

    Raises OSError before anything is written if `needed` bytes do not fit; every OSError of the block names a file.
    """
    missing = [folder for folder in out.parents if not folder.exists()]
    partial = out.with_name(f"{out.name}.partial-{os.getpid()}")
    try:
        free = shutil.disk_usage(out.parents[len(missing)]).free
        if needed > free:
            what = f"{os.strerror(errno.ENOSPC)}: {readable_bytes(needed)} are needed, {readable_bytes(free)} are free"
            raise OSError(errno.ENOSPC, what)
        out.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        missing.clear()
    except OSError as error:
        if type(error) is OSError and error.errno is None:  # from NumPy, which does not say why
            raise OSError(errno.ENOSPC, f"the system refused a part of it, the disk may be full ({error})", str(out)) from error
        if error.errno is not None:
            error.filename = error.filename or str(out)
        raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        for remove in (partial.unlink, *(folder.rmdir for folder in missing)):
            with contextlib.suppress(OSError):  # it was not made, or another process uses it
                remove()


def flush(directory: Path) -> None:
    """Returns when everything in a directory is on the disk."""
    for path in (*directory.rglob("*"), directory):
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
