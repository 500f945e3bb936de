"""Functions of rows: each element has the same bits however many rows there are, on CPU, and the right value."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ferrum_jax.programs import COMPILER_OPTIONS
from pallas_kernels import reductions as r

CASES: dict[str, Callable] = {  # with operations around it that XLA would fuse with it
    "exp": lambda x, y: jnp.where(x > y, r.exp(x - r.row_max(x)), 0.0) * y + x,
    "log": lambda x, y: r.log(r.row_sum(r.exp(x))) + y,
    "softmax": lambda x, y: (lambda odds: odds / r.row_sum(odds))(r.exp(x - r.row_max(x))),
    "sigmoid": lambda x, y: r.sigmoid(1.702 * x + y) * y,
    "silu": lambda x, y: r.silu(x) * y + x,
    "softplus": lambda x, y: r.softplus(x + y) * y,
    "gelu": lambda x, y: r.gelu(x) * y,
}
WIDE = {  # narrower ones have other bits on jax 0.10, where a product is fused into a sum; no model has them
    "rms_norm": lambda x, y: r.rms_norm(x, y, 1e-6),
    "rotation": lambda x, y: r.term(x, y) - r.term(y, x[:, ::-1]),
}


@pytest.mark.parametrize("name", CASES | WIDE)
def test_bits_do_not_depend_on_the_number_of_rows(name):
    rng = np.random.default_rng(3)
    for width in (16, 64) if name in WIDE else (1, 3, 4, 8, 64):
        x, y = (rng.normal(0, 3, (264, width)).astype(np.float32) for _ in "xy")

        def compiled(rows, x=x, y=y):
            return jax.jit((CASES | WIDE)[name]).lower(x[:rows], y[:rows]).compile(COMPILER_OPTIONS["cpu"])

        whole = np.asarray(compiled(264)(x, y))
        for rows in (1, 3, 8, 33):
            part = compiled(rows)
            cut = [np.asarray(part(x[i : i + rows], y[i : i + rows])) for i in range(0, 264, rows)]
            np.testing.assert_array_equal(np.concatenate(cut), whole)


@pytest.mark.parametrize("varies", [False, True])
def test_values(varies, monkeypatch):
    """Of both ways to compute them, against JAX's own functions in float64."""
    monkeypatch.setattr(r, "CPU_FUSION_VARIES", varies)
    x = np.concatenate([np.linspace(-80, 80, 4001), [-np.inf, np.inf, 0.0]]).astype(np.float32)
    with jax.enable_x64(True):
        right = {
            "exp": np.exp(np.float64(x)),
            "sigmoid": jax.nn.sigmoid(np.float64(x)),
            "softplus": jax.nn.softplus(np.float64(x)),
            "gelu": jax.nn.gelu(np.float64(x[:-3]), approximate=True),
            "silu": jax.nn.silu(np.float64(x[:-3])),
        }
    for name, values in right.items():
        found = jax.jit(getattr(r, name))(x[: len(values)])
        np.testing.assert_allclose(found, np.asarray(values, np.float32), rtol=3e-6, atol=1e-6 * (name == "gelu"), err_msg=name)


@pytest.mark.parametrize("varies", [False, True])
def test_derivatives_of_large_numbers_are_finite(varies, monkeypatch):
    monkeypatch.setattr(r, "CPU_FUSION_VARIES", varies)
    x = jnp.asarray([-1e4, -200.0, -89.0, -0.5, 0.5, 89.0, 1e4])
    for function, right in ((r.sigmoid, jax.nn.sigmoid), (r.silu, jax.nn.silu), (r.softplus, jax.nn.softplus)):
        np.testing.assert_allclose(jax.vmap(jax.grad(function))(x), jax.vmap(jax.grad(right))(x), atol=1e-6)
