"""Options of ``synthfast score fid`` and ``synthfast score prdc``."""

from __future__ import annotations

from dataclasses import dataclass

from synthfast.config.fields import allow_lossy_option, option, require, require_seed
from synthfast.errors import UsageError


@dataclass(frozen=True)
class _MetricConfig:
    """What both share: two sets of images, and the features that they are compared by."""

    real: str = option("digits:test", "Real images, such as digits:test, cifar10:test or folder:DIR.")
    synthetic: str | None = option(
        None,
        "Synthetic images: a shard folder, npz:FILE, folder:DIR or any other source; if not given, as many digits of the "
        "embedded generator as there are real ones.",
        metavar="DIR",
    )
    features: str | None = option(
        None,
        "pixels, classifier, classifier:DIR, inception, inception:FILE, dinov2, dinov2:FILE, timm:NAME or timm:NAME:FILE; "
        "classifier (the embedded one) for 8x8 grey images and else inception if not given.",
        metavar="NAME",
    )
    n: int | None = option(None, "Only the first n images of each set.", short="-n")
    per_class: bool = option(False, "Also of each class alone.")
    batch_size: int | None = option(
        None, "Images whose features are computed together; it changes nothing but time and memory."
    )
    seed: int = option(0, "What is drawn for the intervals depends on it.")
    allow_lossy: bool = allow_lossy_option()
    image_size: int | None = option(None, "Side that celeba, imagenet (64 if not given) and folders are resized to.")
    data_dir: str = option("data", "Where data sets lie.", metavar="DIR")
    device: str = option("auto", "auto, cpu, cuda or cuda:N.")
    allow_pickle: bool = option(False, "Read weights that are pickles (through torch.load(weights_only=True)).")
    out: str | None = option(None, "Write the result JSON here.", metavar="FILE")
    json: bool = option(False, "Print the result JSON instead of lines.")

    def __post_init__(self) -> None:
        require(self.n is None or self.n >= 1, "--n", self.n, "a whole number of at least 1")
        require(self.batch_size is None or self.batch_size >= 1, "--batch-size", self.batch_size, "at least 1")
        require_seed(self.seed)


@dataclass(frozen=True)
class FidConfig(_MetricConfig):
    """``synthfast score fid``."""

    save_stats: str | None = option(
        None,
        "Write mean and covariance of the real features here (npz: mu, sigma), for --real stats:FILE.",
        metavar="FILE",
    )
    kid_n: int = option(10_000, "KID: images of each set at most, drawn at random; its time grows with the square.")
    kid_subsets: int = option(
        0, "Also the mean KID of so many random subsets of 1,000 images, as torch-fidelity reports it."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.kid_n >= 24, "--kid-n", self.kid_n, "a whole number of at least 24")
        require(self.kid_subsets >= 0, "--kid-subsets", self.kid_subsets, "a whole number of at least 0")
        if self.save_stats is not None and self.real.startswith("stats:"):
            raise UsageError(
                f"--save-stats {self.save_stats}: --real {self.real} is such a file already; leave one out"
            )


@dataclass(frozen=True)
class PrdcConfig(_MetricConfig):
    """``synthfast score prdc``."""

    k: int = option(5, "The balls around images reach to their k-th nearest neighbour.")

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.k >= 1, "--k", self.k, "a whole number of at least 1")
