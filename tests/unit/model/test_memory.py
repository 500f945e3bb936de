"""Peak memory of loading, on a synthetic file of 2 GB: every weight is in memory once."""

import subprocess
import sys

import pytest

from support import ROOT, environment

CHILD = """
import sys
import ferrum_jax as fj
model = fj.load(sys.argv[1], dtype="float32")
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(int(peak.split()[1]) * 1024, model.memory()["parameters_total"])
"""


@pytest.mark.slow
def test_peak_memory_of_loading(tmp_path):
    """VmHWM, mapped pages included, is at most the parameters and 1.5 GiB."""
    path = tmp_path / "synthetic.gguf"
    make = [sys.executable, "-m", "benchmarks.make_synthetic", str(path), "--shape", "qwen3-moe-2g"]
    subprocess.run(make, cwd=ROOT, check=True, capture_output=True)
    try:
        done = subprocess.run(
            [sys.executable, "-c", CHILD, str(path)], env=environment(), capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        peak, parameters = map(int, done.stdout.split())
        assert parameters >= 1.9e9 and 0.95 <= parameters / path.stat().st_size <= 1.05
        assert peak <= parameters + (3 << 29)
    finally:
        path.unlink()
