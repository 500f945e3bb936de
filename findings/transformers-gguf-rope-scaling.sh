#!/usr/bin/env bash
# transformers: a Llama 3.1 style GGUF file loads with its rope scaling dropped, and computes other logits.
#
# Expected: AutoModelForCausalLM.from_pretrained(gguf_file=...) of the float32 file of a model gives the
# logits of the model, and it does for a model without rope scaling, to the last bit.
# Seen: for the same model with the llama3 scaling (tensor rope_freqs.weight in the file, as llama.cpp
# writes and reads it) config.rope_parameters is the default, the tensor is passed over without a message,
# and most next tokens differ. Llama 3.1, 3.2 and 3.3 files are of this kind.
# Cause: the GGUF config table for llama has no entry for rope scaling, and a tensor whose name is not in
# the map of the model's parameters is skipped (rope_freqs is a buffer that the config computes).
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3.11}" -m venv "$work/env"
"$work/env/bin/pip" install -q torch==2.13.0 transformers==5.24.0 accelerate==1.15.0 gguf==0.19.0
HF_HUB_OFFLINE=1 PYTHONWARNINGS=ignore TQDM_DISABLE=1 "$work/env/bin/python" - "$work" <<'EOF'
import sys

import gguf
import numpy as np
import torch
import transformers

transformers.logging.set_verbosity_error()
print("transformers", transformers.__version__)
work = sys.argv[1]
LAYERS, HEADS, KV_HEADS, WIDTH, HEAD, FORWARD, VOCABULARY, THETA = 2, 4, 2, 64, 16, 96, 128, 500000.0


def halves_to_pairs(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of q and k as llama.cpp stores them for this architecture."""
    return weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def compare(rope: dict) -> tuple[dict, float, float]:
    """Rope parameters after loading, largest difference of logits, and share of equal next tokens."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD,
        intermediate_size=FORWARD,
        vocab_size=VOCABULARY,
        max_position_embeddings=256,
        rms_norm_eps=1e-5,
        initializer_range=0.3,
        tie_word_embeddings=True,
        rope_parameters=rope,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    writer = gguf.GGUFWriter(f"{work}/model.gguf", "llama")
    writer.add_context_length(256)
    writer.add_block_count(LAYERS)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(FORWARD)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(THETA)
    writer.add_rope_dimension_count(HEAD)
    writer.add_vocab_size(VOCABULARY)
    if rope["rope_type"] != "default":
        unscaled = 1.0 / THETA ** (np.arange(0, HEAD, 2) / HEAD)
        factors = unscaled / model.model.rotary_emb.inv_freq.numpy()
        print("rope_freqs.weight in the file:", factors.round(3).tolist())
        writer.add_tensor("rope_freqs.weight", factors.astype(np.float32))
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, LAYERS)
    for name, value in model.state_dict().items():
        if name == "lm_head.weight":  # tied
            continue
        weight = value.numpy()
        if "q_proj" in name or "k_proj" in name:
            weight = halves_to_pairs(weight, HEADS if "q_proj" in name else KV_HEADS)
        writer.add_tensor(names.get_name(name, (".weight",)), np.ascontiguousarray(weight))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    loaded = transformers.AutoModelForCausalLM.from_pretrained(work, gguf_file="model.gguf", dtype=torch.float32)
    tokens = torch.arange(100)[None]
    with torch.no_grad():
        want, got = model(tokens).logits, loaded.eval()(tokens).logits
    same = float((want.argmax(-1) == got.argmax(-1)).float().mean())
    return loaded.config.rope_parameters, float((want - got).abs().max()), same


scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
plain = compare({"rope_type": "default", "rope_theta": THETA})
scaled = compare({"rope_type": "llama3", "rope_theta": THETA, **scaling})
for name, (rope, difference, same) in {"without scaling": plain, "llama3 scaling": scaled}.items():
    print(f"{name}: loaded with {rope}, logits differ by {difference:.3g}, {same:.0%} of next tokens equal")
print("expected: difference 0 and 100% for both")
as_described = plain[1] < 1e-4 and scaled[0]["rope_type"] == "default" and scaled[1] > 1 and scaled[2] < 0.5
print("as described" if as_described else "CHANGED")
sys.exit(not as_described)
EOF
