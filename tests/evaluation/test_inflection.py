"""The comparison with and without synthetic images: what is run, and what is made of the scores."""

from __future__ import annotations

import itertools

import pytest

from synthfast.config import InflectionConfig
from synthfast.errors import UsageError
from synthfast.evaluation.inflection import Plan, Run, compare, table, verdict
from synthfast.evaluation.interval import mean_interval


def config(**options) -> InflectionConfig:
    return InflectionConfig(synthetic=("shards",), **options)


def test_the_plan_holds_every_combination_once():
    plan = Plan.of(config(methods="standard, pgd", counts="400,100,400", seeds=2), 400)
    assert plan == Plan(("standard", "pgd"), (100, 400), 2)
    runs = list(plan.runs())
    assert sorted((r.seed, r.method, r.synthetic) for r in runs) == sorted(
        itertools.product((0, 1), ("standard", "pgd"), (0, 100, 400))
    )
    assert [run.seed for run in runs] == sorted(run.seed for run in runs)
    assert len({run.name for run in runs}) == len(runs) and "standard-real-seed-0" in {run.name for run in runs}


def test_without_counts_all_images_are_used():
    assert Plan.of(config(), 1234).counts == (1234,)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"counts": "many"}, "--counts many: expected whole numbers"),
        ({"counts": "0,5"}, "--counts 0,5: expected numbers from 1 to 400"),
        ({"counts": "401"}, "--counts 401: expected numbers from 1 to 400"),
        (
            {"methods": "standard,madry"},
            "--methods standard,madry: expected some of standard, pgd, trades, found 'madry'",
        ),
        ({"methods": ""}, "--methods : expected some of"),
    ],
)
def test_a_plan_that_cannot_be_is_refused(options, message):
    with pytest.raises(UsageError) as caught:
        Plan.of(config(**options), 400)
    assert str(caught.value).startswith(message)


def results(robust_real, robust_synthetic, clean_real=(0.9, 0.9, 0.9), clean_synthetic=(0.9, 0.9, 0.9)):
    found = {}
    for seed in range(3):
        for count, clean, robust in ((0, clean_real, robust_real), (500, clean_synthetic, robust_synthetic)):
            metrics = {"accuracy": {"value": clean[seed]}, "robust_accuracy": {"value": robust[seed]}}
            found[Run("pgd", count, seed)] = {"metrics": metrics}
    return found


def test_gains_are_paired_by_seed():
    """The seeds differ by more than the gain, which is nearly the same for each: its interval must be narrow."""
    real, synthetic = (0.4, 0.5, 0.6), (0.45, 0.56, 0.65)
    found = compare(results(real, synthetic))
    curve = found["curves"]["pgd"]
    assert curve["synthetic"] == [0, 500]
    assert curve["robust_accuracy"] == [mean_interval(real), mean_interval(synthetic)]
    assert curve["robust_accuracy_gain"][0] is None
    gain = curve["robust_accuracy_gain"][1]
    assert gain == found["metrics"]["pgd_robust_accuracy_gain"]
    assert gain["value"] == pytest.approx(0.16 / 3) and gain["ci"] == pytest.approx(
        mean_interval([0.05, 0.06, 0.05])["ci"]
    )
    assert gain["ci"][1] - gain["ci"][0] < 0.03
    assert found["metrics"]["pgd_accuracy_gain"]["value"] == 0
    assert found["runs"]["pgd-synthetic-500-seed-1"] == {"accuracy": 0.9, "robust_accuracy": 0.56}


@pytest.mark.parametrize(
    ("synthetic", "sentence"),
    [
        (
            (0.45, 0.56, 0.65),
            "+5.3 points [+3.9, +6.8] with 500 synthetic images; the inflection point is crossed (from 500 on)",
        ),
        ((0.35, 0.44, 0.55), "-5.3 points [-6.8, -3.9] with 500 synthetic images; the synthetic images hurt"),
        ((0.5, 0.4, 0.6), "+0.0 points [-24.8, +24.8] with 500 synthetic images; no gain is certain"),
    ],
)
def test_the_verdict(synthetic, sentence):
    curves = compare(results((0.4, 0.5, 0.6), synthetic))["curves"]
    assert verdict(curves)[1] == f"pgd, robust accuracy: {sentence}"


def test_the_verdict_names_the_first_number_from_which_on_it_helps():
    found = results((0.4, 0.5, 0.6), (0.4, 0.5, 0.61))
    for seed, robust in enumerate((0.5, 0.6, 0.71)):
        found[Run("pgd", 1000, seed)] = {"metrics": {"accuracy": {"value": 0.9}, "robust_accuracy": {"value": robust}}}
    assert verdict(compare(found)["curves"])[1].endswith(
        "with 1,000 synthetic images; the inflection point is crossed (from 1,000 on)"
    )


@pytest.mark.parametrize(
    ("most", "sentence"),
    [
        ((0.5, 0.4, 0.6), "with 2,000 synthetic images; a gain is certain with 500 alone"),
        ((0.5, 0.6, 0.71), "with 2,000 synthetic images; the inflection point is crossed (from 2,000 on)"),
    ],
)
def test_a_gain_that_more_images_lose_is_not_a_gain_from_there_on(most, sentence):
    found = results((0.4, 0.5, 0.6), (0.45, 0.56, 0.65))  # certain with 500, not with 1,000
    for count, robust in ((1000, (0.5, 0.4, 0.6)), (2000, most)):
        for seed in range(3):
            metrics = {"accuracy": {"value": 0.9}, "robust_accuracy": {"value": robust[seed]}}
            found[Run("pgd", count, seed)] = {"metrics": metrics}
    assert verdict(compare(found)["curves"])[1].endswith(sentence)


def test_one_seed_has_no_interval():
    one = {run: score for run, score in results((0.4, 0.5, 0.6), (0.5, 0.5, 0.6)).items() if run.seed == 0}
    curves = compare(one)["curves"]
    assert (
        verdict(curves)[1] == "pgd, robust accuracy: +10.0 points with 500 synthetic images; one seed gives no interval"
    )
    assert table(curves)[2] == ("pgd", "500", "90.0", "50.0", "+0.0", "+10.0")


def test_the_table():
    rows = table(compare(results((0.4, 0.5, 0.6), (0.45, 0.56, 0.65)))["curves"])
    assert len({len(row) for row in rows}) == 1
    assert rows[1] == ("pgd", "none", "90.0 [90.0, 90.0]", "50.0 [25.2, 74.8]", "", "")
    wide = compare(results((0.1, 0.5, 0.9), (0.1, 0.5, 1.0)))["curves"]["pgd"]
    assert wide["robust_accuracy"][0]["ci"] == [0.0, 1.0]  # Student's t alone would go beyond
    assert rows[2][:2] == ("pgd", "500") and rows[2][5] == "+5.3 [+3.9, +6.8]"
