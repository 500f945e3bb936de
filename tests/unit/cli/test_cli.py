"""The command line: what each verb prints, exit codes, one-line errors."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest

import ferrum_jax as fj
from ferrum_jax.cli import common, main
from ferrum_jax.errors import ModelFileError, ModelNotFoundError
from support import environment
from support.cli_fakes import END, FakeModel, FakeParams, FakeTokenizer, child, failing_load, finished


@pytest.fixture
def model(monkeypatch):
    """The class of the fake model, which replaces the real one."""

    class Fake(FakeModel):
        loads: list = []  # noqa: RUF012
        made: list = []  # noqa: RUF012

        def __init__(self, *arguments, **options):
            options.pop("progress", None)
            super().__init__(*arguments, **options)
            self.made.append(self)

    monkeypatch.setitem(vars(fj), "load", Fake)
    monkeypatch.setitem(vars(fj), "SamplingParams", FakeParams)
    return Fake


# --- the frame ---------------------------------------------------------------------------------------------------


def test_help_and_version_import_little(tmp_path):
    slow = {"jax", "flax", "gguf", "jinja2", "rich", "prompt_toolkit", "tokenizers", "asyncio"}
    code = f"import sys; from ferrum_jax.cli import main; c = main(sys.argv[1:]); assert not {slow} & set(sys.modules), c"
    for arguments in (["--help"], ["--version"], ["run", "--help"], []):
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments], env=environment(), capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout and not done.stderr


def test_module_is_the_command():
    done = subprocess.run(
        [sys.executable, "-m", "ferrum_jax", "--version"], env=environment(), capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("ferrum-jax ")


MISTAKES = [
    (["fly"], "fly"),
    (["--fly"], "--fly"),
    (["run", "m", "--fly", "1"], "--fly"),
    (["run", "m", "--prompt", "a", "--temperature", "-1"], "--temperature"),
    (["run", "m", "--prompt", "a", "--temperature", "nan"], "--temperature"),
    (["run", "m", "--prompt", "a", "--temperature", "inf"], "--temperature"),
    (["run", "m", "--prompt", "a", "--top-p", "0"], "--top-p"),
    (["run", "m", "--prompt", "a", "--top-p", "1.5"], "--top-p"),
    (["run", "m", "--prompt", "a", "--top-k", "x"], "--top-k"),
    (["run", "m", "--prompt", "a", "--min-p", "2"], "--min-p"),
    (["run", "m", "--prompt", "a", "--repeat-penalty", "0"], "--repeat-penalty"),
    (["run", "m", "--prompt", "a", "--max-tokens", "0"], "--max-tokens"),
    (["run", "m", "--prompt", "a", "--max-seq-len", "1"], "--max-seq-len"),
    (["run", "m", "--prompt", "a", "--seed", "-1"], "seed"),
    (["run", "m", "--prompt", "a", "--stop", ""], "--stop"),
    (["run", "m", "--prompt", "a", "--dtype", "float7"], "--dtype"),
    (["run", "m", "--prompt", "a", "--kv-dtype", "float7"], "--kv-dtype"),
    (["run", "m", "--prompt", "a", "--output-format", "xml"], "--output-format"),
    (["run", "m", "--prompt", "a", "--regex", "a", "--choice", "b"], "got regex and choice"),
    (["run", "m", "--prompt", "a", "--json-schema", "no-such-file"], "--json-schema no-such-file"),
    (["run", "m", "--prompt", ""], "empty"),
    (["run", "m", "--prompt", "\udcff"], "--prompt"),
    (["run", "m", "--prompt", "a", "--raw", "--system", "s"], "--system"),
    (["run", "m", "--prompt", "a", "--raw", "--no-think"], "--think"),
    (["run", "m", "--prompt", "a" * 500], "context"),
    (["bench", "m", "--batch", "0"], "--batch"),
    (["bench", "m", "--batch", "1,,4"], "--batch"),
    (["bench", "m", "--prompt-len", "x"], "--prompt-len"),
    (["bench", "m", "--gen-len", "1"], "--gen-len"),
    (["bench", "m", "--prompt-len", "180", "--gen-len", "64"], "context"),
    (["perplexity", "m"], "FILE"),
    (["perplexity", "m", "no-such-file"], "no-such-file"),
    (["perplexity", "m", __file__, "--window", "1"], "--window"),
    (["perplexity", "m", __file__], "--window"),
    (["info"], "MODEL"),
    (["info", "no-such-file.gguf"], "no-such-file.gguf"),
    (["info", "m", "--context", "0"], "--context"),
    (["pull"], "MODEL"),
    (["list", "m"], "m"),
    (["doctor", "--no"], "--no"),
]


@pytest.mark.parametrize(("arguments", "names"), MISTAKES, ids=[" ".join(a)[:50].encode("ascii", "replace").decode() for a, _ in MISTAKES])  # fmt: skip  # noqa: E501
def test_a_mistake_is_one_line_and_code_2(model, capsys, arguments, names):
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.endswith("\n") and err.count("\n") == 1
    assert names in err and "Traceback" not in err


def test_a_mistake_in_a_process():
    code, out, err = finished(child("run", "m", "--fly", fake=False))
    assert (code, out, err.count("\n")) == (2, "", 1) and "--fly" in err


@pytest.mark.parametrize(
    "error", [ModelFileError("f.gguf: tensor\n  token_embd is damaged"), ModelNotFoundError("x"), ValueError("dtype?")]
)
def test_bad_models_are_code_2(model, monkeypatch, capsys, error):
    monkeypatch.setitem(vars(fj), "load", failing_load(error))
    assert main(["run", "m", "--prompt", "a"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and str(error).replace("\n  ", "; ") in err


def test_our_fault_is_code_1_and_debug_shows_it(model, monkeypatch, capsys):
    monkeypatch.setitem(vars(fj), "load", failing_load(KeyError("lost")))
    assert main(["run", "m", "--prompt", "a"]) == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "--debug" in err and "lost" in err
    for arguments in (["--debug", "run", "m", "--prompt", "a"], ["run", "m", "--prompt", "a", "--debug"]):
        assert main(arguments) == 1
        assert "Traceback" in capsys.readouterr().err


def slow(reply, delay):
    """A child that answers `reply`, one letter every `delay` seconds."""
    return child("run", "m", "--prompt", "a", code=f"cli_fakes.FakeModel.reply, cli_fakes.FakeModel.delay = {(reply, delay)}")


def test_broken_pipe_is_quiet():
    process = slow("ab" * 80, 0.01)
    assert process.stdout.read(1) == "a"
    process.stdout.close()
    assert (process.wait(30), process.stderr.read()) == (0, "")


def test_ctrl_c_is_130():
    process = slow("b" * 150, 0.1)
    assert process.stdout.read(2) == "bb"
    process.send_signal(signal.SIGINT)
    code, _, err = finished(process)
    assert code == 130 and "Traceback" not in err


# --- run ---------------------------------------------------------------------------------------------------------


def test_text(model, capsys):
    assert main(["run", "m", "--prompt", "hi"]) == 0
    out, err = capsys.readouterr()
    assert (out, err) == ("two words\n", "")
    [made] = model.made
    assert made.asked == [([{"role": "user", "content": "hi"}], {})]
    assert made.streams[0].closed


def test_every_sampling_flag_arrives(model):
    flags = "--max-tokens 5 --temperature 0 --top-k 4 --top-p 0.5 --min-p 0.1 --repeat-penalty 1.2 --seed 9"
    assert main(["run", "m", "--prompt", "a", *flags.split(), "--stop", "x", "--stop", "\n"]) == 0
    assert model.made[0].params == FakeParams(5, 0.0, 4, 0.5, 0.1, 1.2, 9, ("x", "\n"))


def test_defaults(model):
    assert main(["run", "m", "--prompt", "a"]) == 0
    assert model.made[0].params == FakeParams(max_tokens=200, temperature=0.7, top_p=0.95)
    assert model.loads == [
        {"source": "m", "dtype": "auto", "implementation": None, "mesh": None, "kv_dtype": None, "max_seq_len": None}
    ]


def test_load_flags_arrive(model):
    flags = ["--dtype", "float32", "--mesh", "tensor=2", "--kv-dtype", "float16", "--max-seq-len", "99"]
    assert main(["run", "m", "--prompt", "a", *flags]) == 0
    [load] = model.loads
    assert load == {
        "source": "m",
        "dtype": "float32",
        "implementation": None,
        "mesh": "tensor=2",
        "kv_dtype": "float16",
        "max_seq_len": 99,
    }
    assert main(["run", "m", "--prompt", "a" * 99, *flags]) == 2


@pytest.mark.parametrize(("flag", "value"), [("--think", True), ("--no-think", False)])
def test_thinking_and_system(model, flag, value):
    assert main(["run", "m", "--prompt", "a", flag, "--system", "s"]) == 0
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "a"}]
    assert model.made[0].asked == [(messages, {"enable_thinking": value})]


def test_a_switch_the_template_lacks_is_said(model, monkeypatch, capsys):
    monkeypatch.setattr(FakeTokenizer, "chat_template", "{{ messages }}")
    assert main(["run", "m", "--prompt", "a", "--no-think"]) == 0
    assert "thinking switch" in capsys.readouterr().err


def test_raw_and_no_template_complete_the_text(model, monkeypatch, capsys):
    assert main(["run", "m", "--prompt", "a", "--raw"]) == 0
    monkeypatch.setattr(FakeTokenizer, "chat_template", None)
    assert main(["run", "m", "--prompt", "a"]) == 0
    assert "does not have a chat template" in capsys.readouterr().err
    assert [made.asked for made in model.made] == [[], []]
    assert [made.streams[0].prompt_token_ids for made in model.made] == [[1, 97], [1, 97]]
    assert main(["run", "m", "--prompt", "a", "--system", "s"]) == 2


def test_without_a_model_it_is_the_one_of_the_package(model, capsys):
    assert main(["run", "--prompt", "Once"]) == 0
    assert capsys.readouterr().out == "two words\n"
    assert main(["bench", "--once", "--prompt-len", "5", "--gen-len", "8"]) == 0
    assert [load["source"] for load in model.loads] == ["tiny", "tiny"]


def test_json_lines(model, capsys):
    assert main(["run", "m", "--prompt", "hi", "--output-format", "jsonl"]) == 0
    *pieces, last = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert "".join(piece["text"] for piece in pieces) == "two words"
    assert all(set(piece) == {"text", "token_ids"} for piece in pieces)
    assert pieces[-1]["token_ids"] == [END]
    assert last == {
        "finish_reason": "stop",
        "usage": {"prompt_tokens": 3, "completion_tokens": 10},
        "timings": {"load_s": 0.5, "compile_s": 0.25, "prefill_tok_s": 6.0, "decode_tok_s": 5.0},
    }


def test_length_is_said_and_stats_go_to_stderr(model, capsys):
    assert main(["run", "m", "--prompt", "hi", "--max-tokens", "3", "--stats"]) == 0
    out, err = capsys.readouterr()
    assert out == "two\n"
    assert "cut after 3 tokens" in err and "prompt 3 tokens, 6.0 tok/s" in err and "5.0 tok/s" in err


@pytest.mark.parametrize("flags", [["--prompt", "-"], []])
def test_stdin_is_the_prompt(flags):
    process = child("run", "m", "--raw", "--output-format", "jsonl", *flags, stdin=subprocess.PIPE)
    code, out, _ = finished(process, input="héllo\n")
    assert code == 0
    assert json.loads(out.splitlines()[-1])["usage"]["prompt_tokens"] == 6


def test_bad_stdin():
    for data, word in ((b"", "empty"), (b"\xff\xfe", "UTF-8")):
        code, _, err = finished(child("run", "m", stdin=subprocess.PIPE, text=False), input=data)
        assert code == 2 and err.count(b"\n") == 1 and word.encode() in err


def test_text_appears_as_it_is_made():
    process = slow("xyz", 0.5)
    process.stdout.read(1)
    first = time.perf_counter()
    process.stdout.read()
    assert time.perf_counter() - first >= 0.8  # two more letters and the end token


# --- the other verbs ---------------------------------------------------------------------------------------------


def test_bench(model, monkeypatch, capsys):
    from ferrum_jax.cli import bench

    started = []
    again = {"load_s": 1.0, "compile_s": 2.0}
    monkeypatch.setattr(bench, "second_start", lambda arguments: started.append(arguments) or again)
    assert main(["bench", "m", "--batch", "1,4", "--prompt-len", "5,9", "--gen-len", "10", "--json"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    result = json.loads(out)
    assert set(result) == {
        "model", "device", "dtype", "versions", "rows", "load_s", "compile_s", "peak_rss_bytes",
        "content_check", "second_start",
    }  # fmt: skip
    assert [(row["batch"], row["prompt_len"], row["gen_len"]) for row in result["rows"]] == [
        (1, 5, 10), (4, 5, 10), (1, 9, 10), (4, 9, 10),
    ]  # fmt: skip
    for row in result["rows"]:
        assert set(row) == {"batch", "prompt_len", "gen_len", "prefill_tok_s", "decode_tok_s", "ttft_s"}
        assert row["prefill_tok_s"] > 0 and row["decode_tok_s"] > 0 and row["ttft_s"] > 0
    assert result["content_check"] == {"tokens": 8, "prompt_len": 5, "batches": [1, 4], "equal": True, "max_gap": 0.0}
    assert result["second_start"] == again
    assert started == [["m", "--batch", "1,4", "--prompt-len", "5,9", "--gen-len", "10", "--dtype", "auto"]]
    assert [load["dtype"] for load in model.loads] == ["auto", "float32"]
    assert result["dtype"] == "bfloat16"
    assert set(result["versions"]) == {"python", "ferrum_jax", "jax", "jaxlib", "flax"}


def test_bench_table_prints_a_gap(model, monkeypatch, capsys):
    def generate(self, prompts, params):
        time.sleep(0.0005 * params.max_tokens)
        return [types.SimpleNamespace(token_ids=list(range(8, 8 + params.max_tokens)), error="") for _ in prompts]

    monkeypatch.setattr(model, "generate", generate)
    flags = ["--batch", "1", "--prompt-len", "5", "--gen-len", "10", "--no-second-start", "--dtype", "float32"]
    assert main(["bench", "m", *flags]) == 0
    out = capsys.readouterr().out
    assert "at most 2.0000 below" in out and "prefill_tok_s" in out and "second start" not in out
    assert len(model.loads) == 1


@pytest.mark.slow
def test_bench_refuses_short_completions_and_nan(model, monkeypatch, capsys):
    flags = ["--batch", "1", "--prompt-len", "5", "--gen-len", "10", "--no-second-start"]
    monkeypatch.setattr(model, "logits", lambda self, batch: [np.full((len(batch[0]), 128), np.nan, np.float32)])
    assert main(["bench", "m", *flags]) == 1
    assert "finite" in capsys.readouterr().err
    monkeypatch.setattr(model, "generate", lambda self, prompts, params: [types.SimpleNamespace(token_ids=[7], error="")])
    assert main(["bench", "m", *flags]) == 1
    assert "10 tokens" in capsys.readouterr().err


def test_bench_once_is_the_second_start(model, capsys):
    assert main(["bench", "m", "--prompt-len", "5", "--once"]) == 0
    assert json.loads(capsys.readouterr().out) == {"load_s": 0.5, "compile_s": 0.0}


def test_second_start_reports_failure(capsys):
    from ferrum_jax.cli import bench

    assert bench.second_start(["m", "--fly"]) is None
    assert "exit code 2" in (note := capsys.readouterr().err) and "--fly" in note


def test_perplexity(model, tmp_path, capsys):
    file = tmp_path / "text"
    file.write_text("a" * 100)
    assert main(["perplexity", "m", str(file)]) == 0
    assert capsys.readouterr() == ("12.5000\n", "")
    assert main(["perplexity", "m", str(file), "--window", "30", "--json", "--dtype", "float32"]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "model": "m", "file": str(file), "tokens": 100, "scored": 87, "window": 30, "perplexity": 30.0,
    }  # fmt: skip
    assert main(["perplexity", "m", str(file), "--window", "101"]) == 2
    assert "fewer" in capsys.readouterr().err
    file.write_bytes(b"\xff\xfe")
    assert main(["perplexity", "m", str(file)]) == 2
    assert "UTF-8" in capsys.readouterr().err


def small_gguf(path, experts=0):
    """A complete model of two layers without a vocabulary: real keys, tiny tensors."""
    import gguf

    writer = gguf.GGUFWriter(path, "qwen3moe" if experts else "llama")
    writer.add_name("tiny")
    writer.add_license("apache-2.0")
    writer.add_block_count(2)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(48)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_key_length(16)
    writer.add_value_length(16)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    if experts:
        writer.add_expert_count(experts)
        writer.add_expert_used_count(2)
        writer.add_expert_feed_forward_length(24)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_chat_template("{{ messages }}")
    shapes = {"token_embd": (100, 32), "output_norm": (32,)}
    per_layer: dict[str, tuple[int, ...]] = {
        "attn_norm": (32,), "ffn_norm": (32,), "attn_q": (64, 32), "attn_k": (32, 32), "attn_v": (32, 32),
        "attn_output": (32, 64),
    }  # fmt: skip
    if experts:
        per_layer |= {"attn_q_norm": (16,), "attn_k_norm": (16,), "ffn_gate_inp": (experts, 32)}
        per_layer |= {"ffn_gate_exps": (experts, 24, 32), "ffn_up_exps": (experts, 24, 32), "ffn_down_exps": (experts, 32, 24)}
    else:
        per_layer |= {"ffn_up": (48, 32), "ffn_down": (32, 48), "ffn_gate": (48, 32)}
    shapes |= {f"blk.{layer}.{name}": shape for layer in range(2) for name, shape in per_layer.items()}
    for name, shape in shapes.items():
        if name == "blk.0.ffn_gate" or name == "blk.0.ffn_gate_exps":  # one Q8_0 block per row
            blocks = np.zeros((*shape[:-1], 34), np.uint8)
            writer.add_tensor(f"{name}.weight", blocks, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
        else:
            writer.add_tensor(f"{name}.weight", np.zeros(shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_info_json(tmp_path, capsys):
    path = small_gguf(tmp_path / "tiny.gguf")
    assert main(["info", str(path), "--json", "--context", "10"]) == 0
    facts = json.loads(capsys.readouterr().out)
    plain = 100 * 32 + 32 + 2 * (2 * 32 + 2 * 64 * 32 + 2 * 32 * 32 + 3 * 48 * 32) - 48 * 32
    tensor_bytes = 4 * plain + 48 * 34
    assert facts["formats"] == [
        {"format": "F32", "tensors": 19, "weights": plain, "bytes": 4 * plain},
        {"format": "Q8_0", "tensors": 1, "weights": 1536, "bytes": 1632},
    ]
    assert facts["parameters"] == plain + 1536 and facts["tensor_bytes"] == tensor_bytes
    assert facts["layer_bodies"] == 2, "the gates differ in format"
    assert facts["file_bytes"] == path.stat().st_size
    # 2 layers x (keys, values) x 2 heads x 16 values
    assert facts["kv_bytes_per_token"] == {"float32": 512, "bfloat16": 256, "float16": 256}
    working = 4 * (64 * 32 + 100)
    half = tensor_bytes + 2560 + working
    assert facts["memory"] == {
        "context": 10,
        "kv_bytes": {"float32": 5120, "bfloat16": 2560, "float16": 2560},
        "working_bytes": working,
        "total_bytes": {"float32": half + 2560, "bfloat16": half, "float16": half},
    }
    expected = {
        "architecture": "llama", "num_layers": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4,
        "num_kv_heads": 2, "head_dim": 16, "vocab_size": 100, "context_length": 64, "num_experts": 0, "name": "tiny",
        "licence": "apache-2.0", "tokenizer": {"model": "gpt2", "pre": "qwen2"}, "chat_template": True, "parts": 1,
    }  # fmt: skip
    assert {key: facts[key] for key in expected} == expected


def test_info_table(tmp_path, capsys):
    assert main(["info", str(small_gguf(tmp_path / "tiny.gguf", experts=8))]) == 0
    out = capsys.readouterr().out
    for text in ("qwen3moe", "8, 2 a token, 24 wide", "apache-2.0", "at 64 tokens", "Q8_0", "8.50", "gpt2 / qwen2"):
        assert text in out
    assert main(["info", str(tmp_path / "tiny.gguf"), "--context", "65"]) == 0
    assert "64 tokens" in capsys.readouterr().err


def test_info_of_a_damaged_file(tmp_path, capsys):
    path = small_gguf(tmp_path / "tiny.gguf")
    path.write_bytes(path.read_bytes()[:-1000])
    assert main(["info", str(path)]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "tiny.gguf" in err


def test_info_needs_no_jax(tmp_path):
    path = small_gguf(tmp_path / "tiny.gguf")
    code = "import sys; from ferrum_jax.cli import main; c = main(); assert 'jax' not in sys.modules; sys.exit(c)"
    done = subprocess.run(
        [sys.executable, "-c", code, "info", path], env=environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture
def hub(monkeypatch):
    """A hub with one cached model and two aliases."""
    from ferrum_jax import hub

    cached = types.SimpleNamespace(name="tiny:1b", path=Path("/cache/tiny.gguf"), bytes=2048, source="hub")
    alias = types.SimpleNamespace(name="tiny:1b", sources=("owner/repo:Q4_K_M",), license="mit", checked=False, note="")
    monkeypatch.setattr(hub, "list_cached", lambda: [cached])
    monkeypatch.setattr(hub, "ALIASES", {"tiny:1b": alias})
    return hub


def test_list(hub, monkeypatch, capsys):
    assert main(["list"]) == 0
    out = capsys.readouterr().out
    assert "tiny:1b" in out and "2.0 KiB" in out and "/cache/tiny.gguf" in out
    assert main(["list", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == [
        {"name": "tiny:1b", "path": "/cache/tiny.gguf", "bytes": 2048, "source": "hub"}
    ]
    monkeypatch.setattr(hub, "list_cached", lambda: [])
    assert main(["list"]) == 0
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("flag", ["--aliases", "--all"])
def test_list_aliases(hub, flag, capsys):
    assert main(["list", flag]) == 0
    out = capsys.readouterr().out
    assert "owner/repo:Q4_K_M" in out and "mit" in out and "never" in out
    assert main(["list", flag, "--json"]) == 0
    [row] = json.loads(capsys.readouterr().out)
    assert row["checked"] is False and row["sources"] == ["owner/repo:Q4_K_M"]


def test_pull(hub, monkeypatch, capsys):
    monkeypatch.setattr(hub, "pull", lambda source, progress=None: Path("/cache") / source)
    assert main(["pull", "tiny"]) == 0
    assert capsys.readouterr() == ("/cache/tiny\n", "")


@pytest.fixture
def diagnostics(monkeypatch):
    """A trial compile that chose one backend."""
    choice = types.SimpleNamespace(operation="quantized_matmul", format="Q4_K", backend="xla", reason="the only one")
    module = types.SimpleNamespace(trial=lambda dtype: [choice], choice=vars(choice))
    monkeypatch.setitem(sys.modules, "ferrum_jax.diagnostics", module)
    monkeypatch.setattr(fj, "diagnostics", module, raising=False)
    return module


def test_doctor(diagnostics, capsys):
    assert main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["problems"] == [] and report["backends"] == [diagnostics.choice]
    assert report["devices"][0]["platform"] == "cpu" and report["devices"][0]["memory_bytes"] > 2**28
    assert report["auto_dtype"] in common.DTYPES
    assert set(report["compilation_cache"]) == set(report["model_cache"]) == {"path", "bytes"}
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "quantized_matmul" in out and "the only one" in out and "everything needed works" in out


def test_doctor_names_what_is_broken(diagnostics, capsys):
    def fail(dtype):
        raise RuntimeError("no kernel")

    diagnostics.trial = fail
    assert main(["doctor"]) == 1
    out, err = capsys.readouterr()
    assert "RuntimeError: no kernel" in out and err == ""


def test_remarks_are_printed_once_and_not_before_an_error(capsys):
    with common.progress_bar() as progress:
        for step in [(0, None, "never checked"), (0, None, "never checked"), (5, 9, "fetching"), (9, 9, "fetching")]:
            progress(*step)
            assert capsys.readouterr().err == ("note: never checked\n" if step == (5, 9, "fetching") else "")
        progress(0, None, "done")
    assert capsys.readouterr() == ("", "note: done\n")
    with pytest.raises(KeyError), common.progress_bar() as progress:
        progress(0, None, "never checked")
        raise KeyError
    assert capsys.readouterr() == ("", "")


def test_a_bar_is_drawn_on_a_terminal():
    import pty

    master, slave = pty.openpty()
    lines = "with common.progress_bar() as update: update(0, None, 'remark'); update(5, 10, 'fetching')"
    code = f"from ferrum_jax.cli import common\n{lines}"
    subprocess.run([sys.executable, "-c", code], stderr=slave, check=True, env=environment(TERM="xterm"))
    os.close(slave)
    shown = os.read(master, 4096).decode()
    os.close(master)
    assert "fetching" in shown and "note: remark" in shown


def test_readable_bytes():
    assert [common.readable_bytes(n) for n in (0, 1023, 1536, 3 * 2**40)] == ["0 B", "1023 B", "1.5 KiB", "3.0 TiB"]
