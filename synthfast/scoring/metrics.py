"""``synthfast score fid`` and ``synthfast score prdc``: from options to a result."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from synthfast.config import FidConfig, PrdcConfig
from synthfast.data import Chosen, ImageSet, open_images
from synthfast.distributed import Ranks
from synthfast.errors import UsageError
from synthfast.evaluation.result import result_json
from synthfast.scoring.coding import require_same_coding
from synthfast.scoring.embedded import embedded_images
from synthfast.scoring.features import Features, load_features
from synthfast.scoring.frechet import fid_scores
from synthfast.scoring.kid import Parted, kid, kid_subsets
from synthfast.scoring.moments import (
    PARTS,
    Gathered,
    Moments,
    draw,
    gather,
    merge,
    read_statistics,
    save_statistics,
    together,
)
from synthfast.scoring.prdc import prdc

STATISTICS = "stats:"
_LEAST = 2 * PARTS  # images that FID needs of each kind: two in each part
_MOST = 4096  # features that FID takes: the moments of its parts need 200 d^2 bytes
_SUBSET = 1000  # images in a subset of KID
# What says where results go and how they are made, and so is not part of what decided them.
_FREE = ("out", "json", "data_dir", "device", "allow_pickle", "allow_lossy", "save_stats", "batch_size")


@dataclass(frozen=True)
class Progress:
    """Images whose features are computed, and how many there are, of this rank's share."""

    done: int
    total: int


Report = Callable[[Progress], None]


def fid_result(
    config: FidConfig, ranks: Ranks, report: Report | None = None, *, synthetic: ImageSet | None = None
) -> dict[str, Any]:
    """The result of ``synthfast score fid`` as JSON values: metrics fid, fid_infinity and kid, ``features`` and ``warnings``.

    The value of ``fid_infinity`` is None where there are too few images for it, that of ``kid`` where the real images are given
    as statistics. Every image is read once. Every rank gets the result. ``synthetic``: these images instead of the named ones.
    """
    start = time.perf_counter()
    inputs = _open(config, ranks, synthetic)
    real, synthetic, features = inputs.real, inputs.synthetic, inputs.features
    if features.dim > _MOST:
        raise UsageError(
            f"--features {features.name}: FID takes at most {_MOST:,} features, found {features.dim:,}; choose others"
        )
    for images in inputs.sets:
        if len(images) < _LEAST:
            raise UsageError(f"{images.name}: expected at least {_LEAST} images, found {len(images)}; take more images")
    fixed = None if inputs.statistics is None else read_statistics(inputs.statistics, features)
    count = _counter(inputs, ranks, report)

    def gathered(images: ImageSet, items: np.ndarray | None) -> Gathered:
        return gather(
            features,
            images,
            np.arange(len(images)) if items is None else items,
            draws[id(images)],
            ranks,
            keep=config.kid_n,
            batch_size=config.batch_size,
            report=count,
        )

    draws = {id(images): draw(len(images), images.labels, config.seed) for images in inputs.sets}
    warnings = _few(inputs)
    groups: dict[str, Any] = {}
    if not config.per_class:
        one, two = None if real is None else gathered(real, None), gathered(synthetic, None)
    else:
        assert real is not None
        pieces: list[tuple[Gathered, Gathered]] = []
        for name, *items in _classes(real, synthetic):
            pair = gathered(real, items[0]), gathered(synthetic, items[1])
            pieces.append(pair)
            if _enough(name, items, _LEAST, warnings):
                groups[name] = ranks.from_first(lambda pair=pair: _fid_scores(*pair, config))
        one, two = (together([pair[side] for pair in pieces], config.kid_n) for side in (0, 1))
    scores: dict[str, Any] = {"metrics": ranks.from_first(lambda: _fid_scores(fixed or one, two, config))}
    if groups:
        scores["groups"] = {"class": groups}
    if config.save_stats is not None and ranks.is_first:
        assert one is not None
        save_statistics(config.save_stats, merge(one.parts), features)
    scores |= {"features": _facts(features), "warnings": warnings}
    return result_json("score fid", _decisive(config, features), inputs.files, scores, time.perf_counter() - start)


def prdc_result(
    config: PrdcConfig, ranks: Ranks, report: Report | None = None, *, synthetic: ImageSet | None = None
) -> dict[str, Any]:
    """The result of ``synthfast score prdc`` as JSON values: metrics precision, recall, density and coverage, ``features`` and
    ``warnings``. The features of all images are kept in memory. Every rank gets the result. ``synthetic``: these images instead
    of the named ones.
    """
    start = time.perf_counter()
    if config.real.startswith(STATISTICS):
        raise UsageError(f"--real {config.real}: precision and recall need images; name their source")
    inputs = _open(config, ranks, synthetic)
    assert inputs.real is not None
    for images in inputs.sets:
        if len(images) <= config.k:
            raise UsageError(f"{images.name}: expected more than k = {config.k} images, found {len(images)}; lower --k")
    count = _counter(inputs, ranks, report)
    real, fake = (
        inputs.features.compute(images, ranks, config.batch_size, count).to(ranks.device)
        for images in (inputs.real, inputs.synthetic)
    )
    metrics = ranks.from_first(lambda: prdc(real, fake, config.k).entries(config.seed))
    scores: dict[str, Any] = {"metrics": metrics}
    warnings: list[str] = []
    groups: dict[str, Any] = {}
    for name, *items in _classes(inputs.real, inputs.synthetic) if config.per_class else ():
        if _enough(name, items, config.k + 1, warnings):
            one, two = real[items[0]], fake[items[1]]
            groups[name] = ranks.from_first(lambda one=one, two=two: prdc(one, two, config.k).entries(config.seed))
    if groups:
        scores["groups"] = {"class": groups}
    scores |= {"features": _facts(inputs.features), "warnings": warnings}
    decisive = _decisive(config, inputs.features)
    return result_json("score prdc", decisive, inputs.files, scores, time.perf_counter() - start)


def _fid_scores(real: Gathered | Moments, synthetic: Gathered, config: FidConfig) -> dict[str, Any]:
    if isinstance(real, Moments):
        return {
            **fid_scores(real, synthetic.parts),
            "kid": {"value": None, "ci": None, "count": synthetic.count},
        }
    one, two = Parted(real.features, real.part), Parted(synthetic.features, synthetic.part)
    found = {**fid_scores(real.parts, synthetic.parts), "kid": kid(one, two, PARTS)}
    if config.kid_subsets:
        size = min(_SUBSET, len(one.features), len(two.features))
        values = kid_subsets(one.features, two.features, size=size, count=config.kid_subsets, seed=config.seed)
        found["kid_subsets"] = {"value": float(values.mean()), "ci": None, "count": size, "std": float(values.std())}
    return found


@dataclass(frozen=True)
class _Inputs:
    """What is compared, by which features. ``files`` are the sets as they were named, for the result."""

    real: ImageSet | None
    statistics: Path | None
    synthetic: ImageSet
    features: Features
    files: Mapping[str, ImageSet | Path]

    @property
    def sets(self) -> list[ImageSet]:
        return [images for images in (self.real, self.synthetic) if images is not None]


def _open(config: FidConfig | PrdcConfig, ranks: Ranks, synthetic: ImageSet | None) -> _Inputs:
    for name, path in (("--out", config.out), ("--save-stats", getattr(config, "save_stats", None))):
        if path is not None and Path(path).is_dir():  # now, and not when the result is lost
            raise UsageError(f"{name} {path}: expected a file, found a folder; choose another name")
    where = {"data_dir": Path(config.data_dir), "image_size": config.image_size}
    statistics, real = None, None
    if config.real.startswith(STATISTICS):
        statistics = Path(config.real.removeprefix(STATISTICS))
        if config.per_class:
            raise UsageError(f"--per-class: --real {config.real} has no classes; name the source of real images")
    else:
        real = open_images(config.real, **where)
    if synthetic is None and config.synthetic is None:
        synthetic = embedded_images(real, config.seed, ranks.device)
    elif synthetic is None:
        synthetic = open_images(config.synthetic, **where)
    if real is not None:
        require_same_coding(real, synthetic, allow=config.allow_lossy)
        if real.shape != synthetic.shape:
            raise UsageError(
                f"{synthetic.name}: expected images {_times(real.shape)} like {real.name}, found {_times(synthetic.shape)}; "
                "compare sets of one shape"
            )
        for images in (real, synthetic) if config.per_class else ():
            if images.labels is None:
                raise UsageError(f"--per-class: {images.name} has no labels; leave it out, or choose another source")
    features = load_features(config.features, synthetic.shape, ranks.device, allow_pickle=config.allow_pickle)
    files = {"real": statistics if real is None else real, "synthetic": synthetic}
    return _Inputs(_first(real, config.n), statistics, _first(synthetic, config.n), features, files)


def _first(images: ImageSet | None, n: int | None) -> Any:
    return images if images is None or n is None or n >= len(images) else Chosen(images, np.arange(n))


def _classes(real: ImageSet, synthetic: ImageSet) -> list[tuple[str, np.ndarray, np.ndarray]]:
    """Name and images of both kinds for each class that either has."""
    assert real.labels is not None and synthetic.labels is not None
    labels = np.union1d(real.labels, synthetic.labels)
    return [(str(k), np.flatnonzero(real.labels == k), np.flatnonzero(synthetic.labels == k)) for k in labels]


def _enough(name: str, items: Sequence[np.ndarray], least: int, warnings: list[str]) -> bool:
    """Whether a class has images enough; if not, ``warnings`` gets a line."""
    if min(map(len, items)) >= least:
        return True
    found = f"{len(items[0])} real and {len(items[1])} synthetic ones"
    warnings.append(f"class {name}: expected at least {least} images of each kind, found {found}; it is left out")
    return False


def _few(inputs: _Inputs) -> list[str]:
    dim = inputs.features.dim
    return [
        f"{images.name}: {len(images):,} images are few for {dim:,} features; FID is compared only at equal numbers, see kid"
        for images in inputs.sets
        if len(images) <= dim
    ]


def _counter(inputs: _Inputs, ranks: Ranks, report: Report | None) -> Callable[[int], None]:
    done, total = 0, sum(map(len, inputs.sets)) // ranks.world_size

    def count(images: int) -> None:
        nonlocal done
        done += images
        if report is not None and ranks.is_first:
            report(Progress(done, max(done, total)))

    return count


def _facts(features: Features) -> dict[str, Any]:
    return {"name": features.name, "dim": features.dim, "fingerprint": features.fingerprint}


def _decisive(config: FidConfig | PrdcConfig, features: Features) -> dict[str, Any]:
    values = {key: value for key, value in dataclasses.asdict(config).items() if key not in _FREE}
    return {**values, "features": features.name}


def _times(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))
