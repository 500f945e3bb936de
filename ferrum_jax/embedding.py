"""An embedding model: turns each text into one vector.

Texts of similar length are batched and padded to one of a few lengths, so that little is computed for padding and few programs
are compiled. A row does not depend on the other rows.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

import jax
import numpy as np

from ferrum_jax import checks
from ferrum_jax.config import EncoderConfig, refuse_encoder
from ferrum_jax.distributed import Placement
from ferrum_jax.errors import NotFiniteError
from ferrum_jax.memory import nbytes
from ferrum_jax.models import bert
from ferrum_jax.programs import Programs
from ferrum_jax.progress import track
from ferrum_jax.tokenizer import Tokenizer
from ferrum_jax.units import readable_bytes
from ferrum_jax.weights.stream import bytes_by_format

_LENGTHS = (8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)  # then powers of two
_TOKENS = 2048  # limit of a batch, padding included
_ROWS = (2, 64)  # limits of a batch


class EmbeddingModel:
    """An embedding model of the BERT family, as `ferrum_jax.load` returns it.

    Attributes:
      params (dict): a pytree of arrays that holds every weight once.
      config (EncoderConfig): what the model is; static and hashable.
      tokenizer (Tokenizer): from the same file or directory.
      device (jax.Device): where the parameters are.
      max_seq_len (int): longer texts are cut to this many tokens.
    """

    def __init__(self, config: EncoderConfig, params: Any, tokenizer: Tokenizer, placement: Placement, max_seq_len: int):
        self.config, self.params, self.tokenizer = config, params, tokenizer
        self.placement, self.max_seq_len = placement, max_seq_len
        self.programs = Programs(placement)
        self.load_s = 0.0

    def __repr__(self) -> str:
        config, size = self.config, readable_bytes(nbytes(self.params))
        return f"<EmbeddingModel {config.architecture}, width {config.hidden_size}, {size}, {config.dtype}, {self.placement}>"

    @property
    def device(self) -> jax.Device:
        """Where the parameters are."""
        return self.placement.device

    def embed(self, texts: Sequence[str], *, normalize: bool = True) -> np.ndarray:
        """One vector for each text.

        Args:
          texts: the texts. Those with more than `max_seq_len` tokens are cut, with a warning.
          normalize: scale every vector to the Euclidean length 1.

        Returns:
          float32 [texts, hidden_size], in the order of the texts.

        Raises:
          ValueError: if `texts` is not a list of texts.
          NotFiniteError: if an embedding is not finite.
        """
        encoded = self._encode(checks.texts(texts))
        out = np.empty((len(encoded), self.config.hidden_size), np.float32)
        pending = []
        for members, tokens, lengths in _batches(encoded, self.config.context_length):
            inputs = (self.params, tokens, lengths)
            pending.append((members, self.programs.run(bert.embed, *inputs, config=self.config, normalize=bool(normalize))))
        for members, rows in track(pending, "embedding, batch"):
            out[members] = self.programs.fetch(rows)[: len(members)]
        if not np.isfinite(out).all():
            row = int(np.isfinite(out).all(axis=1).argmin())
            raise NotFiniteError(f"the embedding of text {row} is not finite: damaged weights, or a dtype too narrow for them")
        return out

    def _encode(self, texts: list[str]) -> list[list[int]]:
        encoded = self.tokenizer.encode_batch(texts, parse_special=True)
        limit, long = self.max_seq_len, 0
        for i, ids in enumerate(encoded):
            if not ids:
                raise ValueError(f"text {i} does not have any tokens, and the tokenizer adds none")
            if (largest := max(ids)) >= self.config.vocab_size:
                raise ValueError(f"text {i} has the token {largest}, but the embedding has {self.config.vocab_size} rows")
            if len(ids) > limit:
                long += 1
                end = ids[-1:] if self.tokenizer.is_control(ids[-1]) else []
                encoded[i] = ids[: limit - len(end)] + end
        if long:
            warnings.warn(f"{long} of {len(texts)} texts are longer than {limit} tokens and are cut there", stacklevel=3)
        return encoded

    def memory(self) -> dict:
        """Sizes in bytes.

        Returns:
          "parameters": bytes by block format; "parameters_total": their sum.
        """
        formats = bytes_by_format(self.params)
        return {"parameters": formats, "parameters_total": sum(formats.values())}

    def _refuse(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Raises UnsupportedModelError: an encoder does not predict a next token."""
        raise refuse_encoder("this model")

    generate = stream = chat = render_chat = logits = perplexity = trace_routing = _refuse
    kv_dtype = property(_refuse)  # the first attribute that an engine reads


def _batches(encoded: list[list[int]], context: int) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Yields (members, tokens int32 [rows, length], lengths int32 [rows]), the longest texts first. Padding rows have one
    token."""
    order = sorted(range(len(encoded)), key=lambda i: -len(encoded[i]))
    while order:
        length = min(_bucket(len(encoded[order[0]])), context)
        rows = min(max(_ROWS[0], 1 << (_TOKENS // length).bit_length() - 1), _ROWS[1])
        members, order = order[:rows], order[rows:]
        rows = max(_ROWS[0], 1 << (len(members) - 1).bit_length())
        tokens, lengths = np.zeros((rows, length), np.int32), np.ones(rows, np.int32)
        for row, member in enumerate(members):
            tokens[row, : len(encoded[member])] = encoded[member]
            lengths[row] = len(encoded[member])
        yield np.array(members), tokens, lengths


def _bucket(length: int) -> int:
    return next((size for size in _LENGTHS if size >= length), 1 << (length - 1).bit_length())
