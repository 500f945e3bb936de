#!/usr/bin/env bash
# transformers: the tokenizer of a DeepSeek-style GGUF file cuts its role markers into letters and numbers
# the start and end tokens past the vocabulary.
#
# Expected: AutoTokenizer.from_pretrained(gguf_file=...) gives "<｜User｜>" the id it has in the file's token
# list, and len(tokenizer) is the length of that list.
# Seen: with the tokens of DeepSeek-R1-Distill-Qwen, whose bars are U+FF5C, "<｜User｜>" becomes 12 ids, the
# begin and end tokens get ids after the last row of the embedding matrix, and no warning is given. With
# ASCII bars the same file is right, so Qwen's and SmolLM's files are.
# Cause: for byte-level vocabularies the reader spells each token that has characters outside the byte
# alphabet in bytes, special tokens too, and then skips control tokens with such characters as mislabeled
# and looks user-defined ones up under a spelling that it has just replaced.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3.11}" -m venv "$work/env"
"$work/env/bin/pip" install -q torch==2.13.0 transformers==5.24.0 gguf==0.19.0
HF_HUB_OFFLINE=1 PYTHONWARNINGS=ignore "$work/env/bin/python" - "$work" <<'EOF'
import sys

import gguf
import numpy as np
import transformers
from tokenizers.pre_tokenizers import ByteLevel

transformers.logging.set_verbosity_error()
print("transformers", transformers.__version__)
work = sys.argv[1]


def load(bar: str) -> tuple[list[str], transformers.PreTrainedTokenizerBase]:
    """The file's token list, and the tokenizer that transformers makes of the file."""
    control = [f"<{bar}begin_of_text{bar}>", f"<{bar}end_of_text{bar}>", "<|endoftext|>"]
    roles = [f"<{bar}User{bar}>", f"<{bar}Assistant{bar}>"]
    plain = sorted(ByteLevel.alphabet()) + ["he", "ll"]
    tokens = plain + control + roles
    writer = gguf.GGUFWriter(f"{work}/model.gguf", "qwen2")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("deepseek-r1-qwen")
    writer.add_token_list(tokens)
    kinds = gguf.TokenType
    writer.add_token_types([kinds.NORMAL] * len(plain) + [kinds.CONTROL] * 3 + [kinds.USER_DEFINED] * 2)
    writer.add_token_merges(["h e", "l l"])
    writer.add_bos_token_id(len(plain))
    writer.add_eos_token_id(len(plain) + 1)
    writer.add_context_length(64)
    writer.add_block_count(1)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    writer.add_tensor("token_embd.weight", np.zeros((len(tokens), 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tokens, transformers.AutoTokenizer.from_pretrained(work, gguf_file="model.gguf")


seen = {}
for bar in ("|", "\uff5c"):
    tokens, tokenizer = load(bar)
    marker = f"<{bar}User{bar}>"
    ids = tokenizer(marker, add_special_tokens=False)["input_ids"]
    seen[bar] = (ids == [tokens.index(marker)], len(ids), tokenizer.eos_token_id < len(tokens), len(tokenizer) - len(tokens))
    print(f"{marker}: ids {ids}, in the file {[tokens.index(marker)]}")
    print(f"  end token {tokenizer.eos_token} has id {tokenizer.eos_token_id}, in the file {tokens.index(tokenizer.eos_token)}")
    print(f"  tokens in the tokenizer {len(tokenizer)}, in the file {len(tokens)}")
print("expected: the same ids in both")
as_described = seen == {"|": (True, 1, True, 0), "\uff5c": (False, 12, False, 2)}
print("as described" if as_described else "CHANGED")
sys.exit(not as_described)
EOF
