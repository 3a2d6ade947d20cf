"""Which class an image gets: by index and seed alone, in the asked proportions."""

from __future__ import annotations

import math

import pytest
import torch

from synthfast.errors import UsageError
from synthfast.sampling import LabelPlan

N = 20_000


def counts(text: str, classes: int, seed: int = 0) -> torch.Tensor:
    labels = LabelPlan.parse(text, classes).labels(torch.arange(N), seed)
    assert labels.dtype == torch.int64
    return torch.bincount(labels, minlength=classes)


def chi_squared(found: torch.Tensor, shares: list[float]) -> float:
    expected = N * torch.tensor(shares, dtype=torch.float64) / math.fsum(shares)
    return float(((found - expected) ** 2 / expected).sum())


def test_balanced_gives_image_i_the_class_i_mod_classes():
    labels = LabelPlan.parse("balanced", 7).labels(torch.tensor([0, 6, 7, 2**40, 15]), 3)
    assert labels.tolist() == [0, 6, 0, 2**40 % 7, 1]


@pytest.mark.parametrize(("text", "expected"), [("3", [3, 3, 3, 3]), ("3,5", [3, 5, 3, 5]), ("1,1,0", [1, 1, 0, 1])])
def test_listed_classes_take_turns(text, expected):
    assert LabelPlan.parse(text, 10).labels(torch.arange(4), 0).tolist() == expected


@pytest.mark.parametrize("seed", [0, 1, -5])
def test_uniform_draws_every_class_alike(seed):
    assert chi_squared(counts("uniform", 10, seed), [1.0] * 10) < 27.9  # 99.9% of 9 degrees of freedom


@pytest.mark.parametrize("seed", [0, 1])
def test_weights_are_the_proportions(seed):
    weights = [0.5, 0.3, 0.15, 0.05]
    text = "weights:" + ",".join(map(str, weights))
    assert chi_squared(counts(text, 4, seed), weights) < 16.3  # 99.9% of 3 degrees of freedom
    scaled = "weights:" + ",".join(str(200 * weight) for weight in weights)
    assert torch.equal(counts(scaled, 4, seed), counts(text, 4, seed))


@pytest.mark.parametrize("text", ["weights:0,1,0", "weights:1,0,0", "weights:0,0,1", "weights:1,0,1"])
def test_a_class_of_weight_0_is_never_drawn(text):
    found = counts(text, 3)
    for share, number in zip(text.removeprefix("weights:").split(","), found.tolist(), strict=True):
        assert (number > 0) == (share == "1")


@pytest.mark.parametrize("text", ["uniform", "weights:1,2,3,4"])
def test_a_drawn_label_depends_on_seed_and_index_alone(text):
    plan, index = LabelPlan.parse(text, 4), torch.arange(100, 300)
    labels = plan.labels(index, 5)
    some = torch.tensor([150, 3, 77])
    assert torch.equal(plan.labels(index[some], 5), labels[some])
    assert not torch.equal(plan.labels(index, 6), labels)
    assert not torch.equal(plan.labels(index + 1, 5), labels)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "even",
        "3;5",
        "3,,5",
        "2.0",
        "4",
        "-1",
        "0,4",
        "weights:",
        "weights:1,2,3",
        "weights:1,2,3,4,5",
        "weights:1,2,3,x",
        "weights:1,1,1,-1",
        "weights:0,0,0,0",
        "weights:1,1,1,inf",
        "weights:1,1,1,nan",
        "weights:nan,1,1,1",
        "weights:1e308,1e308,1e308,1e308",
    ],
)
def test_anything_else_is_refused_in_one_line(text):
    with pytest.raises(UsageError) as caught:
        LabelPlan.parse(text, 4)
    assert str(caught.value).startswith(f"--labels {text}: expected ") and "\n" not in str(caught.value)
