"""Random JSON schemas, and a tiny model whose tokens are bytes, so that it writes any text."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from ferrum_jax.tokenizer.bpe import byte_values
from support.tiny_gguf import write_tiny_llama

_PIECES = ['"a"', '":', '","', "true", "null", '{"', '"}', "12", "[]", "tru"]  # tokens of several characters
_PATTERNS = ("^[a-c]{1,4}$", "x+y", "^(ab|cd)*$", "^\\d{2}-\\d{2}$", "^[^0-9]{2,6}$", "[.]")
_FORMATS = ("date", "time", "uuid", "ipv4", "email", "path", "binary", "duration")
END = 0


def byte_model(path: Path, vocab: int = 310, context: int = 256) -> Path:
    """Writes a random model: an end token, all bytes, a few longer tokens, and places that are not used."""
    letters = {byte: letter for letter, byte in byte_values().items()}
    tokens = ["<end>", *(letters[byte] for byte in range(256)), "<call>", "<plain>", *_PIECES[: vocab - 259]]
    types = [3, *[1] * 256, 3, 4, *[1] * len(_PIECES)]
    tokens += [f"[PAD{i}]" for i in range(vocab - 3 - len(tokens))]  # the logits are wider than the vocabulary
    types += [5] * (len(tokens) - len(types))
    given = {
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": ["1 2"],
        "tokenizer.ggml.eos_token_id": END,
        "tokenizer.ggml.bos_token_id": END,
    }
    return write_tiny_llama(path, vocab=vocab, context=context, metadata=given)


def token_of(text: str) -> int:
    """The token of one ASCII character."""
    return 1 + ord(text)


# Random bytes rarely end a string or an object.
BIAS = {token_of(letter): weight for letter, weight in {'"': 4.0, "}": 4.0, "]": 4.0, ",": 1.0}.items()} | {END: 6.0}


def random_schema(seed: int) -> dict[str, Any]:
    """A schema of which every keyword is one that can be done."""
    rng = random.Random(seed)
    made = _any(rng, 3)
    if rng.random() < 0.2:  # a list of itself
        made = {"type": "object", "properties": {"value": made, "next": {"anyOf": [{"$ref": "#"}, {"type": "null"}]}}}
        made |= {"required": ["value", "next"], "additionalProperties": False}
    if rng.random() < 0.3:
        made = {"$schema": "https://json-schema.org/draft/2020-12/schema", "$ref": "#/$defs/a~1b", "$defs": {"a/b": made}}
    return made


def _any(rng: random.Random, depth: int) -> dict[str, Any]:
    kinds = [_string, _integer, _number, _fixed, lambda *_: {"type": "boolean"}, lambda *_: {"type": ["null", "integer"]}]
    if depth:
        kinds += [_object, _object, _array, _several]
    made = rng.choice(kinds)(rng, depth - 1)
    notes = {"title": "T", "description": "not a rule", "default": 3, "examples": [1], "$comment": "c", "deprecated": True}
    return made | {name: notes[name] for name in notes if rng.random() < 0.1}


def _bounds(rng: random.Random, least: str, most: str, top: int) -> dict[str, int]:
    low = rng.randint(0, top)
    return {name: value for name, value in ((least, low), (most, low + rng.randint(0, top))) if rng.random() < 0.6}


def _string(rng: random.Random, depth: int) -> dict[str, Any]:
    what = rng.choice(
        [_bounds(rng, "minLength", "maxLength", 6), {"pattern": rng.choice(_PATTERNS)}, {"format": rng.choice(_FORMATS)}]
    )
    return {"type": "string"} | what


def _integer(rng: random.Random, depth: int) -> dict[str, Any]:
    low = rng.randint(-1000, 1000)
    made = {"type": "integer", "minimum": low, "maximum": low + rng.randint(10, 5000)}
    return made | rng.choice([{}, {"multipleOf": rng.choice([2, 3, 7])}, {"exclusiveMinimum": low}])


def _number(rng: random.Random, depth: int) -> dict[str, Any]:
    low = rng.uniform(-10, 10)
    return {"type": "number"} | rng.choice(
        [{}, {"minimum": low}, {"minimum": low, "exclusiveMaximum": low + 7}, {"maximum": low}]
    )


def _fixed(rng: random.Random, depth: int) -> dict[str, Any]:
    values = [None, True, 1.5, -3, "text", 'é"\\\n', [1, "a"], {"k": [None]}, "", 2**53]
    return rng.choice([{"const": rng.choice(values)}, {"enum": rng.sample(values, 3)}])


def _array(rng: random.Random, depth: int) -> dict[str, Any]:
    made = {"type": "array", "items": _any(rng, depth), "uniqueItems": False} | _bounds(rng, "minItems", "maxItems", 3)
    if rng.random() < 0.3:
        made["prefixItems"] = [_any(rng, depth) for _ in range(rng.randint(1, 2))]
    return made


def _object(rng: random.Random, depth: int) -> dict[str, Any]:
    names = rng.sample(["a", "b", "name", "é", "a b", 'q"', "$ref", "properties", "type"], rng.randint(1, 4))
    made: dict[str, Any] = {"type": "object", "properties": {name: _any(rng, depth) for name in names}}
    made["required"] = rng.sample(names, rng.randint(0, len(names)))
    rest = rng.choice([False, False, None, _any(rng, 0)])
    if rest is not None:
        made["additionalProperties"] = rest
    elif rng.random() < 0.5:
        made["patternProperties"] = {"^x": _any(rng, 0)}
    return made


def _several(rng: random.Random, depth: int) -> dict[str, Any]:
    tagged = [{"type": "object", "properties": {"kind": {"const": kind}, "v": _any(rng, depth)}, "required": ["kind", "v"]}
              for kind in ("one", "two")]  # fmt: skip
    return rng.choice(
        [{"anyOf": [_any(rng, depth), _any(rng, depth)]}, {"oneOf": tagged}, {"allOf": [tagged[0], {"title": "x"}]}]
    )
