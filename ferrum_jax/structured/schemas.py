"""JSON schemas, as far as llguidance does what they say.

The one idea: a keyword either constrains and the library does it, or it constrains and the schema is refused with the
keyword's name, or it only annotates and is taken out. So nothing is ignored, and nothing fails that says nothing.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any, NamedTuple
from urllib.parse import unquote

MAX_DEPTH = 64
_MAX_NODES = 20_000  # schemas within a schema
_MAX_NAMES = 1000  # of one object
_MAX_COUNT = 100_000  # of a length or a number of items
_EXACT = 2**53  # the library computes with doubles
_SPACE = r"[ \n\r\t]{1,32}"  # between tokens of JSON: without a limit, a model may write nothing else

_TYPES = ("null", "boolean", "integer", "number", "string", "array", "object")
_FORMATS = ("date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri")  # those it knows
_OLD = re.compile(r"draft-0[34567]|2019-09")  # drafts without prefixItems

# Keywords whose values are schemas, lists of schemas, and schemas by name.
_ONE, _SEVERAL, _NAMED = ("items", "additionalItems", "additionalProperties"), ("anyOf", "oneOf", "allOf", "prefixItems"), (
    "properties", "patternProperties", "$defs", "definitions",
)  # fmt: skip
_NUMBERS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")
_COUNTS = ("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties")
_OF_PATTERNS = ("pattern", "format", "minLength", "maxLength")  # that are one expression for the library
_OTHERS = ("type", "enum", "const", "$ref", "required", "pattern", "format")
_DONE = frozenset((*_ONE, *_SEVERAL, *_NAMED, *_NUMBERS, *_COUNTS, *_OTHERS))
# Keywords that constrain and that the library does not have, and the values that say nothing.
_REFUSED: dict[str, tuple[Any, ...]] = {
    "not": (False,), "if": (), "then": (), "else": (), "contains": (), "minContains": (0,), "maxContains": (),
    "uniqueItems": (False,), "propertyNames": (True, {}), "dependencies": ({},), "dependentRequired": ({},),
    "dependentSchemas": ({},), "unevaluatedItems": (True, {}), "unevaluatedProperties": (True, {}), "$dynamicRef": (),
    "$recursiveRef": (), "extends": (), "disallow": (), "divisibleBy": (),
}  # fmt: skip


class Prepared(NamedTuple):
    """A schema without annotations: its JSON text, and the strings in it that match a pattern, by their places."""

    text: str
    patterns: dict[str, dict[str, Any]]


def prepared(text: str) -> Prepared:
    """A schema as the library gets it.

    Raises:
      ValueError: for what is not a JSON schema, and for keywords that would not be followed; it names the keyword and where it
        is.
    """
    try:
        schema = json.loads(text, parse_constant=_not_json)
        json.dumps(schema, ensure_ascii=False).encode()
    except RecursionError:
        raise ValueError(f"is nested more than {MAX_DEPTH} levels deep") from None
    except ValueError as error:
        raise ValueError(f"is not JSON: {error}") from None
    walk = _Walk(schema)
    kept = walk.schema({} if schema is True else schema, "")
    _require(kept is not False, "", "admits nothing")
    escapes = {"json_allowed_escapes": 'nrbtf\\"'} if walk.open_names else {"json_allow_general_unicode_escapes": True}
    options = {"whitespace_pattern": _SPACE} | escapes
    return Prepared(json.dumps({"x-guidance": options} | kept, ensure_ascii=False, separators=(",", ":")), walk.patterns)


def _not_json(name: str) -> Any:
    raise ValueError(f"{name} is not a number")


class _Walk:
    """Visits every schema within `root`. A path is a JSON pointer."""

    def __init__(self, root: Any):
        self.root, self.nodes, self.patterns = root, 0, dict[str, dict[str, Any]]()
        self.open_names = False  # an object has known names and any others: "\\u0061" must not be another name than "a"
        self.old = isinstance(root, dict) and _OLD.search(str(root.get("$schema", ""))) is not None

    def schema(self, value: Any, path: str, depth: int = 0) -> Any:
        """A schema without annotations."""
        self.nodes += 1
        if depth > MAX_DEPTH or self.nodes > _MAX_NODES:
            limit = f"{MAX_DEPTH} levels" if depth > MAX_DEPTH else f"{_MAX_NODES:,} schemas"
            raise _wrong(path[:80], f"is beyond the limit of {limit}")
        if isinstance(value, bool):
            return value
        if not isinstance(value, dict):
            raise _wrong(path, "a schema must be an object, true or false")
        kept = {}
        for name, part in value.items():
            at = f"{path}/{name}"
            if name in _REFUSED:
                if not any(part == neutral and type(part) is type(neutral) for neutral in _REFUSED[name]):
                    raise _wrong(at, "is not supported")
            elif name == "$id" and path and isinstance(part, str):
                raise _wrong(at, "is not supported inside a schema")
            elif name in _DONE and not (name == "format" and part not in _FORMATS):
                kept[name] = self.keyword(name, part, at, depth)
        self.require_countable(value, path)
        others = sorted(value.keys() & {"allOf", "anyOf", "oneOf", "$ref"})  # the library would mix up whose items are left
        _require("additionalItems" not in value or not others, f"{path}/additionalItems", f"is not supported next to {others}")
        if "pattern" in kept:
            self.patterns[f"{path}/pattern"] = {key: kept[key] for key in kept if key in _OF_PATTERNS}
        named = kept.keys() & {"properties", "patternProperties", "required"}
        self.open_names |= bool(named) and kept.get("additionalProperties") is not False
        return kept

    def keyword(self, name: str, value: Any, path: str, depth: int) -> Any:
        """The value of a keyword that constrains."""
        if name in _ONE and not (name == "items" and isinstance(value, list)):
            return self.schema(value, path, depth + 1)
        if name in _SEVERAL or name == "items":
            if name == "prefixItems" and self.old:
                raise _wrong(path, "is not a keyword of the draft that $schema names")
            _require(isinstance(value, list) and bool(value), path, "must be a list of schemas")
            return [self.schema(part, f"{path}/{i}", depth + 1) for i, part in enumerate(value)]
        if name in _NAMED:
            _require(isinstance(value, dict), path, "must be an object of schemas")
            _require(len(value) <= _MAX_NAMES, path, f"has {len(value):,} names; at most {_MAX_NAMES:,} are supported")
            self.patterns |= {f"{path}/{key}": {"pattern": key} for key in value if name == "patternProperties"}
            return {key: self.schema(part, f"{path}/{key}", depth + 1) for key, part in value.items()}
        if name in _NUMBERS:
            old = name.startswith("exclusive") and isinstance(value, bool)
            _require(old or (_is_number(value) and (name != "multipleOf" or value > 0)), path, "must be a number")
            _require_exact(value, path)
        elif name in _COUNTS:
            right = isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _MAX_COUNT
            _require(right, path, f"must be an integer of 0 to {_MAX_COUNT:,}")
        else:
            self.check(name, value, path)
        return value

    def check(self, name: str, value: Any, path: str) -> None:
        """Checks the value of one of the other keywords."""
        if name == "type":
            types = value if isinstance(value, list) else [value]
            _require(bool(types) and all(one in _TYPES for one in types), path, f"must be among {', '.join(_TYPES)}")
        elif name == "enum":
            _require(isinstance(value, list) and bool(value), path, "must be a list of values")
            _require_exact(value, path)
        elif name == "const":
            _require_exact(value, path)
        elif name == "required":
            right = isinstance(value, list) and all(isinstance(one, str) for one in value)
            _require(right, path, "must be a list of names")
        elif name == "$ref":
            self.follow(value, path)
        else:
            _require(isinstance(value, str), path, "must be a text")

    def follow(self, reference: Any, path: str) -> None:
        """Checks that a reference leads to a schema that is visited: to the root, or through keywords that hold schemas; and
        that following references alone does not lead back."""
        seen: list[Any] = []
        while True:
            _require(isinstance(reference, str) and re.match(r"#(/|$)", reference) is not None, path,
                     'must be within the schema, such as "#/$defs/name"')  # fmt: skip
            target = self.find(reference, path)
            if not isinstance(target, dict) or "$ref" not in target:
                return
            _require(reference not in seen, path, "leads back to itself")
            seen.append(reference)
            reference = target["$ref"]

    def find(self, reference: str, path: str) -> Any:
        """What a reference within the schema leads to."""
        target, at_schema = self.root, True
        for step in unquote(reference).split("/")[1:] if reference != "#/" else ():
            step = step.replace("~1", "/").replace("~0", "~")
            try:
                target = target[int(step)] if isinstance(target, list) else target[step]
            except (LookupError, ValueError, TypeError):
                raise _wrong(path, f"{reference!r:.80} leads nowhere") from None
            _require(not at_schema or step in (*_ONE, *_SEVERAL, *_NAMED), path, f"{reference!r:.80} is not a schema")
            at_schema = not at_schema or (step in _ONE and not isinstance(target, list))
        _require(at_schema and isinstance(target, dict | bool), path, f"{reference!r:.80} is not a schema")
        return target

    def require_countable(self, value: dict[str, Any], path: str) -> None:
        """The library may write a name that `properties` does not have twice, which counts only once for minProperties."""
        least, required = value.get("minProperties", 0), value.get("required", [])
        _require(
            least <= len(set(required)) + 1, f"{path}/minProperties", "is supported up to the number of required names, plus 1"
        )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _require_exact(value: Any, path: str) -> None:
    """Checks that no number in a value is changed by the library."""
    waiting = [(value, 0)]
    while waiting:
        one, depth = waiting.pop()
        _require(depth <= MAX_DEPTH, path, f"is nested more than {MAX_DEPTH} levels deep")
        if _is_number(one):
            exact = abs(one) <= _EXACT if isinstance(one, int) else math.isfinite(one)
            _require(exact, path, f"{one!r:.40} cannot be represented; integers up to 2**53 can")
        elif isinstance(one, list | dict):
            waiting += [(part, depth + 1) for part in (one.values() if isinstance(one, dict) else one)]


def _require(holds: bool, path: str, right: str) -> None:
    if not holds:
        raise _wrong(path, right)


def _wrong(path: str, what: str) -> ValueError:
    return ValueError(f"{path or 'the schema'} {what}")
