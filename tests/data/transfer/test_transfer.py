"""Export, import, merge and split between shards of both formats and the other formats: nothing is lost on the way."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from synthfast.config import ExportConfig, ImportConfig, MergeConfig, SplitConfig
from synthfast.data import ShardFolder, ShardSet, ShardWriter, open_images, verify
from synthfast.data.selection import write_selection
from synthfast.data.transfer import copying as copying_module
from synthfast.data.transfer.exporting import export_images
from synthfast.data.transfer.importing import import_images
from synthfast.data.transfer.merging import merge
from synthfast.data.transfer.splitting import part_sizes, split, split_order
from synthfast.errors import SynthfastError, UsageError

ALL = np.arange(23)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch) -> None:
    """Four images of the toy set at a time, so that chunks and shards do not end together."""
    monkeypatch.setattr(copying_module, "CHUNK_BYTES", 4 * 60)


def export(source: object, to: str, out: Path, **options):
    return export_images(ExportConfig(source=(str(source),), to=to, out=str(out), **{"shard_size": 10, **options}))


def import_(source: object, out: Path, **options):
    return import_images(ImportConfig(source=(str(source),), out=str(out), **{"shard_size": 10, **options}))


def request_of(folder: Path) -> dict:
    return json.loads((folder / "manifest.json").read_text())["request"]


def same(folder: Path, images, order=None) -> None:
    """The folder holds ``images``, in ``order``, and is as its manifest says."""
    order = np.arange(len(images)) if order is None else order
    found = ShardSet(folder)
    np.testing.assert_array_equal(found.read(np.arange(len(found))), images.read(order))
    assert found.classes == images.classes
    if images.labels is not None:
        np.testing.assert_array_equal(found.labels, images.labels[order])
    assert verify(folder) == []


@pytest.mark.parametrize("labels", [True, False])
@pytest.mark.parametrize("to", ["npy", "wds", "npz", "folder"])
def test_there_and_back(tmp_path, write, request_values, to, labels):
    request_values["classes"] = 7 if labels else None
    write(tmp_path / "shards", request_values)
    images = ShardSet(tmp_path / "shards")
    out = tmp_path / ("there.npz" if to == "npz" else "there")
    assert export(tmp_path / "shards", to, out).made == 23
    source = {"npz": f"npz:{out}", "folder": f"folder:{out}"}.get(to, out)
    assert import_(source, tmp_path / "back", classes=7 if labels else None).made == 23
    order = np.argsort(images.labels, kind="stable") if to == "folder" and labels else None
    same(tmp_path / "back", images, order)


def test_a_wds_folder_is_also_read_as_tars_from_elsewhere(tmp_path, shards):
    export(shards, "wds", tmp_path / "wds")
    import_(f"wds:{tmp_path / 'wds'}", tmp_path / "back")
    same(tmp_path / "back", ShardSet(shards))


@pytest.mark.parametrize("format", ["npy", "wds"])
@pytest.mark.parametrize("source", ["digits:train", "digits:test"])
def test_named_sources_are_imported(tmp_path, source, format):
    import_(source, tmp_path / "out", format=format, shard_size=400)
    same(tmp_path / "out", open_images(source))
    assert ShardSet(tmp_path / "out").format == format


def test_the_request_says_where_images_come_from(tmp_path, shards):
    images = ShardSet(shards)
    export(shards, "wds", tmp_path / "wds")
    found = request_of(tmp_path / "wds")
    assert list(found) == [
        "n",
        "shape",
        "classes",
        "shard_size",
        "format",
        "codec",
        "source",
        "original",
        "synthfast",
    ]
    assert found["source"] == {"name": str(shards), "fingerprint": images.fingerprint()}
    assert found["original"] == request_of(shards)
    import_("digits", tmp_path / "digits")
    assert request_of(tmp_path / "digits")["source"]["fingerprint"] == open_images("digits").fingerprint()
    assert "original" not in request_of(tmp_path / "digits")


@pytest.mark.parametrize("to", ["npy", "wds", "npz", "folder"])
def test_a_selection_is_exported(tmp_path, shards, to):
    images = ShardSet(shards)
    chosen = np.array([0, 3, 4, 5, 11, 12, 19, 22])
    write_selection(tmp_path / "chosen.npy", images, chosen, None, {})
    out = tmp_path / ("out.npz" if to == "npz" else "out")
    export(shards, to, out, selection=str(tmp_path / "chosen.npy"))
    source = {"npz": f"npz:{out}", "folder": f"folder:{out}"}.get(to, str(out))
    found = open_images(source)
    order = chosen if to != "folder" else chosen[np.argsort(images.labels[chosen], kind="stable")]
    np.testing.assert_array_equal(found.read(np.arange(8)), images.read(order))
    record = json.loads((out / "export.json").read_text())["request"] if to == "folder" else None
    record = request_of(out) if to in ("npy", "wds") else record
    if record is not None:
        assert len(record["selection"]) == 64
    with pytest.raises(UsageError, match="was made with"):
        export(shards, to, out)


class Killed(BaseException):
    pass


@pytest.mark.parametrize("kill_after", range(0, 23, 4))
@pytest.mark.parametrize("format", ["npy", "wds"])
def test_an_interrupted_export_is_completed_byte_for_byte(tmp_path, shards, contents, monkeypatch, format, kill_after):
    export(shards, format, tmp_path / "whole", shard_size=6)

    def die(done: int, total: int) -> None:
        if done >= kill_after:
            raise Killed

    config = ExportConfig(source=(str(shards),), to=format, out=str(tmp_path / "out"), shard_size=6)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(ShardWriter, "abort", lambda self: None)  # a kill cleans nothing up
        export_images(config, die)
    with pytest.raises(SynthfastError, match="incomplete"):
        ShardSet(tmp_path / "out")
    done = export_images(config)
    assert done.kept == max(0, kill_after - 1) // 6 * 6 and done.kept + done.made == 23
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert export_images(config).made == 0


def test_progress_counts_what_was_there(tmp_path, shards):
    seen = []
    config = ExportConfig(source=(str(shards),), to="npy", out=str(tmp_path / "out"), shard_size=10)
    export_images(config, lambda done, total: seen.append((done, total)))
    assert seen == [(k, 23) for k in (0, 4, 8, 10, 14, 18, 20, 23)]
    seen.clear()
    export_images(config, lambda done, total: seen.append((done, total)))
    assert seen == [(23, 23)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shard_size": 5}, "--shard-size: .*out was made with 10, this command says 5"),
        ({"to": "wds"}, '--to: .*out was made with "npy", this command says "wds"'),
        ({"source": ("digits",)}, "DIR .*: .*out was made with|SOURCE .*out was made with"),
    ],
)
def test_another_command_into_the_same_folder_is_refused(tmp_path, shards, change, message):
    values = {"source": (str(shards),), "to": "npy", "out": str(tmp_path / "out"), "shard_size": 10}
    export_images(ExportConfig(**values))
    with pytest.raises(UsageError, match=message):
        export_images(ExportConfig(**{**values, **change}))


def test_two_writers_are_refused(tmp_path, shards):
    export(shards, "npy", tmp_path / "out")
    with (
        ShardFolder.create_or_resume(tmp_path / "out", request_of(tmp_path / "out")),
        pytest.raises(SynthfastError, match="another process is writing this folder"),
    ):
        export(shards, "npy", tmp_path / "out")


def test_classes_may_be_more_than_the_labels_show_but_not_fewer(tmp_path, shards):
    export(shards, "npz", tmp_path / "a.npz")
    import_(f"npz:{tmp_path / 'a.npz'}", tmp_path / "more", classes=12)
    assert ShardSet(tmp_path / "more").classes == 12
    with pytest.raises(UsageError, match=r"--classes 6: npz:.* has labels up to 6; raise it"):
        import_(f"npz:{tmp_path / 'a.npz'}", tmp_path / "fewer", classes=6)
    np.savez(tmp_path / "b.npz", image=np.zeros((3, 4, 4), np.uint8))
    with pytest.raises(UsageError, match=r"--classes 6: npz:.* has no labels"):
        import_(f"npz:{tmp_path / 'b.npz'}", tmp_path / "none", classes=6)


def test_jpg_is_copied_and_not_coded_twice(tmp_path, shards, contents):
    """What jpg has done to the pixels it does once: merged, split and selected from, the files stay as they are."""
    export(shards, "wds", tmp_path / "jpg", codec="jpg", quality=80)
    images = ShardSet(tmp_path / "jpg")
    split(SplitConfig(source=(str(tmp_path / "jpg"),), parts=3, out=str(tmp_path / "part")))
    assert ShardSet(tmp_path / "part-1").encoded(np.arange(8)) == images.encoded(np.arange(7, 15))
    assert request_of(tmp_path / "part-1")["quality"] == 80
    parts = tuple(str(tmp_path / f"part-{k}") for k in (2, 0, 1))
    merge(MergeConfig(parts=parts, out=str(tmp_path / "merged")))
    order = np.concatenate([np.arange(15, 23), np.arange(15)])
    assert ShardSet(tmp_path / "merged").encoded(ALL) == images.encoded(order)
    assert verify(tmp_path / "merged") == []
    export(tmp_path / "jpg", "wds", tmp_path / "other", codec="jpg", quality=30)
    assert ShardSet(tmp_path / "other").encoded(ALL) != images.encoded(ALL)


def test_a_set_remembers_that_jpg_has_been_through_it(tmp_path, shards):
    export(shards, "wds", tmp_path / "jpg", codec="jpg")
    export(tmp_path / "jpg", "npy", tmp_path / "npy")
    assert ShardSet(tmp_path / "npy").lossy and not ShardSet(shards).lossy
    same(tmp_path / "npy", ShardSet(tmp_path / "jpg"))
    merge(MergeConfig(parts=(str(shards), str(tmp_path / "npy")), out=str(tmp_path / "both")))
    assert ShardSet(tmp_path / "both").lossy
    split(SplitConfig(source=(str(tmp_path / "npy"),), parts=2, out=str(tmp_path / "part")))
    assert ShardSet(tmp_path / "part-0").lossy
    export(tmp_path / "part-0", "wds", tmp_path / "png")
    import_(str(tmp_path / "png"), tmp_path / "imported")
    assert ShardSet(tmp_path / "png").codec == "png" and ShardSet(tmp_path / "png").lossy
    assert ShardSet(tmp_path / "imported").lossy


@pytest.mark.parametrize(("to", "kept"), [("npz", False), ("folder", False), ("npy", True), ("wds", True)])
def test_an_export_that_forgets_that_images_were_jpg_says_so(tmp_path, shards, to, kept):
    export(shards, "wds", tmp_path / "jpg", codec="jpg")
    out = tmp_path / ("a.npz" if to == "npz" else "a")
    for _ in range(2):  # also where it was done before
        warning = export(tmp_path / "jpg", to, out).warning
        assert warning is None if kept else "stored as jpg or webp, and this copy does not tell" in warning
    assert open_images({"npz": "npz:", "folder": "folder:"}.get(to, "") + str(out)).lossy is kept
    assert export(shards, to, tmp_path / f"plain-{out.name}").warning is None


@pytest.mark.parametrize("format", [None, "npy", "wds"])
def test_merge_keeps_the_order_given(tmp_path, write, request_values, toy, format):
    expected = []
    for k, n in enumerate((23, 5, 11)):
        values = {**request_values, "n": n, "seed": k}
        write(tmp_path / str(k), values)
        expected.append(toy(values))
    folders = tuple(str(tmp_path / str(k)) for k in (1, 0, 2))
    done = merge(MergeConfig(parts=folders, out=str(tmp_path / "out"), format=format))
    found = ShardSet(tmp_path / "out")
    assert done.made == 39 and found.format == (format or "npy")
    np.testing.assert_array_equal(found.read(np.arange(39)), np.concatenate([expected[k][0] for k in (1, 0, 2)]))
    np.testing.assert_array_equal(found.labels, np.concatenate([expected[k][1] for k in (1, 0, 2)]))
    parts = request_of(tmp_path / "out")["parts"]
    assert [(part["name"], part["n"]) for part in parts] == list(zip(folders, (5, 23, 11), strict=True))
    assert [part["fingerprint"] for part in parts] == [ShardSet(folder).fingerprint() for folder in folders]
    assert [part["original"] for part in parts] == [request_of(Path(folder)) for folder in folders]
    with pytest.raises(UsageError, match=r"DIR \.\.\..*was made with"):
        merge(MergeConfig(parts=folders[::-1], out=str(tmp_path / "out"), format=format))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shape": [4, 5, 1]}, "expected images 4x5x3 as in .*, found 4x5x1; leave it out"),
        ({"classes": 8}, "expected 7 classes as in .*, found 8 classes; leave it out"),
        ({"classes": None}, "expected 7 classes as in .*, found no classes; leave it out"),
    ],
)
def test_sets_that_differ_are_not_merged(tmp_path, shards, write, request_values, change, message):
    write(tmp_path / "other", {**request_values, **change})
    with pytest.raises(UsageError, match=message):
        merge(MergeConfig(parts=(str(shards), str(tmp_path / "other")), out=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()


def test_formats_that_differ_need_a_word(tmp_path, shards):
    export(shards, "wds", tmp_path / "wds")
    with pytest.raises(UsageError, match=r"is stored in another way than .*; say with --format how to store both"):
        merge(MergeConfig(parts=(str(shards), str(tmp_path / "wds")), out=str(tmp_path / "out")))
    merge(MergeConfig(parts=(str(shards), str(tmp_path / "wds")), out=str(tmp_path / "out"), format="wds"))
    np.testing.assert_array_equal(ShardSet(tmp_path / "out").read(ALL + 23), ShardSet(shards).read(ALL))


def parts_of(tmp_path: Path, shards: Path, **options) -> list[ShardSet]:
    done = split(SplitConfig(source=(str(shards),), out=str(tmp_path / "part"), **options))
    found = [ShardSet(tmp_path / f"part-{k}") for k in range(len(done))]
    assert [len(part) for part in found] == [copied.kept + copied.made for copied in done]
    assert not (tmp_path / f"part-{len(done)}").exists()
    return found


def test_a_prefix_may_end_in_a_slash_as_shells_complete_folders(tmp_path, shards):
    done = split(SplitConfig(source=(str(shards),), out=f"{tmp_path / 'part'}/", parts=2))
    assert [copied.path for copied in done] == [str(tmp_path / "part-0"), str(tmp_path / "part-1")]


def test_split_is_contiguous(tmp_path, shards):
    parts = parts_of(tmp_path, shards, parts=4)
    assert [len(part) for part in parts] == [5, 6, 6, 6]
    whole = ShardSet(shards)
    np.testing.assert_array_equal(np.concatenate([part.read(np.arange(len(part))) for part in parts]), whole.read(ALL))
    np.testing.assert_array_equal(np.concatenate([part.labels for part in parts]), whole.labels)
    request = request_of(tmp_path / "part-1")
    assert request["split"] == {"part": 1, "sizes": [5, 6, 6, 6], "shuffle": False, "balanced": False}
    assert request["original"] == request_of(shards) and request["shard_size"] == 10


def rows_of(part: ShardSet, whole: ShardSet) -> list[int]:
    """Which images of the whole a part holds, in its order; the toy images all differ."""
    numbers = {image.tobytes(): k for k, image in enumerate(whole.read(np.arange(len(whole))))}
    return [numbers[image.tobytes()] for image in part.read(np.arange(len(part)))]


def test_a_shuffled_split_has_every_image_once_by_the_seed(tmp_path, shards):
    whole = ShardSet(shards)
    orders = {}
    for seed in (0, 0, 1):
        (tmp_path / f"run-{len(orders)}-{seed}").mkdir(exist_ok=True)
        parts = parts_of(tmp_path / f"run-{len(orders)}-{seed}", shards, sizes="10,13", shuffle=True, seed=seed)
        order = [row for part in parts for row in rows_of(part, whole)]
        assert sorted(order) == list(range(23)) and order != sorted(order)
        assert orders.setdefault(seed, order) == order
        np.testing.assert_array_equal(np.concatenate([p.labels for p in parts]), whole.labels[order])
    assert orders[0] != orders[1]


@pytest.mark.parametrize("shuffle", [False, True])
def test_a_balanced_split_has_a_share_of_every_class(shuffle):
    labels = np.repeat([0, 1, 2, 4], [400, 200, 40, 8])  # class 3 has none
    config = SplitConfig(source=("x",), sizes="0.75,0.25", out="y", shuffle=shuffle, balanced=True)
    sizes = part_sizes(config, len(labels))
    order = split_order(labels, len(labels), config)
    assert sorted(order.tolist()) == list(range(len(labels))) and sizes == [486, 162]
    assert np.bincount(labels[order[:486]]).tolist() == [300, 150, 30, 0, 6]
    if not shuffle:  # the first images of each class are in the first part
        assert [order[:486][labels[order[:486]] == k].max() for k in (0, 1, 2, 4)] == [299, 549, 629, 645]


def test_without_shuffle_a_part_keeps_the_order_of_the_whole(tmp_path, toy, request_values):
    pixels, _ = toy(request_values)
    request = {"n": 23, "shape": [4, 5, 3], "classes": 2, "shard_size": 23}
    with ShardFolder.create_or_resume(tmp_path / "blocks", request) as folder:
        with folder.writer(0) as writer:
            writer.append(pixels, np.repeat([1, 0], [13, 10]))
            writer.commit()
        folder.finish()
    parts = parts_of(tmp_path, tmp_path / "blocks", sizes="10,13", balanced=True)
    for part in parts:
        rows = rows_of(part, ShardSet(tmp_path / "blocks"))
        assert rows == sorted(rows) and len(set(part.labels.tolist())) == 2


def test_a_balanced_split_is_off_by_little_where_classes_do_not_divide(tmp_path, shards):
    parts = parts_of(tmp_path, shards, parts=3, balanced=True)
    whole = np.bincount(ShardSet(shards).labels, minlength=7)
    for part in parts:
        assert np.abs(np.bincount(part.labels, minlength=7) - whole * len(part) / 23).max() <= 1
    assert sorted(row for part in parts for row in rows_of(part, ShardSet(shards))) == list(range(23))
    for part in parts:
        assert rows_of(part, ShardSet(shards)) == sorted(rows_of(part, ShardSet(shards)))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"parts": 1}, [23]),
        ({"parts": 5}, [4, 5, 4, 5, 5]),
        ({"sizes": "20,3"}, [20, 3]),
        ({"sizes": " 1 , 21 , 1"}, [1, 21, 1]),
        ({"sizes": "0.5,0.5"}, [12, 11]),
        ({"sizes": "0.1,0.2,0.7"}, [2, 5, 16]),
        ({"sizes": "1.0"}, [23]),
    ],
)
def test_part_sizes(options, expected):
    assert part_sizes(SplitConfig(source=("x",), out="y", **options), 23) == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"parts": 24}, "--parts 24: a part would get none of the 23 images"),
        ({"sizes": "20,4"}, "--sizes 20,4: add up to 24, expected 23, all images"),
        ({"sizes": "0.01,0.99"}, "--sizes 0.01,0.99: a part would get none"),
        ({"parts": 2, "balanced": True}, "--balanced: .* has no labels to balance"),
    ],
)
def test_splits_that_cannot_be(tmp_path, write, request_values, options, message):
    write(tmp_path / "plain", {**request_values, "classes": None})
    with pytest.raises(UsageError, match=message):
        split(SplitConfig(source=(str(tmp_path / "plain"),), out=str(tmp_path / "part"), **options))
    assert not (tmp_path / "part-0").exists()


def test_an_interrupted_split_is_completed(tmp_path, shards, contents):
    (tmp_path / "whole").mkdir()
    parts_of(tmp_path / "whole", shards, parts=3, shuffle=True)
    config = SplitConfig(source=(str(shards),), out=str(tmp_path / "part"), parts=3, shuffle=True)

    def die(done: int, total: int) -> None:
        assert total == 23
        if done >= 12:
            raise Killed

    with pytest.raises(Killed):
        split(config, die)
    assert [done.kept for done in split(config)] == [7, 0, 0]
    for k in range(3):
        assert contents(tmp_path / f"part-{k}") == contents(tmp_path / "whole" / f"part-{k}")
    with pytest.raises(UsageError, match=r"--seed: .* was made with 0, this command says 1"):
        split(SplitConfig(source=(str(shards),), out=str(tmp_path / "part"), parts=3, shuffle=True, seed=1))


def test_memory_stays_flat_whatever_the_number_of_images(tmp_path, monkeypatch):
    """25 MB of images from shards to tars, merged and split in chunks of 1 MB."""
    import tracemalloc

    monkeypatch.setattr(copying_module, "CHUNK_BYTES", 1 << 20)
    np.savez(tmp_path / "a.npz", image=np.zeros((8000, 32, 32, 3), np.uint8), label=np.arange(8000) % 10)
    tracemalloc.start()
    import_(f"npz:{tmp_path / 'a.npz'}", tmp_path / "npy", shard_size=3000)
    export(tmp_path / "npy", "wds", tmp_path / "wds", shard_size=3000)
    split(SplitConfig(source=(str(tmp_path / "wds"),), parts=2, out=str(tmp_path / "part"), shuffle=True))
    parts = (str(tmp_path / "part-0"), str(tmp_path / "part-1"))
    merge(MergeConfig(parts=parts, out=str(tmp_path / "merged"), format="npy"))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(ShardSet(tmp_path / "merged")) == 8000 and peak < 10e6


def test_the_smallest_images_fill_no_memory_either(tmp_path):
    """In a tar an image of 4 bytes takes 2 KB: 8 MB of pixels would be 4 GB."""
    import tracemalloc

    np.savez(tmp_path / "a.npz", image=np.zeros((50_000, 2, 2, 1), np.uint8), label=np.arange(50_000) % 10)
    tracemalloc.start()
    import_(f"npz:{tmp_path / 'a.npz'}", tmp_path / "wds", shard_size=50_000, format="wds")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(ShardSet(tmp_path / "wds")) == 50_000 and peak < 100e6
