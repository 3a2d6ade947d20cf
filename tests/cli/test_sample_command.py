"""``synthfast sample`` as a shell sees it: what it says, its exit status, and what it leaves alone."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from synthfast.cli.main import main

from synthfast import assets
from synthfast.artifacts import sha256_file
from synthfast.data import ShardFolder, ShardSet
from synthfast.errors import UsageError


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of the embedded checkpoint, to be broken."""
    return Path(shutil.copytree(assets.DIGITS_GENERATOR, tmp_path / "copy"))


def edit(path: Path, **values: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def change_weights(folder: Path, value: float) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["conv_out.bias"].add_(value)
    save_file(weights, folder / "model.safetensors")
    edit(folder / "config.json", sha256=sha256_file(folder / "model.safetensors"))


def test_it_says_what_it_made_and_where_the_picture_is(sample, out):
    first, again = sample(), sample()
    assert first.status == 0 and first.err == ""
    lines = first.out.splitlines()
    assert lines[0].startswith(f"{out}: 23 images in ") and lines[0].endswith(" images/s")
    assert lines[1] == f"{out / 'preview.png'}: the first of them" and len(lines) == 2
    assert again.status == 0 and again.out.splitlines() == [f"{out}: all 23 images are there already", lines[1]]
    assert len(ShardSet(out)) == 23


def test_it_says_how_many_were_there(sample, out):
    sample("--shard-size", 10)
    (out / "shard-000002.images.npy").unlink()
    assert sample("--shard-size", 10).out.startswith(f"{out}: 3 images (20 were there already) in ")


def test_short_n(cli, out):
    assert cli("sample", "-n", 2, "--steps", 1, "--out", out).status == 0
    assert len(ShardSet(out)) == 2


def test_another_command_into_the_same_folder_has_status_2(sample, out, copy, contents):
    sample()
    before = contents(out)
    change_weights(copy, 0.5)
    for options, difference in (
        (("--n", 24), "--n: OUT was made with 23, this command says 24; "),
        (("--seed", 1), "--seed: OUT was made with 0, this command says 1; "),
        (("--steps", 2), "--steps: OUT was made with 1, this command says 2; "),
        (("--solver", "heun"), '--solver: OUT was made with "dpmpp-2m", this command says "heun"; '),
        (("--guidance", 2), "--guidance: OUT was made with nothing, this command says 2.0; "),
        (("--labels", 3), '--labels: OUT was made with "balanced", this command says "3"; '),
        (("--precision", "bf16"), '--precision: OUT was made with "fp32", this command says "bf16"; '),
        (("--generator", copy), '--generator (its weights): OUT was made with "'),
    ):
        ran = sample(*options)
        assert ran.status == 2 and ran.error.startswith(difference.replace("OUT", str(out)))
        assert ran.error.endswith("; repeat the command that made it, or choose another --out")
    assert contents(out) == before


def test_a_generator_of_other_images_is_named(cli, sample, out, tmp_path, monkeypatch):
    sample()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "grey_of_a_test.py").write_text(
        "class Grey:\n    name, shape, classes, sample = 'grey', (4, 4, 1), None, None\n"
        "def make(device):\n    return Grey()\n"
    )
    ran = cli("sample", "--n", 23, "--generator", "py:grey_of_a_test:make", "--out", out)
    assert ran.status == 2
    assert ran.error.startswith(f"--generator (its image shape): {out} was made with [8, 8, 1], this command says [4,")


def test_a_folder_with_strangers_has_status_2(sample, out, contents):
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    ran = sample()
    assert ran.status == 2
    assert ran.error == (
        f"{out}: holds files (notes.txt) but no manifest.json, so it is no shard folder; choose a new or empty folder"
    )
    assert contents(out) == {"notes.txt": b"mine"}


def test_a_folder_that_another_process_is_writing_has_status_1(sample, out, contents):
    sample()
    before = contents(out)
    request = json.loads((out / "manifest.json").read_text())["request"]
    with ShardFolder.create_or_resume(out, request):
        ran = sample()
    assert ran.status == 1
    assert ran.error == f"{out}: another process is writing this folder; wait for it to end or choose another --out"
    assert contents(out) == before


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("FILE", "a file is in the way; choose another --out"),
        ("FILE/out", "a part of the path is not a folder; choose another --out"),
        ("/proc/out", "no such file or folder; choose another --out"),
        ("/proc/sys/out", "; choose another --out"),
        ("FOLDER/" + "x" * 300, "the name is too long; choose another --out"),
    ],
)
def test_a_place_that_cannot_be_written_has_status_1(cli, tmp_path, place, message):
    (tmp_path / "file").write_text("")
    place = place.replace("FILE", str(tmp_path / "file")).replace("FOLDER", str(tmp_path))
    ran = cli("sample", "--n", 3, "--steps", 1, "--out", place)
    assert ran.status == 1 and ran.error.startswith(f"{place}: ") and ran.error.endswith(message)


def test_no_permission_has_status_1(cli, out, monkeypatch):
    def refuse(self: Path, *arguments: object, **options: object) -> None:
        raise PermissionError(13, "Permission denied", str(self))  # root is refused nothing

    monkeypatch.setattr(Path, "mkdir", refuse)
    ran = cli("sample", "--n", 3, "--steps", 1, "--out", out)
    assert ran.status == 1 and ran.error == f"{out}: permission denied; choose another --out"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--n 0", "--n 0: expected a whole number of at least 1"),
        ("--n -5", "--n -5: expected a whole number of at least 1"),
        ("--n 1e3", "Invalid value for '-n' / '--n': '1e3' is not a valid integer."),
        ("--n 2.5", "Invalid value for '-n' / '--n': '2.5' is not a valid integer."),
        ("--batch-size 0", "--batch-size 0: expected at least 1"),
        ("--batch-size x", "Invalid value for '--batch-size': 'x' is not a valid integer."),
        ("--shard-size 0", "--shard-size 0: expected a whole number of at least 1"),
        ("--seed 9223372036854775808", "--seed 9223372036854775808: expected a whole number from -2^63 to 2^63 - 1"),
        ("--seed one", "Invalid value for '--seed': 'one' is not a valid integer."),
        ("--solver plms", "Invalid value for '--solver': 'plms' is not one of 'ddpm', 'ddim', 'euler', 'heun',"),
        ("--steps 0", "--steps 0: expected a whole number from 1 to 100000"),
        ("--guidance much", "Invalid value for '--guidance': expected a number such as 0.5 or 8/255, found 'much'"),
        ("--guidance inf", "--guidance inf: expected a finite number"),
        ("--guidance nan", "Invalid value for '--guidance': expected a number such as 0.5 or 8/255, found 'nan'"),
        ("--guidance 1/0", "Invalid value for '--guidance': expected a number such as 0.5 or 8/255, found '1/0'"),
        ("--labels 10", "--labels 10: expected classes from 0 to 9"),
        ("--labels even", "--labels even: expected balanced, uniform, classes such as 3 or 3,5, or weights:"),
        ("--labels weights:1,2", "--labels weights:1,2: expected 10 non-negative numbers, not all 0, one a class"),
        ("--device tpu", "--device tpu: expected auto, cpu, cuda or cuda:N"),
        ("--device cuda:²", "--device cuda:²: expected auto, cpu, cuda or cuda:N"),
        ("--device cuda:77", "--device cuda:77: GPU 77 is wanted, found "),
        ("--precision fp8", "Invalid value for '--precision': 'fp8' is not one of 'fp32', 'bf16', 'fp16'."),
        ("--eta 0.5", "--eta 0.5: expected --solver ddim with it, found dpmpp-2m"),
        ("--solver ddim --eta 2", "--eta 2.0: expected a number from 0 to 1"),
        ("--churn 1", "--churn 1.0: expected --solver euler or heun with it, found dpmpp-2m"),
        ("--solver heun --churn -1", "--churn -1.0: expected a number of at least 0"),
        ("--solver heun --s-tmin -1", "--s-tmin -1.0: expected a number of at least 0"),
        ("--solver heun --s-tmax -1", "--s-tmax -1.0: expected a number of at least --s-tmin 0.0"),
        ("--solver heun --s-noise -1", "--s-noise -1.0: expected a number of at least 0"),
        ("--spacing even", "Invalid value for '--spacing': 'even' is not one of 'karras', 'leading', 'trailing',"),
        ("--spacing linspace", "--spacing linspace: expected karras, because an EDM model has no timesteps"),
        ("--rho 0", "--rho 0.0: expected a positive number"),
        ("--sigma-min 0", "--sigma-min 0.0: expected a positive number"),
        ("--sigma-max 0.001", "--sigma-min 0.002: expected less than --sigma-max 0.001"),
        ("--clip -1", "--clip -1.0: expected a positive number, or inf for no clipping"),
        ("--variance fixed_small", "--variance fixed_small: expected --solver ddpm with it, found dpmpp-2m"),
        ("--variance learned", "Invalid value for '--variance': 'learned' is not one of 'fixed_small', 'fixed_large'."),
        ("--generator py:module", "--generator py:module: expected py:module:function"),
    ],
)
def test_a_bad_option_value_is_one_line_and_status_2(sample, out, options, message):
    ran = sample(*options.split())
    assert ran.status == 2 and ran.error.startswith(message) and ran.out == ""
    assert not out.exists()


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda copy: (copy / "model.safetensors").unlink(), "COPY/model.safetensors: no weights here"),
        (lambda copy: cut(copy / "model.safetensors"), "COPY/model.safetensors: not a valid safetensors file"),
        (lambda copy: edit(copy / "config.json", sha256="0"), "COPY/model.safetensors: expected SHA-256 0, found "),
        (lambda copy: cut(copy / "config.json"), "COPY/config.json: the checkpoint is not valid JSON"),
        (lambda copy: edit(copy / "config.json", format=2), "COPY/config.json: format 2 is newer than this synthfast"),
        (
            lambda copy: edit(copy / "config.json", kind="classifier"),
            "COPY/config.json: expected a checkpoint of kind 'diffusion' or 'gan', found 'classifier'; check the path",
        ),
        (lambda copy: shutil.rmtree(copy), "no model folder COPY; expected a folder with config.json"),
    ],
)
def test_broken_weights_are_one_line_and_status_1(sample, out, copy, damage, message):
    damage(copy)
    ran = sample("--generator", copy)
    assert ran.status == 1 and ran.error.startswith(message.replace("COPY", str(copy)))
    assert not out.exists()


def test_weights_that_are_not_numbers_leave_no_shard_and_can_be_mended(sample, out, copy, contents):
    change_weights(copy, float("nan"))
    ran = sample("--generator", copy)
    assert ran.status == 1
    assert ran.error.startswith(
        "batch of image 0: expected finite pixels, found NaN or infinity; check the generator's"
    )
    assert list(contents(out)) == ["manifest.json"]


def test_debug_lets_the_error_through(out):
    with pytest.raises(UsageError, match="--steps 0"):
        main(["sample", "--steps", "0", "--out", str(out), "--debug"])


FAILING = """
import torch

class Failing:
    name, shape, classes = "failing", (4, 4, 1), None

    def sample(self, index, labels, seed):
        return torch.full((len(index), 1, 4, 4), float("nan") if 10 in index else 0.0)

def make(device):
    return Failing()
"""


def test_when_one_rank_fails_each_says_one_line(tmp_path, out):
    (tmp_path / "failing.py").write_text(FAILING)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    options = ["-n", "40", "--shard-size", "10", "--generator", "py:failing:make", "--device", "cpu", "--out", str(out)]
    environment = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "synthfast", "sample", *options],
            env={**environment, "RANK": str(rank), "OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE,
            text=True,
            cwd=tmp_path,
        )
        for rank in range(2)
    ]
    errors = [rank.communicate(timeout=120)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [1, 1], errors
    assert errors[1].startswith("synthfast (rank 1): batch of image 10: expected finite pixels, found NaN or infinity")
    assert errors[0].startswith("synthfast: another rank has ended or cannot be reached; look for its message (")
    assert [error.count("\n") for error in errors] == [1, 1]


def test_ranks_without_a_launcher_are_one_line(cli, monkeypatch, out):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    ran = cli("sample", "--n", 3, "--out", out)
    assert ran.status == 2 and ran.error.startswith("WORLD_SIZE=2: expected a launch by torchrun (")
    assert not out.exists()
