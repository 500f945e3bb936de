"""Computes whether a model fits a device that this machine does not have, and what limits its speed there.

The steps of generation, or one of fine-tuning, are compiled with the device's real compiler, for the shapes in the model's
header. So the temporaries are the compiler's own, and the backends are those that would run. Each target is compiled in a
separate process, so that a crash or a timeout affects only that target. `Plan` describes the numbers.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from ferrum_jax import headers, hub, memory
from ferrum_jax.config import ModelConfig
from ferrum_jax.distributed import Placement
from ferrum_jax.engine import EngineConfig, steps
from ferrum_jax.engine.config import MAX_SEQS, MAX_STEPS
from ferrum_jax.engine.ledger import pool_sizes
from ferrum_jax.errors import ModelNotFoundError
from ferrum_jax.loading import auto_dtype
from ferrum_jax.programs import COMPILER_OPTIONS
from ferrum_jax.runtime import PAGE
from ferrum_jax.sampling import Sampling, SamplingParams
from ferrum_jax.state import DecodeState, page_kinds
from ferrum_jax.weights.names import parameters
from ferrum_jax.weights.opening import open_model
from ferrum_jax.weights.source import ModelSource
from ferrum_jax.weights.stream import abstract_parameters
from pallas_kernels import aot, dispatch

_CHILD = "from ferrum_jax.plan import main; main()"
_GROWTH = 0.05  # of the free memory; if temporaries are estimated to grow by more, they are compiled again
_TRIES = 4  # compilations to find a smaller case that fits
_UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


@dataclasses.dataclass(frozen=True)
class Case:
    """What to plan for: a key of `aot.TARGETS`, the tokens of each row (prompt and output), the number of rows, and dtypes as
    for `load`. finetune: fields of a `LoraConfig`, for a step of fine-tuning with `batch` packs of `context` tokens."""

    target: str
    context: int
    batch: int
    dtype: str = "auto"
    kv_dtype: str | None = None
    finetune: dict[str, Any] | None = None


@dataclasses.dataclass
class Plan:
    """The answer for one target. Sizes are in bytes; None means unknown.

    limit: the part of the device's memory that JAX may use. weights, kv: parameters and KV cache in the device's layout.
    states: those of layers that recur, of all rows and as many checkpoints. temporaries: what the larger of the two steps needs
    in addition. adapter, optimizer: of fine-tuning, in place of kv and states; the temporaries of its step include gradients.
    total: the sum of these, or the peak while loading (the weights and twice the largest tensor) if that is more.
    largest_batch, largest_context: the limits at the given context, and at the given batch; temporaries beyond the compiled
    cases are assumed to grow in proportion. compile_s: of each step, on this machine. tokens_per_s: the rows of a decode step
    divided by the time to read read_bytes once, an upper limit. read_bytes: the weights, with the experts that independent
    routing uses, and the keys, values and states of full rows. backends: the dispatcher's choices, see
    `pallas_kernels.dispatch.Choice`. error: why the plan failed.
    """

    target: str
    device: str
    dtype: str
    kv_dtype: str
    fits: bool | None = None
    memory: int | None = None
    limit: int | None = None
    limit_counted: str = ""
    weights: int | None = None
    kv: int | None = None
    states: int | None = None
    adapter: int | None = None
    optimizer: int | None = None
    temporaries: int | None = None
    total: int | None = None
    largest_batch: int | None = None
    largest_context: int | None = None
    compile_s: dict[str, float] = dataclasses.field(default_factory=dict)
    read_bytes: int | None = None
    experts_touched: float | None = None
    tokens_per_s: float | None = None
    backends: list[dict[str, str]] = dataclasses.field(default_factory=list)
    help: str = ""
    error: str = ""


# The header


def find_header(model: str, progress: Callable[[int, int | None, str], None] | None = None) -> ModelSource:
    """The header of a model, from a local file (which may end after its header), from this package, or from the beginning of
    the hub's file. Raises ModelNotFoundError, ModelFileError or UnsupportedModelError."""
    report = progress or (lambda done, total, text: None)
    try:
        return _read(hub.resolve(model, progress=lambda *remark: None, offline=True))
    except ModelNotFoundError as error:
        missing = error
    if (header := headers.bundled(model)) is not None:
        report(0, None, f"{model} is not on this machine; planning with its header in the ferrum_jax package")
        return header
    report(0, None, f"{model} is not on this machine; downloading only its header")
    with tempfile.TemporaryDirectory(prefix="ferrum-jax-plan-") as directory:
        path = hub.fetch_heads(model, Path(directory), _read)
        if path is None:
            raise missing
        return headers.from_json(headers.to_json(_read(path)), Path(path.name))


def _read(path: Path) -> ModelSource:
    with open_model(path, header_only=True) as source:
        return source


# In the process of one target


class _Model:
    """A model on a target as abstract shapes, and its compiled steps."""

    def __init__(self, header: ModelSource, case: Case):
        self.name, self.placement = case.target, Placement.abstract(aot.TARGETS[case.target].target)
        self.config, self.kv_dtype = configure(header, case)
        self.params = abstract_parameters(parameters(header, self.config), self.placement)
        self.weights = memory.nbytes(self.params)
        self.compile_s: dict[str, float] = {}

    def state(self, batch: int, context: int) -> DecodeState:
        windows = [kind.window for kind in page_kinds(self.config)]
        engine = EngineConfig(max_seqs=batch)
        pages = pool_sizes(windows, batch * -(-context // PAGE), engine)
        return memory.abstract_state(self.config, pages, PAGE, self.kv_dtype, self.placement, engine.num_states)

    def read_bytes(self, batch: int, context: int) -> int:
        """Keys, values and states that a decode step of full rows reads."""
        seen = [min(context, kind.window or context) for kind in page_kinds(self.config)]
        pages = [batch * -(-tokens // PAGE) for tokens in seen]
        return memory.nbytes(memory.abstract_state(self.config, pages, PAGE, self.kv_dtype, self.placement, batch))

    def row_bytes(self, batch: int, context: int) -> int:
        """The bytes that grow with rows and context: the state and the prompts."""
        return memory.nbytes(self.state(batch, context)) + 4 * batch * context

    def prefill(self, batch: int, context: int) -> int:
        """The temporaries of the step that reads a chunk of the prompts and samples: `steps.mixed`."""
        longest = EngineConfig(max_seqs=batch).longest
        starts = _numbers(batch), _numbers(batch + 1), jax.ShapeDtypeStruct((batch,), jnp.bool_), _numbers(2, batch)
        mixed = functools.partial(steps.mixed, tokens=longest)
        return self._temporaries("prefill", mixed, batch, context, *starts)

    def decode(self, batch: int, context: int) -> int:
        """The temporaries of the step that decodes the next tokens of every row: `steps.decode`."""
        decode = functools.partial(steps.decode, steps=MAX_STEPS, speculation=0)
        return self._temporaries("decode", decode, batch, context, _numbers(batch), _numbers())

    def training(self, fields: dict[str, Any], batch: int, context: int) -> tuple[int, int, int]:
        """The bytes of the adapter, of the optimizer's state, and of what a step of fine-tuning needs in addition."""
        from ferrum_jax.finetune import LoraConfig
        from ferrum_jax.finetune.abstract import abstract_step

        step, pairs, state, packs = abstract_step(self.params, self.config, LoraConfig(**fields), context, batch)
        ours = self.weights + memory.nbytes((pairs, state))
        temporaries = self._compiled("step", step, (pairs, state, self.params, packs), (0, 1), ours)
        return memory.nbytes(pairs), memory.nbytes(state), temporaries

    def _slots(self, batch: int, context: int) -> steps.Slots:
        sampling = Sampling.from_params([SamplingParams()] * batch, eos_ids=[0], vocab_limit=self.config.vocab_size)
        sizes = {"slots": batch, "capacity": -(-context // PAGE) * PAGE, "vocab": self.config.vocab_size}
        return jax.eval_shape(functools.partial(steps.new_slots, sampling, **sizes))

    def _temporaries(self, name: str, function: Callable, batch: int, context: int, *args: Any) -> int:
        """The bytes that a step needs in addition to weights and state: temporaries, slots, inputs, and results without an
        alias."""
        state = self.state(batch, context)
        step = functools.partial(function, config=self.config)
        rows = self._slots(batch, context), _numbers(batch), _numbers(batch, -(-context // PAGE))
        return self._compiled(name, step, (self.params, state, *rows, *args), (1, 2), self.weights + memory.nbytes(state))

    def _compiled(self, name: str, step: Callable, args: tuple[Any, ...], donated: tuple[int, ...], ours: int) -> int:
        """What a step needs in addition to `ours`, which are among its arguments."""
        begin = time.perf_counter()
        options = COMPILER_OPTIONS.get(self.placement.platform)
        try:
            compiled = aot.compile_for(self.name, step, *args, donate_argnums=donated, compiler_options=options)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            return max(0, _refused(str(error), usable(self.name)[0]) - ours)
        finally:
            self.compile_s.setdefault(name, round(time.perf_counter() - begin, 1))
        sizes = compiled.memory_analysis()
        inputs, results = sizes.argument_size_in_bytes, sizes.output_size_in_bytes - sizes.alias_size_in_bytes
        return sizes.temp_size_in_bytes + max(0, inputs - ours) + max(0, results)


def _numbers(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.int32)


@dataclasses.dataclass
class _Axis:
    """One variable x, the rows or the context: exact(x) counts bytes, temporaries(x) compiles, `known` has the compiled cases.

    Between two known x, temporaries are interpolated linearly; beyond them they are assumed to grow in proportion, which is
    generous.
    """

    exact: Callable[[int], int]
    temporaries: Callable[[int], int]
    known: dict[int, int]

    def largest(self, room: int, most: int) -> int:
        """The largest x up to `most` that fits into `room`, or 0. Compiles smaller cases if the given x does not fit, and a
        larger case if temporaries are estimated to grow a lot."""
        [(asked, first)] = self.known.items()

        def last(most: int) -> int:
            return _last(lambda x: self.exact(x) + self._guess(x) <= room, most)

        x = asked
        while self.exact(x) + self.known[x] > room:
            x = last(x - 1) * 15 // 16  # a little less, in case a larger constant part makes it too large again
            if not x or len(self.known) > _TRIES:
                return 0
            self.known[x] = self.temporaries(x)
        found = last(most if x == asked else asked)
        if found > asked and self._guess(found) - first > _GROWTH * room:
            self.known[found] = self.temporaries(found)
            found = last(most)
        return found

    def _guess(self, x: int) -> float:
        below = sorted(k for k in self.known if k <= x)
        above = sorted(k for k in self.known if k > x)
        if not above:
            return self.known[below[-1]] * x / below[-1]
        low, high = (below[-1], above[0]) if below else (above[0], above[1]) if len(above) > 1 else (0, above[0])
        start = self.known.get(low, 0)
        return max(0.0, start + (self.known[high] - start) * (x - low) / (high - low))


def _last(holds: Callable[[int], bool], most: int) -> int:
    """The largest x from 1 to `most` for which `holds(x)`, or 0. `holds` must be true up to some x and false after it."""
    low, high = 0, 1
    while high <= most and holds(high):
        low, high = high, 2 * high
    high = min(high, most + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


def _refused(message: str, limit: int) -> int:
    """The bytes that a program would need according to the error of a compiler (for TPUs it rejects programs that are too
    large), at least one more than the limit."""
    needed = re.search(r"(?:\(|Used )(\d+\.\d+)([KMGT])", message)
    return max(limit + 1, int((float(needed[1]) + 0.005) * _UNITS[needed[2]]) if needed else 0)


def configure(header: ModelSource, case: Case) -> tuple[ModelConfig, str]:
    """The configuration with the dtype for the target, and the KV dtype."""
    target = aot.TARGETS[case.target].target
    dtype = auto_dtype(target) if case.dtype == "auto" else case.dtype
    return dataclasses.replace(header.config(), dtype=dtype), case.kv_dtype or dtype


def compute(header: ModelSource, case: Case) -> Plan:
    """The plan for one target, compiled in this process. Raises the compiler's errors."""
    hardware, model = aot.TARGETS[case.target], _Model(header, case)
    config, batch, context = model.config, case.batch, case.context
    device = hardware.name if isinstance(hardware, aot.Gpu) else f"TPU {hardware.generation}"
    plan = Plan(case.target, device, config.dtype, model.kv_dtype, memory=hardware.memory, weights=model.weights)
    plan.limit, plan.limit_counted = usable(case.target)
    # While a tensor is loaded, it exists in the layout of the file and in that of the device.
    loading = model.weights + 2 * max(tensor.nbytes for tensor in header.tensors.values())
    with dispatch.record() as choices:
        if case.finetune is None:
            state = model.state(batch, context)
            plan.kv, plan.states = memory.nbytes(state.pools), memory.nbytes(state.recurrent)
            decode, prefill = model.decode(batch, context), model.prefill(batch, context)
            plan.temporaries = max(decode, prefill)
        else:
            plan.adapter, plan.optimizer, plan.temporaries = model.training(case.finetune, batch, context)
    plan.compile_s = dict(model.compile_s)
    plan.backends = [dataclasses.asdict(choice) for choice in choices]
    parts = plan.weights, plan.kv, plan.states, plan.adapter, plan.optimizer, plan.temporaries
    plan.total = max(sum(part or 0 for part in parts), loading)
    plan.fits = plan.total <= plan.limit
    plan.help = _help(plan)
    if case.finetune is not None:
        return plan
    if loading > plan.limit:
        plan.largest_batch = plan.largest_context = 0
    else:
        # What prefill needs in addition to decoding, apart from prompts and cache, is constant: its chunk is fixed.
        room = plan.limit - model.weights - max(0, prefill - 4 * batch * context - decode)
        pages, most = -(-context // PAGE), -(-config.context_length // PAGE)
        batches = _Axis(lambda n: model.row_bytes(n, context), lambda n: model.decode(n, context), {batch: decode})
        contexts = _Axis(lambda n: model.row_bytes(batch, n * PAGE), lambda n: model.decode(batch, n * PAGE), {pages: decode})
        plan.largest_batch = batches.largest(room, MAX_SEQS)
        plan.largest_context = min(contexts.largest(room, most) * PAGE, config.context_length)
    share, plan.experts_touched = experts_read(config, batch)
    plan.read_bytes = weights_read(model.params, config, batch, share) + model.read_bytes(batch, context)
    plan.tokens_per_s = batch * hardware.memory_bandwidth / plan.read_bytes
    return plan


def usable(name: str) -> tuple[int, str]:
    """The bytes of a target's memory that JAX may use, and in words how they are counted."""
    hardware = aot.TARGETS[name]
    if isinstance(hardware, aot.Tpu):
        return hardware.memory, "the HBM that its compiler allows"
    fraction, source = memory.gpu_fraction()
    return int(hardware.memory * fraction), f"{fraction:g} of the device's memory ({source})"


def _help(plan: Plan) -> str:
    assert plan.total and plan.limit and plan.memory
    if plan.fits or plan.target not in aot.GPUS or plan.total > 0.95 * plan.memory:
        return ""
    fraction = -(-100 * plan.total // plan.memory) / 100
    return f"it would fit with XLA_CLIENT_MEM_FRACTION={fraction:g}"


# The bound by bandwidth


def experts_read(config: ModelConfig, batch: int) -> tuple[float, float | None]:
    """The expected share and number of a layer's experts that a step of `batch` rows uses, if each row chooses independently
    and uniformly."""
    if not config.num_experts:
        return 1.0, None
    share = 1 - (1 - config.experts_per_token / config.num_experts) ** batch
    return share, config.num_experts * share


def weights_read(params: dict, config: ModelConfig, batch: int, experts: float) -> int:
    """The bytes of weights that a decode step reads: all matrices, except only the share `experts` of the experts, and only one
    row for each token of an embedding that is not also the output matrix."""
    total = 0.0
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        names = [getattr(key, "key", "") for key in path]
        part = 1.0
        if any(str(name).startswith("expert_") for name in names):
            part = experts
        elif names[0] == "inputs_embedding" or (names[0] == "embedding" and "unembedding" in params):
            part = min(1.0, batch / config.vocab_size)
        total += part * memory.nbytes(leaf)
    return int(total)


# In the caller's process


def plan_for(header: ModelSource, case: Case, timeout: float | None = None) -> Plan:
    """The plan for one target, computed in a separate process. If there is none, `error` says why."""
    task = json.dumps({"header": headers.to_json(header), "path": str(header.path), "case": dataclasses.asdict(case)})
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_ENABLE_COMPILATION_CACHE": "false"}
    config, kv_dtype = configure(header, case)
    failed = Plan(case.target, case.target, config.dtype, kv_dtype)
    try:
        ended = subprocess.run(
            [sys.executable, "-c", _CHILD], input=task, env=environment, capture_output=True, text=True, timeout=timeout
        )
    except subprocess.TimeoutExpired:
        failed.error = f"the compiler gave no answer within {timeout:g} s"
        return failed
    if ended.returncode == 0:
        return Plan(**json.loads(ended.stdout))
    lines = [line.strip() for line in ended.stderr.splitlines() if line.strip()] or ["it said nothing"]
    how = f"exit code {ended.returncode}"
    if ended.returncode < 0:
        how = signal.Signals(-ended.returncode).name
    failed.error = f"the compiler's process ended with {how}: {lines[-1][:300]}"
    return failed


def main() -> None:
    """The main function of a target's process: reads a task from standard input, and writes only a plan as JSON to standard
    output."""
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    task = json.load(sys.stdin)
    case = Case(**task["case"])
    header = headers.from_json(task["header"], Path(task["path"]))
    try:
        result = compute(header, case)
    except Exception as error:
        result = Plan(case.target, case.target, case.dtype, case.kv_dtype or case.dtype)
        first = next(iter(str(error).splitlines()), "")
        result.error = f"{type(error).__name__}: {first[:300]}"
    with answer:
        json.dump(dataclasses.asdict(result), answer)
