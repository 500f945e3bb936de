"""The compiled step: rows that do not affect each other, caches that alias, experts that no token chose, gradients, export."""

import dataclasses
import functools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ferrum_jax import functional as F
from ferrum_jax.models.scan import layer_segments
from ferrum_jax.sampling import Sampling, SamplingParams
from support import environment
from support.random_models import DENSE, MOE, tiny_params

PAGE = 16
RNG = np.random.default_rng(5)
CONFIGS = {"dense": DENSE, "moe": MOE, "window": dataclasses.replace(DENSE, sliding_window=21)}


@functools.cache
def params_of(name: str):
    return tiny_params(CONFIGS[name], lambda matrix, layer: "Q4_0" if "up" in matrix else "Q8_0")


def prompts_of(lengths, vocab=320):
    tokens = np.zeros((len(lengths), max(lengths)), np.int32)
    for row, length in enumerate(lengths):
        tokens[row, :length] = np.random.default_rng(100 + length).integers(0, vocab, length)
    return tokens, np.asarray(lengths, np.int32)


@functools.partial(jax.jit, static_argnames=("chunk", "config"), donate_argnums=1)
def read(params, cache, tokens, lengths, i, *, chunk, config):
    hidden, cache = F.hidden_chunk(params, cache, tokens, lengths, i, chunk=chunk, config=config)
    return F.unembed(params, hidden, config=config), cache


def teacher_forced(name, lengths, chunk, kv="float32"):
    """Logits of all tokens of right-padded prompts, read in chunks: a list of [length, vocab]."""
    config, params = CONFIGS[name], params_of(name)
    tokens, lengths = prompts_of(lengths)
    pages = -(-tokens.shape[1] // PAGE)
    cache = F.new_cache(config, num_pages=len(lengths) * pages, dtype=kv)
    logits = []
    for i in range(-(-int(lengths.sum()) // chunk)):
        out, cache = read(params, cache, tokens, lengths, np.int32(i), chunk=chunk, config=config)
        logits.append(np.asarray(out))
    flat = np.concatenate(logits)[: lengths.sum()]
    return np.split(flat, np.cumsum(lengths)[:-1])


def sampling_of(count, **fields):
    params = [SamplingParams(**{"max_tokens": 9, "temperature": 0.0, "ignore_eos": True, "seed": 7, **fields})] * count
    return Sampling.from_params(params, eos_ids=[1], vocab_limit=320, default_seeds=[0] * count)


@functools.partial(jax.jit, static_argnames=("max_tokens", "config", "logprobs"), donate_argnums=1)
def generate(params, cache, tokens, lengths, sampling, *, max_tokens, config, logprobs=None):
    key = jax.random.key(0)
    return F.generate(params, cache, tokens, lengths, sampling, key, max_tokens=max_tokens, config=config, logprobs=logprobs)


def generated(name, lengths, max_tokens=9, pages=None, logprobs=None, **fields):
    config = CONFIGS[name]
    tokens, lengths = prompts_of(lengths)
    pages = pages or len(lengths) * -(-(tokens.shape[1] + max_tokens) // PAGE)
    cache = F.new_cache(config, num_pages=pages)
    sampling = sampling_of(len(lengths), **fields)
    return generate(params_of(name), cache, tokens, lengths, sampling, max_tokens=max_tokens, config=config, logprobs=logprobs)


def same_bits(a, b) -> bool:
    return a.shape == b.shape and bool((a.view(np.uint32) == b.view(np.uint32)).all())


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_logits_of_a_row_are_bit_equal_alone_in_a_batch_and_chunked(name):
    lengths = [40, 1, 130, 17, 16, 33, 70]  # with all 307 rows XLA would compute the router's softmax otherwise
    together = teacher_forced(name, lengths, chunk=307)
    assert all(np.isfinite(row).all() for row in together)
    chunked = teacher_forced(name, lengths, chunk=50)
    for row, length in enumerate(lengths):
        alone = teacher_forced(name, [length], chunk=length)[0]
        assert same_bits(alone, together[row]), f"length {length}: alone and in a batch"
        assert same_bits(alone, chunked[row]), f"length {length}: whole and in chunks"


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_decoding_gives_the_bits_of_teacher_forcing(name):
    """generate's logprobs, step by step over the cache, against one pass over prompt and output."""
    tokens, lengths, _, sampled = generated(name, [5, 30], logprobs=3)
    tokens, (padded, _) = np.asarray(tokens), prompts_of([5, 30])
    assert lengths.tolist() == [9, 9]
    for row, length in enumerate([5, 30]):
        whole = np.concatenate([padded[row, :length], tokens[row, :-1]])[None].astype(np.int32)
        cache = F.new_cache(CONFIGS[name], num_pages=4)
        lengths_ = np.asarray([whole.shape[1]], np.int32)
        logits, _ = read(params_of(name), cache, whole, lengths_, 0, chunk=whole.shape[1], config=CONFIGS[name])
        forced = np.asarray(logits)[length - 1 :]
        assert (forced.argmax(-1) == tokens[row]).all()
        expected = np.asarray(jax.nn.log_softmax(forced))[np.arange(9), tokens[row]]
        np.testing.assert_allclose(np.asarray(sampled.logprobs)[row, :, 0], expected, atol=2e-6)
        assert (np.asarray(sampled.ids)[row, :, 0] == tokens[row]).all()


@pytest.mark.slow
def test_sampled_tokens_do_not_depend_on_the_batch():
    together = np.asarray(generated("moe", [40, 3, 17], temperature=0.9, top_p=0.95)[0])
    for row, length in enumerate([40, 3, 17]):
        assert np.asarray(generated("moe", [length], temperature=0.9, top_p=0.95)[0])[0].tolist() == together[row].tolist()
    other = np.asarray(generated("moe", [40, 3, 17], temperature=0.9, top_p=0.95, seed=8)[0])
    assert (other != together).any()


@pytest.mark.slow
def test_rows_stop_by_themselves():
    tokens, lengths, _ = generated("dense", [4, 9], max_tokens=12, ignore_eos=False)
    assert lengths.tolist() == [9, 9], "each row's own max_tokens, not the program's"
    assert (np.asarray(tokens)[:, 9:] == -1).all()
    first = int(np.asarray(tokens)[0, 3])
    params = [SamplingParams(max_tokens=12, temperature=0.0)] * 2
    sampling = Sampling.from_params(params, eos_ids=[first], vocab_limit=320, default_seeds=[0, 0])
    padded, counts = prompts_of([4, 9])
    cache = F.new_cache(DENSE, num_pages=4)
    stopped, lengths, _ = generate(params_of("dense"), cache, padded, counts, sampling, max_tokens=12, config=DENSE)
    where = np.asarray(tokens)[0].tolist().index(first)
    assert lengths[0] == where + 1 and np.asarray(stopped)[0, where] == first


def test_a_cache_that_is_too_small_is_refused():
    with pytest.raises(ValueError, match="do not fit into 2 pages of 16; make it 6 pages"):
        generated("dense", [30, 8], max_tokens=9, pages=2)


@pytest.mark.slow
def test_generate_stops_when_every_row_has_stopped():
    """With all rows ended early the loop body must not run on: the cache beyond stays untouched."""
    _, lengths, cache = generated("dense", [4], max_tokens=40)
    assert lengths.tolist() == [9]
    written = np.abs(np.asarray(cache.pages)).sum(axis=(0, 3, 4)).reshape(-1) > 0
    assert written.sum() == 4 + 9 - 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dense", "moe"])
def test_programs_alias_the_whole_cache(name):
    config, params = CONFIGS[name], params_of(name)
    cache = F.new_cache(config, num_pages=64)
    tokens, lengths = prompts_of([40, 3])
    args = (params, cache, tokens, lengths, sampling_of(2), jax.random.key(0))
    program = jax.jit(functools.partial(F.generate, config=config, max_tokens=9), donate_argnums=1).lower(*args).compile()
    assert program.memory_analysis().alias_size_in_bytes == cache.pages.nbytes
    assert program.memory_analysis().temp_size_in_bytes < 8 << 20, "no copy of the cache, no unpacked stack of layers"


def test_a_long_prefill_stays_within_its_temporaries():
    """4,096 tokens in one step at SmolLM2-135M's sizes (four of its layers; they are scanned): under 256 MiB."""
    config = dataclasses.replace(
        DENSE, num_layers=4, hidden_size=576, intermediate_size=1536, num_heads=9, num_kv_heads=3, head_dim=64, rope_dim=64,
        vocab_size=49152,
    )  # fmt: skip
    params = jax.eval_shape(lambda: tiny_params(config))
    cache = jax.eval_shape(lambda: F.new_cache(config, num_pages=256))
    shapes = [(4096,), (4096,), (4096,), (2,), (1,), (1, 256), (1,)]
    batch = F.RaggedBatch(*(jax.ShapeDtypeStruct(shape, jnp.int32) for shape in shapes))
    step = jax.jit(functools.partial(F.forward, config=config), donate_argnums=1).lower(params, cache, batch).compile()
    assert step.memory_analysis().temp_size_in_bytes < 128 << 20


def test_padding_neither_writes_nor_disturbs():
    """Garbage in pages that no sequence has, NaN included, reaches nothing."""
    config, params = MOE, params_of("moe")
    tokens, lengths = prompts_of([20])
    clean = F.new_cache(config, num_pages=2)
    dirty = jax.tree.map(lambda x: x.at[:, 1, 8:].set(jnp.nan), clean)
    a, _ = read(params, clean, tokens, lengths, 0, chunk=32, config=config)
    b, after = read(params, dirty, tokens, lengths, 0, chunk=32, config=config)
    assert same_bits(np.asarray(a)[:20], np.asarray(b)[:20])
    assert np.isnan(np.asarray(after.pages)[:, 1, 8:]).all()


def test_experts_that_no_token_chose_are_not_touched():
    """NaN in every block of the unchosen experts changes no bit."""
    config, params = MOE, tiny_params(MOE, lambda name, layer: "F32" if "expert" in name else "Q8_0")
    tokens, lengths = prompts_of([2])
    cache = F.new_cache(config, num_pages=1)
    clean, _ = read(params, cache, tokens, lengths, 0, chunk=2, config=config)
    poisoned, kept = jax.tree.map(np.array, params), 0
    for layer in range(config.num_layers):
        for expert in range(config.num_experts):
            trial = jax.tree.map(np.array, poisoned)
            for name in ("expert_gate", "expert_up", "expert_down"):
                trial["layers"]["feed_forward"][name].stacks["F32"].planes[0][layer, expert] = np.nan
            cache = F.new_cache(config, num_pages=1)
            out, _ = read(trial, cache, tokens, lengths, 0, chunk=2, config=config)
            if np.isfinite(np.asarray(out)).all():
                poisoned = trial
            else:
                kept += 1
    cache = F.new_cache(config, num_pages=1)
    out, _ = read(poisoned, cache, tokens, lengths, 0, chunk=2, config=config)
    assert same_bits(np.asarray(clean), np.asarray(out))
    assert config.num_layers * 4 <= kept <= config.num_layers * 8, "two tokens choose four experts each"


def test_compiled_bodies_follow_the_formats_not_the_depth():
    """A Q4_K_M mix of 48 layers has four distinct bodies; the signature is what the file has."""

    def mix(name, layer):
        more_bits = layer < 6 or layer >= 42 or (layer - 6) % 3 == 2
        return "Q5_0" if more_bits and name in ("value", "expert_down") else "Q8_0"

    params = jax.eval_shape(lambda: tiny_params(dataclasses.replace(MOE, num_layers=48), mix))
    assert layer_segments(params["layers"]) == ((0, (1,), 6), (6, (2, 1), 12), (42, (1,), 6))
    one = jax.eval_shape(lambda: tiny_params(dataclasses.replace(MOE, num_layers=48)))
    assert layer_segments(one["layers"]) == ((0, (1,), 48),)


def size_of_program(config, params) -> int:
    """Characters of the decode program as XLA gets it: what compile time goes with."""
    cache = F.new_cache(config, num_pages=2)
    tokens, lengths = prompts_of([4])
    args = (params, cache, tokens, lengths, sampling_of(1), jax.random.key(0))
    return len(jax.jit(functools.partial(F.generate, config=config, max_tokens=4)).lower(*args).as_text())


def test_program_size_is_that_of_its_distinct_bodies():
    deep = dataclasses.replace(MOE, num_layers=24)
    shallow = dataclasses.replace(MOE, num_layers=4)
    assert size_of_program(deep, tiny_params(deep)) <= 1.05 * size_of_program(shallow, tiny_params(shallow))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", ["dense", "moe"])
def test_half_precision_stays_near_float32(name, dtype):
    """Rounding of operands to 8 or 11 bits, over three layers: rms within a few ulp of the spread of the logits."""
    exact = np.concatenate(teacher_forced(name, [50], chunk=50))
    CONFIGS[dtype] = dataclasses.replace(CONFIGS[name], dtype=dtype)
    tokens, lengths = prompts_of([50])
    cache = F.new_cache(CONFIGS[dtype], num_pages=4, dtype=dtype)
    assert cache.pages.dtype.itemsize == 2
    logits, _ = read(params_of(name), cache, tokens, lengths, 0, chunk=50, config=CONFIGS.pop(dtype))
    error = np.asarray(logits) - exact
    ulp = {"bfloat16": 2.0**-8, "float16": 2.0**-11}[dtype]
    assert np.median(np.sqrt((error**2).mean(-1))) <= 4 * ulp * exact.std()


EXPORTED = """
import jax, numpy as np
from jax import export
from unit.model import test_functional as t
blob = open({path!r}, "rb").read()
step = export.deserialize(bytearray(blob))
args = t.decode_arguments()
run = jax.jit(step.call, donate_argnums=1)
compiled = run.lower(*args).compile()
assert compiled.memory_analysis().alias_size_in_bytes == args[1].pages.nbytes, "the cache must alias"
logits, cache = compiled(*args)
print(np.asarray(logits).tobytes().hex())
"""


def decode_arguments():
    config = MOE
    cache = F.new_cache(config, num_pages=2)
    batch = F.RaggedBatch(*(np.asarray(a, np.int32) for a in ([5, 9], [0, 0], [0, 16], [0, 1, 2], [1, 1], [[0], [1]], [0, 1])))
    return params_of("moe"), cache, batch


@pytest.mark.slow
def test_the_step_survives_export(tmp_path):
    """Serialized, read by another process, donated again: the same bits."""
    from jax import export

    step = jax.jit(functools.partial(F.forward, config=MOE), donate_argnums=1)
    path = tmp_path / "step.bin"
    path.write_bytes(export.export(step)(*decode_arguments()).serialize())
    here = np.asarray(step(*decode_arguments())[0])
    code = EXPORTED.format(path=str(path))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment(), check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == here.tobytes().hex()
