"""Every supported family of models: `FAMILIES`. docs/architecture/families.md explains how to add one.

A family is one file here. Code that reads, checks, converts or describes a checkpoint gets the facts from its family, and
nothing outside this folder compares names of architectures or model classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ferrum_jax.errors import ModelFileError, UnsupportedModelError
from ferrum_jax.families.bert import BERT
from ferrum_jax.families.deepseek2 import DEEPSEEK2, DEEPSEEK3, GLM4_FLASH, KIMI_K2
from ferrum_jax.families.family import Family
from ferrum_jax.families.gemma3 import GEMMA3, GEMMA3_VISION
from ferrum_jax.families.gemma4 import GEMMA4, GEMMA4_VISION
from ferrum_jax.families.glm4moe import GLM4_MOE
from ferrum_jax.families.gpt_oss import GPT_OSS
from ferrum_jax.families.lfm2 import LFM2, LFM2_MOE
from ferrum_jax.families.llama import LLAMA
from ferrum_jax.families.mistral import MISTRAL
from ferrum_jax.families.mixtral import MIXTRAL
from ferrum_jax.families.qwen2 import QWEN2
from ferrum_jax.families.qwen3 import QWEN3
from ferrum_jax.families.qwen3moe import QWEN3_MOE
from ferrum_jax.families.qwen3next import QWEN3_NEXT
from ferrum_jax.families.qwen35 import QWEN35, QWEN35_MOE, QWEN35_MOE_VISION, QWEN35_VISION

__all__ = ["FAMILIES", "Family", "of_architecture", "of_content", "of_metadata", "sharing"]

FAMILIES: tuple[Family, ...] = (
    *(LLAMA, MISTRAL, MIXTRAL, QWEN2, QWEN3, QWEN3_MOE, GPT_OSS, BERT),
    *(QWEN35, QWEN35_VISION, QWEN35_MOE, QWEN35_MOE_VISION, QWEN3_NEXT),
    *(GEMMA3, GEMMA3_VISION, GEMMA4, GEMMA4_VISION),
    *(GLM4_MOE, LFM2, LFM2_MOE),
    *(DEEPSEEK3, DEEPSEEK2, KIMI_K2, GLM4_FLASH),
)
"""Where several share a GGUF architecture, the first one reads its files."""


def of_architecture(architecture: str, where: str) -> Family:
    """The family of a GGUF architecture. UnsupportedModelError for an unknown one; `where`: the file that names it."""
    if found := sharing(architecture):
        return found[0]
    known = ", ".join(dict.fromkeys(family.architecture for family in FAMILIES))
    raise UnsupportedModelError(f"{where}: architecture {architecture!r} is not supported; supported: {known}")


def sharing(architecture: object) -> tuple[Family, ...]:
    """The families of a GGUF architecture, none if it is not text: the first reads its files."""
    return tuple(family for family in FAMILIES if isinstance(architecture, str) and family.architecture == architecture)


def of_metadata(metadata: Mapping[str, object], where: str) -> Family:
    """The family that the metadata of a GGUF file name. Raises like `of_architecture`, and ModelFileError if they name none."""
    architecture = metadata.get("general.architecture")
    if not isinstance(architecture, str):
        raise ModelFileError(f"{where}: key general.architecture: is missing or not a string")
    return of_architecture(architecture, where)


def of_content(content: Mapping[str, Any], path: Path) -> Family:
    """The family of a config.json at `path`. UnsupportedModelError for an unknown class, ModelFileError for names that
    contradict each other."""
    names, kind = content.get("architectures"), content.get("model_type")
    if names is None and isinstance(kind, str):
        names = [family.model_class for family in FAMILIES if family.model_type == kind] or [kind]
    if not isinstance(names, list) or len(names) != 1 or not isinstance(names[0], str):
        raise ModelFileError(f"{path}: key architectures: must name one model class, not {names!r}")
    if found := [family for family in FAMILIES if family.model_class == names[0]]:
        kinds = {family.model_type: family for family in found}
        if kind is not None and kind not in kinds:
            known = " or ".join(map(repr, kinds))
            raise ModelFileError(f"{path}: key model_type: {kind!r} is not that of {names[0]}, {known}")
        return found[0] if kind is None else kinds[kind]
    known = ", ".join(family.model_class for family in FAMILIES)
    raise UnsupportedModelError(f"{path}: key architectures: {names[0]} is not supported; supported: {known}")
