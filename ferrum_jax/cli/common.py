"""Shared by the verbs: parameter types, loading with a progress bar, and formatting of numbers.

Standard output carries a verb's result and nothing else; progress goes to standard error, and only to a terminal.
"""

from __future__ import annotations

import contextlib
import json
import math
import sys
from collections.abc import Callable, Iterator
from typing import Any

import click

import ferrum_jax as fj
from ferrum_jax.cli.output import harmless as harmless
from ferrum_jax.config import refuse_encoder
from ferrum_jax.units import readable_bytes as readable_bytes

Progress = Callable[[int, int | None, str], None]

DTYPES = ("auto", "float32", "bfloat16", "float16", "int8")
KV_DTYPES = ("float32", "bfloat16", "float16", "int8", "fp8")

model_argument = click.argument("model")
DEFAULT_MODEL = "tiny"  # part of the package
optional_model_argument = click.argument("model", default=DEFAULT_MODEL)
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of a table.")
everything_option = click.option("--all", "--long", "everything", is_flag=True, help="Print everything.")
dtype_option = click.option(
    "--dtype", type=click.Choice(DTYPES), default="auto", show_default=True,
    help="Arithmetic of activations; auto chooses the fast one for the device (`doctor` shows which).",
)  # fmt: skip
implementation_option = click.option(
    "--implementation", multiple=True, metavar="OP=BACKEND", callback=lambda _, __, value: _implementation(value),
    help="Backend to serve an operation, such as paged_attention=xla (`doctor --all` lists them); several times for several.",
)  # fmt: skip
mesh_option = click.option(
    "--mesh", metavar="AXIS=N,...", help="Cut the model over several devices, as in expert=4,tensor=2. Default: one device."
)
adapter_option = click.option(
    "--adapter", type=click.Path(), metavar="PATH", help="LoRA adapter (PEFT directory or GGUF file), applied at run time."
)


def _implementation(pairs: tuple[str, ...]) -> dict[str, str] | None:
    """Backends by operation; None where none is given. The names are checked by `fj.load`."""
    for pair in pairs:
        if "=" not in pair:
            raise click.BadParameter(f"{pair!r} is not OP=BACKEND, such as paged_attention=xla.")
    return dict(pair.split("=", 1) for pair in pairs) or None


class KvDtype(click.Choice):
    """One of KV_DTYPES, or JAX's name for fp8."""

    def __init__(self) -> None:
        super().__init__(KV_DTYPES)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return super().convert("fp8" if value == "float8_e4m3fn" else value, param, ctx)


class FiniteRange(click.FloatRange):
    """A float range without NaN and infinity, which comparisons with the bounds would let through."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value} is not a finite number.", param, ctx)
        return number


class PositiveIntegers(click.ParamType):
    """A comma-separated list of integers, each at least `low`."""

    name = "integers"

    def __init__(self, low: int = 1):
        self.low = low

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if isinstance(value, tuple):
            return value
        try:
            numbers = tuple(int(part) for part in value.split(","))
        except ValueError:
            self.fail(f"{value!r} is not a list of integers such as 1,4.", param, ctx)
        if min(numbers) < self.low:
            self.fail(f"{min(numbers)} is below {self.low}.", param, ctx)
        return numbers


@contextlib.contextmanager
def users_mistake(what: str = "") -> Iterator[None]:
    """Wraps a call that checks the user's input: its ValueError becomes a usage error."""
    try:
        yield
    except ValueError as error:
        raise click.UsageError(f"{what}{error}", click.get_current_context(silent=True)) from error


@contextlib.contextmanager
def progress_bar() -> Iterator[Progress]:
    """Yields a callback (bytes done, total bytes or None, text) that draws a bar if stderr is a terminal.

    A call with 0 and None is a remark. An error should be a single line, so remarks are printed, once each, after the block
    has succeeded, or without a bar when work begins.
    """
    remarks: list[str] = []
    printed = 0

    def print_remarks() -> None:
        nonlocal printed
        for text in remarks[printed:]:
            click.echo(f"note: {text}", err=True)
        printed = len(remarks)

    with _bar() if sys.stderr.isatty() else contextlib.nullcontext() as bar:

        def update(done: int, total: int | None, text: str) -> None:
            if done == 0 and total is None and text not in remarks:
                remarks.append(text)
            if bar:
                bar(done, total, text)
            elif done:
                print_remarks()

        yield update
    print_remarks()


@contextlib.contextmanager
def _bar() -> Iterator[Progress]:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
    from rich.text import Text

    class Amount(DownloadColumn):
        """Bytes; for small totals parts, such as files to compile."""

        def render(self, task: Any) -> Text:
            few = task.total is not None and task.total < 100
            return Text(f"{task.completed:.0f}/{task.total:.0f} parts") if few else super().render(task)

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), Amount(), TimeRemainingColumn())
    bars = Progress(*columns, console=Console(stderr=True), transient=True)
    task = bars.add_task("", total=None)

    def update(done: int, total: int | None, text: str) -> None:
        bars.update(task, completed=done, total=total, description=text)
        bars.start()  # only now is there something to show

    try:
        yield update
    finally:
        bars.stop()


def load_model(source: str, *, embeds: bool = False, adapter: str | None = None, **options: Any) -> Any:
    """Calls `fj.load` with a progress bar and, if given, the adapter in a directory, which `adapter_of` names.

    A ValueError from its checks becomes a usage error, and so does a model of the wrong kind: one that generates text if
    `embeds`, otherwise one that embeds."""
    if adapter is not None:
        options["adapters"] = {adapter: adapter}
    with progress_bar() as progress, users_mistake():
        model = fj.load(source, progress=progress, **options)
    if isinstance(model, fj.EmbeddingModel) != embeds:
        if not embeds:
            raise refuse_encoder(source)
        raise click.UsageError(
            f"{source} generates text; embed needs an embedding model (BERT family), "
            "such as sentence-transformers/all-MiniLM-L6-v2"
        )
    return model


def adapter_of(model: Any) -> str | None:
    """The name of the adapter that a model was loaded with, or None."""
    return next(iter(model.adapters), None)


def print_json(value: Any) -> None:
    click.echo(json.dumps(value))


def figure(value: float | None, digits: int = 1) -> str:
    """A number for a table, or a dash if it was not measured."""
    return "-" if value is None else f"{value:,.{digits}f}"


def rate(count: float, seconds: float) -> float | None:
    """Count per second, or None if nothing was measured."""
    return round(count / seconds, 3) if count > 0 and seconds > 0 else None


def device_name() -> str:
    """Platform and kind of the default device, for example 'cpu: cpu' or 'gpu: NVIDIA H200'."""
    import jax

    device = jax.devices()[0]
    return f"{device.platform}: {device.device_kind}"


def versions() -> dict[str, str]:
    """The versions of Python and of the packages that determine results."""
    import platform
    from importlib.metadata import version

    packages = {"ferrum_jax": "ferrum-jax", "jax": "jax", "jaxlib": "jaxlib", "flax": "flax"}
    return {"python": platform.python_version()} | {name: version(package) for name, package in packages.items()}
