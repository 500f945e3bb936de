"""Derivatives for operations whose kernels have none.

The idea: whichever backend served the call, its derivative is that of a reference which computes the same in plain JAX. A
linear operation does not need a reference, only its transpose, and then its first argument is not kept for the backward pass.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import jax

Function = Callable[..., Any]


def derivative_of(reference: Function, *, of: Sequence[str] = (), static: Sequence[str] = ()) -> Callable[[Function], Function]:
    """Decorates an operation, to be called with positional arguments: its derivative is that of `reference`.

    Args:
      reference: of the same arguments, static ones included.
      of: names of the arguments that have a derivative; () for all of them.
      static: names of the arguments that are not arrays.
    """

    def decorate(operation: Function) -> Function:
        names = list(inspect.signature(operation).parameters)
        kept = [name for name in names if name not in static]
        varied = list(of) or kept

        def backward(*given: Any) -> tuple[Any, ...]:
            *settings, arguments, cotangents = given
            known = dict(zip(static, settings, strict=True)) | dict(zip(kept, arguments, strict=True))

            def varying(*values: Any) -> Any:
                every = known | dict(zip(varied, values, strict=True))
                return reference(*(every[name] for name in names))

            _, back = jax.vjp(varying, *(known[name] for name in varied))
            found = dict(zip(varied, back(cotangents), strict=True))
            return tuple(found.get(name) for name in kept)

        return _with_rule(operation, static, lambda *arguments: arguments, backward)

    return decorate


def linear(transpose: Function, *, static: Sequence[str] = ()) -> Callable[[Function], Function]:
    """Decorates an operation that is linear in its first argument and has no derivative with respect to the others.

    Args:
      transpose: takes the cotangents of the results (in the first argument's dtype), the other arguments and the static ones,
        and returns the cotangent of the first argument.
      static: names of the arguments that are not arrays, the last ones.
    """

    def decorate(operation: Function) -> Function:
        def backward(*given: Any) -> tuple[Any, ...]:
            *settings, (like, *others), cotangents = given
            cotangents = jax.tree.map(lambda part: part.astype(like.dtype), cotangents)
            return transpose(cotangents, *others, *settings).astype(like.dtype), *(None for _ in others)

        return _with_rule(operation, static, lambda x, *others: (x[:0], *others), backward)

    return decorate


def _with_rule(operation: Function, static: Sequence[str], keep: Function, backward: Function) -> Function:
    """The operation with the backward pass `backward(*static, kept, cotangents)`; `keep` selects what of its other arguments is
    kept."""
    names = list(inspect.signature(operation).parameters)
    fixed = [names.index(name) for name in static]
    operation = jax.custom_vjp(operation, nondiff_argnums=fixed)

    def forward(*arguments: Any) -> tuple[Any, Any]:
        return operation(*arguments), keep(*(value for i, value in enumerate(arguments) if i not in fixed))

    operation.defvjp(forward, backward)
    return operation
