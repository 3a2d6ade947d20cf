"""Options of ``synthfast score accuracy``, ``score robust`` and ``inflection``, and what ``rank`` shares with it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from synthfast.config.fields import option, radius, require, require_seed
from synthfast.errors import UsageError


@dataclass(frozen=True)
class AccuracyConfig:
    """``synthfast score accuracy``."""

    classifier: str | None = option(
        None,
        "Checkpoint folder of synthfast train classifier, or a .safetensors or .pt file with --model.",
        metavar="PATH",
    )
    model: str | None = option(
        None, "Architecture of a file of weights, such as wrn-28-10-swish; a folder knows its own.", metavar="NAME"
    )
    dataset: str = option("digits:test", "Labelled images, such as digits:test, cifar10:test or folder:DIR.")
    n: int | None = option(None, "Only the first n images.", short="-n")
    image_size: int | None = option(None, "Side that celeba, imagenet (64 if not given) and folders are resized to.")
    data_dir: str = option("data", "Where data sets lie.", metavar="DIR")
    device: str = option("auto", "auto, cpu, cuda or cuda:N.")
    allow_pickle: bool = option(False, "Read weights that are pickles (through torch.load(weights_only=True)).")
    out: str | None = option(None, "Write the result JSON here.", metavar="FILE")
    json: bool = option(False, "Print the result JSON instead of lines.")

    def __post_init__(self) -> None:
        _require_scored(self)


@dataclass(frozen=True)
class RobustConfig(AccuracyConfig):
    """``synthfast score robust``."""

    attack: str = option(
        "autoattack",
        "autoattack (the standard version), pgd or fgsm.",
        choices=("autoattack", "pgd", "fgsm"),
    )
    norm: str = option("linf", "Norm of the ball.", choices=("linf", "l2"))
    eps: float | None = option(
        None, "Radius on pixels in [0, 1], such as 8/255; 8/255 in linf and 0.5 in l2 if not given."
    )
    attack_steps: int = option(20, "pgd: steps.")
    step_size: float | None = option(None, "pgd: step size; a quarter of eps if not given.")
    restarts: int = option(1, "pgd: random starts.")
    batch_size: int | None = option(
        None, "Images attacked together; 128 on a CPU and 512 on a GPU if not given. Rounding depends on it."
    )
    seed: int = option(0, "Random starts and the square attack depend on it and on an image's number.")

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_attack(self)
        require(self.batch_size is None or self.batch_size >= 1, "--batch-size", self.batch_size, "at least 1")

    @property
    def radius(self) -> float:
        """``eps``, or the usual one of the norm."""
        return radius(self.norm, self.eps)


@dataclass(frozen=True)
class TrialConfig:
    """What ``synthfast inflection`` and ``synthfast rank`` share: how classifiers are trained and tested for a comparison."""

    test: str = option("digits:test", "Labelled images to test classifiers on.")
    train: str | None = option(
        None, "TOML file with further settings of synthfast train classifier for all runs.", metavar="FILE"
    )
    recipe: str | None = option(None, "Recipe for all runs (see synthfast train classifier).", metavar="NAME")
    model: str | None = option(None, "Architecture of all runs (see synthfast train classifier).", metavar="NAME")
    steps: int | None = option(None, "Optimizer steps of each run.")
    batch_size: int | None = option(None, "Images in a step.")
    norm: str = option("linf", "Norm of the ball, in training and test.", choices=("linf", "l2"))
    eps: float | None = option(
        None, "Radius on pixels in [0, 1], in training and test; 8/255 in linf and 0.5 in l2 if not given."
    )
    attack: str = option("pgd", "Attack of the test.", choices=("autoattack", "pgd", "fgsm"))
    attack_steps: int = option(20, "Steps of the test's pgd.")
    step_size: float | None = option(None, "Step size of the test's pgd; a quarter of eps if not given.")
    restarts: int = option(1, "Random starts of the test's pgd.")
    attack_batch_size: int = option(128, "Images attacked together in the test.")
    n: int | None = option(None, "Only the first n test images.", short="-n")
    seed: int = option(0, "Randomness of the test's attack and of scores.")
    image_size: int | None = option(None, "Side that celeba, imagenet and folders are resized to.")
    data_dir: str = option("data", "Where data sets lie.", metavar="DIR")
    device: str = option("auto", "auto, cpu, cuda or cuda:N.")
    json: bool = option(False, "Print the result JSON instead of the table.")

    def __post_init__(self) -> None:
        require(self.attack_batch_size >= 1, "--attack-batch-size", self.attack_batch_size, "at least 1")
        require(self.n is None or self.n >= 1, "--n", self.n, "a whole number of at least 1")
        _require_attack(self)

    @property
    def radius(self) -> float:
        """``eps``, or the usual one of the norm."""
        return radius(self.norm, self.eps)


@dataclass(frozen=True)
class InflectionConfig(TrialConfig):
    """``synthfast inflection``: classifiers with and without synthetic images, over seeds."""

    synthetic: tuple[str, ...] = option((), "Folder of synthetic shards; may be given several times.", metavar="DIR")
    counts: str | None = option(
        None,
        "Numbers of synthetic images to compare, such as 1000,4000,16000 (the first ones of each folder); all if not given.",
    )
    dataset: str = option("digits", "Real training images.")
    methods: str = option("standard,pgd", "Training methods: standard, pgd, trades.")
    seeds: int = option(5, "Classifiers of each kind; with 1 there are no intervals.")
    fraction: float | None = option(None, "Share of synthetic images in a batch, of the runs that have some.")
    out: str = option("runs/inflection", "Folder for the classifiers, result.json and gains.png.", metavar="DIR")

    def __post_init__(self) -> None:
        if not self.synthetic:
            raise UsageError(
                "--synthetic: expected a folder of synthetic shards, found none; make one with synthfast sample"
            )
        require(self.seeds >= 1, "--seeds", self.seeds, "a whole number of at least 1")
        super().__post_init__()


def _require_scored(config: AccuracyConfig) -> None:
    if not config.classifier:
        raise UsageError("--classifier: expected a checkpoint folder or a file of weights, found none; give one")
    require(config.n is None or config.n >= 1, "--n", config.n, "a whole number of at least 1")


def _require_attack(config: RobustConfig | TrialConfig) -> None:
    require(
        config.eps is None or 0 <= config.eps < math.inf, "--eps", config.eps, "a number of at least 0, such as 8/255"
    )
    require(config.attack_steps >= 1, "--attack-steps", config.attack_steps, "a whole number of at least 1")
    require(
        config.step_size is None or 0 < config.step_size < math.inf,
        "--step-size",
        config.step_size,
        "a positive number",
    )
    require(config.restarts >= 1, "--restarts", config.restarts, "a whole number of at least 1")
    require_seed(config.seed)
