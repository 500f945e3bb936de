"""Mixtral (arXiv 2401.04088): Mistral with mixtures of experts; its GGUF files are of arch `llama`."""

import dataclasses

from ferrum_jax.families.llama import LLAMA

MIXTRAL = dataclasses.replace(LLAMA, model_class="MixtralForCausalLM")
