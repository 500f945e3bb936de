"""Mistral (arXiv 2310.06825): LLaMA with a sliding window; its GGUF files are of arch `llama`."""

import dataclasses

from ferrum_jax.families.llama import LLAMA

MISTRAL = dataclasses.replace(LLAMA, model_class="MistralForCausalLM")
