"""What checkpoints are made of, whatever the family: files, JSON, metadata with their types, and where tensors lie.

Here a file is opened without trusting what lies at its path.
"""

from __future__ import annotations

import io
import os
import stat
from pathlib import Path

from ferrum_jax.errors import ModelFileError


def open_regular(path: Path, kind: str) -> tuple[io.FileIO, os.stat_result]:
    """Opens a regular file; `kind` (".gguf") is what an error asks for. FileNotFoundError passes through: the caller
    knows what the file was wanted for."""
    try:
        # Without O_NONBLOCK a named pipe would hang the open.
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
