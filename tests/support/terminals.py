"""The command line in a terminal of a given width, as its user would see it."""

from __future__ import annotations

import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios

from support import environment


def in_terminal(columns: int, *arguments: str, both: bool = True, code: str = "", **variables: str) -> tuple[int, str]:
    """The exit code and the text sent to a terminal, on standard output and, if `both`, on standard error."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    lines = ["import sys", code, "from ferrum_jax.cli import main; sys.exit(main())"]
    command = [sys.executable, "-c", "\n".join(lines), *arguments]
    plain = {key: value for key, value in environment().items() if key not in ("COLUMNS", "LINES")}
    process = subprocess.Popen(
        command, stdin=slave, stdout=slave, stderr=slave if both else subprocess.DEVNULL,
        env=plain | {"TERM": "xterm"} | variables,
    )  # fmt: skip
    os.close(slave)
    shown = b""
    while True:
        try:
            piece = os.read(master, 65536)
        except OSError:  # Linux: the other end is closed
            break
        if not piece:
            break
        shown += piece
    os.close(master)
    return process.wait(60), shown.decode().replace("\r\n", "\n")
