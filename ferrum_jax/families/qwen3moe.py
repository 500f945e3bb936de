"""Qwen3-MoE (arXiv 2505.09388): Qwen3 with mixtures of experts, in all layers or in some."""

from ferrum_jax.families import common
from ferrum_jax.families.family import Family
from ferrum_jax.families.qwen3 import ATTENTION

QWEN3_MOE = Family(
    architecture="qwen3moe",
    model_class="Qwen3MoeForCausalLM",
    tensors=common.decoder((*ATTENTION, *common.dense(), *common.mixture())),
    sizes=common.sizes,
)
