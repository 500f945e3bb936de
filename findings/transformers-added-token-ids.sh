#!/usr/bin/env bash
# transformers: the ids in added_tokens_decoder of tokenizer_config.json are not those that the tokens get.
#
# Expected: with "added_tokens_decoder": {"1000": ...} the token has id 1000, the row of the embedding that was
# trained for it. A directory of vocab.json and merges.txt states that id nowhere else.
# Seen: GPT2Tokenizer, like other classes of the tokenizers backend, numbers the added tokens from the end of the
# vocabulary: 1000 becomes 6, and "<end>", which renames the reserved row 3, gets a new id as well. No warning
# is given, and save_pretrained writes the new ids. CTRLTokenizer, of the Python backend, gives the stated ids
# for the same directory.
# Cause: the tokenizers backend sorts the added tokens by their ids, drops the ids, and appends the tokens to
# the vocabulary, which is right only where the ids go on from its end without a gap.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3.11}" -m venv "$work/env"
"$work/env/bin/pip" install -q transformers==5.24.0
HF_HUB_OFFLINE=1 PYTHONWARNINGS=ignore "$work/env/bin/python" - "$work" <<'EOF'
import json
import sys
from pathlib import Path

import transformers

print("transformers", transformers.__version__)
stated = {"<end>": 3, "<tool>": 1000, "<image>": 2000}
folder = Path(sys.argv[1], "tokenizer")
folder.mkdir()
vocab = {piece: i for i, piece in enumerate(["<unk>", "<|endoftext|>", "a", "<reserved>", "b"])}
flags = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False, "special": True}
added = {str(i): {"content": token, **flags} for token, i in stated.items()}
(folder / "vocab.json").write_text(json.dumps(vocab))
(folder / "merges.txt").write_text("#version: 0.2\n")
(folder / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added}))


def ids(name: str, source: Path) -> dict[str, int]:
    tokenizer = getattr(transformers, name).from_pretrained(source)
    if source == folder:
        tokenizer.save_pretrained(source.with_name(name))
    return {token: tokenizer.convert_tokens_to_ids(token) for token in stated}


print("stated in the file:", stated)
seen = {}
for name in ("CTRLTokenizer", "GPT2Tokenizer"):
    seen[name] = ids(name, folder), ids(name, folder.with_name(name))
    print(f"{name}: {seen[name][0]}; saved and loaded again: {seen[name][1]}")
print("expected: the stated ids each time")
new = {"<end>": 5, "<tool>": 6, "<image>": 7}
as_described = seen == {"CTRLTokenizer": (stated, stated), "GPT2Tokenizer": (new, new)}
print("as described" if as_described else "CHANGED")
sys.exit(not as_described)
EOF
