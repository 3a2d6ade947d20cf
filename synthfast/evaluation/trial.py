"""One classifier of a comparison: trained, attacked, and its scores kept beside it, so that nothing is done twice."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from synthfast import __version__
from synthfast.artifacts import atomic_write_json, read_json
from synthfast.attacks import Attack
from synthfast.config import ClassifierConfig, for_method, make_config, read_toml
from synthfast.config.evaluation import TrialConfig
from synthfast.data import ImageSet
from synthfast.distributed import Ranks
from synthfast.errors import SynthfastError, UsageError
from synthfast.evaluation.progress import remove_progress
from synthfast.evaluation.robust import attack_facts, run_attacks, scores
from synthfast.evaluation.score import check_fits
from synthfast.models.classifiers import load_classifier
from synthfast.models.frozen import freeze
from synthfast.training import train_classifier

SCORE_FILE = "score.json"
PROGRESS_FOLDER = "score.progress"
PER_RUN = ("method", "seed", "out", "synthetic", "synthetic_n")  # set for each run of a comparison


def training_settings(config: TrialConfig, method: str, given: Mapping[str, Any]) -> ClassifierConfig:
    """The settings of the runs of one method; those of ``PER_RUN`` but the method are then replaced for each run.

    Args:
        given: further fields of :class:`ClassifierConfig` that are set for all runs; None is as not given.
    """
    values = {} if config.train is None else read_toml(config.train)
    taken = {
        *PER_RUN,
        "norm",
        "eps",
        "data_dir",
        "device",
        *(name for name, value in given.items() if value is not None),
    }
    for name in values:
        if name in taken:
            raise UsageError(f"{config.train}: {name}: is set by the comparison; remove it")
    chosen = {name: getattr(config, name) for name in ("recipe", "model", "steps", "batch_size", "image_size")}
    chosen |= {"data_dir": config.data_dir, "device": config.device, **given}
    values |= {name: value for name, value in chosen.items() if value is not None}
    # trades takes every setting of an attack; for_method leaves out what the run's own method does not use.
    values |= {"method": "trades", "norm": config.norm, "eps": config.radius}
    return for_method(make_config(ClassifierConfig, values, config.train or ""), method)


def train_and_test(
    training: ClassifierConfig,
    test: ImageSet,
    attacks: Sequence[tuple[str, Attack]],
    ranks: Ranks,
    *,
    count: int | None,
    batch_size: int,
    tell: Callable[[str], None],
) -> dict[str, Any]:
    """Train in ``training.out``, then attack the first ``count`` images of ``test``; what an earlier call has done is kept.

    Args:
        tell: called on every rank with what is being done, such as "training, step 200 of 1,000, loss 0.512".

    Returns ``metrics``, ``attacks`` and ``groups`` as :func:`synthfast.evaluation.robust.scores` gives them; they also lie in
    ``score.json`` of the folder.
    """
    folder = Path(training.out)
    train_classifier(training, ranks, lambda p: tell(f"training, step {p.step:,} of {p.steps:,}, loss {p.loss:.3f}"))
    model, description = load_classifier(folder, ranks.device)
    check_fits(test, description, str(folder))
    facts = {
        "weights": description["sha256"],
        "data": test.fingerprint(),
        "attacks": attack_facts(attacks),
        "count": count,
        "batch_size": batch_size,
        "device": ranks.device.type,
        "synthfast": __version__,
    }

    def attacked() -> dict[str, Any]:
        verdicts = run_attacks(
            freeze(model),
            test,
            attacks,
            ranks,
            count=count,
            batch_size=batch_size,
            progress=folder / PROGRESS_FOLDER,
            facts=facts,
            report=lambda p: tell(f"{p.attack}, {p.done:,} of {p.total:,} images"),
        )
        return scores(verdicts, test.labels)

    result = kept(folder / SCORE_FILE, facts, attacked, ranks)
    if ranks.is_first and (folder / PROGRESS_FOLDER).exists():
        remove_progress(folder / PROGRESS_FOLDER)
    ranks.barrier()
    return result


def kept(path: Path, facts: Mapping[str, Any], make: Callable[[], dict[str, Any]], ranks: Ranks) -> dict[str, Any]:
    """The scores in ``path`` if they were made under the same facts (JSON values) and are not damaged; else ``make()``, called on
    every rank, which then lies there."""
    facts = json.loads(json.dumps(facts))
    if path.exists():
        try:
            found = read_json(path, "score")
        except SynthfastError:
            found = {}
        if found.get("facts") == facts and found.get("sha256") == _sha256(found.get("scores")):
            return found["scores"]
    result = make()
    ranks.barrier()
    if ranks.is_first:
        atomic_write_json(path, {"facts": facts, "scores": result, "sha256": _sha256(result)})
    ranks.barrier()
    return result


def _sha256(scores: Any) -> str:
    return hashlib.sha256(json.dumps(scores).encode()).hexdigest()
