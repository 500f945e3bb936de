"""Faults of the choice of backends, each put back into our own source: its guard must fail."""

from __future__ import annotations

import pytest

from ferrum_jax import implementation
from pallas_kernels import dispatch
from support.patching import Fault, applied
from support.random_models import DENSE
from unit.model import test_implementation as guards


def an_unused_operation_is_refused() -> None:
    guards.test_what_a_model_cannot_have_is_refused(DENSE, {"expert_ffn": "composed"}, "this model does not use expert_ffn")


FAULTS = {
    "forced": Fault(
        "the order decides whatever is forced",
        dispatch._forced,
        "forced.get(case.operation)",
        "None",
        lambda: guards.test_a_backend_that_cannot_serve_is_an_error_that_says_why("triton", "cannot serve"),
    ),
    "part": Fault(
        "what an operation is composed of cannot be forced inside of it",
        dispatch._forced,
        "if part in forced",
        "if False",
        guards.test_a_part_that_is_forced_has_the_operation_composed,
    ),
    "unused": Fault(
        "an operation that the model does not use can be forced",
        implementation.require_implementation,
        "if operation not in used",
        "if False",
        an_unused_operation_is_refused,
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_every_fault_is_noticed(name):
    fault = FAULTS[name]
    fault.guard()
    with applied(fault), pytest.raises((AssertionError, pytest.fail.Exception)):
        fault.guard()
