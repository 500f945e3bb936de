"""`plan --finetune`: the count of memory, and what it refuses. The compiler is replaced by one whose temporaries are known;
tests/aot has the real ones."""

import dataclasses
import json
import types

import pytest

from ferrum_jax import headers, memory, plan
from ferrum_jax.cli import main
from pallas_kernels import aot

QWEN = "qwen3:30b-a3b"


@pytest.fixture(autouse=True)
def settings(monkeypatch):
    for name in ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"):
        monkeypatch.delenv(name, raising=False)


def test_count_of_fine_tuning(monkeypatch):
    """Qwen3-30B-A3B: each expert has factors for gate and up, which share A, and for down; Adam keeps two numbers for each."""

    def compile_for(name, function, pairs, state, params, packs, *, donate_argnums, compiler_options):
        assert donate_argnums == (0, 1) and packs.tokens.shape == packs.targets.shape == (4, 2048)
        sizes = {"temp": 3 << 30, "argument": memory.nbytes((pairs, state, params, packs)), "output": 80, "alias": 70}
        sizes = types.SimpleNamespace(**{f"{key}_size_in_bytes": value for key, value in sizes.items()})
        return types.SimpleNamespace(memory_analysis=lambda: sizes)

    monkeypatch.setattr(aot, "compile_for", compile_for)
    asked = plan.Case("h100", 2048, 4, finetune={"rank": 8})
    found = plan.compute(headers.bundled(QWEN), plan.Case(**json.loads(json.dumps(dataclasses.asdict(asked)))))
    attention = 48 * 8 * (2 * (2048 + 4096) + 2 * (2048 + 512))
    experts = 48 * 128 * 8 * (2048 + 2 * 768 + 768 + 2048)
    assert found.adapter == 4 * (attention + experts) and 0 <= found.optimizer - 2 * found.adapter <= 64
    assert 3 << 30 <= found.temporaries <= (3 << 30) + (1 << 20) and found.kv is found.states is found.largest_batch is None
    assert found.total == found.weights + found.adapter + found.optimizer + found.temporaries and found.fits
    found = plan.compute(headers.bundled(QWEN), plan.Case("l4", 2048, 4, finetune={"targets": ["attention"]}))
    assert found.adapter == 4 * attention and not found.fits and found.help.startswith("it would fit with XLA_CLIENT_MEM")


@pytest.mark.parametrize(
    ("model", "flags", "said"),
    [
        (QWEN, ["--rank", "4"], "--rank is for --finetune"),
        (QWEN, ["--adapt", "experts"], "--adapt is for --finetune"),
        (QWEN, ["--finetune", "--kv-dtype", "int8"], "--kv-dtype: fine-tuning has no KV cache"),
        ("gemma4:e2b", ["--finetune"], "architecture gemma4 cannot be fine-tuned yet: layer 0"),
    ],
)
def test_what_plans_of_fine_tuning_refuse(model, flags, said, capsys):
    assert main(["plan", model, "--target", "l4", *flags]) == 2
    assert said in capsys.readouterr().err
