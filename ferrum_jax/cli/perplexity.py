"""`ferrum-jax perplexity`: measure how well a model predicts a text."""

from __future__ import annotations

import sys

import click

from ferrum_jax.cli import common


@click.command("perplexity", short_help="Measure how well a model predicts a text file.")
@common.model_argument
@click.argument("file", type=click.Path(exists=True, dir_okay=False, allow_dash=True))
@click.option(
    "--window", type=click.IntRange(min=2), metavar="N",
    help="Score independent windows of N tokens and drop a last partial one. Default: the whole text is one window.",
)  # fmt: skip
@common.adapter_option
@common.dtype_option
@common.json_option
def perplexity_command(model: str, file: str, window: int | None, adapter: str | None, dtype: str, as_json: bool) -> None:
    """Print the perplexity of MODEL on the UTF-8 text in FILE (- for standard input).

    No start token is added, special tokens in the text are not parsed, and every token is scored except the first of
    each window.
    """
    try:
        with click.open_file(file, "rb") as handle:
            text = handle.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise click.UsageError(f"{file}: not UTF-8 text (byte {error.start})") from None
    except OSError as error:
        raise click.UsageError(f"{file}: {error.strerror}") from None
    loaded = common.load_model(model, dtype=dtype, adapter=adapter)
    ids = loaded.tokenizer.encode(text, add_special=False, parse_special=False)
    context = loaded.max_seq_len
    if len(ids) < (window or 2):
        raise click.UsageError(f"{file} has {len(ids)} tokens, fewer than the window of {window or 2}")
    if (window or len(ids)) > context:
        what = f"--window {window}" if window else f"{file} ({len(ids):,} tokens)"
        raise click.UsageError(f"{what} does not fit the context of {context:,} tokens; give a smaller --window")
    with common.users_mistake():
        value = float(loaded.perplexity(ids, window, common.adapter_of(loaded)))
    scored = len(ids) - 1 if window is None else len(ids) // window * (window - 1)
    if as_json:
        common.print_json(
            {"model": model, "file": file, "tokens": len(ids), "scored": scored, "window": window, "perplexity": value}
        )
        return
    click.echo(f"{value:.4f}")
    if sys.stderr.isatty():
        click.echo(f"perplexity over {scored:,} of {len(ids):,} tokens", err=True)
