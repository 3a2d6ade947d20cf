"""Folders of png files and CIFAR's binary version, written and read back."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from synthfast.artifacts import Lock
from synthfast.config import ExportConfig, ImportConfig
from synthfast.data import ArrayImages, open_images
from synthfast.data.transfer import copying as copying_module
from synthfast.data.transfer import export_folder as module
from synthfast.data.transfer.export_folder import folder_names, write_cifar, write_folder
from synthfast.data.transfer.exporting import export_images
from synthfast.data.transfer.importing import import_images
from synthfast.errors import SynthfastError, UsageError

RECORD = {"n": 23, "source": {"name": "toy", "fingerprint": "0"}}
OPTIONS = {"source.fingerprint": "DIR (its images)"}
BY_NAME = ("ape", "bat", "cat", "dog", "eel", "fox", "gnu")


def pixels_of(n: int, shape: tuple[int, int, int]) -> np.ndarray:
    return np.random.default_rng(n).integers(0, 256, (n, *shape), np.uint8)


def images_of(n: int = 23, shape=(4, 5, 3), names=None, labels: bool = True) -> ArrayImages:
    return ArrayImages("toy", [pixels_of(n, shape)], np.arange(n) % 7 if labels else None, 7 if labels else None, names)


def write(write_to, images, out, record=RECORD, report=lambda done, total: None):
    return write_to(images, out, record, OPTIONS, report)


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("shape", [(4, 5, 3), (4, 5, 1), (1, 1, 1)])
@pytest.mark.parametrize("names", [None, BY_NAME])
def test_folders_hold_the_same_pixels_and_labels(tmp_path, shape, names):
    images = images_of(shape=shape, names=names)
    done = write(write_folder, images, tmp_path / "out")
    assert (done.kept, done.made) == (0, 23)
    found = open_images(f"folder:{tmp_path / 'out'}")
    order = np.argsort(images.labels, kind="stable")  # a folder's images are ordered by class, then by name
    np.testing.assert_array_equal(found.read(np.arange(23)), images.read(order))
    np.testing.assert_array_equal(found.labels, images.labels[order])
    assert found.class_names == (names or tuple("0123456"))
    assert (tmp_path / "out" / found.class_names[6] / "06.png").is_file()


def test_without_labels_the_order_is_kept(tmp_path):
    images = images_of(n=101, labels=False)
    write(write_folder, images, tmp_path / "out")
    found = open_images(f"folder:{tmp_path / 'out'}")
    assert found.labels is None
    np.testing.assert_array_equal(found.read(np.arange(101)), images.read(np.arange(101)))


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (None, ["0", "1", "2"]),
        (("a", "b", "c"), ["a", "b", "c"]),
        (("c", "b", "a"), ["0-c", "1-b", "2-a"]),
        (("a", "a", "b"), ["0-a", "1-a", "2-b"]),
        (("../a", "b/c", ".d"), ["0-.._a", "1-b_c", "2-.d"]),
        (("", "b", "c"), ["0-", "1-b", "2-c"]),
        (("a", "b\n", "c"), ["0-a", "1-b_", "2-c"]),
    ],
)
def test_class_folders_sort_in_the_order_of_the_classes(names, expected):
    assert folder_names(3, names) == expected == sorted(expected)


def test_many_classes_are_numbered_in_equal_width():
    found = folder_names(1001, None)
    assert found == sorted(found) and found[3] == "0003" and found[1000] == "1000"


def test_a_class_without_images_has_no_folder(tmp_path):
    images = ArrayImages("toy", [pixels_of(3, (2, 2, 1))], np.array([0, 2, 2]), 3)
    for _ in range(2):  # it is no less true when all is there already
        done = write(write_folder, images, tmp_path / "out")
        assert done.warning.startswith("1 of 3 classes without an image have no folder (1), ")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["0", "2", "export.json"]


@pytest.mark.parametrize(
    ("labels", "classes", "said"),
    [
        (np.array([0, 1, 2]), 3, None),
        (None, None, None),
        (np.array([0, 1, 1]), 4, "2 of 4 classes without an image have no folder (2, 3), "),
        (np.array([6, 8, 8]), 10, "8 of 10 classes without an image have no folder (0, 1, 2, 3, 4 and so on), "),
    ],
)
def test_a_warning_says_which_classes_have_no_folder(tmp_path, labels, classes, said):
    done = write(write_folder, ArrayImages("toy", [pixels_of(3, (2, 2, 1))], labels, classes), tmp_path / "out")
    assert done.warning is None if said is None else done.warning.startswith(said)


def test_cifar_layout(tmp_path, monkeypatch):
    """A record is a label's byte, then the red, the green and the blue plane."""
    monkeypatch.setattr(module, "CIFAR_RECORDS", 10)
    images = images_of(shape=(32, 32, 3), names=BY_NAME)
    write(write_cifar, images, tmp_path / "out")
    assert sorted(files(tmp_path / "out")) == [
        "batches.meta.txt",
        "data_batch_1.bin",
        "data_batch_2.bin",
        "data_batch_3.bin",
        "export.json",
    ]
    assert (tmp_path / "out" / "batches.meta.txt").read_text() == "".join(f"{name}\n" for name in BY_NAME)
    records = np.fromfile(tmp_path / "out" / "data_batch_2.bin", np.uint8).reshape(10, 3073)
    np.testing.assert_array_equal(records[:, 0], images.labels[10:20])
    np.testing.assert_array_equal(records[:, 1:1025], images.read(np.arange(10, 20))[..., 0].reshape(10, -1))
    for source in ("out", "out/data_batch_1.bin"):
        found = open_images(f"cifar-binary:{tmp_path / source}")
        np.testing.assert_array_equal(found.read(np.arange(len(found))), images.read(np.arange(len(found))))
        np.testing.assert_array_equal(found.labels, images.labels[: len(found)])
    assert open_images(f"cifar-binary:{tmp_path / 'out'}").class_names == BY_NAME


def test_torchvision_sees_what_cifar10_reads(tmp_path):
    """Five files of the published names are read as cifar10 itself."""
    n = 50
    images = ArrayImages("toy", [pixels_of(n, (32, 32, 3))], np.arange(n) % 10, 10)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "CIFAR_RECORDS", 10)
        write(write_cifar, images, tmp_path / "cifar-10-batches-bin")
    found = open_images("cifar10", data_dir=tmp_path)
    np.testing.assert_array_equal(found.read(np.arange(n)), images.read(np.arange(n)))
    np.testing.assert_array_equal(found.labels, images.labels)


@pytest.mark.parametrize(
    ("write_to", "images", "message"),
    [
        (write_cifar, images_of(), "--to cifar: expected images 32x32x3, found 4x5x3; take npz"),
        (write_cifar, images_of(shape=(32, 32, 3), labels=False), "expected images with labels, found none"),
        (
            write_cifar,
            ArrayImages("toy", [pixels_of(3, (32, 32, 3))], np.arange(3), 257),
            "a label is a byte, expected at most 256 classes, found 257",
        ),
        (write_folder, images_of(shape=(4, 5, 2)), "expected grey or RGB images, found 2 channels; take npz"),
    ],
)
def test_images_that_do_not_fit_are_refused_before_anything_is_written(tmp_path, write_to, images, message):
    with pytest.raises(UsageError, match=message):
        write(write_to, images, tmp_path / "out")
    assert not (tmp_path / "out").exists()


class Killed(BaseException):
    """Stands for a kill: no handler of the package catches it."""


def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CIFAR_RECORDS", 5)
    monkeypatch.setattr(module, "CHUNK_BYTES", 5 * 4 * 5 * 3)


@pytest.mark.parametrize(("write_to", "shape"), [(write_folder, (4, 5, 3)), (write_cifar, (32, 32, 3))])
def test_killed_before_any_rename_the_next_run_completes(tmp_path, monkeypatch, write_to, shape):
    small_blocks(monkeypatch)
    images = images_of(shape=shape, names=BY_NAME)
    write(write_to, images, tmp_path / "whole")
    expected = files(tmp_path / "whole")
    replace, renames = os.replace, []
    for kill_at in range(len(expected) + 6):
        out = tmp_path / f"killed-{kill_at}"
        renames.clear()

        def die(old, new, renames=renames, kill_at=kill_at):
            if len(renames) == kill_at:
                raise Killed
            renames.append(Path(new))
            replace(old, new)

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", die)
            try:
                write(write_to, images, out)
            except Killed:
                pass
            else:
                break
        if renames:
            record = json.loads((out / "export.json").read_text())
            written = sum(path.suffix in (".png", ".bin") for path in renames) * (1 if write_to is write_folder else 5)
            assert record["complete"] is False and record["done"] <= written
        done = write(write_to, images, out)
        assert (done.kept % 5 == 0 or done.kept == 23) and done.kept + done.made == 23
        assert files(out) == expected
    assert kill_at > len(expected)  # every step was tried: files, the record at each block, and at start and end


def test_a_killed_run_goes_on_where_it_stopped(tmp_path, monkeypatch):
    small_blocks(monkeypatch)

    def die(done: int, total: int) -> None:
        if done == 15:
            raise Killed

    with pytest.raises(Killed):
        write(write_folder, images_of(), tmp_path / "out", report=die)
    seen = []
    done = write(write_folder, images_of(), tmp_path / "out", report=lambda done, total: seen.append((done, total)))
    assert (done.kept, done.made) == (15, 8) and seen == [(15, 23), (20, 23), (23, 23)]


def test_files_that_were_lost_are_made_again(tmp_path, monkeypatch):
    small_blocks(monkeypatch)
    write(write_folder, images_of(), tmp_path / "out")
    expected = files(tmp_path / "out")
    (tmp_path / "out" / "3" / "03.png").unlink()
    (tmp_path / "out" / "6" / "20.png").write_bytes(b"")
    done = write(write_folder, images_of(), tmp_path / "out")
    assert (done.kept, done.made) == (15, 8) and files(tmp_path / "out") == expected
    assert write(write_folder, images_of(), tmp_path / "out").made == 0


def test_another_export_or_strangers_are_refused(tmp_path):
    write(write_folder, images_of(), tmp_path / "out")
    other = {**RECORD, "source": {"name": "toy", "fingerprint": "1"}}
    with pytest.raises(UsageError, match=r'DIR \(its images\): .*out was made with "0", this command says "1"'):
        write(write_folder, images_of(), tmp_path / "out", record=other)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("dear")
    with pytest.raises(UsageError, match=r"holds files \(letter.txt\) but no export.json"):
        write(write_folder, images_of(), tmp_path / "full")
    assert files(tmp_path / "full") == {"letter.txt": b"dear"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "the export's record is not valid JSON"),
        (b"{}", "not the record of an export"),
        (b'{"format": 2, "done": 0, "request": {}}', r"format 2 is newer than this synthfast reads \(1\)"),
        (b'{"format": 1, "done": "all", "request": {}}', "not the record of an export"),
    ],
)
def test_a_broken_record_is_one_line(tmp_path, content, message):
    (tmp_path / "export.json").write_bytes(content)
    with pytest.raises(SynthfastError, match=message) as error:
        write(write_folder, images_of(), tmp_path)
    assert "\n" not in str(error.value)


def test_two_writers_are_refused(tmp_path):
    (tmp_path / "out").mkdir()
    with Lock(tmp_path / "out"), pytest.raises(SynthfastError, match="another process is writing this folder"):
        write(write_folder, images_of(), tmp_path / "out")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], r"expected a .bin file or a folder of data_batch_1.bin"),
        (["data_batch_1.bin", "data_batch_3.bin"], r"data_batch_2.bin is missing, data_batch_3.bin is there"),
        (["data_batch_2.bin"], r"data_batch_1.bin is missing"),
    ],
)
def test_cifar_files_that_are_not_there(tmp_path, names, message):
    for name in names:
        (tmp_path / name).write_bytes(bytes(3073))
    with pytest.raises(SynthfastError, match=message):
        open_images(f"cifar-binary:{tmp_path}")


@pytest.mark.parametrize("size", [0, 3072, 3074])
def test_a_cut_cifar_file_is_one_line(tmp_path, size):
    (tmp_path / "a.bin").write_bytes(bytes(size))
    with pytest.raises(SynthfastError, match=f"expected a whole number of 3073-byte records, found {size} bytes"):
        open_images(f"cifar-binary:{tmp_path / 'a.bin'}")


def test_more_cifar_files_than_open_files(tmp_path):
    """Ten million images are a thousand files, each of which stays open."""
    for k in range(1, 121):
        (tmp_path / f"data_batch_{k}.bin").write_bytes(bytes([k]) + bytes(3072))
    program = f"""
import resource, numpy as np
from pathlib import Path
_, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (100, hard))
from synthfast.data.sources.cifar_binary import open_cifar_binary
assert open_cifar_binary(Path({str(tmp_path)!r}), "many").read(np.arange(120)).shape == (120, 32, 32, 3)
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_a_label_beyond_the_names_is_one_line(tmp_path):
    (tmp_path / "data_batch_1.bin").write_bytes(bytes([2]) + bytes(3072))
    (tmp_path / "batches.meta.txt").write_text("cat\ndog\n\n")
    with pytest.raises(SynthfastError, match=r"labels must be in \[0, 1\], found 2 to 2"):
        open_images(f"cifar-binary:{tmp_path}")


def test_ten_files_are_read_in_the_order_of_their_numbers(tmp_path):
    for k in range(1, 12):
        (tmp_path / f"data_batch_{k}.bin").write_bytes(bytes([k]) + bytes(3072))
    assert open_images(f"cifar-binary:{tmp_path}").labels.tolist() == list(range(1, 12))


def test_png_files_are_what_pillow_reads(tmp_path):
    write(write_folder, images_of(labels=False), tmp_path / "out")
    found = np.asarray(Image.open(tmp_path / "out" / "07.png"))
    np.testing.assert_array_equal(found, pixels_of(23, (4, 5, 3))[7])


@pytest.mark.parametrize(("to", "n", "shape"), [("folder", 400, (100, 100, 3)), ("cifar", 4000, (32, 32, 3))])
def test_memory_stays_flat_whatever_the_number_of_images(tmp_path, monkeypatch, to, n, shape):
    """12 MB of images in blocks of 1 MB: numpy's memory, where the pixels are, stays below a few blocks. Those that threads hold
    at a time differ from run to run."""
    import tracemalloc

    np.savez(tmp_path / "a.npz", image=np.zeros((n, *shape), np.uint8), label=np.arange(n) % 10)
    import_images(ImportConfig(source=(f"npz:{tmp_path / 'a.npz'}",), out=str(tmp_path / "shards")))
    monkeypatch.setattr(module, "CHUNK_BYTES", 1 << 20)
    monkeypatch.setattr(copying_module, "CHUNK_BYTES", 1 << 20)
    monkeypatch.setattr(module, "CIFAR_RECORDS", 300)
    tracemalloc.start()
    assert export_images(ExportConfig(source=(str(tmp_path / "shards"),), to=to, out=str(tmp_path / to))).made == n
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10e6
