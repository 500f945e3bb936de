"""SentencePiece-style BPE ("llama"): of the neighboring pairs that together are a token, the one with the best score is joined
first.

Ties go to the leftmost pair. A heap holds the candidate pairs, so a word of n characters costs O(n log n). Characters that end
up in no token are written as byte tokens. Spaces are U+2581 in the vocabulary. A text is cut before a U+2581 if no token
contains it together with the character before it: merges cannot cross such a cut, so words are merged separately and cached.
"""

import re
from heapq import heapify, heappop, heappush

from ferrum_jax.tokenizer.vocabulary import Vocabulary

SPACE = "\u2581"
_CACHED_WORDS, _CACHED_LENGTH = 65_536, 48


class SentencePieceBPE:
    """Encodes text without special tokens; the ids are those of `vocabulary`."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._ids = vocabulary.ids
        self._scores = vocabulary.scores
        unknown = [] if vocabulary.unk_id is None else [vocabulary.unk_id]
        self._bytes = [
            [vocabulary.ids[text]] if (text := f"<0x{byte:02X}>") in vocabulary.ids else unknown for byte in range(256)
        ]
        glued = {SPACE}
        for text in vocabulary.tokens:
            at = text.find(SPACE, 1)
            while at > 0:
                glued.add(text[at - 1])
                at = text.find(SPACE, at + 1)
        self._cut = re.compile(f"(?<=[^{re.escape(''.join(sorted(glued)))}])(?={SPACE})")
        self._words: dict[str, list[int]] = {}

    def encode(self, text: str) -> list[int]:
        out: list[int] = []
        for word in self._cut.split(text.replace(" ", SPACE)):
            ids = self._words.get(word)
            if ids is None:
                ids = self._merge(word)
                if len(word) <= _CACHED_LENGTH:
                    if len(self._words) >= _CACHED_WORDS:
                        self._words.clear()
                    self._words[word] = ids
            out += ids
        return out

    def _merge(self, word: str) -> list[int]:
        ids, scores = self._ids, self._scores
        count = len(word)
        # Symbol i is word[i:end[i]] and is followed by symbol end[i]; end[i] == 0: part of the symbol before.
        end = list(range(1, count + 1))
        before = list(range(-1, count))
        heap = []
        for i in range(count - 1):
            token = ids.get(word[i : i + 2])
            if token is not None:
                heap.append((-scores[token], i, i + 2))
        heapify(heap)
        while heap:
            _, left, stop = heappop(heap)
            right = end[left]
            if not right or right == count or end[right] != stop:
                continue  # one of the two has been joined with another since
            end[left], end[right] = stop, 0
            if stop < count:
                before[stop] = left
                token = ids.get(word[left : end[stop]])
                if token is not None:
                    heappush(heap, (-scores[token], left, end[stop]))
            previous = before[left]
            if previous >= 0:
                token = ids.get(word[previous:stop])
                if token is not None:
                    heappush(heap, (-scores[token], previous, stop))
        out: list[int] = []
        at = 0
        while at < count:
            token = ids.get(word[at : end[at]])
            if token is None:
                for byte in word[at : end[at]].encode():
                    out += self._bytes[byte]
            else:
                out.append(token)
            at = end[at]
        return out
