"""Writes tests/goldens/tokenizer: small vocabularies and the ids that llama.cpp gives awkward texts under each of them.

    LLAMA_BINS=<directory of libllama> python tests/goldens/scripts/make_tokenizer_goldens.py [NAME=MODEL.gguf ...]

`bpe.json.gz` is one byte-level BPE vocabulary, trained here, with the ids under every pre-tokenizer name;
`spm*.json.gz` are SentencePiece vocabularies with many equal scores; `real_NAME.json` are the ids under a real file's
vocabulary (which stays out of the repository). llama.cpp's shared library (the npm package @node-llama-cpp/linux-x64
3.22.1 holds one) is called directly; it reads vocabulary-only GGUF files that gguf's writer makes. Needs gguf and
tokenizers.
"""

import ctypes as c
import gzip
import inspect
import json
import os
import random
import sys
import tempfile
from collections import Counter
from pathlib import Path

import gguf
import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from ferrum_jax.tokenizer.pretokenizers import PRE_TOKENIZERS

OUT = Path(__file__).parents[1] / "tokenizer"
TEXTS = [
    "",
    " ",
    "  ",
    "   ",
    "\t",
    "\n",
    "\n\n",
    "\r\n",
    "\r\n\r\n",
    " \n ",
    "\t\n \r\n\t ",
    "a\n",
    "\na",
    "a \n b",
    "Hello world",
    " Hello",
    "  Hello",
    "Hello ",
    "Hello  world  ",
    "I'm you're HE'S WE'LL I'D'VE 'S 'Ll 'tis don'T",
    "'s 't 're 've 'm 'll 'd 'S",
    "\u2019s curly\u2019ll",
    "1",
    "12",
    "123",
    "1234",
    "12345678901234567890",
    "3.14159 1,000,000 1e-10",
    "a1b22c333d4444",
    " 1 22 333",
    "\u0663\u0664\u0665 \u096a\u096b\u096c \xb2\xb3 \xbd \u2167",
    "\U0001f600",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466 family",
    "\U0001f1e9\U0001f1ea\U0001f1eb\U0001f1f7",
    "\U0001f44d\U0001f3fd\U0001f44d\U0001f3ff",
    "\u2603\ufe0f",
    "\u65e5\u672c\u8a9e\u306e\u30c6\u30ad\u30b9\u30c8",
    "\u4e2d\u6587\uff0c\u6d4b\u8bd5\u3002",
    "\ud55c\uad6d\uc5b4 \ud14d\uc2a4\ud2b8",
    "\u0645\u0631\u062d\u0628\u0627 \u0628\u0627\u0644\u0639\u0627\u0644\u0645",
    "\u05e9\u05dc\u05d5\u05dd \u05e2\u05d5\u05dc\u05dd",
    "\u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35\u0e0a\u0e32\u0e27\u0e42\u0e25\u0e01",
    "\u0928\u092e\u0938\u094d\u0924\u0947 \u0926\u0941\u0928\u093f\u092f\u093e",
    "e\u0301 a\u0308\u0304 \xf1 n\u0303",
    "Z\u0338\u0322\u0353a\u0337l\u0336g\u0335o",
    "\ud7ff\ue000\uf8ff",
    "\U0010ffff\U000e0001",
    "\x00",
    "a\x00b",
    "\x01\x02\x1f\x7f\x80\x9f",
    "\ufffd\ufffd",
    "\ufeffBOM",
    "a\xa0b\u3000c\u2028d\x85e\u2009f\u200bg",
    "\xa0\xa0",
    "\u3000\u3000x",
    "\u2028\u2029",
    "\x85\x85",
    "<|im_start|>user\nhi<|im_end|>",
    "<|endoftext|>",
    "<|im_star",
    "<|im_end|",
    "<|<|im_end|>|>",
    "</s><s><unk><pad>",
    "[INST] x [/INST]",
    "<0x41><0xE2>",
    "\u2581\u2581a\u2581b",
    "\u0120hello \u010a",
    "def f(x):\n    return x**2  # comment\n\n\tif x == 1:\n        pass",
    'int main() { printf("%d\\n", x); }',
    "https://example.com/a?b=c&d=e#f",
    "user@mail.org",
    "$100 \u20ac200 \xa3300 \xa5400",
    "!!!???...---===+++",
    "a-b_c.d/e\\f",
    "CamelCaseHTTPServer snake_case SCREAMING",
    "\xc0\xc9\xce\xd5\xdc \xe0\xe9\xee\xf5\xfc \xdf \u0152\xc6 \u01c5",
    "\u03a9mega \u041f\u0440\u0438\u0432\u0435\u0442 \u043c\u0438\u0440",
    "x" * 300,
    " " * 70,
    "\n" * 40,
    "ab" * 100,
    "supercalifragilisticexpialidocious" * 5,
    "a\u200db \u200c \u2060",
    "\r",
    "\r\r\n\n",
    "\x0b\x0c",
    "fi \ufb01 \ufb00 \xc5 \xc5 \u03a9",
    "\uff11\uff12\uff13\uff21\uff22\uff23",
    "\U0001d407\U0001d41e\U0001d425\U0001d425\U0001d428 \U0001d7cf\U0001d7d0\U0001d7d1",
    "\u02b0\u02b2 \u02c8str\u025bs",
    "<sentinel:12>IMGIMGABZ",
    "..\n/\n//\r\n",
    "\u0301\u0301a",
    "100\u0663 1\u066301",
    "tab\tsep\tvals\n1\t2\t3",
    "\ufdfd",
    "a" * 17 + "1" * 17 + " " * 17,
    "<s> a <mask> b</s> <|user|>\n hi<|im_end|>\n",
    "<|user|>h\xe9llo h\xe9lloh\xe9llo  x",
    "aaaaaa\n\n  a b a  b",
    "\ufdd0\U00016d40\U0001e5f1a1",
    " " * 513 + "1",
]


class _Params(c.Structure):
    """llama_model_params as an opaque block; `vocab_only` is its byte 72 in the release named above."""

    _fields_ = (("raw", c.c_uint8 * 1024),)


class LlamaCpp:
    """The vocabulary of a GGUF file in llama.cpp."""

    lib: c.CDLL | None = None

    def __init__(self, metadata: dict[str, object]) -> None:
        if LlamaCpp.lib is None:
            bins = Path(os.environ["LLAMA_BINS"])
            for name in ("libggml-base.so", "libggml.v0.5.0.so"):
                c.CDLL(str(bins / name), c.RTLD_GLOBAL)
            lib = LlamaCpp.lib = c.CDLL(str(bins / "libllama.v0.5.0.so"), c.RTLD_GLOBAL)
            lib.llama_model_default_params.restype = _Params
            lib.llama_model_load_from_file.argtypes = [c.c_char_p, _Params]
            lib.llama_model_load_from_file.restype = lib.llama_model_get_vocab.restype = c.c_void_p
            lib.llama_model_get_vocab.argtypes = lib.llama_vocab_n_tokens.argtypes = [c.c_void_p]
            lib.llama_vocab_is_eog.argtypes = [c.c_void_p, c.c_int32]
            lib.llama_vocab_is_eog.restype = c.c_bool
            ids = c.POINTER(c.c_int32)
            lib.llama_tokenize.argtypes = [c.c_void_p, c.c_char_p, c.c_int32, ids, c.c_int32, c.c_bool, c.c_bool]
            self.quiet = c.CFUNCTYPE(None, c.c_int, c.c_char_p, c.c_void_p)(lambda *_: None)
            LlamaCpp.keep = self.quiet
            lib.llama_log_set(self.quiet, None)
        params = LlamaCpp.lib.llama_model_default_params()
        assert params.raw[72] == 0 and params.raw[74] == 1, "another llama.cpp: find vocab_only again"
        params.raw[72] = 1
        with tempfile.TemporaryDirectory() as folder:
            path = f"{folder}/vocabulary.gguf"
            _write(path, metadata)
            model = LlamaCpp.lib.llama_model_load_from_file(path.encode(), params)
        assert model, "llama.cpp does not load it"
        self.vocab = LlamaCpp.lib.llama_model_get_vocab(model)

    def end_ids(self) -> list[int]:
        count = self.lib.llama_vocab_n_tokens(self.vocab)
        return [i for i in range(count) if self.lib.llama_vocab_is_eog(self.vocab, i)]

    def encode(self, text: str, add_special: bool, parse_special: bool) -> list[int]:
        raw = text.encode()
        ids = (c.c_int32 * (len(raw) + 16))()
        count = self.lib.llama_tokenize(self.vocab, raw, len(raw), ids, len(ids), add_special, parse_special)
        assert count >= 0
        return list(ids[:count])

    def answers(self) -> dict[str, object]:
        """Ids of every text without and with special tokens (added and parsed), and the end-of-generation set."""
        return {
            "plain": [self.encode(text, False, False) for text in TEXTS],
            "special": [self.encode(text, True, True) for text in TEXTS],
            "end_ids": self.end_ids(),
        }


def _write(path: str, metadata: dict[str, object]) -> None:
    writer = gguf.GGUFWriter(path, "llama")
    for key in ("context_length", "embedding_length", "feed_forward_length", "rope.dimension_count"):
        writer.add_uint32(f"llama.{key}", 64)
    for key in ("block_count", "attention.head_count"):
        writer.add_uint32(f"llama.{key}", 1)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    for key, value in metadata.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()


def _corpus() -> list[str]:
    import argparse
    import textwrap

    return [inspect.getsource(argparse), inspect.getsource(textwrap)] + TEXTS * 4


def bpe_metadata() -> dict[str, object]:
    """Byte-level BPE with the specials of a chat model, a user-defined token and the bytes 0xF5 to 0xFF left out."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    chunks = [line[i : i + 24] for text in _corpus() for line in text.splitlines(True) for i in range(0, len(line), 24)]
    trainer = trainers.BpeTrainer(vocab_size=2600, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()))
    trained.train_from_iterator(chunks, trainer)
    data = json.loads(trained.to_str())["model"]
    tokens = [token for token, _ in sorted(data["vocab"].items(), key=lambda item: item[1])]
    missing = set("õö÷øùúûüýþÿ")
    tokens = [token for token in tokens if not missing & set(token)]
    merges = [" ".join(pair) for pair in data["merges"] if not missing & set("".join(pair))]
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s>", "</s>", "<mask>", "<|user|>", "  ", "héllo"]
    types = [1] * len(tokens) + [3, 3, 1, 3, 3, 3, 4, 4, 4]
    taken = [i for i, token in enumerate(special) if token not in tokens]
    types = types[: len(tokens)] + [types[len(tokens) + i] for i in taken]
    tokens += [special[i] for i in taken]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": tokens.index("<s>"),
        "tokenizer.ggml.eos_token_id": tokens.index("</s>"),
    }


def spm_metadata(ties: int, **more: bool) -> dict[str, object]:
    """Frequent substrings as pieces, `ties` neighbors to a score, so that joins cross and meet equal scores."""
    text = "\n".join(_corpus()).replace(" ", "\u2581")
    found = Counter(text[i : i + n] for n in range(2, 8) for i in range(len(text) - n))
    ranked = sorted(found.items(), key=lambda item: (-item[1] * (len(item[0]) - 1), item[0]))
    pieces = [piece for piece, _ in ranked if "\u2581" not in piece[1:] or not piece.strip("\u2581")][:1300]
    random.Random(ties).shuffle(pieces)
    letters = ["\u2581", *sorted({letter for letter in text if ord(letter) < 0x600} - set("qé"))]
    rows = [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3), *((f"<0x{b:02X}>", 0.0, 6) for b in range(256))]
    rows += [
        ("<|user|>", 0.0, 4),
        ("    ", 0.0, 4),
        ("\n\n", -1000.0, 4),
        ("<|im_end|>", 0.0, 3),
        ("a\u2581b", -1.0, 1),
    ]
    rows += [(piece, -float(i // ties), 1) for i, piece in enumerate(pieces)]
    rows += [(letter, -2000.0, 1) for letter in letters]
    unique = {token: (score, kind) for token, score, kind in reversed(rows)}
    rows = [(token, *unique.pop(token)) for token, _, _ in rows if token in unique]
    metadata: dict[str, object] = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [row[0] for row in rows],
        "tokenizer.ggml.scores": [row[1] for row in rows],
        "tokenizer.ggml.token_type": [row[2] for row in rows],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }
    return metadata | {f"tokenizer.ggml.{key}": value for key, value in more.items()}


def _save(name: str, data: dict[str, object]) -> None:
    raw = json.dumps(data, separators=(",", ":")).encode()
    path = OUT / name
    path.write_bytes(gzip.compress(raw, mtime=0) if name.endswith(".gz") else raw)
    print(name, path.stat().st_size)


def main() -> None:
    metadata = bpe_metadata()
    answers: list[object] = []
    names: dict[str, int] = {}
    for pre in sorted(PRE_TOKENIZERS):
        answer = LlamaCpp(metadata | {"tokenizer.ggml.pre": pre}).answers()
        if answer not in answers:
            answers.append(answer)
        names[pre] = answers.index(answer)
    _save("bpe.json.gz", {"texts": TEXTS, "metadata": metadata, "answers": answers, "pre": names})
    for name, ties, more in (
        ("spm", 1, {}),
        ("spm_ties", 6, {"add_space_prefix": False, "add_eos_token": True, "add_bos_token": False}),
    ):
        metadata = spm_metadata(ties, **more)
        _save(f"{name}.json.gz", {"texts": TEXTS, "metadata": metadata, **LlamaCpp(metadata).answers()})
    for argument in sys.argv[1:]:
        name, _, path = argument.partition("=")
        fields = gguf.GGUFReader(path).fields
        wanted = {key: field.contents() for key, field in fields.items() if key.startswith("tokenizer.ggml.")}
        wanted = {key: value.tolist() if isinstance(value, np.ndarray) else value for key, value in wanted.items()}
        _save(f"real_{name}.json", {"texts": TEXTS, **LlamaCpp(wanted).answers()})


if __name__ == "__main__":
    main()
