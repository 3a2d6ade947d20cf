"""What a run of ``synthfast train generator --arch gan`` leaves, what it goes on from, and what it refuses."""

from __future__ import annotations

import copy
import math
import os
import socket
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from synthfast import ops
from synthfast.artifacts import load_checkpoint, load_tensors, read_json
from synthfast.config import GeneratorConfig
from synthfast.config.generator import settings, settled
from synthfast.data import open_images
from synthfast.distributed import Ranks
from synthfast.errors import SynthfastError, UsageError
from synthfast.models.gan import Generator
from synthfast.training import gan, train_generator
from synthfast.training.generator import GeneratorJob
from synthfast.training.loop import Progress, Trained
from synthfast.training.state import STATE_FILE

TINY = {"arch": "gan", "width": 16, "latent": 4, "device": "cpu", "batch_size": 8, "steps": 2}


class Stopped(Exception):
    """Stands for whatever ends a run."""


@pytest.fixture
def fit_gan(monkeypatch):
    """``fit_gan(folder, report, lr=..., ...)``: 2 steps of 8 images, with networks of a few thousand parameters."""
    monkeypatch.setattr("synthfast.training.generator._GRID_ROWS", 1)

    def train(out, report=None, **options) -> Trained:
        with Ranks("cpu") as ranks:
            return train_generator(GeneratorConfig(**{**TINY, "out": str(out), **options}), ranks, report)

    return train


def job_of(folder, **options) -> gan.GANJob:
    return gan.GANJob(settled(GeneratorConfig(**{**TINY, "out": str(folder), **options})), Ranks("cpu"))


def test_a_run_leaves_weights_state_and_pictures(fit_gan, tmp_path):
    reports: list[Progress] = []
    result = fit_gan(tmp_path, reports.append, steps=3, checkpoint_every=2)
    assert (result.steps, result.made, result.picture) == (3, 3, tmp_path / "samples-000003.png")
    assert {2, 3} <= {progress.step for progress in reports} <= {1, 2, 3}
    assert all(0 < progress.loss < 20 for progress in reports) and reports[-1].loss == result.loss
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "config.json", "model.safetensors", "samples-000002.png", "samples-000003.png", STATE_FILE,
    ]  # fmt: skip
    config, weights = load_checkpoint(tmp_path, "gan")
    assert (config["shape"], config["classes"], config["name"]) == ([8, 8, 1], 10, "digits gan 3 steps")
    assert config["network"] == {"image_size": 8, "channels": 1, "num_classes": 10, "latent": 4, "width": 16}
    training = config["training"]
    assert training["steps_done"] == 3 and "loss" not in training and "arch" not in training
    assert (training["augment"], training["width"], training["d_steps"]) == ("translation", 16, 2)
    state = load_tensors(tmp_path / STATE_FILE)
    assert all(torch.equal(state[f"ema.{key}"], value) for key, value in weights.items())
    assert not torch.equal(state["ema.start.weight"], state["model.generator.start.weight"])
    with Image.open(result.picture) as picture:
        assert picture.size == (10 * 54 + 6, 54 + 6) and picture.getextrema()[0] < 250


def test_the_average_is_of_the_generator_and_needs_no_statistics(tmp_path):
    """After step k: average = d average + (1 - d) weights, d = min(decay, (1 + k) / (10 + k)); there are no buffers."""
    job = job_of(tmp_path, ema=0.5)
    assert not list(job.generator.buffers())
    start = job.generator.start.weight.detach().clone()
    job._step(job.discriminator, 0, job.loader.batch(job._wanted(0)))
    expected = torch.lerp(start, job.generator.start.weight.detach(), 1 - 2 / 11)
    assert not torch.equal(job.generator.start.weight, start)
    torch.testing.assert_close(job.average.module.start.weight, expected)


@pytest.fixture
def started(tmp_path) -> gan.GANJob:
    return job_of(tmp_path, augment="none")


def test_losses_are_the_hinge_losses(started, monkeypatch):
    """L_D = E max(0, 1 - D(x)) + E max(0, 1 + D(G(z))), L_G = -E D(G(z)), and each step moves one network alone."""
    before = {name: value.clone() for name, value in started.model.state_dict().items()}

    def moved(part: str) -> set[str]:
        now = started.model.state_dict().items()
        return {name for name, value in now if name.startswith(part) and not torch.equal(value, before[name])}

    values = torch.tensor([2.0, -0.5, 1.5, 0.25])  # two of real images, two of generated ones

    def network(images, labels):
        assert images.shape == (4, 1, 8, 8) and labels.tolist() == [1, 2, 1, 2]
        return values + 0 * started.discriminator(images, labels)

    real, fake = torch.rand(2, 1, 8, 8), torch.rand(2, 1, 8, 8)
    labels, index = torch.tensor([1, 2]), torch.arange(2)
    loss = started._discriminator_step(network, real, fake, labels, index)
    assert loss.item() == pytest.approx((0 + 1.5) / 2 + (2.5 + 1.25) / 2)
    assert not moved("generator")
    started._discriminator_step(started.discriminator, real, fake, labels, index)
    assert moved("discriminator") and not moved("generator")
    before = {name: value.clone() for name, value in started.model.state_dict().items()}
    z = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(64) % 10
    value = started.discriminator(started.generator(z, labels), labels).mean()
    for _ in range(10):
        started._generator_step(started.generator(z, labels), labels, torch.arange(64))
    assert not moved("discriminator") and len(moved("generator")) == len(list(started.generator.parameters()))
    assert started.discriminator(started.generator(z, labels), labels).mean() > value + 0.01


def test_the_generator_is_judged_on_images_of_the_classes_of_the_batch(started, monkeypatch):
    seen = []
    real = started.judge
    started.judge = lambda images, labels: (seen.append(labels), real(images, labels))[1]
    batch = started.loader.batch(started._wanted(0))
    started._step(started.discriminator, 0, batch)
    assert torch.equal(seen[0], batch[1][8:])  # of the last discriminator step


def test_real_and_generated_images_are_augmented_in_one_call(tmp_path, monkeypatch):
    """At the same positions with the same draws; the generator's step has other draws."""
    calls = []
    augment = gan.diff_augment

    def spy(images, index, seed, policy, step):
        calls.append((images.detach(), index.tolist(), seed, policy, step))
        return augment(images, index, seed, policy, step)

    monkeypatch.setattr(gan, "diff_augment", spy)
    job = job_of(tmp_path, seed=5, d_steps=2, batch_size=4)
    before = copy.deepcopy(job.generator)
    job._step(job.discriminator, 3, job.loader.batch(job._wanted(3)))
    first, second, third = ([*range(start, start + 4)] for start in (24, 28, 28))
    policy = ("translation",)
    assert [call[1:] for call in calls] == [
        (first * 2, 5, policy, 1), (second * 2, 5, policy, 1), (third, 5, policy, 2),
    ]  # fmt: skip
    pixels = torch.from_numpy(job.images.read(job.order[24:28])).permute(0, 3, 1, 2) / 127.5 - 1
    torch.testing.assert_close(calls[0][0][:4], pixels)
    z = gan.latents(before.config, torch.arange(24, 28), 5, ops.Stream.TRAINING_NOISE)
    labels = torch.from_numpy(job.images.labels[job.order[24:28]])
    torch.testing.assert_close(calls[0][0][4:], before(z, labels).detach())
    # The generator answers for the images that the last discriminator step saw.
    assert torch.equal(calls[1][0][4:], calls[2][0]) and not torch.equal(calls[0][0][4:], calls[1][0][4:])


def test_spectral_norms_are_iterated_before_every_discriminator_step(tmp_path, monkeypatch):
    job, calls = job_of(tmp_path, d_steps=3), []
    real = gan.power_iteration
    monkeypatch.setattr(gan, "power_iteration", lambda network: (calls.append(network), real(network)))
    before = {name: value.clone() for name, value in job.discriminator.named_buffers()}
    job._step(job.discriminator, 0, job.loader.batch(job._wanted(0)))
    assert calls == [job.discriminator] * 3
    assert any(not torch.equal(value, before[name]) for name, value in job.discriminator.named_buffers())


def test_every_step_sees_other_images_and_every_pass_all_of_them(fit_gan, write_npz, tmp_path, monkeypatch):
    seen = []
    real = gan.GANJob._wanted
    monkeypatch.setattr(gan.GANJob, "_wanted", lambda job, step: (seen.append(real(job, step)), seen[-1])[1])
    fit_gan(tmp_path / "run", dataset=write_npz(tmp_path / "set.npz"), steps=2, d_steps=3, batch_size=4)
    assert [len(wanted) for wanted in seen] == [12, 12]
    assert sorted(np.concatenate([wanted.items[0] for wanted in seen])) == sorted([*range(12)] * 2)


def test_it_learns(fit_gan, tmp_path):
    """The mean image of each class; a discriminator that is not told the class could not teach that."""
    fit_gan(
        tmp_path, steps=120, batch_size=32, checkpoint_every=120, lr=2e-3, d_lr=2e-3, ema=0.9, augment="translation"
    )
    _, weights = load_checkpoint(tmp_path, "gan")
    network = Generator(gan.small_gan_config(8, 1, 10, latent=4, width=16))
    network.load_state_dict(weights)
    digits = open_images("digits")
    pixels, labels = digits.read(np.arange(500))[..., 0] / 127.5 - 1, digits.labels
    drawn = gan.draw_images(network, torch.arange(500), torch.from_numpy(labels), 0).numpy()[:, 0]
    real, made = (np.stack([x[labels == k].mean(0).ravel() for k in range(10)]) for x in (pixels, drawn))
    nearest = np.abs(made[:, None] - real[None]).mean(2).argmin(1)
    assert (nearest == np.arange(10)).sum() >= 8


@pytest.mark.parametrize("labels", [True, False])
def test_colour_images_with_and_without_labels(fit_gan, write_npz, tmp_path, labels):
    source = write_npz(tmp_path / "set.npz", (10, 10, 3), labels)
    result = fit_gan(tmp_path / "run", dataset=source)
    assert math.isfinite(result.loss)
    config, weights = load_checkpoint(tmp_path / "run", "gan")
    assert (config["shape"], config["classes"]) == ([10, 10, 3], 3 if labels else None)
    assert config["training"]["augment"] == "colour,translation"
    assert ("embedding.weight" in weights) is labels


def test_labels_can_be_left_out(fit_gan, tmp_path):
    fit_gan(tmp_path, conditional=False)
    assert load_checkpoint(tmp_path, "gan")[0]["classes"] is None


def test_bfloat16_keeps_its_weights_in_float32(fit_gan, tmp_path):
    assert math.isfinite(fit_gan(tmp_path / "rough", precision="bf16").loss)
    fit_gan(tmp_path / "fine")
    config, weights = load_checkpoint(tmp_path / "rough", "gan")
    assert config["training"]["precision"] == "bf16"
    assert {tensor.dtype for tensor in load_tensors(tmp_path / "rough" / STATE_FILE).values()} == {torch.float32}
    fine = load_checkpoint(tmp_path / "fine", "gan")[1]
    assert not torch.equal(weights["last.weight"], fine["last.weight"])


def test_each_setting_changes_the_weights(fit_gan, tmp_path):
    options = [{}, {"flip": True}, {"seed": -1}, {"d_steps": 1}, {"d_lr": 1e-3}, {"lr": 2e-3}, {"augment": "none"}]
    options += [{"augment": "cutout"}, {"ema": 0.1}]
    found = set()
    for k, values in enumerate(options):
        fit_gan(tmp_path / f"{k}", steps=3, **values)
        found.add((tmp_path / f"{k}" / "model.safetensors").read_bytes())
    assert len(found) == len(options)


@pytest.mark.parametrize(
    "options",
    [{}, {"flip": True, "d_steps": 1}, {"batch_size": 200}, {"precision": "bf16", "conditional": False}],
    ids=["plain", "flip", "passes", "bf16"],
)
def test_more_steps_later_equal_more_steps_at_once(fit_gan, same_results, tmp_path, options):
    fit_gan(tmp_path / "straight", steps=5, **options)
    fit_gan(tmp_path / "resumed", steps=3, **options)
    torch.manual_seed(123)
    result = fit_gan(tmp_path / "resumed", steps=5, **options)
    assert (result.steps, result.made) == (5, 2)
    assert same_results(tmp_path / "straight", tmp_path / "resumed")


@pytest.mark.parametrize("cut", ["_write_samples", "_description", "save_checkpoint", "save_state"])
def test_cut_within_a_checkpoint_it_makes_it_again(fit_gan, same_results, tmp_path, monkeypatch, cut):
    def stop(*_: object, **__: object) -> None:
        raise Stopped

    fit_gan(tmp_path / "straight", steps=4, checkpoint_every=2)
    fit_gan(tmp_path / "cut")
    with monkeypatch.context() as patch:
        patch.setattr(GeneratorJob if cut.startswith("_") else "synthfast.training.generator." + cut, *(
            (cut, stop) if cut.startswith("_") else (stop,)
        ))  # fmt: skip
        with pytest.raises(Stopped):
            fit_gan(tmp_path / "cut", steps=4)
    assert fit_gan(tmp_path / "cut", steps=4).made == 2
    assert same_results(tmp_path / "straight", tmp_path / "cut")


def test_what_changes_the_result_is_refused_by_name(fit_gan, tmp_path):
    fit_gan(tmp_path, steps=1)
    state = (tmp_path / STATE_FILE).read_bytes()
    for options in (
        {"batch_size": 4},
        {"lr": 0.5},
        {"d_lr": 0.5},
        {"d_steps": 3},
        {"latent": 8},
        {"width": 32},
        {"augment": "none"},
        {"ema": 0.5},
        {"flip": True},
        {"seed": 1},
        {"conditional": False},
    ):
        with pytest.raises(UsageError) as caught:
            fit_gan(tmp_path, **options)
        message = str(caught.value)
        assert message.startswith(f"--{next(iter(options)).replace('_', '-')}: {tmp_path} was made with ")
    assert (tmp_path / STATE_FILE).read_bytes() == state
    # What is given is what is the default.
    assert fit_gan(tmp_path, augment="translation", d_steps=2).made == 1


def test_the_folder_of_the_other_kind_is_refused(fit_gan, train, tiny, tmp_path):
    fit_gan(tmp_path / "gan")
    with pytest.raises(UsageError, match="a checkpoint of kind 'gan', this command would overwrite it"):
        train(tmp_path / "gan")
    train(tmp_path / "diffusion")
    with pytest.raises(UsageError, match="a checkpoint of kind 'diffusion', this command would overwrite it"):
        fit_gan(tmp_path / "diffusion")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": "edm"}, "--loss edm: arch gan does not use it; drop it or add --arch diffusion"),
        ({"label_dropout": 0.1}, "--label-dropout 0.1: arch gan does not use it"),
        ({"warmup": 200}, "--warmup 200: arch gan"),
        ({"weight_decay": 0.0}, "--weight-decay 0.0: arch gan"),
        ({"clip_norm": 1.0}, "--clip-norm 1.0: arch gan"),
        ({"prediction": "epsilon"}, "--prediction epsilon: arch gan"),
        ({"sigma_data": 0.5}, "--sigma-data 0.5: arch gan"),
        (
            {"arch": "diffusion", "latent": None},
            "--width 16: arch diffusion does not use it; drop it or add --arch gan",
        ),
        ({"arch": "diffusion", "width": None}, "--latent 4: arch diffusion does not use it"),
        ({"augment": "color"}, "--augment color: expected none, or some of colour,translation,cutout"),
        ({"augment": "none,cutout"}, "--augment none,cutout: expected none, or some of"),
        ({"augment": ""}, "--augment : expected none, or some of"),
        ({"augment": "colour"}, "--augment colour: colour needs RGB images, found 1 channels; leave it out"),
        ({"width": 24}, "width 24: expected a multiple of 16 for a GAN"),
    ],
)
def test_options_that_do_not_fit(fit_gan, tmp_path, options, message):
    with pytest.raises(UsageError) as caught:
        fit_gan(tmp_path / "run", **options)
    assert str(caught.value).startswith(message) and not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["d_steps", "d_lr", "augment"])
def test_options_of_the_gan_are_not_for_diffusion(name):
    config = GeneratorConfig(**{name: {"d_steps": 1, "d_lr": 1e-3, "augment": "none"}[name]})
    with pytest.raises(UsageError, match=f"^--{name.replace('_', '-')} .*: arch diffusion does not use it"):
        settled(config)


def test_images_that_are_too_small_are_refused(fit_gan, write_npz, tmp_path):
    with pytest.raises(UsageError, match=r"^image_size 6: expected a whole number of at least 8 for a GAN"):
        fit_gan(tmp_path / "run", dataset=write_npz(tmp_path / "set.npz", (6, 6)))


def test_defaults_of_each_kind():
    diffusion = settled(GeneratorConfig())
    values = (
        diffusion.steps,
        diffusion.batch_size,
        diffusion.lr,
        diffusion.warmup,
        diffusion.weight_decay,
        diffusion.clip_norm,
    )
    assert values == (1_500, 128, 1e-3, 200, 0.0, 1.0)
    values = (diffusion.loss, diffusion.prediction, diffusion.sigma_data, diffusion.label_dropout)
    assert values == ("edm", "epsilon", 0.5, 0.1)
    assert diffusion.d_steps is diffusion.d_lr is diffusion.latent is None
    assert settled(GeneratorConfig(steps=7, lr=0.5, loss="ddpm-cosine")).loss == "ddpm-cosine"
    assert settled(GeneratorConfig(steps=7)).steps == 7
    assert list(settings(diffusion)) == [
        "dataset", "out", "steps", "batch_size", "lr", "warmup", "weight_decay", "clip_norm", "ema", "loss", "prediction",
        "sigma_data", "label_dropout", "conditional", "flip", "image_size", "data_dir", "download", "seed", "device",
        "precision", "compile", "checkpoint_every",
    ]  # fmt: skip
    other = settled(GeneratorConfig(arch="gan"))
    assert other.loss is None and other.d_steps == 2 and other.latent == 64
    assert {"d_steps", "d_lr", "latent", "width", "augment", "lr", "steps"} <= settings(other).keys()
    assert not {"loss", "warmup", "arch"} & settings(other).keys()


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((8, 8, 1), ("translation",)),
        ((16, 16, 3), ("colour", "translation")),
        ((28, 28, 1), ("translation", "cutout")),
        ((32, 32, 3), ("colour", "translation", "cutout")),
        ((32, 32, 4), ("translation", "cutout")),
    ],
)
def test_default_augmentations(shape, expected):
    assert gan._policy(None, shape) == expected
    assert gan._policy("none", shape) == () and gan._policy("cutout,translation", shape) == ("cutout", "translation")


def test_a_run_that_diverges_is_stopped_and_saves_nothing(fit_gan, tmp_path):
    with pytest.raises(SynthfastError, match=r"^step 2: .*expected finite numbers; .*lower --lr"):
        fit_gan(tmp_path, lr=1e30, d_lr=1e30)
    assert not list(tmp_path.iterdir())


def test_weights_of_the_generator_that_are_not_finite_are_not_saved(fit_gan, tmp_path, monkeypatch):
    real = gan.GANJob._step

    def overflow(job, *arguments):
        loss = real(job, *arguments)
        with torch.no_grad():
            job.generator.last.bias[0] = float("inf")
        return loss

    monkeypatch.setattr(gan.GANJob, "_step", overflow)
    with pytest.raises(SynthfastError, match=r"^step 1: a weight is not finite"):
        fit_gan(tmp_path, steps=1)
    assert not list(tmp_path.iterdir())


def test_two_ranks_train_what_one_does(fit_gan, tmp_path):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        fit_gan(tmp_path / "one", steps=4, d_steps=2, ema=0.5)
    finally:
        torch.set_num_threads(threads)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = "--arch gan --width 16 --latent 4 --device cpu --batch-size 8 --steps 4 --d-steps 2 --ema 0.5"
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(port)]
    command = [sys.executable, *launcher, "-m", "synthfast", "train", "generator", *options.split()]
    ran = subprocess.run(
        [*command, "--out", str(tmp_path / "two")],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0 and ran.stdout.count("4 steps, last loss ") == 1, ran.stderr
    for name in ("model.safetensors", STATE_FILE):
        one, two = load_tensors(tmp_path / "one" / name), load_tensors(tmp_path / "two" / name)
        assert one.keys() == two.keys()
        # Adam divides by the size of a gradient, which makes rounding errors of small ones larger.
        assert max((one[key] - two[key]).abs().max().item() for key in one) < 3e-4
    config = read_json(tmp_path / "two" / "config.json", "checkpoint")
    assert config["training"]["steps_done"] == 4
