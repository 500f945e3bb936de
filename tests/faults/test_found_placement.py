"""Faults of how arrays are cut, each put back into our own source: its guard must fail."""

from __future__ import annotations

import functools

import pytest

from ferrum_jax import memory, quantized
from ferrum_jax.distributed import Placement
from ferrum_jax.weights import stream
from support.patching import Fault, applied, in_folder
from unit.distributed import test_mesh as mesh
from unit.distributed import test_placement as placement

FAULTS = {
    "runs": Fault(
        "a dimension is cut anywhere",
        Placement.cuts,
        "runs, over = 1 if size % axis.run else size // axis.run, []",
        "runs, over = size, []",
        placement.test_only_whole_runs_are_cut_and_only_evenly,
    ),
    "twice": Fault(
        "an axis of the mesh cuts two dimensions",
        Placement.cuts,
        " and name not in used",
        "",
        placement.test_only_whole_runs_are_cut_and_only_evenly,
    ),
    "blocks": Fault(
        "columns are cut inside blocks",
        stream._Shapes.__init__,
        "math.lcm(axis.run, unit)",
        "axis.run",
        placement.test_an_axis_is_cut_in_all_tensors_or_in_none,
    ),
    "alike": Fault(
        "a tensor is cut without regard to others",
        stream._Shapes.__init__,
        "math.gcd(self.pieces.get(key, 0), size // math.lcm(axis.run, unit))",
        "size // math.lcm(axis.run, unit)",
        placement.test_what_belongs_to_a_head_goes_with_it,
    ),
    "order": Fault(
        "columns in another order are cut",
        stream._Shapes.__init__,
        "tensor.shape[-1] if tensor.order else ",
        "",
        in_folder(placement.test_packed_checkpoints, "gptq", True),
    ),
    "sum": Fault(
        "what devices computed with parts of the columns is not summed",
        quantized._summed,
        "lax.psum(y, over) if over else y",
        "y",
        functools.partial(mesh.test_a_layer_has_two_sums, mesh.DENSE, {"tensor": 2}, 2),
    ),
    "heads": Fault(
        "attention is cut without regard to the heads of keys and values",
        stream.fitted,
        "all(map(fits, config.attentions))",
        "True",
        mesh.test_attention_is_cut_in_whole_heads_or_stays_whole,
    ),
    "held": Fault(
        "a device counts what all devices hold",
        memory._held,
        "sharding.shard_shape(leaf.shape)",
        "leaf.shape",
        placement.test_smollm2,
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_every_fault_is_noticed(name: str) -> None:
    fault = FAULTS[name]
    fault.guard()
    with applied(fault), pytest.raises((AssertionError, ValueError)):
        fault.guard()
