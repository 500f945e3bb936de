"""The files in deploy/ against the program: flags that exist, metrics that are served."""

from __future__ import annotations

import json
import re
import socket
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from ferrum_jax.cli.serve import serve_command
from ferrum_jax.server import running
from support import ROOT
from support.live_server import WEB, Live

DEPLOY = ROOT / "deploy"
FLAGS = {flag for option in serve_command.params for flag in [*option.opts, *option.secondary_opts]}


def test_the_dashboard_shows_what_is_served(server: Live) -> None:
    """Each name that a panel uses is a metric, and each metric is in a panel."""
    board = json.loads((DEPLOY / "grafana.json").read_text(encoding="utf-8"))
    expressions = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    used = {name for expression in expressions for name in re.findall(r"ferrum_\w+", expression)}
    WEB.post(f"{server.url}/v1/completions", json={"prompt": "a", "max_tokens": 2}).raise_for_status()
    families = list(text_string_to_metric_families(WEB.get(f"{server.url}/metrics").text))
    samples = {sample.name for family in families for sample in family.samples}
    assert used <= samples, "not served"
    served = {family.name for family in families if not family.name.endswith("_created")}
    assert {name for name in served if not any(each.startswith(name) for each in used)} == set(), "not shown"
    labels = {label for family in families for sample in family.samples for label in sample.labels}
    assert set(re.findall(r"by \((\w+)\)", " ".join(expressions))) == {"le", "finished_reason"} <= labels
    assert len({tuple(panel["gridPos"].values()) for panel in board["panels"]}) == len(board["panels"])


@pytest.mark.parametrize("name", ["ferrum-jax.service", "Containerfile"])
def test_flags_exist(name: str) -> None:
    text = "\n".join(line for line in (DEPLOY / name).read_text(encoding="utf-8").splitlines() if not line.startswith("#"))
    command = re.search(r"(?:ExecStart=|ENTRYPOINT )(?:.*\\\n)*.*", text)
    assert command is not None
    flags = set(re.findall(r"(?<![\w-])--[a-z-]+", command[0]))
    assert len(flags) >= 3 and flags <= FLAGS


def test_the_unit_gives_more_time_than_the_server_takes() -> None:
    text = (DEPLOY / "ferrum-jax.service").read_text(encoding="utf-8")
    drain, stop = (int(re.search(pattern, text)[1]) for pattern in (r"--drain-timeout (\d+)", r"TimeoutStopSec=(\d+)"))  # type: ignore[index]
    assert stop > drain


def test_systemd_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    running.tell_systemd("READY=1")  # without it, nothing happens
    path = tmp_path / "notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(str(path))
        monkeypatch.setenv("NOTIFY_SOCKET", str(path))
        running.tell_systemd("READY=1")
        assert systemd.recv(100) == b"READY=1"
