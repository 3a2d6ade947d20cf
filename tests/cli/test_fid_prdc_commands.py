"""``synthfast score fid`` and ``synthfast score prdc`` as a shell runs them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from synthfast.data import open_images


@pytest.fixture(scope="module")
def some(tmp_path_factory: pytest.TempPathFactory) -> str:
    """100 real digits as if they were synthetic."""
    digits = open_images("digits:train")
    path = tmp_path_factory.mktemp("some") / "images.npz"
    np.savez(path, image=digits.read(np.arange(100)), label=digits.labels[:100])
    return f"npz:{path}"


def text(entry: dict, places: int = 4) -> str:
    low, high = entry["ci"]
    return f"{entry['value']:.{places}f} [{low:.{places}f}, {high:.{places}f}]"


def test_fid_prints_lines_and_writes_the_result(cli, some, tmp_path):
    out = tmp_path / "fid.json"
    ran = cli("score", "fid", "--synthetic", some, "--features", "pixels", "--out", out, "--device", "cpu")
    assert (ran.status, ran.err) == (0, "")
    result = json.loads(out.read_text())
    metrics = result["metrics"]
    assert ran.out.splitlines() == [
        f"fid {text(metrics['fid'])} of 100 images of {some} against 1,297 images of digits:test, features pixels",
        "fid infinity -",
        f"kid {text(metrics['kid'], 6)}",
    ]
    printed = json.loads(cli("score", "fid", "--synthetic", some, "--features", "pixels", "--json").out)
    assert printed["metrics"] == metrics and printed["config"] == result["config"]


def test_prdc_prints_lines_and_a_table_of_classes(cli, some):
    arguments = ("score", "prdc", "--synthetic", some, "-n", 90, "--k", 3, "--per-class", "--device", "cpu")
    result = json.loads(cli(*arguments, "--json").out)
    lines = cli(*arguments).out.splitlines()
    metrics = result["metrics"]
    of = f" of 90 images of {some} against 90 images of digits:test, features classifier"
    assert lines[0] == f"precision {text(metrics['precision'])}{of}"
    assert lines[1:4] == [f"{name} {text(metrics[name])}" for name in ("recall", "density", "coverage")]
    assert lines[4] == "" and lines[5].split() == ["class", "precision", "recall", "density", "coverage"]
    groups = result["groups"]["class"]
    assert [line.split()[0] for line in lines[6 : 6 + len(groups)]] == list(groups) and len(groups) > 5
    assert lines[6].startswith(f"0      {text(groups['0']['precision'])}")


def test_statistics_are_saved_and_used(cli, some, tmp_path):
    stats = tmp_path / "stats.npz"
    first = cli("score", "fid", "--synthetic", some, "--save-stats", stats)
    warning = f"warning: {some}: 100 images are few for 128 features; FID is compared only at equal numbers, see kid"
    assert first.out.splitlines()[3:] == [warning, f"{stats}: statistics of digits:test, for --real stats:{stats}"]
    again = cli("score", "fid", "--synthetic", some, "--real", f"stats:{stats}")
    assert again.status == 0 and again.out.split()[:2] == first.out.split()[:2] and "\nkid -\n" in again.out
    other = cli("score", "fid", "--synthetic", some, "--real", f"stats:{stats}", "--features", "pixels")
    assert other.status == 2 and other.error.startswith(f"{stats}: expected statistics of 64 features like pixels")


@pytest.mark.parametrize("command", ["fid", "prdc"])
@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["--synthetic", "runs/nowhere"], 2, "runs/nowhere: no such image source; expected digits, mnist"),
        (["--synthetic", "digits", "--real", "digits:valid"], 2, "digits:valid: no such split; digits has train"),
        (["--synthetic", "digits", "--features", "dino"], 2, "--features dino: no such features; expected pixels"),
        (["--synthetic", "digits", "--features", "classifier:x"], 1, "x/config.json: no checkpoint here"),
        (["--synthetic", "digits", "--n", "0"], 2, "--n 0: expected a whole number of at least 1"),
        (["--synthetic", "digits", "--n", "3"], 2, ""),
        (["--synthetic", "digits", "--batch-size", "0"], 2, "--batch-size 0: expected at least 1"),
        (["--synthetic", "digits", "--device", "abacus"], 2, "--device abacus: expected auto, cpu, cuda or cuda:N"),
        (["--synthetic", "digits", "--real", "stats:none.npz"], None, ""),
        (
            ["--synthetic", "digits", "--out", "/proc/nothing/x.json"],
            1,
            "/proc/nothing: no such file or folder; choose",
        ),
    ],
)
def test_wrong_input_is_one_line(cli, command, arguments, status, message):
    ran = cli("score", command, *arguments)
    expected = status if status is not None else {"fid": 1, "prdc": 2}[command]
    assert ran.status == expected and ran.error.startswith(message) and ran.out == ""


def test_options_of_one_command(cli):
    for arguments, message in (
        (("prdc", "--k", 0), "--k 0: expected a whole number of at least 1"),
        (("prdc", "--k", 600), "digits:train: expected more than k = 600 images, found 500; lower --k"),
        (("fid", "--kid-n", 5), "--kid-n 5: expected a whole number of at least 24"),
        (("fid", "--kid-subsets", -1), "--kid-subsets -1: expected a whole number of at least 0"),
        (("fid", "--real", "stats:a", "--save-stats", "b"), "--save-stats b: --real stats:a is such a file already"),
    ):
        ran = cli("score", *arguments, "--synthetic", "digits")
        assert ran.status == 2 and ran.error.startswith(message)


def test_grey_against_colour(cli, tmp_path: Path):
    np.savez(tmp_path / "colour.npz", image=np.zeros((30, 8, 8, 3), np.uint8))
    ran = cli("score", "prdc", "--synthetic", f"npz:{tmp_path / 'colour.npz'}")
    assert ran.status == 2
    assert ran.error.endswith("expected images 8x8x1 like digits:test, found 8x8x3; compare sets of one shape")
