"""Renders calls of functions with all chat templates below some folders, reads them again, and says where they differ.

    python tests/goldens/scripts/round_trip_tools.py FOLDER ...

Folders of public templates: `models/templates` in the source archive of llama-cpp-python, `examples` in that of vllm or
sglang. Templates that do not take tools are counted only.
"""

from __future__ import annotations

import collections
import json
import sys
from pathlib import Path
from typing import Any

import ferrum_jax as fj
from ferrum_jax import chat
from ferrum_jax.parsing import Dialect, Parser, Tools

PROPERTIES = {"city": {"type": "string"}, "days": {"type": "integer"}, "deep": {"type": "object"}, "on": {"type": "boolean"}}
TOOL = {"name": "weather", "description": "Weather", "parameters": {"type": "object", "properties": PROPERTIES}}
TOOLS = [{"type": "function", "function": TOOL}]
ARGUMENTS: list[dict[str, Any]] = [
    {"city": 'Zürich "x"\n  <b>', "days": 3, "deep": {"a": [1, None, {"b": "c"}]}, "on": True},
    {"city": "5"},
]
USER = {"role": "user", "content": "Weather?"}


def rendered(template: str, messages: list[dict[str, Any]], **more: Any) -> str:
    return chat.render(template, messages, tools=TOOLS, bos_token="<s>", eos_token="</s>", **more)


def result(template: str, count: int, thought: str) -> str:
    """What became of some calls, in a word or two."""
    dialect, given, failed = Dialect.of(template), ARGUMENTS[:count], "refused"
    prompt = rendered(template, [USER])
    for write in (lambda value: value, json.dumps):
        calls = [
            {"id": f"abcdef12{i}", "type": "function", "function": {"name": "weather", "arguments": write(each)}}
            for i, each in enumerate(given)
        ]
        answer = {"role": "assistant", "content": "", "tool_calls": calls, "reasoning_content": thought}
        try:
            whole = rendered(template, [USER, answer], add_generation_prompt=False)
        except fj.ChatTemplateError:
            continue
        at = next((i for i, (a, b) in enumerate(zip(prompt, whole, strict=False)) if a != b), len(prompt))
        mark = max(prompt.rfind("<", 0, at), prompt.rfind("[", 0, at))
        if not {">", "]"} & set(prompt[mark:at]):  # not inside of a mark
            at = max(mark, 0)
        found = Parser(dialect, Tools.of(TOOLS), prompt=prompt[:at]).whole(whole[at:])
        if [json.loads(call.arguments) for call in found.calls if call.complete] == given:
            return "equal" if thought in (found.reasoning, "") else "no reasoning"
        if dialect.calls == "none":
            return "unknown"
        failed = f"DIFFERENT {dialect}: {whole[at:]!r} -> {found}" if failed == "refused" else failed
    return failed


def main(folders: list[str]) -> int:
    files = [path for folder in folders for path in sorted(Path(folder).rglob("*.jinja"))]
    templates = {path.read_text(encoding="utf-8"): path for path in files}
    counts: collections.Counter[str] = collections.Counter()
    for template, path in templates.items():
        if "tools" not in chat.variables(template):
            counts["without tools"] += 1
            continue
        for count, thought in ((1, ""), (2, ""), (1, "Hm.")):
            try:
                found = result(template, count, thought)
            except fj.ChatTemplateError:
                found = "refused"
            counts[found.split()[0]] += 1
            if found != "equal":
                print(f"{path.name}, {count}: {found}")
    print(f"{len(templates)} templates, {dict(counts)}")
    return 1 if counts["DIFFERENT"] or not templates else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
