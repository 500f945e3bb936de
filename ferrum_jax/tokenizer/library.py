"""The base of tokenizers whose text is split by the `tokenizers` library."""

from __future__ import annotations

import threading
from typing import Any

from ferrum_jax import checks
from ferrum_jax.tokenizer.tokenizer import Tokenizer, check_text


class LibraryTokenizer(Tokenizer):
    """A subclass calls `_use` with the library's tokenizer. lowercase: texts are converted to lower case first, as in
    sentence-transformers."""

    lowercase = False

    def _use(self, made: Any) -> None:
        self._tokenizer = made
        self._lock = threading.Lock()  # for the tokenizer's only switch

    def encode(self, text: str, add_special: bool = True, parse_special: bool = False) -> list[int]:
        """As `Tokenizer.encode`."""
        check_text(text)
        return self.encode_batch([text], add_special, parse_special)[0]

    def encode_batch(self, texts: list[str], add_special: bool = True, parse_special: bool = False) -> list[list[int]]:
        """As `Tokenizer.encode_batch`."""
        texts = checks.texts(texts)
        for text in texts:
            check_text(text)
        if self.lowercase:
            texts = [text.lower() for text in texts]
        with self._lock:
            self._tokenizer.encode_special_tokens = not parse_special
            return [one.ids for one in self._tokenizer.encode_batch_fast(texts, add_special_tokens=add_special)]
