"""Results of FID and prdc as a whole: what they say, per class, in any batches, on two ranks, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from synthfast.config import FidConfig, PrdcConfig
from synthfast.data import open_images
from synthfast.distributed import Ranks
from synthfast.errors import UsageError
from synthfast.scoring.features import load_features
from synthfast.scoring.frechet import fid
from synthfast.scoring.metrics import fid_result, prdc_result
from synthfast.scoring.moments import Moments
from synthfast.scoring.prdc import prdc

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def blurred(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The "synthetic" images: the training digits, of which every other is blurred along its rows."""
    digits = open_images("digits:train")
    image = digits.read(np.arange(len(digits))).astype(int)
    image[::2] = (np.roll(image[::2], 1, 2) + 2 * image[::2] + np.roll(image[::2], -1, 2)) // 4
    path = tmp_path_factory.mktemp("blurred") / "images.npz"
    np.savez(path, image=image.astype(np.uint8), label=digits.labels)
    return f"npz:{path}"


def run(config: FidConfig | PrdcConfig, report: object = None) -> dict:
    make = fid_result if isinstance(config, FidConfig) else prdc_result
    with Ranks("cpu") as ranks:
        return make(config, ranks, report)


def arrays(source: str, n: int | None = None) -> torch.Tensor:
    images = open_images(source)
    return load_features("classifier", images.shape, CPU).compute(images)[:n]


@pytest.mark.parametrize("n", [None, 200])
def test_values_are_those_of_the_features(blurred, n):
    real, synthetic = arrays("digits:test", n), arrays(blurred, n)
    result = run(FidConfig(synthetic=blurred, n=n, device="cpu"))
    expected = fid(Moments.of(real), Moments.of(synthetic))
    assert result["metrics"]["fid"]["value"] == pytest.approx(expected, rel=1e-5)
    assert result["metrics"]["fid"]["count"] == len(synthetic)
    result = run(PrdcConfig(synthetic=blurred, n=n, k=3, device="cpu"))
    assert result["metrics"] == prdc(real, synthetic, 3).entries(0)


def test_a_result_is_complete_and_json(blurred):
    seen = []
    result = run(FidConfig(synthetic=blurred, device="cpu"), seen.append)
    assert json.loads(json.dumps(result)) == result
    assert list(result["metrics"]) == ["fid", "fid_infinity", "kid"]
    assert result["command"] == "score fid" and result["config"]["features"] == "classifier"
    assert result["inputs"]["real"] == {
        "path": "digits:test",
        "sha256": open_images("digits:test").fingerprint(),
        "count": 1297,
    }
    assert result["inputs"]["synthetic"]["count"] == 500
    assert result["features"]["dim"] == 128 and len(result["features"]["fingerprint"]) == 64
    assert (seen[-1].done, seen[-1].total) == (1797, 1797)
    for entry in result["metrics"].values():
        assert entry["value"] is None or entry["ci"][0] <= entry["value"] <= entry["ci"][1]
    assert not {"out", "json", "data_dir", "device"} & set(result["config"])


def test_better_images_score_better(blurred):
    """Samples of the true distribution, blurred ones and noise."""
    noise = Path(blurred.removeprefix("npz:")).with_name("noise.npz")
    np.savez(noise, image=np.random.default_rng(0).integers(0, 256, (500, 8, 8), np.uint8))
    for features in ("classifier", "pixels"):
        sources = ("digits:train", blurred, f"npz:{noise}")
        results = [run(FidConfig(synthetic=source, features=features, device="cpu")) for source in sources]
        for metric in ("fid", "kid"):
            values = [result["metrics"][metric]["value"] for result in results]
            assert values == sorted(values) and values[2] > 5 * abs(values[0]), metric
        results = [run(PrdcConfig(synthetic=source, features=features, device="cpu")) for source in sources]
        assert results[0]["metrics"]["precision"]["value"] > 0.8
        for metric in ("precision", "density", "coverage"):
            values = [result["metrics"][metric]["value"] for result in results]
            assert values[0] > values[1] > values[2], metric


def test_classes(blurred):
    whole = run(FidConfig(synthetic=blurred, features="pixels", kid_n=300, device="cpu"))
    result = run(FidConfig(synthetic=blurred, features="pixels", kid_n=300, per_class=True, device="cpu"))
    for metric, entry in whole["metrics"].items():
        assert result["metrics"][metric]["count"] == entry["count"]
        if entry["value"] is not None:
            assert result["metrics"][metric]["value"] == pytest.approx(entry["value"], rel=1e-9), metric
            assert result["metrics"][metric]["ci"] == pytest.approx(entry["ci"], rel=1e-8), metric
    assert "groups" not in whole and list(result["groups"]["class"]) == [str(k) for k in range(10)]
    real, synthetic = open_images("digits:test"), open_images(blurred)
    flat = [torch.from_numpy(s.read(np.arange(len(s))).reshape(len(s), -1)) / 255 for s in (real, synthetic)]
    three = flat[0][real.labels == 3], flat[1][synthetic.labels == 3]
    group = result["groups"]["class"]["3"]
    assert group["fid"]["value"] == pytest.approx(fid(*map(Moments.of, three)), rel=1e-6)
    assert group["fid"]["count"] == 50 and group["fid_infinity"]["value"] is None
    assert run(PrdcConfig(synthetic=blurred, features="pixels", per_class=True, device="cpu"))["groups"]["class"][
        "3"
    ] == prdc(*three, 5).entries(0)


def test_a_class_with_too_few_images_is_left_out(tmp_path):
    digits = open_images("digits:test")
    chosen = np.flatnonzero((digits.labels != 4) | (np.arange(1297) < 60))[:900]
    np.savez(tmp_path / "some.npz", image=digits.read(chosen), label=digits.labels[chosen])
    source = f"npz:{tmp_path / 'some.npz'}"
    result = run(FidConfig(synthetic=source, features="pixels", per_class=True, device="cpu"))
    few = int((digits.labels[chosen] == 4).sum())
    assert list(result["groups"]["class"]) == [str(k) for k in range(10) if k != 4]
    assert result["warnings"] == [
        f"class 4: expected at least 24 images of each kind, found {int((digits.labels == 4).sum())} real and {few} "
        "synthetic ones; it is left out"
    ]
    assert result["metrics"]["fid"]["count"] == 900
    assert "4" in run(PrdcConfig(synthetic=source, features="pixels", per_class=True, device="cpu"))["groups"]["class"]


@pytest.mark.parametrize("kind", [FidConfig, PrdcConfig])
def test_batches_change_nothing(blurred, kind):
    config = kind(synthetic=blurred, n=150, device="cpu")
    results = [run(dataclasses.replace(config, batch_size=size))["metrics"] for size in (1, 64, None)]
    for result in results[1:]:
        for metric, entry in result.items():
            first = results[0][metric]
            if first["value"] is None:
                assert entry == first and metric == "fid_infinity"  # 150 images are too few for it
            else:
                assert entry["value"] == pytest.approx(first["value"], rel=1e-4), metric
                assert entry["ci"] == pytest.approx(first["ci"], rel=1e-3), metric


def test_saved_statistics_stand_for_the_real_images(blurred, tmp_path):
    path = tmp_path / "stats.npz"
    first = run(FidConfig(synthetic=blurred, save_stats=str(path), device="cpu"))
    again = run(FidConfig(synthetic=blurred, real=f"stats:{path}", device="cpu"))
    assert again["metrics"]["fid"]["value"] == pytest.approx(first["metrics"]["fid"]["value"], rel=1e-9)
    assert again["metrics"]["kid"]["value"] is None
    assert again["inputs"]["real"]["path"] == str(path)
    # Taken as exact, the real images add nothing to the interval.
    width, before = (result["metrics"]["fid"]["ci"] for result in (again, first))
    assert width[1] - width[0] < before[1] - before[0]
    per_class = run(FidConfig(synthetic=blurred, save_stats=str(path), per_class=True, device="cpu"))
    assert per_class["metrics"]["fid"]["value"] == pytest.approx(first["metrics"]["fid"]["value"], rel=1e-9)


def test_subsets_of_kid_are_in_the_result_when_asked_for(blurred):
    metrics = run(FidConfig(synthetic=blurred, kid_subsets=3, kid_n=100, device="cpu"))["metrics"]
    assert metrics["kid_subsets"]["count"] == 100 and metrics["kid_subsets"]["std"] >= 0
    # All images there are: each subset is the whole.
    assert metrics["kid_subsets"]["value"] == pytest.approx(metrics["kid"]["value"], rel=1e-9)


def test_few_images_are_warned_of(blurred):
    result = run(FidConfig(synthetic=blurred, n=100, device="cpu"))
    expected = "100 images are few for 128 features; FID is compared only at equal numbers, see kid"
    assert result["warnings"] == [f"digits:test: {expected}", f"{blurred}: {expected}"]


TWO = """
import json, sys
import torch
from synthfast.config import FidConfig, PrdcConfig
from synthfast.data import open_images
from synthfast.distributed import Ranks
from synthfast.scoring.features import Features
from synthfast.scoring.metrics import fid_result, prdc_result

torch.set_num_threads(1)
with Ranks("cpu") as ranks:
    results = [
        fid_result(FidConfig(synthetic=sys.argv[1], batch_size=64, kid_n=200, device="cpu"), ranks),
        prdc_result(PrdcConfig(synthetic=sys.argv[1], batch_size=64, device="cpu"), ranks),
    ]
    images = open_images(sys.argv[1])
    signed = Features("signed", images.shape, 64, "", ranks.device, lambda x: 100 - x.flatten(1).float())
    assert torch.equal(signed.compute(images, ranks, 64), signed.compute(images))
print(json.dumps([result["metrics"] for result in results]))
"""


def test_two_ranks_give_the_same_result(blurred):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    common = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", TWO, blurred],
            env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    (two_fid, two_prdc), other = (json.loads(out) for out, _ in outputs)
    assert other == [two_fid, two_prdc]
    one = run(FidConfig(synthetic=blurred, batch_size=64, kid_n=200, device="cpu"))["metrics"]
    for metric, entry in one.items():
        if entry["value"] is not None:
            assert two_fid[metric]["value"] == pytest.approx(entry["value"], rel=1e-9), metric
            assert two_fid[metric]["ci"] == pytest.approx(entry["ci"], rel=1e-8), metric
    assert two_prdc == run(PrdcConfig(synthetic=blurred, batch_size=64, device="cpu"))["metrics"]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (PrdcConfig(synthetic="digits", real="stats:x.npz"), "--real stats:x.npz: precision and recall need images"),
        (FidConfig(synthetic="digits", real="stats:x.npz", per_class=True), "--per-class: --real stats:x.npz has no"),
        (FidConfig(synthetic="digits", n=23), "digits:test: expected at least 24 images, found 23; take more images"),
        (PrdcConfig(synthetic="digits", n=5), "digits:test: expected more than k = 5 images, found 5; lower --k"),
        (FidConfig(synthetic="digits", out="."), "--out .: expected a file, found a folder; choose another name"),
        (FidConfig(synthetic="digits", save_stats="/"), "--save-stats /: expected a file, found a folder"),
    ],
)
def test_what_cannot_be_scored_is_one_line(config, message):
    with pytest.raises(UsageError) as caught:
        run(config)
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


def test_sets_that_do_not_fit_are_refused(tmp_path):
    path = tmp_path / "images.npz"
    source = f"npz:{path}"
    np.savez(path, image=np.zeros((40, 8, 8, 3), np.uint8))
    for kind in (FidConfig, PrdcConfig):
        with pytest.raises(
            UsageError, match="expected images 8x8x1 like digits:test, found 8x8x3; compare sets of one"
        ):
            run(kind(synthetic=source))
    np.savez(path, image=np.zeros((40, 8, 8), np.uint8))
    with pytest.raises(UsageError, match=f"^--per-class: {source} has no labels; leave it out"):
        run(FidConfig(synthetic=source, per_class=True))
    np.savez(path, image=np.zeros((40, 70, 70), np.uint8))
    with pytest.raises(UsageError, match=r"^--features pixels: FID takes at most 4,096 features, found 4,900"):
        run(FidConfig(real=source, synthetic=source, features="pixels"))
