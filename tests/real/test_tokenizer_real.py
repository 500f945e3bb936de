"""The vocabularies of the two real files: ids of difficult texts equal llama.cpp's, and decoding returns every text."""

import json
from pathlib import Path

import pytest

from ferrum_jax.tokenizer import TextStream, Tokenizer
from ferrum_jax.weights.gguf import open_gguf

pytestmark = pytest.mark.real
GOLDENS = Path(__file__).resolve().parents[1] / "goldens/tokenizer"


def check_real(tokenizer: Tokenizer, name: str) -> None:
    """Compares with tests/goldens/tokenizer/real_NAME.json (make_tokenizer_goldens.py)."""
    golden = json.loads((GOLDENS / f"real_{name}.json").read_text(encoding="utf-8"))
    assert sorted(tokenizer.eos_ids) == golden["end_ids"]
    for text, plain, special in zip(golden["texts"], golden["plain"], golden["special"], strict=True):
        assert tokenizer.encode(text, add_special=False, parse_special=False) == plain, repr(text)
        assert tokenizer.encode(text, add_special=True, parse_special=True) == special, repr(text)
        stream = TextStream(tokenizer)
        assert "".join([stream.push(i) for i in plain]) + stream.flush() == tokenizer.decode(plain)


@pytest.mark.parametrize(("fixture", "name"), [("smollm2_path", "smollm2"), ("qwen25_path", "qwen2.5")])
def test_real_vocabulary(fixture: str, name: str, request: pytest.FixtureRequest) -> None:
    path = request.getfixturevalue(fixture)
    with open_gguf(path) as file:
        check_real(Tokenizer.from_gguf(file.metadata, path.name), name)
