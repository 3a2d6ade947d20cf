"""The loader ``dali``: NVIDIA DALI decodes png and jpg, crops and mirrors, on a GPU where there is one.

The order is the caller's, so that going on from a step needs no state of a pipeline: what a batch holds is fed to it. Crops and
flips are computed from the run's Philox keys and done inside the pipeline, on bytes; the result is that of ``gather_augment`` bit
for bit. Only jpg on a GPU, where nvJPEG decodes, may differ from what ``read`` gives, by a few levels of 255.
"""

from __future__ import annotations

import collections
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from synthfast import ops
from synthfast.data.images import ImageSet
from synthfast.data.loaders.base import Augment, Batches, Loader, Plan, Wanted, cpus_of_rank, read_bytes
from synthfast.data.loaders.encoded import encoded_images, plain_images
from synthfast.data.loaders.in_order import InOrder
from synthfast.data.loaders.pipelines import (
    AHEAD,
    copy_out,
    decode_files,
    explained,
    import_dali,
    make_pipeline,
    refusals,
)
from synthfast.data.shards.shard_set import ShardSet
from synthfast.errors import UsageError
from synthfast.parallel import prefetch


class DaliLoader(Loader):
    """Batches through DALI pipelines: one for the sets whose files it decodes, one for those that are read as bytes.

    Args:
        threads: of each pipeline; by default as many as there are CPUs.

    Attributes:
        encoded: for each set what gives its files; None for one that is read as bytes.
    """

    kind = "dali"

    def __init__(
        self,
        sets: Sequence[ImageSet],
        device: torch.device,
        augment: Augment | None = None,
        threads: int | None = None,
    ) -> None:
        super().__init__(sets, device, augment)
        if self.shape[2] not in (1, 3):
            raise UsageError(
                f"--loader dali: expected grey or RGB images, found {self.shape[2]} channels; take --loader device or torch"
            )
        import_dali()
        self.threads = threads or cpus_of_rank()
        self.encoded = [encoded_images(images) for images in sets]

    def batches(self, plan: Plan, first: int, last: int) -> Batches:
        plan = _remembered(plan)
        flows = []
        for decode in (False, True):
            numbers = [k for k, encoded in enumerate(self.encoded) if (encoded is not None) == decode]
            if numbers:
                flows.append(_Flow(self, numbers, decode, map(plan, range(first, last))))

        def make(number: int) -> tuple[Wanted, Tensor, Tensor | None]:
            wanted = plan(number)
            found = [flow.take(wanted) for flow in flows]
            return wanted, found[0] if len(flows) == 1 else _merged(flows, found, wanted), self._labels(wanted)

        made = prefetch(make, first, last)
        try:
            for wanted, pixels, labels in made:
                yield self._finished(pixels, labels, wanted, augmented=True)
        finally:
            made.close()
            for flow in flows:
                flow.close()

    def in_order(self, images: ShardSet, batch_size: int) -> Batches:
        """All images of one of the sets, which is a shard folder of tars, from the first to the last, neither cropped nor
        mirrored."""
        source = InOrder(images, batch_size, self.device, threads=self.threads)

        def make(_: int) -> tuple[Wanted, Tensor, Tensor | None]:
            items, pixels = next(source)
            wanted = Wanted((items,))
            return wanted, pixels, self._labels(wanted)

        for wanted, pixels, labels in prefetch(make, 0, -(-len(images) // batch_size)):
            yield self._finished(pixels, labels, wanted, augmented=True)


class _Flow:
    """A pipeline and the sets that go through it.

    Args:
        numbers: of the sets, ascending.
        decode: whether it gets their files, or their bytes.
        batches: what will be asked of :meth:`take`, in order.
    """

    def __init__(self, loader: DaliLoader, numbers: Sequence[int], decode: bool, batches: Iterator[Wanted]) -> None:
        self.numbers, self._loader, self._decode, self._batches = numbers, loader, decode, batches
        self._under_way: collections.deque[Wanted] = collections.deque()
        self._pipeline: Any = None
        self._too_large: Wanted | None = None  # a batch that the pipeline was not made for

    def take(self, wanted: Wanted) -> Tensor:
        """The images of the next batch, uint8 [k, H, W, C] on the device, one set after the other."""
        count, loader = self._count(wanted), self._loader
        pixels = torch.empty((count, *loader.shape), dtype=torch.uint8, device=loader.device)
        if count == 0:
            return pixels
        if self._pipeline is None:
            self._pipeline = _pipeline(loader, self._decode, count, self._fed(count))
        try:
            (found,) = self._pipeline.run()
        except StopIteration:  # it was made for smaller batches
            self._pipeline = None
            return self.take(wanted)
        except RuntimeError as error:
            asked = [(loader.sets[k], under_way.items[k]) for under_way in self._under_way for k in self.numbers]
            raise explained(error, asked) from error
        self._under_way.popleft()
        copy_out(found.as_tensor(), pixels)
        return pixels

    def close(self) -> None:
        """Let go of the pipeline, which knows this object."""
        self._pipeline = None

    def _count(self, wanted: Wanted) -> int:
        return sum(len(wanted.items[k]) for k in self.numbers)

    def _fed(self, most: int) -> Iterator[tuple[Any, ...]]:
        """Files or bytes of the images of each batch, and what :func:`draw_crops` gives; ends before one with more images."""
        loader = self._loader
        for wanted in itertools.chain([self._too_large] if self._too_large else [], self._batches):
            count = self._count(wanted)
            if count == 0:
                continue
            if count > most:
                self._too_large = wanted
                return
            images: Any = []
            if self._decode:
                for k in self.numbers:
                    images += plain_images(loader.sets[k], loader.encoded[k], wanted.items[k])
            else:
                sets, items = zip(*((loader.sets[k], wanted.items[k]) for k in self.numbers), strict=True)
                images = read_bytes(sets, items).numpy()
            drawn: list[np.ndarray] = []
            if wanted.index is not None:
                ends = np.cumsum([0, *map(len, wanted.items)])
                index = np.concatenate([wanted.index[ends[k] : ends[k + 1]] for k in self.numbers])
                drawn = draw_crops(index, loader.augment or Augment())
            self._under_way.append(wanted)
            yield images, *drawn


def _merged(flows: Sequence[_Flow], found: Sequence[Tensor], wanted: Wanted) -> Tensor:
    """What several pipelines gave, in the order of the sets."""
    parts = {}
    for flow, pixels in zip(flows, found, strict=True):
        parts |= dict(zip(flow.numbers, pixels.split([len(wanted.items[k]) for k in flow.numbers]), strict=True))
    return torch.cat([parts[k] for k in sorted(parts)])


@refusals()
def _pipeline(loader: DaliLoader, decode: bool, batch_size: int, source: Iterator[tuple[Any, ...]]) -> Any:
    """A pipeline from what ``source`` yields to the bytes of images, cropped and mirrored."""
    augment, dali = loader.augment or Augment(), import_dali()
    fn, types = dali.fn, dali.types
    fed = [(types.UINT8, 1, "") if decode else (types.UINT8, 3, "HWC")]
    fed += [(types.INT32, 1, "")] if augment.crop else []
    fed += [(types.INT32, 0, "")] if augment.flip else []
    dtype, ndim, layout = map(list, zip(*fed, strict=True))
    pipeline = make_pipeline(batch_size, loader.threads, loader.device)
    with pipeline:
        images, *drawn = fn.external_source(
            source=source, num_outputs=len(fed), batch=True, dtype=dtype, ndim=ndim, layout=layout
        )
        if decode:
            images = decode_files(images, loader.shape, loader.device)
        elif loader.device.type == "cuda":
            images = images.gpu()
        if augment.crop:
            shape = loader.shape[:2]
            images = fn.slice(
                images, start=drawn[0], shape=shape, axes=[0, 1], out_of_bounds_policy="pad", fill_values=0
            )
        if augment.flip:
            images = fn.flip(images, horizontal=drawn[-1])
        pipeline.set_outputs(images)
    pipeline.build()
    return pipeline


def draw_crops(index: np.ndarray, augment: Augment) -> list[np.ndarray]:
    """What ``gather_augment`` draws for the keys int64 [n]: where each crop begins, int32 [n, 2] in [-crop, crop], and whether
    the image is mirrored, int32 [n]; each only where ``augment`` asks for it.
    """
    # The words' upper 24 bits as fractions, so that products are exact in float64.
    u = ops.philox_uniform_(
        torch.empty(len(index), 3), torch.from_numpy(index), augment.seed, ops.Stream.AUGMENT
    ).numpy()
    start = (u[:, :2].astype(np.float64) * (2 * augment.crop + 1)).astype(np.int32) - np.int32(augment.crop)
    mirrored = (u[:, 2] < 0.5).astype(np.int32)
    return [start] * bool(augment.crop) + [mirrored] * augment.flip


def _remembered(plan: Plan) -> Plan:
    """A plan that several ask, each for ascending numbers and at most a few apart, without being made more than once."""
    known: dict[int, Wanted] = {}

    def ask(number: int) -> Wanted:
        if number not in known:
            known[number] = plan(number)
            known.pop(number - 4 * AHEAD, None)
        return known[number]

    return ask
