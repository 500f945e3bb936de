"""`ferrum-jax serve`: an HTTP server over an engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ferrum_jax.cli import common
from pallas_kernels.extras import install

_ENGINE = ("page_size", "num_pages", "max_seqs", "token_budget", "steps_per_dispatch", "prefix_cache", "speculation",
           "checkpoints", "checkpoint_bytes", "dispatch_seconds")  # fmt: skip
_ADDITIONAL = click.IntRange(min=0)
_POSITIVE = click.IntRange(min=1)


def _adapters(pairs: tuple[str, ...]) -> dict[str, str]:
    for pair in pairs:
        if not all(pair.partition("=")):
            raise click.BadParameter(f"{pair!r} is not NAME=PATH, such as poems=path/to/adapter.")
    return dict(pair.split("=", 1) for pair in pairs)


def _keys(key: str | None, file: Path | None) -> tuple[str, ...]:
    if key is not None and file is not None:
        raise click.UsageError("--api-key and --api-key-file are both given")
    lines = [key] if key is not None else []
    if file is not None:
        with common.users_mistake(f"--api-key-file {file}: "):
            lines = file.read_text(encoding="utf-8").split("\n")
    keys = tuple(line.strip() for line in lines if line.strip())
    if not keys and (key is not None or file is not None):
        raise click.UsageError("--api-key is empty" if key is not None else f"--api-key-file {file}: has no key")
    return keys


def _template(file: Path | None) -> str:
    """A template in a file; without one, that of models that do not have a template."""
    from ferrum_jax.chat import check_template
    from ferrum_jax.server.settings import PLAIN_TEMPLATE

    if file is None:
        click.echo("note: the model does not have a chat template; it goes on after the texts of a conversation", err=True)
        return PLAIN_TEMPLATE
    with common.users_mistake(f"--chat-template {file}: "):
        template = file.read_text(encoding="utf-8")
    check_template(template, str(file))
    return template


@click.command("serve", short_help="Serve a model over HTTP.")
@common.optional_model_argument
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen at; 0.0.0.0: all of the machine's.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0: one that is free.")
@click.option("--uds", type=click.Path(path_type=Path), metavar="PATH", help="Listen at a Unix socket instead.")
@click.option("--served-model-name", metavar="NAME", help="Name of the model for clients. Default: MODEL.")
@click.option("--api-key", metavar="KEY", help="Key that every request needs. Others on the machine can see it here.")
@click.option(
    "--api-key-file", type=click.Path(exists=True, dir_okay=False, path_type=Path), metavar="FILE", help="Keys, one a line."
)
@click.option("--cors-origin", multiple=True, metavar="ORIGIN", help="Allow pages of this origin; several times for several.")
@click.option(
    "--max-queue", type=_ADDITIONAL, default=256, show_default=True, help="Completions that may wait; more get status 429."
)
@click.option("--max-body-bytes", type=_POSITIVE, default=32 << 20, show_default=True, help="Limit of a request's body.")
@click.option(
    "--request-timeout", type=common.FiniteRange(min=0), default=600, show_default=True,
    help="Seconds after which a request is ended; 0: never.",
)  # fmt: skip
@click.option(
    "--drain-timeout", type=common.FiniteRange(min=0), default=60, show_default=True,
    help="Seconds that running requests have after SIGTERM.",
)  # fmt: skip
@click.option(
    "--chat-template", type=click.Path(exists=True, dir_okay=False, path_type=Path), metavar="FILE",
    help="Jinja template for conversations, instead of the model's.",
)  # fmt: skip
@click.option(
    "--store", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE",
    help="SQLite file that keeps conversations of the Responses API. Default: the newest ones in memory.",
)  # fmt: skip
@click.option(
    "--tool-parser", metavar="NAME", help="How the model writes calls of functions. Default: as its chat template says."
)
@click.option("--reasoning-parser", metavar="NAME", help="How the model writes reasoning. Default: as its chat template says.")
@click.option("--log-prompts", is_flag=True, help="Put prompts and answers into the log.")
@click.option("--no-web", is_flag=True, help="Without the chat page at /.")
@click.option("--adapter", multiple=True, metavar="NAME=PATH", help="LoRA adapter, served as the model NAME; several times.")
@click.option("--embedding-model", metavar="MODEL", help="Model for /v1/embeddings (BERT family), under this name.")
@common.dtype_option
@common.implementation_option
@common.mesh_option
@click.option("--kv-dtype", type=common.KvDtype(), help="Dtype of the KV cache. Default: follows --dtype.")
@click.option("--max-seq-len", type=click.IntRange(min=2), help="Limit of the context, in tokens.")
@click.option("--quantize", metavar="FORMAT", help="Quantize matrices in F32, F16 or BF16 while loading, such as q4_k.")
@click.option("--page-size", type=_POSITIVE, default=16, show_default=True, help="Tokens of a page of the KV cache.")
@click.option("--num-pages", type=_POSITIVE, help="Pages of the KV cache. Default: as many as are useful and fit.")
@click.option("--max-seqs", type=_POSITIVE, default=32, show_default=True, help="Completions that run together.")
@click.option("--token-budget", type=_POSITIVE, default=512, show_default=True, help="Limit of the tokens in a step.")
@click.option("--steps-per-dispatch", type=_POSITIVE, help="Decode steps at once. Default: from --dispatch-seconds.")
@click.option(
    "--dispatch-seconds", type=common.FiniteRange(min=0, min_open=True), default=0.05, show_default=True,
    help="Aimed duration of a dispatch: shorter is smoother, longer is faster.",
)  # fmt: skip
@click.option("--prefix-cache/--no-prefix-cache", default=True, show_default=True, help="Share equal beginnings.")
@click.option("--checkpoints", type=_ADDITIONAL, help="States kept of a model that recurs. Default: --max-seqs.")
@click.option("--checkpoint-bytes", type=_ADDITIONAL, help="The bytes of these states, in place of their number.")
@click.option("--speculation", type=_ADDITIONAL, default=0, show_default=True, help="Tokens to draft from the text itself.")
@click.option(
    "--warm-up/--no-warm-up", default=True, show_default=True,
    help="Before requests are taken, compile and try what can serve any of them; else while the first ones wait.",
)  # fmt: skip
def serve_command(model: str, host: str, port: int, uds: Path | None, **options: Any) -> None:
    """Serve MODEL (default: tiny, which is part of the package) to OpenAI's clients, until SIGTERM or Ctrl-C.

    docs/server.md describes the routes. One line on standard output says when it is ready; the log goes to standard
    error, as JSON.
    """
    try:
        from ferrum_jax.server import Settings, create_app, running
        from ferrum_jax.server.store import Store
    except ModuleNotFoundError as error:
        raise click.UsageError(f"serve needs {error.name}: {install('serve')}") from None
    from ferrum_jax.engine import Engine, EngineConfig

    with common.users_mistake():
        settings = Settings(
            name=options["served_model_name"] or model,
            embedding_name=options["embedding_model"] or "",
            api_keys=_keys(options["api_key"], options["api_key_file"]),
            cors_origins=options["cors_origin"],
            max_queue=options["max_queue"],
            max_body_bytes=options["max_body_bytes"],
            request_timeout=options["request_timeout"] or None,
            log_prompts=options["log_prompts"],
            web=not options["no_web"],
            store=options["store"],
            tool_parser=options["tool_parser"],
            reasoning_parser=options["reasoning_parser"],
        )
    adapters = _adapters(options["adapter"])
    if settings.name in adapters:
        raise click.UsageError(f"--adapter {settings.name}: the model has this name; --served-model-name gives it another one")
    if settings.store is not None:
        with common.users_mistake("--store "):
            Store(settings.store).close()  # before the model is loaded
    with common.users_mistake():
        config = EngineConfig(**{name: options[name] for name in _ENGINE})
    try:
        bound = running.bind(host, port, uds)
    except OSError as error:
        where = f"--uds {uds}" if uds else f"{host}:{port}"
        raise click.UsageError(f"cannot listen at {where}: {error.strerror or error}") from None
    with bound:
        loaded = common.load_model(
            model, adapters=adapters or None,
            **{name: options[name] for name in ("dtype", "implementation", "mesh", "kv_dtype", "max_seq_len", "quantize")},
        )  # fmt: skip
        embedder = None
        if options["embedding_model"] is not None:
            embedder = common.load_model(options["embedding_model"], embeds=True)
        tokenizer = loaded.tokenizer
        if options["chat_template"] is not None or tokenizer.chat_template is None:
            tokenizer.chat_template = _template(options["chat_template"])
        with common.users_mistake():
            engine = Engine(loaded, config)
        if options["warm_up"]:
            engine.warm_up(essential=True)  # the background loop compiles the others
            engine.rehearse()
        where = running.address(bound)

        def ready() -> None:
            click.echo(f"{settings.name} is served at {where}")

        running.serve(create_app(engine, settings, embedder), bound, drain_timeout=options["drain_timeout"], ready=ready)
