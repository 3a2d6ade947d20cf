"""Options of ``synthfast sample``."""

from __future__ import annotations

import math
from dataclasses import dataclass

from synthfast.config.fields import option, require, require_seed
from synthfast.errors import UsageError


@dataclass(frozen=True)
class SampleConfig:
    """``synthfast sample``. Where a default is None the generator's own value counts."""

    n: int = option(
        10_000, "Number of images. Under torchrun write -n, because it takes --n for an option of its own.", short="-n"
    )
    generator: str = option(
        "digits",
        "digits (embedded), a checkpoint folder, a diffusers model folder or hub id, or py:module:function.",
        metavar="PATH",
    )
    out: str = option("runs/samples", "Folder for the shards.", metavar="DIR")
    solver: str | None = option(
        None, "Sampling algorithm.", choices=("ddpm", "ddim", "euler", "heun", "dpmpp-2m", "dpmpp-2m-sde")
    )
    steps: int | None = option(
        None, "Solver steps; heun evaluates the network 2 x steps - 1 times, the others steps times."
    )
    guidance: float | None = option(None, "Classifier-free guidance weight; 1 is none.")
    labels: str = option(
        "balanced",
        "balanced (image i has class i mod classes), uniform (drawn), classes such as 3 or 3,5 (in turn), "
        "or weights:0.5,0.3,0.2 (drawn).",
    )
    seed: int = option(0, "Image i depends on the seed and i alone.")
    batch_size: int | None = option(None, "Images in one network call; 128 on a CPU and 1,024 on a GPU if not given.")
    shard_size: int = option(10_000, "Images in a shard, the unit of work that an interruption can lose.")
    format: str | None = option(
        None,
        "npy (arrays) or wds (WebDataset tars with an index for DALI); npy up to 64x64 pixels and wds above if not given.",
        choices=("npy", "wds"),
    )
    codec: str | None = option(None, "wds: png (lossless) or jpg; png if not given.", choices=("png", "jpg"))
    quality: int | None = option(
        None,
        "jpg: 1 to 100; 95 if not given. From 90 on colours keep their full resolution (4:4:4), below it half (4:2:0).",
    )
    device: str = option("auto", "auto, cpu, cuda or cuda:N.")
    precision: str = option(
        "fp32", "Arithmetic of the network; the solver always computes in float32.", choices=("fp32", "bf16", "fp16")
    )
    compile: bool = option(False, "Run the network through torch.compile.")
    eta: float | None = option(None, "ddim: 0 is deterministic, 1 has the noise of ddpm.")
    churn: float | None = option(None, "euler, heun: S_churn of Karras et al. 2022.")
    s_tmin: float | None = option(None, "euler, heun: lowest noise level with churn.")
    s_tmax: float | None = option(None, "euler, heun: highest noise level with churn.")
    s_noise: float | None = option(None, "euler, heun: factor on the noise of churn.")
    spacing: str | None = option(
        None, "Spacing of the noise levels.", choices=("karras", "leading", "trailing", "linspace")
    )
    rho: float | None = option(None, "Exponent of the karras spacing.")
    sigma_min: float | None = option(None, "Lowest noise level of the karras spacing.")
    sigma_max: float | None = option(None, "Highest noise level of the karras spacing.")
    clip: float | None = option(None, "Clip denoised images to [-clip, clip]; inf for no clipping.")
    variance: str | None = option(None, "ddpm: variance of its noise.", choices=("fixed_small", "fixed_large"))
    allow_pickle: bool = option(False, "Read weights that are pickles (through torch.load(weights_only=True)).")

    def __post_init__(self) -> None:
        require(self.n >= 1, "--n", self.n, "a whole number of at least 1")
        require(self.shard_size >= 1, "--shard-size", self.shard_size, "a whole number of at least 1")
        require(self.batch_size is None or self.batch_size >= 1, "--batch-size", self.batch_size, "at least 1")
        require(
            self.quality is None or 1 <= self.quality <= 100, "--quality", self.quality, "a whole number from 1 to 100"
        )
        if self.quality is not None and self.codec != "jpg":
            raise UsageError(f"--quality {self.quality}: is for jpg; add --codec jpg, or leave it out")
        if self.codec is not None and self.format == "npy":
            raise UsageError(f"--codec {self.codec}: npy stores plain pixels; write --format wds, or leave it out")
        require_seed(self.seed)
        require(self.guidance is None or math.isfinite(self.guidance), "--guidance", self.guidance, "a finite number")
