"""Faults that users found in texts, templates and vocabularies, each put back into our own source: its guard must fail."""

from __future__ import annotations

from pathlib import Path

import pytest

from ferrum_jax import chat
from ferrum_jax.errors import ChatTemplateError
from ferrum_jax.templates import Budget, Environment, Limits
from ferrum_jax.tokenizer import TextStream, huggingface
from ferrum_jax.tokenizer.huggingface import DirectoryTokenizer
from ferrum_jax.tokenizer.library import LibraryTokenizer
from ferrum_jax.tokenizer.vocabulary import _Keys, read_vocabulary
from support.patching import Fault, applied
from unit.engine import test_continuation_text as continuation
from unit.text import test_templates as templates
from unit.text import test_vocabularies as vocabularies
from unit.text.test_directory_tokenizer import byte_level


def a_loop_has_an_end(path: Path) -> None:
    template = "{% for a in range(90000) %}{% endfor %}"
    with pytest.raises(ChatTemplateError, match="takes longer"):
        chat.render(template, templates.USER, limits=Limits(seconds=0.002))


def a_list_counts_once_for_each_mention(path: Path) -> None:
    template = templates.GROW.replace("START", "(1,)").replace("STEP", "(ns.s, ns.s)").replace("90", "18")
    with pytest.raises(ChatTemplateError, match="more than 1 MiB"):
        chat.render(template.replace("{{ ns.s }}", "{{ ns.s == 1 }}"), templates.USER, limits=Limits(nbytes=1 << 20))


FAULTS = {
    "ids beyond": Fault(
        "an id beyond the vocabulary is taken for one of it",
        _Keys.token,
        "value >= count:",
        "False:",
        lambda path: vocabularies.test_an_id_beyond_the_vocabulary_counts_as_absent("eot", path),
    ),
    "tokens elsewhere": Fault(
        "a token of added_tokens_decoder keeps the number that is said there",
        DirectoryTokenizer._add_elsewhere,
        "ids.get(token, free)",
        "int(_)",
        lambda path: vocabularies.test_tokens_that_stand_elsewhere(byte_level, vocabularies.ELSEWHERE["with gaps"], path),
    ),
    "lower case": Fault(
        "do_lower_case is not looked at",
        LibraryTokenizer.encode_batch,
        "if self.lowercase:",
        "if False:",
        lambda path: vocabularies.test_do_lower_case("vocab.txt", path),
    ),
    "flags of bert": Fault(
        "the normalizer of tokenizer.json counts more than tokenizer_config.json",
        huggingface._follow_flags,
        "normalizer.update(flags)",
        "pass",
        lambda path: vocabularies.test_the_flags_of_a_bert_vocabulary_are_those_of_tokenizer_config(True, path),
    ),
    "content": Fault(
        "content of any kind goes to the template",
        chat.render,
        "and not _is_data(message)",
        "and False",
        lambda path: templates.test_content_of_other_kinds_is_refused_by_number(5),
    ),
    "byte tokens": Fault(
        "a byte token may be spelled anyhow",
        read_vocabulary,
        "and not byte_level and not BYTE.fullmatch(tokens[i])",
        "and False",
        lambda path: vocabularies.test_a_byte_that_is_none_is_an_error("byte"),
    ),
    "endless loop": Fault(
        "a loop in a template is not counted",
        Environment.tick.fget,
        "return _BUDGET.get().tick()",
        "return True",
        a_loop_has_an_end,
    ),
    "shared list": Fault(
        "a container that holds one list twice counts as if it held it once",
        Budget.check,
        "if self.size(value) > self.limits.nbytes:",
        "if False:",
        a_list_counts_once_for_each_mention,
    ),
    "tools": Fault(
        "with tools the default template is taken",
        chat.choose,
        'tools and "tool_use" in templates',
        "False",
        templates.test_which_template_is_meant,
    ),
    "null": Fault(
        "what a template has made of null is taken, though it is the word None",
        chat.render,
        "mistaken = [mark.lower() for mark in (*_MISTAKEN, *map(str, parts))]",
        "mistaken = []",
        lambda path: templates.test_content_that_a_template_cannot_take("trims"),
    ),
    "first space": Fault(
        "what goes on from a prompt loses its first space",
        TextStream.__init__,
        "if not silent:",
        "if False:",
        lambda path: continuation.test_of_a_directory("spm", path),
    ),
    "cut character": Fault(
        "the bytes of a character that the prompt began are forgotten",
        TextStream.__init__,
        "self._decoder.decode(tail[-3:])",
        "self._decoder.decode(b'')",
        lambda path: continuation.test_of_a_directory("bytes", path),
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_the_guard_holds_and_notices(name: str, tmp_path: Path) -> None:
    fault = FAULTS[name]
    for part in ("sound", "faulty"):
        (tmp_path / part).mkdir()
    fault.guard(tmp_path / "sound")
    with applied(fault), pytest.raises((Exception, pytest.fail.Exception)):
        fault.guard(tmp_path / "faulty")
