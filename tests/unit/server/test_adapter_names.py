"""LoRA adapters as models of the server: each name has the tokens that PEFT gives, also in one batch with the others."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import openai
import pytest

import ferrum_jax as fj
from support.adapter_directories import CASES, Folder
from support.golden_checks import TIE
from support.goldens import adapter_cases, tiny_models
from support.live_server import WEB, live

TOKENS = 8


@pytest.mark.slow
def test_an_adapter_is_a_model_of_its_name(tmp_path: Path) -> None:
    folder, names = Folder(tmp_path), ["llama-all", "llama-some-rslora"]
    goldens = {name: folder.golden(CASES[name]) for name in names}
    adapters = {name: folder(CASES[name]) for name in names}
    model = fj.load(folder(adapter_cases.LLAMA), dtype="float32", adapters=adapters)
    prompts = tiny_models.prompts(adapter_cases.LLAMA.vocab)[:2]
    config = fj.EngineConfig(page_size=16, num_pages=40, max_seqs=2, token_budget=16, steps_per_dispatch=2)
    with (
        fj.Engine(model, config) as engine,
        live(engine, name="base") as server,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0) as client,
    ):
        listed = {each.id: each.model_extra["parent"] for each in client.models.list()}
        assert listed == {"base": None, **dict.fromkeys(names, "base")}

        def ask(name: str, prompt: list[int]) -> list[str]:
            found = client.completions.create(
                model=name, prompt=prompt, max_tokens=TOKENS, temperature=0, logprobs=0, extra_body={"ignore_eos": True}
            )
            assert found.model == name
            return found.choices[0].logprobs.tokens

        def texts_of(ids: list[int]) -> list[str]:
            return [model.tokenizer.token_bytes(id).decode("utf-8", "replace") for id in ids]

        asked = [(name, i) for i in range(len(prompts)) for name in ["base", *names]]
        with ThreadPoolExecutor(len(asked)) as threads:
            texts = dict(zip(asked, threads.map(lambda each: ask(each[0], prompts[each[1]]), asked), strict=True))
        for name, i in asked:
            if name == "base":
                params = fj.SamplingParams(max_tokens=TOKENS, temperature=0.0, ignore_eos=True)
                assert texts[name, i] == texts_of(engine.submit(prompts[i], params).result().token_ids)
                continue
            golden = goldens[name]
            assert np.min(golden[f"gaps{i}"][:TOKENS]) > TIE
            assert texts[name, i] == texts_of(golden[f"tokens{i}"][:TOKENS].tolist())
            assert texts[name, i] != texts["base", i]
        unknown = WEB.post(f"{server.url}/v1/completions", json={"model": "other", "prompt": "a"})
        assert unknown.status_code == 404 and "llama-all" in unknown.json()["error"]["message"]
