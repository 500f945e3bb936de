"""POST /v1/embeddings, with a second model."""

from __future__ import annotations

import base64
from typing import Any, Literal

import numpy as np
from pydantic import Field
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from ferrum_jax.embedding import EmbeddingModel
from ferrum_jax.server.bodies import Body, ignored_header
from ferrum_jax.server.errors import ApiError
from ferrum_jax.server.replies import Reply
from ferrum_jax.server.service import refusals, service_of

_MOST = 2048  # texts in a request, as in OpenAI's API


class EmbeddingBody(Body):
    input: str | list[str] = Field(min_length=1)
    model: str | None = None
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = None

    @property
    def texts(self) -> list[str]:
        return [self.input] if isinstance(self.input, str) else self.input


async def embeddings(request: HttpRequest) -> Response:
    service = service_of(request)
    body = await service.read(request, EmbeddingBody)
    model, name = service.embedder, service.settings.embedding_name
    if model is None:
        raise ApiError(404, "no embedding model is served (--embedding-model)", param="model", code="model_not_found")
    if body.model not in (None, name):
        message = f"the embedding model {body.model!r:.200} does not exist here; there is {name}"
        raise ApiError(404, message, param="model", code="model_not_found")
    if body.dimensions not in (None, model.config.hidden_size):
        raise ApiError(400, f"dimensions: this model has {model.config.hidden_size}", param="dimensions")
    if len(body.texts) > _MOST:
        raise ApiError(400, f"input: {len(body.texts)} texts; at most {_MOST} in a request", param="input")
    with refusals("input"):
        vectors, tokens = await service.alone(lambda: _embed(model, body.texts))
    data = [{"object": "embedding", "index": i, "embedding": _written(row, body)} for i, row in enumerate(vectors)]
    counts = {"prompt_tokens": tokens, "total_tokens": tokens}
    answer = {"object": "list", "model": name, "data": data, "usage": counts}
    return Reply(answer, headers=ignored_header(body.ignored()))


def _embed(model: EmbeddingModel, texts: list[str]) -> tuple[np.ndarray, int]:
    """The vectors of some texts, and the number of their tokens."""
    lengths = [len(ids) for ids in model.tokenizer.encode_batch(texts, parse_special=True)]
    for i, length in enumerate(lengths):
        if length > model.max_seq_len:
            raise ValueError(f"input: text {i} has {length} tokens, which do not fit into a context of {model.max_seq_len}")
    return model.embed(texts), sum(lengths)


def _written(row: np.ndarray, body: EmbeddingBody) -> Any:
    """A vector as numbers, or as the base64 of its float32 values, smallest byte first."""
    return base64.b64encode(row.astype("<f4").tobytes()).decode() if body.encoding_format == "base64" else row.tolist()
