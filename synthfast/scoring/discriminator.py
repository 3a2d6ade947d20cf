"""Robust discriminators: networks that tell real from synthetic images, trained adversarially on balls around both kinds.

Madry et al. 2018 (arXiv:1706.06083) with two classes. With two classes the gradient of the cross-entropy points along that of the
margin between the logits, so the attack follows the margin, which does not underflow where the network is sure.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from synthfast import ops
from synthfast.attacks.losses import cw_margin
from synthfast.attacks.pgd import PGD, pgd_maximize
from synthfast.data import ImageSet
from synthfast.errors import SynthfastError, UsageError
from synthfast.models.classifier_parts import Normalize
from synthfast.models.classifiers import make_classifier
from synthfast.models.frozen import freeze
from synthfast.training.batches import EpochOrder, to_unit
from synthfast.training.ema import EMA

SYNTHETIC, REAL = 0, 1
LINEAR = "linear"
_REAL_STREAM, _SYNTHETIC_STREAM = 1, 2
_VALIDATION_BATCH = 256
_WARMUP = 20  # steps in which the rate rises
_FITS = 0.75  # accuracy on training images from which a network has learned to tell them apart, if only by heart
_building = threading.Lock()  # torch's global generator is lent to one network at a time

State = Mapping[str, Tensor]


@dataclass(frozen=True)
class DiscriminatorSettings:
    """How a discriminator is trained.

    architecture: a classifier of the zoo, "linear" (one layer), or "auto": small-cnn up to 16 pixels, else resnet-18.
    norm: "l2" or "linf".
    steps: at most so many steps of AdamW.
    batch_size: images in a step, half of them real.
    lr, weight_decay: of AdamW; the rate rises for 20 steps and is constant then.
    attack_steps: of the PGD that makes the training images; the one that validates has twice as many.
    crop: images are padded by so many pixels and cropped at random; flip: mirrored with probability 1/2. Both kinds alike.
    ema: decay of the averaged weights, which are what is validated and kept.
    validate_every: steps between validations.
    patience: training ends after so many validations in a row without a better one.
    seed: of everything random.
    """

    architecture: str = "auto"
    norm: str = "l2"
    steps: int = 600
    batch_size: int = 64
    lr: float = 0.002
    weight_decay: float = 0.0005
    attack_steps: int = 5
    crop: int = 0
    flip: bool = False
    ema: float = 0.95
    validate_every: int = 25
    patience: int = 6
    seed: int = 0


@dataclass(frozen=True)
class TrainingSets:
    """Images of both kinds, uint8 [n, H, W, C] on the device that trains: to train with, and to choose a state by."""

    real: Tensor
    synthetic: Tensor
    real_validation: Tensor
    synthetic_validation: Tensor

    @classmethod
    def read(
        cls,
        real: ImageSet,
        synthetic: ImageSet,
        real_validation: ImageSet,
        synthetic_validation: ImageSet,
        device: torch.device,
    ) -> TrainingSets:
        """From sets of images, which are read whole."""
        sets = (real, synthetic, real_validation, synthetic_validation)
        return cls(*(torch.from_numpy(images.read(np.arange(len(images)))).to(device) for images in sets))


@dataclass(frozen=True)
class Discriminator:
    """A trained discriminator.

    network: images float [N, C, H, W] in [0, 1] to logits [N, 2], class 1 for real; in evaluation mode.
    eps: the radius it was trained at, on pixels in [0, 1].
    validation_accuracy: robust accuracy of its state on the validation images, under PGD.
    training_accuracy: the highest robust accuracy on training images between two validations, whatever state was kept.
    steps: how many were made.
    best_step: the step after which the state was kept; 0 is the start.
    """

    network: nn.Module
    eps: float
    validation_accuracy: float
    training_accuracy: float
    steps: int
    best_step: int


def train_discriminator(
    sets: TrainingSets,
    eps: float,
    settings: DiscriminatorSettings,
    *,
    start: State | None = None,
    report: Callable[[int], None] | None = None,
) -> Discriminator:
    """Train a network to tell balls around real images from balls around synthetic ones, and keep its best state.

    Batches are half real and half synthetic, each kind in shuffled passes of its own. Every ``validate_every`` steps the averaged
    weights are validated, and the state with the highest robust accuracy is kept, the later one of equals.

    Args:
        sets: see :class:`TrainingSets`.
        eps: radius of the balls on pixels in [0, 1], at least 0; 0 trains without an attack.
        start: a state dict to begin with, such as that of a smaller radius; it is validated first, as one of the candidates.
        report: called with the number of steps done after every validation.

    Returns:
        The :class:`Discriminator`; the same for the same arguments, and untouched by the global random state.

    Raises:
        UsageError: images of different shapes, a batch that is not two of a kind or more.
        SynthfastError: a loss that is not finite.
    """
    _check(sets, eps, settings)
    network = make_network(sets, settings)
    if start is not None:
        network.load_state_dict(start)
    return _Training(sets, eps, settings, network, warm=start is not None).run(report)


def learned(found: Discriminator, validation_images: int) -> bool:
    """Whether a discriminator beats chance on validation images, by two standard errors, or else fits its training images."""
    return found.validation_accuracy > _beyond_chance(validation_images) or found.training_accuracy >= _FITS


def _beyond_chance(images: int) -> float:
    return 0.5 + 2 * 0.5 / math.sqrt(images)


def make_network(sets: TrainingSets, settings: DiscriminatorSettings) -> nn.Module:
    """The network that ``settings`` name, with two outputs and random weights that depend on the seed, on the sets' device.

    Pixels are normalized by mean and standard deviation, by channel, of the training images of both kinds.
    """
    shape = tuple(sets.real.shape[1:])
    mean, std = _pixel_statistics(sets)
    name = settings.architecture
    if name == "auto":
        name = default_discriminator(shape)
    with _building, torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(settings.seed % 2**63)
        network = Linear(shape, mean, std) if name == LINEAR else make_classifier(name, shape, 2, mean=mean, std=std)
    return network.to(sets.real.device)


def default_discriminator(shape: tuple[int, ...]) -> str:
    """The network for images of ``shape`` (H, W, C) where none is named: small-cnn up to 16 pixels, else resnet-18."""
    return "small-cnn" if max(shape[0], shape[1]) <= 16 else "resnet-18"


class Linear(nn.Module):
    """One linear layer on normalized pixels: the best discriminator there is between two Gaussians of equal covariance.

    Input: images float [N, C, H, W] of ``shape`` (H, W, C). Output: logits float [N, 2].
    """

    def __init__(self, shape: tuple[int, ...], mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.normalize = Normalize(mean, std)
        self.layer = nn.Linear(math.prod(shape), 2)
        nn.init.zeros_(self.layer.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.normalize(x).flatten(1))


def _pixel_statistics(sets: TrainingSets) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation by channel, of pixels in [0, 1]."""
    pixels = [images.flatten(0, 2).double() / 255 for images in (sets.real, sets.synthetic)]
    mean = sum(part.mean(0) for part in pixels) / 2
    square = sum((part * part).mean(0) for part in pixels) / 2
    std = (square - mean * mean).clamp(min=1 / 255**2).sqrt()
    return tuple(round(v, 6) for v in mean.tolist()), tuple(round(v, 6) for v in std.tolist())


def _check(sets: TrainingSets, eps: float, settings: DiscriminatorSettings) -> None:
    parts = (sets.real, sets.synthetic, sets.real_validation, sets.synthetic_validation)
    if len({tuple(part.shape[1:]) for part in parts}) > 1:
        found = ", ".join(str(list(part.shape[1:])) for part in parts)
        raise UsageError(f"a discriminator needs images of one shape, found {found}; choose sets that fit")
    if settings.batch_size < 4 or settings.batch_size % 2:
        raise UsageError(f"batch_size must be even and at least 4, half of it is real, found {settings.batch_size}")
    if not 0 <= eps < math.inf:
        raise UsageError(f"eps must be a finite number >= 0 on pixels in [0, 1], found {eps!r}")


class _Training:
    def __init__(
        self, sets: TrainingSets, eps: float, settings: DiscriminatorSettings, network: nn.Module, *, warm: bool
    ) -> None:
        self.eps, self.settings, self.network, self.warm = eps, settings, network, warm
        self.device = sets.real.device
        self.half = settings.batch_size // 2
        self.images = torch.cat([sets.synthetic, sets.real])
        self.first_real = len(sets.synthetic)
        self.orders = (
            EpochOrder(len(sets.synthetic), settings.seed, _SYNTHETIC_STREAM),
            EpochOrder(len(sets.real), settings.seed, _REAL_STREAM),
        )
        self.targets = _targets(self.half, self.half, self.device)
        self.validation = to_unit(torch.cat([sets.synthetic_validation, sets.real_validation]), self.device)
        self.validation_targets = _targets(len(sets.synthetic_validation), len(sets.real_validation), self.device)
        self.optimizer = torch.optim.AdamW(
            network.parameters(), lr=settings.lr, weight_decay=settings.weight_decay, fused=True
        )
        self.average = EMA(network, settings.ema)
        self.frozen, self.frozen_average = freeze(network), freeze(self.average.module)

    def run(self, report: Callable[[int], None] | None) -> Discriminator:
        settings, average = self.settings, self.average.module
        best, best_step, state = -1.0, 0, None
        if self.warm:
            best, state = self._validate(), _copied(average)
        fitted, waited, step = 0.0, 0, 0
        right = torch.zeros((), device=self.device)  # since the last validation
        seen = 0
        self.network.train()
        for step in range(1, settings.steps + 1):
            right += self._step(step)
            seen += settings.batch_size
            if step % settings.validate_every and step < settings.steps:
                continue
            fitted = max(fitted, float(right) / seen)
            right.zero_()
            seen = 0
            accuracy = self._validate()
            waited = 0 if accuracy > best else waited + 1
            if accuracy >= best:
                best, best_step, state = accuracy, step, _copied(average)
            if report is not None:
                report(step)
            # Without an attack, chance may only mean that learning has not begun.
            begun = self.eps > 0 or best > _beyond_chance(len(self.validation)) or fitted >= _FITS
            if begun and waited >= settings.patience:
                break
        if not all(bool(tensor.isfinite().all()) for tensor in average.state_dict().values()):
            raise SynthfastError(f"a discriminator's weights are not finite after step {step}; lower the learning rate")
        assert state is not None
        average.load_state_dict(state)
        return Discriminator(average, self.eps, best, fitted, step, best_step)

    def _step(self, step: int) -> Tensor:
        """One step; how many images of the batch were right, as a tensor."""
        settings = self.settings
        for group in self.optimizer.param_groups:
            group["lr"] = settings.lr * min(1.0, step / _WARMUP)
        x, index = self._batch(step - 1)
        logits = self.network(self._attacked(x, index))
        loss = F.cross_entropy(logits, self.targets)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        self.average.update(self.network, step)
        return (logits.detach().argmax(1) == self.targets).sum()

    def _batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Images of a step in [0, 1], synthetic ones first, and what keys their randomness."""
        settings = self.settings
        synthetic, real = (order[step * self.half : (step + 1) * self.half] for order in self.orders)
        items = torch.from_numpy(np.concatenate([synthetic, real + self.first_real])).to(self.device)
        index = torch.arange(step * settings.batch_size, (step + 1) * settings.batch_size, device=self.device)
        x = ops.gather_augment(self.images, items, index, settings.seed, padding=settings.crop, flip=settings.flip)
        return x, index

    def _attacked(self, x: Tensor, index: Tensor) -> Tensor:
        settings = self.settings
        if self.eps == 0:
            return x
        self.frozen.refresh()
        start = ops.ball_start(x, index, self.eps, settings.norm, settings.seed)
        return pgd_maximize(
            lambda images: cw_margin(self.frozen(images), self.targets),
            start,
            x,
            norm=settings.norm,
            eps=self.eps,
            step_size=min(1.0, 2.5 / settings.attack_steps) * self.eps,
            steps=settings.attack_steps,
        )

    def _validate(self) -> float:
        """Robust accuracy of the averaged weights."""
        self.frozen_average.refresh()
        attack = PGD(
            self.settings.norm, self.eps, seed=self.settings.seed, steps=2 * self.settings.attack_steps, loss="cw"
        )
        right = 0
        for first in range(0, len(self.validation), _VALIDATION_BATCH):
            x = self.validation[first : first + _VALIDATION_BATCH]
            y = self.validation_targets[first : first + _VALIDATION_BATCH]
            index = torch.arange(first, first + len(x), device=self.device)
            if self.eps == 0:
                with torch.no_grad():
                    right += int((self.frozen_average(x).argmax(1) == y).sum())
            else:
                right += int(attack.run(self.frozen_average, x, y, index).fooled.logical_not().sum())
        return right / len(self.validation)


def _targets(synthetic: int, real: int, device: torch.device) -> Tensor:
    return torch.cat([torch.full((synthetic,), SYNTHETIC), torch.full((real,), REAL)]).to(device)


def _copied(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}
