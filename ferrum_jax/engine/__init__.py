"""Continuous batching: many requests, one device. docs/architecture/engine.md follows a request through it."""

from ferrum_jax.engine.config import EngineConfig
from ferrum_jax.engine.engine import Engine
from ferrum_jax.engine.request import Output, Request

__all__ = ["Engine", "EngineConfig", "Output", "Request"]
