"""One writer at a time: between processes, between threads of one, and after a kill."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import threading

import pytest

from synthfast import artifacts
from synthfast.artifacts import Lock
from synthfast.errors import SynthfastError

HOLDER = """
import os, sys, signal
from synthfast.artifacts import Lock
lock = Lock(sys.argv[1])
if sys.argv[2] == "fork" and os.fork() == 0:
    os.write(1, b"%d\\n" % os.getpid())
    signal.pause()
os.write(1, b"held\\n")
signal.pause()
"""


@pytest.fixture(params=["folder", "file"])
def place(request, tmp_path):
    if request.param == "folder":
        (tmp_path / "folder").mkdir()
    return tmp_path / request.param


def hold(place, how=""):
    return subprocess.Popen([sys.executable, "-c", HOLDER, place, how], stdout=subprocess.PIPE, text=True)


def test_a_second_lock_is_refused_until_the_first_is_closed(place):
    what = place.name
    with Lock(place), pytest.raises(SynthfastError) as caught:
        Lock(place)
    message = f"{place}: another process is writing this {what}; wait for it to end or choose another --out"
    assert str(caught.value) == message
    lock = Lock(place)
    lock.close()
    lock.close()
    Lock(place).close()
    assert os.listdir(place.parent) == (["folder"] if what == "folder" else [])


def test_a_kill_frees_it(place):
    with hold(place) as process:
        try:
            assert process.stdout.readline() == "held\n"
            with pytest.raises(SynthfastError, match="another process is writing this"):
                Lock(place)
        finally:
            process.send_signal(signal.SIGKILL)
    Lock(place).close()
    assert os.listdir(place.parent) == (["folder"] if place.is_dir() else [])


def test_a_forked_child_that_outlives_a_killed_parent_does_not_keep_it(place):
    with hold(place, "fork") as process:
        lines = {process.stdout.readline().strip() for _ in range(2)} - {"held"}
        process.send_signal(signal.SIGKILL)
        process.wait()
        (child,) = map(int, lines)
        try:
            Lock(place).close()
        finally:
            os.kill(child, signal.SIGKILL)


def test_one_of_many_threads_gets_it(place):
    held, start = [], threading.Barrier(16)

    def take():
        start.wait()
        try:
            held.append(Lock(place))
        except SynthfastError as error:
            assert "another process" in str(error)

    for _ in range(20):
        threads = [threading.Thread(target=take) for _ in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(held) == 1
        held.pop().close()


def test_a_folder_removed_and_made_again_meanwhile_is_locked_as_it_is_now(tmp_path, monkeypatch):
    folder, real, calls = tmp_path / "folder", artifacts.fcntl.flock, []
    folder.mkdir()

    def slow(descriptor, how):
        calls.append(descriptor)
        if len(calls) == 1:
            shutil.rmtree(folder)
            folder.mkdir()
        real(descriptor, how)

    monkeypatch.setattr("fcntl.flock", slow)
    with Lock(folder), pytest.raises(SynthfastError, match="another process"):
        Lock(folder)
    assert len(calls) == 3


def test_a_lock_file_removed_meanwhile_is_made_again(tmp_path, monkeypatch):
    """The other process had it, and removed it as it let go, between the opening and the locking of this one."""
    first, real = Lock(tmp_path / "file"), artifacts.fcntl.flock

    def slow(descriptor, how):
        first.close()
        real(descriptor, how)

    monkeypatch.setattr("fcntl.flock", slow)
    with Lock(tmp_path / "file"), pytest.raises(SynthfastError, match="another process"):
        Lock(tmp_path / "file")


def test_a_file_system_without_locks_is_written_all_the_same(place, monkeypatch):
    def no_lock(descriptor, how):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", no_lock)
    with Lock(place), Lock(place):
        pass


def test_what_the_file_system_refuses_is_one_line(tmp_path, monkeypatch):
    with pytest.raises(SynthfastError) as caught:
        Lock(tmp_path / "none" / "file", "choose another name")
    assert str(caught.value) == f"{tmp_path / 'none' / 'file'}: no such file or folder; choose another name"

    def denied(*_):
        raise PermissionError(errno.EACCES, "Permission denied", str(tmp_path))

    monkeypatch.setattr(os, "open", denied)
    with pytest.raises(SynthfastError, match=r": permission denied; choose another --out$"):
        Lock(tmp_path)
