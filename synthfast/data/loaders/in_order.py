"""A shard folder of tars from its first image to its last, read and decoded by DALI's ``readers.webdataset`` with our index."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from synthfast.data.loaders.base import cpus_of_rank
from synthfast.data.loaders.pipelines import copy_out, decode_files, explained, import_dali, make_pipeline, refusals
from synthfast.data.shards.shard_set import ShardSet
from synthfast.errors import SynthfastError, UsageError

_STATE = struct.Struct("<qqqqq")  # batches given, images of the set, images of a batch, rank, ranks


class InOrder:
    """An iterator over batches: (items int64 [k], images uint8 [k, H, W, C] on the device).

    Each of ``world_size`` ranks gets a stretch of the set, so that every image comes once.

    Args:
        images: a shard folder of the format wds.
        batch_size: images of a batch; the last one of a rank may have fewer.
        threads: that decode; by default as many as there are CPUs.
        state: goes on where another iterator over the same images, with the same arguments, gave :meth:`state`.

    Raises:
        UsageError: DALI is not installed, or there are more ranks than images.
        SynthfastError: an image cannot be read, or the state is of another pass.
    """

    def __init__(
        self,
        images: ShardSet,
        batch_size: int,
        device: torch.device,
        *,
        rank: int = 0,
        world_size: int = 1,
        threads: int | None = None,
        state: bytes | None = None,
    ) -> None:
        self._images, self._batch_size, self._device = images, batch_size, device
        if len(images) < world_size:  # which DALI refuses
            raise UsageError(
                f"{images.name}: expected at least one image for each of the {world_size} ranks, found {len(images)}; start fewer"
            )
        self._facts = (len(images), batch_size, rank, world_size)
        # As DALI cuts a set.
        first, last = (len(images) * part // world_size for part in (rank, rank + 1))
        self._items = np.arange(first, last)
        self._given, checkpoint = (0, None) if state is None else self._parsed(state)
        self._pipeline = self._build(rank, world_size, threads or cpus_of_rank(), checkpoint)

    def __iter__(self) -> Iterator[tuple[np.ndarray, Tensor]]:
        return self

    def __next__(self) -> tuple[np.ndarray, Tensor]:
        first = self._given * self._batch_size
        items = self._items[first : first + self._batch_size]
        if not len(items):
            raise StopIteration
        try:
            (found,) = self._pipeline.run()
        except RuntimeError as error:
            asked = self._items[first : first + 3 * self._batch_size]
            self._items = self._items[:0]  # running it again would crash
            raise explained(error, [(self._images, asked)]) from error
        pixels = torch.empty((self._batch_size, *self._images.shape), dtype=torch.uint8, device=self._device)
        copy_out(found.as_tensor(), pixels)  # the last batch is filled up
        self._given += 1
        return items, pixels[: len(items)]

    def state(self) -> bytes:
        """Where the iterator is: about 500 bytes."""
        return _STATE.pack(self._given, *self._facts) + self._pipeline.checkpoint()

    def _parsed(self, state: bytes) -> tuple[int, bytes]:
        try:
            given, *rest = _STATE.unpack_from(state)
        except struct.error:
            rest = []
        if rest != list(self._facts):
            raise SynthfastError(f"{self._images.name}: the state is of another pass over images; begin anew")
        return given, state[_STATE.size :]

    @refusals()
    def _build(self, rank: int, world_size: int, threads: int, checkpoint: Any) -> Any:
        images, fn = self._images, import_dali().fn
        pipeline = make_pipeline(
            self._batch_size, threads, self._device, enable_checkpointing=True, checkpoint=checkpoint
        )
        with pipeline:
            files = fn.readers.webdataset(
                paths=[str(path) for path in images.tar_paths],
                index_paths=[str(path) for path in images.index_paths],
                ext=[images.codec],
                missing_component_behavior="error",
                shard_id=rank,
                num_shards=world_size,
                pad_last_batch=True,  # epochs after the first are wrong without it
                name="Reader",
            )
            pipeline.set_outputs(decode_files(files, images.shape, self._device))
        try:
            pipeline.build()
        except RuntimeError as error:
            if "checkpoint" not in str(error):
                raise
            raise SynthfastError(f"{images.name}: the state is damaged; begin anew") from error
        return pipeline
