"""``synthfast score robust`` on a classifier of digits, as users start it: results, resuming, ranks, what is refused."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from synthfast.cli.main import main

from synthfast.evaluation import wilson_interval

QUICK = ("--attack", "pgd", "--attack-steps", "4", "--eps", "0.1", "--batch-size", "64", "--device", "cpu")


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("classifier") / "cnn"
    with pytest.raises(SystemExit) as caught:
        main(["train", "classifier", "--steps", "60", "--device", "cpu", "--out", str(folder)])
    assert caught.value.code == 0
    return folder


def test_the_result_has_every_part(cli, classifier, tmp_path):
    file = tmp_path / "robust.json"
    ran = cli("score", "robust", "--classifier", classifier, *QUICK, "-n", 200, "--out", file, "--json")
    assert ran.status == 0
    result = json.loads(ran.out)
    assert json.loads(file.read_text()) == result and [path.name for path in tmp_path.iterdir()] == ["robust.json"]
    assert list(result) == [
        "format", "command", "config", "environment", "inputs", "metrics", "attacks", "groups", "warnings", "seconds",
    ]  # fmt: skip
    assert result["command"] == "score robust" and result["config"]["eps"] == 0.1
    attack = result["config"]["attacks"]["pgd-4"]
    assert (attack["attack"], attack["steps"], attack["norm"]) == ("PGD", 4, "linf")
    assert attack["step_size"] == pytest.approx(0.025)
    clean, robust = result["metrics"]["accuracy"], result["metrics"]["robust_accuracy"]
    assert clean["count"] == robust["count"] == 200 and 0.02 < robust["value"] < clean["value"] - 0.1
    assert robust["ci"] == wilson_interval(round(200 * robust["value"]), 200)
    assert result["attacks"]["pgd-4"]["broken"] == round(200 * (clean["value"] - robust["value"]))
    groups = result["groups"]["class"]
    assert sum(group["robust_accuracy"]["count"] for group in groups.values()) == 200
    total = sum(g["robust_accuracy"]["value"] * g["robust_accuracy"]["count"] for g in groups.values())
    assert total == pytest.approx(200 * robust["value"])
    assert result["warnings"] == []


def test_lines(cli, classifier):
    ran = cli("score", "robust", "--classifier", classifier, *QUICK, "-n", 50)
    first, second = ran.out.splitlines()
    assert first.startswith("accuracy ") and first.endswith(" on 50 images")
    assert second.startswith("robust accuracy ")
    assert second.endswith(" on 50 images of digits:test under pgd, linf eps 0.1")


def test_a_larger_ball_breaks_more_and_none_breaks_nothing(cli, classifier):
    values = []
    for eps in ("0", "8/255", "0.1", "0.5"):
        ran = cli("score", "robust", "--classifier", classifier, *QUICK, "-n", 100, "--eps", eps, "--json")
        result = json.loads(ran.out)
        values.append(result["metrics"]["robust_accuracy"]["value"])
        if eps == "8/255":
            assert result["config"]["eps"] == 8 / 255
    assert values[0] == result["metrics"]["accuracy"]["value"]
    assert values == sorted(values, reverse=True) and values[0] > values[1] > values[2] > values[3]


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_autoattack_says_what_each_attack_left(cli, classifier, norm):
    eps = {"linf": 0.2, "l2": 1.5}[norm]  # so much that few images stand for the long attacks
    ran = cli("score", "robust", "--classifier", classifier, "--norm", norm, "--eps", eps, "-n", 10, "--device", "cpu")
    assert ran.status == 0
    lines = ran.out.splitlines()
    assert lines[1].endswith(f"under autoattack, {norm} eps {eps}")
    assert [line.split()[1] for line in lines[2:6]] == ["apgd-ce:", "apgd-t:", "fab-t:", "square:"]
    assert len(lines) == 6


def test_a_published_file_of_weights(cli, classifier, tmp_path):
    tensors = load_file(classifier / "model.safetensors")
    torch.save({"state_dict": tensors}, tmp_path / "weights.pt")
    arguments = ("score", "robust", "--model", "small-cnn", *QUICK, "-n", 50, "--json")
    refused = cli(*arguments, "--classifier", tmp_path / "weights.pt")
    assert refused.status == 1 and "pass --allow-pickle if you trust it" in refused.error
    found = json.loads(cli(*arguments, "--classifier", tmp_path / "weights.pt", "--allow-pickle").out)
    expected = json.loads(cli("score", "robust", "--classifier", classifier, *QUICK, "-n", 50, "--json").out)
    assert found["metrics"] == expected["metrics"]
    assert found["inputs"]["classifier"]["path"] == str(tmp_path / "weights.pt")


def command(classifier: Path, out: Path) -> list[str]:
    steps = (
        "--attack",
        "pgd",
        "--attack-steps",
        "12",
        "--eps",
        "0.05",
        "-n",
        "500",
        "--batch-size",
        "32",
        "--device",
        "cpu",
    )
    return ["-m", "synthfast", "score", "robust", "--classifier", str(classifier), *steps, "--out", str(out)]


ONE_THREAD = {"OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def straight(classifier, tmp_path_factory) -> dict:
    out = tmp_path_factory.mktemp("straight") / "robust.json"
    subprocess.run([sys.executable, *command(classifier, out)], env={**os.environ, **ONE_THREAD}, check=True)
    return json.loads(out.read_text())


def parts(result: dict) -> dict:
    return {key: result[key] for key in ("metrics", "attacks", "groups")}


def test_killed_and_started_again_gives_the_same(classifier, straight, tmp_path):
    out = tmp_path / "robust.json"
    process = subprocess.Popen([sys.executable, *command(classifier, out)], env={**os.environ, **ONE_THREAD})
    progress, deadline = tmp_path / "robust.json.progress", time.monotonic() + 120
    while len(list(progress.glob("01-*"))) < 3:  # some batches of the attack are done
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not out.exists()
    kept = {path: path.stat().st_mtime_ns for path in progress.glob("01-*")}
    assert len(kept) >= 3
    subprocess.run([sys.executable, *command(classifier, out)], env={**os.environ, **ONE_THREAD}, check=True)
    assert parts(json.loads(out.read_text())) == parts(straight)
    assert [path.name for path in tmp_path.iterdir()] == ["robust.json"]


def test_two_ranks_give_what_one_gives(classifier, straight, tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    out = tmp_path / "robust.json"
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(port)]
    ran = subprocess.run(
        [sys.executable, *launcher, *command(classifier, out)],
        env={**os.environ, **ONE_THREAD},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    assert parts(json.loads(out.read_text())) == parts(straight)
    assert ran.stdout.count("robust accuracy") == 1


def test_an_evaluation_of_something_else_does_not_go_on(cli, classifier, tmp_path):
    out = tmp_path / "robust.json"
    folder = tmp_path / "robust.json.progress"
    folder.mkdir()
    (folder / "facts.json").write_text('{"classifier": "another"}')
    ran = cli("score", "robust", "--classifier", classifier, *QUICK, "--out", out)
    assert ran.status == 2 and ran.error.startswith(f'classifier: {folder} was made with "another", this command says ')
    assert not out.exists()


def test_images_that_do_not_fit_are_refused(cli, classifier, tmp_path):
    np.savez(tmp_path / "images.npz", image=np.zeros((4, 9, 9), np.uint8), label=np.arange(4))
    source = f"npz:{tmp_path / 'images.npz'}"
    ran = cli("score", "robust", "--classifier", classifier, "--dataset", source, *QUICK)
    expected = f"{source}: expected images [8, 8, 1] in 10 classes as {classifier} was trained on, found [9, 9, 1] in 4"
    assert ran.status == 2 and ran.error.startswith(expected)


@pytest.mark.parametrize("command", ["accuracy", "robust"])
def test_a_folder_as_result_file_is_refused_before_anything_is_computed(cli, tmp_path, command):
    ran = cli("score", command, "--classifier", tmp_path / "none", "--out", tmp_path, "--device", "cpu")
    assert ran.status == 2 and ran.error == f"--out {tmp_path}: expected a file, found a folder; choose another name"
