# Installs ferrum_jax where it is missing: from a checkout around or next to this
# notebook, else from its repository. A JAX that is in range stays as it is.
import importlib
import os
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

from packaging.specifiers import SpecifierSet

REPOSITORY = "https://github.com/OWNER/ferrum_jax"
JAX = ">=0.10.2,<0.13"


class NoSource(Exception):
    def _render_traceback_(self):  # one line in a notebook, without a traceback
        return [str(self)]


versions = {each.name: each.version for each in metadata.distributions()}
if "ferrum-jax" not in versions:
    folders = [*(Path.cwd() / "_").parents, *Path.cwd().glob("*/")]
    checkouts = [f for f in folders if os.path.exists(f / "ferrum_jax/loading.py")]
    address = os.environ.get("FERRUM_JAX_GIT") or f"git+{REPOSITORY}"
    if not checkouts and "/OWNER/" in address:
        raise NoSource(
            "Put a checkout of ferrum_jax here, or set FERRUM_JAX_GIT to git+https://..."
        )
    extras = "[finetune,plot,serve]"
    wanted = [
        f"{checkouts[0]}{extras}" if checkouts else f"ferrum-jax{extras} @ {address}"
    ]
    if "jax" not in versions or versions["jax"] not in SpecifierSet(JAX):
        if shutil.which("nvidia-smi"):
            wanted += ["jax[cuda12]"]  # for every driver from 525 on
        elif "libtpu" in versions:
            wanted += ["jax[tpu]"]
    pip = [sys.executable, "-m", "pip", "install", "--quiet"]
    subprocess.run([*pip, *wanted], check=True)
    importlib.invalidate_caches()
