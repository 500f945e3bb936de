"""Shared by the tests of the command line: a model that repeats the prompt's letters, and child processes that install it."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import textwrap
import time
import types

import numpy as np

import ferrum_jax as fj
from support import environment

END = 3  # the fake's end token


@dataclasses.dataclass(frozen=True)
class FakeParams:
    max_tokens: int = 16
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False

    def __post_init__(self):
        if self.seed is not None and self.seed < 0:
            raise ValueError("seed must not be negative")


class FakeTokenizer:
    """One character, one id."""

    vocab_size = 128
    bos_id = 1
    eos_ids = frozenset({END})
    chat_template = "{{ messages }}{{ enable_thinking }}"

    def encode(self, text, add_special=True, parse_special=False):
        return [1] * add_special + [ord(character) % 128 for character in text]

    def is_control(self, token):
        return token in (1, END)

    def token_bytes(self, token):
        return bytes([token])


class FakeStream:
    def __init__(self, text, ids, params, delay, end):
        count = min(len(text), params.max_tokens)
        self.prompt_token_ids, self.token_ids = ids, []
        self._steps = [(letter, [ord(letter) % 128]) for letter in text[:count]]
        self.error = ""
        self.finish_reason, self._reason, self.closed, self._delay = None, "length", False, delay
        if end and len(text) < params.max_tokens:
            self._steps.append(("", [END]))
            self._reason = "stop"

    def __iter__(self):
        return self

    def __next__(self):
        if not self._steps or self.closed:
            self.finish_reason = self._reason
            raise StopIteration
        time.sleep(self._delay)
        text, tokens = self._steps.pop(0)
        self.token_ids += tokens
        return text, tokens

    def close(self):
        self.closed = True


class FakeModel:
    """Answers `reply` and records the calls. Its greedy tokens are 7, 8, 9 and so on."""

    tokenizer = FakeTokenizer()
    reply = "two words"
    adapters: dict = {}  # noqa: RUF012
    delay = 0.0
    loads: list = []  # noqa: RUF012

    def __init__(self, source, dtype="auto", **options):
        self.loads.append({"source": source, "dtype": dtype} | options)
        self.config = types.SimpleNamespace(dtype="bfloat16" if dtype == "auto" else dtype)
        self.max_seq_len = options.get("max_seq_len") or 200
        self.clock = dict.fromkeys(("load_s", "compile_s", "prefill_tokens", "prefill_s", "decode_tokens", "decode_s"), 0.0)
        self.clock["load_s"] = 0.5
        self.asked: list = []
        self.streams: list = []

    @property
    def _runtime(self):
        return self

    def room(self):
        return self.max_seq_len

    def timings(self):
        return dict(self.clock)

    def encode_chat(self, messages, **template):
        return self.encode_rendered(self.render_chat(messages, **template))

    def render_chat(self, messages, **template):
        self.asked.append((messages, template))
        return " ".join(message["content"] for message in messages)

    def encode_rendered(self, text):
        ids = self.tokenizer.encode(text)
        if len(ids) > self.max_seq_len:
            raise ValueError(f"{len(ids)} tokens do not fit into a context of {self.max_seq_len}")
        return ids

    def stream(self, ids, params, adapter=None):
        self.streams.append(FakeStream(self.reply, ids, params, self.delay, not params.ignore_eos))
        self.params = params
        self.clock["compile_s"] += 0.25
        self.clock["prefill_tokens"] += len(ids)
        self.clock["prefill_s"] += 0.5
        self.clock["decode_tokens"] += 10
        self.clock["decode_s"] += 2.0
        return self.streams[-1]

    def generate(self, prompts, params):
        time.sleep(0.0005 * params.max_tokens)
        tokens = list(range(7, 7 + params.max_tokens))
        return [types.SimpleNamespace(token_ids=tokens, error="") for _ in prompts]

    def logits(self, batch):
        """After a prompt of 5 ids the argmax is the greedy tokens, 2 above every other id."""
        [ids] = batch
        rows = np.zeros((len(ids), 128), np.float32)
        for position, token in enumerate(ids):
            rows[position, token + 1 if position >= 5 else 7] = 2.0
        return [rows]

    def perplexity(self, ids, window=None, adapter=None):
        return 12.5 if window is None else float(window)


class FakeEngine:
    """Answers as the model's streams do."""

    warmed_up = 1, 1

    def __init__(self, model):
        self.model, self.context, self.prompt_tokens = model, model.max_seq_len, 0

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def metrics(self):
        return {"prompt_tokens": self.prompt_tokens}

    def submit(self, ids, params, adapter=None):
        self.prompt_tokens += len(ids)
        return FakeRequest(self.model.stream(ids, params, adapter))

    def abort(self, request):
        request.stream.close()
        request.finish_reason = request.finish_reason or "abort"


class FakeRequest:
    def __init__(self, stream):
        self.stream, self.text, self.token_ids, self.finish_reason, self.error = stream, "", [], None, ""

    def __iter__(self):
        for text, ids in self.stream:
            if self.finish_reason is None:
                self.text += text
                self.token_ids += ids
                yield types.SimpleNamespace(text=text, token_ids=ids)
        self.finish_reason = self.finish_reason or self.stream.finish_reason


def install_fake():
    """Put the fake in the place of the real model, for this process."""
    fj.load, fj.SamplingParams = FakeModel, FakeParams


def failing_load(error):
    def load(*_arguments, **_options):
        raise error

    return load


def child(*arguments, code="", fake=True, **options):
    """Runs the command line in another process, with the fake model by default."""
    lines = ["import signal, sys"]
    lines += ["signal.signal(signal.SIGINT, signal.default_int_handler)"]  # ignored where the tests run in the background
    if fake:
        lines += ["from support import cli_fakes", "cli_fakes.install_fake()", textwrap.dedent(code)]
    lines += ["from ferrum_jax.cli import main", "sys.exit(main())"]
    command = [sys.executable, "-c", "\n".join(lines), *arguments]
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, **({"env": environment()} | pipes | options))


def finished(process, **options):
    out, err = process.communicate(timeout=60, **options)
    return process.returncode, out, err
