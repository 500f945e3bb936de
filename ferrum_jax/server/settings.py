"""What the owner of a server decides."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from ferrum_jax.parsing import Dialect

# For a model without a chat template: it goes on after the texts of the messages.
PLAIN_TEMPLATE = "{% for message in messages %}{{ message['content'] }}{{ '' if loop.last else '\n' }}{% endfor %}"


@dataclasses.dataclass(frozen=True)
class Settings:
    """The settings of a server.

    Attributes:
      name: the name of the model in requests and answers.
      embedding_name: that of the embedding model.
      api_keys: the keys of which every request needs one; empty: none is needed.
      cors_origins: the origins whose pages may call the server from a browser.
      max_queue: completions that may wait in addition to those that run; more are refused with 429.
      max_body_bytes: limit of the body of a request.
      max_header_bytes: limit of all headers of a request.
      request_timeout: seconds after which a request is ended; None: never.
      ping_seconds: a stream that has nothing to send for this long sends a comment, so that nothing on the way closes it.
      log_prompts: whether the log has texts of requests.
      web: whether there is a chat page at /
      store: the file in which the Responses API keeps answers; None: in memory.
      tool_parser: how the model writes calls of functions, of `ferrum_jax.parsing.CALL_NAMES`; None: as its chat template says.
      reasoning_parser: the same for reasoning, of `ferrum_jax.parsing.REASONING_NAMES`.
    """

    name: str = "model"
    embedding_name: str = "embedding"
    api_keys: tuple[str, ...] = ()
    cors_origins: tuple[str, ...] = ()
    max_queue: int = 256
    max_body_bytes: int = 32 << 20
    max_header_bytes: int = 64 << 10
    request_timeout: float | None = 600.0
    ping_seconds: float = 10.0
    log_prompts: bool = False
    web: bool = True
    store: Path | None = None
    tool_parser: str | None = None
    reasoning_parser: str | None = None

    def __post_init__(self) -> None:
        Dialect.of(None, self.tool_parser, self.reasoning_parser)
