"""Renders all chat templates below some folders as transformers does and as we do, and says where the texts differ.

    python tests/goldens/scripts/compare_templates.py FOLDER ...

Folders of public templates: `models/templates` in the source archive of llama-cpp-python, `examples` in that of vllm or
sglang. Each distinct `*.jinja` is rendered for 12 conversations; where transformers fails, so must we. Needs transformers.
"""

from __future__ import annotations

import collections
import sys
from pathlib import Path
from typing import Any

from transformers.utils.chat_template_utils import render_jinja_template

import ferrum_jax as fj
from ferrum_jax import chat

TOWN = {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer", "enum": [1, 2]}}}
TOOL = {"name": "weather", "description": 'Weather <now> & "here", in °C', "parameters": {**TOWN, "required": ["city"]}}
TOOLS = [{"type": "function", "function": TOOL}]


def user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


def answer(content: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


SYSTEM = {"role": "system", "content": " Be brief. "}
CALL = {"id": "abcdef123", "type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo", "days": 1}}}
CALLED = [user("Weather?"), answer("", tool_calls=[CALL])]
CALLED += [{"role": "tool", "name": "weather", "tool_call_id": "abcdef123", "content": '{"t": 3}'}]
CASES: list[tuple[list[dict[str, Any]], dict[str, Any]]] = [
    ([user("Name three uses of iron.")], {}),
    ([user("Hi")], {"add_generation_prompt": False}),
    ([SYSTEM, user("  Héllo <b>&\n")], {}),
    ([user("One?"), answer("1 \n"), user("Two?"), answer("2"), user("日本?")], {}),
    ([user("2+2?"), answer("<think>\nadd\n</think>\n\n4"), user("Why?")], {"enable_thinking": False}),
    ([user("2+2?"), answer("4", reasoning_content="add"), user("Why?")], {"enable_thinking": True}),
    ([user("Weather in Oslo?")], {"tools": TOOLS}),
    ([SYSTEM, user("Weather in Oslo?")], {"tools": TOOLS}),
    (CALLED, {"tools": TOOLS}),
    ([*CALLED, answer("3 degrees"), user("Thanks")], {"tools": TOOLS}),
    ([user("a"), user("b")], {}),
    ([user("a"), answer("b")], {"add_generation_prompt": False}),
]


def rendered(template: str, messages: list[dict[str, Any]], arguments: dict[str, Any]) -> tuple[str | None, str | None]:
    """The text of transformers and ours, None each where the template refuses."""
    arguments = {"add_generation_prompt": True, "bos_token": "<s>", "eos_token": "</s>", **arguments}
    try:
        theirs = render_jinja_template([messages], chat_template=template, **arguments)[0][0]
    except Exception:
        theirs = None
    try:
        return theirs, chat.render(template, messages, **arguments)
    except fj.ChatTemplateError:
        return theirs, None


def main(folders: list[str]) -> int:
    files = [path for folder in folders for path in sorted(Path(folder).rglob("*.jinja"))]
    templates = {path.read_text(encoding="utf-8"): path for path in files}
    counts: collections.Counter[str] = collections.Counter()
    for template, path in templates.items():
        for number, (messages, arguments) in enumerate(CASES):
            theirs, ours = rendered(template, messages, arguments)
            result = "different" if theirs != ours else "both refuse" if ours is None else "the same"
            counts[result] += 1
            if result == "different":
                print(f"{path}, conversation {number}:\n  theirs {theirs!r}\n  ours   {ours!r}")
    print(f"{len(templates)} templates, {dict(counts)}")
    return 1 if counts["different"] or not templates else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
