"""Attacks one after the other on what still stands: verdicts, order, resuming, threads, scores."""

from __future__ import annotations

import dataclasses
import json
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from synthfast.attacks import Attack
from synthfast.data import ArrayImages
from synthfast.distributed import Ranks
from synthfast.errors import SynthfastError, UsageError
from synthfast.evaluation import robust, wilson_interval
from synthfast.evaluation.progress import remove_progress

COUNT = 50


class Parity:
    """Two classes: the sum of the pixels above or below a half of its largest value."""

    def __call__(self, x: Tensor) -> Tensor:
        assert x.dtype == torch.float32 and x.min() >= 0 and x.max() <= 1
        score = x.flatten(1).mean(1) - 0.5
        return torch.stack((-score, score), 1)


@dataclasses.dataclass(frozen=True)
class Breaks(Attack):
    """Breaks the images whose number is in ``numbers``, by turning them inside out; records the batches it sees."""

    numbers: tuple[int, ...] = ()
    fail_at: int | None = None

    def _attack(self, model, x, y, index):
        SEEN.append(index.tolist())
        if self.fail_at is not None and self.fail_at in index.tolist():
            raise KeyboardInterrupt
        chosen = torch.tensor([int(i) in self.numbers for i in index])
        return torch.where(chosen[:, None, None, None], 1 - x, x)


SEEN: list[list[int]] = []


@pytest.fixture(autouse=True)
def forget():
    SEEN.clear()
    yield
    torch.set_num_threads(1)  # what tests of threads changed


@pytest.fixture
def toy() -> ArrayImages:
    """Dark images of class 0 and bright ones of class 1 in turn; images 7 and 20 carry the wrong label."""
    labels = np.arange(COUNT) % 2
    pixels = np.where(labels == 1, 200, 50).astype(np.uint8)[:, None, None, None] + np.zeros((1, 3, 4, 1), np.uint8)
    labels[[7, 20]] = 1 - labels[[7, 20]]
    return ArrayImages("toy", [pixels], labels, 2)


def attacks(fail_at: int | None = None) -> list[tuple[str, Attack]]:
    first = Breaks("linf", 1.0, numbers=(0, 3, 20))
    second = Breaks("linf", 1.0, numbers=(3, 11, 49), fail_at=fail_at)
    return [("first", first), ("second", second)]


def run(images, chosen, **options) -> robust.Verdicts:
    with Ranks("cpu") as ranks:
        return robust.run_attacks(Parity(), images, chosen, ranks, **{"batch_size": 8, **options})


EXPECTED = np.full(COUNT, 3)
EXPECTED[[7, 20]] = 0
EXPECTED[[0, 3]] = 1
EXPECTED[[11, 49]] = 2


@pytest.mark.parametrize("batch_size", [1, 8, 1000])
@pytest.mark.parametrize("threads", [1, 3])
def test_each_image_is_broken_by_the_first_attack_that_can(toy, batch_size, threads):
    torch.set_num_threads(threads)
    verdicts = run(toy, attacks(), batch_size=batch_size)
    assert np.array_equal(verdicts.fate, EXPECTED)
    assert verdicts.broken() == {"first": 2, "second": 2}
    assert verdicts.right.sum() == COUNT - 2 and verdicts.robust.sum() == COUNT - 6


def test_an_attack_sees_only_what_still_stands_in_full_batches(toy):
    run(toy, attacks())
    standing = [i for i in range(COUNT) if i not in (7, 20)]
    left = [i for i in standing if i not in (0, 3)]
    wanted = [part[k : k + 8] for part in (standing, left) for k in range(0, len(part), 8)]
    assert wanted == SEEN


def test_only_the_first_images(toy):
    assert np.array_equal(run(toy, attacks(), count=12).fate, EXPECTED[:12])
    assert len(run(toy, attacks(), count=1000).fate) == COUNT


def test_an_interrupted_run_goes_on(toy, tmp_path):
    folder = tmp_path / "result.json.progress"
    with pytest.raises(KeyboardInterrupt):
        run(toy, attacks(fail_at=30), progress=folder, facts={"weights": "abc"})
    before = len(SEEN)
    assert folder.is_dir()
    SEEN.clear()
    verdicts = run(toy, attacks(), progress=folder, facts={"weights": "abc"})
    assert np.array_equal(verdicts.fate, EXPECTED)
    whole = 6 + 6  # batches of 48 and of 46 images
    assert before + len(SEEN) == whole + 1  # the batch that failed is the only one made twice
    SEEN.clear()
    assert np.array_equal(run(toy, attacks(), progress=folder, facts={"weights": "abc"}).fate, EXPECTED)
    assert SEEN == []  # kept until the caller has written the verdicts
    remove_progress(folder)
    assert not folder.exists()


def test_a_folder_with_something_else_is_left_alone(toy, tmp_path):
    (tmp_path / "thesis.txt").write_text("chapter 1")
    with pytest.raises(UsageError, match="expected the progress of an evaluation, found other files"):
        run(toy, attacks(), progress=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_damaged_batch_is_made_again(toy, tmp_path):
    folder = tmp_path / "progress"
    with pytest.raises(KeyboardInterrupt):
        run(toy, attacks(fail_at=49), progress=folder)
    done = sorted(path for path in folder.iterdir() if path.name != "facts.json")
    done[-1].write_bytes(b"\x01")
    done[0].unlink()
    assert np.array_equal(run(toy, attacks(), progress=folder).fate, EXPECTED)


@pytest.mark.parametrize(
    ("facts", "options", "message"),
    [
        ({"weights": "new"}, {}, 'weights: FOLDER was made with "old", this command says "new"'),
        ({"weights": "old"}, {"batch_size": 9}, "batch_size: FOLDER was made with 8, this command says 9"),
        ({"weights": "old"}, {"count": 9}, "count: FOLDER was made with 50, this command says 9"),
    ],
)
def test_another_evaluation_does_not_go_on(toy, tmp_path, facts, options, message):
    folder = tmp_path / "progress"
    with pytest.raises(KeyboardInterrupt):
        run(toy, attacks(fail_at=30), progress=folder, facts={"weights": "old"})
    with pytest.raises(UsageError) as caught:
        run(toy, attacks(), progress=folder, facts=facts, **options)
    assert str(caught.value).startswith(message.replace("FOLDER", str(folder)))
    assert np.array_equal(run(toy, attacks(), progress=folder, facts={"weights": "old"}).fate, EXPECTED)


def test_progress_is_reported_and_ends_at_the_total(toy):
    found: list[robust.Progress] = []
    run(toy, attacks(), report=found.append)
    last = {progress.attack: progress for progress in found}
    assert list(last) == ["clean", "first", "second"]
    assert [(p.done, p.total, p.standing) for p in last.values()] == [(50, 50, 48), (48, 48, 46), (46, 46, 44)]


def test_several_runs_share_one_set_of_ranks(toy):
    with Ranks("cpu") as ranks:
        for _ in range(2):
            verdicts = robust.run_attacks(Parity(), toy, attacks(), ranks, batch_size=8)
            assert np.array_equal(verdicts.fate, EXPECTED)


def test_logits_that_are_not_finite_are_refused(toy):
    def broken(x: Tensor) -> Tensor:
        return Parity()(x) / 0 * 0

    with Ranks("cpu") as ranks, pytest.raises(SynthfastError, match="images 0 to 7 of toy: expected finite logits"):
        robust.run_attacks(broken, toy, attacks(), ranks, batch_size=8)


def test_images_without_labels_are_refused():
    with pytest.raises(UsageError, match="toy: has no labels, robust accuracy needs them"):
        run(ArrayImages("toy", [np.zeros((2, 3, 4, 1), np.uint8)]), attacks())


def test_a_thread_takes_a_batch(toy):
    torch.set_num_threads(2)
    seen, both = set(), threading.Barrier(2, timeout=20)

    def model(x: Tensor) -> Tensor:
        name = threading.current_thread().name
        if name not in seen and len(seen) < 2:
            seen.add(name)
            both.wait()  # passes only if two threads are in the model at once
        return Parity()(x)

    with Ranks("cpu") as ranks:
        robust.run_attacks(model, toy, [], ranks, batch_size=8)
    assert len(seen) == 2


def test_scores(toy):
    verdicts = run(toy, attacks())
    found = json.loads(json.dumps(robust.scores(verdicts, toy.labels)))
    assert found["metrics"] == {
        "accuracy": {"value": 48 / 50, "ci": wilson_interval(48, 50), "count": 50},
        "robust_accuracy": {"value": 44 / 50, "ci": wilson_interval(44, 50), "count": 50},
    }
    assert [(name, entry["robust_accuracy"]["value"], entry["broken"]) for name, entry in found["attacks"].items()] == [
        ("first", 46 / 50, 2),
        ("second", 44 / 50, 2),
    ]
    for label, group in found["groups"]["class"].items():
        of_class = toy.labels == int(label)
        assert group["accuracy"]["value"] == (EXPECTED[of_class] > 0).mean()
        assert group["robust_accuracy"]["value"] == (EXPECTED[of_class] == 3).mean()
        assert group["robust_accuracy"]["count"] == of_class.sum()


def test_facts_name_every_setting_of_an_attack():
    assert robust.attack_facts(attacks()[:1]) == {
        "first": {"attack": "Breaks", "norm": "linf", "eps": 1.0, "seed": 0, "numbers": (0, 3, 20), "fail_at": None}
    }


def test_the_progress_folder_must_be_writable(toy, tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SynthfastError, match="a part of the path is not a folder"):
        run(toy, attacks(), progress=tmp_path / "file" / "progress")
