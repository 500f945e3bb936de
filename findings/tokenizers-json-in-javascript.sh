#!/usr/bin/env bash
# tokenizers and @huggingface/tokenizers give other ids for the same tokenizer.json and text.
#
# Expected: a tokenizer.json means one tokenizer: the ids of the Python library are the ids in JavaScript.
# Seen, without an error: Digits splits only ASCII digits in JavaScript, so numbers in Arabic or Indian digits
# merge; Whitespace ends a word before each accented letter ("naïve" is three words); a lowercasing
# normalizer writes the Greek final sigma, which an uncased vocabulary lacks, so words become unknown; and
# Metaspace ignores split=true, so merges reach over spaces. A model served from Python and from a browser
# sees other prompts, in some languages only.
# Cause: \d, \w and \b of a JavaScript regular expression are ASCII also with the u flag, toLowerCase looks
# at a letter's position in the word while Rust's is called on one character at a time, and the JavaScript
# Metaspace reads the replacement and the scheme from the file but not split.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3.11}" -m venv "$work/env"
"$work/env/bin/pip" install -q tokenizers==0.23.3
(cd "$work" && npm install --silent --no-audit --no-fund @huggingface/tokenizers@0.2.0)
"$work/env/bin/python" - "$work" <<'EOF'
import json
import subprocess
import sys
from pathlib import Path

import tokenizers
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

work = Path(sys.argv[1])
print("tokenizers", tokenizers.__version__, "@huggingface/tokenizers 0.2.0")
PROGRAM = """
import {Tokenizer} from '@huggingface/tokenizers';
import {readFileSync} from 'node:fs';
const [file, texts] = JSON.parse(process.argv[2]);
const tokenizer = new Tokenizer(JSON.parse(readFileSync(file)), {});
console.log(JSON.stringify(texts.map(text => tokenizer.encode(text).ids)));
"""
(work / "encode.mjs").write_text(PROGRAM)


def bpe(pre_tokenizer: pre_tokenizers.PreTokenizer, text: str, merges: list[tuple[str, str]]) -> Tokenizer:
    tokens = ["<unk>", *sorted(set(text)), *(a + b for a, b in merges)]
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizer
    return tokenizer


words = ["<unk>", "sos", "\u03bb\u03cc\u03b3\u03bf\u03c3"]
uncased = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
uncased.normalizer = normalizers.Lowercase()
arabic = "\u0661\u0662"
cases = {
    "Digits": (bpe(pre_tokenizers.Digits(True), "12" + arabic, [("1", "2"), tuple(arabic)]), ["12", arabic]),
    "Whitespace": (
        bpe(pre_tokenizers.Whitespace(), "na\u00efve", [("n", "a"), ("na", "\u00ef")]),
        ["na", "na\u00efve"],
    ),
    "Lowercase": (uncased, ["SOS", "\u039b\u038c\u0393\u039f\u03a3"]),
    "Metaspace": (
        bpe(pre_tokenizers.Metaspace(split=True), "\u2581ab", [("\u2581", "\u2581"), ("\u2581", "b")]),
        ["a b", "a  b"],
    ),
}
seen = {}
for name, (tokenizer, texts) in cases.items():
    tokenizer.save(str(work / f"{name}.json"))
    node = ["node", "encode.mjs", json.dumps([f"{name}.json", texts])]
    javascript = json.loads(subprocess.run(node, cwd=work, stdout=subprocess.PIPE, check=True).stdout)
    python = [tokenizer.encode(text).ids for text in texts]
    for text, ours, theirs in zip(texts, python, javascript, strict=True):
        tokens = [[tokenizer.id_to_token(i) for i in ids] for ids in (ours, theirs)]
        print(f"{name} {text!r}: Python {tokens[0]}, JavaScript {tokens[1]}")
    seen[name] = [ours == theirs for ours, theirs in zip(python, javascript, strict=True)]
print("expected: equal each time")
as_described = seen == dict.fromkeys(cases, [True, False])
print("as described" if as_described else "CHANGED")
sys.exit(not as_described)
EOF
