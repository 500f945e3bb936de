"""Mistakes that fine-tuning can make, each put into our own source: its guard must fail."""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
import pytest

from ferrum_jax import finetune
from ferrum_jax.finetune import peft
from ferrum_jax.models.layers import FeedForward
from pallas_kernels import segment_attention as attention
from pallas_kernels.delta_net import packed
from support.patching import Fault, applied, in_folder, retraced
from unit.finetune import test_families as families
from unit.finetune import test_loss as parts


def what_is_not_learned_is_no_target() -> None:
    batch = finetune.pack([finetune.Example([5, 6, 7, 8], [True, False, True, False]), finetune.Example([9, 4])], 8, 50)
    targets = batch.targets[0]
    assert targets[targets >= 0].tolist() == [7, 4] and batch.rows[0][:2].tolist() == [1, 4]
    assert np.array_equal(batch.starts[0], [0, 4, 6])


ATTENTION = retraced(parts.test_attention_of_segments, 0, False)
DELTA_NET = retraced(families.test_packed_delta_net, False)
STEP = retraced(in_folder(families.test_a_step, "glm4moe"))
FAULTS = {
    "attention": Fault(
        "a sequence sees those before it in its pack",
        attention._scores,
        "(key >= _cut(low, i, 0, static)[:, None]) & ",
        "",
        ATTENTION,
    ),
    "convolution": Fault(
        "the convolution goes on into the next sequence",
        packed.convolved,
        "place - back >= first",
        "place - back >= 0",
        DELTA_NET,
    ),
    "corrections": Fault(
        "tokens of a chunk correct those of the next sequence",
        packed._chunk,
        "(begins[:, None] == begins[None]) & ",
        "",
        DELTA_NET,
    ),
    "memory": Fault("a sequence begins with the memory of another", packed._chunk, "begins < start", "begins >= 0", DELTA_NET),
    "mask": Fault(
        "every token is learned",
        finetune.Example.targets.fget,
        "if self.learned is None else np.asarray(self.learned, bool)",
        "if True else None",
        what_is_not_learned_is_no_target,
    ),
    "scale": Fault(
        "the adapter's term is not divided by its rank",
        finetune.LoraConfig.scale.fget,
        "else self.rank)",
        "else 1)",
        STEP,
    ),
    "halves": Fault("gate has the adapter of up", FeedForward.expert_adapters, "gate, up = (both", "up, gate = (both", STEP),
    "layout": Fault(
        "an expert's rank is outside the expert in B",
        peft._Modules._of_experts,
        "b.transpose(1, 2, 0)",
        "b.transpose(1, 0, 2)",
        STEP,
    ),
}


@functools.cache
def sound(guard: Callable[[], None]) -> None:
    """The guard passes without a fault; once is enough."""
    guard()


@pytest.mark.slow
@pytest.mark.parametrize("name", FAULTS)
def test_every_fault_is_noticed(name: str) -> None:
    fault = FAULTS[name]
    sound(fault.guard)
    with applied(fault), pytest.raises(AssertionError):
        fault.guard()
