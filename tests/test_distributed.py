"""Devices by name, and ranks: alone, and two of them."""

from __future__ import annotations

import datetime
import os
import socket
import subprocess
import sys

import pytest
import torch

from synthfast import distributed
from synthfast.distributed import Ranks, pick_device
from synthfast.errors import SynthfastError, UsageError


def gpus(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)


@pytest.mark.parametrize(
    ("name", "count", "local_rank", "expected"),
    [
        ("auto", 0, 0, "cpu"),
        ("auto", 2, 1, "cuda:1"),
        ("cpu", 2, 1, "cpu"),
        ("cuda", 3, 2, "cuda:2"),
        ("cuda:1", 3, 0, "cuda:1"),
    ],
)
def test_devices_by_name(monkeypatch, name, count, local_rank, expected):
    gpus(monkeypatch, count)
    assert pick_device(name, local_rank) == torch.device(expected)


@pytest.mark.parametrize("name", ["gpu", "", "cuda:x", "cuda:-1", "cuda:1.0", "cuda:²", "CPU", "mps", "cpu:0"])
def test_an_unknown_device_is_refused(name):
    with pytest.raises(UsageError, match=f"^--device {name}: expected auto, cpu, cuda or cuda:N$"):
        pick_device(name)


@pytest.mark.parametrize(("name", "local_rank"), [("cuda", 2), ("cuda:2", 0), ("cuda:9", 0)])
def test_a_gpu_that_is_not_there_is_refused(monkeypatch, name, local_rank):
    gpus(monkeypatch, 2)
    with pytest.raises(
        UsageError, match=rf"^--device {name}: GPU \d is wanted, found 2 usable GPUs; use --device cpu$"
    ):
        pick_device(name, local_rank)


def test_a_single_rank_needs_no_launcher(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    with Ranks("cpu") as ranks:
        assert (ranks.rank, ranks.world_size, ranks.is_first) == (0, 1, True)
        ranks.barrier()
        assert ranks.broadcast([1]) == [1] and ranks.mean(2.5) == 2.5
        assert [ranks.add("a", 3), ranks.add("a", 4), ranks.add("b", 1)] == [3, 7, 1]
        assert not torch.distributed.is_initialized()


def test_a_world_without_a_launcher_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UsageError, match=r"^WORLD_SIZE=2: expected a launch by torchrun") as caught, Ranks("cpu"):
        pass
    assert "\n" not in str(caught.value)
    assert not torch.distributed.is_initialized()


TWO = """
import os, sys, torch.distributed as dist
from synthfast.distributed import Ranks
from synthfast.errors import SynthfastError, UsageError
with Ranks("cpu") as ranks:
    assert ranks.world_size == 2 and ranks.is_first == (ranks.rank == 0)
    value = ranks.broadcast({"from": ranks.rank, "error": UsageError("told to all")})
    assert value["from"] == 0 and str(value["error"]) == "told to all"
    assert ranks.mean(float(ranks.rank)) == 0.5
    ranks.add("images", 10 + ranks.rank)
    ranks.barrier()
    assert ranks.add("images", 0) == 21
    assert dist.is_initialized()
    ranks.barrier()
    if ranks.rank == 1:
        print("done", flush=True)
        os._exit(0)  # as if it were killed
    try:
        ranks.barrier()
        sys.exit("the barrier was passed without the other rank")
    except SynthfastError as error:
        assert str(error).startswith("another rank has ended") and "\\n" not in str(error), error
assert not dist.is_initialized()
print("done")
"""


def test_two_ranks_share_values():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    common = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", TWO],
            env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [process.communicate(timeout=60)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert all(output.endswith("done\n") for output in outputs)


def test_ranks_whose_launcher_has_ended_end_soon(monkeypatch):
    """Nobody listens at the port any more; without a launcher the first rank may still be on its way."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        monkeypatch.setenv("MASTER_PORT", str(probe.getsockname()[1]))
    for name, value in (("WORLD_SIZE", "2"), ("RANK", "1"), ("LOCAL_RANK", "1"), ("MASTER_ADDR", "127.0.0.1")):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    assert distributed._joining() == datetime.timedelta(minutes=1)
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE")
    assert distributed._joining() == datetime.timedelta(minutes=30)
    monkeypatch.setattr(distributed, "_joining", lambda: datetime.timedelta(seconds=1))
    with pytest.raises(SynthfastError, match="another rank has ended or cannot be reached") as caught, Ranks("cpu"):
        pass
    assert "\n" not in str(caught.value)
