"""``synthfast rank``: which generator makes the best training data, and which score could have told so.

For each generator the scores of its images against real ones (ARC, the accuracy of a plain discriminator, FID, KID, precision,
recall, density, coverage), and what they are to predict: clean and robust accuracy, on real test images, of classifiers trained
on its images alone. Then the rank correlation of every score with the robust accuracy over the generators (Sehwag et al. 2022,
arXiv:2104.09425, section 4, who find that ARC predicts it and FID does not).
"""

from __future__ import annotations

import dataclasses
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from synthfast import __version__
from synthfast.artifacts import Lock, make_folder
from synthfast.config import (
    ArcConfig,
    ClassifierConfig,
    FidConfig,
    PrdcConfig,
    RankConfig,
    SampleConfig,
    make_config,
    read_toml,
)
from synthfast.data import Chosen, ImageSet, ShardSet, open_images
from synthfast.data.shards.manifest import MANIFEST
from synthfast.distributed import Ranks
from synthfast.errors import UsageError
from synthfast.evaluation.interval import mean_interval, within_unit
from synthfast.evaluation.progress import remove_progress
from synthfast.evaluation.result import result_json
from synthfast.evaluation.score import make_attacks
from synthfast.evaluation.trial import kept, train_and_test, training_settings
from synthfast.sampling import Generator, generate, load_generator
from synthfast.scoring.arc import arc_result, progress_folder
from synthfast.scoring.coding import require_same_coding
from synthfast.scoring.correlation import Measured, rank_correlations
from synthfast.scoring.features import load_features
from synthfast.scoring.metrics import fid_result, prdc_result
from synthfast.scoring.moments import PARTS
from synthfast.scoring.names import METRICS, SCORES, TARGET

_FREE = ("out", "json", "data_dir", "device", "allow_lossy")  # where results go and how they are shown
_TAKEN = ("real", "test", "result.json", "rank.png")  # names of inputs and files of the result
_NAMED = re.compile(r"([\w.+-]+)=(.+)", re.DOTALL)
_SET_HERE = (
    "real",
    "synthetic",
    "n",
    "seed",
    "out",
    "json",
    "figure",
    "data_dir",
    "device",
    "image_size",
    "allow_lossy",
)


@dataclass(frozen=True)
class Source:
    """One of the compared: its name, and a shard folder or a generator as ``synthfast sample`` takes it."""

    name: str
    spec: str

    @property
    def is_shards(self) -> bool:
        return os.path.exists(Path(self.spec) / MANIFEST)


@dataclass(frozen=True)
class Progress:
    """The generator at hand, its number from 1 of ``total``, and what is done with it."""

    name: str
    number: int
    total: int
    doing: str


def parse_sources(texts: Sequence[str]) -> list[Source]:
    """NAME=SOURCE as it says; else a folder has the name of its last part, and py:module:function that of the function."""
    sources = []
    for text in texts:
        match = None if os.path.exists(text) else _NAMED.fullmatch(text)
        name, spec = match.groups() if match else (re.split(r"[/:]", text.rstrip("/"))[-1], text)
        if name in ("", ".", ".."):
            raise UsageError(f"{text}: expected a name, found none; write NAME={text}")
        if name in _TAKEN:
            raise UsageError(f"{text}: the name {name} has another meaning here; write NAME={text}")
        if name in {source.name for source in sources}:
            raise UsageError(f"{text}: a second source with the name {name}; write NAME={text}")
        sources.append(Source(name, spec))
    return sources


def rank_result(config: RankConfig, ranks: Ranks, report: Callable[[Progress], None] | None = None) -> dict[str, Any]:
    """Sample, score, train, test and compare: the result of ``synthfast rank`` as JSON values.

    Every step keeps its result in OUT/NAME; the same command does not repeat it.

    Returns:
        The result format with ``generators`` (name to metric to value), ``correlations`` (score to what
        :func:`synthfast.scoring.correlation.rank_correlations` gives, over the generators) and ``metrics`` (rho of each score).

    Raises:
        UsageError: sources or options that do not fit each other.
        SynthfastError: as in the commands that it runs.
    """
    start = time.perf_counter()
    if ranks.world_size > 1:
        raise UsageError(f"rank runs in one process, found {ranks.world_size}; start it without torchrun")
    sources = parse_sources(config.sources)
    test = _labelled(config.test, config)
    real = open_images(config.real, data_dir=Path(config.data_dir), image_size=config.image_size)
    _check(sources, config, real, test, ranks)
    arc_settings = _arc_settings(config)
    if training_settings(config, config.method, {"synthetic": ("DIR",), "fraction": 1.0}).validation:
        raise UsageError(f"{config.train}: validation: no real images are trained on that could be held out; remove it")
    make_folder(Path(config.out))
    generators: dict[str, dict[str, Any]] = {}
    inputs: dict[str, ImageSet | Path] = {"real": real, "test": test}
    with Lock(config.out):
        for number, source in enumerate(sources, start=1):

            def tell(doing: str, source: Source = source, number: int = number) -> None:
                if report is not None and ranks.is_first:
                    report(Progress(source.name, number, len(sources), doing))

            shards = _shards(source, config, ranks, tell)
            images: ImageSet = ShardSet(shards)
            if len(images) > config.samples:
                images = Chosen(images, np.arange(config.samples))
            inputs[source.name] = images
            scores = _scores(source, shards, images, real, config, arc_settings, ranks, tell)
            generators[source.name] = scores | _accuracies(source, shards, test, config, ranks, tell)
    decisive = {key: value for key, value in dataclasses.asdict(config).items() if key not in _FREE}
    decisive["eps"], decisive["sources"] = config.radius, {source.name: source.spec for source in sources}
    decisive["arc"] = arc_settings
    found = {"generators": generators, **correlations(generators, config.seeds, config.seed)}
    return result_json("rank", decisive, inputs, found, time.perf_counter() - start)


def correlations(generators: Mapping[str, Mapping[str, Any]], seeds: int = 1, seed: int = 0) -> dict[str, Any]:
    """``metrics`` and ``correlations`` from the values of each generator; a score that is missing for one is left out.

    ``seeds``: classifiers of a generator, whose accuracies have intervals by Student's t if there are several.
    """
    rows = list(generators.values())
    trained = seeds - 1 or None
    freedom = {"fid": PARTS - 1, "kid": PARTS - 1, "accuracy": trained, TARGET: trained}
    scores = {
        name: Measured.of([row[name] for row in rows], freedom.get(name))
        for name in (*SCORES, "accuracy")
        if all(row[name]["value"] is not None for row in rows)
    }
    found = rank_correlations(scores, Measured.of([row[TARGET] for row in rows], freedom[TARGET]), seed=seed)
    metrics = {f"{name}_rho": {key: entry[key] for key in ("value", "ci", "count")} for name, entry in found.items()}
    return {"metrics": metrics, "correlations": found}


def _labelled(source: str, config: RankConfig) -> ImageSet:
    images = open_images(source, data_dir=Path(config.data_dir), image_size=config.image_size)
    if images.labels is None:
        raise UsageError(f"--test {source}: has no labels, expected some; choose another source")
    return images


def _check(sources: Sequence[Source], config: RankConfig, real: ImageSet, test: ImageSet, ranks: Ranks) -> None:
    """UsageError, before anything is done, for a shard folder or a generator that cannot take part."""
    if real.shape != test.shape:
        raise UsageError(
            f"--real {real.name}: expected images {list(test.shape)} like --test {test.name}, found {list(real.shape)}; "
            "choose sources that fit"
        )
    load_features(config.features, test.shape, ranks.device)
    for source in sources:
        offered: ImageSet | Generator
        if source.is_shards:
            offered = images = ShardSet(source.spec)
            if len(images) < config.samples:
                raise UsageError(
                    f"{source.spec}: holds {len(images):,} images, --samples {config.samples:,} is compared; sample more or "
                    "lower --samples"
                )
            classes = images.classes if images.labels is not None else None
        else:
            offered = load_generator(_sampling(source, config), ranks.device)
            classes = offered.classes
        if tuple(offered.shape) != test.shape or classes != test.classes:
            raise UsageError(
                f"{source.spec}: expected labelled images {list(test.shape)} in {test.classes} classes like {test.name}, "
                f"found {list(offered.shape)} in {classes}; choose sources that fit"
            )
        sampled = offered if isinstance(offered, ShardSet) else source.spec
        require_same_coding(real, sampled, allow=config.allow_lossy)


def _arc_settings(config: RankConfig) -> dict[str, Any]:
    """What --arc FILE sets, checked before anything is done."""
    if config.arc is None:
        return {}
    values = read_toml(config.arc)
    for name in _SET_HERE:
        if name in values:
            raise UsageError(f"{config.arc}: {name}: is set by synthfast rank; remove it")
    make_config(ArcConfig, {"synthetic": "DIR", **values}, config.arc)
    return values


def _shards(source: Source, config: RankConfig, ranks: Ranks, tell: Callable[[str], None]) -> str:
    """The folder with the images of a source; sampled if it is a generator."""
    if source.is_shards:
        return source.spec
    sampling = _sampling(source, config)
    generate(sampling, ranks, lambda p: tell(f"sampling, {p.done:,} of {p.total:,} images"))
    return sampling.out


def _sampling(source: Source, config: RankConfig) -> SampleConfig:
    out = str(Path(config.out) / source.name / "samples")
    return SampleConfig(
        n=config.samples,
        generator=source.spec,
        out=out,
        seed=config.seed,
        device=config.device,
    )


def _scores(
    source: Source,
    shards: str,
    images: ImageSet,
    real: ImageSet,
    config: RankConfig,
    arc_settings: Mapping[str, Any],
    ranks: Ranks,
    tell: Callable[[str], None],
) -> dict[str, Any]:
    common = {
        "real": config.real,
        "synthetic": shards,
        "seed": config.seed,
        "data_dir": config.data_dir,
        "device": config.device,
        "image_size": config.image_size,
        "allow_lossy": config.allow_lossy,
    }
    by = {} if config.features is None else {"features": config.features}
    features = load_features(config.features, images.shape, ranks.device).fingerprint
    folder = Path(config.out) / source.name

    def score(name: str, settings: Any, make: Callable[[Any], dict[str, Any]], **facts: Any) -> dict[str, Any]:
        tell(f"scoring, {name}")
        free = (*_FREE, "figure", "synthetic")
        facts |= {key: value for key, value in dataclasses.asdict(settings).items() if key not in free}
        facts |= {"real": real.fingerprint(), "synthetic": images.fingerprint(), "images": len(images)}
        facts |= {"device": ranks.device.type, "synthfast": __version__}
        make_folder(folder)
        return kept(folder / f"{name}.json", facts, lambda: make(settings), ranks)

    arc_config = make_config(ArcConfig, {**common, **arc_settings, "out": str(folder / "arc-result.json")})
    arc = score(
        "arc", arc_config, lambda each: arc_result(each, ranks, lambda p: tell(f"ARC, {p.doing}"), synthetic=images)
    )
    if (progress := progress_folder(arc_config)) is not None and progress.exists():
        remove_progress(progress)
    fid_config, prdc_config = make_config(FidConfig, {**common, **by}), make_config(PrdcConfig, {**common, **by})
    fid = score("fid", fid_config, lambda each: fid_result(each, ranks, synthetic=images), features=features)
    prdc = score("prdc", prdc_config, lambda each: prdc_result(each, ranks, synthetic=images), features=features)
    curve = arc["curves"]["arc"]
    plain_interval = None if curve["ci"] is None else curve["ci"][0]
    plain = {"value": curve["accuracy"][0], "ci": plain_interval, "count": arc["metrics"]["arc"]["count"]}
    metrics = {**arc["metrics"], "plain_accuracy": plain, **fid["metrics"], **prdc["metrics"]}
    return {name: metrics[name] for name in SCORES}


def _accuracies(
    source: Source,
    shards: str,
    test: ImageSet,
    config: RankConfig,
    ranks: Ranks,
    tell: Callable[[str], None],
) -> dict[str, Any]:
    """Means over the seeds, of classifiers that saw the synthetic images alone; with one seed, of its test images."""
    first_ones = config.samples if config.samples < len(ShardSet(shards)) else None
    # The name of the real data decides on flips; with fraction 1 no image of it is read.
    given = {"synthetic": (shards,), "fraction": 1.0, "dataset": config.test}
    settings: ClassifierConfig = training_settings(config, config.method, given)
    attacks = make_attacks(config, test.classes or 0)
    found = []
    for seed in range(config.seeds):
        out = str(Path(config.out) / source.name / f"classifier-{seed}")
        training = dataclasses.replace(settings, seed=seed, out=out, synthetic_n=first_ones)
        found.append(
            train_and_test(
                training,
                test,
                attacks,
                ranks,
                count=config.n,
                batch_size=config.attack_batch_size,
                tell=lambda text, seed=seed: tell(f"classifier {seed + 1} of {config.seeds}, {text}"),
            )
        )
    names = ("accuracy", TARGET)
    if config.seeds == 1:
        return {name: found[0]["metrics"][name] for name in names}
    return {name: within_unit(mean_interval([each["metrics"][name]["value"] for each in found])) for name in names}


def table(result: Mapping[str, Any]) -> list[list[str]]:
    """Rows of text, the first of them the titles: the generators by falling robust accuracy, then rho of each score."""
    generators = result["generators"]
    rows = [["generator", *(title for title, _, _ in METRICS.values())]]
    order = sorted(generators, key=lambda name: -generators[name][TARGET]["value"])
    for name in order:
        rows.append([name, *(_text(generators[name][metric]["value"], METRICS[metric][2]) for metric in METRICS)])
    found = result["correlations"]
    rows.append(["rho", *(_text(found[m]["value"], "+.2f") if m in found else "" for m in METRICS)])
    return rows


def _text(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def verdict(result: Mapping[str, Any]) -> list[str]:
    """A line for each score, the strongest correlation first, and how ARC compares with FID."""
    found = result["correlations"]
    lines = []
    for name in sorted((each for each in found if each != "accuracy"), key=lambda each: -abs(found[each]["value"])):
        entry = found[name]
        low, high = entry["ci"]
        lines.append(
            f"{METRICS[name][0]}: rank correlation with robust accuracy {entry['value']:+.2f} [{low:+.2f}, {high:+.2f}], "
            f"p {entry['p']:.3f}, {entry['count']} generators"
        )
    if {"arc", "fid"} <= set(found):
        entry = found["arc"]["magnitude_minus"]["fid"]
        low, high = entry["ci"]
        lines.append(f"ARC's |rho| minus FID's: {entry['value']:+.2f} [{low:+.2f}, {high:+.2f}]")
    return lines
