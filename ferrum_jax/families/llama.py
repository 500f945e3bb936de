"""LLaMA (arXiv 2302.13971, 2407.21783). Files of arch `llama` may also be Mistral or Mixtral: they are the same layers.

GGUF files of this arch keep the rows of queries and keys in the order of interleaved rotation, and LLaMA-3.1's factors as a
tensor; files without `rope.freq_base` were written before the key existed and mean 10,000.
"""

from functools import partial

from ferrum_jax.families import decoder, tensors
from ferrum_jax.families.family import Family
from ferrum_jax.families.table import Tensor

LLAMA = Family(
    architecture="llama",
    model_class="LlamaForCausalLM",
    model_type="llama",
    tensors=tensors.decoder(
        (
            *tensors.attention(rotated_rows=tensors.interleaved_rows),
            tensors.FEED_FORWARD_NORM,
            *tensors.dense(may_be_biased=True),
            *tensors.mixture(),
        ),
        (*tensors.EMBEDDINGS, Tensor("rope_freqs.weight", ("rope_factors",), ("rotated",), optional=True)),
    ),
    sizes=tensors.sizes,
    from_gguf=partial(
        decoder.from_gguf, theta=10_000.0, feed_forward=partial(decoder.mixture_from_gguf, width_key="feed_forward_length")
    ),
    from_json=decoder.from_json,
    to_gguf=partial(decoder.to_gguf, width_key="feed_forward_length"),
)
