"""Backends that the caller forces: for one operation, for a whole model, and on the command line."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ferrum_jax as fj
from ferrum_jax import functional as F
from ferrum_jax import loading, program_store
from ferrum_jax.cli import main
from ferrum_jax.distributed.placement import Placement
from ferrum_jax.implementation import require_implementation
from pallas_kernels import dispatch
from pallas_kernels.blocks.matrix import Matrix
from pallas_kernels.operations import OPERATIONS
from pallas_kernels.quantized_matmul import quantized_matmul, swiglu
from support.compiler import needs_compiler
from support.random_models import DENSE, MOE, stored, tiny_params
from support.tiny_gguf import write_tiny_llama

GREEDY = fj.SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True)
CPU = dispatch.Target("cpu")


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return write_tiny_llama(tmp_path_factory.mktemp("model") / "tiny.gguf", context=96)


def matrix():
    return Matrix.of(jnp.asarray(stored("Q8_0", (64, 96), np.random.default_rng(0), 0.1)), "Q8_0")


def rows(dtype="float32"):
    return jnp.asarray(np.random.default_rng(1).normal(size=(3, 96)), dtype)


@needs_compiler
def test_a_forced_backend_serves_and_shares_no_trace_with_the_first_choice():
    function = jax.jit(quantized_matmul, static_argnames=("arithmetic", "implementation"))
    with dispatch.record() as choices:
        results = [function(rows(), matrix(), "int8", name) for name in (None, "xla", "native")]
    assert [(choice.backend, choice.reason) for choice in choices] == [
        ("native", "first choice"), ("xla", "forced"), ("native", "forced"),
    ]  # fmt: skip
    assert np.array_equal(results[0], results[2]) and not np.array_equal(results[0], results[1])
    exact = quantized_matmul(rows(), matrix())
    assert np.array_equal(results[1], exact)


def test_the_derivative_of_a_forced_operation_is_that_of_the_operation():
    def loss(x, implementation):
        return swiglu(x, matrix(), matrix(), implementation=implementation).sum()

    gradients = [jax.grad(loss)(rows(), name) for name in (None, "xla", "composed")]
    assert all(np.array_equal(gradients[0], gradient) for gradient in gradients)


def test_a_part_that_is_forced_has_the_operation_composed():
    with dispatch.record() as choices:
        swiglu(rows(), matrix(), matrix(), implementation=(("quantized_matmul", "xla"),))
    assert [(choice.operation, choice.backend, choice.reason) for choice in choices] == [
        ("swiglu", "composed", "quantized_matmul forced"), ("quantized_matmul", "xla", "forced"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("implementation", "words"),
    [
        ("triton", "quantized_matmul: the forced implementation 'triton' cannot serve Q8_0 .* on cpu.*: for NVIDIA GPUs"),
        ("native", "'native' cannot serve Q8_0 .*: is for int8 arithmetic, not float32"),
        ("cuda", "quantized_matmul has no implementation 'cuda'; it has native, triton, mosaic_tpu, xla"),
    ],
)
def test_a_backend_that_cannot_serve_is_an_error_that_says_why(implementation, words):
    with dispatch.on(CPU), pytest.raises(ValueError, match=words):
        quantized_matmul(rows(), matrix(), implementation=implementation)


@needs_compiler
def test_a_forced_part_of_a_model_is_what_runs():
    """In int8 one C++ call does all layers; an operation inside of it is forced by composing them."""
    for forced, expected in [
        ((("paged_attention", "xla"),), {"decoder_layers": "composed", "paged_attention": "xla", "swiglu": "native"}),
        ((("quantized_matmul", "xla"), ("swiglu", "native")), {"quantized_matmul": "xla", "swiglu": "native"}),
    ]:
        config = dataclasses.replace(DENSE, dtype="int8", implementation=forced)
        with dispatch.record() as choices:
            require_implementation(config, tiny_params(config), "float32", Placement.abstract(CPU))
        taken = {choice.operation: choice.backend for choice in choices}
        assert expected.items() <= taken.items()


@pytest.mark.parametrize(
    ("config", "forced", "words"),
    [
        (MOE, {"expert_ffn": "xla"}, "expert_ffn has no implementation 'xla'; it has native, triton, mosaic_tpu, composed"),
        (DENSE, {"expert_ffn": "composed"}, "this model does not use expert_ffn; it uses decoder_layers"),
        (MOE, {"append": "triton"}, "append: the forced implementation 'triton' cannot serve"),
    ],
)
def test_what_a_model_cannot_have_is_refused(config, forced, words):
    config = dataclasses.replace(config, implementation=tuple(forced.items()))
    with pytest.raises(ValueError, match=words):
        require_implementation(config, tiny_params(config), "float32", Placement.abstract(CPU))


@pytest.mark.slow
def test_two_models_with_different_choices_share_no_program(path, tmp_path, monkeypatch):
    one, two = (fj.load(path, dtype="float32", implementation=forced) for forced in (None, {"append": "xla"}))
    assert one.config.implementation == () and two.config.implementation == (("append", "xla"),)
    monkeypatch.setattr(program_store, "directory", lambda: tmp_path)
    here = Placement.of()
    names = [program_store.key(here, F.forward, {"config": model.config}, (), (), None) for model in (one, two)]
    assert None not in names and len(set(names)) == 2
    tokens = [model.generate([[5, 6, 7, 8]], GREEDY)[0].token_ids for model in (one, two)]
    assert tokens[0] == tokens[1]


@pytest.mark.parametrize(
    ("implementation", "words"),
    [
        ("xla", "implementation must be backends by operation"),
        ({"attention": "xla"}, "implementation: there is no operation 'attention'; there are decoder_layers, "),
        ({"append": "cuda"}, "implementation: append has no implementation 'cuda'; it has triton, xla"),
        ({"append": "triton"}, "append: the forced implementation 'triton' cannot serve float32"),
        ({"route": "xla"}, "implementation: this model does not use route; it uses decoder_layers"),
    ],
)
def test_loading_refuses_before_a_weight_is_read(path, implementation, words, monkeypatch):
    monkeypatch.setattr(loading, "read_parameters", lambda *_: pytest.fail("weights were read"))
    with pytest.raises(ValueError, match=words):
        fj.load(path, dtype="float32", implementation=implementation)


@pytest.mark.slow
def test_the_command_line(path, capsys):
    flags = ["run", str(path), "--raw", "--prompt", "abc", "--max-tokens", "2", "--dtype", "float32"]
    assert main([*flags, "--implementation", "append=xla", "--implementation", "paged_attention=xla"]) == 0
    capsys.readouterr()
    for pair, words in [("append", "'append' is not OP=BACKEND"), ("append=triton", "cannot serve float32")]:
        assert main([*flags, "--implementation", pair]) == 2
        assert words in capsys.readouterr().err


def test_doctor_lists_the_backends(capsys, monkeypatch):
    from ferrum_jax import diagnostics

    monkeypatch.setattr(diagnostics, "trial", lambda dtype: [])
    assert main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["implementations"]["paged_attention"] == ["triton", "mosaic_tpu", "xla"]
    assert set(report["implementations"]) == set(OPERATIONS)
