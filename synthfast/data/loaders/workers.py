"""The loader ``torch``: a ``torch.utils.data.DataLoader`` whose worker processes read, and decode, the bytes of whole batches."""

from __future__ import annotations

import collections
import contextlib
import gc
import multiprocessing
import signal
import threading
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from synthfast.data.images import ImageSet
from synthfast.data.loaders.base import Augment, Batches, Loader, Plan, Wanted, read_bytes
from synthfast.errors import SynthfastError
from synthfast.parallel import prefetch


class TorchLoader(Loader):
    """Batches through a DataLoader.

    Args:
        workers: processes that read; with 0 a thread of this one does.
    """

    kind = "torch"

    def __init__(
        self, sets: Sequence[ImageSet], device: torch.device, augment: Augment | None = None, workers: int = 0
    ) -> None:
        super().__init__(sets, device, augment)
        self.workers = workers

    def batches(self, plan: Plan, first: int, last: int) -> Batches:
        asked: collections.deque[Wanted] = collections.deque()

        def indices() -> Iterator[list[np.ndarray]]:
            for number in range(first, last):
                asked.append(plan(number))
                yield list(asked[-1].items)

        with warnings.catch_warnings():
            # More workers than CPUs, as was asked for.
            warnings.filterwarnings("ignore", message="This DataLoader will create")
            data = DataLoader(
                _Bytes(self.sets),
                batch_sampler=_Endless(indices()),  # in our order
                num_workers=self.workers,
                collate_fn=_as_it_is,
                worker_init_fn=_ignore_interrupts,
                generator=torch.Generator(),  # else a seed is drawn from the global one
                # Arrays would be copied to processes that are started otherwise.
                multiprocessing_context=_context() if self.workers else None,
            )
            running = [_started(data) if self.workers else iter(data)]

        def read(_: int) -> tuple[Wanted, Tensor, Tensor | None]:
            with _worker_errors():
                pixels = next(running[0])
            if isinstance(pixels, Exception):
                raise pixels
            wanted = asked.popleft()
            return wanted, self._pinned(pixels), self._labels(wanted)

        # Workers are ahead by themselves.
        made = prefetch(read, first, last) if self.workers == 0 else (read(number) for number in range(first, last))
        try:
            for wanted, pixels, labels in made:
                yield self._finished(pixels, labels, wanted)
        finally:
            made.close()
            running.clear()  # ends the workers


class MapStyle(ImageSet):
    """A map-style data set of PyTorch as a set of images.

    Args:
        dataset: ``dataset[i]`` is an image or a tuple that begins with one: a PIL image (L or RGB), uint8 [H, W] or [H, W, C] as
            an array, or [C, H, W] as a tensor.
        labels: integers [n]; by default ``dataset.targets``, as torchvision's sets have it, and none where there is none.
        classes: number of classes, see :class:`synthfast.data.ImageSet`.
    """

    def __init__(self, dataset: Any, name: str = "data set", labels: Any = None, classes: int | None = None) -> None:
        self._dataset = dataset
        labels = getattr(dataset, "targets", None) if labels is None else labels
        labels = None if labels is None else np.asarray(labels)
        count = len(dataset)
        shape = _pixels(dataset[0]).shape if count else (1, 1, 1)
        super().__init__(name, shape, count, labels, classes, getattr(dataset, "classes", None))

    def _read(self, indices: np.ndarray) -> np.ndarray:
        out = np.empty((len(indices), *self.shape), np.uint8)
        for slot, item in enumerate(indices.tolist()):
            try:
                pixels = _pixels(self._dataset[item])
            except SynthfastError:
                raise
            except Exception as error:  # anybody's code
                reason = " ".join(str(error).split())[:160] or type(error).__name__
                raise SynthfastError(
                    f"{self.name}: cannot read image {item} ({reason}); repair or remove it"
                ) from error
            if pixels.shape != self.shape:
                raise SynthfastError(
                    f"{self.name}: expected images {list(self.shape)} like the first, found {list(pixels.shape)} for image "
                    f"{item}; resize it"
                )
            out[slot] = pixels
        return out


def _pixels(sample: Any) -> np.ndarray:
    """uint8 [H, W, C]."""
    from PIL import Image

    image = sample[0] if isinstance(sample, (tuple, list)) else sample
    if isinstance(image, Image.Image) and image.mode not in ("L", "RGB"):  # such as a palette's numbers
        raise ValueError(f"expected a PIL image of mode L or RGB, found {image.mode}")
    pixels = image.permute(1, 2, 0).numpy() if isinstance(image, Tensor) and image.dim() == 3 else np.asarray(image)
    if pixels.dtype != np.uint8 or pixels.ndim not in (2, 3):
        raise ValueError(f"expected uint8 pixels of 2 or 3 dimensions, found {pixels.dtype} {list(pixels.shape)}")
    return pixels if pixels.ndim == 3 else pixels[..., None]


class _Bytes(Dataset):
    """Batches of several sets as one data set: an index is a list of items for each of the sets."""

    def __init__(self, sets: Sequence[ImageSet]) -> None:
        self._sets = sets

    def __len__(self) -> int:
        return sum(map(len, self._sets))

    def __getitems__(self, items: list[np.ndarray]) -> Tensor | Exception:
        """uint8 [n, H, W, C]; an error that is told in a line comes back, because DataLoader would wrap it in pages of text."""
        try:
            return read_bytes(self._sets, items)
        except (SynthfastError, OSError, MemoryError) as error:
            return error


class _Endless:
    """A batch sampler out of an iterator; DataLoader iterates over it once."""

    def __init__(self, batches: Iterator[list[np.ndarray]]) -> None:
        self._batches = batches

    def __iter__(self) -> Iterator[list[np.ndarray]]:
        return self._batches


def _as_it_is(batch: Any) -> Any:
    return batch


def _ignore_interrupts(_: int) -> None:
    """Ctrl-C reaches every process of a terminal; the one that started the workers ends them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _started(data: DataLoader) -> Iterator[Any]:
    """An iterator with its workers.

    Garbage is collected before the fork: a DALI pipeline that a worker's collection ended would wait for ever for the pipeline's
    threads, which are not there. PyTorch's handler of ended processes, which would raise its error wherever this process is,
    makes way for the one before: that a worker has ended is then found when the next batch is waited for.
    """
    on_main_thread = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGCHLD)
    gc.collect()
    try:
        return iter(data)
    finally:
        if on_main_thread and handler is not None:
            signal.signal(signal.SIGCHLD, handler)


def _context() -> Any:
    return multiprocessing.get_context("fork" if "fork" in multiprocessing.get_all_start_methods() else None)


@contextlib.contextmanager
def _worker_errors() -> Iterator[None]:
    """Around waiting for workers: one that was killed shows as one of several errors."""
    try:
        yield
    except (RuntimeError, ConnectionError, EOFError) as error:
        if isinstance(error, RuntimeError) and not str(error).startswith("DataLoader worker"):
            raise
        raise SynthfastError(
            f"--loader torch: a worker process has ended ({str(error).splitlines()[0] or type(error).__name__}); give it fewer "
            "--workers or more (shared) memory, 0 reads without processes"
        ) from error
