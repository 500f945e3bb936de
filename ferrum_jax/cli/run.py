"""`ferrum-jax run`: answer a prompt, or chat in the terminal.

Text goes to standard output while it is generated.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import Any

import click

import ferrum_jax as fj
from ferrum_jax import progress
from ferrum_jax.cli import common
from ferrum_jax.cli.answer import Answer, answer, encode, print_stats
from ferrum_jax.cli.writer import Writer

TEMPERATURE, TOP_P = 0.7, 0.95


def _read_stdin() -> str:
    if sys.stdin is None:  # the shell closed it
        return ""
    if sys.stdin.isatty():
        click.echo("reading the prompt from the terminal; Ctrl-D ends it", err=True)
    try:
        text = sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise click.UsageError(f"the prompt on standard input is not UTF-8 text (byte {error.start})") from None
    return text.removesuffix("\n").removesuffix("\r")


def _model_and_prompt(words: tuple[str, ...], prompt: str | None) -> tuple[str, str | None]:
    """The model and the prompt in the arguments. A single argument with white space is a prompt, unless it is a path."""
    model, *rest = words or (common.DEFAULT_MODEL,)
    if not rest and len(model.split()) > 1 and not os.path.exists(os.path.expanduser(model)):
        model, rest = common.DEFAULT_MODEL, [model]
    if rest and prompt is not None:
        raise click.UsageError(f"the prompt is given twice: --prompt {prompt!r} and {' '.join(rest)!r}")
    return model, " ".join(rest) if rest else prompt


def _sampling(values: dict[str, Any]) -> Any:
    """Makes SamplingParams before the model is loaded, so that a bad value is reported at once."""
    if "" in values["stop"]:
        raise click.UsageError("--stop must not be empty")
    with common.users_mistake():
        return fj.SamplingParams(**values)


def _structured(json_schema: str | None, regex: str | None, choice: tuple[str, ...]) -> fj.Structured | None:
    """What the answer has to be. json_schema: a JSON text or the path of one."""
    if json_schema is None and regex is None and not choice:
        return None
    with common.users_mistake():
        if json_schema is not None and not json_schema.lstrip().startswith("{"):
            try:
                json_schema = Path(json_schema).read_text(encoding="utf-8")
            except OSError as error:
                raise ValueError(f"--json-schema {json_schema}: {error.strerror}") from None
        return fj.Structured(json_schema=json_schema, regex=regex, choice=choice or None)


def _require_grammar(model: Any, structured: fj.Structured) -> None:
    """Refuses what cannot be done, before the prompt is read."""
    try:
        with common.users_mistake():
            model._runtime.grammars.follower(structured, 0)
    except ImportError as error:
        raise click.UsageError(str(error)) from None


def _template_arguments(model: Any, source: str, *, system: str | None, think: bool | None, raw: bool) -> dict | None:
    """Keyword arguments for the chat template, or None if prompts are completed as they are."""
    if raw:
        return None
    written = model.tokenizer.chat_template
    if not written:
        if system is not None:
            raise click.UsageError(f"--system: {source} does not have a chat template, so it cannot take a system message")
        click.echo("note: the file does not have a chat template; prompts are completed as they are", err=True)
        return None
    if think is None:
        return {}
    if "enable_thinking" not in written:
        click.echo("note: the chat template does not have a thinking switch; --think/--no-think changes nothing", err=True)
        return {}
    return {"enable_thinking": think}


def _print_text(model: Any, ids: list[int], params: Any) -> Answer:
    writer = Writer()

    def emit(text: str, _tokens: list[int]) -> None:
        progress.show(False)  # clearing its line would now delete a line of the answer
        writer.write(text)

    result = answer(model, ids, params, emit)
    writer.close()
    if result.finish_reason == "length":
        count = result.usage["completion_tokens"]
        click.echo(f"note: cut after {count} tokens (--max-tokens, or the context)", err=True)
    return result


def _print_json_lines(model: Any, ids: list[int], params: Any) -> Answer:
    def emit(text: str, tokens: list[int]) -> None:
        click.echo(json.dumps({"text": text, "token_ids": [int(token) for token in tokens]}))

    result = answer(model, ids, params, emit)
    last = {key: getattr(result, key) for key in ("finish_reason", "usage", "timings")}
    click.echo(json.dumps(last | ({"error": result.error} if result.error else {})))
    return result


@click.command("run", short_help="Answer a prompt, or chat in the terminal.")
@click.argument("words", nargs=-1, metavar="[MODEL] [PROMPT]")
@click.option("--prompt", metavar="TEXT", help="The prompt; - reads standard input. Default: a piped text, or a chat.")
@click.option("--system", metavar="TEXT", help="System message of the conversation.")
@click.option("--raw", is_flag=True, help="Complete the prompt as it is, without the chat template.")
@click.option("--think/--no-think", default=None, help="Set enable_thinking of the chat template.")
@click.option(
    "--max-tokens", type=click.IntRange(min=1),
    help="Limit of the answer, in tokens. Default: the rest of the context, as far as memory allows.",
)  # fmt: skip
@click.option(
    "--temperature", type=common.FiniteRange(min=0), default=TEMPERATURE, show_default=True,
    help="0: always the likeliest token.",
)  # fmt: skip
@click.option("--top-k", type=click.IntRange(min=0), default=0, show_default=True, help="0: off.")
@click.option("--top-p", type=common.FiniteRange(min=0, min_open=True, max=1), default=TOP_P, show_default=True)
@click.option("--min-p", type=common.FiniteRange(min=0, max=1), default=0.0, show_default=True, help="0: off.")
@click.option(
    "--repeat-penalty", "repetition_penalty", type=common.FiniteRange(min=0, min_open=True), default=1.0,
    show_default=True, help="1: off.",
)  # fmt: skip
@click.option("--seed", type=int, help="The same seed gives the same text. Default, or -1: a new one each time.")
@click.option("--stop", multiple=True, metavar="TEXT", help="End before this text; can be repeated.")
@click.option("--json-schema", metavar="FILE|TEXT", help="The answer is JSON that is valid under this schema.")
@click.option("--regex", metavar="TEXT", help="The answer is a text that this regular expression matches.")
@click.option("--choice", multiple=True, metavar="TEXT", help="The answer is this text, or another one of them.")
@common.adapter_option
@common.dtype_option
@common.implementation_option
@common.mesh_option
@click.option("--kv-dtype", type=common.KvDtype(), help="Dtype of the KV cache. Default: follows --dtype.")
@click.option(
    "--max-seq-len", type=click.IntRange(min=2), help="Limit of prompt and answer, in tokens. Default: the model's context."
)
@click.option("--output-format", type=click.Choice(["text", "jsonl"]), default="text", show_default=True)
@click.option(
    "--history/--no-history", default=True, envvar="FERRUM_JAX_HISTORY", help="Keep the lines typed in a chat for later chats."
)
@click.option("--stats", is_flag=True, help="Print timings on standard error at the end.")
def run_command(
    words: tuple[str, ...],
    prompt: str | None,
    system: str | None,
    raw: bool,
    think: bool | None,
    adapter: str | None,
    dtype: str,
    implementation: dict[str, str] | None,
    mesh: str | None,
    kv_dtype: str | None,
    max_seq_len: int | None,
    output_format: str,
    history: bool,
    stats: bool,
    json_schema: str | None,
    regex: str | None,
    choice: tuple[str, ...],
    **sampling: Any,
) -> None:
    """Answer a prompt with MODEL: PROMPT, --prompt, a piped text, or the lines typed in a chat.

    The default MODEL is tiny, which is part of the package. If the file has a chat template, the prompt becomes a user
    message; otherwise, and with --raw, it is completed as it is. A single argument with white space that is not a file
    is the PROMPT.
    """
    model, prompt = _model_and_prompt(words, prompt)
    if raw and (system is not None or think is not None):
        flag = "--system" if system is not None else "--think/--no-think"
        raise click.UsageError(f"{flag} needs the chat template, which --raw leaves out")
    limited = sampling["max_tokens"] is not None
    structured = _structured(json_schema, regex, choice)
    params = _sampling(sampling if limited else {**sampling, "max_tokens": 1})
    talk = prompt is None and output_format == "text" and bool(sys.stdin) and sys.stdin.isatty() and sys.stdout.isatty()
    text = ""
    if not talk:
        text = _read_stdin() if prompt in (None, "-") else prompt or ""
        with common.users_mistake("--prompt is not UTF-8 text: "):
            text.encode()
        if not text:
            raise click.UsageError("the prompt is empty")

    loaded = common.load_model(
        model,
        adapter=adapter,
        dtype=dtype,
        implementation=implementation,
        mesh=mesh,
        kv_dtype=kv_dtype,
        max_seq_len=max_seq_len,
    )
    if not limited:
        params = dataclasses.replace(params, max_tokens=loaded._runtime.room())
    if structured is not None:
        _require_grammar(loaded, structured)
        params = dataclasses.replace(params, structured=structured)
    template = _template_arguments(loaded, model, system=system, think=think, raw=raw)
    if talk:
        from ferrum_jax.cli.chat import Chat

        progress.show(False)
        return Chat(loaded, params, system=system, template=template, stats=stats, history=history).run(model)

    messages = [{"role": "system", "content": system}] if system is not None else []
    with common.users_mistake():
        ids = encode(loaded, [*messages, {"role": "user", "content": text}], template)
    result = (_print_json_lines if output_format == "jsonl" else _print_text)(loaded, ids, params)
    if stats:
        print_stats(result)
    if result.error:
        raise fj.NotFiniteError(f"{model}: {result.error}")
