"""The functions that may be called, and how texts become their arguments."""

from __future__ import annotations

import ast
import json
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any

_KINDS: dict[type, str] = {bool: "boolean", int: "integer", float: "number", str: "string", list: "array", dict: "object"}
_WORDS = {"true": True, "false": False, "True": True, "False": False}


class Tools:
    """Functions by name.

    Args:
      schemas: of the parameters of each function.
      new_id: makes the id of a call.
    """

    def __init__(self, schemas: Mapping[str, Mapping[str, Any]], new_id: Callable[[], str] | None = None):
        self.schemas, self.new_id = dict(schemas), new_id or (lambda: f"call_{uuid.uuid4().hex[:24]}")

    @classmethod
    def of(cls, tools: Sequence[Mapping[str, Any]], new_id: Callable[[], str] | None = None) -> Tools:
        """From tools as a chat template takes them."""
        functions = [tool.get("function", tool) for tool in tools]
        return cls({function["name"]: function.get("parameters") or {} for function in functions}, new_id)

    def kinds(self, function: str, parameter: str) -> tuple[str, ...]:
        """The JSON types that a parameter may have; () if its schema does not say."""
        root = self.schemas.get(function, {})
        properties = root.get("properties")
        return kinds_of(properties.get(parameter), root) if isinstance(properties, dict) else ()


def argument(text: str, kinds: tuple[str, ...]) -> Any:
    """What a text stands for where only texts can be written: the first of the parameter's types that it can be, otherwise
    the text itself. Without types it is JSON if it can be."""
    for kind in kinds or ("any",):
        try:
            if kind == "boolean" and text.strip() in _WORDS:
                return _WORDS[text.strip()]
            if kind == "null" and text.strip() in ("null", "None"):
                return None
            if kind in ("integer", "number", "array", "object", "any"):
                found = _read(text)
                if kind == "integer" and isinstance(found, float) and found.is_integer():
                    found = int(found)
                json.dumps(found, allow_nan=False, ensure_ascii=False).encode()
                is_kind = kind == "any" or _KINDS.get(type(found)) == kind or (kind == "number" and type(found) is int)
                if is_kind and not (kind == "any" and isinstance(found, str)):
                    return found
        except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
            continue
    return text


def _read(text: str) -> Any:
    """The value in a text: JSON, or a list or dict as Python writes it, which some templates do."""
    try:
        return json.loads(text, parse_constant=_refuse)
    except ValueError:
        if text.lstrip()[:1] not in ("[", "{"):
            raise
        return ast.literal_eval(text.strip())


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def kinds_of(schema: Any, root: Mapping[str, Any], depth: int = 8) -> tuple[str, ...]:
    """The JSON types that a schema within `root` admits; () if it does not say."""
    if not isinstance(schema, dict) or not depth:
        return ()
    reference = schema.get("$ref")
    if isinstance(reference, str) and reference.startswith("#/"):
        found: Any = root
        for part in reference[2:].split("/"):
            found = found.get(part) if isinstance(found, Mapping) else None
        return kinds_of(found, root, depth - 1)
    kind = schema.get("type")
    kinds = [each for each in _listed(kind) or [kind] if isinstance(each, str)]
    for choices in (schema.get(name) for name in ("anyOf", "oneOf", "allOf") if not kinds):
        for choice in _listed(choices):
            kinds += kinds_of(choice, root, depth - 1)
    if not kinds:
        values = _listed(schema.get("enum")) or ([schema["const"]] if "const" in schema else [])
        kinds = ["null" if value is None else _KINDS[type(value)] for value in values]
    return tuple(dict.fromkeys(kinds))


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
