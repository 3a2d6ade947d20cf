"""Reading shard folders: damage is found and named, manifests are not trusted."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from synthfast.data import ShardSet, summary, verify
from synthfast.errors import SynthfastError

FILES = [f"shard-00000{i}.{kind}.npy" for i in range(3) for kind in ("images", "labels")]


def edit(folder: Path, *keys, value=...) -> None:
    """Set, or without ``value`` delete, one key of the manifest."""
    manifest = json.loads((folder / "manifest.json").read_text())
    place = manifest
    for key in keys[:-1]:
        place = place[key]
    if value is ...:
        del place[keys[-1]]
    else:
        place[keys[-1]] = value
    (folder / "manifest.json").write_text(json.dumps(manifest))


def rehash(folder: Path, index: int, kind: str) -> None:
    """Make the manifest agree with a changed file, as somebody who means harm would."""
    data = (folder / f"shard-{index:06d}.{kind}.npy").read_bytes()
    edit(folder, "shards", index, kind, "sha256", value=hashlib.sha256(data).hexdigest())
    edit(folder, "shards", index, kind, "bytes", value=len(data))


def test_whole_folder_has_no_problems(shards):
    seen = []
    assert verify(shards, lambda done, total: seen.append((done, total))) == []
    total = sum((shards / name).stat().st_size for name in FILES)
    assert len(seen) == 6 and seen[-1] == (total, total) and seen == sorted(seen)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.sampled_from(FILES), place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_any_flipped_bit_is_found_and_named(shards, name, place, bit):
    path = shards / name
    whole = path.read_bytes()
    changed = bytearray(whole)
    changed[int(place * len(whole))] ^= 1 << bit
    path.write_bytes(changed)
    try:
        problems = verify(shards)
    finally:
        path.write_bytes(whole)
    assert len(problems) == 1 and problems[0].startswith(f"{path}: ") and "delete it" in problems[0]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "expected .* bytes, found"),
        (lambda path: path.write_bytes(path.read_bytes() + b"x"), "expected .* bytes, found"),
        (lambda path: path.write_bytes(b""), "bytes, found 0"),
        (lambda path: path.unlink(), "missing; run the command that made the folder again"),
        (lambda path: (path.unlink(), path.mkdir()), "expected a file"),
        (lambda path: (path.unlink(), os.mkfifo(path)), "expected a file"),
    ],
)
def test_damaged_file_is_named_by_verify_and_refused_by_the_reader(shards, name, damage, message):
    damage(shards / name)
    problems = verify(shards)
    assert len(problems) == 1 and problems[0].startswith(str(shards / name))
    with pytest.raises(SynthfastError, match=message) as error:
        ShardSet(shards)
    assert str(error.value).startswith(str(shards / name))


def test_swapped_shards_are_recognised(shards):
    first, second = shards / FILES[0], shards / FILES[2]
    data = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(data)
    assert verify(shards) == [
        f"{first}: holds what belongs in {FILES[2]}; delete it and run the command that made the folder again",
        f"{second}: holds what belongs in {FILES[0]}; delete it and run the command that made the folder again",
    ]


def test_extra_files_are_named(shards):
    for name in ("shard-000003.images.npy", "shard-0.images.npy", "shard-000000.images.npy.bak"):
        (shards / name).write_bytes(b"?")
    (shards / "preview.png").write_bytes(b"not a shard")
    problems = verify(shards)
    assert sorted(problem.partition(": ")[0] for problem in problems) == sorted(
        str(p) for p in shards.glob("shard-*?") if p.name not in FILES
    )
    assert all("does not belong to this set" in problem for problem in problems)


def test_several_problems_are_all_named(shards):
    (shards / FILES[0]).unlink()
    (shards / FILES[5]).write_bytes(b"?")
    (shards / "shard-000007.labels.npy").touch()
    assert [Path(problem.partition(": ")[0]).name for problem in verify(shards)] == [
        FILES[0],
        FILES[5],
        "shard-000007.labels.npy",
    ]


@pytest.mark.parametrize("label", [-1, 7])
def test_labels_outside_the_classes_are_found(shards, label):
    labels = np.load(shards / FILES[3])
    labels[4] = label
    data = (shards / FILES[3]).read_bytes()[:-80] + labels.tobytes()
    (shards / FILES[3]).write_bytes(data)
    rehash(shards, 1, "labels")
    problems = verify(shards)
    assert len(problems) == 1 and problems[0].startswith(f"{shards / FILES[3]}: labels must be in [0, 6]")
    with pytest.raises(SynthfastError, match=r"labels must be in \[0, 6\]"):
        ShardSet(shards)


@pytest.mark.parametrize(
    ("name", "array"),
    [
        (FILES[2], np.zeros((10, 4, 5, 3), np.int8)),
        (FILES[2], np.zeros((10, 5, 4, 3), np.uint8)),
        (FILES[2], np.zeros((9, 4, 5, 3), np.uint8)),
        (FILES[2], np.array([{}] * 10, object)),
        (FILES[3], np.zeros(10, np.float64)),
        (FILES[3], np.zeros(10, ">i8")),
        (FILES[3], np.zeros((10, 1), np.int64)),
    ],
)
def test_headers_are_checked_against_the_manifest(shards, name, array):
    np.save(shards / name, array, allow_pickle=True)
    rehash(shards, 1, name.split(".")[1])
    problems = verify(shards)
    assert len(problems) == 1 and problems[0].startswith(f"{shards / name}: expected ")
    with pytest.raises(SynthfastError, match=f"{name}: expected "):
        ShardSet(shards)


@pytest.mark.parametrize(
    ("keys", "value", "message"),
    [
        (("format",), 3, "format 3 is newer than this synthfast reads .2.; upgrade"),
        (("format",), 2, "'format' must be 1 for npy shards, found 2"),
        (("format",), 0, "'format' must be 1 or more"),
        (("format",), "1", "'format' must be an integer, found \"1\""),
        (("format",), True, "'format' must be an integer, found true"),
        (("format",), ..., "key 'format' is missing"),
        (("complete",), ..., "key 'complete' is missing"),
        (("complete",), 1, "'complete' must be true or false"),
        (("complete",), False, "'shards' must have 0 entries, found 3"),
        (("request",), ..., "key 'request' is missing"),
        (("request",), [], "'request' must be an object"),
        (("request", "n"), ..., "key 'n' is missing"),
        (("request", "n"), 24, r"shards\[2\]: 'count' must be 4, found 3"),
        (("request", "n"), -5, "'n' must be at least 1"),
        (("request", "n"), 10**18, "'shards' must have 100000000000000000 entries, found 3"),
        (("request", "shape"), [4, 5], "'shape' must be three positive integers"),
        (("request", "shape"), [4, 5, True], "'shape' must be three positive integers"),
        (("request", "shape"), [10**9, 10**9, 10**9], "expected uint8"),
        (("request", "classes"), ..., "key 'classes' is missing"),
        (("request", "classes"), 10**12, "'classes' must be null or 1 to 1000000"),
        (("request", "classes"), None, r"shards\[0\]: 'labels' must be null in a set without classes"),
        (("request", "shard_size"), 0, "'shard_size' must be at least 1"),
        (("shards",), {}, "'shards' must be a list"),
        (("shards", 1), 3, r"shards\[1\]: a shard must be an object"),
        (("shards", 1, "index"), 2, r"shards\[1\]: 'index' must be 1, found 2"),
        (("shards", 1, "first"), 0, r"shards\[1\]: 'first' must be 10, found 0"),
        (("shards", 1, "labels"), None, r"shards\[1\]: 'labels' must be an object, found null"),
        (("shards", 1, "labels"), ..., "key 'labels' is missing"),
        (("shards", 1, "images", "sha256"), "xyz", "'sha256' must be 64 hexadecimal digits"),
        (("shards", 1, "images", "bytes"), 1.5, "'bytes' must be an integer, found 1.5"),
        (("shards", 1, "images", "bytes"), 7, "expected 7 bytes, found"),
        (("shards", 1, "images", "file"), "/etc/passwd", 'must be called shard-000001.images.npy, found "/etc/passwd"'),
        (("shards", 1, "images", "file"), "../shard-000001.images.npy", "must be called shard-000001.images.npy"),
        (("shards", 1, "images", "file"), "sub/shard-000001.images.npy", "must be called shard-000001.images.npy"),
        (("shards", 1, "images", "file"), "shard-000000.images.npy", "must be called shard-000001.images.npy"),
        (("shards", 1, "images", "file"), "shard-000001.images.npy\n", "must be called shard-000001.images.npy"),
    ],
)
def test_manifest_is_not_trusted(shards, keys, value, message):
    edit(shards, *keys, value=value)
    with pytest.raises(SynthfastError, match=message) as error:
        ShardSet(shards)
    assert str(error.value).startswith(str(shards)) and "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "\ud800", '{"format": 1e400}', "[" * 100_000])
def test_manifest_that_is_no_manifest(shards, text):
    (shards / "manifest.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    for look in (ShardSet, verify, summary):
        with pytest.raises(SynthfastError, match=r"manifest\.json") as error:
            look(shards)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("look", [ShardSet, verify, summary])
def test_no_manifest(tmp_path, look):
    with pytest.raises(SynthfastError, match=r"manifest\.json: no shard manifest here"):
        look(tmp_path)


@pytest.mark.parametrize("look", [ShardSet, verify, summary])
def test_a_file_is_no_shard_folder(tmp_path, look):
    path = tmp_path / "a.npz"
    path.write_bytes(b"")
    with pytest.raises(SynthfastError, match=r"a\.npz: expected a shard folder, found a file; .* import"):
        look(path)


def test_links_must_stay_in_the_folder(tmp_path, shards):
    path = shards / FILES[0]
    outside = tmp_path / "outside.npy"
    path.rename(outside)
    path.symlink_to(outside)
    with pytest.raises(SynthfastError, match=r"shard-000000\.images\.npy: a link that leads out of the folder"):
        ShardSet(shards)
    assert "leads out of the folder" in verify(shards)[0]
    path.unlink()
    outside.rename(shards / "inside.npy")
    path.symlink_to("inside.npy")
    assert verify(shards) == [] and len(ShardSet(shards)) == 23
    (tmp_path / "link").symlink_to(shards)
    assert len(ShardSet(tmp_path / "link")) == 23  # the folder itself may be one
    path.unlink()
    path.symlink_to(path.name)
    assert len(verify(shards)) == 1


def test_incomplete_folder(tmp_path, request_values, write):
    write(tmp_path / "out", request_values, only=range(1))
    message = "incomplete, 1 of 3 shards are there; run the command that made it again to complete it"
    with pytest.raises(SynthfastError, match=message):
        ShardSet(tmp_path / "out")
    assert verify(tmp_path / "out") == [f"{tmp_path / 'out'}: {message}"]
    (tmp_path / "out" / FILES[0]).write_bytes(b"?")
    assert len(verify(tmp_path / "out")) == 2
    facts = summary(tmp_path / "out")
    assert (facts["complete"], facts["shards"], facts["shards_finished"], facts["images"]) == (False, 3, 1, 10)


def test_summary(shards, request_values):
    facts = summary(shards)
    assert facts == {
        "path": str(shards),
        "complete": True,
        "n": 23,
        "images": 23,
        "shape": [4, 5, 3],
        "classes": 7,
        "format": "npy",
        "images_per_class": [4, 4, 3, 3, 3, 3, 3],
        "shards": 3,
        "shards_finished": 3,
        "bytes": sum((shards / name).stat().st_size for name in FILES),
        "request": request_values,
    }
    json.dumps(facts)


def test_summary_without_labels(tmp_path, request_values, write):
    request_values["classes"] = None
    write(tmp_path / "out", request_values)
    assert summary(tmp_path / "out")["images_per_class"] is None


def test_fingerprint_follows_the_content(tmp_path, shards, request_values, write):
    write(tmp_path / "same", {**request_values, "solver": {"name": "ddim"}})
    write(tmp_path / "other", {**request_values, "seed": 1})
    prints = [ShardSet(path).fingerprint() for path in (shards, tmp_path / "same", tmp_path / "other")]
    assert prints[0] == prints[1] != prints[2]
