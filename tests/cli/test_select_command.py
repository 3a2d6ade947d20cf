"""``synthfast select``, and ``train classifier`` with what it chose."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from synthfast.cli.main import main

from synthfast.data import ShardSet
from synthfast.data.selection import read_selection


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    """100 digits with all scores but the discriminator's."""
    folder = tmp_path_factory.mktemp("scored") / "digits"
    scores = ["--scores", "density,confidence,memorization", "--null-share", "0.3"]
    for arguments in (
        ["sample", "--n", "100", "--steps", "4", "--device", "cpu", "--out", str(folder)],
        ["score", "samples", "--synthetic", str(folder), *scores, "--device", "cpu"],
    ):
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        assert caught.value.code == 0
    return folder


def test_a_selection_and_what_is_said_about_it(cli, scored, tmp_path):
    out = tmp_path / "chosen.npy"
    ran = cli(
        "select", scored, "--by", "density", "--by", "confidence", "--keep", 0.4, "--low-density", 1, "--out", out
    )
    assert (ran.status, ran.err) == (0, "")
    assert ran.out.splitlines() == [
        f"{out}: 40 of 100 images, 4 of each class, by density and confidence",
        "chosen.weights.npy: weights to draw them by, larger where real images are sparse",
    ]
    selection = read_selection(out, ShardSet(scored))
    assert len(selection.indices) == 40 and selection.weights.mean() == pytest.approx(1, abs=1e-5)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["chosen.json", "chosen.npy", "chosen.weights.npy"]


def test_json_is_the_manifest_and_shares_may_be_fractions(cli, scored, tmp_path):
    out = tmp_path / "chosen.npy"
    ran = cli("select", scored, "--by", "random", "--keep", "1/5", "--no-balanced", "--seed", 3, "--out", out, "--json")
    manifest = json.loads(ran.out)
    assert manifest == json.loads((tmp_path / "chosen.json").read_text())
    assert manifest["count"] == 20 and manifest["criteria"]["keep"] == 0.2 and manifest["criteria"]["seed"] == 3


def test_fewer_than_wanted_is_said(cli, scored, tmp_path):
    p = np.load(scored / "scores" / "memorization_p.npy")
    left = int((p > np.float32(0.3)).sum())
    assert 20 < left < 100
    ran = cli("select", scored, "--by", "not-memorized", "--no-balanced", "--out", tmp_path / "chosen.npy")
    assert ran.out.splitlines()[0] == f"{tmp_path / 'chosen.npy'}: {left} of 100 images, by not-memorized"
    assert ran.out.splitlines()[1] == f"fewer than the 100 wanted: {left} images were left to choose from"


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        ("--by density", 2, "expected one folder of synthetic shards, found 0; name one"),
        ("DIR DIR --by density", 2, "expected one folder of synthetic shards, found 2; name one"),
        ("DIR", 2, "--by: expected one of discriminator, density, confidence, not-memorized, random, found none"),
        ("DIR --by beauty", 2, "--by beauty: expected one of discriminator"),
        ("DIR --by discriminator", 1, "DIR/scores: expected discriminator scores, found none; run synthfast score"),
        ("DIR --by density --keep 1.2", 2, "--keep 1.2: expected a share above 0 and up to 1"),
        ("DIR --by density --keep 0.01", 2, "--keep 0.01: would keep none of the 100 images of DIR of each of its 10 classes"),
        ("DIR --by density --out chosen.txt", 2, "chosen.txt: expected a name like chosen.npy for a selection; change it"),
        ("DIR --by density --out /nowhere/a.npy", 1, "/nowhere/a.npy: no such file or folder"),
        ("/nowhere --by density", 1, "/nowhere/manifest.json: no shard manifest here; check the path"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(cli, scored, tmp_path, monkeypatch, arguments, status, message):
    monkeypatch.chdir(tmp_path)
    ran = cli("select", *(word.replace("DIR", str(scored)) for word in arguments.split()))
    assert ran.status == status and ran.error.startswith(message.replace("DIR", str(scored)))
    assert not list(tmp_path.iterdir())


def test_stale_scores_are_refused(cli, scored, tmp_path):
    cli("sample", "--n", 30, "--steps", 1, "--device", "cpu", "--out", tmp_path / "other")
    shutil.copytree(scored / "scores", tmp_path / "other" / "scores")
    ran = cli("select", tmp_path / "other", "--by", "density", "--out", tmp_path / "chosen.npy")
    assert ran.status == 1 and "the scores are of other images than" in ran.error
    assert f"run synthfast score samples --synthetic {tmp_path / 'other'} --scores density" in ran.error


def test_a_classifier_is_trained_on_what_was_selected(cli, scored, tmp_path):
    out = tmp_path / "chosen.npy"
    cli("select", scored, "--by", "density", "--low-density", 1, "--out", out)
    train = ("train", "classifier", "--synthetic", scored, "--selection", out, "--fraction", 1, "--steps", 3)
    train += ("--batch-size", 10, "--device", "cpu", "--out", tmp_path / "run")
    assert cli(*train).status == 0
    assert "all 3 steps are done already" in cli(*train).out
    cli("select", scored, "--by", "density", "--out", out)
    ran = cli(*train)
    assert ran.status == 2 and ran.error.startswith("--selection (its images): ") and "was made with" in ran.error
    out.with_suffix(".json").unlink()
    assert cli(*train).error == f"{out.with_suffix('.json')}: no selection's manifest here; check the path"
