"""``synthfast score arc`` as a user runs it, as small as it can be."""

from __future__ import annotations

import json

import numpy as np
import pytest

from synthfast.data import open_images

SMALL = ("--steps", 50, "--attack-steps", 2, "--measure-steps", 3, "--bootstrap", 100, "--device", "cpu")


@pytest.fixture
def pale(tmp_path):
    """Digits with a third of their contrast: far from real ones at any small radius."""
    digits = open_images("digits")
    path = tmp_path / "pale.npz"
    image = digits.read(np.arange(len(digits)))
    np.savez(path, image=(image // 3 + 80).astype(np.uint8), label=digits.labels)
    return f"npz:{path}"


def test_a_score(cli, pale, tmp_path):
    out = tmp_path / "new" / "arc.json"
    command = ("score", "arc", "--synthetic", pale, "--eps", "0,0.2", "-n", 200, "--per-class", "--out", out, *SMALL)
    ran = cli(*command)
    assert ran.status == 0, ran.err
    lines = ran.out.splitlines()
    assert lines[0].startswith("arc 0.") and "held-out images, l2, pixels in [0, 1]" in lines[0]
    assert lines[1].startswith("arc normalized ") and lines[1].endswith("up to eps 0.2")
    assert lines[2].startswith("  eps 0        success ") and lines[3].startswith("  eps 0.2      success ")
    assert lines[4].startswith("  class 0: arc ") and lines[-1] == f"{out.with_suffix('.png')}: the curve"
    result = json.loads(out.read_text())
    assert result["command"] == "score arc" and result["metrics"]["arc"]["value"] > 0.06
    assert len(result["groups"]["class"]) == 10 and result["inputs"]["synthetic"]["count"] == 500
    assert out.with_suffix(".png").read_bytes()[:4] == b"\x89PNG"
    assert sorted(path.name for path in out.parent.iterdir()) == ["arc.json", "arc.png"]


def test_l_infinity_and_json(cli, pale, tmp_path):
    out = tmp_path / "arc.linf"
    command = ("score", "arc", "--synthetic", pale, "--norm", "linf", "--eps", "0,8/255", "-n", 100, "--out", out)
    ran = cli(*command, "--json", *SMALL)
    assert ran.status == 0, ran.err
    result = json.loads(ran.out)
    assert result["curves"]["arc"]["eps"] == pytest.approx([0, 8]) and 0 < result["metrics"]["arc"]["value"] <= 4
    assert (tmp_path / "arc.linf.png").exists()
    assert json.loads(out.read_text()) == result


def test_without_options_the_embedded_generator_is_scored(cli):
    ran = cli("score", "arc", "--real", "digits", "--eps", "0,0.5", "-n", 60, "--restarts", 1, *SMALL)
    assert ran.status == 0, ran.err
    assert ran.out.startswith("arc")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--eps", "big"), "--eps big: expected auto, radii such as 0,2,4,8, or START:STOP:COUNT"),
        (("--norm", "linf", "--eps", "0.03"), "--eps 0.03: l-infinity radii are in units of 1/255"),
        (("--synthetic", "digits:test"), "digits:test: holds the same images as digits:test"),
        (("-n", 10), "--n 10: expected a whole number of at least 20"),
        (("-n", 501, "--synthetic", "digits"), "--n 501: digits:train holds 500 images"),
        (("--held-out", 0.01, "-n", 30, "--synthetic", "digits"), "--held-out 0.01: none of 30 images of a kind"),
        (("--synthetic", "digits", "--out", "."), "--out .: expected a file, found a folder"),
        (("--discriminator", "resnet-x", "--synthetic", "digits"), "'resnet-x': no classifier has this name"),
        (("--radii", 1), "--radii 1: expected a whole number of at least 2"),
    ],
)
def test_wrong_input_is_one_line(cli, arguments, message):
    ran = cli("score", "arc", *arguments, "--device", "cpu")
    assert ran.status == 2 and ran.error.startswith(message) and ran.out == ""


def test_progress_of_another_command_is_refused(cli, pale, tmp_path):
    folder = tmp_path / "arc.json.progress"
    folder.mkdir()
    (folder / "facts.json").write_text('{"settings": {"held_out": 0.5}}')
    ran = cli("score", "arc", "--synthetic", pale, "--out", tmp_path / "arc.json", *SMALL)
    assert ran.status == 2 and f"{folder} was made with " in ran.error
    assert not (tmp_path / "arc.json").exists()
