"""The published sets byte by byte as they are distributed, with all that lies beside them, and what may be wrong with copies."""

from __future__ import annotations

import gzip
import hashlib
import pickle
import struct
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from synthfast.data import open_images
from synthfast.errors import SynthfastError

CIFAR10_NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def planar(images: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(images.transpose(0, 3, 1, 2)).reshape(len(images), -1)


class Python2Pickle:
    """Protocol 2 as Python 2's cPickle and numpy 1 wrote it in 2009, which is what CIFAR's Python version consists of.

    Text is in the opcodes of Python 2's str, arrays are rebuilt by numpy.core.multiarray, their pixels a str.
    """

    @classmethod
    def dump(cls, value: dict[str, object]) -> bytes:
        return b"\x80\x02" + cls._any(value) + b"."

    @classmethod
    def _any(cls, value: object) -> bytes:
        if isinstance(value, dict):
            return b"}(" + b"".join(cls._any(key) + cls._any(item) for key, item in value.items()) + b"u"
        if isinstance(value, list):
            return b"](" + b"".join(map(cls._any, value)) + b"e"
        if isinstance(value, str):
            return cls._bytes(value.encode("latin1"))
        if isinstance(value, int):
            return b"K" + bytes([value]) if value < 256 else b"J" + struct.pack("<i", value)
        return cls._array(value)

    @staticmethod
    def _bytes(data: bytes) -> bytes:
        return b"U" + bytes([len(data)]) + data if len(data) < 256 else b"T" + struct.pack("<i", len(data)) + data

    @classmethod
    def _array(cls, array: np.ndarray) -> bytes:
        start = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\0\x85U\1b\x87R(K\1"
        shape = b"".join(map(cls._any, array.shape)) + b"\x86"
        dtype = b"cnumpy\ndtype\nU\2u1K\0K\1\x87R(K\3U\1|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\0tb"
        return start + shape + dtype + b"\x89" + cls._bytes(array.tobytes()) + b"tb"


def test_the_pickles_of_python_2_are_what_they_should_be():
    pixels = noise(3, 3072)
    data = Python2Pickle.dump({"labels": [0, 9, 300], "data": pixels, "filenames": ["leptodactylus.png"]})
    assert b"numpy.core.multiarray" in data
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = pickle.loads(data, encoding="latin1")
    assert found["labels"] == [0, 9, 300] and found["filenames"] == ["leptodactylus.png"]
    np.testing.assert_array_equal(found["data"], pixels)


def cifar_python(root: Path, monkeypatch: pytest.MonkeyPatch, classes: int) -> dict[str, tuple[np.ndarray, list[int]]]:
    """The folder as the archive unpacks it, readme included; its hashes are made known to torchvision."""
    datasets = pytest.importorskip("torchvision.datasets")
    kind = datasets.CIFAR10 if classes == 10 else datasets.CIFAR100
    folder = root / kind.base_folder
    folder.mkdir()
    sets = {}
    for number, (attribute, split) in enumerate((("train_list", "train"), ("test_list", "test"))):
        files, parts = [], []
        names = [name for name, _ in getattr(kind, attribute)]
        for k, name in enumerate(names):
            pixels = noise(100 // len(names) + 100, 32, 32, 3, seed=10 * number + k)
            labels = [(7 * i + k) % classes for i in range(len(pixels))]
            parts.append((pixels, labels))
            if classes == 10:
                label = f"training batch {k + 1} of 5" if split == "train" else "testing batch 1 of 1"
                content = {"batch_label": label, "labels": labels}
            else:
                coarse = [label // 5 for label in labels]
                content = {"batch_label": f"{split}ing batch 1 of 1", "fine_labels": labels, "coarse_labels": coarse}
            content |= {"data": planar(pixels), "filenames": [f"x_s_{i:06d}.png" for i in range(len(pixels))]}
            data = Python2Pickle.dump(content)
            (folder / name).write_bytes(data)
            files.append([name, hashlib.md5(data).hexdigest()])
        monkeypatch.setattr(kind, attribute, files)
        sets[split] = (np.concatenate([each for each, _ in parts]), [label for _, each in parts for label in each])
    names = list(CIFAR10_NAMES) if classes == 10 else [f"fine_{i}" for i in range(100)]
    meta = {"num_cases_per_batch": 10000, "label_names": names, "num_vis": 3072}
    if classes == 100:
        meta = {"fine_label_names": names, "coarse_label_names": [f"coarse_{i}" for i in range(20)]}
    data = Python2Pickle.dump(meta)
    (folder / kind.meta["filename"]).write_bytes(data)
    monkeypatch.setattr(kind, "meta", {**kind.meta, "md5": hashlib.md5(data).hexdigest()})
    (folder / ("readme.html" if classes == 10 else "file.txt~")).write_text("<meta HTTP-EQUIV='REFRESH'>")
    return sets


@pytest.mark.parametrize("classes", [10, 100])
def test_cifar_as_python_2_pickled_it(tmp_path, monkeypatch, recwarn, classes):
    sets = cifar_python(tmp_path, monkeypatch, classes)
    for split, (pixels, labels) in sets.items():
        images = open_images(f"cifar{classes}:{split}", data_dir=tmp_path)
        assert (images.shape, images.classes, len(images)) == ((32, 32, 3), classes, len(labels))
        np.testing.assert_array_equal(images.read(np.arange(len(images))), pixels)
        assert images.labels.tolist() == labels
        assert images.class_names[0] == ("airplane" if classes == 10 else "fine_0")
    assert [str(warning.message) for warning in recwarn] == []


def cifar_binary(root: Path, classes: int, count: int = 100) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The folder as the archive unpacks it: records, names that end with an empty line, and a readme."""
    folder = root / ("cifar-10-batches-bin" if classes == 10 else "cifar-100-binary")
    folder.mkdir()
    sets = {}
    for split, files in (
        ("train", [f"data_batch_{i}.bin" for i in range(1, 6)] if classes == 10 else ["train.bin"]),
        ("test", ["test_batch.bin"] if classes == 10 else ["test.bin"]),
    ):
        pixels, labels = noise(count, 32, 32, 3, seed=len(files)), (np.arange(count) * 7 % classes).astype(np.uint8)
        coarse = [] if classes == 10 else [labels[:, None] // 5]
        records = np.concatenate([*coarse, labels[:, None], planar(pixels)], axis=1)
        for file, part in zip(files, np.array_split(records, len(files)), strict=True):
            (folder / file).write_bytes(part.tobytes())
        sets[split] = (pixels, labels)
    if classes == 10:
        (folder / "batches.meta.txt").write_text("\n".join(CIFAR10_NAMES) + "\n\n")
        (folder / "readme.html").write_text("<html>")
    else:
        (folder / "fine_label_names.txt").write_text("".join(f"fine_{i}\n" for i in range(100)))
        (folder / "coarse_label_names.txt").write_text("".join(f"coarse_{i}\n" for i in range(20)))
    return sets


@pytest.mark.parametrize("classes", [10, 100])
def test_cifar_binary_as_it_is_unpacked(tmp_path, classes):
    for split, (pixels, labels) in cifar_binary(tmp_path, classes).items():
        images = open_images(f"cifar{classes}:{split}", data_dir=tmp_path)
        np.testing.assert_array_equal(images.read(np.arange(100)), pixels)
        np.testing.assert_array_equal(images.labels, labels)
        assert images.class_names[9] == ("truck" if classes == 10 else "fine_9")


def test_cifar_binary_that_is_something_else(tmp_path):
    cifar_binary(tmp_path, 10)
    folder = tmp_path / "cifar-10-batches-bin"
    names = (folder / "batches.meta.txt").read_text()
    (folder / "batches.meta.txt").write_text(names.replace("truck\n", ""))
    with pytest.raises(SynthfastError, match=r"batches\.meta\.txt: expected the names of 10 classes, found 9"):
        open_images("cifar10", data_dir=tmp_path)
    (folder / "batches.meta.txt").write_text(names)
    whole = (folder / "test_batch.bin").read_bytes()
    (folder / "test_batch.bin").write_bytes(b"\x0a" + whole[1:])
    with pytest.raises(SynthfastError, match=r"cifar10:test: labels must be in \[0, 9\], found 0 to 10"):
        open_images("cifar10:test", data_dir=tmp_path)
    # CIFAR-100's records have a byte more.
    (folder / "test_batch.bin").write_bytes(b"".join(b"\0" + whole[i : i + 3073] for i in range(0, len(whole), 3073)))
    with pytest.raises(SynthfastError, match=r"test_batch\.bin: expected a whole number of 3073-byte records"):
        open_images("cifar10:test", data_dir=tmp_path)


def test_train_and_test_swapped_are_noticed_by_their_numbers(tmp_path):
    records = np.zeros((10_000, 3073), np.uint8)
    records[:, 0] = np.arange(10_000) % 10
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    for i in range(1, 6):
        (folder / f"data_batch_{i}.bin").write_bytes(records[2000 * (i - 1) : 2000 * i].tobytes())
    with pytest.raises(
        SynthfastError, match="cifar10:train: expected 50,000 images, found 10,000, as many as test has; the files seem"
    ):
        open_images("cifar10", data_dir=tmp_path)
    write_idx(tmp_path / "train-images-idx3-ubyte", np.zeros((10_000, 28, 28), np.uint8))
    write_idx(tmp_path / "train-labels-idx1-ubyte", (np.arange(10_000) % 10).astype(np.uint8))
    with pytest.raises(SynthfastError, match="mnist:train: expected 60,000 images, found 10,000, as many as test has"):
        open_images("mnist", data_dir=tmp_path)


def write_idx(path: Path, array: np.ndarray, order: str = ">", kind: int = 8) -> bytes:
    data = bytes((0, 0, kind, array.ndim)) + struct.pack(f"{order}{array.ndim}I", *array.shape) + array.tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return data


def test_mnist_as_torchvision_leaves_it(tmp_path):
    """Both the archives and what they hold; the unpacked files are read."""
    raw = tmp_path / "MNIST" / "raw"
    for stem, count in (("train", 30), ("t10k", 20)):
        for name, array in (
            (f"{stem}-images-idx3-ubyte", noise(count, 28, 28, seed=count)),
            (f"{stem}-labels-idx1-ubyte", np.arange(count, dtype=np.uint8) % 10),
        ):
            packed = gzip.compress(write_idx(raw / name, array), mtime=0)
            # The published archives hold the file's name.
            (raw / f"{name}.gz").write_bytes(packed[:3] + b"\x08" + packed[4:10] + name.encode() + b"\0" + packed[10:])
    for split, count in (("train", 30), ("test", 20)):
        images = open_images(f"mnist:{split}", data_dir=tmp_path)
        np.testing.assert_array_equal(images.read(np.arange(count))[..., 0], noise(count, 28, 28, seed=count))
    for path in raw.glob("*-ubyte"):
        path.unlink()
    assert len(open_images("mnist:test", data_dir=tmp_path)) == 20


def test_mnist_of_mixed_files_and_other_orders(tmp_path):
    images, labels = tmp_path / "train-images-idx3-ubyte", tmp_path / "train-labels-idx1-ubyte"
    write_idx(labels, np.arange(20, dtype=np.uint8) % 10)
    write_idx(images, noise(30, 28, 28))
    with pytest.raises(
        SynthfastError, match=r"mnist:train: labels must be integers \[30\], one per image, found uint8 \[20\]"
    ):
        open_images("mnist", data_dir=tmp_path)
    write_idx(images, noise(20, 28, 28), order="<")
    with pytest.raises(SynthfastError, match=r"images-idx3-ubyte: expected \d{20,} bytes of data, found 15680"):
        open_images("mnist", data_dir=tmp_path)
    write_idx(images, noise(20, 28, 28), kind=0x0D)
    with pytest.raises(SynthfastError, match="not an idx file of bytes with 3 dimensions"):
        open_images("mnist", data_dir=tmp_path)
    write_idx(images, np.arange(20, dtype=np.uint8))  # labels where images belong
    with pytest.raises(SynthfastError, match="not an idx file of bytes with 3 dimensions"):
        open_images("mnist", data_dir=tmp_path)


def test_an_archive_that_unpacks_to_much_more_than_it_says_is_not_unpacked(tmp_path):
    """30 MB of zeros behind a header of 20 images: reading stops after the first byte too many."""
    header = bytes((0, 0, 8, 3)) + struct.pack(">3I", 20, 28, 28)
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(header + bytes(30_000_000)))
    (tmp_path / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(b"\0\0\x08\1" + struct.pack(">I", 20)))
    with pytest.raises(SynthfastError, match="expected 15680 bytes of data, found more"):
        open_images("mnist", data_dir=tmp_path)


def celeba(root: Path, count: int = 9) -> list[np.ndarray]:
    """The folder that torchvision unpacks: pictures, the partition, and the lists of attributes beside them."""
    folder = root / "celeba"
    (folder / "img_align_celeba").mkdir(parents=True)
    faces = []
    for i in range(1, count + 1):
        faces.append(np.repeat(np.repeat(noise(11, 9, 3, seed=i), 20, 0), 20, 1)[:218, :178])
        Image.fromarray(faces[-1]).save(folder / "img_align_celeba" / f"{i:06d}.jpg", quality=95)
    names = [f"{i:06d}.jpg" for i in range(1, count + 1)]
    (folder / "list_eval_partition.txt").write_text("".join(f"{name} {i // 3}\n" for i, name in enumerate(names)))
    (folder / "identity_CelebA.txt").write_text("".join(f"{name} {2880 + i}\n" for i, name in enumerate(names)))
    attributes = "".join(f"{name} -1  1  1 -1\n" for name in names)
    (folder / "list_attr_celeba.txt").write_text(f"{count}\n5_o_Clock_Shadow Arched_Eyebrows Young Male \n{attributes}")
    boxes = "".join(f"{name}    95  71 226 313\n" for name in names)
    (folder / "list_bbox_celeba.txt").write_text(f"{count}\nimage_id x_1 y_1 width height\n{boxes}")
    (folder / "list_landmarks_align_celeba.txt").write_text(f"{count}\nlefteye_x lefteye_y\n")
    (folder / "img_align_celeba.zip").write_bytes(b"PK\x05\x06" + bytes(18))
    return faces


def test_celeba_as_torchvision_leaves_it(tmp_path):
    faces = celeba(tmp_path)
    for number, split in enumerate(("train", "valid", "test")):
        images = open_images(f"celeba:{split}", data_dir=tmp_path, image_size=140)
        assert (len(images), images.shape, images.labels) == (3, (140, 140, 3), None)
        expected = np.stack([face[39:179, 19:159] for face in faces[3 * number : 3 * number + 3]])
        assert np.abs(images.read(np.arange(3)).astype(int) - expected).mean() < 6  # jpg


def test_celeba_with_files_missing_or_listed_twice(tmp_path):
    celeba(tmp_path)
    folder = tmp_path / "celeba"
    lines = (folder / "list_eval_partition.txt").read_text()
    (folder / "list_eval_partition.txt").write_bytes(lines.replace("\n", "\r\n").encode() + b"\r\n")
    assert len(open_images("celeba", data_dir=tmp_path)) == 3
    (folder / "img_align_celeba" / "000002.jpg").unlink()
    images = open_images("celeba", data_dir=tmp_path)
    with pytest.raises(SynthfastError, match=r"000002\.jpg: no such file or folder"):
        images.read(np.arange(3))
    (folder / "list_eval_partition.txt").write_text("000001.jpg 1\n")
    with pytest.raises(SynthfastError, match="celeba:train"):
        open_images("celeba", data_dir=tmp_path)


def imagenet(root: Path, part: str, classes: int = 1000) -> None:
    """``train/<wnid>/<wnid>_<n>.JPEG`` or ``val/<wnid>/ILSVRC2012_val_<n>.JPEG``, as torchvision sorts them, of few pixels."""
    for i in range(classes):
        wnid = f"n{1440764 + 11 * i:08d}"
        folder = root / part / wnid
        folder.mkdir(parents=True)
        name = f"{wnid}_{i}.JPEG" if part == "train" else f"ILSVRC2012_val_{i + 1:08d}.JPEG"
        Image.new("RGB", (8, 6), (i % 256, 0, 0)).save(folder / name)


def test_imagenet_train_with_its_odd_files(tmp_path):
    """CMYK and grey JPEG, and a PNG that is called JPEG, which the published set has; lists and archives beside the folders."""
    imagenet(tmp_path, "train")
    folders = sorted((tmp_path / "train").iterdir())
    shades = np.repeat(np.linspace(0, 255, 24).astype(np.uint8)[None], 20, 0)
    cmyk = Image.fromarray(np.stack([shades, shades // 2, shades[:, ::-1], shades // 4], 2), "CMYK")
    cmyk.save(folders[0] / "n01440764_999.JPEG", quality=95)
    Image.fromarray(shades).save(folders[1] / "n01440775_999.JPEG", quality=95)
    Image.fromarray(np.stack([shades] * 3 + [np.full_like(shades, 255)], 2)).save(
        folders[2] / "n01440786_999.JPEG", "PNG"
    )
    (folders[3] / ".DS_Store").write_bytes(b"\0\0\0\1Bud1")
    (folders[3] / "n01440797.xml").write_text("<annotation/>")
    (tmp_path / "LOC_synset_mapping.txt").write_text("n01440764 tench, Tinca tinca\n")
    (tmp_path / "meta.bin").write_bytes(b"PK\3\4")  # torchvision's
    (tmp_path / "ILSVRC2012_devkit_t12.tar.gz").write_bytes(b"\x1f\x8b")
    images = open_images("imagenet", data_dir=tmp_path, image_size=6)
    assert (len(images), images.classes, images.shape) == (1003, 1000, (6, 6, 3))
    assert images.class_names[:2] == ("n01440764", "n01440775") and images.labels[:4].tolist() == [0, 0, 1, 1]
    cmyk, grey, png = images.read(np.array([1, 3, 5])).astype(int)
    with Image.open(folders[0] / "n01440764_999.JPEG") as opened:
        assert opened.mode == "CMYK"
        converted = np.asarray(opened.convert("RGB").resize((7, 6), Image.Resampling.BICUBIC)).astype(int)
    assert np.abs(cmyk - converted[:, :6]).max() <= 2 and cmyk.std(axis=2).max() > 10
    for each in (grey, png):
        assert (each[..., 0] == each[..., 1]).all() and (each[..., 0] == each[..., 2]).all() and each.std() > 30


def test_imagenet_val_needs_its_thousand_folders(tmp_path):
    imagenet(tmp_path, "val", classes=20)
    with pytest.raises(SynthfastError, match=r"imagenet:test: expected 1000 classes, found 20; for a part of it use"):
        open_images("imagenet:test", data_dir=tmp_path)
    images = open_images(f"folder:{tmp_path / 'val'}", image_size=4)
    assert images.classes == 20 and images.class_names[1] == "n01440775"
    flat = tmp_path / "flat" / "val"  # as the archive of the validation part unpacks
    flat.mkdir(parents=True)
    Image.new("RGB", (8, 6)).save(flat / "ILSVRC2012_val_00000001.JPEG")
    with pytest.raises(SynthfastError, match=r"imagenet:test: expected 1000 classes, found None"):
        open_images("imagenet:test", data_dir=tmp_path / "flat")


def downsampled(root: Path, size: int = 4, count: int = 1000) -> tuple[np.ndarray, np.ndarray]:
    """``train_data_batch_1.npz`` to 10 with data, labels from 1 and the mean image; ``val_data.npz`` without a mean."""
    pixels, labels = (
        noise(count, size, size, 3),
        np.random.default_rng(1).permutation(1000)[np.arange(count) % 1000] + 1,
    )
    for i, rows in enumerate(np.array_split(np.arange(count), 10)):
        mean = planar(pixels).mean(0)
        np.savez(root / f"train_data_batch_{i + 1}.npz", data=planar(pixels[rows]), labels=labels[rows], mean=mean)
    np.savez(root / "val_data.npz", data=planar(pixels[::-1]), labels=labels[::-1])
    return pixels, labels - 1


@pytest.mark.parametrize("place", ["", "imagenet"])
def test_imagenet_downsampled_as_published(tmp_path, place):
    (tmp_path / place).mkdir(exist_ok=True)
    pixels, labels = downsampled(tmp_path / place)
    for split, order in (("train", slice(None)), ("test", slice(None, None, -1))):
        images = open_images(f"imagenet:{split}", data_dir=tmp_path, image_size=4)
        np.testing.assert_array_equal(images.read(np.arange(1000)), pixels[order])
        np.testing.assert_array_equal(images.labels, labels[order])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": np.arange(100)}, r"labels must be in \[0, 999\], found -1 to"),
        ({"labels": np.arange(902, 1002)}, r"labels must be in \[0, 999\], found 0 to 1000"),
        ({"labels": np.arange(1, 101) / 1.0}, r"batch_3\.npz: expected integer labels \[100\], found float64"),
        ({"labels": np.arange(1, 100)}, r"batch_3\.npz: expected integer labels \[100\], found int64 \[99\]"),
        ({"data": noise(100, 48).astype(np.float32)}, r"batch_3\.npz: expected uint8 \[n, 48\] .* found float32"),
        ({"data": noise(100, 3, 4, 4)}, r"batch_3\.npz: expected uint8 \[n, 48\] .* found uint8 \[100, 3, 4, 4\]"),
        ({"data": noise(100, 3 * 8 * 8)}, r"expected uint8 \[n, 48\] for image size 4, found uint8 \[100, 192\]"),
    ],
)
def test_a_downsampled_batch_that_is_something_else(tmp_path, change, message):
    downsampled(tmp_path)
    with np.load(tmp_path / "train_data_batch_3.npz") as whole:
        np.savez(tmp_path / "train_data_batch_3.npz", **{**whole, **change})
    with pytest.raises(SynthfastError, match=message):
        open_images("imagenet", data_dir=tmp_path, image_size=4)


def test_downsampled_classes_are_counted(tmp_path):
    downsampled(tmp_path)
    with np.load(tmp_path / "val_data.npz") as whole:
        labels = np.where(whole["labels"] == 7, 8, whole["labels"])
        np.savez(tmp_path / "val_data.npz", data=whole["data"], labels=labels)
    with pytest.raises(SynthfastError, match="imagenet:test: expected 1000 classes, found 999"):
        open_images("imagenet:test", data_dir=tmp_path, image_size=4)
