"""Tokenizers of Gemma: what GGUF files state is encoded as the tokenizers library encodes the tokenizer.json that it is of."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer as Library
from tokenizers import decoders, models, normalizers, pre_tokenizers

from ferrum_jax.tokenizer import Tokenizer
from ferrum_jax.tokenizer.opening import tokenizer_of_directory, tokenizer_of_gguf
from ferrum_jax.tokenizer.to_gguf import tokenizer_metadata

CONTROL = ["<pad>", "<eos>", "<bos>", "<unk>", "<turn|>", "<|tool_call>"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
PAIRS = "t h|th e|▁ the|i n|▁ a|n d|▁a nd|▁ ▁|▁▁ ▁▁|a t|c at|▁ cat|r o|ro o|roo m|in g|l l|e ll|▁ x|1 2|é e"
MERGES = [*(tuple(pair.split(" ")) for pair in PAIRS.split("|")), ("\n", "\n"), ("\n\n", "\n")]
LETTERS = [*"abcdefghijklmnopqrstuvwxyzé0123456789.,!?'\n\t▁"]
TOKENS = [*CONTROL, *BYTES, *LETTERS, *dict.fromkeys("".join(pair) for pair in MERGES)]
TEXTS = [
    "the cat and the room",
    " the  cat    sat\n\nin\n\n\n\n\nthe room\n",
    "thing, cell! 12 123 x1",
    "ée é\tnaïve 東京 👍🏽 \u0000end",
    "\n",
    "",
    "    \n    the",
    "the\n the\n  the",
]


def library() -> Library:
    """As a tokenizer.json of Gemma has it."""
    ids = {token: i for i, token in enumerate(TOKENS)}
    made = Library(models.BPE(ids, MERGES, byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    made.normalizer = normalizers.Replace(" ", "▁")
    made.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    made.add_special_tokens(CONTROL)
    return made


def metadata(**more) -> dict:
    types = [3] * len(CONTROL) + [6] * 256 + [1] * (len(TOKENS) - len(CONTROL) - 256)
    keys = {"model": "gemma4", "tokens": TOKENS, "token_type": np.array(types, np.int32), "bos_token_id": 2, "eos_token_id": 1}
    keys |= {"merges": [" ".join(pair) for pair in MERGES], "scores": np.zeros(len(TOKENS), np.float32)}
    return {f"tokenizer.ggml.{key}": value for key, value in (keys | more).items()}


@pytest.mark.parametrize("text", TEXTS)
def test_ids_and_text_of_gemma4(text: str) -> None:
    made = tokenizer_of_gguf(metadata())
    ids = made.encode(text, add_special=False)
    assert ids == library().encode(text, add_special_tokens=False).ids
    assert made.decode(ids) == text and b"".join(map(made.token_bytes, ids)) == text.encode()


def test_bos_of_gemma4_is_added_whatever_the_file_says() -> None:
    """llama.cpp overrides the key, which published files have wrong."""
    made = tokenizer_of_gguf(metadata(add_bos_token=False))
    assert made.encode("the cat<turn|>", parse_special=True)[0] == 2 and made.encode("the<turn|>", parse_special=True)[-1] == 4
    assert made.eos_ids == {1, 4}


@pytest.mark.parametrize("model", ["llama", "gemma4"])
def test_a_directory_of_gemma_becomes_the_vocabulary_that_llama_cpp_reads(model: str, tmp_path: Path) -> None:
    """The converter of llama.cpp (in llama-cpp-python 0.3.36) writes "llama" for Gemma 3 and "gemma4" for Gemma 4."""
    library().save(str(tmp_path / "tokenizer.json"))
    names = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(names | {"add_bos_token": True}))
    directory = tokenizer_of_directory(tmp_path)
    keys = {key: entry.value for key, entry in tokenizer_metadata(tmp_path, len(TOKENS), model).items()}
    assert keys["tokenizer.ggml.model"] == model and keys["tokenizer.ggml.add_space_prefix"] is False
    if model == "gemma4":
        assert keys["tokenizer.ggml.merges"] == [" ".join(pair) for pair in MERGES]
        assert keys["tokenizer.ggml.token_type"][5] == 4  # llama.cpp shows it
    made = Tokenizer.from_gguf(keys)
    for text in TEXTS:
        assert made.encode(text) == directory.encode(text) and made.encode(text)[0] == 2
