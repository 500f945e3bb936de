"""Mistakes that an implementation of gated delta nets and of their states can make, each put into our own source."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

import jax
import pytest

import ferrum_jax as fj
from ferrum_jax.engine.core import Core
from ferrum_jax.engine.ledger import Ledger
from ferrum_jax.engine.pages import PagePool
from ferrum_jax.families import qwen3next, tensors
from ferrum_jax.models import delta_net, layers, recurrence
from pallas_kernels.delta_net import xla
from support.engine_stand_in import Violation
from support.golden_checks import check_logits
from support.goldens import tiny_hybrids, tiny_models
from support.patching import Fault, applied, in_folder
from unit.engine import test_engine_paging as paging
from unit.kernels import test_delta_net as kernels
from unit.model import test_hybrids as hybrids


def of_golden(prompts: int) -> None:
    """The golden of the first prompts' logits, from a GGUF file."""
    jax.clear_caches()  # earlier traces have no fault in them, or another one
    spec = hybrids.BY_NAME["qwen35moe"]
    with tempfile.TemporaryDirectory() as folder:
        model = fj.load(hybrids.written(spec, Path(folder), "gguf"), dtype="float32")
        texts = tiny_models.prompts(spec.vocab, lengths=tiny_hybrids.LENGTHS[:prompts])
        check_logits(model, hybrids.golden(spec), texts)


def of_kernel(tiled: bool) -> None:
    """The reference of a batch, in which heads are grouped or tiled."""
    jax.clear_caches()
    kernels.test_a_ragged_step_is_the_reference(kernels.SHAPES[tiled], "xla")


grouped, tiled = (functools.partial(of_kernel, each) for each in (False, True))
FAULTS = {
    "carry": Fault(
        "a chunk begins with an empty state", recurrence.recurrence, "== 0", ">= 0", functools.partial(of_golden, 4)
    ),
    "own norm": Fault(
        "the delta net's own norm has a 1 added",
        delta_net.GatedDeltaNet.__call__,
        'self.stack("norm").vector(layer)',
        '1 + self.stack("norm").vector(layer)',
        functools.partial(of_golden, 2),
    ),
    "gate": Fault(
        "queries and gates are halves of their matrix",
        layers.Attention.__call__,
        "q[:, 0::2], q[:, 1::2]",
        "q[:, : q.shape[1] // 2], q[:, q.shape[1] // 2 :]",
        functools.partial(of_golden, 2),
    ),
    "tail": Fault("the tail is one token old", xla._step, "window[1:]", "window[:-1]", grouped),
    "taps": Fault("the first tap is of the newest token", xla._step, "taps[:, i]", "taps[:, -1 - i]", grouped),
    "tiled": Fault("value heads are grouped by key head in every file", xla.heads_of, "if tiled", "if False", tiled),
    "grouped": Fault("value heads are tiled in every file", xla.heads_of, "if tiled", "if True", grouped),
    "decayed": Fault(
        "the correction is of the memory before its decay", xla._step, "_read(memory, k)", "_read(kept[1], k)", grouped
    ),
    "both": Fault(
        "gate and up change places",
        tensors._rows_of_both,
        "[:, index]",
        "[:, 1 - index]",
        in_folder(hybrids.test_tensors_that_hold_several, "qwen35moe-q4_k_m"),
    ),
    "older": Fault(
        "the older matrix has all queries first",
        qwen3next._grouped,
        "np.split(rows, cuts, axis=1)",
        "np.split(rows.reshape(1, -1), cuts * mixer.key_heads, axis=1)",
        in_folder(hybrids.test_tensors_that_hold_several, "qwen3next-q8_0"),
    ),
    "fork": Fault(
        "a branch goes on without the state of the text before it",
        Ledger.admit,
        "copies.append((len(self.pools), found.checkpoint, slot))",
        "pass",
        paging.test_a_branch_and_a_copy_of_what_recurs,
    ),
    "late": Fault(
        "a checkpoint is made one token later than where it is found",
        Ledger.passed,
        "* self.page_size - prefilled - 1 if here",
        "* self.page_size - prefilled if here",
        paging.test_layers_that_recur_go_on_from_a_checkpoint,
    ),
    "kept early": Fault(
        "the end of an answer goes to a place that a conversation is about to go on from",
        Core._land,
        "self._take_in(flight, results)",
        "self._take_in(flight, results); self._keep()",
        paging.test_the_end_of_an_answer_is_kept_after_a_conversation_has_left_its_place,
    ),
    "superseded": Fault(
        "the old end of a conversation is kept longer than the new one of another",
        Ledger.admit,
        "first=True",
        "first=False",
        functools.partial(paging.test_later_turns_compute_only_what_is_new, ()),
    ),
    "prompt first": Fault(
        "the checkpoint of a prompt is kept longer than that of the answer's end",
        Ledger.end,
        "if held.checkpoint >= 0:",
        "if False:",
        paging.test_a_checkpoint_without_a_place_is_none,
    ),
    "stride": Fault(
        "a long prompt leaves no states on its way",
        Ledger.admit,
        "range(stride, last, stride) if stride else ()",
        "()",
        paging.test_a_long_prompt_leaves_states_on_its_way_as_the_budget_allows,
    ),
    "evicted": Fault(
        "a state stays without the pages before it",
        PagePool.take,
        "if self._evicted is not None:",
        "if False:",
        paging.test_a_checkpoint_is_evicted_together_with_its_page,
    ),
    "end": Fault(
        "the state at the end of an answer is found for a text that is one token shorter",
        Ledger.end,
        "self.page_size : written])",
        "self.page_size : written - 1])",
        functools.partial(paging.test_a_conversation_goes_on_from_the_end_of_an_answer, [0], 1, 0),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FAULTS)
def test_every_fault_is_noticed(name: str) -> None:
    fault = FAULTS[name]
    with applied(fault), pytest.raises((AssertionError, pytest.fail.Exception, Violation)):
        fault.guard()
