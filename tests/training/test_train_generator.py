"""What a run of ``synthfast train generator`` leaves: on any source, with any loss; and what it refuses."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from PIL import Image

from synthfast import diffusion
from synthfast.artifacts import load_checkpoint, load_tensors
from synthfast.data import open_images
from synthfast.errors import SynthfastError, UsageError
from synthfast.sampling import load_generator
from synthfast.training.state import STATE_FILE


@pytest.fixture(autouse=True)
def _tiny(tiny):
    """Every test here trains the tiny network."""


def test_a_run_leaves_weights_state_and_pictures(train, tmp_path):
    reports = []
    result = train(tmp_path, reports.append, steps=3, checkpoint_every=2)
    assert (result.steps, result.made, result.picture) == (3, 3, tmp_path / "samples-000003.png")
    assert {2, 3} <= {progress.step for progress in reports} <= {1, 2, 3}
    assert all(math.isfinite(progress.loss) and progress.images_per_second > 0 for progress in reports)
    assert (reports[1].steps, reports[1].images_per_step, reports[1].loss) == (3, 8, result.loss)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "config.json", "model.safetensors", "samples-000002.png", "samples-000003.png", STATE_FILE,
    ]  # fmt: skip
    config, weights = load_checkpoint(tmp_path, "diffusion")
    assert (config["shape"], config["classes"], config["null_label"]) == ([8, 8, 1], 10, 10)
    assert config["training"]["steps_done"] == 3
    state = load_tensors(tmp_path / STATE_FILE)
    assert all(torch.equal(state[f"ema.{key}"], value) for key, value in weights.items())
    assert not torch.equal(state["ema.conv_in.weight"], state["model.conv_in.weight"])


def test_the_pictures_show_a_column_a_class(train, tmp_path, monkeypatch):
    monkeypatch.setattr("synthfast.training.generator._GRID_ROWS", 2)
    pictures, labels = {}, []
    real = diffusion.sample
    monkeypatch.setattr(
        diffusion,
        "sample",
        lambda *arguments, **options: (labels.append(options["labels"]), real(*arguments, **options))[1],
    )
    for name, options in (("classes", {}), ("none", {"conditional": False})):
        with Image.open(train(tmp_path / name, **options).picture) as picture:
            assert picture.mode == "L" and picture.getextrema()[0] < 250
            pictures[name] = picture.size
    assert pictures["classes"] == (10 * 54 + 6, 2 * 54 + 6)  # 8 pixels, each 6 wide, and a gap of 6
    assert pictures["none"][1] >= 54 + 6
    assert labels[0].tolist() == [*range(10)] * 2 and labels[1] is None


@pytest.mark.parametrize(
    ("loss", "prediction", "parameterization"),
    [
        ("edm", "epsilon", {"kind": "edm", "sigma_data": 0.5}),
        ("ddpm-linear", "epsilon", {"kind": "vp"}),
        ("ddpm-cosine", "v_prediction", {"kind": "vp"}),
        ("ddpm-linear", "sample", {"kind": "vp"}),
    ],
)
def test_every_loss_learns(train, tmp_path, loss, prediction, parameterization):
    losses = []
    options = {"steps": 60, "checkpoint_every": 20, "batch_size": 32, "warmup": 5, "lr": 3e-3, "ema": 0.9}
    train(tmp_path, lambda progress: losses.append(progress.loss), loss=loss, prediction=prediction, **options)
    assert losses[-1] < 0.9 * losses[0]
    config, _ = load_checkpoint(tmp_path, "diffusion")
    assert parameterization.items() <= config["parameterization"].items()


@pytest.mark.parametrize("labels", [True, False])
def test_arrays_of_colour_images_with_and_without_labels(train, write_npz, tmp_path, labels):
    train(tmp_path / "run", dataset=write_npz(tmp_path / "set.npz", (10, 10, 3), labels))
    config, weights = load_checkpoint(tmp_path / "run", "diffusion")
    assert config["shape"] == [10, 10, 3]
    assert (config["classes"], config["null_label"]) == ((3, 3) if labels else (None, None))
    assert ("class_embedding.weight" in weights) is labels


@pytest.mark.parametrize(
    ("options", "expected"), [({"conditional": False}, (None, None)), ({"label_dropout": 0.0}, (10, None))]
)
def test_labels_and_the_null_label_can_be_left_out(train, tmp_path, options, expected):
    train(tmp_path, **options)
    config, _ = load_checkpoint(tmp_path, "diffusion")
    assert (config["classes"], config["null_label"]) == expected


def test_a_folder_of_colour_images(train, tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for k in range(4):
            Image.fromarray(np.full((10, 12, 3), 40 * k, np.uint8)).save(tmp_path / "images" / name / f"{k}.png")
    source = f"folder:{tmp_path / 'images'}"
    train(tmp_path / "run", dataset=source, image_size=8)
    config, _ = load_checkpoint(tmp_path / "run", "diffusion")
    assert (config["shape"], config["class_names"]) == ([8, 8, 3], ["cat", "dog"])
    with pytest.raises(
        UsageError, match=r"^--dataset folder:.*: expected square images, found 10x12; give --image-size"
    ):
        train(tmp_path / "other", dataset=source)


def test_a_shard_folder(train, write_shards, tmp_path):
    source = write_shards(tmp_path / "shards", np.zeros((6, 8, 8, 3), np.uint8), np.arange(6) % 4, classes=4)
    train(tmp_path / "run", dataset=source)
    config, _ = load_checkpoint(tmp_path / "run", "diffusion")
    assert (config["shape"], config["classes"]) == ([8, 8, 3], 4)


def test_a_set_smaller_than_a_batch(train, write_npz, tmp_path):
    assert math.isfinite(train(tmp_path / "run", dataset=write_npz(tmp_path / "set.npz"), batch_size=30).loss)


def test_bfloat16_keeps_its_weights_in_float32(train, tmp_path):
    assert math.isfinite(train(tmp_path, precision="bf16").loss)
    config, weights = load_checkpoint(tmp_path, "diffusion")
    assert config["training"]["precision"] == "bf16"
    assert {tensor.dtype for tensor in weights.values() if tensor.is_floating_point()} == {torch.float32}


def test_what_was_trained_can_be_sampled(train, tmp_path):
    from synthfast.config import SampleConfig

    train(tmp_path)
    index = torch.arange(4)
    generator = load_generator(SampleConfig(generator=str(tmp_path), steps=2), torch.device("cpu"))
    images = generator.sample(index, labels=index % 10, seed=0)
    assert images.shape == (4, 1, 8, 8) and images.isfinite().all()


def test_flips_and_seeds_change_the_weights(train, tmp_path):
    for name, options in (("a", {}), ("b", {}), ("flip", {"flip": True}), ("seed", {"seed": -1})):
        train(tmp_path / name, **options)
    weights = {name: (tmp_path / name / "model.safetensors").read_bytes() for name in ("a", "b", "flip", "seed")}
    assert weights["a"] == weights["b"] and len(set(weights.values())) == 3


def test_every_step_sees_other_images_and_every_pass_all_of_them(train, write_npz, tmp_path, monkeypatch):
    from synthfast.training import generator

    seen = []
    real = generator._Job._wanted
    monkeypatch.setattr(generator._Job, "_wanted", lambda job, step: (seen.append(real(job, step)), seen[-1])[1])
    train(tmp_path / "run", dataset=write_npz(tmp_path / "set.npz"), steps=3)
    assert [len(wanted) for wanted in seen] == [8, 8, 8]
    assert sorted(np.concatenate([wanted.items[0] for wanted in seen])) == sorted([*range(12)] * 2)


def test_the_data_are_opened_as_the_options_say(train, tmp_path, monkeypatch):
    calls = []

    def opened(source, **options):
        calls.append((source, str(options["data_dir"]), options["download"], options["image_size"]))
        return open_images("digits")

    monkeypatch.setattr("synthfast.training.loop.open_images", opened)
    train(tmp_path, dataset="cifar10", data_dir="there", download=True, image_size=32)
    assert calls == [("cifar10", "there", True, 32)]
    assert load_checkpoint(tmp_path, "diffusion")[0]["training"]["flip"] is True  # the default of photographs


def test_options_that_do_not_fit(train, write_npz, tmp_path):
    with pytest.raises(UsageError, match=r"expected square images, found 8x12; cut or resize them$"):
        train(tmp_path / "run", dataset=write_npz(tmp_path / "set.npz", (8, 12)))
    with pytest.raises(UsageError, match=r"^--prediction v_prediction: the edm loss has its own"):
        train(tmp_path / "run", prediction="v_prediction")
    (tmp_path / "file").write_text("")
    with pytest.raises(SynthfastError, match="file"):
        train(tmp_path / "file" / "run")


@pytest.mark.parametrize("ranks", [3, 16])
def test_a_batch_that_the_ranks_cannot_share_is_refused(tmp_path, ranks):
    from synthfast.config import GeneratorConfig
    from synthfast.distributed import Ranks
    from synthfast.training import train_generator

    alone = Ranks("cpu")
    alone.world_size = ranks
    with pytest.raises(UsageError, match=f"^--batch-size 8: expected a multiple of the {ranks} ranks; change one"):
        train_generator(GeneratorConfig(out=str(tmp_path), batch_size=8), alone)


def test_a_run_that_diverges_is_stopped_and_saves_nothing(train, tmp_path):
    with pytest.raises(SynthfastError, match=r"^step 2: .*expected finite numbers; .*lower --lr") as caught:
        train(tmp_path, lr=1e30, warmup=0)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())
