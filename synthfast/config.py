"""One dataclass a stage: every option, its default and its help, once. The command line and TOML files are made from them.

A TOML file holds the field names at its top level (``steps = 4000``, ``eps = "8/255"``); unknown keys and wrong types are
errors. This module imports no torch, so that ``synthfast --help`` is quick.
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from synthfast.errors import UsageError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Config = TypeVar("Config")


def option(default: Any, text: str, **extra: Any) -> Any:
    """A field with its help text. ``extra``: choices (a tuple), metavar, short (such as "-n")."""
    return field(default=default, metadata={"help": text, **extra})


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
        _require(self.n >= 1, "--n", self.n, "a whole number of at least 1")
        _require(self.shard_size >= 1, "--shard-size", self.shard_size, "a whole number of at least 1")
        _require(self.batch_size is None or self.batch_size >= 1, "--batch-size", self.batch_size, "at least 1")
        _require_seed(self.seed)
        _require(self.guidance is None or math.isfinite(self.guidance), "--guidance", self.guidance, "a finite number")


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
            _require(getattr(self, name) >= 1, _flag(name), getattr(self, name), "a whole number of at least 1")
        _require_optimizer(self.lr, self.weight_decay)
        _require(self.warmup >= 0, "--warmup", self.warmup, "a whole number of at least 0")
        _require(0 < self.clip_norm < math.inf, "--clip-norm", self.clip_norm, "a positive number")
        _require(0 <= self.ema < 1, "--ema", self.ema, "a number from 0 to below 1")
        _require(0 < self.sigma_data < math.inf, "--sigma-data", self.sigma_data, "a positive number")
        _require(0 <= self.label_dropout < 1, "--label-dropout", self.label_dropout, "a number from 0 to below 1")
        _require_seed(self.seed)


@dataclass(frozen=True)
class ClassifierConfig:
    """``synthfast train classifier``: standard or adversarial training on real images, synthetic ones, or both.

    Where a default is None it depends on other settings or on the data, as the option's help says. The values of ``recipe`` are
    taken by :func:`make_config`; the constructor itself only notes the name.
    """

    dataset: str = option("digits", "Real images: digits, mnist, cifar10, ..., folder:DIR, npz:FILE or a shard folder.")
    synthetic: tuple[str, ...] = option((), "Folder of synthetic shards; may be given several times.", metavar="DIR")
    fraction: float | None = option(
        None, "Share of synthetic images in a batch: 0 uses real ones only, 1 synthetic ones only; 0.5 if not given."
    )
    synthetic_n: int | None = option(None, "Only the first n images of each synthetic folder; all if not given.")
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
    checkpoint_every: int = option(500, "Steps between checkpoints, and between validations.")

    def __post_init__(self) -> None:
        for name in ("steps", "attack_steps", "checkpoint_every"):
            _require(getattr(self, name) >= 1, _flag(name), getattr(self, name), "a whole number of at least 1")
        _require(self.batch_size >= 2, "--batch-size", self.batch_size, "at least 2, for the network has batch norm")
        _require_optimizer(self.lr, self.weight_decay)
        _require(0 < self.momentum < 1, "--momentum", self.momentum, "a number between 0 and 1")
        _require(self.warmup is None or 0 <= self.warmup < 1, "--warmup", self.warmup, "a number from 0 to below 1")
        for name in ("eps", "step_size"):
            value = getattr(self, name)
            _require(value is None or 0 < value < math.inf, _flag(name), value, "a positive number such as 8/255")
        _require(self.beta is None or 0 <= self.beta < math.inf, "--beta", self.beta, "a number of at least 0")
        for name in ("ema", "label_smoothing"):
            value = getattr(self, name)
            _require(0 <= value < 1, _flag(name), value, "a number from 0 to below 1")
        _require(self.crop is None or self.crop >= 0, "--crop", self.crop, "a whole number of at least 0")
        _require(0 <= self.cutmix <= 1, "--cutmix", self.cutmix, "a number from 0 to 1")
        _require(
            0 <= self.validation < math.inf and (self.validation < 1 or self.validation == int(self.validation)),
            "--validation",
            self.validation,
            "a share below 1 or a whole number of images",
        )
        _require(self.fraction is None or 0 <= self.fraction <= 1, "--fraction", self.fraction, "a number from 0 to 1")
        if self.fraction is not None and self.fraction > 0 and not self.synthetic:
            whose = "" if self.recipe is None else f" (of --recipe {self.recipe})"
            raise UsageError(
                f"--fraction {self.fraction}{whose}: expected --synthetic DIR beside it, found none; add one"
            )
        for name in ("synthetic_n", "pseudo_labels"):
            value = getattr(self, name)
            if value is not None and not self.synthetic:
                raise UsageError(f"{_flag(name)} {value}: expected --synthetic DIR beside it, found none; add one")
        _require(
            self.synthetic_n is None or self.synthetic_n >= 1,
            "--synthetic-n",
            self.synthetic_n,
            "a whole number of at least 1",
        )
        for name in ("eps", "step_size", "beta"):
            value, methods = getattr(self, name), _METHODS_WITH[name]
            if value is not None and self.method not in methods:
                raise UsageError(
                    f"{_flag(name)} {value}: method {self.method} does not use it; add --method {' or '.join(methods)}"
                )
        _require_seed(self.seed)

    @property
    def radius(self) -> float:
        """``eps``, or the usual one of the norm."""
        return radius(self.norm, self.eps)


# Settings of an attack, and the methods that use them.
_METHODS_WITH = {"eps": ("pgd", "trades"), "step_size": ("pgd", "trades"), "beta": ("trades",)}


def _unused(method: str) -> set[str]:
    return {name for name, methods in _METHODS_WITH.items() if method not in methods}


def for_method(config: ClassifierConfig, method: str) -> ClassifierConfig:
    """The same settings for another training method, without those (eps, step_size, beta) that it does not use."""
    unused: dict[str, Any] = dict.fromkeys(_unused(method))
    return dataclasses.replace(config, method=method, **unused)


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
        _require(self.batch_size is None or self.batch_size >= 1, "--batch-size", self.batch_size, "at least 1")

    @property
    def radius(self) -> float:
        """``eps``, or the usual one of the norm."""
        return radius(self.norm, self.eps)


@dataclass(frozen=True)
class InflectionConfig:
    """``synthfast inflection``: classifiers with and without synthetic images, over seeds."""

    synthetic: tuple[str, ...] = option((), "Folder of synthetic shards; may be given several times.", metavar="DIR")
    counts: str | None = option(
        None,
        "Numbers of synthetic images to compare, such as 1000,4000,16000 (the first ones of each folder); all if not given.",
    )
    dataset: str = option("digits", "Real training images.")
    test: str = option("digits:test", "Labelled images to test on.")
    methods: str = option("standard,pgd", "Training methods: standard, pgd, trades.")
    seeds: int = option(5, "Classifiers of each kind; with 1 there are no intervals.")
    out: str = option("runs/inflection", "Folder for the classifiers, result.json and gains.png.", metavar="DIR")
    train: str | None = option(
        None, "TOML file with further settings of synthfast train classifier for all runs.", metavar="FILE"
    )
    recipe: str | None = option(None, "Recipe for all runs (see synthfast train classifier).", metavar="NAME")
    model: str | None = option(None, "Architecture of all runs (see synthfast train classifier).", metavar="NAME")
    steps: int | None = option(None, "Optimizer steps of each run.")
    batch_size: int | None = option(None, "Images in a step.")
    fraction: float | None = option(None, "Share of synthetic images in a batch, of the runs that have some.")
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
    seed: int = option(0, "Randomness of the test's attack.")
    image_size: int | None = option(None, "Side that celeba, imagenet and folders are resized to.")
    data_dir: str = option("data", "Where data sets lie.", metavar="DIR")
    device: str = option("auto", "auto, cpu, cuda or cuda:N.")
    json: bool = option(False, "Print the result JSON instead of the table.")

    def __post_init__(self) -> None:
        if not self.synthetic:
            raise UsageError(
                "--synthetic: expected a folder of synthetic shards, found none; make one with synthfast sample"
            )
        _require(self.seeds >= 1, "--seeds", self.seeds, "a whole number of at least 1")
        _require(self.attack_batch_size >= 1, "--attack-batch-size", self.attack_batch_size, "at least 1")
        _require(self.n is None or self.n >= 1, "--n", self.n, "a whole number of at least 1")
        _require_attack(self)

    @property
    def radius(self) -> float:
        """``eps``, or the usual one of the norm."""
        return radius(self.norm, self.eps)


DEFAULT_RADIUS = {"linf": 8 / 255, "l2": 0.5}


def radius(norm: str, eps: float | None) -> float:
    """The radius of the ball: ``eps``, or where it is None 8/255 in linf and 0.5 in l2, the usual ones on CIFAR."""
    return DEFAULT_RADIUS[norm] if eps is None else eps


def _require_scored(config: AccuracyConfig) -> None:
    if not config.classifier:
        raise UsageError("--classifier: expected a checkpoint folder or a file of weights, found none; give one")
    _require(config.n is None or config.n >= 1, "--n", config.n, "a whole number of at least 1")


def _require_attack(config: RobustConfig | InflectionConfig) -> None:
    _require(
        config.eps is None or 0 <= config.eps < math.inf, "--eps", config.eps, "a number of at least 0, such as 8/255"
    )
    _require(config.attack_steps >= 1, "--attack-steps", config.attack_steps, "a whole number of at least 1")
    _require(
        config.step_size is None or 0 < config.step_size < math.inf,
        "--step-size",
        config.step_size,
        "a positive number",
    )
    _require(config.restarts >= 1, "--restarts", config.restarts, "a whole number of at least 1")
    _require_seed(config.seed)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _require(condition: bool, flag: str, value: object, expected: str) -> None:
    if not condition:
        raise UsageError(f"{flag} {value}: expected {expected}")


def _require_optimizer(lr: float, weight_decay: float) -> None:
    _require(0 < lr < math.inf, "--lr", lr, "a positive number")
    _require(0 <= weight_decay < math.inf, "--weight-decay", weight_decay, "a number of at least 0")


def _require_seed(seed: int) -> None:
    _require(-(2**63) <= seed < 2**63, "--seed", seed, "a whole number from -2^63 to 2^63 - 1")


def make_config(cls: type[Config], values: Mapping[str, Any], where: str = "") -> Config:
    """An instance of a stage's dataclass from plain values.

    Args:
        cls: one of the dataclasses above.
        values: field name to value; missing ones take their defaults.
        where: starts the messages, such as the path of a TOML file.

    A recipe that ``values`` name (``recipe``) gives the values that are missing there. Raises UsageError for unknown keys, wrong
    types and bad values, in one line.
    """
    checked = _checked_values(cls, values, where)
    if cls is ClassifierConfig and checked.get("recipe") is not None:
        checked = {**_suitable(recipe_values(checked["recipe"]), checked), **checked}
    try:
        return cls(**checked)
    except UsageError as error:
        raise UsageError(f"{where}: {error}" if where else str(error)) from None


def _checked_values(cls: type, values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """``values`` with the types of the fields of ``cls``; UsageError for unknown keys, wrong types and choices."""
    prefix = f"{where}: " if where else ""
    fields = {item.name: item for item in dataclasses.fields(cls)}
    hints = typing.get_type_hints(cls)
    checked = {}
    for name, value in values.items():
        if name not in fields:
            raise UsageError(f"{prefix}unknown key {name!r}; expected one of {', '.join(fields)}")
        checked[name] = _checked(hints[name], value, f"{prefix}{name}")
        choices = fields[name].metadata.get("choices")
        if choices and checked[name] is not None and checked[name] not in choices:
            raise UsageError(f"{prefix}{name}: expected one of {', '.join(choices)}, found {value!r}")
    return checked


RECIPES = Path(__file__).parent / "training" / "recipes"


def recipe_values(recipe: str) -> dict[str, Any]:
    """What a recipe of ``synthfast train classifier`` sets: field name of :class:`ClassifierConfig` to value.

    ``recipe``: the name of a file of the package (``proxy``, ``edm``) or the path of a TOML file.
    """
    names = sorted(path.stem for path in RECIPES.glob("*.toml"))
    path = RECIPES / f"{recipe}.toml" if recipe in names else Path(recipe)
    if path.suffix != ".toml":
        raise UsageError(f"--recipe {recipe}: no such recipe; expected {', '.join(names)} or a TOML file")
    if not path.exists():
        raise UsageError(f"--recipe {recipe}: no such file; check the path, or take one of {', '.join(names)}")
    values = _checked_values(ClassifierConfig, read_toml(path), str(path))
    if "recipe" in values:
        raise UsageError(f"{path}: recipe: a recipe names no other; take its values over")
    try:
        # Synthetic folders are the user's matter; everything else must be valid by itself.
        ClassifierConfig(**{"synthetic": ("DIR",), **values})
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from None
    return values


def _suitable(recipe: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a recipe without those that belong to another method, norm, radius or schedule than the one given."""
    final = {**recipe, **given}
    method = final.get("method", ClassifierConfig.method)
    without = _unused(method)
    if "norm" in given and given["norm"] != recipe.get("norm", ClassifierConfig.norm):
        without |= {"eps", "step_size"}
    if "eps" in given and given["eps"] != recipe.get("eps"):
        without |= {"step_size"}
    if "schedule" in given and given["schedule"] != recipe.get("schedule", ClassifierConfig.schedule):
        without |= {"warmup"}
    return {name: value for name, value in recipe.items() if name not in without}


def number(text: str) -> float:
    """A number from text such as "0.5" or "8/255"; ValueError with what was expected."""
    above, _, below = text.partition("/")
    try:
        value = float(above) / float(below) if below else float(above)
    except (ValueError, ZeroDivisionError):
        value = math.nan
    if math.isnan(value):
        raise ValueError(f"expected a number such as 0.5 or 8/255, found {text!r}")
    return value


def _checked(hint: Any, value: Any, where: str) -> Any:
    """``value`` as the annotated type: str, int, float, bool, tuple[str, ...], or one of these or None."""
    alternatives = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if value is None and type(None) in alternatives:
        return None
    kind = next(item for item in alternatives if item is not type(None))
    if typing.get_origin(kind) is tuple:
        if isinstance(value, (list, tuple)) and all(isinstance(item, str) for item in value):
            return tuple(value)
        raise UsageError(f"{where}: expected a list of strings, found {value!r}")
    if kind is float and type(value) is int and abs(value) <= sys.float_info.max:
        return float(value)
    if kind is float and isinstance(value, str):
        try:
            return number(value)
        except ValueError as error:
            raise UsageError(f"{where}: {error}") from None
    if type(value) is not kind:
        names = {str: "a string", int: "a whole number", float: "a number", bool: "true or false"}
        raise UsageError(f"{where}: expected {names[kind]}, found {value!r}")
    return value


def read_toml(path: str | Path) -> dict[str, Any]:
    """The values of a TOML file; one-line UsageError if it is missing or broken."""
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"{path}: no such configuration file; check the path") from None
    except (OSError, ValueError, RecursionError) as error:  # ValueError: not TOML, not UTF-8, an endless integer
        raise UsageError(f"{path}: not a readable TOML file ({error}); correct it") from None


def to_toml(config: Any) -> str:
    """The dataclass as TOML text, which ``read_toml`` and ``make_config`` turn back into an equal one. None is left out."""
    lines = []
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        if value is not None:
            lines.append(f"{item.name} = {_toml_value(value)}")
    return "\n".join(lines) + "\n"


def _toml_value(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_toml_value(item) for item in value) + "]"
    if isinstance(value, float):
        return repr(value)  # inf and nan are written alike in both languages
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
