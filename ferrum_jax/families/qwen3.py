"""Qwen3, dense (arXiv 2505.09388): queries and keys of each head are normed."""

from ferrum_jax.families import common
from ferrum_jax.families.family import Family

ATTENTION = (*common.attention(not_in_gguf="llama.cpp's Qwen3 has no biases"), *common.HEAD_NORMS, common.FEED_FORWARD_NORM)

QWEN3 = Family(
    architecture="qwen3",
    model_class="Qwen3ForCausalLM",
    tensors=common.decoder((*ATTENTION, *common.dense())),
    sizes=common.sizes,
)
