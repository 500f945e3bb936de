"""Each kernel alone, relative to what the device can do: bytes against a measured copy, operations against a measured product.

A program calls the operation once for each of many layers, as a model does, so that no weights stay in the cache, and only the
last result is read. `share` takes the time of the package's own kernels from a profile (of all kernels where there are none);
`wall_share` takes the wall time of a call in the loop, gaps and XLA's fusions included. Bytes are counted from what the call
must read: the chosen experts, and the keys and values up to each length.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from benchmarks import common
from benchmarks.gpu import trace, weights
from benchmarks.gpu.check_attention import BOUND as ATTENTION_BOUND
from benchmarks.gpu.check_attention import without_kernels
from benchmarks.gpu.check_kernels import MATMUL, MIXTURE, UNIT
from benchmarks.gpu.lab import Lab
from benchmarks.gpu.sizes import GOALS, goal
from ferrum_jax.quantized import QuantizedTensor
from pallas_kernels import dispatch
from pallas_kernels.grouped_matmul import expert_ffn
from pallas_kernels.paged_attention import KVCache, Tables, bytes_per_token, make_metadata, paged_attention
from pallas_kernels.quantized_matmul import quantized_matmuls

PAGE = 16
AHEAD = True
COMPILED_ELSEWHERE = (weights.draw, weights.normal)
_KERNEL_NAME = re.compile(r'xla\.gpu\.triton"?.*?name = "([^"]+)"', re.DOTALL)


def steps(lab: Lab) -> Iterator[tuple[str, Callable[[], Iterator[dict]]]]:
    alone = Alone(lab)
    many, long = lab.sizes.batch, lab.sizes.long_context
    yield "ceilings", alone.ceilings
    for tokens in (1, many, 16 * many, 64 * many)[: 4 if lab.sizes.real else 2]:
        yield f"experts {tokens}", lambda tokens=tokens: alone.experts(tokens, "bfloat16")
    caches = ((many, "bfloat16"), (1, "bfloat16"), (many, "int8"), (many, "float8_e4m3fn"))
    for batch, dtype in caches[: 4 if lab.sizes.real else 1]:
        yield f"attention {batch} {dtype}", lambda b=batch, d=dtype: alone.attention(f"batch {b}", [(long, 1)] * b, d)
    prompt = lab.sizes.prompt
    yield "attention prefill", lambda: alone.attention("prefill", [(prompt, prompt)], "bfloat16")
    short = lab.rehearsal and lab.collecting  # fewer sizes of one kernel to compile
    for rows in (1, prompt) if short else (1, many, prompt)[: 3 if lab.sizes.real else 1]:
        for name in ("qkv", "output", "unembedding"):
            yield f"{name} {rows}", lambda rows=rows, name=name: alone.dense(name, rows)
    for tokens in (1, many)[: 2 if lab.sizes.real and not short else 1]:
        yield f"experts {tokens} float16", lambda tokens=tokens: alone.experts(tokens, "float16")


class Alone:
    def __init__(self, lab: Lab):
        self.lab, self.config = lab, lab.sizes.config
        self.copy_rate, self.product_rate = 1.0, 1.0  # bytes/s, operations/s
        self.tensors: dict[Any, QuantizedTensor] = {}
        self.traced_with: Callable[[Callable], Callable] = lambda function: function  # see tiles.py

    def ceilings(self) -> Iterator[dict]:
        lab, count, n = self.lab, self.lab.sizes.copy_bytes, self.lab.sizes.product
        words = lab.run(random_words, count=count // 4)
        a = lab.run(random_matrix, n=n)
        copy_s = lab.seconds(lambda: lab.run(copied, words))
        read_s = lab.seconds(lambda: lab.run(total, words))
        product_s = lab.seconds(lambda: lab.run(product, a))
        if lab.collecting:
            return
        self.copy_rate = 2 * count / statistics.median(copy_s)
        self.product_rate = 2 * n**3 / statistics.median(product_s)
        yield {"name": "copy bandwidth", "value": self.copy_rate / 1e9, "unit": "GB/s"}
        yield {"name": "read bandwidth", "value": count / statistics.median(read_s) / 1e9, "unit": "GB/s"}
        yield {"name": "bfloat16 product", "value": self.product_rate / 1e12, "unit": "TFLOP/s"}

    def stack(self, name: str, format: str, *shape: int) -> QuantizedTensor:
        key = (name, format, *shape)
        if key not in self.tensors:
            self.tensors[key] = weights.stack(self.lab, format, *shape, seed=name)
        return self.tensors[key]

    def experts(self, tokens: int, dtype: str) -> Iterator[dict]:
        """gate, up, SwiGLU, down and combine of one layer's experts, with independent routing."""
        lab, c = self.lab, self.config
        layers, calls = lab.sizes.kernel_layers, lab.sizes.kernel_layers * (4 if tokens < 512 else 1)
        inner = (layers, c.num_experts, c.expert_intermediate_size, c.hidden_size)
        gate, up = (self.stack(name, "Q4_K", *inner) for name in ("gate", "up"))
        down = self.stack("down", "Q4_K", layers, c.num_experts, c.hidden_size, c.expert_intermediate_size)
        rng = np.random.default_rng(tokens)
        order = rng.random((calls, tokens, c.num_experts)).argsort(-1)
        ids = order[..., : c.experts_per_token].astype(np.int32)
        x = np.asarray(rng.standard_normal((tokens, c.hidden_size)), dtype)
        scale = np.full(ids.shape, 1 / c.experts_per_token, np.float32)
        arguments = (*lab.put((x, ids, scale)), gate, up, down)
        touched = np.mean([len(np.unique(one)) for one in ids]) / c.num_experts / layers
        assignments = tokens * c.experts_per_token
        read = touched * sum(plane.size * plane.dtype.itemsize for t in (gate, up, down) for plane in t.planes)
        flops = 6 * assignments * c.hidden_size * c.expert_intermediate_size
        extra = {"experts_touched": round(float(touched * c.num_experts * layers), 1)}
        name = f"experts, batch {tokens}"
        yield from self.row(name, dtype, mixture_calls, arguments, calls, read, flops, MIXTURE * UNIT[dtype], extra)

    def dense(self, name: str, rows: int) -> Iterator[dict]:
        """The matrix products of one layer's attention, or that of the output matrix."""
        lab, c = self.lab, self.config
        queries, keys = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
        layers = 4 * lab.sizes.kernel_layers
        if name == "unembedding":
            layers = 1
            tensors = (self.stack("unembedding", "Q6_K", 1, c.vocab_size, c.hidden_size),)
        elif name == "output":
            tensors = (self.stack("output", "Q4_K", layers, c.hidden_size, queries),)
        else:
            sizes = (("query", queries), ("key", keys), ("value", keys))
            tensors = tuple(self.stack(part, "Q4_K", layers, size, c.hidden_size) for part, size in sizes)
        if name == "unembedding" and rows > lab.sizes.batch:
            return  # logits are needed for few rows
        columns = tensors[0].matrix[1]
        x = np.asarray(np.random.default_rng(rows).standard_normal((rows, columns)), "bfloat16")
        read = sum(plane.size * plane.dtype.itemsize for t in tensors for plane in t.planes) / layers
        flops = 2 * rows * columns * sum(t.matrix[0] for t in tensors)
        arguments, bound = (lab.put(x), *tensors), MATMUL * UNIT["bfloat16"]
        calls = max(layers, 8)
        yield from self.row(f"{name}, {rows} rows", "bfloat16", dense_calls, arguments, calls, read, flops, bound, {})

    def attention(self, name: str, batch: list[tuple[int, int]], dtype: str) -> Iterator[dict]:
        """One layer's attention; `batch`: (cached tokens, queries) of each sequence."""
        lab, c, layers = self.lab, self.config, 4
        lengths, queries = (np.array(column, np.int32) for column in zip(*batch, strict=True))
        width = -(-int(lengths.max()) // PAGE)
        pages = np.random.default_rng(2).permutation(len(batch) * width).astype(np.int32)
        positions = np.concatenate([np.arange(n - q, n) for n, q in batch]).astype(np.int32)
        starts = np.concatenate([[0], np.cumsum(queries)]).astype(np.int32)
        tables = Tables(positions, starts, lengths, pages.reshape(len(batch), width))
        static = {"dtype": dtype, "layers": layers, "kv_heads": c.num_kv_heads, "head_dim": c.head_dim}
        cache = lab.run(random_cache, pages=pages.size, **static)
        q = np.random.default_rng(4).standard_normal((len(positions), c.num_heads, c.head_dim)).astype(np.float32)
        read = int(lengths.sum()) * bytes_per_token(dtype, c.num_kv_heads, c.head_dim)
        seen = sum(q * n - q * (q - 1) // 2 for n, q in batch)  # pairs of a query and a key that it attends to
        flops = 4 * seen * c.num_heads * c.head_dim
        arguments = (*lab.put((q, tables)), cache)
        calls, bound = 8 * layers, ATTENTION_BOUND[dtype]
        yield from self.row(f"attention, {name}", dtype, attention_calls, arguments, calls, read, flops, bound, {})

    def row(
        self,
        name: str,
        dtype: str,
        function: Callable,
        arguments: tuple,
        calls: int,
        read: float,
        flops: float,
        bound: float,
        extra: dict[str, Any],
    ) -> Iterator[dict]:
        """Times `calls` calls in one program and compares the last result with plain XLA in float32."""
        lab, exactly = self.lab, EXACT[function]
        function = self.traced_with(function)
        taken = lab.seconds(lambda: lab.run(function, *arguments, calls=calls))
        got = lab.run(function, *arguments, calls=calls)
        exact = lab.run(exactly, *arguments, calls=calls)
        if lab.collecting:
            return
        program = lab.program(function, *arguments, calls=calls)
        wall = statistics.median(taken) / calls
        found = trace.record(lambda: program(*arguments))
        own = own_kernels(program.compiled.as_text())
        mine = [kernel for kernel in found if kernel.name in own] or found
        busy = sum(kernel.seconds for kernel in mine) / calls or wall
        share, wall_share = (read / seconds / self.copy_rate for seconds in (busy, wall))
        standard = name if name in GOALS and dtype == "bfloat16" else None
        row = {"name": f"{name}, {dtype}"} | (goal(standard, share, lab.sizes) if standard else {"value": share})
        row |= {"unit": "of copy bandwidth", "wall_share": wall_share, "kernel_us": 1e6 * busy, "wall_us": 1e6 * wall}
        row |= {"read_bytes": round(read), "tflops": flops / busy / 1e12, "product_share": flops / busy / self.product_rate}
        row |= {"samples": common.summary([1e6 * seconds / calls for seconds in taken])}
        row |= {"profile": trace.summary(found, calls, wall, top=6), "own_kernels": sorted(own)} | extra
        yield row | {"check": check(got, exact, bound), "backends": lab.backends(function, *arguments, calls=calls)}


def own_kernels(text: str) -> set[str]:
    """Names of the package's kernels in a compiled program, as profiles show them."""
    return {trace.plain(name) for name in _KERNEL_NAME.findall(text)}


def check(got, exact, bound: float) -> dict[str, Any]:
    """Relative error of the results against the exact ones, computed on the device."""
    errors = [float(error) for error in relative_errors(jax.tree.leaves(got), jax.tree.leaves(exact))]
    error = max(errors, key=lambda value: np.inf if np.isnan(value) else value)
    return {"error": error, "bound": bound, "ok": error <= bound}


@jax.jit
def relative_errors(got: list[jax.Array], exact: list[jax.Array]) -> list[jax.Array]:
    pairs = [(a.astype(jnp.float32), b) for a, b in zip(got, exact, strict=True)]
    return [jnp.sqrt(jnp.mean((a - b) ** 2) / jnp.mean(b * b)) for a, b in pairs]


# Programs


def random_words(*, count: int) -> jax.Array:
    return jax.random.bits(jax.random.key(0), (count,), jnp.uint32)


def random_matrix(*, n: int) -> jax.Array:
    return jax.random.normal(jax.random.key(1), (n, n), jnp.bfloat16)


def copied(words) -> jax.Array:
    return words ^ jnp.uint32(1)


def total(words) -> jax.Array:
    return jnp.sum(words, dtype=jnp.uint32)


def product(a) -> jax.Array:
    return a @ a


def mixture_calls(x, ids, scale, gate, up, down, *, calls: int) -> jax.Array:
    def call(i, y):
        layer = i % gate.planes[0].shape[0]
        return expert_ffn(x, ids[i], scale[i], *(tensor.operand(layer) for tensor in (gate, up, down)))

    return lax.fori_loop(0, calls, call, jnp.zeros(x.shape, jnp.float32))


def dense_calls(x, *tensors, calls: int) -> tuple[jax.Array, ...]:
    def call(i, ys):
        layer = i % tensors[0].planes[0].shape[0]
        return tuple(quantized_matmuls(x, [tensor.operand(layer) for tensor in tensors]))

    return lax.fori_loop(0, calls, call, tuple(jnp.zeros((x.shape[0], t.matrix[0]), jnp.float32) for t in tensors))


def attention_calls(q, tables: Tables, cache: KVCache, *, calls: int) -> jax.Array:
    metadata = make_metadata(tables, cache, q.shape[1])

    def call(i, y):
        return paged_attention(q, cache, i % cache.pages.shape[0], metadata, cache.head_dim**-0.5)

    return lax.fori_loop(0, calls, call, jnp.zeros(q.shape, jnp.float32))


def random_cache(*, dtype: str, layers: int, kv_heads: int, head_dim: int, pages: int) -> KVCache:
    """A cache full of normal numbers, written as a model writes it."""
    cache = KVCache.empty(layers, pages, PAGE, kv_heads, head_dim, dtype)
    part = pages * PAGE // 16 or pages * PAGE

    def fill(i, cache):
        layer, start = i // (pages * PAGE // part), i % (pages * PAGE // part) * part
        k, v = jax.random.normal(jax.random.fold_in(jax.random.key(3), i), (2, part, kv_heads, head_dim))
        return cache.write(layer, start + jnp.arange(part, dtype=jnp.int32), k, v)

    return lax.fori_loop(0, layers * (pages * PAGE // part), fill, cache)


def last_call(function: Callable) -> Callable:
    """The last of the calls alone, without kernels and in float32."""

    def exactly(x, *arguments, calls: int):
        with dispatch.on(without_kernels()):
            return function(x.astype(jnp.float32), *arguments, calls=calls)

    exactly.__name__ = f"exact_{function.__name__}"
    return exactly


def last_mixture(x, ids, scale, gate, up, down, *, calls: int) -> jax.Array:
    layer = (calls - 1) % gate.planes[0].shape[0]
    return expert_ffn(x, ids[-1], scale[-1], *(tensor.operand(layer) for tensor in (gate, up, down)))


def last_dense(x, *tensors, calls: int) -> list[jax.Array]:
    layer = (calls - 1) % tensors[0].planes[0].shape[0]
    return quantized_matmuls(x, [tensor.operand(layer) for tensor in tensors])


def last_attention(q, tables: Tables, cache: KVCache, *, calls: int) -> jax.Array:
    layer = (calls - 1) % cache.pages.shape[0]
    return paged_attention(q, cache, layer, make_metadata(tables, cache, q.shape[1]), cache.head_dim**-0.5)


EXACT = {
    mixture_calls: last_call(last_mixture),
    dense_calls: last_call(last_dense),
    attention_calls: last_call(last_attention),
}
COMPILED_ONCE = tuple(EXACT.values())  # plain XLA: one size of each is enough for a rehearsal
