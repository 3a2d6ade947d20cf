"""Precision, recall, density and coverage: the counts of the prdc package, and cases whose answer is known."""

from __future__ import annotations

import contextlib
import io
import subprocess
import sys

import numpy as np
import pytest
import torch

from synthfast.errors import UsageError
from synthfast.evaluation import wilson_interval
from synthfast.scoring.prdc import prdc

NAMES = ("precision", "recall", "density", "coverage")


def theirs(real: torch.Tensor, synthetic: torch.Tensor, k: int) -> dict[str, float]:
    package = pytest.importorskip("prdc")
    with contextlib.redirect_stdout(io.StringIO()):
        return package.compute_prdc(real.numpy(), synthetic.numpy(), k)


def made(kind: str, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    real, synthetic = (torch.randn(count, 24, generator=generator) for count in (400, 700))
    if kind == "alike":
        return real, synthetic
    if kind == "collapsed":
        return real, synthetic * 0.3
    if kind == "spread":
        return real, synthetic * 2
    if kind == "rectified":  # as the features of networks: not negative, about a mean far from 0
        return (real + 2).relu(), (synthetic * 1.1 + 2).relu()
    # Pixels of few levels: many equal distances, so that < and <= differ.
    return (real * 2 + 8).clamp(0, 16).round() / 16, (synthetic * 2 + 8).clamp(0, 16).round() / 16


@pytest.mark.parametrize("kind", ["alike", "collapsed", "spread", "rectified", "pixels"])
@pytest.mark.parametrize("k", [1, 5, 50])
def test_counts_are_those_of_the_package(generator, kind, k):
    real, synthetic = made(kind, generator)
    expected, found = theirs(real, synthetic, k), prdc(real, synthetic, k)
    for name in NAMES:
        assert getattr(found, name) == pytest.approx(float(expected[name]), abs=1e-12), name


def test_counts_one_by_one(generator):
    real, synthetic = made("pixels", generator)
    found = prdc(real, synthetic, 3)
    distances = (real.double()[:, None] - synthetic.double()[None]).square().sum(2).float().sqrt()
    within = (real.double()[:, None] - real.double()[None]).square().sum(2).float().sqrt()
    assert np.array_equal(found.real_radii, within.sort(dim=1).values[:, 3].numpy())
    inside = distances < torch.from_numpy(found.real_radii)[:, None]
    assert np.array_equal(found.hits, inside.sum(0).numpy())
    assert np.array_equal(found.covered, inside.any(1).numpy())
    assert np.array_equal(found.recalled, (distances < torch.from_numpy(found.synthetic_radii)).any(1).numpy())


def test_a_set_against_itself_and_against_one_far_away(generator):
    real, _ = made("alike", generator)
    itself = prdc(real, real.clone(), 5)
    assert [itself.precision, itself.recall, itself.coverage] == [1, 1, 1]
    assert itself.density == pytest.approx(
        1, abs=0.01
    )  # every ball holds its centre and the nearest four, not the fifth
    far = prdc(real, real + 100, 5)
    assert [far.precision, far.recall, far.density, far.coverage] == [0, 0, 0, 0]


def test_more_copies_raise_neither_recall_nor_coverage(generator):
    """A generator that repeats ten images looks real, and covers little."""
    real, _ = made("alike", generator)
    found = prdc(real, real[:10].repeat(40, 1), 5)
    assert found.precision == 1 and found.recall == 0 and found.coverage < 0.35


def test_swapping_swaps_precision_and_recall(generator):
    real, synthetic = made("spread", generator)
    one, two = prdc(real, synthetic), prdc(synthetic, real)
    assert (one.precision, one.recall) == (two.recall, two.precision)
    assert one.precision < one.recall


def test_entries_have_intervals(generator):
    real, synthetic = made("collapsed", generator)
    found = prdc(real, synthetic, 4)
    entries = found.entries(seed=3)
    assert list(entries) == list(NAMES)
    assert [entries[name]["count"] for name in NAMES] == [700, 400, 700, 400]
    for name in NAMES:
        assert entries[name]["value"] == getattr(found, name)
        low, high = entries[name]["ci"]
        assert low <= entries[name]["value"] <= high
    assert entries["recall"]["ci"] == wilson_interval(int(found.recalled.sum()), 400)
    # The bootstrap of a mean: about 1.96 standard errors to each side.
    half = 1.96 * found.hits.std() / 4 / 700**0.5
    low, high = entries["density"]["ci"]
    assert high - low == pytest.approx(2 * half, rel=0.1)
    assert found.entries(seed=3) == entries and found.entries(seed=4)["density"] != entries["density"]


@pytest.mark.parametrize(("n", "m", "k"), [(5, 9, 5), (9, 5, 5), (2, 2, 7)])
def test_too_few_images_are_refused(n, m, k):
    message = f"^--k {k}: expected more than {k} images in each set, found {n} real and {m} synthetic ones; lower it"
    with pytest.raises(UsageError, match=message):
        prdc(torch.randn(n, 3), torch.randn(m, 3), k)


MEMORY = """
import torch
from synthfast.scoring.prdc import prdc

def kilobytes(field):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(field))

torch.set_num_threads(1)
x = torch.randn(8000, 16, generator=torch.Generator().manual_seed(0))
prdc(x[:200], x[200:400])
before = kilobytes("VmRSS")
prdc(x[:4000], x[4000:])
print(kilobytes("VmHWM") - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_does_not_hold_all_distances():
    """Those of 4,000 images of each kind would take 64 MB, and their order 128 MB more."""
    run = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True)
    assert int(run.stdout) < 50_000
