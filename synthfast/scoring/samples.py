"""``synthfast score samples``: a score for each image of a shard folder, kept beside the shards, and tables of them."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from synthfast.config import SamplesConfig
from synthfast.data import ShardSet
from synthfast.distributed import Ranks
from synthfast.errors import UsageError
from synthfast.evaluation.result import result_json
from synthfast.scoring.groups import Grouping, read_groups, summarize
from synthfast.scoring.image_scores import SCORERS, Scorer, Sources, Tell
from synthfast.selection.score_files import ScoreFolder

_FREE = ("out", "json", "data_dir", "device", "scores_folder", "allow_lossy")
_CHUNK = 8192  # images between two pieces of a file


@dataclass(frozen=True)
class Progress:
    """What is being done, for which score, and how far it is."""

    score: str
    doing: str
    done: int
    total: int


def samples_result(
    config: SamplesConfig, ranks: Ranks, report: Callable[[Progress], None] | None = None
) -> dict[str, Any]:
    """Score every image of a shard folder and summarise: the result of ``synthfast score samples`` as JSON values.

    The scores lie in the folder ``scores`` of the shard folder, or in ``config.scores_folder``; see
    :mod:`synthfast.selection.score_files`. A score that is there and was made with the same facts is not made again, so that an
    interrupted call loses at most the score in progress (of the discriminator's, only what comes after training). Several ranks
    share the images; the numbers do not depend on how many there are.

    Args:
        config: see :class:`synthfast.config.SamplesConfig`.
        ranks: entered; every rank calls this with the same configuration.
        report: called on rank 0.

    Returns:
        The result format with ``metrics`` and ``groups`` as :func:`synthfast.scoring.groups.summarize` gives them, ``scores``
        (facts and notes of each score) and ``warnings``.

    Raises:
        UsageError: options that do not fit each other or the images.
        SynthfastError: unreadable data, numbers that are not finite, a disk that refuses.
    """
    start = time.perf_counter()
    if config.out is not None and Path(config.out).is_dir():
        raise UsageError(f"--out {config.out}: expected a file, found a folder; choose another name")
    images = ShardSet(str(config.synthetic))
    groupings = {} if images.labels is None else {"class": Grouping.of(images.labels)}
    if config.groups is not None:
        groupings["group"] = read_groups(config.groups, len(images))
    folder = ScoreFolder(images, config.scores_folder)
    sources = Sources(config, images)
    scorers = [SCORERS[name](config, images, sources, ranks) for name in config.score_names]
    with ranks.on_first(folder.prepare_alone) or contextlib.nullcontext():  # rank 0 holds the lock
        made = [scorer.name for scorer in scorers if _bring(scorer, folder, ranks, report)]
    values: dict[str, np.ndarray] = {}
    warnings: list[str] = []
    for scorer in scorers:
        notes = folder.notes(scorer.name)
        columns = {name: folder.read(scorer.name, name, check=False) for name in folder.sha256(scorer.name)}
        values |= scorer.metrics(columns, notes)
        warnings += scorer.warnings(notes)
    metrics, groups = summarize(values, groupings)
    summary = {
        "metrics": metrics,
        "groups": groups,
        "scores": {
            scorer.name: {
                "facts": scorer.facts,
                "notes": folder.notes(scorer.name),
                "sha256": folder.sha256(scorer.name),
                "made": scorer.name in made,
            }
            for scorer in scorers
        },
        "folder": str(folder.path),
        "warnings": warnings,
    }
    decisive = {key: value for key, value in dataclasses.asdict(config).items() if key not in _FREE}
    inputs = {"synthetic": images, **sources.opened, **{k: p for s in scorers for k, p in s.files.items()}}
    return result_json("score samples", decisive, inputs, summary, time.perf_counter() - start)


def _bring(scorer: Scorer, folder: ScoreFolder, ranks: Ranks, report: Callable[[Progress], None] | None) -> bool:
    """Compute a score unless it is there; returns whether it was computed."""

    def tell(doing: str, done: int, total: int) -> None:
        if report is not None and ranks.is_first:
            report(Progress(scorer.name, doing, done, total))

    if ranks.broadcast(folder.made(scorer.name, scorer.facts)):
        return False
    _make(scorer, folder, ranks, tell)
    return True


def _make(scorer: Scorer, folder: ScoreFolder, ranks: Ranks, tell: Tell) -> None:
    """Compute one score and put its files in place."""
    total = len(folder.images)
    scorer.prepare(folder, tell)
    with folder.writer(scorer.name, scorer.facts, ranks) as writer:
        chunk = min(_CHUNK, -(-total // ranks.world_size))
        firsts = range(0, total, chunk)
        for first in firsts[ranks.rank :: ranks.world_size]:
            done = min(first + chunk, total)
            writer.write(first, scorer.score(np.arange(first, done)))
            tell("scoring", done, total)
        writer.commit(scorer.notes)
    if ranks.is_first:
        for path in scorer.leftovers(folder):
            path.unlink(missing_ok=True)


def table(result: Mapping[str, Any]) -> list[list[str]]:
    """The summaries of a result as rows of cells: a heading, all images, then the groups of each kind."""
    known = [(metric, title, form) for metric, title, form in _TABLE if metric in result["metrics"]]
    rows = [["group", "images", *(title for _, title, _ in known)]]

    def add(name: str, metrics: Mapping[str, Any]) -> None:
        count = metrics[known[0][0]]["count"]
        rows.append([name, f"{count:,}", *(form(metrics[metric]["value"]) for metric, _, form in known)])

    add("all", result["metrics"])
    for kind, groups in result["groups"].items():
        for name, metrics in groups.items():
            add(f"{kind} {name}", metrics)
    return rows


def _percent(value: float) -> str:
    return f"{100 * value:.1f}%"


def _number(value: float) -> str:
    return f"{value:.4g}"


_TABLE = (
    ("discriminator", "margin", _number),
    ("looks_real", "looks real", _percent),
    ("density_distance", "distance", _number),
    ("in_manifold", "in manifold", _percent),
    ("confidence", "confidence", _number),
    ("confidence_max", "highest", _number),
    ("label_agreement", "label agrees", _percent),
    ("nearest_distance", "nearest", _number),
    ("memorized", "memorized", _percent),
)
