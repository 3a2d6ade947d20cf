"""A run that is killed anywhere is completed by the next one, byte for byte."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from synthfast.data import ShardFolder, ShardSet, ShardWriter
from synthfast.data.shards.hashed_file import HashedFile
from synthfast.errors import SynthfastError

# Files of a shard, without its sidecar.
FILES = {"npy": ["images.npy", "labels.npy"], "wds": ["tar", "idx", "labels.npy"]}


@pytest.fixture(params=FILES)
def request_values(request, request_values) -> dict[str, Any]:
    """Every test here is for both formats."""
    return request_values | ({"format": "wds", "codec": "png"} if request.param == "wds" else {})


def files_of(values: dict[str, Any]) -> list[str]:
    return FILES[values.get("format", "npy")]


class Killed(BaseException):
    """Stands for a kill: no handler of the package catches it, and the clean-up that a kill skips is switched off."""


def operations(monkeypatch: pytest.MonkeyPatch, kill_at: int | None) -> list[str]:
    """Record every step that touches the disk, and be killed just before step ``kill_at``."""
    done: list[str] = []

    def watch(owner: object, name: str) -> None:
        real = getattr(owner, name)

        def watched(*arguments, **options):
            if len(done) == kill_at:
                raise Killed
            done.append(name)
            return real(*arguments, **options)

        monkeypatch.setattr(owner, name, watched)

    for owner, name in ((os, "replace"), (os, "fsync"), (Path, "unlink"), (Path, "mkdir"), (HashedFile, "write")):
        watch(owner, name)
    monkeypatch.setattr(ShardWriter, "abort", lambda self: None)
    return done


def test_killed_before_any_step_the_next_run_completes(tmp_path, request_values, write, contents, shards):
    expected = contents(shards)
    with pytest.MonkeyPatch.context() as patch:
        steps = operations(patch, None)
        write(tmp_path / "counted", request_values)
    each = len(files_of(request_values)) + 1  # renames of a shard
    assert steps.count("replace") == 1 + 3 * each + 1 and steps.count("unlink") >= 3
    for kill_at in range(0, len(steps), each - 2):  # of tars every other step: there are more, of the same kinds
        out = tmp_path / f"killed-{kill_at}"
        with pytest.MonkeyPatch.context() as patch:
            operations(patch, kill_at)
            with pytest.raises(Killed):
                write(out, request_values)
        if (
            out.exists()
            and (out / "manifest.json").exists()
            and not json.loads((out / "manifest.json").read_text())["complete"]
        ):
            with pytest.raises(SynthfastError, match="incomplete"):
                ShardSet(out)
        with ShardFolder.create_or_resume(out, request_values) as folder:
            # The first rename is the manifest's; a shard's last is its sidecar's, and from then on it is kept.
            kept = min(3, max(0, steps[:kill_at].count("replace") - 1) // each)
            assert len(list(folder.pending())) == 3 - kept, f"killed before step {kill_at}: {steps[kill_at]}"
        write(out, request_values)
        assert contents(out) == expected, f"killed before step {kill_at}: {steps[kill_at]}"


def test_sidecar_comes_last_and_after_everything_is_on_the_disk(tmp_path, request_values, write, monkeypatch):
    steps: list[str] = []
    replace, fsync = os.replace, os.fsync
    monkeypatch.setattr(os, "replace", lambda old, new: (steps.append(Path(new).name), replace(old, new)))
    monkeypatch.setattr(os, "fsync", lambda descriptor: (steps.append("fsync"), fsync(descriptor)))
    ShardFolder.create_or_resume(tmp_path / "out", request_values).close()
    steps.clear()
    write(tmp_path / "out", request_values, only=range(1))
    files = files_of(request_values)
    names = [f"shard-000000.{suffix}" for suffix in [*files, "json"]]
    assert [step for step in steps if step != "fsync"] == names
    assert steps[: len(files)] == ["fsync"] * len(files) and steps.index(names[0]) == len(files)
    assert "fsync" in steps[steps.index(names[-2]) : steps.index(names[-1])] and steps[-1] == "fsync"


def test_leftovers_of_a_killed_run_are_removed(tmp_path, request_values, contents, shards):
    expected = contents(shards)
    (shards / ".tmp-preview.png").write_bytes(b"half a picture")
    (shards / "shard-000001.json").write_text("{}")
    ShardFolder.create_or_resume(shards, request_values).close()
    assert contents(shards) == expected


def test_killed_while_mending_a_complete_set(tmp_path, request_values, write, contents, shards):
    expected = contents(shards)
    with pytest.MonkeyPatch.context() as patch:
        lost = shards / f"shard-000001.{files_of(request_values)[0]}"
        lost.unlink()
        steps = operations(patch, None)
        write(shards, request_values)
    assert contents(shards) == expected
    for kill_at in range(0, len(steps), len(files_of(request_values)) - 1):
        lost.unlink()
        with pytest.MonkeyPatch.context() as patch:
            operations(patch, kill_at)
            with pytest.raises(Killed):
                write(shards, request_values)
        write(shards, request_values)
        assert contents(shards) == expected, f"killed before step {kill_at}: {steps[kill_at]}"


def test_sigkill_frees_the_lock_and_the_next_run_completes(tmp_path, request_values, write, contents, shards):
    code = f"""
import os, signal, numpy as np
from synthfast.data import ShardFolder
folder = ShardFolder.create_or_resume({str(tmp_path / "out")!r}, {request_values!r})
writer = folder.writer(0)
writer.append(np.zeros((4, 4, 5, 3), np.uint8), np.zeros(4, np.int64))
print("writing", flush=True)
signal.pause()
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout.readline() == "writing\n"
            with pytest.raises(SynthfastError, match="another process is writing this folder"):
                write(tmp_path / "out", request_values)
        finally:
            process.send_signal(signal.SIGKILL)
    assert list((tmp_path / "out").glob(".tmp-*"))
    write(tmp_path / "out", request_values)
    assert contents(tmp_path / "out") == contents(shards)
