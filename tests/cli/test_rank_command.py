"""``synthfast rank`` as a user runs it: two generators, everything as small as it can be."""

from __future__ import annotations

import json

import pytest

GREY = """
class Grey:
    name, shape, classes = "grey", (8, 8, 1), None
    def __init__(self, device): pass
    def sample(self, index, labels, seed): raise AssertionError
"""
ARC = "radii = 2\nsteps = 25\nmeasure_steps = 3\nrestarts = 1\nbootstrap = 100\n"


def quick(tmp_path, *sources):
    arc = tmp_path / "arc.toml"
    arc.write_text(ARC)
    small = ("--samples", 60, "--steps", 3, "--seeds", 1, "--eps", 0.1, "--attack-steps", 2, "--batch-size", 16)
    where = ("-n", 40, "--arc", arc, "--out", tmp_path / "rank", "--device", "cpu")
    return ("rank", *sources, *small, *where)


@pytest.fixture
def shards(cli, tmp_path):
    def make(name, *options):
        ran = cli("sample", "-n", 60, "--steps", 1, "--out", tmp_path / name, "--device", "cpu", *options)
        assert ran.status == 0, ran.err
        return tmp_path / name

    return make


def test_a_comparison(cli, shards, tmp_path):
    command = quick(tmp_path, shards("good"), "two=digits")
    ran = cli(*command)
    assert ran.status == 0, ran.err
    lines = ran.out.splitlines()
    assert lines[0].split()[:2] == ["generator", "ARC"] and {lines[1].split()[0], lines[2].split()[0]} == {
        "good",
        "two",
    }
    assert lines[3].startswith("rho")
    result = json.loads((tmp_path / "rank" / "result.json").read_text())
    assert result["command"] == "rank" and set(result["generators"]) == {"good", "two"}
    row = result["generators"]["good"]
    assert set(row) >= {
        "arc",
        "fid",
        "kid",
        "precision",
        "recall",
        "density",
        "coverage",
        "accuracy",
        "robust_accuracy",
    }
    assert 0 <= row["robust_accuracy"]["value"] <= row["accuracy"]["value"] <= 1
    assert result["inputs"]["two"] == result["inputs"]["two"] | {"count": 60, "path": f"{tmp_path}/rank/two/samples"}
    assert (tmp_path / "rank" / "rank.png").read_bytes()[:4] == b"\x89PNG"
    # Again: nothing is computed, the result is the same.
    files = {
        path: path.stat().st_mtime_ns for path in (tmp_path / "rank").rglob("*.json") if path.name != "result.json"
    }
    assert len(files) >= 8
    again = cli(*command, "--json")
    assert again.status == 0
    repeated = json.loads(again.out)
    assert {k: v for k, v in repeated.items() if k != "seconds"} == {k: v for k, v in result.items() if k != "seconds"}
    assert files == {path: path.stat().st_mtime_ns for path in files}
    # The report takes it.
    page = cli("report", tmp_path / "rank" / "result.json", "--out", tmp_path / "page.html")
    assert page.status == 0 and "Generators, by robust accuracy" in (tmp_path / "page.html").read_text()


def test_what_does_not_fit_is_refused_first(cli, shards, tmp_path, monkeypatch):
    few = shards("few")
    ran = cli(*quick(tmp_path, few, "digits"), "--samples", 61)
    assert ran.status == 2 and ran.error.startswith(f"{few}: holds 60 images, --samples 61 is compared; sample more or")
    assert not (tmp_path / "rank").exists()
    ran = cli(*quick(tmp_path, few, "x=py:nowhere:make"))
    assert ran.status == 2 and ran.error.startswith("--generator py:nowhere:make: cannot be imported")
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "grey.py").write_text(GREY)
    ran = cli(*quick(tmp_path, few, "py:grey:Grey"))
    assert ran.status == 2 and ran.error.startswith("py:grey:Grey: expected labelled images [8, 8, 1] in 10 classes")
    assert not (tmp_path / "rank").exists()
