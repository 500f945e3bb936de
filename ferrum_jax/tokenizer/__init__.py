"""Tokenizers: text to ids (for GGUF files with the same ids as llama.cpp), ids to text piece by piece, stop strings.

tokenizer = Tokenizer.from_gguf(metadata)
tokenizer.decode(tokenizer.encode("Hello"))
"""

from ferrum_jax.tokenizer.stream import StopMatcher, TextStream
from ferrum_jax.tokenizer.tokenizer import Tokenizer

__all__ = ["StopMatcher", "TextStream", "Tokenizer"]
