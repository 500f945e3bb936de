"""Examples, and how they become batches of one shape: whole sequences packed into rows of `length` tokens.

Packing depends on the examples and their order alone. All packs share the numbers of sequences and targets, padded, so one
compiled step serves them all.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from ferrum_jax.finetune.objective import PackedBatch

_OPEN = 64  # packs that still may get an example
_ROUND = 64  # the number of rows with targets is a multiple


class Example(NamedTuple):
    """A sequence to learn from.

    Attributes:
      tokens: its ids.
      learned: for each token, whether it is a target; None: all are. The first one never is, as nothing comes before it.
    """

    tokens: Sequence[int]
    learned: Sequence[bool] | None = None

    @property
    def targets(self) -> np.ndarray:
        """Which of its tokens are targets: bool [tokens]."""
        found = np.ones(len(self.tokens), bool) if self.learned is None else np.asarray(self.learned, bool)
        return found & (np.arange(len(self.tokens)) > 0)


def pack(examples: Iterable[Example], length: int, vocab_size: int) -> PackedBatch:
    """The examples in packs of `length` tokens, each whole in the first of the last packs that has room.

    Args:
      examples: in the order in which they are packed.
      length: tokens of a pack.
      vocab_size: of the model.

    Returns:
      NumPy arrays as of `PackedBatch`, with an axis of packs first.

    Raises:
      ValueError: for an example that is longer than a pack, has no target, has an id out of range, or whose `learned` has
        another length.
    """
    packs: list[list[Example]] = []
    room: list[int] = []
    for number, example in enumerate(examples):
        _check(number, example, length, vocab_size)
        size = len(example.tokens)
        place = next((i for i in range(max(0, len(packs) - _OPEN), len(packs)) if room[i] >= size), len(packs))
        if place == len(packs):
            packs.append([])
            room.append(length)
        packs[place].append(example)
        room[place] -= size
    if not packs:
        raise ValueError("there are no examples")
    sequences = max(map(len, packs))
    count = max(sum(int(example.targets.sum()) for example in members) for members in packs)
    rows = min(length, -(-count // _ROUND) * _ROUND)
    made = [_packed(members, length, sequences, rows) for members in packs]
    return PackedBatch(*(np.stack(arrays) for arrays in zip(*made, strict=True)))


def _packed(members: Sequence[Example], length: int, sequences: int, rows: int) -> PackedBatch:
    tokens = np.zeros(length, np.int32)
    whole = np.concatenate([np.asarray(example.tokens, np.int32) for example in members])
    tokens[: len(whole)] = whole
    ends = np.cumsum([len(example.tokens) for example in members])
    starts = np.full(sequences + 1, len(whole), np.int32)
    starts[: len(members) + 1] = [0, *ends]
    places = np.flatnonzero(np.concatenate([example.targets for example in members]))
    before, targets = np.zeros(rows, np.int32), np.full(rows, -1, np.int32)
    before[: len(places)], targets[: len(places)] = places - 1, whole[places]
    return PackedBatch(tokens, starts, before, targets)


def _check(number: int, example: Example, length: int, vocab_size: int) -> None:
    size = len(example.tokens)
    if example.learned is not None and len(example.learned) != size:
        raise ValueError(f"example {number}: {size} tokens and {len(example.learned)} values of learned")
    if size > length:
        raise ValueError(f"example {number}: {size} tokens do not fit into a pack of {length}")
    if not example.targets.any():
        raise ValueError(f"example {number}: has no target; it needs one that is not the first token")
    ids = np.asarray(example.tokens)
    if ids.dtype.kind not in "iu" or ids.min() < 0 or ids.max() >= vocab_size:
        raise ValueError(f"example {number}: token ids must be integers below the vocabulary's {vocab_size}")
