"""Checkpoint directories of Hugging Face, converted: the same model from Orbax and from GGUF, with the same tokenizer."""

import json
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

import ferrum_jax as fj
from ferrum_jax.convert import convert
from ferrum_jax.tokenizer.to_gguf import PROBE, tokenizer_metadata
from ferrum_jax.weights.opening import open_model
from support import directories
from support.directories import GPTQ, MOE
from support.goldens import directory_cases

IDS = [[5, 9, 13, 2, 40, 41, 42]]
CASES = {case.name: case for case in directory_cases.CASES}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama3-bf16", "qwen3moe-f32", "gptq-llama"])
def test_a_directory_from_orbax_and_from_gguf(name: str, tmp_path: Path):
    """Rotated rows interleaved for GGUF and back, factors of rope, stacked experts, packed matrices that are ggml's."""
    path = directories.write(CASES[name], tmp_path / "model")
    expected = fj.load(path, dtype="float32")
    saved = convert(path, tmp_path / "saved", to="orbax")
    from_path, from_saved = (convert(source, tmp_path / f"{i}.gguf", to="gguf") for i, source in enumerate((path, saved)))
    for made in (saved, from_path, from_saved):
        model = fj.load(made, dtype="float32")
        assert np.array_equal(model.logits(IDS)[0], expected.logits(IDS)[0]), made.name
        assert model.tokenizer.eos_ids == expected.tokenizer.eos_ids
        assert model.tokenizer.chat_template == expected.tokenizer.chat_template
        assert model.tokenizer.encode("Iron is 42 times") == expected.tokenizer.encode("Iron is 42 times")
    with open_model(from_path) as file:
        assert {i.format for i in file.tensors.values() if len(i.shape) == 1} == {"F32"}
        routers = [info for key, info in file.tensors.items() if "ffn_gate_inp" in key]
        assert all(info.format == "F32" for info in routers)
        assert file.metadata["general.architecture"] == expected.config.architecture


@pytest.mark.slow
def test_a_directory_quantized(tmp_path: Path):
    path = directories.write(CASES["qwen3moe-f32"], tmp_path / "model")
    expected = fj.load(path, dtype="float32", quantize="q8_0")
    assert set(expected.memory()["parameters"]) == {"Q8_0", "F32"}
    for to in ("orbax", "gguf"):
        made = fj.load(convert(path, tmp_path / to, to=to, quantize="q8_0"), dtype="float32")
        assert np.array_equal(made.logits(IDS)[0], expected.logits(IDS)[0])


def test_columns_in_another_order_survive_in_orbax_and_are_refused_in_gguf(tmp_path: Path):
    path = directories.write(GPTQ, tmp_path / "model")
    saved = convert(path, tmp_path / "saved", to="orbax")
    expected, made = fj.load(path, dtype="float32"), fj.load(saved, dtype="float32")
    assert np.array_equal(made.logits(IDS)[0], expected.logits(IDS)[0])
    assert made.memory() == expected.memory()
    for source in (path, saved):
        with pytest.raises(fj.UnsupportedModelError, match=r"tensor .*: GGUF cannot represent reordered columns"):
            convert(source, tmp_path / "out.gguf", to="gguf")
    with pytest.raises(fj.UnsupportedModelError, match=r"q_proj\.weight: is U4_32_F16 already and would lose twice as Q8_0"):
        fj.load(path, quantize="q8_0")
    assert not (tmp_path / "out.gguf").exists()


def test_what_llama_cpp_cannot_run_is_refused(tmp_path: Path):
    biased = directories.write(CASES["qwen3-new-keys-bias"], tmp_path / "biased")
    with pytest.raises(fj.UnsupportedModelError, match=r"q_proj\.bias: llama\.cpp's Qwen3 does not support biases"):
        convert(biased, tmp_path / "out.gguf", to="gguf")
    unscaled = directories.write(MOE, tmp_path / "unscaled", {"norm_topk_prob": False})
    with pytest.raises(fj.UnsupportedModelError, match="norm_topk_prob false cannot be written as GGUF"):
        convert(unscaled, tmp_path / "out.gguf", to="gguf")
    some = directories.write(CASES["mistral-window-kinds"], tmp_path / "some")
    with pytest.raises(fj.UnsupportedModelError, match="a sliding window in some layers only cannot be written as GGUF"):
        convert(some, tmp_path / "out.gguf", to="gguf")
    windowed = directories.write(CASES["mistral-f32"], tmp_path / "windowed")
    remarks: list[str] = []
    convert(windowed, tmp_path / "out.gguf", to="gguf", progress=lambda done, total, text: remarks.append(text))
    assert "llama.cpp does not apply the window of 24 tokens in this architecture" in remarks


# ---- tokenizers

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}DIGITS| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)


def _split(pattern: str):
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), BYTES])


PRE = {
    "gpt-2": pre_tokenizers.ByteLevel(add_prefix_space=False),
    "llama-bpe": _split(_WORDS.replace("DIGITS", "{1,3}")),
    "qwen2": _split(_WORDS.replace("DIGITS", "")),
    "smollm": pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    ),
}


def write_tokenizer(directory: Path, made: Tokenizer, **config) -> Path:
    directory.mkdir()
    made.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


def byte_level(pre, **options) -> Tokenizer:
    made = Tokenizer(models.BPE(**options))
    made.pre_tokenizer, made.decoder = pre, decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        [PROBE], trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, special_tokens=["<s>", "<|im_end|>", "<x>"])
    )
    return made


def sentencepiece(**options) -> Tokenizer:
    made = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True, **options))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    octets = [f"<0x{byte:02X}>" for byte in range(256)]
    made.train_from_iterator(
        [PROBE[:200]], trainers.BpeTrainer(vocab_size=400, special_tokens=["<unk>", "<s>", "</s>", *octets])
    )
    content = json.loads(made.to_str())
    content["added_tokens"] = content["added_tokens"][:3]
    made = Tokenizer.from_str(json.dumps(content))
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return made


def metadata_of(directory: Path, size: int) -> dict:
    return {key: entry.value for key, entry in tokenizer_metadata(directory, size).items()}


@pytest.mark.parametrize("name", PRE)
def test_pre_tokenizers_are_found_by_what_they_do(name: str, tmp_path: Path):
    made = byte_level(PRE[name], ignore_merges=name == "llama-bpe")
    directory = write_tokenizer(tmp_path / "t", made, eos_token="<|im_end|>")
    metadata = metadata_of(directory, 420)
    assert (metadata["tokenizer.ggml.model"], metadata["tokenizer.ggml.pre"]) == ("gpt2", name)
    assert len(metadata["tokenizer.ggml.tokens"]) == 420
    assert metadata["tokenizer.ggml.tokens"][419] == "[PAD419]"
    assert not metadata["tokenizer.ggml.add_bos_token"]
    tokenizer = fj.tokenizer.Tokenizer.from_gguf(metadata)
    for text in ("it's 1234567 o'clock\n\n  now", "東京 ünïcödé 👍", " x", ""):
        assert tokenizer.encode(text) == made.encode(text).ids


def test_a_sentencepiece_vocabulary_gets_scores(tmp_path: Path):
    made = sentencepiece()
    directory = write_tokenizer(tmp_path / "t", made, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    metadata = metadata_of(directory, made.get_vocab_size())
    assert metadata["tokenizer.ggml.model"] == "llama"
    assert metadata["tokenizer.ggml.add_bos_token"] and metadata["tokenizer.ggml.add_space_prefix"]
    tokenizer = fj.tokenizer.Tokenizer.from_gguf(metadata)
    for text in ("Hello World again and again", "  two", "東京 👍", "a\nb"):
        assert tokenizer.encode(text) == made.encode(text).ids


def test_other_ends_are_kept(tmp_path: Path):
    directory = write_tokenizer(tmp_path / "t", byte_level(PRE["qwen2"]), eos_token="<|im_end|>")
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 2]}))
    metadata = metadata_of(directory, 400)
    assert metadata["tokenizer.ggml.eot_token_id"] == 2
    assert fj.tokenizer.Tokenizer.from_gguf(metadata).eos_ids == {1, 2}


def test_tokenizers_that_llama_cpp_has_not_are_refused(tmp_path: Path):
    odd = write_tokenizer(tmp_path / "odd", byte_level(_split(r"[aeiou]+|\s")), eos_token="<|im_end|>")
    with pytest.raises(fj.UnsupportedModelError, match=r"cuts text as no pre-tokenizer of llama\.cpp does"):
        tokenizer_metadata(odd, 400)
    words = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    words.decoder = decoders.WordPiece()
    with pytest.raises(fj.UnsupportedModelError, match=r"tokenizer\.json"):
        tokenizer_metadata(write_tokenizer(tmp_path / "words", words), 2)
    lowered = sentencepiece()
    lowered.normalizer = normalizers.Sequence([normalizers.Lowercase(), lowered.normalizer])
    lower = write_tokenizer(tmp_path / "lower", lowered, bos_token="<s>", eos_token="</s>")
    with pytest.raises(fj.UnsupportedModelError, match=r"llama\.cpp would encode texts with other ids"):
        tokenizer_metadata(lower, lowered.get_vocab_size())
