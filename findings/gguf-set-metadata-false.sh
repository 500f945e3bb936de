#!/usr/bin/env bash
# gguf: gguf-set-metadata cannot set a boolean to false, and reports success.
#
# Expected: `gguf-set-metadata model.gguf tokenizer.ggml.add_bos_token false` writes false, or refuses.
# Seen: "false", "False", "0", "no" and "off" all mean True: the tool answers that the key is already set to
# the requested value True (or sets a false one to True) and exits 0. Booleans are what one changes most in
# a converted file: add_bos_token, add_eos_token, add_space_prefix. Only the empty string gives False.
# Cause: the text of the command line goes through the Python type of the field, and bool() of any
# nonempty string is True.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3.11}" -m venv "$work/env"
"$work/env/bin/pip" install -q gguf==0.19.0 numpy==2.4.6
"$work/env/bin/python" - "$work" <<'EOF'
import subprocess
import sys
from importlib.metadata import version

import gguf
import numpy as np

print("gguf", version("gguf"))
work = sys.argv[1]
KEY = "tokenizer.ggml.add_bos_token"


def after(before: bool, text: str) -> tuple[int, bool]:
    """Exit status of the tool, and the value in the file after it."""
    writer = gguf.GGUFWriter(f"{work}/model.gguf", "llama")
    writer.add_add_bos_token(before)
    writer.add_tensor("t", np.zeros(32, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    command = [f"{work}/env/bin/gguf-set-metadata", "--force", f"{work}/model.gguf", KEY, text]
    status = subprocess.run(command, capture_output=True).returncode
    return status, bool(gguf.GGUFReader(f"{work}/model.gguf").get_field(KEY).contents())


seen = {}
for before in (True, False):
    for text in ("false", "0", ""):
        seen[before, text] = after(before, text)
        print(f"{KEY} {before}, set to {text!r}: exit status and value {seen[before, text]}")
print("expected: False after 'false' and '0', or an exit status other than 0")
as_described = all(outcome == (0, text != "") for (_, text), outcome in seen.items())
print("as described" if as_described else "CHANGED")
sys.exit(not as_described)
EOF
