"""Guards for the work on the device, without a model: slots, sampling and decoding over logits from a table.

They run without jit, or trace anew, so that they see a fault that was just put in. All other guards are tests of tests/unit.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ferrum_jax import choice, functional, sampling
from ferrum_jax.config import Rope, RopeScaling
from ferrum_jax.distributed import Placement
from ferrum_jax.engine import EngineConfig, steps
from ferrum_jax.engine.executor import Bucket, Executor
from ferrum_jax.engine.ledger import Held
from ferrum_jax.engine.sequence import Dispatch, Row, Sequence
from ferrum_jax.models.rope import rope_angles, rope_frequencies
from ferrum_jax.programs import Programs
from ferrum_jax.sampling import Sampling, SamplingParams, filtered_logits, is_end, sample
from ferrum_jax.state import DecodeState
from ferrum_jax.tokenizer import TextStream
from support.engine_stand_in import Model
from support.random_models import DENSE, tiny_params

VOCAB, CAPACITY, END, MADE = 12, 48, 2, 5
TABLE = np.random.default_rng(3).normal(0, 2, (VOCAB, VOCAB)).astype(np.float32)  # logits after each token


def parameters(rows: list[SamplingParams], limit: int = VOCAB, end: int = END) -> Sampling:
    plain = [params.row(7 if params.seed is None else params.seed, params.max_tokens) for params in rows]
    return Sampling.from_params(plain, eos_ids=[end], vocab_limit=limit)


def greedy(**fields) -> SamplingParams:
    return SamplingParams(**{"max_tokens": 20, "temperature": 0.0, "ignore_eos": True, **fields})


def slots_of(count: int = 3) -> steps.Slots:
    sampling = parameters([greedy(max_tokens=1)] * count)
    return steps.new_slots(sampling, slots=count, capacity=CAPACITY, vocab=VOCAB)


def admitted(slots: steps.Slots, slot: int, prompt: list[int], output: list[int], params: SamplingParams) -> steps.Slots:
    text = np.zeros(CAPACITY, np.int32)
    text[: len(prompt) + len(output)] = [*prompt, *output]
    bias = dict(params.logit_bias or ())
    admission = steps.Admission(
        slot=np.int32(slot),
        text=text,
        length=np.int32(len(prompt) + len(output)),
        prompt_length=np.int32(len(prompt)),
        bias_ids=np.array([*bias, VOCAB], np.int32),
        bias=np.array([*bias.values(), 0], np.float32),
        banned=np.full((steps.BAD_WORDS, steps.BAD_WORD_TOKENS), -1, np.int32),
        min_tokens=np.int32(params.min_tokens),
        constrained=np.bool_(False),
        scored=np.bool_(params.logprobs is not None),
        scored_prompt=np.bool_(False),
        adapter=np.int32(-1),
        sampling=parameters([params]),
    )
    return steps.admit(slots, admission)


def of_slot(slots: steps.Slots, slot: int) -> dict[str, np.ndarray]:
    """What a slot holds, its history up to its length."""
    rows = {**slots._asdict(), **{name: getattr(slots.sampling, name) for name in sampling.PER_ROW}}
    del rows["sampling"]
    found = {name: np.asarray(array)[slot] for name, array in rows.items()}
    found["history"] = found["history"][: found["length"]]
    return found


def same(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> None:
    for name, value in one.items():
        assert np.array_equal(value, other[name]), f"{name}: {value} and {other[name]}"


# ---- slots


def a_slot_remembers_nothing_of_those_before():
    first = admitted(slots_of(), 1, [3, 4, 5, 6, 7, 8], [9, 9, 1], greedy(min_tokens=4, logit_bias={3: 1.0}, logprobs=1))
    again = admitted(first, 1, [5, 4], [], greedy(seed=1))
    same(of_slot(admitted(slots_of(), 1, [5, 4], [], greedy(seed=1)), 1), of_slot(again, 1))


def a_slot_filled_again_is_as_it_was():
    """After preemption: the same text, counts and parameters as if the tokens were chosen one by one."""
    params = greedy(repetition_penalty=1.5, presence_penalty=0.5, frequency_penalty=0.7, min_tokens=3)
    slots = admitted(slots_of(), 1, [3, 4, 4], [], params)
    for _ in range(2):
        slots = chosen(slots, np.array([1], np.int32), np.array([True]))
    made = of_slot(slots, 1)
    same(made, of_slot(admitted(slots_of(), 1, [3, 4, 4], made["history"][3:].tolist(), params), 1))


def chosen(slots: steps.Slots, rows: np.ndarray, alive: np.ndarray) -> steps.Slots:
    last = slots.history[rows, slots.length[rows] - 1]
    return steps._choose(jnp.asarray(TABLE)[last], slots, jnp.asarray(rows), jnp.asarray(alive))[0]


def rows_of_padding_touch_no_slot():
    slots = slots_of()
    for slot in range(3):
        slots = admitted(slots, slot, [3 + slot], [], greedy())
    after = chosen(slots, np.array([1, -1, -1], np.int32), np.array([True, False, False]))
    assert after.length[1] == 2
    for slot in (0, 2):
        same(of_slot(slots, slot), of_slot(after, slot))


def rows_of_padding_have_no_slot():
    """Sent to the device: rows after those of the dispatch are -1."""
    seen = []

    class Recorder(Executor):
        def reset(self):
            self.state = self.slots = self._placed_key = None

        def compile(self, bucket):
            def program(params, state, slots, rows, table, *rest):
                seen.append((bucket, np.asarray(rows), rest))
                return state, slots, None

            return program

    model = Model()
    model.params, model.placement, model.programs = None, Placement.of(), Programs(Placement.of())
    device = Recorder(model, EngineConfig(num_pages=4, max_seqs=9, token_budget=20), [4], 48)
    sequence = Sequence(0, [1, 2, 3], 3, 9)
    held = Held(1, 3)
    device.launch(Dispatch([Row(sequence, 0, 0, 3, True, 0, held)] * 5, 0, [], []))
    device.launch(Dispatch([Row(sequence, 0, -1, 1, True, 0, held)] * 5, 2, [], []))
    (mixed, rows, (starts, query_starts, samples, _)), (decode, decoded, _) = seen
    assert mixed == Bucket(20, 9) and rows.tolist() == [0] * 5 + [-1] * 4 and samples.tolist() == [True] * 5 + [False] * 4
    assert starts.tolist() == [0] * 5 + [-1] * 4 and query_starts.tolist() == [0, 3, 6, 9, 12, 15, 15, 15, 15, 15]
    assert decode == Bucket(0, 9) and decoded.tolist() == [0] * 5 + [-1] * 4


# ---- sampling


def taken(logits: list[float], params: SamplingParams, prompt=(), output=(), limit: int = 0) -> int:
    seen = np.zeros((1, len(logits)), np.int32)
    for id in output:
        seen[0, id] += 2
    for id in set(prompt):
        seen[0, id] += 1
    rows = parameters([params], limit or len(logits))
    return int(sample(jnp.asarray([logits]), rows, jnp.asarray(seen), jnp.zeros(1, jnp.int32), jax.random.key(0))[0])


def greedy_takes_the_first_of_equals():
    assert taken([0.0, 3.0, 1.0, 3.0, 3.0], greedy()) == 1
    assert taken([-1.0] * 300, greedy()) == 0


def a_repetition_is_penalized_once():
    params = greedy(repetition_penalty=2.0)
    assert taken([0.0, 8.0, 3.0], params, output=[1, 1, 1]) == 1  # 4 > 3; twice would be 2
    assert taken([0.0, 5.0, 3.0], params, output=[1]) == 2
    assert taken([0.0, 5.0, 3.0], params, prompt=[1]) == 2  # the prompt counts


def presence_and_frequency_are_taken_off():
    assert taken([0.0, 4.0, 3.5], greedy(presence_penalty=1.0), output=[1]) == 2
    assert taken([0.0, 4.0, 3.5], greedy(presence_penalty=1.0), prompt=[1]) == 1  # of the output alone
    assert taken([0.0, 4.0, 3.5], greedy(frequency_penalty=0.2), output=[1, 1]) == 1
    assert taken([0.0, 4.0, 3.5], greedy(frequency_penalty=0.2), output=[1, 1, 1]) == 2


def filters_come_after_the_temperature():
    """At temperature 10 three near equals are needed for 0.9; at 1 the first has nearly all."""
    rows = parameters([SamplingParams(temperature=10.0, top_p=0.9), SamplingParams(min_p=0.5)], 4)
    kept = filtered_logits(jnp.asarray([[9.0, 4.0, 3.0, 0.0], [3.0, 2.9, 1.0, 0.0]]), rows, jnp.zeros((2, 4), jnp.int32))
    assert np.isfinite(np.asarray(kept)).sum(axis=1).tolist() == [4, 2]


def end_tokens_are_those_of_the_model():
    rows = parameters([SamplingParams()] * 3 + [greedy()], end=5)
    assert is_end(jnp.asarray([5, 2, 0, 5]), rows).tolist() == [True, False, False, False]


def a_padded_vocabulary_is_never_sampled():
    assert taken([0.0, 1.0, 9.0, 9.0], greedy(), limit=2) == 1
    assert taken([0.0, 1.0, 50.0], SamplingParams(seed=1), limit=2) < 2


def biases_and_early_ends_count():
    slots = admitted(slots_of(), 0, [3], [], SamplingParams(logit_bias={4: 1.5, 5: -jnp.inf}, min_tokens=2))
    rows = jnp.zeros(1, jnp.int32)
    adjusted = np.asarray(choice._adjust(jnp.zeros((1, VOCAB)), slots.choice, slots.sampling, rows))[0]
    assert adjusted[4] == 1.5 and adjusted[5] == adjusted[END] == -np.inf and not adjusted[6:].any()


def masked_ids_are_not_chosen():
    best = int(TABLE[3].argmax())
    slots = chosen(admitted(slots_of(1), 0, [3], [], greedy(logit_bias={best: -jnp.inf})), np.zeros(1, int), np.ones(1, bool))
    assert slots.history[0, 1] == np.where(np.arange(VOCAB) == best, -np.inf, TABLE[3]).argmax()


def with_grammar(slots: steps.Slots, slot: int, admitted: list[int]) -> steps.Slots:
    """The slots where one has a grammar that admits some ids next."""
    bits = np.array([[sum(1 << id for id in admitted)]], np.int32)
    slots = slots._replace(constrained=slots.constrained.at[slot].set(True))
    return steps.mask(slots, jnp.asarray([slot, 9]), jnp.full((2, 1), -1), jnp.asarray(np.concatenate([bits, bits])))


def what_a_grammar_forces_counts_like_what_is_chosen():
    """A slot with forced tokens is one that was admitted with them; the other slots do not change."""
    slots = slots_of()
    for slot in range(3):
        slots = admitted(slots, slot, [3, 4], [5], greedy())
    forced = jnp.asarray([[6, 6, 0, -1], [-1] * 4, [7, 8, 9, 7]])
    made = steps.mask(slots, jnp.asarray([2, 0, 9]), forced, jnp.ones((3, 1), jnp.int32))
    right = admitted(slots_of(), 2, [3, 4], [5, 6, 6, 0], greedy())
    for slot, text in ((0, slots), (1, slots), (2, right)):
        mask = {"mask": np.asarray([slot != 1]), "masked": np.asarray(slot != 1)}
        same(of_slot(made, slot), of_slot(text, slot) | mask)


def a_grammar_is_stronger_than_bans():
    slots = with_grammar(admitted(slots_of(1), 0, [3], [], greedy(logit_bias={4: -jnp.inf, 5: -1e30}, min_tokens=3)), 0, [4])
    assert chosen(slots, np.zeros(1, int), np.ones(1, bool)).history[0, 1] == 4
    slots = with_grammar(admitted(slots_of(1), 0, [3], [], greedy(logit_bias={4: -jnp.inf})), 0, [4, 5])
    assert chosen(slots, np.zeros(1, int), np.ones(1, bool)).history[0, 1] == 5


def a_mask_serves_for_one_token():
    """In a dispatch of several steps, with and without drafts, and not at all without a mask."""
    prompt = [3, 4, 5, 6, 3, 4, 5, 6, 3, 4, 5]
    for drafts in (0, 2):
        assert decoded(drafts, greedy(max_tokens=MADE), prompt, [7, 8]) == [7 if TABLE[5, 7] > TABLE[5, 8] else 8]
        assert decoded(drafts, greedy(max_tokens=MADE), prompt, []) == []


# ---- decoding, with drafts


def decoded(drafts: int, params: SamplingParams, prompt: list[int], grammar: list[int] | None = None) -> list[int]:
    """Tokens of one row, from `steps.decode` over a model whose logits are a table. grammar: the ids that it admits next; none:
    its mask is not known."""

    def hidden(params, state, slots, rows, table, first, query_starts, live, tokens, config, after=None):
        place = jnp.arange(tokens)
        row = jnp.clip(jnp.searchsorted(query_starts, place, side="right") - 1, 0, rows.shape[0] - 1)
        position = jnp.clip(first[row] + place - query_starts[row], 0, CAPACITY - 1)
        return jnp.asarray(TABLE)[slots.history[rows[row], position]], state

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(steps, "_hidden", hidden)
        patch.setattr(steps.functional, "unembed", lambda params, hidden, config: hidden)
        slots = admitted(slots_of(1), 0, prompt, [], params)
        if grammar is not None:
            slots = with_grammar(slots, 0, grammar)._replace(masked=jnp.asarray([bool(grammar)]))
        rows, table, ends = jnp.zeros(1, jnp.int32), jnp.zeros((1, 1), jnp.int32), jnp.asarray([len(prompt) + MADE], jnp.int32)
        static = {"config": dataclasses.replace(DENSE, vocab_size=VOCAB), "steps": MADE, "speculation": drafts}
        found = np.asarray(steps.decode(None, DecodeState(()), slots, rows, table, ends, MADE, **static)[2].tokens)[0]
    return found[found >= 0].tolist()


def drafts_change_no_token():
    """Neither at a temperature, where even a likely draft may differ from the noise's choice, nor with penalties."""
    prompt = [3, 4, 5, 6, 3, 4, 5, 6, 3, 4, 5]
    for params in (
        SamplingParams(max_tokens=MADE, ignore_eos=True, seed=3, temperature=0.7),
        greedy(max_tokens=MADE, repetition_penalty=1.6, frequency_penalty=0.9),
    ):
        text = list(prompt)
        for _ in range(MADE):
            text.append(chosen_alone(text, params, len(prompt)))
        assert decoded(2, params, prompt) == text[len(prompt) :]


def chosen_alone(text: list[int], params: SamplingParams, prompt_length: int) -> int:
    """The next token of a text from the definition of penalties, by `sample` without any."""
    logits, output = TABLE[text[-1]].copy(), text[prompt_length:]
    for id in set(text):
        logits[id] = logits[id] / params.repetition_penalty if logits[id] > 0 else logits[id] * params.repetition_penalty
        logits[id] -= np.float32(params.frequency_penalty) * output.count(id) + params.presence_penalty * (id in output)
    plain = dataclasses.replace(params, repetition_penalty=1.0, frequency_penalty=0.0, presence_penalty=0.0)
    seen, position = jnp.zeros((1, VOCAB), jnp.int32), jnp.asarray([len(text)], jnp.int32)
    return int(sample(jnp.asarray(logits[None]), parameters([plain]), seen, position, jnp.zeros(2, jnp.uint32))[0])


# ---- the model


def a_window_is_all_that_a_query_sees():
    """One layer with a window of 5 over two pages: the last of 24 tokens does not see the first ones, but does the 20th."""
    config = dataclasses.replace(DENSE, num_layers=1, sliding_window=5, hidden_size=64, intermediate_size=64, num_heads=2)
    config = dataclasses.replace(config, head_dim=32, rope_dim=32, num_kv_heads=1, vocab_size=32)
    params, length = tiny_params(config), 24
    run = jax.jit(lambda *args: functional.forward(*args, config=config)[0])

    def last(tokens: list[int]) -> bytes:
        place = np.arange(length, dtype=np.int32)
        batch = functional.RaggedBatch(
            tokens=np.asarray(tokens, np.int32),
            positions=place,
            slots=place,
            query_starts=np.array([0, length], np.int32),
            kv_lengths=np.array([length], np.int32),
            page_table=np.array([[0, 1]], np.int32),
            logits_rows=np.array([length - 1, 0], np.int32),
        )
        return np.asarray(run(params, functional.new_cache(config, num_pages=2), batch))[0].tobytes()

    tokens = list(range(length))
    plain = last(tokens)
    assert last([31, *tokens[1:]]) == plain == last([*tokens[:18], 30, *tokens[19:]])
    assert last([*tokens[:20], 30, *tokens[21:]]) != plain


def frequencies_are_those_of_the_file():
    plain = Rope(1e6, 8)
    yarn = RopeScaling("yarn", 4.0, original_context=64, beta_fast=32.0, beta_slow=1.0, attention_factor=1.0)
    stretched = rope_frequencies(dataclasses.replace(plain, scaling=yarn)) / rope_frequencies(plain)
    assert stretched[-1] == 0.25 and (np.diff(stretched) <= 0).all() and stretched[0] > 0.25
    position = jnp.asarray([1], jnp.int32)
    with_factors = rope_angles(plain, position, jnp.asarray([1.0, 1.0, 2.0, 8.0]))
    without = rope_angles(plain, position, None)
    ratio = np.arcsin(np.asarray(without[1]))[0, 0, 1:] / np.arcsin(np.asarray(with_factors[1]))[0, 0, 1:]
    assert np.abs(ratio - [1, 2, 8]).max() <= 1e-3


# ---- text


def a_character_of_several_tokens_stays_whole():
    class Bytes:
        adds_space_prefix = False

        def is_control(self, token):
            return False

        def token_bytes(self, token):
            return bytes([token])

    stream = TextStream(Bytes())
    assert [stream.push(byte) for byte in "aé€".encode()] == ["a", "", "é", "", "", "€"] and stream.flush() == ""
