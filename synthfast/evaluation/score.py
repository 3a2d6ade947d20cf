"""``synthfast score accuracy`` and ``synthfast score robust``: from options to a result file."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from synthfast import __version__, attacks
from synthfast.artifacts import CHECKPOINT_WEIGHTS, sha256_file
from synthfast.config import AccuracyConfig, RobustConfig
from synthfast.data import ImageSet, open_images
from synthfast.distributed import Ranks
from synthfast.errors import UsageError
from synthfast.evaluation.accuracy import accuracy
from synthfast.evaluation.result import result_json
from synthfast.evaluation.robust import Progress, attack_facts, run_attacks, scores
from synthfast.models.classifiers import load_classifier
from synthfast.models.frozen import freeze

# What says where results go and how they are shown, and so is not part of what decided them.
_FREE = ("out", "json", "data_dir", "device", "allow_pickle")


def score_accuracy(config: AccuracyConfig, ranks: Ranks) -> dict[str, Any]:
    """The result of ``synthfast score accuracy`` as JSON values."""
    start = time.perf_counter()
    model, images, weights = open_inputs(config, ranks)
    result = accuracy(model, images, ranks.device, count=config.n)
    inputs = {"classifier": weights, "dataset": images}
    return result_json("score accuracy", _decisive(config), inputs, result, time.perf_counter() - start)


def score_robust(
    config: RobustConfig, ranks: Ranks, report: Callable[[Progress], None] | None = None
) -> dict[str, Any]:
    """The result of ``synthfast score robust`` as JSON values, with ``attacks`` (what each left standing) and ``warnings``.

    With ``config.out`` an interrupted evaluation goes on where it stopped: finished batches lie in :func:`progress_folder`, which
    the caller removes once the result is written.
    """
    start = time.perf_counter()
    model, images, weights = open_inputs(config, ranks)
    chosen = make_attacks(config, images.classes or 0)
    facts = {
        "classifier": sha256_file(weights),
        "dataset": images.fingerprint(),
        "attack": attack_facts(chosen),
        "device": ranks.device.type,
        "synthfast": __version__,
    }
    verdicts = run_attacks(
        freeze(model),
        images,
        chosen,
        ranks,
        count=config.n,
        batch_size=config.batch_size or (128 if ranks.device.type == "cpu" else 512),
        progress=progress_folder(config),
        facts=facts,
        report=report,
    )
    warnings = []
    if config.attack == "autoattack":
        warnings = [
            attacks.ce_only_reason(images.classes or 0),
            attacks.gradient_masking_warning(verdicts.broken(), len(verdicts.fate)),
        ]
    found = {**scores(verdicts, images.labels), "warnings": [line for line in warnings if line is not None]}
    inputs = {"classifier": weights, "dataset": images}
    decisive = {**_decisive(config), "eps": config.radius, "attacks": attack_facts(chosen)}
    return result_json("score robust", decisive, inputs, found, time.perf_counter() - start)


def progress_folder(config: RobustConfig) -> Path | None:
    """Where ``score robust`` keeps finished batches: OUT.progress; None without --out."""
    return None if config.out is None else Path(config.out + ".progress")


def open_inputs(config: AccuracyConfig | RobustConfig, ranks: Ranks) -> tuple[nn.Module, ImageSet, Path]:
    """The classifier, the labelled images that fit it, and the file with its weights."""
    if config.out is not None and Path(config.out).is_dir():  # now, and not when the result is lost
        raise UsageError(f"--out {config.out}: expected a file, found a folder; choose another name")
    path = Path(config.classifier or "")
    images = open_images(config.dataset, data_dir=Path(config.data_dir), image_size=config.image_size)
    if images.labels is None:
        raise UsageError(f"{images.name}: has no labels, accuracy needs them; choose another source")
    # A folder knows what its images are, and check_fits compares; a file takes those that it is tested on.
    shape = None if path.is_dir() else images.shape
    model, description = load_classifier(
        path, ranks.device, model=config.model, shape=shape, allow_pickle=config.allow_pickle
    )
    check_fits(images, description, str(path))
    return model, images, path / CHECKPOINT_WEIGHTS if path.is_dir() else path


def check_fits(images: ImageSet, description: Mapping[str, Any], classifier: str) -> None:
    """UsageError unless the images have the size and classes that a classifier was made for."""
    if list(images.shape) != list(description["shape"]) or images.classes != description["classes"]:
        raise UsageError(
            f"{images.name}: expected images {description['shape']} in {description['classes']} classes as {classifier} was "
            f"trained on, found {list(images.shape)} in {images.classes}; choose a source that fits"
        )


def make_attacks(config: Any, classes: int) -> list[tuple[str, attacks.Attack]]:
    """Names and attacks for the options ``attack``, ``norm``, ``radius``, ``attack_steps``, ``restarts`` and ``seed``."""
    eps = config.radius
    if config.attack == "autoattack":
        return attacks.standard(config.norm, eps, classes, config.seed)
    if config.attack == "fgsm":
        return [("fgsm", attacks.FGSM(norm=config.norm, eps=eps, seed=config.seed))]
    pgd = attacks.PGD(
        norm=config.norm,
        eps=eps,
        seed=config.seed,
        steps=config.attack_steps,
        step_size=(eps / 4 or None) if config.step_size is None else config.step_size,
        restarts=config.restarts,
    )
    return [(f"pgd-{config.attack_steps}", pgd)]


def _decisive(config: AccuracyConfig | RobustConfig) -> dict[str, Any]:
    return {key: value for key, value in dataclasses.asdict(config).items() if key not in _FREE}
