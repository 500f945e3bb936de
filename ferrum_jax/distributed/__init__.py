"""Where a model's arrays are: see `placement`."""

from ferrum_jax.distributed.placement import AXES, RULES, Axis, Placement

__all__ = ["AXES", "RULES", "Axis", "Placement"]
