"""`train`: the loop around `loss`, on the host.

A step is one compiled program: gradients of a few packs are summed by a scan, divided by the number of targets, and handed to
the optimizer, in donated memory. Which packs a step gets depends on the seed and the step alone, and a checkpoint has
everything else, so a run that was killed goes on with the same bits.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import statistics
import time
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ferrum_jax import progress
from ferrum_jax.errors import NotFiniteError
from ferrum_jax.finetune.checkpoints import Checkpoints
from ferrum_jax.finetune.lora import LoraAdapter, LoraConfig, init
from ferrum_jax.finetune.objective import PackedBatch, summed
from ferrum_jax.finetune.packing import Example, pack
from pallas_kernels.extras import install

if TYPE_CHECKING:
    import optax

    from ferrum_jax.model import Model

LENGTH = 2048  # tokens of a pack, if the context has as many


class Report(NamedTuple):
    """One step.

    Attributes:
      step: its number, from 1.
      loss: the mean over its targets, before the step.
      gradient_norm: the norm of its gradient, before clipping.
      tokens_per_second: of its tokens, targets or not, without padding.
      held_out_loss: the mean over the held-out targets after the step; None where it was not measured.
      seconds: that the step took, without the measurement.
    """

    step: int
    loss: float
    gradient_norm: float
    tokens_per_second: float
    held_out_loss: float | None = None
    seconds: float = 0.0


def train(
    model: Model,
    examples: Sequence[Example],
    config: LoraConfig = LoraConfig(),
    *,
    steps: int,
    optimizer: optax.GradientTransformation | None = None,
    learning_rate: float = 2e-4,
    warmup: int | None = None,
    clip: float = 1.0,
    length: int | None = None,
    accumulation: int = 1,
    held_out: float | Sequence[Example] = 0.0,
    evaluate_every: int = 50,
    patience: int | None = None,
    checkpoints: str | Path | None = None,
    checkpoint_every: int = 50,
    seed: int = 0,
    report: Callable[[Report], object] | None = None,
) -> LoraAdapter:
    """Trains an adapter.

    Args:
      model: that it is for; its weights stay as they are.
      examples: to learn from.
      config: what the adapter is.
      steps: of the optimizer.
      optimizer: of optax; None: Adam with a linear warmup, then a cosine to zero, and clipping.
      learning_rate: its peak, without an `optimizer`.
      warmup: steps of the warmup; None: a twentieth.
      clip: the largest norm of a gradient, without an `optimizer`.
      length: tokens of a pack; None: 2048, or the model's context. Longer examples are an error.
      accumulation: packs of a step.
      held_out: examples that are only measured, or the fraction of `examples` that is taken away for that.
      evaluate_every: steps between two measurements, if there are such examples. The result is the adapter that was best.
      patience: end after that many measurements in a row without a new best one; None: never.
      checkpoints: a directory. A run that finds a checkpoint of the same training in it goes on from there.
      checkpoint_every: steps between two checkpoints.
      seed: of the adapter and of the order.
      report: is called after each step.

    Raises:
      UnsupportedModelError: if layers of the model cannot be trained yet.
      ValueError: if an argument or an example is wrong, or a checkpoint is of another training.
      NotFiniteError: if a loss or gradient is not finite; the step is named.
      ImportError: if optax is missing.
    """
    for name, value in (("steps", steps), ("accumulation", accumulation), ("checkpoint_every", checkpoint_every),
                        ("evaluate_every", evaluate_every)):  # fmt: skip
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be a positive integer, not {value!r}")
    length = min(LENGTH, model.max_seq_len) if length is None else length
    if not 2 <= length <= model.max_seq_len:
        raise ValueError(f"length must be 2 to the context of {model.max_seq_len} tokens, not {length}")
    begin = init(model, config, jax.random.key(seed))
    learned, measured = split(examples, held_out) if isinstance(held_out, float | int) else (examples, held_out)
    order = np.random.default_rng(seed).permutation(len(learned))
    vocab = model.config.vocab_size
    packs = pack([learned[i] for i in order], length, vocab)
    tests = pack(measured, length, vocab) if measured else None
    optimizer = adam(learning_rate, warmup, clip, steps) if optimizer is None else optimizer
    program = _Program(model, begin, optimizer)
    settings = dataclasses.asdict(config) | {
        "steps": steps, "learning_rate": learning_rate, "warmup": warmup, "clip": clip, "accumulation": accumulation,
        "seed": seed, "examples": _digest(packs), "held_out": _digest(tests), "evaluate_every": evaluate_every,
    }  # fmt: skip
    kept = Checkpoints(None if checkpoints is None else Path(checkpoints), settings)
    state = State(begin.pairs, program.optimizer.init(begin.pairs), jax.tree.map(jnp.copy, begin.pairs) if measured else {})
    state, told = kept.latest(state)
    history = [Report(*values) for values in told]
    for one in history:
        _tell(report, one)
    with progress.task("fine-tuning, step", steps) as update:
        for step in range(len(history), steps):
            if _patient(history, patience):
                break
            started = time.perf_counter()
            batch = jax.tree.map(lambda array: array[_chosen(step, accumulation, len(array), seed)], packs)  # noqa: B023
            state, mean, norm = program.step(state, batch)
            if not (math.isfinite(mean) and math.isfinite(norm)):
                raise NotFiniteError(
                    f"step {step + 1}: the loss is {mean} and the norm of its gradient {norm}; a smaller learning rate or "
                    "dtype float32 may help" + (f"; checkpoints are in {checkpoints}" if checkpoints else "")
                )
            seconds = time.perf_counter() - started
            speed = float(batch.starts[:, -1].sum()) / seconds
            found = None
            if tests is not None and ((step + 1) % evaluate_every == 0 or step + 1 == steps):
                found = program.measure(state, tests)
                if found < min((one.held_out_loss for one in history if one.held_out_loss is not None), default=math.inf):
                    state = state._replace(best=jax.tree.map(jnp.copy, state.pairs))
            history.append(Report(step + 1, mean, norm, speed, found, seconds))
            _tell(report, history[-1])
            left = time_left(history, steps)
            update(step + 1, f"fine-tuning, loss {mean:.3f}, {speed:,.0f} tokens/s, {left} left, step")
            if (step + 1) % checkpoint_every == 0 or step + 1 == steps:
                kept.save(step + 1, state, history)
    return dataclasses.replace(begin, pairs=state.best if measured else state.pairs)


class State(NamedTuple):
    """What a step changes: the pairs, the optimizer's state, and the pairs that were best on held-out examples."""

    pairs: Any
    optimizer: Any
    best: Any


class _Program:
    """The compiled step and the compiled measurement."""

    def __init__(self, model: Model, adapter: LoraAdapter, optimizer: optax.GradientTransformation) -> None:
        self.model, self.placement = model, model._runtime.placement
        self.optimizer = optimizer
        self._step = jax.jit(step_of(adapter, optimizer), donate_argnums=(0, 1))
        self._measured = jax.jit(functools.partial(_of_pack, adapter))

    def step(self, state: State, batch: PackedBatch) -> tuple[State, float, float]:
        """The state after a step, and the loss and the norm of its gradient."""
        with self.placement.as_default():
            pairs, optimizer, mean, norm = self._step(state.pairs, state.optimizer, self.model.params, batch)
        return State(pairs, optimizer, state.best), float(mean), float(norm)

    def measure(self, state: State, packs: PackedBatch) -> float:
        """The mean loss over all targets of the packs."""
        total, count = 0.0, 0
        with self.placement.as_default():
            for number in range(len(packs.tokens)):
                one = jax.tree.map(lambda array: array[number], packs)  # noqa: B023
                losses, targets = self._measured(state.pairs, self.model.params, one)
                total, count = total + float(losses), count + int(targets)
        return total / count


def step_of(adapter: LoraAdapter, optimizer: optax.GradientTransformation) -> Callable[..., tuple[Any, ...]]:
    """The pure step of an adapter like this one: (pairs, optimizer's state, params, packs) -> (pairs, optimizer's state, mean
    loss, norm of the gradient). packs: a `PackedBatch` with an axis of packs first."""

    def stepped(pairs: Any, state: Any, params: Any, packs: PackedBatch) -> tuple[Any, ...]:
        def one(carry: Any, pack: PackedBatch) -> tuple[Any, None]:
            of_pack = jax.value_and_grad(functools.partial(_of_pack, adapter), has_aux=True)
            found, slope = of_pack(pairs, params, pack)
            return jax.tree.map(lambda known, new: known + new, carry, (*found, slope)), None

        zeros = jax.tree.map(lambda array: jnp.zeros(array.shape, jnp.float32), pairs)
        carry = jnp.zeros((), jnp.float32), jnp.zeros((), jnp.int32), zeros
        (total, count, slope), _ = jax.lax.scan(one, carry, packs)
        slope = jax.tree.map(lambda array: array / count, slope)
        norm = jnp.sqrt(sum(jnp.sum(array * array) for array in jax.tree.leaves(slope)))
        updates, state = optimizer.update(slope, state, pairs)
        pairs = jax.tree.map(lambda array, update: (array + update).astype(array.dtype), pairs, updates)
        return pairs, state, total / count, norm

    return stepped


def _of_pack(adapter: LoraAdapter, pairs: Any, params: Any, pack: PackedBatch) -> tuple[jax.Array, jax.Array]:
    return summed(params, dataclasses.replace(adapter, pairs=pairs), pack, adapter.model)


def split(examples: Sequence[Example], fraction: float) -> tuple[list[Example], list[Example]]:
    """The examples to learn from, and about that fraction of them to measure; where each goes depends on its tokens alone."""
    if not 0 <= fraction < 1:
        raise ValueError(f"held_out must be examples or a fraction from 0 to below 1, not {fraction!r}")
    places = [zlib.crc32(np.asarray(example.tokens, "<i4").tobytes()) / 2**32 < fraction for example in examples]
    learned, measured = ([e for e, out in zip(examples, places, strict=True) if out is side] for side in (False, True))
    if fraction and not (learned and measured):
        raise ValueError(f"held_out {fraction}: of {len(examples)} examples it leaves {len(learned)} and takes {len(measured)}")
    return learned, measured


def _chosen(step: int, accumulation: int, packs: int, seed: int) -> list[int]:
    """The packs of a step: each epoch has all of them, in another order."""
    epochs: dict[int, np.ndarray] = {}
    found = []
    for number in range(step * accumulation, (step + 1) * accumulation):
        epoch = number // packs
        if epoch not in epochs:
            epochs[epoch] = np.random.default_rng([seed, epoch]).permutation(packs)
        found.append(int(epochs[epoch][number % packs]))
    return found


def _patient(history: Sequence[Report], patience: int | None) -> bool:
    """Whether the last `patience` measurements were all worse than one before them."""
    losses = [one.held_out_loss for one in history if one.held_out_loss is not None]
    return patience is not None and len(losses) > patience and min(losses[-patience:]) >= min(losses[:-patience])


def time_left(history: Sequence[Report], steps: int) -> str:
    """About how long the steps after these will take, as the last ones did: "41 s", "12 min" or "3.5 h"."""
    seconds = (steps - len(history)) * statistics.median(one.seconds for one in history[-10:])
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _tell(report: Callable[[Report], object] | None, one: Report) -> None:
    if report is not None:
        report(one)


def _digest(packs: PackedBatch | None) -> str:
    return f"{zlib.crc32(b''.join(array.tobytes() for array in packs)):08x}" if packs else ""


def adam(rate: float, warmup: int | None, clip: float, steps: int) -> optax.GradientTransformation:
    """The optimizer of a training that is not given one. Raises ImportError if optax is missing."""
    try:
        import optax
    except ImportError:
        raise ImportError(f"the optimizer needs optax: {install('finetune')}") from None
    warm = max(1, steps // 20) if warmup is None else warmup
    schedule = optax.warmup_cosine_decay_schedule(0.0, rate, warm, max(steps, warm + 1))
    return optax.chain(optax.clip_by_global_norm(clip), optax.adam(schedule))
