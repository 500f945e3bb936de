"""What the families of decoders share: tensors and the sizes of their axes."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import numpy as np

from ferrum_jax.config import Attention, Dense, LayerSpec, Mixture, ModelConfig
from ferrum_jax.families.table import Change, GgufRows, Part, Path, Table, Tensor, every_layer

IGNORED = r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq"
EMBEDDINGS = (
    Tensor("token_embd.weight", ("embedding",), ("vocab", "hidden"), ("model.embed_tokens",)),
    Tensor("output_norm.weight", ("final_norm",), ("hidden",), ("model.norm",)),
    Tensor("output.weight", ("unembedding",), ("vocab", "hidden"), ("lm_head",), optional=True),
)
HEAD_NORMS = (
    Tensor("attn_q_norm.weight", ("attention", "query_norm"), ("head",), ("self_attn.q_norm",)),
    Tensor("attn_k_norm.weight", ("attention", "key_norm"), ("head",), ("self_attn.k_norm",)),
)


def decoder(layer: tuple[Tensor, ...], whole: tuple[Tensor, ...] = EMBEDDINGS) -> Table:
    """The table of a decoder, with the module names that transformers uses for almost all of them."""
    return Table(whole, layer, "model.layers.", IGNORED)


def attention(*, rotated_rows: GgufRows | None = None, biased: bool = False, not_in_gguf: str = "") -> tuple[Tensor, ...]:
    """Norm and matrices of grouped-query attention. rotated_rows: `gguf_rows` of queries and keys. biased: queries, keys and
    values always have biases; otherwise all four matrices may have them. not_in_gguf: applies to the biases."""
    norm = Tensor("attn_norm.weight", ("attention_norm",), ("hidden",), ("input_layernorm",))
    matrices, biases = [], []
    for letter, module, name, axis in (
        ("q", "q_proj", "query", "heads"),
        ("k", "k_proj", "key", "kv_heads"),
        ("v", "v_proj", "value", "kv_heads"),
        ("output", "o_proj", "output", "heads"),
    ):
        stem, path, modules = f"attn_{letter}", ("attention", name), (f"self_attn.{module}",)
        is_output = letter == "output"
        axes = ("hidden", axis) if is_output else (axis, "hidden")
        rows = rotated_rows if letter in ("q", "k") else None
        matrices.append(Tensor(f"{stem}.weight", path, axes, modules, gguf_rows=rows))
        path, optional = ("attention", f"{name}_bias"), is_output or not biased
        bias = Tensor(f"{stem}.bias", path, axes[:1], modules, optional=optional, gguf_rows=rows, not_in_gguf=not_in_gguf)
        biases.append(bias)
    return (norm, *matrices, *biases)


def shifted_norm(stem: str, path: Path, axis: str, *modules: str, layers: Callable[[LayerSpec], bool] = every_layer) -> Tensor:
    """A norm whose weights have the 1 added in GGUF files that transformers adds to them."""
    changes = (Change(f"{module}.weight", values=lambda weights: 1 + weights) for module in modules)
    return Tensor(f"{stem}.weight", path, (axis,), tuple(changes), layers)


def is_mixture(spec: LayerSpec) -> bool:
    """Whether the feed-forward of a layer is a mixture of experts."""
    return isinstance(spec.feed_forward, Mixture)


def has_shared(spec: LayerSpec) -> bool:
    """Whether every token of a layer goes through an expert in addition to those that are chosen for it."""
    return isinstance(spec.feed_forward, Mixture) and spec.feed_forward.shared_width > 0


def is_dense(spec: LayerSpec) -> bool:
    """Whether the feed-forward of a layer is one SwiGLU."""
    return isinstance(spec.feed_forward, Dense)


FEED_FORWARD_NORM = Tensor("ffn_norm.weight", ("feed_forward_norm",), ("hidden",), ("post_attention_layernorm",))
POST_ATTENTION_NORM = dataclasses.replace(FEED_FORWARD_NORM, name="post_attention_norm.weight")  # by its other name


def dense(*, may_be_biased: bool = False) -> tuple[Tensor, ...]:
    """The matrices of a SwiGLU."""
    axes = {"gate": ("width", "hidden"), "up": ("width", "hidden"), "down": ("hidden", "width")}
    module = {name: (f"mlp.{name}_proj",) for name in axes}
    path = "feed_forward"
    matrices = [Tensor(f"ffn_{name}.weight", (path, name), axes[name], module[name], is_dense) for name in axes]
    biases = [
        Tensor(f"ffn_{name}.bias", (path, f"{name}_bias"), axes[name][:1], module[name], is_dense, optional=True)
        for name in axes
    ]
    return (*matrices, *(biases if may_be_biased else ()))


def mixture(router: str = "mlp.gate", experts: str = "mlp.experts") -> tuple[Tensor, ...]:
    """The router and the experts (SwiGLUs), with these names of modules and with those of Mixtral, one tensor per expert or one
    for all."""
    wide, narrow = ("expert", "expert_width", "hidden"), ("expert", "hidden", "expert_width")
    modules: tuple[str | Part, ...] = (router, "block_sparse_moe.gate")
    path = "feed_forward"
    found = [Tensor("ffn_gate_inp.weight", (path, "router"), ("routed", "hidden"), modules, is_mixture, quantize=False)]
    for name, letters, axes, part in (
        ("gate", "w1", wide, Part(f"{experts}.gate_up_proj", 0)),
        ("up", "w3", wide, Part(f"{experts}.gate_up_proj", 1)),
        ("down", "w2", narrow, Part(f"{experts}.down_proj")),
    ):
        modules = (f"{experts}.*.{name}_proj", f"block_sparse_moe.experts.*.{letters}", part)
        both = None if name == "down" else Change("ffn_gate_up_exps.weight", functools.partial(_rows_of_both, part.index))
        found.append(Tensor(f"ffn_{name}_exps.weight", (path, f"expert_{name}"), axes, modules, is_mixture, elsewhere=both))
    return tuple(found)


def _rows_of_both(index: int, spec: LayerSpec) -> np.ndarray:
    """The rows of gate (0) or up (1) in a tensor that has, for each expert, those of gate and then those of up."""
    assert isinstance(spec.feed_forward, Mixture)
    experts, width = spec.feed_forward.num_experts, spec.feed_forward.width
    return np.arange(experts * 2 * width).reshape(experts, 2, width)[:, index].reshape(-1)


def shared_expert(module: str) -> tuple[Tensor, ...]:
    """The matrices of the SwiGLU that every token of a mixture goes through, in `module` of a layer."""
    axes = {name: ("shared_width", "hidden") for name in ("gate", "up")} | {"down": ("hidden", "shared_width")}
    return tuple(
        Tensor(
            f"ffn_{name}_shexp.weight", ("feed_forward", f"shared_{name}"), axes[name], (f"{module}.{name}_proj",), has_shared
        )
        for name in axes
    )


def sizes(config: ModelConfig, spec: LayerSpec | None) -> dict[str, int | tuple[int, int]]:
    """The sizes of the axes above; heads and kv_heads are the rows of all heads together."""
    found: dict[str, int | tuple[int, int]] = {"vocab": config.vocab_size, "hidden": config.hidden_size}
    if spec is None:
        return found | {"rotated": max((mixer.rope.dim for mixer in config.attentions if mixer.rope.factored), default=0) // 2}
    mixer, feed_forward = spec.mixer, spec.feed_forward
    if isinstance(mixer, Attention):
        head = mixer.head_dim
        found |= {"heads": (mixer.num_heads, head), "kv_heads": (mixer.num_kv_heads, head), "head": head}
    if isinstance(feed_forward, Mixture):
        experts = feed_forward.num_experts
        found |= {"expert": experts, "routed": experts}
        return found | {"expert_width": feed_forward.width, "shared_width": feed_forward.shared_width}
    return found | {"width": feed_forward.width}


@functools.lru_cache
def interleaved_rows(spec: LayerSpec, rows: int) -> np.ndarray:
    """For each row of half-split heads, its row in a file for interleaved rotation, which stores rotated pairs next to each
    other."""
    assert isinstance(spec.mixer, Attention)
    width, rotated = spec.mixer.head_dim, spec.mixer.rope.dim
    head = np.arange(width)
    head[:rotated] = head[:rotated].reshape(-1, 2).T.reshape(-1)
    return (np.arange(0, rows, width)[:, None] + head).reshape(-1)
