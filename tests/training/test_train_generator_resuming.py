"""A training folder across runs: what may change, what may not, and where a run may be cut."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch

from synthfast.artifacts import read_json, save_checkpoint
from synthfast.errors import SynthfastError, UsageError
from synthfast.training import generator
from synthfast.training.state import STATE_FILE


@pytest.fixture(autouse=True)
def _tiny(tiny):
    """Every test here trains the tiny network."""


class Stopped(Exception):
    """Stands for whatever ends a run."""


@pytest.mark.parametrize(
    "options",
    [{}, {"flip": True, "warmup": 4}, {"loss": "ddpm-cosine", "batch_size": 200}, {"precision": "bf16"}],
    ids=["plain", "flip", "passes", "bf16"],
)
def test_more_steps_later_equal_more_steps_at_once(train, same_results, tmp_path, options):
    """A run goes on as if it had never stopped; batches of 200 cross from one pass over the 500 digits to the next."""
    train(tmp_path / "straight", steps=5, **options)
    train(tmp_path / "resumed", steps=3, **options)
    result = train(tmp_path / "resumed", steps=5, **options)
    assert (result.steps, result.made) == (5, 2)
    assert same_results(tmp_path / "straight", tmp_path / "resumed")


def test_dropout_resumes_too(train, tiny, same_results, tmp_path):
    for rate in (0.5, 0.0):
        tiny(dropout=rate)
        train(tmp_path / f"straight-{rate}", steps=4)
    tiny(dropout=0.5)
    train(tmp_path / "resumed", steps=2)
    torch.manual_seed(123)  # what another process would have there
    train(tmp_path / "resumed", steps=4)
    assert same_results(tmp_path / "straight-0.5", tmp_path / "resumed")
    assert not same_results(tmp_path / "straight-0.0", tmp_path / "resumed")


def test_stopped_between_checkpoints_it_goes_on_from_the_last_one(train, same_results, tmp_path):
    train(tmp_path / "straight", steps=7, checkpoint_every=3)

    def stop(progress) -> None:
        if progress.step == 3:  # reports come at checkpoints, and once a second between them
            raise Stopped

    with pytest.raises(Stopped):
        train(tmp_path / "stopped", stop, steps=7, checkpoint_every=3)
    reports = []
    result = train(tmp_path / "stopped", reports.append, steps=7, checkpoint_every=3)
    assert (result.steps, result.made) == (7, 4)
    assert {6, 7} <= {report.step for report in reports} <= {4, 5, 6, 7}
    assert same_results(tmp_path / "straight", tmp_path / "stopped")


@pytest.mark.parametrize("cut", ["_write_samples", "_description", "save_checkpoint", "save_state"])
def test_cut_within_a_checkpoint_it_makes_it_again(train, same_results, tmp_path, monkeypatch, cut):
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


def test_cut_before_the_first_state_it_starts_again(train, same_results, tmp_path, monkeypatch):
    train(tmp_path / "straight")
    with monkeypatch.context() as patch:
        patch.setattr(generator, "save_state", lambda *_: (_ for _ in ()).throw(Stopped))
        with pytest.raises(Stopped):
            train(tmp_path / "cut")
    assert (tmp_path / "cut" / "config.json").exists() and not (tmp_path / "cut" / STATE_FILE).exists()
    assert train(tmp_path / "cut").made == 2
    assert same_results(tmp_path / "straight", tmp_path / "cut")


def test_what_does_not_change_the_result_may_differ(train, write_npz, tmp_path):
    source = write_npz(tmp_path / "set.npz")
    train(tmp_path / "run", dataset=source)
    shutil.move(tmp_path / "set.npz", tmp_path / "moved.npz")
    shutil.move(tmp_path / "run", tmp_path / "moved")
    options = {"dataset": f"npz:{tmp_path / 'moved.npz'}", "data_dir": "elsewhere", "checkpoint_every": 1}
    assert train(tmp_path / "moved", steps=3, **options).made == 1


def test_what_changes_the_result_is_refused_by_name(train, tmp_path):
    train(tmp_path, steps=1)
    state = (tmp_path / STATE_FILE).read_bytes()
    for options in (
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
    ):
        with pytest.raises(UsageError) as caught:
            train(tmp_path, **options)
        message = str(caught.value)
        assert message.startswith(f"--{next(iter(options)).replace('_', '-')}: {tmp_path} was made with ")
        assert message.endswith("; repeat the command that made it, or choose another --out") and "\n" not in message
    assert (tmp_path / STATE_FILE).read_bytes() == state


def test_changed_images_under_the_same_name_are_refused(train, write_npz, tmp_path):
    train(tmp_path / "run", dataset=write_npz(tmp_path / "set.npz"))
    source = write_npz(tmp_path / "set.npz", seed=1)
    with pytest.raises(UsageError, match=r"^--dataset \(its images\): .* was made with "):
        train(tmp_path / "run", dataset=source, steps=3)


def test_precision_and_flip_are_compared_as_they_are_used(train, tmp_path):
    train(tmp_path, steps=1)  # precision auto is fp32 on a CPU, digits are not flipped
    assert train(tmp_path, precision="fp32", flip=False).made == 1
    facts = read_json(tmp_path / "config.json", "checkpoint")["training"]
    assert (facts["precision"], facts["flip"]) == ("fp32", False)


def test_fewer_steps_than_were_made_change_nothing(train, tmp_path):
    train(tmp_path, steps=3)
    before = (tmp_path / STATE_FILE).read_bytes()
    result = train(tmp_path, steps=1)
    assert (result.steps, result.made) == (3, 0) and np.isnan(result.loss)
    assert result.picture == tmp_path / "samples-000003.png" and result.picture.exists()
    assert (tmp_path / STATE_FILE).read_bytes() == before


def test_weights_that_are_not_finite_are_not_saved(train, tmp_path, monkeypatch):
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


def test_the_last_checkpoint_is_kept_when_a_run_diverges(train, tmp_path, monkeypatch):
    train(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    real = generator._Job._step
    monkeypatch.setattr(generator._Job, "_step", lambda *arguments: real(*arguments) * float("nan"))
    with pytest.raises(SynthfastError, match=r"^step 3: the loss is nan, expected finite numbers; the last checkpoint"):
        train(tmp_path, steps=3)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_the_folder_of_something_else_is_refused(train, tmp_path):
    save_checkpoint(tmp_path / "classifier", "classifier", {}, {"w": torch.ones(1)})
    with pytest.raises(UsageError, match="a checkpoint of kind 'classifier', this command would overwrite it"):
        train(tmp_path / "classifier")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"_class_name": "UNet2DModel"}')
    with pytest.raises(UsageError, match="no checkpoint of synthfast, this command would overwrite it"):
        train(tmp_path / "model")
