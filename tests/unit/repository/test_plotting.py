"""Pictures: the artists have the data, the axes have names and units, and nothing outside the figure changes."""

import builtins
import itertools
import math

import matplotlib
import numpy as np
import pytest

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.colors import to_rgba

import ferrum_jax as fj
from ferrum_jax import plotting
from ferrum_jax.completion import Completion
from ferrum_jax.finetune import Report
from ferrum_jax.plotting import Event, Point
from support.tiny_gguf import write_tiny_llama

ROUTING = fj.Routing(
    tokens=np.asarray([5, 6, 7, 8], np.int32),
    layers=np.asarray([1, 5], np.int32),
    expert_ids=np.asarray([[[0, 2], [2, 0], [2, 1], [3, 2]], [[3, 0], [3, 1], [3, 2], [3, 4]]], np.int32),
    expert_weights=np.asarray([[[0.75, 0.25]] * 4, [[0.5, 0.375]] * 4], np.float32),
    num_experts=5,
)
SHARES = np.asarray([[50, 25, 100, 25, 0], [25, 25, 25, 100, 25]])


class Letters:
    """A tokenizer in which id i is a letter; 3 is half a character and 4 a dollar."""

    def token_bytes(self, id):
        return {3: b"\xe2", 4: b"$x$"}.get(id, b" " + bytes([97 + id]))


@pytest.fixture(autouse=True)
def nothing_outside():
    """No figure is left, and styles are as they were."""
    before = dict(matplotlib.rcParams)
    yield
    pyplot.close("all")
    assert dict(matplotlib.rcParams) == before


def names(ax):
    return ax.get_xlabel(), ax.get_ylabel()


def ticks(labels):
    return [label.get_text() for label in labels]


def test_heatmap_of_all_layers():
    ax = plotting.expert_heatmap(ROUTING)
    (image,) = ax.images
    assert np.array_equal(image.get_array(), SHARES) and image.get_clim()[0] == 0
    assert names(ax) == ("expert", "layer") and ticks(ax.get_yticklabels()) == ["1", "5"]
    assert [other.get_ylabel() for other in ax.figure.axes if other is not ax] == ["share of tokens (%)"]
    assert ax.figure.get_size_inches()[0] == 8


def test_heatmap_of_one_layer():
    ax = plotting.expert_heatmap(ROUTING, layer=5)
    shown = ax.images[0].get_array()
    assert shown.shape == (5, 4) and (shown[3] == 0.5).all() and ax.get_title() == "layer 5"
    assert [shown[expert, token] for token, expert in enumerate([0, 1, 2, 4])] == [0.375] * 4
    assert np.ma.count(shown) == 8, "where an expert was not chosen there is nothing"
    assert names(ax) == ("position of the token", "expert")
    with pytest.raises(ValueError, match="layer 0 has no experts; those that have: 1, 5"):
        plotting.expert_heatmap(ROUTING, layer=0)
    assert len(pyplot.get_fignums()) == 1, "nothing is drawn before it is refused"


def test_heatmap_of_many_layers_names_some():
    many = ROUTING._replace(layers=np.arange(60), expert_ids=np.repeat(ROUTING.expert_ids[:1], 60, axis=0))
    labels = ticks(plotting.expert_heatmap(many).get_yticklabels())
    assert len(labels) == 16 and (labels[0], labels[-1]) == ("0", "59")


def test_load():
    ax = plotting.expert_load(ROUTING)
    assert [bar.get_height() for bar in ax.patches] == SHARES.mean(axis=0).tolist()
    assert ax.lines[0].get_ydata()[0] == 40 and names(ax) == ("expert", "share of tokens (%)")
    assert set(ticks(ax.get_legend().get_texts())) == {"mean over layers", "uniform: 40 %"}
    ax = plotting.expert_load(ROUTING, layer=5)
    assert [bar.get_height() for bar in ax.patches] == SHARES[1].tolist()
    with pytest.raises(ValueError, match="layer 2 has no experts"):
        plotting.expert_load(ROUTING, layer=2)


def test_probabilities_of_tokens():
    logprobs = [
        [(1, math.log(0.25)), (2, math.log(0.5)), (1, math.log(0.25))],
        [(3, math.log(0.5)), (3, math.log(0.5)), (4, math.log(0.125))],
    ]
    ax = plotting.token_probabilities(Completion("", [1, 3], "length", logprobs, [9]), Letters())
    bars = sorted(ax.patches, key=lambda bar: bar.get_y())
    assert [bar.get_width() for bar in bars] == pytest.approx([0.25, 0.5, 0.5, 0.125])
    assert ticks(ax.get_yticklabels()) == ["' b'", "' c'", r"'\\xe2'", "'$x$'"]
    assert not any(label.get_parse_math() for label in ax.get_yticklabels())
    chosen = [bar.get_facecolor() == to_rgba("C0") for bar in bars]
    assert chosen == [True, False, True, False]
    assert ax.yaxis_inverted(), "the first token is on top"
    assert ax.get_xlabel() == "probability" and ax.get_xlim() == (0, 1)
    assert len(plotting.token_probabilities(Completion("", [1, 3], "length", logprobs, [9]), Letters(), 1).patches) == 2
    with pytest.raises(ValueError, match=r"SamplingParams\(logprobs=k\)"):
        plotting.token_probabilities(Completion("", [1], "length", None, [9]), Letters())


def test_timeline():
    events = [Event(7, "prefill", 0.0, 0.5), Event("b", "prefill", 0.5, 0.75), Event(7, "decode", 0.5, 1.0)]
    ax = plotting.timeline(events)
    bars = [(bar.get_x(), bar.get_width(), bar.get_y() + bar.get_height() / 2) for bar in ax.patches]
    assert np.allclose(bars, [(0, 0.5, 0), (0.5, 0.25, 1), (0.5, 0.5, 0)])
    assert ticks(ax.get_yticklabels()) == ["7", "b"] and ax.yaxis_inverted()
    assert names(ax) == ("time since the first event (s)", "request") and ax.get_xlim()[0] == 0
    assert ticks(ax.get_legend().get_texts()) == ["prefill", "decode"]


def test_timeline_begins_with_its_first_event():
    """Events may be of any clock; one that counts from the start of the machine does not move them out of the picture."""
    ax = plotting.timeline([Event(0, "prefill", 5000.5, 5001.0), Event(0, "decode", 5001.0, 5002.0)])
    assert [(bar.get_x(), bar.get_width()) for bar in ax.patches] == [(0, 0.5), (0.5, 1)]
    assert ax.get_xlim()[0] == 0 and ax.get_xlim()[1] < 2


@pytest.mark.slow
def test_events_of_an_engine(tmp_path):
    """The loop of the docstring: each request is read, then decoded, without a gap, one step at a time."""
    model = fj.load(write_tiny_llama(tmp_path / "tiny.gguf"), dtype="float32")
    engine = fj.Engine(model, fj.EngineConfig(page_size=8, num_pages=40, max_seqs=2, token_budget=16))
    greedy = fj.SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True)
    requests = [engine.submit([3] * length, greedy) for length in (40, 5, 6)]
    text = plotting.timeline.__doc__.partition("Args:")[0]
    program = "\n".join(line.strip(" ") if line.startswith(" " * 8 + "e") else line[8:] for line in text.splitlines())
    program = program[program.index("events, start") :]
    found: dict = {"engine": engine, "requests": requests, "Event": Event}
    exec("import time\n" + program, found)
    assert all(len(request.token_ids) == 6 for request in requests)
    by_request = [[event for event in found["events"] if event.request == request.id] for request in requests]
    for events in by_request:
        kinds = [event.kind for event in events]
        assert kinds == sorted(kinds, reverse=True) and set(kinds) == {"prefill", "decode"}
        assert all(a.end_s <= b.begin_s for a, b in itertools.pairwise(events))
    assert sum(event.kind == "prefill" for event in by_request[0]) >= 3, "40 tokens at 16 a step"
    assert by_request[2][0].begin_s > by_request[1][0].begin_s, "the third waits for a place"
    assert len(plotting.timeline(found["events"]).patches) == len(found["events"])


def test_roofline():
    points = [Point("decode", 2e9, 1e9, 0.5), Point("prefill", 4e12, 1e9, 2.0)]
    ax = plotting.roofline(points, bandwidth=8e9, flops=4e12)
    roof, *dots = ax.lines
    assert roof.get_ydata().tolist() == [8e9 * 0.5, 4e12, 4e12] and roof.get_xdata().tolist() == [0.5, 500, 16000]
    assert [(dot.get_xdata()[0], dot.get_ydata()[0]) for dot in dots] == [(2, 4e9), (4000, 2e12)]
    labels = ticks(ax.get_legend().get_texts())
    assert labels == ["8 GB/s, 4000 GFLOP/s", "decode: 25 % of the roof", "prefill: 50 % of the roof"]
    assert (ax.get_xscale(), ax.get_yscale()) == ("log", "log")
    assert names(ax) == ("operations per byte (FLOP/B)", "operations per second (FLOP/s)")


def test_everything_draws_into_axes_that_are_given():
    logprobs = [[(1, -1.0), (2, -0.5)]]
    completion = Completion("", [1], "length", logprobs, [9])
    figure, places = pyplot.subplots(3, 2)
    drawn = [
        plotting.expert_heatmap(ROUTING, ax=places[0, 0]),
        plotting.expert_heatmap(ROUTING, 1, ax=places[0, 1]),
        plotting.expert_load(ROUTING, ax=places[1, 0]),
        plotting.token_probabilities(completion, Letters(), ax=places[1, 1]),
        plotting.timeline([Event(0, "decode", 0, 1)], ax=places[2, 0]),
        plotting.roofline([Point("x", 1, 1, 1)], 1, 1, ax=places[2, 1]),
    ]
    assert drawn == places.ravel().tolist() and pyplot.get_fignums() == [figure.number]


def test_without_matplotlib_the_extra_is_named(monkeypatch):
    real = builtins.__import__

    def refusing(name, *arguments):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *arguments)

    monkeypatch.setattr(builtins, "__import__", refusing)
    with pytest.raises(ImportError, match=r"pip install '.*\[plot\]"):
        plotting.expert_load(ROUTING)


def test_a_point_above_the_roof_is_not_a_share_of_it():
    """An int8 program under a float32 roof reached 161 % of it."""
    (above, noisy) = ticks(
        plotting.roofline([Point("int8", 161.0, 1.0, 1.0), Point("noise", 105.0, 1.0, 1.0)], 1e3, 100.0)
        .get_legend()
        .get_texts()
    )[1:]
    assert above.startswith("int8: above the roof") and "%" not in above and noisy == "noise: 105 % of the roof"


def test_losses_of_a_training():
    reports = [Report(step, 4.0 / step, 1.0, 100.0, 2.0 if step == 3 else None) for step in (1, 2, 3)]
    ax = plotting.losses(reports)
    training, held_out = ax.lines
    assert training.get_xydata().tolist() == [[1, 4.0], [2, 2.0], [3, 4.0 / 3]]
    assert held_out.get_xydata().tolist() == [[3, 2.0]]
    assert names(ax) == ("step", "mean loss of a token (nats)")
    assert len(plotting.losses(reports[:2]).lines) == 1
