"""LoRA adapters against PEFT's merged results: next to the weights, alone and several in one batch, and merged.

The numbers in tests/goldens/adapters were made by PEFT and transformers (see tests/goldens/scripts). They have one adapter at a
time, which is enough for batches, too, because a row has the same tokens as alone.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest

import ferrum_jax as fj
from ferrum_jax import functional
from ferrum_jax.adapters import nbytes
from ferrum_jax.cli import main
from ferrum_jax.convert import convert
from ferrum_jax.sampling import Sampling
from ferrum_jax.weights.adapter import read_adapter
from ferrum_jax.weights.opening import open_model
from ferrum_jax.weights.quantize import PLAIN, plain_numbers
from pallas_kernels.blocks import unpack
from support.adapter_directories import CASES, CONFIG, TENSORS, Folder
from support.directories import GPTQ, edit, edit_tensors
from support.directories import write as write_directory
from support.golden_checks import check_greedy, check_logits
from support.goldens import adapter_cases, tiny_adapters, tiny_directories, tiny_models

LLAMA = adapter_cases.LLAMA
NAMES = ["llama-all", None, "llama-patterns", "llama-some-rslora", None, "llama-all"]  # of the rows of a mixed batch
PROMPTS = [list(range(5, 5 + length)) for length in (25, 31, 28, 26, 29, 28)]  # of one bucket
GREEDY = fj.SamplingParams(temperature=0.0, max_tokens=10, ignore_eos=True)
NOISY = dataclasses.replace(GREEDY, temperature=1.2, top_k=40, seed=3)
ENGINE = fj.EngineConfig(page_size=8, num_pages=60, max_seqs=4, token_budget=16, steps_per_dispatch=2)


class Adapted:
    """A model with one of its adapters, for the checks of goldens."""

    def __init__(self, model: fj.Model, adapter: str) -> None:
        self.model, self.adapter = model, adapter

    def logits(self, prompts):
        return self.model.logits(prompts, self.adapter)

    def generate(self, prompts, params):
        return self.model.generate(prompts, params, self.adapter)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Folder:
    return Folder(tmp_path_factory.mktemp("adapters"))


@pytest.fixture(scope="module")
def together(folder):
    """Each checkpoint with all of its adapters, loaded once."""
    loaded: dict[str, fj.Model] = {}

    def load(base):
        if base.name not in loaded:
            loaded[base.name] = fj.load(folder(base), dtype="float32", adapters=folder.beside(base))
        return loaded[base.name]

    return load


@pytest.fixture(scope="module")
def model(together) -> fj.Model:
    return together(LLAMA)


@pytest.fixture(scope="module")
def base(folder) -> fj.Model:
    return fj.load(folder(LLAMA), dtype="float32")


@pytest.fixture(scope="module")
def of_base(base) -> dict:
    """The tokens of each prompt in a model without adapters, by the parameters."""
    return {params: tokens_of(base.generate(PROMPTS, params)) for params in (GREEDY, NOISY)}


@pytest.fixture(scope="module")
def alone(model):
    """The tokens of each row of the mixed batch, alone, by the parameters."""
    known: dict = {}

    def tokens(params):
        if params not in known:
            known[params] = [model.generate([p], params, adapter=n)[0].token_ids for p, n in zip(PROMPTS, NAMES, strict=True)]
        return known[params]

    return tokens


def tokens_of(completions) -> list[list[int]]:
    return [completion.token_ids for completion in completions]


# ---- goldens


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_beside_the_weights(name: str, folder: Folder, together) -> None:
    """With adapters of other ranks and for other modules in the same model."""
    case = CASES[name]
    golden, prompts = folder.golden(case), tiny_models.prompts(case.base.vocab)
    model = together(case.base)
    assert len(model.adapters) >= 2
    check_logits(Adapted(model, name), golden, prompts)
    check_greedy(Adapted(model, name), golden, prompts)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_alone_beside_the_weights(name: str, folder: Folder) -> None:
    case = CASES[name]
    model = fj.load(folder(case.base), dtype="float32", adapters={"it": folder(case)})
    check_logits(Adapted(model, "it"), folder.golden(case), tiny_models.prompts(case.base.vocab))


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.base.dtype == "F32"])
@pytest.mark.slow
def test_merged(name: str, folder: Folder) -> None:
    case = CASES[name]
    golden, prompts = folder.golden(case), tiny_models.prompts(case.base.vocab)
    merged = fj.load(folder(case.base), dtype="float32", merge_adapter=folder(case))
    assert merged.adapters == {}
    check_logits(merged, golden, prompts)
    check_greedy(merged, golden, prompts)


@pytest.mark.parametrize("name", CASES)
def test_merged_weights_are_rounded_once(name: str, folder: Folder) -> None:
    """Each within half a unit in the last place of its dtype of W + B A in float64, and all others as they were."""
    case = CASES[name]
    deltas = dict(tiny_adapters.deltas(case))
    digits = {"F32": 24, "F16": 11, "BF16": 8}[case.base.dtype]
    with open_model(folder(case.base)) as plain, open_model(folder(case.base), merge_adapter=folder(case)) as merged:
        assert merged.tensors == plain.tensors and merged.tensor_bytes == plain.tensor_bytes
        for key, info in plain.tensors.items():
            before, after = (source.read(info) for source in (plain, merged))
            delta = deltas.pop(plain.own_name(key).removesuffix(".weight"), None)
            if delta is None:
                assert np.array_equal(before, after), key
                continue
            stored = plain_numbers(before.view(PLAIN[info.format]), info.format).reshape(info.shape)
            values = plain_numbers(after.view(PLAIN[info.format]), info.format).reshape(info.shape)
            exact = stored.astype(np.float64) + delta
            half_ulp = 2.0 ** (np.frexp(exact)[1] - digits - 1)
            half_ulp = np.maximum(half_ulp, 2.0**-25) if info.format == "F16" else half_ulp
            rank = 16  # float32 sums of at most that many products, and two more roundings
            noise = (rank + 2) * 2.0**-24 * (np.abs(stored) + 4 * np.abs(delta).max())
            assert (np.abs(values - exact) <= half_ulp + noise).all(), key
    assert not deltas


# ---- merging into other files


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_merged_into_gguf(dtype: str, folder: Folder, tmp_path: Path) -> None:
    """GGUF files of LLaMA have the rotated rows in another order."""
    case = CASES["llama-patterns"]
    spec = dataclasses.replace(LLAMA, name=f"llama-as-{dtype}", dtype=dtype)
    expected = fj.load(folder(spec), dtype="float32", merge_adapter=folder(case)).logits(PROMPTS)
    file = convert(folder(spec), tmp_path / "plain.gguf", to="gguf")
    with open_model(file) as source:
        assert source.is_gguf and source.tensors["blk.1.attn_q.weight"].format == dtype
    made = convert(folder(spec), tmp_path / "merged.gguf", to="gguf", merge_adapter=folder(case))
    at_load = fj.load(file, dtype="float32", merge_adapter=folder(case)).logits(PROMPTS)
    before = fj.load(made, dtype="float32").logits(PROMPTS)
    for want, one, other in zip(expected, at_load, before, strict=True):
        # Libraries of linear algebra may round a row of the product by its place, and heads are summed in their rows' order.
        assert max(np.abs(want - one).max(), np.abs(want - other).max()) <= 2e-5
    if dtype == "F32":
        check_logits(fj.load(made, dtype="float32"), folder.golden(case), tiny_models.prompts(LLAMA.vocab))
        beside = fj.load(file, dtype="float32", adapters={"it": folder(case)})
        check_logits(Adapted(beside, "it"), folder.golden(case), tiny_models.prompts(LLAMA.vocab))


@pytest.mark.slow
def test_merged_into_orbax_and_quantized_after_it(folder: Folder, tmp_path: Path) -> None:
    case = CASES["llama-all"]
    paths = {"merge_adapter": folder(case)}
    merged = convert(folder(LLAMA), tmp_path / "merged", to="orbax", **paths)
    check_logits(fj.load(merged, dtype="float32"), folder.golden(case), tiny_models.prompts(LLAMA.vocab))
    plain = convert(folder(LLAMA), tmp_path / "plain", to="orbax")
    from_orbax = convert(plain, tmp_path / "from_orbax.gguf", to="gguf", **paths)
    quantized = [
        fj.load(source, dtype="float32", quantize="q8_0", **more).logits(PROMPTS)
        for source, more in ((folder(LLAMA), paths), (plain, paths), (merged, {}), (from_orbax, {}))
    ]
    quantized.append(
        fj.load(convert(plain, tmp_path / "q", to="orbax", quantize="q8_0", **paths), dtype="float32").logits(PROMPTS)
    )
    for other in quantized[1:]:
        assert all(np.array_equal(one, same) for one, same in zip(quantized[0], other, strict=True))
    exact = fj.load(merged, dtype="float32").logits(PROMPTS)
    error = np.concatenate(quantized[0]) - np.concatenate(exact)
    assert np.sqrt(np.mean(error**2)) <= 0.05 * np.concatenate(exact).std()


def test_merging_into_quantized_matrices_is_refused(folder: Folder, tmp_path: Path) -> None:
    case = CASES["llama-all"]
    file = convert(folder(LLAMA), tmp_path / "q.gguf", to="gguf", quantize="q8_0")
    with pytest.raises(
        fj.UnsupportedModelError, match=r"q\.gguf: tensor blk\.0\.ffn_down\.weight: is Q8_0, and merging .* twice"
    ):
        fj.load(file, merge_adapter=folder(case))
    with pytest.raises(fj.UnsupportedModelError, match=r"tensor blk\.0\.ffn_down\.weight: is Q8_0"):
        convert(file, tmp_path / "out.gguf", to="gguf", merge_adapter=folder(case))
    packed = write_directory(GPTQ, tmp_path / "gptq")
    adapter = tiny_adapters.Spec("of-gptq", GPTQ, ("q_proj",))
    with pytest.raises(fj.UnsupportedModelError, match=r"tensor model\.layers\.0\.self_attn\.q_proj\.weight: is U4_32_F16"):
        fj.load(packed, merge_adapter=folder(adapter))
    assert not (tmp_path / "out.gguf").exists()


def test_sums_that_a_dtype_has_not_are_refused(folder: Folder, tmp_path: Path) -> None:
    half = dataclasses.replace(LLAMA, name="llama-half", dtype="F16")
    tiny_adapters.write(CASES["llama-all"], tmp_path / "huge")
    for spec, alpha, said in ((half, 1e7, "values beyond half precision"), (LLAMA, 1e19, "values that are not finite")):
        edit(tmp_path / "huge" / CONFIG, lambda content, alpha=alpha: content.update(lora_alpha=alpha))
        if spec is LLAMA:  # A too must be large
            edit_tensors(tmp_path / "huge" / TENSORS, lambda t: t.update({key: fill(*t[key]) for key in t if "lora_A" in key}))
        with pytest.raises(fj.ModelFileError, match=rf"tensor model\.layers\.\d\.\S+: with the adapter it holds {said}"):
            fj.load(folder(spec), dtype="float32", merge_adapter=tmp_path / "huge")


def fill(dtype: str, shape: tuple[int, ...], data: bytes) -> tuple[str, tuple[int, ...], bytes]:
    return dtype, shape, np.full(shape, 1e30, np.float32).tobytes()


# ---- next to compressed weights, and other dtypes


def unpacked(source_path: Path, out: Path, config: tiny_directories.Spec, **options) -> Path:
    """A checkpoint in F32 of the values that another one's blocks stand for."""
    write_directory(dataclasses.replace(config, dtype="F32", packing=None), out)
    with open_model(source_path, **options) as source:
        entries = []
        for key, info in source.tensors.items():
            raw = source.read(info)
            plain = info.format in PLAIN
            values = plain_numbers(raw.view(PLAIN[info.format]), info.format) if plain else np.asarray(unpack(raw, info.format))
            entries.append((source.own_name(key), "F32", info.shape, values.astype("<f4").tobytes()))
    (out / "model.safetensors").write_bytes(tiny_directories.safetensors(entries))
    return out


@pytest.mark.slow
@pytest.mark.parametrize("format", ["q8_0", "q4_k"])
def test_beside_blocks(format: str, folder: Folder, tmp_path: Path) -> None:
    """The same as merged into the float32 values of the blocks."""
    adapter = folder(CASES["llama-all"])
    compressed = fj.load(folder(LLAMA), dtype="float32", quantize=format, adapters={"it": adapter, "more": adapter})
    assert format.upper() in compressed.memory()["parameters"]
    plain = fj.load(unpacked(folder(LLAMA), tmp_path / "plain", LLAMA, quantize=format), dtype="float32", merge_adapter=adapter)
    for found, want in zip(compressed.logits(PROMPTS, "it"), plain.logits(PROMPTS), strict=True):
        assert np.abs(found - want).max() <= 1e-3


def test_beside_packed_matrices(folder: Folder, tmp_path: Path) -> None:
    packed = write_directory(GPTQ, tmp_path / "gptq")
    plain = write_directory(dataclasses.replace(GPTQ, dtype="F32", packing=None), tmp_path / "plain")
    entries = [(name, "F32", v.shape, tiny_directories.to_bytes(v, "F32")) for name, v in tiny_directories.dense(GPTQ)]
    (plain / "model.safetensors").write_bytes(tiny_directories.safetensors(entries))
    adapter = folder(tiny_adapters.Spec("all-of-gptq", GPTQ))
    found = fj.load(packed, dtype="float32", adapters={"it": adapter}).logits(PROMPTS, "it")
    for one, other in zip(found, fj.load(plain, dtype="float32", merge_adapter=adapter).logits(PROMPTS), strict=True):
        assert np.abs(one - other).max() <= 1e-3


@pytest.mark.slow
def test_other_arithmetics_are_near(folder: Folder) -> None:
    """With an adapter, rounding costs at most twice as much as without. The weights are quantized, so that int8 has something
    to multiply."""
    adapters = {"it": folder(CASES["llama-all"])}
    exact, *others = (
        fj.load(folder(LLAMA), dtype=d, quantize="q8_0", adapters=adapters) for d in ("float32", "bfloat16", "int8")
    )
    for rounded in others:
        errors = []
        for name in (None, "it"):
            want, found = (np.concatenate(m.logits(PROMPTS, name)) for m in (exact, rounded))
            errors.append(np.sqrt(np.mean((found - want) ** 2)) / want.std())
        assert 0 < errors[0] <= 0.05 and errors[1] <= 2 * errors[0], rounded.config.dtype


# ---- several in one batch


@pytest.mark.slow
def test_no_adapter_is_the_model_itself(model: fj.Model, base: fj.Model, of_base) -> None:
    for found, want in zip(model.logits(PROMPTS), base.logits(PROMPTS), strict=True):
        assert np.array_equal(found, want)
    for params, tokens in of_base.items():
        assert tokens_of(model.generate(PROMPTS, params)) == tokens


@pytest.mark.parametrize("params", [GREEDY, NOISY], ids=["greedy", "sampled"])
@pytest.mark.slow
def test_rows_of_a_batch_have_the_tokens_that_they_have_alone(params, model: fj.Model, alone, of_base) -> None:
    mixed = tokens_of(model.generate(PROMPTS, params, adapter=NAMES))
    assert mixed == alone(params)
    for row, name in enumerate(NAMES):
        assert (mixed[row] == of_base[params][row]) == (name is None)
    one = model.generate([PROMPTS[2]] * 6, params, adapter=NAMES)
    assert len({tuple(ids) for ids in tokens_of(one)}) == len(set(NAMES)) == 4


@pytest.mark.slow
def test_functional(model: fj.Model, base: fj.Model, alone) -> None:
    """Adapters by their place, one for each row; in NumPy here, which tracing must not mind."""
    rows, longest = len(PROMPTS), max(map(len, PROMPTS))
    prompts = np.zeros((rows, longest), np.int32)
    for row, ids in enumerate(PROMPTS):
        prompts[row, : len(ids)] = ids
    lengths = np.array([len(ids) for ids in PROMPTS], np.int32)
    places = np.array([-1 if name is None else list(model.adapters).index(name) for name in NAMES], np.int32)
    sampling = Sampling.from_params([GREEDY] * rows, eos_ids=[], vocab_limit=LLAMA.vocab, default_seeds=[0] * rows)
    cache = functional.new_cache(model.config, num_pages=rows * 4, dtype="float32")

    def run(params, cache, adapters):
        fixed = {"config": model.config, "max_tokens": GREEDY.max_tokens, "adapters": adapters}
        return functional.generate(params, cache, prompts, lengths, sampling, jax.random.key(0), **fixed)

    tokens, made, _ = jax.jit(lambda params, cache: run(params, cache, places))(model.params, cache)
    assert np.asarray(tokens).tolist() == alone(GREEDY) and (np.asarray(made) == GREEDY.max_tokens).all()
    with pytest.raises(ValueError, match=r"adapters must be int32 \[6\], one for each row, not \[5\]"):
        run(model.params, cache, places[1:])
    with pytest.raises(ValueError, match="the parameters have no adapters"):
        run(base.params, cache, places)


def test_adapters_that_are_not_there(model: fj.Model, base: fj.Model) -> None:
    loaded = "adapter 'other' is not loaded; loaded: llama-all, llama-patterns, llama-some-rslora"
    for ask in (
        lambda: model.generate(["a"], GREEDY, "other"),
        lambda: model.generate(["a", "b"], GREEDY, ["llama-all", "other"]),
        lambda: model.stream("a", GREEDY, adapter="other"),
        lambda: model.chat([{"role": "user", "content": "a"}], GREEDY, adapter="other"),
        lambda: model.logits([[5]], adapter="other"),
        lambda: model.perplexity([5, 6, 7], adapter="other"),
        lambda: fj.Engine(model, ENGINE).submit([5], GREEDY, adapter="other"),
    ):
        with pytest.raises(ValueError, match=loaded):
            ask()
    with pytest.raises(ValueError, match="adapter 'llama-all' is not loaded; loaded: none"):
        base.generate(["a"], GREEDY, "llama-all")
    with pytest.raises(ValueError, match="3 prompts and 2 adapters; give one for all or one for each"):
        model.generate(["a", "b", "c"], GREEDY, ["llama-all", None])
    with pytest.raises(ValueError, match="adapter 0 is not loaded"):
        model.generate(["a"], GREEDY, 0)  # type: ignore[arg-type]


def test_what_they_take_is_counted(model: fj.Model, base: fj.Model, folder: Folder) -> None:
    factors = [read_adapter(path, base.config).factors for path in folder.beside(LLAMA).values()]
    sizes = [sum(leaf.nbytes for leaf in jax.tree.leaves(m.params)) for m in (model, base)]
    assert sizes[0] - sizes[1] == nbytes(factors)


def test_names_of_adapters(folder: Folder) -> None:
    path = folder(CASES["llama-all"])
    for wrong in ([path], {"": path}, {None: path}, {0: path}):
        with pytest.raises(ValueError, match="adapters must be directories or files by name"):
            fj.load(folder(LLAMA), adapters=wrong)


# ---- streams, conversations, scores


@pytest.mark.slow
def test_streams_and_stop_strings(model: fj.Model, alone) -> None:
    prompt, name = PROMPTS[2], NAMES[2]
    whole = model.generate([prompt], NOISY, name)[0]
    stream = model.stream(prompt, NOISY, adapter=name)
    assert "".join(text for text, _ in stream) == whole.text and stream.token_ids == whole.token_ids == alone(NOISY)[2]
    stop = dataclasses.replace(NOISY, stop=[whole.text[4:6]])
    (ended,) = model.generate([prompt], stop, [name])
    assert ended.finish_reason == "stop" and ended.text == whole.text[: whole.text.index(whole.text[4:6])]
    of_engine = dataclasses.replace(NOISY, logit_bias={whole.token_ids[-1]: -np.inf})
    streamed = [id for _, ids in model.stream(prompt, of_engine, adapter=name) for id in ids]
    assert streamed[:-1] == whole.token_ids[:-1] and streamed[-1] != whole.token_ids[-1]


@pytest.mark.slow
def test_conversations_and_perplexity(model: fj.Model) -> None:
    name, messages = "llama-all", [{"role": "user", "content": "iron"}]
    ids = model.encode_chat(messages)
    assert model.chat(messages, GREEDY, adapter=name).token_ids == model.generate([ids], GREEDY, name)[0].token_ids
    ids = PROMPTS[1]
    for adapter in (name, None):
        (logits,) = model.logits([ids], adapter)
        scores = np.asarray(jax.nn.log_softmax(logits, axis=-1))[np.arange(len(ids) - 1), ids[1:]]
        assert abs(model.perplexity(ids, adapter=adapter) / np.exp(-scores.mean()) - 1) <= 1e-4
    assert abs(model.perplexity(ids, adapter=name) / model.perplexity(ids) - 1) > 1e-2


# ---- the engine


@pytest.mark.slow
def test_requests_of_an_engine(model: fj.Model, alone) -> None:
    """Rows of several adapters in the same steps, each with the same output as alone, also after preemption."""
    for params in (GREEDY, NOISY):
        engine = fj.Engine(model, ENGINE)
        requests = [engine.submit(prompt, params, adapter=name) for prompt, name in zip(PROMPTS, NAMES, strict=True)]
        assert [request.adapter for request in requests] == NAMES
        assert [request.result().token_ids for request in requests] == alone(params)
    engine = fj.Engine(model, ENGINE)
    engine.num_pages, engine._scheduler.ledger = 9, engine._new_ledger(9)
    requests = [engine.submit(prompt, NOISY, adapter=name) for prompt, name in zip(PROMPTS, NAMES, strict=True)]
    assert [request.result().token_ids for request in requests] == alone(NOISY)
    assert engine.metrics()["preemptions"] > 0


@pytest.mark.slow
def test_speculation(model: fj.Model, alone) -> None:
    engine = fj.Engine(model, dataclasses.replace(ENGINE, speculation=3))
    requests = [engine.submit(prompt, GREEDY, adapter=name) for prompt, name in zip(PROMPTS, NAMES, strict=True)]
    assert [request.result().token_ids for request in requests] == alone(GREEDY)


@pytest.mark.slow
def test_pages_are_shared_by_rows_of_one_adapter_alone(model: fj.Model) -> None:
    engine, prompt = fj.Engine(model, ENGINE), PROMPTS[1]
    names = ["llama-all", "llama-patterns", None]
    right = [model.generate([prompt], GREEDY, name)[0].token_ids for name in names]
    assert len(set(map(tuple, right))) == 3
    for hits in (0, 3):
        for name, want in zip(names, right, strict=True):
            before = engine.metrics()["prefix_hit_pages"]
            assert engine.submit(prompt, GREEDY, adapter=name).result().token_ids == want
            assert engine.metrics()["prefix_hit_pages"] == before + hits


@pytest.mark.slow
def test_choices_and_forks_keep_the_adapter(model: fj.Model) -> None:
    name, prompt = "llama-some-rslora", PROMPTS[2]
    engine = fj.Engine(model, ENGINE)
    params = dataclasses.replace(NOISY, n=3)
    choices = engine.submit(prompt, params, adapter=name).results()
    singles = [dataclasses.replace(NOISY, seed=NOISY.seed + i) for i in range(3)]
    assert tokens_of(choices) == [model.generate([prompt], single, name)[0].token_ids for single in singles]
    request = engine.submit(prompt, NOISY, adapter=name)
    while len(request.token_ids) < 4:
        engine.step()
    known = [*prompt, *request.token_ids]
    fork = request.fork(GREEDY)
    assert fork.adapter == name and fork.result().token_ids == model.generate([known], GREEDY, name)[0].token_ids


@pytest.mark.slow
def test_snapshots_keep_the_adapter(model: fj.Model, base: fj.Model, tmp_path: Path) -> None:
    name, prompt = "llama-patterns", PROMPTS[1]
    first, second = fj.Engine(model, ENGINE), fj.Engine(model, ENGINE)
    request = first.submit(prompt, NOISY, adapter=name)
    while len(request.token_ids) < 5:
        first.step()
    first.snapshot(request, tmp_path / "snapshot")
    copy = second.restore(tmp_path / "snapshot")
    assert copy.adapter == name
    assert copy.result().token_ids == request.result().token_ids == model.generate([prompt], NOISY, name)[0].token_ids
    assert second.metrics()["prompt_tokens"] < ENGINE.page_size * 2  # the part after the last full page
    hits = second.metrics()["prefix_hit_pages"]
    second.submit(prompt, NOISY).result()
    assert second.metrics()["prefix_hit_pages"] == hits
    with pytest.raises(ValueError, match="of another model or engine"):
        fj.Engine(base, ENGINE).restore(tmp_path / "snapshot")


# ---- the command line


@pytest.mark.slow
def test_run_and_perplexity(folder: Folder, model: fj.Model, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    case = CASES["llama-all"]
    path, adapter = str(folder(LLAMA)), ["--adapter", str(folder(case)), "--dtype", "float32"]
    prompt = "in the heat one sits on iron here"
    flags = ["--raw", "--prompt", prompt, "--temperature", "0", "--max-tokens", "10"]
    assert main(["run", path, *flags, *adapter]) == 0
    want = model.generate([prompt], fj.SamplingParams(temperature=0.0, max_tokens=10), case.name)[0].text
    assert capsys.readouterr().out == want + "\n" * (not want.endswith("\n"))
    text = tmp_path / "text"
    text.write_text(prompt)
    assert main(["perplexity", path, str(text), *adapter]) == 0
    assert abs(float(capsys.readouterr().out) / model.perplexity(text.read_text(), adapter=case.name) - 1) <= 1e-3
    assert main(["run", path, *flags, "--adapter", str(tmp_path / "none")]) == 2
    assert "none: an adapter is a directory with adapter_config.json" in capsys.readouterr().err
    assert main(["perplexity", path, str(text), "--adapter", str(folder(CASES["qwen3"]))]) == 2
    assert "does not fit this model" in capsys.readouterr().err


@pytest.mark.slow
def test_convert(folder: Folder, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    case = CASES["llama-all"]
    flags = ["--to", "gguf", "--merge-adapter", str(folder(case)), "--quantize", "q8_0"]
    assert main(["convert", str(folder(LLAMA)), str(tmp_path / "out.gguf"), *flags]) == 0
    found = fj.load(tmp_path / "out.gguf", dtype="float32")
    want = fj.load(folder(LLAMA), dtype="float32", merge_adapter=folder(case), quantize="q8_0")
    assert np.array_equal(found.logits(PROMPTS[:1])[0], want.logits(PROMPTS[:1])[0])
    capsys.readouterr()
    assert main(["convert", str(tmp_path / "out.gguf"), str(tmp_path / "more.gguf"), *flags]) == 2
    assert "is Q8_0, and merging an adapter would quantize it twice" in capsys.readouterr().err


@pytest.mark.parametrize(("verb", "flag"), [("run", "--adapter"), ("perplexity", "--adapter"), ("convert", "--merge-adapter")])
def test_helps_name_the_flags(verb: str, flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([verb, "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert f"{flag} PATH" in text and "LoRA adapter (PEFT" in text
