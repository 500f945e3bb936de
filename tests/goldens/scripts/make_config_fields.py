"""Writes ferrum_jax/families/fields.py: for each model_type the keys of config.json that can change what transformers computes.

They are the fields of its configuration class, the other names of those fields, and what the code that all models share
reads from any configuration; without those of training, of generation, of the tokenizer and about the file itself.
`python make_config_fields.py` needs transformers 5.24 and torch. Which model_types there are, the families say.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import textwrap
from pathlib import Path

import transformers
from transformers import cache_utils, masking_utils, modeling_rope_utils
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from ferrum_jax.families import FAMILIES

OUT = Path(__file__).resolve().parents[3] / "ferrum_jax" / "families" / "fields.py"
MODEL_TYPES = sorted(family.model_type for family in FAMILIES if family.model_type in CONFIG_MAPPING)
# Read with getattr, whatever the class: masks, kinds of caches, rotary parameters, and the width of a head.
COMMON = {
    masking_utils: ("is_causal", "sliding_window", "attention_chunk_size"),
    cache_utils: ("layer_types", "per_layer_config", "kv_sharing_modes"),
    modeling_rope_utils: (
        "rope_scaling",
        "rope_theta",
        "partial_rotary_factor",
        "original_max_position_embeddings",
        "head_dim",
    ),
}
READERS = ("__post_init__", "convert_rope_params_to_dict")  # methods of a class that read keys which are not its fields
NO_CONSEQUENCE = {
    "architectures", "attention_dropout", "attention_probs_dropout_prob", "bos_token_id", "chunk_size_feed_forward",
    "classifier_dropout", "dtype", "eos_token_id", "hidden_dropout_prob", "id2label", "initializer_range", "label2id",
    "output_hidden_states", "output_router_logits", "pad_token_id", "pretraining_tp", "problem_type", "return_dict",
    "router_aux_loss_coef", "router_jitter_noise", "transformers_version", "use_cache",
}  # fmt: skip


def fields(model_type: str) -> set[str]:
    """The keys that count for one model_type alone."""
    kind = CONFIG_MAPPING[model_type]
    names = {field.name for field in dataclasses.fields(kind)}
    own = "".join(inspect.getsource(vars(kind)[name]) for name in READERS if name in vars(kind))
    more = re.findall(r'kwargs\.(?:get|pop|setdefault)\("(\w+)"', own)
    return (names | {*kind.attribute_map, *kind.attribute_map.values(), *more}) - NO_CONSEQUENCE


def common() -> set[str]:
    """What is read from any configuration; each name must still be in the source that it was found in."""
    for module, names in COMMON.items():
        missing = [name for name in names if name not in inspect.getsource(module)]
        assert not missing, f"{module.__name__} no longer reads {missing}"
    return {name for names in COMMON.values() for name in names}


def text() -> str:
    """The module."""

    def lines(names: set[str], indent: int) -> str:
        words = ", ".join(f'"{name}"' for name in sorted(names))
        return textwrap.fill(words, 126, initial_indent=" " * indent, subsequent_indent=" " * indent)

    of_class = {kind: fields(kind) for kind in MODEL_TYPES}
    of_class |= {kind: names | common() for kind, names in of_class.items() if "rope_parameters" in names}
    shared = set.intersection(*(names for names in of_class.values() if "rope_parameters" in names))
    made = (
        f'"""Keys of config.json that can change what transformers {transformers.__version__} computes, by model_type; any '
        'other key changes nothing.\n\nWritten by tests/goldens/scripts/make_config_fields.py.\n"""\n\n# fmt: off\n'
        f"_DECODERS = {{\n{lines(shared, 4)},\n}}\nFIELDS = {{\n"
    )
    for kind, names in of_class.items():
        own = names - shared if shared <= names else names
        terms = ["_DECODERS"] * (shared <= names) + [f"{{\n{lines(own, 8)},\n    }}"] * bool(own)
        made += f'    "{kind}": {" | ".join(terms)},\n'
    rope = set(modeling_rope_utils.RopeParameters.__annotations__)
    return made + f"}}\n# Keys inside the object rope_scaling or rope_parameters.\nROPE_FIELDS = {{\n{lines(rope, 4)},\n}}\n"


if __name__ == "__main__":
    OUT.write_text(text())
