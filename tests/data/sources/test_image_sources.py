from __future__ import annotations

import numpy as np
import pytest

from synthfast.data import ShardSet, open_images
from synthfast.errors import SynthfastError, UsageError


def test_default_split_is_train_and_either_spelling_names_another():
    assert open_images("digits").name == open_images("digits:train").name == "digits:train"
    assert open_images("digits", split="test").name == open_images("digits:test", split="test").name == "digits:test"
    with pytest.raises(UsageError, match="digits:train: names a split, and split 'test' was asked for as well"):
        open_images("digits:train", split="test")


@pytest.mark.parametrize("source", ["digits:valid", "mnist:val", "digits:", "celeba:dev"])
def test_unknown_split_lists_the_known(source):
    with pytest.raises(UsageError, match=r"no such split; \w+ has train, .*test"):
        open_images(source)


def test_unknown_source_lists_the_known(tmp_path, monkeypatch):
    with pytest.raises(
        UsageError, match="expected digits, mnist, cifar10, cifar100, celeba, imagenet, folder:DIR, npz:FILE"
    ):
        open_images("cifar-10")
    with pytest.raises(UsageError, match=f"for a folder of images write folder:{tmp_path}"):
        open_images(str(tmp_path))
    np.savez(tmp_path / "a.npz", image=np.zeros((1, 2, 2), np.uint8))
    with pytest.raises(UsageError, match="for an npz file write npz:"):
        open_images(str(tmp_path / "a.npz"))


def test_sets_of_fixed_size_are_not_resized(tmp_path):
    assert open_images("digits", image_size=8).shape == (8, 8, 1)
    with pytest.raises(UsageError, match="images are 8x8x1 and are not resized, image size 32 was asked for"):
        open_images("digits", image_size=32)
    for source in ("celeba", "imagenet"):
        with pytest.raises(UsageError, match=f"{source}: the image size must be at least 1, found 0"):
            open_images(source, data_dir=tmp_path, image_size=0)


@pytest.mark.parametrize("shape", [(6, 4, 5), (6, 4, 5, 1), (6, 4, 5, 3)])
def test_npz(tmp_path, shape):
    pixels = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    np.savez(tmp_path / "a.npz", image=pixels, label=np.array([0, 1, 2, 2, 1, 0], np.uint8))
    images = open_images(f"npz:{tmp_path / 'a.npz'}")
    assert images.shape == (4, 5, shape[3] if len(shape) == 4 else 1)
    assert images.classes == 3 and images.labels.tolist() == [0, 1, 2, 2, 1, 0]
    np.testing.assert_array_equal(images.read(np.arange(6)), pixels.reshape(6, *images.shape))


def test_npz_without_labels(tmp_path):
    np.savez_compressed(tmp_path / "a.npz", image=np.zeros((3, 2, 2, 3), np.uint8))
    images = open_images(f"npz:{tmp_path / 'a.npz'}")
    assert images.labels is None and images.classes is None


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"images": np.zeros((3, 2, 2), np.uint8)}, "expected an array 'image', found images"),
        ({"image": np.zeros((3, 2, 2))}, r"must be uint8 .*, found float64 \[3, 2, 2\]"),
        ({"image": np.zeros((3, 2), np.uint8)}, r"found uint8 \[3, 2\]"),
        ({"image": np.zeros((3, 3, 8, 8), np.uint8)}, r"with C 1 or 3, found \[3, 3, 8, 8\]"),
        ({"image": np.zeros((0, 8, 8), np.uint8)}, "holds no images"),
        ({"image": np.zeros((3, 8, 8), np.uint8), "label": np.zeros(4, np.int64)}, r"integers \[3\], one per image"),
        ({"image": np.zeros((3, 8, 8), np.uint8), "label": np.zeros(3)}, r"found float64 \[3\]"),
        ({"image": np.zeros((3, 8, 8), np.uint8), "label": np.full(3, -1)}, "0 or more, found -1"),
    ],
)
def test_npz_that_cannot_be_images(tmp_path, arrays, message):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(SynthfastError, match=message):
        open_images(f"npz:{tmp_path / 'a.npz'}")


def test_sources_without_splits_refuse_one(tmp_path, shards):
    np.savez(tmp_path / "a.npz", image=np.zeros((3, 2, 2), np.uint8))
    for source in (f"npz:{tmp_path / 'a.npz'}", f"folder:{tmp_path}", str(shards)):
        with pytest.raises(UsageError, match="has no splits, 'test' was asked for"):
            open_images(source, split="test")
    with pytest.raises(SynthfastError, match="no such npz file"):
        open_images(f"npz:{tmp_path / 'b.npz'}")


def test_path_of_a_shard_folder(shards):
    images = open_images(str(shards))
    assert isinstance(images, ShardSet) and images.shape == (4, 5, 3) and images.classes == 7


@pytest.mark.parametrize("name", ["npz", "folder", "wds", "cifar-binary"])
def test_only_shard_folders_are_read_from_urls(name):
    with pytest.raises(UsageError, match=rf"^{name}:memory://a: expected a local path, found a URL.* fetch it first$"):
        open_images(f"{name}:memory://a")
