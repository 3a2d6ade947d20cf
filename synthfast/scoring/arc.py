"""ARC: the area under the success curve of robust discriminators (Sehwag et al. 2022, arXiv:2104.09425).

For each radius eps a network is trained to tell balls around real images from balls around synthetic ones, and a(eps) is the
share of held-out balls that it gets right everywhere, the mean of both kinds. ARC is the integral of max(a - 1/2, 0) over eps:
0 where the sets cannot be told apart. A discriminator of images alone, at eps = 0, sees traces that no eye sees and is right
about nearly every generator; how far images may be moved before it fails says more.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from synthfast import __version__
from synthfast.config import ArcConfig, ClassifierConfig
from synthfast.data import ImageSet, open_images
from synthfast.distributed import Ranks
from synthfast.errors import UsageError
from synthfast.evaluation.result import result_json
from synthfast.scoring.arc_curve import CHANCE, Area, measure_area
from synthfast.scoring.arc_grid import (
    Point,
    chance_radius,
    first_radius,
    larger_radius,
    meeting_radius,
    next_radii,
    parse_radii,
)
from synthfast.scoring.arc_measure import MeasureSettings
from synthfast.scoring.arc_radii import measure_radii
from synthfast.scoring.arc_sets import ArcSets, split_sets
from synthfast.scoring.arc_store import Measured, Store
from synthfast.scoring.coding import require_same_coding
from synthfast.scoring.discriminator import (
    DiscriminatorSettings,
    TrainingSets,
    default_discriminator,
    learned,
    train_discriminator,
)
from synthfast.scoring.embedded import embedded_images
from synthfast.training.loop import flips

# What says where results go and how they are shown, and so is not part of what decided them.
_FREE = ("out", "json", "figure", "data_dir", "device", "allow_lossy")
_POINT, _POINTS = (
    0.01,
    0.02,
)  # what a further run of the attack may break without a warning, by the width of the interval
_BY_HEART = 128  # images of a kind that any network which learns at all learns by heart


@dataclass(frozen=True)
class ArcSettings:
    """How an ARC is made.

    training: of the discriminators; its norm is that of the balls, its seed that of everything.
    measuring: the attack on held-out images.
    radii: on pixels in [0, 1], ascending from 0; None to find them.
    most: with None, so many are measured.
    n, held_out: see :func:`synthfast.scoring.arc_sets.split_sets`.
    draws: of the bootstrap.
    """

    training: DiscriminatorSettings = field(default_factory=DiscriminatorSettings)
    measuring: MeasureSettings = field(default_factory=MeasureSettings)
    radii: tuple[float, ...] | None = None
    most: int = 8
    n: int | None = None
    held_out: float = 0.25
    draws: int = 1000

    @property
    def unit(self) -> float:
        """The unit of radii and of ARC: 1 in l2, 1/255 in l-infinity, on pixels in [0, 1]."""
        return 1 / 255 if self.training.norm == "linf" else 1.0


@dataclass(frozen=True)
class Progress:
    """How many radii are done, of how many at most, and what is being done, in words."""

    done: int
    total: int
    doing: str


@dataclass(frozen=True)
class ArcCurve:
    """What :func:`arc` found.

    area: value, interval and curve over the radii ``eps``; None where no discriminator learned anything.
    eps: radii in units of the norm (l2: pixels in [0, 1], l-infinity: 1/255), ascending, from 0.
    measured: of each radius, or None where success is 1/2 without looking: beyond the first radius at chance, and where all
        balls meet.
    last: the last radius of the grid, which the normalized value belongs to; in an automatic grid where all balls meet.
    classes: ARC of each class, by its number, where classes were balanced.
    counts: images of each kind to train with, to validate and held out.
    warnings: in sentences.
    """

    area: Area | None
    eps: tuple[float, ...]
    measured: tuple[Measured | None, ...]
    last: float
    classes: dict[int, Area] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    @property
    def value(self) -> float | None:
        return None if self.area is None else self.area.value


def arc(
    real: ImageSet,
    synthetic: ImageSet,
    settings: ArcSettings,
    device: torch.device,
    *,
    store: Path | None = None,
    facts: Mapping[str, Any] | None = None,
    report: Callable[[Progress], None] | None = None,
) -> ArcCurve:
    """ARC between two sets of images.

    Discriminators are trained from radius 0 up, each from the weights of the nearest smaller radius, whose state is the first
    candidate at the larger one; states are chosen on validation images, success is measured on held-out ones. Where a radius is
    at chance (within a standard error, on held-out images), larger ones are not trained and count as 1/2.

    Args:
        real, synthetic: of one shape. They take turns nowhere: swapped, the result is the same up to randomness.
        store: folder that holds what is finished, so that an interrupted call goes on.
        facts: JSON values that must be the same when it goes on.
        report: called from any thread as work goes on.

    Raises:
        UsageError: sets that cannot be compared, or a ``store`` of something else.
    """
    training = settings.training
    sets = split_sets(real, synthetic, n=settings.n, held_out=settings.held_out, seed=training.seed, device=device)
    end = meeting_radius(training.norm, real.shape)
    total = settings.most if settings.radii is None else len(settings.radii)
    found: dict[float, Measured] = {}
    points: dict[float, Point] = {}
    has_learned = True

    def tell(eps: float, doing: str) -> None:
        if report is not None:
            report(Progress(len(found), total, f"eps {eps / settings.unit:.4g}, {doing}"))

    with Store(store, facts or {}) as kept:
        while radii := next_radii(points, settings.radii, most=settings.most, norm=training.norm, end=end):
            stored = {eps: kept.read(eps) for eps in radii}
            missing = [eps for eps in radii if stored[eps] is None]
            if missing:
                made = measure_radii(sets, missing, dict(found), training, settings.measuring, kept.write, tell)
                stored |= {measured.eps: measured for measured in made}
            found |= {eps: measured for eps, measured in stored.items() if measured is not None}
            points = {eps: _point(measured) for eps, measured in found.items()}
            if 0.0 in radii and not (has_learned := _has_learned(found[0.0], sets.training, training)):
                break
    return _curve(found, points, sets, settings, end, has_learned=has_learned)


def _point(measured: Measured) -> Point:
    """Success on held-out images, and whether it is chance within a standard error.

    Validation images have no say: the best of many states is above chance on them by choice.
    """
    held = len(measured.outcomes.real) + len(measured.outcomes.synthetic)
    success = measured.outcomes.success()
    return Point(success, at_chance=success <= CHANCE + 0.5 / math.sqrt(held))


def _has_learned(first: Measured, sets: TrainingSets, settings: DiscriminatorSettings) -> bool:
    """Whether what was found at radius 0 counts, be it chance.

    Sets that are alike and too large to be learned by heart leave a network at chance on all images, as too little training does.
    Then the same training must learn a few images of each kind by heart, which any network can that learns at all.
    """
    held = len(first.outcomes.real) + len(first.outcomes.synthetic)
    if _point(first).at_chance and _unfinished(first, settings):
        return False
    if learned(first.outcomes.success(), held, first.training_accuracy):
        return True
    if len(sets.real) <= _BY_HEART:
        return False
    few = TrainingSets(
        sets.real[:_BY_HEART], sets.synthetic[:_BY_HEART], sets.real_validation, sets.synthetic_validation
    )
    return learned(0.0, held, train_discriminator(few, 0.0, settings).training_accuracy)


def _unfinished(measured: Measured, settings: DiscriminatorSettings) -> bool:
    """Whether training still made progress in the last of all steps that it may take."""
    return measured.best_step == settings.steps


def _curve(
    found: Mapping[float, Measured],
    points: Mapping[float, Point],
    sets: ArcSets,
    settings: ArcSettings,
    end: float,
    *,
    has_learned: bool,
) -> ArcCurve:
    eps, last = _radii(points, settings, end)
    measured = tuple(found.get(radius) for radius in eps)
    units = tuple(radius / settings.unit for radius in eps)
    curve = ArcCurve(None, units, measured, last / settings.unit, counts=sets.counts)
    if not has_learned:
        message = (
            f"the discriminator is under-trained at eps 0 (accuracy {found[0.0].training_accuracy:.3f} on training images, "
            f"{found[0.0].outcomes.success():.3f} on held-out images), so there is no ARC; raise --steps, or take another "
            "--discriminator"
        )
        return dataclasses.replace(curve, warnings=(message,))
    real, synthetic = _outcomes(measured, sets)
    draws = {"draws": settings.draws, "seed": settings.training.seed}
    area = measure_area(units, real, synthetic, **draws)
    classes = {}
    if sets.classes is not None:
        for label in np.unique(sets.classes).tolist():
            of_class = sets.classes == label
            classes[label] = measure_area(units, real[:, of_class], synthetic[:, of_class], **draws)
    warnings = _warnings(curve, area, points, sets, settings, end)
    return dataclasses.replace(curve, area=area, classes=classes, warnings=warnings)


def _radii(points: Mapping[float, Point], settings: ArcSettings, end: float) -> tuple[list[float], float]:
    """Radii of the curve, on pixels in [0, 1], and the last one of the grid.

    An automatic grid ends where all balls meet; the curve stops at the radius at chance, or where that is 0, at the radius that
    would have come next, as 1/2. A grid that was cut short has no more than what was measured: its area is a lower bound.
    """
    if settings.radii is not None:
        return list(settings.radii), settings.radii[-1]
    eps = sorted(points)
    if points[0.0].at_chance:
        return [*eps, first_radius(settings.training.norm)], end
    at_chance = chance_radius(points) is not None
    return (eps if at_chance or _cut_short(points, settings, end) else [*eps, end]), end


def _cut_short(points: Mapping[float, Point], settings: ArcSettings, end: float) -> bool:
    """Whether an automatic grid ended above chance for want of radii, and not because the next one is where all balls meet."""
    if settings.radii is not None or chance_radius(points) is not None:
        return False
    return larger_radius(points, settings.training.norm) < end


def _outcomes(measured: Sequence[Measured | None], sets: ArcSets) -> tuple[np.ndarray, np.ndarray]:
    """Outcomes [radii, images] of both kinds, 1/2 at radii that were not measured."""
    rows: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
    for radius in measured:
        for kind, images in enumerate((sets.real, sets.synthetic)):
            right = np.full(len(images), CHANCE) if radius is None else radius.outcomes.right()[kind].astype(np.float64)
            rows[kind].append(right)
    return np.stack(rows[0]), np.stack(rows[1])


def _warnings(
    curve: ArcCurve, area: Area, points: Mapping[float, Point], sets: ArcSets, settings: ArcSettings, end: float
) -> tuple[str, ...]:
    lines = [] if sets.warning is None else [sets.warning]
    unchecked = False
    for k, (eps, radius) in enumerate(zip(curve.eps, curve.measured, strict=True)):
        if radius is None:
            continue
        if radius.outcomes.runs < 2:
            unchecked = radius.eps > 0
            continue
        lost = radius.outcomes.success(radius.outcomes.runs - 1) - radius.outcomes.success()
        half = (area.accuracy_ci[k][1] - area.accuracy_ci[k][0]) / 2
        if lost > max(_POINT, min(half, _POINTS)):
            lines.append(
                f"eps {eps:.4g}: the last run of the attack still broke {100 * lost:.1f}% of the images, so ARC is too high; "
                "raise --measure-steps or --restarts"
            )
    if unchecked:
        lines.append("one run of the attack, so that nothing tells whether more would break more; raise --restarts")
    floored = [
        f"{eps:.4g}"
        for eps, radius, low in zip(curve.eps, curve.measured, area.floored, strict=True)
        if radius is not None and low
    ]
    if floored:
        lines.append(
            f"the fit of held-out success is below 1/2 at eps {', '.join(floored)}; 1/2 counts there, as for a blind guess"
        )
    unfinished = [
        f"{eps:.4g}"
        for eps, radius in zip(curve.eps, curve.measured, strict=True)
        if radius is not None and _unfinished(radius, settings.training)
    ]
    if unfinished:
        lines.append(f"training still made progress in its last step at eps {', '.join(unfinished)}; raise --steps")
    if _cut_short(points, settings, end):
        lines.append(
            f"success is still above chance at the largest radius measured, {curve.eps[-1]:.4g}, so that ARC is a lower bound; "
            "raise --radii"
        )
    return tuple(lines)


def arc_result(
    config: ArcConfig,
    ranks: Ranks,
    report: Callable[[Progress], None] | None = None,
    *,
    synthetic: ImageSet | None = None,
) -> dict[str, Any]:
    """The result of ``synthfast score arc`` as JSON values: metrics arc and arc_normalized, curves, groups, counts, warnings.

    With ``config.out`` an interrupted run goes on where it stopped: finished radii lie in :func:`progress_folder`, which the
    caller removes once the result is written.

    Args:
        synthetic: these images instead of those of ``config.synthetic``.

    Raises:
        UsageError: options or sets that do not fit each other.
    """
    begin = time.perf_counter()
    if ranks.world_size > 1:
        raise UsageError(f"score arc runs in one process, found {ranks.world_size}; start it without torchrun")
    if config.out is not None and Path(config.out).is_dir():  # now, and not when the result is lost
        raise UsageError(f"--out {config.out}: expected a file, found a folder; choose another name")
    parse_radii(config.eps, config.norm)
    where: dict[str, Any] = {"data_dir": Path(config.data_dir), "image_size": config.image_size}
    real = open_images(config.real, **where)
    if synthetic is None:
        if config.synthetic is None:
            synthetic = embedded_images(real, config.seed, ranks.device)
        else:
            synthetic = open_images(config.synthetic, **where)
    require_same_coding(real, synthetic, allow=config.allow_lossy)
    if config.per_class and (real.labels is None or synthetic.labels is None or real.classes != synthetic.classes):
        raise UsageError(
            f"--per-class: expected labels of the same classes in {real.name} and {synthetic.name}, found {real.classes} and "
            f"{synthetic.classes} classes; leave it out"
        )
    settings = _settings(config, real)
    decisive = {key: value for key, value in dataclasses.asdict(config).items() if key not in _FREE}
    decisive |= {name: getattr(settings.training, name) for name in ("crop", "flip")}
    decisive["discriminator"] = settings.training.architecture
    facts = {
        "settings": dataclasses.asdict(settings) | {"draws": None},
        "real": real.fingerprint(),
        "synthetic": synthetic.fingerprint(),
        "device": ranks.device.type,
        "synthfast": __version__,
    }
    _check_figure(config.figure)
    curve = arc(real, synthetic, settings, ranks.device, store=progress_folder(config), facts=facts, report=report)
    warnings = list(curve.warnings)
    if config.per_class and curve.area is not None and not curve.classes:
        warnings.append("--per-class: the classes could not be balanced, so there is no ARC of each")
    found = {**scores(curve, settings.training.norm, per_class=config.per_class), "warnings": warnings}
    inputs = {"real": real, "synthetic": synthetic}
    return result_json("score arc", decisive, inputs, found, time.perf_counter() - begin)


def _check_figure(path: str | None) -> None:
    """Before the work, that the picture which is asked for can be drawn."""
    if path is not None and importlib.util.find_spec("matplotlib") is None:
        raise UsageError(f"--figure {path}: figures need matplotlib; install it with: pip install matplotlib")


def progress_folder(config: ArcConfig) -> Path | None:
    """Where ``score arc`` keeps finished radii: OUT.progress; None without --out."""
    return None if config.out is None else Path(config.out + ".progress")


def _settings(config: ArcConfig, real: ImageSet) -> ArcSettings:
    side = min(real.shape[:2])
    crop = config.crop if config.crop is not None else (0 if side <= 16 else 2)
    if crop >= side:
        raise UsageError(f"--crop {crop}: expected less than the images' side of {side}; lower it")
    radii = parse_radii(config.eps, config.norm)
    name = config.discriminator
    training = DiscriminatorSettings(
        architecture=default_discriminator(real.shape) if name == "auto" else name,
        norm=config.norm,
        steps=config.steps,
        batch_size=config.batch_size,
        lr=config.lr,
        attack_steps=config.attack_steps,
        crop=crop,
        # Either side may be the set of photographs: swapped, nothing changes.
        flip=any(
            flips(ClassifierConfig(dataset=source, flip=config.flip))
            for source in (config.real, config.synthetic or "")
        ),
        patience=max(config.patience, DiscriminatorSettings.patience),
        warm_patience=config.patience,
        seed=config.seed,
    )
    return ArcSettings(
        training=training,
        measuring=MeasureSettings(steps=config.measure_steps, restarts=config.restarts, seed=config.seed),
        radii=None if radii is None else tuple(radii),
        most=config.radii,
        n=config.n,
        held_out=config.held_out,
        draws=config.bootstrap,
    )


def scores(curve: ArcCurve, norm: str, *, per_class: bool = False) -> dict[str, Any]:
    """``metrics``, ``curves``, ``groups`` and ``images`` of the result format."""
    held = 2 * curve.counts["held_out"]
    result: dict[str, Any] = {
        "metrics": _metrics(curve.area, curve.last, held),
        "curves": {"arc": _curve_json(curve, norm)},
        "images": curve.counts,
    }
    if per_class:
        result["groups"] = {"class": {str(k): _metrics(area, curve.last, None) for k, area in curve.classes.items()}}
    return result


def _metrics(area: Area | None, last: float, count: int | None) -> dict[str, Any]:
    if area is None:
        nothing = {"value": None, "ci": None, "count": count}
        return {"arc": nothing, "arc_normalized": dict(nothing)}
    largest = last / 2
    return {
        "arc": {"value": area.value, "ci": list(area.ci), "count": count},
        "arc_normalized": {
            "value": area.value / largest,
            "ci": [bound / largest for bound in area.ci],
            "count": count,
        },
    }


def _curve_json(curve: ArcCurve, norm: str) -> dict[str, Any]:
    area, measured = curve.area, curve.measured
    entries: dict[str, Any] = {
        "eps": list(curve.eps),
        "unit": "1/255" if norm == "linf" else "1",
        "norm": norm,
        "last": curve.last,
        "accuracy": [CHANCE if radius is None else radius.outcomes.success() for radius in measured],
        "ci": None if area is None else area.accuracy_ci.tolist(),
        "isotonic": None if area is None else area.fitted.tolist(),
        "floored": None if area is None else area.floored.tolist(),
        "trained": [radius is not None for radius in measured],
        "first_run": [
            None if radius is None else radius.outcomes.success(min(1, radius.outcomes.runs)) for radius in measured
        ],
    }
    for name in ("validation_accuracy", "training_accuracy", "steps", "best_step", "seconds"):
        entries[name] = [None if radius is None else round(getattr(radius, name), 4) for radius in measured]
    return entries
