"""A process as users start it, interrupted and killed: the same command completes the folder, byte for byte.

Two ranks are killed in tests/faults.
"""

from __future__ import annotations

import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

OPTIONS = {"n": 1200, "shard_size": 50, "batch_size": 20, "steps": 4, "labels": "uniform", "seed": 11}
PATIENCE = 120  # seconds until a process that does nothing is taken for hung


@pytest.fixture(scope="module")
def arguments(checkpoints) -> list[str]:
    words = [word for key, value in OPTIONS.items() for word in (f"--{key.replace('_', '-')}", str(value))]
    words[0] = "-n"  # torchrun takes --n for one of its own options
    return ["-m", "synthfast", "sample", *words, "--generator", str(checkpoints()), "--device", "cpu"]


@pytest.fixture(scope="module")
def expected(sample_into, contents, tmp_path_factory) -> dict[str, bytes]:
    """The files of a run that nothing interrupted, in this process."""
    return contents(sample_into(tmp_path_factory.mktemp("whole") / "samples", **OPTIONS))


def heed_interrupts() -> None:
    """In the child: a shell starts background jobs with SIGINT ignored, which tests started by one would hand on."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def start(command: list[str], out: Path, threads: int = 1, **options: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*command, "--out", str(out)],
        env={**os.environ, "OMP_NUM_THREADS": str(threads)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # so that the ranks can be killed with their launcher
        **{"preexec_fn": heed_interrupts, **options},
    )


def finished(out: Path) -> int:
    return len(list(out.glob("shard-*.json")))


def stop_after(process: subprocess.Popen[str], out: Path, shards: int, delay: float, how: int = signal.SIGKILL) -> None:
    """Send a signal ``delay`` seconds after so many more shards are finished; the process must be at work then."""
    before, deadline = finished(out), time.monotonic() + PATIENCE
    while finished(out) < before + shards:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.002)
    time.sleep(delay)
    assert process.poll() is None, "the run ended before it could be interrupted"
    os.killpg(process.pid, how)


def moments(seed: int, count: int) -> list[tuple[int, float]]:
    """Random moments in a run of 24 shards: after how many more shards, and how many seconds later."""
    draw = random.Random(seed)
    return [(draw.randint(1, 4), draw.uniform(0, 0.05)) for _ in range(count)]


def test_an_interrupt_and_three_kills_leave_the_same_bytes(arguments, expected, contents, tmp_path):
    command, out = [sys.executable, *arguments], tmp_path / "killed"
    # The interrupt first, while most is still to do: a run that is at its end by then, on a busy machine, would not show it.
    process = start(command, out, threads=2)
    stop_after(process, out, 1, 0.01, signal.SIGINT)
    output, errors = process.communicate(timeout=PATIENCE)
    assert (process.returncode, output) == (130, ""), errors
    assert errors.split("\n") == ["", "synthfast: interrupted; run the same command again to go on", ""]
    for shards, delay in moments(seed=0, count=3):
        process = start(command, out, threads=2)
        stop_after(process, out, shards, delay)
        process.communicate(timeout=PATIENCE)
        assert process.returncode == -signal.SIGKILL
        assert contents(out) != expected
    process = start(command, out, threads=2)
    output, errors = process.communicate(timeout=PATIENCE)
    assert (process.returncode, errors) == (0, "")
    assert "were there already" in output
    assert contents(out) == expected


def test_a_full_disk_is_one_line_and_the_next_run_completes(arguments, contents, sample_into, tmp_path):
    def limit() -> None:  # the images of a shard are 3,328 bytes
        resource.setrlimit(resource.RLIMIT_FSIZE, (2500, 2500))

    out = tmp_path / "full"
    process = start([sys.executable, *arguments, "-n", "120"], out, preexec_fn=limit)
    output, errors = process.communicate(timeout=PATIENCE)
    assert (process.returncode, output) == (1, "")
    reason = "the file size limit is reached; once that is mended run the same command again: finished shards are kept"
    assert errors == f"synthfast: {out}/shard-000000.images.npy: {reason}\n"
    assert [path.name for path in out.iterdir()] == ["manifest.json"]
    options = {**OPTIONS, "n": 120}
    sample_into(out, **options)
    assert contents(out) == contents(sample_into(tmp_path / "whole", **options))
