#!/usr/bin/env bash
# PEFT: saving an adapter reorders alpha_pattern and rank_pattern, and the first match wins.
#
# Expected: PeftModel.from_pretrained of a saved adapter computes what the saved model computed.
# Seen: with alpha_pattern={"model.layers.0.mlp.down_proj": 4, "down_proj": 64} (one layer, then the rest)
# layer 0 has alpha 4 before saving and 64 after loading, 16 times its weight, without a warning. The same
# two entries in rank_pattern make the adapter impossible to load (size mismatch).
# Cause: a module takes the first pattern that matches the end of its name, in the order of the dictionary,
# and adapter_config.json is written with sorted keys, which puts "down_proj" before "model.layers...".
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3.11}" -m venv "$work/env"
"$work/env/bin/pip" install -q torch==2.13.0 transformers==5.24.0 peft==0.21.2
HF_HUB_OFFLINE=1 PYTHONWARNINGS=ignore "$work/env/bin/python" - "$work" <<'EOF'
import sys

import peft
import torch
import transformers

transformers.logging.set_verbosity_error()
print("peft", peft.__version__, "transformers", transformers.__version__)
work = sys.argv[1]


def base() -> transformers.LlamaForCausalLM:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        vocab_size=64,
        initializer_range=0.2,
    )
    return transformers.LlamaForCausalLM(config).eval()


def adapted(**patterns: dict) -> peft.PeftModel:
    model = peft.get_peft_model(base(), peft.LoraConfig(r=4, lora_alpha=8, target_modules=["down_proj"], **patterns))
    for name, value in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(value, std=0.2)
    return model.eval()


def scalings(model: peft.PeftModel) -> list[float]:
    return [layer.mlp.down_proj.scaling["default"] for layer in model.base_model.model.model.layers]


tokens = torch.arange(16)[None]
one_layer_first = {"model.layers.0.mlp.down_proj": 4, "down_proj": 64}
saved = adapted(alpha_pattern=one_layer_first)
saved.save_pretrained(f"{work}/alpha")
loaded = peft.PeftModel.from_pretrained(base(), f"{work}/alpha").eval()
with torch.no_grad():
    difference = float((saved(tokens).logits - loaded(tokens).logits).abs().max())
print("scaling per layer, saved model: ", scalings(saved))
print("scaling per layer, loaded model:", scalings(loaded), "largest difference of logits:", difference)

adapted(rank_pattern=one_layer_first).save_pretrained(f"{work}/rank")
try:
    peft.PeftModel.from_pretrained(base(), f"{work}/rank")
    error = None
except RuntimeError as raised:
    error = "size mismatch" in str(raised)
print("rank_pattern: loading raised a size mismatch:", error)
print("expected: equal scalings, difference 0.0, no error")
as_described = scalings(saved) == [1.0, 16.0] and scalings(loaded) == [16.0, 16.0] and difference > 0.1 and error
print("as described" if as_described else "CHANGED")
sys.exit(not as_described)
EOF
