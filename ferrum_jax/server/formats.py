"""What the output has to be, from the fields of a request: OpenAI's and Anthropic's schemas, and vLLM's structured_outputs with
its older names."""

from __future__ import annotations

import re
from typing import Any

from ferrum_jax.server.bodies import ResponseFormat, StructuredOutputs, TextFormat
from ferrum_jax.server.errors import ApiError
from ferrum_jax.server.service import Service
from ferrum_jax.structured import Structured

_KINDS = {"json": "json_schema", "grammar": "lark"}  # vLLM's names


def structured(service: Service, formats: dict[str, Any]) -> dict[str, Structured]:
    """The argument `structured` of SamplingParams, if one of the fields of a body says something; its grammar is compiled.

    Raises ApiError that names the field, also if several say something.
    """
    given = [found for name, value in formats.items() if (found := _given(name, value)) is not None]
    if len(given) > 1:
        raise ApiError(400, f"{given[1][0]}: not together with {given[0][0]}", param=given[1][0])
    for field, asked in given:
        try:
            if "lark" in asked:
                asked["lark"] = _lark(asked["lark"])
            made = Structured(**asked)
            service.engine.model.grammars.follower(made, 0)
        except ValueError as error:
            said = re.sub(r"^Structured(\.\w+)?(:| must| has) ?", r"\2 ", str(error)).removeprefix(": ")
            raise ApiError(400, f"{field}: {said.strip()}", param=field) from None
        return {"structured": made}
    return {}


def _given(name: str, value: Any) -> tuple[str, dict[str, Any]] | None:
    """A field's full name, and what it gives to `Structured`; None if it says nothing."""
    if isinstance(value, ResponseFormat):
        return _schema(name, value.type, f"{name}.json_schema.schema", value.json_schema and value.json_schema.schema_)
    if isinstance(value, TextFormat):
        return _schema(name, value.type, f"{name}.schema", value.schema_)
    if isinstance(value, StructuredOutputs):
        asked = {"json": value.json_, "regex": value.regex, "choice": value.choice, "grammar": value.grammar}
        return name, {_KINDS.get(kind, kind): given for kind, given in asked.items() if given is not None}
    kind = name.removeprefix("guided_")
    return None if value is None else (name, {_KINDS.get(kind, kind): value})


def _schema(name: str, kind: str, field: str, schema: Any) -> tuple[str, dict[str, Any]] | None:
    if kind == "text":
        return None
    if kind == "json_object":
        return f"{name}.type", {"json_schema": True}
    if schema is None:
        raise ApiError(400, f"{field}: is missing", param=field)
    return field, {"json_schema": "true" if schema is True else schema}


def _lark(grammar: str) -> str:
    """A grammar in Lark's syntax from one in llama.cpp's or in Lark's."""
    from llguidance.gbnf_to_lark import any_to_lark

    try:
        return any_to_lark(grammar)
    except Exception as error:  # whatever its parser meets
        raise ValueError(f"is not a grammar: {error}") from None
