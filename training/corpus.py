"""The training text of the tiny model: short stories that a larger model writes through this package, and a filter.

    python -m training.corpus STORIES.jsonl --stories 10000          (run it again after an interruption: it continues)

Story n has its own prompt, a combination of words that `briefs` draws without repetition, and n as its seed: the same arguments
give the same stories, whatever else ran in the batch. The model's text is kept as written; the filter runs over all of it at
the end, so that it can be changed without writing the stories again.
"""

from __future__ import annotations

import argparse
import json
import lzma
import math
import random
import re
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import ferrum_jax as fj

OUT = Path(__file__).with_name("stories.txt.xz")
LARGEST = 4_000_000  # bytes of the compressed text
SEPARATOR = "\n<|endoftext|>\n"
MODEL, SLOTS = "smollm2:135m", 32
PAGES = 28  # of 16 tokens each, for a prompt and its story
ENDING = 3.0  # added to the logit of the end, as the writer rarely stops by itself
SAMPLING = {
    "max_tokens": 300,
    "min_tokens": 60,
    "temperature": 0.6,
    "top_p": 0.95,
    "frequency_penalty": 0.2,
    "presence_penalty": 0.2,
}

# ---- Prompts

KINDS = (
    "rabbit", "bear", "fox", "duck", "mouse", "cat", "dog", "owl", "hen", "goat", "pony", "frog", "turtle", "hedgehog",
    "squirrel", "robin", "lamb", "pig", "bee", "snail", "girl", "boy", "baker", "gardener", "sailor", "farmer", "king",
    "robot", "giant", "dragon",
)  # fmt: skip
NAMES = (
    "Pip", "Tilly", "Max", "Rosie", "Sam", "Lily", "Ben", "Mia", "Tom", "Nora", "Oscar", "Daisy", "Leo", "Ruby", "Finn",
    "Ella", "Jack", "Poppy", "Hugo", "Ivy", "Toby", "Clara", "Milo", "Wren", "Otto", "Maya", "Gus", "Hazel", "Kit", "Zoe",
)  # fmt: skip
TRAITS = (
    "little", "shy", "brave", "curious", "sleepy", "kind", "lonely", "clever", "grumpy", "cheerful", "careful", "hungry",
    "proud", "quiet", "playful", "patient",
)  # fmt: skip
THINGS = (
    "a red kite", "an old key", "a broken cup", "a blue umbrella", "a wooden boat", "a small bell", "a warm scarf",
    "a lost hat", "a shiny coin", "a big pumpkin", "a jar of honey", "a paper lantern", "a round stone", "a bag of seeds",
    "a torn map", "a drum", "a yellow balloon", "a silver spoon", "a basket of apples", "a music box", "a muddy shoe",
    "a tiny egg", "a long rope", "a letter", "a box of crayons", "a feather", "a cake", "a lamp", "a mirror", "a ladder",
)  # fmt: skip
PLACES = (
    "in the forest", "by the river", "on a farm", "in a small town", "on a hill", "by the sea", "in the garden", "at school",
    "in the snow", "at the market", "under an old tree", "in a castle", "on an island", "near the pond", "in the kitchen",
    "on a mountain", "in a meadow", "by the lighthouse", "at the train station", "in a barn", "at a fair",
)  # fmt: skip
DETAILS = (*(f"There is {thing} in it." for thing in THINGS), *(f"It happens {place}." for place in PLACES))
TURNS = (
    "makes a new friend", "loses something and finds it again", "helps somebody who is sad", "learns to share",
    "is afraid at first and then tries", "tells the truth about a mistake", "has to wait for a long time",
    "builds something with others", "gets lost and finds the way home", "says sorry", "plans a surprise",
    "finds out that asking for help is good", "gives something away", "learns to listen", "does not give up",
    "solves a small mystery", "looks after somebody who is ill",
)  # fmt: skip
OPENINGS = (
    "Once upon a time, there was a {trait} {kind} named {name}.",
    "One rainy morning, {name} the {trait} {kind} woke up early.",
    "{name} was a {trait} {kind}.",
    "It was a sunny day, and {name} the {kind} was",
    "Every evening, a {trait} {kind} named {name}",
    '"What is that?" asked {name}, the {trait} {kind}.',
    "Long ago, a {trait} {kind} named {name} lived",
    "On a cold winter day, {name} the {kind}",
    "{name}, a {trait} {kind}, had",
    "Nobody knew why {name} the {trait} {kind}",
    "Late one night, {name} the {kind} heard",
    '"Wait for me!" called {name}. {name} was a {trait} {kind}',
    "There once was a {kind} who was very {trait}. Everyone called the {kind} {name}.",
)
LISTS = (KINDS, NAMES, TRAITS, DETAILS, TURNS, OPENINGS)
ASKED = "Write a very short story of five sentences for a small child about {name}, a {trait} {kind}, who {turn}. {detail}"


class Rate(NamedTuple):
    """Tokens generated, and the seconds that it took."""

    tokens: int
    seconds: float


class Brief(NamedTuple):
    """What a story should be: the message, and the words that the answer is made to begin with."""

    message: str
    opening: str


def briefs() -> Iterator[Brief]:
    """The briefs of stories 0, 1, ...: always the same, all different."""
    rng, drawn = random.Random(0), set()
    while True:
        choice = tuple(rng.choice(words) for words in LISTS)
        if choice not in drawn:
            drawn.add(choice)
            fields = dict(zip(("kind", "name", "trait", "detail", "turn"), choice, strict=False))
            yield Brief(ASKED.format(**fields), choice[-1].format(**fields))


# ---- Writing


def write(engine: Any, asked: Iterable[tuple[int, Brief]], path: Path, *, slots: int, until: float = math.inf) -> Rate:
    """Appends the stories of numbered briefs to `path`, one line of JSON {"number", "text", "finish_reason"} each, in the order
    in which they end. After `until`, a time of time.monotonic, no more are started."""
    begin, tokens, ended, left = time.monotonic(), 0, 0, iter(asked)
    running: dict[int, tuple[Brief, Any]] = {}
    with path.open("a", encoding="utf-8") as file:
        while True:
            while len(running) < 2 * slots and time.monotonic() < until and (pair := next(left, None)) is not None:
                running[pair[0]] = pair[1], submit(engine, *pair)
            if not running:
                return Rate(tokens, time.monotonic() - begin)
            engine.step()
            for number in [number for number, (_, request) in running.items() if request.state == "finished"]:
                brief, request = running.pop(number)
                result = request.result()
                tokens += len(result.token_ids)
                story = {"number": number, "text": brief.opening + result.text, "finish_reason": result.finish_reason}
                file.write(json.dumps(story) + "\n")
                file.flush()
                ended += 1
                if ended % 100 == 0:
                    print(f"{ended} stories, {tokens / (time.monotonic() - begin):.0f} tokens/s", flush=True)


def submit(engine: Any, number: int, brief: Brief) -> Any:
    """The request for a story; the answer is made to begin with the opening, so that it does not begin with a remark."""
    prompt = engine.model.render_chat([{"role": "user", "content": brief.message}]) + brief.opening
    bias = dict.fromkeys(engine.model.tokenizer.eos_ids, ENDING)
    return engine.submit(prompt, fj.SamplingParams(seed=number, logit_bias=bias, **SAMPLING))


def read_written(path: Path) -> dict[int, dict[str, Any]]:
    """The stories of a file by number; a last line cut off by an interruption is removed from the file."""
    if not path.exists():
        return {}
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if len(whole) < len(data):
        path.write_bytes(whole)
    stories = map(json.loads, whole.decode("utf-8").splitlines())
    return {story["number"]: story for story in stories}


# ---- Filter

_ASCII = str.maketrans({"‘": "'", "’": "'", "“": '"', "”": '"', "—": "-", "–": "-", "…": "...", "\u00a0": " "})
_REMARKS = re.compile(
    r"\b(as an ai|language model|here(?:'s| is) (?:a|the|your) (?:short |revised )?(?:story|version)|this story|the story|"
    r"the narrat\w+|in this tale|the reader|word count|i(?:'m| am) sorry, but|i can(?:no|')t (?:write|help with)|"
    r"note that|the moral|sentences?|the end of|title)\b",
    re.IGNORECASE,
)
_GRIM = re.compile(
    r"\b(kill\w*|murder\w*|blood\w*|guns?|shot|dead|deadly|died|dies|dying|suicid\w*|sex\w*|naked|drugs?|drunk\w*|alcohol\w*|"
    r"beer|wine|whiskey|cigarettes?|knives|stabb\w+|corpses?|hell|damn|rap(?:e|ed|ist)|abus\w+|slaves?)\b",
    re.IGNORECASE,
)
_MARKUP = re.compile(r"[*#_`\[\]{}<>|\\=~^@]|^\s*(?:[-+]|\d+[.)])\s", re.MULTILINE)
_SENTENCE_END = re.compile(r"(?<=[.!?])[\"']?\s+")
SHORTEST, LONGEST, SHARED, RUN = 40, 220, 0.2, 8  # words; words; share of 8-grams; words of an 8-gram


def words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9']+", text.lower())


def grams(text: str, run: int = RUN) -> set[tuple[str, ...]]:
    """The runs of `run` words in a text."""
    found = words(text)
    return {tuple(found[i : i + run]) for i in range(len(found) - run + 1)}


def tidied(text: str) -> str:
    """The text with ASCII punctuation, one empty line between paragraphs, and otherwise only single spaces."""
    paragraphs = (" ".join(part.split()) for part in re.split(r"\n\s*\n|\n", text.translate(_ASCII)))
    return "\n\n".join(filter(None, paragraphs))


def fault(text: str, finish_reason: str) -> str | None:
    """Why a tidied text is not a usable story by itself, or None."""
    count = len(words(text))
    sentences = [" ".join(words(sentence)) for sentence in _SENTENCE_END.split(text)]
    long = [sentence for sentence in sentences if sentence.count(" ") >= 3]
    checks = {
        "not ended": finish_reason != "stop" or not text.rstrip("\"'").endswith((".", "!", "?")),
        "too short": count < SHORTEST,
        "too long": count > LONGEST,
        "not ASCII": not text.isascii(),
        "markup": bool(_MARKUP.search(text)),
        "a remark": bool(_REMARKS.search(text)),
        "grim": bool(_GRIM.search(text)),
        "repeats itself": len(set(long)) < len(long) or len(grams(text, 3)) < 0.85 * (count - 2),
        "endless sentence": any(sentence.count(" ") > 45 for sentence in sentences),
    }
    return next((reason for reason, failed in checks.items() if failed), None)


def sieve(stories: Iterable[dict[str, Any]]) -> tuple[list[str], Counter[str]]:
    """The stories to keep, tidied, in order, and how many were dropped for each reason. A story is a duplicate if more than
    `SHARED` of its 8-grams occur in stories kept before it."""
    kept: list[str] = []
    dropped: Counter[str] = Counter()
    seen: set[tuple[str, ...]] = set()
    for story in stories:
        text = tidied(story["text"])
        reason, own = fault(text, story["finish_reason"]), grams(text)
        if reason is None and len(own & seen) > SHARED * len(own):
            reason = "duplicate"
        if reason is None:
            kept.append(text)
            seen |= own
        else:
            dropped[reason] += 1
    return kept, dropped


# ---- The file


def pack(stories: Iterable[str], out: Path) -> int:
    """Writes the text, compressed, and returns its uncompressed size in bytes. ValueError if the file is larger than
    `LARGEST`."""
    text = (SEPARATOR.join(stories) + "\n").encode("ascii")
    packed = lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)
    if len(packed) > LARGEST:
        raise ValueError(f"{len(packed):,} bytes compressed are more than {LARGEST:,}; take fewer stories")
    out.write_bytes(packed)
    return len(text)


def read_stories(path: Path = OUT) -> list[str]:
    """The stories of a packed file."""
    with lzma.open(path, "rt", encoding="ascii") as file:
        return file.read().removesuffix("\n").split(SEPARATOR)


def report(written: int, kept: list[str], dropped: Counter[str]) -> Iterator[str]:
    yield f"{written:,} written, {len(kept):,} kept ({len(kept) / max(1, written):.0%}); dropped:"
    yield from (f"  {count:6,}  {reason}" for reason, count in dropped.most_common())


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the stories that the tiny model is trained on.")
    parser.add_argument("written", type=Path, metavar="STORIES.jsonl", help="where stories are kept as they came")
    parser.add_argument("--stories", type=int, required=True, help="how many to write, the dropped ones included")
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no more stories after so long")
    parser.add_argument("--slots", type=int, default=SLOTS, help="stories that are written at once")
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    done = read_written(options.written)
    missing = [(n, brief) for n, brief in enumerate(islice(briefs(), options.stories)) if n not in done]
    if missing:
        until = time.monotonic() + 60 * options.minutes
        config = fj.EngineConfig(max_seqs=options.slots, num_pages=options.slots * PAGES)
        engine = fj.Engine(fj.load(options.model, dtype="int8"), config)
        tokens, seconds = write(engine, missing, options.written, slots=options.slots, until=until)
        print(f"{tokens:,} tokens in {seconds:.0f} s, {tokens / seconds:.0f} tokens/s")
    written = [story for number, story in sorted(read_written(options.written).items()) if number < options.stories]
    kept, dropped = sieve(written)
    print(*report(len(written), kept, dropped), sep="\n")
    size = pack(kept, options.out)
    print(f"{options.out}: {size:,} bytes of text, {options.out.stat().st_size:,} compressed")


if __name__ == "__main__":
    main()
