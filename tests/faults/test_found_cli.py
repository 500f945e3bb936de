"""Faults that users found in the command line, each put back: its guard must fail."""

from __future__ import annotations

import tempfile
import types
from pathlib import Path

import pytest

import ferrum_jax as fj
from ferrum_jax import checks
from ferrum_jax.cli import bench, inspect, output
from ferrum_jax.sampling_params import SamplingParams
from ferrum_jax.weights.fresh import fresh
from support.patching import Fault, applied
from unit.cli import test_cli_output as output_guards
from unit.convert import test_convert_disk as disk_guards
from unit.model import test_checks as checks_guards


def in_a_folder(guard, *more):
    with tempfile.TemporaryDirectory() as folder:
        guard(Path(folder), *more)


def the_space_is_compared_first():
    with pytest.MonkeyPatch.context() as patches:
        in_a_folder(disk_guards.test_the_space_is_compared_first, patches)


def a_licence_of_another_type():
    stated = inspect._stated(types.SimpleNamespace(metadata={"general.license": ["a", "b"]}), "general.license")
    assert stated == "a, b"


def default_lengths_fit():
    prompts, generated = bench._lengths(None, None, 512)
    assert max(prompts) + generated <= 512


def a_bool_is_no_id():
    with pytest.raises(ValueError, match="not bool"):
        checks.token_ids([True])


def a_seed_of_minus_one():
    assert fj.SamplingParams(seed=-1).seed is None


FAULTS = {
    "licence": Fault(
        "what a file says is printed as the type that it is",
        inspect._stated,
        "return None if value is None else plain(value)",
        "return value",
        a_licence_of_another_type,
    ),
    "escapes": Fault(
        "escape sequences of a file reach the terminal",
        output.plain,
        "letter if letter.isprintable() else chr(_PICTURES.get(ord(letter), 0xFFFD))",
        "letter",
        output_guards.test_plain_takes_what_json_and_numpy_have,
    ),
    "folded": Fault(
        "words longer than the line are broken",
        output.wrapped,
        "break_long_words=False",
        "break_long_words=True",
        output_guards.test_a_word_is_never_broken,
    ),
    "left": Fault(
        "directories made for an output stay when the disk is full",
        fresh,
        "*(folder.rmdir for folder in missing)",
        "",
        lambda: in_a_folder(disk_guards.test_directories_made_for_an_output_go_with_it),
    ),
    "space": Fault(
        "the space is not compared before anything is written",
        fresh,
        "if needed > free:",
        "if False:",
        the_space_is_compared_first,
    ),
    "bench": Fault(
        "bench's usual lengths are taken whatever the context is",
        bench._lengths,
        "min(n, context - generated)",
        "n",
        default_lengths_fit,
    ),
    "bool": Fault("True is token 1", checks.token_ids, "isinstance(item, bool | np.bool_)", "False", a_bool_is_no_id),
    "seed": Fault(
        "a seed of -1 is the seed 4294967295",
        SamplingParams.__post_init__,
        "None if self.seed == -1 else self.seed % 2**32",
        "self.seed % 2**32",
        a_seed_of_minus_one,
    ),
    "dtype": Fault(
        "a dtype of JAX is no dtype",
        checks.dtype_name,
        "return np.dtype(value).name",
        "return value",
        lambda: checks_guards.test_dtypes_of_jax_and_numpy_are_names("float32"),
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_noticed(name):
    fault = FAULTS[name]
    fault.guard()
    with applied(fault), pytest.raises((AssertionError, ValueError, pytest.fail.Exception)):
        fault.guard()
