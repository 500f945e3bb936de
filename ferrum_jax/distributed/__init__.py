"""Where a model's arrays are: see `placement`, which is imported when `Placement` is first asked for, as it needs JAX."""

from typing import TYPE_CHECKING, Any

from ferrum_jax.distributed.axes import AXES, RULES, Axis

if TYPE_CHECKING:
    from ferrum_jax.distributed.placement import Placement

__all__ = ["AXES", "RULES", "Axis", "Placement"]


def __getattr__(name: str) -> Any:
    if name == "Placement":
        from ferrum_jax.distributed.placement import Placement

        return Placement
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
