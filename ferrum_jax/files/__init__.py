"""What checkpoints of all families consist of: files, JSON, metadata with their types, and the places of tensors.

A file is opened here without trusting what is at its path.
"""

from __future__ import annotations

import io
import os
import stat
from pathlib import Path

from ferrum_jax.errors import ModelFileError


def open_regular(path: Path, kind: str) -> tuple[io.FileIO, os.stat_result]:
    """Opens a regular file; errors say that a `kind` (".gguf") file is needed. FileNotFoundError passes through, as the caller
    can say what the file was needed for."""
    try:
        # Without O_NONBLOCK, opening a named pipe would block.
        file = io.FileIO(path, opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK))
    except FileNotFoundError:
        raise
    except IsADirectoryError:
        raise ModelFileError(f"{path}: this is a directory; name the {kind} file in it") from None
    except OSError as error:
        raise ModelFileError(f"{path}: the file cannot be opened: {error.strerror}") from None
    status = os.fstat(file.fileno())
    if not stat.S_ISREG(status.st_mode):
        file.close()
        raise ModelFileError(f"{path}: this is not a regular file; name a {kind} file")
    return file, status
