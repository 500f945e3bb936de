"""Qwen2 and Qwen2.5 (arXiv 2407.10671): queries, keys and values have biases."""

from ferrum_jax.families import common
from ferrum_jax.families.family import Family

QWEN2 = Family(
    architecture="qwen2",
    model_class="Qwen2ForCausalLM",
    tensors=common.decoder((*common.attention(biased=True), common.FEED_FORWARD_NORM, *common.dense())),
    sizes=common.sizes,
)
