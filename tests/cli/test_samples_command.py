"""``synthfast score samples``, from sampled digits to the table and the result file."""

from __future__ import annotations

import json

import numpy as np
import pytest
from synthfast.cli.main import main

from synthfast.data import ShardSet

QUICK = ("--scores", "density,confidence,memorization", "--device", "cpu")


@pytest.fixture(scope="module")
def sampled(tmp_path_factory):
    """40 digits from the embedded generator."""
    folder = tmp_path_factory.mktemp("sampled") / "digits"
    with pytest.raises(SystemExit) as caught:
        main(["sample", "--n", "40", "--steps", "4", "--device", "cpu", "--out", str(folder)])
    assert caught.value.code == 0
    return folder


def test_a_table_of_all_and_each_class_and_the_files(cli, sampled, tmp_path):
    ran = cli("score", "samples", "--synthetic", sampled, *QUICK, "--out", tmp_path / "result.json")
    assert (ran.status, ran.err) == (0, "")
    lines = ran.out.splitlines()
    result = json.loads((tmp_path / "result.json").read_text())
    assert lines[0].split() == [
        "group", "images", "distance", "in", "manifold", "confidence", "highest", "label", "agrees", "nearest", "memorized",
    ]  # fmt: skip
    assert lines[1].split()[:2] == ["all", "40"] and [line.split()[:3] for line in lines[2:12]] == [
        ["class", str(k), "4"] for k in range(10)
    ]
    assert f"{100 * result['metrics']['label_agreement']['value']:.1f}%" in lines[1]
    assert lines[12] == f"{sampled}/scores: the scores of each image" and len(lines) == 13
    for column in ("density_distance", "confidence", "memorization_p"):
        assert np.load(sampled / "scores" / f"{column}.npy", mmap_mode="r").shape == (40,)
    assert cli("shards", "verify", sampled).status == 0


def test_json_is_the_result_and_groups_are_in_it(cli, sampled, tmp_path):
    (tmp_path / "groups.csv").write_text("group\n" + "even\nodd\n" * 20)
    arguments = ("--synthetic", sampled, *QUICK, "--groups", tmp_path / "groups.csv", "--json")
    result = json.loads(cli("score", "samples", *arguments).out)
    assert list(result["groups"]) == ["class", "group"] and list(result["groups"]["group"]) == ["even", "odd"]
    values = np.load(sampled / "scores" / "confidence.npy").astype(float)
    assert result["groups"]["group"]["odd"]["confidence"]["value"] == pytest.approx(values[1::2].mean())
    assert result["inputs"]["synthetic"]["sha256"] == ShardSet(sampled).fingerprint()
    assert result["command"] == "score samples" and "out" not in result["config"]


def test_many_groups_are_cut_from_the_table(cli, sampled, tmp_path, monkeypatch):
    monkeypatch.setattr("synthfast.cli.score_samples._MOST_ROWS", 5)
    lines = cli("score", "samples", "--synthetic", sampled, *QUICK).out.splitlines()
    assert len(lines) == 7 and lines[5] == "... and 7 groups more; --out FILE gives all"


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        ("", 2, "--synthetic: expected a folder of synthetic shards, found none; give one"),
        ("--synthetic /nowhere", 1, "/nowhere/manifest.json: no shard manifest here; check the path"),
        ("--synthetic DIR --scores beauty", 2, "--scores beauty: expected some of discriminator, density"),
        ("--synthetic DIR --groups /nowhere.csv", 1, "/nowhere.csv: no such file or folder"),
        ("--synthetic DIR --real nothing", 2, "nothing: no such image source"),
        ("--synthetic DIR --classifier /nowhere", 2, "--classifier /nowhere: expected a checkpoint folder, found none"),
        ("--synthetic DIR --null-share 1/1000", 2, "--null-share 0.001: 500 training images tell shares from 0.002 on"),
        ("--synthetic DIR --scores density -k 500", 2, "-k 500: digits:train has 500 images, expected more; lower it"),
    ],
)
def test_mistakes_are_one_line(cli, sampled, arguments, status, message):
    ran = cli("score", "samples", *(str(sampled) if word == "DIR" else word for word in arguments.split()))
    assert ran.status == status and ran.error.startswith(message)
