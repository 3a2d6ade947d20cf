"""``synthfast score accuracy``: share of images that a classifier gets right."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import nn

from synthfast.artifacts import load_checkpoint
from synthfast.data import ImageSet
from synthfast.errors import SynthfastError, UsageError
from synthfast.evaluation.interval import share
from synthfast.models.small_cnn import SmallCNN, SmallCNNConfig
from synthfast.training.batches import to_model


def load_classifier(folder: str | Path, device: torch.device) -> tuple[nn.Module, dict[str, object]]:
    """A classifier of ``synthfast train classifier``, in evaluation mode, and its configuration."""
    config, tensors = load_checkpoint(folder, "classifier")
    try:
        sizes = dict(config["model"])
        sizes.pop("name")
        model = SmallCNN(SmallCNNConfig(**{**sizes, "widths": tuple(sizes["widths"])}))
        model.load_state_dict(tensors)
        shape, classes = config["shape"], config["classes"]
        if (
            not isinstance(shape, list)
            or len(shape) != 3
            or (shape[2], classes) != (sizes["channels"], sizes["classes"])
        ):
            raise ValueError(f"images {shape} in {classes} classes")
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise SynthfastError(f"{folder}: the weights do not fit config.json ({reason}); train again") from error
    return model.to(device).eval(), config


def predict(model: nn.Module, images: ImageSet, device: torch.device, batch_size: int = 512) -> np.ndarray:
    """The class that ``model`` gives each image: int64 [n]."""
    predictions = []
    with torch.inference_mode():
        for first in range(0, len(images), batch_size):
            batch = torch.from_numpy(images.read(np.arange(first, min(first + batch_size, len(images)))))
            predictions.append(model(to_model(batch, device)).argmax(1).cpu().numpy())
    return np.concatenate(predictions)


def accuracy(folder: str | Path, images: ImageSet, device: torch.device) -> dict[str, dict]:
    """Accuracy of a classifier on labelled images, over all and per class, each with its interval.

    Returns {"metrics": {"accuracy": {...}}, "groups": {"class": {"0": {"accuracy": {...}}, ...}}} of the result format, a value
    being {"value": share in [0, 1], "ci": [low, high], "count": images}; see :func:`synthfast.evaluation.interval.wilson_interval`.
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
