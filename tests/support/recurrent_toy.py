"""A mixer that recurs, as far as the engine can tell."""

from __future__ import annotations

import dataclasses

from ferrum_jax.config import Recurrent


@dataclasses.dataclass(frozen=True)
class Toy(Recurrent):
    """`width` numbers that recur."""

    width: int

    @property
    def kept(self) -> dict[str, tuple[int, ...]]:
        return {"state": (self.width,), "tail": (2, self.width)}
