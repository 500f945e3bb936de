"""BERT (arXiv 1810.04805) as an encoder of sentences."""

from ferrum_jax.encoder_config import EncoderConfig
from ferrum_jax.families.family import Family
from ferrum_jax.families.table import Table, Tensor


def _with_bias(stem: str, path: tuple[str, ...], axes: tuple[str, ...], module: str) -> tuple[Tensor, Tensor]:
    bias = (*path[:-1], f"{path[-1]}_bias")
    return Tensor(f"{stem}.weight", path, axes, (module,)), Tensor(f"{stem}.bias", bias, axes[:1], (module,))


def _embedding(name: str, parameter: str, axis: str, module: str, quantize: bool = True) -> Tensor:
    return Tensor(f"{name}.weight", (parameter,), (axis, "hidden"), (f"embeddings.{module}",), quantize=quantize)


def _sizes(config: EncoderConfig, spec: EncoderConfig | None) -> dict[str, int]:
    return {
        "vocab": config.vocab_size,
        "hidden": config.hidden_size,
        "heads": config.hidden_size,
        "width": config.intermediate_size,
        "position": config.context_length,
        "type": config.num_types,
    }


BERT = Family(
    architecture="bert",
    model_class="BertModel",
    tensors=Table(
        (
            _embedding("token_embd", "embedding", "vocab", "word_embeddings"),
            _embedding("position_embd", "positions", "position", "position_embeddings", quantize=False),
            _embedding("token_types", "types", "type", "token_type_embeddings", quantize=False),
            *_with_bias("token_embd_norm", ("embedding_norm",), ("hidden",), "embeddings.LayerNorm"),
        ),
        (
            *_with_bias("attn_q", ("attention", "query"), ("heads", "hidden"), "attention.self.query"),
            *_with_bias("attn_k", ("attention", "key"), ("heads", "hidden"), "attention.self.key"),
            *_with_bias("attn_v", ("attention", "value"), ("heads", "hidden"), "attention.self.value"),
            *_with_bias("attn_output", ("attention", "output"), ("hidden", "heads"), "attention.output.dense"),
            *_with_bias("attn_output_norm", ("attention_norm",), ("hidden",), "attention.output.LayerNorm"),
            *_with_bias("ffn_up", ("feed_forward", "up"), ("width", "hidden"), "intermediate.dense"),
            *_with_bias("ffn_down", ("feed_forward", "down"), ("hidden", "width"), "output.dense"),
            *_with_bias("layer_output_norm", ("feed_forward_norm",), ("hidden",), "output.LayerNorm"),
        ),
        prefix="encoder.layer.",
        ignored=r"embeddings\.position_ids|pooler\.dense\.(weight|bias)",
    ),
    sizes=_sizes,
)
