"""The folder of scores: pieces that make a file, what is there, and what is stale, lost or damaged."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest

from synthfast.artifacts import sha256_file
from synthfast.data import ShardSet, verify
from synthfast.distributed import Ranks
from synthfast.errors import SynthfastError, UsageError
from synthfast.selection.score_files import SCORES, ScoreFolder, columns


@pytest.fixture
def folder(images):
    made = ScoreFolder(images)
    made.prepare()
    return made


def test_pieces_in_any_order_make_the_columns(images, folder):
    distance, count = np.random.default_rng(0).random(60).astype(np.float32), np.arange(60)[::-1] * 2**40
    with Ranks("cpu") as ranks, folder.writer("density", {"k": 5}, ranks) as writer:
        for first in (40, 0, 7):
            rows = slice(first, {40: 60, 0: 7, 7: 40}[first])
            writer.write(first, {"density_distance": distance[rows], "density_count": count[rows]})
        assert not (folder.path / "density_distance.npy").exists()
        writer.commit({"threshold": 3})
    assert np.load(folder.path / "density_distance.npy").tolist() == distance.tolist()
    assert np.load(folder.path / "density_count.npy", mmap_mode="r").tolist() == count.tolist()
    assert folder.read("density", "density_count").dtype == np.int64
    assert sorted(path.name for path in folder.path.iterdir()) == [
        "density_count.npy", "density_distance.npy", "scores.json",
    ]  # fmt: skip
    manifest = json.loads((folder.path / "scores.json").read_text())
    assert manifest["source"] == {"path": images.name, "fingerprint": images.fingerprint(), "count": 60}
    entry = manifest["scores"]["density"]
    assert (entry["facts"], entry["notes"], folder.notes("density")) == ({"k": 5}, {"threshold": 3}, {"threshold": 3})
    for name, file in entry["files"].items():
        assert file["sha256"] == sha256_file(folder.path / file["file"]) == folder.sha256("density")[name]
        assert file["unit"] and file["meaning"] and file["dtype"] in ("<f4", "<i8")


def test_scores_do_not_disturb_the_shards(images, give):
    for score in SCORES:
        give(images, score)
    assert verify(images.path) == []
    assert ShardSet(images.path).fingerprint() == images.fingerprint()
    assert list(json.loads((images.path / "scores" / "scores.json").read_text())["scores"]) == list(SCORES)


def test_what_was_made_is_made_while_its_facts_and_files_are_the_same(images, folder, give):
    give(images, "density")
    give(images, "confidence")
    assert folder.made("density", {"score": "density"}) and not folder.made("memorization", {})
    assert not folder.made("density", {"score": "density", "k": 5})
    file = folder.path / "density_distance.npy"
    content = file.read_bytes()
    file.write_bytes(content[:-1])
    assert not folder.made("density", {"score": "density"})
    file.unlink()
    assert not folder.made("density", {"score": "density"})
    assert folder.made("confidence", {"score": "confidence"})
    file.write_bytes(content)
    assert folder.made("density", {"score": "density"})


def test_an_interrupted_writer_leaves_no_part_and_the_old_score(images, folder, give):
    give(images, "density", density_distance=np.ones(60))
    with pytest.raises(KeyboardInterrupt), Ranks("cpu") as ranks, folder.writer("density", {}, ranks) as writer:
        writer.write(0, {"density_distance": np.zeros(3), "density_count": np.zeros(3)})
        raise KeyboardInterrupt
    assert folder.read("density", "density_distance").tolist() == [1] * 60
    assert not list(folder.path.glob(".tmp-*"))


def test_numbers_that_are_not_finite_are_refused(images, folder):
    with Ranks("cpu") as ranks, folder.writer("density", {}, ranks) as writer:
        message = (
            rf"^{images.name}: density_distance of image 32 is not a finite number; check the network and the images$"
        )
        with pytest.raises(SynthfastError, match=message):
            writer.write(30, {"density_distance": np.array([1, 2, np.nan, np.inf]), "density_count": np.zeros(4)})


def test_images_that_changed_make_scores_stale(images, give, make, tmp_path):
    give(images, "density")
    give(images, "confidence")
    (images.path / "scores").rename(tmp_path / "scores")
    other = make(tmp_path / "other", images.labels, seed=1)
    (tmp_path / "scores").rename(other.path / "scores")
    folder = ScoreFolder(other)
    assert not folder.made("density", {"score": "density"})
    message = (
        rf"^{other.path}/scores: the scores are of other images than {other.path} holds now; "
        rf"run synthfast score samples --synthetic {other.path} --scores density$"
    )
    with pytest.raises(SynthfastError, match=message):
        folder.read("density", "density_distance")
    give(other, "confidence")  # the others go: they are worth nothing
    assert folder.made("confidence", {"score": "confidence"})
    with pytest.raises(
        SynthfastError, match=rf"^{other.path}/scores: expected density scores, found none; run synthfast"
    ):
        folder.read("density", "density_distance")


def test_a_folder_given_by_name_is_not_taken_from_other_images(images, give, make, tmp_path):
    give(images, "density", path=tmp_path / "mine")
    folder = ScoreFolder(images, tmp_path / "mine")
    folder.prepare()
    assert folder.made("density", {"score": "density"}) and not (images.path / "scores").exists()
    message = rf"--synthetic {images.name} --scores-folder {tmp_path}/mine --scores confidence$"
    with pytest.raises(SynthfastError, match=message):
        folder.read("confidence", "predicted")
    other = make(tmp_path / "other", None, count=9)
    with pytest.raises(
        UsageError, match=rf"^{tmp_path}/mine: holds the scores of {images.name}, which is not what {other.name}"
    ):
        ScoreFolder(other, tmp_path / "mine").prepare()


def test_a_changed_file_is_named(images, folder, give):
    give(images, "density")
    file = folder.path / "density_distance.npy"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(
        SynthfastError, match=rf"^{re.escape(str(file))}: expected SHA-256 .*, found .*; delete it and run"
    ):
        folder.read("density", "density_distance")
    assert len(folder.read("density", "density_distance", check=False)) == 60


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, r"format 2 is newer than this synthfast reads \(1\); upgrade synthfast"),
        ({"format": "1"}, "not a manifest of scores; delete it and run synthfast score samples again"),
        ({"source": {"path": 1}}, "not a manifest of scores"),
        ({"scores": []}, "not a manifest of scores"),
        ({"scores": {"density": {"files": {"density_distance": {"sha256": "x"}}}}}, "density_distance has no SHA-256"),
        ({"scores": {"density": {"files": 1}}}, "density_distance has no SHA-256"),
    ],
)
def test_a_manifest_is_not_trusted(images, folder, give, change, message):
    give(images, "density")
    file = folder.path / "scores.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(SynthfastError, match=rf"^{file}: {message}"):
        folder.read("density", "density_distance")


def test_images_without_labels_have_no_confidence_in_theirs(make, give, tmp_path):
    plain = make(tmp_path / "plain", None)
    give(plain, "confidence")
    assert [column.name for column in columns("confidence", False)] == ["confidence_max", "predicted"]
    assert sorted(path.stem for path in (plain.path / "scores").glob("*.npy")) == ["confidence_max", "predicted"]


def test_a_disk_that_refuses_is_one_line(images, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SynthfastError, match=rf"^{tmp_path}/file/scores: a part of the path is not a folder; choose"):
        ScoreFolder(images, tmp_path / "file" / "scores").prepare()
