"""LoRA adapters: as PEFT writes them, adapter_config.json and adapter_model.safetensors in one directory; or in a GGUF file
(adapter_gguf.py).

The one idea: an adapter is a table of pairs (A, B) by parameter path, checked against the model's configuration before anything
is computed. At run time (x A^T) B^T is added to x W^T; a merge adds B A to W. As in families/keys.py, an unknown key that might
change the result is refused by name.

Experts are what PEFT calls target_parameters, and their tensors do not name them: of two parameters of a module,
`base_layer.lora_*` is gate_up_proj and `lora_*` down_proj; of one it is `lora_*`. lora_A is [experts * rank, in] with the
expert outermost, lora_B [out, rank * experts] with the rank outermost.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import math
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ferrum_jax import families
from ferrum_jax.adapters import Factors
from ferrum_jax.config import LayerSpec, ModelConfig
from ferrum_jax.errors import ModelFileError, ModelNotFoundError, UnsupportedModelError
from ferrum_jax.families.keys import Keys
from ferrum_jax.families.table import Change, Tensor
from ferrum_jax.families.table import Path as TensorPath
from ferrum_jax.files.json_file import open_regular, read_object
from ferrum_jax.files.tensor_info import TensorInfo
from ferrum_jax.weights.adapter_gguf import read_adapter_file
from ferrum_jax.weights.opened import read_range
from ferrum_jax.weights.quantize import PLAIN, plain_numbers
from ferrum_jax.weights.safetensors import parse_header
from ferrum_jax.weights.source import ModelSource
from ferrum_jax.weights.tied import same_numbers
from ferrum_jax.weights.wrapped import innermost

_CONFIG, _TENSORS, _PICKLED = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
_READ = {"peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "bias", "init_lora_weights",
          "modules_to_save", "target_parameters"}  # fmt: skip
# Keys about training, the adapter's origin or initialization alone, or that repeat what the tensors themselves show.
_HARMLESS = {
    "auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying", "eva_config", "exclude_modules",
    "fan_in_fan_out", "inference_mode", "layers_pattern", "layers_to_transform", "loftq_config", "lora_dropout",
    "lora_ga_config", "megatron_core", "peft_version", "qalora_group_size", "revision", "runtime_config",
    "target_modules", "task_type",
}  # fmt: skip
_STARTS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")  # these change the factors alone
_LARGEST = 2.0**64
_FACTOR = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")
# Tensors that an adapter may hold copies of, and what stands for them if the model lacks them: a tied output is the embedding.
_COPIED = {"token_embd.weight": "token_embd.weight", "output.weight": "token_embd.weight"}
_BOTH = {"gate_up_proj", "down_proj"}  # the parameters of experts
_PLAIN_PATTERN = re.compile(r"\^?[\w.]+")


@dataclasses.dataclass(frozen=True)
class Adapter:
    """`factors` of the model's matrices, with the scale (alpha / rank) included in B; `digest`: of everything that was read."""

    path: Path
    digest: str
    factors: Factors


def read_adapter(path: str | Path, config: ModelConfig, base: ModelSource | None = None) -> Adapter:
    """Reads a PEFT directory or a GGUF file whose adapter is for a model of this configuration. base: the open checkpoint; a
    copy of its embedding or output matrix, which PEFT writes after a resize, is skipped if it is equal.

    Raises ModelNotFoundError if there is neither, ModelFileError for anything that is damaged, missing or does not fit the
    model, and UnsupportedModelError for adapters other than LoRA, for matrices other than those of attention and dense
    feed-forward, and for pickled files.
    """
    path = Path(path)
    if path.suffix == ".gguf" and path.exists():
        of_file, digest = read_adapter_file(path, config)
        return Adapter(path, digest, of_file)
    if not path.is_dir():
        raise ModelNotFoundError(
            f"{path}: an adapter is a directory with {_CONFIG} and {_TENSORS}, or a .gguf file; there is none"
        )
    settings = _settings(path)
    raw, digest = _read(path, config, settings, base)
    factors: dict[tuple[int, TensorPath], tuple[np.ndarray, np.ndarray]] = {}
    for (layer, parameter, module), pair in raw.items():
        if missing := {"A", "B"} - pair.keys():
            raise ModelFileError(f"{path / _TENSORS}: module {module} has no lora_{missing.pop()}")
        a, b = pair["A"], pair["B"]
        if a.shape[-2] != b.shape[-1]:
            raise ModelFileError(f"{path / _TENSORS}: module {module}: lora_A has rank {a.shape[-2]}, lora_B {b.shape[-1]}")
        rank = _of_module(settings["rank_pattern"], module, settings["r"])
        if a.shape[-2] != rank:
            raise ModelFileError(
                f"{path / _CONFIG}: module {module} has rank {rank} by the keys r and rank_pattern; its tensors have rank "
                f"{a.shape[-2]}"
            )
        alpha = _of_module(settings["alpha_pattern"], module, settings["lora_alpha"])
        with np.errstate(over="ignore"):
            b = b * np.float32(alpha / (math.sqrt(rank) if settings["use_rslora"] else rank))
        if not np.isfinite(b).all():
            raise ModelFileError(f"{path / _TENSORS}: module {module}: lora_B times alpha {alpha} / rank is beyond float32")
        tensor = families.of_architecture(config.architecture, str(path)).tensors.at(parameter)
        factors[layer, parameter] = _by_matrix(tensor, config.layers[layer], a, b)
    if not factors:
        raise ModelFileError(f"{path / _TENSORS}: has no tensor")
    return Adapter(path, digest, factors)


def _by_matrix(tensor: Tensor | None, spec: LayerSpec, a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The factors of a matrix, or of each of the matrices that the rows of one became: [matrices, ...]."""
    change = next((part for part in tensor.modules if isinstance(part, Change)), None) if tensor else None
    if change is None or change.matrices is None:
        return a, b
    count = change.matrices(spec)
    b = b.reshape(count, -1, b.shape[1])
    a = np.broadcast_to(a, (count, *a.shape))
    return (b.swapaxes(1, 2), a.swapaxes(1, 2)) if change.turned else (a, b)


def _size(shape: Sequence[int], change: Change | None) -> tuple[int, int]:
    """Rows and columns of the matrix, or of the part of one, that becomes a tensor of this shape."""
    if change is None or change.matrices is None:
        return shape[0], shape[1]
    count, rows, columns = shape
    return (count * columns, rows) if change.turned else (count * rows, columns)


def _settings(path: Path) -> dict[str, Any]:
    """The keys that matter, checked."""
    file = path / _CONFIG
    content = read_object(file)
    if content is None:
        raise ModelFileError(f"{file}: is missing; an adapter is a directory as PEFT writes it")
    if (kind := content.get("peft_type")) != "LORA":
        raise UnsupportedModelError(f"{file}: key peft_type: {kind!r} is not supported; supported: 'LORA'")
    keys = Keys(content, "", str(file))
    keys.ignore(*_READ, *_HARMLESS)
    keys.judge("{} is not supported")
    if (bias := content.get("bias", "none")) != "none":
        raise UnsupportedModelError(f"{file}: key bias: {bias!r} is not supported: biases cannot be adapted")
    start = content.get("init_lora_weights", True)
    if start not in _STARTS:
        raise UnsupportedModelError(
            f"{file}: key init_lora_weights: {start!r} changes the base model's weights too; let PEFT save the adapter "
            "converted to plain LoRA (path_initial_model_for_weight_conversion)"
        )
    rank, alpha = content.get("r"), content.get("lora_alpha")
    patterns = {key: content.get(key) or {} for key in ("rank_pattern", "alpha_pattern")}
    for key, pattern in patterns.items():
        if not isinstance(pattern, dict):
            raise ModelFileError(f"{file}: key {key}: must be an object, not {pattern!r:.200}")
        if wrong := next((name for name in pattern if not _PLAIN_PATTERN.fullmatch(name)), None):
            raise UnsupportedModelError(
                f"{file}: key {key}: {wrong!r:.200} is not a module name; regular expressions are not supported"
            )
    for key, value in [("r", rank), *(("rank_pattern", value) for value in patterns["rank_pattern"].values())]:
        if type(value) is not int or value < 1:
            raise ModelFileError(f"{file}: key {key}: a rank must be a positive integer, not {value!r:.200}")
    for key, value in [("lora_alpha", alpha), *(("alpha_pattern", value) for value in patterns["alpha_pattern"].values())]:
        if isinstance(value, bool) or not isinstance(value, int | float) or not -_LARGEST <= value <= _LARGEST:
            raise ModelFileError(f"{file}: key {key}: alpha must be a number of sane size, not {value!r:.200}")
    if not isinstance(content.get("use_rslora", False), bool):
        raise ModelFileError(f"{file}: key use_rslora: must be true or false")
    used = {"r": rank, "lora_alpha": alpha, "use_rslora": content.get("use_rslora", False), **patterns}
    saved = content.get("modules_to_save")
    parameters = content.get("target_parameters") or []
    if not isinstance(parameters, list) or not all(isinstance(name, str) for name in parameters):
        raise ModelFileError(f"{file}: key target_parameters: must be a list of names, not {parameters!r:.200}")
    return used | ({"modules_to_save": saved} if saved else {}) | ({"target_parameters": parameters} if parameters else {})


def _of_module(pattern: Mapping[str, Any], module: str, default: Any) -> Any:
    """The value of the first name in the pattern that the module's name ends with (or, if it begins with ^, equals), or
    `default`."""
    for name, value in pattern.items():
        if module == name.removeprefix("^") or (not name.startswith("^") and module.endswith("." + name)):
            return value
    return default


def _read(
    path: Path, config: ModelConfig, settings: Mapping[str, Any], base: ModelSource | None
) -> tuple[dict[tuple, dict[str, np.ndarray]], str]:
    """The factors by (layer, parameter path, module) and "A" or "B", as float32; and a digest."""
    file = path / _TENSORS
    try:
        opened, status = open_regular(file, ".safetensors")
    except FileNotFoundError:
        if (path / _PICKLED).exists():
            raise UnsupportedModelError(
                f"{path / _PICKLED}: is pickled, which is unsafe: unpickling a file can run any program; only "
                f"{_TENSORS} is read"
            ) from None
        raise ModelFileError(f"{file}: is missing") from None
    family = families.of_architecture(config.architecture, str(path))
    found: dict[tuple, dict[str, np.ndarray]] = {}
    digest = hashlib.blake2b(repr(sorted(settings.items())).encode(), digest_size=16)
    with opened:
        tensors = parse_header(file, opened.fileno(), status.st_size)
        own_names = {f"base_model.model.{family.tensors.own_name(name)}": name for name in _COPIED}
        copies = own_names.keys() & tensors.keys() if base is not None else set()
        _require_copies(path / _CONFIG, settings.get("modules_to_save", []), copies)
        for name, info in sorted(tensors.items()):
            if name in copies:
                assert base is not None
                _compare(opened, info, own_names[name], base)
                continue
            experts = _experts(file, name, config, settings, tensors.keys())
            layer, targets, module, factor = experts[:4] if experts else _place(file, name, config)
            if info.format not in PLAIN:
                raise UnsupportedModelError(f"{file}: tensor {name}: dtype {info.format} is not supported")
            count = family.shape(targets[0][0], config, layer)[0] if experts else 1
            sizes = [_size(family.shape(tensor, config, layer)[bool(experts) :], change) for tensor, change in targets]
            rows, columns = sum(rows for rows, _ in sizes), sizes[0][1]
            fits = info.shape[1:] == (columns,) if factor == "A" else info.shape[:1] == (rows,)
            if len(info.shape) != 2 or 0 in info.shape or not fits or info.shape[factor == "B"] % count:
                rank = f"{count} * rank" if experts else "rank"
                expected = f"[{rank}, {columns}]" if factor == "A" else f"[{rows}, {rank}]"
                raise ModelFileError(f"{file}: tensor {name}: shape {list(info.shape)} does not fit this model: {expected}")
            stored = np.empty(info.shape, PLAIN[info.format])
            read_range(opened, info, stored.reshape(-1).view(np.uint8), 0)
            values = plain_numbers(stored, info.format)
            if not np.isfinite(values).all():
                raise ModelFileError(f"{file}: tensor {name}: holds values that are not finite")
            digest.update(name.encode() + values.tobytes())
            spec = config.layers[layer]
            for number, (tensor, change) in enumerate(targets):
                own = values
                if experts:
                    own = experts.own(values, count, number)
                if change and (order := change.columns if factor == "A" else change.rows):
                    own = values[:, order(spec)] if factor == "A" else values[order(spec)]
                found.setdefault((layer, tensor.path, module), {})[factor] = own
    return found, digest.hexdigest()


class _Experts(NamedTuple):
    """A tensor with a factor of all experts of a layer: the layer, the tensors that its parameter becomes, its name, "A" or
    "B", and whether the rows of those tensors lie in turn."""

    layer: int
    targets: list[tuple[Tensor, Change | None]]
    parameter: str
    factor: str
    interleaved: bool

    def own(self, values: np.ndarray, count: int, number: int) -> np.ndarray:
        """The factor of target `number` for each of `count` experts: [experts, rank, in] or [experts, out, rank]."""
        if self.factor == "A":
            return values.reshape(count, -1, values.shape[1])
        every = values.reshape(len(values), -1, count).transpose(2, 0, 1)
        parts = len(self.targets)
        return every[:, number::parts] if self.interleaved else np.split(every, parts, axis=1)[number]


def _experts(
    file: Path, name: str, config: ModelConfig, settings: Mapping[str, Any], present: Collection[str]
) -> _Experts | None:
    """What a name in the file means if it is of experts; None if it is not."""
    match = _FACTOR.fullmatch(name)
    module, factor = match.groups() if match else ("", "")
    outer = module.removesuffix(".base_layer")
    for family in families.sharing(config.architecture):
        parts = family.tensors.parts(outer)
        layer = family.tensors.layer_of(outer)
        if not parts or layer is None or layer not in config.expert_layers:
            continue
        named = {parameter.rpartition(".")[2] for parameter in settings.get("target_parameters", [])} & parts.keys()
        inner = f"base_model.model.{outer}.base_layer.lora_{factor}.weight" in present
        if named != (_BOTH if inner else named & _BOTH) or len(named) != 1 + inner:
            raise ModelFileError(
                f"{file.parent / _CONFIG}: key target_parameters: {settings.get('target_parameters', [])!r:.200} does not say "
                f"which parameters the tensors of {outer} are of"
            )
        parameter = next(iter(named)) if not inner else "down_proj" if module == outer else "gate_up_proj"
        found = [(family.tensors.find(known)[0], part) for known, part in parts[parameter]]
        targets: list[tuple[Tensor, Change | None]] = [(tensor, None) for tensor, _ in found if tensor]
        return _Experts(layer, targets, f"{outer}.{parameter}", factor, found[0][1].interleaved)
    return None


def _require_copies(file: Path, saved: Any, copies: Collection[str]) -> None:
    """Raises UnsupportedModelError unless every module that PEFT saved whole is one of the copies that will be compared."""
    names = {copy.removesuffix(".weight").rpartition(".")[2] for copy in copies}
    if not isinstance(saved, list) or not {str(module).rpartition(".")[2] for module in saved} <= names:
        raise UnsupportedModelError(f"{file}: key modules_to_save: {saved!r:.200} is not supported")


def _compare(file: io.FileIO, copy: TensorInfo, name: str, base: ModelSource) -> None:
    """Raises UnsupportedModelError unless `copy` in the adapter's file holds the numbers of the tensor `name` of `base`."""
    source = innermost(base)
    name = name if name in source.tensors else _COPIED[name]
    if name not in source.tensors:
        raise ModelFileError(f"{source.path}: tensor {source.own_name('token_embd.weight')}: is missing")
    own = source.tensors[name]

    def fill(info: TensorInfo, out: np.ndarray, start: int) -> None:
        read_range(file, info, out, start)

    if not same_numbers(copy, fill, own, source.read_into):
        kind = "" if own.format in PLAIN else f", which is {own.format} and cannot be compared with a copy that is not"
        raise UnsupportedModelError(
            f"{copy.path}: tensor {copy.name}: {list(copy.shape)} differs from the model's {source.own_name(name)} "
            f"{list(own.shape)}{kind}; "
            "an adapter that changes the embedding or the output is not supported"
        )


def _place(file: Path, name: str, config: ModelConfig) -> tuple[int, list[tuple[Tensor, Change | None]], str, str]:
    """The layer, module and factor that a name in the file means, and the tensors that the module's matrix becomes and how."""
    match = _FACTOR.fullmatch(name)
    layer: int | None = None
    targets: list[tuple[Tensor, Change | None]] = []
    module, factor = match.groups() if match else ("", "")
    for family in families.sharing(config.architecture):
        tensor, layer = family.tensors.find(f"{family.tensors.locate(module)[0]}.weight")
        if tensor is not None:
            targets = [(tensor, None)]
        else:
            changes, layer = family.tensors.changes(f"{module}.weight")
            targets = [(tensor, change) for _, tensor, change in changes]
        if targets:
            break
    if layer is None or not targets or not all(tensor.is_projection or (way and way.matrices) for tensor, way in targets):
        raise UnsupportedModelError(
            f"{file}: tensor {name}: is not supported; LoRA is applied to the projections of attention, of gated delta nets "
            "and of dense feed-forward layers"
        )
    if layer >= config.num_layers:
        raise ModelFileError(f"{file}: tensor {name}: does not fit this model, which has {config.num_layers} layers")
    if not all(tensor.layers(config.layers[layer]) for tensor, _ in targets):
        experts = ".mlp." in module and layer in config.expert_layers
        problem = "is a mixture of experts" if experts else "does not have this projection"
        raise ModelFileError(f"{file}: tensor {name}: does not fit this model: layer {layer} {problem}")
    return layer, targets, module, factor
