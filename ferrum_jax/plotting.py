"""Plots for notebooks: routing, probabilities, the engine's work over time, the roofline, the losses of a training.

Each function draws into `ax`, or into a new figure 8 inches wide if that is None, and returns the Axes. It does not show the
figure or change styles. The first call imports matplotlib, which the extra "plot" installs, and raises ImportError if it is
missing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from ferrum_jax.completion import Completion
    from ferrum_jax.finetune import Report
    from ferrum_jax.model import Routing
    from ferrum_jax.tokenizer import Tokenizer

__all__ = ["Event", "Point", "expert_heatmap", "expert_load", "losses", "roofline", "timeline", "token_probabilities"]

_WIDTH = 8.0  # inches
_LABELS = 16  # at most, on an axis that names each row


class Event(NamedTuple):
    """Work on one request.

    Attributes:
      request: its id.
      kind: "prefill" or "decode".
      begin_s: when the work began, in seconds on any clock.
      end_s: when it ended, on the same clock.
    """

    request: int | str
    kind: str
    begin_s: float
    end_s: float


class Point(NamedTuple):
    """A measured program.

    Attributes:
      name: its name in the legend.
      flops: the number of its floating-point operations.
      bytes: the bytes that it read and wrote.
      seconds: how long it took.
    """

    name: str
    flops: float
    bytes: float
    seconds: float


def expert_heatmap(routing: Routing, layer: int | None = None, *, ax: Axes | None = None) -> Axes:
    """The share of tokens (%) routed to each expert of each layer, or for one layer the weight of each expert for each token.

    Args:
      routing: from `Model.trace_routing`.
      layer: the number of a layer; None: all layers.
      ax: where to draw; None makes a figure.

    Raises:
      ValueError: if the layer does not have experts.
    """
    if layer is None:
        ax = _axes(ax)
        shown = np.unique(np.linspace(0, len(routing.layers) - 1, _LABELS).astype(int))
        _image(ax, 100 * _load(routing), "share of tokens (%)")
        ax.set_yticks(shown, labels=routing.layers[shown].tolist())
        ax.set(xlabel="expert", ylabel="layer")
        return ax
    row, tokens = _row(routing, layer), len(routing.tokens)
    weights = np.full((routing.num_experts, tokens), np.nan)
    weights[routing.expert_ids[row], np.arange(tokens)[:, None]] = routing.expert_weights[row]
    ax = _axes(ax, min(8.0, max(4.0, routing.num_experts / 24)))
    _image(ax, weights, "weight")
    ax.locator_params(axis="y", integer=True)
    ax.set(xlabel="position of the token", ylabel="expert", title=f"layer {layer}")
    return ax


def expert_load(routing: Routing, layer: int | None = None, *, ax: Axes | None = None) -> Axes:
    """The share of tokens (%) routed to each expert, and the share of a uniform distribution.

    Args:
      routing: from `Model.trace_routing`.
      layer: the number of a layer; None: the mean over layers.
      ax: where to draw; None makes a figure.

    Raises:
      ValueError: if the layer does not have experts.
    """
    load = 100 * _load(routing)
    shares = load.mean(axis=0) if layer is None else load[_row(routing, layer)]
    uniform = 100 * routing.expert_ids.shape[2] / routing.num_experts
    ax = _axes(ax)
    ax.bar(np.arange(len(shares)), shares, color="C0", label="mean over layers" if layer is None else f"layer {layer}")
    ax.axhline(uniform, color="C1", linestyle="--", label=f"uniform: {uniform:.3g} %")
    ax.locator_params(axis="x", integer=True)
    ax.set(xlabel="expert", ylabel="share of tokens (%)", xlim=(-0.75, len(shares) - 0.25))
    _legend_above(ax)
    return ax


def token_probabilities(completion: Completion, tokenizer: Tokenizer, count: int = 12, *, ax: Axes | None = None) -> Axes:
    """The probabilities of the first generated tokens and of their best alternatives.

    Args:
      completion: generated with `SamplingParams(logprobs=k)`.
      tokenizer: the model's.
      count: the number of tokens to show.
      ax: where to draw; None makes a figure.

    Raises:
      ValueError: if the completion does not have logprobs.
    """
    if completion.logprobs is None:
        raise ValueError("the completion has no logprobs; generate it with SamplingParams(logprobs=k)")
    heights, labels, values, chosen = [], [], [], []
    height = 0.0
    for entries in completion.logprobs[:count]:
        for id, logprob in dict(entries).items():
            heights.append(height)
            labels.append(repr(tokenizer.token_bytes(id).decode("utf-8", "backslashreplace")))
            values.append(np.exp(logprob))
            chosen.append(id == entries[0][0])
            height += 1
        height += 0.75
    ax = _axes(ax, 0.9 + 0.2 * height)
    for kind, color, mine in (("chosen", "C0", np.array(chosen, bool)), ("alternative", "0.7", ~np.array(chosen, bool))):
        ax.barh(np.array(heights)[mine], np.array(values)[mine], color=color, label=kind)
    ax.set_yticks(heights, labels=labels)
    for label in ax.get_yticklabels():
        label.set_parse_math(False)  # a dollar is a dollar
    ax.set(xlabel="probability", ylabel="token", xlim=(0, 1), ylim=(height - 1.0, -0.75))
    _legend_above(ax)
    return ax


def timeline(events: Sequence[Event], *, ax: Axes | None = None) -> Axes:
    """When each request was prefilled and decoded, one row for each request in order of appearance.

    The events of an engine that does not run in the background can be recorded around `step`, since each step continues all
    running requests:

        events, start, more = [], time.perf_counter(), True
        while more:
            running = [each for each in requests if each.state == "running"]
            kinds = [(each.id, "decode" if each.token_ids else "prefill") for each in running]
            begin = time.perf_counter() - start
            more = engine.step()
            end = time.perf_counter() - start
            events += [Event(id, kind, begin, end) for id, kind in kinds]

    Args:
      events: in any order, all on the same clock.
      ax: where to draw; None makes a figure.
    """
    ax = _axes(ax, 1.2 + 0.3 * len({event.request for event in events}))
    rows = {request: row for row, request in enumerate(dict.fromkeys(event.request for event in events))}
    first = min((event.begin_s for event in events), default=0.0)
    for kind, color in (("prefill", "C1"), ("decode", "C0")):
        mine = [event for event in events if event.kind == kind]
        widths = [event.end_s - event.begin_s for event in mine]
        begins = [event.begin_s - first for event in mine]
        heights = [rows[event.request] for event in mine]
        ax.barh(heights, widths, 0.7, begins, color=color, edgecolor="white", linewidth=0.3, label=kind)
    ax.set_yticks(list(rows.values()), labels=[str(request) for request in rows])
    ax.set(xlabel="time since the first event (s)", ylabel="request", ylim=(len(rows) - 0.5, -0.5), xlim=(0, None))
    _legend_above(ax)
    return ax


def roofline(points: Sequence[Point], bandwidth: float, flops: float, *, ax: Axes | None = None) -> Axes:
    """The speed of programs compared with the limits of the device: its memory bandwidth and its operations a second
    (Williams, Waterman and Patterson, "Roofline", 2009).

    Args:
      points: the programs, all in the same arithmetic.
      bandwidth: bytes a second that the device's memory delivers.
      flops: operations a second that the device reaches in the arithmetic of the points; each arithmetic has its own roof.
      ax: where to draw; None makes a figure.

    Returns:
      The Axes. The legend gives each point's share of its roof, and marks points more than 10 % above it, which belong to
        another roof.
    """
    ax = _axes(ax)
    ridge = flops / bandwidth
    intensities = [point.flops / point.bytes for point in points]
    low, high = min([ridge, *intensities]) / 4, max([ridge, *intensities]) * 4
    roof = np.array([low, ridge, high])
    limits = f"{bandwidth / 1e9:.4g} GB/s, {flops / 1e9:.4g} GFLOP/s"
    ax.plot(roof, np.minimum(flops, bandwidth * roof), color="0.3", label=limits)
    for point, intensity in zip(points, intensities, strict=True):
        reached = point.flops / point.seconds
        share = 100 * reached / min(flops, bandwidth * intensity)
        place = f"{share:.0f} % of the roof" if share <= 110 else "above the roof, which is of another arithmetic or memory"
        ax.plot(intensity, reached, "o", label=f"{point.name}: {place}")
    ax.set(xscale="log", yscale="log", xlabel="operations per byte (FLOP/B)", ylabel="operations per second (FLOP/s)")
    ax.grid(True, which="major", alpha=0.3)
    ax.legend(loc="lower right")
    return ax


def losses(reports: Sequence[Report], *, ax: Axes | None = None) -> Axes:
    """The loss of each step of a training, and of the held-out examples where it was measured.

    Args:
      reports: of the steps, as `finetune.train` reports them.
      ax: where to draw; None makes a figure.
    """
    ax = _axes(ax)
    ax.plot([one.step for one in reports], [one.loss for one in reports], color="C0", label="training")
    measured = [(one.step, one.held_out_loss) for one in reports if one.held_out_loss is not None]
    if measured:
        ax.plot(*zip(*measured, strict=True), "o-", color="C1", label="held out")
    ax.locator_params(axis="x", integer=True)
    ax.set(xlabel="step", ylabel="mean loss of a token (nats)")
    _legend_above(ax)
    return ax


def _axes(ax: Axes | None, height: float = 4.0) -> Any:
    if ax is not None:
        return ax
    try:
        from matplotlib import pyplot
    except ImportError as error:
        from pallas_kernels import extras

        raise ImportError(f"plots need matplotlib; install it with: {extras.install('plot')}") from error
    return pyplot.subplots(figsize=(_WIDTH, height), layout="constrained")[1]


def _legend_above(ax: Axes) -> None:
    ax.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, frameon=False)


def _row(routing: Routing, layer: int) -> int:
    """The index of a layer among those with experts."""
    if layer not in routing.layers:
        raise ValueError(f"layer {layer} has no experts; those that have: {', '.join(map(str, routing.layers))}")
    return routing.layers.tolist().index(layer)


def _image(ax: Axes, values: np.ndarray, label: str) -> None:
    image = ax.imshow(values, aspect="auto", vmin=0)
    ax.figure.colorbar(image, ax=ax, label=label)
    ax.locator_params(axis="x", integer=True)


def _load(routing: Routing) -> np.ndarray:
    """The share of tokens that go to each expert: float64 [layers, experts]."""
    counts = [np.bincount(ids.ravel(), minlength=routing.num_experts) for ids in routing.expert_ids]
    return np.stack(counts) / len(routing.tokens)
