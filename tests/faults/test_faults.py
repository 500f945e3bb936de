"""Known faults of the system that this one reimplements, each put into our own source: its guard must fail.

The numbers are those of that system's list of faults. Left out are 9 (a client that disconnects) and 16 (guided output), which
need a server and grammars, and faults outside of the engine and its numbers: 10, 11, 18, 19 and 20.
"""

from __future__ import annotations

import contextlib

import jax
import pytest

from ferrum_jax import choice, sampling
from ferrum_jax.engine import Engine, ledger, steps
from ferrum_jax.engine.executor import Executor
from ferrum_jax.engine.ledger import Ledger
from ferrum_jax.engine.pages import PagePool
from ferrum_jax.engine.scheduler import Scheduler
from ferrum_jax.models import decoder
from ferrum_jax.models.rope import rope_angles, rope_frequencies
from ferrum_jax.tokenizer import StopMatcher, TextStream
from support import guards
from support.patching import Fault, applied
from unit.engine import test_engine_pages as pages
from unit.engine import test_engine_paging as paging
from unit.engine import test_not_finite as not_finite


def one_page_twice():
    paging.test_a_prompt_around_one_page_is_the_same_the_second_time(4)


def nan_in_a_large_vocabulary():
    not_finite.test_one_bad_number_ends_its_row_alone(5000)


FAULTS = {
    "1": Fault(
        "a continuation chunk is hashed as if it began the prompt",
        Ledger.settle,
        "parent = held.digests[-1] if number else self.root(adapter)",
        "parent = self.root(adapter)",
        paging.test_every_chunk_of_a_prompt_is_known_by_all_that_is_before_it,
    ),
    "2": Fault(
        "a prompt of exactly one page hits fully",
        Ledger.find,
        "if start + self.page_size >= len(tokens):",
        "if start + self.page_size > len(tokens):",
        one_page_twice,
    ),
    "3": Fault(
        "the rest of a hit is computed into the shared page: no copy on write",
        Ledger.admit,
        "held.append([pool.take() for pool in self.pools])",
        "self.share(found._replace(pages=[[page] for page in found.rest])); held.append(found.rest)",
        paging.test_a_branch_writes_into_a_page_of_its_own,
    ),
    "4-idle": Fault(
        "going idle discards the prefix cache",
        Scheduler.finish,
        'sequence.state = "finished"',
        'sequence.state = "finished"\n    if not (self.waiting or self.running): self.ledger.forget()',
        paging.test_texts_are_kept_while_nothing_runs,
    ),
    "4-order": Fault(
        "the page given back last is evicted first",
        PagePool.take,
        "popitem(last=False)",
        "popitem(last=True)",
        pages.test_the_text_unused_for_longest_goes_first_and_its_end_before_its_beginning,
    ),
    "4-match": Fault(
        "a digest is trusted, tokens are not compared",
        PagePool.find,
        "if page is None or self._entries[page] != entry else",
        "if page is None else",
        pages.test_a_digest_that_collides_is_no_hit,
    ),
    "4-salt": Fault(
        "the hash knows no salt",
        ledger.root,
        "salt + ",
        "",
        pages.test_other_models_and_adapters_have_other_texts,
    ),
    "4-adapter": Fault(
        "the hash knows no adapter",
        ledger.root,
        'f" adapter {adapter}".encode()',
        "b''",
        pages.test_other_models_and_adapters_have_other_texts,
    ),
    "4-model": Fault(
        "the engine's hash knows no model",
        Engine.__init__,
        "{self.model.fingerprint()} kv",
        "kv",
        pages.test_engines_of_other_models_have_other_texts,
    ),
    "5-generated": Fault(
        "only pages of the prompt are cached",
        Scheduler._settle,
        "sequence.written",
        "min(sequence.written, sequence.prompt_length)",
        paging.test_generated_pages_are_found_too,
    ),
    "5-mixed": Fault(
        "mixed batches do not look texts up",
        Scheduler._found,
        "if self.config.prefix_cache",
        "if self.config.prefix_cache and not self.running",
        paging.test_requests_beside_others_look_texts_up_and_leave_theirs,
    ),
    "6-up-front": Fault(
        "a sequence takes all the pages that it may ever need at once",
        Scheduler._grow,
        "self.ledger.grow(sequence.held, tokens)",
        "self.ledger.grow(sequence.held, sequence.limit - 1)",
        pages.test_pages_are_taken_as_a_sequence_grows,
    ),
    "6-exhausted": Fault(
        "an exhausted pool is a panic",
        Ledger.grow,
        "if not self.available:",
        "if False:",
        paging.test_a_pool_that_runs_out_lets_requests_wait,
    ),
    "6-overflow": Fault(
        "what can never fit is accepted",
        Engine._check,
        "if needed > pool.num_pages:",
        "if False:",
        paging.test_what_can_never_fit_is_refused_with_the_numbers,
    ),
    "7-leak": Fault(
        "a release forgets a page",
        Ledger.give_back,
        "held.pages",
        "[pages[:-1] for pages in held.pages]",
        paging.test_sixty_forgotten_requests_leave_the_pool_whole,
    ),
    "7-forgotten": Fault(
        "an abort forgets the release",
        Engine._end,
        "self._scheduler.finish(request._sequence)",
        "request._sequence.state = 'finished'",
        paging.test_sixty_forgotten_requests_leave_the_pool_whole,
    ),
    "7-stale": Fault(
        "the length of a released sequence leaks into the next",
        steps.admit,
        '"length": admission.length,',
        '"length": jnp.maximum(admission.length, slots.length[admission.slot]),',
        guards.a_slot_remembers_nothing_of_those_before,
    ),
    "8-offset": Fault(
        "preemption forgets what was streamed",
        Scheduler.preempt,
        "self._give_up(sequence)",
        "self._give_up(sequence); sequence.tokens = sequence.tokens[: sequence.prompt_length]",
        paging.test_preempted_requests_go_on_where_they_were,
    ),
    "8-noise": Fault(
        "preemption begins the noise anew",
        Engine._launch,
        "request._seed",
        "request._seed + sequence.epoch",
        paging.test_preempted_requests_go_on_where_they_were,
    ),
    "8-counts": Fault(
        "preemption forgets the counts of penalties",
        steps.admit,
        '.at[output].add(2, mode="drop")',
        "",
        guards.a_slot_filled_again_is_as_it_was,
    ),
    "8-length": Fault(
        "preemption forgets how many tokens there were",
        steps.admit,
        '"generated": admission.length - admission.prompt_length,',
        '"generated": 0,',
        guards.a_slot_filled_again_is_as_it_was,
    ),
    "12-window": Fault(
        "the sliding window is ignored when paged",
        decoder._composed,
        "mixer.num_heads, mixer.window,",
        "mixer.num_heads, 0,",
        guards.a_window_is_all_that_a_query_sees,
    ),
    "12-pages": Fault(
        "pages behind the window are kept",
        Ledger.settle,
        "for windowed in self.windowed:",
        "for windowed in ():",
        pages.test_pages_behind_the_window_are_given_back,
    ),
    "12-pools": Fault(
        "a text is found where one pool has what another lacks",
        Ledger._sees,
        "all(",
        "any(",
        pages.test_a_text_is_found_where_each_pool_has_what_it_looks_at,
    ),
    "12-state": Fault(
        "pages are enough where layers recur",
        Ledger.find,
        "if state is not None:",
        "if True:",
        paging.test_layers_that_recur_go_on_from_a_checkpoint,
    ),
    "12-yarn": Fault(
        "YaRN is ignored",
        rope_frequencies,
        "if scaling is None:",
        "if scaling is None or scaling.kind == 'yarn':",
        guards.frequencies_are_those_of_the_file,
    ),
    "12-factors": Fault(
        "rope_freqs are ignored",
        rope_angles,
        "if factors is not None and rope.factored:",
        "if False:",
        guards.frequencies_are_those_of_the_file,
    ),
    "13-padding": Fault(
        "rows of padding write into the slot of another",
        choice.choose,
        "target = jnp.where(alive, every, capacity)",
        "target = every",
        guards.rows_of_padding_touch_no_slot,
    ),
    "13-finite": Fault(
        "NaN is looked for in a maximum, which loses it",
        choice.choose,
        "finite = (top < jnp.inf) & (most > -jnp.inf)",
        "finite = ~jnp.isnan(top)",
        nan_in_a_large_vocabulary,
    ),
    "13-stale": Fault(
        "rows of padding name a slot in use",
        Executor._placed,
        "rows = np.full(count, -1, np.int32)",
        "rows = np.zeros(count, np.int32)",
        guards.rows_of_padding_have_no_slot,
    ),
    "13-ties": Fault(
        "greedy takes the last of equals",
        sampling._argmax,
        "return block * _BLOCK + jnp.argmax(inside, axis=1).astype(jnp.int32)",
        "return block * _BLOCK + _BLOCK - 1 - jnp.argmax(inside[:, ::-1], axis=1).astype(jnp.int32)",
        guards.greedy_takes_the_first_of_equals,
    ),
    "14-often": Fault(
        "the repetition penalty falls once an occurrence",
        sampling._penalized,
        "jnp.where(x > 0, x / penalty, x * penalty)",
        "jnp.where(x > 0, x / penalty ** (seen >> 1), x * penalty ** (seen >> 1))",
        guards.a_repetition_is_penalized_once,
    ),
    "14-prompt": Fault(
        "the repetition penalty ignores the prompt",
        sampling._penalized,
        "(seen != 0)",
        "(seen > 1)",
        guards.a_repetition_is_penalized_once,
    ),
    "14-order": Fault(
        "temperature comes after top-p",
        sampling._Rows.of,
        " / temperature.reshape(shape)",
        "",
        guards.filters_come_after_the_temperature,
    ),
    "14-min-p": Fault(
        "min_p is accepted and not applied",
        sampling._Rows.of,
        "jnp.log(sampling.min_p)",
        "-jnp.inf",
        guards.filters_come_after_the_temperature,
    ),
    "14-presence": Fault(
        "presence_penalty is accepted and not applied",
        sampling._penalized,
        "jnp.where(count > 0, sampling.presence_penalty[:, None], 0)",
        "0",
        guards.presence_and_frequency_are_taken_off,
    ),
    "14-frequency": Fault(
        "frequency_penalty is accepted and not applied",
        sampling._penalized,
        "sampling.frequency_penalty[:, None] * count",
        "0",
        guards.presence_and_frequency_are_taken_off,
    ),
    "14-bias": Fault(
        "logit_bias is accepted and not applied",
        choice._adjust,
        "logits + what.bias[rows]",
        "logits",
        guards.biases_and_early_ends_count,
    ),
    "15-ends": Fault(
        "the end token is hard-coded",
        sampling.is_end,
        "[:, None] == eos)",
        "[:, None] == 2)",
        guards.end_tokens_are_those_of_the_model,
    ),
    "15-padding": Fault(
        "ids of a padded vocabulary are sampled",
        sampling._penalized,
        "< sampling.vocab_limit",
        "< x.shape[1]",
        guards.a_padded_vocabulary_is_never_sampled,
    ),
    "15-stop": Fault(
        "the beginning of a stop string leaks",
        StopMatcher.push,
        "keep = self._first_partial()",
        "keep = len(self._held)",
        paging.test_a_stop_string_of_several_tokens_is_never_shown,
    ),
    "15-utf8": Fault(
        "a character of several tokens is decoded token by token",
        TextStream.push,
        "return self._decoder.decode(piece)",
        "return piece.decode('utf-8', 'replace')",
        guards.a_character_of_several_tokens_stays_whole,
    ),
    "17-accepted": Fault(
        "drafts are accepted whatever was chosen",
        steps.decode,
        "(token == text[:, j])",
        "(token >= 0)",
        guards.drafts_change_no_token,
    ),
    "17-penalties": Fault(
        "penalties are bypassed",
        choice.choose,
        "sample(adjusted, own, of(choice.seen),",
        "sample(adjusted, own, jnp.zeros_like(of(choice.seen)),",
        guards.drafts_change_no_token,
    ),
    "17-masks": Fault(
        "masks are bypassed",
        choice.choose,
        "sample(adjusted,",
        "sample(logits,",
        guards.masked_ids_are_not_chosen,
    ),
}
COMPILED = {guards.a_window_is_all_that_a_query_sees}  # the others run step by step, which is faster than compiling them
SOUND = {fault.guard.__name__: fault.guard for fault in FAULTS.values()}


def run(guard) -> None:
    with contextlib.nullcontext() if guard in COMPILED else jax.disable_jit():
        guard()


@pytest.mark.slow
@pytest.mark.parametrize("guard", SOUND)
def test_without_a_fault_the_guards_are_content(guard):
    run(SOUND[guard])


@pytest.mark.slow
@pytest.mark.parametrize("number", FAULTS)
def test_every_fault_is_noticed(number):
    fault = FAULTS[number]
    with applied(fault), pytest.raises((AssertionError, pytest.fail.Exception)):
        run(fault.guard)


def test_a_fault_of_code_that_has_changed_is_an_error():
    for ours in ("no such text", "self"):
        fault = Fault("", Scheduler.preempt, ours, "", one_page_twice)
        with pytest.raises(LookupError, match=r"Scheduler\.preempt: \d times in its source"), applied(fault):
            pass
