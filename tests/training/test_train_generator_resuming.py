"""A training folder across runs: what may change, what may not, and where a run may be cut."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from synthfast.artifacts import load_tensors, read_json, save_checkpoint
from synthfast.config import GeneratorConfig
from synthfast.data import ShardFolder
from synthfast.distributed import Ranks
from synthfast.errors import SynthfastError, UsageError
from synthfast.training import generator, train_generator
from synthfast.training.state import STATE_FILE


@pytest.fixture(autouse=True)
def _tiny(tiny):
    """Every test here trains the tiny network."""


def train(out: Path, report=None, **options: object):
    config = GeneratorConfig(**{"out": str(out), "device": "cpu", "batch_size": 8, "steps": 2, **options})
    with Ranks("cpu") as ranks:
        return train_generator(config, ranks, report)


def npz(path: Path, seed: int = 0) -> str:
    random = np.random.default_rng(seed)
    np.savez(path, image=random.integers(0, 256, (12, 8, 8), np.uint8), label=np.arange(12) % 3)
    return f"npz:{path}"


def same_results(first: Path, second: Path) -> bool:
    """Bit for bit: the averaged weights, and every tensor of the state (weights, average, optimizer)."""
    states = [load_tensors(folder / STATE_FILE) for folder in (first, second)]
    assert states[0].keys() == states[1].keys() and len(states[0]) > 300
    return (first / "model.safetensors").read_bytes() == (second / "model.safetensors").read_bytes() and all(
        torch.equal(states[0][key], states[1][key]) for key in states[0]
    )


class Stopped(Exception):
    """Stands for whatever ends a run."""


def test_stopped_between_checkpoints_it_goes_on_from_the_last_one(tmp_path):
    train(tmp_path / "straight", steps=7, checkpoint_every=3)

    def stop(progress) -> None:
        assert progress.step == 3
        raise Stopped

    with pytest.raises(Stopped):
        train(tmp_path / "stopped", stop, steps=7, checkpoint_every=3)
    reports = []
    result = train(tmp_path / "stopped", reports.append, steps=7, checkpoint_every=3)
    assert (result.steps, result.made, [report.step for report in reports]) == (7, 4, [6, 7])
    assert same_results(tmp_path / "straight", tmp_path / "stopped")


@pytest.mark.parametrize("cut", ["_write_samples", "_description", "save_checkpoint", "save_state"])
def test_cut_within_a_checkpoint_it_makes_it_again(tmp_path, monkeypatch, cut):
    """Before the picture, after it, after the weights and their configuration, or just before the state."""

    def stop(*_: object, **__: object) -> None:
        raise Stopped

    train(tmp_path / "straight", steps=4, checkpoint_every=2)
    train(tmp_path / "cut")
    with monkeypatch.context() as patch:
        patch.setattr(generator._Job if cut.startswith("_") else generator, cut, stop)
        with pytest.raises(Stopped):
            train(tmp_path / "cut", steps=4)
    assert train(tmp_path / "cut", steps=4).made == 2
    assert same_results(tmp_path / "straight", tmp_path / "cut")


def test_cut_before_the_first_state_it_starts_again(tmp_path, monkeypatch):
    train(tmp_path / "straight")
    with monkeypatch.context() as patch:
        patch.setattr(generator, "save_state", lambda *_: (_ for _ in ()).throw(Stopped))
        with pytest.raises(Stopped):
            train(tmp_path / "cut")
    assert (tmp_path / "cut" / "config.json").exists() and not (tmp_path / "cut" / STATE_FILE).exists()
    assert train(tmp_path / "cut").made == 2
    assert same_results(tmp_path / "straight", tmp_path / "cut")


def test_what_does_not_change_the_result_may_differ(tmp_path):
    source = npz(tmp_path / "set.npz")
    train(tmp_path / "run", dataset=source)
    shutil.move(tmp_path / "set.npz", tmp_path / "moved.npz")
    shutil.move(tmp_path / "run", tmp_path / "moved")
    options = {"dataset": f"npz:{tmp_path / 'moved.npz'}", "data_dir": "elsewhere", "checkpoint_every": 1}
    assert train(tmp_path / "moved", steps=3, **options).made == 1


@pytest.mark.parametrize(
    "options",
    [
        {"batch_size": 4},
        {"lr": 0.5},
        {"warmup": 3},
        {"weight_decay": 0.1},
        {"clip_norm": 2.0},
        {"ema": 0.5},
        {"loss": "ddpm-cosine"},
        {"loss": "ddpm-linear", "prediction": "sample"},
        {"sigma_data": 0.4},
        {"label_dropout": 0.2},
        {"conditional": False},
        {"flip": True},
        {"seed": 1},
        {"precision": "bf16"},
    ],
)
def test_what_changes_the_result_is_refused_by_name(tmp_path, options):
    train(tmp_path, steps=1)
    state = (tmp_path / STATE_FILE).read_bytes()
    with pytest.raises(UsageError) as caught:
        train(tmp_path, **options)
    message = str(caught.value)
    assert message.startswith(f"--{next(iter(options)).replace('_', '-')}: {tmp_path} was made with ")
    assert message.endswith("; repeat the command that made it, or choose another --out") and "\n" not in message
    assert (tmp_path / STATE_FILE).read_bytes() == state


def test_other_images_are_refused_by_name(tmp_path):
    train(tmp_path / "run", dataset=npz(tmp_path / "a.npz"))
    with pytest.raises(UsageError, match=r"^--dataset \(its images\): .* was made with "):
        train(tmp_path / "run", dataset=npz(tmp_path / "b.npz", seed=1), steps=3)


def test_precision_and_flip_are_compared_as_they_are_used(tmp_path):
    train(tmp_path, steps=1)  # precision auto is fp32 on a CPU, digits are not flipped
    assert train(tmp_path, precision="fp32", flip=False).made == 1
    facts = read_json(tmp_path / "config.json", "checkpoint")["training"]
    assert (facts["precision"], facts["flip"]) == ("fp32", False)


def test_fewer_steps_than_were_made_change_nothing(tmp_path):
    train(tmp_path, steps=3)
    before = (tmp_path / STATE_FILE).read_bytes()
    result = train(tmp_path, steps=1)
    assert (result.steps, result.made) == (3, 0) and np.isnan(result.loss)
    assert result.picture == tmp_path / "samples-000003.png" and result.picture.exists()
    assert (tmp_path / STATE_FILE).read_bytes() == before


def test_flips_and_seeds_change_the_weights(tmp_path):
    for name, options in (("a", {}), ("b", {}), ("flip", {"flip": True}), ("seed", {"seed": 1})):
        train(tmp_path / name, **options)
    weights = {name: (tmp_path / name / "model.safetensors").read_bytes() for name in ("a", "b", "flip", "seed")}
    assert weights["a"] == weights["b"] and len(set(weights.values())) == 3


def test_every_step_sees_other_images_and_every_pass_all_of_them(tmp_path, monkeypatch):
    seen = []
    real = generator.read_batch
    monkeypatch.setattr(generator, "read_batch", lambda images, items: (seen.append(items), real(images, items))[1])
    train(tmp_path / "run", dataset=npz(tmp_path / "set.npz"), steps=3, batch_size=8)
    assert [len(items) for items in seen] == [8, 8, 8]
    assert sorted(np.concatenate(seen)) == sorted([*range(12)] * 2)


def test_a_shard_folder_is_a_data_set(tmp_path):
    request = {"n": 6, "shape": [8, 8, 3], "classes": 4, "shard_size": 6}
    with ShardFolder.create_or_resume(tmp_path / "shards", request) as folder:
        with folder.writer(0) as writer:
            writer.append(np.zeros((6, 8, 8, 3), np.uint8), np.arange(6) % 4)
            writer.commit()
        folder.finish()
    train(tmp_path / "run", dataset=str(tmp_path / "shards"))
    config = read_json(tmp_path / "run" / "config.json", "checkpoint")
    assert (config["shape"], config["classes"]) == ([8, 8, 3], 4)


@pytest.mark.parametrize("ranks", [3, 16])
def test_a_batch_that_the_ranks_cannot_share_is_refused(tmp_path, ranks):
    alone = Ranks("cpu")
    alone.world_size = ranks
    with pytest.raises(UsageError, match=f"^--batch-size 8: expected a multiple of the {ranks} ranks; change one"):
        train_generator(GeneratorConfig(out=str(tmp_path), batch_size=8), alone)


def test_weights_that_are_not_finite_are_not_saved(tmp_path, monkeypatch):
    """The step's own loss is still finite: it was computed before the step."""
    real = generator._Job._step

    def overflow(job, *arguments):
        loss = real(job, *arguments)
        with torch.no_grad():
            job.model.conv_in.bias[0] = float("inf")
        return loss

    monkeypatch.setattr(generator._Job, "_step", overflow)
    with pytest.raises(
        SynthfastError, match=r"^step 1: a weight is not finite, expected finite numbers; .* lower --lr"
    ):
        train(tmp_path, steps=1)
    assert not list(tmp_path.iterdir())


def test_the_last_checkpoint_is_kept_when_a_run_diverges(tmp_path, monkeypatch):
    train(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    real = generator._Job._step
    monkeypatch.setattr(generator._Job, "_step", lambda *arguments: real(*arguments) * float("nan"))
    with pytest.raises(SynthfastError, match=r"^step 3: the loss is nan, expected finite numbers; the last checkpoint"):
        train(tmp_path, steps=3)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_the_folder_of_something_else_is_refused(tmp_path):
    save_checkpoint(tmp_path / "classifier", "classifier", {}, {"w": torch.ones(1)})
    with pytest.raises(UsageError, match="a checkpoint of kind 'classifier', this command would overwrite it"):
        train(tmp_path / "classifier")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"_class_name": "UNet2DModel"}')
    with pytest.raises(UsageError, match="no checkpoint of synthfast, this command would overwrite it"):
        train(tmp_path / "model")
