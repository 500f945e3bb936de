"""What a schema or a grammar says is done or refused by name, in bounded time; what only annotates does not matter."""

import dataclasses
import datetime
import decimal
import enum
import json
import pathlib
import uuid
from typing import Annotated, Literal

import pydantic
import pytest

import ferrum_jax as fj
from ferrum_jax.structured import MAX_LENGTH, schemas
from ferrum_jax.structured.grammar import Grammars
from support.schemas import END


class Bytes:
    """A tokenizer whose tokens are bytes, after an end token."""

    eos_ids, bos_id, vocab_size = frozenset({END}), None, 257

    def token_bytes(self, token):
        return bytes([token - 1]) if token else b"<end>"

    def is_control(self, token):
        return token == END

    def encode(self, text, add_special=True, parse_special=False):
        return [1 + byte for byte in text.encode()]


GRAMMARS = Grammars(Bytes())


def admits(text, **structured):
    """Whether a text is a whole match."""
    GRAMMARS._kept.clear()
    follower, taken = GRAMMARS.follower(fj.Structured(**structured), 0), []
    for token in [*GRAMMARS.tokenizer.encode(text), END]:
        (mask,) = GRAMMARS.masks([follower], 257)
        if not mask[token >> 5] >> (token & 31) & 1:
            return False
        follower.follow(taken, [token])
        taken = [*taken, token]
    return True


def refusal(**structured):
    GRAMMARS._kept.clear()
    with pytest.raises(ValueError) as error:
        GRAMMARS.follower(fj.Structured(**structured), 0)
    return str(error.value)


OBJECT = {"type": "object", "properties": {"a": {"type": "integer"}}, "additionalProperties": False}


@pytest.mark.parametrize("name", sorted(schemas._REFUSED))
def test_what_cannot_be_done_is_refused_by_name(name):
    value = {"if": {}, "not": {}, "contains": {}, "uniqueItems": True, "minContains": 2, "$dynamicRef": "#a"}.get(
        name, {"x": ["y"]}
    )
    inside = {"type": "array", "items": {"type": "object", "properties": {"p": {"type": "string", name: value}}}}
    assert refusal(json_schema=inside) == f"Structured.json_schema: /items/properties/p/{name} is not supported"
    assert admits('{"' + name + '":1}', json_schema={"type": "object", "properties": {name: {"const": 1}}})  # as a name


@pytest.mark.parametrize(
    ("schema", "said"),
    [
        ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "oneOf constraints are not supported"),
        ({"type": "string", "pattern": "a(?=b)"}, "/pattern: regex parse error: look-around"),
        ({"items": {"type": "string", "pattern": "("}}, "/items/pattern: regex parse error: unclosed group"),
        ({"type": "string", "pattern": 3}, "/pattern must be a text"),
        ({"patternProperties": {"^a": {"const": 1}, "b$": {"const": 2}}}, "patternProperties regexes /^a/ and /b$/ are not"),
        ({"type": "object", "minProperties": 2, "required": []}, "/minProperties is supported up to the number of required"),
        ({"type": "object", "properties": {"a": {}, "b": {}}, "maxProperties": 1, "required": ["a"]}, "maxProperties"),
        ({"const": 2**53 + 1}, "/const 9007199254740993 cannot be represented"),
        ({"enum": [1, {"a": [-(2**60)]}]}, "/enum -1152921504606846976 cannot be represented"),
        ({"minimum": -(2**63)}, "/minimum -9223372036854775808 cannot be represented"),
        ({"type": "number", "multipleOf": 0}, "/multipleOf must be a number"),
        ({"type": "integer", "minimum": 5, "maximum": 3}, "minimum (5) is greater than maximum (3)"),
        ({"$ref": "https://example.com/schema"}, "/$ref must be within the schema"),
        ({"$ref": "#/$defs/b", "$defs": {"a": {}}}, "/$ref '#/$defs/b' leads nowhere"),
        ({"$ref": "#/x/b", "x": {"b": {}}}, "/$ref '#/x/b' is not a schema"),
        ({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}, "/$ref leads back to itself"),
        ({"$defs": {"a": {"$id": "b"}}, "$ref": "#/$defs/a"}, "/$defs/a/$id is not supported"),
        ({"$schema": "http://json-schema.org/draft-07/schema#", "prefixItems": [{}]}, "/prefixItems is not a keyword of the"),
        ({"allOf": [{}], "items": [{}], "additionalItems": {}}, "/additionalItems is not supported next to ['allOf']"),
        ({"type": "any"}, "/type must be among null, boolean"),
        ({"type": "string", "minLength": -1}, "/minLength must be an integer of 0 to"),
        ({"properties": {"a": 3}}, "/properties/a a schema must be an object, true or false"),
        ({"allOf": [{"type": "integer"}, {"type": "string"}]}, "Unsatisfiable schema: incompatible types"),
        ({"allOf": [{"$ref": "#"}]}, "is too complex, or admits nothing"),
        ("false", "the schema admits nothing"),
        ("{", "is not JSON"),
        ('{"const": NaN}', "NaN is not a number"),
        ('{"const": "\\ud800"}', "surrogates not allowed"),
    ],
)  # fmt: skip
def test_an_impossible_schema_is_refused_with_the_reason(schema, said):
    assert said in refusal(json_schema=schema)


@pytest.mark.parametrize(
    ("structured", "said"),
    [
        ({"regex": "a(?!b)"}, "Structured.regex: "),
        ({"lark": "start: name"}, 'Structured.lark: at 1(8): unknown name: "name"'),
        ({"lark": "start: <|no|>"}, "unknown special token"),
        ({"lark": "start: x\nx[temperature=0.5]: /a/"}, "Structured.lark: the option 'temperature' of a rule is not supported"),
        ({"lark": 'start: %json {"not": {}}'}, "Structured.lark: /not is not supported"),
        ({"lark": "start: %json {"}, "Structured.lark: %json is not JSON"),
    ],
)
def test_an_impossible_grammar_is_refused_with_the_reason(structured, said):
    assert said in refusal(**structured)


def test_exactly_one_kind_is_given():
    for given, said in [
        ({}, "exactly one of json_schema, regex, choice, lark; got none"),
        ({"regex": "a", "lark": "b"}, "got regex and lark"),
        ({"json_schema": False}, "json_schema must be a dict, a JSON text or True"),
        ({"json_schema": {"a": {1}}}, "json_schema is not JSON"),
        ({"regex": 3}, "regex must be a text"),
        ({"choice": "yes"}, "choice must be a list of 1 to 4096 non-empty texts"),
        ({"choice": ["a", ""]}, "choice must be a list"),
        ({"regex": "a" * (MAX_LENGTH + 1)}, "regex has 262,145 characters; at most 262,144"),
    ]:
        with pytest.raises(ValueError, match=f"Structured.*{said}"):
            fj.Structured(**given)
    with pytest.raises(ValueError, match=r"SamplingParams.structured must be None, a Structured or a dict"):
        fj.SamplingParams(structured="x")
    with pytest.raises(ValueError, match=r"SamplingParams.structured must be a Structured or a dict of its fields"):
        fj.SamplingParams(structured={"xml": 1})
    assert fj.SamplingParams(structured={"choice": ["a"]}).structured == fj.Structured(choice=("a",))


def explosions():
    deep, chain = {"type": "null"}, {f"d{i}": {"allOf": [{"$ref": f"#/$defs/d{i + 1}"}] * 2} for i in range(20)}
    for _ in range(70):
        deep = {"type": "array", "items": deep}
    return {
        "large": {"enum": ["x" * 1000] * 300},
        "deep": deep,
        "product": {"allOf": [{"anyOf": [{"properties": {f"{i} {j}": {"const": j}}} for j in range(6)]} for i in range(14)]},
        "names": {"properties": {f"p{i}": {} for i in range(2000)}},
        "counts": {"type": "array", "items": {}, "minItems": 10**9},
        "doubling": {"$ref": "#/$defs/d0", "$defs": chain | {"d20": {"type": "object"}}},
        "nested repeats": {"type": "string", "pattern": ".*a.{200}", "minLength": 10, "maxLength": 1000},
    }


@pytest.mark.parametrize("name", explosions())
def test_what_explodes_ends_soon(name):
    """It is refused, or compiled and then followed, without effort that grows without a limit."""
    try:
        follower = GRAMMARS.follower(fj.Structured(json_schema=explosions()[name]), 0)
    except ValueError as error:
        assert str(error).startswith("Structured.json_schema")
    else:
        assert name == "doubling" and GRAMMARS.masks([follower], 257).any()


def test_compiled_grammars_are_kept_up_to_a_limit():
    grammars = Grammars(Bytes())
    compiled = []
    compile_ = grammars._compile
    grammars._compile = lambda structured: (compiled.append(structured), compile_(structured))[1]
    for number in [*range(70), 69, 0]:
        grammars.follower(fj.Structured(choice=[f"text {number}"]), 0)
    assert len(compiled) == 71 and len(grammars._kept) == 64


def test_results_that_are_lost_are_followed_again():
    a, b, c = GRAMMARS.tokenizer.encode("abc")
    follower = GRAMMARS.follower(fj.Structured(choice=["abc"]), 2)
    for text, made, following in [([5, 5], [a, b], c), ([5, 5, a], [], b), ([5, 5], [], a), ([5, 5, a, b], [c], END)]:
        follower.follow(text, made)
        (mask,) = GRAMMARS.masks([follower], 257)
        assert [token for token in range(257) if mask[token >> 5] >> (token & 31) & 1] == [following] and not follower.error


def test_a_grammar_that_cannot_go_on_says_so():
    """Its mask admits the end."""
    follower = GRAMMARS.follower(fj.Structured(choice=["abc"]), 0)
    follower.follow([], GRAMMARS.tokenizer.encode("ax"))
    assert follower.error.startswith("Structured: the grammar cannot go on (") and "abc" not in follower.error


# ---- what is done


def test_annotations_do_not_matter():
    notes = {"title": "T", "default": 5, "format": "int64", "x-mine": {"not": {}}, "uniqueItems": False, "nullable": True,
             "x-guidance": {"lenient": True}, "$comment": "", "unevaluatedProperties": True, "deprecated": True}  # fmt: skip
    noted = OBJECT | notes | {"properties": {"a": {"type": "integer"} | notes}}
    assert json.loads(schemas.prepared(json.dumps(noted)).text)["properties"] == OBJECT["properties"]
    assert admits('{"a": 1}', json_schema=noted) and not admits('{"a": 1.5}', json_schema=noted)
    assert admits('"x"', json_schema={"type": "string", "format": "path"}) and admits("[1]", json_schema=notes)


def test_a_name_cannot_be_written_in_another_way():
    """With an escape a known name would be one of the others, or occur twice."""
    either = OBJECT | {"additionalProperties": {"type": "string"}}
    assert admits('{"a":1,"b":"c"}', json_schema=either) and not admits('{"\\u0061":"x"}', json_schema=either)
    assert not admits('{"a":"x"}', json_schema=either) and not admits('{"a":1,"a":2}', json_schema=either)
    assert admits('{"\\u0061": "\\u00e9\\ud83d\\ude00"}', json_schema=True)  # without known names JSON may be all ASCII


def test_forced_tokens_are_those_of_one_after_the_other():
    """Also where what is left after a token is cut into other tokens than before."""

    class Pairs(Bytes):
        pieces = ("bc", "cd", "de")
        vocab_size = 257 + len(pieces)

        def token_bytes(self, token):
            return self.pieces[token - 257].encode() if token > 256 else super().token_bytes(token)

        def encode(self, text, add_special=True, parse_special=False):
            found = [1 + ord(text[0])] if text else []
            for piece in (text[i : i + 2] for i in range(1, len(text), 2)):
                found += [257 + self.pieces.index(piece)] if piece in self.pieces else [1 + ord(letter) for letter in piece]
            return found

    grammars = Grammars(Pairs())
    follower = grammars.follower(fj.Structured(choice=["abcdefgh"]), 0)
    at_once, forced = follower.matcher.compute_ff_tokens(), follower.forced(99, {END})
    assert forced != at_once and follower.end == 0 and follower.forced(3, {END}) == forced[:3]
    for number, token in enumerate(forced):
        (mask,) = grammars.masks([follower], Pairs.vocab_size)
        assert [one for one in range(Pairs.vocab_size) if mask[one >> 5] >> (one & 31) & 1] == [token]
        assert follower.forced(99, {END}) == forced[number:]
        follower.go_on([token])
    assert b"".join(map(Pairs().token_bytes, forced)) == b"abcdefgh" and follower.end == len(forced)


def test_objects_are_json_and_nothing_around():
    assert all(admits(text, json_schema=True) for text in ("{}", '{"a": [1, null, {"é\\n": -1.5e3}]}', '{\n "a" : true }'))
    assert not any(admits(text, json_schema=True) for text in ("[]", "1", ' {"a": 1}', '{"a": 1}\n', '{"a": 1,}', "{a: 1}"))
    assert admits("[]", json_schema="true") and not admits("{" + " " * 70 + "}", json_schema=True)


class Color(enum.Enum):
    RED = "red"
    NUMBER = 3


class Leaf(pydantic.BaseModel):
    kind: Literal["leaf"]
    path: pathlib.Path
    raw: bytes
    secret: pydantic.SecretStr


class Node(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid")

    kind: Literal["node"]
    when: datetime.datetime | datetime.date | None = None
    price: decimal.Decimal
    key: uuid.UUID
    color: Color
    pair: tuple[int, str]
    table: dict[str, float]
    tags: set[str] | None
    child: Annotated["Leaf | Node", pydantic.Field(discriminator="kind")]


def test_pydantics_schemas_are_done_or_refused_by_name():
    Node.model_rebuild()
    schema = Node.model_json_schema()
    assert "uniqueItems is not supported" in refusal(json_schema=schema)  # of a set
    fields = {name: field.annotation for name, field in Node.model_fields.items() if name not in ("tags", "child")}
    made = pydantic.create_model("Node", child=(Leaf, ...), **{name: (kind, ...) for name, kind in fields.items()})
    leaf = Leaf(kind="leaf", path=pathlib.Path("/a b"), raw=b"x", secret="s")
    value = made(
        kind="node", when=datetime.datetime(2026, 1, 31, 23, 59, tzinfo=datetime.UTC), price="12.50", key=uuid.UUID(int=7),
        color=Color.NUMBER, pair=(3, "x"), table={"y": -0.5}, child=leaf,
    )  # fmt: skip
    names = made.model_json_schema()["properties"]
    written = value.model_dump(mode="json")
    text = json.dumps({name: written[name] for name in names})
    assert admits(text, json_schema=made.model_json_schema()) and made.model_validate_json(text)
    assert not admits(text.replace('"leaf"', '"loaf"'), json_schema=made.model_json_schema())
    assert not admits(text.replace("2026-01-31", "2026-13-31"), json_schema=made.model_json_schema())


def test_copies_of_parameters_keep_the_schema():
    params = fj.SamplingParams(structured=fj.Structured(json_schema={"b": 1, "a": 2}))
    assert (
        params.structured.json_schema == '{"b":1,"a":2}' and dataclasses.replace(params, seed=1).structured == params.structured
    )
    assert fj.SamplingParams(**dataclasses.asdict(params)) == params
    with pytest.raises(ValueError, match=r"SamplingParams.structured needs an engine"):
        fj.functional.Sampling.from_params([params], eos_ids=[1], vocab_limit=4)
