"""``synthfast score accuracy``: share of images that a classifier gets right."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import nn

from synthfast import ops
from synthfast.data import ImageSet
from synthfast.errors import UsageError
from synthfast.evaluation.interval import share
from synthfast.models.classifiers import load_classifier


def predict(model: nn.Module, images: ImageSet, device: torch.device, batch_size: int = 512) -> np.ndarray:
    """The class that ``model``, of images in [0, 1], gives each image: int64 [n]."""
    predictions = []
    with torch.inference_mode():
        for first in range(0, len(images), batch_size):
            batch = torch.from_numpy(images.read(np.arange(first, min(first + batch_size, len(images))))).to(device)
            rows = torch.arange(len(batch), device=device)
            predictions.append(model(ops.gather_augment(batch, rows, rows, 0)).argmax(1).cpu().numpy())
    return np.concatenate(predictions)


def accuracy(folder: str | Path, images: ImageSet, device: torch.device) -> dict[str, dict]:
    """Accuracy of a classifier on labelled images, over all and per class, each with its interval.

    Returns {"metrics": {"accuracy": {...}}, "groups": {"class": {"0": {"accuracy": {...}}, ...}}} of the result format, a
    value being {"value": share in [0, 1], "ci": [low, high], "count": images}; see
    :func:`synthfast.evaluation.interval.wilson_interval`.
    """
    model, config = load_classifier(folder, device)
    if images.labels is None:
        raise UsageError(f"{images.name}: has no labels, accuracy needs them; choose another source")
    if list(images.shape) != config["shape"] or images.classes != config["classes"]:
        raise UsageError(
            f"{images.name}: expected images {config['shape']} in {config['classes']} classes as {folder} was trained on, "
            f"found {list(images.shape)} in {images.classes}; choose a source that fits"
        )
    right = predict(model, images, device) == images.labels
    per_class = {str(k): {"accuracy": share(right[images.labels == k])} for k in np.unique(images.labels)}
    return {"metrics": {"accuracy": share(right)}, "groups": {"class": per_class}}
