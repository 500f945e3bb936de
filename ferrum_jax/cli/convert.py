"""`ferrum-jax convert`: write a model as a checkpoint directory (Orbax) or a GGUF file, optionally quantized."""

from __future__ import annotations

import time
from pathlib import Path

import click

from ferrum_jax.cli import common
from ferrum_jax.cli.output import plain_path

KINDS = ("orbax", "gguf")


@click.command("convert", short_help="Write a model as a checkpoint directory or a GGUF file.")
@common.model_argument
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--to", type=click.Choice(KINDS), help="orbax: a directory; gguf: a file. Required.")
@click.option("--quantize", metavar="FORMAT", help="Quantize F32, F16 and BF16 matrices: q4_k, q6_k, q8_0, ...")
@click.option("--merge-adapter", type=click.Path(), metavar="PATH", help="Merge a LoRA adapter (PEFT or GGUF) first.")
@click.option("--adapter", type=click.Path(), metavar="PATH", help="Write this LoRA adapter of MODEL alone, as a GGUF file.")
@click.option("--force", is_flag=True, help="Replace OUT if it exists.")
@common.json_option
def convert_command(
    model: str,
    out: Path,
    to: str | None,
    quantize: str | None,
    merge_adapter: str | None,
    adapter: str | None,
    force: bool,
    as_json: bool,
) -> None:
    """Write MODEL to OUT, which appears only when it is complete.

    orbax: a directory that every verb takes as MODEL, with the parameters in the layout of this machine's device. gguf: a
    file for llama.cpp and others, with the tensors and metadata of MODEL, or named as by llama.cpp's converter.
    """
    if to is None:
        raise click.UsageError(f"--to is missing: --to gguf writes {out} as a file, --to orbax as a directory")
    from ferrum_jax.convert import convert

    begin = time.perf_counter()
    try:
        with common.progress_bar() as progress, common.users_mistake():
            options = {"quantize": quantize, "merge_adapter": merge_adapter, "adapter": adapter}
            convert(model, out, to=to, **options, force=force, progress=progress)
    except OSError as error:
        reason = error.strerror or str(error)
        hint = "; --force replaces it" if not force and isinstance(error, FileExistsError) and not error.filename else ""
        raise click.UsageError(f"{error.filename or ''}{': ' * bool(error.filename)}{reason}{hint}") from None
    files = [out] if out.is_file() else [path for path in out.rglob("*") if path.is_file()]
    size, seconds = sum(path.stat().st_size for path in files), time.perf_counter() - begin
    if as_json:
        common.print_json({"path": str(out), "bytes": size, "seconds": round(seconds, 3)})
    else:
        click.echo(f"{plain_path(out)}: {common.readable_bytes(size)} in {seconds:.1f} s")
