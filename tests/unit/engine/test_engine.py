"""The engine as users see it: the same tokens as alone, whatever else runs, and every way a request can end."""

import asyncio
import dataclasses
import threading

import jax
import numpy as np
import pytest

import ferrum_jax as fj
from ferrum_jax.engine import snapshot
from ferrum_jax.sampling_params import MAX_LOGPROBS
from support.tiny_gguf import write_tiny_llama

GREEDY = fj.SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True, logprobs=2)
NOISY = dataclasses.replace(GREEDY, temperature=1.3, top_k=30, top_p=0.9, repetition_penalty=1.1, seed=5)
SMALL = fj.EngineConfig(page_size=8, num_pages=40, max_seqs=4, token_budget=16, steps_per_dispatch=2)  # whatever is timed
GUESSING = dataclasses.replace(SMALL, speculation=3, steps_per_dispatch=4)
PROMPTS = [list(range(3, 3 + length)) for length in (1, 7, 8, 9, 16, 17, 40)]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return fj.load(write_tiny_llama(tmp_path_factory.mktemp("model") / "tiny.gguf", context=128), dtype="float32")


@pytest.fixture
def engine(model):
    return fj.Engine(model, SMALL)


def limited(model, num_pages):
    """An engine that may use `num_pages` pages, with the compiled programs of the others."""
    engine = fj.Engine(model, SMALL)
    engine.num_pages, engine._scheduler.ledger = num_pages, engine._new_ledger(num_pages)
    return engine


def parts(completion):
    return completion.token_ids, completion.text, completion.finish_reason, completion.logprobs


def is_whole(engine):
    """Every page is free or cached and nothing is left."""
    found = engine.metrics()
    return found["pages_free"] + found["pages_cached"] == engine.num_pages and not found["requests_running"]


def test_a_program_with_its_own_loop_takes_what_has_arrived(engine):
    """It is told of every output and of the end, also of one that has come before it listens."""
    first = engine.submit(PROMPTS[5], GREEDY)
    notes = []
    first.listen(lambda: notes.append((first.state, len(first.token_ids))))
    engine.run()
    assert [count for _, count in notes] == sorted(count for _, count in notes) and notes[-1] == ("finished", 12)
    assert [token for output in first.poll() for token in output.token_ids] == first.token_ids and first.poll() == []
    assert first.cached_tokens == 0 and first.times.arrived < first.times.admitted < first.times.first_token
    assert first.times.first_token < first.times.last_token
    second = engine.submit(PROMPTS[5], dataclasses.replace(GREEDY, stop=first.text[4:6]))
    engine.run()
    second.listen(lambda: notes.append("late"))
    assert notes[-1] == "late" and second.cached_tokens == 16
    assert second.finish_reason == "stop" and (second.stop_string, first.stop_string) == (first.text[4:6], None)


def test_a_conversation_is_submitted_with_tools_and_variables(model, engine, monkeypatch):
    monkeypatch.setattr(
        model.tokenizer, "chat_templates", {"default": "{{ messages[0].content }}{{ tools[0].name }}{{ tone }}"}
    )
    talk = [{"role": "user", "content": "a"}]
    request = engine.submit(talk, GREEDY, tools=[{"name": "b"}], tone="c")
    assert request.prompt_token_ids == model.tokenizer.encode("abc")
    engine.abort(request)
    for given in ({"tools": [{}]}, {"tone": "c"}):
        with pytest.raises(ValueError, match=f"{next(iter(given))}: is for a conversation"):
            engine.submit("a", GREEDY, **given)


@pytest.mark.parametrize("params", [GREEDY, NOISY], ids=["greedy", "sampled"])
def test_requests_have_the_bits_that_they_have_alone(model, engine, params):
    each = [dataclasses.replace(params, seed=i, max_tokens=5 + i) for i in range(len(PROMPTS))]
    alone = [model.generate([prompt], p)[0] for prompt, p in zip(PROMPTS, each, strict=True)]
    for _ in range(2):  # the second time from the prefix cache
        requests = [engine.submit(prompt, p) for prompt, p in zip(PROMPTS, each, strict=True)]
        assert [parts(request.result()) for request in requests] == [parts(completion) for completion in alone]
        assert is_whole(engine)
    assert engine.metrics()["prefix_hit_pages"] >= 5
    assert engine.metrics()["generated_tokens"] == 2 * sum(len(c.token_ids) for c in alone)


def test_preempted_requests_end_as_if_nothing_had_been(model):
    engine = limited(model, 9)
    params = dataclasses.replace(NOISY, max_tokens=40, presence_penalty=0.5)
    prompts = [PROMPTS[3], PROMPTS[5], PROMPTS[2]]
    alone = [parts(model.generate([prompt], params)[0]) for prompt in prompts]
    requests = [engine.submit(prompt, params) for prompt in prompts]
    streamed = ["".join(text for text, _ in request) for request in requests]
    assert [parts(request.result()) for request in requests] == alone
    assert streamed == [text for _, text, *_ in alone]
    assert engine.metrics()["preemptions"] > 0 and is_whole(engine)


@pytest.mark.parametrize("params", [GREEDY, NOISY], ids=["greedy", "sampled"])
@pytest.mark.slow
def test_speculation_changes_no_token(model, params):
    params = dataclasses.replace(params, max_tokens=60, frequency_penalty=0.1)
    prompts = [[5, 6, 7, 8] * 6, PROMPTS[4], [9, 9, 9, 9, 9, 9, 9, 9]]
    plain = [parts(model.generate([prompt], params)[0]) for prompt in prompts]
    engine = fj.Engine(model, GUESSING)
    requests = [engine.submit(prompt, params) for prompt in prompts]
    assert [parts(request.result()) for request in requests] == plain and is_whole(engine)


@pytest.mark.slow
def test_steps_of_a_repetitive_text_are_fewer_with_speculation(model):
    params = fj.SamplingParams(max_tokens=60, temperature=0.0, ignore_eos=True, logit_bias={7: 100.0})  # 7 7 7 7 ...
    engine = fj.Engine(model, GUESSING)
    assert engine.submit([7, 7, 7, 7, 7, 7], params).result().token_ids == [7] * 60
    assert engine.metrics()["steps"] < 30


@pytest.mark.slow
def test_choices_share_the_prompt_and_have_noise_of_their_own(model, engine):
    params = dataclasses.replace(NOISY, n=3, prompt_logprobs=1)
    request = engine.submit(PROMPTS[6], params)
    results = request.results()
    single = [dataclasses.replace(params, n=1, prompt_logprobs=None, seed=params.seed + i) for i in range(3)]
    assert [parts(r) for r in results] == [parts(model.generate([PROMPTS[6]], p)[0]) for p in single]
    assert len({tuple(r.token_ids) for r in results}) == 3
    assert engine.metrics()["prompt_tokens"] == len(PROMPTS[6]) + 2  # one token more for each choice
    assert is_whole(engine)
    assert [parts(r) for r in model.generate([PROMPTS[6]], params)] == [parts(r) for r in results]


def test_a_fork_goes_on_without_computing_anything_again(model, engine):
    request = engine.submit(PROMPTS[6], dataclasses.replace(NOISY, max_tokens=40))
    while len(request.token_ids) < 9:
        engine.step()
    known = [*PROMPTS[6], *request.token_ids]
    before = engine.metrics()["prompt_tokens"]
    fork = request.fork(GREEDY)
    assert parts(fork.result()) == parts(model.generate([known], GREEDY)[0]) and fork.prompt_token_ids == known
    assert engine.metrics()["prompt_tokens"] == before + 1
    assert parts(request.result()) == parts(model.generate([PROMPTS[6]], request.params)[0]) and is_whole(engine)
    later = request.fork(GREEDY)  # of a finished request: its cached part
    assert parts(later.result()) == parts(model.generate([[*PROMPTS[6], *request.token_ids]], GREEDY)[0])


def test_prompt_logprobs_are_those_of_the_logits(model, engine):
    prompt = PROMPTS[6]
    engine.submit(prompt, GREEDY).result()
    for params in (dataclasses.replace(GREEDY, prompt_logprobs=3), dataclasses.replace(GREEDY, prompt_logprobs=0)):
        found = engine.submit(prompt, params).result().prompt_logprobs
        (logits,) = model.logits([prompt])
        exact = np.asarray(jax.nn.log_softmax(logits, axis=-1))
        assert found[0] is None and len(found) == len(prompt)
        for position in range(1, len(prompt)):
            row = exact[position - 1]
            assert [id for id, _ in found[position]][:1] == [prompt[position]]
            assert [id for id, _ in found[position]][1:] == np.argsort(-row)[: params.prompt_logprobs].tolist()
            assert max(abs(row[id] - value) for id, value in found[position]) <= 1e-5
    assert engine.metrics()["prefix_hit_pages"] == 0  # they cannot come from the cache


def test_biases_banned_words_and_early_ends(model, engine):
    free = engine.submit(PROMPTS[3], GREEDY).result().token_ids
    banned = dataclasses.replace(GREEDY, logit_bias={free[0]: -np.inf})
    assert free[0] not in engine.submit(PROMPTS[3], banned).result().token_ids
    wanted = dataclasses.replace(GREEDY, logit_bias={11: 1000.0})
    assert engine.submit(PROMPTS[3], wanted).result().token_ids == [11] * 12
    end = min(model.tokenizer.eos_ids)
    eager = dataclasses.replace(GREEDY, logit_bias={end: 1000.0}, ignore_eos=False)
    assert len(engine.submit(PROMPTS[3], eager).result().token_ids) == 1
    patient = engine.submit(PROMPTS[3], dataclasses.replace(eager, min_tokens=5)).result()
    assert patient.finish_reason == "stop" and [id == end for id in patient.token_ids] == [False] * 5 + [True]


def test_a_word_of_several_tokens_is_never_completed(model, engine):
    text = "qwx"
    ids = model.tokenizer.encode(text, add_special=False, parse_special=False)
    assert len(ids) == 3
    push = dict.fromkeys(ids, 50.0)
    free = engine.submit(PROMPTS[3], dataclasses.replace(NOISY, logit_bias=push, max_tokens=60, top_k=0)).result()
    assert text in free.text
    params = dataclasses.replace(NOISY, logit_bias=push, max_tokens=60, top_k=0, bad_words=[text])
    assert text not in engine.submit(PROMPTS[3], params).result().text
    assert text not in model.generate([PROMPTS[3]], params)[0].text
    assert text not in "".join(piece for piece, _ in model.stream(PROMPTS[3], params))


def test_penalties_count_every_occurrence(model, engine):
    """Against the same computed from the logits of the whole text, one token after the other."""
    params = dataclasses.replace(GREEDY, presence_penalty=0.7, frequency_penalty=0.4, repetition_penalty=1.2)
    prompt, text = PROMPTS[3], list(PROMPTS[3])
    for _ in range(params.max_tokens):
        x = model.logits([text])[0][-1].astype(np.float64)
        x[model.tokenizer.vocab_size :] = -np.inf
        for id in set(text):
            x[id] = x[id] / 1.2 if x[id] > 0 else x[id] * 1.2
        for id in set(text[len(prompt) :]):
            x[id] -= 0.7 + 0.4 * text[len(prompt) :].count(id)
        text.append(int(np.argmax(x)))
    assert engine.submit(prompt, params).result().token_ids == text[len(prompt) :]
    assert model.generate([prompt], params)[0].token_ids == text[len(prompt) :]


def test_stop_strings_end_a_request_and_give_its_pages_back(model, engine):
    whole = model.generate([PROMPTS[3]], NOISY)[0]
    stop = whole.text[3:6]
    params = dataclasses.replace(NOISY, stop=[stop])
    completion = engine.submit(PROMPTS[3], params).result()
    assert completion.finish_reason == "stop" and completion.text == whole.text[: whole.text.index(stop)]
    engine.run()
    assert is_whole(engine)


def test_the_context_ends_a_request(model, engine):
    params = dataclasses.replace(GREEDY, max_tokens=500)
    completion = engine.submit(list(range(3, 43)), params).result()
    assert completion.finish_reason == "length" and len(completion.token_ids) == 128 - 40
    assert parts(completion) == parts(model.generate([list(range(3, 43))], params)[0])


@pytest.mark.parametrize(
    ("prompt", "params", "message"),
    [
        ([], GREEDY, "empty prompt"),
        ("", GREEDY, "empty prompt"),
        ([64], GREEDY, "out of range"),
        ([5, True], GREEDY, "integers, not bool"),
        ([5], None, "params must be SamplingParams, not NoneType"),
        ([5], {"max_tokens": 4}, "params must be SamplingParams, not dict"),
        ([1] * 128, GREEDY, "no room in a context of 128"),
        ([1] * 60, dataclasses.replace(GREEDY, max_tokens=60), "needs 15 pages of 8 tokens; the engine has 12"),
        ([1], dataclasses.replace(GREEDY, logit_bias={64: 1.0}), "token id 64 is out of range"),
        ([1], dataclasses.replace(GREEDY, bad_words=["abcdefghijklmnopqrstuvwxyz"]), "bad_words"),
    ],
)
def test_requests_that_can_never_be_run_are_refused_with_the_numbers(model, prompt, params, message):
    engine = limited(model, 12)
    with pytest.raises(ValueError, match=message):
        engine.submit(prompt, params)
    assert engine.metrics()["requests_waiting"] == 0


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("page_size", 0), ("max_seqs", 0), ("num_pages", -1), ("token_budget", 1.5), ("prefix_cache", 1), ("speculation", -1),
        ("max_seqs", 10**7), ("page_size", 10**6), ("token_budget", 10**9), ("num_pages", 10**30), ("speculation", 10**6),
    ],
)  # fmt: skip
def test_configurations_that_cannot_be(field, value):
    with pytest.raises(ValueError, match=rf"EngineConfig\.{field} must be"):
        fj.EngineConfig(**{field: value})
    with pytest.raises(ValueError, match="int3"):
        fj.EngineConfig(kv_dtype="int3")


def test_a_path_that_is_none(engine):
    request = engine.submit([1, 2], fj.SamplingParams(max_tokens=1))
    for call in (lambda: engine.snapshot(request, 5), lambda: engine.restore(None)):
        with pytest.raises(ValueError, match="must be a path"):
            call()


def test_a_configuration_as_a_dict(model):
    assert fj.Engine(model, {"page_size": 8, "num_pages": 4}).config == fj.EngineConfig(page_size=8, num_pages=4)
    for wrong in (None, "tiny", model.config):
        with pytest.raises(ValueError, match="an engine runs a Model"):
            fj.Engine(wrong)
    for config, message in (({"max_rows": 4}, "no field 'max_rows'; its fields are page_size"), (None, "not NoneType")):
        with pytest.raises(ValueError, match=message):
            fj.Engine(model, config)
    with pytest.raises(ValueError, match=r"EngineConfig\.max_seqs must be"):
        fj.Engine(model, {"max_seqs": 0})


def test_aborts_in_every_state(model, engine):
    requests = [engine.submit(prompt, dataclasses.replace(GREEDY, max_tokens=40)) for prompt in PROMPTS]
    engine.abort(requests[-1])  # waiting
    engine.step()
    engine.abort(requests[0])  # running, its first token on the way
    engine.step()
    engine.step()
    engine.abort(requests[1])
    engine.abort(requests[1])
    results = [request.result() for request in requests]
    assert [r.finish_reason for r in results] == ["abort", "abort", "length", "length", "length", "length", "abort"]
    assert parts(results[3]) == parts(model.generate([PROMPTS[3]], requests[3].params)[0])
    engine.run()
    engine.abort(requests[3])
    assert requests[3].finish_reason == "length" and is_whole(engine)


@pytest.mark.parametrize("place", ["launch", "fetch"])
def test_an_error_inside_a_step_ends_its_requests_and_not_the_engine(model, monkeypatch, place):
    engine = fj.Engine(model, SMALL)
    del engine._scheduler._slots[2:]  # two run, two wait
    requests = [engine.submit(prompt, GREEDY) for prompt in PROMPTS[:4]]
    engine.step()
    engine.step()
    original = getattr(engine._executor, place)

    def fail(*args):
        monkeypatch.setattr(engine._executor, place, original)
        raise RuntimeError("the device is on fire")

    monkeypatch.setattr(engine._executor, place, fail)
    results = [request.result() for request in requests]
    assert [r.finish_reason for r in results] == ["error", "error", "length", "length"]
    assert "the device is on fire" in requests[0].error
    assert parts(results[3]) == parts(model.generate([PROMPTS[3]], GREEDY)[0]) and is_whole(engine)


def test_an_interrupt_loses_nothing(model, engine, monkeypatch):
    requests = [engine.submit(prompt, NOISY) for prompt in PROMPTS]
    engine.step()
    original = engine._executor.fetch

    def interrupt(*args):
        monkeypatch.setattr(engine._executor, "fetch", original)
        raise KeyboardInterrupt

    monkeypatch.setattr(engine._executor, "fetch", interrupt)
    with pytest.raises(KeyboardInterrupt):
        engine.run()
    alone = [parts(model.generate([prompt], NOISY)[0]) for prompt in PROMPTS]
    assert [parts(request.result()) for request in requests] == alone and is_whole(engine)


@pytest.mark.slow
def test_a_cache_that_grows_changes_no_bit(model):
    """From two pages over 8 and 32 to 40, in the middle of answers, with branches and cached pages along."""
    params = dataclasses.replace(NOISY, max_tokens=60)
    alone = [parts(model.generate([prompt], params)[0]) for prompt in PROMPTS]
    engine = fj.Engine(model, dataclasses.replace(SMALL, initial_pages=2))
    assert engine._executor.pages == 2 and engine.metrics()["pages_free"] == 40
    first = engine.submit(PROMPTS[0], params)
    assert parts(first.result()) == alone[0] and engine._executor.pages == 8
    requests = [engine.submit(prompt, params) for prompt in PROMPTS]
    assert [parts(request.result()) for request in requests] == alone
    assert engine._executor.pages == 40 and is_whole(engine)


@pytest.mark.slow
def test_a_snapshot_goes_into_a_cache_that_grows(model, tmp_path):
    engine = fj.Engine(model, dataclasses.replace(SMALL, steps_per_dispatch=1))
    request = engine.submit(PROMPTS[-1], dataclasses.replace(NOISY, max_tokens=30))
    while len(request.token_ids) < 9:
        engine.step()
    engine.snapshot(request, tmp_path / "saved")
    small = fj.Engine(model, dataclasses.replace(SMALL, initial_pages=1))
    assert parts(small.restore(tmp_path / "saved").result()) == parts(request.result())
    assert small.metrics()["prefix_hit_pages"] >= 5 and is_whole(small)


def test_logits_that_are_not_finite_are_an_error(model):
    broken = fj.Engine(model, SMALL)
    params = jax.tree.map(lambda leaf: leaf, model.params)
    params["final_norm"] = params["final_norm"] * np.nan
    model.params, good = params, model.params
    try:
        request = broken.submit([5, 6], GREEDY)
        assert request.result().finish_reason == "error" and "not finite" in request.error
    finally:
        model.params = good
    assert is_whole(broken)


def test_the_background_loop_serves_threads_and_tasks(model):
    alone = [parts(model.generate([prompt], NOISY)[0]) for prompt in PROMPTS]
    with fj.Engine(model, SMALL) as engine:
        found: dict[int, tuple] = {}

        def ask(i):
            found[i] = parts(engine.submit(PROMPTS[i], NOISY).result())

        threads = [threading.Thread(target=ask, args=(i,)) for i in range(len(PROMPTS))]
        for thread in threads:
            thread.start()

        async def collect(prompt):
            request = engine.submit(prompt, NOISY)
            return [id async for output in request for id in output.token_ids]

        async def collect_all():
            return await asyncio.gather(*map(collect, PROMPTS))

        assert asyncio.run(collect_all()) == [ids for ids, *_ in alone]
        for thread in threads:
            thread.join()
        assert [found[i] for i in range(len(PROMPTS))] == alone
        left = engine.submit([5], dataclasses.replace(GREEDY, max_tokens=100))
    assert left.finish_reason in ("abort", "length") and is_whole(engine)


def test_the_log_says_which_shapes_are_compiled(model, caplog):
    with caplog.at_level("INFO", "ferrum_jax.engine"), fj.Engine(model, SMALL) as engine:
        engine.submit([5], GREEDY).result()
    assert "40 pages of 8 tokens; shapes: decoding 1 rows, decoding 4 rows, 16 tokens" in caplog.text
    assert "0 of 6 programs, now: admit" in caplog.text


def test_tasks_drive_an_engine_without_a_loop(model, engine):
    async def collect(prompt):
        return [id async for output in engine.submit(prompt, NOISY) for id in output.token_ids]

    async def collect_all():
        return await asyncio.gather(*map(collect, PROMPTS))

    assert asyncio.run(collect_all()) == [model.generate([prompt], NOISY)[0].token_ids for prompt in PROMPTS]


def test_nothing_compiles_while_serving(model, engine):
    said = []
    engine.warm_up(lambda *state: said.append(state))
    before = model._runtime.programs.compiled
    assert said[-1][:2] == (len(engine.buckets()) + 3,) * 2 and said[-1][2] == "ready"
    requests = [engine.submit(prompt, dataclasses.replace(NOISY, n=2)) for prompt in PROMPTS]
    engine.run()
    assert all(len(r.token_ids) == 12 for request in requests for r in request.results())
    assert model._runtime.programs.compiled == before and engine.metrics()["compiles"] <= len(engine.buckets()) + 3


def test_few_programs_serve_any_request(model, monkeypatch):
    """Until the background loop has compiled the others."""
    engine = fj.Engine(model, dataclasses.replace(SMALL, num_pages=41))
    engine.warm_up(essential=True)
    engine.rehearse()
    compiled = engine.metrics()["compiles"]
    assert parts(engine.submit(PROMPTS[2], GREEDY).result()) == parts(model.generate([PROMPTS[2]], GREEDY)[0])
    requests = [engine.submit(prompt, NOISY) for prompt in PROMPTS]
    assert [request.result().token_ids for request in requests] == [one.token_ids for one in model.generate(PROMPTS, NOISY)]
    assert engine.metrics()["compiles"] == compiled and len(engine.buckets()) > 2
    monkeypatch.setattr(engine._executor, "programs", list)
    assert engine._executor.substitutes
    with engine:
        engine._compiler.call(lambda: None)
        assert not engine._executor.substitutes


def test_a_rehearsal_measures_and_leaves_nothing(model):
    """Not even with pages for fewer sequences than slots."""
    engine = limited(model, 3)
    before = engine.metrics()
    engine.rehearse()
    assert engine.metrics() == before | {"compiles": engine.metrics()["compiles"]} and before["pages_free"] == 3
    assert engine._scheduler.pace._steps.keys() > {1}
    assert parts(engine.submit(PROMPTS[2], GREEDY).result()) == parts(model.generate([PROMPTS[2]], GREEDY)[0])


def test_every_step_aliases_the_whole_cache(model, engine):
    engine.warm_up()
    cache = sum(leaf.nbytes for leaf in jax.tree.leaves(engine._executor.state))
    for bucket in engine._executor.buckets():
        assert engine._executor.compile(bucket).compiled.memory_analysis().alias_size_in_bytes >= cache


@pytest.mark.parametrize("finished", [False, True])
def test_a_snapshot_goes_on_in_another_engine(model, tmp_path, finished):
    first, second = fj.Engine(model, dataclasses.replace(SMALL, steps_per_dispatch=1)), fj.Engine(model, SMALL)
    params = dataclasses.replace(NOISY, max_tokens=30, logit_bias={9: -np.inf}, prompt_logprobs=None)
    alone = parts(model.generate([PROMPTS[6]], params)[0])
    request = first.submit(PROMPTS[6], params)
    while not (request.state == "finished" if finished else len(request.token_ids) >= 11):
        first.step()
    first.snapshot(request, tmp_path / "snapshot")
    copy = second.restore(tmp_path / "snapshot")
    assert copy.state == ("finished" if finished else "waiting") and copy.token_ids[:11] == alone[0][:11]
    assert parts(copy.result()) == alone == parts(request.result())
    if not finished:
        assert second.metrics()["prompt_tokens"] < 16  # the part after the last full page
    follow = [*PROMPTS[6], *alone[0], 5]
    second.submit(follow, GREEDY).result()
    assert second.metrics()["prefix_hit_pages"] >= 5 and is_whole(first) and is_whole(second)


def test_snapshots_that_cannot_be(model, engine, tmp_path):
    request = engine.submit([5], GREEDY)
    engine.snapshot(request, tmp_path / "one")
    with pytest.raises(FileExistsError, match="new directory"):
        engine.snapshot(request, tmp_path / "one")
    with pytest.raises(fj.ModelFileError, match="not a snapshot"):
        engine.restore(tmp_path / "none")
    (tmp_path / "other").mkdir()
    with pytest.raises(fj.ModelFileError, match="not a snapshot"):
        engine.restore(tmp_path / "other")
    other = fj.Engine(model, dataclasses.replace(SMALL, page_size=4))
    with pytest.raises(ValueError, match="of another model or engine"):
        other.restore(tmp_path / "one")
    assert snapshot._VERSION == 4 and MAX_LOGPROBS == 64


def test_a_reset_forgets_texts_and_keeps_requests(model, engine):
    engine.submit(PROMPTS[6], GREEDY).result()
    request = engine.submit(PROMPTS[6], GREEDY)
    engine.step()
    engine.reset()
    assert parts(request.result()) == parts(model.generate([PROMPTS[6]], GREEDY)[0])
    engine.reset()
    assert engine.metrics()["pages_cached"] == 0 and engine.metrics()["pages_free"] == engine.num_pages
    hits = engine.metrics()["prefix_hit_pages"]
    engine.submit(PROMPTS[6], GREEDY).result()
    assert engine.metrics()["prefix_hit_pages"] == hits


@pytest.mark.slow
def test_a_thousand_requests_in_the_queue(model, engine):
    params = fj.SamplingParams(max_tokens=2, temperature=0.0, ignore_eos=True)
    requests = [engine.submit(PROMPTS[i % len(PROMPTS)], params) for i in range(1000)]
    engine.run()
    want = [c.token_ids for c in model.generate(PROMPTS, params)]
    assert all(request.token_ids == want[i % len(PROMPTS)] for i, request in enumerate(requests)) and is_whole(engine)


def test_a_pool_of_three_pages(model):
    engine = limited(model, 3)
    prompts, params = PROMPTS[:6], dataclasses.replace(NOISY, max_tokens=7)
    requests = [engine.submit(prompt, params) for prompt in prompts]
    assert [parts(r.result()) for r in requests] == [parts(model.generate([p], params)[0]) for p in prompts]
    assert is_whole(engine)
