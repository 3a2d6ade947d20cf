"""``score samples``: every number by its definition, what corruption does to it, and what is kept and made again."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys

import numpy as np
import pytest
import torch

from synthfast.assets import DIGITS_CLASSIFIER
from synthfast.config import SamplesConfig
from synthfast.data import ShardFolder, ShardSet, open_images
from synthfast.distributed import Ranks
from synthfast.errors import SynthfastError, UsageError
from synthfast.models.classifiers import load_classifier
from synthfast.scoring import image_scores, samples
from synthfast.scoring.features import load_features
from synthfast.scoring.samples import samples_result, table
from synthfast.training.batches import to_unit

CPU = torch.device("cpu")
CLEAN, NOISE, BLUR, LABEL, COPY = range(5)


def write(path, images, labels, shard_size=None):
    request = {"n": len(images), "shape": list(images.shape[1:]), "classes": None if labels is None else 10}
    with ShardFolder.create_or_resume(path, {**request, "shard_size": shard_size or len(images)}) as folder:
        for span in folder.pending():
            with folder.writer(span.index) as writer:
                rows = slice(span.first, span.first + span.count)
                writer.append(np.ascontiguousarray(images[rows]), None if labels is None else labels[rows])
                writer.commit()
        folder.finish()
    return ShardSet(path)


def blurred(images):
    """[1 2 1] / 4 in both directions, twice."""
    x = images.astype(np.float64)
    for axis in (1, 2, 1, 2):
        pad = [(0, 0)] * 4
        pad[axis] = (1, 1)
        p = np.pad(x, pad, mode="edge")
        x = (np.take(p, range(0, 8), axis) + 2 * x + np.take(p, range(2, 10), axis)) / 4
    return np.rint(x).astype(np.uint8)


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """600 images: real ones that no training saw, of which 60 are noisy, 60 blurred, 60 wrongly labelled, 30 training images."""
    test, train = open_images("digits:test"), open_images("digits")
    random = np.random.default_rng(0)
    images, labels, kind = test.read(np.arange(600)), test.labels[:600].copy(), np.zeros(600, np.int64)
    order = random.permutation(600)
    for number, (first, last) in enumerate(((0, 60), (60, 120), (120, 180), (180, 210)), start=1):
        kind[order[first:last]] = number
    noise = random.normal(0, 0.25 * 255, images[kind == NOISE].shape)
    images[kind == NOISE] = np.clip(np.rint(images[kind == NOISE] + noise), 0, 255)
    images[kind == BLUR] = blurred(images[kind == BLUR])
    labels[kind == LABEL] = (labels[kind == LABEL] + random.integers(1, 10, 60)) % 10
    chosen = random.choice(500, 30, replace=False)
    images[kind == COPY], labels[kind == COPY] = train.read(chosen), train.labels[chosen]
    folder = tmp_path_factory.mktemp("samples")
    np.save(folder / "kind.npy", kind)
    return write(folder / "images", images, labels, shard_size=250), kind, chosen


@pytest.fixture(scope="module")
def score(digits):
    def run(report=None, source=digits[0], **options):
        config = SamplesConfig(**{"synthetic": str(source.path), "device": "cpu", **options})
        with Ranks("cpu") as ranks:
            return samples_result(config, ranks, report)

    return run


@pytest.fixture(scope="module")
def result(digits, score):
    """All scores but the discriminator's."""
    kinds = digits[0].path.parent / "kind.npy"
    return score(scores="memorization, density,confidence", groups=str(kinds))


def column(source, name):
    return np.load(source.path / "scores" / f"{name}.npy")


def area(values, kind, corrupted):
    """The probability that a clean image has a higher value than a corrupted one (the area under the ROC curve)."""
    low, high = values[kind == corrupted], values[kind == CLEAN]
    return ((low[:, None] < high).mean() + 0.5 * (low[:, None] == high).mean()).item()


def flat(images):
    return torch.from_numpy(images.read(np.arange(len(images)))).flatten(1).double() / 255


def test_density_by_its_definition(digits, result):
    features = load_features(None, (8, 8, 1), CPU)
    real, images = (features.compute(s).double() for s in (open_images("digits"), digits[0]))
    pairs = torch.cdist(images, real)
    own = torch.cdist(real, real).sort(1).values[:, 5]  # the first is itself
    assert np.allclose(column(digits[0], "density_distance"), pairs.sort(1).values[:, 4], rtol=1e-5)
    assert (column(digits[0], "density_count") == (pairs < own).sum(1).numpy()).mean() > 0.995  # cdist rounds
    assert result["metrics"]["in_manifold"]["value"] == (column(digits[0], "density_count") > 0).mean()


def test_confidence_by_its_definition(digits, result):
    model, description = load_classifier(DIGITS_CLASSIFIER, CPU)
    images = digits[0]
    with torch.no_grad():
        probability = model(to_unit(torch.from_numpy(images.read(np.arange(600))), CPU)).double().softmax(1).numpy()
    assert np.allclose(column(images, "confidence"), probability[np.arange(600), images.labels], atol=1e-5)
    assert np.allclose(column(images, "confidence_max"), probability.max(1), atol=1e-5)
    assert (column(images, "predicted") == probability.argmax(1)).mean() > 0.995
    assert result["metrics"]["label_agreement"]["value"] == (column(images, "predicted") == images.labels).mean()
    assert result["scores"]["confidence"]["facts"]["classifier"] == description["sha256"]


def test_memorization_by_its_definition(digits, result):
    images, kind, chosen = digits
    pairs = torch.cdist(flat(images), flat(open_images("digits")))
    assert np.allclose(column(images, "nearest_distance"), pairs.amin(1), atol=1e-6)
    assert column(images, "nearest_train")[kind == COPY].tolist() == chosen.tolist()
    assert result["metrics"]["memorized"]["value"] == (column(images, "memorization_p") <= np.float32(0.01)).mean()


def test_planted_copies_are_flagged_and_others_at_the_null_rate(digits, result):
    images, kind, _ = digits
    flagged = column(images, "memorization_p") <= np.float32(0.01)
    assert flagged[kind == COPY].all()
    new = flagged[(kind == CLEAN) | (kind == LABEL)]
    assert new.mean() < 0.01 + 3 * np.sqrt(0.01 * 0.99 * (1 / 500 + 1 / len(new)))
    group = result["groups"]["group"]
    assert group[str(COPY)]["memorized"]["value"] == 1 and group[str(CLEAN)]["memorized"]["value"] < 0.03
    assert result["scores"]["memorization"]["notes"]["null_share"] == 0.01


def test_corrupted_images_rank_low(digits, result):
    images, kind, _ = digits
    density, confidence = -column(images, "density_distance"), column(images, "confidence")
    assert area(density, kind, NOISE) > 0.8 and area(density, kind, BLUR) > 0.8
    assert area(confidence, kind, NOISE) > 0.7 and area(confidence, kind, BLUR) > 0.7
    assert area(confidence, kind, LABEL) > 0.97 and abs(area(density, kind, LABEL) - 0.5) < 0.15
    counts = column(images, "density_count")
    assert area(counts, kind, NOISE) > 0.8 and area(counts, kind, BLUR) > 0.8


def test_tables_per_class_and_group(digits, result):
    images, kind, _ = digits
    assert list(result["groups"]) == ["class", "group"]
    for name, values in (("class", images.labels), ("group", kind)):
        for number in np.unique(values):
            found, here = result["groups"][name][str(number)], values == number
            assert found["confidence"]["count"] == here.sum()
            assert found["confidence"]["value"] == pytest.approx(
                column(images, "confidence")[here].astype(float).mean()
            )
            assert found["in_manifold"]["value"] == (column(images, "density_count")[here] > 0).mean()
    rows = table(result)
    assert rows[0][:2] == ["group", "images"] and [row[0] for row in rows[1:3]] == ["all", "class 0"]
    assert len(rows) == 2 + 10 + 5 and {len(row) for row in rows} == {len(rows[0])}
    assert rows[-1][rows[0].index("memorized")] == "100.0%"


def test_the_result_is_json_and_says_what_it_is_of(digits, result):
    text = json.loads(json.dumps(result, allow_nan=False))
    assert text["command"] == "score samples" and set(text["inputs"]) == {
        "synthetic",
        "real",
        "train_set",
        "classifier",
    } - {"train_set"}
    assert text["inputs"]["synthetic"]["sha256"] == digits[0].fingerprint()
    manifest = json.loads((digits[0].path / "scores" / "scores.json").read_text())
    for name, score in text["scores"].items():
        assert manifest["scores"][name]["facts"] == score["facts"]
        assert score["sha256"] == {k: v["sha256"] for k, v in manifest["scores"][name]["files"].items()}


def test_neither_chunks_nor_batches_nor_threads_change_the_numbers(digits, score, result, tmp_path, monkeypatch):
    monkeypatch.setattr(samples, "_CHUNK", 250)
    torch.set_num_threads(2)
    score(scores="density,confidence,memorization", scores_folder=str(tmp_path / "other"), batch_size=50)
    torch.set_num_threads(1)
    for path in sorted((digits[0].path / "scores").glob("*.npy")):
        if not path.stem.startswith("discriminator"):
            one, other = np.load(path), np.load(tmp_path / "other" / path.name)
            assert one.dtype == other.dtype and np.allclose(one, other, rtol=1e-4, atol=1e-6), path.name


def test_finished_scores_are_kept_while_their_facts_are_the_same(digits, score, tmp_path, monkeypatch):
    calls = []
    whole = samples._make
    monkeypatch.setattr(samples, "_make", lambda scorer, *rest: calls.append(scorer.name) or whole(scorer, *rest))
    folder = str(tmp_path / "scores")
    both = {"scores": "density,memorization", "scores_folder": folder}

    def made(**options):
        calls.clear()
        result = score(**{**both, **options})
        assert [name for name, entry in result["scores"].items() if entry["made"]] == calls
        return calls[:]

    assert made() == ["density", "memorization"]
    assert made() == [] and made(batch_size=7, seed=3, eps=0.3) == []
    assert made(null_share=0.05) == ["memorization"]
    assert made(null_share=0.05, k=4) == ["density", "memorization"]
    assert made(null_share=0.05, k=4, features="pixels") == ["density"]
    assert made(null_share=0.05, k=4, features="pixels", real="digits:test", train_set="digits") == ["density"]
    (tmp_path / "scores" / "nearest_ratio.npy").unlink()
    assert made(null_share=0.05, k=4, features="pixels", real="digits:test", train_set="digits") == ["memorization"]


def test_an_interruption_keeps_what_is_finished(digits, score, tmp_path):
    def stop(progress):
        if progress.score == "memorization":
            raise KeyboardInterrupt

    options = {"scores": "density,memorization", "scores_folder": str(tmp_path / "scores")}
    with pytest.raises(KeyboardInterrupt):
        score(stop, **options)
    assert {path.name for path in (tmp_path / "scores").iterdir()} == {
        "density_count.npy", "density_distance.npy", "scores.json",
    }  # fmt: skip
    assert [name for name, entry in score(**options)["scores"].items() if entry["made"]] == ["memorization"]


def test_images_without_labels(digits, score, tmp_path):
    plain = write(tmp_path / "plain", digits[0].read(np.arange(40)), None)
    result = score(source=plain, scores="confidence,density")
    assert result["groups"] == {} and "confidence" not in result["metrics"]
    assert result["metrics"]["confidence_max"]["count"] == 40
    assert sorted(path.stem for path in (plain.path / "scores").glob("c*.npy")) == ["confidence_max"]
    assert (column(plain, "predicted") == column(digits[0], "predicted")[:40]).mean() > 0.97


# The discriminator's score.


@pytest.fixture(scope="module")
def judged(tmp_path_factory, score):
    """Half of 400 training digits are blurred; the discriminators see the other real digits, and no test has more steps."""
    test = open_images("digits:test")
    images = test.read(np.arange(400))
    bad = np.arange(400) % 2 == 1
    images[bad] = blurred(images[bad])
    folder = tmp_path_factory.mktemp("judged")
    source = write(folder / "images", images, test.labels[:400])
    return source, bad, score(source=source, scores="discriminator", **JUDGE)


JUDGE = {"eps": 0.05, "discriminator_steps": 40, "attack_steps": 3}


def test_discriminators_rank_blurred_images_low(judged):
    source, bad, result = judged
    for name in ("discriminator", "discriminator_clean"):
        assert area(column(source, name), np.where(bad, BLUR, CLEAN), BLUR) > 0.75
    assert (column(source, "discriminator") <= column(source, "discriminator_clean")).all()
    assert result["metrics"]["looks_real"]["value"] == (column(source, "discriminator") > 0).mean()


def test_no_image_is_scored_by_a_network_that_trained_on_it(judged, score, tmp_path, monkeypatch):
    source = judged[0]
    trained, asked = [], []
    train, margins = image_scores.train_discriminator, image_scores._Discriminator._margins

    def spy_train(sets, *rest, **more):
        seen = [s.numpy().reshape(len(s), -1) for s in (sets.synthetic, sets.synthetic_validation)]
        trained.append({row.tobytes() for row in np.concatenate(seen)})
        return train(sets, *rest, **more)

    def spy_margins(self, batch, half):
        asked.append((half, batch.images))
        return margins(self, batch, half)

    monkeypatch.setattr(image_scores, "train_discriminator", spy_train)
    monkeypatch.setattr(image_scores._Discriminator, "_margins", spy_margins)
    score(source=source, scores="discriminator", scores_folder=str(tmp_path), **{**JUDGE, "discriminator_steps": 6})
    keys = [image.tobytes() for image in source.read(np.arange(400))]
    assert (
        len(trained) == 4 and trained[0] == trained[1] and trained[2] == trained[3]
    )  # without an attack, then with one
    assert not trained[0] & trained[2] and trained[0] | trained[2] == set(keys)
    scored = np.zeros(400, int)
    for half, images in asked:
        pixels = (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1)
        found = [image.numpy().tobytes() for image in pixels.contiguous()]
        assert not set(found) & trained[2 * half]
        scored[[keys.index(key) for key in found]] += 1
    assert (scored >= 1).all()


def test_the_networks_of_both_halves_speak_alike(judged):
    source, _, result = judged
    order = np.random.default_rng([0, image_scores._FOLD_STREAM]).permutation(400)
    parts = [column(source, "discriminator")[half] for half in np.array_split(order, 2)]
    medians, spreads = zip(*((np.median(p), np.subtract(*np.quantile(p, (0.75, 0.25)))) for p in parts), strict=True)
    assert medians[0] == pytest.approx(medians[1], abs=1e-4) and spreads[0] == pytest.approx(spreads[1], rel=1e-3)
    halves = result["scores"]["discriminator"]["notes"]["halves"]
    assert len(halves) == 2 and all(half["validation_images"] == 80 for half in halves)


def test_trained_discriminators_survive_an_interruption(judged, score, tmp_path, monkeypatch):
    source = judged[0]
    options = {
        "source": source,
        "scores": "discriminator",
        "scores_folder": str(tmp_path),
        **JUDGE,
        "discriminator_steps": 1,
        "attack_steps": 1,
    }

    def stop(progress):
        if progress.doing == "scoring":
            raise KeyboardInterrupt

    whole = score(**{**options, "scores_folder": str(tmp_path / "whole")})
    with pytest.raises(KeyboardInterrupt):
        score(stop, **options)
    with monkeypatch.context() as patch:
        patch.setattr(image_scores, "train_discriminator", None)
        assert score(**options)["scores"]["discriminator"]["sha256"] == whole["scores"]["discriminator"]["sha256"]
    assert not list(tmp_path.glob("*.safetensors"))
    with pytest.raises(KeyboardInterrupt):
        score(stop, **{**options, "seed": 1})
    trained = []
    train = image_scores.train_discriminator
    monkeypatch.setattr(image_scores, "train_discriminator", lambda *a, **k: trained.append(1) or train(*a, **k))
    score(**{**options, "seed": 2})  # those of another seed are not taken
    assert len(trained) == 4  # two halves, without an attack and with one


def test_two_ranks_leave_the_numbers_of_one(judged, score, tmp_path):
    source = write(tmp_path / "few", judged[0].read(np.arange(60)), judged[0].labels[:60])
    quick = {"eps": 0.05, "discriminator_steps": 1, "attack_steps": 1}
    score(source=source, scores_folder=str(tmp_path / "one"), **quick)
    options = [word for name, value in quick.items() for word in ("--" + name.replace("_", "-"), str(value))]
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(port), "-m", "synthfast"]
    command = [
        sys.executable,
        *launcher,
        "score",
        "samples",
        "--synthetic",
        str(source.path),
        "--device",
        "cpu",
        *options,
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.count("all ") == 1 and ran.stdout.count("the scores of each image") == 1
    names = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert names == sorted(path.name for path in (source.path / "scores").iterdir()) and len(names) == 12
    for path in (tmp_path / "one").glob("*.npy"):
        assert np.allclose(np.load(path), np.load(source.path / "scores" / path.name), rtol=1e-4, atol=1e-5), path.name


def test_a_discriminator_at_chance_is_a_warning(judged, score, tmp_path):
    blind = {**JUDGE, "eps": 3.0, "discriminator_steps": 2}
    result = score(source=judged[0], scores="discriminator", scores_folder=str(tmp_path), **blind)
    assert len(result["warnings"]) == 1
    assert (
        result["warnings"][0].startswith("discriminator: robust accuracy ") and "lower --eps" in result["warnings"][0]
    )


def test_the_default_radius_grows_with_the_images():
    assert image_scores.default_radius((8, 8, 1), "l2") == pytest.approx(image_scores.L2_RADIUS)
    assert image_scores.default_radius((32, 32, 3), "l2") == pytest.approx(image_scores.L2_RADIUS * 48**0.5)
    assert image_scores.default_radius((32, 32, 3), "linf") == 4 / 255


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"synthetic": None}, "--synthetic: expected a folder of synthetic shards, found none; give one"),
        ({"scores": "density,beauty"}, "--scores density,beauty: expected some of discriminator, .* found 'beauty'"),
        ({"scores": ""}, "--scores : expected some of"),
        ({"k": 0}, "-k 0|--k 0: expected a whole number of at least 1"),
        ({"eps": -1.0}, "--eps -1.0: expected a number of at least 0"),
        ({"null_share": 1.0}, "--null-share 1.0: expected a number between 0 and 1"),
        ({"attack_steps": -1}, "--attack-steps -1: expected a whole number of at least 0"),
        ({"discriminator_steps": 0}, "--discriminator-steps 0: expected"),
        ({"batch_size": 0}, "--batch-size 0: expected at least 1"),
        ({"seed": 2**63}, "--seed "),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(UsageError, match=f"^{message}"):
        SamplesConfig(**{"synthetic": "a", **options})


def test_options_that_do_not_fit_the_images(digits, score, tmp_path):
    cases = [
        ({"k": 500}, r"^-k 500: digits:train has 500 images, expected more; lower it$", "density"),
        ({"k": 499}, r"^-k 499: digits:train has 500 images, expected at least k \+ 2; lower it$", "memorization"),
        (
            {"null_share": 0.001},
            r"^--null-share 0\.001: 500 training images tell shares from 0\.002 on; raise it$",
            "memorization",
        ),
        ({"features": "beauty"}, r"^--features beauty: no such features", "density"),
        ({"memorization_features": "beauty"}, r"^--memorization-features beauty: no such features", "memorization"),
        (
            {"classifier": str(tmp_path / "none")},
            r"^--classifier .*none: expected a checkpoint folder, found none",
            "confidence",
        ),
        ({"groups": "groups.txt"}, r"^--groups groups\.txt: expected a \.npy", "density"),
        ({"out": str(tmp_path)}, r"^--out .*: expected a file, found a folder", "density"),
    ]
    for options, message, name in cases:
        with pytest.raises(SynthfastError, match=message):
            score(scores=name, scores_folder=str(tmp_path / "scores"), **options)
    other = write(tmp_path / "other", np.zeros((20, 9, 9, 1), np.uint8), np.zeros(20, np.int64))
    with pytest.raises(
        UsageError, match=r"^--real digits: expected images \[9, 9, 1\] like .*other, found \[8, 8, 1\]"
    ):
        score(source=other, scores="density")
    with pytest.raises(UsageError, match=r"^--train-set digits:test: expected images \[9, 9, 1\]"):
        score(source=other, scores="memorization", train_set="digits:test")
    with pytest.raises(
        UsageError, match=r"^--classifier: expected one for the confidence in images \[9, 9, 1\], found none"
    ):
        score(source=other, scores="confidence")
    with pytest.raises(
        UsageError, match=r"was trained on images \[8, 8, 1\] in 10 classes, .*other has \[9, 9, 1\] in 10"
    ):
        score(source=other, scores="confidence", classifier=str(DIGITS_CLASSIFIER))
    few = write(tmp_path / "few", np.zeros((15, 8, 8, 1), np.uint8), np.zeros(15, np.int64))
    with pytest.raises(UsageError, match=r"^--synthetic .*few: a discriminator needs at least 16 images, found 15"):
        score(source=few, scores="discriminator")
