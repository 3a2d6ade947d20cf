"""``synthfast score accuracy``: share of images that a classifier gets right."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from synthfast.data import ImageSet
from synthfast.errors import SynthfastError
from synthfast.evaluation.interval import share
from synthfast.training.batches import read_batch, to_unit


def require_finite(logits: torch.Tensor, items: np.ndarray, images: ImageSet) -> None:
    """SynthfastError unless the logits of these images are all finite numbers."""
    if not bool(logits.isfinite().all()):
        raise SynthfastError(
            f"images {items[0]} to {items[-1]} of {images.name}: expected finite logits, found NaN or infinity; "
            "check the classifier's weights"
        )


def predict(
    model: nn.Module, images: ImageSet, device: torch.device, batch_size: int = 512, *, count: int | None = None
) -> np.ndarray:
    """The class that ``model``, of images in [0, 1], gives each image, or each of the first ``count``: int64 [n]."""
    predictions = []
    total = len(images) if count is None else min(count, len(images))
    with torch.inference_mode():
        for first in range(0, total, batch_size):
            items = np.arange(first, min(first + batch_size, total))
            pixels, _ = read_batch(images, items)
            logits = model(to_unit(pixels, device))
            require_finite(logits, items, images)
            predictions.append(logits.argmax(1).cpu().numpy())
    return np.concatenate(predictions)


def accuracy(
    model: nn.Module, images: ImageSet, device: torch.device, *, count: int | None = None
) -> dict[str, dict[str, Any]]:
    """Accuracy of a classifier on labelled images, over all and per class, each with its interval.

    Args:
        model: in evaluation mode on ``device``; takes images in [0, 1].
        images: labelled, of the shape and classes of the model.
        count: only the first ``count`` of them.

    Returns {"metrics": {"accuracy": {...}}, "groups": {"class": {"0": {"accuracy": {...}}, ...}}} of the result format, a
    value being {"value": share in [0, 1], "ci": [low, high], "count": images}; see
    :func:`synthfast.evaluation.interval.wilson_interval`.
    """
    assert images.labels is not None
    predictions = predict(model, images, device, count=count)
    labels = images.labels[: len(predictions)]
    right = predictions == labels
    per_class = {str(k): {"accuracy": share(right[labels == k])} for k in np.unique(labels)}
    return {"metrics": {"accuracy": share(right)}, "groups": {"class": per_class}}
