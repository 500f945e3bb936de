"""Converted and quantized models: they load unchanged, are written completely or not at all, and errors give names."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest

import ferrum_jax as fj
from ferrum_jax.convert import convert
from ferrum_jax.distributed import Placement
from ferrum_jax.loading import check, validate
from ferrum_jax.weights import stream
from ferrum_jax.weights.opening import open_model
from ferrum_jax.weights.quantize import QUANTIZATIONS
from pallas_kernels.blocks import unpack
from pallas_kernels.dispatch import Target
from support import environment
from support.tiny_gguf import write_tiny_llama

IDS = [[5, 9, 13, 2, 40, 41, 42]]
WIDE = {"hidden": 256, "heads": 4, "kv_heads": 2, "head_dim": 64, "ffn": 320, "layers": 3}


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    """A model in F32 whose down matrices have a width that is not a multiple of 256."""
    return write_tiny_llama(tmp_path_factory.mktemp("original") / "model.gguf", tensor_type="F32", **WIDE)


def contents(path: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    with open_model(path) as model:
        return {name: (info.format, info.shape, model.read(info).tobytes()) for name, info in model.tensors.items()}


# ---- quantize at load


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "formats"),
    [
        ("q4_k", {"attn_q": "Q4_K", "ffn_down": "Q8_0", "token_embd": "Q4_K", "output": "Q6_K"}),
        ("Q8_0", {"attn_q": "Q8_0", "ffn_down": "Q8_0", "token_embd": "Q8_0", "output": "Q8_0"}),
        ("iq4_nl", {"attn_q": "IQ4_NL", "ffn_down": "IQ4_NL", "token_embd": "IQ4_NL", "output": "Q6_K"}),
    ],
)
def test_quantize_at_load(original: Path, name: str, formats: dict[str, str]):
    seen = []
    model = fj.load(original, dtype="float32", quantize=name, progress=lambda done, total, text: seen.append((done, total)))
    assert seen[-1][0] == seen[-1][1] and len(seen) > 10
    assert set(model.memory()["parameters"]) == set(formats.values()) | {"F32"}
    with open_model(original, quantize=name) as quantized, open_model(original) as plain:
        for tensor, format in formats.items():
            info = next(info for key, info in quantized.tensors.items() if key.split(".")[-2] == tensor)
            assert info.format == format
            exact = plain.read(plain.tensors[info.name]).view(np.float32)
            made = np.asarray(unpack(quantized.read(info), format))
            assert np.sqrt(np.mean((made - exact) ** 2)) <= 0.1 * exact.std(), tensor
    exact, made = (m.logits(IDS)[0] for m in (fj.load(original, dtype="float32"), model))
    assert np.sqrt(np.mean((made - exact) ** 2)) <= (0.05 if name == "Q8_0" else 0.5) * exact.std()


def test_tied_embeddings_are_the_output_and_narrow_rows_fall_back(tmp_path: Path):
    path = write_tiny_llama(tmp_path / "tied.gguf", tensor_type="BF16", tied=True, hidden=144, heads=3, kv_heads=3, head_dim=48)
    with open_model(path, quantize="q4_k") as model:
        assert {info.format for name, info in model.tensors.items() if len(info.shape) > 1} == {"F16", "Q8_0"}
        assert model.tensors["token_embd.weight"].format == "F16"  # 144 is not a multiple of 32
        assert model.tensors["blk.0.ffn_down.weight"].format == "Q8_0"  # 128 is, but not of 256
    path = write_tiny_llama(tmp_path / "wide.gguf", tensor_type="BF16", tied=True, **WIDE)
    with open_model(path, quantize="q3_k") as model:
        assert model.tensors["token_embd.weight"].format == "Q6_K"


def test_what_is_quantized_already_is_refused_but_for_its_own_format(tmp_path: Path):
    path = write_tiny_llama(tmp_path / "q8.gguf", tensor_type="Q8_0", **WIDE)
    with pytest.raises(fj.UnsupportedModelError, match=r"q8\.gguf: tensor token_embd\.weight: is Q8_0 already and would lose"):
        fj.load(path, quantize="q4_k")
    with open_model(path, quantize="q8_0") as model, open_model(path) as plain:
        for name, info in plain.tensors.items():
            assert np.array_equal(model.read(model.tensors[name]), plain.read(info))


def test_bad_values_are_refused_by_name(tmp_path: Path):
    for value in (np.nan, 1e9):
        up = np.ones((320, 256), np.float32)
        up[200, 100] = value
        path = write_tiny_llama(tmp_path / "bad.gguf", tensor_type="F32", tensors={"blk.1.ffn_up.weight": up}, **WIDE)
        problem = "holds values that are not finite" if np.isnan(value) else "are too large for the half-precision scales"
        with pytest.raises(fj.ModelFileError, match=rf"bad\.gguf: tensor blk\.1\.ffn_up\.weight: .*{problem}"):
            fj.load(path, quantize="q4_k")


def test_names_of_quantizations(original: Path):
    with pytest.raises(ValueError, match=r"quantize 'q4_k_m' is a mix of formats, which is not supported; 'q4_k' gives"):
        fj.load(original, quantize="q4_k_m")
    with pytest.raises(ValueError, match=rf"quantize 'q9' is not supported; supported: {', '.join(QUANTIZATIONS)}"):
        fj.load("no such model", quantize="q9")


# ---- GGUF


def test_gguf_to_gguf_keeps_every_tensor_and_key(tmp_path: Path):
    extra = {"general.alignment": (64, gguf.GGUFValueType.UINT32), "x.f": -0.1, "x.i": [1, -2]}
    path = write_tiny_llama(tmp_path / "a.gguf", split_max_tensors=7, metadata=extra)
    out = convert(path, tmp_path / "b.gguf", to="gguf")
    assert contents(out) == contents(path)
    with open_model(path) as before, open_model(out) as after:
        kept = {key: value for key, value in before.types.items() if not key.startswith("split.")}
        assert after.types == kept
        for key in kept:
            assert np.array_equal(after.metadata[key], before.metadata[key]), key
    assert {tensor.data_offset % 64 for tensor in gguf.GGUFReader(out).tensors} == {0}


@pytest.mark.slow
def test_quantized_gguf_is_what_loading_quantized_gives(original: Path, tmp_path: Path):
    out = convert(original, tmp_path / "q.gguf", to="gguf", quantize="q5_k")
    made, loaded = fj.load(out, dtype="float32"), fj.load(original, dtype="float32", quantize="q5_k")
    assert np.array_equal(made.logits(IDS)[0], loaded.logits(IDS)[0])
    with open_model(out) as model:
        assert model.metadata["general.file_type"] == gguf.LlamaFileType.MOSTLY_Q5_K_S
        assert model.metadata["general.quantization_version"] == 2
    for tensor in gguf.GGUFReader(out).tensors:
        assert np.isfinite(gguf.quants.dequantize(tensor.data, tensor.tensor_type)).all()


def test_nothing_is_overwritten_unasked(original: Path, tmp_path: Path):
    for to in ("gguf", "orbax"):
        out = tmp_path / to
        out.write_text("precious")
        with pytest.raises(FileExistsError, match=f"{to} exists"):
            convert(original, out, to=to)
        assert out.read_text() == "precious"
    directory = tmp_path / "directory"
    directory.mkdir()
    (directory / "thesis.txt").write_text("precious")
    for to in ("gguf", "orbax"):
        with pytest.raises(FileExistsError, match="directory"):
            convert(original, directory, to=to, force=True)
    assert (directory / "thesis.txt").read_text() == "precious"
    convert(original, tmp_path / "gguf", to="gguf", force=True)
    assert contents(tmp_path / "gguf") == contents(original)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["directory", "gguf", "orbax"]


# ---- Orbax


@pytest.fixture(scope="module")
def saved(original: Path, tmp_path_factory) -> Path:
    return convert(original, tmp_path_factory.mktemp("saved") / "model", to="orbax", quantize="q4_k")


def test_orbax_loads_as_it_was(original: Path, saved: Path):
    before, after = fj.load(original, dtype="float32", quantize="q4_k"), fj.load(saved, dtype="float32")
    assert np.array_equal(before.logits(IDS)[0], after.logits(IDS)[0])
    assert after.config == before.config
    assert after.memory() == before.memory()
    assert after.tokenizer.encode("the an and 12") == before.tokenizer.encode("the an and 12")
    assert after.tokenizer.eos_ids == before.tokenizer.eos_ids
    message = [{"role": "user", "content": "hello"}]
    assert after.render_chat(message) == before.render_chat(message)


@pytest.mark.filterwarnings("ignore:Sharding info not provided")
def test_orbax_reads_it_too(saved: Path):
    import orbax.checkpoint

    with orbax.checkpoint.PyTreeCheckpointer() as checkpointer:
        tree = checkpointer.restore(saved / "parameters")
    with open_model(saved) as model:
        stacked = np.stack([model.read(model.tensors[f"blk.{layer}.attn_k.weight"]) for layer in range(3)])
    assert np.array_equal(np.asarray(tree["attention.key.Q4_K.plain.0"]).reshape(3, -1), stacked)


def test_orbax_back_to_gguf(original: Path, saved: Path, tmp_path: Path):
    """The rows of queries and keys get back the order of GGUF files."""
    direct = convert(original, tmp_path / "direct.gguf", to="gguf", quantize="q4_k")
    assert contents(convert(saved, tmp_path / "back.gguf", to="gguf")) == contents(direct)


@pytest.mark.slow
@pytest.mark.parametrize("target", [Target("gpu", "9.0"), Target("tpu", "TPU v5e")], ids=lambda target: target.platform)
def test_a_device_layout_is_stored_and_repacked(tmp_path: Path, monkeypatch, target: Target):
    """Written for another device: read in that layout, and repacked for this one."""
    path = write_tiny_llama(tmp_path / "model.gguf", tensor_type="Q8_0", **WIDE | {"ffn": 384})
    there = dataclasses.replace(Placement.of(), target=target)
    with monkeypatch.context() as patch:
        patch.setattr(Placement, "of", lambda device=None: there)
        patch.setattr("ferrum_jax.weights.orbax._SPLIT_BYTES", 1000)  # a file for each layer, as large models have
        out = convert(path, tmp_path / "packed", to="orbax")
        with open_model(out) as model, open_model(path) as file:
            assert len(model.parts) > 3 * 7
            layouts = {model.memory_layout(info) for info in model.tensors.values()}
            assert layouts == {target.platform, "ggml"}
            both = [stream.read_parameters(source, check(source)[1], there) for source in (file, model)]
    import jax

    assert jax.tree.structure(both[0]) == jax.tree.structure(both[1])
    assert all(np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, both), strict=True))
    assert np.array_equal(fj.load(out, dtype="float32").logits(IDS)[0], fj.load(path, dtype="float32").logits(IDS)[0])
    assert contents(convert(out, tmp_path / "back.gguf", to="gguf")) == contents(path)


def copy(saved: Path, to: Path) -> Path:
    import shutil

    return Path(shutil.copytree(saved, to))


def changed(path: Path, **fields) -> None:
    header = json.loads((path / "ferrum_jax.json").read_text())
    (path / "ferrum_jax.json").write_text(json.dumps(header | fields))


def test_an_unknown_version_is_named(saved: Path, tmp_path: Path):
    path = copy(saved, tmp_path / "next")
    changed(path, version=2)
    with pytest.raises(fj.UnsupportedModelError, match=r"ferrum_jax\.json: is a checkpoint of version 2; .* reads version 1"):
        fj.load(path)


# The "config" in the header of `saved` from before ModelConfig had layers.
OLD_CONFIG = json.loads(
    """{"architecture": "llama", "num_layers": 3, "hidden_size": 256, "intermediate_size": 320, "num_heads": 4,
    "num_kv_heads": 2, "head_dim": 64, "vocab_size": 64, "context_length": 128, "rms_norm_eps": 9.999999747378752e-06,
    "rope_theta": 10000.0, "rope_dim": 64, "rope_scaling": null, "sliding_window": 0, "num_experts": 0, "experts_per_token": 0,
    "expert_intermediate_size": 0, "norm_topk_prob": false, "expert_weights_scale": 1.0, "dense_layers": [],
    "dtype": "float32"}"""
)


def test_an_older_header_loads(saved: Path, tmp_path: Path):
    path = copy(saved, tmp_path / "old")
    parameters = json.loads((saved / "ferrum_jax.json").read_text())["parameters"]
    stacks = [{"layout" if key == "memory_layout" else key: value for key, value in stack.items()} for stack in parameters]
    assert all("layout" in stack for stack in stacks)
    changed(path, config=OLD_CONFIG, parameters=stacks)
    assert fj.load(path, dtype="float32").config == fj.load(saved, dtype="float32").config
    changed(path, config=OLD_CONFIG | {"num_layers": 2**40})
    with pytest.raises(fj.ModelFileError, match=r"is damaged .*num_layers is 1099511627776; it must be from 1 to 4096"):
        fj.load(path)


def test_damage_is_named(saved: Path, tmp_path: Path):
    header = json.loads((saved / "ferrum_jax.json").read_text())
    parameters = header["parameters"]

    def expect(problem: str, damage) -> None:
        path = copy(saved, tmp_path / "damaged")
        damage(path)
        with pytest.raises(fj.ModelFileError, match=problem):
            fj.load(path)
        import shutil

        shutil.rmtree(path)

    array = "parameters/attention.key.Q4_K.plain.0"
    expect("attention.key.Q4_K.plain.0: is missing", lambda path: (path / array / ".zarray").unlink())
    expect("0.0.0: is missing", lambda path: (path / array / "0.0.0").unlink())
    expect(r"0\.0\.0: has 100 bytes, not", lambda path: os.truncate(path / array / "0.0.0", 100))
    expect(r"\.zarray: .*JSON", lambda path: (path / array / ".zarray").write_text("{"))
    expect(
        r"\.zarray: compressor is not what ferrum_jax wrote",
        lambda path: (path / array / ".zarray").write_text(
            (path / array / ".zarray").read_text().replace('"compressor":null', '"compressor":{"id":"zstd"}')
        ),
    )
    expect(r"ferrum_jax\.json: .*JSON", lambda path: (path / "ferrum_jax.json").write_text('{"version": 1'))
    expect(r"ferrum_jax\.json: has no version", lambda path: (path / "ferrum_jax.json").write_text("{}"))
    expect(
        r"ferrum_jax\.json: is damaged \(KeyError: 'config'\)",
        lambda path: (path / "ferrum_jax.json").write_text('{"version": 1}'),
    )
    expect("is damaged", lambda path: changed(path, config=header["config"] | {"nonsense": 1}))
    expect("is damaged", lambda path: changed(path, metadata={"a": ["uint99", 1]}))
    expect("is damaged", lambda path: changed(path, parameters=[5]))
    expect("tensor token_embd.weight: is missing", lambda path: changed(path, parameters=parameters[1:]))
    expect("is there twice", lambda path: changed(path, parameters=[parameters[0], *parameters]))
    expect("parameter exec: is unknown", lambda path: changed(path, parameters=[parameters[0] | {"path": ["exec"]}]))
    expect("memory layout 'x' is not known", lambda path: changed(path, parameters=[parameters[0] | {"memory_layout": "x"}]))
    expect("is impossible", lambda path: changed(path, parameters=[parameters[0] | {"shape": [-1, 256]}]))


@pytest.mark.slow
def test_an_interrupted_save_is_no_checkpoint(original: Path, tmp_path: Path):
    """Killed while it writes: there is no directory of that name, and the remains are refused."""
    code = (
        "import os, sys, orbax.checkpoint as ocp\n"
        "from ferrum_jax.convert import convert\n"
        "save = ocp.PyTreeCheckpointer.save\n"
        "def half(self, *a, **k):\n    save(self, *a, **k)\n    print('there', flush=True)\n    import time; time.sleep(60)\n"
        "ocp.PyTreeCheckpointer.save = half\n"
        "convert(sys.argv[1], sys.argv[2], to='orbax')\n"
    )
    out = tmp_path / "model"
    process = subprocess.Popen([sys.executable, "-c", code, str(original), str(out)], env=environment(), stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == b"there\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not out.exists()
    (left,) = tmp_path.iterdir()
    with pytest.raises(fj.ModelFileError, match="is what an interrupted conversion left"):
        fj.load(left)
    with pytest.raises(fj.ModelNotFoundError):
        fj.load(out)
    convert(original, out, to="orbax")
    assert contents(out).keys() == contents(original).keys()


def test_a_failed_save_leaves_what_was_there(original: Path, saved: Path, tmp_path: Path, monkeypatch):
    out = copy(saved, tmp_path / "model")
    before = contents(out)

    def full(directory: Path) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("ferrum_jax.weights.orbax.flush", full)
    with pytest.raises(OSError, match="disk full"):
        convert(original, out, to="orbax", force=True)
    assert contents(out) == before
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_the_command(original: Path, tmp_path: Path, capsys):
    from ferrum_jax.cli import main

    out = tmp_path / "out"
    assert main(["convert", str(original), str(out), "--to", "orbax", "--quantize", "q8_0", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["bytes"] > 0
    assert main(["info", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["formats"][0]["format"] == "Q8_0"
    assert main(["convert", str(original), str(out), "--to", "orbax"]) == 2
    assert "out exists; --force replaces it" in capsys.readouterr().err
    assert main(["convert", str(original), str(out), "--to", "orbax", "--force"]) == 0
    assert main(["convert", str(original), str(tmp_path / "x"), "--to", "gguf", "--quantize", "q4_k_m"]) == 2
    assert "'q4_k' gives all matrices that one" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_damaged_headers_raise_nothing_else(saved: Path, tmp_path: Path):
    """Any byte may be wrong: the result is ModelFileError, or a model whose shapes agree with its files."""
    path = copy(saved, tmp_path / "fuzzed")
    files = [path / "ferrum_jax.json", *sorted(path.glob("parameters/*/.zarray"))]
    rng = np.random.default_rng(6)
    refused = 0
    for turn in range(400):
        file = files[0] if turn % 4 else files[rng.integers(1, len(files))]
        sound = file.read_bytes()
        damaged = bytearray(sound)
        damaged[rng.integers(len(damaged))] = rng.integers(256)
        file.write_bytes(damaged if turn % 10 else damaged[: rng.integers(len(damaged))])
        try:
            validate(path)
        except fj.ModelFileError:
            refused += 1
        file.write_bytes(sound)
    assert refused >= 200
