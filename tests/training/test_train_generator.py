from __future__ import annotations

import dataclasses
import os
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image

from synthfast.artifacts import load_checkpoint, load_tensors, read_json, save_tensors
from synthfast.config import GeneratorConfig
from synthfast.distributed import Ranks
from synthfast.errors import SynthfastError, UsageError
from synthfast.training import train_generator
from synthfast.training.state import STATE_FILE


def train(out, report=None, **options):
    config = GeneratorConfig(**{"out": str(out), "device": "cpu", "batch_size": 8, "steps": 2, **options})
    with Ranks("cpu") as ranks:
        return train_generator(config, ranks, report)


def same_tensors(a, b):
    first, second = load_tensors(a), load_tensors(b)
    assert first.keys() == second.keys()
    return all(torch.equal(first[key], second[key]) for key in first)


def write_npz(path, shape, count=12, labels=True, seed=0):
    random = np.random.default_rng(seed)
    arrays = {"image": random.integers(0, 256, (count, *shape), dtype=np.uint8)}
    if labels:
        arrays["label"] = np.arange(count) % 3
    np.savez(path, **arrays)
    return f"npz:{path}"


def test_a_run_leaves_weights_state_and_a_picture(tiny, tmp_path):
    reports = []
    result = train(tmp_path, reports.append, steps=3, checkpoint_every=2)
    assert (result.steps, result.made) == (3, 3)
    assert np.isfinite(result.loss)
    assert [progress.step for progress in reports] == [2, 3]
    assert result.picture == tmp_path / "samples-000003.png"
    for step in (2, 3):
        picture = np.asarray(Image.open(tmp_path / f"samples-{step:06d}.png"))
        assert picture.min() < picture.max()
    config, weights = load_checkpoint(tmp_path, "diffusion")
    assert config["shape"] == [8, 8, 1]
    assert (config["classes"], config["null_label"]) == (10, 10)
    assert config["training"]["steps_done"] == 3
    averaged = load_tensors(tmp_path / STATE_FILE)
    assert all(torch.equal(averaged[f"ema.{key}"], value) for key, value in weights.items())
    assert not torch.equal(averaged["ema.conv_in.weight"], averaged["model.conv_in.weight"])


@pytest.mark.parametrize(
    ("loss", "prediction"),
    [("edm", "epsilon"), ("ddpm-linear", "epsilon"), ("ddpm-cosine", "v_prediction"), ("ddpm-linear", "sample")],
)
def test_every_loss_learns(tiny, tmp_path, loss, prediction):
    losses = []
    train(tmp_path, lambda p: losses.append(p.loss), loss=loss, prediction=prediction, steps=60, batch_size=32,
          checkpoint_every=20, warmup=5, lr=3e-3, ema=0.9)  # fmt: skip
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("labels", [True, False])
def test_arrays_with_and_without_labels(tiny, tmp_path, labels):
    source = write_npz(tmp_path / "set.npz", (8, 8, 3), labels=labels)
    train(tmp_path / "run", dataset=source)
    config, weights = load_checkpoint(tmp_path / "run", "diffusion")
    assert config["shape"] == [8, 8, 3]
    assert config["classes"] == (3 if labels else None)
    assert ("class_embedding.weight" in weights) is labels


def test_labels_can_be_left_out(tiny, tmp_path):
    train(tmp_path, conditional=False)
    config, _ = load_checkpoint(tmp_path, "diffusion")
    assert (config["classes"], config["null_label"]) == (None, None)


def test_without_label_dropout_there_is_no_null_label(tiny, tmp_path):
    train(tmp_path, label_dropout=0.0)
    config, _ = load_checkpoint(tmp_path, "diffusion")
    assert (config["classes"], config["null_label"]) == (10, None)


def test_a_folder_of_colour_images(tiny, tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for k in range(4):
            pixels = np.full((10, 12, 3), 40 * k, np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / name / f"{k}.png")
    train(tmp_path / "run", dataset=f"folder:{tmp_path / 'images'}", image_size=8)
    config, _ = load_checkpoint(tmp_path / "run", "diffusion")
    assert (config["shape"], config["class_names"]) == ([8, 8, 3], ["cat", "dog"])


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_a_resumed_run_equals_one_that_was_never_stopped(tiny, tmp_path, dropout):
    tiny(dropout=dropout)
    options = {"flip": True, "warmup": 4}
    train(tmp_path / "straight", steps=7, **options)
    train(tmp_path / "resumed", steps=3, **options)
    result = train(tmp_path / "resumed", steps=7, **options)
    assert (result.steps, result.made) == (7, 4)
    assert same_tensors(tmp_path / "straight" / STATE_FILE, tmp_path / "resumed" / STATE_FILE)
    assert (tmp_path / "straight/model.safetensors").read_bytes() == (
        tmp_path / "resumed/model.safetensors"
    ).read_bytes()


def test_a_finished_run_does_nothing(tiny, tmp_path):
    train(tmp_path)
    before = (tmp_path / "model.safetensors").stat().st_mtime_ns
    assert train(tmp_path).made == 0
    assert (tmp_path / "model.safetensors").stat().st_mtime_ns == before


@pytest.mark.parametrize(("option", "value"), [("lr", 0.5), ("seed", 1), ("loss", "ddpm-linear"), ("batch_size", 4)])
def test_another_command_is_refused_and_the_difference_named(tiny, tmp_path, option, value):
    train(tmp_path)
    with pytest.raises(UsageError, match=f"--{option.replace('_', '-')}: .*was made with .*, this command says"):
        train(tmp_path, steps=4, **{option: value})


def test_changed_data_under_the_same_name_are_refused(tiny, tmp_path):
    source = write_npz(tmp_path / "set.npz", (8, 8, 1))
    train(tmp_path / "run", dataset=source)
    write_npz(tmp_path / "set.npz", (8, 8, 1), seed=1)
    with pytest.raises(UsageError, match="--data"):
        train(tmp_path / "run", dataset=source, steps=4)


def test_bad_states_are_refused_in_one_line(tiny, tmp_path):
    train(tmp_path)
    path = tmp_path / STATE_FILE
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(SynthfastError, match="training state"):
        train(tmp_path, steps=4)
    save_tensors(path, {"model.x": torch.zeros(1)})
    with pytest.raises(SynthfastError, match="training state"):
        train(tmp_path, steps=4)


def test_a_state_of_another_network_is_refused(tiny, tmp_path, monkeypatch):
    train(tmp_path)
    from synthfast.training import generator

    wider = dataclasses.replace(generator.small_unet_config(8, 1, 10), block_out_channels=(16, 16))
    monkeypatch.setattr(generator, "small_unet_config", lambda *_: wider)
    with pytest.raises(SynthfastError, match="does not fit this model"):
        train(tmp_path, steps=4)


def test_a_run_that_diverges_is_stopped_and_saves_nothing(tiny, tmp_path):
    with pytest.raises(
        SynthfastError, match=r"step 2: .*expected finite numbers; the last checkpoint is kept, lower --lr"
    ):
        train(tmp_path, lr=1e30, warmup=0)
    assert not (tmp_path / STATE_FILE).exists()
    assert not (tmp_path / "model.safetensors").exists()


def test_options_that_do_not_fit(tiny, tmp_path):
    rectangles = write_npz(tmp_path / "set.npz", (8, 12, 1))
    with pytest.raises(UsageError, match="expected square images, found 8x12"):
        train(tmp_path / "run", dataset=rectangles)
    with pytest.raises(UsageError, match="--prediction v_prediction"):
        train(tmp_path / "run", prediction="v_prediction")
    (tmp_path / "file").write_text("")
    with pytest.raises(SynthfastError, match="file"):
        train(tmp_path / "file" / "run")


# Real processes: the command as users start it.

COMMAND = ["-m", "synthfast", "train", "generator", "--device", "cpu", "--batch-size", "8"]


def run(arguments, launcher=(), **extra):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, *launcher, *COMMAND, *arguments], env=environment, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, start_new_session=True, **extra,
    )  # fmt: skip


def finish(process):
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    return output


@pytest.fixture
def one_thread():
    """What the processes have: the last bits depend on it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_killed_and_started_again_gives_the_same_weights(tmp_path, one_thread):
    options = ["--steps", "6", "--checkpoint-every", "2", "--out", str(tmp_path / "killed")]
    killed = run(options)
    deadline = time.monotonic() + 60
    while not (tmp_path / "killed" / STATE_FILE).exists():
        assert time.monotonic() < deadline and killed.poll() is None
        time.sleep(0.01)
    time.sleep(0.25 * np.random.default_rng(1).random())
    os.killpg(killed.pid, signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    finish(run(options))
    train(tmp_path / "straight", steps=6, checkpoint_every=2)
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("killed", "straight")]
    assert weights[0] == weights[1]
    assert same_tensors(tmp_path / "killed" / STATE_FILE, tmp_path / "straight" / STATE_FILE)


def test_two_ranks_train_what_one_does(tmp_path, one_thread):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(port)]
    finish(run(["--steps", "4", "--out", str(tmp_path / "two")], launcher))
    train(tmp_path / "one", steps=4)
    one, two = (load_tensors(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert max((one[key] - two[key]).abs().max().item() for key in one) < 1e-5
    assert read_json(tmp_path / "one/config.json", "")["training"]["steps_done"] == 4
