"""Random schedules: whatever arrives, ends, branches or fails at any time, every request has the output that it has alone,
waits a bounded time, and no page is lost. First thousands of schedules on a stand-in for the device, then some on the compiled
step.

ENGINE_SCHEDULES=5000 in the environment searches longer and with a new random seed.
"""

import asyncio
import contextlib
import dataclasses
import json
import os
import random
import threading
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

import ferrum_jax as fj
from ferrum_jax.engine import EngineConfig, snapshot
from ferrum_jax.quantized import LayerStack, QuantizedTensor
from support.engine_stand_in import ADAPTERS, VOCAB, Injected, Model, check, expected, step, use
from support.goldens import golden_cases, tiny_gemma, tiny_hybrids, tiny_latent, tiny_mixtures, tiny_models
from support.recurrent_toy import Toy
from support.tiny_gguf import write_tiny_llama

SCHEDULES = int(os.environ.get("ENGINE_SCHEDULES", "0"))
RULES = 50  # of one schedule
PAGE_SIZES, BUDGETS, DRAFTS = [1, 1, 2, 3, 4, 7, 16], [1, 2, 3, 5, 8, 24], [0, 0, 2, 4]
WINDOWS = [(0,), (0,), (0,), (1,), (3,), (4,), (9,), (0, 3), (4, 0), (2, 9), (0, 1, 7)]  # of the layers of a model
STEPS, COUNTS, STOPS = [1, None, 4], [1, 1, 1, 2, 3], [(), (), ("ab",), ("a", "cab", "d")]
NAMES = [None, None, *ADAPTERS]
GRAMMARS = [None, None, fj.Structured(regex="3"), fj.Structured(regex="6")]  # of the stand-in
TURNS = [0, 0, 2]  # of rows without a grammar
NOWHERE = Path("/a directory that is never written")

configs = st.builds(
    EngineConfig,
    page_size=st.sampled_from(PAGE_SIZES),
    num_pages=st.integers(3, 12),
    max_seqs=st.integers(1, 5),
    token_budget=st.sampled_from(BUDGETS),
    steps_per_dispatch=st.sampled_from(STEPS),
    prefix_cache=st.booleans(),
    speculation=st.sampled_from(DRAFTS),
    checkpoints=st.sampled_from([None, 0, 1, 3, 9, 40]),
)
params = st.builds(
    fj.SamplingParams,
    max_tokens=st.integers(1, 14),
    seed=st.integers(0, 2),
    n=st.sampled_from(COUNTS),
    ignore_eos=st.booleans(),
    stop=st.sampled_from(STOPS),
    structured=st.sampled_from(GRAMMARS),
)
which = st.integers(0, 1000)


class Schedule(RuleBasedStateMachine):
    """The rules. `requests`: all that were accepted, with their prompts, parameters and seeds; `aborted`: those that may end
    early; `saved`: what snapshots of them hold; `before`: how many tokens those that came of one had then."""

    @initialize(config=configs, context=st.integers(12, 60), windows=st.sampled_from(WINDOWS), recurs=st.booleans(),
                turns=st.sampled_from(TURNS))  # fmt: skip
    def start(self, config, context, windows, recurs, turns):
        self.engine = use(Model(context, *windows, recurs=recurs), config)
        self.engine._turns = lambda: turns
        self.device, self.scheduler = self.engine._executor, self.engine._scheduler
        self.requests, self.aborted, self.saved, self.before = [], set(), [], {}
        self.oldest, self.left = None, 0

    def submitted(self, make, prompt, params):
        """Accepts a request that `make` submits, or a justified refusal."""
        size, limit = self.engine.config.page_size, min(len(prompt) + params.max_tokens, self.engine.model.max_seq_len)
        never = len(prompt) >= self.engine.model.max_seq_len or -(-(limit - 1) // size) > min(self.device.num_pages)
        try:
            request = make()
        except ValueError:
            assert never
            return
        assert not never or any(self.device.windows)
        for i, choice in enumerate(request.choices):
            self.requests.append((choice, list(prompt), params, params.seed + i))

    @rule(stem=st.integers(0, 1), pages=st.integers(0, 12), more=st.integers(-1, 2), tail=st.integers(0, 2), params=params,
          adapter=st.sampled_from(NAMES))  # fmt: skip
    def submit(self, stem, pages, more, tail, params, adapter):
        """Prompts share beginnings and end around the borders of pages."""
        length = max(1, min(pages * self.engine.config.page_size + more, self.engine.model.max_seq_len))
        prompt = [1 + (i * i + stem * i // 3) % (VOCAB - 1) for i in range(length)] + [1] * tail
        self.submitted(lambda: self.engine.submit(prompt, params, adapter), prompt, params)

    @rule(which=which, params=params, own=st.booleans())
    @precondition(lambda self: self.requests)
    def fork(self, which, params, own):
        request, prompt, of, _ = self.requests[which % len(self.requests)]
        params = of if own else params
        self.submitted(lambda: request.fork(None if own else params), [*prompt, *request.token_ids], params)

    @rule(which=which)
    @precondition(lambda self: self.requests)
    def abort(self, which):
        request, *_ = self.requests[which % len(self.requests)]
        self.aborted |= {choice.id for choice in request.choices if choice.state != "finished"}
        self.engine.abort(request)
        assert all(choice.state == "finished" for choice in request.choices)
        self.held()

    @rule(which=which)
    @precondition(lambda self: self.requests)
    def abort_between(self, which):
        """From another thread, while a dispatch is started."""
        request, *_ = self.requests[which % len(self.requests)]

        def between():
            self.aborted |= {choice.id for choice in request.choices if choice.state != "finished"}
            self.engine.abort(request)

        self.device.between = between
        self.once()

    @rule(which=which)
    @precondition(lambda self: self.requests)
    def save(self, which):
        """A snapshot, without the files. One of a request that is aborted, even by a thread just now, is not kept."""
        request, *of = self.requests[which % len(self.requests)]

        def keep(path, name, facts, content):
            if facts["finish_reason"] not in ("abort", "error"):
                self.saved.append((json.dumps(facts), content, of))

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(snapshot, "save", keep)
            self.engine.snapshot(request, NOWHERE)
        self.held()

    @rule(which=which)
    @precondition(lambda self: self.requests)
    def restore(self, which):
        """A request of a snapshot; the one that it was taken of may run still."""
        if not self.saved:  # not a precondition: a thread decides whether a snapshot is kept
            return
        facts, content, of = self.saved[which % len(self.saved)]

        def load(path, name, vocab, like):
            saved = snapshot._checked(json.loads(facts), vocab)
            if content is not None:
                length = len(saved.prompt) + len(saved.output)
                snapshot._check_pages(snapshot._arrays(content), like, saved.full_pages, length)
            return saved._replace(content=content)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(snapshot, "load", load)
            request = self.engine.restore(NOWHERE)
        self.before[request.id] = len(request.token_ids)
        self.requests.append((request, *of))
        self.held()

    @rule()
    def reset(self):
        self.engine.reset()
        assert self.engine.metrics()["pages_cached"] == 0
        self.held()

    @rule(where=st.sampled_from(["admit", "launch", "fetch"]))
    def fail(self, where):
        self.device.fault = where

    @rule(steps=st.integers(1, 6))
    def step(self, steps):
        for _ in range(steps):
            self.once()

    @rule()
    def interrupt(self):
        """Ctrl-C while the results are waited for."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(self.device, "fetch", interrupted)
            try:
                step(self.engine)
            except KeyboardInterrupt:
                self.oldest = None
        self.held()

    def once(self) -> bool:
        faults = len(self.device.struck)
        more = step(self.engine)
        if len(self.device.struck) > faults:
            self.oldest = None
        self.held()
        self.waited()
        return more

    def held(self):
        check(self.engine)
        unfinished = sorted(request.id for request, *_ in self.requests if request.state != "finished")
        assert unfinished == sorted(s.number for s in [*self.scheduler.waiting, *self.scheduler.running])

    def waited(self):
        """The oldest request finishes within a bound after it became the oldest, so the wait of every request is bounded.

        Each step gives the oldest running request at least one token, except for one step at its end while the results are in
        flight. A waiting request is admitted when those that ran before it have ended. After a failure it starts over.
        """
        unfinished = [*self.scheduler.waiting, *self.scheduler.running]
        oldest = min(unfinished, key=lambda sequence: sequence.number, default=None)
        if oldest is not self.oldest:
            self.oldest = oldest
            self.left = 4 + sum(s.limit + 2 for s in [oldest, *self.scheduler.running] if s) if oldest else 0
        self.left -= 1
        assert oldest is None or self.left > 0, f"request {oldest.number} starves"

    def teardown(self):
        if not hasattr(self, "engine"):
            return
        self.device.fault = ""
        while self.once():
            pass
        struck = {sequence.number for sequence in self.device.struck}
        for request, prompt, params, seed in self.requests:
            model = self.engine.model
            adapter = model.adapter_index(request.adapter)
            right = expected(prompt, params, seed, model.max_seq_len, adapter, request._begun)
            result = request.result()
            outputs, before = list(request), self.before.get(request.id, 0)
            text = "".join(output.text for output in outputs)
            assert result.text.endswith(text) and (before or result.text == text)
            assert [id for output in outputs for id in output.token_ids] == result.token_ids[before:]
            if result.finish_reason == "abort":
                assert request.id in self.aborted
            elif result.finish_reason == "error":
                assert request.id in struck and Injected.__name__ in request.error, request.error
            else:
                assert (result.token_ids, result.text) == (right.token_ids, right.text)
                assert result.finish_reason == right.finish_reason and result.prompt_token_ids == prompt
            assert right.token_ids[: len(result.token_ids)] == result.token_ids
            assert request.id not in struck or result.finish_reason == "error"
        metrics = self.engine.metrics()
        assert metrics["pages_free"] + metrics["pages_cached"] == self.engine.num_pages
        assert metrics["requests_waiting"] == metrics["requests_running"] == 0
        assert len(self.scheduler._slots) == self.engine.config.max_seqs


def interrupted(*_):
    raise KeyboardInterrupt


def test_thousands_of_random_steps():
    health = [HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large]
    chosen = settings(max_examples=SCHEDULES or 100, stateful_step_count=RULES, derandomize=not SCHEDULES, database=None)
    run_state_machine_as_test(Schedule, settings=settings(chosen, deadline=None, suppress_health_check=health))


def busy(seed: int) -> Schedule:
    """A schedule of the same rules with the dice of a plain generator: longer and busier than those of hypothesis."""
    dice, schedule = random.Random(seed), Schedule()
    config = EngineConfig(
        page_size=dice.choice(PAGE_SIZES),
        num_pages=dice.randint(3, 12),
        max_seqs=dice.randint(1, 5),
        token_budget=dice.choice(BUDGETS),
        steps_per_dispatch=dice.choice(STEPS),
        prefix_cache=dice.random() < 0.7,
        speculation=dice.choice(DRAFTS),
        checkpoints=dice.choice([None, 0, 1, 3, 9, 40]),
    )
    schedule.start(config=config, context=dice.randint(12, 60), windows=dice.choice(WINDOWS), recurs=dice.random() < 0.4,
                   turns=dice.choice(TURNS))  # fmt: skip
    for _ in range(RULES):
        params = fj.SamplingParams(
            max_tokens=dice.randint(1, 14),
            seed=dice.randint(0, 2),
            n=dice.choice(COUNTS),
            ignore_eos=dice.random() < 0.5,
            stop=dice.choice(STOPS),
            structured=dice.choice(GRAMMARS),
        )
        pages, more = dice.randint(0, 12) // dice.choice([1, 2, 4]), dice.randint(-1, 2)
        submit = {"stem": dice.randint(0, 1), "pages": pages, "more": more, "tail": dice.randint(0, 2), "params": params}
        submit["adapter"] = dice.choice(NAMES)
        which = dice.randint(0, 1000)
        rules = {
            "step": (50, {"steps": dice.randint(1, 6)}),
            "submit": (30, submit),
            "fork": (10 * bool(schedule.requests), {"which": which, "params": params, "own": dice.random() < 0.5}),
            "abort": (5 * bool(schedule.requests), {"which": which}),
            "abort_between": (4 * bool(schedule.requests), {"which": which}),
            "save": (12 * bool(schedule.requests), {"which": which}),
            "restore": (6 * bool(schedule.saved), {"which": which}),
            "reset": (2, {}),
            "fail": (3, {"where": dice.choice(["admit", "launch", "fetch"])}),
            "interrupt": (1, {}),
        }
        (name,) = dice.choices(list(rules), [weight for weight, _ in rules.values()])
        getattr(schedule, name)(**rules[name][1])
    schedule.teardown()
    return schedule


@pytest.mark.slow
def test_busy_schedules():
    first = random.SystemRandom().randrange(2**32) if SCHEDULES else 0
    found = {"dispatches": 0, "preemptions": 0, "hits": 0, "evictions": 0, "faults": 0, "restored": 0, "restored pages": 0}
    found["forced"] = 0
    for seed in range(first, first + (SCHEDULES or 150)):
        try:
            schedule = busy(seed)
        except BaseException as error:
            error.add_note(f"busy({seed})")
            raise
        found["dispatches"] += schedule.device.launches
        found["preemptions"] += schedule.scheduler.preemptions
        found["hits"] += schedule.scheduler.hit_pages
        found["evictions"] += schedule.scheduler.ledger.evictions
        found["forced"] += schedule.device.forced
        found["faults"] += len(schedule.device.struck)
        found["restored"] += len(schedule.before)
        found["restored pages"] += sum(content is not None for _, content, _ in schedule.saved)
    print(found)
    assert min(found.values()) > (SCHEDULES or 150) / 2, found  # the schedules cover the events that they are for


def test_forced_tokens_take_no_page_of_a_row_that_has_just_ended():
    """That row is in the same dispatch, and still writes."""
    engine = use(Model(60), EngineConfig(page_size=1, num_pages=11, max_seqs=2))
    forced, other = fj.SamplingParams(max_tokens=11, structured=fj.Structured(regex="8")), fj.SamplingParams(max_tokens=8)
    request, ends = engine.submit([1], forced), engine.submit([2, 3, 4, 5], other)
    step(engine)
    engine._executor.between = lambda: engine._end(ends, "abort")
    while step(engine):
        pass
    assert engine._executor.forced > 5 and request.token_ids == expected([1], forced, 0, 60).token_ids


@pytest.mark.parametrize("serving", [True, False])
def test_threads_and_tasks_at_once(serving):
    """Four threads submit, read, branch, abort and reset; without a background loop they drive the engine themselves."""
    engine = use(Model(60), EngineConfig(page_size=3, num_pages=16, max_seqs=3, token_budget=6, speculation=2))
    errors = []

    def live(number):
        dice = random.Random(number)
        try:
            for _ in range(30):
                params = fj.SamplingParams(max_tokens=dice.randint(1, 14), seed=dice.randint(0, 3), n=dice.choice(COUNTS))
                prompt = [1 + i * i % 5 for i in range(dice.randint(1, 12))]
                request, move = engine.submit(prompt, params), dice.random()
                if move < 0.3:
                    engine.abort(request)
                elif move < 0.5 and next(iter(request), None):
                    branch = request.fork(params).result()
                    right = expected(branch.prompt_token_ids, params, params.seed, 60)
                    assert branch.token_ids == right.token_ids and branch.prompt_token_ids[: len(prompt)] == prompt
                elif move < 0.6:
                    asyncio.run(leave(request))
                elif move < 0.63:
                    engine.reset()
                for i, completion in enumerate(request.results()):
                    right = expected(prompt, params, params.seed + i, 60)
                    ended = completion.finish_reason != "abort"
                    assert completion.token_ids == (right.token_ids if ended else right.token_ids[: len(completion.token_ids)])
                    assert move < 0.3 or completion.finish_reason == right.finish_reason
        except BaseException as error:
            errors.append(error)

    with engine if serving else contextlib.nullcontext():
        threads = [threading.Thread(target=live, args=(number,), daemon=True) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert not errors and not any(thread.is_alive() for thread in threads), errors
    engine.run()
    check(engine)
    assert engine._scheduler.ledger.available == 16


async def leave(request):
    """Reads a little and leaves, and so does the event loop."""
    async for _ in request:
        return


# On the compiled step

REFERENCE = {"max_tokens": 16, "logprobs": 2}  # of one shape, so that one program gives all references
PLAIN = EngineConfig(page_size=4, num_pages=9, max_seqs=3, token_budget=8, steps_per_dispatch=4)
DRAFTED = dataclasses.replace(PLAIN, speculation=2)
PLANS = {"plain": (0, PLAIN), "window and drafts": (7, DRAFTED), "experts in int8": ("int8", DRAFTED)}
PLANS |= {"sinks": ("oss float32", PLAIN), "sinks in int8": ("oss int8", DRAFTED)}
PLANS |= {"two windows": ("windows", PLAIN), "recurrent": ("recurrent", PLAIN), "all kinds and drafts": ("all", DRAFTED)}
PLANS |= {"sigmoids, groups and drafts": ("glm4moe-q8_0", DRAFTED), "convolutions and drafts": ("lfm2moe", DRAFTED)}
PLANS |= {"latent and drafts": ("glm4-lite", DRAFTED), "latent in int8": ("deepseek2-lite-q8_0", PLAIN)}
PLANS |= {
    "delta net and drafts": ("qwen35moe", dataclasses.replace(DRAFTED, checkpoints=12)),
    "delta net in int8": ("qwen3next-q8_0", PLAIN),
}
PLANS |= {"shared keys and drafts": ("gemma4", DRAFTED), "two rotations in int8": ("gemma3-q8_0", PLAIN)}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Models with 25 tokens of context by their window: some requests end with the context, in the first place of a page.
    "int8": a mixture in a Q4_K_M mix, whose layers are one C++ call if there is a compiler. "oss": windows in every other
    layer, sinks, and experts in MXFP4 with biases."""
    made = {}
    for window in (0, 7):
        path = tmp_path_factory.mktemp("model") / "tiny.gguf"
        write_tiny_llama(path, metadata={"llama.attention.sliding_window": window} if window else {})
        made[window] = fj.load(path, dtype="float32", max_seq_len=25)
    path = tmp_path_factory.mktemp("model") / "mixture.gguf"
    tiny_models.write(next(case.spec for case in golden_cases.CASES if case.name == "qwen3moe-q4_k_m"), path)
    made["int8"] = fj.load(path, dtype="int8", max_seq_len=25)
    path = tmp_path_factory.mktemp("model") / "oss.gguf"
    oss = next(case.spec for case in golden_cases.CASES if case.name == "gpt-oss-mxfp4")
    tiny_models.write(dataclasses.replace(oss, window=7, layers=2), path)
    made |= {f"oss {dtype}": fj.load(path, dtype=dtype, max_seq_len=25) for dtype in ("float32", "int8")}
    for tiny, spec in [(kind, spec) for kind in (tiny_hybrids, tiny_mixtures, tiny_latent) for spec in kind.CASES]:
        if spec.name in [which for which, _ in PLANS.values()]:
            path = tmp_path_factory.mktemp("model") / f"{spec.name}.gguf"
            tiny.write_gguf(spec, path)
            made[spec.name] = fj.load(path, dtype="int8" if "q8_0" in spec.name else "float32", max_seq_len=25)
    for spec in tiny_gemma.CASES:
        if spec.name in ("gemma4", "gemma3-q8_0"):
            path = tmp_path_factory.mktemp("model") / f"{spec.name}.gguf"
            tiny_gemma.write_gguf(dataclasses.replace(spec, window=7), path)
            made[spec.name] = fj.load(path, dtype="int8" if spec.formats else "float32", max_seq_len=25)
    path = tmp_path_factory.mktemp("model") / "layers.gguf"
    deep = fj.load(write_tiny_llama(path, layers=4), dtype="float32", max_seq_len=25)
    kinds = {"windows": (7, 0, 7, 0), "recurrent": (0, None, 0, None), "all": (7, None, 0, 3)}
    return made | {name: unlike(deep, *of_layers) for name, of_layers in kinds.items()}


def unlike(model, *windows):
    """A model whose layers have these windows; a layer with None recurs."""
    rng, (spec, *_) = np.random.default_rng(5), model.config.layers
    toys = [number for number, window in enumerate(windows) if window is None]
    layers = [
        dataclasses.replace(spec, mixer=Toy(16) if window is None else dataclasses.replace(spec.mixer, window=window))
        for window in windows
    ]
    params, hidden = dict(model.params), model.config.hidden_size
    if toys:
        formats = tuple("F32" if number in toys else "" for number in range(len(windows)))
        shapes = {"into": (len(toys), 16, hidden), "out": (len(toys), hidden, 16)}
        params["layers"] = params["layers"] | {"toy": {
            name: LayerStack({"F32": QuantizedTensor.of(jnp.asarray(rng.normal(0, 0.2, shape), jnp.float32), "F32")}, formats)
            for name, shape in shapes.items()
        }}  # fmt: skip
    config, runtime = dataclasses.replace(model.config, layers=layers), model._runtime
    return type(model)(config, params, model.tokenizer, runtime.placement, runtime.kv_dtype, 25)


def sampled(dice: random.Random) -> fj.SamplingParams:
    greedy = {"temperature": 0.0}
    noisy = {"temperature": dice.choice([0.7, 1.5]), "top_k": dice.choice([0, 20]), "top_p": dice.choice([1.0, 0.9])}
    penalties = {"repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.7, "min_p": 0.02}
    return fj.SamplingParams(
        max_tokens=dice.randint(1, 16),
        seed=dice.randint(0, 99),
        n=dice.choice(COUNTS),
        ignore_eos=dice.random() < 0.7,
        logprobs=dice.choice([None, 1, 2]),
        **dice.choice([greedy, noisy]),
        **dice.choice([{}, penalties]),
    )


def alone(model, prompt, params, seed):
    """The result of `generate` for a single prompt, in the program used for all."""
    reference = dataclasses.replace(params, seed=seed, n=1, **REFERENCE)
    (completion,) = model.generate([prompt], reference)
    ids, logprobs = completion.token_ids[: params.max_tokens], completion.logprobs[: params.max_tokens]
    if params.logprobs is not None:
        logprobs = [row[: params.logprobs + 1] for row in logprobs]
    return ids, logprobs if params.logprobs is not None else None


@pytest.mark.slow
@pytest.mark.parametrize("plan", PLANS)
def test_compiled_steps_give_the_bits_of_each_request_alone(models, plan, monkeypatch):
    which, config = PLANS[plan]
    model, found = models[which], {"preemptions": 0, "hits": 0, "failed": 0, "finished": 0}
    for seed in range(25):
        dice = random.Random(f"{plan} {seed}")
        engine = fj.Engine(model, dataclasses.replace(config, prefix_cache=dice.random() < 0.8))
        engine._scheduler.ledger = engine._new_ledger(dice.choice([7, 9]))  # with the programs of the others
        engine.num_pages = sum(pool.num_pages for pool in engine._scheduler.ledger.pools)
        requests = []
        for _ in range(24):
            move, params, known = dice.random(), sampled(dice), [r for r in requests if len(r[1]) + len(r[0].token_ids) <= 16]
            if move < 0.4:
                start = dice.choice([3, 30])
                prompt = [start + i * i % 29 for i in range(dice.choice([1, 3, 4, 5, 8, 9, 15, 16]))]
                try:
                    request = engine.submit(prompt, params)
                except ValueError:
                    continue
                requests += [(choice, prompt, params, params.seed + i) for i, choice in enumerate(request.choices)]
            elif move < 0.55 and known:
                origin, prompt, *_ = dice.choice(known)
                prompt = [*prompt, *origin.token_ids]
                try:
                    request = origin.fork(params)
                except ValueError:
                    continue
                requests += [(choice, prompt, params, params.seed + i) for i, choice in enumerate(request.choices)]
            elif move < 0.6 and requests:
                engine.abort(dice.choice(requests)[0])
            elif move < 0.62:
                engine.reset()
            elif move < 0.64:
                monkeypatch.setattr(engine._executor, dice.choice(["launch", "fetch"]), broken)
                engine.step()
                monkeypatch.undo()
            else:
                engine.step()
        engine.run()
        for request, prompt, params, own in requests:
            ids, logprobs = alone(model, prompt, params, own)
            if request.finish_reason in ("abort", "error"):
                found["failed"] += 1
                ids = ids[: len(request.token_ids)]
                logprobs = logprobs and logprobs[: len(ids)]
            assert (request.token_ids, request.logprobs or None) == (ids, logprobs or None), f"seed {seed}, {request}"
            found["finished"] += 1
        metrics = engine.metrics()
        assert metrics["pages_free"] + metrics["pages_cached"] == engine.num_pages and metrics["compiles"] <= 5
        found["preemptions"] += metrics["preemptions"]
        found["hits"] += metrics["prefix_hit_pages"]
    print(found)
    assert min(found.values()) >= 5, found


@pytest.mark.slow
def test_every_choice_and_branch_has_the_logprobs_of_its_prompt(models):
    engine, prompt = fj.Engine(models[0], PLAIN), [3, 4, 5, 6, 7, 8, 9, 3, 4]
    params = fj.SamplingParams(max_tokens=4, seed=1, n=3, ignore_eos=True, prompt_logprobs=1, logprobs=1)
    first, *others = engine.submit(prompt, params).results()
    assert len(first.prompt_logprobs) == len(prompt) and first.prompt_logprobs[0] is None
    assert all(completion.prompt_logprobs == first.prompt_logprobs for completion in others)
    request = engine.submit(prompt, dataclasses.replace(params, n=1, max_tokens=8))
    while len(request.token_ids) < 2:
        engine.step()
    branch = request.fork(dataclasses.replace(params, n=1)).result()
    made = len(branch.prompt_token_ids) - len(prompt)
    assert branch.prompt_logprobs[: len(prompt)] == first.prompt_logprobs
    chosen = [row[0] for row in branch.prompt_logprobs[len(prompt) :]]
    assert chosen == [row[0] for row in request.logprobs[:made]] and made >= 2


def broken(*_):
    raise Injected("a failure that the test asked for")
