"""Chat templates with names, content that is not a text, and templates that would take all time and memory."""

from __future__ import annotations

import json
import time
import tracemalloc
from pathlib import Path
from typing import Any

import gguf
import pytest
from gguf import GGUFValueType as T
from jinja2.sandbox import ImmutableSandboxedEnvironment
from transformers import AutoTokenizer

import ferrum_jax as fj
from ferrum_jax import chat
from ferrum_jax.convert import convert
from ferrum_jax.templates import Limits
from ferrum_jax.tokenizer.opening import tokenizer_of_directory
from support.directories import LLAMA, write
from support.tiny_gguf import TEMPLATE, write_tiny_llama
from unit.text.test_directory_tokenizer import byte_level, directory

USER = [{"role": "user", "content": "Hi"}]
TOOLS = [{"type": "function", "function": {"name": "w", "description": "", "parameters": {}}}]
PLAIN = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
USE = "TOOLS {{ tools | tojson }} " + PLAIN
NAMED = [
    {"name": "default", "template": PLAIN},
    {"name": "tool_use", "template": USE},
    {"name": "rag", "template": "RAG {{ documents }}"},
]

# ---- names


def places(path: Path) -> dict[str, Path]:
    """The same three templates in a list, in files, and in both."""
    made = {name: path / name for name in ("list", "files", "mixed", "only tool_use")}
    for place in made.values():
        place.mkdir()
    for name in ("files", "mixed"):
        (made[name] / "additional_chat_templates").mkdir()
        for entry in NAMED[1:]:
            (made[name] / "additional_chat_templates" / f"{entry['name']}.jinja").write_text(entry["template"])
    (made["files"] / "chat_template.jinja").write_text(PLAIN)
    configs: dict[str, Any] = {"list": NAMED, "files": None, "mixed": NAMED[:1], "only tool_use": NAMED[1:2]}
    for name, value in configs.items():
        config = {"tokenizer_class": "PreTrainedTokenizerFast"} | ({"chat_template": value} if value else {})
        directory(made[name], byte_level(), tokenizer_config=config)
    return made


def test_which_template_is_meant(tmp_path: Path) -> None:
    """As transformers chooses."""
    for name, place in places(tmp_path).items():
        ours, theirs = tokenizer_of_directory(place), AutoTokenizer.from_pretrained(place)
        for asked in (None, "default", "tool_use", "rag"):
            for tools in (None, TOOLS):
                arguments = {"chat_template": asked, "tools": tools}
                if asked in ours.chat_templates or (asked is None and (tools or ours.chat_template)):
                    if name == "mixed" and (asked == "default" or (asked or tools) is None):
                        continue  # transformers ignores tokenizer_config.json's if there are files
                    expected = theirs.apply_chat_template(USER, tokenize=False, **arguments)
                    template = chat.choose(ours.chat_templates, asked, tools=tools is not None)
                    assert chat.render(template, USER, tools=tools) == expected, (name, arguments)
                else:
                    with pytest.raises(ValueError, match=r"not have a chat template .*; it has .*tool_use"):
                        chat.choose(ours.chat_templates, asked, tools=tools is not None)
    assert chat.choose({}) is None and chat.choose({"tool_use": USE}, tools=True) == USE


def named_gguf(path: Path) -> Path:
    keys = {f"tokenizer.chat_template.{entry['name']}": (entry["template"], T.STRING) for entry in NAMED[1:]}
    keys["tokenizer.chat_templates"] = (["rag", "tool_use"], T.ARRAY)
    return write_tiny_llama(path, metadata=keys)


def test_templates_of_a_gguf_file_and_of_what_it_is_converted_to(tmp_path: Path) -> None:
    source = named_gguf(tmp_path / "m.gguf")
    orbax = convert(source, tmp_path / "orbax", to="orbax")
    again = convert(orbax, tmp_path / "again.gguf", to="gguf")
    for place in (source, orbax, again):
        model = fj.load(place, dtype="float32")
        assert model.tokenizer.chat_templates == {"default": TEMPLATE, "tool_use": USE, "rag": "RAG {{ documents }}"}
        assert model.render_chat(USER).startswith("<|im_start|>user")
        assert model.render_chat(USER, TOOLS).startswith("TOOLS [")
        assert model.render_chat(USER, TOOLS, chat_template="rag", documents=["d"]) == "RAG ['d']"
        assert model.encode_chat(USER, chat_template="rag") == model._runtime.encode("RAG None")
        with pytest.raises(ValueError, match="not have a chat template 'default2'; it has default, rag, tool_use"):
            model.render_chat(USER, chat_template="default2")
        with pytest.raises(ValueError, match="enable_thinkin: no chat template of this model reads"):
            model.render_chat(USER, enable_thinkin=False)


def test_templates_of_a_directory_and_of_what_it_is_converted_to(tmp_path: Path) -> None:
    source = write(LLAMA, tmp_path / "source")
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tool-use.jinja").write_text(USE)
    (source / "chat_template.jinja").write_text(PLAIN)
    orbax = convert(source, tmp_path / "orbax", to="orbax")
    expected = {"default": PLAIN, "tool-use": USE}
    assert fj.load(orbax, dtype="float32").tokenizer.chat_templates == expected
    written = convert(orbax, tmp_path / "m.gguf", to="gguf")
    fields = gguf.GGUFReader(written).fields
    assert fields["tokenizer.chat_template.tool_use"].contents() == USE
    assert fields["tokenizer.chat_templates"].contents() == ["tool_use"]


@pytest.mark.parametrize("value", [3, [3], [{"name": "x"}], [{"name": 3, "template": "x"}], {"default": 3}, [[]]])
def test_templates_of_a_wrong_kind(value: object, tmp_path: Path) -> None:
    path = directory(tmp_path, byte_level(), tokenizer_config={"chat_template": value})
    with pytest.raises(fj.ModelFileError, match=r"tokenizer_config\.json: key chat_template: must be"):
        tokenizer_of_directory(path)
    bad = {"chat_template.rag": (7, T.UINT32), "chat_templates": ("rag", T.STRING)}
    for key, content in bad.items():
        with pytest.raises(fj.ModelFileError, match=rf"tokenizer\.{key}: must be a"):
            fj.load(write_tiny_llama(tmp_path / "m.gguf", metadata={f"tokenizer.{key}": content}))


def test_variables() -> None:
    template = "{% set a = 1 %}{{ a }}{% if b is defined %}{% set b = 2 %}{% endif %}{% for c in d %}{{ c }}{{ e }}{% endfor %}"
    template += "{% macro f(g, h=i) %}{{ g }}{{ j }}{{ range(3) }}{% endmacro %}{{ f(1) }}"
    assert chat.variables(template) - {"range", "f"} == {"b", "d", "e", "i", "j"}


# ---- content that is not a text

PARTS = [{"type": "text", "text": "Hello "}, {"type": "text", "text": "you"}]
CALL = [{"type": "function", "function": {"name": "w", "arguments": {}}}]
READS = {
    "joins texts": "{% for m in messages %}[{{ m.role }}:{{ m['content'] }}]{% endfor %}",
    "adds texts": "{% for m in messages %}{{ '[' + m.role + ':' + m['content'] + ']' }}{% endfor %}",
    "trims": "{% for m in messages %}[{{ m.role }}:{{ m['content'] | trim }}]{% endfor %}",
    "asks": "{% for m in messages %}[{{ m.role }}:{{ m.content if m.content is string else '' }}]{% endfor %}",
    "refuses": "{% for m in messages %}{% if m.content is not string %}{{ raise_exception('texts only') }}{% endif %}"
    "[{{ m.role }}:{{ m.content }}]{% endfor %}",
}
TAKES = (
    "{% for m in messages %}[{{ m.role }}:{% if m.content is string %}{{ m.content }}{% elif m.content is none %}nothing"
    "{% else %}{% for part in m.content %}<{{ part.text }}>{% endfor %}{% endif %}]{% endfor %}"
)


@pytest.mark.parametrize("reads", READS)
def test_content_that_a_template_cannot_take(reads: str) -> None:
    messages = [{"role": "user", "content": PARTS}, {"role": "assistant", "content": None, "tool_calls": CALL}]
    texts = [{"role": "user", "content": "Hello you"}, {"role": "assistant", "content": "", "tool_calls": CALL}]
    expected = chat.render(READS[reads], texts)
    assert "Hello you" in expected and chat.render(READS[reads], messages) == expected
    for content in (["Hello ", "you"], [{"type": "input_text", "text": "Hello you"}], [{"text": "Hello you"}]):
        assert chat.render(READS[reads], [{"role": "user", "content": content}, texts[1]]) == expected
    assert chat.render(READS[reads], [texts[0], {"role": "assistant", "tool_calls": CALL}]) == expected


def test_content_that_a_template_takes() -> None:
    messages = [{"role": "user", "content": PARTS}, {"role": "assistant", "content": None, "tool_calls": CALL}]
    assert chat.render(TAKES, messages) == "[user:<Hello ><you>][assistant:nothing]"
    assert chat.render("{{ messages[0].tool_calls is none }}", [{"role": "user", "content": "", "tool_calls": None}]) == "True"


@pytest.mark.parametrize("part", [{"type": "image_url", "image_url": {}}, {"type": "text"}, {"type": "text", "text": 3}, 7])
def test_other_parts_are_refused_by_number(part: object) -> None:
    messages = [*USER, {"role": "user", "content": [PARTS[0], part]}]
    with pytest.raises(ValueError, match=r"messages: entry 1: part 1 of its content has the type .*text"):
        chat.render(TAKES, messages)


# ---- hostile templates

GROW = "{% set ns = namespace(s=START, t=START) %}{% for i in range(90) %}{% set ns.s = STEP %}{% endfor %}{{ ns.s }}"
COSTLY = [
    *("{{ 'a' * 10**9 }}", "{{ 10**9 * [1] }}", "{{ 2**(10**8) }}", "{{ 1.5 | round(10**9, 'ceil') }}", "{{ range(10**9) }}"),
    *("{{ 'a' | center(10**9) }}", "{{ 'a'.ljust(10**9) }}", "{{ 'a'.zfill(10**9) }}", "{{ '\t'.expandtabs(10**9) }}"),
    *("{{ 'a' | indent(10**9, true) }}", "{{ ('a\n' * 10**6) | indent(1000) }}", "{{ messages | tojson(indent=10**9) }}"),
    *("{{ '%1000000000d' % 1 }}", "{{ '%*d' % (10**9, 1) }}", "{{ '%.1000000000f' | format(1) }}"),
    *("{{ '{:1000000000}'.format(1) }}", "{{ '{:{}}'.format('x', '1000000000') }}"),
    *("{{ ('{0}' * 10000).format('x' * 100000) }}", "{{ (5).to_bytes(10**9, 'big') }}", "{{ [] | slice(10**9) | list }}"),
    *("{{ ('x' * 10**6).replace('', 'y' * 10**6) }}", "{{ ('x' * 10**6) | replace(new='y' * 10**6, old='') }}"),
    *("{{ ('x' * 10**6) | join('y' * 10**6) }}", "{{ range(99999) | map('string') | join('y' * 10**6) }}"),
    *("{{ ('a' * 10**6).translate({97: 'x' * 10**6}) }}", "{{ ('a' * 3 * 10**7) | list }}", "{{ ('a ' * 10**7).split() }}"),
    *("{{ ('<!--' * 10**6) | striptags }}", "{{ ('a' * 2 * 10**7).rfind('b' + 'a' * 10**7) }}"),
    *("{{ '%(' * 10**7 % {} }}", "{{ ('é' * 10**6).encode('punycode') }}", "{{ ('a' * 3 * 10**7).strip('b' * 10**7 + 'a') }}"),
    *("{% filter center(10**9) %}x{% endfilter %}", "{% autoescape 'a' | center(10**9) %}{% endautoescape %}"),
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "{% for a in range(99999) %}{% for b in range(99999) if false %}{% endfor %}{% endfor %}",
    "{% set x %}{% for a in range(99999) %}{% for b in range(99999) %}" + "x" * 999 + "{% endfor %}{% endfor %}{% endset %}",
    "{% for a in range(99999) %}{% for b in range(99999) %}{% set x = [] %}{% endfor %}{% endfor %}",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "{% macro f(n) %}{% if n %}{{ f(n - 1, varargs, varargs) }}{% else %}{{ varargs }}{% endif %}{% endmacro %}{{ f(60) }}",
    "{% for x in 'ab' recursive %}{% if loop.depth < 60 %}{{ loop('ab') }}{% endif %}{% endfor %}",
    *(GROW.replace("START", "'ab'").replace("STEP", step) for step in ("ns.s + ns.s", "ns.s ~ ns.s", "ns.s * 2", "[ns.s] * 2")),
    *(GROW.replace("START", "(1,)").replace("STEP", step) for step in ("ns.s + ns.s", "(ns.s, ns.s)", "dict(a=ns.s, b=ns.s)")),
    GROW.replace("START", "(1,)")
    .replace("STEP", "(ns.s, ns.s)")
    .replace("%}{% endfor", "%}{% set ns.t = (ns.t, ns.t) %}{% endfor")
    + "{{ ns.s == ns.t }}",
]


@pytest.mark.parametrize("template", COSTLY)
def test_a_template_has_a_budget(template: str) -> None:
    chat.check_template(template, "m.gguf")  # nothing is computed there
    tracemalloc.start()
    before = time.thread_time()
    with pytest.raises(
        fj.ChatTemplateError, match=r"longer than 0\.1 s|more than 64 MiB|at most|more than 1000 digits|too big"
    ):
        chat.render(template, USER, limits=Limits(seconds=0.1))
    assert time.thread_time() - before <= 2
    assert tracemalloc.get_traced_memory()[1] <= 160 << 20
    tracemalloc.stop()


def test_limits_are_those_asked_for() -> None:
    template = "{% for i in range(20000) %}{{ 'x' * 100 }}{% endfor %}"
    assert len(chat.render(template, USER)) == 2_000_000
    with pytest.raises(fj.ChatTemplateError, match="more than 1 MiB"):
        chat.render(template, USER, limits=Limits(nbytes=1 << 20))
    long = [{"role": "user", "content": "e" * 10**6}] * 4
    assert len(chat.render("{% for m in messages %}{{ '<' + m.role + '>' + m.content | trim }}{% endfor %}", long)) == 4 * (
        10**6 + 6
    )


FEATURES = [
    "{{ 7 // 2 }} {{ 7 % 4 }} {{ 2 ** 3 }} {{ -1.5 + 1 }} {{ 'a' ~ 1 ~ none }} {{ [1] + [2] }} {{ (1, 2) * 2 }}",
    "{{ '%s-%04d' % ('a', 3) }} {{ '%(a)s' % {'a': 1} }} {{ '{0}{1:>4}{x!r}'.format(1, 2, x='y') }} {{ '%5.1f' | format(2) }}",
    "{{ [3, 1, 2] | sort | join('-') }} {{ 'abc' | center(9) }}| {{ 'a\nb' | indent(2) }} {{ [1, 2, 3] | sum }}",
    "{{ [{'a': [1]}, {'a': [2]}] | sum('a.0') }} {{ [[1], [2]] | sum(start=[]) }}{{ 'abcd'[1:3] }}{{ messages[::-1]|length }}",
    "{{ range(5) | batch(2) | list }} {{ range(5) | slice(2) | list }} {{ ['a', 'b'] | map('upper') | list }}",
    "{{ 'a-b'.split('-') }} {{ 'ab'.replace('a', 'c') }} {{ ','.join(['x', 'y']) }} {{ 'x'.ljust(3) }}| {{ 'a b' | title }}",
    "{% for a, b in {'x': 1}.items() %}{{ loop.index }}{{ a }}{{ b }}{{ loop.last }}{% else %}none{% endfor %}",
    "{% for i in range(9) if i is odd %}{{ loop.length }}{{ i }}{{ loop.cycle('a', 'b') }}{% endfor %}",
    "{% macro f(a, b=2) %}{{ a }}{{ b }}{{ varargs }}{{ kwargs }}{% endmacro %}{{ f(1) }}{{ f(1, 2, 3, c=4) }}",
    "{% for x in [1, [2]] recursive %}{{ loop(x) if x is iterable else x }}{% endfor %}{% set x %}a{% endset %}{{ x }}",
    "{% autoescape true %}{{ '<' }}{{ '<' ~ 'a' }}{{ '<' | safe }}{% endautoescape %}{{ '<' | e }}{{ 'b' in 'abc' }}",
    "{% set ns = namespace(a=1) %}{% for i in range(3) %}{% set ns.a = ns.a + i %}{% endfor %}{{ ns.a }}{{ 3 | round(1) }}",
    "{{ 'x' if none else 'y' }}{{ 1 < 2 <= 2 }}{{ [1, 2] == [1, 2] }}{{ {'a': [1]} }}{{ () }}{{ (1,) }}{{ missing }}",
    "{{ [2, 1, 2] | unique | list }}{{ {'b': 1, 'a': 2} | dictsort }}{{ [1, 2] | reverse | list }}{{ 'ab' | reverse }}",
    *(
        "{% call(x) m() %}{{ x }}{% endcall %}{% macro m() %}<{{ caller(1) }}>{% endmacro %}"
        and "{% filter upper %}ab{% endfilter %}",
    ),
]


@pytest.mark.parametrize("template", FEATURES)
def test_what_is_counted_is_what_jinja_makes(template: str) -> None:
    plain = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    expected = plain.from_string(template).render(messages=USER)
    assert chat.render(template, USER) == expected


def test_namespaces_show_nothing() -> None:
    assert chat.render("{{ namespace(a=1) }}", USER) == "<Namespace>"


def test_json_is_pythons() -> None:
    value = [{"role": "user", "content": "", "data": ["é", 1.5, None, {"b": [], "a": True}]}]
    for options in ("", "indent=2", "indent='\t', sort_keys=true", "separators=(',', ':')", "ensure_ascii=true"):
        arguments = eval(f"dict({options})", {"true": True})
        expected = json.dumps(value, **({"ensure_ascii": False} | arguments))
        assert chat.render("{{ messages | tojson(" + options + ") }}", value) == expected


CONTENT = "{% for m in messages %}{{ m.role }}: {{ m.content }};{% endfor %}"


@pytest.mark.parametrize("content", [5, True, 1.5, b"a", object(), {"type": "text", "text": "a"}, [1, 2], [None], [PARTS]])
def test_content_of_other_kinds_is_refused_by_number(content: object) -> None:
    with pytest.raises(ValueError, match=r"messages: entry 1: (its content must be a text|part 0 of its content has)"):
        chat.render(CONTENT, [*USER, {"role": "user", "content": content}])


def test_content_without_parts_and_in_tuples() -> None:
    assert chat.render(CONTENT, [{"role": "user", "content": []}]) == "user: ;"
    assert chat.render(CONTENT, [{"role": "user", "content": tuple(PARTS)}]) == "user: Hello you;"
    assert chat.render("{{ messages[0].content | upper }}", [{"role": "user", "content": PARTS}]) == "HELLO YOU"
    assert chat.render(CONTENT, [{"role": "tool", "content": {"a": 1}}]) == "tool: {'a': 1};"
