"""For each format: how its models write, as a template in their style, and the texts that are part of it."""

from __future__ import annotations

import gzip
import json
from typing import NamedTuple

from support import GOLDENS

_STORED = json.loads(gzip.decompress((GOLDENS / "chat" / "goldens.json.gz").read_bytes()))["templates"]
_TURNS = "{% for m in messages %}{% if m.role == 'user' %}U:{{ m.content }}\n{% else %}A:"
_END = "<eos>{% endif %}{% endfor %}{% if add_generation_prompt %}A:{% endif %}"
_THOUGHT = "{% if m.reasoning_content %}<think>\n{{ m.reasoning_content }}\n</think>\n\n{% endif %}{{ m.content }}"
_CALLS = "{% for c in m.tool_calls %}{% set f = c.function %}"


def _written(before: str, call: str, after: str = "{% endfor %}", thought: str = _THOUGHT) -> str:
    return f"{_TURNS}{thought}{{% if m.tool_calls %}}{before}{_CALLS}{call}{after}{{% endif %}}{_END}"


QWEN_XML = _written(
    "",
    "\n<tool_call>\n<function={{ f.name }}>\n{% for k, v in f.arguments | items %}<parameter={{ k }}>\n"
    "{{ v | tojson if v is mapping or (v is sequence and v is not string) else v | string }}\n</parameter>\n{% endfor %}"
    "</function>\n</tool_call>",
)
GLM = _written(
    "",
    "\n<tool_call>{{ f.name }}\n{% for k, v in f.arguments | items %}<arg_key>{{ k }}</arg_key>\n"
    "<arg_value>{{ v if v is string else v | tojson }}</arg_value>\n{% endfor %}</tool_call>",
)
DEEPSEEK = _written(
    "<｜tool▁calls▁begin｜>",
    "<｜tool▁call▁begin｜>{{ f.name }}<｜tool▁sep｜>{{ f.arguments | tojson }}<｜tool▁call▁end｜>",
    "{% endfor %}<｜tool▁calls▁end｜>",
)
DEEPSEEK_OLD = _written(
    "<｜tool▁calls▁begin｜>",
    "{{ '' if loop.first else '\\n' }}<｜tool▁call▁begin｜>function<｜tool▁sep｜>{{ f.name }}\n"
    "```json\n{{ f.arguments | tojson }}\n```<｜tool▁call▁end｜>",
    "{% endfor %}<｜tool▁calls▁end｜>",
)
KIMI = _written(
    "<|tool_calls_section_begin|>",
    "<|tool_call_begin|>functions.{{ f.name }}:{{ loop.index0 }}<|tool_call_argument_begin|>{{ f.arguments | tojson }}"
    "<|tool_call_end|>",
    "{% endfor %}<|tool_calls_section_end|>",
)
MISTRAL_NAMED = _written(
    "",
    "[TOOL_CALLS]{{ f.name }}[ARGS]{{ f.arguments | tojson }}",
    thought="{% if m.reasoning_content %}[THINK]{{ m.reasoning_content }}[/THINK]{% endif %}{{ m.content }}",
)
LFM = _written(
    "{# <|tool_list_start|> #}<|tool_call_start|>[",
    "{{ f.name }}({% for k, v in f.arguments | items %}{{ k }}={{ v | pprint }}{{ ', ' if not loop.last }}{% endfor %})"
    "{{ ', ' if not loop.last }}",
    "{% endfor %}]<|tool_call_end|>",
)
_GEMMA_VALUE = (
    "{% macro value(v) %}{% if v is string %}<|\"|>{{ v }}<|\"|>{% elif v is mapping %}{{ '{' }}{% for k, w in v | items %}"
    "{{ k }}:{{ value(w) }}{{ ',' if not loop.last }}{% endfor %}{{ '}' }}{% elif v is sequence %}[{% for w in v %}"
    "{{ value(w) }}{{ ',' if not loop.last }}{% endfor %}]{% else %}{{ v | tojson }}{% endif %}{% endmacro %}"
)
GEMMA = _GEMMA_VALUE + _written(
    "",
    "<|tool_call>call:{{ f.name }}{{ value(f.arguments) }}<tool_call|>",
    thought="{% if m.reasoning_content %}<|channel>thought\n{{ m.reasoning_content }}\n<channel|>{% endif %}{{ m.content }}",
)
HARMONY = (
    "{% for m in messages %}<|start|>{{ m.role }}{% if m.role == 'user' %}<|message|>{{ m.content }}<|end|>{% else %}"
    "{% if m.reasoning_content %}<|channel|>analysis<|message|>{{ m.reasoning_content }}<|end|><|start|>assistant{% endif %}"
    "{% for c in m.tool_calls %}<|channel|>commentary to=functions.{{ c.function.name }} <|constrain|>json<|message|>"
    "{{ c.function.arguments | tojson }}<|call|>{{ '<|start|>assistant' if m.content or not loop.last }}{% endfor %}"
    "{% if m.content %}<|channel|>final<|message|>{{ m.content }}<|return|>{% endif %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)


class Case(NamedTuple):
    """`calls`, `reasoning`: the names that the template leads to. `parts`: what its models write, also in the wrong places."""

    template: str
    calls: str
    reasoning: str
    parts: tuple[str, ...]


_JSON = (
    '{"name": "f", "arguments": {"a": "x"}}',
    '{"name": "f", "arguments": ',
    '"parameters": {}}',
    '{"name": 1}',
    "[",
    "]",
    ", ",
)
CASES = {
    "qwen3": Case(_STORED["qwen3"], "hermes", "think", ("<tool_call>", "</tool_call>", *_JSON)),
    "qwen_xml": Case(
        QWEN_XML,
        "qwen_xml",
        "think",
        (
            "<tool_call>",
            "</tool_call>",
            "<function=f>",
            "</function>",
            "<parameter=a>",
            "</parameter>",
            "<parameter=n>",
            "<function=",
        ),
    ),
    "glm": Case(
        GLM,
        "glm",
        "think",
        ("<tool_call>f", "</tool_call>", "<arg_key>a</arg_key>", "<arg_key>", "<arg_value>", "</arg_value>", "</arg_key>"),
    ),
    "llama": Case(_STORED["llama3"], "llama", "none", ("<|python_tag|>", ";", *_JSON)),
    "mistral": Case(_STORED["mistral"], "mistral", "none", ("[TOOL_CALLS]", "f[ARGS]", "[CALL_ID]", *_JSON)),
    "mistral_named": Case(
        MISTRAL_NAMED, "mistral_named", "mistral", ("[TOOL_CALLS]", "f[ARGS]", "f{", "[THINK]", "[/THINK]", *_JSON)
    ),
    "deepseek": Case(
        DEEPSEEK,
        "deepseek",
        "think",
        (
            "<｜tool▁calls▁begin｜>",
            "<｜tool▁call▁begin｜>",
            "f<｜tool▁sep｜>",
            "<｜tool▁call▁end｜>",
            "<｜tool▁calls▁end｜>",
            *_JSON,
        ),
    ),
    "deepseek_old": Case(
        DEEPSEEK_OLD,
        "deepseek_old",
        "think",
        (
            "<｜tool▁call▁begin｜>function",
            "<｜tool▁sep｜>f",
            "```json",
            "```",
            "<｜tool▁call▁end｜>",
            "<｜tool▁calls▁end｜>",
            *_JSON,
        ),
    ),
    "kimi": Case(
        KIMI,
        "kimi",
        "think",
        (
            "<|tool_calls_section_begin|>",
            "<|tool_call_begin|>functions.f:0",
            "<|tool_call_argument_begin|>",
            "<|tool_call_end|>",
            *_JSON,
        ),
    ),
    "lfm": Case(LFM, "lfm", "think", ("<|tool_call_start|>", "<|tool_call_end|>", "[f(a='x')]", "f(", "'", ")", *_JSON)),
    "gemma": Case(
        GEMMA,
        "gemma",
        "gemma",
        ("<|tool_call>", "call:f{", '<|"|>', "a:", "}", "<tool_call|>", "<|channel>thought\n", "<channel|>"),
    ),
    "harmony": Case(
        HARMONY,
        "harmony",
        "harmony",
        (
            "<|start|>",
            "assistant",
            "<|channel|>",
            "analysis",
            "commentary",
            "final",
            " to=functions.f",
            "<|constrain|>json",
            "<|message|>",
            "<|end|>",
            "<|call|>",
            "<|return|>",
            '{"a": 1}',
        ),
    ),
}
