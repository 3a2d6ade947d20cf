"""What ``synthfast score samples`` knows of an image: one class for each score."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from synthfast.artifacts import load_tensors, save_tensors
from synthfast.assets import DIGITS_CLASSIFIER
from synthfast.attacks.pgd import pgd_maximize
from synthfast.config import SamplesConfig
from synthfast.data import Chosen, ImageSet, ShardSet, open_images
from synthfast.data.loaders import Augment, Batch, stream
from synthfast.distributed import Ranks
from synthfast.errors import UsageError
from synthfast.models.classifiers import load_classifier
from synthfast.models.frozen import Frozen, freeze
from synthfast.parallel import in_order
from synthfast.scoring.coding import require_same_coding
from synthfast.scoring.discriminator import (
    DiscriminatorSettings,
    TrainingSets,
    make_network,
    train_discriminator,
)
from synthfast.scoring.features import DIGITS_SHAPE, Features, load_features, split
from synthfast.scoring.memorization import Memorization, check_enough, check_null_share
from synthfast.scoring.neighbours import k_nearest, kth_distances, within_counts
from synthfast.selection.score_files import ScoreFolder

L2_RADIUS = 0.02  # of the discriminators, for 8x8 grey images
_SCORING = 1  # raised whenever the same facts would give other numbers
_VALIDATION_SHARE, _MOST_VALIDATION = 0.2, 1000
_ALIGNED_BY = 1000  # images that say how the margins of the two discriminators compare
_FOLD_STREAM, _REAL_STREAM = 31, 32
_FLIPPED = ("cifar10", "cifar100", "celeba", "imagenet")

Columns = dict[str, np.ndarray]
Tell = Callable[[str, int, int], None]
"""Called with what is being done, how far it is, and in all."""


class Sources:
    """Real images of a command, each opened and hashed once."""

    def __init__(self, config: SamplesConfig, images: ImageSet) -> None:
        self._config, self._images = config, images
        self._known: dict[str, tuple[ImageSet, str]] = {}
        self.opened: dict[str, ImageSet] = {}

    def _open(self, role: str, source: str, option: str) -> tuple[ImageSet, str]:
        """The images and their fingerprint; UsageError unless they are of the size of the synthetic ones."""
        if source not in self._known:
            config = self._config
            found = open_images(source, data_dir=Path(config.data_dir), image_size=config.image_size)
            if found.shape != self._images.shape:
                raise UsageError(
                    f"{option} {source}: expected images {list(self._images.shape)} like {self._images.name}, found "
                    f"{list(found.shape)}; choose a source that fits"
                )
            require_same_coding(found, self._images, allow=config.allow_lossy)
            self._known[source] = found, found.fingerprint()
        self.opened[role] = self._known[source][0]
        return self._known[source]

    def real(self) -> tuple[ImageSet, str]:
        return self._open("real", self._config.real, "--real")

    def train(self) -> tuple[ImageSet, str]:
        source = self._config.train_set
        return self.real() if source is None else self._open("train_set", source, "--train-set")


class Scorer(ABC):
    """One score. The constructor opens what it needs and says what it depends on; only then is it computed, if it must be.

    Attributes:
        name: of the score.
        facts: what the numbers depend on beside the images.
        notes: what was found; complete after ``score`` was called for all images.
        files: files that the result names as inputs.
    """

    name: str

    def __init__(self, config: SamplesConfig, images: ShardSet, sources: Sources, ranks: Ranks) -> None:
        self.config, self.images, self.ranks, self.device = config, images, ranks, ranks.device
        self.batch_size = config.batch_size or (256 if ranks.device.type == "cpu" else 1024)
        self.threads = torch.get_num_threads() if ranks.device.type == "cpu" else 1
        self.notes: dict[str, Any] = {}
        self.files: dict[str, Path] = {}
        self.facts = {"scoring": _SCORING, **self.open(sources)}

    @abstractmethod
    def open(self, sources: Sources) -> dict[str, Any]:
        """Open what is needed; return the facts."""

    @abstractmethod
    def prepare(self, folder: ScoreFolder, tell: Tell) -> None:
        """What is done once, before the images."""

    @abstractmethod
    def score(self, items: np.ndarray) -> Columns:
        """The columns of the images ``items`` (int64 [k]): arrays [k]."""

    def leftovers(self, folder: ScoreFolder) -> list[Path]:
        """Files that ``prepare`` may leave in the folder, which are of no use once the score is there."""
        return []

    @abstractmethod
    def metrics(self, columns: Mapping[str, np.ndarray], notes: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """What the tables summarise, by metric: arrays [n], bool for shares."""

    def warnings(self, notes: Mapping[str, Any]) -> list[str]:
        return []

    def batches(self, items: np.ndarray, make: Callable[[Batch], tuple[Tensor, ...]]) -> list[np.ndarray]:
        """``make`` of every batch of ``items``, images in [0, 1], a batch a thread, as one array for each of what it returns."""
        with contextlib.closing(stream(self.images, split(items, self.batch_size), self.device, Augment())) as read:
            parts = list(in_order(make, read, self.threads))
        return [torch.cat(tensors).cpu().numpy() for tensors in zip(*parts, strict=True)]

    def feature_tensor(self, features: Features, images: ImageSet) -> Tensor:
        """Features of a whole set, which the ranks share the work of, on the device."""
        return features.compute(images, self.ranks, self.config.batch_size).to(self.device)

    def features_of(self, features: Features, items: np.ndarray) -> Tensor:
        parts = features.stream(self.images, split(items, self.config.batch_size or features.batch_size))
        return torch.cat([part for _, part in parts])


class _Discriminator(Scorer):
    """The margin real minus synthetic of robust discriminators, each scoring the half of the images that it did not train on.

    Sehwag et al. (2022, arXiv:2104.09425) rank generators, and choose samples, by how well robust discriminators tell them from
    real images. The synthetic images are cut into two random halves; a discriminator is trained on each half and all real images
    but some that choose its state, as for ARC at one radius. An image's score is the least margin that PGD finds in the ball
    around it, by the discriminator of the other half: positive means that all of the ball, as far as PGD can tell, looks real.

    The two networks need not agree on the scale of logits. Since the halves are random, their margins must be distributed
    alike, so the second's are moved and stretched to the first's median and interquartile range, as measured on up to 1,000
    images of each half.
    """

    name = "discriminator"

    def open(self, sources: Sources) -> dict[str, Any]:
        config = self.config
        self.real, fingerprint = sources.real()
        self.eps = default_radius(self.images.shape, config.norm) if config.eps is None else config.eps
        kind = config.real.partition(":")[0]
        self.settings = DiscriminatorSettings(
            norm=config.norm,
            steps=config.discriminator_steps,
            batch_size=64,
            crop=4 if self.images.shape[:2] == (32, 32) else 0,
            flip=kind in _FLIPPED,
            seed=config.seed,
        )
        least = 8
        for images, option in ((self.real, "--real"), (self.images, "--synthetic")):
            if len(images) < 2 * least:
                raise UsageError(
                    f"{option} {images.name}: a discriminator needs at least {2 * least} images, found {len(images)}; take more"
                )
        return {
            "real": fingerprint,
            "eps": self.eps,
            "attack_steps": config.attack_steps,
            **{f"training_{key}": value for key, value in dataclasses.asdict(self.settings).items()},
        }

    def prepare(self, folder: ScoreFolder, tell: Tell) -> None:
        random = [np.random.default_rng([self.config.seed % 2**64, k]) for k in (_FOLD_STREAM, _REAL_STREAM)]
        order, real_order = random[0].permutation(len(self.images)), random[1].permutation(len(self.real))
        halves = np.array_split(order, 2)
        self.half_of = np.zeros(len(self.images), np.uint8)
        self.half_of[halves[1]] = 1
        sets = [self._sets(half, items, real_order) for half, items in enumerate(halves)]
        paths = self.leftovers(folder)
        key = {"facts": json.dumps(self.facts), "images": self.images.fingerprint()}
        for half in range(self.ranks.rank, 2, self.ranks.world_size):
            self._train(half, sets[half], paths[half], key, tell)
        self.ranks.barrier()
        self.networks: list[Frozen] = []
        for half, path in enumerate(paths):
            network = make_network(sets[half], self.settings)
            network.load_state_dict(load_tensors(path))
            self.networks.append(freeze(network.eval()))
        self.scale: list[tuple[tuple[float, float], ...]] = [((0.0, 1.0), (0.0, 1.0))] * 2
        measured = []
        for half in range(2):
            sample = np.sort(halves[half][:_ALIGNED_BY])
            margins = self.batches(sample, lambda batch, judge=1 - half: self._margins(batch, judge))
            quartiles = [np.quantile(each.astype(np.float64), (0.25, 0.5, 0.75)) for each in margins]
            measured.append([(float(middle), float(high - low)) for low, middle, high in quartiles])
        self.scale = [measured[0], measured[1]]
        self.notes = {"eps": self.eps, "norm": self.config.norm, "halves": [_read_state(path, key) for path in paths]}

    def _sets(self, half: int, items: np.ndarray, real_order: np.ndarray) -> TrainingSets:
        """The first of the real images in this order choose the state of the first network, the next ones that of the second."""
        count = min(round(_VALIDATION_SHARE * min(len(self.real), len(items))), _MOST_VALIDATION)
        held_out = real_order[half * count : (half + 1) * count]
        rest = np.concatenate([real_order[: half * count], real_order[(half + 1) * count :]])
        # No more than training can look at.
        most = self.settings.steps * self.settings.batch_size // 2
        return TrainingSets.read(
            Chosen(self.real, rest[:most]),
            Chosen(self.images, items[count : count + most]),
            Chosen(self.real, held_out),
            Chosen(self.images, items[:count]),
            self.device,
        )

    def _train(self, half: int, sets: TrainingSets, path: Path, key: Mapping[str, str], tell: Tell) -> None:
        """Train one network into ``path``, unless an interrupted call left it there.

        Under attack from the start, networks may not learn to tell images apart that are much alike: they are trained without
        one first.
        """
        if _read_state(path, key) is not None:
            return
        steps = self.settings.steps
        radii = [0.0] if self.eps == 0 else [0.0, self.eps]
        start, clean = None, 0.0
        for number, radius in enumerate(radii):

            def done(step: int, before: int = number * steps) -> None:
                tell(f"training discriminator {half + 1} of 2", before + step, len(radii) * steps)

            result = train_discriminator(sets, radius, self.settings, start=start, report=done)
            start = result.network.state_dict()
            clean = result.validation_accuracy if number == 0 else clean
        held_out = len(sets.real_validation) + len(sets.synthetic_validation)
        found = {
            "validation_accuracy": result.validation_accuracy,
            "training_accuracy": result.training_accuracy,
            "validation_images": held_out,
            "clean_validation_accuracy": clean,
            "steps": result.steps,
            "best_step": result.best_step,
            # By two standard errors on images that neither the weights nor, but for the state's choice, anything else has seen.
            "beats_chance": result.validation_accuracy > 0.5 + 1 / math.sqrt(held_out),
        }
        _write_state(path, result.network.state_dict(), key, found)

    def _margins(self, batch: Batch, half: int) -> tuple[Tensor, Tensor]:
        """The worst margin in the ball and that of the image itself, by one of the networks: float32 [k] each."""
        network = self.networks[half]
        x = batch.images

        def loss(images: Tensor) -> Tensor:
            logits = network(images)
            return logits[:, 0] - logits[:, 1]

        with torch.no_grad():
            clean = -loss(x)
            if self.eps == 0 or self.config.attack_steps == 0:
                return clean, clean
            steps = self.config.attack_steps
            step_size = min(1.0, 2.5 / steps) * self.eps
            attacked = pgd_maximize(loss, x, x, norm=self.config.norm, eps=self.eps, step_size=step_size, steps=steps)
            return torch.minimum(clean, -loss(attacked)), clean

    def score(self, items: np.ndarray) -> Columns:
        found = np.zeros((2, len(items)), np.float32)
        for half in range(2):
            here = np.flatnonzero(self.half_of[items] == half)
            if not len(here):
                continue
            margins = self.batches(items[here], lambda batch, judge=1 - half: self._margins(batch, judge))
            for kind, each in enumerate(margins):
                (middle, spread), (to_middle, to_spread) = self.scale[half][kind], self.scale[0][kind]
                factor = to_spread / spread if spread > 0 and to_spread > 0 else 1.0
                found[kind, here] = each if half == 0 else to_middle + (each - middle) * factor
        return {"discriminator": found[0], "discriminator_clean": found[1]}

    def leftovers(self, folder: ScoreFolder) -> list[Path]:
        return [folder.path / f"discriminator-{half}.safetensors" for half in range(2)]

    def metrics(self, columns: Mapping[str, np.ndarray], notes: Mapping[str, Any]) -> dict[str, np.ndarray]:
        margin = columns["discriminator"]
        return {"discriminator": margin, "looks_real": margin > 0}

    def warnings(self, notes: Mapping[str, Any]) -> list[str]:
        weak = [half["validation_accuracy"] for half in notes["halves"] if not half["beats_chance"]]
        if not weak:
            return []
        accuracies = " and ".join(f"{value:.3f}" for value in weak)
        return [
            f"discriminator: robust accuracy {accuracies} on held-out images is close to 0.5 at --eps {notes['eps']:g}: real and "
            "synthetic images are hardly told apart there, so that only the worst images are sure to rank low; lower --eps or "
            "give more real images"
        ]


class _Density(Scorer):
    """How dense the real images are around an image: the distance to the k-th of them, and how many have it in their own ball.

    The second is what density and precision (Naeem et al. 2020, arXiv:2002.09797) are sums of: the balls reach to each real
    image's k-th neighbour among the others.
    """

    name = "density"

    def open(self, sources: Sources) -> dict[str, Any]:
        self.real, fingerprint = sources.real()
        if len(self.real) <= self.config.k:
            raise UsageError(
                f"-k {self.config.k}: {self.real.name} has {len(self.real)} images, expected more; lower it"
            )
        self.features = load_features(self.config.features, self.images.shape, self.device)
        return {"real": fingerprint, "features": self.features.fingerprint, "k": self.config.k}

    def prepare(self, folder: ScoreFolder, tell: Tell) -> None:
        tell("features of the real images", 0, len(self.real))
        self.base = self.feature_tensor(self.features, self.real)
        self.radii = kth_distances(self.base, self.config.k)
        middle = float(self.radii.median())
        self.notes = {"features": self.features.name, "k": self.config.k, "median_real_distance": middle}

    def score(self, items: np.ndarray) -> Columns:
        points = self.features_of(self.features, items)
        distance = k_nearest(points, self.base, self.config.k)[0][:, -1]
        counts = within_counts(points, self.base, self.radii)
        return {"density_distance": distance.cpu().numpy(), "density_count": counts.cpu().numpy()}

    def metrics(self, columns: Mapping[str, np.ndarray], notes: Mapping[str, Any]) -> dict[str, np.ndarray]:
        counts = columns["density_count"]
        return {"density_distance": columns["density_distance"], "density_count": counts, "in_manifold": counts > 0}


class _Confidence(Scorer):
    """What a classifier thinks of an image's label."""

    name = "confidence"

    def open(self, sources: Sources) -> dict[str, Any]:
        path = self.config.classifier
        if path is None:
            if self.images.shape != DIGITS_SHAPE or self.images.classes not in (10, None):
                raise UsageError(
                    f"--classifier: expected one for the confidence in images {list(self.images.shape)}, found none; give a "
                    "checkpoint folder of synthfast train classifier, or leave confidence out of --scores"
                )
            path = str(DIGITS_CLASSIFIER)
        if not Path(path).is_dir():
            raise UsageError(f"--classifier {path}: expected a checkpoint folder, found none; check the path")
        model, description = load_classifier(path, self.device)
        wrong_classes = self.images.classes is not None and self.images.classes != description["classes"]
        if list(self.images.shape) != list(description["shape"]) or wrong_classes:
            raise UsageError(
                f"--classifier {path}: was trained on images {description['shape']} in {description['classes']} classes, "
                f"{self.images.name} has {list(self.images.shape)} in {self.images.classes}; choose another"
            )
        self.network = freeze(model)
        self.files = {"classifier": Path(path) / "model.safetensors"}
        self.notes = {"classifier": path}
        return {"classifier": description["sha256"]}

    def prepare(self, folder: ScoreFolder, tell: Tell) -> None:
        """The classifier is all that is needed."""

    def _judge(self, batch: Batch) -> tuple[Tensor, ...]:
        x, labels = batch
        with torch.inference_mode():
            probability = self.network(x).double().softmax(1)
        highest, predicted = probability.max(1)
        if labels is None:
            return highest.float(), predicted
        return probability.gather(1, labels[:, None])[:, 0].float(), highest.float(), predicted

    def score(self, items: np.ndarray) -> Columns:
        names = ("confidence", "confidence_max", "predicted")
        found = self.batches(items, self._judge)
        return dict(zip(names[len(names) - len(found) :], found, strict=True))

    def metrics(self, columns: Mapping[str, np.ndarray], notes: Mapping[str, Any]) -> dict[str, np.ndarray]:
        highest = {"confidence_max": columns["confidence_max"]}
        if self.images.labels is None:
            return highest
        agrees = columns["predicted"] == self.images.labels
        return {"confidence": columns["confidence"], **highest, "label_agreement": agrees}


class _Memorization(Scorer):
    """Whether an image is a copy of a training image; see :mod:`synthfast.scoring.memorization`."""

    name = "memorization"

    def open(self, sources: Sources) -> dict[str, Any]:
        config = self.config
        self.train, fingerprint = sources.train()
        try:
            self.features = load_features(config.memorization_features, self.images.shape, self.device)
        except UsageError as error:
            raise UsageError(str(error).replace("--features", "--memorization-features", 1)) from None
        check_null_share(config.null_share, len(self.train))
        check_enough(self.train.name, len(self.train), config.k)
        return {
            "train_set": fingerprint,
            "features": self.features.fingerprint,
            "k": config.k,
            "null_share": config.null_share,
        }

    def prepare(self, folder: ScoreFolder, tell: Tell) -> None:
        tell("features of the training images", 0, len(self.train))
        base = self.feature_tensor(self.features, self.train)
        self.comparison = Memorization(base, self.config.k, self.train.name)
        share = self.config.null_share
        self.notes = {
            "features": self.features.name,
            "k": self.config.k,
            "null_share": share,
            "training_images": len(self.train),
            "threshold": self.comparison.thresholds(share),
        }

    def score(self, items: np.ndarray) -> Columns:
        found = self.comparison(self.features_of(self.features, items))
        return {
            "nearest_train": found.index,
            "nearest_distance": found.distance,
            "nearest_ratio": found.ratio,
            "memorization_p": found.p,
        }

    def metrics(self, columns: Mapping[str, np.ndarray], notes: Mapping[str, Any]) -> dict[str, np.ndarray]:
        flagged = columns["memorization_p"] <= np.float32(notes["null_share"])
        return {"nearest_distance": columns["nearest_distance"], "memorized": flagged}

    def warnings(self, notes: Mapping[str, Any]) -> list[str]:
        if notes["threshold"]["distance"] > 0:
            return []
        return [
            f"memorization: more than {notes['null_share']:.3g} of the training images have copies among themselves, so that no "
            "image can be flagged; raise --null-share or remove the copies"
        ]


SCORERS: dict[str, type[Scorer]] = {
    scorer.name: scorer for scorer in (_Discriminator, _Density, _Confidence, _Memorization)
}


def default_radius(shape: Sequence[int], norm: str) -> float:
    """The discriminators' radius where none is given; see the option."""
    return 4 / 255 if norm == "linf" else L2_RADIUS * math.sqrt(math.prod(shape) / math.prod(DIGITS_SHAPE))


def _read_state(path: Path, key: Mapping[str, str]) -> dict[str, Any] | None:
    """Facts about a trained network that lies at ``path`` and was trained for ``key``; None where there is none."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
        return json.loads(metadata["found"]) if metadata.get("key") == json.dumps(dict(key)) else None
    except (SafetensorError, OSError, KeyError, ValueError):
        return None  # it is trained again


def _write_state(path: Path, state: Mapping[str, Tensor], key: Mapping[str, str], found: Mapping[str, Any]) -> None:
    save_tensors(path, dict(state), {"key": json.dumps(dict(key)), "found": json.dumps(dict(found))})
