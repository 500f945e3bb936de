"""The examples of docs/server.md work."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from contextlib import redirect_stdout
from io import StringIO

from support import ROOT
from support.live_server import Live

PAGE = (ROOT / "docs" / "server.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


def test_python_of_the_page_runs(server: Live):
    program = "\n".join(blocks("python")).replace("http://127.0.0.1:8000", server.url)
    shown, names = StringIO(), {}
    with redirect_stdout(shown):
        exec(compile(program, "server.md", "exec"), names)
    assert names["second"].previous_response_id == names["first"].id and shown.getvalue()


def test_calls_of_curl_are_answered(server: Live):
    lines = [line for block in blocks("bash") for line in block.splitlines()]
    assert len(lines) >= 5
    for line in lines:
        done = subprocess.run(shlex.split(line.replace("http://127.0.0.1:8000", server.url)), capture_output=True, timeout=60)
        assert done.returncode == 0
        if b"data: " in done.stdout:
            assert done.stdout.endswith(b"data: [DONE]\n\n")
        else:
            assert "error" not in json.loads(done.stdout) or json.loads(done.stdout)["error"] is None, done.stdout
