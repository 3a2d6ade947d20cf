"""Options of ``synthfast score arc``."""

from __future__ import annotations

from dataclasses import dataclass

from synthfast.config.fields import allow_lossy_option, option, require, require_optimizer, require_seed


@dataclass(frozen=True)
class ArcConfig:
    """``synthfast score arc``."""

    synthetic: str | None = option(
        None,
        "Synthetic images: a folder of shards, or any other source; if not given, as many digits of the embedded generator "
        "as there are real ones.",
        metavar="SOURCE",
    )
    real: str = option(
        "digits:test", "Real images. Take ones that the generator was not trained on, or memorizing them is rewarded."
    )
    norm: str = option("l2", "Norm of the balls.", choices=("l2", "linf"))
    eps: str = option(
        "auto",
        "Radii: auto, a list such as 0,0.1,0.2, or START:STOP:COUNT. In l2 on pixels in [0, 1], in linf in units of 1/255.",
        metavar="GRID",
    )
    radii: int = option(
        8, "auto: so many radii are measured, 0 included, and up to 4 more where success is not at chance yet."
    )
    n: int | None = option(None, "Images of each kind; as many as the smaller set has if not given.", short="-n")
    held_out: float = option(
        0.25,
        "Share of the images to measure on, at most 5,000 of a kind; 0.15 of them validate, at most 500; the rest trains.",
    )
    per_class: bool = option(False, "ARC of each class too.")
    discriminator: str = option(
        "auto",
        "Network: auto (small-cnn up to 16 pixels, else resnet-18), a classifier's name, or linear.",
        metavar="NAME",
    )
    steps: int = option(600, "At most so many optimizer steps for a radius.")
    batch_size: int = option(64, "Images in a step, half of them real.")
    lr: float = option(0.002, "Learning rate of AdamW.")
    attack_steps: int = option(5, "PGD steps in training.")
    patience: int = option(
        3,
        "Stop after so many validations, one every 15 steps, without a better one; at radius 0, which begins anew, "
        "after 12 at least.",
    )
    crop: int | None = option(None, "Pad training images by so many pixels and crop; 0 up to 16 pixels, else 2.")
    flip: bool | None = option(None, "Mirror half of the training images; on for sets of photographs.")
    measure_steps: int = option(25, "Steps of a run of the measuring attack (APGD).")
    restarts: int = option(
        2,
        "Runs of the measuring attack, each from another start; if more than one, up to three times as many where the last one "
        "still breaks more than 0.2% of the images.",
    )
    bootstrap: int = option(1000, "Draws for the intervals.")
    figure: str | None = option(
        None, "Draw the curve here; beside --out, with the ending .png, if not given.", metavar="FILE"
    )
    seed: int = option(0, "Of the split, the networks, the attacks and the draws.")
    allow_lossy: bool = allow_lossy_option()
    image_size: int | None = option(None, "Side that celeba, imagenet (64 if not given) and folders are resized to.")
    data_dir: str = option("data", "Where data sets lie.", metavar="DIR")
    device: str = option("auto", "auto, cpu, cuda or cuda:N.")
    out: str | None = option(None, "Write the result JSON here; interrupted, the same command goes on.", metavar="FILE")
    json: bool = option(False, "Print the result JSON instead of lines.")

    def __post_init__(self) -> None:
        require(self.radii >= 2, "--radii", self.radii, "a whole number of at least 2")
        require(self.n is None or self.n >= 20, "--n", self.n, "a whole number of at least 20")
        require(0 < self.held_out <= 0.8, "--held-out", self.held_out, "a number above 0 and at most 0.8")
        for name in ("steps", "attack_steps", "patience", "measure_steps", "restarts"):
            value = getattr(self, name)
            require(value >= 1, f"--{name.replace('_', '-')}", value, "a whole number of at least 1")
        even = self.batch_size >= 4 and self.batch_size % 2 == 0
        require(even, "--batch-size", self.batch_size, "an even number of at least 4")
        require_optimizer(self.lr, 0.0)
        require(self.crop is None or self.crop >= 0, "--crop", self.crop, "a whole number of at least 0")
        require(self.bootstrap >= 100, "--bootstrap", self.bootstrap, "a whole number of at least 100")
        require_seed(self.seed)
