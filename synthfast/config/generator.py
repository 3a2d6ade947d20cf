"""Options of ``synthfast train generator``."""

from __future__ import annotations

import math
from dataclasses import dataclass

from synthfast.config.fields import flag, option, require, require_optimizer, require_seed


@dataclass(frozen=True)
class GeneratorConfig:
    """``synthfast train generator``: a diffusion model with the EDM or the DDPM loss."""

    dataset: str = option(
        "digits", "digits, mnist, cifar10, cifar100, celeba, imagenet, folder:DIR, npz:FILE or a shard folder."
    )
    out: str = option("runs/generator", "Folder for the checkpoint.", metavar="DIR")
    steps: int = option(1_500, "Optimizer steps.")
    batch_size: int = option(128, "Images in a step, over all ranks.")
    lr: float = option(1e-3, "Learning rate of AdamW after the warm-up.")
    warmup: int = option(200, "Steps of linear warm-up.")
    weight_decay: float = option(0.0, "Weight decay of AdamW.")
    clip_norm: float = option(1.0, "Largest gradient norm.")
    ema: float = option(0.999, "Decay of the averaged weights a step; they are what is saved and sampled from.")
    loss: str = option(
        "edm",
        "edm (Karras et al. 2022), or ddpm with a linear or a cosine schedule.",
        choices=("edm", "ddpm-linear", "ddpm-cosine"),
    )
    prediction: str = option(
        "epsilon", "ddpm losses: what the network predicts.", choices=("epsilon", "v_prediction", "sample")
    )
    sigma_data: float = option(0.5, "edm loss: standard deviation of the data in [-1, 1].")
    label_dropout: float = option(0.1, "Share of labels dropped, so that guidance works; labelled data only.")
    conditional: bool = option(True, "Use the labels where the data has them.")
    flip: bool | None = option(None, "Flip half of the images; on for cifar, celeba and imagenet if not given.")
    image_size: int | None = option(None, "Side that celeba, imagenet (64 if not given) and folders are resized to.")
    data_dir: str = option("data", "Where data sets lie.", metavar="DIR")
    download: bool = option(False, "Download the data set if it is missing.")
    seed: int = option(0, "Weights, order, noise and augmentation depend on it.")
    device: str = option("auto", "auto, cpu, cuda or cuda:N.")
    precision: str = option("auto", "auto is bf16 where the GPU has it, else fp32.", choices=("auto", "fp32", "bf16"))
    compile: bool = option(False, "Train through torch.compile.")
    checkpoint_every: int = option(500, "Steps between checkpoints.")

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "checkpoint_every"):
            require(getattr(self, name) >= 1, flag(name), getattr(self, name), "a whole number of at least 1")
        require_optimizer(self.lr, self.weight_decay)
        require(self.warmup >= 0, "--warmup", self.warmup, "a whole number of at least 0")
        require(0 < self.clip_norm < math.inf, "--clip-norm", self.clip_norm, "a positive number")
        require(0 <= self.ema < 1, "--ema", self.ema, "a number from 0 to below 1")
        require(0 < self.sigma_data < math.inf, "--sigma-data", self.sigma_data, "a positive number")
        require(0 <= self.label_dropout < 1, "--label-dropout", self.label_dropout, "a number from 0 to below 1")
        require_seed(self.seed)
