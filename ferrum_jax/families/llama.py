"""LLaMA (arXiv 2302.13971, 2407.21783). Files of arch `llama` may also be Mistral or Mixtral: they are the same layers."""

from ferrum_jax.families import common
from ferrum_jax.families.family import Family
from ferrum_jax.families.table import Tensor

LLAMA = Family(
    architecture="llama",
    model_class="LlamaForCausalLM",
    tensors=common.decoder(
        (
            *common.attention(rotated_rows=common.interleaved_rows),
            common.FEED_FORWARD_NORM,
            *common.dense(may_be_biased=True),
            *common.mixture(),
        ),
        (*common.EMBEDDINGS, Tensor("rope_freqs.weight", ("rope_factors",), ("rotated",), optional=True)),
    ),
    sizes=common.sizes,
)
