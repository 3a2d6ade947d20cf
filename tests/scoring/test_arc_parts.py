"""What ARC makes of measured radii, and how it goes on after an interruption; no network is trained where it can be helped."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch

from synthfast.data import ArrayImages
from synthfast.errors import SynthfastError, UsageError
from synthfast.scoring import arc as module
from synthfast.scoring.arc import ArcSettings, Progress, arc, scores
from synthfast.scoring.arc_measure import MeasureSettings, Outcomes
from synthfast.scoring.arc_store import Measured, Store
from synthfast.scoring.discriminator import DiscriminatorSettings

CPU = torch.device("cpu")
LABELS = np.arange(400) % 2


def flat(name: str, seed: int, labels: np.ndarray | None = LABELS) -> ArrayImages:
    pixels = np.random.default_rng(seed).integers(60, 120, (400, 4, 4, 1), dtype=np.uint8)
    return ArrayImages(name, [pixels + np.uint8(80 * (seed == 2))], labels)


REAL, SYNTHETIC = flat("real", 1), flat("synthetic", 2)  # far apart


def outcomes(success: float, images: int, lost: float = 0.0) -> Outcomes:
    """``success`` of the images of either kind stand two runs, ``lost`` more only the first."""
    stood = np.ones(images, np.uint8)
    stood[: round((success + lost) * images)] = 2
    stood[: round(success * images)] = 3
    return Outcomes(stood, stood.copy(), 2)


@pytest.fixture
def known(monkeypatch):
    """``known(success)`` lets a curve, from radius to success, be measured instead of networks."""

    def use(success, *, lost=lambda eps: 0.0, validation=None, training=0.9, best_step=10):
        asked = []

        def measure_radii(sets, radii, found, settings, measuring, finished, report):
            asked.append(list(radii))
            made = []
            for eps in radii:
                report(eps, "step 1")
                value = success(eps)
                validated = value if validation is None else validation(eps)
                made.append(
                    Measured(
                        eps,
                        outcomes(value, len(sets.real), lost(eps)),
                        validation_accuracy=validated,
                        validation_images=2 * len(sets.training.real_validation),
                        training_accuracy=training,
                        steps=50,
                        best_step=best_step,
                        state={"weight": torch.tensor([eps])},
                        seconds=1.0,
                    )
                )
                finished(made[-1])
            return made

        monkeypatch.setattr(module, "measure_radii", measure_radii)
        return asked

    return use


def run(norm="l2", real=REAL, synthetic=SYNTHETIC, **change):
    options = {key: change.pop(key) for key in ("store", "facts", "report") if key in change}
    settings = ArcSettings(training=DiscriminatorSettings(norm=norm), draws=100, **change)
    return arc(real, synthetic, settings, CPU, **options)


def test_given_radii_past_chance_count_as_half_without_being_measured(known):
    asked = known({0.0: 1.0, 0.1: 0.8, 0.2: 0.5}.__getitem__)
    found = run(radii=(0.0, 0.1, 0.2, 0.4, 0.8))
    assert asked == [[0.0], [0.1, 0.2]]
    assert found.eps == (0.0, 0.1, 0.2, 0.4, 0.8) and found.last == 0.8
    assert [radius is not None for radius in found.measured] == [True, True, True, False, False]
    assert found.value == pytest.approx(0.1 * 0.4 + 0.1 * 0.15)
    result = scores(found, "l2")
    assert result["metrics"]["arc_normalized"]["value"] == pytest.approx(found.value / 0.4)
    assert result["metrics"]["arc"]["count"] == 2 * found.counts["held_out"] == 200
    curve = result["curves"]["arc"]
    assert curve["trained"] == [True, True, True, False, False]
    assert curve["accuracy"] == [1.0, 0.8, 0.5, 0.5, 0.5] and curve["steps"] == [50, 50, 50, None, None]
    json.dumps(result, allow_nan=False)


def test_l_infinity_is_in_units_of_1_255(known):
    known(lambda eps: 1.0)
    found = run("linf", radii=(0.0, 4 / 255, 8 / 255))
    assert found.eps == pytest.approx((0, 4, 8)) and found.value == pytest.approx(0.5 * 8)
    assert scores(found, "linf")["metrics"]["arc_normalized"]["value"] == pytest.approx(1)
    assert scores(found, "linf")["curves"]["arc"]["unit"] == "1/255"


def test_an_automatic_grid_is_measured_against_where_all_balls_meet(known):
    known(lambda eps: 1.0 - min(eps, 0.5))
    found = run()
    assert found.last == 2.0  # the norm of 16 times 1/2
    assert len(found.eps) == 8 and found.value == pytest.approx(0.125, rel=0.05)
    assert scores(found, "l2")["metrics"]["arc_normalized"]["value"] == pytest.approx(found.value)
    assert found.warnings == ()


def test_separable_up_to_where_all_balls_meet(known):
    known(lambda eps: 1.0)
    found = run()
    assert found.eps[-1] == 2.0 and found.measured[-1] is None
    assert 0.9 < scores(found, "l2")["metrics"]["arc_normalized"]["value"] < 1
    assert found.warnings == ()


def test_at_chance_without_a_ball_the_curve_ends_at_the_next_radius(known):
    asked = known(lambda eps: 0.51)
    found = run()
    assert asked == [[0.0]] and found.eps == (0.0, 0.1)
    assert found.value == pytest.approx(0.01 * 0.1 / 2) and found.area.ci[0] == 0


def test_chance_is_judged_by_held_out_images_alone(known):
    """The best of many states is above chance on validation images by choice."""
    asked = known(lambda eps: 0.5, validation=lambda eps: 0.6)
    run()
    assert len(asked) == 1
    asked = known(lambda eps: 0.6, validation=lambda eps: 0.5)
    run()
    assert len(asked) > 1


def test_success_below_half_counts_as_half_and_is_told(known):
    known({0.0: 1.0, 0.1: 0.4, 0.2: 0.3}.__getitem__, validation=lambda eps: 0.9)
    found = run(radii=(0.0, 0.1, 0.2))
    assert found.value == pytest.approx(0.5 * 0.1 / 2)
    assert found.warnings == (
        "the fit of held-out success is below 1/2 at eps 0.1, 0.2; 1/2 counts there, as for a blind guess",
    )
    curve = scores(found, "l2")["curves"]["arc"]
    assert curve["floored"] == [False, True, True] and curve["isotonic"] == pytest.approx([1.0, 0.4, 0.3])


def test_an_attack_that_has_not_converged_is_told(known):
    known(lambda eps: 0.8, lost=lambda eps: 0.12 if eps == 0.2 else 0.005)
    found = run(radii=(0.0, 0.1, 0.2))
    assert found.warnings == (
        "eps 0.2: the last run of the attack still broke 12.0% of the images, so ARC is too high; raise --measure-steps or "
        "--restarts",
    )
    assert scores(found, "l2")["curves"]["arc"]["first_run"] == pytest.approx([0.8, 0.8, 0.92], abs=0.011)


def test_training_that_was_cut_short_is_told(known):
    known(lambda eps: 0.9, best_step=DiscriminatorSettings().steps)
    assert run(radii=(0.0, 0.1)).warnings == (
        "training still made progress in its last step at eps 0, 0.1; raise --steps",
    )


def test_a_discriminator_that_learned_nothing_is_reported_and_not_scored(known, monkeypatch):
    monkeypatch.setattr(module, "_BY_HEART", 240)  # as many as there are: nothing smaller to learn by heart
    asked = known(lambda eps: 0.52, training=0.6)
    found = run()
    assert asked == [[0.0]] and found.area is None and found.value is None
    assert "under-trained at eps 0 (accuracy 0.600 on training images, 0.520 on held-out images)" in found.warnings[0]
    result = scores(found, "l2", per_class=True)
    assert result["metrics"]["arc"] == {"value": None, "ci": None, "count": 200}
    assert result["metrics"]["arc_normalized"]["value"] is None and result["groups"] == {"class": {}}
    json.dumps(result, allow_nan=False)
    known(lambda eps: 0.52, training=0.9, best_step=DiscriminatorSettings().steps)  # by heart, and still getting better
    assert run().value is None
    known(lambda eps: 0.52, training=0.8)  # it has learned the training images by heart: nothing to be found
    assert run().value is not None
    monkeypatch.setattr(module, "_BY_HEART", 30)  # it learns 30 of each by heart, so that chance on all of them counts
    known(lambda eps: 0.52, training=0.5)
    assert run().value is not None


def test_classes_are_scored_on_their_own_images(known, monkeypatch):
    known(lambda eps: 1.0)
    right = {0: {0.0: 1.0, 0.1: 0.9}, 1: {0.0: 0.8, 0.1: 0.6}}

    def of_class(success):
        def make(sets, radii, found, settings, measuring, finished, report):
            made = []
            for eps in radii:
                stood = np.ones(len(sets.real), np.uint8)
                for label in (0, 1):
                    rows = np.flatnonzero(sets.classes == label)
                    stood[rows[: round(right[label][eps] * len(rows))]] = 3
                made.append(Measured(eps, Outcomes(stood, stood, 2), 0.9, 100, 0.9, 1, 1, {}, 1.0))
            return made

        return make

    monkeypatch.setattr(module, "measure_radii", of_class(None))
    found = run(radii=(0.0, 0.1))
    assert list(found.classes) == [0, 1]
    assert found.classes[0].value == pytest.approx((0.5 + 0.4) / 2 * 0.1)
    assert found.classes[1].value == pytest.approx((0.3 + 0.1) / 2 * 0.1)
    assert found.value == pytest.approx(sum(area.value for area in found.classes.values()) / 2)
    groups = scores(found, "l2", per_class=True)["groups"]["class"]
    assert groups["1"]["arc"]["value"] == found.classes[1].value and len(groups["1"]["arc"]["ci"]) == 2
    assert "groups" not in scores(found, "l2")


def test_progress_is_reported(known):
    known(lambda eps: 0.9)
    seen = []
    run("linf", radii=(0.0, 2 / 255), report=seen.append)
    assert seen == [Progress(0, 2, "eps 0, step 1"), Progress(1, 2, "eps 2, step 1")]


# What is kept for an interrupted run.

LINEAR = DiscriminatorSettings(
    architecture="linear", steps=30, batch_size=32, lr=0.02, validate_every=10, attack_steps=2
)
TRAINED = ArcSettings(training=LINEAR, measuring=MeasureSettings(steps=5), radii=(0.0, 0.1, 0.3, 0.5), draws=100)


def summary(curve):
    return curve.value, curve.area.ci, [radius.outcomes.real.tolist() for radius in curve.measured if radius]


def test_an_interrupted_run_goes_on_and_ends_the_same(tmp_path):
    straight = arc(REAL, SYNTHETIC, TRAINED, CPU)
    folder = tmp_path / "progress"

    def stop_at(eps):
        def report(progress):
            if progress.doing.startswith(f"eps {eps}, measuring"):
                raise KeyboardInterrupt

        return report

    for eps, done in (("0", 0), ("0.3", 2), ("0.5", 3)):
        with pytest.raises(KeyboardInterrupt):
            arc(REAL, SYNTHETIC, TRAINED, CPU, store=folder, facts={"a": 1}, report=stop_at(eps))
        assert len(list(folder.glob("radius-*.json"))) == done
    kept = {path: path.stat().st_mtime_ns for path in folder.glob("radius-*")}
    found = arc(REAL, SYNTHETIC, TRAINED, CPU, store=folder, facts={"a": 1})
    assert summary(found) == summary(straight)
    assert all(path.stat().st_mtime_ns == time for path, time in kept.items())
    seen = []
    again = arc(REAL, SYNTHETIC, TRAINED, CPU, store=folder, facts={"a": 1}, report=seen.append)
    assert summary(again) == summary(straight) and seen == []


def test_a_radius_is_kept_whole(tmp_path):
    made = Measured(
        0.1, outcomes(0.7, 20), 0.8, 30, 0.9, 100, 75, {"layer.weight": torch.randn(3, 2), "n": torch.tensor(4)}, 1.5
    )
    with Store(tmp_path / "p", {"a": (1, 2.5)}) as store:
        assert store.read(0.1) is None
        store.write(made)
        assert store.read(0.10000000000000002) is None
    with Store(tmp_path / "p", {"a": [1, 2.5]}) as store:
        found = store.read(0.1)
    assert {f.name for f in dataclasses.fields(Measured)} == {*vars(found)}
    for field in (
        "eps",
        "validation_accuracy",
        "validation_images",
        "training_accuracy",
        "steps",
        "best_step",
        "seconds",
    ):
        assert getattr(found, field) == getattr(made, field)
    assert (found.outcomes.real == made.outcomes.real).all() and found.outcomes.runs == 2
    assert (found.outcomes.synthetic == made.outcomes.synthetic).all()
    assert found.state.keys() == made.state.keys()
    assert all(torch.equal(found.state[name], tensor) for name, tensor in made.state.items())


def test_a_radius_without_its_numbers_is_made_again(tmp_path):
    with Store(tmp_path / "p", {}) as store:
        store.write(Measured(0.1, outcomes(0.7, 20), 0.8, 30, 0.9, 100, 75, {}, 1.5))
        (tmp_path / "p" / "radius-0.1.json").unlink()
        assert store.read(0.1) is None


def test_other_facts_or_other_files_are_refused(tmp_path):
    with Store(tmp_path / "p", {"settings": {"lr": 0.1}}), pytest.raises(SynthfastError, match="another process"):
        Store(tmp_path / "p", {"settings": {"lr": 0.1}})
    with pytest.raises(UsageError, match=r"^settings.lr: .* was made with 0.1, this command says 0.2"):
        Store(tmp_path / "p", {"settings": {"lr": 0.2}})
    (tmp_path / "thesis.txt").write_text("chapter 1")
    with pytest.raises(UsageError, match="expected the progress of an ARC, found other files; choose another --out"):
        Store(tmp_path, {})
    with pytest.raises(SynthfastError, match="a part of the path is not a folder"):
        Store(tmp_path / "thesis.txt" / "p", {})
