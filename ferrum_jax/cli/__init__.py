"""The command line `ferrum-jax`.

One function, `main`, owns the process: it turns every exception of a verb into an exit code and at most one line on
standard error. Verbs raise; they never exit. They import JAX and other heavy packages only when they run, so that
`--help` and a mistyped flag answer at once.

Exit codes: 0; 2 for a mistake of the user (unknown flag, bad value, missing or damaged file, unsupported model);
1 for a fault in ferrum_jax; 130 for Ctrl-C. A reader that closes the pipe early ends the program quietly with 0.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sys
import warnings
from collections.abc import Callable
from typing import Any

import click

from ferrum_jax import progress
from ferrum_jax.cli.bench import bench_command
from ferrum_jax.cli.bench_serve import bench_serve_command
from ferrum_jax.cli.convert import convert_command
from ferrum_jax.cli.doctor import doctor_command
from ferrum_jax.cli.embed import embed_command
from ferrum_jax.cli.finetune import finetune_command
from ferrum_jax.cli.inspect import info_command, list_command, pull_command
from ferrum_jax.cli.output import harmless
from ferrum_jax.cli.perplexity import perplexity_command
from ferrum_jax.cli.plan import plan_command
from ferrum_jax.cli.remove import rm_command
from ferrum_jax.cli.run import run_command
from ferrum_jax.cli.serve import serve_command
from ferrum_jax.errors import FerrumError

PROGRAM = "ferrum-jax"


def _set_debug(context: click.Context, _option: click.Parameter, value: bool) -> None:
    context.find_root().obj["debug"] |= value


_DEBUG = click.Option(
    ["--debug"], is_flag=True, expose_value=False, callback=_set_debug, help="Print the traceback of an error."
)


@click.command("version", short_help="Print the version of ferrum_jax.")
def version_command() -> None:
    """Print the version of ferrum_jax."""
    from importlib.metadata import version

    click.echo(f"{PROGRAM} {version(PROGRAM)}")


def _print_version(context: click.Context, _option: click.Parameter, value: bool) -> None:
    if value:
        context.invoke(version_command)
        context.exit()


@click.group(
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Run language models in JAX. MODEL is a .gguf file, a checkpoint directory, an alias such as smollm2:135m "
    "(`list --aliases`), or owner/repo[:file or quantization] on the Hugging Face hub.",
)
@click.option("--version", is_flag=True, is_eager=True, expose_value=False, callback=_print_version, help="Print the version.")
@click.pass_context
def verbs(context: click.Context) -> None:
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


for _verb in (
    run_command, bench_command, info_command, plan_command, pull_command, list_command, convert_command, doctor_command,
    perplexity_command, embed_command, finetune_command, serve_command, bench_serve_command, rm_command, version_command,
):  # fmt: skip
    verbs.add_command(_verb)
    _verb.params.append(_DEBUG)
verbs.params.append(_DEBUG)
verbs.add_command(list_command, "ls")


def main(argv: list[str] | None = None) -> int:
    """Run the command line on `argv` (default: the process's arguments) and return the exit code."""
    state = {"debug": False}
    try:
        output, notes = _open_streams()
        with (
            contextlib.redirect_stdout(output),  # type: ignore[type-var]
            contextlib.redirect_stderr(notes),  # type: ignore[type-var]
            warnings.catch_warnings(),
        ):
            progress.show(sys.stderr.isatty())
            _note_warnings()
            arguments = list(sys.argv[1:] if argv is None else argv)
            with verbs.make_context(PROGRAM, arguments, obj=state) as context:
                verbs.invoke(context)
            sys.stdout.flush()
    except click.exceptions.Exit as exit_request:
        return exit_request.exit_code
    except BrokenPipeError:
        _drop(sys.stdout)
        return 0
    except (KeyboardInterrupt, click.Abort):
        return 130
    except click.ClickException as error:
        where = error.ctx.command_path if isinstance(error, click.UsageError) and error.ctx else PROGRAM
        hint = "; --help lists them" if "No such command" in error.format_message() else ""
        return _report(2, f"{where}: {error.format_message()}{hint}", state["debug"])
    except FerrumError as error:
        return _report(2, f"{PROGRAM}: {error}", state["debug"])
    except Exception as error:
        if isinstance(error, OSError) and (error.filename == "standard output" or error.errno in _REFUSALS):
            if error.filename == "standard output":
                _drop(sys.stdout)
            what = ": ".join(str(part) for part in (error.filename, error.strerror or error) if part)
            return _report(2, f"{PROGRAM}: {what}", state["debug"])
        hint = "" if state["debug"] else " (add --debug for the traceback)"
        return _report(1, f"{PROGRAM}: internal error: {type(error).__name__}: {error}{hint}", state["debug"])
    return 0


def _note_warnings() -> None:
    """Shows each warning once, as one line without the code that issued it."""
    told = set()

    def show(message: Warning | str, *_: Any) -> None:
        text = str(message)
        if text.startswith("Error reading persistent compilation cache entry"):  # JAX never deletes a damaged entry
            import jax

            folder = jax.config.values["jax_compilation_cache_dir"]
            text = f"an entry of XLA's cache is damaged; it is compiled again at each start until you delete {folder}"
        if text not in told:
            told.add(text)
            print(f"note: {harmless(text)}", file=sys.stderr)

    warnings.showwarning = show  # type: ignore[assignment]


def _open_streams() -> tuple[_Output, _Notes]:
    """Standard output and error. A closed standard output is an error before any work; standard input and error may be
    closed."""
    sys.stdin = sys.stdin or open(os.devnull)  # noqa: SIM115
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    if sys.stdout is None:
        raise click.UsageError("standard output is closed, so the result cannot be printed (> /dev/null drops it)")
    with contextlib.suppress(AttributeError):  # a replaced stdout may not have it
        sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]
    return _Output(sys.stdout), _Notes(sys.stderr)


class _Output:
    """A stream whose errors name standard output as the file."""

    def __init__(self, stream: Any):
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _try(self, method: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return method(*arguments)
        except OSError as error:
            error.filename = "standard output"
            raise

    def write(self, text: str) -> int:
        return self._try(self._stream.write, text)

    def flush(self) -> None:
        self._try(self._stream.flush)


class _Notes(_Output):
    """A stream that ignores its errors; after the first one it writes nowhere."""

    def _try(self, method: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return super()._try(method, *arguments)
        except OSError:
            _drop(self._stream)


# Refusals by the file system or by the user's limits. Any other errno is a fault of ours.
_REFUSALS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.EMFILE}


def _drop(stream: Any) -> None:
    """Sends the rest of a stream to nowhere, so that the flush at exit does not fail."""
    with contextlib.suppress(OSError):  # a replaced stream may not have a descriptor
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _report(code: int, message: str, debug: bool) -> int:
    if debug:
        import traceback

        traceback.print_exc()
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    try:
        print(harmless("; ".join(lines).replace(":; ", ": ")), file=sys.stderr)
    except OSError:
        _drop(sys.stderr)
    return code
