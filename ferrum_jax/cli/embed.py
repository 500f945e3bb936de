"""`ferrum-jax embed`: texts as vectors."""

from __future__ import annotations

import sys
import warnings

import click

from ferrum_jax.cli import common


@click.command("embed", short_help="Texts as vectors, by an embedding model.")
@common.model_argument
@click.argument("texts", nargs=-1, metavar="[TEXT]...")
@click.option("--max-seq-len", type=click.IntRange(min=2), help="Tokens that a text is cut to (default: the model's own).")
@common.dtype_option
@common.json_option
def embed_command(model: str, texts: tuple[str, ...], max_seq_len: int | None, dtype: str, as_json: bool) -> None:
    """The vector of each TEXT, or without one of each line of standard input, by MODEL of the BERT family.

    A vector is a line of numbers, its Euclidean length is 1.
    """
    given = list(texts) or _lines()
    loaded = common.load_model(model, embeds=True, dtype=dtype, max_seq_len=max_seq_len)
    with warnings.catch_warnings(record=True) as notes, common.users_mistake():
        warnings.simplefilter("always", UserWarning)
        vectors = loaded.embed(given)
    for note in notes:
        click.echo(f"note: {note.message}", err=True)
    rows = [[float(f"{value:.9g}") for value in row] for row in vectors.tolist()]  # nine digits are exact in float32
    if as_json:
        common.print_json({"model": model, "dimension": vectors.shape[1], "embeddings": rows})
    else:
        for row in rows:
            click.echo(" ".join(f"{value:.9g}" for value in row))


def _lines() -> list[str]:
    if getattr(sys.stdin, "isatty", bool)():
        click.echo("reading texts from the terminal, one a line; Ctrl-D ends them", err=True)
    try:
        text = sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise click.UsageError(f"standard input: not UTF-8 text (byte {error.start})") from None
    return [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")] if text else []
