"""Golden logits and greedy tokens of the tiny models of Gemma, from transformers' own loading of the directories.

PYTHONPATH=tests python tests/goldens/scripts/make_gemma_goldens.py SCRATCH [NAME ...]
"""

from tiny_goldens import build, write

from support.goldens import tiny_gemma as tiny

if __name__ == "__main__":
    write(tiny, lambda spec, path: build(path, tiny.CLASSES[spec.arch][0], experts=bool(spec.experts)))
