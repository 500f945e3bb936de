"""The page of measurements shows the committed results, which were checked when they were measured."""

import json

import pytest

from benchmarks import common, report
from support import ROOT

RESULTS = sorted((ROOT / "benchmarks" / "results").glob("*.json"))


def test_page_is_generated_from_the_results():
    assert len(RESULTS) >= 4
    assert report.render() == report.PAGE.read_text()
    assert report.with_front(report.FRONT.read_text()) == report.FRONT.read_text()


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_result_is_complete_and_its_content_was_right(path):
    result = json.loads(path.read_text())
    assert set(result["machine"]) == {"cpu", "cores", "instructions", "memory_gib"}
    assert {"python", "jax", "jaxlib", "ferrum-jax"} <= set(result["versions"])
    assert "/" not in json.dumps(result["machine"] | result["versions"])
    if path.stem.startswith("cpu-"):
        for row in result["rows"]:
            check = row["content_check"]
            assert check["tokens"] == result["gen_len"]
            if row["dtype"] == "float32":
                assert check["worst_gap"] <= 2e-3
    elif path.stem.startswith("memory-"):
        assert result["peak_generated_bytes"] <= result["limit_bytes"]
        assert result["content_check"]["logprobs_finite"] and result["content_check"]["greedy"]
    elif path.stem == "compile_time":
        shallow, deep, mixed = (program["compile_s"]["median"] for program in result["programs"])
        bodies = [program["bodies"] for program in result["programs"]]
        assert bodies == [1, 1, 5]
        assert deep <= 1.3 * shallow
        assert mixed <= bodies[2] * shallow
        assert result["starts"]["content_check"]["equal"]
    elif path.stem == "engine":
        rows = {(row["engine"], row["dtype"], row["slots"]): row for row in result["throughput"]["rows"]}
        for engine, dtype, slots in rows:
            check = rows[engine, dtype, slots]["content_check"]
            assert check["requests"] == result["throughput"]["requests"] == 32
            if dtype == "float32":
                assert check["equal_requests"] == 32 and check["worst_gap"] <= 2e-3
        assert {row["rows"] for row in result["host"]} == {16, 32}
        assert result["prefix_cache"]["content_check"]["equal"]
        for row in result["speculation"]["rows"]:
            assert row["content_check"]["equal"]
        assert abs(result["kv_dtypes"]["content_check"]["difference_percent"]) <= 1e-3
    elif path.stem == "checkpoints":
        assert result["loading"]["content_check"]["equal"]
        assert all(0 < row["content_check"]["rms_error"] < 0.1 for row in result["quantizing"])
    elif path.stem == "embedding":
        assert all(row["content_check"]["error"] <= 1e-5 for row in result["rows"])
    else:
        assert path.stem == "dtypes"
        for model in result["models"]:
            assert abs(model["content_check"]["float32_difference_percent"]) <= 0.02


def test_one_part_of_a_result_is_replaced(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    common.write("some", {"model": "m", "threads": 2, "host": 1, "speculation": 2})
    common.write("some", {"model": "m", "threads": 2, "speculation": 3}, keep=True)
    known = json.loads((tmp_path / "some.json").read_text())
    assert (known["host"], known["speculation"]) == (1, 3)
    with pytest.raises(ValueError, match="model and threads"):
        common.write("some", {"model": "other", "threads": 1, "speculation": 4}, keep=True)
    assert json.loads((tmp_path / "some.json").read_text()) == known
