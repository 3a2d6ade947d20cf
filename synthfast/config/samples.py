"""Options of ``synthfast score samples`` and ``synthfast select``."""

from __future__ import annotations

import math
from dataclasses import dataclass

from synthfast.config.fields import allow_lossy_option, flag, option, require, require_seed
from synthfast.errors import UsageError

SAMPLE_SCORES = ("discriminator", "density", "confidence", "memorization")
CRITERIA = ("discriminator", "density", "confidence", "not-memorized", "random")


@dataclass(frozen=True)
class SamplesConfig:
    """``synthfast score samples``: a score for each image, in files beside the shards."""

    synthetic: str | None = option(None, "Folder of synthetic shards.", metavar="DIR")
    real: str = option("digits", "Real images to compare with, such as cifar10 or folder:DIR; no test images.")
    scores: str | None = option(
        None, f"Which scores, separated by commas; all of {', '.join(SAMPLE_SCORES)} if not given.", metavar="NAMES"
    )
    scores_folder: str | None = option(
        None, "Folder for the scores; scores, in the folder of shards, if not given.", metavar="DIR"
    )
    groups: str | None = option(
        None, "Groups for the tables: a .npy of whole numbers or a .csv of names, one for each image.", metavar="FILE"
    )
    norm: str = option("l2", "discriminator: norm of the ball.", choices=("l2", "linf"))
    eps: float | None = option(
        None,
        "discriminator: radius on pixels in [0, 1], in training and scoring; if not given, in l2 0.02 for 8x8 grey images and in "
        "proportion to the root of the number of values for others, in linf 4/255.",
    )
    discriminator_steps: int = option(
        600, "discriminator: at most so many training steps for each of the two, without an attack and then with it."
    )
    attack_steps: int = option(10, "discriminator: steps of the attack on each image; 0 scores the image itself.")
    features: str | None = option(
        None, "density: features (see synthfast score fid); those of that command if not given.", metavar="NAME"
    )
    k: int = option(5, "density, memorization: the neighbour whose distance is the size of a ball.", short="-k")
    classifier: str | None = option(
        None, "confidence: checkpoint folder; an embedded one for 8x8 digits if not given.", metavar="DIR"
    )
    train_set: str | None = option(
        None, "memorization: what the generator was trained on; --real if not given.", metavar="SOURCE"
    )
    memorization_features: str = option("pixels", "memorization: features in which images are near.", metavar="NAME")
    null_share: float = option(
        0.01, "memorization: share of new real images that would be flagged, which sets the threshold."
    )
    batch_size: int | None = option(
        None, "Images scored together; 256 on a CPU and 1024 on a GPU if not given. Rounding depends on it."
    )
    seed: int = option(0, "Discriminators and attacks depend on it.")
    allow_lossy: bool = allow_lossy_option()
    image_size: int | None = option(None, "Side that real images without a fixed size are resized to.")
    data_dir: str = option("data", "Where data sets lie.", metavar="DIR")
    device: str = option("auto", "auto, cpu, cuda or cuda:N.")
    out: str | None = option(None, "Write the result JSON here.", metavar="FILE")
    json: bool = option(False, "Print the result JSON instead of the table.")

    def __post_init__(self) -> None:
        if not self.synthetic:
            raise UsageError("--synthetic: expected a folder of synthetic shards, found none; give one")
        for name in self.score_names:
            if name not in SAMPLE_SCORES:
                raise UsageError(
                    f"--scores {self.scores}: expected some of {', '.join(SAMPLE_SCORES)}, found {name!r}; correct it"
                )
        require(
            self.eps is None or 0 <= self.eps < math.inf, "--eps", self.eps, "a number of at least 0, such as 8/255"
        )
        if self.norm == "linf" and self.eps is not None and self.eps >= 1:
            raise UsageError(
                f"--eps {self.eps:g}: expected a radius on pixels in [0, 1]; write {self.eps:g}/255 for 1/255ths"
            )
        require(self.attack_steps >= 0, "--attack-steps", self.attack_steps, "a whole number of at least 0")
        for name in ("discriminator_steps", "k"):
            require(getattr(self, name) >= 1, flag(name), getattr(self, name), "a whole number of at least 1")
        require(0 < self.null_share < 1, "--null-share", self.null_share, "a number between 0 and 1")
        require(self.batch_size is None or self.batch_size >= 1, "--batch-size", self.batch_size, "at least 1")
        require_seed(self.seed)

    @property
    def score_names(self) -> tuple[str, ...]:
        """Each once, in the order of the tables."""
        given = SAMPLE_SCORES if self.scores is None else [name.strip() for name in self.scores.split(",")]
        return tuple(dict.fromkeys([*(name for name in SAMPLE_SCORES if name in given), *given]))


@dataclass(frozen=True)
class SelectConfig:
    """``synthfast select``: which images of a scored shard folder to use."""

    folder: tuple[str, ...] = option((), "Folder of synthetic shards.", metavar="DIR", positional=True)
    by: tuple[str, ...] = option(
        (),
        f"What images are chosen by: {', '.join(CRITERIA)}. Given several times, images that not-memorized leaves are ranked by "
        "the mean of their ranks.",
        metavar="NAME",
    )
    keep: float | None = option(
        None, "Share of all images to keep; 0.2, and with not-memorized alone all that it leaves, if not given."
    )
    balanced: bool | None = option(
        None, "Keep the same number of each class; on for images with labels, except with not-memorized alone."
    )
    low_density: float | None = option(
        None,
        "Also write weights that grow with the distance to the k-th real neighbour to this power, so that regions which the "
        "real images cover poorly are drawn more often.",
        metavar="WEIGHT",
    )
    out: str = option("selection.npy", "File of the selection, a .npy.", metavar="FILE")
    scores_folder: str | None = option(
        None, "Folder of the scores; scores, in the folder of shards, if not given.", metavar="DIR"
    )
    seed: int = option(0, "The order of random depends on it.")
    json: bool = option(False, "Print the selection's manifest instead of lines.")

    def __post_init__(self) -> None:
        if len(self.folder) != 1:
            raise UsageError(f"expected one folder of synthetic shards, found {len(self.folder)}; name one")
        if not self.criteria:
            raise UsageError(f"--by: expected one of {', '.join(CRITERIA)}, found none; give one")
        for name in self.criteria:
            if name not in CRITERIA:
                raise UsageError(f"--by {name}: expected one of {', '.join(CRITERIA)}; correct it")
        require(self.keep is None or 0 < self.keep <= 1, "--keep", self.keep, "a share above 0 and up to 1")
        require(
            self.low_density is None or 0 < self.low_density <= 10,
            "--low-density",
            self.low_density,
            "a power above 0 and up to 10",
        )
        require_seed(self.seed)

    @property
    def criteria(self) -> tuple[str, ...]:
        """Each once, those given with commas apart."""
        return tuple(dict.fromkeys(name.strip() for given in self.by for name in given.split(",")))
