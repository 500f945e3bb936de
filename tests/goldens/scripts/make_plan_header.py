"""Writes the headers in ferrum_jax/headers: of published models as llama.cpp's Q4_K_M or MXFP4 stores them.

    LLAMA_BINS=<directory of libllama> python tests/goldens/scripts/make_plan_header.py [NAME ...]

The sizes are those of each model's config.json; names and shapes follow from them, for newer families by their own tables (the
numbers of all weights that their publishers state are checked in tests/unit/model/test_plan.py). Which tensor gets which type
llama.cpp itself says: it quantizes a model of the same architecture and layers, but narrow, with few experts and all zeros. Its
shared library (the npm package @node-llama-cpp/linux-x64 3.22.1 holds one) is called directly. Needs gguf and 1 GB of disk in
the temporary directory.
"""

import ctypes as c
import dataclasses
import json
import math
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from ferrum_jax import families

OUT = Path(__file__).parents[3] / "ferrum_jax" / "headers"
FILE_TYPES = {"q4_k_m": 15, "mxfp4": 38}  # llama.cpp's
NARROW_VOCABULARY = 64
# Matrices that converter and quantizer leave in F32.
PLAIN = ("ffn_gate_inp.", "ffn_gate_inp_shexp.", "ssm_conv1d.", "shortconv.conv.")


@dataclasses.dataclass(frozen=True)
class Model:
    """A published model. keys: those of its architecture. Rows of `narrow` are as wide as a block of any type."""

    file: str
    architecture: str
    name: str
    vocabulary: int
    tied: bool
    keys: dict[str, Any]

    def key(self, name: str) -> int:
        return int(self.keys[name])

    @property
    def metadata(self) -> dict[str, Any]:
        general = {
            "general.architecture": self.architecture,
            "general.name": self.name,
            "general.license": "apache-2.0",
            "general.file_type": FILE_TYPES[self.file.rpartition("-")[2]],
            "general.quantization_version": 2,
        }
        return general | {f"{self.architecture}.{key}": value for key, value in self.keys.items()}

    @property
    def narrow(self) -> "Model":
        small = {"embedding_length": 256, "feed_forward_length": 256, "attention.head_count": 4, "attention.head_count_kv": 2}
        if "expert_count" in self.keys:  # not 8, for which llama.cpp has rules of its own
            small |= {"expert_feed_forward_length": 256, "expert_count": 4, "expert_used_count": 2}
        if "expert_shared_feed_forward_length" in self.keys:
            small["expert_shared_feed_forward_length"] = 256
        keys = {key: small.get(key, value) for key, value in self.keys.items()}
        return dataclasses.replace(self, vocabulary=NARROW_VOCABULARY, keys=keys)


@dataclasses.dataclass(frozen=True)
class OfConfig:
    """A published model by its config.json, whose tensors are those of its family's table. license: as the hub states it."""

    file: str
    name: str
    license: str
    content: dict[str, Any]

    @property
    def read(self) -> Any:
        """The `ConfigFile` that the family makes of it."""
        path = Path(f"{self.file}/config.json")
        return families.of_content(self.content, path).read_json(self.content, path)

    @property
    def architecture(self) -> str:
        return str(self.read.config.architecture)

    @property
    def metadata(self) -> dict[str, Any]:
        family = families.of_architecture(self.architecture, self.file)
        assert family.to_gguf is not None
        keys = {key: entry.value for key, entry in family.to_gguf(self.read.config, self.file).items()}
        general = {
            "general.architecture": self.architecture,
            "general.name": self.name,
            "general.license": self.license,
            "general.file_type": FILE_TYPES["q4_k_m"],
            "general.quantization_version": 2,
        }
        return general | {key: value.tolist() if isinstance(value, np.ndarray) else value for key, value in keys.items()}

    @property
    def narrow(self) -> "OfConfig":
        """Sizes have the same remainders by the largest block, on which the types depend; not 8 experts, for which llama.cpp
        has rules of its own."""
        widths = ("hidden_size", "intermediate_size", "moe_intermediate_size", "q_lora_rank", "kv_lora_rank")
        counts = {"vocab_size": NARROW_VOCABULARY} | dict.fromkeys(("num_experts", "n_routed_experts"), 16)
        small = {key: 256 + self.content[key] % 256 for key in widths if self.content.get(key)}
        if self.content.get("query_pre_attn_scalar") not in (None, self.content.get("head_dim")):  # of 62 layers
            small["query_pre_attn_scalar"] = small["hidden_size"] // self.content["num_attention_heads"]
        small |= {key: count for key, count in counts.items() if self.content.get(key)}
        return dataclasses.replace(self, content=self.content | small)

    @property
    def shapes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        family, file = families.of_architecture(self.architecture, self.file), self.read

        def there(row: Any) -> bool:
            if row.name in ("output.weight", "rope_freqs.weight"):
                return not file.tied if row.name == "output.weight" else file.rope_factors is not None
            stated = row.name.endswith(".bias") and row.stem in file.biases
            return not row.optional or stated or file.optional.get(row.name, row.name == "layer_output_scale.weight")

        for name, row, layer in family.tensors_of(file.config):
            if there(row):
                yield name, family.shape(row, file.config, layer)


def attention(key: Any, q: int, biases: bool = False) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Tensors of attention; q: how many times as many rows of queries as of heads."""
    hidden, head = key("embedding_length"), key("attention.key_length")
    heads, kv_heads = key("attention.head_count") * head, key("attention.head_count_kv") * head
    matrices = {"k": (kv_heads, hidden), "output": (hidden, heads), "q": (q * heads, hidden), "v": (kv_heads, hidden)}
    for name, shape in matrices.items():
        if biases:
            yield f"attn_{name}.bias", shape[:1]
        elif name in ("k", "q"):
            yield f"attn_{name}_norm.weight", (head,)
        yield f"attn_{name}.weight", shape


def delta_net(key: Any) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, state, heads = key("embedding_length"), key("ssm.state_size"), key("ssm.time_step_rank")
    inner, channels = key("ssm.inner_size"), 2 * key("ssm.group_count") * state + key("ssm.inner_size")
    yield "attn_gate.weight", (inner, hidden)
    yield "attn_qkv.weight", (channels, hidden)
    yield "ssm_a", (heads,)
    yield "ssm_alpha.weight", (heads, hidden)
    yield "ssm_beta.weight", (heads, hidden)
    yield "ssm_conv1d.weight", (channels, key("ssm.conv_kernel"))
    yield "ssm_dt.bias", (heads,)
    yield "ssm_norm.weight", (inner // heads,)
    yield "ssm_out.weight", (hidden, inner)


def mixture(key: Any, biases: bool = False) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, experts, width = key("embedding_length"), key("expert_count"), key("expert_feed_forward_length")
    wide = (experts, width, hidden)
    for name, shape in (("down", (experts, hidden, width)), ("gate", wide), ("up", wide)):
        yield f"ffn_{name}_exps.weight", shape
        if biases:
            yield f"ffn_{name}_exps.bias", shape[:2]
    yield "ffn_gate_inp.weight", (experts, hidden)
    if biases:
        yield "ffn_gate_inp.bias", (experts,)


def swiglu(hidden: int, width: int, suffix: str = "") -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"ffn_down{suffix}.weight", (hidden, width)
    yield f"ffn_gate{suffix}.weight", (width, hidden)
    yield f"ffn_up{suffix}.weight", (width, hidden)


def layer(model: Model, number: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    key, hidden = model.key, model.key("embedding_length")
    yield "attn_norm.weight", (hidden,)
    if model.architecture == "gpt-oss":
        yield from attention(key, 1, biases=True)
        yield "attn_sinks.weight", (key("attention.head_count"),)
        yield "post_attention_norm.weight", (hidden,)
        yield from mixture(key, biases=True)
    elif model.architecture == "qwen3moe":
        yield from attention(key, 1)
        yield "ffn_norm.weight", (hidden,)
        yield from mixture(key)
    else:
        yield from delta_net(key) if (number + 1) % key("full_attention_interval") else attention(key, 2)
        yield "post_attention_norm.weight", (hidden,)
        if model.architecture == "qwen35":
            yield from swiglu(hidden, key("feed_forward_length"))
        else:
            yield from mixture(key)
            yield "ffn_gate_inp_shexp.weight", (hidden,)
            yield from swiglu(hidden, key("expert_shared_feed_forward_length"), "_shexp")


def shapes(model: "Model | OfConfig") -> Iterator[tuple[str, tuple[int, ...]]]:
    """Every tensor with its shape, slowest axis first."""
    if isinstance(model, OfConfig):
        yield from model.shapes
        return
    hidden = model.key("embedding_length")
    if not model.tied:
        yield "output.weight", (model.vocabulary, hidden)
    yield "token_embd.weight", (model.vocabulary, hidden)
    for number in range(model.key("block_count")):
        for name, shape in layer(model, number):
            yield f"blk.{number}.{name}", shape
    yield "output_norm.weight", (hidden,)


def write_zeros(path: Path, model: Model | OfConfig) -> None:
    """A model file of zeros, matrices in float16, norms and routers in float32 as the converter writes them."""
    writer = gguf.GGUFWriter(path, model.architecture)
    for name, value in model.metadata.items():
        if isinstance(value, bool):
            writer.add_bool(name, value)
        elif isinstance(value, float):
            writer.add_float32(name, value)
        elif isinstance(value, int):
            writer.add_uint32(name, value)
        elif isinstance(value, list):
            writer.add_array(name, value)
        elif name.endswith("scaling.type"):
            writer.add_string(name, value)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list([chr(0x21 + i) for i in range(NARROW_VOCABULARY)])
    writer.add_token_types([1] * NARROW_VOCABULARY)
    writer.add_token_merges(["! !"])
    for name, shape in shapes(model):
        plain = len(shape) == 1 or name.endswith(".bias") or any(part in name for part in PLAIN)
        writer.add_tensor(name, np.broadcast_to(np.zeros((), np.float32 if plain else np.float16), shape))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class _Params(c.Structure):
    """llama_model_quantize_params, and room: a struct returned and passed through memory may be larger than the real one."""

    _fields_ = (("threads", c.c_int32), ("file_type", c.c_int32), ("rest", c.c_uint8 * 1016))


def quantize(source: Path, target: Path, file_type: int) -> None:
    """Calls llama.cpp's quantizer on one thread."""
    bins = Path(os.environ["LLAMA_BINS"])
    c.CDLL(str(bins / "libggml-base.so"), c.RTLD_GLOBAL)
    ggml = c.CDLL(str(bins / "libggml.v0.5.0.so"), c.RTLD_GLOBAL)
    ggml.ggml_backend_load.restype = c.c_void_p
    assert ggml.ggml_backend_load(str(bins / "libggml-cpu-haswell.so").encode())
    llama = c.CDLL(str(bins / "libllama.v0.5.0.so"), c.RTLD_GLOBAL)
    llama.llama_model_quantize_default_params.restype = _Params
    llama.llama_model_quantize.argtypes = [c.c_char_p, c.c_char_p, c.POINTER(_Params)]
    params = llama.llama_model_quantize_default_params()
    assert params.file_type == 7, "another llama.cpp: its default file type was 7, Q8_0"
    params.threads, params.file_type = 1, file_type
    assert llama.llama_model_quantize(str(source).encode(), str(target).encode(), params) == 0


HEADS = {"attention.head_count": 32, "attention.head_count_kv": 4, "attention.key_length": 128, "attention.value_length": 128}
EPS = {"attention.layer_norm_rms_epsilon": 1e-6}


def qwen35(name: str, layers: int, hidden: int, width: int, heads: int, kv_heads: int, value_heads: int, tied: bool) -> Model:
    """A model of Qwen3.5, 3.6 or 3.8; with experts if `width` is 0."""
    experts = {"expert_count": 256, "expert_used_count": 8, "expert_feed_forward_length": 512}
    experts["expert_shared_feed_forward_length"] = 512
    keys = {
        "block_count": layers,
        "context_length": 262144,
        "embedding_length": hidden,
        **({"feed_forward_length": width} if width else experts),
        "attention.head_count": heads,
        "attention.head_count_kv": kv_heads,
        "attention.key_length": 256,
        "attention.value_length": 256,
        **EPS,
        "rope.freq_base": 1e7,
        "rope.dimension_count": 64,
        "rope.dimension_sections": [11, 11, 10, 0],
        "ssm.conv_kernel": 4,
        "ssm.state_size": 128,
        "ssm.group_count": 16,
        "ssm.time_step_rank": value_heads,
        "ssm.inner_size": 128 * value_heads,
        "full_attention_interval": 4,
    }
    stem = name.lower().replace(" ", "-")
    return Model(f"{stem}-q4_k_m", "qwen35" if width else "qwen35moe", name, 248320, tied, keys)


MODELS: list[Model | OfConfig] = [
    Model("qwen3-30b-a3b-q4_k_m", "qwen3moe", "Qwen3 30B A3B", 151936, False, {
        "block_count": 48, "context_length": 40960, "embedding_length": 2048, "feed_forward_length": 6144, **HEADS, **EPS,
        "rope.freq_base": 1e6, "expert_count": 128, "expert_used_count": 8, "expert_feed_forward_length": 768,
    }),
    Model("gpt-oss-20b-mxfp4", "gpt-oss", "Gpt Oss 20b", 201088, False, {
        "block_count": 24, "context_length": 131072, "embedding_length": 2880, "feed_forward_length": 2880,
        "attention.head_count": 64, "attention.head_count_kv": 8, "attention.key_length": 64, "attention.value_length": 64,
        "attention.layer_norm_rms_epsilon": 1e-5, "attention.sliding_window": 128, "rope.freq_base": 150000.0,
        "rope.scaling.type": "yarn", "rope.scaling.factor": 32.0, "rope.scaling.original_context_length": 4096,
        "expert_count": 32, "expert_used_count": 4, "expert_feed_forward_length": 2880,
    }),
    qwen35("Qwen3.6 35B A3B", 40, 2048, 0, 16, 2, 32, False),
    qwen35("Qwen3.6 27B", 64, 5120, 17408, 24, 4, 48, False),
    qwen35("Qwen3.5 9B", 32, 4096, 12288, 16, 4, 32, False),
    qwen35("Qwen3.5 4B", 32, 2560, 9216, 16, 4, 32, True),
    qwen35("Qwen3.5 2B", 24, 2048, 6144, 8, 2, 16, True),
    qwen35("Qwen3.5 0.8B", 24, 1024, 3584, 8, 2, 16, True),
]  # fmt: skip


GEMMA = {"hidden_activation": "gelu_pytorch_tanh", "rms_norm_eps": 1e-6, "tie_word_embeddings": True, "vocab_size": 262144}


def gemma3(size: str, layers: int, hidden: int, width: int, heads: int, kv_heads: int, head: int, scalar: int) -> OfConfig:
    """A model of Gemma 3 (text); GGUF files are without the rows of pictures in its embedding."""
    content = GEMMA | {
        "architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text", "num_hidden_layers": layers,
        "hidden_size": hidden, "intermediate_size": width, "num_attention_heads": heads, "num_key_value_heads": kv_heads,
        "head_dim": head, "query_pre_attn_scalar": scalar, "max_position_embeddings": 131072, "sliding_window": 1024,
        "rope_theta": 1e6, "rope_local_base_freq": 1e4, "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
    }  # fmt: skip
    return OfConfig(f"gemma-3-{size}-it-q4_k_m", f"Gemma 3 {size} It", "gemma", content)


def gemma4(size: str, layers: int, period: int, hidden: int, width: int, heads: int, kv_heads: int, **more: Any) -> OfConfig:
    """A model of Gemma 4 (text), as its publisher's own code has it."""
    content = GEMMA | {
        "architectures": ["Gemma4ForCausalLM"], "model_type": "gemma4_text", "num_hidden_layers": layers,
        "layer_types": ["sliding_attention" if (n + 1) % period else "full_attention" for n in range(layers)],
        "hidden_size": hidden, "intermediate_size": width, "num_attention_heads": heads, "num_key_value_heads": kv_heads,
        "head_dim": 256, "global_head_dim": 512, "hidden_size_per_layer_input": 0, "final_logit_softcapping": 30.0,
        "rope_parameters": {
            "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
    }  # fmt: skip
    large = {"sliding_window": 1024, "max_position_embeddings": 262144, "attention_k_eq_v": True}
    small = {"sliding_window": 512, "max_position_embeddings": 131072, "hidden_size_per_layer_input": 256}
    content |= (small if "num_kv_shared_layers" in more else large) | more
    return OfConfig(f"gemma-4-{size.lower()}-it-q4_k_m", f"Gemma 4 {size} It", "apache-2.0", content)


MIXED = {"hidden_act": "silu", "n_group": 1, "topk_group": 1, "rms_norm_eps": 1e-5, "first_k_dense_replace": 1}
LFM2 = {"norm_eps": 1e-5, "vocab_size": 65536, "hidden_size": 2048, "num_attention_heads": 32, "num_key_value_heads": 8,
        "max_position_embeddings": 128000, "rope_theta": 1e6, "conv_L_cache": 3, "conv_bias": False,
        "tie_word_embeddings": True}  # fmt: skip
MODELS += [
    OfConfig("glm-4.5-air-q4_k_m", "GLM 4.5 Air", "mit", MIXED | {
        "architectures": ["Glm4MoeForCausalLM"], "model_type": "glm4_moe", "num_hidden_layers": 46, "hidden_size": 4096,
        "intermediate_size": 10944, "num_attention_heads": 96, "num_key_value_heads": 8, "head_dim": 128,
        "vocab_size": 151552, "max_position_embeddings": 131072, "rope_theta": 1e6, "partial_rotary_factor": 0.5,
        "attention_bias": True, "use_qk_norm": False, "n_routed_experts": 128, "n_shared_experts": 1,
        "num_experts_per_tok": 8, "moe_intermediate_size": 1408, "norm_topk_prob": True, "routed_scaling_factor": 1.0,
        "num_nextn_predict_layers": 1, "tie_word_embeddings": False,
    }),
    OfConfig("glm-4.7-flash-q4_k_m", "GLM 4.7 Flash", "mit", MIXED | {
        "architectures": ["Glm4MoeLiteForCausalLM"], "model_type": "glm4_moe_lite", "num_hidden_layers": 47,
        "hidden_size": 2048, "intermediate_size": 10240, "num_attention_heads": 20, "num_key_value_heads": 20,
        "q_lora_rank": 768, "kv_lora_rank": 512, "qk_nope_head_dim": 192, "qk_rope_head_dim": 64, "v_head_dim": 256,
        "vocab_size": 154880, "max_position_embeddings": 202752, "rope_theta": 1e6, "n_routed_experts": 64,
        "n_shared_experts": 1, "num_experts_per_tok": 4, "moe_intermediate_size": 1536, "norm_topk_prob": True,
        "routed_scaling_factor": 1.8, "num_nextn_predict_layers": 1, "tie_word_embeddings": False,
    }),
    OfConfig("deepseek-v2-lite-q4_k_m", "DeepSeek V2 Lite Chat", "deepseek", MIXED | {
        "architectures": ["DeepseekV2ForCausalLM"], "model_type": "deepseek_v2", "num_hidden_layers": 27, "hidden_size": 2048,
        "intermediate_size": 10944, "num_attention_heads": 16, "num_key_value_heads": 16, "q_lora_rank": None,
        "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "vocab_size": 102400,
        "max_position_embeddings": 163840, "rope_theta": 10000, "n_routed_experts": 64, "n_shared_experts": 2,
        "num_experts_per_tok": 6, "moe_intermediate_size": 1408, "norm_topk_prob": False, "routed_scaling_factor": 1.0,
        "topk_method": "greedy", "scoring_func": "softmax", "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
        "rope_scaling": {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096, "beta_fast": 32,
                         "beta_slow": 1, "mscale": 0.707, "mscale_all_dim": 0.707},
    }),
    gemma3("4b", 34, 2560, 10240, 8, 4, 256, 256),
    gemma3("12b", 48, 3840, 15360, 16, 8, 256, 256),
    gemma3("27b", 62, 5376, 21504, 32, 16, 128, 168),
    gemma4("E2B", 35, 5, 1536, 6144, 8, 1, num_kv_shared_layers=20, use_double_wide_mlp=True),
    gemma4("E4B", 42, 6, 2560, 10240, 8, 2, num_kv_shared_layers=18),
    gemma4("26B-A4B", 30, 6, 2816, 2112, 16, 8, num_global_key_value_heads=2, enable_moe_block=True, num_experts=128,
           top_k_experts=8, moe_intermediate_size=704),
    gemma4("31B", 60, 6, 5376, 21504, 32, 16, num_global_key_value_heads=4),
    OfConfig("lfm2-1.2b-q4_k_m", "LFM2 1.2B", "lfm1.0", LFM2 | {
        "architectures": ["Lfm2ForCausalLM"], "model_type": "lfm2", "num_hidden_layers": 16, "block_ff_dim": 12288,
        "block_auto_adjust_ff_dim": True, "block_ffn_dim_multiplier": 1.0, "block_multiple_of": 256,
        "full_attn_idxs": [2, 5, 8, 10, 12, 14],
    }),
    OfConfig("lfm2-8b-a1b-q4_k_m", "LFM2 8B A1B", "lfm1.0", LFM2 | {
        "architectures": ["Lfm2MoeForCausalLM"], "model_type": "lfm2_moe", "num_hidden_layers": 24,
        "intermediate_size": 7168, "moe_intermediate_size": 1792, "num_experts": 32, "num_experts_per_tok": 4,
        "num_dense_layers": 2, "use_expert_bias": True, "norm_topk_prob": True, "routed_scaling_factor": 1.0,
        "layer_types": ["full_attention" if n in (2, 6, 10, 14, 18, 21) else "conv" for n in range(24)],
    }),
]  # fmt: skip


def main() -> None:
    """Command line."""
    for model in MODELS:
        if sys.argv[1:] and model.file not in sys.argv[1:]:
            continue
        with tempfile.TemporaryDirectory() as folder:
            source, target = Path(folder, "f16.gguf"), Path(folder, "quantized.gguf")
            write_zeros(source, model.narrow)
            quantize(source, target, model.metadata["general.file_type"])
            types = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(target).tensors}
        tensors = [[name, types.pop(name), list(shape)] for name, shape in shapes(model)]
        assert not types, types
        rows = ",\n".join(json.dumps(tensor) for tensor in tensors)
        (OUT / f"{model.file}.json").write_text(
            f'{{"metadata": {json.dumps(model.metadata, indent=1)},\n"tensors": [\n{rows}\n]}}\n'
        )
        numbers = sum(math.prod(shape) for _, _, shape in tensors)
        print(f"{model.file}: {numbers:,} numbers", flush=True)


if __name__ == "__main__":
    main()
