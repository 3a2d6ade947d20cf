"""Options of ``synthfast train classifier``."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from synthfast.config.fields import (
    flag,
    loader_option,
    option,
    radius,
    require,
    require_optimizer,
    require_seed,
    require_workers,
    workers_option,
)
from synthfast.errors import UsageError

ALL_IMAGES = "all"  # in place of a selection


@dataclass(frozen=True)
class ClassifierConfig:
    """``synthfast train classifier``: standard or adversarial training on real images, synthetic ones, or both.

    Where a default is None it depends on other settings or on the data, as the option's help says. The values of ``recipe`` are
    taken by :func:`make_config`; the constructor itself only notes the name.
    """

    dataset: str = option("digits", "Real images: digits, mnist, cifar10, ..., folder:DIR, npz:FILE or a shard folder.")
    synthetic: tuple[str, ...] = option((), "Folder of synthetic shards; may be given several times.", metavar="DIR")
    synthetic_weight: tuple[float, ...] = option(
        (),
        "How much of a batch's synthetic images a folder gives, in proportion to the others; one for each --synthetic, in their "
        "order; equal shares if not given.",
        metavar="W",
    )
    fraction: float | None = option(
        None, "Share of synthetic images in a batch: 0 uses real ones only, 1 synthetic ones only; 0.5 if not given."
    )
    synthetic_n: int | None = option(
        None, "Only the first n images of each synthetic folder, or of what is selected from it; all if not given."
    )
    selection: tuple[str, ...] = option(
        (),
        "Only the images that synthfast select chose, drawn by their weights if it gave any; one for each --synthetic, in their "
        "order, or the word all.",
        metavar="FILE",
    )
    out: str = option("runs/classifier", "Folder for the checkpoint.", metavar="DIR")
    recipe: str | None = option(
        None,
        "proxy (Sehwag et al. 2022) or edm (Wang et al. 2023), both for CIFAR-10, or a TOML file: settings that options and "
        "--config override.",
        metavar="NAME",
    )
    model: str = option(
        "auto",
        "small-cnn, preact-resnet-18, resnet-18, wrn-28-10, wrn-34-10, wrn-70-16 (any of these with -swish), or timm:NAME; "
        "auto is small-cnn up to 16 pixels, else preact-resnet-18.",
        metavar="NAME",
    )
    method: str = option(
        "standard",
        "standard, pgd (Madry et al. 2018) or trades (Zhang et al. 2019).",
        choices=("standard", "pgd", "trades"),
    )
    norm: str = option("linf", "pgd, trades: norm of the ball.", choices=("linf", "l2"))
    eps: float | None = option(
        None,
        "pgd, trades: radius of the ball on pixels in [0, 1], such as 8/255; 8/255 in linf and 0.5 in l2 if not given.",
    )
    attack_steps: int = option(10, "pgd, trades: steps of the attack.")
    step_size: float | None = option(None, "pgd, trades: step size of the attack; a quarter of eps if not given.")
    beta: float | None = option(None, "trades: weight of the robust term; 6 if not given.")
    steps: int = option(
        1_000, "Optimizer steps. The schedule depends on it, so that a finished run is not made longer."
    )
    batch_size: int = option(128, "Images in a step, over all ranks.")
    lr: float = option(0.1, "Highest learning rate of SGD.")
    schedule: str = option(
        "cosine",
        "cosine: linear rise to --lr, then along a cosine to 0. onecycle (Smith and Topin 2018): both along a cosine, from "
        "1/25 of --lr to a 10,000th of that.",
        choices=("cosine", "onecycle"),
    )
    warmup: float | None = option(
        None, "Share of the steps in which the rate rises; 0.1 for cosine and 0.3 for onecycle if not given."
    )
    momentum: float = option(0.9, "Nesterov momentum of SGD.")
    weight_decay: float = option(5e-4, "Weight decay of SGD; biases and batch norms have none.")
    ema: float = option(
        0.0, "Decay (tau) of the averaged weights a step, which are then what is saved and validated; 0 for no average."
    )
    label_smoothing: float = option(0.0, "Share of each label that is spread over all classes.")
    crop: int | None = option(
        None, "Zero pixels around an image before a random crop; 4 for colour images of 32x32 and 0 else if not given."
    )
    flip: bool | None = option(None, "Flip half of the images; on for cifar, celeba and imagenet if not given.")
    cutmix: float = option(0.0, "Probability that an image gets a box of another one (CutMix, Yun et al. 2019).")
    pseudo_labels: str | None = option(
        None, "Classifier (checkpoint folder) that labels synthetic shards without labels.", metavar="DIR"
    )
    validation: float = option(
        0.0,
        "Number, or below 1 the share, of real training images to hold out: the checkpoint that does best on them is kept, "
        "under attack if the training is; with 0 the last one.",
    )
    image_size: int | None = option(None, "Side that celeba, imagenet (64 if not given) and folders are resized to.")
    data_dir: str = option("data", "Where data sets lie.", metavar="DIR")
    download: bool = option(False, "Download the data set if it is missing.")
    seed: int = option(0, "Weights, order, augmentation and attacks depend on it.")
    device: str = option("auto", "auto, cpu, cuda or cuda:N.")
    precision: str = option("auto", "auto is bf16 where the GPU has it, else fp32.", choices=("auto", "fp32", "bf16"))
    compile: bool = option(False, "Train through torch.compile.")
    loader: str = loader_option()
    workers: int | None = workers_option()
    checkpoint_every: int = option(500, "Steps between checkpoints, and between validations.")

    def __post_init__(self) -> None:
        for name in ("steps", "attack_steps", "checkpoint_every"):
            require(getattr(self, name) >= 1, flag(name), getattr(self, name), "a whole number of at least 1")
        require(self.batch_size >= 2, "--batch-size", self.batch_size, "at least 2, for the network has batch norm")
        require_optimizer(self.lr, self.weight_decay)
        require(0 < self.momentum < 1, "--momentum", self.momentum, "a number between 0 and 1")
        require(self.warmup is None or 0 <= self.warmup < 1, "--warmup", self.warmup, "a number from 0 to below 1")
        for name in ("eps", "step_size"):
            value = getattr(self, name)
            require(value is None or 0 < value < math.inf, flag(name), value, "a positive number such as 8/255")
        require(self.beta is None or 0 <= self.beta < math.inf, "--beta", self.beta, "a number of at least 0")
        for name in ("ema", "label_smoothing"):
            value = getattr(self, name)
            require(0 <= value < 1, flag(name), value, "a number from 0 to below 1")
        require(self.crop is None or self.crop >= 0, "--crop", self.crop, "a whole number of at least 0")
        require(0 <= self.cutmix <= 1, "--cutmix", self.cutmix, "a number from 0 to 1")
        require(
            0 <= self.validation < math.inf and (self.validation < 1 or self.validation == int(self.validation)),
            "--validation",
            self.validation,
            "a share below 1 or a whole number of images",
        )
        require(self.fraction is None or 0 <= self.fraction <= 1, "--fraction", self.fraction, "a number from 0 to 1")
        if self.fraction is not None and self.fraction > 0 and not self.synthetic:
            whose = "" if self.recipe is None else f" (of --recipe {self.recipe})"
            raise UsageError(
                f"--fraction {self.fraction}{whose}: expected --synthetic DIR beside it, found none; add one"
            )
        for name in ("synthetic_n", "pseudo_labels"):
            value = getattr(self, name)
            if value is not None and not self.synthetic:
                raise UsageError(f"{flag(name)} {value}: expected --synthetic DIR beside it, found none; add one")
        if self.selection and len(self.selection) != len(self.synthetic):
            raise UsageError(
                f"--selection {' '.join(self.selection)}: expected one for each --synthetic folder, of which there are "
                f"{len(self.synthetic)}, found {len(self.selection)}; give as many, {ALL_IMAGES} for a whole folder"
            )
        if self.synthetic_weight and len(self.synthetic_weight) != len(self.synthetic):
            raise UsageError(
                f"--synthetic-weight {' '.join(f'{weight:g}' for weight in self.synthetic_weight)}: expected one for each "
                f"--synthetic folder, of which there are {len(self.synthetic)}, found {len(self.synthetic_weight)}; give as many"
            )
        for weight in self.synthetic_weight:
            require(0 < weight < math.inf, "--synthetic-weight", weight, "a positive number")
        require(
            self.synthetic_n is None or self.synthetic_n >= 1,
            "--synthetic-n",
            self.synthetic_n,
            "a whole number of at least 1",
        )
        for name in ("eps", "step_size", "beta"):
            value, methods = getattr(self, name), _METHODS_WITH[name]
            if value is not None and self.method not in methods:
                raise UsageError(
                    f"{flag(name)} {value}: method {self.method} does not use it; add --method {' or '.join(methods)}"
                )
        require_workers(self.workers)
        require_seed(self.seed)

    @property
    def radius(self) -> float:
        """``eps``, or the usual one of the norm."""
        return radius(self.norm, self.eps)


# Settings of an attack, and the methods that use them.
_METHODS_WITH = {"eps": ("pgd", "trades"), "step_size": ("pgd", "trades"), "beta": ("trades",)}


def unused_by(method: str) -> set[str]:
    return {name for name, methods in _METHODS_WITH.items() if method not in methods}


def for_method(config: ClassifierConfig, method: str) -> ClassifierConfig:
    """The same settings for another training method, without those (eps, step_size, beta) that it does not use."""
    unused: dict[str, Any] = dict.fromkeys(unused_by(method))
    return dataclasses.replace(config, method=method, **unused)
