"""`ferrum-jax finetune`: train a LoRA adapter."""

from __future__ import annotations

import csv
import sys
from pathlib import Path
from typing import Any

import click

from ferrum_jax.cli import common
from ferrum_jax.cli.output import plain_path

_LOSSES = "losses.csv", "losses.png"


@click.command("finetune", short_help="Train a LoRA adapter on a JSONL file.")
@common.model_argument
@click.argument("data", type=click.Path(exists=True, dir_okay=False))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--steps", type=click.IntRange(min=1), default=100, show_default=True, help="Steps of the optimizer.")
@click.option("--rank", type=click.IntRange(min=1), default=8, show_default=True, help="Rank of the adapter.")
@click.option("--alpha", type=common.FiniteRange(min=0, min_open=True), default=16.0, show_default=True,
              help="What the adapter adds is multiplied by alpha / rank.")  # fmt: skip
@click.option("--rslora", is_flag=True, help="Multiply by alpha / sqrt(rank) instead.")
@click.option("--target", "targets", type=click.Choice(("attention", "dense", "experts")), multiple=True,
              help="What to adapt; several times for several. Default: all of them.")  # fmt: skip
@click.option("--learning-rate", type=common.FiniteRange(min=0, min_open=True), default=2e-4, show_default=True,
              help="Peak of Adam's learning rate.")  # fmt: skip
@click.option("--length", type=click.IntRange(min=2), metavar="N", help="Tokens of a pack. Default: 2048 or the context.")
@click.option("--accumulation", type=click.IntRange(min=1), default=1, show_default=True, help="Packs of a step.")
@click.option("--held-out", type=common.FiniteRange(min=0, max=0.9), default=0.0, show_default=True,
              help="Fraction of the examples that is only measured; the best adapter is kept.")  # fmt: skip
@click.option("--evaluate-every", type=click.IntRange(min=1), default=50, show_default=True, help="Steps between measurements.")
@click.option("--patience", type=click.IntRange(min=1), help="End after that many measurements without a better one.")
@click.option(
    "--checkpoint-every", type=click.IntRange(min=1), default=50, show_default=True, help="Steps between checkpoints."
)
@click.option("--seed", type=int, default=0, show_default=True, help="Of the adapter and of the order.")
@common.dtype_option
@common.json_option
def finetune_command(model: str, data: str, out: Path, dtype: str, as_json: bool, **given: Any) -> None:
    """Train a LoRA adapter for MODEL on the examples in DATA and write it to the directory OUT, as PEFT does.

    Each line of DATA is an object with "text"; with "prompt" and "completion", of which the completion is learned; or with
    "messages", of which the assistant's are. Checkpoints are in OUT.checkpoints; the same command goes on after an
    interruption.
    """
    from ferrum_jax import finetune
    from ferrum_jax.finetune.training import LENGTH, time_left

    if out.exists():
        raise click.UsageError(f"{out} exists")
    names = {"rank", "alpha", "rslora"}
    fields = {name: given.pop(name) for name in names}
    if targets := given.pop("targets"):
        fields["targets"] = targets
    with common.users_mistake():
        config = finetune.LoraConfig(**fields)
    loaded = common.load_model(model, dtype=dtype)
    length = given.pop("length") or min(LENGTH, loaded.max_seq_len)
    with common.users_mistake():
        examples, cut = finetune.read_examples(data, loaded, length)
    if cut:
        click.echo(f"note: {cut} of the examples in {data} are cut to {length} tokens", err=True)
    history: list[Any] = []

    def told(report: Any) -> None:
        history.append(report)
        if not as_json:
            held_out = "" if report.held_out_loss is None else f", held out {report.held_out_loss:.4f}"
            speed, left = f"{report.tokens_per_second:,.0f} tokens/s", time_left(history, given["steps"])
            click.echo(f"step {report.step}: loss {report.loss:.4f}{held_out}, {speed}, {left} left")

    checkpoints = out.with_name(f"{out.name}.checkpoints")
    with common.users_mistake():
        adapter = finetune.train(loaded, examples, config, length=length, checkpoints=checkpoints, report=told, **given)
    path = finetune.save_peft(adapter, out, base_model=model)
    _write_losses(path, history)
    if as_json:
        common.print_json(
            {"path": str(path), "examples": len(examples), "cut": cut, "steps": [one._asdict() for one in history]}
        )
    else:
        click.echo(f"{plain_path(path)}: rank {config.rank}, loss {history[0].loss:.4f} to {history[-1].loss:.4f}")
    sys.stdout.flush()


def _write_losses(folder: Path, history: list[Any]) -> None:
    """The steps as a table and, with matplotlib, as a picture."""
    table, picture = (folder / name for name in _LOSSES)
    with table.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(history[0]._fields)
        writer.writerows(history)
    try:
        from matplotlib.figure import Figure
    except ImportError:
        from pallas_kernels import extras

        click.echo(f"note: {picture.name} is not drawn: it needs matplotlib; {extras.install('plot')}", err=True)
        return
    from ferrum_jax import plotting

    figure = Figure(figsize=(8, 4), layout="constrained")  # not pyplot's, so nothing is shown
    plotting.losses(history, ax=figure.subplots())
    figure.savefig(picture)
