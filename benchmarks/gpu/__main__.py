"""Command line of the package; see its docstring."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import benchmarks.gpu
from benchmarks import common


def main() -> int:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.gpu", description=benchmarks.gpu.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("only", nargs="*", help="modules of the sections to run; default: all")
    parser.add_argument("--rehearse", action="store_true", help="run at small shapes on the CPU and compile for the GPU")
    parser.add_argument("--out", type=Path, default=common.RESULTS, help="folder of the result")
    parser.add_argument("--section", help=argparse.SUPPRESS)
    parser.add_argument("--mode", default="measure", help=argparse.SUPPRESS)
    parser.add_argument("--skip", default="[]", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.section:
        from benchmarks.gpu import child

        return child.main(options.section, options.mode, frozenset(json.loads(options.skip)))
    from benchmarks.gpu import run

    bad = run.rehearse(options.only) if options.rehearse else run.measure(options.out, options.only)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
