"""Loads a model: finds the file, checks all of it, then streams the weights to the device."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Mapping
from numbers import Integral
from pathlib import Path

import jax
from jax.sharding import Mesh

from ferrum_jax import adapters as lora
from ferrum_jax import checks, hub, memory
from ferrum_jax.chat import check_template
from ferrum_jax.config import EncoderConfig, ModelConfig
from ferrum_jax.distributed import Placement
from ferrum_jax.distributed.placement import mesh_sizes
from ferrum_jax.embedding import EmbeddingModel
from ferrum_jax.errors import ModelFileError, UnsupportedModelError
from ferrum_jax.implementation import checked_implementation, require_implementation
from ferrum_jax.model import Model
from ferrum_jax.programs import enable_compilation_cache
from ferrum_jax.runtime import PAGE
from ferrum_jax.state import kv_dtype as named_kv_dtype
from ferrum_jax.tokenizer import Tokenizer
from ferrum_jax.units import readable_bytes, shown_dtype
from ferrum_jax.weights.adapter import read_adapter
from ferrum_jax.weights.names import Parameters, parameters
from ferrum_jax.weights.opening import open_model
from ferrum_jax.weights.quantize import checked_format
from ferrum_jax.weights.source import ModelSource
from ferrum_jax.weights.stream import Progress, abstract_parameters, fitted, read_parameters
from pallas_kernels import native
from pallas_kernels.dispatch import Target

DTYPES = ("float32", "bfloat16", "float16", "int8")
_LOG = logging.getLogger(__name__)


def load(
    source: str | Path,
    *,
    dtype: str = "auto",
    kv_dtype: str | None = None,
    device: jax.Device | None = None,
    mesh: Mesh | str | None = None,
    max_seq_len: int | None = None,
    quantize: str | None = None,
    adapters: Mapping[str, str | Path] | None = None,
    merge_adapter: str | Path | None = None,
    implementation: Mapping[str, str] | None = None,
    progress: Progress | None = None,
) -> Model | EmbeddingModel:
    """Loads a model. Its weights stay compressed as they are in the file.

    Args:
      source: path of a .gguf file (any part of a split one) or of a checkpoint directory (config.json and safetensors), an
        alias ("smollm2:135m"), or "owner/repo[:file or quantization]" on the Hugging Face hub.
      dtype: arithmetic of activations: "float32" (exact), "bfloat16", "float16" or "int8" (CPU only: activations are quantized
        in blocks inside products). "auto" chooses the fast one for the device, and float32 for an embedding model.
      kv_dtype: dtype of the KV cache; None: the same as dtype (float16 for int8).
      device: where the weights go; None: JAX's first device.
      mesh: several devices, instead of `device`: a `jax.sharding.Mesh` whose axes are among "expert" and "tensor", or a text
        such as "expert=4,tensor=2" over JAX's first devices. What cannot be cut evenly is whole on every device.
      max_seq_len: limit of the context in tokens; None: the model's. An embedding model cuts texts there.
      quantize: a block format, such as "q4_k" (weights.quantize.QUANTIZATIONS), to which the matrices of a checkpoint in F32,
        F16 or BF16 are quantized while they are read.
      adapters: directories (PEFT) or GGUF files of LoRA adapters, each under a name that `generate` and other methods accept.
        They are applied at run time in float32, with compressed weights too.
      merge_adapter: an adapter to add to the weights of a checkpoint in F32, F16 or BF16 while they are read, before
        `quantize`.
      implementation: backends by operation, as in {"paged_attention": "xla"}, to use instead of the first that can serve
        (`pallas_kernels.operations.OPERATIONS`; `doctor --all` lists them).
      progress: a function that is called with (bytes done, total bytes or None, text).

    Returns:
      A `Model`, or for the BERT family an `EmbeddingModel`.

    Raises:
      ModelNotFoundError: if no source has the model.
      ModelFileError: if a file is damaged or inconsistent.
      UnsupportedModelError: if the file needs something that ferrum_jax does not support.
      OutOfMemoryError: if the weights do not fit the device; raised before any of them is read.
      ValueError: if an argument is wrong.
    """
    begin = time.perf_counter()
    _check_place(device, mesh)
    source = checks.path(source, "source")
    for name, directory in (("merge_adapter", merge_adapter), *(adapters.items() if isinstance(adapters, Mapping) else ())):
        if directory is not None:
            checks.path(directory, f"{name}, the directory of an adapter,")
    if progress is not None and not callable(progress):
        raise ValueError(
            f"progress must be a function of (bytes done, bytes in all or None, text), not {checks.kind(progress)}"
        )
    dtype = checks.dtype_name(dtype)
    if dtype not in (*DTYPES, "auto"):
        raise ValueError(f"dtype {dtype!r} is not supported; supported: auto, {', '.join(DTYPES)}")
    kv_dtype = None if kv_dtype is None else named_kv_dtype(kv_dtype)
    if max_seq_len is not None and (isinstance(max_seq_len, bool) or not isinstance(max_seq_len, Integral) or max_seq_len < 2):
        raise ValueError(f"max_seq_len must be an integer of at least 2, not {max_seq_len!r}")

    if adapters is not None and not (
        isinstance(adapters, Mapping) and all(name and isinstance(name, str) for name in adapters)
    ):
        raise ValueError(f"adapters must be directories or files by name, as in {{'name': 'path'}}, not {adapters!r:.200}")
    forced = checked_implementation(implementation)
    checked_format(quantize)
    path = hub.resolve(str(source), progress=progress)
    enable_compilation_cache()
    with open_model(path, quantize=quantize, merge_adapter=merge_adapter) as checkpoint:
        placement = _placement(device, mesh)
        if (encoder := checkpoint.encoder()) is not None:
            _refuse_mesh(placement, f"{path}: an embedding model ({encoder.architecture})")
            if adapters:
                raise UnsupportedModelError(f"{path}: adapters are for decoders, not for an embedding model")
            dtype = _dtype(placement, "float32" if dtype == "auto" else dtype, progress)
            encoder = dataclasses.replace(encoder, dtype=dtype, implementation=forced)
            embedding = _load_encoder(checkpoint, encoder, placement, max_seq_len, progress)
            embedding.load_s = time.perf_counter() - begin
            return embedding
        if adapters:
            _refuse_mesh(placement, "adapters: a model with LoRA adapters")
        config, assigned, tokenizer = check(checkpoint)
        placement = fitted(placement, assigned, config)
        if progress is not None and placement.mesh.shape.get("tensor", 1) > 1 and not placement.rules["heads"]:
            progress(0, None, f"attention is whole on every device: its heads cannot be cut evenly over {placement}")
        dtype = _dtype(placement, dtype, progress)
        kv_dtype = kv_dtype or ("float16" if dtype == "int8" else dtype)
        config = dataclasses.replace(config, dtype=dtype, implementation=forced)
        beside = {name: read_adapter(directory, config, checkpoint) for name, directory in (adapters or {}).items()}
        factors = [adapter.factors for adapter in beside.values()]
        if max_seq_len is not None and max_seq_len > config.context_length:
            raise ValueError(f"max_seq_len {max_seq_len} is beyond the model's context of {config.context_length} tokens")
        max_seq_len = max_seq_len or config.context_length
        abstract = abstract_parameters(assigned, placement)
        if forced:
            require_implementation(config, abstract, kv_dtype, placement)
        weights = memory.nbytes(abstract) + lora.nbytes(factors)
        cache = memory.abstract_state(config, -(-max_seq_len // PAGE), PAGE, kv_dtype, placement)
        count = (
            f"{path}: weights {readable_bytes(weights)}, KV cache {readable_bytes(memory.nbytes(cache))} for one row of "
            f"{max_seq_len:,} tokens ({shown_dtype(kv_dtype)})"
        )
        memory.require(weights, placement, f"the weights do not fit: {count}")
        with memory.explained(placement, lambda: f"loading {count}"):
            params = read_parameters(checkpoint, assigned, placement, progress)
            if factors:
                params = lora.with_adapters(params, factors, config.num_layers, placement)
    digests = {name: adapter.digest for name, adapter in beside.items()}
    model = Model(config, params, tokenizer, placement, kv_dtype, max_seq_len, digests)
    model._runtime.load_s = time.perf_counter() - begin
    return model


def _check_place(device: jax.Device | None, mesh: Mesh | str | None) -> None:
    """Raises ValueError if the arguments of `load` are not a device or a mesh. Does not start JAX's devices."""
    if device is not None and not isinstance(device, jax.Device):
        raise ValueError(f"device must be a jax.Device, as in jax.devices(), not {device!r}")
    if mesh is None:
        return
    if device is not None:
        raise ValueError("device and mesh are both given; a mesh has its devices")
    if not isinstance(mesh, Mesh | str):
        raise ValueError(f'mesh must be a jax.sharding.Mesh or a text such as "expert=4,tensor=2", not {mesh!r:.200}')


def _placement(device: jax.Device | None, mesh: Mesh | str | None) -> Placement:
    """Raises ValueError for a mesh that cannot be."""
    if mesh is None:
        return Placement.of(device)
    sizes = mesh_sizes(mesh) if isinstance(mesh, str) else mesh.shape
    if (rows := sizes.get("data", 1)) > 1:
        raise ValueError(f"mesh: data={rows} is not supported yet; models are cut over expert and tensor alone")
    return Placement.named(sizes) if isinstance(mesh, str) else Placement.over(mesh)


def _refuse_mesh(placement: Placement, what: str) -> None:
    """UnsupportedModelError for a placement of several devices."""
    if placement.size > 1:
        raise UnsupportedModelError(f"{what} is not supported on a mesh of several devices yet; leave out mesh")


def _dtype(placement: Placement, dtype: str, progress: Progress | None) -> str:
    """Chooses the default after the file was checked. Builds the CPU kernels if the dtype may need them."""
    if dtype == "int8" and placement.platform != "cpu":
        raise ValueError(f'dtype "int8" is for CPUs, not {placement.platform}')
    if dtype in ("auto", "int8") and placement.platform == "cpu":
        native.prepare(progress)
        if reason := native.refusal():
            _LOG.warning("the C++ kernels for CPUs are not used: %s", reason)
    return auto_dtype(placement.target) if dtype == "auto" else dtype


def validate(path: str | Path) -> None:
    """Checks a checkpoint as `load` does, without reading weights. Raises what `load` would raise."""
    with open_model(path) as checkpoint:
        encoder = checkpoint.encoder()
        check(checkpoint) if encoder is None else _assigned(checkpoint, encoder)


def _load_encoder(
    checkpoint: ModelSource, config: EncoderConfig, placement: Placement, max_seq_len: int | None, progress: Progress | None
) -> EmbeddingModel:
    if max_seq_len is not None and max_seq_len > config.context_length:
        raise ValueError(f"max_seq_len {max_seq_len} is beyond the model's {config.context_length} positions")
    assigned, tokenizer = _assigned(checkpoint, config)
    abstract = abstract_parameters(assigned, placement)
    if config.implementation:
        require_implementation(config, abstract, "float32", placement)
    weights = memory.nbytes(abstract)
    count = f"{checkpoint.path}: weights {readable_bytes(weights)}"
    memory.require(weights, placement, f"the weights do not fit: {count}")
    with memory.explained(placement, lambda: f"loading {count}"):
        params = read_parameters(checkpoint, assigned, placement, progress)
    return EmbeddingModel(config, params, tokenizer, placement, max_seq_len or config.text_length)


def check(checkpoint: ModelSource) -> tuple[ModelConfig, Parameters, Tokenizer]:
    """The configuration, the parameter of every tensor and the tokenizer. Raises an error if something is wrong."""
    config = checkpoint.config()
    assigned, tokenizer = _assigned(checkpoint, config)
    for name, template in tokenizer.chat_templates.items():
        check_template(template, str(checkpoint.path), name)
    return config, assigned, tokenizer


def _assigned(checkpoint: ModelSource, config: ModelConfig | EncoderConfig) -> tuple[Parameters, Tokenizer]:
    assigned = parameters(checkpoint, config)
    tokenizer = checkpoint.tokenizer()
    if tokenizer.vocab_size > config.vocab_size and "tokenizer.ggml.tokens" in checkpoint.metadata:
        raise ModelFileError(
            f"{checkpoint.path}: the tokenizer (tokenizer.ggml.tokens) has {tokenizer.vocab_size} tokens, but tensor "
            f"{checkpoint.own_name('token_embd.weight')} has only {config.vocab_size} rows"
        )
    return assigned, tokenizer


def auto_dtype(target: Target) -> str:
    """The dtype that "auto" chooses: float16 on GPUs below compute capability 8.0, bfloat16 on other accelerators. On CPUs int8
    if the kernels are available, otherwise float32, because only some CPUs multiply bfloat16 faster."""
    if target.platform == "cpu":
        return "int8" if native.refusal() is None else "float32"
    return "float16" if (0, 0) < target.capability < (8, 0) else "bfloat16"
