"""A disk that is full, a limit, a file system that refuses: one line and status 1, what was there stays, the rerun completes."""

from __future__ import annotations

import errno
import shutil
import subprocess

import pytest

from synthfast.artifacts import load_checkpoint

SMALL = (
    *("sample", "sample-wds", "classifier", "arc", "robust", "samples", "select", "report"),
    *("export-npy", "export-wds", "export-npz", "export-folder", "merge", "import"),
)
LEAST = 100  # a limit that the line on standard error still fits into


def assert_refused(ran, reason: str) -> None:
    assert ran.status == 1 and ran.out == "", (ran.status, ran.out, ran.err)
    assert reason in ran.error


@pytest.mark.parametrize("name", SMALL)
def test_files_that_may_not_grow(run, commands, reference, left_in, nothing_half_done, copy, name):
    """A limit below most of the files, one below the largest; then none."""
    expected = reference(name)
    # The picture of an ARC is done without where it cannot be written.
    files = {file: data for file, data in expected.left.items() if file != "out.png"}
    sizes = sorted({len(data) for data in files.values() if len(data) > LEAST})
    for size in sorted({sizes[len(sizes) // 3], sizes[-1]}):
        limit = int(0.95 * size)  # results vary by the digits of their seconds
        assert_refused(run(copy, *commands[name].line, limit=limit), ": the file size limit is reached")
        assert list(copy.rglob(".tmp-*")) == []
        nothing_half_done(copy)
    ran = run(copy, *commands[name].line)
    assert ran.status == 0, ran.err
    assert expected.differing(copy) == []


@pytest.mark.parametrize(("name", "flushes"), [("gan", 10), ("gan", 11), ("classifier", 5)])
def test_a_disk_that_fills_up_while_training_keeps_the_last_checkpoint(run, commands, reference, copy, name, flushes):
    """While the second checkpoint's weights, or its description, are written; or the first one's state."""
    assert_refused(run(copy, *commands[name].line, fail=["fsync", errno.ENOSPC, flushes]), ": the disk is full")
    assert load_checkpoint(copy / "out", name)[0]["training"]["steps_done"] == 2
    assert list(copy.rglob(".tmp-*")) == []
    assert run(copy, *commands[name].line).status == 0
    assert reference(name).differing(copy) == []


@pytest.mark.parametrize(
    ("name", "function", "number", "reason"),
    [
        ("select", "fsync", errno.EIO, "Input/output error"),
        ("fid", "fsync", errno.EDQUOT, "the disk quota is used up"),
        ("report", "replace", errno.EROFS, "the file system is read-only"),
        ("select", "replace", errno.EACCES, "permission denied"),
    ],
)
def test_an_earlier_result_is_kept(run, commands, reference, contents, copy, name, function, number, reason):
    command = commands[name]
    for file, data in reference(name).left.items():
        (copy / file).write_bytes(data)
    before = contents(copy)
    others = ["random" if word == "density" else word for word in command.line]
    assert_refused(run(copy, *others, fail=[function, number, 0]), f"{command.out}: {reason}")
    assert contents(copy) == before


@pytest.mark.parametrize(
    ("name", "function", "number"),
    [
        ("sample", "fsync", errno.EIO),
        ("sample-wds", "replace", errno.EROFS),
        ("robust", "fsync", errno.EIO),
        ("samples", "replace", errno.EROFS),
        ("export-wds", "fsync", errno.EIO),
        ("export-folder", "replace", errno.EROFS),
    ],
)
def test_a_disk_that_fails_anywhere_is_one_line(run, commands, nothing_half_done, copy, name, function, number):
    """From a first, a second or a later write on; each run goes on from what the last one left."""
    for before in (0, 1, 4):
        assert_refused(run(copy, *commands[name].line, fail=[function, number, before]), ": ")
        nothing_half_done(copy)
    assert run(copy, *commands[name].line).status == 0


@pytest.fixture
def mount(tmp_path):
    """``mount("size=64k")``: a file system in memory, or a test that is skipped; ``mount("remount,size=1m")`` changes it."""
    place, begun = tmp_path / "disk", []

    def make(options: str):
        place.mkdir(exist_ok=True)
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)], capture_output=True, text=True, check=False
        )
        if done.returncode:
            pytest.skip(f"no permission to mount: {done.stderr.strip()}")
        begun.append(options)
        return place

    if shutil.which("mount") is None:
        pytest.skip("no mount")
    yield make
    if begun:
        subprocess.run(["umount", str(place)], check=True)


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("sample", ("24k", "100k")),
        ("sample-wds", ("24k", "200k")),
        ("export-npz", ("8k", "40k")),
        ("export-wds", ("40k", "400k")),
        ("classifier", ("40k", "160k")),
        ("arc", ("8k", "24k")),
        ("samples", ("4k", "12k")),
    ],
)
def test_a_full_disk(run, commands, reference, world, nothing_half_done, mount, name, sizes):
    """A small one, then one that is larger and still too small, then one that is large enough."""
    command, expected = commands[name], reference(name)
    copy = mount("size=16m") / "copy"
    shutil.copytree(world, copy)
    used = sum(-(-path.stat().st_size // 4096) * 4 for path in copy.rglob("*") if path.is_file())
    for size in sizes:
        mount(f"remount,size={used + int(size[:-1])}k")
        assert_refused(run(copy, *command.line), ": the disk is full")
        nothing_half_done(copy)
    mount("remount,size=32m")
    ran = run(copy, *command.line)
    assert ran.status == 0, ran.err
    assert expected.differing(copy) == []


@pytest.mark.parametrize(
    "name",
    [
        "sample",
        "sample-wds",
        "diffusion",
        "classifier",
        "arc",
        "robust",
        "samples",
        "select",
        "export-npz",
        "export-folder",
    ],
)
def test_a_read_only_file_system_is_one_line(run, commands, world, contents, mount, name):
    copy = mount("size=16m") / "copy"
    shutil.copytree(world, copy)
    before = contents(copy)
    mount("remount,ro")
    assert_refused(run(copy, *commands[name].line), ": the file system is read-only")
    assert contents(copy) == before
