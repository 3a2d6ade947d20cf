"""Robust accuracy: the share of images that a classifier gets right and that no attack of a list changes its mind about."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch

from synthfast.artifacts import Lock, atomic_write_bytes
from synthfast.attacks import Attack
from synthfast.data import ImageSet
from synthfast.distributed import Ranks
from synthfast.errors import UsageError
from synthfast.evaluation.accuracy import require_finite
from synthfast.evaluation.interval import share
from synthfast.evaluation.progress import open_progress
from synthfast.parallel import in_order
from synthfast.training.batches import read_batch, to_unit

Model = Callable[[torch.Tensor], torch.Tensor]
CLEAN = "clean"
_WRONG, _STANDING = 0, np.iinfo(np.int64).max


@dataclass(frozen=True)
class Progress:
    """Where an evaluation is: the attack, images it has done and has to do, and how many images still stand."""

    attack: str
    done: int
    total: int
    standing: int


@dataclass(frozen=True)
class Verdicts:
    """What became of each image.

    Attributes:
        attacks: names, in the order they ran.
        fate: int64 [n]: 0 misclassified without an attack, k broken by attack k (from 1), len(attacks) + 1 robust.
    """

    attacks: tuple[str, ...]
    fate: np.ndarray

    @property
    def right(self) -> np.ndarray:
        """bool [n]: right without an attack."""
        return self.fate > _WRONG

    @property
    def robust(self) -> np.ndarray:
        """bool [n]: right, and broken by none."""
        return self.fate == len(self.attacks) + 1

    def broken(self) -> dict[str, int]:
        """Attack to the number of images that it broke, of those that stood before it."""
        return {name: int((self.fate == k).sum()) for k, name in enumerate(self.attacks, start=1)}


def run_attacks(
    model: Model,
    images: ImageSet,
    attacks: Sequence[tuple[str, Attack]],
    ranks: Ranks,
    *,
    count: int | None = None,
    batch_size: int = 128,
    progress: Path | None = None,
    facts: Mapping[str, Any] | None = None,
    report: Callable[[Progress], None] | None = None,
) -> Verdicts:
    """Run the attacks one after the other, each on the images that still stand.

    The standing images are cut into batches of ``batch_size`` in their order, and the ranks (on a CPU also the threads) take
    whole batches, so the verdicts do not depend on how many there are. Randomness is keyed by an image's number.

    Args:
        model: images float32 [N, C, H, W] in [0, 1] to logits [N, classes]; in evaluation mode, safe for several threads.
        images: labelled.
        attacks: name and attack, in order.
        ranks: entered; every rank calls this with the same arguments.
        count: only the first ``count`` images.
        progress: folder that holds what is finished, so that an interrupted call goes on. When the verdicts are safe, call
            :func:`synthfast.evaluation.progress.remove_progress`.
        facts: JSON values that must be the same when it goes on: weights, data, attacks.
        report: called on rank 0 after every batch.

    Raises:
        UsageError: no labels, or a progress folder of another evaluation or with something else in it.
        SynthfastError: logits that are not finite, a disk that refuses.
    """
    if images.labels is None:
        raise UsageError(f"{images.name}: has no labels, robust accuracy needs them; choose another source")
    total = len(images) if count is None else min(count, len(images))
    with _State(progress, {**(facts or {}), "count": total, "batch_size": batch_size}, ranks) as state:
        return _run(model, images, attacks, ranks, state, total, batch_size, report)


def _run(
    model: Model,
    images: ImageSet,
    attacks: Sequence[tuple[str, Attack]],
    ranks: Ranks,
    state: _State,
    total: int,
    batch_size: int,
    report: Callable[[Progress], None] | None,
) -> Verdicts:
    fate = np.full(total, _STANDING, np.int64)

    def batch(items: np.ndarray) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        pixels, labels = read_batch(images, items)
        assert labels is not None
        return to_unit(pixels, ranks.device), labels.to(ranks.device), torch.from_numpy(items).to(ranks.device)

    def misclassified(items: np.ndarray) -> np.ndarray:
        x, y, _ = batch(items)
        with torch.inference_mode():
            logits = model(x)
        require_finite(logits, items, images)
        return (logits.argmax(1) != y).cpu().numpy()

    def fooled_by(attack: Attack) -> Callable[[np.ndarray], np.ndarray]:
        return lambda items: attack.run(model, *batch(items)).fooled.cpu().numpy()

    stages = [(CLEAN, misclassified), *((name, fooled_by(attack)) for name, attack in attacks)]
    threads = torch.get_num_threads() if ranks.device.type == "cpu" else 1
    for number, (name, judge) in enumerate(stages):
        standing = np.flatnonzero(fate == _STANDING)
        batches = [standing[first : first + batch_size] for first in range(0, len(standing), batch_size)]
        found = torch.zeros(total, dtype=torch.int64)  # 1 where this stage broke the image

        def do(
            part: int,
            number: int = number,
            judge: Callable[[np.ndarray], np.ndarray] = judge,
            batches: list[np.ndarray] = batches,
        ) -> tuple[np.ndarray, np.ndarray]:
            items = batches[part]
            broken = state.read(number, part, len(items))
            if broken is None:
                broken = judge(items)
                state.write(number, part, broken)
            return items, broken

        taken, counted, lost = (ranks.unique(f"{what} of an attack") for what in ("batches", "images", "broken images"))
        with contextlib.closing(in_order(do, _take(ranks, taken, len(batches)), threads)) as results:
            for items, broken in results:
                found[items[broken]] = 1
                done, fallen = ranks.add(counted, len(items)), ranks.add(lost, int(broken.sum()))
                if report is not None and ranks.is_first:
                    report(Progress(name, done, len(standing), len(standing) - fallen))
        fate[ranks.maximum(found).numpy() == 1] = number
    fate[fate == _STANDING] = len(stages)
    return Verdicts(tuple(name for name, _ in attacks), fate)


def _take(ranks: Ranks, counter: str, parts: int) -> Iterator[int]:
    """Numbers below ``parts``, each on one rank: whoever is free takes the next."""
    while (part := ranks.add(counter, 1) - 1) < parts:
        yield part


class _State:
    """Finished batches on disk: a file of one byte an image for each and a checksum, beside the facts they were made under.

    A context manager, in which no other process writes the folder.
    """

    def __init__(self, folder: Path | None, facts: Mapping[str, Any], ranks: Ranks) -> None:
        self._folder = folder
        self._lock: Lock | None = None
        if folder is not None:
            self._lock = ranks.on_first(
                lambda: open_progress(folder, facts, "an evaluation", lambda key: key.partition(".")[0])
            )

    def __enter__(self) -> _State:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._lock is not None:
            self._lock.close()

    def _path(self, stage: int, part: int) -> Path:
        assert self._folder is not None
        return self._folder / f"{stage:02d}-{part:08d}"

    def read(self, stage: int, part: int, count: int) -> np.ndarray | None:
        """bool [count], or None if the batch is not done."""
        if self._folder is None:
            return None
        try:
            data = self._path(stage, part).read_bytes()
        except OSError:
            return None
        outcomes, check = data[:count], data[count:]
        return np.frombuffer(outcomes, np.uint8).astype(bool) if check == _check(outcomes) else None

    def write(self, stage: int, part: int, broken: np.ndarray) -> None:
        if self._folder is not None:
            outcomes = broken.astype(np.uint8).tobytes()
            atomic_write_bytes(self._path(stage, part), outcomes + _check(outcomes))


def _check(outcomes: bytes) -> bytes:
    """What stands behind a batch's outcomes, so that one that was damaged is done again."""
    return hashlib.sha256(outcomes).digest()[:8]


def attack_facts(attacks: Sequence[tuple[str, Attack]]) -> dict[str, Any]:
    """The settings of each attack as JSON values, by name."""
    return {name: {"attack": type(attack).__name__, **dataclasses.asdict(attack)} for name, attack in attacks}


def scores(verdicts: Verdicts, labels: np.ndarray) -> dict[str, Any]:
    """``metrics`` (accuracy, robust_accuracy), ``attacks`` (what stands after each, and how many it broke) and ``groups`` by
    class, of the result format; a value has its 95% interval (Wilson) and count."""
    labels = labels[: len(verdicts.fate)]
    after = {}
    for number, (name, broken) in enumerate(verdicts.broken().items(), start=1):
        after[name] = {"robust_accuracy": share(verdicts.fate > number), "broken": broken}
    per_class = {}
    for label in np.unique(labels):
        of_class = labels == label
        per_class[str(label)] = {
            "accuracy": share(verdicts.right[of_class]),
            "robust_accuracy": share(verdicts.robust[of_class]),
        }
    metrics = {"accuracy": share(verdicts.right), "robust_accuracy": share(verdicts.robust)}
    return {"metrics": metrics, "attacks": after, "groups": {"class": per_class}}
