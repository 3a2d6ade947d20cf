from __future__ import annotations

import json

import pytest

from synthfast.artifacts import json_bytes, sha256_file
from synthfast.data import open_images
from synthfast.evaluation import result_json, wilson_interval


@pytest.mark.parametrize(
    ("successes", "count", "low", "high"),
    [(8, 10, 0.4902, 0.9433), (0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (500, 1000, 0.4691, 0.5309)],
)
def test_wilson_interval_against_published_values(successes, count, low, high):
    assert wilson_interval(successes, count) == pytest.approx([low, high], abs=5e-5)


def test_a_result_holds_what_it_was_made_from(tmp_path):
    (tmp_path / "weights").write_bytes(b"weights")
    digits = open_images("digits:test")
    scores = {"metrics": {"accuracy": {"value": 0.5, "ci": [0.4, 0.6], "count": 10}}, "groups": {}}
    inputs = {"classifier": tmp_path / "weights", "dataset": digits}
    result = json.loads(json_bytes(result_json("score accuracy", {"dataset": "digits:test"}, inputs, scores, 1.23456)))
    assert list(result) == ["format", "command", "config", "environment", "inputs", "metrics", "groups", "seconds"]
    assert result["format"] == 1
    assert result["metrics"] == scores["metrics"]
    assert result["seconds"] == 1.235
    assert result["inputs"]["dataset"] == {"path": "digits:test", "sha256": digits.fingerprint(), "count": 1297}
    assert result["inputs"]["classifier"]["sha256"] == sha256_file(tmp_path / "weights")
    assert {"synthfast", "python", "torch", "cpu", "threads", "gpus"} <= result["environment"].keys()
