"""Run language models in JAX, straight from compressed files.

    import ferrum_jax as fj
    model = fj.load("smollm2:135m")
    print(model.generate(["Iron is"], fj.SamplingParams(max_tokens=32, temperature=0.0))[0].text)

Names are imported when they are first used, so `import ferrum_jax` alone does not import jax.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

__all__ = [
    "ChatTemplateError",
    "Completion",
    "EmbeddingModel",
    "Engine",
    "EngineConfig",
    "FerrumError",
    "Model",
    "ModelConfig",
    "ModelFileError",
    "ModelNotFoundError",
    "NotFiniteError",
    "OutOfMemoryError",
    "Request",
    "Routing",
    "SamplingParams",
    "Structured",
    "Tokenizer",
    "UnsupportedModelError",
    "finetune",
    "functional",
    "load",
    "plotting",
    "progress",
]

_MODULES = ("finetune", "functional", "plotting", "progress")
_HOMES = {  # of all other names: the module that defines them
    "Completion": "completion",
    "EmbeddingModel": "embedding",
    "Engine": "engine",
    "EngineConfig": "engine",
    "Model": "model",
    "ModelConfig": "config",
    "Request": "engine",
    "Routing": "model",
    "SamplingParams": "sampling",
    "Structured": "structured",
    "Tokenizer": "tokenizer",
    "load": "loading",
}

if TYPE_CHECKING:
    from ferrum_jax import finetune, functional, plotting, progress
    from ferrum_jax.completion import Completion
    from ferrum_jax.config import ModelConfig
    from ferrum_jax.embedding import EmbeddingModel
    from ferrum_jax.engine import Engine, EngineConfig, Request
    from ferrum_jax.errors import (
        ChatTemplateError,
        FerrumError,
        ModelFileError,
        ModelNotFoundError,
        NotFiniteError,
        OutOfMemoryError,
        UnsupportedModelError,
    )
    from ferrum_jax.loading import load
    from ferrum_jax.model import Model, Routing
    from ferrum_jax.sampling import SamplingParams
    from ferrum_jax.structured import Structured
    from ferrum_jax.tokenizer import Tokenizer


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'ferrum_jax' has no attribute {name!r}")
    if name in _MODULES:
        return importlib.import_module(f"ferrum_jax.{name}")
    value = getattr(importlib.import_module(f"ferrum_jax.{_HOMES.get(name, 'errors')}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
