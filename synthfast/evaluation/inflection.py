"""``synthfast inflection``: do a generator's images help, and from how many on?

Sehwag et al. (2022), "Robust learning meets generative models: can proxy distributions improve adversarial robustness?": a
generator has crossed the inflection point when classifiers trained on its images beside the real ones are better than those
trained on the real ones alone. Here both are trained with the same number of steps and the same seeds, so that the difference
is paired: a gain is the mean over seeds of (real + synthetic) - (real only), with its interval by Student's t.
The interval says how far training runs scatter, on these test images; it does not include the choice of the test images.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from synthfast.artifacts import Lock, make_folder
from synthfast.config import ClassifierConfig, InflectionConfig
from synthfast.data import ImageSet, ShardSet, open_images
from synthfast.distributed import Ranks
from synthfast.errors import UsageError
from synthfast.evaluation.interval import mean_interval, within_unit
from synthfast.evaluation.result import result_json
from synthfast.evaluation.score import make_attacks
from synthfast.evaluation.trial import PER_RUN, train_and_test, training_settings
from synthfast.training.loop import open_in_turn

_FREE = ("out", "json", "data_dir", "device")  # where results go and how they are shown
_METRICS = ("accuracy", "robust_accuracy")


@dataclass(frozen=True)
class Run:
    """One classifier of the comparison: its method, number of synthetic images (0: none) and seed."""

    method: str
    synthetic: int
    seed: int

    @property
    def name(self) -> str:
        data = f"synthetic-{self.synthetic}" if self.synthetic else "real"
        return f"{self.method}-{data}-seed-{self.seed}"


@dataclass(frozen=True)
class Progress:
    """The run at hand, its number from 1 of ``total``, and what it does, such as "training, step 200 of 1,000"."""

    run: Run
    number: int
    total: int
    doing: str


@dataclass(frozen=True)
class Plan:
    """What is trained: each method without and with each number of synthetic images, over the seeds."""

    methods: tuple[str, ...]
    counts: tuple[int, ...]
    seeds: int

    @classmethod
    def of(cls, config: InflectionConfig, available: int) -> Plan:
        """``available``: synthetic images there are."""
        methods = tuple(dict.fromkeys(part.strip() for part in config.methods.split(",")))
        for method in methods:
            if method not in ("standard", "pgd", "trades"):
                raise UsageError(
                    f"--methods {config.methods}: expected some of standard, pgd, trades, found {method!r}"
                )
        if config.counts is None:
            return cls(methods, (available,), config.seeds)
        try:
            counts = tuple(sorted({int(part) for part in config.counts.split(",")}))
        except ValueError:
            raise UsageError(f"--counts {config.counts}: expected whole numbers such as 1000,4000,16000") from None
        if counts[0] < 1 or counts[-1] > available:
            raise UsageError(
                f"--counts {config.counts}: expected numbers from 1 to {available}, the synthetic images there are; "
                "sample more or ask for fewer"
            )
        return cls(methods, counts, config.seeds)

    def runs(self) -> Iterator[Run]:
        """Seed by seed, so that a comparison that is stopped early has whole seeds."""
        for seed in range(self.seeds):
            for method in self.methods:
                for count in (0, *self.counts):
                    yield Run(method, count, seed)


def inflection_result(
    config: InflectionConfig, ranks: Ranks, report: Callable[[Progress], None] | None = None
) -> dict[str, Any]:
    """Train and test every classifier of the plan, and compare: the result of ``synthfast inflection`` as JSON values.

    Each run has a folder of its own below ``config.out`` with its checkpoint and ``score.json``; what is there is not done
    again, and a run that was interrupted goes on.

    Args:
        config: see :class:`synthfast.config.InflectionConfig`.
        ranks: entered; every rank calls this with the same configuration.
        report: called on rank 0.

    Returns:
        The result format with ``metrics``, ``curves`` and ``runs`` as :func:`compare` gives them.

    Raises:
        UsageError: options that do not fit each other or the data.
        SynthfastError: as in training and scoring.
    """
    start = time.perf_counter()
    test = open_images(config.test, data_dir=Path(config.data_dir), image_size=config.image_size)
    if test.labels is None:
        raise UsageError(f"--test {config.test}: has no labels, expected some; choose another source")
    synthetic = [ShardSet(folder) for folder in config.synthetic]
    plan = Plan.of(config, min(len(images) for images in synthetic))
    given = {"dataset": config.dataset, "synthetic": config.synthetic, "fraction": config.fraction}
    settings = {method: training_settings(config, method, given) for method in plan.methods}
    _check_alike(open_in_turn(settings[plan.methods[0]], ranks), test, synthetic)
    runs = list(plan.runs())
    results: dict[Run, dict[str, Any]] = {}
    with ranks.on_first(lambda: _lock(Path(config.out))) or contextlib.nullcontext():  # rank 0 holds the lock
        for number, run in enumerate(runs, start=1):

            def tell(doing: str, run: Run = run, number: int = number) -> None:
                if report is not None and ranks.is_first:
                    report(Progress(run, number, len(runs), doing))

            results[run] = _train_and_test(config, settings[run.method], run, test, ranks, tell)
    inputs = {"test": test, **{f"synthetic {number}": images for number, images in enumerate(synthetic, start=1)}}
    decisive = {key: value for key, value in dataclasses.asdict(config).items() if key not in _FREE}
    decisive["training"] = {
        method: {k: v for k, v in dataclasses.asdict(each).items() if k not in (*PER_RUN, *_FREE)}
        for method, each in settings.items()
    }
    return result_json("inflection", decisive, inputs, compare(results), time.perf_counter() - start)


def _lock(folder: Path) -> Lock:
    make_folder(folder)
    return Lock(folder)


def _check_alike(real: ImageSet, test: ImageSet, synthetic: Sequence[ImageSet]) -> None:
    """UsageError, before anything is trained, unless all images are like the real training images."""
    for option, images in (("--test", test), *(("--synthetic", images) for images in synthetic)):
        other_classes = images.labels is not None and images.classes != real.classes
        if images.shape != real.shape or other_classes:
            raise UsageError(
                f"{option} {images.name}: expected images {list(real.shape)} in {real.classes} classes like {real.name}, "
                f"found {list(images.shape)} in {images.classes}; choose a source that fits"
            )


def _train_and_test(
    config: InflectionConfig,
    settings: ClassifierConfig,
    run: Run,
    test: ImageSet,
    ranks: Ranks,
    tell: Callable[[str], None],
) -> dict[str, Any]:
    folder = Path(config.out) / run.name
    training = dataclasses.replace(settings, seed=run.seed, out=str(folder), synthetic_n=run.synthetic or None)
    if not run.synthetic:
        training = dataclasses.replace(training, synthetic=(), fraction=None, pseudo_labels=None)
    attacks = make_attacks(config, test.classes or 0)
    return train_and_test(
        training, test, attacks, ranks, count=config.n, batch_size=config.attack_batch_size, tell=tell
    )


def compare(results: Mapping[Run, Mapping[str, Any]]) -> dict[str, Any]:
    """From the scores of each run to means and gains over the seeds.

    Returns:
        ``curves``: method to {"synthetic": [0, counts ...], "accuracy": [...], "robust_accuracy": [...], "accuracy_gain": [None,
        ...], "robust_accuracy_gain": [None, ...]}, each entry {"value", "ci", "count"}, the gains paired by seed;
        ``metrics``: the gains of the largest count as METHOD_accuracy_gain and METHOD_robust_accuracy_gain;
        ``runs``: name to the accuracies of a single run.
    """
    curves: dict[str, Any] = {}
    for method in dict.fromkeys(run.method for run in results):
        counts = sorted({run.synthetic for run in results if run.method == method})
        curve: dict[str, list[Any]] = {"synthetic": counts}
        for metric in _METRICS:
            values = {count: _values(results, method, count, metric) for count in counts}
            curve[metric] = [within_unit(mean_interval(values[count])) for count in counts]
            curve[f"{metric}_gain"] = [
                None if count == 0 else mean_interval([a - b for a, b in zip(values[count], values[0], strict=True)])
                for count in counts
            ]
        curves[method] = curve
    metrics = {
        f"{method}_{metric}_gain": curve[f"{metric}_gain"][-1]
        for method, curve in curves.items()
        for metric in _METRICS
    }
    runs = {
        run.name: {metric: scores["metrics"][metric]["value"] for metric in _METRICS} for run, scores in results.items()
    }
    return {"metrics": metrics, "curves": curves, "runs": runs}


def _values(results: Mapping[Run, Mapping[str, Any]], method: str, count: int, metric: str) -> list[float]:
    """By seed."""
    chosen = sorted((r for r in results if (r.method, r.synthetic) == (method, count)), key=lambda run: run.seed)
    return [results[run]["metrics"][metric]["value"] for run in chosen]


def verdict(curves: Mapping[str, Any]) -> list[str]:
    """A sentence for each method and metric: from how many synthetic images on the gain's whole interval lies above 0, for that
    number and all larger ones."""
    lines = []
    for method, curve in curves.items():
        for metric, name in zip(_METRICS, ("accuracy", "robust accuracy"), strict=True):
            gains = dict(zip(curve["synthetic"], curve[f"{metric}_gain"], strict=True))
            lines.append(f"{method}, {name}: {_sentence(gains)}")
    return lines


def _sentence(gains: Mapping[int, Any]) -> str:
    known = {count: gain for count, gain in gains.items() if gain is not None}
    last = known[max(known)]
    value = f"{100 * last['value']:+.1f} points"
    if last["ci"] is None:
        return f"{value} with {max(known):,} synthetic images; one seed gives no interval"
    low, high = (100 * bound for bound in last["ci"])
    value += f" [{low:+.1f}, {high:+.1f}] with {max(known):,} synthetic images"
    certain = [gain["ci"][0] > 0 for _, gain in sorted(known.items())]
    if certain[-1]:
        first = sorted(known)[max((k + 1 for k, above in enumerate(certain) if not above), default=0)]
        return f"{value}; the inflection point is crossed (from {first:,} on)"
    if any(certain):
        some = ", ".join(f"{count:,}" for count, above in zip(sorted(known), certain, strict=True) if above)
        return f"{value}; a gain is certain with {some} alone"
    if all(gain["ci"][1] < 0 for gain in known.values()):
        return f"{value}; the synthetic images hurt"
    return f"{value}; no gain is certain"


def table(curves: Mapping[str, Any]) -> list[Sequence[str]]:
    """Rows of text, the first of them the titles: method, synthetic images, accuracies and gains in percent."""
    rows: list[Sequence[str]] = [
        ("method", "synthetic", "accuracy %", "robust accuracy %", "gain in accuracy", "gain in robust accuracy")
    ]
    for method, curve in curves.items():
        for k, count in enumerate(curve["synthetic"]):
            cells = [_percent(curve[metric][k], "") for metric in _METRICS]
            gains = [_percent(curve[f"{metric}_gain"][k], "+") for metric in _METRICS]
            rows.append((method, f"{count:,}" if count else "none", *cells, *gains))
    return rows


def _percent(value: Mapping[str, Any] | None, sign: str) -> str:
    if value is None:
        return ""
    text = f"{100 * value['value']:{sign}.1f}"
    if value["ci"] is None:
        return text
    low, high = (100 * bound for bound in value["ci"])
    return f"{text} [{low:{sign}.1f}, {high:{sign}.1f}]"
