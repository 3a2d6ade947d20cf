"""Classifiers from real images, synthetic ones and both: what a batch holds, what is learned, what is refused."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from synthfast import ops
from synthfast.artifacts import load_checkpoint, load_tensors
from synthfast.attacks.pgd import PGD
from synthfast.config import ClassifierConfig
from synthfast.data import open_images
from synthfast.distributed import Ranks
from synthfast.errors import SynthfastError, UsageError
from synthfast.models.classifiers import load_classifier
from synthfast.training import classifier, mixture, train_classifier
from synthfast.training.batches import read_batch, to_unit
from synthfast.training.state import STATE_FILE

CPU = torch.device("cpu")


def first_test_images(count=1297):
    digits = open_images("digits:test")
    pixels, labels = read_batch(digits, np.arange(count))
    return to_unit(pixels, CPU), labels


def accuracy(folder):
    """On the test digits."""
    model, _ = load_classifier(folder, CPU)
    images, labels = first_test_images()
    with torch.no_grad():
        return float((model(images).argmax(1) == labels).float().mean())


def robust_accuracy(folder, eps, norm="linf", count=150):
    """On the first test digits, under 10 steps of PGD."""
    model, _ = load_classifier(folder, CPU)
    return 1 - float(
        PGD(norm, eps, steps=10, step_size=eps / 4).run(model, *first_test_images(count)).fooled.float().mean()
    )


@pytest.fixture
def batches(monkeypatch):
    """What each step reads: a list of (name of the set, items)."""
    seen = []
    real = mixture.Mixture.wanted

    def wanted(data, step, positions):
        found = real(data, step, positions)
        seen.extend((images.name, items) for (images, _), items in zip(data.parts, found.items, strict=True))
        return found

    monkeypatch.setattr(mixture.Mixture, "wanted", wanted)
    return seen


def test_it_learns_the_digits(fit, tmp_path):
    reports = []
    result = fit(tmp_path, reports.append, steps=60, batch_size=128)
    assert (result.steps, result.made) == (60, 60) and result.loss < 0.3
    assert reports[-1].step == 60 and reports[-1].loss == result.loss and reports[-1].images_per_step == 128
    assert reports[-1].accuracy > 0.9 and reports[-1].robust_accuracy is None
    assert accuracy(tmp_path) > 0.95


def test_synthetic_images_alone_teach_it_too(fit, tmp_path, copies):
    """The real images are not even looked for."""
    fit(tmp_path / "run", synthetic=(copies,), fraction=1.0, steps=40, batch_size=128, dataset="not there")
    assert accuracy(tmp_path / "run") > 0.9


def test_adversarial_training_makes_it_robust(fit, tmp_path):
    """All of them are much better under their attack than standard training is."""
    options = {"steps": 70, "lr": 0.05}
    fit(tmp_path / "standard", **options)
    for method, norm, eps in (("pgd", "linf", 0.15), ("trades", "linf", 0.15), ("pgd", "l2", 0.8)):
        reports, folder = [], tmp_path / f"{method}-{norm}"
        fit(folder, reports.append, method=method, norm=norm, eps=eps, step_size=eps / 2, **options)
        robust, standard = (robust_accuracy(path, eps, norm) for path in (folder, tmp_path / "standard"))
        assert robust > standard + 0.15 and robust > 0.4, (method, norm, robust, standard)
        assert accuracy(folder) > 0.85
        assert reports[-1].robust_accuracy > 0.4
        assert (reports[-1].accuracy is None) is (method == "pgd")


@pytest.mark.parametrize(
    ("fraction", "real", "synthetic"), [(None, 64, 64), (0.7, 38, 90), (0.004, 127, 1), (1.0, 0, 128), (0.0, 128, 0)]
)
def test_every_batch_holds_its_share_of_synthetic_images(fit, tmp_path, copies, batches, fraction, real, synthetic):
    fit(tmp_path / "run", synthetic=(copies,), fraction=fraction, steps=2, batch_size=128)
    expected = [(name, share) for name, share in (("digits:train", real), (copies, synthetic)) if share]
    assert [(name, len(items)) for name, items in batches] == expected * 2


def test_every_set_is_read_in_passes_of_its_own(fit, tmp_path, write_shards, batches):
    digits = open_images("digits")
    few = write_shards(tmp_path / "few", digits.read(np.arange(20)), digits.labels[:20])
    fit(tmp_path / "run", synthetic=(few,), fraction=0.1, batch_size=100, steps=4)
    real = np.concatenate([items for name, items in batches if name == "digits:train"])
    synthetic = np.concatenate([items for name, items in batches if name == few])
    assert len(set(real)) == len(real) == 360  # no image twice within the first pass
    assert sorted(synthetic[:20]) == sorted(synthetic[20:]) == list(range(20))


def test_every_set_has_a_shuffled_order_of_its_own(fit, tmp_path, copies, batches):
    for seed in (0, 1):
        fit(tmp_path / f"run-{seed}", synthetic=(copies, copies), fraction=1.0, steps=1, seed=seed)
    orders = [tuple(items) for _, items in batches]
    assert len(orders) == len(set(orders)) == 4 and all(list(items) != sorted(items) for items in orders)


def test_several_folders_share_the_synthetic_part(fit, tmp_path, copies, batches):
    fit(tmp_path / "run", synthetic=(copies, copies, copies), fraction=0.5, steps=1, batch_size=128)
    assert [len(items) for _, items in batches] == [64, 22, 21, 21]
    with pytest.raises(UsageError, match=r"^--batch-size 4: 3 synthetic folders share 2 images a batch"):
        fit(tmp_path / "run", synthetic=(copies, copies, copies), fraction=0.5, batch_size=4)


@pytest.mark.parametrize(("fraction", "count"), [(0.1, 0), (0.9, 4)])
def test_a_fraction_that_the_batch_cannot_hold_is_refused(fit, tmp_path, copies, fraction, count):
    with pytest.raises(UsageError, match=rf"^--fraction {fraction}: {count} of 4 images a batch would be synthetic"):
        fit(tmp_path / "run", synthetic=(copies,), fraction=fraction, batch_size=4)
    assert not (tmp_path / "run").exists()


def test_equal_seeds_give_equal_weights_and_the_callers_random_state_stays(fit, tmp_path):
    weights = {}
    for name, seed in (("a", 1), ("b", 1), ("c", 2), ("d", -1)):
        torch.manual_seed(hash(name) % 1000)
        before = torch.get_rng_state()
        fit(tmp_path / name, seed=seed, method="pgd", cutmix=0.5)
        assert torch.equal(torch.get_rng_state(), before)
        weights[name] = (tmp_path / name / "model.safetensors").read_bytes()
    assert weights["a"] == weights["b"] and len(set(weights.values())) == 3


@pytest.mark.parametrize(
    "options",
    [
        {"method": "pgd"},
        {"method": "trades"},
        {"method": "pgd", "norm": "l2"},
        {"flip": True},
        {"crop": 2},
        {"cutmix": 1.0},
        {"label_smoothing": 0.1},
        {"ema": 0.9},
        {"momentum": 0.5},
        {"weight_decay": 0.1},
        {"schedule": "onecycle"},
        {"warmup": 0.9},
        {"precision": "bf16"},
        {"validation": 0.5},
        {"model": "small-cnn-swish"},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_every_option_changes_the_weights(fit, tmp_path, options):
    fit(tmp_path / "plain")
    fit(tmp_path / "other", **options)
    plain, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("plain", "other"))
    assert plain != other


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("pgd", {"eps": 0.2}),
        ("pgd", {"attack_steps": 3}),
        ("pgd", {"step_size": 0.02}),
        ("trades", {"beta": 1.0}),
        ("trades", {"norm": "l2"}),
    ],
)
def test_every_option_of_an_attack_changes_the_weights(fit, tmp_path, method, options):
    fit(tmp_path / "plain", method=method)
    fit(tmp_path / "other", method=method, **options)
    plain, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("plain", "other"))
    assert plain != other


def test_the_attack_sees_the_network_in_evaluation_mode_and_the_training_does_not(fit, tmp_path, monkeypatch):
    """Under attack, batch norm uses its running statistics and leaves them alone."""
    real, calls = classifier.objectives.pgd_images, []

    def watched(attacked, x, targets, *arguments):
        with torch.no_grad():
            pair, alone = attacked(x[:2]), attacked(x[:1])
        calls.append(float((pair[:1] - alone).abs().max()))
        return real(attacked, x, targets, *arguments)

    monkeypatch.setattr(classifier.objectives, "pgd_images", watched)
    fit(tmp_path, method="pgd", steps=4)
    assert len(calls) == 4 and max(calls) < 1e-4
    state = load_tensors(tmp_path / STATE_FILE)
    counts = [int(value) for key, value in state.items() if key.startswith("model.") and "num_batches" in key]
    assert counts and set(counts) == {4}


def test_the_attack_follows_the_weights(fit, tmp_path, monkeypatch):
    real, logits = classifier.objectives.pgd_images, []

    def watched(attacked, x, *arguments):
        with torch.no_grad():
            logits.append(attacked(torch.zeros_like(x[:1])))
        return real(attacked, x, *arguments)

    monkeypatch.setattr(classifier.objectives, "pgd_images", watched)
    fit(tmp_path, method="pgd", steps=3)
    assert not torch.equal(logits[0], logits[1]) and not torch.equal(logits[1], logits[2])


def test_the_average_is_saved_with_the_statistics_of_the_last_step(fit, tmp_path):
    fit(tmp_path, ema=0.9, steps=5)
    state, (_, weights) = load_tensors(tmp_path / STATE_FILE), load_checkpoint(tmp_path, "classifier")
    assert all(torch.equal(state[f"ema.{key}"], value) for key, value in weights.items())
    assert not torch.equal(state["ema.head.weight"], state["model.head.weight"])
    assert all(torch.equal(state[f"model.{key}"], value) for key, value in weights.items() if "running_" in key)


def test_biases_and_batch_norms_do_not_decay(fit, tmp_path, monkeypatch):
    made = []
    real = classifier._optimizer
    monkeypatch.setattr(classifier, "_optimizer", lambda *a: (made.append((a[0], real(*a))), made[-1][1])[1])
    fit(tmp_path, weight_decay=0.3, momentum=0.8, steps=1)
    ((model, optimizer),) = made
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    for name, module in model.named_modules():
        for own, parameter in module.named_parameters(recurse=False):
            free = own == "bias" or isinstance(module, torch.nn.BatchNorm2d)
            assert decay.pop(id(parameter)) == (0.0 if free else 0.3), f"{name}.{own}"
    assert not decay
    assert all(group["nesterov"] and group["momentum"] == 0.8 for group in optimizer.param_groups)


def test_bfloat16_keeps_its_weights_in_float32(fit, tmp_path):
    for method in ("standard", "pgd", "trades"):
        assert math.isfinite(fit(tmp_path / method, precision="bf16", method=method).loss)
        config, weights = load_checkpoint(tmp_path / method, "classifier")
        assert config["training"]["precision"] == "bf16"
        assert {tensor.dtype for tensor in weights.values() if tensor.is_floating_point()} == {torch.float32}


def test_compiled_training_gives_the_same_numbers_up_to_rounding(fit, tmp_path, monkeypatch):
    """The compiler itself is torch's matter: here it is one that runs the network as it is, and counts."""
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda network: (compiled.append(network), network)[1])
    fit(tmp_path / "plain", method="trades")
    fit(tmp_path / "compiled", method="trades", compile=True)
    assert len(compiled) == 1
    plain, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("plain", "compiled"))
    assert plain == other


def test_the_checkpoint_says_what_it_was_made_from(fit, tmp_path, copies):
    fit(tmp_path / "run", synthetic=(copies,), fraction=0.25, method="trades")
    config, _ = load_checkpoint(tmp_path / "run", "classifier")
    assert (config["shape"], config["classes"], config["name"]) == ([8, 8, 1], 10, "small-cnn")
    training = config["training"]
    assert training["data"] == [open_images(name).fingerprint() for name in ("digits", copies)]
    assert (training["synthetic"], training["fraction"], training["steps_done"]) == ([copies], 0.25, 3)
    resolved = {"model": "small-cnn", "eps": 8 / 255, "step_size": 2 / 255, "beta": 6.0, "warmup": 0.1, "crop": 0}
    assert {**resolved, "flip": False, "precision": "fp32", "pseudo_labels": None}.items() <= training.items()
    assert config["validation"] is None


def test_defaults_that_depend_on_other_settings(fit, tmp_path, write_npz):
    source = write_npz(tmp_path / "set.npz", (32, 32, 3))
    settings = {}
    for name, options in (
        ("colour", {"dataset": source, "model": "small-cnn", "batch_size": 4, "steps": 1}),
        ("l2", {"method": "pgd", "norm": "l2"}),
        ("onecycle", {"schedule": "onecycle"}),
    ):
        fit(tmp_path / name, **options)
        settings[name] = load_checkpoint(tmp_path / name, "classifier")[0]["training"]
    assert settings["colour"]["crop"] == 4 and settings["colour"]["flip"] is False
    assert (settings["l2"]["eps"], settings["l2"]["step_size"], settings["l2"]["beta"]) == (0.5, 0.125, None)
    assert (settings["onecycle"]["warmup"], settings["onecycle"]["eps"]) == (0.3, None)


def test_the_data_are_opened_as_the_options_say(fit, tmp_path, monkeypatch):
    calls = []

    def opened(source, **options):
        calls.append((source, str(options["data_dir"]), options["download"], options["image_size"]))
        return open_images("digits")

    monkeypatch.setattr("synthfast.training.loop.open_images", opened)
    fit(tmp_path, dataset="cifar10", data_dir="there", download=True, image_size=32)
    assert calls == [("cifar10", "there", True, 32)]
    assert load_checkpoint(tmp_path, "classifier")[0]["training"]["flip"] is True  # the default of photographs


def test_a_larger_network_for_larger_images(fit, tmp_path, write_npz):
    source = write_npz(tmp_path / "set.npz", (20, 20, 3))
    fit(tmp_path / "run", dataset=source, batch_size=4, steps=1)
    model, config = load_classifier(tmp_path / "run", CPU)
    assert config["model"]["name"] == config["training"]["model"] == "preact-resnet-18"
    assert model(torch.rand(2, 3, 20, 20)).shape == (2, 3)


def test_augmented_images_are_what_is_learned_from(fit, tmp_path, monkeypatch):
    """Each image is keyed by its position in the run."""
    seen = []
    real = ops.gather_augment

    def watched(images, items, index, seed, **options):
        seen.append((index.tolist(), seed, options))
        return real(images, items, index, seed, **options)

    monkeypatch.setattr(ops, "gather_augment", watched)
    fit(tmp_path, crop=2, flip=True, steps=2, seed=4)
    options = {"padding": 2, "flip": True}
    assert seen == [([*range(32)], 4, options), ([*range(32, 64)], 4, options)]


def test_the_checkpoint_that_does_best_on_held_out_images_is_kept(fit, tmp_path, monkeypatch):
    """The later one of equals; what is saved is that step's network."""
    scores = iter([0.5, 0.75, 0.75, 0.6])
    monkeypatch.setattr(classifier._Job, "_validate", lambda job, images: next(scores))
    result = fit(tmp_path / "best", steps=8, checkpoint_every=2, validation=100)
    assert (result.validation, result.best_step) == (0.75, 6)
    config, weights = load_checkpoint(tmp_path / "best", "classifier")
    assert config["training"]["steps_done"] == 6 and config["validation"] == {"accuracy": 0.75, "count": 100}
    state = load_tensors(tmp_path / "best" / STATE_FILE)
    assert not torch.equal(state["model.head.weight"], weights["head.weight"])


@pytest.mark.parametrize("method", ["standard", "pgd"])
def test_validation_is_accuracy_on_held_out_images(fit, tmp_path, method):
    result = fit(tmp_path, steps=40, validation=150, method=method, batch_size=64, ema=0.8)
    measure = "accuracy" if method == "standard" else "robust_accuracy"
    config, _ = load_checkpoint(tmp_path, "classifier")
    assert config["validation"] == {measure: result.validation, "count": 150} and result.best_step == 40
    settings = ClassifierConfig(out=str(tmp_path), validation=150, batch_size=64, device="cpu")
    with Ranks("cpu") as ranks:
        held_out = mixture.open_mixture(settings, ranks).validation
    pixels, labels = read_batch(held_out, np.arange(150))
    model, _ = load_classifier(tmp_path, CPU)
    x = to_unit(pixels, CPU)
    if method == "standard":
        expected = float((model(x).argmax(1) == labels).float().mean())
    else:
        attack = PGD("linf", 8 / 255, steps=4, step_size=2 / 255)
        expected = 1 - float(attack.run(model, x, labels, torch.arange(150)).fooled.float().mean())
    assert result.validation == pytest.approx(expected, abs=0.011)  # one image may fall otherwise in another batch
    assert 0.5 < result.validation < 1


def test_sets_that_do_not_fit_are_refused(fit, tmp_path, write_shards):
    random = np.random.default_rng(0)
    other_size = random.integers(0, 256, (20, 9, 9, 1), dtype=np.uint8)
    digits_size = other_size[:, :8, :8]
    labels = np.arange(20) % 10
    wide = write_shards(tmp_path / "wide", other_size, labels)
    few = write_shards(tmp_path / "few", digits_size, labels % 5, classes=5)
    unlabelled = write_shards(tmp_path / "unlabelled", digits_size, None, classes=None)
    for folder, words in (
        (wide, r"found \[9, 9, 1\] in 10"),
        (few, "in 5; choose sets"),
        (unlabelled, "has no labels"),
    ):
        with pytest.raises(UsageError, match=words) as caught:
            fit(tmp_path / "run", synthetic=(folder,))
        assert str(caught.value).startswith(f"{folder}: ") and "\n" not in str(caught.value)
    with pytest.raises(UsageError, match="has no labels"):
        fit(tmp_path / "run", dataset=unlabelled)
    with pytest.raises(SynthfastError, match="no shard manifest here"):
        fit(tmp_path / "run", synthetic=(str(tmp_path / "nowhere"),))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("ranks", [3, 64])
def test_a_batch_that_the_ranks_cannot_share_is_refused(tmp_path, ranks):
    alone = Ranks("cpu")
    alone.world_size = ranks
    with pytest.raises(UsageError, match=f"^--batch-size 32: expected a multiple of the {ranks} ranks; change one"):
        train_classifier(ClassifierConfig(out=str(tmp_path), batch_size=32), alone)


def test_a_rank_with_one_image_is_refused(tmp_path):
    alone = Ranks("cpu")
    alone.world_size = 4
    message = "^--batch-size 4: expected at least 2 images for each of the 4 ranks, for the network has batch norm; enlarge it$"
    with pytest.raises(UsageError, match=message):
        train_classifier(ClassifierConfig(out=str(tmp_path), batch_size=4), alone)


def test_a_network_that_is_not_there(fit, tmp_path):
    with pytest.raises(UsageError, match=r"^resnet-19: expected a depth of 18 or 34") as caught:
        fit(tmp_path / "run", model="resnet-19")
    assert "\n" not in str(caught.value) and not (tmp_path / "run").exists()


def test_a_diverging_run_is_one_line_and_saves_nothing(fit, tmp_path):
    with pytest.raises(SynthfastError, match=r"^step \d+: .*expected finite numbers; .*lower --lr and choose"):
        fit(tmp_path, lr=1e30, steps=20)
    with pytest.raises(SynthfastError, match=r"^step 1: a weight is not finite, expected finite numbers; "):
        fit(tmp_path, lr=1e38, weight_decay=1e10, steps=1)  # the loss of step 1 is from before it
    assert not list(tmp_path.iterdir())


def factors(steps=100, **options):
    config = ClassifierConfig(**{"steps": steps, "warmup": 0.1, **options})
    return [classifier.rate_factor(config, step) for step in range(steps)]


def test_cosine_rises_along_a_line_and_falls_to_zero():
    found = factors()
    assert found[:10] == pytest.approx([(k + 1) / 10 for k in range(10)])
    assert found[10] == 1 and found[55] == pytest.approx(0.5)
    assert found[10:] == sorted(found[10:], reverse=True) and 0 < found[99] < 1e-3
    assert factors(warmup=0.0) == pytest.approx([(1 + math.cos(math.pi * k / 100)) / 2 for k in range(100)])
    assert all(math.isfinite(f) for steps in (1, 2, 3) for f in factors(steps))


@pytest.mark.parametrize(("steps", "warmup"), [(100, 0.3), (1000, 0.025), (7, 0.5)])
def test_onecycle_is_that_of_torch(steps, warmup):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 1.0, total_steps=steps, pct_start=warmup, cycle_momentum=False
    )
    expected = []
    for _ in range(steps):
        expected.append(schedule.get_last_lr()[0])
        optimizer.step()
        if len(expected) < steps:
            schedule.step()
    found = factors(steps, schedule="onecycle", warmup=warmup)
    assert found == pytest.approx(expected, rel=1e-9)
    assert all(math.isfinite(f) for steps in (1, 2, 3) for f in factors(steps, schedule="onecycle", warmup=0.0))


def test_the_rate_reaches_the_optimizer(fit, tmp_path, monkeypatch):
    rates = []
    real = torch.optim.SGD.step

    def step(optimizer, *arguments):
        rates.append([group["lr"] for group in optimizer.param_groups])
        return real(optimizer, *arguments)

    monkeypatch.setattr(torch.optim.SGD, "step", step)
    fit(tmp_path, steps=4, lr=0.02, warmup=0.5)
    expected = [0.02 * factor for factor in factors(4, warmup=0.5)]
    assert rates == [[rate, rate] for rate in expected]


def test_the_loss_that_is_told_depends_on_no_clock(fit, tmp_path, monkeypatch):
    losses = []
    for seconds in (-1.0, 3600.0):
        monkeypatch.setattr("synthfast.training.loop._REPORT_EVERY", seconds)
        monkeypatch.setattr("synthfast.training.loop._MEAN_OF", 3)
        reports = []
        losses.append(fit(tmp_path / str(seconds), reports.append, steps=8, checkpoint_every=4, batch_size=32).loss)
        assert len(reports) == (8 if seconds < 0 else 2)
    assert losses[0] == losses[1]
    told = [report.loss for report in reports]
    assert told[1] == losses[0] != told[0]
