"""Faults of notebooks and pictures, each put back: its guard must fail."""

import pytest

from ferrum_jax import plotting
from support.patching import Fault, applied
from unit.repository import test_notebooks as notebooks
from unit.repository import test_plotting as plots

FAULTS = {
    "digest": Fault(
        "a cell is stale where its own code was changed, but not where the code before it was",
        notebooks.execute.digests,
        "digest.update(cell",
        "digest = hashlib.sha256(cell",
        notebooks.test_a_change_of_code_makes_all_later_outputs_stale,
    ),
    "path": Fault(
        "paths of the machine stay in outputs",
        notebooks.execute.faults,
        "TRACE.findall(text_of(output))",
        "[]",
        lambda: notebooks.test_a_path_of_a_machine_is_found_in_outputs("/home/me/x.py"),
    ),
    "roof": Fault(
        "an int8 program has 161 % of a float32 roof",
        plotting.roofline,
        "if share <= 110 else",
        "if True else",
        plots.test_a_point_above_the_roof_is_not_a_share_of_it,
    ),
    "clock": Fault(
        "a timeline begins with the clock and not with its first event",
        plotting.timeline,
        "event.begin_s - first",
        "event.begin_s",
        plots.test_timeline_begins_with_its_first_event,
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_the_guard_notices(name):
    fault = FAULTS[name]
    with applied(fault), pytest.raises(AssertionError):
        fault.guard()
