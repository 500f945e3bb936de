"""From stories to batches of token ids: the split, the tokenizer, and the windows of each step.

The batch of a step depends on the step's number alone, so an interrupted training continues with the batch it would have had.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from ferrum_jax.tokenizer.bpe import byte_letters, splitter
from ferrum_jax.tokenizer.pretokenizers import PRE_TOKENIZERS
from training.model import END

END_TEXT, PRE_TOKENIZER = "<|endoftext|>", "qwen2"
HELD_OUT = 20  # one story in 20


def split(stories: Iterable[str]) -> tuple[list[str], list[str]]:
    """Stories to train on and held-out ones, by a hash of their text: a story stays on its side whatever is added."""
    sides: tuple[list[str], list[str]] = ([], [])
    for story in stories:
        digest = hashlib.sha256(story.encode()).digest()
        sides[int.from_bytes(digest[:8], "little") % HELD_OUT == 0].append(story)
    return sides


def train_tokenizer(stories: Sequence[str], vocab_size: int) -> Any:
    """A byte-level BPE of the `tokenizers` library, cutting text as llama.cpp's "qwen2" does; id 0 is END_TEXT."""
    from tokenizers import Tokenizer, decoders, models, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = splitter(PRE_TOKENIZERS[PRE_TOKENIZER])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END_TEXT], initial_alphabet=list(byte_letters()), show_progress=False
    )
    tokenizer.train_from_iterator(stories, trainer)
    if tokenizer.get_vocab_size() != vocab_size or tokenizer.token_to_id(END_TEXT) != END:
        raise ValueError(f"the text gives {tokenizer.get_vocab_size()} tokens, fewer than the {vocab_size} that are wanted")
    return tokenizer


def encode(tokenizer: Any, stories: Sequence[str]) -> list[np.ndarray]:
    """The ids of each story, int32, END before them."""
    return [np.array([END, *encoded.ids], np.int32) for encoded in tokenizer.encode_batch(list(stories))]


class Batches:
    """Windows int32 [batch, length + 1] over the stories laid end to end, in a different order in each epoch."""

    def __init__(self, stories: Sequence[np.ndarray], batch: int, length: int, seed: int = 0) -> None:
        self.stories, self.batch, self.length, self.seed = stories, batch, length, seed
        self.steps_per_epoch = (sum(map(len, stories)) - 1) // (batch * length)
        if not self.steps_per_epoch:
            raise ValueError(f"the stories do not fill one batch of {batch} windows of {length} tokens")
        self._epoch, self._windows = -1, np.empty(0)

    def __getitem__(self, step: int) -> np.ndarray:
        """The batch of a step; the last target of a window is the first token of the next."""
        epoch, place = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            rng = np.random.default_rng([self.seed, epoch])
            stream = np.concatenate([self.stories[i] for i in rng.permutation(len(self.stories))])
            count = self.steps_per_epoch * self.batch
            windows = np.lib.stride_tricks.sliding_window_view(stream, self.length + 1)[:: self.length][:count]
            self._epoch, self._windows = epoch, windows[rng.permutation(count)]
        return self._windows[place * self.batch : (place + 1) * self.batch]
