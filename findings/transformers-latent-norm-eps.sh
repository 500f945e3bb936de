#!/usr/bin/env bash
# transformers: in models with latent attention, two norms of each layer do not use rms_norm_eps of config.json.
#
# Expected: "rms_norm_eps" is the epsilon of every RMS norm of the model, as its documentation says ("the epsilon used by
# the rms normalization layers"), also of q_a_layernorm and kv_a_layernorm; engines that have one epsilon for a model,
# and GGUF files, which have one key for it, compute the same.
# Seen: DeepSeek V2 and V3 and GLM-4.7-Flash (glm4_moe_lite, whose default is 1e-5) normalize the two latent vectors with
# 1e-6, whatever the config says. With an epsilon of 0.1 in the config, all norms of the residual have it and these do not.
# Cause: they are created with the length alone. The published DeepSeek models have 1e-6 everywhere, so nothing shows there.
# Consequence: what is right for a GLM-4.7-Flash depends on whom you ask; the latent vectors differ where they are small.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3.11}" -m venv "$work/env"
"$work/env/bin/pip" install -q torch==2.13.0 transformers==5.24.0
HF_HUB_OFFLINE=1 PYTHONWARNINGS=ignore "$work/env/bin/python" - <<'EOF'
import sys

import transformers

transformers.logging.set_verbosity_error()
print("transformers", transformers.__version__)
sizes = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "vocab_size": 64,
}
as_described = True
for name in ("DeepseekV2", "DeepseekV3", "Glm4MoeLite"):
    config = getattr(transformers, name + "Config")(**sizes, rms_norm_eps=0.1)
    model = getattr(transformers, name + "ForCausalLM")(config)
    found = {}
    for path, module in model.named_modules():
        if hasattr(module, "variance_epsilon"):
            found.setdefault(module.variance_epsilon, set()).add(path.rsplit(".", 1)[-1])
    print(f"{name}, rms_norm_eps {config.rms_norm_eps}:", {eps: sorted(norms) for eps, norms in found.items()})
    residual = {"input_layernorm", "post_attention_layernorm", "norm"}
    as_described &= found == {0.1: residual, 1e-6: {"q_a_layernorm", "kv_a_layernorm"}}
print("expected: 0.1 for every norm")
print("as described" if as_described else "CHANGED")
sys.exit(not as_described)
EOF
