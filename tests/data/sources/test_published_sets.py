"""Each published set from small files in the format in which it is distributed."""

from __future__ import annotations

import gzip
import hashlib
import pickle
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from synthfast.data import open_images
from synthfast.data.sources.published import CELEBA_CROP
from synthfast.errors import SynthfastError


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def planar(images: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(images.transpose(0, 3, 1, 2)).reshape(len(images), -1)


def write_idx(path: Path, array: np.ndarray, zipped: bool) -> None:
    data = bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    if zipped:
        path.with_name(path.name + ".gz").write_bytes(gzip.compress(data))
    else:
        path.write_bytes(data)


@pytest.mark.parametrize("place", ["", "MNIST/raw"])
@pytest.mark.parametrize("zipped", [False, True])
def test_mnist(tmp_path, place, zipped):
    for stem, count in (("train", 30), ("t10k", 20)):
        write_idx(tmp_path / place / f"{stem}-images-idx3-ubyte", noise(count, 28, 28, seed=count), zipped)
        write_idx(tmp_path / place / f"{stem}-labels-idx1-ubyte", np.arange(count, dtype=np.uint8) % 10, zipped)
    for split, count in (("train", 30), ("test", 20)):
        images = open_images(f"mnist:{split}", data_dir=tmp_path)
        assert (len(images), images.shape, images.classes) == (count, (28, 28, 1), 10)
        np.testing.assert_array_equal(images.read(np.arange(count))[..., 0], noise(count, 28, 28, seed=count))
        np.testing.assert_array_equal(images.labels, np.arange(count) % 10)
        assert images.class_names[3] == "3"


def test_mnist_as_torchvision_reads_it(tmp_path):
    datasets = pytest.importorskip("torchvision.datasets")
    write_idx(tmp_path / "MNIST/raw/train-images-idx3-ubyte", noise(20, 28, 28), False)
    write_idx(tmp_path / "MNIST/raw/train-labels-idx1-ubyte", np.arange(20, dtype=np.uint8) % 10, False)
    for stem in ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"):
        (tmp_path / "MNIST/raw" / stem).touch()  # torchvision asks that they exist
    theirs = datasets.MNIST(str(tmp_path))
    ours = open_images("mnist", data_dir=tmp_path)
    np.testing.assert_array_equal(ours.read(np.arange(20))[..., 0], theirs.data.numpy())
    np.testing.assert_array_equal(ours.labels, theirs.targets.numpy())


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[:-1], "expected 784 bytes of data, found 783"),
        (lambda data: data[:7], "not an idx file"),
        (lambda data: b"\0\0\x0d" + data[3:], "not an idx file"),
    ],
)
def test_damaged_mnist(tmp_path, damage, message):
    write_idx(tmp_path / "train-images-idx3-ubyte", noise(1, 28, 28), False)
    write_idx(tmp_path / "train-labels-idx1-ubyte", noise(1), True)
    path = tmp_path / "train-images-idx3-ubyte"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(SynthfastError, match=message):
        open_images("mnist", data_dir=tmp_path)


def test_damaged_gzip_is_named(tmp_path):
    write_idx(tmp_path / "train-images-idx3-ubyte", noise(10, 28, 28), True)
    write_idx(tmp_path / "train-labels-idx1-ubyte", noise(10), True)
    path = tmp_path / "train-images-idx3-ubyte.gz"
    whole = path.read_bytes()
    for damaged in (whole[:100], b"no gzip", whole[:3000] + bytes(100) + whole[3100:]):
        path.write_bytes(damaged)
        with pytest.raises(SynthfastError, match=r"images-idx3-ubyte\.gz: not a valid gzip file"):
            open_images("mnist", data_dir=tmp_path)


def test_mnist_of_another_size_or_fewer_classes(tmp_path):
    write_idx(tmp_path / "train-labels-idx1-ubyte", np.arange(20, dtype=np.uint8) % 10, False)
    write_idx(tmp_path / "train-images-idx3-ubyte", noise(20, 27, 28), False)
    with pytest.raises(SynthfastError, match="mnist:train: expected images 28x28x1, found 27x28x1"):
        open_images("mnist", data_dir=tmp_path)
    write_idx(tmp_path / "train-images-idx3-ubyte", noise(20, 28, 28), False)
    write_idx(tmp_path / "train-labels-idx1-ubyte", np.arange(20, dtype=np.uint8) % 9, False)
    with pytest.raises(SynthfastError, match="expected 10 classes, found 9"):
        open_images("mnist", data_dir=tmp_path)
    write_idx(tmp_path / "train-labels-idx1-ubyte", np.arange(20, dtype=np.uint8) % 11, False)
    with pytest.raises(SynthfastError, match=r"labels must be in \[0, 9\], found 0 to 10"):
        open_images("mnist", data_dir=tmp_path)


def test_cifar10_binary(tmp_path):
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    pixels, labels = noise(60, 32, 32, 3), (np.arange(60) % 10).astype(np.uint8)
    records = np.concatenate([labels[:, None], planar(pixels)], axis=1)
    for i in range(5):
        (folder / f"data_batch_{i + 1}.bin").write_bytes(records[i * 10 : (i + 1) * 10].tobytes())
    (folder / "test_batch.bin").write_bytes(records[50:].tobytes())
    (folder / "batches.meta.txt").write_text("airplane\nautomobile\nbird\ncat\ndeer\ndog\nfrog\nhorse\nship\ntruck\n\n")
    for split, rows in (("train", slice(0, 50)), ("test", slice(50, 60))):
        images = open_images("cifar10", data_dir=tmp_path, split=split)
        assert images.shape == (32, 32, 3) and images.classes == 10 and images.class_names[9] == "truck"
        np.testing.assert_array_equal(images.read(np.arange(len(images))), pixels[rows])
        np.testing.assert_array_equal(images.labels, labels[rows])
    (folder / "data_batch_3.bin").write_bytes(records[:10].tobytes()[:-1])
    with pytest.raises(SynthfastError, match=r"data_batch_3\.bin: expected a whole number of 3073-byte records"):
        open_images("cifar10", data_dir=tmp_path)
    (folder / "data_batch_3.bin").unlink()
    with pytest.raises(SynthfastError, match=r"data_batch_3\.bin: no such file"):
        open_images("cifar10", data_dir=tmp_path)


def test_cifar100_binary_has_fine_labels(tmp_path):
    folder = tmp_path / "cifar-100-binary"
    folder.mkdir()
    pixels, fine = noise(200, 32, 32, 3), (np.arange(200) % 100).astype(np.uint8)
    records = np.concatenate([(fine // 5)[:, None], fine[:, None], planar(pixels)], axis=1)
    (folder / "train.bin").write_bytes(records.tobytes())
    images = open_images("cifar100", data_dir=tmp_path)
    assert images.classes == 100 and images.class_names is None
    np.testing.assert_array_equal(images.labels, fine)
    np.testing.assert_array_equal(images.read(np.array([199, 0])), pixels[[199, 0]])


def write_cifar_python(root: Path, monkeypatch: pytest.MonkeyPatch, classes: int) -> tuple[np.ndarray, list[int]]:
    """CIFAR's Python version, small, its hashes made known to torchvision."""
    datasets = pytest.importorskip("torchvision.datasets")
    kind = datasets.CIFAR10 if classes == 10 else datasets.CIFAR100
    folder = root / kind.base_folder
    folder.mkdir()
    pixels, labels = noise(2 * classes, 32, 32, 3), [i % classes for i in range(2 * classes)]

    def dump(name: str, value: dict) -> str:
        (folder / name).write_bytes(pickle.dumps(value))
        return hashlib.md5((folder / name).read_bytes()).hexdigest()

    names = [name for name, _ in kind.train_list]
    key = "labels" if classes == 10 else "fine_labels"
    cuts = np.array_split(np.arange(2 * classes), len(names))
    hashes = [
        [name, dump(name, {"data": planar(pixels[cut]), key: [labels[i] for i in cut]})]
        for name, cut in zip(names, cuts, strict=True)
    ]
    tests = [
        [name, dump(name, {"data": planar(pixels[:classes]), key: labels[:classes]})] for name, _ in kind.test_list
    ]
    meta = dict(kind.meta)
    meta["md5"] = dump(meta["filename"], {meta["key"]: [f"class{i}" for i in range(classes)]})
    for attribute, value in (("train_list", hashes), ("test_list", tests), ("meta", meta)):
        monkeypatch.setattr(kind, attribute, value)
    return pixels, labels


@pytest.mark.parametrize("classes", [10, 100])
def test_cifar_python_version_through_torchvision(tmp_path, monkeypatch, classes):
    pixels, labels = write_cifar_python(tmp_path, monkeypatch, classes)
    images = open_images(f"cifar{classes}", data_dir=tmp_path)
    assert images.shape == (32, 32, 3) and images.classes == classes and images.class_names[1] == "class1"
    np.testing.assert_array_equal(images.read(np.arange(2 * classes)), pixels)
    assert images.labels.tolist() == labels
    assert len(open_images(f"cifar{classes}:test", data_dir=tmp_path)) == classes


def test_changed_pickle_is_not_loaded(tmp_path, monkeypatch):
    write_cifar_python(tmp_path, monkeypatch, 10)
    path = tmp_path / "cifar-10-batches-py" / "data_batch_2"
    known = hashlib.md5(path.read_bytes()).hexdigest()
    path.write_bytes(pickle.dumps({"data": 1}))
    message = (
        rf"data_batch_2: expected the published file with MD5 {known}, found \w{{32}}; it is a pickle and is not opened"
    )
    with pytest.raises(SynthfastError, match=message):
        open_images("cifar10", data_dir=tmp_path)
    path.unlink()
    with pytest.raises(SynthfastError, match="data_batch_2: no such file or folder"):
        open_images("cifar10:test", data_dir=tmp_path)


def test_without_torchvision_the_error_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    (tmp_path / "cifar-10-batches-py").mkdir()
    with pytest.raises(SynthfastError, match=r"cifar10: needs torchvision .* install torchvision, or unpack"):
        open_images("cifar10", data_dir=tmp_path)
    with pytest.raises(SynthfastError, match="mnist: needs torchvision"):
        open_images("mnist", data_dir=tmp_path, download=True)
    assert len(open_images("digits")) == 500


@pytest.mark.parametrize(
    ("source", "kind", "error"),
    [
        ("mnist", "MNIST", RuntimeError("Error downloading\ntrain-images")),
        ("cifar10", "CIFAR10", ConnectionResetError("reset by peer")),
        ("celeba", "CelebA", ModuleNotFoundError("No module named 'gdown'")),
    ],
)
def test_failed_download_is_one_line_and_keeps_standard_output_clean(
    tmp_path, monkeypatch, capsys, source, kind, error
):
    datasets = pytest.importorskip("torchvision.datasets")

    def fail(root: str, **options) -> None:
        assert Path(root) == tmp_path and options["download"] is True
        print("Downloading http://...")
        raise error

    monkeypatch.setattr(datasets, kind, fail)
    with pytest.raises(SynthfastError, match=f"{source}: could not be downloaded") as caught:
        open_images(source, data_dir=tmp_path, download=True)
    assert "\n" not in str(caught.value)
    assert capsys.readouterr().out == ""


def test_download_puts_mnist_where_it_is_read(tmp_path, monkeypatch):
    datasets = pytest.importorskip("torchvision.datasets")

    def download(root: str, **options) -> None:
        write_idx(Path(root) / "MNIST/raw/train-images-idx3-ubyte", noise(10, 28, 28), True)
        write_idx(Path(root) / "MNIST/raw/train-labels-idx1-ubyte", np.arange(10, dtype=np.uint8), True)

    monkeypatch.setattr(datasets, "MNIST", download)
    assert len(open_images("mnist", data_dir=tmp_path, download=True)) == 10


@pytest.mark.parametrize("source", ["mnist", "cifar10", "cifar100:test", "celeba:valid"])
def test_missing_set_says_where_it_was_looked_for(tmp_path, source):
    name = source.partition(":")[0]
    with pytest.raises(SynthfastError, match=rf"^{name}: found no .* in {tmp_path}.*--download .*--data-dir"):
        open_images(source, data_dir=tmp_path)


def write_faces(folder: Path, sizes: dict[str, tuple[int, int]]) -> dict[str, np.ndarray]:
    (folder / "img_align_celeba").mkdir(parents=True)
    faces = {}
    for number, (name, (width, height)) in enumerate(sizes.items()):
        faces[name] = np.full((height, width, 3), 40 * number, np.uint8)
        faces[name][height // 2 - 70 : height // 2 + 70, width // 2 - 70 : width // 2 + 70] += 100
        Image.fromarray(faces[name]).save(folder / "img_align_celeba" / name, quality=100)
    return faces


@pytest.mark.parametrize("place", ["", "celeba"])
def test_celeba(tmp_path, place):
    write_faces(tmp_path / place, {f"{i:06d}.jpg": (178, 218) for i in range(1, 5)})
    lines = "000001.jpg 0\n000002.jpg 1\n000003.jpg 2\n000004.jpg 0\n"
    (tmp_path / place / "list_eval_partition.txt").write_text(lines)
    train = open_images("celeba", data_dir=tmp_path)
    assert (len(train), train.shape, train.labels, train.classes) == (2, (64, 64, 3), None, None)
    # Only the brighter centre of 140 x 140 is seen.
    assert CELEBA_CROP == 140
    read = train.read(np.arange(2)).astype(int)
    assert np.abs(read[0] - 100).max() <= 2 and np.abs(read[1] - 220).max() <= 2
    assert open_images("celeba:valid", data_dir=tmp_path, image_size=32).shape == (32, 32, 3)
    assert len(open_images("celeba:test", data_dir=tmp_path)) == 1


def test_celeba_that_is_not_the_aligned_one(tmp_path):
    write_faces(tmp_path, {"000001.jpg": (178, 218), "000002.jpg": (200, 218)})
    (tmp_path / "list_eval_partition.txt").write_text("000001.jpg 0\n000002.jpg 0\n")
    images = open_images("celeba", data_dir=tmp_path)
    with pytest.raises(SynthfastError, match=r"000002\.jpg: expected 178x218 pixels, found 200x218"):
        images.read(np.arange(2))
    for line in ("../../etc/passwd 0", "000001.jpg 7", "000001.jpg"):
        (tmp_path / "list_eval_partition.txt").write_text(f"{line}\n")
        with pytest.raises(SynthfastError, match=r"expected lines like '000001.jpg 0'"):
            open_images("celeba", data_dir=tmp_path)


def test_imagenet_folders(tmp_path):
    """A thousand class folders; grey and CMYK files, which the real set has, become RGB."""
    for i in range(1000):
        folder = tmp_path / "imagenet" / "val" / f"n{i:08d}"
        folder.mkdir(parents=True)
        mode = {0: "L", 1: "CMYK"}.get(i, "RGB")
        Image.new(mode, (9, 7)).save(folder / f"ILSVRC2012_val_{i:08d}.JPEG")
    images = open_images("imagenet:test", data_dir=tmp_path, image_size=4)
    assert (len(images), images.shape, images.classes) == (1000, (4, 4, 3), 1000)
    assert images.class_names[7] == "n00000007" and images.labels[7] == 7
    assert images.read(np.arange(10)).shape == (10, 4, 4, 3)
    next((tmp_path / "imagenet/val/n00000500").iterdir()).unlink()
    (tmp_path / "imagenet/val/n00000500").rmdir()
    with pytest.raises(SynthfastError, match=r"expected 1000 classes, found 999; for a part of it use folder:DIR"):
        open_images("imagenet:test", data_dir=tmp_path)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_imagenet_downsampled(tmp_path, save):
    pixels, labels = noise(1000, 4, 4, 3), np.random.default_rng(1).permutation(1000)
    for i in range(10):
        rows = slice(100 * i, 100 * i + 100)
        save(tmp_path / f"train_data_batch_{i + 1}.npz", data=planar(pixels[rows]), labels=labels[rows] + 1)
    images = open_images("imagenet", data_dir=tmp_path, image_size=4)
    np.testing.assert_array_equal(images.labels, labels)
    np.testing.assert_array_equal(images.read(np.array([999, 5, 100])), pixels[[999, 5, 100]])
    with pytest.raises(SynthfastError, match=r"expected uint8 \[n, 12288\] for image size 64, found uint8 \[100, 48\]"):
        open_images("imagenet", data_dir=tmp_path)
    (tmp_path / "train_data_batch_7.npz").unlink()
    with pytest.raises(SynthfastError, match=r"train_data_batch_7\.npz"):
        open_images("imagenet", data_dir=tmp_path, image_size=4)


def test_imagenet_downsampled_validation_part_in_its_own_folder(tmp_path):
    (tmp_path / "Imagenet4_val_npz").mkdir()
    pixels = noise(1000, 4, 4, 3)
    np.savez(tmp_path / "Imagenet4_val_npz/val_data.npz", data=planar(pixels), labels=np.arange(1, 1001))
    images = open_images("imagenet:test", data_dir=tmp_path, image_size=4)
    np.testing.assert_array_equal(images.read(np.arange(1000)), pixels)


def test_imagenet_missing(tmp_path):
    with pytest.raises(
        SynthfastError, match=r"imagenet: found neither train/<wnid>/\*\.JPEG nor train_data_batch_1\.npz"
    ):
        open_images("imagenet", data_dir=tmp_path)
