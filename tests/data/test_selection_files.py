"""Selections: what is written is what is read, and nothing that does not fit is taken."""

from __future__ import annotations

import hashlib
import json
import re
import shutil

import numpy as np
import pytest

from synthfast.data import ShardSet
from synthfast.data.selection import read_selection, selection_files, write_selection
from synthfast.errors import SynthfastError, UsageError

INDICES = np.array([0, 3, 4, 17, 22])
WEIGHTS = np.array([0.5, 1.5, 1.0, 0.25, 1.75], np.float32)


@pytest.fixture
def images(shards):
    return ShardSet(shards)


@pytest.fixture
def chosen(images, tmp_path):
    """A selection with weights of five of the 23 images."""
    write_selection(tmp_path / "chosen.npy", images, INDICES, WEIGHTS, {"by": ["density"]})
    return tmp_path / "chosen.npy"


def test_what_is_written_is_read(images, chosen, tmp_path):
    selection = read_selection(chosen, images)
    assert selection.indices.dtype == np.int64 and selection.indices.tolist() == INDICES.tolist()
    assert selection.weights.dtype == np.float32 and selection.weights.tolist() == WEIGHTS.tolist()
    assert np.load(chosen).tolist() == INDICES.tolist()
    assert np.load(tmp_path / "chosen.weights.npy").tolist() == WEIGHTS.tolist()
    manifest = json.loads((tmp_path / "chosen.json").read_text())
    assert manifest["source"] == {"path": images.name, "fingerprint": images.fingerprint(), "count": 23}
    assert (manifest["count"], manifest["criteria"]) == (5, {"by": ["density"]})
    assert manifest["images_per_class"] == np.bincount(images.labels[INDICES], minlength=7).tolist()


def test_weights_of_an_earlier_selection_do_not_stay(images, chosen, tmp_path):
    with_weights = read_selection(chosen, images).sha256
    write_selection(chosen, images, INDICES, None, {})
    assert not (tmp_path / "chosen.weights.npy").exists()
    selection = read_selection(chosen, images)
    assert selection.weights is None and selection.sha256 != with_weights
    write_selection(chosen, images, INDICES[:4], None, {})
    assert read_selection(chosen, images).sha256 != selection.sha256


def test_a_folder_that_was_moved_is_still_the_source(images, chosen, shards, tmp_path):
    shutil.move(shards, tmp_path / "elsewhere")
    assert len(read_selection(chosen, ShardSet(tmp_path / "elsewhere")).indices) == 5


def test_another_folder_is_refused(chosen, write, request_values, tmp_path):
    write(tmp_path / "other", {**request_values, "seed": 1})
    message = (
        rf"^{chosen}: was selected from {tmp_path / 'shards'} \(23 images\), which is not what {tmp_path / 'other'} holds "
        r"\(23 images\); select from that folder$"
    )
    with pytest.raises(UsageError, match=message):
        read_selection(chosen, ShardSet(tmp_path / "other"))


@pytest.mark.parametrize("name", ["chosen", "chosen.json", "chosen.weights.npy"])
def test_names_of_selections(name):
    with pytest.raises(UsageError, match=rf"^{name}: expected a name like chosen\.npy for a selection; change it$"):
        selection_files(name)


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        ([], r"expected int64 \[m\] with m of at least 1, found int64 \[0\]"),
        ([1, 1], "expected ascending numbers without repeats, found 1 before 1"),
        ([0, 5, 4], "expected ascending numbers without repeats, found 5 before 4"),
        ([-1, 5], r"expected numbers in \[0, 23\), found -1 to 5"),
        ([5, 23], r"expected numbers in \[0, 23\), found 5 to 23"),
    ],
)
def test_bad_indices_are_neither_written_nor_read(images, chosen, indices, message):
    bad = np.array(indices, np.int64)
    with pytest.raises(ValueError, match=message):
        write_selection(chosen, images, bad, None, {})
    if len(bad) == 0:
        return
    # With the right hash, as another program might write it.
    write_selection(chosen, images, np.arange(len(bad)), None, {})
    replace(chosen, bad, "indices")
    with pytest.raises(
        SynthfastError, match=rf"^{re.escape(str(chosen))}: {message}; make it again with synthfast select$"
    ):
        read_selection(chosen, images)


@pytest.mark.parametrize(("value", "shown"), [(0.0, "0.0"), (-1.0, "-1.0"), (np.nan, "nan"), (np.inf, "inf")])
def test_bad_weights_are_neither_written_nor_read(images, chosen, value, shown):
    bad = WEIGHTS.copy()
    bad[3] = value
    message = f"expected finite numbers above 0, found {shown} for entry 3"
    with pytest.raises(ValueError, match=message):
        write_selection(chosen, images, INDICES, bad, {})
    replace(chosen, bad, "weights")
    with pytest.raises(SynthfastError, match=rf"chosen.weights.npy: {message}; make it again"):
        read_selection(chosen, images)


def test_a_changed_or_lost_file_is_named(images, chosen, tmp_path):
    weights = tmp_path / "chosen.weights.npy"
    for file in (chosen, weights):
        before = file.read_bytes()
        file.write_bytes(before[:-1] + b"\x7f")
        with pytest.raises(
            SynthfastError, match=rf"^{file}: expected SHA-256 [0-9a-f]{{64}} as in the manifest, found"
        ):
            read_selection(chosen, images)
        file.write_bytes(before[:-8])
        with pytest.raises(SynthfastError, match=rf"^{file}: expected {len(before)} bytes, found {len(before) - 8}"):
            read_selection(chosen, images)
        file.unlink()
        with pytest.raises(
            SynthfastError, match=rf"^{file}: missing, though the selection's manifest names it; make it"
        ):
            read_selection(chosen, images)
        file.write_bytes(before)
    np.save(chosen, INDICES.astype(np.int32))
    with pytest.raises(SynthfastError, match=rf"^{chosen}: expected int64 \[5\], found int32 \[5\]"):
        read_selection(chosen, images)
    (tmp_path / "chosen.json").unlink()
    with pytest.raises(SynthfastError, match=r"chosen\.json: no selection's manifest here; check the path$"):
        read_selection(chosen, images)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 0}, "'format' must be 1, found 0"),
        ({"format": 2}, r"format 2 is newer than this synthfast reads \(1\); upgrade synthfast$"),
        ({"count": True}, "'count' must be an integer of at least 1, found True"),
        ({"count": 0}, "'count' must be an integer of at least 1, found 0"),
        ({"source": None}, "'source' must have a path, a fingerprint and a count, found None"),
        ({"source": {"path": "a", "fingerprint": 3, "count": 23}}, "'source' must have a path"),
        ({"indices": None}, "'indices' must name a file and its SHA-256, found None"),
        ({"indices": {"sha256": "0"}}, "'indices' must name a file and its SHA-256"),
        ({"weights": {"file": "a"}}, "'weights' must name a file and its SHA-256"),
        ({"weights": 1}, "'weights' must name a file and its SHA-256, found 1"),
    ],
)
def test_a_manifest_is_not_trusted(images, chosen, change, message):
    edit(chosen, **change)
    with pytest.raises(SynthfastError, match=rf"chosen\.json: {message}"):
        read_selection(chosen, images)


def test_a_manifest_without_a_key_is_refused(images, chosen):
    manifest = chosen.with_suffix(".json")
    whole = json.loads(manifest.read_text())
    for key in ("format", "source", "count", "indices", "weights"):
        manifest.write_text(json.dumps({name: value for name, value in whole.items() if name != key}))
        with pytest.raises(SynthfastError, match=rf"^{manifest}: '{key}' must"):
            read_selection(chosen, images)


def test_what_cannot_be_written_is_one_line(images, tmp_path):
    with pytest.raises(SynthfastError, match=rf"^{tmp_path}/none/chosen.npy: no such file or folder$"):
        write_selection(tmp_path / "none" / "chosen.npy", images, INDICES, None, {})
    (tmp_path / "chosen.npy").mkdir()
    with pytest.raises(SynthfastError, match="a file was expected, a folder was found"):
        write_selection(tmp_path / "chosen.npy", images, INDICES, None, {})


def edit(chosen, **change):
    manifest = chosen.with_suffix(".json")
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), **change}))


def replace(chosen, array, part):
    """Put another array in place of a selection's indices or weights, with its own SHA-256 in the manifest."""
    file = chosen if part == "indices" else chosen.with_suffix(".weights.npy")
    np.save(file, array)
    edit(chosen, **{part: {"file": file.name, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}})
