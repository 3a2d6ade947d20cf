"""``synthfast sample``: an index range to shards, on any number of ranks, interrupted and resumed at will."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from synthfast import __version__, ops
from synthfast.config import SampleConfig
from synthfast.data import ShardFolder, ShardSet
from synthfast.data.formats.codec import DEFAULT_QUALITY
from synthfast.data.formats.png import COLOUR_TYPES
from synthfast.data.grids import grid_png
from synthfast.data.shards.manifest import Span
from synthfast.data.storage.places import Folder, join, write_bytes
from synthfast.distributed import Ranks
from synthfast.errors import SynthfastError, UsageError
from synthfast.parallel import in_order
from synthfast.sampling.generators import Generator, load_generator
from synthfast.sampling.labels import LabelPlan

PREVIEW = "preview.png"
_PREVIEW_ROWS = 8
_LARGEST_NPY = 64  # pixels on a side: larger images are written as tars unless the user says otherwise
_STORAGE_KEYS = ("format", "codec", "quality")
# What the manifest's keys are called on the command line, for the message about a folder made by another command.
_OPTIONS = {
    "n": "--n",
    "shard_size": "--shard-size",
    "batch_size": "--batch-size",
    "seed": "--seed",
    "labels": "--labels",
    "guidance": "--guidance",
    "precision": "--precision",
    "compile": "--compile",
    "device": "--device",
    "format": "--format",
    "codec": "--codec",
    "quality": "--quality",
    "solver.name": "--solver",
    "shape": "--generator (its image shape)",
    "classes": "--generator (its classes)",
    "generator.name": "--generator",
    "generator.sha256": "--generator (its weights)",
    "synthfast": "the version of synthfast",
}


@dataclass(frozen=True)
class Progress:
    """``done`` of ``total`` images over all ranks; ``images_per_second`` and ``seconds_left`` from this run alone."""

    done: int
    total: int
    images_per_second: float
    seconds_left: float


@dataclass(frozen=True)
class Sampled:
    """What a run left: the folder, its preview picture, images it held before and images made now, and the seconds."""

    path: Folder
    preview: Folder
    kept: int
    made: int
    seconds: float


def generate(config: SampleConfig, ranks: Ranks, report: Callable[[Progress], None] | None = None) -> Sampled:
    """Sample ``config.n`` images into a shard folder, or complete one that an earlier run of the same command began.

    Shards are the unit of work: those that are missing are dealt out to the ranks in turn, and cut into batches in the same way
    on any number of ranks, so the files do not depend on it. A shard appears whole or not at all.

    Args:
        config: see :class:`synthfast.config.SampleConfig`.
        ranks: entered; every rank calls this with the same configuration.
        report: called on rank 0 after each batch.

    Raises:
        UsageError: options that do not fit the generator, or a folder made by another command.
        SynthfastError: weights or disk at fault, or images that are not finite.
    """
    generator = load_generator(config, ranks.device)
    plan = _label_plan(config, generator)
    batch_size = config.batch_size or (128 if ranks.device.type == "cpu" else 1024)
    request = _request(config, generator, batch_size, ranks.device)
    options = {**_OPTIONS, **{f"solver.{key}": "--" + key.replace("_", "-") for key in request.get("solver") or {}}}
    options["solver.name"] = "--solver"
    folder = _open(config.out, request, options, ranks)
    with folder:
        # Rank 0 looks for all: on network file systems others may see an older folder.
        pending = ranks.from_first(lambda: list(folder.pending()))
        to_make = sum(span.count for span in pending)
        meter = _Meter(config.n, to_make, ranks, report)
        mine = pending[ranks.rank :: ranks.world_size]
        _make_shards(folder, mine, generator, plan, config.seed, batch_size, ranks.device, meter)
        ranks.barrier()
        if ranks.is_first:
            folder.finish()
            _write_preview(folder.path, plan)
        ranks.barrier()
    return Sampled(folder.path, join(folder.path, PREVIEW), config.n - to_make, to_make, meter.seconds)


def _label_plan(config: SampleConfig, generator: Generator) -> LabelPlan | None:
    if generator.classes is not None:
        return LabelPlan.parse(config.labels, generator.classes)
    if config.labels != "balanced":
        raise UsageError(f"--labels {config.labels}: {generator.name} has no classes, expected no labels; leave it out")
    return None


def _request(config: SampleConfig, generator: Generator, batch_size: int, device: torch.device) -> dict[str, Any]:
    """Everything that the content of the set depends on, in the manifest's order."""
    first = {
        "n": config.n,
        "shape": list(generator.shape),
        "classes": generator.classes,
        "shard_size": config.shard_size,
        "generator": {"name": generator.name, "sha256": getattr(generator, "fingerprint", None)},
        "seed": config.seed,
        "labels": None if generator.classes is None else config.labels,
    }
    storage = _storage(config, generator)
    last = {
        "batch_size": batch_size,
        "precision": config.precision,
        "compile": config.compile,
        "device": device.type,
        "synthfast": __version__,
    }
    facts = getattr(generator, "facts", {})
    for key in facts:
        if key in first or key in last or key in _STORAGE_KEYS:
            raise SynthfastError(f"{generator.name}: its facts have the key '{key}', which the sampler uses; rename it")
    return {**first, **storage, **facts, **last}


def _storage(config: SampleConfig, generator: Generator) -> dict[str, Any]:
    """The keys of a request that say how images are stored; none for npy."""
    height, width, channels = generator.shape
    size = f"{generator.name} makes images of {height}x{width}x{channels}"
    storable = channels in COLOUR_TYPES
    wds = max(height, width) > _LARGEST_NPY and storable if config.format is None else config.format == "wds"
    if not wds:
        if config.codec is not None:
            raise UsageError(f"--codec {config.codec}: {size}, which are written as npy; add --format wds")
        return {}
    if not storable:
        raise UsageError(f"--format wds: {size}, expected 1 or 3 channels; use --format npy")
    if config.codec != "jpg":
        return {"format": "wds", "codec": "png"}
    return {"format": "wds", "codec": "jpg", "quality": DEFAULT_QUALITY if config.quality is None else config.quality}


def _open(path: str, request: dict[str, Any], options: dict[str, str], ranks: Ranks) -> ShardFolder:
    """Rank 0 makes or resumes the folder; the others join when it is there, or stop with the same error."""
    folder = ranks.on_first(lambda: ShardFolder.create_or_resume(path, request, options=options))
    return folder if folder is not None else ShardFolder.join(path, request, options=options)


class _Meter:
    """Counts images over all ranks and tells rank 0's listener how fast it goes."""

    def __init__(self, total: int, to_make: int, ranks: Ranks, report: Callable[[Progress], None] | None) -> None:
        self._total, self._to_make, self._ranks, self._report = total, to_make, ranks, report
        self._start = time.perf_counter()
        self._first: tuple[float, int] | None = None  # after the first batch, which also pays for warming up

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._start

    def add(self, images: int) -> None:
        made = self._ranks.add("images", images)
        if self._report is None or not self._ranks.is_first:
            return
        now = self.seconds
        if self._first is None:
            self._first = (now, made)
        since, base = self._first if made > self._first[1] else (0.0, 0)
        rate = (made - base) / max(now - since, 1e-9)
        left = (self._to_make - made) / rate
        self._report(Progress(self._total - self._to_make + made, self._total, rate, left))


def _make_shards(
    folder: ShardFolder,
    spans: list[Span],
    generator: Generator,
    plan: LabelPlan | None,
    seed: int,
    batch_size: int,
    device: torch.device,
    meter: _Meter,
) -> None:
    def make(rows: range) -> _Batch:
        index = torch.arange(rows.start, rows.stop, device=device)
        labels = None if plan is None else plan.labels(index, seed)
        return _Batch(_checked(generator, generator.sample(index, labels, seed), len(index)), labels, rows.start)

    def rows_of(span: Span) -> Iterator[range]:
        end = span.first + span.count
        return (range(first, min(first + batch_size, end)) for first in range(span.first, end, batch_size))

    # A thread a batch: so the files do not depend on the number of threads, as they do not on that of ranks.
    threads = torch.get_num_threads() if device.type == "cpu" and getattr(generator, "concurrent", False) else 1
    with contextlib.closing(in_order(make, (rows for span in spans for rows in rows_of(span)), threads)) as batches:
        for span in spans:
            with folder.writer(span.index) as writer:
                for _ in rows_of(span):
                    meter.add(next(batches).write(writer.append))
                writer.commit()


class _Batch:
    """A batch on its way from the device to the disk."""

    def __init__(self, images: Tensor, labels: Tensor | None, first: int) -> None:
        self._first = first
        self._finite = _to_host(images.isfinite().all())
        self._images = _to_host(ops.quantize_uint8(images))
        self._labels = None if labels is None else _to_host(labels)
        self._ready = None
        if images.is_cuda:
            self._ready = torch.cuda.Event()
            self._ready.record()

    def write(self, append: Callable[[np.ndarray, np.ndarray | None], None]) -> int:
        if self._ready is not None:
            self._ready.synchronize()
        if not self._finite:
            raise SynthfastError(
                f"batch of image {self._first}: expected finite pixels, found NaN or infinity; "
                "check the generator's weights, or lower --guidance"
            )
        append(self._images.numpy(), None if self._labels is None else self._labels.numpy())
        return len(self._images)


def _to_host(tensor: Tensor) -> Tensor:
    """The tensor on the CPU; from a GPU a copy that is complete once an event recorded afterwards is."""
    if not tensor.is_cuda:
        return tensor
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)


def _checked(generator: Generator, images: Tensor, count: int) -> Tensor:
    height, width, channels = generator.shape
    expected = [count, channels, height, width]
    if not isinstance(images, Tensor) or not images.is_floating_point() or list(images.shape) != expected:
        found = f"{images.dtype} {list(images.shape)}" if isinstance(images, Tensor) else type(images).__name__
        raise SynthfastError(
            f"{generator.name}: sample() must give a float tensor {expected}, found {found}; correct it"
        )
    return images


def _write_preview(folder: Folder, plan: LabelPlan | None) -> None:
    """The first images; with balanced labels a column a class."""
    columns = min(len(plan.cycle) if plan is not None and len(plan.cycle) > 1 else 10, 20)
    images = ShardSet(folder)
    first = images.read(np.arange(min(len(images), columns * _PREVIEW_ROWS)))
    write_bytes(folder, PREVIEW, grid_png(first, columns))
