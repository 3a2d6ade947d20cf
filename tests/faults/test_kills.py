"""kill -9 at random moments, again and again: the same command completes what is there, as if nothing had happened.

Three kills of each command; SYNTHFAST_SOAK=20 (``make soak``) makes it twenty. The moments are drawn over the duration of a run
that nothing disturbs: a third of them over all of it, the others over what is left of it once something is written, for some
commands take longer to start than to work. A run that comes to its end before it is killed, or has done all of its work by then,
is compared and begun anew.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import random
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from synthfast.training.state import STATE_FILE

KILLS = int(os.environ.get("SYNTHFAST_SOAK", "3"))
PATIENCE = 240
KILLED = (
    *("sample", "sample-wds", "diffusion", "gan", "classifier", "arc", "export-npy", "export-wds", "export-npz"),
    "export-folder",
)


def clear(folder: Path, world: Path) -> None:
    for path in folder.iterdir():
        if not (world / path.name).exists():
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def moments(name: str) -> Iterator[float]:
    """Parts of the duration, one from each of as many equal stretches as there are kills, in any order."""
    draw = random.Random(zlib.crc32(name.encode()))
    stretches = list(range(KILLS))
    draw.shuffle(stretches)
    return ((stretch + draw.random()) / KILLS for stretch in stretches)


def looks(folder: Path) -> dict[str, tuple[int, int]]:
    """Every file by its size and time."""
    found = {}
    for path in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):
            status = path.stat()
            if stat.S_ISREG(status.st_mode):
                found[str(path)] = (status.st_size, status.st_mtime_ns)
    return found


@pytest.mark.parametrize("name", KILLED)
def test_killed_again_and_again_it_leaves_what_an_undisturbed_run_leaves(
    start, run, commands, world, reference, left_in, nothing_half_done, copy, name
):
    expected, words, told = reference(name), commands[name].line, []

    def compare(ran) -> None:
        assert ran.status == 0, (told, ran.err)
        assert expected.differing(copy) == [], told

    seconds, in_the_middle = expected.seconds, 0
    for number, part in enumerate(moments(name)):
        for attempt in range(5):
            before, begun = looks(copy), 0.0
            running = start(copy, *words)
            while number % 3 and not running.ended and looks(copy) == before:
                begun = time.monotonic() - running.started
            moment = begun + 0.6**attempt * part * max(seconds - begun, 0.01)
            while time.monotonic() - running.started < moment and not running.ended:
                time.sleep(0.001)
            if not running.ended:
                running.kill()
                left = sorted(left_in(copy))
                told.append(
                    f"killed after {moment:.3f} s of {seconds:.3f}, {begun:.3f} of them idle, which left {left}"
                )
                nothing_half_done(copy)
                if expected.differing(copy):
                    in_the_middle += bool(left)
                    break
                clear(copy, world)
                continue
            if attempt:  # a whole run, and quicker than the first one
                seconds = time.monotonic() - running.started
            compare(running.wait())
            clear(copy, world)
        else:
            pytest.fail(f"five runs were done within {moment:.3f} s, the first took {expected.seconds:.3f} s")
    compare(run(copy, *words))
    assert in_the_middle or name == "export-npz", told  # which is written within milliseconds
    print(*told, sep="\n")


def descendants(pid: int) -> list[int]:
    """A process and all that came of it; ranks of torchrun have sessions of their own."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            words = path.read_text().rpartition(")")[2].split()
            if words[0] != "Z":
                parents[int(path.parent.name)] = int(words[1])
    found = [pid]
    for one in found:
        found += [child for child, parent in parents.items() if parent == one]
    return found


def gone(pid: int) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    return True


class TwoRanks:
    """``synthfast sample`` by torchrun on two ranks, as a user starts it."""

    def __init__(self, folder: Path, words: tuple[object, ...]) -> None:
        self.folder, self.words, self.out = folder, words, folder / "out"

    def start(self) -> subprocess.Popen[str]:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", port]
        return subprocess.Popen(
            [*launcher, "-m", "synthfast", *map(str, self.words)],
            cwd=self.folder,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def wait_for_work(self, process: subprocess.Popen[str]) -> None:
        """Until the folder's lock is taken and shards are made."""
        deadline = time.monotonic() + PATIENCE
        before = {path.name for path in self.out.glob(".tmp-*")}
        while process.poll() is None and not {path.name for path in self.out.glob(".tmp-shard*")} - before:
            assert time.monotonic() < deadline
            time.sleep(0.002)


def kill(process: subprocess.Popen[str], whom: str) -> str:
    """All of a launch, its launcher alone, or one rank; returns when nothing of it is left, with what it said."""
    family = descendants(process.pid)
    victims = {"all": family[::-1], "launcher": family[:1], "a rank": family[-1:]}[whom]
    for pid in victims:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    said = process.communicate(timeout=PATIENCE)[1]
    deadline = time.monotonic() + PATIENCE
    while not all(gone(pid) for pid in family):
        assert time.monotonic() < deadline, f"after the end of {whom} processes stay: {family}"
        time.sleep(0.01)
    return said


def test_two_ranks_killed_again_and_again_leave_the_bytes_of_one(
    commands, world, reference, left_in, nothing_half_done, tmp_path
):
    """All of the launch, the launcher alone (its ranks then end by themselves) or a single rank."""
    expected, ranks, told = reference("sample"), TwoRanks(tmp_path, commands["sample"].line), []

    def compare(process: subprocess.Popen[str]) -> None:
        output, errors = process.communicate(timeout=PATIENCE)
        assert process.returncode == 0, (told, errors)
        assert output.count("images/s") <= 1  # one rank speaks for both
        assert expected.differing(tmp_path) == [], told

    begin = time.monotonic()
    process = ranks.start()
    ranks.wait_for_work(process)
    startup = time.monotonic() - begin
    compare(process)
    working = time.monotonic() - begin - startup
    clear(tmp_path, world)
    draw = random.Random(
        15
    )  # in the first three the launcher is killed at work: its ranks else look for it for a minute
    for number, part in enumerate(moments("two ranks")):
        whom = ("all", "launcher", "a rank")[number % 3]
        at_work = draw.random() < 0.75
        for attempt in range(5):
            moment = 0.8**attempt * part * (working if at_work else startup)
            process = ranks.start()
            if at_work:
                ranks.wait_for_work(process)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(moment)
            if process.poll() is None:
                break
            compare(process)
            clear(tmp_path, world)
        else:
            pytest.fail(f"five runs ended before they could be killed, the last one within {moment:.3f} s")
        kill(process, whom)
        left = sorted(left_in(tmp_path))
        told.append(f"{whom} killed {moment:.3f} s after {'the first shard' if at_work else 'the start'}, left {left}")
        nothing_half_done(tmp_path)
    compare(ranks.start())
    print(*told, sep="\n")


def write(folder: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def test_the_comparison_sees_a_difference(reference, tmp_path):
    """Files that are missing or more, a bit of a shard, a number of a result, a weight of a state; not the order of metadata."""
    shards, result = reference("sample").left, reference("arc").left
    assert reference("sample").differing(write(tmp_path / "same", shards)) == []
    file = "out/shard-000007.images.npy"
    changed = {**shards, file: shards[file][:-1] + bytes([shards[file][-1] ^ 1]), "out/more": b""}
    del changed["out/preview.png"]
    assert reference("sample").differing(write(tmp_path / "shards", changed)) == ["out/more", "out/preview.png", file]
    values = json.loads(result["out.json"])
    values["seconds"] = 1e9
    assert (
        reference("arc").differing(write(tmp_path / "slow", {**result, "out.json": json.dumps(values).encode()})) == []
    )
    values["metrics"]["arc"]["value"] += 1e-9
    other = {**result, "out.json": json.dumps(values).encode()}
    assert reference("arc").differing(write(tmp_path / "other", other)) == ["out.json"]
    state, name = {"a": torch.zeros(2)}, "out/" + STATE_FILE
    expected = dataclasses.replace(reference("sample"), left={name: save(state, {"step": "1", "b": "2"})})
    for number, (tensors, metadata, same) in enumerate(
        (
            (state, {"b": "2", "step": "1"}, True),
            (state, {"b": "2", "step": "2"}, False),
            ({"a": torch.tensor([0, 1e-30])}, {"b": "2", "step": "1"}, False),
        )
    ):
        folder = write(tmp_path / f"state-{number}", {name: save(tensors, metadata)})
        assert (expected.differing(folder) == []) is same
