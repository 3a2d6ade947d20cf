"""Robust discriminators: networks that tell real from synthetic images, trained adversarially on balls around both kinds.

Madry et al. 2018 (arXiv:1706.06083) with two classes. With two classes the gradient of the cross-entropy points along that of the
margin between the logits, so the attack follows the margin, which does not underflow where the network is sure.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from synthfast import ops
from synthfast.attacks.base import float32_below
from synthfast.attacks.losses import cw_margin
from synthfast.attacks.pgd import pgd_maximize
from synthfast.data import ImageSet
from synthfast.data.loaders import resident
from synthfast.errors import SynthfastError, UsageError
from synthfast.models.bank import Bank
from synthfast.models.classifier_parts import Normalize
from synthfast.models.classifiers import make_classifier
from synthfast.models.frozen import Frozen, freeze
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
    patience: training ends after so many validations in a row without a better one; warm_patience: where it did not begin with
        random weights, but with what another radius has learned.
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
    ema: float = 0.98
    validate_every: int = 15
    patience: int = 12
    warm_patience: int = 3
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
        return cls(*(resident([images], device) for images in (real, synthetic, real_validation, synthetic_validation)))


@dataclass(frozen=True)
class Discriminator:
    """A trained discriminator.

    network: images float [N, C, H, W] in [0, 1] to logits [N, 2], class 1 for real; in evaluation mode.
    attacked: the same as attacks see it.
    eps: the radius it was trained at, on pixels in [0, 1].
    validation_accuracy: robust accuracy of its state on the validation images, under PGD.
    training_accuracy: the highest robust accuracy on training images between two validations, whatever state was kept.
    steps: how many were made.
    best_step: the step after which the state was kept; 0 is the start.
    """

    network: nn.Module
    attacked: Frozen
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
        report: called with the number of steps done after each; it may raise to end the work.

    Returns:
        The :class:`Discriminator`; the same for the same arguments, and untouched by the global random state.

    Raises:
        UsageError: images of different shapes, a batch that is not two of a kind or more.
        SynthfastError: a loss that is not finite.
    """
    return DiscriminatorTraining(sets, [eps], settings, [start]).run(report)[0]


def learned(validation_accuracy: float, validation_images: int, training_accuracy: float) -> bool:
    """Whether a discriminator beats chance on validation images, by two standard errors, or else fits its training images."""
    return validation_accuracy > _beyond_chance(validation_images) or training_accuracy >= _FITS


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


def _check(sets: TrainingSets, radii: Sequence[float], settings: DiscriminatorSettings) -> None:
    parts = (sets.real, sets.synthetic, sets.real_validation, sets.synthetic_validation)
    if len({tuple(part.shape[1:]) for part in parts}) > 1:
        found = ", ".join(str(list(part.shape[1:])) for part in parts)
        raise UsageError(f"a discriminator needs images of one shape, found {found}; choose sets that fit")
    if settings.batch_size < 4 or settings.batch_size % 2:
        raise UsageError(f"batch_size must be even and at least 4, half of it is real, found {settings.batch_size}")
    for eps in radii:
        if not 0 <= eps < math.inf:
            raise UsageError(f"eps must be a finite number >= 0 on pixels in [0, 1], found {eps!r}")


class DiscriminatorTraining:
    """Training of one network for each radius, all from the same images, as a call that may run on a thread of its own.

    With one radius it is a network, with more a :class:`synthfast.models.bank.Bank` of them, which is faster on a GPU. Each is
    what it would be alone, up to rounding.

    Making it traces networks, during which no other thread may run one; :meth:`run` traces nothing.

    Args:
        radii: one or more.
        starts: a state dict or None for each.
    """

    def __init__(
        self,
        sets: TrainingSets,
        radii: Sequence[float],
        settings: DiscriminatorSettings,
        starts: Sequence[State | None] | None = None,
    ) -> None:
        _check(sets, radii, settings)
        self.radii, self.settings, self.device = list(radii), settings, sets.real.device
        self.warm = [start is not None for start in starts or [None] * len(radii)]
        self.networks = [make_network(sets, settings) for _ in radii]
        for network, start in zip(self.networks, starts or (), strict=False):
            if start is not None:
                network.load_state_dict(start)
        self.half = settings.batch_size // 2
        self.images = torch.cat([sets.synthetic, sets.real])
        self.first_real = len(sets.synthetic)
        self.orders = (
            EpochOrder(len(sets.synthetic), settings.seed, _SYNTHETIC_STREAM),
            EpochOrder(len(sets.real), settings.seed, _REAL_STREAM),
        )
        self.targets = _targets(self.half, self.half, self.device)
        self.validation = torch.cat([sets.synthetic_validation, sets.real_validation])
        self.validation_targets = _targets(len(sets.synthetic_validation), len(sets.real_validation), self.device)
        self.network = self.networks[0] if len(radii) == 1 else Bank(self.networks)
        self.optimizer = torch.optim.AdamW(
            self.network.parameters(), lr=settings.lr, weight_decay=settings.weight_decay, fused=True
        )
        self.average = EMA(self.network, settings.ema)
        self.attacked, self.attacked_average = freeze(self.network), freeze(self.average.module)
        self.finished = [freeze(network) for network in self.networks]

    def run(self, report: Callable[[int], None] | None = None) -> list[Discriminator]:
        """Train until each has gone its ``patience`` of validations without a better state, or ``steps`` are done.

        Args:
            report: called with the number of steps done after each; it may raise to end the work.
        """
        settings = self.settings
        keepers = [
            _Keeper(eps, len(self.validation), settings.warm_patience if warm else settings.patience)
            for eps, warm in zip(self.radii, self.warm, strict=True)
        ]
        if any(self.warm):
            accuracies = self._validate([0.0] * len(keepers))
            for keeper, warm, accuracy in zip(keepers, self.warm, accuracies, strict=True):
                if warm:
                    keeper.look(0, accuracy, 0.0, self._state(keepers.index(keeper)))
        right = torch.zeros(len(self.radii), device=self.device)  # since the last validation
        seen = 0
        self.network.train()
        for step in range(1, settings.steps + 1):
            right += self._step(step)
            seen += settings.batch_size
            if report is not None:
                report(step)
            if step % settings.validate_every and step < settings.steps:
                continue
            fits = (right / seen).tolist()
            right.zero_()
            seen = 0
            running = [not keeper.done() for keeper in keepers]
            needed = [keeper.best if runs else math.inf for keeper, runs in zip(keepers, running, strict=True)]
            for row, accuracy in enumerate(self._validate(needed)):
                if running[row]:
                    keepers[row].look(step, accuracy, fits[row], self._state(row))
            if all(keeper.done() for keeper in keepers):
                break
        return [self._finish(row, keeper) for row, keeper in enumerate(keepers)]

    def _finish(self, row: int, keeper: _Keeper) -> Discriminator:
        network, state = self.networks[row], keeper.state
        assert state is not None
        if not all(bool(tensor.isfinite().all()) for tensor in state.values()):
            raise SynthfastError(
                f"a discriminator of radius {keeper.eps:g} has weights that are not finite; lower the learning rate"
            )
        network.load_state_dict(state)
        network.eval().requires_grad_(False)
        self.finished[row].refresh()
        return Discriminator(
            network, self.finished[row], keeper.eps, keeper.best, keeper.fitted, keeper.steps, keeper.best_step
        )

    def _state(self, row: int) -> State:
        module = self.average.module
        if isinstance(module, Bank):
            return module.state(row)
        return {name: tensor.clone() for name, tensor in module.state_dict().items()}

    def _step(self, step: int) -> Tensor:
        """One step; how many images of the batch each network got right: [R] on the device."""
        settings, count = self.settings, len(self.radii)
        for group in self.optimizer.param_groups:
            group["lr"] = settings.lr * min(1.0, step / _WARMUP)
        x, index = self._batch(step - 1)
        targets = self.targets.repeat(count)
        self.attacked.refresh()
        x = self._adversarial(self.attacked, x, targets, index, settings.attack_steps)
        logits = self.network(x)
        loss = F.cross_entropy(logits, targets) * count  # the sum of the networks' means
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        self.average.update(self.network, step)
        return (logits.detach().argmax(1) == targets).view(count, -1).sum(1)

    def _batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Images of a step in [0, 1], synthetic ones first, and what keys their randomness."""
        settings = self.settings
        synthetic, real = (order[step * self.half : (step + 1) * self.half] for order in self.orders)
        items = torch.from_numpy(np.concatenate([synthetic, real + self.first_real])).to(self.device)
        index = torch.arange(step * settings.batch_size, (step + 1) * settings.batch_size, device=self.device)
        x = ops.gather_augment(self.images, items, index, settings.seed, padding=settings.crop, flip=settings.flip)
        return x, index

    def _adversarial(self, attacked: Frozen, x: Tensor, targets: Tensor, index: Tensor, steps: int) -> Tensor:
        """The images [N, ...] for each network in turn, [R N, ...], moved up the margin in the ball of its radius."""
        settings, count = self.settings, len(self.radii)
        if count > 1:
            x = x.repeat(count, 1, 1, 1).contiguous(memory_format=torch.channels_last)
            index = index.repeat(count)
        if not any(self.radii):
            return x
        eps = torch.tensor([float32_below(radius) for radius in self.radii], device=self.device)
        eps = eps.repeat_interleave(len(x) // count)
        return pgd_maximize(
            lambda images: cw_margin(attacked(images), targets),
            ops.ball_start(x, index, eps, settings.norm, settings.seed),
            x,
            norm=settings.norm,
            eps=eps,
            step_size=min(1.0, 2.5 / steps) * eps,
            steps=steps,
        )

    def _validate(self, needed: Sequence[float]) -> list[float]:
        """Robust accuracy of the averaged weights of each network: right as they are and after each of two attacks, the second of
        which has twice the steps of training.

        An attack sees what still stands. Where no network has as many images left as ``needed`` [R], the rest is spared: the
        numbers are then too high, but below what was needed all the same.
        """
        self.attacked_average.refresh()
        steps = self.settings.attack_steps
        right = torch.ones(len(self.radii), len(self.validation), dtype=torch.bool, device=self.device)
        for attack_steps in (0, max(1, steps // 2), 2 * steps) if any(self.radii) else (0,):
            self._judge(right, attack_steps)
            accuracies = right.float().mean(1).tolist()
            if all(accuracy < enough for accuracy, enough in zip(accuracies, needed, strict=True)):
                break
        return accuracies

    def _judge(self, right: Tensor, attack_steps: int) -> None:
        """Leave in ``right`` [R, validation images] what is right after so many steps of the attack too."""
        count = len(self.radii)
        for rows in right.any(0).nonzero()[:, 0].split(_VALIDATION_BATCH):
            x = to_unit(self.validation[rows], self.device)
            targets = self.validation_targets[rows].repeat(count)
            if attack_steps:
                x = self._adversarial(self.attacked_average, x, targets, rows, attack_steps)
            elif count > 1:
                x = x.repeat(count, 1, 1, 1).contiguous(memory_format=torch.channels_last)
            with torch.no_grad():
                right[:, rows] &= (self.attacked_average(x).argmax(1) == targets).view(count, -1)


class _Keeper:
    """The best state of one network so far, and whether it is worth going on."""

    def __init__(self, eps: float, validation_images: int, patience: int) -> None:
        self.eps, self._chance, self._patience = eps, _beyond_chance(validation_images), patience
        self.best, self.fitted, self.best_step, self.steps, self._waited = -1.0, 0.0, 0, 0, 0
        self.state: State | None = None

    def look(self, step: int, accuracy: float, fitted: float, state: State) -> None:
        """A state of validated ``accuracy``, and the share of training images that were right up to it."""
        self.steps, self.fitted = step, max(self.fitted, fitted)
        self._waited = 0 if accuracy > self.best else self._waited + 1
        if accuracy >= self.best:  # the later one of equals
            self.best, self.best_step, self.state = accuracy, step, state

    def done(self) -> bool:
        # Without an attack, chance may only mean that learning has not begun.
        begun = self.eps > 0 or self.best > self._chance or self.fitted >= _FITS
        return begun and self._waited >= self._patience


def _targets(synthetic: int, real: int, device: torch.device) -> Tensor:
    return torch.cat([torch.full((synthetic,), SYNTHETIC), torch.full((real,), REAL)]).to(device)
