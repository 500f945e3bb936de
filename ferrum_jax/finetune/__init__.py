"""LoRA adapters trained through compressed weights.

    from ferrum_jax import finetune
    config = finetune.LoraConfig(rank=8)
    adapter = finetune.train(model, examples, config, steps=100)
    finetune.save_peft(adapter, "out", model)

`init` and `loss` are pure, for your own loop: `jax.value_and_grad(loss, argnums=1)`.
"""

from ferrum_jax.finetune.lora import LoraAdapter, LoraConfig, init
from ferrum_jax.finetune.objective import PackedBatch, loss
from ferrum_jax.finetune.packing import Example, pack
from ferrum_jax.finetune.peft import save_peft
from ferrum_jax.finetune.reading import read_examples
from ferrum_jax.finetune.training import Report, train

__all__ = [
    "Example",
    "LoraAdapter",
    "LoraConfig",
    "PackedBatch",
    "Report",
    "init",
    "loss",
    "pack",
    "read_examples",
    "save_peft",
    "train",
]
