"""`ferrum-jax doctor`: what this installation runs on.

The backends it lists are those that the dispatcher chose in a trial compilation on this machine, not a guess.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ferrum_jax.cli import common
from ferrum_jax.cli.common import readable_bytes
from ferrum_jax.cli.output import print_facts, print_table
from ferrum_jax.units import shown_dtype


def _folder(path: Path, *parts: str) -> dict[str, Any]:
    """A cache folder and the bytes in it, or in these parts of it. It may not exist yet. Links are not followed."""
    found = (file for folder in (parts or [""]) for file in (path / folder).rglob("*"))
    files = [file for file in found if file.is_file() and not file.is_symlink()]
    return {"path": str(path), "bytes": sum(file.stat().st_size for file in files)}


def _devices() -> list[dict[str, Any]]:
    """The devices, and the memory that JAX may use on each, as loading counts it."""
    import jax

    from ferrum_jax.memory import device_limit

    rows = []
    for device in jax.devices():
        limit = device_limit(device)
        rows.append(
            {
                "platform": device.platform,
                "kind": device.device_kind,
                "memory_bytes": limit and limit.total,
                "in_use_bytes": limit and limit.in_use,
                "counted": limit and limit.counted,
            }
        )
    return rows


def examine() -> dict[str, Any]:
    """Everything that `doctor` prints. If a part fails, its error goes into "problems" and the other parts are still
    examined."""
    report: dict[str, Any] = {"problems": []}

    def part(name: str, look: Any) -> None:
        try:
            report[name] = look()
        except Exception as error:
            report[name] = None
            report["problems"].append(f"{name}: {type(error).__name__}: {error}")

    def backends() -> list[dict[str, str]]:
        from ferrum_jax import diagnostics

        keys = ("operation", "format", "backend", "reason")
        choices = diagnostics.trial(report["auto_dtype"])
        return [{key: shown_dtype(str(getattr(choice, key))) for key in keys} for choice in choices]

    def implementations() -> dict[str, list[str]]:
        from pallas_kernels.operations import OPERATIONS

        return {name: [backend.name for backend in backends] for name, backends in OPERATIONS.items()}

    def auto_dtype() -> str:
        import jax

        from ferrum_jax.loading import auto_dtype
        from pallas_kernels.dispatch import target_of

        return auto_dtype(target_of(jax.devices()[0]))

    def cpu_kernels() -> str:
        from pallas_kernels import native

        return native.refusal() or native.isa()

    def compilation_cache() -> dict[str, Any]:
        from ferrum_jax.programs import enable_compilation_cache

        return _folder(enable_compilation_cache())

    def model_cache() -> dict[str, Any]:
        from ferrum_jax import hub

        return _folder(hub.cache_root(), "hub", "wheels", "tmp")

    part("versions", common.versions)
    part("devices", _devices)
    part("auto_dtype", auto_dtype)
    part("cpu_kernels", cpu_kernels)
    part("backends", backends)
    part("implementations", implementations)
    part("compilation_cache", compilation_cache)
    part("model_cache", model_cache)
    return report


def _summary(backends: list[dict[str, str]]) -> list[tuple[str, str]]:
    """A line for each backend and reason: its operations and the number of formats."""
    groups: dict[tuple[str, str], list[dict[str, str]]] = {}
    for row in backends:
        groups.setdefault((row["backend"], row["reason"].replace(f" for {row['format']}", "")), []).append(row)
    lines = []
    for (backend, reason), rows in groups.items():
        operations = ", ".join(dict.fromkeys(row["operation"] for row in rows))
        count = len({row["format"] for row in rows})
        lines.append((backend, f"{operations} for {count} format{'s' * (count != 1)}; {reason}"))
    return lines


def _print_report(report: dict[str, Any], everything: bool) -> None:
    click.echo("everything needed works" if not report["problems"] else "\n  ".join(["broken:", *report["problems"]]))
    click.echo()
    facts: list[tuple[str, str | Path]] = []
    for device in report["devices"] or ():
        facts.append(("device", f"{device['platform']}: {device['kind']}"))
        if device["memory_bytes"]:
            sizes = f"{readable_bytes(device['memory_bytes'])}, {readable_bytes(device['in_use_bytes'])} in use"
            facts.append(("memory for JAX", f"{sizes} ({device['counted']})"))
    facts.append(('dtype "auto"', report["auto_dtype"] or "-"))
    facts.append(("kernels for CPU", report["cpu_kernels"] or "-"))
    for name in ("compilation_cache", "model_cache"):
        folder = report[name]
        if folder:
            facts.append((name.replace("_", " "), Path(folder["path"])))
            facts.append(("", readable_bytes(folder["bytes"])))
    facts += (report["versions"] or {}).items()
    print_facts(facts)
    if not report["backends"]:
        return
    click.echo("\nbackends" + ("" if everything else " (--all: for each operation and format)"))
    if not everything:
        print_facts(_summary(report["backends"]))
        return
    formats: dict[tuple[str, str, str], list[str]] = {}
    for row in report["backends"]:
        formats.setdefault((row["operation"], row["backend"], row["reason"]), []).append(row["format"])
    rows = [(operation, backend, " ".join(served), reason) for (operation, backend, reason), served in formats.items()]
    print_table(rows, ("operation", "backend", "formats", "reason"))
    click.echo("\nbackends of each operation, the first choice first (--implementation OP=BACKEND takes another)")
    print_facts([(operation, ", ".join(names)) for operation, names in (report["implementations"] or {}).items()])


@click.command("doctor", short_help="Check the installation: versions, devices, kernels.")
@common.everything_option
@common.json_option
@click.pass_context
def doctor_command(context: click.Context, everything: bool, as_json: bool) -> None:
    """Check that everything works, and print devices, versions, caches and the backends chosen in a trial compilation.

    Exit code 1 if something is broken.
    """
    report = examine()
    if as_json:
        common.print_json(report)
    else:
        _print_report(report, everything)
    if report["problems"]:
        context.exit(1)
