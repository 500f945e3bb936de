"""How to install optional packages: from the place that this package was installed from, because no index has it."""

from __future__ import annotations

import contextlib
import json
import re
from importlib import metadata
from pathlib import Path
from urllib.parse import unquote, urlsplit


def install(extra: str) -> str:
    """The command that installs an extra of pyproject.toml, and where to run it."""
    came: dict = {}
    with contextlib.suppress(metadata.PackageNotFoundError, ValueError):
        came = json.loads(metadata.distribution("ferrum-jax").read_text("direct_url.json") or "{}")
    address = re.sub(r"//[^/@]*@", "//", came.get("url", ""))  # without a password
    if source := came.get("vcs_info"):
        revision = source.get("requested_revision")
        return f"pip install 'ferrum-jax[{extra}] @ {source['vcs']}+{address}{f'@{revision}' if revision else ''}'"
    clone = Path(unquote(urlsplit(address).path))
    known = "dir_info" in came and (clone / "pyproject.toml").is_file()
    return f"pip install '.[{extra}]' in {clone if known else 'a clone of the repository'}"
