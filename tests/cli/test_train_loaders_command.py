"""Loaders and weights as options of ``synthfast train``; interrupted from the terminal."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

QUICK = ("--device", "cpu", "--steps", 2, "--batch-size", 16)


@pytest.fixture
def files(tmp_path):
    random = np.random.default_rng(0)
    for number in range(24):
        folder = tmp_path / "files" / str(number % 2)
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (8, 8, 3), np.uint8)).save(folder / f"{number:02d}.png")
    return tmp_path / "files"


@pytest.mark.parametrize("loader", ["auto", "device", "dali", "torch"])
def test_the_loader_that_ran_is_told(cli, files, tmp_path, loader):
    if loader in ("auto", "dali"):
        pytest.importorskip("nvidia.dali")
    ran = cli(
        "train",
        "classifier",
        "--dataset",
        f"folder:{files}",
        "--loader",
        loader,
        "--workers",
        1,
        *QUICK,
        "--out",
        tmp_path / "run",
    )
    kind = loader.replace("auto", "dali")
    assert ran.status == 0 and ran.err == ""
    assert ran.out.startswith(f"{tmp_path / 'run'}: 2 steps, last loss ") and ran.out.endswith(
        f", images by the {kind} loader\n"
    )


def test_an_unknown_loader_and_workers_that_are_none(cli, tmp_path):
    for command in ("classifier", "generator"):
        ran = cli("train", command, "--loader", "fast", "--out", tmp_path / "run")
        assert ran.status == 2 and "'fast' is not one of 'auto', 'device', 'dali', 'torch'" in ran.error
        ran = cli("train", command, "--workers", "-2", "--out", tmp_path / "run")
        assert ran.status == 2 and ran.error.startswith("--workers -2: expected a whole number of at least 0")
    assert not (tmp_path / "run").exists()


def test_a_missing_dali_says_what_to_install(cli, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    monkeypatch.setitem(sys.modules, "nvidia.dali.fn", None)
    ran = cli("train", "classifier", "--loader", "dali", *QUICK, "--out", tmp_path / "run")
    assert ran.status == 2 and ran.error.endswith("which is not installed; pip install 'synthfast[dali]'")


@pytest.mark.parametrize("loader", ["device", "dali", "torch"])
@pytest.mark.parametrize("command", ["classifier", "generator"])
def test_a_damaged_image_is_one_line(cli, files, tmp_path, loader, command):
    if loader == "dali":
        pytest.importorskip("nvidia.dali")
    broken = files / "1" / "11.png"
    broken.write_bytes(broken.read_bytes()[:-40])
    ran = cli("train", command, "--dataset", f"folder:{files}", "--loader", loader, *QUICK, "--out", tmp_path / "run")
    assert ran.status == 1 and ran.error.startswith(f"{broken}: not a readable image")


def test_weights_of_folders(cli, tmp_path):
    for name in ("one", "two"):
        assert cli("sample", "--n", 20, "--steps", 1, "--device", "cpu", "--out", tmp_path / name).status == 0
    both = ("--synthetic", tmp_path / "one", "--synthetic", tmp_path / "two")
    arguments = ("train", "classifier", *both, *QUICK, "--out", tmp_path / "run")
    ran = cli(*arguments, "--synthetic-weight", "1/4", "--synthetic-weight", "0.75")
    assert ran.status == 0, ran.err
    printed = cli(*arguments, "--synthetic-weight", "1/4", "--synthetic-weight", "0.75", "--print-config").out
    assert "synthetic_weight = [0.25, 0.75]\n" in printed
    (tmp_path / "set.toml").write_text(printed.replace("[0.25, 0.75]", "[1, 3]"))  # whole numbers, the same shares
    assert "all 2 steps are done already" in cli("train", "classifier", "--config", tmp_path / "set.toml").out
    ran = cli(*arguments, "--synthetic-weight", 1)
    assert ran.status == 2 and ran.error.startswith("--synthetic-weight 1: expected one for each --synthetic folder")
    ran = cli(*arguments, "--synthetic-weight", "heavy", "--synthetic-weight", 1)
    assert ran.status == 2 and "expected a number such as 0.5 or 8/255, found 'heavy'" in ran.error
    for value, words in (
        ('"heavy"', "expected a list of numbers, found 'heavy'"),
        ('[1, "x"]', "expected a number such as"),
    ):
        (tmp_path / "set.toml").write_text(f"synthetic_weight = {value}\n")
        assert words in cli("train", "classifier", "--config", tmp_path / "set.toml").error


@pytest.mark.parametrize("loader", ["torch", "dali"])
def test_ctrl_c_ends_the_command_and_its_workers(files, tmp_path, loader):
    """Every process of the terminal gets the signal."""
    if loader == "dali":
        pytest.importorskip("nvidia.dali")
    command = [
        sys.executable,
        "-m",
        "synthfast",
        "train",
        "classifier",
        "--dataset",
        f"folder:{files}",
        "--loader",
        loader,
    ]
    command += [
        "--workers",
        "2",
        "--device",
        "cpu",
        "--steps",
        "1000000",
        "--batch-size",
        "16",
        "--out",
        str(tmp_path / "run"),
    ]
    process = subprocess.Popen(
        [*command, "--checkpoint-every", "3"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    deadline = time.monotonic() + 120
    while not (tmp_path / "run" / "training-state.safetensors").exists():
        assert time.monotonic() < deadline and process.poll() is None, process.communicate()
        time.sleep(0.02)
    group = members(process.pid)
    assert len(group) == (3 if loader == "torch" else 1)
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, "")
    assert err.strip() == "synthfast: interrupted; run the same command again to go on"
    while members(process.pid):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def members(group: int) -> list[int]:
    """The processes of a group that are alive."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[2]) == group and fields[0] != "Z":
            found.append(int(stat.parent.name))
    return found
