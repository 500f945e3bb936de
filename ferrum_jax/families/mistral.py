"""Mistral (arXiv 2310.06825): LLaMA with a sliding window; its GGUF files are of arch `llama`.

A config.json with `layer_types` is a Ministral, as for transformers' AutoModel: the layers named there have the window."""

import dataclasses
from functools import partial

from ferrum_jax.families import decoder
from ferrum_jax.families.llama import LLAMA

MISTRAL = dataclasses.replace(
    LLAMA,
    model_class="MistralForCausalLM",
    model_type="mistral",
    from_json=partial(decoder.from_json, window=partial(decoder.stated_window, default=4096, some=True)),
)
