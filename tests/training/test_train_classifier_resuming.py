"""A classifier's folder across runs: cut anywhere, it goes on as if nothing had happened; finished, it is left alone."""

from __future__ import annotations

import math
import shutil

import pytest
import torch

from synthfast.artifacts import load_checkpoint, save_checkpoint
from synthfast.errors import SynthfastError, UsageError
from synthfast.training import classifier
from synthfast.training.state import STATE_FILE


class Stopped(Exception):
    """Stands for whatever ends a run."""


def stop_at(step):
    """A report that ends the run; reports come at checkpoints, and once a second between them."""

    def report(progress):
        if progress.step == step:
            raise Stopped

    return report


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"method": "pgd", "ema": 0.9, "flip": True, "crop": 1},
        {"method": "pgd", "norm": "l2", "batch_size": 200},
        {"method": "trades", "cutmix": 0.5, "label_smoothing": 0.1, "schedule": "onecycle"},
        {"method": "trades", "precision": "bf16"},
        {"method": "pgd", "validation": 0.2, "ema": 0.5},
        {"model": "preact-resnet-18", "batch_size": 8},
    ],
    ids=["standard", "pgd", "passes", "trades", "bf16", "validation", "resnet"],
)
def test_stopped_between_checkpoints_it_goes_on_from_the_last_one(fit, same_results, tmp_path, options):
    """Bit for bit; batches of 200 cross from one pass over the 500 digits to the next."""
    options = {"steps": 5, "checkpoint_every": 2, **options}
    straight = fit(tmp_path / "straight", **options)
    with pytest.raises(Stopped):
        fit(tmp_path / "stopped", stop_at(2), **options)
    torch.manual_seed(123)  # what another process would have there
    resumed = fit(tmp_path / "stopped", **options)
    assert (resumed.steps, resumed.made) == (5, 3)
    assert (resumed.validation, resumed.best_step) == (straight.validation, straight.best_step)
    assert same_results(tmp_path / "straight", tmp_path / "stopped")


def test_dropout_resumes_too(fit, same_results, tmp_path, monkeypatch):
    real = classifier.make_classifier

    def with_dropout(*arguments):
        model = real(*arguments)
        description = model.description
        model = torch.nn.Sequential(model, torch.nn.Dropout(0.5))
        model.description = description
        return model

    fit(tmp_path / "without", steps=4, checkpoint_every=2)
    monkeypatch.setattr(classifier, "make_classifier", with_dropout)
    fit(tmp_path / "straight", steps=4, checkpoint_every=2)
    with pytest.raises(Stopped):
        fit(tmp_path / "stopped", stop_at(2), steps=4, checkpoint_every=2)
    torch.manual_seed(123)
    fit(tmp_path / "stopped", steps=4, checkpoint_every=2)
    assert same_results(tmp_path / "straight", tmp_path / "stopped")
    weights = [load_checkpoint(tmp_path / name, "classifier")[1] for name in ("straight", "without")]
    assert not torch.equal(weights[0]["0.head.weight"], weights[1]["head.weight"])


@pytest.mark.parametrize("cut", ["_validate", "_description", "save_checkpoint", "save_state"])
def test_cut_within_a_checkpoint_it_makes_it_again(fit, same_results, tmp_path, monkeypatch, cut):
    """Before the validation, after it, after the weights and their configuration, or just before the state."""

    def stop(*_: object, **__: object) -> None:
        raise Stopped

    options = {"steps": 4, "checkpoint_every": 2, "validation": 50}
    monkeypatch.setattr(classifier._Job, "_validate", lambda job, images: 0.5)  # every checkpoint is kept
    straight = fit(tmp_path / "straight", **options)
    with pytest.raises(Stopped):
        fit(tmp_path / "cut", stop_at(2), **options)
    with monkeypatch.context() as patch:
        patch.setattr(classifier._Job if cut.startswith("_") else classifier, cut, stop)
        with pytest.raises(Stopped):
            fit(tmp_path / "cut", **options)
    again = fit(tmp_path / "cut", **options)
    assert (again.made, again.validation, again.best_step) == (2, straight.validation, straight.best_step)
    assert same_results(tmp_path / "straight", tmp_path / "cut")


def test_the_best_so_far_is_remembered(fit, tmp_path, monkeypatch):
    """A run that is resumed compares with what was measured before it was cut."""
    scores = iter([0.9, 0.5, 0.6])
    monkeypatch.setattr(classifier._Job, "_validate", lambda job, images: next(scores))
    options = {"steps": 6, "checkpoint_every": 2, "validation": 50}
    with pytest.raises(Stopped):
        fit(tmp_path, stop_at(2), **options)
    before = (tmp_path / "model.safetensors").read_bytes()
    result = fit(tmp_path, **options)
    assert (result.validation, result.best_step) == (0.9, 2)
    assert (tmp_path / "model.safetensors").read_bytes() == before


def test_a_finished_run_is_left_alone(fit, tmp_path):
    first = fit(tmp_path, validation=50)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    reports = []
    again = fit(tmp_path, reports.append, validation=50)
    assert (again.steps, again.made, again.best_step) == (3, 0, 3) and math.isnan(again.loss) and reports == []
    assert again.validation == first.validation
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("steps", [2, 4])
def test_another_number_of_steps_is_another_run(fit, tmp_path, steps):
    """The schedule depends on it: the rates of the steps already made would have been others."""
    fit(tmp_path)
    with pytest.raises(UsageError, match=rf"^--steps: .* was made with 3, this command says {steps}; repeat"):
        fit(tmp_path, steps=steps)


def test_what_does_not_change_the_result_may_differ(fit, same_results, write_npz, write_shards, copies, tmp_path):
    source = write_npz(tmp_path / "set.npz")
    options = {"batch_size": 8, "steps": 4, "checkpoint_every": 2, "fraction": 0.0, "synthetic": (copies,)}
    fit(tmp_path / "straight", dataset=source, **options)
    with pytest.raises(Stopped):
        fit(tmp_path / "run", stop_at(2), dataset=source, **options)
    for old, new in (("set.npz", "moved.npz"), ("run", "moved"), ("copies", "elsewhere")):
        shutil.move(tmp_path / old, tmp_path / new)
    options |= {"data_dir": "there", "checkpoint_every": 3, "synthetic": (str(tmp_path / "elsewhere"),)}
    # What a recipe would have set stands in the options themselves: its name decides nothing.
    moved = fit(tmp_path / "moved", dataset=f"npz:{tmp_path / 'moved.npz'}", recipe="mine.toml", **options)
    assert moved.made == 2
    assert same_results(tmp_path / "straight", tmp_path / "moved")


def test_what_changes_the_result_is_refused_by_name(fit, copies, tmp_path):
    options = {"method": "trades", "synthetic": (copies,), "steps": 1, "validation": 0.1}
    fit(tmp_path / "run", **options)
    state = (tmp_path / "run" / STATE_FILE).read_bytes()
    for change in (
        {"fraction": 0.25},
        {"synthetic_n": 100},
        {"model": "small-cnn-swish"},
        {"norm": "l2"},
        {"eps": 0.1},
        {"attack_steps": 3},
        {"step_size": 0.1},
        {"beta": 1.0},
        {"batch_size": 16},
        {"lr": 0.5},
        {"schedule": "onecycle"},
        {"warmup": 0.3},
        {"momentum": 0.8},
        {"weight_decay": 0.1},
        {"label_smoothing": 0.2},
        {"crop": 1},
        {"flip": True},
        {"cutmix": 0.3},
        {"validation": 0.2},
        {"seed": 1},
        {"precision": "bf16"},
        {"checkpoint_every": 7},
        {"method": "pgd"},
    ):
        with pytest.raises(UsageError) as caught:
            fit(tmp_path / "run", **{**options, **change})
        message = str(caught.value)
        assert message.startswith(f"--{next(iter(change)).replace('_', '-')}: {tmp_path / 'run'} was made with ")
        assert message.endswith("; repeat the command that made it, or choose another --out") and "\n" not in message
    assert (tmp_path / "run" / STATE_FILE).read_bytes() == state


def test_an_average_cannot_be_added_later(fit, tmp_path):
    fit(tmp_path)
    with pytest.raises(UsageError, match=r"^--ema: .* was made with 0\.0, this command says 0\.9"):
        fit(tmp_path, ema=0.9)


def test_defaults_are_compared_as_they_are_used(fit, tmp_path):
    with pytest.raises(Stopped):
        fit(tmp_path, stop_at(2), method="pgd", checkpoint_every=2)
    said = {"eps": 8 / 255, "step_size": 2 / 255, "precision": "fp32", "crop": 0, "flip": False, "warmup": 0.1}
    assert fit(tmp_path, method="pgd", model="small-cnn", fraction=0.0, checkpoint_every=2, **said).made == 1


def test_changed_images_under_the_same_name_are_refused(fit, write_npz, tmp_path):
    fit(tmp_path / "run", dataset=write_npz(tmp_path / "set.npz"), batch_size=8)
    source = write_npz(tmp_path / "set.npz", seed=1)
    with pytest.raises(UsageError, match=r"^--dataset or --synthetic \(their images\): .* was made with "):
        fit(tmp_path / "run", dataset=source, batch_size=8)


def test_the_last_checkpoint_is_kept_when_a_run_diverges(fit, tmp_path, monkeypatch):
    with pytest.raises(Stopped):
        fit(tmp_path, stop_at(2), steps=4, checkpoint_every=2)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    real = classifier._Job._step
    monkeypatch.setattr(classifier._Job, "_step", lambda *arguments: real(*arguments) * float("nan"))
    with pytest.raises(SynthfastError, match=r"^step 4: the loss is nan, expected finite numbers; the last checkpoint"):
        fit(tmp_path, steps=4, checkpoint_every=2)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_the_folder_of_something_else_is_refused(fit, tmp_path):
    save_checkpoint(tmp_path / "generator", "diffusion", {}, {"w": torch.ones(1)})
    with pytest.raises(UsageError, match="a checkpoint of kind 'diffusion', this command would overwrite it"):
        fit(tmp_path / "generator")
