"""The state file: what comes back, and what is refused."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from synthfast.artifacts import Lock, load_kept, save_tensors
from synthfast.distributed import Ranks
from synthfast.errors import SynthfastError, UsageError
from synthfast.training.state import STATE_FILE, exclusive, load_state, save_state

CONFIG = {"lr": 0.1, "name": "toy", "flip": None, "steps": 10}


def network(width: int = 4) -> tuple[dict[str, nn.Module], torch.optim.Optimizer]:
    model, average = nn.Linear(3, width), nn.Linear(3, width)
    return {"model": model, "ema": average}, torch.optim.AdamW(model.parameters(), lr=0.1)


def step(modules: dict[str, nn.Module], optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    modules["model"](torch.ones(2, 3)).square().sum().backward()
    optimizer.step()


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, dict[str, nn.Module], torch.optim.Optimizer]:
    modules, optimizer = network()
    step(modules, optimizer)
    step(modules, optimizer)
    save_state(tmp_path, 2, CONFIG, modules, optimizer)
    return tmp_path, modules, optimizer


def test_everything_comes_back(saved):
    folder, modules, optimizer = saved
    others, other_optimizer = network()
    assert load_state(folder, CONFIG, others, other_optimizer) == 2
    for _ in range(3):  # equal now and after more steps, so the optimizer's moments and step count are back too
        for name, module in modules.items():
            for mine, theirs in zip(module.parameters(), others[name].parameters(), strict=True):
                assert torch.equal(mine, theirs)
        step(modules, optimizer)
        step(others, other_optimizer)


def test_a_folder_without_a_state_starts_at_0(tmp_path):
    modules, optimizer = network()
    assert load_state(tmp_path, CONFIG, modules, optimizer) == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lr": 0.2}, "--lr: FOLDER was made with 0.1, this command says 0.2; repeat"),
        ({"flip": True}, "--flip: FOLDER was made with nothing, this command says true; repeat"),
        ({"name": "other"}, '--the-name: FOLDER was made with "toy", this command says "other"; repeat'),
        ({"new_one": 1}, "--new-one: FOLDER was made with nothing, this command says 1; repeat"),
    ],
)
def test_another_configuration_is_refused_with_the_difference(saved, changes, message):
    folder, modules, optimizer = saved
    with pytest.raises(UsageError) as caught:
        load_state(folder, {**CONFIG, **changes}, modules, optimizer, options={"name": "--the-name"})
    assert str(caught.value).startswith(message.replace("FOLDER", str(folder)))
    assert load_state(folder, {**CONFIG, **changes}, modules, optimizer, may_differ=tuple(changes)) == 2


def test_a_state_of_another_architecture_is_refused(saved):
    modules, optimizer = network(width=5)
    with pytest.raises(SynthfastError, match="does not fit this model") as caught:
        load_state(saved[0], CONFIG, modules, optimizer)
    assert "\n" not in str(caught.value)


def rewrite(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Change the tensors of a state file and leave its metadata; the digest is right."""
    tensors, metadata = load_kept(path)
    change(tensors)
    save_tensors(path, tensors, metadata)


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors: tensors.pop("ema.bias"),
        lambda tensors: tensors.update({"ema.more": torch.zeros(1)}),
        lambda tensors: tensors.update({"model.bias": torch.zeros(5)}),
        lambda tensors: tensors.pop("optimizer.1.exp_avg"),
        lambda tensors: [tensors.pop(key) for key in list(tensors) if key.startswith("optimizer.0.")],
        lambda tensors: [tensors.pop(key) for key in list(tensors) if key.startswith("optimizer.")],
        lambda tensors: tensors.update({"optimizer.2.exp_avg": torch.zeros(4)}),
        lambda tensors: tensors.update({"optimizer.one.exp_avg": torch.zeros(4)}),
        lambda tensors: tensors.update({"optimizer.1.exp_avg": torch.zeros(3)}),
    ],
)
def test_a_state_whose_tensors_do_not_fit_is_refused(saved, change):
    path = saved[0] / STATE_FILE
    rewrite(path, change)
    with pytest.raises(SynthfastError, match="does not fit this model") as caught:
        load_state(saved[0], CONFIG, *network())
    assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)


def test_the_optimizer_gets_its_memory_layout_back(tmp_path):
    """Its tensors are laid out as the weights are, so that a resumed run rounds as one that was never stopped."""
    convolution = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(convolution.parameters())
    convolution(torch.ones(1, 3, 5, 5)).sum().backward()
    optimizer.step()
    before = optimizer.state[convolution.weight]
    save_state(tmp_path, 1, CONFIG, {"model": convolution}, optimizer)
    optimizer = torch.optim.AdamW(convolution.parameters())
    load_state(tmp_path, CONFIG, {"model": convolution}, optimizer)
    after = optimizer.state[convolution.weight]
    for key in ("exp_avg", "exp_avg_sq"):
        assert after[key].stride() == before[key].stride() == convolution.weight.stride()
        assert torch.equal(after[key], before[key])
    assert convolution.weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("keep", [0, 4, 100, 900])
def test_a_truncated_state_is_refused(saved, keep):
    path = saved[0] / STATE_FILE
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(SynthfastError, match="not a readable training state") as caught:
        load_state(saved[0], CONFIG, *network())
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "metadata",
    [
        None,
        {"step": "2"},
        {"config": json.dumps(CONFIG)},
        {"step": "two", "config": json.dumps(CONFIG)},
        {"step": "-1", "config": json.dumps(CONFIG)},
        {"step": "2", "config": "{"},
        {"step": "2", "config": "[]"},
        {"step": "2", "config": "[" * 100_000},
        {"step": "9" * 5000, "config": json.dumps(CONFIG)},
    ],
)
def test_a_state_with_other_metadata_is_refused(tmp_path, metadata):
    save_file({"model.weight": torch.zeros(4, 3)}, tmp_path / STATE_FILE, metadata)
    with pytest.raises(SynthfastError, match="not a readable training state") as caught:
        load_state(tmp_path, CONFIG, *network())
    assert "remove it to start again" in str(caught.value) and "\n" not in str(caught.value)


def test_a_pipe_is_refused(tmp_path):
    os.mkfifo(tmp_path / STATE_FILE)
    with pytest.raises(SynthfastError, match="expected a file, found a pipe"):
        load_state(tmp_path, CONFIG, *network())


def test_a_damaged_state_lets_go_of_the_lock(saved):
    path = saved[0] / STATE_FILE
    path.write_bytes(path.read_bytes()[:100])
    with Ranks("cpu") as ranks, pytest.raises(SynthfastError, match="not a readable") as caught:
        exclusive(saved[0], 2, ranks).__enter__()
    with Lock(saved[0]):  # while the error, and with it everything it has seen, is held
        assert caught


def test_a_flipped_bit_anywhere_is_refused(saved):
    path = saved[0] / STATE_FILE
    whole = path.read_bytes()
    for place in np.random.default_rng(0).choice(len(whole), 200, replace=False):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << int(place) % 8
        path.write_bytes(damaged)
        with pytest.raises(SynthfastError) as caught:
            load_state(saved[0], CONFIG, *network())
        assert "\n" not in str(caught.value)
    path.write_bytes(whole)
    assert load_state(saved[0], CONFIG, *network()) == 2


def test_a_state_without_a_digest_is_refused(saved):
    path = saved[0] / STATE_FILE
    tensors, metadata = load_kept(path)
    save_file(tensors, path, metadata)
    with pytest.raises(SynthfastError, match=r"has no 'digest', so another program or an older synthfast wrote it"):
        load_state(saved[0], CONFIG, *network())


def test_a_run_keeps_others_out_and_sees_who_was_there_before(saved):
    folder, *state = saved
    with Ranks("cpu") as ranks:
        with exclusive(folder, 2, ranks), pytest.raises(SynthfastError, match="another process is writing this folder"):
            Lock(folder)
        save_state(folder, 3, CONFIG, *state)
        with pytest.raises(
            SynthfastError, match="has trained here since step 2 was loaded, found step 3; run the same"
        ):
            exclusive(folder, 2, ranks).__enter__()
        with pytest.raises(ZeroDivisionError), exclusive(folder, 3, ranks):
            raise ZeroDivisionError
        Lock(folder).close()
        (folder / STATE_FILE).unlink()
        with exclusive(folder, 0, ranks):
            pass
