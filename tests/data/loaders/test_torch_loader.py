"""The loader ``torch``: anybody's map-style data sets, and what happens to worker processes."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal

import numpy as np
import pytest
import torch
from PIL import Image

from synthfast.data import ArrayImages, ImageSet
from synthfast.data.loaders import Augment, MapStyle, Wanted, open_loader
from synthfast.errors import SynthfastError

CPU = torch.device("cpu")
PIXELS = np.random.default_rng(0).integers(0, 256, (20, 6, 5, 3), np.uint8)


class Samples:
    """A map-style data set."""

    def __init__(self, make, targets=None):
        self.make = make
        if targets is not None:
            self.targets = targets

    def __len__(self):
        return len(PIXELS)

    def __getitem__(self, item):
        return self.make(item)


FORMS = {
    "PIL images": lambda item: (Image.fromarray(PIXELS[item]), item % 3),
    "arrays": lambda item: (PIXELS[item], item % 3),
    "tensors": lambda item: (torch.from_numpy(PIXELS[item]).permute(2, 0, 1), item % 3),
    "bare arrays": lambda item: PIXELS[item],
}


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("form", FORMS)
def test_a_map_style_data_set_is_a_set_of_images(form, workers):
    images = MapStyle(Samples(FORMS[form], [item % 3 for item in range(20)]), "samples")
    assert (images.shape, len(images), images.classes, images.name) == ((6, 5, 3), 20, 3, "samples")
    loader = open_loader("torch", [images], CPU, workers=workers)
    found = loader.batch(Wanted((np.array([3, 19, 3]),)))
    assert np.array_equal(found.images, PIXELS[[3, 19, 3]]) and found.labels.tolist() == [0, 1, 0]


def test_grey_images_and_labels_of_ones_own():
    images = MapStyle(
        Samples(lambda item: Image.fromarray(PIXELS[item, :, :, 0])), labels=torch.arange(20) % 4, classes=6
    )
    assert (images.shape, images.classes, images.labels[:5].tolist()) == ((6, 5, 1), 6, [0, 1, 2, 3, 0])
    assert np.array_equal(images.read(np.array([2]))[0, :, :, 0], PIXELS[2, :, :, 0])
    assert MapStyle(Samples(FORMS["arrays"])).labels is None


def broken(item):
    if item == 7:
        raise ValueError("no such\nthing")
    return PIXELS[item] if item != 9 else PIXELS[item, :3]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    ("item", "words"),
    [
        (7, r"^samples: cannot read image 7 \(no such thing\); repair or remove it$"),
        (9, r"^samples: expected images \[6, 5, 3\] like the first, found \[3, 5, 3\] for image 9; resize it$"),
    ],
)
def test_an_image_that_cannot_be_read_is_named(item, words, workers, capfd):
    loader = open_loader("torch", [MapStyle(Samples(broken), "samples")], CPU, Augment(), workers=workers)
    taken = []
    with pytest.raises(SynthfastError, match=words):
        for batch in loader.batches(lambda step: Wanted((np.array([step if step < 2 else item]),)), 0, 20):
            taken.append(batch)
    assert len(taken) == 2
    gc.collect()
    assert not multiprocessing.active_children() and capfd.readouterr() == ("", "")


@pytest.mark.parametrize("mode", ["P", "1", "RGBA", "CMYK", "HSV"])
def test_pil_images_that_are_neither_grey_nor_rgb_are_refused(mode):
    """Their bytes would pass for grey or RGB."""
    for first in (0, 1):
        with pytest.raises((ValueError, SynthfastError), match=rf"expected a PIL image of mode L or RGB, found {mode}"):
            images = MapStyle(Samples(lambda item, first=first: Image.new(mode if item == first else "RGB", (5, 6))))
            images.read(np.array([1]))


def test_a_set_that_is_no_image_at_all():
    for sample in (np.zeros((3, 3)), np.zeros(4, np.uint8)):
        with pytest.raises(ValueError, match="expected uint8 pixels of 2 or 3 dimensions"):
            MapStyle(Samples(lambda _, sample=sample: sample))


class Failing(ArrayImages):
    """The system fails with image 7."""

    error: Exception

    def _read(self, indices: np.ndarray) -> np.ndarray:
        if 7 in indices:
            raise self.error
        return super()._read(indices)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("error", [OSError(5, "Input/output error", "some.png"), MemoryError("no more")])
def test_errors_of_the_system_come_without_pages_of_text(error, workers):
    images = Failing("failing", [PIXELS])
    images.error = error
    loader = open_loader("torch", [images], CPU, workers=workers)
    with pytest.raises(type(error)) as caught:
        list(loader.batches(lambda step: Wanted((np.array([step]),)), 0, 20))
    assert str(caught.value) == str(error)
    assert getattr(caught.value, "filename", None) == getattr(error, "filename", None)


class Deadly(ArrayImages):
    """Ends the process that reads image 7."""

    def _read(self, indices: np.ndarray) -> np.ndarray:
        if 7 in indices:
            os.kill(os.getpid(), signal.SIGKILL)
        return super()._read(indices)


@pytest.fixture
def no_handler(monkeypatch):
    """As in a process where no DataLoader has had workers yet."""
    monkeypatch.setattr("torch.utils.data._utils.signal_handling._SIGCHLD_handler_set", False)
    before = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGCHLD, before)


def test_a_worker_that_is_killed_is_one_line_and_leaves_none_behind(no_handler):
    images: ImageSet = Deadly("deadly", [PIXELS])
    loader = open_loader("torch", [images], CPU, workers=2)
    with pytest.raises(
        SynthfastError, match=r"^--loader torch: a worker process has ended \(.+\); give it fewer --"
    ) as caught:
        for _ in loader.batches(lambda step: Wanted((np.array([step]),)), 0, 20):
            # PyTorch's would raise wherever this process is.
            assert signal.getsignal(signal.SIGCHLD) is signal.SIG_DFL
    assert "\n" not in str(caught.value)
    del caught
    gc.collect()
    assert not multiprocessing.active_children()


def test_workers_do_not_hear_ctrl_c():
    loader = open_loader("torch", [ArrayImages("toy", [PIXELS])], CPU, workers=2)
    batches = loader.batches(lambda step: Wanted((np.array([step % 20]),)), 0, 1000)
    for _ in range(2):  # one from each: both have begun
        next(batches)
    workers = multiprocessing.active_children()
    assert len(workers) == 2
    for worker in workers:
        os.kill(worker.pid, signal.SIGINT)
    for _ in range(100):
        next(batches)
    assert all(worker.is_alive() for worker in workers)
    batches.close()
    assert not multiprocessing.active_children()


def test_a_worker_opens_tars_anew(made, monkeypatch):
    """A place in a file is shared with the process that was forked from."""
    images = made("tars")
    expected = images.read(np.array([0, 30, 59]))
    handles = dict(images._handles)
    images.read(np.array([0, 30, 59]))
    assert images._handles == handles
    monkeypatch.setattr(os, "getpid", lambda: 1)
    assert np.array_equal(images.read(np.array([0, 30, 59])), expected)
    assert images._handles.keys() == handles.keys() and not set(images._handles.values()) & set(handles.values())


@pytest.mark.filterwarnings("error")
def test_more_workers_than_cpus_are_no_warning(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})
    loader = open_loader("torch", [ArrayImages("toy", [PIXELS])], CPU, workers=2)
    assert len(list(loader.batches(lambda step: Wanted((np.array([step]),)), 0, 5))) == 5


class Collecting(ArrayImages):
    """Collects garbage whenever it is read."""

    def _read(self, indices: np.ndarray) -> np.ndarray:
        gc.collect()
        return super()._read(indices)


def test_a_fork_leaves_dalis_pipelines_alone(made):
    """Those that are garbage, which a worker's collection would end, and wait for ever for threads that it has not."""
    dali = pytest.importorskip("nvidia.dali")
    loader = open_loader("torch", [Collecting("toy", [PIXELS])], CPU, workers=1)

    def hangs(*_):
        raise TimeoutError("the worker hangs")

    before = signal.signal(signal.SIGALRM, hangs)
    gc.disable()
    try:
        unfinished = open_loader("dali", [made("jpg")], CPU, workers=1).batches(lambda _: Wanted((np.arange(4),)), 0, 9)
        next(unfinished)
        knot: list[object] = [unfinished]
        knot.append(knot)  # only a collection frees it
        del unfinished, knot
        assert any(type(one) is dali.Pipeline for one in gc.get_objects())
        signal.alarm(30)
        assert len(list(loader.batches(lambda step: Wanted((np.array([step]),)), 0, 5))) == 5
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        gc.enable()
