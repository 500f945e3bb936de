#!/usr/bin/env bash
# transformers: the key/value cache obeys a sliding_window in config.json that the model ignores.
#
# Expected: decoding with the cache computes what a pass over the whole sequence computes, and
# generate(use_cache=True) gives the tokens of generate(use_cache=False).
# Seen: LlamaConfig does not have a field sliding_window. With "sliding_window": 4 in config.json, as in the
# config.json of a Mistral checkpoint turned into Llama, the whole pass is unchanged, but from the fifth token
# on the logits of the cache are others, and generate gives other tokens, without a warning. Mistral, which has
# the field, agrees with itself.
# Cause: where a config does not list layer types, the cache makes sliding layers of any attribute named
# sliding_window and keeps that many keys less one, while Llama builds its mask without looking at it.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3.11}" -m venv "$work/env"
"$work/env/bin/pip" install -q torch==2.13.0 transformers==5.24.0
HF_HUB_OFFLINE=1 PYTHONWARNINGS=ignore "$work/env/bin/python" - "$work" <<'EOF'
import json
import sys
from pathlib import Path

import torch
import transformers

transformers.logging.set_verbosity_warning()
transformers.logging.disable_progress_bar()
print("transformers", transformers.__version__, "torch", torch.__version__)
torch.set_num_threads(1)
sizes = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "vocab_size": 64,
    "initializer_range": 0.2,
}
tokens = torch.arange(1, 13)[None]
whole_passes, seen = {}, {}
for name in ("Llama", "Mistral"):
    config = getattr(transformers, name + "Config")(**sizes)
    folder = Path(sys.argv[1], name)
    torch.manual_seed(0)
    getattr(transformers, name + "ForCausalLM")(config).save_pretrained(folder)
    written = json.loads((folder / "config.json").read_text())
    for window in (None, 4):
        (folder / "config.json").write_text(json.dumps({**written, "sliding_window": window}))
        model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
        with torch.no_grad():
            whole = model(tokens).logits
            first = model(tokens[:, :1], use_cache=True)
            steps = [first.logits]
            for i in range(1, tokens.shape[1]):
                steps.append(model(tokens[:, i : i + 1], cache=first.cache).logits)
            difference = (torch.cat(steps, 1) - whole).abs().amax(-1)[0]
            generated = [
                model.generate(tokens, max_new_tokens=8, do_sample=False, use_cache=cached)[0, 12:].tolist()
                for cached in (True, False)
            ]
        whole_passes[name, window] = whole
        wrong = (difference > 1e-3).nonzero()[:, 0].tolist()
        seen[name, window] = wrong, generated[0] == generated[1]
        print(f"{name}, sliding_window {window}: token by token differs from the whole pass at positions {wrong}")
        print(f"  largest difference {float(difference.max()):.2g}; generate with the cache {generated[0]}, without {generated[1]}")
changed = {name: not torch.equal(whole_passes[name, None], whole_passes[name, 4]) for name in ("Llama", "Mistral")}
print("the window changes the whole pass:", changed)
print("expected: no positions, and equal tokens, each time")
right = ([], True)
as_described = changed == {"Llama": False, "Mistral": True} and seen == {
    ("Llama", None): right,
    ("Llama", 4): (list(range(4, 12)), False),
    ("Mistral", None): right,
    ("Mistral", 4): right,
}
print("as described" if as_described else "CHANGED")
sys.exit(not as_described)
EOF
