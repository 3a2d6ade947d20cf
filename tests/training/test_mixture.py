"""Which images a classifier is trained and validated on."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from synthfast.artifacts import load_tensors
from synthfast.config import ClassifierConfig
from synthfast.data import ShardSet, open_images
from synthfast.data.loaders import open_loader
from synthfast.data.selection import write_selection
from synthfast.distributed import Ranks
from synthfast.errors import SynthfastError, UsageError
from synthfast.models.classifiers import load_classifier
from synthfast.training import mixture
from synthfast.training.batches import EpochOrder, read_batch, to_unit
from synthfast.training.mixture import WeightedOrder, open_mixture

CPU = torch.device("cpu")


@pytest.fixture
def opened(tmp_path):
    """``open_mixture`` with batches of 32, in one process."""

    def open_one(**options):
        config = ClassifierConfig(**{"out": str(tmp_path / "run"), "batch_size": 32, "device": "cpu", **options})
        with Ranks("cpu") as ranks:
            return open_mixture(config, ranks)

    return open_one


def read(data, step, positions):
    """What a loader makes of a step: uint8 [n, H, W, C] and labels."""
    return open_loader("device", [images for images, _ in data.parts], CPU).batch(data.wanted(step, positions))


def keys(images):
    """Each image as bytes."""
    return [image.tobytes() for image in images.read(np.arange(len(images)))]


@pytest.mark.parametrize("validation", [0.2, 100, 1])
def test_what_is_held_out_is_not_trained_on_and_no_test_image(opened, validation):
    digits = open_images("digits")
    data = opened(validation=validation)
    ((training, _),) = data.parts
    count = 100 if validation != 1 else 1
    assert (len(data.validation), len(training)) == (count, 500 - count)
    # An image is known by pixels and label; the digits have no two alike.
    everything = sorted(keys(digits))
    assert len(set(everything)) == 500
    assert sorted(keys(training) + keys(data.validation)) == everything
    assert not set(keys(data.validation)) & set(keys(open_images("digits:test")))
    labels = dict(zip(keys(digits), digits.labels, strict=True))
    for part in (training, data.validation):
        assert [labels[key] for key in keys(part)] == part.labels.tolist()


def test_what_is_held_out_depends_on_the_seed(opened):
    parts = [keys(opened(validation=50, seed=seed).validation) for seed in (0, 0, 1)]
    assert parts[0] == parts[1] and len(set(parts[0]) & set(parts[2])) < 25
    assert len(set(opened(validation=50).validation.labels)) == 10


def test_the_draw_of_what_is_held_out_is_no_pass_of_training():
    orders = [EpochOrder(500, 3, stream) for stream in (mixture._HELD_OUT_STREAM, 0, 1)]
    passes = {order[first : first + 500].tobytes() for order in orders for first in (0, 500, 1000)}
    assert len(passes) == 9


def test_real_images_serve_for_validation_alone_where_all_training_images_are_synthetic(opened, copies):
    data = opened(validation=30, synthetic=(copies,), fraction=1.0)
    assert [(images.name, count) for images, count in data.parts] == [(copies, 32)]
    assert (data.validation.name, len(data.validation)) == ("digits:train", 30)
    assert len(data.facts["data"]) == 2


@pytest.mark.parametrize(("validation", "count"), [(500, 500), (1000, 1000), (0.999, 500), (0.0009, 0)])
def test_a_part_that_cannot_be_held_out_is_refused(opened, validation, count):
    with pytest.raises(UsageError, match=rf"^--validation {validation:g}: {count} of the 500 images of digits:train"):
        opened(validation=validation)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_ranks_read_every_image_of_a_batch_once_and_each_its_share_of_every_part(opened, copies, ranks):
    data = opened(synthetic=(copies, copies), fraction=0.5)
    for step in (0, 7):
        whole, labels = read(data, step, np.arange(32))
        for rank in range(ranks):
            mine = np.arange(rank, 32, ranks)
            pixels, own = read(data, step, mine)
            assert torch.equal(pixels, whole[mine]) and torch.equal(own, labels[mine])
            assert [int(((mine >= a) & (mine < b)).sum()) for a, b in ((0, 16), (16, 24), (24, 32))] == [
                16 // ranks, 8 // ranks, 8 // ranks,
            ]  # fmt: skip


def test_a_batch_is_the_next_part_of_each_order(opened, copies):
    data = opened(synthetic=(copies,), fraction=0.25)
    (real, _), (synthetic, _) = data.parts
    for step in (0, 3):
        pixels, labels = read(data, step, np.arange(32))
        for images, order, rows, count in (
            (real, data.orders[0], slice(0, 24), 24),
            (synthetic, data.orders[1], slice(24, 32), 8),
        ):
            expected, expected_labels = read_batch(images, order[step * count : (step + 1) * count])
            assert torch.equal(pixels[rows], expected) and torch.equal(labels[rows], expected_labels)


def test_only_the_first_synthetic_images(opened, copies):
    data = opened(synthetic=(copies,), synthetic_n=40, fraction=1.0)
    ((images, _),) = data.parts
    assert keys(images) == keys(open_images("digits"))[:40]
    assert len(opened(synthetic=(copies,), synthetic_n=500).parts[1][0]) == 500
    with pytest.raises(UsageError, match=r"^--synthetic-n 501: .*copies holds 500 images; lower it or sample more$"):
        opened(synthetic=(copies,), synthetic_n=501)


@pytest.fixture
def unlabelled(write_shards, tmp_path):
    """A shard folder with 700 test digits and no labels."""
    return write_shards(tmp_path / "unlabelled", open_images("digits:test").read(np.arange(700)), None, classes=None)


@pytest.fixture
def labeller(fit, tmp_path):
    fit(tmp_path / "labeller", steps=40, batch_size=64)
    return str(tmp_path / "labeller")


def test_pseudo_labels_are_what_the_classifier_says(opened, copies, unlabelled, labeller, tmp_path):
    options = {"synthetic": (copies, unlabelled), "fraction": 0.5, "pseudo_labels": labeller}
    data = opened(**options)
    model, description = load_classifier(labeller, CPU)
    images = open_images(unlabelled)
    pixels, _ = read_batch(images, np.arange(len(images)))
    with torch.no_grad():
        expected = model(to_unit(pixels, CPU)).argmax(1).numpy()
    parts = [part for part, _ in data.parts]
    assert (parts[2].labels == expected).mean() > 0.995  # a near tie may fall otherwise in another batch
    assert (expected == open_images("digits:test").labels[:700]).mean() > 0.7
    assert parts[2].classes == 10 and keys(parts[2]) == keys(images)
    assert parts[1].labels.tolist() == open_images("digits").labels.tolist()  # given labels stay
    assert data.facts["pseudo_labels"] == description["sha256"]
    few = opened(**options, synthetic_n=100).parts[2][0]
    assert len(few) == 100 and few.labels.tolist() == parts[2].labels[:100].tolist()


def test_pseudo_labels_are_computed_once_and_kept(opened, unlabelled, labeller, tmp_path, monkeypatch):
    options = {"synthetic": (unlabelled,), "pseudo_labels": labeller}
    first = opened(**options).parts[1][0].labels
    (file,) = (tmp_path / "run").iterdir()
    assert load_tensors(file)["labels"].tolist() == first.tolist()
    with monkeypatch.context() as patch:
        patch.setattr(mixture, "stream", None)
        assert opened(**options).parts[1][0].labels.tolist() == first.tolist()


def test_labels_of_another_classifier_are_not_taken(opened, unlabelled, labeller, fit, tmp_path):
    first = opened(synthetic=(unlabelled,), pseudo_labels=labeller)
    fit(tmp_path / "other", steps=2, seed=3)
    second = opened(synthetic=(unlabelled,), pseudo_labels=str(tmp_path / "other"))
    assert first.facts != second.facts
    assert first.parts[1][0].labels.tolist() != second.parts[1][0].labels.tolist()


def test_pseudo_labels_that_do_not_fit(opened, copies, unlabelled, labeller, fit, write_shards, write_npz, tmp_path):
    with pytest.raises(UsageError, match=r"has no labels, training a classifier needs them; .*--pseudo-labels"):
        opened(synthetic=(unlabelled,))
    with pytest.raises(UsageError, match=r"^--pseudo-labels .*: all synthetic folders have labels; leave it out$"):
        opened(synthetic=(copies,), pseudo_labels=labeller)
    weights = str(tmp_path / "labeller" / "model.safetensors")  # a file does not tell what network it is of
    for path in (str(tmp_path / "nowhere"), weights):
        with pytest.raises(
            UsageError, match=rf"^--pseudo-labels {path}: expected the checkpoint folder of a classifier"
        ):
            opened(synthetic=(unlabelled,), pseudo_labels=path)
    with pytest.raises(SynthfastError, match="no checkpoint here"):
        opened(synthetic=(unlabelled,), pseudo_labels=str(tmp_path))
    wide = write_shards(tmp_path / "wide", np.zeros((20, 9, 9, 1), np.uint8), None, classes=None)
    with pytest.raises(UsageError, match=r"was trained on images \[8, 8, 1\], .*wide has \[9, 9, 1\]"):
        opened(synthetic=(wide,), pseudo_labels=labeller)
    fit(tmp_path / "three", dataset=write_npz(tmp_path / "set.npz"), batch_size=8)
    with pytest.raises(UsageError, match=r"unlabelled: expected images .* in 10 classes .*, found .* in 3; choose"):
        opened(synthetic=(unlabelled,), pseudo_labels=str(tmp_path / "three"))
    with pytest.raises(UsageError, match="has no labels"):  # real images are not labelled by a classifier
        opened(dataset=unlabelled, synthetic=(unlabelled,), pseudo_labels=labeller)


@pytest.fixture
def select(tmp_path):
    """A selection of a shard folder, by its name as an image source."""

    def write(folder, name, indices, weights=None):
        path = tmp_path / f"{name}.npy"
        weights = None if weights is None else np.asarray(weights, np.float32)
        write_selection(path, ShardSet(folder), np.asarray(indices), weights, {})
        return str(path)

    return write


def test_only_what_is_selected_is_read(opened, copies, select):
    digits = open_images("digits")
    odd = np.arange(1, 500, 2)
    data = opened(synthetic=(copies, copies), selection=("all", select(copies, "odd", odd)), fraction=1.0)
    whole, part = (images for images, _ in data.parts)
    assert keys(whole) == keys(digits)
    assert keys(part) == [image.tobytes() for image in digits.read(odd)]
    assert part.labels.tolist() == digits.labels[odd].tolist()
    seen = data.orders[1][0:250]
    assert sorted(seen) == list(range(250)) and type(data.orders[1]) is EpochOrder


def test_selections_are_part_of_what_a_run_was_made_with(opened, copies, select, fit, tmp_path):
    first, second = select(copies, "first", np.arange(100)), select(copies, "second", np.arange(100, 200))
    weighted = select(copies, "weighted", np.arange(100), np.linspace(0.5, 1.5, 100))
    facts = [opened(synthetic=(copies,), selection=(name,)).facts for name in (first, second, weighted)]
    assert len({fact["selected"][0] for fact in facts}) == 3
    assert "selected" not in opened(synthetic=(copies,)).facts  # so that runs made before there were selections go on
    assert "selected" not in opened(synthetic=(copies,), selection=("all",)).facts
    assert "selected" not in opened(synthetic=(copies,), selection=(first,), fraction=0.0).facts
    run = {"out": tmp_path / "classifier", "synthetic": (copies,), "fraction": 1.0}
    fit(**run, selection=(first,))
    assert fit(**run, selection=(first,)).made == 0
    (tmp_path / "first.npy").rename(tmp_path / "moved.npy")
    (tmp_path / "first.json").rename(tmp_path / "moved.json")
    assert fit(**run, selection=(str(tmp_path / "moved.npy"),)).made == 0
    for other in ((second,), (weighted,), ("all",), ()):
        with pytest.raises(
            UsageError, match=r"^--selection \(its images\).*classifier was made with .*, this command says"
        ):
            fit(**run, selection=other)


def test_synthetic_n_is_the_first_of_what_is_selected(opened, copies, select):
    weights = np.r_[np.full(10, 4.0), np.full(40, 0.25)]
    even = select(copies, "even", np.arange(0, 100, 2), weights)
    data = opened(synthetic=(copies,), selection=(even,), synthetic_n=20, fraction=1.0)
    ((images, _),) = data.parts
    assert keys(images) == keys(open_images("digits"))[:40:2]
    counts = np.bincount(data.orders[0][0 : 20 * 100], minlength=20) / 100  # 80 / 42.5 and 5 / 42.5 in a pass of 20
    assert abs(counts[:10] - 1.88).max() < 0.15 and abs(counts[10:] - 0.12).max() < 0.15
    with pytest.raises(UsageError, match=r"^--synthetic-n 51: .*even\.npy selects 50 images; lower it or select more$"):
        opened(synthetic=(copies,), selection=(even,), synthetic_n=51)


def test_images_come_in_proportion_to_their_weights():
    random = np.random.default_rng(0)
    weights = random.uniform(0.1, 3, 400).astype(np.float32)
    order = WeightedOrder(weights, seed=5, stream=1)
    expected = weights / weights.mean()
    passes = [np.bincount(order[first : first + 400], minlength=400) for first in range(0, 400 * 300, 400)]
    for counts in passes:
        assert counts.sum() == 400 and (abs(counts - expected) < 1).all()
    # A pass has the number rounded down or up, so that the mean of 300 has a standard error of at most 0.03.
    assert abs(np.mean(passes, 0) - expected).max() < 0.13
    assert abs(np.mean(passes, 0) - expected).mean() < 0.02
    # Shuffled: where an image stands in the pass says nothing of its number.
    positions = [np.corrcoef(np.arange(400), order[first : first + 400])[0, 1] for first in range(0, 4000, 400)]
    assert abs(np.mean(positions)) < 0.05
    first, second = order[0:400], order[400:800]
    assert (first != second).mean() > 0.9


def test_a_weighted_order_depends_on_seed_stream_and_position_alone():
    weights = np.linspace(0.1, 2, 50)
    whole = WeightedOrder(weights, 3)[0:500]
    again = WeightedOrder(weights, 3)
    assert again[330:347].tolist() == whole[330:347].tolist()  # as in a run that goes on
    assert again[40:60].tolist() == whole[40:60].tolist()
    for other in (WeightedOrder(weights, 4), WeightedOrder(weights, 3, 1), WeightedOrder(weights[::-1], 3)):
        assert other[0:50].tolist() != whole[:50].tolist()


@pytest.mark.parametrize("weight", [1.0, 0.3, 1e-30])
def test_equal_weights_are_the_order_without_weights(weight):
    for count in (1, 7, 1000):
        order = WeightedOrder(np.full(count, weight, np.float32), 9, 2)
        assert order[0 : 3 * count].tolist() == EpochOrder(count, 9, 2)[0 : 3 * count].tolist()


def test_batches_are_drawn_by_weight(opened, copies, select):
    heavy = select(copies, "heavy", np.arange(500), np.r_[np.full(50, 9.1), np.full(450, 0.1)])
    data = opened(synthetic=(copies,), selection=(heavy,), fraction=1.0, batch_size=50)
    first = set(keys(open_images("digits"))[:50])
    seen = [read(data, step, np.arange(50))[0] for step in range(10)]
    share = np.mean([image.tobytes() in first for pixels in seen for image in pixels.numpy()])
    assert 0.9 <= share <= 0.92


def test_pseudo_labels_of_one_selection_are_not_taken_for_another(opened, unlabelled, labeller, select):
    first, second = select(unlabelled, "first", np.arange(60)), select(unlabelled, "second", np.arange(60, 120))
    options = {"synthetic": (unlabelled,), "pseudo_labels": labeller, "fraction": 1.0}
    whole = opened(**options).parts[0][0].labels
    for name, items in ((first, slice(0, 60)), (second, slice(60, 120))):
        assert (opened(**options, selection=(name,)).parts[0][0].labels == whole[items]).mean() > 0.98


def test_selections_that_do_not_fit(opened, copies, unlabelled, select, tmp_path):
    chosen = select(copies, "chosen", np.arange(10))
    with pytest.raises(
        UsageError, match=r"^--selection .*chosen\.npy: expected one for each --synthetic folder, of which"
    ):
        opened(synthetic=(copies, copies), selection=(chosen,))
    with pytest.raises(UsageError, match=r"of which there are 0, found 1; give as many, all for a whole folder$"):
        opened(selection=(chosen,))
    with pytest.raises(
        UsageError, match=rf"^{chosen}: was selected from .*copies .*, which is not what .*unlabelled holds"
    ):
        opened(synthetic=(unlabelled,), selection=(chosen,))
    with pytest.raises(SynthfastError, match=r"nowhere\.json: no selection's manifest here; check the path$"):
        opened(synthetic=(copies,), selection=(str(tmp_path / "nowhere.npy"),))


@pytest.mark.parametrize(
    ("weights", "batch", "shares"),
    [
        ((), 32, [11, 11, 10]),
        ((1.0, 1.0, 1.0), 32, [11, 11, 10]),
        ((0.5, 0.25, 0.25), 32, [16, 8, 8]),
        ((3.0, 1.0, 1.0), 32, [19, 7, 6]),  # 19.2, 6.4, 6.4: the first of equal remainders gets what is left
        ((0.1, 0.2, 0.7), 10, [1, 2, 7]),
        ((1.7e308, 1.7e308, 1.7e307), 21, [10, 10, 1]),
        ((1e-300, 2e-300, 1e-300), 4, [1, 2, 1]),
    ],
)
def test_folders_share_the_synthetic_part_by_weight(opened, copies, weights, batch, shares):
    data = opened(synthetic=(copies,) * 3, synthetic_weight=weights, fraction=1.0, batch_size=batch)
    assert [count for _, count in data.parts] == shares
    wanted = data.wanted(3, np.arange(batch))
    assert [len(items) for items in wanted.items] == shares and wanted.index.tolist() == [*range(3 * batch, 4 * batch)]


def test_weights_share_what_is_not_real(opened, copies):
    data = opened(synthetic=(copies, copies), synthetic_weight=(3.0, 1.0), fraction=0.25)
    assert [count for _, count in data.parts] == [24, 6, 2]
    assert [count for _, count in opened(synthetic=(copies,), synthetic_weight=(3.0,), fraction=0.0).parts] == [32]


def test_a_folder_without_a_share_is_refused(opened, copies, write_shards, tmp_path):
    digits = open_images("digits")
    other = write_shards(tmp_path / "other", digits.read(np.arange(20)), digits.labels[:20])
    with pytest.raises(
        UsageError,
        match=r"^--batch-size 32: 2 synthetic folders share 16 images a batch, expected at least one each, found none of "
        r".*other; enlarge it or the folder's --synthetic-weight$",
    ):
        opened(synthetic=(copies, other), synthetic_weight=(1.0, 0.01))


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        (
            (1.0,),
            r"^--synthetic-weight 1: expected one for each --synthetic folder, of which there are 2, found 1; give as",
        ),
        ((1.0, 2.0, 3.5), r"^--synthetic-weight 1 2 3\.5: expected one for each .* are 2, found 3; give as many$"),
        ((1.0, 0.0), r"^--synthetic-weight 0\.0: expected a positive number$"),
        ((1.0, -1.0), r"^--synthetic-weight -1\.0: expected a positive number$"),
        ((1.0, float("inf")), r"^--synthetic-weight inf: expected a positive number$"),
    ],
)
def test_weights_that_are_none(opened, copies, weights, words):
    with pytest.raises(UsageError, match=words):
        opened(synthetic=(copies, copies), synthetic_weight=weights)


def test_shares_are_part_of_what_a_run_was_made_with(opened, copies, fit, tmp_path):
    two = {"synthetic": (copies, copies), "fraction": 1.0}
    assert "synthetic_shares" not in opened(**two).facts  # so that runs made before there were weights go on
    assert "synthetic_shares" not in opened(**two, synthetic_weight=(7.0, 7.0)).facts
    assert opened(**two, synthetic_weight=(1.0, 3.0)).facts["synthetic_shares"] == [8, 24]
    fit(tmp_path / "run", **two)
    assert fit(tmp_path / "run", **two, synthetic_weight=(2.0, 2.0)).made == 0
    with pytest.raises(
        UsageError, match=r"^--synthetic-weight \(images of each folder in a batch\): .* was made with "
    ):
        fit(tmp_path / "run", **two, synthetic_weight=(1.0, 3.0))
    fit(tmp_path / "other", **two, synthetic_weight=(1.0, 3.0))
    assert fit(tmp_path / "other", **two, synthetic_weight=(10.0, 30.0)).made == 0
