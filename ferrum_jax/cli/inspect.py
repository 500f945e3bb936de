"""`info`, `pull` and `list`: describe, download and list model files. None of them imports JAX."""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter, defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ferrum_jax.cli import common
from ferrum_jax.cli.common import readable_bytes
from ferrum_jax.cli.output import plain, plain_path, print_facts, print_table, width, wrapped

if TYPE_CHECKING:
    from ferrum_jax.config import EncoderConfig, ModelConfig
    from ferrum_jax.weights.source import ModelSource

DEFAULT_CONTEXT = 4096
KV_ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def _formats(source: ModelSource) -> list[dict[str, Any]]:
    """The tensors, weights and bytes of each block format, largest first."""
    rows: dict[str, dict[str, Any]] = defaultdict(lambda: {"tensors": 0, "weights": 0, "bytes": 0})
    for info in source.tensors.values():
        row = rows[info.format]
        row["tensors"] += 1
        row["weights"] += math.prod(info.shape)
        row["bytes"] += info.nbytes
    return sorted(({"format": name} | row for name, row in rows.items()), key=lambda row: -row["bytes"])


def _working_bytes(source: ModelSource, config: ModelConfig) -> int:
    """An upper estimate of what a step needs in addition to weights and KV cache: the largest matrix of a layer (or of one
    expert) unpacked to float32, and one row of logits."""
    layers = [info for name, info in source.tensors.items() if name.startswith("blk.") and len(info.shape) >= 2]
    largest = max((math.prod(info.shape[-2:]) for info in layers), default=0)
    return 4 * (largest + config.vocab_size)


def _stated(source: ModelSource, key: str) -> str | None:
    """The value of a key that is only shown, as plain text."""
    value = source.metadata.get(key)
    return None if value is None else plain(value)


def _of_the_file(source: ModelSource) -> dict[str, Any]:
    """The facts about models of every kind."""
    return {
        "path": str(source.path),
        "parts": len(source.parts),
        "name": _stated(source, "general.name"),
        "licence": _stated(source, "general.license"),
        "file_bytes": sum(part.stat().st_size for part in source.parts),
        "tensor_bytes": source.tensor_bytes,
        "parameters": sum(math.prod(info.shape) for info in source.tensors.values()),
    }


def describe(source: ModelSource, context: int | None = None) -> dict[str, Any]:
    """The facts that `info` prints about an open file. `context`: the number of tokens to estimate memory for; default 4,096,
    or the model's context if that is shorter. Raises ModelFileError or UnsupportedModelError as loading would."""
    from ferrum_jax.models.segments import segments
    from ferrum_jax.weights.changed import Held
    from ferrum_jax.weights.names import parameters

    if (encoder := source.encoder()) is not None:
        return describe_encoder(source, encoder)
    config = source.config()
    bodies = list(zip(parameters(source, config).layer_formats, config.layers, strict=True))
    context = context or min(DEFAULT_CONTEXT, config.context_length)
    kv = {name: config.kv_bytes_per_token(size) for name, size in KV_ITEM_BYTES.items()}
    working = _working_bytes(source, config)
    kinds = dict.fromkeys(mixer.rope.scaling.kind for mixer in config.attentions if mixer.rope.scaling)
    latents = dict.fromkeys(mixer.latent for mixer in config.attentions if mixer.latent)
    return {
        **_of_the_file(source),
        "architecture": config.architecture,
        "num_layers": config.num_layers,
        "recurrent_layers": config.num_layers - len(config.attentions),
        "layer_bodies": sum(len(segment.runs) for segment in segments(bodies)),
        "hidden_size": config.hidden_size,
        **{name: config.by_layer(name) for name in ("intermediate_size", "num_heads", "num_kv_heads", "head_dim")},
        "latent": [dataclasses.asdict(latent) for latent in latents],
        "vocab_size": config.vocab_size,
        "context_length": config.context_length,
        **{name: config.by_layer(name) for name in ("sliding_window", "num_experts", "experts_per_token")},
        **{name: config.by_layer(name) for name in ("expert_intermediate_size", "rope_theta")},
        "rope_scaling": " or ".join(kinds) or None,
        "rms_norm_eps": config.rms_norm_eps,
        "tokenizer": {key: _stated(source, f"tokenizer.ggml.{key}") for key in ("model", "pre")},
        "chat_template": "tokenizer.chat_template" in source.metadata,
        "formats": _formats(source),
        "expanded": sorted(info.name for info in source.tensors.values() if isinstance(info, Held) and info.is_expanded),
        "passed_over": sorted(name for name in source.passed_over),
        "kv_bytes_per_token": kv,
        "state_bytes": config.bytes_per_state,
        "memory": {
            "context": context,
            "kv_bytes": {name: size * context for name, size in kv.items()},
            "working_bytes": working,
            "total_bytes": {
                name: source.tensor_bytes + size * context + config.bytes_per_state + working for name, size in kv.items()
            },
        },
    }


def describe_encoder(source: ModelSource, config: EncoderConfig) -> dict[str, Any]:
    """The facts about an embedding model. Raises what `describe` raises."""
    from ferrum_jax.weights.names import parameters

    parameters(source, config)
    return {
        **_of_the_file(source),
        **{key: value for key, value in dataclasses.asdict(config).items() if key not in ("dtype", "implementation")},
        "formats": _formats(source),
    }


def _head(facts: dict[str, Any], architecture: str, memory: str) -> list[tuple[str, str | Path]]:
    """Prints the verdict, and returns the rows that every model has."""
    name = facts["name"] or Path(facts["path"]).name
    click.echo(wrapped(f"{plain(name)}: can be loaded; {memory}", width(), "  ") + "\n")
    rows: list[tuple[str, str | Path]] = [("file", Path(facts["path"]))]
    if facts["parts"] > 1:
        rows.append(("parts", f"{facts['parts']}; this is the first"))
    return [
        *rows,
        ("name", facts["name"] or "not stated"),
        ("licence", facts["licence"] or "not stated in the file"),
        ("architecture", architecture),
        ("parameters", f"{facts['parameters']:,}"),
    ]


def _print_encoder(facts: dict[str, Any], everything: bool) -> None:
    weights = f"weights {readable_bytes(facts['tensor_bytes'])}"
    rows = _head(facts, f"{facts['architecture']}, an embedding model", weights)
    if everything:
        width = f"{facts['hidden_size']} wide, feed-forward {facts['intermediate_size']}"
        rows += [("layers", f"{facts['num_layers']}, {width}"), ("heads", str(facts["num_heads"]))]
        rows.append(("vocabulary", f"{facts['vocab_size']:,}"))
    rows += [
        ("context", f"{facts['context_length']:,} tokens; by default, texts are cut to {facts['text_length']:,}"),
        ("pooling", facts["pooling"]),
        ("memory", weights),
    ]
    print_facts(rows)
    _print_formats(facts)


def _each(value: Any) -> str:
    """A number of layers; where they differ, each once."""
    values = dict.fromkeys(value) if isinstance(value, tuple) else (value,)
    return " or ".join(f"{one:g}" if isinstance(one, float) else str(one) for one in values if one is not None)


def _sees(window: int | tuple[int, ...]) -> str:
    if not isinstance(window, tuple):
        return f", each sees {window:,}" if window else ""
    counts = Counter(one for one in window if one)
    return "".join(f", in {count} of {len(window)} layers each sees {one:,}" for one, count in counts.items())


def _print_info(facts: dict[str, Any], everything: bool) -> None:
    memory, kv = facts["memory"], facts["kv_bytes_per_token"]
    experts = "none"
    if facts["num_experts"]:
        experts = f"{_each(facts['num_experts'])}, {_each(facts['experts_per_token'])} a token"
        experts += f", {_each(facts['expert_intermediate_size'])} wide"
    kind = " / ".join(value for value in facts["tokenizer"].values() if value) or "none in the file"

    def both(sizes: dict[str, int]) -> str:
        return f"{readable_bytes(sizes['float16'])} (16 bit), {readable_bytes(sizes['float32'])} (float32)"

    state = f"a sequence's state {readable_bytes(facts['state_bytes'])}, " if facts["state_bytes"] else ""
    needed = f"{readable_bytes(memory['total_bytes']['float16'])} for {memory['context']:,} tokens"
    rows = _head(facts, facts["architecture"], f"about {needed}")
    rows.append(("experts", experts))
    if everything:
        layers = f"{facts['num_layers']} (distinct bodies to compile: {facts['layer_bodies']}), {facts['hidden_size']} wide"
        layers += f", feed-forward {_each(facts['intermediate_size'])}" if facts["intermediate_size"] else ""
        layers += f", {facts['recurrent_layers']} of them recur" if facts["recurrent_layers"] else ""
        heads, head_dim, kv_heads = (_each(facts[key]) for key in ("num_heads", "head_dim", "num_kv_heads"))
        heads = f"{heads} of {head_dim}, {kv_heads} for keys and values"
        for latent in facts["latent"]:
            heads = (
                f"{_each(facts['num_heads'])} of {latent['nope']} and {facts['head_dim'] - latent['width']} rotated, values "
            )
            heads += f"of {latent['values']}; all read one vector of {latent['width']} and one rotated key of a token"
        rows += [
            ("layers", layers),
            ("heads", heads),
            ("vocabulary", f"{facts['vocab_size']:,}"),
            ("rope", f"theta {_each(facts['rope_theta'])}, scaling {facts['rope_scaling'] or 'none'}"),
            ("KV cache", f"{both(kv)} a token"),
        ]
    rows += [
        ("context", f"{facts['context_length']:,} tokens{_sees(facts['sliding_window'])}"),
        ("tokenizer", f"{kind}; chat template: {'yes' if facts['chat_template'] else 'no'}"),
        (f"at {memory['context']:,} tokens", f"KV cache {both(memory['kv_bytes'])}"),
        (
            "memory",
            f"about {both(memory['total_bytes'])}: weights {readable_bytes(facts['tensor_bytes'])}, KV, {state}"
            f"working space {readable_bytes(memory['working_bytes'])}; the runtime comes on top",
        ),
    ]
    if names := facts["expanded"]:
        rows.append(
            ("expanded", f"{len(names)} tensors of an older file become F32 while they are read: {plain(names[0])}, ...")
        )
    if names := facts["passed_over"]:
        kinds = ", ".join(dict.fromkeys(map(_part_of, names)))
        rows.append(("not run", f"{len(names)} tensors that predict further tokens or see pictures: {plain(kinds)}"))
    print_facts(rows)
    _print_formats(facts)


def _part_of(name: str) -> str:
    """The part of a model that a tensor belongs to."""
    found = re.match(r"mtp|model\.layers\.\d+", name)
    return found[0] if found else ".".join(name.split(".")[:2])


def _print_formats(facts: dict[str, Any]) -> None:
    numbers = ("tensors", "weights", "bytes", "bits/weight")
    blocks = [
        (row["format"], *(f"{row[key]:,}" for key in numbers[:3]), f"{8 * row['bytes'] / max(1, row['weights']):.2f}")
        for row in facts["formats"]
    ]
    click.echo()
    print_table(blocks, ("format", *numbers), numbers)


@click.command("info", short_help="What a model file is, from its header.")
@common.model_argument
@click.option("--context", type=click.IntRange(min=1), help="Estimate memory for this many tokens (default: 4096).")
@common.everything_option
@common.json_option
def info_command(model: str, context: int | None, everything: bool, as_json: bool) -> None:
    """Whether MODEL can be loaded, its block formats and its memory, read from its header; weights are not loaded.

    A model that is not on this machine yet is fetched first.
    """
    from ferrum_jax import hub
    from ferrum_jax.weights.opening import open_model

    with common.progress_bar() as progress:
        path = hub.resolve(model, progress=progress)
    with open_model(path) as source:
        facts = describe(source, context)
    if context and context > facts["context_length"]:
        click.echo(f"note: the model's own context is {facts['context_length']:,} tokens", err=True)
    if as_json:
        common.print_json(facts)
    else:
        (_print_encoder if "pooling" in facts else _print_info)(facts, everything)


@click.command("pull", short_help="Download a model into the cache.")
@common.model_argument
def pull_command(model: str) -> None:
    """Download MODEL into the cache and print the path of its file."""
    from ferrum_jax import hub

    with common.progress_bar() as progress:
        path = hub.pull(model, progress=progress)
    click.echo(plain_path(path))


@click.command("list", short_help="List the downloaded models, or the aliases.")
@click.option("--aliases", "--all", "aliases", is_flag=True, help="List the aliases instead.")
@click.option("--long", is_flag=True, help="Also show where each model came from.")
@common.json_option
def list_command(aliases: bool, long: bool, as_json: bool) -> None:
    """List the models in the cache, or with --aliases all short names with sources, licenses and whether they were checked."""
    from ferrum_jax import hub

    if aliases:
        _list_aliases(hub.ALIASES, as_json)
        return
    models = hub.list_cached()
    if as_json:
        common.print_json([{"name": m.name, "path": str(m.path), "bytes": m.bytes, "source": str(m.source)} for m in models])
    elif not models:
        click.echo("no models in the cache; `ferrum-jax list --aliases` lists some to pull", err=True)
    else:
        cached: list[tuple[str | Path, ...]] = [
            (plain(m.name), readable_bytes(m.bytes), Path(m.path), *[plain(m.source)] * long) for m in models
        ]
        print_table(cached, ("name", "size", "path", *["source"] * long), numbers=("size",))


def _list_aliases(aliases: dict[str, Any], as_json: bool) -> None:
    rows: list[dict[str, Any]] = [
        {
            "name": name,
            "sources": [str(source) for source in alias.sources],
            "licence": alias.license,
            "checked": alias.checked,
            "note": alias.note if name == alias.name else f"the same as {alias.name}",
        }
        for name, alias in aliases.items()
    ]
    if as_json:
        common.print_json(rows)
        return
    table: list[tuple[str, ...]] = []
    for row in rows:
        checked = {True: "yes", False: "never"}.get(row["checked"], row["checked"])
        table.append((row["name"], row["licence"], "; ".join(row["sources"]), checked, row["note"]))
    print_table(table, ("alias", "licence", "sources", "checked", "note"))
