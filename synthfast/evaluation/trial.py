"""One classifier of a comparison: trained, attacked, and its scores kept beside it, so that nothing is done twice."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from synthfast import __version__
from synthfast.artifacts import atomic_write_json, read_json
from synthfast.attacks import Attack
from synthfast.config import ClassifierConfig
from synthfast.data import ImageSet
from synthfast.distributed import Ranks
from synthfast.evaluation.robust import attack_facts, remove_progress, run_attacks, scores
from synthfast.evaluation.score import check_fits
from synthfast.models.classifiers import load_classifier
from synthfast.models.frozen import freeze
from synthfast.training import train_classifier

SCORE_FILE = "score.json"
PROGRESS_FOLDER = "score.progress"


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
    facts = json.loads(json.dumps(facts))
    path = folder / SCORE_FILE
    if path.exists():
        found = read_json(path, "score")
        if found.get("facts") == facts:
            return found["scores"]
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
    result = scores(verdicts, test.labels)
    ranks.barrier()
    if ranks.is_first:
        atomic_write_json(path, {"facts": facts, "scores": result})
        remove_progress(folder / PROGRESS_FOLDER)
    ranks.barrier()
    return result
