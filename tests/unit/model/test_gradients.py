"""The gradient of a loss with respect to norm weights, through compressed weights and the cache, against torch's."""

import jax
import numpy as np
import pytest

import ferrum_jax as fj
from ferrum_jax import functional as F
from ferrum_jax.quantized import LayerStack, QuantizedTensor
from support.goldens import golden_cases, tiny_models

NORMS = {
    "attn_norm": ("attention_norm",),
    "ffn_norm": ("feed_forward_norm",),
    "attn_q_norm": ("attention", "query_norm"),
    "attn_k_norm": ("attention", "key_norm"),
}


def replaced(tree: dict, path: tuple[str, ...], leaf) -> dict:
    return {**tree, path[0]: leaf if len(path) == 1 else replaced(tree[path[0]], path[1:], leaf)}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama3-f32", "qwen3moe-f32"])
def test_gradients_equal_torch(name, tmp_path):
    case = next(case for case in golden_cases.CASES if case.name == name)
    tiny_models.write(case.spec, tmp_path / "model.gguf")
    model = fj.load(tmp_path / "model.gguf", dtype="float32")
    ids = np.asarray([tiny_models.prompts(case.spec.vocab)[2]], np.int32)
    with np.load(golden_cases.HERE / f"{name}.grad.npz") as file:
        golden = dict(file)

    def loss(norms):
        layers = model.params["layers"]
        for norm, values in norms.items():
            if norm in NORMS:
                stack = LayerStack({"F32": QuantizedTensor.of(values, "F32", vectors=True)}, ("F32",) * model.config.num_layers)
                layers = replaced(layers, NORMS[norm], stack)
        params = {**model.params, "layers": layers, "final_norm": norms["output_norm"]}
        length = ids.shape[1]
        cache = F.new_cache(model.config, num_pages=-(-length // 16))
        lengths = np.asarray([length], np.int32)
        hidden, _ = F.hidden_chunk(params, cache, ids, lengths, 0, chunk=length, config=model.config)
        return -F.logprobs_of(params, hidden[:-1], ids[0, 1:], config=model.config).mean()

    value, gradients = jax.jit(jax.value_and_grad(loss))(start(model, golden))
    assert abs(float(value) - float(golden["loss"])) <= 1e-5 * abs(float(golden["loss"]))
    for norm, gradient in gradients.items():
        expected = golden[norm]
        error = np.abs(np.asarray(gradient) - expected).max()
        assert error <= 1e-4 * np.abs(expected).max(), norm


def start(model, golden) -> dict:
    """The norm weights of the model, by the golden's names."""
    norms = {"output_norm": model.params["final_norm"]}
    for norm, path in NORMS.items():
        if norm in golden:
            node = model.params["layers"]
            for part in path:
                node = node[part]
            norms[norm] = node.stacks["F32"].planes[0]
    return norms
