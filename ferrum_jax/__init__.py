"""ferrum_jax: language models in JAX, straight from compressed GGUF files.

    import ferrum_jax as fj
    model = fj.load("smollm2:135m")
    print(model.generate(["Iron is"], fj.SamplingParams(max_tokens=32, temperature=0.0))[0].text)

Names are loaded on first use, so that `import ferrum_jax` alone does not import jax.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "ChatTemplateError": "errors",
    "Completion": "completion",
    "EmbeddingModel": "embedding",
    "Engine": "engine",
    "EngineConfig": "engine",
    "FerrumError": "errors",
    "Model": "model",
    "ModelConfig": "config",
    "ModelFileError": "errors",
    "ModelNotFoundError": "errors",
    "NotFiniteError": "errors",
    "OutOfMemoryError": "errors",
    "Request": "engine",
    "Routing": "model",
    "SamplingParams": "sampling",
    "Tokenizer": "tokenizer",
    "UnsupportedModelError": "errors",
    "functional": "",
    "load": "loading",
    "plotting": "",
    "progress": "",
}

if TYPE_CHECKING:
    from ferrum_jax import functional as functional
    from ferrum_jax import plotting as plotting
    from ferrum_jax import progress as progress
    from ferrum_jax.completion import Completion as Completion
    from ferrum_jax.config import ModelConfig as ModelConfig
    from ferrum_jax.embedding import EmbeddingModel as EmbeddingModel
    from ferrum_jax.engine import Engine as Engine
    from ferrum_jax.engine import EngineConfig as EngineConfig
    from ferrum_jax.engine import Request as Request
    from ferrum_jax.errors import ChatTemplateError as ChatTemplateError
    from ferrum_jax.errors import FerrumError as FerrumError
    from ferrum_jax.errors import ModelFileError as ModelFileError
    from ferrum_jax.errors import ModelNotFoundError as ModelNotFoundError
    from ferrum_jax.errors import NotFiniteError as NotFiniteError
    from ferrum_jax.errors import OutOfMemoryError as OutOfMemoryError
    from ferrum_jax.errors import UnsupportedModelError as UnsupportedModelError
    from ferrum_jax.loading import load as load
    from ferrum_jax.model import Model as Model
    from ferrum_jax.model import Routing as Routing
    from ferrum_jax.sampling import SamplingParams as SamplingParams
    from ferrum_jax.tokenizer import Tokenizer as Tokenizer


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'ferrum_jax' has no attribute {name!r}")
    home = importlib.import_module(f"ferrum_jax.{_HOMES[name] or name}")
    value = getattr(home, name) if _HOMES[name] else home
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
