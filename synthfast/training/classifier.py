"""``synthfast train classifier``: standard and adversarial training on real images, synthetic ones, or a mix of both."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from synthfast.artifacts import make_checkpoint_folder, save_checkpoint
from synthfast.attacks.pgd import PGD
from synthfast.config import ClassifierConfig
from synthfast.data import ImageSet
from synthfast.data.loaders import Augment, Batch, Wanted, open_loader, stream
from synthfast.distributed import Ranks
from synthfast.errors import UsageError
from synthfast.models.classifiers import default_classifier, make_classifier
from synthfast.models.frozen import freeze
from synthfast.training import objectives
from synthfast.training.augment import cutmix
from synthfast.training.ema import EMA
from synthfast.training.loop import (
    PRECISION_NAMES,
    Job,
    Progress,
    Trained,
    average_statistics,
    flips,
    pick_precision,
)
from synthfast.training.mixture import Mixture, open_mixture
from synthfast.training.state import load_notes, load_state, save_state

# What does not change the result: not part of what a resumed run must repeat. Data count by their content.
_FREE = (
    "out",
    "recipe",
    "dataset",
    "synthetic",
    "selection",
    "image_size",
    "data_dir",
    "download",
    "device",
    "compile",
)
# Not even noted: loaders change nothing, and of weights the shares are noted, where they are not equal.
_UNNOTED = ("loader", "workers", "synthetic_weight")
_OPTIONS = {
    "data": "--dataset or --synthetic (their images)",
    "synthetic_shares": "--synthetic-weight (images of each folder in a batch)",
    "selected": "--selection (its images)",
    "pseudo_labels": "--pseudo-labels (its weights)",
}
_BETA = 6.0  # of trades where none is given: 1 / lambda of Zhang et al. 2019 on CIFAR-10


def train_classifier(
    config: ClassifierConfig, ranks: Ranks, report: Callable[[Progress], None] | None = None
) -> Trained:
    """Train, or go on training, and leave a checkpoint folder.

    A batch holds round(fraction * batch_size) synthetic images and real ones for the rest; each set is seen in shuffled passes
    of its own. The folder then holds ``config.json`` and ``model.safetensors`` (the averaged weights if there is an average; of
    the checkpoint that did best on the held-out images if there are any, else of the last step) and
    ``training-state.safetensors``, from which the same command goes on exactly where it stopped. A finished run is left alone.
    Nothing is chosen by looking at test data.

    Several ranks share each batch and see the images, augmentations and attack starts that one would. Each normalizes by its
    own share in batch norm, so that the weights differ a little from those of one rank.

    Args:
        config: see :class:`synthfast.config.ClassifierConfig`.
        ranks: entered; every rank calls this with the same configuration.
        report: called on rank 0 about once a second and at checkpoints.

    Raises:
        UsageError: options or sets that do not fit each other, the device or an existing run in the folder.
        SynthfastError: unreadable data, a loss that is not finite, a disk that refuses.
    """
    return _Job(config, ranks).run(report)


class _Job(Job):
    def __init__(self, config: ClassifierConfig, ranks: Ranks) -> None:
        self.ranks, self.folder, device = ranks, Path(config.out), ranks.device
        self.config = config
        if self._share() < 2:
            raise UsageError(
                f"--batch-size {config.batch_size}: expected at least 2 images for each of the {ranks.world_size} ranks, for the "
                "network has batch norm; enlarge it"
            )
        self.data = open_mixture(config, ranks)
        self.config = config = _resolved(config, self.data, device)
        self.loader = open_loader(
            config.loader,
            [images for images, _ in self.data.parts],
            device,
            Augment(config.seed, config.crop or 0, bool(config.flip)),
            workers=config.workers,
        )
        shape, classes = self.data.reference.shape, self.data.reference.classes
        assert classes is not None
        with torch.random.fork_rng(devices=[]):  # the caller's random state stays as it is
            torch.default_generator.manual_seed(config.seed % 2**63)
            self.model = make_classifier(config.model, shape, classes)
        make_checkpoint_folder(self.folder, "classifier")
        self.model.to(device).train()
        self.average = EMA(self.model, config.ema) if config.ema > 0 else None
        self.optimizer = _optimizer(self.model, config)
        self.precision = pick_precision(config.precision, device)
        self.ball = None
        if config.method != "standard":
            self.ball = objectives.Ball(config.norm, config.radius, config.step_size or 0.0, config.attack_steps)
            self.frozen = freeze(self.model)
            # On a CPU it is fast by itself.
            compiled = config.compile and device.type == "cuda"
            self.logits = torch.compile(self.frozen.__call__) if compiled else self.frozen
        self.measures = {
            "standard": ("loss", "accuracy"),
            "pgd": ("loss", "robust_accuracy"),
            "trades": ("loss", "accuracy", "robust_accuracy"),
        }[config.method]
        # CutMix pastes from the whole batch, which every rank then reads; else each reads its share.
        share = np.arange(ranks.rank, config.batch_size, ranks.world_size)
        self.positions = np.arange(config.batch_size) if config.cutmix else share
        self.mine = torch.from_numpy(share).to(device) if config.cutmix and ranks.world_size > 1 else None
        noted = {name: value for name, value in dataclasses.asdict(config).items() if name not in _UNNOTED}
        self.facts = {**noted, **self.data.facts}
        # Which checkpoint is kept depends on when they are compared.
        free = _FREE if self.data.validation is not None else (*_FREE, "checkpoint_every")
        modules = {"model": self.model} | ({"ema": self.average.module} if self.average else {})
        self.modules: dict[str, nn.Module] = modules
        self.first_step = load_state(
            self.folder, self.facts, modules, self.optimizer, may_differ=free, options=_OPTIONS
        )
        notes = load_notes(self.folder)
        self.best: tuple[float, int] | None = tuple(notes["best"]) if notes.get("best") else None

    def run(self, report: Callable[[Progress], None] | None) -> Trained:
        loss = self._run(_Passes(self.model), report)
        accuracy, step = self.best or (None, None)
        made = self.config.steps - self.first_step
        return Trained(self.config.steps, made, loss, None, accuracy, step, self.loader.kind)

    @property
    def averaged(self) -> nn.Module:
        """What is validated and saved."""
        return self.model if self.average is None else self.average.module

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.ranks.device.type, self.precision, enabled=self.precision != torch.float32)

    def _wanted(self, step: int) -> Wanted:
        return self.data.wanted(step, self.positions)

    def _mixed(self, step: int, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """This rank's images, their targets, and their positions in the run, which key all that is random."""
        config, device = self.config, self.ranks.device
        index = torch.from_numpy(step * config.batch_size + self.positions).to(device)
        x, targets = batch
        assert targets is not None
        if config.cutmix:
            classes = self.data.reference.classes or 0
            x, targets = cutmix(x, targets, classes, index, config.seed, config.cutmix)
        if self.mine is not None:
            layout = torch.channels_last  # indexing may not keep it, and the noise of attacks follows the storage order
            x, targets, index = x[self.mine].contiguous(memory_format=layout), targets[self.mine], index[self.mine]
        return x, targets, index

    def _attacked(self, x: Tensor) -> Tensor:
        """The logits that the attack sees: of the network in evaluation mode."""
        with self._autocast():
            return self.logits(x)

    def _step(self, network: nn.Module, step: int, batch: Batch) -> Tensor:
        config = self.config
        for group in self.optimizer.param_groups:
            group["lr"] = config.lr * rate_factor(config, step)
        x, targets, index = self._mixed(step, batch)
        inputs = [x]
        if self.ball is not None:
            self.frozen.refresh()
            if config.method == "pgd":
                inputs = [objectives.pgd_images(self._attacked, x, targets, index, config.seed, self.ball)]
            else:
                inputs += [objectives.trades_images(self._attacked, x, index, config.seed, self.ball)]
        with self._autocast():
            outputs = network(*inputs)
        if config.method == "trades":
            loss = objectives.trades_loss(*outputs, targets, config.beta or 0.0, config.label_smoothing)
        else:
            loss = objectives.cross_entropy(outputs[0], targets, config.label_smoothing)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        average_statistics(self.model, self.ranks)
        if self.average is not None:
            self.average.update(self.model, step + 1)
        with torch.no_grad():
            labels = targets if targets.dim() == 1 else targets.argmax(1)
            right = [(logits.argmax(1) == labels).float().mean() for logits in outputs]
            return torch.stack([loss.detach(), *right])

    @torch.no_grad()
    def _validate(self, images: ImageSet) -> float:
        """Accuracy on held-out images, attacked if the training is (by PGD of twice its steps); each rank does its share."""
        config, ranks = self.config, self.ranks
        frozen = freeze(self.averaged)
        attack = None
        if self.ball is not None:
            ball = self.ball
            attack = PGD(ball.norm, ball.eps, seed=config.seed, steps=2 * ball.steps, step_size=ball.step_size)

        def network(x: Tensor) -> Tensor:
            with self._autocast():
                return frozen(x).float()

        mine, right = np.arange(ranks.rank, len(images), ranks.world_size), 0
        parts = [mine[first : first + config.batch_size] for first in range(0, len(mine), config.batch_size)]
        batches = stream(images, parts, ranks.device, Augment(), kind=config.loader, workers=config.workers)
        with contextlib.closing(batches):
            for items, (x, y) in zip(parts, batches, strict=True):
                assert y is not None
                if attack is None:
                    right += int((network(x).argmax(1) == y).sum())
                else:
                    found = attack.run(network, x, y, torch.from_numpy(items).to(ranks.device))
                    right += int(found.fooled.logical_not().sum())
        return round(ranks.mean(right) * ranks.world_size) / len(images)

    def _checkpoint(self, step: int) -> None:
        """Weights if they are the best so far, and the state, last, so that a kill in between repeats this checkpoint."""
        keep = True
        if self.data.validation is not None:
            accuracy = self._validate(self.data.validation)
            # The later one of equals: the falling rate makes it the better bet.
            keep = self.best is None or accuracy >= self.best[0]
            self.best = (accuracy, step) if keep else self.best
        self.ranks.barrier()
        if self.ranks.is_first:
            if keep:
                save_checkpoint(self.folder, "classifier", self._description(step), self.averaged.state_dict())
            save_state(self.folder, step, self.facts, self.modules, self.optimizer, {"best": self.best})
        self.ranks.barrier()

    def _description(self, step: int) -> dict[str, object]:
        reference = self.data.reference
        measure = "accuracy" if self.ball is None else "robust_accuracy"
        return {
            "name": self.config.model,
            "shape": list(reference.shape),
            "classes": reference.classes,
            "class_names": None if reference.class_names is None else list(reference.class_names),
            "model": self.model.description,
            "training": {**self.facts, "steps_done": step},
            "validation": None
            if self.best is None
            else {measure: self.best[0], "count": len(self.data.validation or ())},
        }


class _Passes(nn.Module):
    """Several batches through one network in one call, because DDP takes one forward call a backward call.

    Each batch is normalized by itself in batch norm, as in the training of TRADES that was published.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *batches: Tensor) -> list[Tensor]:
        return [self.model(batch) for batch in batches]


def _resolved(config: ClassifierConfig, data: Mixture, device: torch.device) -> ClassifierConfig:
    """The configuration with what depends on the data, the device or other settings filled in."""
    shape = data.reference.shape
    attacks = config.method != "standard"
    eps = config.radius if attacks else None
    if config.crop is not None and config.crop >= min(shape[:2]):
        raise UsageError(f"--crop {config.crop}: expected less than the images' side of {min(shape[:2])}; lower it")
    return dataclasses.replace(
        config,
        fraction=data.fraction,
        model=default_classifier(shape) if config.model == "auto" else config.model,
        eps=eps,
        step_size=config.step_size if eps is None or config.step_size is not None else eps / 4,
        beta=_BETA if config.method == "trades" and config.beta is None else config.beta,
        warmup=config.warmup if config.warmup is not None else {"cosine": 0.1, "onecycle": 0.3}[config.schedule],
        crop=config.crop if config.crop is not None else (4 if shape == (32, 32, 3) else 0),
        flip=flips(config),
        precision=PRECISION_NAMES[pick_precision(config.precision, device)],
    )


def _optimizer(model: nn.Module, config: ClassifierConfig) -> torch.optim.Optimizer:
    """SGD with Nesterov momentum; biases and the weights of batch norm, all of one dimension, do not decay.

    Decay pulls these towards 0 without the effect it has on a convolution before a batch norm, whose scale does not matter
    (He et al. 2019, "Bag of tricks for image classification", section 3.1).
    """
    decaying = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    others = [parameter for parameter in model.parameters() if parameter.dim() <= 1]
    groups = [{"params": decaying}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.SGD(
        groups, lr=config.lr, momentum=config.momentum, nesterov=True, weight_decay=config.weight_decay, fused=True
    )


def rate_factor(config: ClassifierConfig, step: int) -> float:
    """The learning rate of a step (from 0), as a factor on ``lr``.

    cosine: up a straight line in the first ``warmup`` of the steps, then down half a cosine to 0 (Loshchilov and Hutter 2017).
    onecycle: up half a cosine from 1/25 to 1, then down another to 1/250,000 (Smith and Topin 2018, in the form and with the
    ends of torch's OneCycleLR, whose changing momentum is left out).
    """
    assert config.warmup is not None
    if config.schedule == "cosine":
        rise = int(config.warmup * config.steps)
        if step < rise:
            return (step + 1) / rise
        return _half_cosine(1.0, 0.0, (step - rise) / max(1, config.steps - rise))
    top, last = config.warmup * config.steps - 1, config.steps - 1
    if step < top:
        return _half_cosine(1 / 25, 1.0, step / top)
    return _half_cosine(1.0, 1 / 250_000, (step - top) / max(1, last - top))


def _half_cosine(start: float, end: float, share: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * share)) / 2
