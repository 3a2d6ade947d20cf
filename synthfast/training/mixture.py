"""Real and synthetic images of a classifier's training: which sets, how many of each in a batch, which are held out."""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from synthfast.artifacts import load_kept, make_checkpoint_folder, save_tensors
from synthfast.config import ALL_IMAGES, ClassifierConfig
from synthfast.data import Chosen, ImageSet, ShardSet
from synthfast.data.loaders import Augment, Wanted, stream
from synthfast.data.selection import Selection, read_selection
from synthfast.distributed import Ranks
from synthfast.errors import SynthfastError, UsageError
from synthfast.models.classifiers import load_classifier
from synthfast.models.frozen import freeze
from synthfast.training.batches import EpochOrder
from synthfast.training.loop import open_in_turn

# The orders of the sets have the streams 0, 1, ...; one word, for numpy takes a seed of (s, 2**32, 0) for one of (s, 0, 1).
_HELD_OUT_STREAM = 2**32 - 1
_LABEL_BATCH = 512


@dataclass(frozen=True)
class Mixture:
    """What a classifier is trained on.

    parts: the sets a batch is drawn from, labelled, with the number of images from each; real ones first.
    orders: the passes over each part, shuffled, and by weight where a selection has weights.
    validation: real images that no part holds, or None.
    fraction: share of synthetic images in a batch.
    facts: what tells whether another run has the same data.
    """

    parts: tuple[tuple[ImageSet, int], ...]
    orders: tuple[EpochOrder, ...]
    validation: ImageSet | None
    fraction: float
    facts: dict[str, Any]

    @property
    def reference(self) -> ImageSet:
        """A set with the shape and the classes of all."""
        return self.parts[0][0]

    def wanted(self, step: int, positions: np.ndarray) -> Wanted:
        """Images of a step's batch, which is one part after the other, keyed by their positions in the run.

        ``positions``: which of the batch, int64 [n], ascending.
        """
        items, first = [], 0
        for (_, count), order in zip(self.parts, self.orders, strict=True):
            here = positions[(positions >= first) & (positions < first + count)] - first
            items.append(order[step * count : (step + 1) * count][here])
            first += count
        return Wanted(tuple(items), step * first + positions)


def open_mixture(config: ClassifierConfig, ranks: Ranks) -> Mixture:
    """The sets that ``config`` names, checked against each other, with labels and without what is held out.

    Raises UsageError for sets that do not fit each other or the batch, SynthfastError for unreadable data.
    """
    fraction, real_share, synthetic_shares = _shares(config)
    # And "selected", where there are selections, and "synthetic_shares", where they are not as equal as can be.
    facts: dict[str, Any] = {"data": [], "pseudo_labels": None}
    parts: list[tuple[ImageSet, int]] = []
    validation = None
    if real_share or config.validation:
        real = open_in_turn(config, ranks)
        facts["data"].append(real.fingerprint())
        training, validation = _held_out(real, config)
        if real_share:
            parts.append((training, real_share))
    if synthetic_shares != _largest_remainders(sum(synthetic_shares), [1.0] * len(synthetic_shares)):
        facts["synthetic_shares"] = synthetic_shares
    synthetic = [ShardSet(folder) for folder in config.synthetic[: len(synthetic_shares)]]
    facts["data"] += [images.fingerprint() for images in synthetic]
    selections = _selections(config, synthetic)
    if any(selections):
        facts["selected"] = [None if selection is None else selection.sha256 for selection in selections]
    chosen = [_chosen(images, selection, config) for images, selection in zip(synthetic, selections, strict=True)]
    if config.pseudo_labels is not None and chosen:
        keys = [*facts["data"], *facts.get("selected", [])]
        facts["pseudo_labels"], chosen = _pseudo_labelled(chosen, keys, config, ranks)
    parts += zip(chosen, synthetic_shares, strict=True)
    _check_alike([images for images, _ in parts] + ([] if validation is None else [validation]))
    of_parts = [None] * (len(parts) - len(chosen)) + selections
    orders = tuple(
        _order(len(images), selection, config.seed, stream)
        for stream, ((images, _), selection) in enumerate(zip(parts, of_parts, strict=True))
    )
    return Mixture(tuple(parts), orders, validation, fraction, facts)


class WeightedOrder(EpochOrder):
    """Endless shuffled passes in which items come in proportion to their weights.

    A pass has as many positions as there are items. Item i comes count * w_i / sum(w) times in a pass on average, in each pass
    that number rounded down or up (systematic sampling: one uniform number a pass decides). With equal weights a pass is
    :class:`EpochOrder`'s. Like there, position p depends on the seed and p alone, so that a run goes on from its step.

    Args:
        weights: float [count], finite and positive.
    """

    def __init__(self, weights: np.ndarray, seed: int, stream: int = 0) -> None:
        super().__init__(len(weights), seed, stream)
        ends = np.cumsum(weights, dtype=np.float64)
        self._ends = ends * (len(weights) / ends[-1])  # where the items end on a line as long as a pass

    def _draw(self, random: np.random.Generator) -> np.ndarray:
        shuffled = self._shuffled(random)
        # The marks u, u + 1, ..., u + count - 1 on the line; an item comes once for each mark in its stretch.
        marks = random.random() + np.arange(self.count)
        items = np.minimum(np.searchsorted(self._ends, marks, side="right"), self.count - 1)
        return items.astype(shuffled.dtype)[shuffled]


def _order(count: int, selection: Selection | None, seed: int, stream: int) -> EpochOrder:
    if selection is None or selection.weights is None:
        return EpochOrder(count, seed, stream)
    return WeightedOrder(selection.weights[:count], seed, stream)


def _selections(config: ClassifierConfig, synthetic: list[ShardSet]) -> list[Selection | None]:
    """One for each synthetic folder in use, None where all of it is."""
    if not config.selection:
        return [None] * len(synthetic)
    pairs = zip(config.selection, synthetic, strict=False)  # no folder is in use with --fraction 0
    return [None if name == ALL_IMAGES else read_selection(name, images) for name, images in pairs]


def _shares(config: ClassifierConfig) -> tuple[float, int, list[int]]:
    """The fraction, the number of real images in a batch, and that of each synthetic folder (none if there are none)."""
    fraction = config.fraction if config.fraction is not None else (0.5 if config.synthetic else 0.0)
    synthetic = round(fraction * config.batch_size)
    if (fraction > 0 and synthetic == 0) or (fraction < 1 and synthetic == config.batch_size):
        raise UsageError(
            f"--fraction {fraction:g}: {synthetic} of {config.batch_size} images a batch would be synthetic, expected at "
            "least one of each kind; enlarge --batch-size"
        )
    if synthetic == 0:
        return fraction, config.batch_size, []
    weights = config.synthetic_weight or [1.0] * len(config.synthetic)
    shares = _largest_remainders(synthetic, weights)
    if 0 in shares:
        folder = config.synthetic[shares.index(0)]
        raise UsageError(
            f"--batch-size {config.batch_size}: {len(shares)} synthetic folders share {synthetic} images a batch, expected at "
            f"least one each, found none of {folder}; enlarge it"
            + (" or the folder's --synthetic-weight" * bool(config.synthetic_weight))
        )
    return fraction, config.batch_size - synthetic, shares


def _largest_remainders(total: int, weights: Sequence[float]) -> list[int]:
    """Whole numbers that add up to ``total``, in proportion to ``weights``; the first of equals gets what is left over."""
    scaled = [weight / max(weights) for weight in weights]
    exact = [total * (weight / math.fsum(scaled)) for weight in scaled]
    shares = [math.floor(share) for share in exact]
    by_remainder = sorted(range(len(shares)), key=lambda k: shares[k] - exact[k])
    for k in by_remainder[: total - sum(shares)]:
        shares[k] += 1
    return shares


def _check_alike(sets: list[ImageSet]) -> None:
    first = sets[0]
    for images in sets:
        if images.labels is None:
            raise UsageError(
                f"{images.name}: has no labels, training a classifier needs them; choose another source, or give "
                "--pseudo-labels for synthetic images"
            )
        if images.classes is None or images.classes < 2:
            raise UsageError(
                f"{images.name}: expected images in 2 classes or more, found {images.classes}; choose another source"
            )
        if images.shape != first.shape or images.classes != first.classes:
            raise UsageError(
                f"{images.name}: expected images {list(first.shape)} in {first.classes} classes as {first.name} has, "
                f"found {list(images.shape)} in {images.classes}; choose sets that fit"
            )


def _held_out(images: ImageSet, config: ClassifierConfig) -> tuple[ImageSet, ImageSet | None]:
    """The images to train on, and the ones held out: a random part that depends on the seed."""
    if config.validation == 0:
        return images, None
    count = round(config.validation * len(images)) if config.validation < 1 else int(config.validation)
    if not 1 <= count < len(images):
        raise UsageError(
            f"--validation {config.validation:g}: {count} of the {len(images)} images of {images.name} would be held out, "
            "expected at least 1 and not all; change it"
        )
    order = EpochOrder(len(images), config.seed, _HELD_OUT_STREAM)[0 : len(images)]
    return Chosen(images, np.sort(order[count:])), Chosen(images, np.sort(order[:count]))


def _chosen(images: ImageSet, selection: Selection | None, config: ClassifierConfig) -> ImageSet:
    """The selected images, or of these the first ``synthetic_n``; all without a selection."""
    items = None if selection is None else selection.indices
    total, count = len(images) if items is None else len(items), config.synthetic_n
    if count is not None and count > total:
        if selection is not None:
            raise UsageError(f"--synthetic-n {count}: {selection.path} selects {total} images; lower it or select more")
        raise UsageError(f"--synthetic-n {count}: {images.name} holds {total} images; lower it or sample more")
    if items is None and count not in (None, total):
        items = np.arange(count)
    return images if items is None else Chosen(images, items[:count])


def _pseudo_labelled(
    sets: list[ImageSet], fingerprints: list[str], config: ClassifierConfig, ranks: Ranks
) -> tuple[str, list[ImageSet]]:
    """The SHA-256 of the classifier's weights, and the sets, those without labels with the ones it gives."""
    if not Path(str(config.pseudo_labels)).is_dir():
        raise UsageError(
            f"--pseudo-labels {config.pseudo_labels}: expected the checkpoint folder of a classifier, found no folder; "
            "check the path"
        )
    model, description = load_classifier(config.pseudo_labels, ranks.device)
    if all(images.labels is not None for images in sets):
        raise UsageError(f"--pseudo-labels {config.pseudo_labels}: all synthetic folders have labels; leave it out")
    attacked = freeze(model)
    labelled = []
    for number, images in enumerate(sets):
        if images.labels is None:
            if list(images.shape) != list(description["shape"]):
                raise UsageError(
                    f"--pseudo-labels {config.pseudo_labels}: was trained on images {list(description['shape'])}, "
                    f"{images.name} has {list(images.shape)}; choose another classifier"
                )
            key = hashlib.sha256(repr((description["sha256"], fingerprints, number, len(images))).encode())
            path = Path(config.out) / f"pseudo-labels-{key.hexdigest()[:16]}.safetensors"
            labels = _labels(attacked, images, path, config, ranks)
            images = Chosen(images, np.arange(len(images)), labels, description["classes"])
        labelled.append(images)
    return description["sha256"], labelled


def _labels(network: Any, images: ImageSet, path: Path, config: ClassifierConfig, ranks: Ranks) -> np.ndarray:
    """The class with the highest logit for each image: int64 [n]; kept in a file, so that a resumed run reads it."""
    make_checkpoint_folder(path.parent, "classifier")
    ranks.barrier()
    if path.exists():
        return load_kept(path)[0]["labels"].numpy()
    labels = torch.full((len(images),), -1)
    first_ones = range(0, len(images), _LABEL_BATCH)[ranks.rank :: ranks.world_size]
    parts = [np.arange(first, min(first + _LABEL_BATCH, len(images))) for first in first_ones]
    batches = stream(images, parts, ranks.device, Augment(), kind=config.loader, workers=config.workers)
    with torch.no_grad(), contextlib.closing(batches):
        for items, (x, _) in zip(parts, batches, strict=True):
            logits = network(x)
            if not bool(logits.isfinite().all()):
                raise SynthfastError(
                    f"images {items[0]} to {items[-1]} of {images.name}: expected finite logits, found NaN or infinity; check "
                    "the weights of --pseudo-labels"
                )
            labels[items] = logits.argmax(1).cpu()
    labels = ranks.maximum(labels)
    if ranks.is_first:
        save_tensors(path, {"labels": labels})
    ranks.barrier()
    return labels.numpy()
