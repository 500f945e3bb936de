"""`ferrum-jax embed`: turn texts into vectors."""

from __future__ import annotations

import sys
import warnings

import click

from ferrum_jax.cli import common


@click.command("embed", short_help="Turn texts into vectors with an embedding model.")
@common.model_argument
@click.argument("texts", nargs=-1, metavar="[TEXT]...")
@click.option(
    "--max-seq-len", type=click.IntRange(min=2), help="Cut texts to this many tokens. Default: the model's own limit."
)
@common.dtype_option
@common.json_option
def embed_command(model: str, texts: tuple[str, ...], max_seq_len: int | None, dtype: str, as_json: bool) -> None:
    """Print the vector of each TEXT, or of each line of standard input, computed by MODEL (BERT family).

    A vector is a line of numbers with the Euclidean length 1.
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
        click.echo("reading texts from the terminal, one per line; Ctrl-D ends the input", err=True)
    try:
        text = sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise click.UsageError(f"standard input: not UTF-8 text (byte {error.start})") from None
    return [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")] if text else []
