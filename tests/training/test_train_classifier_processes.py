"""The command as users start it: killed and started again, and on two ranks."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from synthfast.artifacts import load_tensors
from synthfast.data import ShardFolder, open_images
from synthfast.training import classifier
from synthfast.training.state import STATE_FILE

ROBUST = {
    "method": "pgd",
    "attack_steps": 2,
    "eps": 0.1,
    "cutmix": 0.5,
    "ema": 0.9,
    "flip": True,
    "checkpoint_every": 2,
}
# Runs whose network has no batch norm, the one thing that ranks do not share.
SHARED = {
    "halves": {"method": "pgd"},
    "whole": {"method": "trades", "cutmix": 0.5, "crop": 1, "flip": True, "ema": 0.9, "validation": 60},
}
QUICK = {
    "device": "cpu",
    "batch_size": 24,
    "steps": 6,
    "checkpoint_every": 3,
    "attack_steps": 2,
    "eps": 0.1,
    "lr": 0.05,
}
ONE_STEP = {"device": "cpu", "batch_size": 32, "steps": 1, "lr": 1e-9}

TWO_RANKS = """
import dataclasses, json, sys
import torch
from synthfast.config import ClassifierConfig
from synthfast.distributed import Ranks
from synthfast.training import classifier

sys.path.insert(0, sys.argv[1])
from test_train_classifier_processes import ONE_STEP, ROBUST, SHARED, QUICK, watched_reads, without_batch_norm

class Stopped(Exception):
    pass

out, synthetic = sys.argv[2:]
with Ranks("cpu") as ranks:
    robust = ClassifierConfig(**ROBUST, device="cpu", batch_size=32, steps=6)
    for folder in ("straight", "stopped"):
        settings = dataclasses.replace(robust, out=f"{out}/{folder}")
        if folder == "stopped":
            real = classifier._Job._checkpoint
            def checkpoint(job, step):
                real(job, step)
                if step == 4:
                    raise Stopped
            classifier._Job._checkpoint = checkpoint
            try:
                classifier.train_classifier(settings, ranks)
            except Stopped:
                classifier._Job._checkpoint = real
        classifier.train_classifier(settings, ranks)
    classifier.train_classifier(ClassifierConfig(out=f"{out}/one-step", **ONE_STEP), ranks)
    classifier.make_classifier = without_batch_norm
    told = {"rank": ranks.rank}
    for name, options in SHARED.items():
        settings = ClassifierConfig(out=f"{out}/{name}", synthetic=(synthetic,), **{**QUICK, **options})
        with watched_reads() as seen:
            result = classifier.train_classifier(settings, ranks)
        told[name] = [seen, result.validation]
    with open(f"{out}/told-{ranks.rank}.json", "w") as file:
        json.dump(told, file)
"""


def without_batch_norm(name, shape, classes):
    """In place of make_classifier."""
    model = torch.nn.Sequential(
        torch.nn.Flatten(), torch.nn.Linear(64, 16), torch.nn.ReLU(), torch.nn.Linear(16, classes)
    )
    model.description = {"name": name}
    return model


class watched_reads:
    """Which of a step's batch were asked for, and their labels: a list of [step, positions, labels]."""

    def __enter__(self):
        self.real, seen = classifier.Mixture.wanted, []

        def wanted(data, step, positions):
            found = self.real(data, step, positions)
            labels = [images.labels[items] for (images, _), items in zip(data.parts, found.items, strict=True)]
            seen.append([step, positions.tolist(), np.concatenate(labels).tolist()])
            return found

        classifier.Mixture.wanted = wanted
        return seen

    def __exit__(self, *_):
        classifier.Mixture.wanted = self.real


def launch(command, **environment):
    return subprocess.Popen(
        [sys.executable, *command],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def train(out):
    """The command with the options of ROBUST."""
    command = ["-m", "synthfast", "train", "classifier", "--device", "cpu", "--batch-size", "32", "--steps", "8"]
    for name, value in ROBUST.items():
        flag = "--" + name.replace("_", "-")
        command += [flag] if value is True else [flag, str(value)]
    return launch([*command, "--out", str(out)])


def finish(process):
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output
    return output


def largest_difference(first, second, file):
    one, two = load_tensors(first / file), load_tensors(second / file)
    assert one.keys() == two.keys()
    return max((one[key].double() - two[key].double()).abs().max().item() for key in one)


def test_killed_and_started_again_gives_the_same_weights(fit, same_results, tmp_path):
    straight, folder = tmp_path / "straight", tmp_path / "killed"
    fit(straight, steps=8, **ROBUST)
    killed = train(folder)
    deadline = time.monotonic() + 120
    while not folder.exists():  # then the network is there and steps are made
        assert time.monotonic() < deadline and killed.poll() is None
        time.sleep(0.005)
    moment = random.random() * 0.5
    time.sleep(moment)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    left = sorted(path.name for path in folder.iterdir())
    output = finish(train(folder))
    assert f"{folder}: 8 steps, last loss " in output or "are done already" in output, output
    assert same_results(straight, folder), f"killed after {moment} s, which left {left}"
    assert not list(folder.glob(".tmp-*"))


def unused_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """The folder of the runs on two ranks, and what each rank told."""
    out, digits = tmp_path_factory.mktemp("two"), open_images("digits")
    synthetic = out / "synthetic"
    facts = {"n": len(digits), "shape": list(digits.shape), "classes": 10, "shard_size": len(digits)}
    with ShardFolder.create_or_resume(synthetic, facts) as folder, folder.writer(0) as writer:
        writer.append(digits.read(np.arange(len(digits))), digits.labels)
        writer.commit()
        folder.finish()
    script = out / "train.py"
    script.write_text(TWO_RANKS)
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", unused_port()]
    finish(launch([*torchrun, str(script), str(Path(__file__).parent), str(out), str(synthetic)]))
    return out, [json.loads((out / f"told-{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize(("name", "tolerance"), [("halves", 1e-5), ("whole", 1e-3)])
def test_two_ranks_do_what_one_does_where_batch_norm_is_out_of_the_way(
    fit, two_ranks, tmp_path, monkeypatch, name, tolerance
):
    """The same images, augmentations, boxes and attack starts. Sums are rounded otherwise, and at the start of TRADES the sign
    of a gradient that is nearly 0 may turn."""
    out, told = two_ranks
    monkeypatch.setattr(classifier, "make_classifier", without_batch_norm)
    with watched_reads() as seen:
        result = fit(tmp_path, synthetic=(str(out / "synthetic"),), **{**QUICK, **SHARED[name]})
    assert [one["rank"] for one in told] == [0, 1]
    for rank, (read, validation) in enumerate(one[name] for one in told):
        if name == "whole":  # CutMix pastes from all of it
            assert read == seen and validation == pytest.approx(result.validation, abs=1 / 60 + 1e-9)
        else:
            assert read == [[step, positions[rank::2], labels[rank::2]] for step, positions, labels in seen]
    for file in ("model.safetensors", STATE_FILE):
        assert largest_difference(tmp_path, out / name, file) < tolerance


def test_two_ranks_resume_as_two_ranks(two_ranks):
    """With batch norm: every rank has the same statistics after each step, so that rank 0's are enough to go on exactly."""
    out, _ = two_ranks
    assert largest_difference(out / "straight", out / "stopped", STATE_FILE) == 0


def test_the_statistics_of_batch_norm_are_those_of_both_ranks(fit, two_ranks, tmp_path):
    """Exact for the mean of what the first batch norm sees; the variances lack what the halves' means differ by."""
    out, _ = two_ranks
    fit(tmp_path, **ONE_STEP)
    one, two = (load_tensors(folder / "model.safetensors") for folder in (tmp_path, out / "one-step"))
    torch.testing.assert_close(two["features.1.running_mean"], one["features.1.running_mean"], rtol=0, atol=1e-6)
    assert one["features.1.running_mean"].abs().max() > 0.01
    torch.testing.assert_close(two["features.1.running_var"], one["features.1.running_var"], rtol=0.01, atol=0)


def test_a_rank_that_fails_is_a_line_of_each(tmp_path):
    """One meets a damaged image, the other waits for it in a step."""
    for number in range(40):
        path = tmp_path / "files" / str(number % 4) / f"{number:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8), number, np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:-30])
    command = ["-m", "synthfast", "train", "classifier", "--dataset", f"folder:{tmp_path / 'files'}", "--device", "cpu"]
    command += [
        "--loader",
        "torch",
        "--workers",
        "0",
        "--steps",
        "20",
        "--batch-size",
        "4",
        "--out",
        str(tmp_path / "run"),
    ]
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": unused_port()}
    ranks = [launch(command, RANK=str(rank), LOCAL_RANK=str(rank), **place) for rank in range(2)]
    outputs = [rank.communicate(timeout=120)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [1, 1] and all(output.count("\n") == 1 for output in outputs), outputs
    told = sorted((output.partition(": ")[2] for output in outputs), key=lambda words: words.startswith("another"))
    assert told[0].startswith(f"{path}: not a readable image")
    assert told[1].startswith("another rank has ended or cannot be reached; look for its message (")
