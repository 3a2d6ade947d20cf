"""``synthfast train classifier`` and ``synthfast score accuracy``, from sampled digits to the result file."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from synthfast.cli.main import main

from synthfast import __version__
from synthfast.data import open_images
from synthfast.evaluation import wilson_interval


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier trained for a moment on the real digits."""
    folder = tmp_path_factory.mktemp("classifier") / "cnn"
    with pytest.raises(SystemExit) as caught:
        main(["train", "classifier", "--steps", "60", "--device", "cpu", "--out", str(folder)])
    assert caught.value.code == 0
    return folder


def test_the_result_has_every_part_and_is_what_json_prints(cli, classifier, tmp_path):
    file = tmp_path / "result.json"
    printed = cli("score", "accuracy", "--classifier", classifier, "--out", file, "--json", "--device", "cpu")
    assert (printed.status, printed.err) == (0, "")
    result = json.loads(printed.out)
    assert json.loads(file.read_text()) == result and [path.name for path in tmp_path.iterdir()] == ["result.json"]
    assert list(result) == ["format", "command", "config", "environment", "inputs", "metrics", "groups", "seconds"]
    assert (result["format"], result["command"]) == (1, "score accuracy")
    assert result["config"] == {
        "classifier": str(classifier),
        "model": None,
        "dataset": "digits:test",
        "n": None,
        "image_size": None,
    }
    assert {"synthfast": __version__}.items() <= result["environment"].items()
    assert {"python", "torch", "numpy", "platform", "cpu", "cores", "threads", "gpus"} <= set(result["environment"])
    weights = classifier / "model.safetensors"
    digits = open_images("digits:test")
    assert result["inputs"] == {
        "classifier": {
            "path": str(weights),
            "sha256": hashlib.sha256(weights.read_bytes()).hexdigest(),
            "count": None,
        },
        "dataset": {"path": "digits:test", "sha256": digits.fingerprint(), "count": 1297},
    }
    assert result["seconds"] > 0


def test_the_numbers_fit_each_other(cli, classifier):
    result = json.loads(cli("score", "accuracy", "--classifier", classifier, "--json").out)
    overall, labels = result["metrics"]["accuracy"], open_images("digits:test").labels
    assert overall["count"] == 1297 and 0.6 < overall["value"] <= 1
    right = round(overall["value"] * 1297)
    assert overall["value"] == right / 1297 and overall["ci"] == wilson_interval(right, 1297)
    groups = result["groups"]["class"]
    assert list(groups) == [str(k) for k in range(10)]
    assert [group["accuracy"]["count"] for group in groups.values()] == np.bincount(labels).tolist()
    total = sum(group["accuracy"]["value"] * group["accuracy"]["count"] for group in groups.values())
    assert round(total, 6) == right
    for group in groups.values():
        low, high = group["accuracy"]["ci"]
        assert 0 <= low <= group["accuracy"]["value"] <= high <= 1


def test_without_json_it_is_one_line(cli, classifier):
    ran = cli("score", "accuracy", "--classifier", classifier, "--dataset", "digits:train")
    value = json.loads(cli("score", "accuracy", "--classifier", classifier, "--dataset", "digits", "--json").out)
    share, (low, high) = (value["metrics"]["accuracy"][key] for key in ("value", "ci"))
    assert ran.out == f"accuracy {share:.4f} [{low:.4f}, {high:.4f}] on 500 images of digits:train\n"
    assert ran.err == ""


def test_from_sampled_digits_alone(cli, tmp_path):
    samples, folder = tmp_path / "samples", tmp_path / "cnn"
    assert cli("sample", "--n", 300, "--steps", 3, "--out", samples, "--device", "cpu").status == 0
    synthetic = ("train", "classifier", "--synthetic", samples, "--fraction", 1)
    ran = cli(*synthetic, "--steps", 40, "--batch-size", 64, "--out", folder, "--device", "cpu")
    assert ran.status == 0 and ran.out.startswith(f"{folder}: 40 steps, last loss ")
    training = json.loads((folder / "config.json").read_text())["training"]
    assert training["synthetic"] == [str(samples)] and len(training["data"]) == 1  # no real image
    score = json.loads(cli("score", "accuracy", "--classifier", folder, "--dataset", samples, "--json").out)
    assert score["metrics"]["accuracy"]["value"] > 0.3
    assert score["inputs"]["dataset"] == {
        "path": str(samples),
        "sha256": open_images(str(samples)).fingerprint(),
        "count": 300,
    }


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["--dataset", "digits:valid"], 2, "digits:valid: no such split; digits has train, test"),
        (["--dataset", "digts"], 2, "digts: no such image source; expected digits, mnist"),
        (["--dataset", "npz:none.npz"], 1, "none.npz: no such npz file; check the path"),
        (["--device", "abacus"], 2, "--device abacus: expected auto, cpu, cuda or cuda:N"),
        (["--out", "/proc/nothing/result.json"], 1, "/proc/nothing: no such file or folder; choose another --out"),
        (["--out", "/dev/null/result.json"], 1, "/dev/null: a file is in the way; choose another --out"),
    ],
)
def test_what_cannot_be_done_is_one_line(cli, classifier, arguments, status, message):
    ran = cli("score", "accuracy", "--classifier", classifier, *arguments)
    assert ran.status == status and ran.error.startswith(message) and ran.out == ""


def test_images_that_do_not_fit_are_refused(cli, classifier, tmp_path):
    for images, message in (
        ({"image": np.zeros((4, 8, 8), np.uint8)}, "has no labels, accuracy needs them; choose another source"),
        (
            {"image": np.zeros((4, 9, 9), np.uint8), "label": np.arange(4)},
            f"expected images [8, 8, 1] in 10 classes as {classifier} was trained on, found [9, 9, 1] in 4",
        ),
    ):
        np.savez(tmp_path / "images.npz", **images)
        source = f"npz:{tmp_path / 'images.npz'}"
        ran = cli("score", "accuracy", "--classifier", classifier, "--dataset", source)
        assert ran.status == 2 and ran.error.startswith(f"{source}: {message}")


def test_a_folder_that_is_no_classifier_is_refused(cli, classifier, tmp_path):
    ran = cli("score", "accuracy", "--classifier", tmp_path / "none")
    assert ran.status == 1 and ran.error == f"{tmp_path / 'none' / 'config.json'}: no checkpoint here; check the path"
    for damage, message in (
        (
            lambda config: {**config, "kind": "diffusion"},
            "expected a checkpoint of kind 'classifier', found 'diffusion'",
        ),
        (lambda config: {**config, "format": 9}, "format 9 is newer than this synthfast reads (1); upgrade synthfast"),
        (lambda config: {**config, "model": {"name": "small-cnn"}}, "the weights do not fit config.json"),
        (lambda config: {**config, "sha256": "0" * 64}, f"expected SHA-256 {'0' * 64}, found "),
    ):
        folder = Path(shutil.copytree(classifier, tmp_path / "copy", dirs_exist_ok=True))
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(damage(config)))
        ran = cli("score", "accuracy", "--classifier", folder)
        assert ran.status == 1 and message in ran.error
