"""Requests with known texts under a real server: a script takes the place of the model, between the engine and the routes."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest

from ferrum_jax.engine import Engine, Output
from ferrum_jax.engine.request import Times
from ferrum_jax.sampling_params import SamplingParams


class Scripted:
    """A request whose text arrives in pieces, each after the one before was taken."""

    def __init__(self, prompt: list[int], params: SamplingParams, pieces: list[str], reason: str):
        self.prompt_token_ids, self.params, self.choices = prompt, params, [self]
        self.text, self.token_ids = "".join(pieces), [0] * len(pieces)
        self.state, self.finish_reason, self.error, self.times = "running", None, "", Times(admitted=1.0)
        self.logprobs = self.prompt_logprobs = self.stop_string = None
        self.cached_tokens = 0
        self._pieces, self._reason, self._outputs = pieces, reason, list[Output]()

    def listen(self, callback: Any) -> None:
        threading.Thread(target=self._tell, args=(callback,), daemon=True).start()

    def poll(self) -> list[Output]:
        found, self._outputs = self._outputs, []
        return found

    def _tell(self, callback: Any) -> None:
        for i, piece in enumerate(self._pieces):
            self._outputs.append(Output(piece, [0]))
            self.times.took_tokens(time.perf_counter())
            if i == len(self._pieces) - 1:
                self.state, self.finish_reason = "finished", self._reason
            callback()
            while self._outputs:
                time.sleep(0.0005)


class Script:
    """Answers every prompt with `text`, in pieces of `size` letters. `prompts`, `params`: of the requests that were made."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, engine: Engine, size: int = 5):
        self.text, self.size, self.reason = "", size, "stop"
        self.prompts: list[str] = []
        self.params: list[SamplingParams] = []
        self._decode = engine.model.tokenizer.decode
        monkeypatch.setattr(engine, "submit", self._submit)
        monkeypatch.setattr(engine, "abort", lambda request: None)

    def _submit(self, prompt: list[int], params: SamplingParams, adapter: str | None = None, *, begun: int = 0) -> Scripted:
        self.prompts.append(self._decode(prompt, skip_special=False))
        self.params.append(params)
        pieces = [self.text[i : i + self.size] for i in range(0, len(self.text), self.size)] or [""]
        return Scripted(prompt, params, pieces, self.reason)
