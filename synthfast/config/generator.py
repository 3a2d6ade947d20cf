"""Options of ``synthfast train generator``."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from synthfast.config.fields import (
    flag,
    loader_option,
    option,
    require,
    require_seed,
    require_workers,
    workers_option,
)
from synthfast.errors import UsageError

AUGMENTATIONS = ("colour", "translation", "cutout")


@dataclass(frozen=True)
class GeneratorConfig:
    """``synthfast train generator``: a diffusion model with the EDM or the DDPM loss, or a GAN.

    Where a default is None it depends on ``arch`` or on the data, as the option's help says; :func:`settled` fills in the former.
    """

    dataset: str = option(
        "digits", "digits, mnist, cifar10, cifar100, celeba, imagenet, folder:DIR, npz:FILE or a shard folder."
    )
    out: str = option("runs/generator", "Folder for the checkpoint.", metavar="DIR")
    arch: str = option(
        "diffusion",
        "diffusion, or gan: a class-conditional GAN with the hinge loss (Miyato and Koyama 2018).",
        choices=("diffusion", "gan"),
    )
    steps: int | None = option(None, "Optimizer steps; 1,500 (gan: 4,000) if not given.")
    batch_size: int | None = option(None, "Images in a step, over all ranks; 128 (gan: 32) if not given.")
    lr: float | None = option(None, "Learning rate, of the gan's generator; 1e-3 (gan: 5e-4) if not given.")
    warmup: int | None = option(None, "diffusion: steps of linear warm-up; 200 if not given.")
    weight_decay: float | None = option(None, "diffusion: weight decay of AdamW; 0 if not given.")
    clip_norm: float | None = option(None, "diffusion: largest gradient norm; 1 if not given.")
    ema: float = option(0.999, "Decay of the averaged weights a step; they are what is saved and sampled from.")
    loss: str | None = option(
        None,
        "diffusion: edm (Karras et al. 2022; if not given), or ddpm with a linear or a cosine schedule.",
        choices=("edm", "ddpm-linear", "ddpm-cosine"),
    )
    prediction: str | None = option(
        None,
        "ddpm losses: what the network predicts; epsilon if not given.",
        choices=("epsilon", "v_prediction", "sample"),
    )
    sigma_data: float | None = option(None, "edm loss: standard deviation of the data in [-1, 1]; 0.5 if not given.")
    label_dropout: float | None = option(
        None, "diffusion: share of labels dropped, so that guidance works; labelled data only; 0.1 if not given."
    )
    d_steps: int | None = option(None, "gan: discriminator steps, each of a batch of its own, a step; 2 if not given.")
    d_lr: float | None = option(None, "gan: learning rate of the discriminator; 2e-3 if not given.")
    latent: int | None = option(None, "gan: size of the noise vector; 64 if not given.")
    width: int | None = option(
        None,
        "gan: channels at the full resolution, twice as many at half of it; if not given 32 up to 16 pixels a side, 128 up to "
        "32, else 64.",
    )
    augment: str | None = option(
        None,
        "gan: differentiable augmentation (Zhao et al. 2020): none, or some of colour,translation,cutout; if not given all of "
        "them, but colour for RGB alone and cutout above 16 pixels alone.",
    )
    conditional: bool = option(True, "Use the labels where the data has them.")
    flip: bool | None = option(None, "Flip half of the images; on for cifar, celeba and imagenet if not given.")
    image_size: int | None = option(None, "Side that celeba, imagenet (64 if not given) and folders are resized to.")
    data_dir: str = option("data", "Where data sets lie.", metavar="DIR")
    download: bool = option(False, "Download the data set if it is missing.")
    seed: int = option(0, "Weights, order, noise and augmentation depend on it.")
    device: str = option("auto", "auto, cpu, cuda or cuda:N.")
    precision: str = option("auto", "auto is bf16 where the GPU has it, else fp32.", choices=("auto", "fp32", "bf16"))
    compile: bool = option(False, "Train through torch.compile.")
    loader: str = loader_option()
    workers: int | None = workers_option()
    checkpoint_every: int = option(500, "Steps between checkpoints.")

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "checkpoint_every", "d_steps", "latent", "width"):
            self._require(name, lambda value: value >= 1, "a whole number of at least 1")
        for name in ("lr", "d_lr", "clip_norm", "sigma_data"):
            self._require(name, lambda value: 0 < value < math.inf, "a positive number")
        self._require("weight_decay", lambda value: 0 <= value < math.inf, "a number of at least 0")
        self._require("warmup", lambda value: value >= 0, "a whole number of at least 0")
        for name in ("ema", "label_dropout"):
            self._require(name, lambda value: 0 <= value < 1, "a number from 0 to below 1")
        require_workers(self.workers)
        require_seed(self.seed)

    def _require(self, name: str, holds: Callable[[Any], bool], expected: str) -> None:
        value = getattr(self, name)
        require(value is None or holds(value), flag(name), value, expected)


# What options are where they are not given. One that a kind lacks is not for it.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "diffusion": {
        "steps": 1_500,
        "batch_size": 128,
        "lr": 1e-3,
        "warmup": 200,
        "weight_decay": 0.0,
        "clip_norm": 1.0,
        "loss": "edm",
        "prediction": "epsilon",
        "sigma_data": 0.5,
        "label_dropout": 0.1,
    },
    "gan": {
        "steps": 4_000,
        "batch_size": 32,
        "lr": 5e-4,
        "d_steps": 2,
        "d_lr": 2e-3,
        "latent": 64,
        "width": None,
        "augment": None,
    },
}


def settled(config: GeneratorConfig) -> GeneratorConfig:
    """``config`` with the defaults of its ``arch`` filled in; UsageError where it has an option of another kind."""
    defaults = _DEFAULTS[config.arch]
    for arch, others in _DEFAULTS.items():
        for name in others:
            value = getattr(config, name)
            if name not in defaults and value is not None:
                raise UsageError(
                    f"{flag(name)} {value}: arch {config.arch} does not use it; drop it or add --arch {arch}"
                )
    return dataclasses.replace(
        config, **{name: value for name, value in defaults.items() if getattr(config, name) is None}
    )


def settings(config: GeneratorConfig) -> dict[str, Any]:
    """The options that the ``arch`` of ``config`` uses, by name; ``arch`` itself aside, which the kind of checkpoint says, and
    those of loaders, which change nothing."""
    unused = {name for others in _DEFAULTS.values() for name in others} - _DEFAULTS[config.arch].keys()
    unused |= {"arch", "loader", "workers"}
    return {name: value for name, value in dataclasses.asdict(config).items() if name not in unused}
