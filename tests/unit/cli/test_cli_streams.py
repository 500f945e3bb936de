"""Standard streams that are full, closed or broken: one clear line, the right exit code and nothing else."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from support import environment
from unit.cli.test_cli import small_gguf

FULL = "/dev/full"
pytestmark = pytest.mark.skipif(not os.path.exists(FULL), reason="needs /dev/full")
VERBS = [
    ["info", "FILE"],
    ["info", "FILE", "--json"],
    ["list", "--aliases"],
    ["--help"],
    ["run", "--help"],
    ["--version"],
    ["pull", "FILE"],
]


def through_a_shell(redirection, arguments, unbuffered):
    """Exit code, standard output and standard error of a command line with this redirection."""
    command = ["sh", "-c", f'exec "$@" {redirection}', "sh", sys.executable, "-m", "ferrum_jax", *arguments]
    variables = environment(PYTHONUNBUFFERED=unbuffered)
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=variables)
    return done.returncode, done.stdout, done.stderr


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(small_gguf(tmp_path_factory.mktemp("model") / "tiny.gguf"))


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("arguments", VERBS, ids=" ".join)
def test_a_full_output_is_one_line(model, arguments, unbuffered):
    arguments = [model if argument == "FILE" else argument for argument in arguments]
    expected = (2, "", "ferrum-jax: standard output: No space left on device\n")
    assert through_a_shell(f"> {FULL}", arguments, unbuffered) == expected


@pytest.mark.parametrize(
    "arguments", [["info", "FILE"], ["list", "--aliases"], ["convert", "FILE", "OUT", "--to", "gguf"]], ids=" ".join
)
def test_a_closed_output_is_refused_before_anything_is_done(model, tmp_path, arguments):
    places = {"FILE": model, "OUT": str(tmp_path / "out.gguf")}
    code, _, err = through_a_shell(">&-", [places.get(argument, argument) for argument in arguments], "")
    assert code == 2 and err.count("\n") == 1 and "standard output is closed" in err
    assert not list(tmp_path.iterdir())


def test_an_output_that_cannot_be_written_to_is_named(model):
    expected = (2, "", "ferrum-jax: standard output: Bad file descriptor\n")
    assert through_a_shell("1< /dev/null", ["info", model], "") == expected


@pytest.mark.parametrize("redirection", ["2>&-", f"2> {FULL}", "<&-"])
def test_the_other_streams_may_be_missing(model, redirection):
    code, out, err = through_a_shell(redirection, ["info", model], "")
    assert (code, err) == (0, "") and "can be loaded" in out
    assert through_a_shell(redirection, ["info", "no-such-file.gguf"], "")[:2] == (2, "")
    noted = ["info", model, "--context", "999999999"]  # a note that this is more than the model's own
    assert through_a_shell(redirection, noted, "")[0] == 0


def test_a_reader_that_went_away_is_not_an_error(model):
    command = f"{sys.executable} -m ferrum_jax info {model} | true; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], env=environment(), capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("0\n", "")
