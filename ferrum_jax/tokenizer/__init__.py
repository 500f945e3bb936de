"""Tokenizers of GGUF files: text to ids as llama.cpp does it, ids to text piece by piece, stop strings.

tokenizer = Tokenizer.from_gguf(metadata)
tokenizer.decode(tokenizer.encode("Hello"))
"""

from ferrum_jax.tokenizer.stream import StopMatcher, TextStream
from ferrum_jax.tokenizer.tokenizer import Tokenizer

__all__ = ["StopMatcher", "TextStream", "Tokenizer"]
