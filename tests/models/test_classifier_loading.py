"""load_classifier: checkpoint folders and files of weights, and what does not fit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from synthfast.artifacts import save_checkpoint, save_tensors
from synthfast.errors import SynthfastError, UsageError
from synthfast.models import build_classifier, describe_classifier, load_classifier, make_classifier

CPU = torch.device("cpu")
KINDS = ("small-cnn", "small-cnn-swish", "resnet-18", "preact-resnet-18-swish", "wrn-10-2", "wrn-10-2-swish")


def one_line(kind: type[SynthfastError], *arguments, **options) -> str:
    with pytest.raises(SynthfastError) as caught:
        load_classifier(*arguments, **options)
    assert type(caught.value) is kind and "\n" not in str(caught.value)
    return str(caught.value)


def save(folder: Path, model: torch.nn.Module, **values) -> Path:
    description = model.description
    config = {"shape": description["shape"], "classes": description["classes"], "model": description, **values}
    save_checkpoint(folder, "classifier", config, model.state_dict())
    return folder


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A classifier of 4x5 colour images in 3 classes with random weights."""
    torch.manual_seed(0)
    model = build_classifier(describe_classifier("small-cnn", (4, 5, 3), 3, widths=[4, 8]))
    return save(tmp_path / "cnn", model, class_names=None)


@pytest.mark.parametrize("name", KINDS)
def test_a_folder_gives_back_the_network(name, tmp_path, randomize, generator):
    model = randomize(make_classifier(name, (9, 8, 2), 3, mean=(0.2, 0.4), std=0.3))
    torch.manual_seed(5)
    before = torch.get_rng_state()
    loaded, config = load_classifier(save(tmp_path / "x", model, note="kept"), CPU)
    assert torch.equal(torch.get_rng_state(), before)
    assert config["note"] == "kept" and loaded.description == model.description
    assert not any(module.training for module in loaded.modules())
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    weights = [tensor for tensor in loaded.parameters() if tensor.dim() == 4]
    assert all(tensor.is_contiguous(memory_format=torch.channels_last) for tensor in weights)
    images = torch.rand(3, 2, 9, 8, generator=generator)
    with torch.inference_mode():
        assert torch.equal(loaded(images), model(images))
    load_classifier(tmp_path / "x", CPU, model=name, shape=(9, 8, 2), classes=3)


@pytest.mark.parametrize("name", KINDS)
def test_a_bare_file_of_our_own_weights(name, tmp_path, randomize, generator):
    """Mean and standard deviation are not in it, so it gets those that are given, or those of its name."""
    model = randomize(make_classifier(name, (8, 8, 1), 3, mean=0.2, std=0.3))
    path = tmp_path / "x.safetensors"
    save_tensors(path, model.state_dict())
    loaded, config = load_classifier(path, CPU, model=name, shape=(8, 8, 1), mean=0.2, std=0.3)
    assert loaded.description == model.description == config["model"]
    assert (config["name"], config["shape"], config["classes"], config["class_names"]) == (name, [8, 8, 1], 3, None)
    images = torch.rand(3, 1, 8, 8, generator=generator)
    with torch.inference_mode():
        assert torch.equal(loaded(images), model(images))
    other, config = load_classifier(path, CPU, model=name)
    expected = describe_classifier(name, (32, 32, 1), 3)
    assert other.description == config["model"] == expected and config["shape"] == [32, 32, 1]


def test_the_widths_of_a_small_cnn_are_read_from_its_file(tmp_path):
    model = build_classifier(describe_classifier("small-cnn", (8, 8, 1), 3, widths=[4, 4, 6, 9]))
    save_tensors(tmp_path / "x.safetensors", model.state_dict())
    _, config = load_classifier(tmp_path / "x.safetensors", CPU, model="small-cnn")
    assert config["model"]["widths"] == [4, 4, 6, 9]


def test_weights_are_copies_and_train(checkpoint):
    """A file's tensors may lie in one piece of memory; the network's do not, and a step moves them."""
    model, _ = load_classifier(checkpoint, CPU)
    model.train()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    torch.nn.functional.cross_entropy(model(torch.rand(4, 3, 4, 5)), torch.tensor([0, 1, 2, 0])).backward()
    optimizer.step()
    assert not any(torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))
    again, _ = load_classifier(checkpoint, CPU)
    assert all(torch.equal(old, new) for old, new in zip(before, again.parameters(), strict=True))


@pytest.mark.parametrize(
    "values",
    [
        {"model": None},
        {"model": [1]},
        {"model": {"name": "small-cnn"}},
        {"model": {"name": "wrn-10-1"}},
        {"model": {"name": "no such"}},
        {"model": {"widths": [4, 9]}},
        {"model": {"widths": [4, 8, 8]}},
        {"model": {"widths": [4]}},
        {"model": {"depth": 1}},
        {"model": {"classes": 4}},
        {"model": {"shape": [4, 5, "3"]}},
        {"model": {"shape": [4, 5, 1], "mean": [0.5], "std": [0.5]}},
        {"model": {"std": [0.5, 0.5, 0.0]}},
        {"shape": None},
        {"shape": [4, 5]},
        {"shape": [4, 5, 1]},
        {"shape": [5, 4, 3]},
        {"classes": 4},
        {"classes": None},
    ],
)
def test_a_configuration_that_does_not_fit_the_weights_is_refused(checkpoint, values):
    path = checkpoint / "config.json"
    config = json.loads(path.read_text())
    if isinstance(values.get("model"), dict):
        values = {"model": {**({} if values["model"].keys() == {"name"} else config["model"]), **values["model"]}}
    path.write_text(json.dumps({**config, **values}))
    message = one_line(SynthfastError, checkpoint, CPU)
    assert message.startswith(f"{checkpoint}: the weights do not fit config.json (") and message.endswith(
        "; train again"
    )


@pytest.mark.parametrize("key", ["model", "shape", "classes"])
def test_a_missing_key_is_named(checkpoint, key):
    path = checkpoint / "config.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != key}))
    expected = f"{checkpoint}: the weights do not fit config.json ('{key}'); train again"
    assert one_line(SynthfastError, checkpoint, CPU) == expected


def test_a_tensor_that_does_not_fit_is_named(checkpoint):
    model, config = load_classifier(checkpoint, CPU)
    del config["sha256"]
    state = model.state_dict()
    for change, reason in (
        ({"head.bias": torch.zeros(4)}, "'head.bias': expected [3], found [4]"),
        ({"head.more": torch.zeros(3)}, "'head.more' is not part of small-cnn"),
        ({"head.bias": None}, "'head.bias' is missing"),
    ):
        changed = {key: tensor for key, tensor in {**state, **change}.items() if tensor is not None}
        save_checkpoint(checkpoint, "classifier", config, changed)
        assert one_line(SynthfastError, checkpoint, CPU).startswith(
            f"{checkpoint}: the weights do not fit config.json ({reason}"
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"model": "wrn-10-1"},
            "expected the network wrn-10-1, found small-cnn; ask for that, or choose other weights",
        ),
        ({"shape": (5, 4, 3)}, "expected images [5, 4, 3], found [4, 5, 3]; ask for that, or choose other weights"),
        ({"classes": 4}, "expected classes 4, found 3; ask for that, or choose other weights"),
        ({"mean": 0.5, "std": 0.5}, "mean and std stand in a checkpoint's config.json; leave them out"),
    ],
)
def test_a_folder_of_something_else_than_asked_for(checkpoint, options, message):
    assert one_line(UsageError, checkpoint, CPU, **options) == f"{checkpoint}: {message}"


def test_no_folder_and_no_file(tmp_path):
    assert one_line(SynthfastError, tmp_path / "none", CPU).startswith(
        f"{tmp_path / 'none' / 'config.json'}: no checkpoint"
    )
    message = one_line(SynthfastError, tmp_path / "none.pt", CPU, model="wrn-10-1", allow_pickle=True)
    assert message.startswith(f"{tmp_path / 'none.pt'}: no weights here")


@pytest.fixture
def wide(tmp_path: Path) -> Path:
    """A file of a Wide ResNet of depth 10 and width 1, for colour images in 3 classes."""
    save_tensors(tmp_path / "wide.safetensors", make_classifier("wrn-10-1", (32, 32, 3), 3).state_dict())
    return tmp_path / "wide.safetensors"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "a file of weights needs the name of its network; pass --model, one of small-cnn, "),
        ({"model": "wrn-16-1"}, "expected weights of wrn-16-1, found those of wrn-10-1; pass that as --model"),
        (
            {"model": "wrn-10-2-swish"},
            "expected weights of wrn-10-2-swish, found those of wrn-10-1; pass that as --model",
        ),
        ({"model": "resnet-18"}, "expected weights of resnet-18, found those of wrn-10-1; pass that as --model"),
        ({"model": "wrn-10-1", "classes": 10}, "expected classes 10, found 3; ask for that, or choose other weights"),
        (
            {"model": "wrn-10-1", "shape": (28, 28, 1)},
            "expected images [28, 28, 1], found [28, 28, 3]; ask for that, or choose other weights",
        ),
    ],
)
def test_a_file_of_something_else_than_asked_for(wide, options, message):
    assert one_line(UsageError, wide, CPU, **options).startswith(f"{wide}: {message}")


def test_names_and_shapes_are_checked_for_files_too(wide):
    assert one_line(UsageError, wide, CPU, model="wrn-9-1").startswith("wrn-9-1: expected a depth of 6n + 4")
    assert one_line(UsageError, wide, CPU, model="wrn-10-1", shape=(32, 3)).startswith("expected the shape of images")


def test_a_pickle_needs_leave(tmp_path):
    torch.save(make_classifier("wrn-10-1", (32, 32, 3), 3).state_dict(), tmp_path / "x.pt")
    assert "pass --allow-pickle" in one_line(SynthfastError, tmp_path / "x.pt", CPU, model="wrn-10-1")


def test_files_of_no_network_or_several_are_refused(tmp_path):
    path, state = tmp_path / "x.safetensors", make_classifier("wrn-10-1", (32, 32, 3), 3).state_dict()
    for tensors, message in (
        (
            {"w": torch.ones(1)},
            "expected weights of a ResNet, PreActResNet or WideResNet named as in RobustBench, found w",
        ),
        (
            {f"{prefix}{key}": tensor.clone() for key, tensor in state.items() for prefix in ("a.", "b.")},
            "expected one network, found 2 ('a.', 'b.'); save one alone",
        ),
        (
            {**{f"module.{key}": tensor for key, tensor in state.items()}, "step": torch.tensor(1)},
            "expected all weights to start with 'module.', found 'step'; save the network alone",
        ),
        ({**state, "popup": torch.ones(1)}, "the weights do not fit wrn-10-1 ('popup' is not part of wrn-10-1)"),
        (
            {key: value for key, value in state.items() if key != "fc.weight"},
            "expected the weight 'fc.weight' of a layer",
        ),
        (
            {key: value for key, value in state.items() if key != "fc.bias"},
            "the weights do not fit wrn-10-1 ('fc.bias' is",
        ),
        ({**state, "mean": torch.ones(3)}, "expected a mean and a standard deviation for each of 3 channels, found "),
        (
            {**state, "mu": torch.ones(2), "std": torch.ones(2)},
            "expected a mean and a standard deviation for each of 3",
        ),
        ({**state, "mu": torch.ones(3), "mean": torch.ones(3)}, "expected one mean of pixels, found '"),
    ):
        save_tensors(path, tensors)
        assert one_line(SynthfastError, path, CPU, model="wrn-10-1").startswith(f"{path}: {message}")


def test_deepmind_weights_of_unknown_pixels_are_refused(tmp_path, robustbench):
    path = tmp_path / "x.safetensors"
    network = robustbench.dm_wide_resnet.DMWideResNet(7, 10, 1)
    save_tensors(path, network.state_dict())
    message = one_line(UsageError, path, CPU, model="wrn-10-1")
    assert message.startswith(f"{path}: DeepMind's networks normalise their images, but the file holds no mean and std")
    _, config = load_classifier(path, CPU, model="wrn-10-1", mean=0.4, std=0.2)
    assert (config["model"]["mean"], config["model"]["variant"]) == ([0.4] * 3, "deepmind")


def test_bottleneck_blocks_are_named_by_their_depth(tmp_path, robustbench):
    path = tmp_path / "x.safetensors"
    with torch.device("meta"):
        network = robustbench.resnet.ResNet(robustbench.resnet.Bottleneck, [3, 4, 6, 3])
    save_tensors(
        path, {key: torch.zeros(tensor.shape, dtype=torch.int8) for key, tensor in network.state_dict().items()}
    )
    message = one_line(UsageError, path, CPU, model="resnet-34")
    assert message == f"{path}: expected weights of resnet-34, found those of resnet-50; pass that as --model"
