"""Structured output as users see it: what ends with "stop" matches, at any temperature, and nobody else's tokens change."""

import dataclasses
import json
import re

import jax.numpy as jnp
import jsonschema
import numpy as np
import pytest

import ferrum_jax as fj
from ferrum_jax import choice
from support import guards
from support.schemas import BIAS, END, byte_model, random_schema, token_of

SMALL = fj.EngineConfig(page_size=8, num_pages=200, max_seqs=8, token_budget=32, steps_per_dispatch=3)
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 6}, "age": {"type": "integer", "minimum": 0, "maximum": 130}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
WILD = fj.SamplingParams(max_tokens=60, temperature=1.5, seed=7, logit_bias=BIAS)
FREE = fj.SamplingParams(max_tokens=24, temperature=1.2, top_p=0.9, seed=3, ignore_eos=True, logprobs=1)
PROMPTS = [[5, 6, 7], list(range(40, 60)), [9] * 33, [70, 71]]


def asked(**structured):
    return dataclasses.replace(WILD, structured=fj.Structured(**structured))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return fj.load(byte_model(tmp_path_factory.mktemp("model") / "bytes.gguf"), dtype="float32")


@pytest.fixture
def engine(model):
    return fj.Engine(model, SMALL)


def parts(completion):
    return completion.token_ids, completion.text, completion.finish_reason, completion.logprobs


def is_whole(engine):
    found = engine.metrics()
    return found["pages_free"] + found["pages_cached"] == engine.num_pages and not found["requests_running"]


def alone(model, prompt, params):
    """The completions of one prompt, by itself."""
    return fj.Engine(model, SMALL).submit(prompt, params).results()


def bits(mask, vocab):
    return {token for token in range(vocab) if mask[token >> 5] >> (token & 31) & 1}


# ---- what is admitted


def test_masks_are_those_of_brute_force(model):
    """At each place on the way to each choice: the tokens whose bytes keep a choice possible, and the end where one is
    complete. Where the next byte is certain, only the token that the tokenizer has for what is certain."""
    choices = ["true", 'trunk "a"', "trap", "nulls", "é12", "12", "1,2"]
    grammars, tokenizer = model._runtime.grammars, model.tokenizer
    vocab, checked = model.config.vocab_size, 0
    for text in choices:
        follower, done, taken = grammars.follower(fj.Structured(choice=choices), 0), b"", list[int]()
        for token in [*tokenizer.encode(text, add_special=False), END]:
            left = {whole.encode()[len(done) :] for whole in choices if whole.encode().startswith(done)}
            pieces = {t: tokenizer.token_bytes(t) for t in range(tokenizer.vocab_size) if not tokenizer.is_control(t)}
            right = {t for t, piece in pieces.items() if piece and any(rest.startswith(piece) for rest in left)}
            found = bits(grammars.masks([follower], vocab)[0], vocab)
            if len({rest[:1] for rest in left}) > 1 or left == {b""}:
                assert found == right | ({END} if b"" in left else set())
                checked += 1
            assert token in found and (found == {token} or found == right)
            follower.follow(taken, [token])
            taken, done = [*taken, token], done + tokenizer.token_bytes(token)
    assert checked > 15


def test_the_device_takes_nothing_else():
    """Random bits for some rows against NumPy; the others are as without any, to the bit."""
    rng = np.random.default_rng(1)
    slots = guards.slots_of(4)
    for slot in range(4):
        slots = guards.admitted(slots, slot, [3 + slot], [], guards.greedy(logit_bias={4: 2.0}))
    mask = rng.integers(1, 2**guards.VOCAB, (4, 1)).astype(np.int32)
    constrained = jnp.asarray([True, False, True, False])
    rows = jnp.asarray([2, 0, 3], jnp.int32)
    what = slots._replace(mask=jnp.asarray(mask), constrained=constrained).choice.adjustments
    logits = rng.normal(0, 3, (3, guards.VOCAB)).astype(np.float32)
    found = np.asarray(choice._admit(jnp.asarray(logits), what, rows))
    allowed = np.array([[mask[row, 0] >> token & 1 for token in range(guards.VOCAB)] for row in (2, 0, 3)], bool)
    allowed[2] = True
    assert np.array_equal(found, np.where(allowed, logits, -np.inf))


@pytest.mark.parametrize("seeds", [range(60), pytest.param(range(60, 1000), marks=pytest.mark.slow)], ids=["some", "many"])
def test_what_ends_is_valid(model, seeds):
    engine = fj.Engine(model, SMALL)
    schemas = [random_schema(seed) for seed in seeds]
    each = [dataclasses.replace(WILD, seed=seed, max_tokens=120) for seed in seeds]
    requests = [
        engine.submit([65], dataclasses.replace(params, structured=fj.Structured(json_schema=schema)))
        for params, schema in zip(each, schemas, strict=True)
    ]
    ended = 0
    for schema, request in zip(schemas, requests, strict=True):
        found = request.result()
        assert found.finish_reason in ("stop", "length"), (schema, request.error)
        if found.finish_reason == "stop":
            ended += 1
            jsonschema.Draft202012Validator(schema).validate(json.loads(found.text))
    assert ended > len(seeds) / 2 and is_whole(engine)


def test_expressions_choices_and_grammars_hold(model):
    kinds = {
        "regex": ("[0-9]{3}-[a-c]{1,9}", r"[0-9]{3}-[a-c]{1,9}"),
        "choice": (["yes", "no", 'é"\n'], '(yes|no|é"\n)'),
        "lark": (
            'start: <call> %json {"title": "x", "enum": [1, [2]]} REST\nREST: /[a-b]{0,4}/',
            r"(1|\[[ \n\r\t]*2[ \n\r\t]*\])[ab]{0,4}",
        ),
    }
    for kind, (given, right) in kinds.items():
        found = alone(model, PROMPTS[0], dataclasses.replace(asked(**{kind: given}), n=4))
        assert all(one.finish_reason == "stop" and re.fullmatch(right, one.text) for one in found), found
    call = model.tokenizer.encode("<call>", add_special=False, parse_special=True)
    assert all(one.token_ids[:1] == call for one in found)


def test_a_limit_ends_with_length(model):
    (found,) = model.generate([PROMPTS[0]], asked(regex="[ab]{100}"))
    assert found.finish_reason == "length" and re.fullmatch("[ab]{60}", found.text)
    assert "".join(text for text, _ in model.stream(PROMPTS[0], asked(regex="[ab]{100}"))) == found.text


# ---- together with everything else


@pytest.mark.parametrize("turns", [0, 2], ids=["together", "in turns"])
@pytest.mark.parametrize("speculation", [0, pytest.param(3, marks=pytest.mark.slow)])
def test_rows_do_not_disturb_each_other(model, turns, speculation):
    free = [dataclasses.replace(FREE, seed=i) for i in range(3)]
    bound = [dataclasses.replace(asked(json_schema=PERSON), seed=i, logprobs=2, repetition_penalty=1.1) for i in range(3)]
    right = [parts(alone(model, prompt, params)[0]) for prompt in PROMPTS[:2] for params in (*free, *bound)]
    engine = fj.Engine(model, dataclasses.replace(SMALL, speculation=speculation))
    engine._turns = lambda: turns
    requests = [engine.submit(prompt, params) for prompt in PROMPTS[:2] for params in (*free, *bound)]
    assert [parts(request.result()) for request in requests] == right and is_whole(engine)
    assert any(request.finish_reason == "stop" for request in requests if request.params.structured)


def test_rows_without_a_grammar_keep_their_steps(model, engine):
    """In turns: while a grammar has to know the newest token, the others go on for several steps in one dispatch."""
    engine._turns = lambda: 3
    seen = []
    launch = engine._executor.launch
    engine._executor.launch = lambda dispatch: (seen.append((dispatch.steps, len(dispatch.rows))), launch(dispatch))[1]
    requests = [engine.submit([8], FREE), engine.submit([8], asked(regex="[a-d]{8}"))]
    assert [len(request.result().token_ids) for request in requests] == [24, 9]
    assert (3, 1) in seen and (1, 2) in seen and all(rows == 1 for steps, rows in seen if steps > 1)


@pytest.mark.parametrize("speculation", [0, pytest.param(3, marks=pytest.mark.slow)])
def test_forced_tokens_take_one_step(model, speculation):
    """Of several rows, with little room, and with the same output as one after the other."""
    schema = {"type": "object", "properties": {"a_long_name": {"enum": ["nothing at all", "something"]}, "é": {"const": 12345}}}
    schema |= {"required": ["a_long_name", "é"], "additionalProperties": False}
    asking = [dict(json_schema=schema), dict(regex="(ab|cd)[.]{40}"), dict(json_schema=schema), dict(choice=["y" * 50, "z"])]
    each = [dataclasses.replace(asked(**one), seed=i, repetition_penalty=1.2) for i, one in enumerate(asking)]
    each[2] = dataclasses.replace(each[2], stop=["some"], max_tokens=30)
    config = dataclasses.replace(SMALL, speculation=speculation)

    def ran(steps):
        engine = fj.Engine(model, config)
        engine.num_pages, engine._scheduler.ledger = 20, engine._new_ledger(20)
        force, engine._force = engine._force, lambda dispatch: force(dispatch) if steps else dispatch
        requests = [engine.submit(PROMPTS[i % 4], params) for i, params in enumerate((*each, FREE, *each))]
        found = [parts(request.result()) for request in requests]
        assert is_whole(engine)
        return found, engine.metrics()

    (right, slow), (found, fast) = ran(False), ran(True)
    assert found == right and fast["steps"] < slow["steps"] / 2
    assert min(one["preemptions"] for one in (fast, slow)) > 0


def test_n_preemption_and_cached_prefixes_change_nothing(model):
    params = dataclasses.replace(asked(json_schema=PERSON), n=3, logprobs=1, min_tokens=2, stop=["zz"])
    right = [parts(one) for one in alone(model, PROMPTS[2], params)]
    engine = fj.Engine(model, SMALL)
    engine.num_pages, engine._scheduler.ledger = 14, engine._new_ledger(14)
    others = [engine.submit([i, 3, 4], dataclasses.replace(FREE, max_tokens=60)) for i in range(4)]
    for _ in range(2):  # the second time from the prefix cache
        assert [parts(one) for one in engine.submit(PROMPTS[2], params).results()] == right
    assert all(other.result().finish_reason == "length" for other in others)
    assert engine.metrics()["preemptions"] > 0 and engine.metrics()["prefix_hit_pages"] > 0 and is_whole(engine)


def test_a_fork_goes_on_inside_the_grammar(model, engine):
    request = engine.submit(PROMPTS[0], asked(regex="[0-9]{8}[a-z]{8}"))
    while len(request.token_ids) < 5:
        engine.step()
    begun = len(request.token_ids)
    forks = [request.fork(dataclasses.replace(request.params, seed=seed)) for seed in (1, 2)]
    again = forks[0].fork()
    for fork in forks:
        assert re.fullmatch(f"[0-9]{{{8 - begun}}}[a-z]{{8}}", fork.result().text) and fork.finish_reason == "stop"
    assert re.fullmatch("[0-9]*[a-z]{8}", again.result().text)
    other = request.fork(asked(choice=["ab"]))
    assert other.result().text == "ab" and request.result().finish_reason == "stop"


def test_a_snapshot_goes_on_inside_the_grammar(model, engine, tmp_path):
    params = asked(json_schema=PERSON)
    (whole,) = alone(model, PROMPTS[2], params)
    request = engine.submit(PROMPTS[2], params)
    while len(request.token_ids) < 6:
        engine.step()
    engine.snapshot(request, tmp_path / "kept")
    restored = fj.Engine(model, SMALL).restore(tmp_path / "kept")
    assert restored.params == params and parts(restored.result()) == parts(whole)


def test_the_grammar_is_stronger_than_bans(model):
    """Where only banned tokens are admitted, one of them is chosen."""
    params = dataclasses.replace(asked(choice=["a"]), min_tokens=5, bad_words=["a"], logit_bias={token_of("a"): -np.inf})
    assert alone(model, PROMPTS[0], params)[0].text == "a"


def test_after_an_ignored_end_there_are_only_ends(model):
    (found,) = alone(model, PROMPTS[0], dataclasses.replace(asked(choice=["ab", "ac"]), ignore_eos=True, max_tokens=6))
    assert found.text in ("ab", "ac") and found.token_ids[2:] == [END] * 4 and found.finish_reason == "length"


def test_a_grammar_that_cannot_go_on_is_an_error(model, engine, monkeypatch):
    """Its mask would admit the end token alone."""
    other = engine.submit([8], FREE)
    request = engine.submit(PROMPTS[0], asked(regex="[0-9]{30}"))
    while len(request.token_ids) < 4:
        engine.step()
    request._sequence.follower.matcher.consume_token(token_of("x"))
    found = request.result()
    assert found.finish_reason == "error" and "the grammar cannot go on" in found.error and len(found.token_ids) < 8
    assert parts(other.result()) == parts(alone(model, [8], FREE)[0]) and is_whole(engine)


def test_the_command_line_takes_it(tmp_path, capsys):
    from ferrum_jax.cli import main

    path, schema = byte_model(tmp_path / "bytes.gguf"), tmp_path / "schema.json"
    schema.write_text('{"enum": ["red", "green"]}')
    for flags, right in [
        (["--json-schema", str(schema)], '"(red|green)"'),
        (["--json-schema", '{"const": 5}'], "5"),
        (["--regex", "[ab]{3}"], "[ab]{3}"),
        (["--choice", "yes", "--choice", "no"], "yes|no"),
    ]:
        assert main(["run", str(path), "--prompt", "a", "--dtype", "float32", "--max-tokens", "20", "--raw", *flags]) == 0
        assert re.fullmatch(right, capsys.readouterr().out.strip())
    assert main(["run", str(path), "--prompt", "a", "--raw", "--json-schema", '{"not": {}}']) == 2
    assert "/not is not supported" in capsys.readouterr().err
