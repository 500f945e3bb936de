"""Tiny checkpoint directories for tests that damage or read them: sound ones from tests/goldens/directories."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from support.goldens import tiny_directories
from support.goldens.tiny_directories import Packing, Spec

SMALL = {"layers": 1, "hidden": 64, "heads": 2, "kv_heads": 1, "head_dim": 32, "ff": 64}
LLAMA = Spec("llama", "LlamaForCausalLM", **SMALL)
MOE = Spec("moe", "Qwen3MoeForCausalLM", **SMALL, experts=4, top_k=2, expert_ff=32, config={"norm_topk_prob": True})
GPTQ = Spec("gptq", "LlamaForCausalLM", "F16", **SMALL, packing=Packing("gptq", 4, 32, symmetric=False, ordered=True))


def write(spec: Spec, path: Path, config: dict[str, Any] | None = None) -> Path:
    """The directory of a spec, `config` in place of some keys of its config.json (None drops one)."""
    tiny_directories.write(spec, path)
    if config:
        edit(path / "config.json", lambda content: content.update(config))
        edit(path / "config.json", lambda content: [content.pop(key) for key, value in config.items() if value is None])
    return path


def edit(path: Path, change: Callable[[Any], object]) -> None:
    """Changes the content of a JSON file."""
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


Entries = dict[str, tuple[str, tuple[int, ...], bytes]]


def edit_tensors(path: Path, change: Callable[[Entries], object]) -> None:
    """Changes the tensors of a safetensors file: {name: (dtype, shape, bytes)}."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    header.pop("__metadata__", None)
    entries: Entries = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        entries[name] = entry["dtype"], tuple(entry["shape"]), raw[8 + length + begin : 8 + length + end]
    change(entries)
    path.write_bytes(tiny_directories.safetensors([(name, *entry) for name, entry in entries.items()]))
