"""Every family of models that is known: `FAMILIES`. docs/architecture/families.md tells how to add one.

A family is one file here. What reads, checks, converts or describes a checkpoint asks its family, and nothing outside of this
folder compares names of architectures or model classes.
"""

from __future__ import annotations

from collections.abc import Mapping

from ferrum_jax.errors import ModelFileError, UnsupportedModelError
from ferrum_jax.families.bert import BERT
from ferrum_jax.families.family import Family
from ferrum_jax.families.llama import LLAMA
from ferrum_jax.families.mistral import MISTRAL
from ferrum_jax.families.mixtral import MIXTRAL
from ferrum_jax.families.qwen2 import QWEN2
from ferrum_jax.families.qwen3 import QWEN3
from ferrum_jax.families.qwen3moe import QWEN3_MOE

__all__ = ["FAMILIES", "Family", "of_architecture", "of_class", "of_metadata"]

FAMILIES: tuple[Family, ...] = (LLAMA, MISTRAL, MIXTRAL, QWEN2, QWEN3, QWEN3_MOE, BERT)
"""Of several with one architecture the first reads its GGUF files."""


def of_architecture(architecture: str, where: str) -> Family:
    """The family of a GGUF architecture. UnsupportedModelError for an unknown one; `where` is what names it."""
    for family in FAMILIES:
        if family.architecture == architecture:
            return family
    known = ", ".join(dict.fromkeys(family.architecture for family in FAMILIES))
    raise UnsupportedModelError(f"{where}: architecture {architecture!r} is not supported; supported: {known}")


def of_metadata(metadata: Mapping[str, object], where: str) -> Family:
    """The family that the metadata of a GGUF file state. Raises as `of_architecture`, and ModelFileError where they state
    none."""
    architecture = metadata.get("general.architecture")
    if not isinstance(architecture, str):
        raise ModelFileError(f"{where}: key general.architecture: is missing or not a string")
    return of_architecture(architecture, where)


def of_class(model_class: str) -> Family | None:
    """The family of a class of transformers."""
    return next((family for family in FAMILIES if family.model_class == model_class), None)
