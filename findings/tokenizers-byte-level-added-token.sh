#!/usr/bin/env bash
# tokenizers: an added token with an accented Latin letter does not survive decode of a byte-level model.
#
# Expected: decode(encode(text)) == text for a byte-level BPE, with added tokens too.
# Seen: the added token "né" is found in the text and comes back as "n" and U+FFFD; "Đà" becomes two other
# bytes; "日" and "né日" are right. Plain text with the same letters is right, and so are ASCII tokens, so a
# test with <think> or with Chinese tokens does not show it.
# Cause: the ByteLevel decoder is given added tokens too; where every character of one happens to be in the
# 256-character byte alphabet (which has most of Latin-1 and of Latin Extended-A up to U+0143) it maps them
# to bytes, and only a token with some other character is taken as text.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3.11}" -m venv "$work/env"
"$work/env/bin/pip" install -q tokenizers==0.23.3
"$work/env/bin/python" - <<'EOF'
import sys

import tokenizers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.decoders import DecodeStream

print("tokenizers", tokenizers.__version__)
alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
tokenizer = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
tokenizer.decoder = decoders.ByteLevel()
added = ["né", "Đà", "日", "né日", "<think>"]
print("plain:", [tokenizer.decode(tokenizer.encode(token).ids) for token in added])
tokenizer.add_tokens(added)
seen = {}
for token in added:
    encoding = tokenizer.encode(f"a{token}b")
    stream = DecodeStream(skip_special_tokens=True)
    pieces = "".join(stream.step(tokenizer, i) or "" for i in encoding.ids)
    seen[token] = tokenizer.decode(encoding.ids)
    print(f"added: {encoding.tokens} decodes to {seen[token]!r}, streamed to {pieces!r}")
print("expected: the text itself each time")
wrong = [token for token in added if seen[token] != f"a{token}b"]
as_described = wrong == ["né", "Đà"] and "\ufffd" in seen["né"]
print("as described" if as_described else "CHANGED")
sys.exit(not as_described)
EOF
