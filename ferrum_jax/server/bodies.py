"""What the bodies of requests have in common.

A field is known and checked, or known and not supported, or unknown. One that is not supported is an error unless its value is
what the server does anyway (`NEUTRAL`); an unknown one is ignored, and a header of the answer names it.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from ferrum_jax.sampling_params import SamplingParams
from ferrum_jax.server.errors import ApiError

IGNORED = "x-ferrum-ignored"
_SHOWN = 20  # ignored fields in the header


class Body(BaseModel):
    """A JSON object whose numbers, texts and truth values are not converted into each other."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False, protected_namespaces=())

    NEUTRAL: ClassVar[dict[str, list[Any]]] = {}

    def require_supported(self, within: str = "") -> None:
        """Raises ApiError for a field that is known and not supported, also inside others."""
        for name, value in (self.model_extra or {}).items():
            if name in self.NEUTRAL and value is not None and value not in self.NEUTRAL[name]:
                field = within + name
                raise ApiError(400, f"{field}: is not supported here; leave it out", param=field, code="unsupported_parameter")
        for name, part in self._parts():
            part.require_supported(f"{within}{name}.")

    def ignored(self) -> list[str]:
        """The names of the fields that have no effect, also inside others."""
        names = [name for name in self.model_extra or () if name not in self.NEUTRAL]
        return names + [f"{field}.{name}" for field, part in self._parts() for name in part.ignored()]

    def _parts(self) -> list[tuple[str, Body]]:
        fields = ((name, getattr(self, name)) for name in type(self).model_fields)
        return [(name, value) for name, value in fields if isinstance(value, Body)]


def ignored_header(names: list[str]) -> dict[str, str]:
    """The header that names ignored fields."""
    shown = ", ".join(name[:64].encode("ascii", "backslashreplace").decode() for name in names[:_SHOWN])
    harmless = "".join(letter if letter.isprintable() else "?" for letter in shown)
    return {IGNORED: harmless} if names else {}


class StreamOptions(Body):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None


Schema = dict[str, Any] | bool


class JsonSchema(Body):
    name: str | None = None
    description: str | None = None
    strict: bool | None = None
    schema_: Schema | None = Field(None, alias="schema")


class ResponseFormat(Body):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class TextFormat(JsonSchema):
    """The same in one object, as in newer APIs."""

    type: Literal["text", "json_object", "json_schema"]


class StructuredOutputs(Body):
    """vLLM's."""

    NEUTRAL: ClassVar[dict[str, list[Any]]] = {
        "json_object": [False],
        "structural_tag": [],
        "whitespace_pattern": [],
        "disable_any_whitespace": [False],
        "disable_additional_properties": [False],
    }

    json_: Schema | str | None = Field(None, alias="json")
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None


# The engine searches for each of them in each piece of text.
StopText = Annotated[str, Field(min_length=1, max_length=1024)]
StopTexts = Annotated[list[StopText], Field(max_length=64)]


class SamplingBody(Body):
    """OpenAI's and vLLM's names of sampling parameters. `SamplingParams` checks the values."""

    NEUTRAL: ClassVar[dict[str, list[Any]]] = {
        "best_of": [1],
        "use_beam_search": [False],
        "length_penalty": [1, 1.0],
        "stop_token_ids": [[]],
        "include_stop_str_in_output": [False],
        "spaces_between_special_tokens": [True, False],
        "truncate_prompt_tokens": [],
        "logits_processors": [[]],
        "allowed_token_ids": [],
    }

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    n: int | None = None
    stop: StopText | StopTexts | None = None
    seed: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    min_tokens: int | None = None
    bad_words: list[str] | None = Field(None, max_length=1024)
    ignore_eos: bool | None = None
    prompt_logprobs: int | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: Schema | str | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    skip_special_tokens: bool | None = None

    def require_supported(self, within: str = "") -> None:
        super().require_supported(within)
        if self.stream_options is not None and not self.stream:
            raise ApiError(400, "stream_options: only with stream: true", param="stream_options")

    @property
    def formats(self) -> dict[str, Any]:
        """The fields that may say what the output has to be."""
        names = ("structured_outputs", "guided_json", "guided_regex", "guided_choice", "guided_grammar")
        return {name: getattr(self, name) for name in names}

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with the usage."""
        return bool(self.stream_options and self.stream_options.include_usage)

    def sampling(self, **given: Any) -> SamplingParams:
        """The parameters of this request; `given` instead of its own."""
        names = SamplingParams.__dataclass_fields__.keys() & type(self).model_fields.keys() - {"logprobs", "logit_bias"}
        values = {name: value for name in names if (value := getattr(self, name)) is not None}
        if self.skip_special_tokens is False:
            values["special_tokens"] = True
        if self.logit_bias:
            try:
                values["logit_bias"] = {int(token): bias for token, bias in self.logit_bias.items()}
            except ValueError:
                raise ApiError(400, "logit_bias: its keys must be token ids", param="logit_bias") from None
        return SamplingParams(**values | given)


class OpenAiBody(SamplingBody):
    """Completions and chats. vLLM's fields for clients that think in tokens: `return_token_ids` adds them to the answer,
    `return_tokens_as_token_ids` names tokens as `token_id:17` in log-probabilities."""

    response_format: ResponseFormat | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None

    @property
    def formats(self) -> dict[str, Any]:
        return super().formats | {"response_format": self.response_format}
