"""The command as users start it, with the real network: killed and started again, and on two ranks."""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch

from synthfast.artifacts import load_tensors
from synthfast.training.state import STATE_FILE

STEPS = 6


@pytest.fixture(scope="module")
def straight(tmp_path_factory, request):
    """A run that was never stopped, on one rank and one thread as the processes have: the last bits depend on it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        from synthfast.config import GeneratorConfig
        from synthfast.distributed import Ranks
        from synthfast.training import train_generator

        folder = tmp_path_factory.mktemp("straight")
        with Ranks("cpu") as ranks:
            train_generator(GeneratorConfig(out=str(folder), device="cpu", batch_size=8, steps=STEPS), ranks)
    finally:
        torch.set_num_threads(threads)
    return folder


def start(out, launcher=()):
    command = [*launcher, "-m", "synthfast", "train", "generator", "--device", "cpu", "--batch-size", "8"]
    return subprocess.Popen(
        [sys.executable, *command, "--steps", str(STEPS), "--checkpoint-every", "2", "--out", str(out)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(process):
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    return output


def test_killed_and_started_again_gives_the_same_weights(same_results, straight, tmp_path):
    folder = tmp_path / "killed"
    killed = start(folder)
    deadline = time.monotonic() + 60
    while not folder.exists():  # then the network is there and steps are made
        assert time.monotonic() < deadline and killed.poll() is None
        time.sleep(0.005)
    moment = random.random() * 1.5
    time.sleep(moment)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    left = sorted(path.name for path in folder.iterdir())
    output = finish(start(folder))
    assert f"{folder}: {STEPS} steps, last loss " in output or "are done already" in output, output
    assert same_results(straight, folder), f"killed after {moment} s, which left {left}"
    assert not list(folder.glob(".tmp-*"))


def test_two_ranks_train_what_one_does(straight, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(port)]
    output = finish(start(tmp_path / "two", launcher))
    assert output.count(f"{STEPS} steps, last loss ") == 1, output  # rank 0 alone tells
    for name in ("model.safetensors", STATE_FILE):
        one, two = load_tensors(straight / name), load_tensors(tmp_path / "two" / name)
        assert one.keys() == two.keys()
        assert max((one[key] - two[key]).abs().max().item() for key in one) < 1e-5
