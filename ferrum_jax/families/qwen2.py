"""Qwen2 and Qwen2.5 (arXiv 2407.10671): queries, keys and values have biases."""

from functools import partial

from ferrum_jax.families import decoder, tensors
from ferrum_jax.families.family import Family

QWEN2 = Family(
    architecture="qwen2",
    model_class="Qwen2ForCausalLM",
    model_type="qwen2",
    tensors=tensors.decoder((*tensors.attention(biased=True), tensors.FEED_FORWARD_NORM, *tensors.dense())),
    sizes=tensors.sizes,
    from_gguf=decoder.from_gguf,
    from_json=partial(decoder.from_json, window=decoder.window_on_request),
    to_gguf=decoder.to_gguf,
)
