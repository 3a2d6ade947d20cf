"""``synthfast inflection`` on digits with very little training: files, table, what is not done twice, what is refused."""

from __future__ import annotations

import json

import numpy as np
import pytest
from synthfast.cli.main import main

QUICK = (
    "--steps", "8", "--batch-size", "32", "--seeds", "2", "--attack-steps", "2", "--eps", "0.1", "-n", "60", "--device", "cpu",
)  # fmt: skip
NAMES = [
    f"{method}-{data}-seed-{seed}"
    for method in ("pgd", "standard")
    for data in ("real", "synthetic-40", "synthetic-64")
    for seed in (0, 1)
]


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    folder = tmp_path_factory.mktemp("samples") / "digits"
    with pytest.raises(SystemExit) as caught:
        main(["sample", "-n", "64", "--steps", "2", "--out", str(folder), "--device", "cpu"])
    assert caught.value.code == 0
    return folder


def test_from_samples_to_a_verdict(cli, samples, tmp_path):
    out = tmp_path / "out"
    arguments = ("inflection", "--synthetic", samples, "--counts", "64,40", *QUICK, "--out", out)
    ran = cli(*arguments)
    assert ran.status == 0, ran.err
    folders = sorted(path.name for path in out.iterdir() if path.is_dir())
    assert folders == NAMES
    for name in NAMES:
        config = json.loads((out / name / "config.json").read_text())["training"]
        assert config["method"] == name.split("-")[0] and config["seed"] == int(name[-1])
        count = None if "real" in name else int(name.split("-")[2])
        assert config["synthetic_n"] == count
        assert (config["synthetic"] == []) == (count is None)
        if name.startswith("pgd"):
            assert config["eps"] == 0.1
    lines = ran.out.splitlines()
    assert lines[0].split()[:2] == ["method", "synthetic"] and len(lines) == 1 + 6 + 1 + 4 + 2
    assert lines[-2:] == [f"{out / 'result.json'}: the result", f"{out / 'gains.png'}: the gains"]
    assert (out / "gains.png").read_bytes().startswith(b"\x89PNG")
    result = json.loads((out / "result.json").read_text())
    assert result["command"] == "inflection" and set(result["curves"]) == {"standard", "pgd"}
    assert result["curves"]["pgd"]["synthetic"] == [0, 40, 64]
    assert sorted(result["runs"]) == NAMES
    for name, run in result["runs"].items():
        score = json.loads((out / name / "score.json").read_text())["scores"]["metrics"]
        assert run == {metric: score[metric]["value"] for metric in run}
    assert result["inputs"]["synthetic 1"]["count"] == 64 and result["inputs"]["test"]["path"] == "digits:test"

    # Again: nothing is trained or attacked a second time, and the result is the same.
    before = {
        path: path.stat().st_mtime_ns for path in out.rglob("*") if path.name in ("model.safetensors", "score.json")
    }
    assert len(before) == 2 * len(NAMES)
    (out / NAMES[0] / "score.json").unlink()
    again = json.loads(cli(*arguments, "--json").out)
    assert {key: again[key] for key in ("metrics", "curves", "runs")} == {
        key: result[key] for key in ("metrics", "curves", "runs")
    }
    changed = {path for path, moment in before.items() if path.stat().st_mtime_ns != moment}
    assert changed == {out / NAMES[0] / "score.json"}

    # Another attack needs no training, but new scores.
    cli(*arguments, "--attack", "fgsm")
    changed = {path.name for path, moment in before.items() if path.stat().st_mtime_ns != moment}
    assert changed == {"score.json"}


def test_settings_of_a_file_count_for_every_run(cli, samples, tmp_path):
    (tmp_path / "train.toml").write_text("lr = 0.02\nlabel_smoothing = 0.1\n")
    out = tmp_path / "out"
    ran = cli(
        "inflection", "--synthetic", samples, *QUICK, "--seeds", 1, "--methods", "trades", "--train", tmp_path / "train.toml",
        "--fraction", 0.25, "--out", out,
    )  # fmt: skip
    assert ran.status == 0, ran.err
    for name, fraction in (("trades-real-seed-0", 0), ("trades-synthetic-64-seed-0", 0.25)):
        config = json.loads((out / name / "config.json").read_text())["training"]
        assert (config["lr"], config["label_smoothing"], config["fraction"] or 0) == (0.02, 0.1, fraction)
    assert "one seed gives no interval" in ran.out


def test_a_folder_without_shards_is_refused(cli, tmp_path):
    ran = cli("inflection", "--synthetic", tmp_path, "--out", tmp_path / "out")
    assert ran.status == 1 and ran.error == f"{tmp_path / 'manifest.json'}: no shard manifest here; check the path"


@pytest.mark.parametrize(
    ("text", "arguments", "message"),
    [
        ("seed = 3\n", (), "FILE: seed: is set by the comparison; remove it"),
        ("speed = 3\n", (), "FILE: unknown key 'speed'"),
        ("", ("--counts", "65"), "--counts 65: expected numbers from 1 to 64, the synthetic images there are"),
        ("", ("--methods", "madry"), "--methods madry: expected some of standard, pgd, trades"),
        ("", ("--test", "digits:valid"), "digits:valid: no such split"),
    ],
)
def test_what_cannot_be_done_is_one_line_and_leaves_nothing(cli, samples, tmp_path, text, arguments, message):
    file = tmp_path / "train.toml"
    file.write_text(text)
    ran = cli("inflection", "--synthetic", samples, "--train", file, *arguments, "--out", tmp_path / "out")
    assert ran.status == 2 and ran.error.startswith(message.replace("FILE", str(file)))
    assert not (tmp_path / "out").exists()


def test_images_that_do_not_fit_are_refused_before_anything_is_trained(cli, samples, tmp_path):
    np.savez(tmp_path / "two.npz", image=np.zeros((4, 8, 8), np.uint8), label=np.arange(4) % 2)
    source, out = f"npz:{tmp_path / 'two.npz'}", tmp_path / "out"
    ran = cli("inflection", "--synthetic", samples, "--test", source, *QUICK, "--out", out)
    expected = f"--test {source}: expected images [8, 8, 1] in 10 classes like digits"
    assert ran.status == 2 and ran.error.startswith(expected) and not out.exists()
    ran = cli("inflection", "--synthetic", samples, "--dataset", source, "--test", source, *QUICK, "--out", out)
    expected = f"--synthetic {samples}: expected images [8, 8, 1] in 2 classes like {source}"
    assert ran.status == 2 and ran.error.startswith(expected) and not out.exists()


def test_synthetic_images_must_be_shards_before_anything_is_trained(cli, tmp_path):
    ran = cli("inflection", "--synthetic", "digits", *QUICK, "--out", tmp_path / "out")
    assert ran.status in (1, 2) and ran.error.startswith("digits") and not (tmp_path / "out").exists()
