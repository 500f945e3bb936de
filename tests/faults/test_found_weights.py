"""Faults in reading checkpoints, each put back into our own source: its guard must fail."""

from __future__ import annotations

from pathlib import Path

import pytest

from ferrum_jax.errors import FerrumError
from ferrum_jax.families import Family, delta_net, keys, qwen3next
from ferrum_jax.weights import adapter, adapter_gguf, changed, huggingface, packed
from ferrum_jax.weights import block_scales as reading
from ferrum_jax.weights import names as weights_names
from ferrum_jax.weights.gguf import open_gguf
from ferrum_jax.weights.tied import same_numbers
from support.directories import LLAMA, write
from support.goldens import tiny_directories
from support.patching import Fault, applied, in_folder
from support.tiny_gguf import write_tiny_llama
from unit.kernels import test_block_scales as block_scales
from unit.model import test_hybrids as hybrids
from unit.weights import test_adapter_files as adapters
from unit.weights import test_adapter_gguf as of_files
from unit.weights import test_config as of_gguf
from unit.weights import test_config_numbers as numbers
from unit.weights import test_directory_config as directory_config
from unit.weights import test_families as families
from unit.weights import test_schemes as schemes
from unit.weights import test_tied as tied


def one_bit_of_the_output(folder: Path) -> None:
    path = tied.directory(folder / "model", lambda t: t.update({tied.HEAD: tied.one_bit(t[tied.EMBEDDING])}))
    assert tied.stored(path)


def a_copy_that_differs(folder: Path) -> None:
    model = write(LLAMA, folder / "model")
    adapters.tiny_adapters.write(adapters.PLAIN, folder / "adapter")

    def change(entry: tuple) -> tuple:
        return entry[0], entry[1], tiny_directories.to_bytes(tiny_directories.from_bytes(entry[2], entry[0]) * 2, entry[0])

    adapters.test_a_copy_that_differs_is_refused_by_name(change, folder / "adapter", model)


def modules_saved(folder: Path) -> None:
    model = write(LLAMA, folder / "model")
    adapters.tiny_adapters.write(adapters.PLAIN, folder / "adapter")
    adapters.test_modules_saved_whole_are_passed_over_where_they_are_equal_copies(folder / "adapter", model)


def an_array_of_counts(folder: Path) -> None:
    with open_gguf(write_tiny_llama(folder / "model.gguf")) as header:
        numbers.test_types_of_integers_in_gguf("context_length", header)


def the_file_of_llama_cpp(folder: Path) -> None:
    directories = of_files.Folder(folder)
    with of_files.open_model(directories(of_files.adapter_cases.LLAMA)) as source:
        of_files.test_the_file_of_llama_cpp_is_the_directory(directories, source.config())


FAULTS = {
    "adapter rows": Fault(
        "rows of B are taken as they are in the file of an adapter",
        adapter_gguf.read_adapter_file,
        "if factor and tensor.gguf_rows:",
        "if False:",
        in_folder(the_file_of_llama_cpp),
    ),
    "3-tied": Fault(
        "an output of its own is dropped where config.json ties",
        huggingface._Layout._tie,
        "elif self.directory._header_only:",
        "elif True:",
        in_folder(tied.test_in_parts),
    ),
    "3-bits": Fault(
        "matrices of one shape are the same",
        same_numbers,
        "if not (one == other).all():",
        "if False:",
        in_folder(one_bit_of_the_output),
    ),
    "3-adapter": Fault(
        "an adapter's copy is passed over without a look",
        adapter._compare,
        "if not same_numbers(",
        "if False and not same_numbers(",
        in_folder(a_copy_that_differs),
    ),
    "3-saved": Fault(
        "modules_to_save is not looked at",
        adapter._require_copies,
        "<= names:",
        "<= names | {'norm', 'head'}:",
        in_folder(modules_saved),
    ),
    "5-zeros": Fault(
        "the header says how zero points are stored",
        packed.packed_matrix,
        "points.min() == points.max()",
        "False",
        in_folder(schemes.test_symmetric_zero_points_are_what_is_stored, "gptq_v2", 4, {}),
    ),
    "5-keys": Fault(
        "unknown keys of a quantization_config are ignored",
        keys.Keys.judge,
        "raise self.unsupported(key, text.format(shown(value)))",
        "pass",
        lambda: schemes.test_keys_that_change_the_numbers_are_refused(schemes.GPTQ | {"rotation": "h"}, "rotation: 'h'"),
    ),
    "9-fields": Fault(
        "a key counts whether or not the class has it",
        keys.Keys.__init__,
        "if fields is None or key in fields}",
        "}",
        lambda: directory_config.test_a_key_that_is_no_field_of_the_class_changes_nothing("llama"),
    ),
    "9-unread": Fault(
        "a field that nothing reads is ignored",
        keys.Keys.unread,
        "not is_neutral(value))",
        "False)",
        lambda: directory_config.test_a_feature_that_is_not_there_is_named(
            {"attention_chunk_size": 64}, "attention_chunk_size: 64 is not supported"
        ),
    ),
    "14-json": Fault(
        "what no family reads in config.json is not judged",
        Family.read_json,
        'keys.judge(f"{{}} is not supported in a {self.model_class}")',
        "pass",
        lambda: directory_config.test_a_feature_that_is_not_there_is_named({"kv_sharing_modes": [1]}, "kv_sharing_modes"),
    ),
    "14-gguf": Fault(
        "what no family reads in a GGUF file is not judged",
        Family.read_gguf,
        'keys.judge("this feature is not supported")',
        "pass",
        in_folder(of_gguf.test_a_feature_that_is_not_there_is_named, "llama.attention.scale", (1.0, of_gguf.T.FLOAT32)),
    ),
    "14-rows": Fault(
        "rows of queries and keys stay as GGUF files have them",
        weights_names.parameters,
        "if row.gguf_rows and source.is_gguf:",
        "if False:",
        in_folder(families.test_rows_of_llama_are_those_of_the_converter),
    ),
    "2-numbers": Fault(
        "a number has no upper bound",
        keys.Keys.number,
        " and value <= high",
        "",
        lambda: numbers.test_numbers_of_json({"rope_theta": 1e30}, "rope_theta"),
    ),
    "2-scales": Fault(
        "a block's scale may be infinite",
        reading.read_blocks,
        "if exponents.max() == _EXPONENT:",
        "if False:",
        in_folder(block_scales.test_every_half_of_a_block, "Q4_K"),
    ),
    "14-arrays": Fault(
        "any count may be an array",
        keys.Keys.integer,
        "return self._integer(key, value, low, high)",
        "return self._integer(key, value[0].item() if isinstance(value, np.ndarray) and len(value) else value, low, high)",
        in_folder(an_array_of_counts),
    ),
    "15-tiled": Fault(
        "value heads of a directory keep their order",
        delta_net.tiled_heads,
        ".transpose(1, 0, 2)",
        "",
        in_folder(hybrids.test_a_directory_becomes_the_gguf_file_of_llama_cpp, "qwen35moe"),
    ),
    "15-grouped": Fault(
        "queries, keys, values and gates of a key head are taken for all queries, all keys, ...",
        qwen3next._grouped,
        "np.split(rows, cuts, axis=1)",
        "np.split(rows.reshape(1, -1), cuts * mixer.key_heads, axis=1)",
        in_folder(hybrids.test_a_directory_becomes_the_gguf_file_of_llama_cpp, "qwen3next"),
    ),
    "15-values": Fault(
        "norms without their 1, A_log as it stands",
        changed.Changed.read_range,
        "self.values(plain_numbers(numbers, self.info.format))",
        "plain_numbers(numbers, self.info.format)",
        in_folder(hybrids.test_a_directory_becomes_the_gguf_file_of_llama_cpp, "qwen35"),
    ),
    "15-columns": Fault(
        "the columns after the value heads keep their order",
        changed.Changed.read_range,
        "[:, self.columns]",
        "",
        in_folder(hybrids.test_a_directory_becomes_the_gguf_file_of_llama_cpp, "qwen35"),
    ),
    "15-rows": Fault(
        "a tensor may have more rows than the configuration says",
        changed.changed,
        "if len(used) == len(changes) and",
        "if False and",
        in_folder(hybrids.test_what_does_not_fit_is_named, {"linear_num_value_heads": 4}, "expected 256 rows"),
    ),
    "15-adapter": Fault(
        "an adapter's rows keep the order of the directory",
        adapter._read,
        'change.columns if factor == "A" else change.rows',
        'change.columns if factor == "A" else None',
        in_folder(hybrids.test_an_adapter_of_every_projection_gives_what_peft_gives, "qwen35", "gguf"),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("number", FAULTS)
def test_every_fault_is_noticed(number: str) -> None:
    fault = FAULTS[number]
    fault.guard()
    with applied(fault), pytest.raises((AssertionError, pytest.fail.Exception, FerrumError)):
        fault.guard()
