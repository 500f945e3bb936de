"""`LoraConfig`, `LoraAdapter` and `init`: low-rank factors for the matrices of a model (arXiv 2106.09685).

A product x W^T gains scale x A^T B^T. B begins with zeros, so the model begins as it is. Each expert of a mixture has its own
factors; its gate and up share A, as in PEFT, where both are one matrix.
"""

from __future__ import annotations

import dataclasses
import math
import zlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from ferrum_jax import families
from ferrum_jax.config import Attention, ModelConfig
from ferrum_jax.errors import UnsupportedModelError
from ferrum_jax.finetune.names import peft_name
from ferrum_jax.models.scan import Sliced
from ferrum_jax.quantized import LayerStack

if TYPE_CHECKING:
    from ferrum_jax.model import Model

# The matrices of a layer by target; those that stand together share A, and the rows of their B lie one after the other.
MATRICES: dict[str, tuple[tuple[str, tuple[str, ...]], ...]] = {
    "attention": tuple(
        (f"{mixer}.{name}", (name,))
        for mixer, names in (
            ("attention", ("query", "query_a", "query_b", "key", "value", "key_value_a", "output")),
            ("delta_net", ("qkv", "gate", "beta", "alpha", "beta_alpha", "output")),
            ("short_conv", ("into", "output")),
        )
        for name in names
    ),
    "dense": tuple(
        (f"feed_forward.{prefix}{name}", (prefix + name,)) for prefix in ("", "shared_") for name in ("gate", "up", "down")
    ),
    "experts": (
        ("feed_forward.expert_gate_up", ("expert_gate", "expert_up")),
        ("feed_forward.expert_down", ("expert_down",)),
    ),
}
_DTYPES = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """What an adapter is.

    Attributes:
      rank: columns of A and B.
      alpha: what the adapter adds is multiplied by alpha / rank.
      targets: which matrices it adapts: "attention" (and those of layers that recur), "dense" (feed-forward, shared experts
        too), "experts". Those that a model does not have are passed over, and those that PEFT has no module for.
      dtype: of its factors, "float32" or "bfloat16".
      rslora: multiply by alpha / sqrt(rank) instead (arXiv 2312.03732).
      dora: is refused: the norms of the adapted rows (arXiv 2402.09353) are not computed.
    """

    rank: int = 8
    alpha: float = 16.0
    targets: tuple[str, ...] = ("attention", "dense", "experts")
    dtype: str = "float32"
    rslora: bool = False
    dora: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "targets", tuple(self.targets))
        if isinstance(self.rank, bool) or not isinstance(self.rank, int) or self.rank < 1:
            raise ValueError(f"LoraConfig.rank must be a positive integer, not {self.rank!r}")
        if isinstance(self.alpha, bool) or not isinstance(self.alpha, int | float) or not 0 < self.alpha < math.inf:
            raise ValueError(f"LoraConfig.alpha must be a positive number, not {self.alpha!r}")
        if not self.targets or (unknown := set(self.targets) - MATRICES.keys()):
            what = f"has {min(unknown)!r}" if self.targets else "is empty"
            raise ValueError(f"LoraConfig.targets {what}; the targets are {', '.join(MATRICES)}")
        if self.dora:
            raise ValueError("LoraConfig.dora: DoRA is not supported; LoRA and rsLoRA (rslora=True) are")
        if self.dtype not in _DTYPES:
            raise ValueError(f"LoraConfig.dtype {self.dtype!r} is not supported; supported: {', '.join(_DTYPES)}")

    @property
    def scale(self) -> float:
        """The factor of what the adapter adds."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LoraAdapter:
    """The factors of an adapter, a pytree.

    Attributes:
      pairs: by the path of a matrix in a layer, such as "attention.query", pairs (A, B) [layers, rank, in] and [layers, out,
        rank], those of experts [layers, experts, ...].
      config: what it is; static.
      model: the configuration of the model that it is for; static.
    """

    pairs: dict[str, Sliced]
    config: LoraConfig = dataclasses.field(metadata={"static": True})
    model: ModelConfig = dataclasses.field(metadata={"static": True})


def init(model: Model, config: LoraConfig, key: jax.Array) -> LoraAdapter:
    """A new adapter: A is uniform in +-1 / sqrt(in), B is zero.

    Args:
      model: that it is for.
      config: what it is.
      key: a PRNG key, of which A is a function.

    Raises:
      UnsupportedModelError: if layers of the model cannot be trained yet.
      ValueError: if the model has none of the targets.
    """
    if (placement := model._runtime.placement).size > 1:
        raise UnsupportedModelError(f"training on a mesh ({placement}) is not supported yet; load the model on one device")
    return init_for(model.params, model.config, config, key)


def init_for(params: Mapping[str, Any], model: ModelConfig, config: LoraConfig, key: jax.Array) -> LoraAdapter:
    """`init` for the parameters, or their shapes, of a model with this configuration."""
    require_trainable(model)
    family, pairs = families.of_architecture(model.architecture, "LoraConfig"), {}
    for target in dict.fromkeys(config.targets):
        for path, names in MATRICES[target]:
            group = path.partition(".")[0]
            stacks = [params["layers"].get(group, {}).get(name) for name in names]
            if all(stacks) and peft_name(family, (group, names[0])):
                pairs[path] = _pairs(stacks, config, jax.random.fold_in(key, zlib.crc32(path.encode())))
    if not pairs:
        raise ValueError(f"LoraConfig.targets {', '.join(config.targets)}: the model has none of these matrices")
    return LoraAdapter(pairs, config, model)


def _pairs(stacks: list[LayerStack], config: LoraConfig, key: jax.Array) -> Sliced:
    """The pairs of matrices that share A, for the layers that have them."""
    known = [{format: tensor.shape[1:] for format, tensor in stack.stacks.items()} for stack in stacks]
    shapes = [[of_format.get(format, ()) for format in stack.formats] for stack, of_format in zip(stacks, known, strict=True)]
    labels, found = [], {}
    for of_layer in zip(*shapes, strict=True):
        labels.append(" ".join("x".join(map(str, shape)) for shape in of_layer).strip())
        found[labels[-1]] = of_layer
    groups = {}
    for number, (label, of_layer) in enumerate(sorted(found.items())):
        if label:
            *experts, _, columns = of_layer[0]
            stack, rows = (labels.count(label), *experts), sum(shape[-2] for shape in of_layer)
            bound, own = columns**-0.5, jax.random.fold_in(key, number)
            a = jax.random.uniform(own, (*stack, config.rank, columns), jnp.float32, -bound, bound)
            groups[label] = a.astype(config.dtype), jnp.zeros((*stack, rows, config.rank), config.dtype)
    return Sliced(groups, tuple(labels))


def require_trainable(config: ModelConfig) -> None:
    """Raises UnsupportedModelError if there is a layer that cannot be trained yet."""
    for number, spec in enumerate(config.layers):
        problem = ""
        if isinstance(spec.mixer, Attention) and spec.mixer.shared_kv:
            problem = "reads the keys and values of another layer"
        elif spec.input_width:
            problem = "has an input of its own"
        if problem:
            raise UnsupportedModelError(
                f"architecture {config.architecture} cannot be fine-tuned yet: layer {number} {problem}"
            )
