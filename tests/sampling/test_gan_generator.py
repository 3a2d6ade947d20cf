"""``synthfast sample`` from a GAN: the same command, manifest and promises as for a diffusion model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from synthfast import ops
from synthfast.artifacts import save_checkpoint, sha256_file
from synthfast.config import SampleConfig
from synthfast.data import ShardSet
from synthfast.errors import UsageError
from synthfast.models.gan import GANConfig, Generator, draw_images
from synthfast.sampling import load_generator

CPU = torch.device("cpu")


def write_gan(folder: Path, classes: int | None = 10) -> Path:
    """A checkpoint as ``synthfast train generator --arch gan`` leaves it, with random weights, none of them 0."""
    network = Generator(GANConfig(8, 1, classes, latent=6, width=16))
    random = torch.Generator().manual_seed(0)
    weights = {name: torch.randn(x.shape, generator=random) * 0.2 for name, x in network.state_dict().items()}
    description = {
        "name": "tiny gan",
        "shape": [8, 8, 1],
        "classes": classes,
        "class_names": None,
        "network": network.config.to_dict(),
        "training": {},
    }
    save_checkpoint(folder, "gan", description, weights)
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return write_gan(tmp_path_factory.mktemp("gan") / "tiny")


@pytest.fixture
def copy(checkpoint, tmp_path) -> Path:
    return Path(shutil.copytree(checkpoint, tmp_path / "copy"))


def pixels(folder: Path) -> np.ndarray:
    shards = ShardSet(folder)
    return shards.read(np.arange(len(shards)))


def edit(path: Path, **values: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_a_checkpoint_is_a_generator(checkpoint):
    generator = load_generator(SampleConfig(generator=str(checkpoint)), CPU)
    assert (generator.name, generator.shape, generator.classes) == ("tiny gan", (8, 8, 1), 10)
    assert generator.fingerprint == sha256_file(checkpoint / "model.safetensors") and generator.concurrent
    index, labels = torch.tensor([5, 2**40]), torch.tensor([0, 9])
    network = Generator(GANConfig(8, 1, 10, latent=6, width=16))
    network.load_state_dict(load_file(checkpoint / "model.safetensors"))
    images = generator.sample(index, labels, 3)
    torch.testing.assert_close(images, draw_images(network, index, labels, 3))
    assert images.std() > 0.1 and not torch.equal(generator.sample(index, labels, 4), images)
    assert not torch.equal(generator.sample(index, labels.flip(0), 3), images)


@pytest.mark.parametrize("batch_size", [1, 5, 23, 1000])
def test_images_do_not_depend_on_the_batch_size(run, checkpoint, batch_size):
    """Another batch size may round differently in the last bit, which the quantization shows now and then."""
    found, expected = (run(generator=str(checkpoint), batch_size=size) for size in (batch_size, 8))
    off = np.abs(pixels(found).astype(int) - pixels(expected))
    assert off.max() <= 1 and (off > 0).mean() < 0.01
    assert ShardSet(found).labels.tolist() == [k % 10 for k in range(23)]


def test_image_i_depends_on_the_seed_and_i(run, checkpoint):
    """Bit for bit, where batches begin at the same images."""
    few, many = (pixels(run(generator=str(checkpoint), n=n, seed=2)) for n in (16, 40))
    assert np.array_equal(few, many[:16])
    assert not np.array_equal(few, pixels(run(generator=str(checkpoint), n=16, seed=3)))


def test_files_do_not_depend_on_the_number_of_threads(run, contents, checkpoint):
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append(contents(run(generator=str(checkpoint), n=50, batch_size=7, shard_size=20)))
    finally:
        torch.set_num_threads(before)
    assert found[0] == found[1]


def test_a_run_that_was_cut_is_completed_to_the_same_bytes(run, contents, checkpoint, tmp_path, monkeypatch):
    straight = run(generator=str(checkpoint), shard_size=10)
    from synthfast.sampling import generators

    real, calls = generators.draw_images, []

    def broken(*arguments):
        calls.append(arguments)
        if len(calls) > 3:
            raise KeyboardInterrupt
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(generators, "draw_images", broken)
        with pytest.raises(KeyboardInterrupt):
            run(generator=str(checkpoint), shard_size=10, out=str(tmp_path / "cut"))
    calls.clear()
    monkeypatch.setattr(generators, "draw_images", lambda *arguments: (calls.append(arguments), real(*arguments))[1])
    resumed = run(generator=str(checkpoint), shard_size=10, out=str(tmp_path / "cut"))
    assert contents(resumed) == contents(straight)
    assert 0 < len(calls) < 5  # of 5 batches in all: 8 + 2, 8 + 2, 3


def test_the_manifest_names_the_generator_and_no_solver(run, checkpoint):
    request = json.loads((run(generator=str(checkpoint)) / "manifest.json").read_text())["request"]
    assert request["generator"] == {"name": "tiny gan", "sha256": sha256_file(checkpoint / "model.safetensors")}
    assert "solver" not in request and "guidance" not in request


@pytest.mark.parametrize(("labels", "expected"), [("3", [3] * 4), ("3,5", [3, 5, 3, 5])])
def test_labels_are_chosen(run, checkpoint, labels, expected):
    folder = run(generator=str(checkpoint), n=4, labels=labels)
    assert ShardSet(folder).labels.tolist() == expected
    generator = load_generator(SampleConfig(generator=str(checkpoint)), CPU)
    images = ops.quantize_uint8(generator.sample(torch.arange(4), torch.tensor(expected), 0)).numpy()
    assert np.abs(images.astype(int) - pixels(folder)).max() <= 1


def test_a_generator_without_classes(run, refused, tmp_path):
    folder = write_gan(tmp_path / "plain", None)
    samples = ShardSet(run(generator=str(folder), n=4))
    assert samples.labels is None and samples.classes is None and len(samples) == 4
    with pytest.raises(UsageError, match="has no classes, expected no labels"):
        run(generator=str(folder), n=4, labels="3")


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_lower_precisions_are_close(run, checkpoint, precision):
    rough, fine = (pixels(run(generator=str(checkpoint), precision=name)) for name in (precision, "fp32"))
    off = np.abs(rough.astype(int) - fine)
    assert 0 < off.mean() < 3


@pytest.mark.parametrize(
    "option",
    [
        *({"solver": "heun"}, {"guidance": 2.0}, {"steps": 3}, {"eta": 0.5}, {"churn": 1.0}, {"s_tmin": 0.1}),
        *({"s_tmax": 1.0}, {"s_noise": 1.0}, {"spacing": "karras"}, {"rho": 7.0}, {"sigma_min": 0.1}),
        *({"sigma_max": 9.0}, {"clip": 1.0}, {"variance": "fixed_small"}),
    ],
)
def test_options_of_solvers_are_refused(refused, checkpoint, option):
    flag = "--" + next(iter(option)).replace("_", "-")
    message = f"{flag}: {checkpoint} samples in its own way, expected no solver options; leave it out"
    assert refused(checkpoint, UsageError, **option) == message


@pytest.mark.parametrize("kind", ["classifier", "vae", None, 3, ["gan"]])
def test_a_checkpoint_of_another_kind_is_refused(refused, copy, kind):
    edit(copy / "config.json", kind=kind)
    assert refused(copy) == (
        f"{copy / 'config.json'}: expected a checkpoint of kind 'diffusion' or 'gan', found {kind!r}; check the path"
    )


@pytest.mark.parametrize(
    "values",
    [
        {"format": 2},
        {"shape": [8, 8]},
        {"shape": [16, 16, 1]},
        {"shape": [8, 8, 3]},
        {"shape": None},
        {"classes": "10"},
        {"classes": 9},
        {"classes": None},
        {"classes": 10.0},
        {"name": 3},
        {"network": [1]},
        {"network": None},
        {"network": {}},
        {"network": {"image_size": 8, "channels": 1, "num_classes": 10, "depth": 3}},
        {"network": {"image_size": 8, "channels": 1, "num_classes": 10, "width": 20}},
    ],
)
def test_a_configuration_that_cannot_be_is_refused(refused, copy, values):
    edit(copy / "config.json", **values)
    assert str(copy / "config.json") in refused(copy)


@pytest.mark.parametrize("key", ["name", "shape", "classes", "network"])
def test_a_missing_key_is_named(refused, copy, key):
    path = copy / "config.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != key}))
    assert refused(copy) == f"{path}: missing or wrong ('{key}'); train again"


def test_weights_that_do_not_fit_or_were_altered_are_refused(refused, copy):
    header = json.loads((copy / "config.json").read_text())
    edit(copy / "config.json", network={**header["network"], "latent": 7})
    assert "do not fit the configuration beside them" in refused(copy)
    edit(copy / "config.json", **header)
    path = copy / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert refused(copy).startswith(f"{path}: expected SHA-256")


def test_other_weights_do_not_complete_a_set(run, copy, tmp_path):
    out = run(generator=str(copy), n=2)
    weights = load_file(copy / "model.safetensors")
    weights["last.bias"] += 0.1
    save_file(weights, copy / "model.safetensors")
    edit(copy / "config.json", sha256=sha256_file(copy / "model.safetensors"))
    with pytest.raises(UsageError, match=r"^--generator \(its weights\): "):
        run(generator=str(copy), n=2, out=str(out))
