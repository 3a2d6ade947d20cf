"""Loaders whose batches are wanted on a GPU: those of the CPU, bit for bit but for jpg that nvJPEG decodes.

SYNTHFAST_TEST_DEVICE=cpu runs them where there is no GPU, to see that the tests themselves work.
"""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch

from synthfast.data.loaders import Augment, open_loader, resident, stream
from synthfast.errors import UsageError

DEVICE = torch.device(os.environ.get("SYNTHFAST_TEST_DEVICE", "cuda"))
if DEVICE.type == "cuda" and not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)

LOADERS = {"auto": ("auto", None), "device": ("device", None), "dali": ("dali", 1), "workers": ("torch", 2)}
LEVELS = 8  # of 255, by which decoders of jpg may differ


def batches(loader, plan):
    return [(batch.images, batch.labels) for batch in loader.batches(plan, 0, 10)]


@pytest.mark.parametrize("name", LOADERS)
@pytest.mark.parametrize("augment", [None, Augment(-3, crop=2, flip=True)])
@pytest.mark.parametrize(
    ("kinds", "counts"),
    [
        (("memory",), (7,)),
        (("planar",), (7,)),
        (("png",), (7,)),
        (("jpg",), (7,)),
        (("folder",), (7,)),
        (("grey png",), (7,)),
        (("chosen memory", "shards"), (5, 3)),
        (("folder", "shards", "jpg", "chosen png", "planar"), (3, 1, 2, 4, 2)),
    ],
)
def test_batches_are_those_of_the_cpu(made, plan_of, kinds, counts, augment, name):
    kind, workers = LOADERS[name]
    if kind == "dali":
        pytest.importorskip("nvidia.dali")
    sets = [made(one) for one in kinds]
    loader = open_loader(kind, sets, DEVICE, augment, workers=workers)
    expected = batches(open_loader("torch", sets, torch.device("cpu"), augment, workers=0), plan_of(sets, counts))
    inexact = loader.kind == "dali" and DEVICE.type == "cuda" and any(one in ("jpg", "folder") for one in kinds)
    scale = 1 if augment is None else 255
    for (x, y), (wanted_x, wanted_y) in zip(batches(loader, plan_of(sets, counts)), expected, strict=True):
        assert x.device.type == y.device.type == DEVICE.type
        assert torch.equal(y.cpu(), wanted_y) and x.stride() == wanted_x.stride() and x.dtype == wanted_x.dtype
        difference = (x.cpu().float() - wanted_x.float()).abs().max() * scale
        assert difference <= (LEVELS if inexact else 0)


@pytest.mark.parametrize("kind", ["auto", "device", "torch"])
def test_a_set_that_is_read_once(made, kind):
    images = made("png")
    parts = np.array_split(np.arange(len(images)), 7)
    found = [batch.images.cpu() for batch in stream(images, parts, DEVICE, kind=kind)]
    assert torch.equal(torch.cat(found), torch.from_numpy(images.read(np.arange(len(images)))))


def test_a_pass_in_order_through_dali(made):
    pytest.importorskip("nvidia.dali")
    images = made("png")
    parts = [np.arange(first, min(first + 16, len(images))) for first in range(0, len(images), 16)]
    found = [batch.images.cpu() for batch in stream(images, parts, DEVICE, kind="dali")]
    assert torch.equal(torch.cat(found), torch.from_numpy(images.read(np.arange(len(images)))))


def test_a_resident_set(made):
    pixels = resident([made("shards")], DEVICE)
    assert pixels.device.type == DEVICE.type
    assert np.array_equal(pixels.cpu().numpy(), made("shards").read(np.arange(60)))


def test_a_set_larger_than_the_memory_of_the_device(made, monkeypatch):
    monkeypatch.setattr("synthfast.data.loaders.device.free_memory", lambda device: 1000)
    with pytest.raises(UsageError, match=r"^--loader device: .*; take --loader dali or torch$"):
        open_loader("device", [made("png")], DEVICE)
    assert open_loader("auto", [made("png")], DEVICE).kind == "torch"
