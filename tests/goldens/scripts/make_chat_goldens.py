"""Writes tests/goldens/chat/goldens.json.gz: templates and their renderings by transformers' `apply_chat_template`.

    python tests/goldens/scripts/make_chat_goldens.py [MODEL.gguf ...]

The templates in the style of Llama 3, Mistral and Qwen 3 are written here; those of the given GGUF files are added to
them. Needs transformers and gguf.
"""

import gzip
import json
import sys
from pathlib import Path

import gguf
from transformers.utils.chat_template_utils import render_jinja_template

LLAMA3 = """{{- bos_token }}
{%- if custom_tools is defined %}{%- set tools = custom_tools %}{%- endif %}
{%- if not date_string is defined %}{%- set date_string = "26 Jul 2024" %}{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\nToday: " + date_string + "\\n" }}
{%- if tools is not none %}
    {{- "Functions:\\n" }}
    {%- for t in tools %}
        {{- t | tojson(indent=4) }}
        {{- "\\n" }}
    {%- endfor %}
{%- endif %}
{{- system_message + "<|eot_id|>" }}
{%- for message in messages %}
    {%- if message.role in ['ipython', 'tool'] %}
        {{- "<|start_header_id|>ipython<|end_header_id|>\\n\\n" }}
        {%- if message.content is mapping or message.content is iterable and message.content is not string %}
            {{- message.content | tojson }}
        {%- else %}
            {{- message.content }}
        {%- endif %}
        {{- "<|eot_id|>" }}
    {%- elif 'tool_calls' in message %}
        {%- if not message.tool_calls|length == 1 %}
            {{- raise_exception("one tool call at a time") }}
        {%- endif %}
        {%- set tool_call = message.tool_calls[0].function %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n{"name": "' + tool_call.name + '", "parameters": ' }}
        {{- tool_call.arguments | tojson }}
        {{- "}<|eot_id|>" }}
    {%- else %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'
            + message['content'] | trim + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
MISTRAL = """{%- if messages[0]["role"] == "system" %}
    {%- set system = messages[0]["content"] %}
    {%- set rest = messages[1:] %}
{%- else %}
    {%- set rest = messages %}
{%- endif %}
{%- set ns = namespace(index=0) %}
{%- for message in rest %}
    {%- if message.role in ("user", "assistant") and message.tool_calls is not defined %}
        {%- if (message["role"] == "user") != (ns.index % 2 == 0) %}
            {{- raise_exception("user and assistant must alternate") }}
        {%- endif %}
        {%- set ns.index = ns.index + 1 %}
    {%- endif %}
{%- endfor %}
{{- bos_token }}
{%- for message in rest %}
    {%- if message["role"] == "user" %}
        {%- if tools is not none and loop.last %}
            {{- "[AVAILABLE_TOOLS] [" }}
            {%- for tool in tools %}
                {%- set tool = tool.function %}
                {{- '{"type": "function", "function": {' }}
                {%- for key, val in tool.items() if key != "return" %}
                    {%- if val is string %}{{- '"' + key + '": "' + val + '"' }}
                    {%- else %}{{- '"' + key + '": ' + val|tojson }}{%- endif %}
                    {%- if not loop.last %}{{- ", " }}{%- endif %}
                {%- endfor %}
                {{- "}}" }}
                {%- if not loop.last %}{{- ", " }}{%- else %}{{- "]" }}{%- endif %}
            {%- endfor %}
            {{- "[/AVAILABLE_TOOLS]" }}
        {%- endif %}
        {%- if loop.last and system is defined %}
            {{- "[INST] " + system + "\\n\\n" + message["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST] " + message["content"] + "[/INST]" }}
        {%- endif %}
    {%- elif message.tool_calls is defined and message.tool_calls is not none %}
        {{- "[TOOL_CALLS] [" }}
        {%- for call in message.tool_calls %}
            {{- call.function|tojson }}
            {%- if not loop.last %}{{- ", " }}{%- endif %}
        {%- endfor %}
        {{- "]" + eos_token }}
    {%- elif message["role"] == "assistant" %}
        {{- " " + message["content"]|trim + eos_token }}
    {%- elif message["role"] == "tool" %}
        {{- '[TOOL_RESULTS] {"content": ' + message.content|string + "}[/TOOL_RESULTS]" }}
    {%- else %}
        {{- raise_exception("Only user, assistant and tool roles: " + message.role) }}
    {%- endif %}
{%- endfor %}
"""
QWEN3 = """{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}{{- messages[0].content + '\\n\\n' }}{%- endif %}
    {{- "# Tools\\n<tools>" }}
    {%- for tool in tools %}
        {{- "\\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- "\\n</tools><|im_end|>\\n" }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and message.content is string
           and not(message.content.startswith('<tool_response>') and message.content.endswith('</tool_response>')) %}
        {%- set ns.multi_step_tool = false %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content if message.content is string else '' %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {%- set reasoning_content = '' %}
        {%- if message.reasoning_content is string %}
            {%- set reasoning_content = message.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set reasoning_content = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last_query_index and (loop.last or reasoning_content) %}
            {{- '<|im_start|>assistant\\n<think>\\n' + reasoning_content.strip('\\n') + '\\n</think>\\n\\n' }}
            {{- content.lstrip('\\n') }}
        {%- else %}
            {{- '<|im_start|>assistant\\n' + content }}
        {%- endif %}
        {%- if message.tool_calls %}
            {%- for tool_call in message.tool_calls %}
                {%- if (loop.first and content) or (not loop.first) %}{{- '\\n' }}{%- endif %}
                {%- if tool_call.function %}{%- set tool_call = tool_call.function %}{%- endif %}
                {{- '<tool_call>\\n{"name": "' + tool_call.name + '", "arguments": ' }}
                {%- if tool_call.arguments is string %}{{- tool_call.arguments }}
                {%- else %}{{- tool_call.arguments | tojson }}{%- endif %}
                {{- '}\\n</tool_call>' }}
            {%- endfor %}
        {%- endif %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == "tool" %}
        {%- if loop.first or (messages[loop.index0 - 1].role != "tool") %}{{- '<|im_start|>user' }}{%- endif %}
        {{- '\\n<tool_response>\\n' + content + '\\n</tool_response>' }}
        {%- if loop.last or (messages[loop.index0 + 1].role != "tool") %}{{- '<|im_end|>\\n' }}{%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{%- endif %}
"""
BLOCKS = """
  {% for message in messages %}
    {% if loop.index0 >= 5 %}{% break %}{% endif %}
    {% if message.role == 'tool' %}{% continue %}{% endif %}
  {{ message.role | upper }}: {% generation %}{{ message.content }}{% endgeneration %}

  {% endfor %}
{{ dict(a=1, b="<&>'").items() | list }}
{{ tools | tojson(sort_keys=true, separators=(",", ":")) }} {{ extra | default("none") }}
  {% if add_generation_prompt %}ASSISTANT:{% endif %}
"""

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": 'The weather <now> & "here" in a town\'s centre, in °C',
            "parameters": {
                "type": "object",
                "properties": {"town": {"type": "string"}, "days": {"type": "integer", "minimum": 1}},
                "required": ["town"],
            },
        },
    },
    {"type": "function", "function": {"name": "stop", "description": "halt", "parameters": {}}},
]


def _turn(role: str, content: object, **more: object) -> dict[str, object]:
    return {"role": role, "content": content, **more}


_CALL = {"type": "function", "function": {"name": "get_weather", "arguments": {"town": "Zürich", "days": 2}}}
CONVERSATIONS: dict[str, list[dict[str, object]]] = {
    "single": [_turn("user", "Name three uses of iron.")],
    "system": [_turn("system", " Be brief. "), _turn("user", "  Héllo <b>&\n")],
    "turns": [
        _turn("user", "One?"),
        _turn("assistant", "1 \n"),
        _turn("user", "Two?"),
        _turn("assistant", "2"),
        _turn("user", "日本?"),
    ],
    "thought": [
        _turn("user", "Q"),
        _turn("assistant", "<think>\nhm\n</think>\n\nA"),
        _turn("user", "R"),
        _turn("assistant", "B", reasoning="why"),
    ],
    "tools": [
        _turn("system", "Use tools."),
        _turn("user", "Weather?"),
        _turn("assistant", "", tool_calls=[_CALL]),
        _turn("tool", '{"deg": 3}'),
        _turn("assistant", "3 °C"),
        _turn("user", "Thanks"),
    ],
    "two results": [
        _turn("user", "Weather?"),
        _turn("assistant", "Let me see.", tool_calls=[_CALL, _CALL]),
        _turn("tool", "1"),
        _turn("tool", "2"),
    ],
    "bad role": [_turn("critic", "No."), _turn("user", "Yes.")],
}
VARIANTS: list[dict[str, object]] = [
    {},
    {"add_generation_prompt": False},
    {"tools": TOOLS},
    {"enable_thinking": False, "extra": "x"},
    {"enable_thinking": True, "date_string": "1 May 2025", "tools": TOOLS, "add_generation_prompt": False},
]


def main() -> None:
    templates = {"llama3": LLAMA3, "mistral": MISTRAL, "qwen3": QWEN3, "blocks": BLOCKS}
    for path in sys.argv[1:]:
        template = gguf.GGUFReader(path).fields["tokenizer.chat_template"].contents()
        templates[Path(path).stem] = template
    cases = []
    for name, template in templates.items():
        for talk, messages in CONVERSATIONS.items():
            for variant in VARIANTS:
                arguments = {"add_generation_prompt": True, "bos_token": "<s>", "eos_token": "</s>", **variant}
                case = {"template": name, "messages": talk, "arguments": variant}
                try:
                    case["text"] = render_jinja_template([messages], chat_template=template, **arguments)[0][0]
                except Exception as error:  # what the template refuses, whatever the class
                    case["error"] = str(error)
                cases.append(case)
    out = Path(__file__).parents[1] / "chat" / "goldens.json.gz"
    goldens = {"templates": templates, "conversations": CONVERSATIONS, "cases": cases}
    out.write_bytes(gzip.compress(json.dumps(goldens, ensure_ascii=False).encode(), mtime=0))
    print(len(cases), sum("error" in case for case in cases), out.stat().st_size)


if __name__ == "__main__":
    main()
