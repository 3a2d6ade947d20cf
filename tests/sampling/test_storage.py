"""--format, --codec and --quality: what is written, by any number of threads and ranks, and what is refused."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from synthfast.config import SampleConfig
from synthfast.data import ShardSet, verify
from synthfast.distributed import Ranks
from synthfast.errors import SynthfastError, UsageError
from synthfast.sampling import generate

PATIENCE = 120


def pixels(folder: Path) -> np.ndarray:
    images = ShardSet(folder)
    return images.read(np.arange(len(images)))


class Blank:
    """A generator of images of any size: grey levels that count, no labels."""

    classes, concurrent = None, False

    def __init__(self, *shape: int, facts: dict | None = None) -> None:
        self.shape, self.name, self.facts = shape, f"blank {'x'.join(map(str, shape))}", facts or {}

    def sample(self, index: torch.Tensor, labels: None, seed: int) -> torch.Tensor:
        height, width, channels = self.shape
        return (index / 100 - 1).reshape(-1, 1, 1, 1).expand(-1, channels, height, width)


@pytest.fixture
def blank(monkeypatch, tmp_path):
    """``blank((H, W, C), facts, **options)``: the folder sampled from such a generator."""

    def sample(shape: tuple[int, int, int], facts: dict | None = None, **options: object) -> Path:
        monkeypatch.setattr(
            sys.modules["synthfast.sampling.generate"], "load_generator", lambda *_: Blank(*shape, facts=facts)
        )
        out = tmp_path / f"blank-{len(list(tmp_path.iterdir()))}"
        with Ranks("cpu") as ranks:
            return generate(SampleConfig(n=5, out=str(out), device="cpu", **options), ranks).path

    return sample


def request_of(folder: Path) -> dict:
    return json.loads((folder / "manifest.json").read_text())["request"]


def test_tars_hold_the_same_images(run):
    arrays, tars = run(shard_size=10), run(shard_size=10, format="wds")
    assert np.array_equal(pixels(tars), pixels(arrays))
    assert ShardSet(tars).labels.tolist() == ShardSet(arrays).labels.tolist()
    assert verify(tars) == []
    assert (arrays / "preview.png").read_bytes() == (tars / "preview.png").read_bytes()
    request = request_of(tars)
    assert list(request)[:9] == [
        "n",
        "shape",
        "classes",
        "shard_size",
        "generator",
        "seed",
        "labels",
        "format",
        "codec",
    ]
    assert {key: request.pop(key) for key in ("format", "codec")} == {"format": "wds", "codec": "png"}
    assert request == request_of(arrays)


def test_arrays_say_nothing_of_formats(run, contents):
    assert contents(run(format="npy")) == contents(run())
    assert not {"format", "codec", "quality"} & set(request_of(run()))


@pytest.mark.parametrize(("options", "quality"), [({}, 95), ({"quality": 60}, 60)])
def test_jpg(run, options, quality):
    folder = run(format="wds", codec="jpg", **options)
    request = request_of(folder)
    assert [request[key] for key in ("format", "codec", "quality")] == ["wds", "jpg", quality]
    difference = np.abs(pixels(folder).astype(int) - pixels(run()))
    assert 0 < difference.mean() < 20 and ShardSet(folder).lossy


@pytest.mark.parametrize(
    ("shape", "expected"),
    [((64, 64, 3), "npy"), ((64, 65, 3), "wds"), ((65, 8, 1), "wds"), ((80, 80, 2), "npy"), ((8, 8, 1), "npy")],
)
def test_large_images_are_written_as_tars(blank, shape, expected):
    folder = blank(shape)
    assert ShardSet(folder).format == expected
    assert ShardSet(blank(shape, format="npy")).format == "npy"
    assert pixels(folder)[:, 0, 0, 0].tolist() == [0, 1, 3, 4, 5]


def test_what_does_not_fit_the_images_is_refused(blank, tmp_path):
    with pytest.raises(
        UsageError, match=r"^--codec png: blank 8x8x3 makes images of 8x8x3, which are written as npy; add"
    ):
        blank((8, 8, 3), codec="png")
    with pytest.raises(
        UsageError, match=r"^--format wds: blank 8x8x4 makes images of 8x8x4, expected 1 or 3 channels; use"
    ):
        blank((8, 8, 4), format="wds")
    for key in ("format", "codec", "quality"):
        with pytest.raises(SynthfastError, match=f"its facts have the key '{key}', which the sampler uses; rename it"):
            blank((8, 8, 3), {key: "mine"})
    assert not list(tmp_path.iterdir())
    assert ShardSet(blank((70, 70, 3), codec="jpg")).codec == "jpg"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quality": 90}, "^--quality 90: is for jpg; add --codec jpg, or leave it out$"),
        ({"quality": 90, "codec": "png", "format": "wds"}, "^--quality 90: is for jpg"),
        ({"quality": 0, "codec": "jpg"}, "^--quality 0: expected a whole number from 1 to 100$"),
        ({"quality": 101, "codec": "jpg"}, "^--quality 101: expected"),
        (
            {"codec": "jpg", "format": "npy"},
            "^--codec jpg: npy stores plain pixels; write --format wds, or leave it out$",
        ),
    ],
)
def test_options_that_do_not_fit_each_other_are_refused(options, message):
    with pytest.raises(UsageError, match=message):
        SampleConfig(**options)


def test_another_storage_into_the_same_folder_is_refused(run, contents):
    folder = run(format="wds")
    before = contents(folder)
    for options, difference in (
        ({}, '--format: OUT was made with "wds", this command says "npy"'),
        ({"format": "wds", "codec": "jpg"}, '--codec: OUT was made with "png", this command says "jpg"'),
    ):
        with pytest.raises(UsageError, match=f"^{re.escape(difference.replace('OUT', str(folder)))}"):
            run(out=str(folder), **options)
    assert contents(folder) == before


def test_threads_and_batches_of_files_leave_the_same_bytes(run, contents, monkeypatch):
    folders = []
    for cpus in (1, 3):
        monkeypatch.setattr("synthfast.data.machine.usable_cpus", lambda cpus=cpus: cpus)
        monkeypatch.setattr("synthfast.data.formats.codec._LEAST", {"png": 64, "jpg": 64})
        folders.append(run(n=60, format="wds", shard_size=25))
    assert contents(folders[0]) == contents(folders[1])


def test_killed_alone_and_finished_by_two_ranks(sample_into, checkpoints, contents, tmp_path):
    """The files are those of one process that nobody interrupted."""
    options = {"n": 200, "shard_size": 20, "batch_size": 10, "format": "wds"}
    expected = contents(sample_into(tmp_path / "whole", **options))
    words = [word for key, value in options.items() for word in (f"--{key.replace('_', '-')}", str(value))]
    out = tmp_path / "killed"
    sample = ["-m", "synthfast", "sample", "-n", *words[1:], "--generator", str(checkpoints()), "--device", "cpu"]
    sample += ["--out", str(out)]
    program = f"""
import os, signal, sys
from synthfast.data.shards.writer import ShardWriter
commit, done = ShardWriter.commit, []
def killed(self):
    commit(self)
    done.append(self)
    if len(done) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
ShardWriter.commit = killed
from synthfast.cli.main import main
main({sample[2:]!r})
"""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run([sys.executable, "-c", program], env=environment, timeout=PATIENCE, check=False)
    assert run.returncode == -signal.SIGKILL
    assert len(list(out.glob("*.json"))) == 1 + 3 and contents(out) != expected
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--master-port",
        "0",
        "--standalone",
    ]
    done = subprocess.run(
        [*torchrun, *sample], env=environment, timeout=PATIENCE, check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "140 images (60 were there already)" in done.stdout
    assert contents(out) == expected
