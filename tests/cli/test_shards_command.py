"""``synthfast shards ls`` and ``synthfast shards verify``."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from synthfast.cli.main import main


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """23 digits in shards of 10, 10 and 3."""
    folder = tmp_path_factory.mktemp("shards") / "digits"
    arguments = ["--n", "23", "--shard-size", "10", "--steps", "1", "--seed", "5", "--device", "cpu"]
    with pytest.raises(SystemExit) as caught:
        main(["sample", "--out", str(folder), *arguments])
    assert caught.value.code == 0
    return folder


@pytest.fixture
def folder(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished set to damage."""
    return Path(shutil.copytree(finished, tmp_path / "digits"))


def interrupt(folder: Path) -> None:
    """Leave the folder as a run does that was killed before its third shard."""
    manifest = json.loads((folder / "manifest.json").read_text())
    for entry in manifest["shards"][:2]:
        (folder / f"shard-{entry['index']:06d}.json").write_text(json.dumps(entry))
    (folder / "manifest.json").write_text(json.dumps({**manifest, "complete": False, "shards": []}))
    for file in folder.glob("shard-000002.*.npy"):
        file.unlink()


def rows(text: str) -> dict[str, str]:
    return {line[:18].strip(): line[19:] for line in text.splitlines()}


def test_ls_says_what_is_there(cli, finished):
    ran = cli("shards", "ls", finished)
    assert (ran.status, ran.err) == (0, "")
    found = rows(ran.out)
    assert found["state"] == "complete"
    assert (found["images"], found["image shape"], found["shards"]) == ("23 of 23", "8x8x1", "3 of 3")
    assert int(found["bytes"].replace(",", "")) == sum(file.stat().st_size for file in finished.glob("*.npy"))
    assert found["images per class"] == "0: 3, 1: 3, 2: 3, " + ", ".join(f"{k}: 2" for k in range(3, 10))
    assert (found["seed"], found["labels"], found["device"]) == ("5", "balanced", "cpu")
    assert "digits" in found["generator"] and "steps 1," in found["solver"]


def test_many_classes_are_one_short_line(cli, tmp_path):
    np.savez(tmp_path / "a.npz", image=np.zeros((23, 8, 8), np.uint8), label=np.arange(23))
    assert (
        cli("shards", "import", f"npz:{tmp_path / 'a.npz'}", "--classes", 1000, "--out", tmp_path / "out").status == 0
    )
    for command in ("ls", "stats"):
        found = rows(cli("shards", command, tmp_path / "out").out)
        assert found["images per class"] == "0 to 1 in each of 1,000"


def test_ls_json_says_the_same(cli, finished):
    facts = json.loads(cli("shards", "ls", finished, "--json").out)
    assert facts["complete"] is True and (facts["n"], facts["images"], facts["shape"]) == (23, 23, [8, 8, 1])
    assert facts["images_per_class"] == [3, 3, 3] + [2] * 7
    assert facts["request"] == json.loads((finished / "manifest.json").read_text())["request"]


def test_ls_of_an_interrupted_run(cli, folder):
    interrupt(folder)
    ran = cli("shards", "ls", folder)
    found = rows(ran.out)
    assert ran.status == 0
    assert found["state"] == "incomplete; run the command that made it again to complete it"
    assert (found["images"], found["shards"]) == ("20 of 23", "2 of 3")


def test_verify_finds_nothing_wrong(cli, finished):
    ran = cli("shards", "verify", finished)
    assert (ran.status, ran.err) == (0, "")
    assert ran.out == f"{finished}: 23 images in 3 shards, all as the manifest says\n"


@pytest.mark.parametrize("name", ["shard-000001.images.npy", "shard-000002.labels.npy"])
@pytest.mark.parametrize("damage", ["a flipped bit", "cut short", "missing"])
def test_verify_names_a_damaged_file(cli, folder, name, damage):
    file = folder / name
    content = bytearray(file.read_bytes())
    if damage == "a flipped bit":
        content[-1] ^= 1
        file.write_bytes(content)
    elif damage == "cut short":
        file.write_bytes(content[:-1])
    else:
        file.unlink()
    ran = cli("shards", "verify", folder)
    assert ran.status == 1 and ran.out == ""
    assert ran.err.startswith(f"{file}: ") and ran.err.count("\n") == 1
    expected = {"a flipped bit": "SHA-256", "cut short": f"expected {len(content)} bytes", "missing": "missing"}
    assert expected[damage] in ran.err


def test_verify_names_every_problem(cli, folder):
    (folder / "shard-000000.labels.npy").unlink()
    (folder / "shard-000002.images.npy").unlink()
    (folder / "shard-000007.images.npy").write_bytes(b"")
    lines = cli("shards", "verify", folder).err.splitlines()
    assert [Path(line.partition(":")[0]).name for line in lines] == [
        "shard-000000.labels.npy",
        "shard-000002.images.npy",
        "shard-000007.images.npy",
    ]


def test_verify_of_an_interrupted_run_says_so(cli, folder):
    interrupt(folder)
    ran = cli("shards", "verify", folder)
    assert ran.status == 1
    assert ran.err.splitlines() == [
        f"{folder}: incomplete, 2 of 3 shards are there; run the command that made it again to complete it"
    ]


@pytest.mark.parametrize("command", ["ls", "verify"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no shard manifest here; check the path"),
        ("{", "the shard manifest is not valid JSON"),
        ("[]", "the shard manifest must be a JSON object, found list"),
        ('{"format": 3}', "format 3 is newer than this synthfast reads (2); upgrade synthfast"),
        ('{"format": 1, "complete": true, "shards": []}', "key 'request' is missing"),
    ],
)
def test_no_or_a_broken_manifest_is_one_line(cli, tmp_path, command, content, message):
    if content is not None:
        (tmp_path / "manifest.json").write_text(content)
    ran = cli("shards", command, tmp_path)
    assert ran.status == 1 and ran.error.startswith(f"{tmp_path / 'manifest.json'}: {message}")


@pytest.mark.parametrize("command", ["ls", "verify"])
def test_a_folder_that_is_not_there_is_one_line(cli, tmp_path, command):
    (tmp_path / "file").write_text("")
    assert cli("shards", command, tmp_path / "none").status == 1
    ran = cli("shards", command, tmp_path / "file")
    assert ran.status == 1 and ran.error.startswith(f"{tmp_path / 'file'}: expected a shard folder, found a file; ")
