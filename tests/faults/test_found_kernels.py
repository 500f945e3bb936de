"""Faults of the choice of backends, each put back into our own source: its guard must fail."""

from __future__ import annotations

import pytest

from ferrum_jax import implementation
from ferrum_jax.models import decoder
from interpret import test_delta_net as interpreted
from pallas_kernels import dispatch, native
from pallas_kernels.delta_net import chunks, xla
from pallas_kernels.native import tables
from support.compiler import needs_compiler
from support.patching import Fault, applied, retraced
from support.random_models import DENSE
from unit.kernels import test_delta_net as delta_net
from unit.kernels import test_native
from unit.model import test_decoder_layers as whole_layers
from unit.model import test_implementation as guards


def an_unused_operation_is_refused() -> None:
    guards.test_what_a_model_cannot_have_is_refused(DENSE, {"expert_ffn": "composed"}, "this model does not use expert_ffn")


FAULTS = {
    "tail": Fault(
        "the convolution begins anew with each step",
        xla._step,
        "jnp.concatenate([tail, qkv[None]])",
        "jnp.concatenate([tail * 0, qkv[None]])",
        retraced(delta_net.test_a_ragged_step_is_the_reference, delta_net.SHAPES[0], "xla"),
    ),
    "decay": Fault(
        "a memory decays after it was corrected",
        xla._step,
        "- _read(memory, k))",
        "- _read(memory / jnp.exp(log_decay)[:, None, None], k))",
        retraced(delta_net.test_a_ragged_step_is_the_reference, delta_net.SHAPES[0], "xla"),
    ),
    "tiled": Fault(
        "each key head has consecutive value heads, whatever the model says",
        xla.heads_of,
        "if tiled else",
        "if False else",
        retraced(delta_net.test_a_ragged_step_is_the_reference, delta_net.SHAPES[1], "xla"),
    ),
    "places": Fault(
        "the state after a token that is not to be kept overwrites another",
        xla.delta_net,
        "jnp.where(sequences.writes[t] < 0, places, sequences.writes[t])",
        "sequences.writes[t]",
        retraced(delta_net.test_states_after_tokens_in_between_are_kept_where_asked, "xla"),
    ),
    "chunk": Fault(
        "a chunk is taken at once although the state after one of its tokens is to be kept",
        chunks.whole_chunks,
        "& (between == 0)",
        "",
        retraced(interpreted.test_a_state_within_a_chunk_is_kept, interpreted.on_gpu, interpreted.SMALL),
    ),
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
    "signs": Fault(
        "the eighth sign after seven is always positive",
        tables._rows,
        "even_signs(np.arange(128))",
        "np.arange(128)",
        test_native.test_the_grids_in_the_header_are_those_of_gguf,
    ),
}

IN_ONE_CALL = {
    "window": Fault(
        "all layers of one call have the window of the first",
        decoder._mixers,
        "mixer.window",
        "config.attentions[0].window",
        retraced(whole_layers.test_one_call_gives_what_the_composition_gives, "windows and ropes", "float16"),
    ),
    "rope": Fault(
        "all layers of one call have the rotation of the first",
        decoder._mixers,
        "rotations.index(mixer.rope)",
        "0",
        retraced(whole_layers.test_one_call_gives_what_the_composition_gives, "windows and ropes", "float16"),
    ),
    "state": Fault(
        "all delta nets of one call have the state of the first",
        decoder._mixers,
        "*places[layer], mixer.tiled",
        "0, 0, mixer.tiled",
        retraced(whole_layers.test_one_call_gives_what_the_composition_gives, "qwen35", "float16"),
    ),
    "pages": Fault(
        "all layers of one call look for pages in the table of the first pool",
        native.decoder_layers,
        "(slots, table.page_table)",
        "(slots, tables[0].page_table)",
        retraced(whole_layers.test_one_call_gives_what_the_composition_gives, "windows and ropes", "float16"),
    ),
}
FAULTS |= IN_ONE_CALL


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[needs_compiler, pytest.mark.slow] if name in IN_ONE_CALL else []) for name in FAULTS]
)
def test_every_fault_is_noticed(name):
    fault = FAULTS[name]
    fault.guard()
    with applied(fault), pytest.raises((AssertionError, pytest.fail.Exception)):
        fault.guard()
