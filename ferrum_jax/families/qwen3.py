"""Qwen3, dense (arXiv 2505.09388): queries and keys are normalized in each head."""

from functools import partial

from ferrum_jax.families import decoder, tensors
from ferrum_jax.families.family import Family

ATTENTION = (
    *tensors.attention(not_in_gguf="llama.cpp's Qwen3 does not support biases"),
    *tensors.HEAD_NORMS,
    tensors.FEED_FORWARD_NORM,
)

QWEN3 = Family(
    architecture="qwen3",
    model_class="Qwen3ForCausalLM",
    model_type="qwen3",
    tensors=tensors.decoder((*ATTENTION, *tensors.dense())),
    sizes=tensors.sizes,
    from_gguf=decoder.from_gguf,
    from_json=partial(decoder.from_json, head_dim=128, window=decoder.window_on_request),
    to_gguf=decoder.to_gguf,
)
