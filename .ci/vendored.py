#!/usr/bin/env python3
"""Fetches the browser libraries of the chat page again, with npm, and compares them with those in the repository.

The table of docs/dependencies.md says what is there. To take another version, change it there and run this with --write, which
replaces the files and the hashes of the table.
"""

import hashlib
import re
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
TABLE = ROOT / "docs" / "dependencies.md"
VENDOR = ROOT / "ferrum_jax" / "server" / "web" / "vendor"
ROW = re.compile(r"^\| `([\w.]+)` \| (\S+) (\S+), `([\w./]+)` \|(.*)\| `([0-9a-f]{64})` \|$", re.MULTILINE)


def fetched(package: str, version: str, member: str, folder: Path) -> bytes:
    """A file of a package."""
    archive = folder / f"{package}-{version}.tgz"
    if not archive.exists():
        subprocess.run(["npm", "pack", "--silent", f"{package}@{version}"], cwd=folder, check=True, stdout=subprocess.DEVNULL)
    with tarfile.open(archive) as opened:
        content = opened.extractfile(f"package/{member}")
        assert content is not None
        return content.read()


def main(write: bool) -> int:
    """0 if all files are as they are published."""
    page, wrong = TABLE.read_text(encoding="utf-8"), 0
    with tempfile.TemporaryDirectory() as folder:
        for name, package, version, member, _, known in ROW.findall(page):
            content = fetched(package, version, member, Path(folder))
            digest = hashlib.sha256(content).hexdigest()
            if write:
                (VENDOR / name).write_bytes(content)
                page = page.replace(known, digest)
            elif known != digest or (VENDOR / name).read_bytes() != content:
                wrong += 1
                print(f"{name}: is not {member} of {package} {version}, whose sha256 is {digest}")
    TABLE.write_text(page, encoding="utf-8")
    return min(wrong, 1)


if __name__ == "__main__":
    sys.exit(main("--write" in sys.argv[1:]))
