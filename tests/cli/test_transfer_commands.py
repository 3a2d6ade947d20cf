"""``synthfast shards export``, ``import``, ``merge``, ``split`` and ``stats`` as a shell starts them."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest

from synthfast.data import ShardSet


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The 500 training digits in shards of 200."""
    from synthfast.config import ImportConfig
    from synthfast.data.transfer.importing import import_images

    folder = tmp_path_factory.mktemp("digits") / "set"
    import_images(ImportConfig(source=("digits",), out=str(folder), shard_size=200))
    return folder


def test_import_and_import_again(cli, tmp_path):
    arguments = ("shards", "import", "digits", "--out", tmp_path / "out", "--shard-size", 300)
    ran = cli(*arguments)
    assert (ran.status, ran.out, ran.err) == (0, f"{tmp_path / 'out'}: 500 images\n", "")
    assert cli(*arguments).out == f"{tmp_path / 'out'}: all 500 images are there already\n"
    (tmp_path / "out" / "shard-000001.images.npy").unlink()
    assert cli(*arguments).out == f"{tmp_path / 'out'}: 200 images (300 were there already)\n"
    assert cli("shards", "verify", tmp_path / "out").status == 0


@pytest.mark.parametrize("to", ["npy", "wds", "npz", "folder"])
def test_export(cli, tmp_path, digits, to):
    out = tmp_path / ("out.npz" if to == "npz" else "out")
    assert cli("shards", "export", digits, "--to", to, "--out", out).out == f"{out}: 500 images\n"
    assert cli("shards", "export", digits, "--to", to, "--out", out).out == f"{out}: all 500 images are there already\n"
    source = {"npz": f"npz:{out}", "folder": f"folder:{out}"}.get(to, out)
    assert cli("shards", "import", source, "--out", tmp_path / "back").status == 0
    found, whole = ShardSet(tmp_path / "back"), ShardSet(digits)
    order = np.argsort(whole.labels, kind="stable") if to == "folder" else np.arange(500)
    np.testing.assert_array_equal(found.read(np.arange(500)), whole.read(order))
    np.testing.assert_array_equal(found.labels, whole.labels[order])


def test_export_to_a_folder_says_which_classes_it_loses(cli, tmp_path, digits):
    from synthfast.data.selection import write_selection

    chosen, images = tmp_path / "some.npy", ShardSet(digits)
    write_selection(chosen, images, np.flatnonzero(images.labels % 4 != 3), None, {})
    ran = cli("shards", "export", digits, "--to", "folder", "--selection", chosen, "--out", tmp_path / "a")
    assert (ran.status, ran.err) == (0, "")
    assert ran.out.splitlines()[1] == (
        "warning: 2 of 10 classes without an image have no folder (3, 7), so that readers of the folders number the classes "
        "anew; --to npz keeps the labels"
    )
    npz = tmp_path / "a.npz"
    assert (
        len(cli("shards", "export", digits, "--to", "npz", "--selection", chosen, "--out", npz).out.splitlines()) == 1
    )
    cli("shards", "import", f"npz:{npz}", "--out", tmp_path / "back")
    assert np.bincount(ShardSet(tmp_path / "back").labels)[[3, 7]].tolist() == [0, 0]


def test_split_and_merge(cli, tmp_path, digits):
    ran = cli("shards", "split", digits, "--sizes", "0.8,0.2", "--balanced", "--out", tmp_path / "part")
    assert ran.out == f"{tmp_path / 'part-0'}: 400 images\n{tmp_path / 'part-1'}: 100 images\n"
    ran = cli(
        "shards", "merge", tmp_path / "part-1", tmp_path / "part-0", "--out", tmp_path / "merged", "--format", "wds"
    )
    assert ran.out == f"{tmp_path / 'merged'}: 500 images\n"
    ran = cli("shards", "ls", tmp_path / "merged")
    assert "name" in ran.out and str(tmp_path / "part-1") in ran.out and len(ran.out) < 3000


def test_stats(cli, digits):
    ran = cli("shards", "stats", digits)
    rows = {line[:18].strip(): line[19:] for line in ran.out.splitlines()}
    assert rows["images"] == "500" and rows["image shape"] == "8x8x1" and rows["constant images"] == "0"
    assert rows["images per class"].startswith("0: 50, 1: 50, ") and rows["duplicates"] == "0 (0.00%)"
    facts = json.loads(cli("shards", "stats", digits, "--json").out)
    pixels = ShardSet(digits).read(np.arange(500)) / 255
    assert facts["mean"] == pytest.approx([pixels.mean()]) and facts["std"] == pytest.approx([pixels.std()])
    assert rows["mean"] == f"{pixels.mean():.4f}"


def test_a_selection_of_score_samples(cli, tmp_path, digits):
    from synthfast.data.selection import write_selection

    write_selection(tmp_path / "chosen.npy", ShardSet(digits), np.arange(0, 500, 7), None, {})
    ran = cli(
        "shards", "export", digits, "--to", "npz", "--selection", tmp_path / "chosen.npy", "--out", tmp_path / "a.npz"
    )
    assert ran.out == f"{tmp_path / 'a.npz'}: 72 images\n"
    np.testing.assert_array_equal(np.load(tmp_path / "a.npz")["label"], ShardSet(digits).labels[::7])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("export", "expected one shard folder, found none; name one"),
        ("export a b", "expected one shard folder, found 2; name one"),
        ("export a --out x", "--to: expected one of npy, wds, npz, folder, cifar, found none; give one"),
        ("export a --to npz", "--out: expected where to write to, found none; give it"),
        (
            "export a --to zip --out x",
            "Invalid value for '--to': 'zip' is not one of 'npy', 'wds', 'npz', 'folder', 'cifar'",
        ),
        ("export a --to npz --out x", "--out x: expected a name like images.npz for --to npz; change it"),
        (
            "export a --to npy --out x --compress",
            "--compress: only npz files can be deflated, --to is npy; leave it out",
        ),
        ("export a --to npy --out x --codec png", "--codec png: --to npy has no codec; leave it out, or take wds"),
        ("export a --to wds --out x --quality 9", "--quality 9: only jpg has a quality; give --codec jpg with it"),
        ("export a --to wds --out x --codec jpg --quality 0", "--quality 0: expected a whole number from 1 to 100"),
        ("export a --to npy --out x --shard-size 0", "--shard-size 0: expected a whole number of at least 1"),
        ("export nowhere --to npy --out x", "nowhere: no such image source; expected digits, mnist"),
        ("export digits --to cifar --out x", "--to cifar: expected images 32x32x3, found 8x8x1; take npz"),
        ("export digits --to npz --out memory://a.npz", "--out memory://a.npz: only shards are written to URLs"),
        ("import", "expected one source of images, found none; name one"),
        ("import digits", "--out: expected where to write to, found none; give it"),
        ("import digits --out x --format npz", "Invalid value for '--format': 'npz' is not one of 'npy', 'wds'"),
        ("import digits --out x --classes 9", "--classes 9: digits has labels up to 9; raise it"),
        ("import digits --out x --classes 0", "--classes 0: expected a whole number of at least 1"),
        ("import digits --out x --image-size 9", "digits:train: images are 8x8x1 and are not resized"),
        ("import digits:valid --out x", "digits:valid: no such split; digits has train, test"),
        ("import foo://x --out x", "foo://x: the protocol 'foo' is not known"),
        ("import digits --out foo://x", "foo://x: the protocol 'foo' is not known"),
        ("merge a --out x", "expected two shard folders or more, found 1; name them"),
        ("merge a b", "--out: expected where to write to, found none; give it"),
        ("split a --out x", "--parts, --sizes: expected one of the two, found none; give one"),
        ("split a --out x --parts 2 --sizes 1,2", "--parts, --sizes: expected one of the two, found both; give one"),
        ("split a --out x --parts 0", "--parts 0: expected a whole number of at least 1"),
        ("split a --out x --sizes 1,x", "--sizes 1,x: expected numbers of images such as 45000,5000, or shares of all"),
        ("split a --out x --sizes 5,0", "--sizes 5,0: expected numbers of images"),
        ("split a --out x --sizes 0.5,0.6", "--sizes 0.5,0.6: add up to 1.1, expected shares that add up to 1"),
        ("split a --out x --sizes -1,24", "--sizes -1,24: expected numbers of images"),
        ("split a --out x --sizes nan", "--sizes nan: expected numbers of images"),
        ("split a --out x --sizes ,", "--sizes ,: expected numbers of images"),
        ("split a --out x --parts 2 --seed 9223372036854775808", "--seed 9223372036854775808: expected a whole number"),
        ("stats", "expected one shard folder, found none; name one"),
    ],
)
def test_wrong_usage_is_one_line_and_status_2(cli, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    ran = cli("shards", *arguments.split())
    assert ran.status == 2 and ran.error.startswith(message)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("stats nowhere", "nowhere/manifest.json: no shard manifest here; check the path"),
        ("merge nowhere there --out x", "nowhere/manifest.json: no shard manifest here"),
        ("split nowhere --parts 2 --out x", "nowhere/manifest.json: no shard manifest here"),
        ("import npz:none.npz --out x", "none.npz: no such npz file; check the path"),
        ("import folder:none --out x", "none: expected a folder of images, found nothing"),
        ("import cifar-binary:none --out x", "none: expected a .bin file or a folder of data_batch_1.bin"),
        ("import wds:none-*.tar --out x", "none-*.tar: expected a tar file, a folder of them, or a pattern"),
        ("stats memory://none", "memory://none/manifest.json: no shard manifest here; check the path"),
        ("export digits --to npy --out file/x", "file/x: a part of the path is not a folder"),
        ("export digits --to npz --out file/x.npz", "file: a file is in the way"),
        ("export digits --to folder --out file", "file: a file is in the way"),
    ],
)
def test_what_is_not_there_is_one_line_and_status_1(cli, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("in the way")
    ran = cli("shards", *arguments.split())
    assert ran.status == 1 and ran.error.startswith(message)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_hostile_tar_is_one_line_and_nothing_is_written_outside(cli, tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        info = tarfile.TarInfo("../../escaped.png")
        info.size = 3
        archive.addfile(info, io.BytesIO(b"png"))
    ran = cli("shards", "import", f"wds:{tmp_path / 'a.tar'}", "--out", tmp_path / "deep" / "out")
    assert ran.status == 1 and "leads out of its folder" in ran.error
    assert not list(tmp_path.parent.rglob("escaped*")) and not (tmp_path / "deep").exists()


def test_full_disk_is_one_line(tmp_path, digits):
    """A limit on the size of files stands for it; nothing is left under the final name."""
    code = (
        "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000));"
        "from synthfast.cli.main import main; main()"
    )
    for to, name in (("npz", "a.npz"), ("npy", "a"), ("wds", "b")):
        command = [
            sys.executable,
            "-c",
            code,
            "shards",
            "export",
            str(digits),
            "--to",
            to,
            "--out",
            str(tmp_path / name),
        ]
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        assert run.returncode == 1 and run.stderr.count("\n") == 1
        assert "the file size limit is reached; once that is mended run the same command again" in run.stderr
    assert not (tmp_path / "a.npz").exists() and not list(tmp_path.glob(".tmp-*"))


@pytest.mark.parametrize(("to", "name"), [("npz", "a.npz"), ("folder", "a")])
def test_ctrl_c_and_the_same_command_again(cli, tmp_path, digits, contents, to, name):
    """Interrupted while it writes, by a signal; the result is as if nothing had happened."""
    cli("shards", "export", digits, "--to", to, "--out", tmp_path / "whole" / name)
    code = f"""
import os, signal
from synthfast.data.transfer import copying
from synthfast.data.transfer import export_folder
copying.CHUNK_BYTES = export_folder.CHUNK_BYTES = 64 * 50
from synthfast.cli import shards_transfer
import contextlib
@contextlib.contextmanager
def bar(title):
    yield lambda done, total: done >= 300 and os.kill(os.getpid(), signal.SIGINT)
shards_transfer.images_bar = bar
from synthfast.cli.main import main
main(["shards", "export", {str(digits)!r}, "--to", {to!r}, "--out", {str(tmp_path / name)!r}])
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 130, run.stderr
    assert run.stderr == "\nsynthfast: interrupted; run the same command again to go on\n"
    assert (tmp_path / name).exists() == (to == "folder")
    assert cli("shards", "export", digits, "--to", to, "--out", tmp_path / name).status == 0
    if to == "npz":
        assert (tmp_path / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    else:
        files = [
            {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}
            for root in (tmp_path / name, tmp_path / "whole" / name)
        ]
        assert files[0] == files[1] and len(files[0]) == 501


def test_a_kill_and_the_same_command_again(tmp_path, digits, contents):
    """SIGKILL while shards are written: no handler runs."""
    code = f"""
import os, signal
from synthfast.data.transfer import copying
copying.CHUNK_BYTES = 64 * 50
from synthfast.config import ExportConfig
from synthfast.data.transfer.exporting import export_images
config = ExportConfig(source=({str(digits)!r},), to="wds", out={str(tmp_path / "out")!r}, shard_size=120)
export_images(config, lambda done, total: done >= LIMIT and os.kill(os.getpid(), signal.SIGKILL))
"""
    whole = tmp_path / "whole"
    for kill, out in ((501, whole), (300, tmp_path / "out"), (501, tmp_path / "out")):
        text = code.replace("LIMIT", str(kill)).replace(str(tmp_path / "out"), str(out))
        run = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=False)
        assert run.returncode == (-signal.SIGKILL if kill == 300 else 0), run.stderr
        assert len(list(out.glob(".tmp-*"))) == (3 if kill == 300 else 0)
    assert contents(tmp_path / "out") == contents(whole)
    assert os.listdir(tmp_path / "out")


def test_progress_without_a_terminal_is_a_line_now_and_then(cli, tmp_path, digits, monkeypatch):
    from synthfast.data.transfer import copying

    monkeypatch.setattr(copying, "CHUNK_BYTES", 64 * 100)
    monkeypatch.setattr("synthfast.cli.progress._LINE_EVERY", 0.0)
    ran = cli("shards", "export", digits, "--to", "npz", "--out", tmp_path / "a.npz")
    lines = ran.err.splitlines()
    assert lines[0] == "exporting: 0 of 500, 0 images/s, starting"
    assert lines[-1].startswith("exporting: 500 of 500, ") and lines[-1].endswith(" images/s, 0:00 left")
    assert len(lines) == 6
