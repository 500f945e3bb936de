"""What PEFT calls the matrices of a model: by the table of its family, whose rows know where directories have them."""

from __future__ import annotations

from typing import NamedTuple

from ferrum_jax.families.family import Family
from ferrum_jax.families.table import Change, Part


class PeftName(NamedTuple):
    """The module or, of experts, the parameter after the layer's number; and how the module's rows and columns differ from the
    parameter's (`change`), or which part of the parameter it is."""

    name: str
    change: Change | None = None
    part: Part | None = None


def peft_name(family: Family, path: tuple[str, ...]) -> PeftName | None:
    """Of a parameter of a layer by its path; None if PEFT has no module for it alone, or no parameter of all its experts."""
    row = family.tensors.at(path)
    if row is None:
        return None
    for module in row.modules:
        if isinstance(module, Part):
            if len(row.axes) == 3:
                return PeftName(module.tensor, part=module)
        elif isinstance(module, Change):
            sharing, _ = family.tensors.changes(f"{family.tensors.prefix}0.{module.tensor}")
            if len(sharing) == 1 and module.values is None and module.matrices is None:
                return PeftName(module.tensor.removesuffix(".weight"), change=module)
        elif "*" not in module and len(row.axes) == 2:
            return PeftName(module)
    return None
