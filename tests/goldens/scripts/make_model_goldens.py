"""Golden logits and greedy tokens of the tiny models and of two real ones, from transformers.

The reference is transformers in float32 with eager attention on weights that gguf-py dequantized exactly. Of this
project it uses only the generator of the tiny files, so that its numbers are answers our code did not make. torch and
transformers are needed here and nowhere in the tests.

    PYTHONPATH=tests python tests/goldens/scripts/make_model_goldens.py --help
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
from pathlib import Path

import gguf
import numpy as np
import torch
import transformers

from support import GOLDENS
from support.goldens import golden_cases as cases
from support.goldens import tiny_models

torch.set_num_threads(1)
CLASSES = {
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
    "mistral": (transformers.MistralConfig, transformers.MistralForCausalLM),
    "mixtral": (transformers.MixtralConfig, transformers.MixtralForCausalLM),
    "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
    "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
    "qwen3moe": (transformers.Qwen3MoeConfig, transformers.Qwen3MoeForCausalLM),
    "gpt-oss": (transformers.GptOssConfig, transformers.GptOssForCausalLM),
}
PARTS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_gate_inp": "mlp.gate",
    "ffn_down_exps": "mlp.experts.down_proj",
}
OSS_PARTS = PARTS | {
    "post_attention_norm": "post_attention_layernorm",
    "attn_sinks": "self_attn.sinks",
    "ffn_gate_inp": "mlp.router",
}


def build(path: Path, rope_changes: dict | None = None, unpermute: bool = True, **changes: object) -> torch.nn.Module:
    """The transformers model of a GGUF file, in float32.

    `rope_changes` joins the rope parameters; `unpermute=False` and `changes` of config fields plant mistakes.
    """
    reader = gguf.GGUFReader(path)
    meta = {k: f.contents() for k, f in reader.fields.items()}
    arch = meta["general.architecture"]
    get = {k.removeprefix(arch + "."): v for k, v in meta.items() if k.startswith(arch + ".")}.get
    weights = {}
    for t in reader.tensors:
        shape = tuple(int(n) for n in reversed(t.shape))
        weights[t.name] = torch.from_numpy(gguf.quants.dequantize(t.data, t.tensor_type).reshape(shape).copy())

    heads, kv_heads = get("attention.head_count"), get("attention.head_count_kv")
    fields = {
        "vocab_size": weights["token_embd.weight"].shape[0],
        "hidden_size": get("embedding_length"),
        "num_hidden_layers": get("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": get("attention.key_length") or get("embedding_length") // heads,
        "intermediate_size": get("feed_forward_length"),
        "max_position_embeddings": get("context_length"),
        "rms_norm_eps": get("attention.layer_norm_rms_epsilon"),
        "tie_word_embeddings": "output.weight" not in weights,
        "attention_bias": "blk.0.attn_output.bias" in weights,
        "rope_parameters": {"rope_type": "default", "rope_theta": get("rope.freq_base") or 10000.0},
    }
    rope = fields["rope_parameters"]
    if get("rope.scaling.type") in ("linear", "yarn"):
        rope |= {"rope_type": get("rope.scaling.type"), "factor": get("rope.scaling.factor")}
        if rope["rope_type"] == "yarn":
            rope["original_max_position_embeddings"] = get("rope.scaling.original_context_length")
    kind = arch
    if arch == "llama" and get("expert_count"):
        kind = "mixtral"
        fields |= {"num_local_experts": get("expert_count"), "num_experts_per_tok": get("expert_used_count")}
    elif arch == "llama" and get("attention.sliding_window"):
        kind = "mistral"
        fields["sliding_window"] = get("attention.sliding_window")
    elif arch == "qwen3moe":
        fields |= {
            "num_experts": get("expert_count"),
            "num_experts_per_tok": get("expert_used_count"),
            "moe_intermediate_size": get("expert_feed_forward_length"),
            "norm_topk_prob": True,
        }
    elif arch == "gpt-oss":
        fields |= {
            "num_local_experts": get("expert_count"),
            "num_experts_per_tok": get("expert_used_count"),
            "intermediate_size": get("expert_feed_forward_length"),
            "sliding_window": get("attention.sliding_window"),
        }
        rope["truncate"] = False  # as the published config.json has it; GGUF has no key for it
    rope |= rope_changes or {}
    fields |= changes
    config_class, model_class = CLASSES[kind]
    extra = {"attn_implementation": "eager"} | ({"experts_implementation": "eager"} if get("expert_count") else {})
    with torch.device("meta"):
        model = model_class._from_config(config_class(**fields), **extra)
    model = model.to_empty(device="cpu").float().eval()
    rotary = model.model.rotary_emb  # its buffers were made on the meta device
    model.model.rotary_emb = type(rotary)(model.config)

    def halves(w: torch.Tensor, count: int) -> torch.Tensor:
        """Rows of each head from interleaved pairs to the two halves that transformers rotates."""
        if arch != "llama" or not unpermute:
            return w
        return w.reshape(count, -1, 2, *w.shape[1:]).transpose(1, 2).reshape(w.shape)

    state = {"model.embed_tokens.weight": weights.pop("token_embd.weight")}
    state["model.norm.weight"] = weights.pop("output_norm.weight")
    state["lm_head.weight"] = weights.pop("output.weight", state["model.embed_tokens.weight"])
    weights.pop("rope_freqs.weight", None)  # the caller gives transformers the formula instead
    scale = get("expert_weights_scale") or 1.0
    for n in range(get("block_count")):
        gate, up = (weights.pop(f"blk.{n}.ffn_{x}_exps.weight", None) for x in ("gate", "up"))
        experts = f"model.layers.{n}.mlp.experts."
        if arch == "gpt-oss":  # rows of gate and up in turn, and last
            both = torch.stack([gate, up], dim=2).flatten(1, 2)
            state[experts + "gate_up_proj"] = both.transpose(1, 2).contiguous()
            biases = [weights.pop(f"blk.{n}.ffn_{x}_exps.bias") for x in ("gate", "up")]
            state[experts + "gate_up_proj_bias"] = torch.stack(biases, dim=2).flatten(1, 2)
            state[experts + "down_proj"] = weights.pop(f"blk.{n}.ffn_down_exps.weight").transpose(1, 2).contiguous()
            state[experts + "down_proj_bias"] = weights.pop(f"blk.{n}.ffn_down_exps.bias")
        elif gate is not None:
            state[experts + "gate_up_proj"] = torch.cat([gate, up], dim=1)
    parts = OSS_PARTS if arch == "gpt-oss" else PARTS
    for name, w in weights.items():
        _, n, part, suffix = name.split(".")
        if part == "attn_q":
            w = halves(w, heads)
        elif part == "attn_k":
            w = halves(w, kv_heads)
        elif part == "ffn_down_exps":
            w = w * scale
        tail = "" if part.endswith(("_exps", "_sinks")) else "." + suffix
        state[f"model.layers.{n}.{parts[part]}{tail}"] = w
    model.load_state_dict(state, strict=True)
    if model.config.tie_word_embeddings:
        model.tie_weights()
    return model


def llama3_rope(spec: tiny_models.Spec) -> dict[str, object]:
    """The rope parameters of transformers that the tensor rope_freqs stands for, if the file has one."""
    if not spec.rope or spec.rope[0] != "llama3":
        return {}
    names = ("rope_type", "factor", "original_max_position_embeddings")
    return dict(zip(names, spec.rope, strict=True)) | {"low_freq_factor": 1.0, "high_freq_factor": 4.0}


@torch.no_grad()
def logits(model: torch.nn.Module, ids: list[int]) -> np.ndarray:
    """float32 [length, vocabulary], teacher-forced."""
    return model(torch.tensor([ids]), use_cache=False).logits[0].numpy()


@torch.no_grad()
def greedy(model: torch.nn.Module, ids: list[int], count: int) -> tuple[np.ndarray, np.ndarray]:
    """Greedy token ids [count] and at each step the distance between the two best logits [count]."""
    step = model(torch.tensor([ids]), use_cache=True, logits_to_keep=1)
    out: list[int] = []
    gaps: list[float] = []
    while True:
        best = torch.topk(step.logits[0, -1], 2)
        out.append(int(best.indices[0]))
        gaps.append(float(best.values[0] - best.values[1]))
        if len(out) == count:
            break
        step = model(torch.tensor([out[-1:]]), past_key_values=step.past_key_values, use_cache=True)
    check = model(torch.tensor([ids + out]), use_cache=False, logits_to_keep=count + 1).logits[0, :-1]
    assert [int(t) for t in check.argmax(-1)] == out or min(gaps) < 1e-3, "cached and whole passes disagree"
    return np.array(out, np.int32), np.array(gaps, np.float32)


def golden(model: torch.nn.Module, vocab: int, lengths: tuple[int, ...] = (1, 17, 130)) -> dict[str, np.ndarray]:
    """The arrays of one case: for prompt i rows{i} of the logits, proj{i} of every row, tokens{i} and gaps{i}."""
    out = {}
    for i, ids in enumerate(tiny_models.prompts(vocab, lengths=lengths)):
        full = logits(model, ids)
        out[f"rows{i}"] = full[cases.kept_rows(len(ids))]
        out[f"proj{i}"] = (full.astype(np.float64) @ cases.projection(vocab)).astype(np.float32)
        out[f"tokens{i}"], out[f"gaps{i}"] = greedy(model, ids, cases.NEW_TOKENS)
        assert max(out[f"tokens{i}"]) < vocab - len(tiny_models.SPECIALS), "a special token came out; change the seed"
    return out


def gradient(path: Path, rope: dict[str, object]) -> dict[str, np.ndarray]:
    """Loss and its gradient with respect to the norm weights, on the longest prompt: mean cross-entropy of ids[1:]."""
    model = build(path, rope)
    ids = torch.tensor([tiny_models.prompts(model.config.vocab_size)[-1]])
    rows = model(ids, use_cache=False).logits[0, :-1]
    loss = torch.nn.functional.cross_entropy(rows, ids[0, 1:])
    loss.backward()
    out = {"loss": np.float32(loss.item()), "output_norm": model.model.norm.weight.grad.numpy()}
    names = ["attn_norm", "ffn_norm"]
    if hasattr(model.model.layers[0].self_attn, "q_norm"):
        names += ["attn_q_norm", "attn_k_norm"]
    for name in names:  # [layers, size]
        grads = [layer.get_submodule(PARTS[name]).weight.grad for layer in model.model.layers]
        out[name] = torch.stack(grads).numpy()
    return out


def make_tiny(scratch: Path, quantizer: str | None, names: list[str]) -> None:
    """Write the files of `cases`, their goldens and the gradient goldens."""
    for case in cases.CASES:
        if names and case.name not in names:
            continue
        path = scratch / f"{case.name}.gguf"
        digest = tiny_models.write(case.spec, path)
        if case.quantized:
            kept = cases.HERE / f"{case.name}.gguf"
            if quantizer:
                subprocess.run([*quantizer.split(), str(path), str(kept), case.quantized], check=True)
            path, digest = kept, hashlib.sha256(kept.read_bytes()).hexdigest()
        rope = llama3_rope(case.spec)
        arrays = golden(build(path, rope), case.spec.vocab, case.lengths)
        np.savez_compressed(cases.HERE / f"{case.name}.npz", digest=np.array(digest), **arrays)
        if case.gradient:
            np.savez_compressed(cases.HERE / f"{case.name}.grad.npz", **gradient(path, rope))
        gap = min(arrays[f"gaps{i}"].min() for i in range(len(case.lengths)))
        print(f"{case.name}: spread {arrays['rows2'].std():.2f}, smallest gap {gap:.4f}")


def plant(scratch: Path) -> None:
    """Print how far mistakes planted in the reference move the logits: the tests' bounds must lie well below."""
    for case in cases.CASES:
        spec = case.spec
        path = (cases.HERE if case.quantized else scratch) / f"{case.name}.gguf"
        rope = llama3_rope(spec)
        mistakes: dict[str, dict] = {f"eps {eps}": {"rms_norm_eps": eps} for eps in (1e-6, 1e-5) if eps != spec.eps}
        mistakes["theta"] = {"rope_changes": rope | {"rope_theta": spec.theta * 1.01}}
        if spec.arch == "llama":
            mistakes["rope layout"] = {"unpermute": False}
        if spec.rope:
            mistakes["no rope scaling"] = {"rope_changes": {"rope_type": "default"}}
        if spec.window:
            mistakes["no window"] = {"sliding_window": None}
            mistakes["window + 1"] = {"sliding_window": spec.window + 1}
        if spec.arch == "qwen3moe":
            mistakes["no renormalization"] = {"norm_topk_prob": False}
        if spec.experts:
            mistakes["top_k - 1"] = {"num_experts_per_tok": spec.top_k - 1}
        right = build(path, rope)
        for label, changes in mistakes.items():
            wrong = build(path, **{"rope_changes": rope, **changes})
            for ids in tiny_models.prompts(spec.vocab):
                error = logits(wrong, ids) - logits(right, ids)
                rms = np.sqrt((error**2).mean())
                print(f"{case.name}, {label}, {len(ids)} tokens: max {abs(error).max():.1e}, rms {rms:.1e}")


@torch.no_grad()
def perplexity(model: torch.nn.Module, ids: list[int], window: int | None) -> float:
    """exp of the mean negative log-likelihood; independent windows, the first token of each not scored."""
    size = window or len(ids)
    losses = []
    for start in range(0, len(ids) - size + 1, size):
        part = torch.tensor(ids[start : start + size])
        hidden = model.model(part[None], use_cache=False).last_hidden_state[0, :-1]
        for rows, targets in zip(hidden.split(128), part[1:].split(128), strict=True):
            losses.append(torch.nn.functional.cross_entropy(model.lm_head(rows).double(), targets, reduction="none"))
    return float(torch.cat(losses).mean().exp())


def make_real(name: str, path: Path, ids_file: Path) -> None:
    """Goldens of a real model. `ids_file`: JSON {"prompts": [[id]], "text": [id]}, as llama.cpp tokenizes them."""
    given = json.loads(ids_file.read_text())
    model = build(path)
    vocab = model.config.vocab_size
    probe = cases.probe_ids(vocab)
    out: dict[str, np.ndarray] = {}
    for i, ids in enumerate(given["prompts"]):
        full = logits(model, ids)
        rows = cases.kept_rows(len(ids))
        order = np.argsort(-full[rows], axis=-1, kind="stable")[:, :50]
        out[f"prompt{i}"] = np.array(ids, np.int32)
        out[f"top_ids{i}"], out[f"top{i}"] = order.astype(np.int32), np.take_along_axis(full[rows], order, -1)
        out[f"probe{i}"] = full[rows][:, probe]
        out[f"tokens{i}"], out[f"gaps{i}"] = greedy(model, ids, 48)
        print(name, i, len(ids), "smallest gap", out[f"gaps{i}"].min(), flush=True)
    out["text"] = np.array(given["text"], np.int32)
    out["perplexity512"] = np.array(perplexity(model, given["text"], 512))
    out["perplexity"] = np.array(perplexity(model, given["text"], None))
    print(name, len(given["text"]), out["perplexity512"], out["perplexity"])
    np.savez_compressed(GOLDENS / "real" / f"{name}.npz", **out)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="of tiny cases; none: all")
    parser.add_argument("--scratch", type=Path, help="folder for the tiny files; makes the tiny goldens")
    parser.add_argument("--quantizer", help="llama-quantize of llama.cpp (SRC DST TYPE): remake the committed files")
    parser.add_argument("--planted", action="store_true", help="show what planted mistakes do to the files in scratch")
    parser.add_argument("--real", nargs=3, metavar=("NAME", "GGUF", "IDS"), help="makes the goldens of a real model")
    args = parser.parse_args()
    if args.planted:
        plant(args.scratch)
    elif args.scratch:
        make_tiny(args.scratch, args.quantizer, args.names)
    if args.real:
        make_real(args.real[0], Path(args.real[1]), Path(args.real[2]))


if __name__ == "__main__":
    main()
