"""`ferrum-jax plan`: whether a model fits a device that you do not have, and what limits its speed there."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import click

from ferrum_jax.cli import common
from ferrum_jax.cli.common import figure, readable_bytes
from ferrum_jax.cli.output import plain, plain_path, print_facts, print_table
from ferrum_jax.units import shown_dtype

if TYPE_CHECKING:
    from ferrum_jax.plan import Plan

DEFAULT_CONTEXT, DEFAULT_PACK = 4096, 2048


def _targets(given: tuple[str, ...]) -> list[str]:
    """The named targets, each once. Raises UsageError for none, an unknown one or one whose compiler is missing."""
    from pallas_kernels import aot

    asked = (name.strip().lower() for text in given for name in text.split(",") if name.strip())
    names = list(dict.fromkeys(aot.SAME_AS.get(name, name) for name in asked))
    if not names:
        raise click.UsageError(f"--target is missing: give one or more of {', '.join(aot.TARGETS)}")
    for name in names:
        if name not in aot.TARGETS:
            raise click.UsageError(f"--target {name} is not known; known: {', '.join(aot.TARGETS)}")
        if missing := aot.missing(name):
            raise click.UsageError(f"compiling for {name} needs {missing}")
    return names


def _json(plan: Plan) -> dict[str, Any]:
    """The fields of a plan; the names of sizes end with _bytes."""
    sizes = ("memory", "limit", "weights", "kv", "states", "adapter", "optimizer", "temporaries", "total")
    return {f"{key}_bytes" if key in sizes else key: value for key, value in dataclasses.asdict(plan).items()}


def _print_plan(plan: Plan) -> None:
    cache = f", KV cache {shown_dtype(plan.kv_dtype)}" if plan.adapter is None else ""
    click.echo(f"{plan.target}: {plan.device}, {plan.dtype}{cache}")
    if plan.error:
        click.echo(f"  {plan.error}")
        return

    def size(count: int | None) -> str:
        return "-" if count is None else readable_bytes(count)

    parts = {
        "weights": plan.weights, "KV cache": plan.kv, "states of layers that recur": plan.states or None,
        "adapter": plan.adapter, "optimizer": plan.optimizer, "temporaries": plan.temporaries,
    }  # fmt: skip
    known = {name: part for name, part in parts.items() if part is not None}
    loading = "; loading needs more than these" if (plan.total or 0) > sum(known.values()) else ""
    touched = "" if plan.experts_touched is None else f", including {plan.experts_touched:.0f} experts of each layer"
    rows = {
        "fits": ("yes" if plan.fits else "no") + (f"; {plan.help}" if plan.help else ""),
        "needs": f"{size(plan.total)}: {', '.join(f'{name} {size(part)}' for name, part in known.items())}{loading}",
        "may use": f"{size(plan.limit)}: {plan.limit_counted}",
        "compiled in": ", ".join(f"{name} {seconds:.0f} s" for name, seconds in plan.compile_s.items()),
    }
    if plan.largest_batch is not None:
        speed = f"{figure(plan.tokens_per_s, 0)} tokens/s in all: a step reads {size(plan.read_bytes)}{touched}"
        largest = {"largest batch": f"{plan.largest_batch:,}", "largest context": f"{plan.largest_context:,}"}
        rows |= largest | {"at most": speed}
    print_facts((f"  {name}", text) for name, text in rows.items())
    formats: dict[tuple[str, str, str], list[str]] = {}
    for row in plan.backends:
        formats.setdefault((row["operation"], row["backend"], row["reason"]), []).append(shown_dtype(row["format"]))
    table = [("  " + operation, *rest, " ".join(served)) for (operation, *rest), served in formats.items()]
    print_table(table, ("  operation", "backend", "reason", "formats"))


@click.command("plan", short_help="Check whether a model fits a GPU or TPU that you do not have.")
@common.model_argument
@click.option(
    "--target", "targets", multiple=True, metavar="NAME", help="l4, h200, v5e, ...; several with commas, or repeat the flag."
)
@click.option(
    "--context",
    type=click.IntRange(min=1),
    help="Tokens of each row, prompt and output. Default: 4096, of packs 2048, or the model's context.",
)
@click.option("--batch", type=click.IntRange(1, 1 << 16), default=1, show_default=True, help="Rows that run together.")
@common.dtype_option
@click.option("--kv-dtype", type=common.KvDtype(), help="Dtype of the KV cache. Default: follows --dtype.")
@click.option("--finetune", is_flag=True, help="Plan a step of `finetune` with --batch packs of --context tokens.")
@click.option("--rank", type=click.IntRange(min=1), help="Rank of the adapter, for --finetune. Default: 8.")
@click.option("--adapt", multiple=True, type=click.Choice(("attention", "dense", "experts")),
              help="What the adapter is for, with --finetune; several times for several. Default: all of them.")  # fmt: skip
@click.option("--timeout", type=click.FloatRange(min=1), default=1800, show_default=True, help="Seconds for each target.")
@common.json_option
@click.pass_context
def plan_command(
    ctx: click.Context,
    model: str,
    targets: tuple[str, ...],
    context: int | None,
    batch: int,
    dtype: str,
    kv_dtype: str | None,
    finetune: bool,
    rank: int | None,
    adapt: tuple[str, ...],
    timeout: float,
    as_json: bool,
) -> None:
    """Compile MODEL for one device of each target, and print whether it fits and what limits its speed.

    Only the header of MODEL is read: the file may end after it, and for a model on the hub only the header is downloaded.
    Exit code 1 if a compiler failed, with its message; "does not fit" is exit code 0.
    """
    names = _targets(targets)
    if not finetune and (rank or adapt):
        raise click.UsageError(f"{'--rank' if rank else '--adapt'} is for --finetune")
    if finetune and kv_dtype:
        raise click.UsageError("--kv-dtype: fine-tuning has no KV cache")
    lora = {key: value for key, value in (("rank", rank), ("targets", adapt)) if value} if finetune else None
    from ferrum_jax import plan
    from ferrum_jax.weights.names import parameters

    with common.progress_bar() as progress, common.users_mistake():
        for name in names:
            plan.usable(name)
        header = plan.find_header(model, progress)
    config = header.config()
    parameters(header, config)  # errors of the model are reported once
    if finetune:
        from ferrum_jax.finetune.lora import require_trainable

        with common.users_mistake():
            require_trainable(config)
    context = context or min(DEFAULT_PACK if finetune else DEFAULT_CONTEXT, config.context_length)
    if context > config.context_length:
        raise click.UsageError(f"--context {context} is beyond the model's context of {config.context_length} tokens")
    plans, kind = [], "packs" if finetune else "rows"
    for name in names:
        with common.progress_bar() as progress:
            progress(0, 1, f"compiling for {name}")
            plans.append(plan.plan_for(header, plan.Case(name, context, batch, dtype, kv_dtype, lora), timeout))
        if not as_json:
            click.echo("" if len(plans) > 1 else f"{plain_path(header.path)}: {batch:,} {kind} of {context:,} tokens\n")
            _print_plan(plans[-1])
    if as_json:
        named = header.metadata.get("general.name")
        head = {"model": str(header.path), "name": None if named is None else plain(named), "context": context, "batch": batch}
        common.print_json(head | {"versions": common.versions(), "targets": [_json(p) for p in plans]})
    if any(p.error for p in plans):
        ctx.exit(1)
