"""Batches of images in a given order, from memory, through DALI or through PyTorch's DataLoader (``open_loader``)."""

from synthfast.data.loaders.base import Augment, Batch, Batches, Loader, Plan, Wanted
from synthfast.data.loaders.choose import open_loader, stream
from synthfast.data.loaders.device import resident
from synthfast.data.loaders.workers import MapStyle

__all__ = [
    "Augment",
    "Batch",
    "Batches",
    "Loader",
    "MapStyle",
    "Plan",
    "Wanted",
    "open_loader",
    "resident",
    "stream",
]
