"""The TPU kernels for compressed matrices, compiled for absent TPUs at the shapes of Qwen3-30B-A3B.

Temporaries are bounded by activations: no layer, expert or unpacked matrix is copied. And no kernel may need more bundles than
given here, where a slower lowering would show first: a relayout costs ten times as many.
"""

import pytest

TARGETS = ("v5e", "v6e", "v5p")
HIDDEN, WIDTH, TOP_K, KIB = 2048, 768, 8, 1024

# Bundles of the whole program, about 8 % above what was compiled: for a v5e, a v6e and a v5p. A step of the kernels for
# few rows reads k x 512 weights, which at 819, 1640 and 1382 GB/s and 1.5, 1.75 and 1.75 GHz takes, with k = 2048, 1110,
# 647 and 768 cycles of Q4_K, 1575, 918 and 1089 of Q6_K, 2040, 1189 and 1411 of Q8_0. The experts' kernel has two bodies,
# for one or two rows of an expert and for more, and the sum over the slots; the experts of a step take 5768, 3361 and 3988
# cycles with down in Q6_K, 5040, 2936 and 3484 in Q4_K.
# fmt: off
CEILINGS = {
    ("Q4_0, 1 rows", "few_rows_Q4_0"): (1170, 810, 1060),
    ("Q4_0, 8 rows", "few_rows_Q4_0"): (1340, 930, 1250),
    ("Q4_1, 1 rows", "few_rows_Q4_1"): (1160, 860, 1060),
    ("Q4_1, 8 rows", "few_rows_Q4_1"): (1500, 1130, 1400),
    ("Q5_0, 1 rows", "few_rows_Q5_0"): (1380, 950, 1260),
    ("Q5_0, 8 rows", "few_rows_Q5_0"): (1540, 1110, 1440),
    ("Q5_1, 1 rows", "few_rows_Q5_1"): (1390, 970, 1260),
    ("Q5_1, 8 rows", "few_rows_Q5_1"): (1700, 1310, 1610),
    ("Q8_0, 1 rows", "few_rows_Q8_0"): (920, 640, 820),
    ("Q8_0, 8 rows", "few_rows_Q8_0"): (1080, 810, 980),
    ("Q4_K, 1 rows", "few_rows_Q4_K"): (1080, 830, 960),
    ("Q4_K, 8 rows", "few_rows_Q4_K"): (1400, 1040, 1310),
    ("Q5_K, 1 rows", "few_rows_Q5_K"): (1300, 870, 1140),
    ("Q5_K, 8 rows", "few_rows_Q5_K"): (1640, 1240, 1510),
    ("Q6_K, 1 rows", "few_rows_Q6_K"): (1390, 970, 1240),
    ("Q6_K, 8 rows", "few_rows_Q6_K"): (1790, 1330, 1670),
    ("IQ4_NL, 1 rows", "few_rows_IQ4_NL"): (2670, 2520, 2570),
    ("IQ4_NL, 8 rows", "few_rows_IQ4_NL"): (2440, 2680, 2340),
    ("IQ4_XS, 1 rows", "few_rows_IQ4_XS"): (2650, 2480, 2530),
    ("IQ4_XS, 8 rows", "few_rows_IQ4_XS"): (2390, 2630, 2300),
    ("MXFP4, 1 rows", "few_rows_MXFP4"): (2140, 1710, 2030),
    ("MXFP4, 8 rows", "few_rows_MXFP4"): (2320, 1870, 2220),
    ("qkv, 1 rows", "few_rows_Q4_K_Q4_K_Q6_K"): (3330, 2370, 3360),
    ("o, 1 rows", "few_rows_Q4_K"): (1910, 1380, 1930),
    ("qkv, 8 rows", "few_rows_Q4_K_Q4_K_Q6_K"): (4410, 3210, 4450),
    ("o, 8 rows", "few_rows_Q4_K"): (2630, 1860, 2630),
    ("output, 1 rows", "few_rows_Q6_K"): (1380, 950, 1390),
    ("swiglu, 8 rows", "few_rows_Q4_K_Q4_K"): (2710, 1940, 2710),
    ("k = 28672, 8 rows", "few_rows_Q4_K"): (1640, 1550, 1650),
    ("experts, 1 tokens, down Q6_K", "expert_ffn_Q4_K_Q4_K_Q6_K"): (11890, 8310, 11900),
    ("experts, 1 tokens, down Q6_K", "group_few"): (520, 470, 580),
    ("experts, 1 tokens, down Q4_K", "expert_ffn_Q4_K_Q4_K_Q4_K"): (10810, 7410, 10840),
    ("experts, 1 tokens, down Q4_K", "group_few"): (520, 470, 580),
    ("experts, 32 tokens, down Q6_K", "expert_ffn_Q4_K_Q4_K_Q6_K"): (12020, 8510, 12020),
    ("experts, 32 tokens, down Q6_K", "group_few"): (790, 650, 850),
    ("experts, 128 tokens, down Q4_K", "expert_ffn_Q4_K_Q4_K_Q4_K"): (12940, 9350, 12970),
    ("experts, 128 tokens, down Q4_K", "group_few"): (4540, 2950, 4580),
    ("experts, 512 tokens, down Q6_K", "grouped_many_rows_Q4_K_Q4_K"): (11420, 7260, 11530),
    ("experts, 512 tokens, down Q6_K", "grouped_many_rows_Q6_K"): (3590, 2420, 3540),
    ("experts, 2048 tokens, down Q4_K", "grouped_many_rows_Q4_K"): (3410, 2280, 3410),
    ("experts, 2048 tokens, down Q4_K", "grouped_many_rows_Q4_K_Q4_K"): (11490, 7330, 11550),
    ("large experts, 4 tokens", "grouped_few_rows_Q4_K_Q4_K"): (5140, 3610, 5240),
    ("large experts, 4 tokens", "grouped_few_rows_Q6_K"): (2270, 1800, 2360),
    ("large experts, 512 tokens", "grouped_many_rows_Q4_K_Q4_K"): (30740, 19240, 31370),
    ("large experts, 512 tokens", "grouped_many_rows_Q6_K"): (17100, 6810, 17090),
}
# fmt: on


@pytest.fixture
def report(target, compiled_by):
    """What support.aot.tpu_kernels reports for the target."""
    return compiled_by("tpu_kernels", target)


def room(case):
    """Bytes of temporaries a case may have, from its shapes."""
    if case.startswith("experts"):
        tokens = int(case.split()[1])
        if tokens * TOP_K <= 1024:
            return 4 * tokens * HIDDEN + 256 * KIB
        return tokens * TOP_K * (10 * HIDDEN + 2 * WIDTH) + 1024 * KIB  # rows, hidden, products; products again by token
    if case.startswith("large experts"):
        tokens = int(case.split()[2])
        return tokens * 2 * (10 * 4096 + 2 * 14336) + 1024 * KIB
    if case.startswith("qkv"):
        return 4 * int(case.split()[1]) * (4096 + 512 + 512) + 256 * KIB  # the three parts of one result
    return {"pack": 1024 * KIB, "look up": 32 * 64 * KIB}.get(case, 0)


@pytest.mark.parametrize("target", TARGETS)
def test_temporaries_are_activations(target, report):
    assert {case for case, _ in CEILINGS} < set(report)
    for case, found in report.items():
        if not case.startswith("delta net"):  # see test_delta_net.py
            assert found["temp_bytes"] <= room(case), case


@pytest.mark.parametrize("target", TARGETS)
def test_bundles(target, report):
    for (case, kernel), ceilings in CEILINGS.items():
        bundles = report[case]["kernels"][kernel]["bundles"]
        assert 0 < bundles <= ceilings[TARGETS.index(target)], (case, kernel)


@pytest.mark.parametrize("target", TARGETS)
def test_launches(target, report):
    """One for q, k and v; one for gate and up; two for a whole feed-forward of experts at decode."""
    launches = {case: found["launches"] for case, found in report.items()}
    assert launches["qkv, 8 rows"] == launches["swiglu, 8 rows"] == 1
    assert launches["experts, 1 tokens, down Q6_K"] == launches["experts, 512 tokens, down Q6_K"] == 2
