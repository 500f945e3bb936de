"""Trains the tiny Qwen3-MoE on the stories of this folder and writes it as a quantized GGUF file.

    pip install '.[training]'
    python -m training.train                     (run it again after an interruption: it continues from the last checkpoint)

AdamW with warm-up, cosine and clipping (optax). Intermediate files go to --work: the tokenizer, checkpoints, a log with a line
of JSON per report, and at the end the float32 model as a checkpoint directory.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import math
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import ferrum_jax as fj
from ferrum_jax.config import ModelConfig
from training import corpus, data, export, model

OUT = Path(fj.__file__).with_name("data") / "tiny-moe.gguf"
CONFIG = ModelConfig(
    architecture="qwen3moe",
    num_layers=4,
    hidden_size=256,
    intermediate_size=0,
    num_heads=4,
    num_kv_heads=2,
    head_dim=64,
    vocab_size=4096,
    context_length=512,
    rms_norm_eps=1e-6,
    rope_theta=10_000.0,
    rope_dim=64,
    num_experts=8,
    experts_per_token=2,
    expert_intermediate_size=192,
    norm_topk_prob=True,
)
WORK = Path("build/tiny-moe")
FORMAT = "q8_0"
LARGEST = 8_000_000  # bytes of the file
EPOCHS = 10
REPORT, SCORE, SCORED = 20, 200, 64  # steps; steps; held-out stories


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How it is trained. A step takes `batch` windows of `length` tokens; dtype: of the operands of matrix products; room: of
    each expert, as a multiple of an even share."""

    steps: int
    batch: int = 16
    length: int = 256
    rate: float = 2e-3
    warmup: int = 100
    decay: float = 0.1
    clip: float = 1.0
    dtype: str = "bfloat16"
    room: float = 1.25
    seed: int = 0

    def optimizer(self) -> optax.GradientTransformation:
        """Weight decay for matrices alone."""
        rate = optax.warmup_cosine_decay_schedule(0.0, self.rate, min(self.warmup, self.steps // 2), self.steps, self.rate / 20)

        def matrices(params):
            return jax.tree.map(lambda leaf: leaf.ndim > 1, params)

        adamw = optax.adamw(rate, b1=0.9, b2=0.95, weight_decay=self.decay, mask=matrices)
        return optax.chain(optax.clip_by_global_norm(self.clip), adamw)


class State(NamedTuple):
    """What a step changes, and the seconds of training so far."""

    step: int
    seconds: float
    params: model.Params
    optimizer: Any


def new_state(config: ModelConfig, recipe: Recipe) -> State:
    params = model.init(config, recipe.seed)
    return State(0, 0.0, params, recipe.optimizer().init(params))


def make_step(config: ModelConfig, recipe: Recipe):
    """The compiled (params, optimizer, tokens int32 [batch, length + 1]) -> (params, optimizer, nats, Routing)."""
    optimizer = recipe.optimizer()

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, tokens):
        loss = functools.partial(model.loss, config=config, dtype=recipe.dtype, room=recipe.room)
        (_, (nats, routing)), gradients = jax.value_and_grad(loss, has_aux=True)(params, tokens)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, nats, routing

    return step


# ---- Checkpoints


def save(path: Path, state: State) -> None:
    """Writes all leaves of the state to one file, which gets its name only when it is complete."""
    partial = path.with_suffix(".partial")
    with partial.open("wb") as file:
        np.savez(file, *map(np.asarray, jax.tree.leaves(state)))
    os.replace(partial, path)


def restore(path: Path, like: State) -> State:
    """The state that `save` wrote. ValueError if it belongs to another model or recipe."""
    leaves, structure = jax.tree.flatten(like)
    with np.load(path) as file:
        saved = list(file.values())
    if [np.shape(leaf) for leaf in saved] != [np.shape(leaf) for leaf in leaves]:
        raise ValueError(f"{path}: is a checkpoint of another model; remove it or name another --work")
    state: State = jax.tree.unflatten(structure, map(jnp.asarray, saved))
    return state._replace(step=int(state.step), seconds=float(state.seconds))


# ---- Scores


class Scores(NamedTuple):
    """nats: of all tokens of the stories, the END after each included; load float32 [layers, experts]: the share of the tokens
    that chose each expert."""

    nats: float
    load: np.ndarray


@functools.partial(jax.jit, static_argnames="config")
def _score(params, tokens, real, config):
    """Nats of the targets for which `real` [batch, length] is true, and how often each expert was chosen there [layers,
    experts]."""
    logits, routing = model.forward(params, tokens[:, :-1], config)
    load = jax.nn.one_hot(routing.expert_ids, config.num_experts).sum(2) * real.reshape(-1, 1)
    return -jnp.sum(jnp.where(real, model.token_logprobs(logits, tokens[:, 1:]), 0.0)), load.sum(1)


def evaluate(params: model.Params, config: ModelConfig, stories: Sequence[np.ndarray], rows: int = 16) -> Scores:
    """Scores of stories (int32 [tokens] each, END first), in float32."""
    longest = max(map(len, stories))
    nats, counts = 0.0, np.zeros((config.num_layers, config.num_experts))
    for first in range(0, len(stories), rows):
        part = stories[first : first + rows]
        tokens = np.full((rows, longest + 1), model.END, np.int32)
        for row, story in zip(tokens, part, strict=False):
            row[: len(story)] = story
        lengths = np.array([len(story) for story in part] + [0] * (rows - len(part)))
        lost, count = _score(params, tokens, np.arange(longest) < lengths[:, None], config)
        nats += float(lost)
        counts += np.asarray(count)
    return Scores(nats, counts / counts.sum(1, keepdims=True))


def bits_per_byte(nats: float, stories: Sequence[str]) -> float:
    """The nats of the stories and their ends, as bits per byte of the stories."""
    return nats / math.log(2) / sum(len(story.encode()) for story in stories)


# ---- The run


def train(
    config: ModelConfig,
    recipe: Recipe,
    batches: data.Batches,
    work: Path,
    bytes_per_token: float,
    minutes: float = math.inf,
    score: Callable[[model.Params], float] | None = None,
) -> State:
    """Trains to the end, or for `minutes`, from the checkpoint in `work` if there is one. Reports every `REPORT` steps, scores
    the held-out stories every `SCORE`, and saves every five minutes and at the end."""
    checkpoint = work / "checkpoint.npz"
    state = new_state(config, recipe)
    if checkpoint.exists():
        state = restore(checkpoint, state)
        print(f"going on from step {state.step}")
    step, first, before = make_step(config, recipe), state.step, state.seconds
    begin = saved = time.monotonic()
    measured: list[tuple[float, float]] = []  # nats and seconds of the steps since the last report
    with (work / "log.jsonl").open("a") as log:
        for number in range(first, recipe.steps):
            start = time.monotonic()
            params, optimizer, nats, routing = step(state.params, state.optimizer, batches[number])
            measured.append((float(nats), time.monotonic() - start))
            done, now = number + 1, time.monotonic()
            state = State(done, before + now - begin, params, optimizer)
            if done % REPORT == 0 or done == recipe.steps:
                mean, seconds = np.mean([nats for nats, _ in measured]), np.median([seconds for _, seconds in measured])
                facts = {
                    "step": done,
                    "loss": round(float(mean), 4),
                    "bits_per_byte": round(float(mean) / math.log(2) / bytes_per_token, 4),
                    "balance": round(float(routing.balance), 3),
                    "tokens_per_second": round(recipe.batch * recipe.length / float(seconds)),
                    "minutes": round(state.seconds / 60, 1),
                    "minutes_left": round((recipe.steps - done) * float(seconds) / 60, 1),
                }
                if score is not None and (done % SCORE == 0 or done == recipe.steps):
                    facts["held_out"] = round(score(params), 4)
                print("  ".join(f"{name} {value}" for name, value in facts.items()), flush=True)
                log.write(json.dumps(facts) + "\n")
                log.flush()
                measured.clear()
            if now - saved > 300:
                save(checkpoint, state)
                saved = now
            if now > begin + 60 * minutes:
                break
    save(checkpoint, state)
    return state


def prepare(work: Path, config: ModelConfig, stories: Path) -> tuple[Any, list[str], list[str]]:
    """The tokenizer (from `work` if an earlier run left it there), the stories to train on and the held-out ones."""
    from tokenizers import Tokenizer

    work.mkdir(parents=True, exist_ok=True)
    trained, held_out = data.split(corpus.read_stories(stories))
    path = work / "tokenizer.json"
    if not path.exists():
        data.train_tokenizer(trained, config.vocab_size).save(str(path))
    return Tokenizer.from_file(str(path)), trained, held_out


def check(
    out: Path, params: model.Params, config: ModelConfig, directory: Path, tokenizer: Any, stories: Sequence[str]
) -> None:
    """Checks that the package reads back what was trained: the same ids of stories, and the same float32 logits of the float32
    model. ValueError if not."""
    loaded, exact = fj.load(out), fj.load(directory, dtype="float32")
    ids = [story.tolist() for story in data.encode(tokenizer, stories)]
    for each in (loaded, exact):
        if [each.tokenizer.encode(story) for story in stories] != ids:
            raise ValueError("the tokenizer of the file gives other ids than that of the training")
    worst = 0.0
    for row, logits in zip(ids, exact.logits(ids), strict=True):
        own, _ = model.forward(params, jnp.asarray([row]), config)
        worst = max(worst, float(np.abs(np.asarray(own[0]) - logits).max()))
    if not worst <= 1e-3:
        raise ValueError(f"the package's logits differ from those of the training by {worst}")
    print(f"{out}: {out.stat().st_size:,} bytes; ids equal, float32 logits within {worst:.1e} of the training's")


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the tiny Qwen3-MoE.")
    parser.add_argument("--stories", type=Path, default=corpus.OUT)
    parser.add_argument("--work", type=Path, default=WORK, help="tokenizer, checkpoints, log, float32 model")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--epochs", type=float, default=EPOCHS, help="how often every story is seen")
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop after so long; the next call goes on")
    parser.add_argument("--vocab", type=int, default=CONFIG.vocab_size, help="size of the vocabulary")
    options = parser.parse_args()

    config = dataclasses.replace(CONFIG, vocab_size=options.vocab)
    tokenizer, stories, held_out = prepare(options.work, config, options.stories)
    encoded = data.encode(tokenizer, stories)
    tokens, size = sum(map(len, encoded)), sum(map(len, stories))
    batches = data.Batches(encoded, Recipe.batch, Recipe.length, Recipe.seed)
    recipe = Recipe(steps=math.ceil(options.epochs * batches.steps_per_epoch))
    print(f"{len(stories):,} stories, {len(held_out):,} held out; {tokens:,} tokens, {size / tokens:.2f} bytes each")
    print(f"{recipe.steps:,} steps of {recipe.batch * recipe.length:,} tokens")
    some = held_out[:SCORED]

    def score(params: model.Params) -> float:
        return bits_per_byte(evaluate(params, config, data.encode(tokenizer, some)).nats, some)

    state = train(config, recipe, batches, options.work, size / tokens, options.minutes, score)

    nats, load = evaluate(state.params, config, data.encode(tokenizer, held_out))
    print(f"step {state.step}: {bits_per_byte(nats, held_out):.4f} bits per byte of held-out stories")
    print(f"load of experts: from {load.min():.3f} to {load.max():.3f}, {1 / config.num_experts:.3f} would be even")
    export.write_directory(options.work / "float32", config, state.params, tokenizer)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    export.write_quantized(options.work / "float32", options.out, FORMAT)
    check(options.out, state.params, config, options.work / "float32", tokenizer, held_out[:8])
    if options.out.stat().st_size > LARGEST:
        raise SystemExit(f"{options.out}: is larger than {LARGEST:,} bytes")


if __name__ == "__main__":
    main()
