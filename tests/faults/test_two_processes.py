"""Two processes, or two launches of ranks, for one folder: the second is refused in one line and changes nothing."""

from __future__ import annotations

import os
import signal
import socket
import time

import pytest

from synthfast.artifacts import Lock

LOCKED = (
    *("sample", "diffusion", "gan", "classifier", "arc", "robust", "samples", "select", "rank", "inflection"),
    *("export-npy", "export-wds", "export-npz", "export-folder", "merge", "import"),
)
RUNNING = ("sample", "diffusion", "classifier", "arc", "robust", "samples", "export-wds", "export-folder", "merge")


def is_file(locked: str) -> bool:
    return locked.endswith((".npy", ".npz"))


def refusal(command) -> str:
    what = "file" if is_file(command.locked) else "folder"
    option = "--scores-folder" if command.locked == "mine" else "--out"
    return f"{command.locked}: another process is writing this {what}; wait for it to end or choose another {option}"


@pytest.mark.parametrize("name", LOCKED)
def test_what_another_process_is_writing_is_left_alone(run, commands, copy, contents, name):
    command = commands[name]
    if not is_file(command.locked):
        (copy / command.locked).mkdir()
    with Lock(copy / command.locked):
        before = contents(copy)
        ran = run(copy, *command.line)
        assert (ran.status, ran.out, ran.error) == (1, "", refusal(command))
        assert contents(copy) == before


@pytest.mark.parametrize("name", RUNNING)
def test_a_command_keeps_others_out_for_as_long_as_it_works(start, run, commands, copy, name):
    command = commands[name]
    first = start(copy, *command.line)
    while not (copy / command.sign).exists():
        assert not first.ended, first.wait().err
        time.sleep(0.001)
    os.killpg(first.pid, signal.SIGSTOP)
    try:
        second = run(copy, *command.line)
    finally:
        os.killpg(first.pid, signal.SIGCONT)
    assert (second.status, second.out, second.error) == (1, "", refusal(command))
    assert first.wait().status == 0, first.err
    assert not list(copy.rglob(".tmp-*"))


@pytest.mark.parametrize("name", ["sample", "classifier", "robust", "samples"])
def test_rank_0_holds_the_lock_and_every_rank_says_why_it_ends(start, commands, copy, contents, name):
    command = commands[name]
    (copy / command.locked).mkdir()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    with Lock(copy / command.locked):
        before = contents(copy)
        launch = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        ranks = [
            start(copy, *command.line, env={**launch, "RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(2)
        ]
        for rank, ran in enumerate(ranks):
            who = "synthfast: " if rank == 0 else "synthfast (rank 1): "
            assert (ran.wait().status, ran.err) == (1, f"{who}{refusal(command)}\n")
        assert contents(copy) == before


def test_after_a_kill_the_lock_is_free_at_once(start, run, commands, copy):
    command = commands["classifier"]
    first = start(copy, *command.line)
    while not (copy / command.sign).exists():
        assert not first.ended, first.wait().err
        time.sleep(0.001)
    first.kill()
    assert run(copy, *command.line).status == 0
