"""Which loader ``auto`` takes."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from PIL import Image

from synthfast.config.fields import LOADERS
from synthfast.data import open_images
from synthfast.data.loaders import choose, device, open_loader, stream
from synthfast.errors import UsageError

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)

CHOICES = [
    (("memory",), "device"),
    (("shards", "planar", "chosen memory"), "device"),
    (("png",), "torch"),
    (("memory", "chosen png"), "torch"),
    (("jpg",), "dali"),
    (("folder",), "dali"),
    (("memory", "png", "jpg"), "dali"),
]


@pytest.mark.parametrize(("kinds", "expected"), CHOICES)
def test_auto_takes_the_fastest(made, kinds, expected):
    pytest.importorskip("nvidia.dali")
    loader = open_loader("auto", [made(kind) for kind in kinds], CPU)
    assert loader.kind == expected


@pytest.mark.parametrize(("kinds", "expected"), CHOICES)
def test_auto_needs_no_dali(made, kinds, expected, monkeypatch):
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    monkeypatch.setitem(sys.modules, "nvidia.dali.fn", None)
    sets = [made(kind) for kind in kinds]
    assert open_loader("auto", sets, CPU).kind == expected.replace("dali", "torch")
    with pytest.raises(
        UsageError, match=r"^--loader dali: needs the package nvidia-dali-cuda130 .*synthfast\[dali\]'$"
    ):
        open_loader("dali", sets, CPU)


@pytest.mark.parametrize(
    ("fits", "once", "expected"), [(True, False, "device"), (True, True, "torch"), (False, False, "torch")]
)
def test_auto_on_a_gpu_copies_sets_that_fit_and_are_read_again(made, monkeypatch, fits, once, expected):
    monkeypatch.setattr(choose, "does_not_fit", lambda sets, device: None if fits else "too large")
    assert choose._fastest([made("shards")], GPU, once) == expected


def test_folders_that_dali_cannot_take_are_for_torch(tmp_path):
    for name, image in (("resized", Image.new("RGB", (20, 20))), ("palette", Image.new("P", (8, 8)))):
        (tmp_path / name).mkdir()
        image.save(tmp_path / name / "1.png")
        images = open_images(f"folder:{tmp_path / name}", image_size=8)
        assert open_loader("auto", [images], CPU).kind == "torch"


@pytest.mark.parametrize("kinds", [("memory",), ("png",), ("memory", "jpg")])
def test_workers_that_are_not_given(made, kinds, monkeypatch):
    monkeypatch.setattr(choose, "cpus_of_rank", lambda: 5)
    loader = open_loader("torch", [made(kind) for kind in kinds], CPU)
    assert loader.workers == (5 if "jpg" in kinds else 0)


def test_an_unknown_loader():
    with pytest.raises(UsageError, match=r"^--loader fast: no such loader; expected auto, device, dali, torch$"):
        open_loader("fast", [open_images("digits")], CPU)
    assert LOADERS == ("auto", "device", "dali", "torch")


@pytest.mark.parametrize("kind", LOADERS)
def test_a_set_that_is_read_once(made, kind):
    images = made("jpg")
    batches = [np.arange(9, 30), np.array([3, 3, 59]), np.arange(25)]
    found = list(stream(images, batches, CPU, kind=kind))
    assert [np.array_equal(batch.images, images.read(items)) for batch, items in zip(found, batches, strict=True)] == [
        True
    ] * 3
    assert list(stream(images, [], CPU, kind=kind)) == []


def test_a_set_that_is_read_once_is_not_copied_into_memory(made, monkeypatch):
    """A run that validates must not fail at its first checkpoint because the training has taken the memory since."""
    monkeypatch.setattr(device, "free_memory", lambda device: 1000)
    images, batches = made("jpg"), [np.arange(9, 30), np.arange(25)]
    with pytest.raises(UsageError, match=r"^--loader device: the images take "):
        open_loader("device", [images], CPU)
    found = list(stream(images, batches, CPU, kind="device"))
    assert all(np.array_equal(batch.images, images.read(items)) for batch, items in zip(found, batches, strict=True))
