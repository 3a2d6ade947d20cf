"""``synthfast train classifier``: supervised training on real images, synthetic ones, or a mix of both."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from synthfast.artifacts import make_checkpoint_folder, save_checkpoint
from synthfast.config import ClassifierConfig
from synthfast.data import ImageSet, ShardSet, open_images
from synthfast.distributed import Ranks
from synthfast.errors import SynthfastError, UsageError
from synthfast.models.small_cnn import SmallCNN, SmallCNNConfig
from synthfast.training.batches import EpochOrder, prefetch, read_batch, to_model
from synthfast.training.generator import Progress, Trained, not_finite


def train_classifier(config: ClassifierConfig, report: Callable[[Progress], None] | None = None) -> Trained:
    """Train a :class:`SmallCNN` with cross-entropy and leave a checkpoint folder.

    A batch holds round(fraction * batch_size) synthetic images and real ones for the rest; each kind is seen in shuffled
    passes of its own. Nothing is chosen by looking at test data: the last weights are the result.

    Raises:
        UsageError: options or sets that do not fit each other, or a folder that holds another kind of checkpoint.
        SynthfastError: unreadable data, a loss that is not finite, a disk that refuses.
    """
    ranks = Ranks(config.device)
    if ranks.world_size > 1:
        raise UsageError(f"train classifier: expected one process, found {ranks.world_size} ranks; leave torchrun out")
    device = ranks.device
    parts = _parts(config)
    make_checkpoint_folder(config.out, "classifier")
    reference = parts[0][0]
    with torch.random.fork_rng(devices=[]):  # the caller's random state stays as it is
        torch.default_generator.manual_seed(config.seed % 2**63)
        model = SmallCNN(SmallCNNConfig(reference.shape[2], reference.classes or 0))
    model.to(device).train()
    optimizer = torch.optim.SGD(
        model.parameters(), lr=config.lr, momentum=0.9, nesterov=True, weight_decay=config.weight_decay
    )
    orders = [EpochOrder(len(images), config.seed, stream) for stream, (images, _) in enumerate(parts)]

    def batch(step: int) -> tuple[Tensor, Tensor]:
        read = [
            read_batch(images, order[step * share : (step + 1) * share])
            for (images, share), order in zip(parts, orders, strict=True)
        ]
        return torch.cat([pixels for pixels, _ in read]), torch.cat([labels for _, labels in read])

    losses: list[Tensor] = []
    loss, clock, seen = math.nan, time.perf_counter(), 0
    for step, (pixels, labels) in enumerate(prefetch(batch, 0, config.steps)):
        for group in optimizer.param_groups:
            group["lr"] = config.lr * _lr_factor(step, config.steps)
        value = nn.functional.cross_entropy(model(to_model(pixels, device)), labels.to(device))
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        optimizer.step()
        losses.append(value.detach())
        seen += len(pixels)
        last = step + 1 == config.steps
        if last or time.perf_counter() - clock > 1.0:
            loss = float(torch.stack(losses).mean())
            losses.clear()
            problem = not_finite(loss, model if last else None)
            if problem is not None:
                raise SynthfastError(f"step {step + 1}: {problem}, expected finite numbers; lower --lr")
            if report is not None:
                rate = seen / (time.perf_counter() - clock)
                report(Progress(step + 1, config.steps, loss, config.batch_size, rate))
            clock, seen = time.perf_counter(), 0
    description = {
        "name": "small-cnn",
        "shape": list(reference.shape),
        "classes": reference.classes,
        "class_names": None if reference.class_names is None else list(reference.class_names),
        "model": {"name": "small-cnn", **dataclasses.asdict(model.config)},
        "training": {**dataclasses.asdict(config), "data": [images.fingerprint() for images, _ in parts]},
    }
    save_checkpoint(config.out, "classifier", description, model.state_dict())
    return Trained(config.steps, config.steps, loss)


def _parts(config: ClassifierConfig) -> list[tuple[ImageSet, int]]:
    """The sets a batch is drawn from, with the number of images from each."""
    fraction = config.fraction if config.fraction is not None else (0.5 if config.synthetic else 0.0)
    synthetic = round(fraction * config.batch_size)
    if (fraction > 0 and synthetic == 0) or (fraction < 1 and synthetic == config.batch_size):
        raise UsageError(
            f"--fraction {fraction:g}: {synthetic} of {config.batch_size} images a batch would be synthetic, expected at "
            "least one of each kind; enlarge --batch-size"
        )
    parts: list[tuple[ImageSet, int]] = []
    if synthetic < config.batch_size:
        real = open_images(config.dataset, data_dir=Path(config.data_dir), download=config.download)
        parts.append((real, config.batch_size - synthetic))
    if synthetic > 0:
        folders = [ShardSet(folder) for folder in config.synthetic]
        shares = [synthetic // len(folders) + (k < synthetic % len(folders)) for k in range(len(folders))]
        if 0 in shares:
            raise UsageError(
                f"--batch-size {config.batch_size}: {len(folders)} synthetic folders share {synthetic} images a batch, "
                "expected at least one each; enlarge it"
            )
        parts += zip(folders, shares, strict=True)
    first = parts[0][0]
    for images, _ in parts:
        if images.labels is None:
            raise UsageError(f"{images.name}: has no labels, training a classifier needs them; choose another source")
        if images.shape != first.shape or images.classes != first.classes:
            raise UsageError(
                f"{images.name}: expected images {list(first.shape)} in {first.classes} classes as {first.name} has, "
                f"found {list(images.shape)} in {images.classes}; choose sets that fit"
            )
    return parts


def _lr_factor(step: int, steps: int) -> float:
    """Linear rise over a tenth of the steps, then a cosine to 0."""
    rise = max(1, steps // 10)
    if step < rise:
        return (step + 1) / rise
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))
