"""Networks of timm as classifiers."""

from __future__ import annotations

import sys

import pytest
import timm
import torch

from synthfast.artifacts import save_checkpoint, save_tensors
from synthfast.errors import SynthfastError, UsageError
from synthfast.models import build_classifier, load_classifier, make_classifier

CPU = torch.device("cpu")
# timm's own small networks: one of convolutions, one whose image size is fixed.
NAMES = ("timm:test_resnet", "timm:test_vit")


def one_line(function, *arguments, **options) -> str:
    with pytest.raises(SynthfastError) as caught:
        function(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", NAMES)
def test_logits_are_those_of_timm_behind_its_normalisation(name, channels, generator):
    model = make_classifier(name, (64, 48, channels), 7).eval()
    size = {"img_size": (64, 48)} if name == "timm:test_vit" else {}
    network = timm.create_model(name.removeprefix("timm:"), num_classes=7, in_chans=channels, **size).eval()
    network.load_state_dict(model.network.state_dict())
    images = torch.rand(2, channels, 64, 48, generator=generator)
    with torch.inference_mode():
        torch.testing.assert_close(model(images), network((images - 0.5) / 0.5), atol=1e-5, rtol=1e-5)


def test_pixels_are_timms_own_unless_given():
    assert make_classifier("timm:resnet18", (64, 64, 3), 2).normalize.mean == (0.485, 0.456, 0.406)
    grey = make_classifier("timm:resnet18", (64, 64, 1), 2)
    assert grey.description["mean"] == [pytest.approx((0.485 + 0.456 + 0.406) / 3)]
    assert make_classifier("timm:test_resnet", (64, 64, 2), 2, mean=0.1, std=(1, 2)).normalize.std == (1.0, 2.0)


@pytest.mark.parametrize("name", NAMES)
def test_round_trip_through_a_checkpoint_folder(name, tmp_path, generator):
    model = make_classifier(name, (32, 32, 3), 4, mean=0.3, std=0.2).eval()
    config = {"shape": [32, 32, 3], "classes": 4, "model": model.description}
    save_checkpoint(tmp_path, "classifier", config, model.state_dict())
    before = torch.get_rng_state()
    loaded, read = load_classifier(tmp_path, CPU)
    assert torch.equal(torch.get_rng_state(), before)
    assert read["model"] == model.description == loaded.description
    images = torch.rand(2, 3, 32, 32, generator=generator)
    with torch.inference_mode():
        assert torch.equal(loaded(images), model(images))


@pytest.mark.parametrize("prefix", ["", "module.", "network."])
@pytest.mark.parametrize("name", NAMES)
def test_a_file_with_timms_names(name, prefix, tmp_path, generator):
    model = make_classifier(name, (32, 32, 1), 4).eval()
    state = {prefix + key: tensor for key, tensor in model.network.state_dict().items()}
    save_tensors(tmp_path / "x.safetensors", state)
    loaded, config = load_classifier(tmp_path / "x.safetensors", CPU, model=name)
    assert (config["shape"], config["classes"]) == ([32, 32, 1], 4)
    images = torch.rand(2, 1, 32, 32, generator=generator)
    with torch.inference_mode():
        assert torch.equal(loaded(images), model(images))


def test_weights_depend_on_torchs_global_generator_alone():
    states = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        states.append(make_classifier("timm:test_resnet", (32, 32, 3), 2).state_dict()["network.fc.weight"])
    assert torch.equal(states[0], states[1]) and not torch.equal(states[0], states[2])


def test_a_network_that_timm_does_not_have():
    message = one_line(make_classifier, "timm:resne18", (64, 64, 3), 2)
    assert (
        message.startswith("timm:resne18: timm ") and "no network of this name, the nearest are resnet18, " in message
    )
    assert "no network of this name" in one_line(make_classifier, "timm:resnet18.no_such_weights", (64, 64, 3), 2)
    assert "no network of this name" in one_line(make_classifier, "timm:", (64, 64, 3), 2)


def test_a_size_that_a_network_cannot_have(monkeypatch):
    def refuse(*arguments, **options):
        raise AssertionError("size must divide\nby 16")

    monkeypatch.setattr(timm, "create_model", refuse)
    assert one_line(make_classifier, "timm:test_vit", (8, 8, 3), 2) == (
        "timm:test_vit: cannot be made for images [8, 8, 3] in 2 classes (size must divide); choose another network"
    )


def test_weights_of_another_network_are_refused(tmp_path):
    model = make_classifier("timm:test_resnet", (32, 32, 3), 4)
    save_tensors(tmp_path / "x.safetensors", {"mine": torch.zeros(1), **model.network.state_dict()})
    message = one_line(load_classifier, tmp_path / "x.safetensors", CPU, model="timm:test_resnet")
    assert message.startswith(
        f"{tmp_path / 'x.safetensors'}: the weights do not fit timm:test_resnet ('network.mine' is not"
    )
    save_tensors(tmp_path / "x.safetensors", {"mine": torch.zeros(1)})
    message = one_line(load_classifier, tmp_path / "x.safetensors", CPU, model="timm:test_resnet")
    assert "expected one network, found 0" in message


def test_without_timm_the_way_to_it_is_told(monkeypatch):
    description = make_classifier("timm:test_resnet", (32, 32, 3), 4).description
    monkeypatch.setitem(sys.modules, "timm", None)
    for call in (
        lambda: make_classifier("timm:test_resnet", (32, 32, 3), 4),
        lambda: make_classifier("timm:test_resnet", (32, 32, 3), 4, mean=0, std=1),
        lambda: build_classifier(description),
    ):
        with pytest.raises(UsageError) as caught:
            call()
        assert str(caught.value) == (
            "timm:test_resnet: needs the package timm, which is not installed; pip install 'synthfast[timm]'"
        )


@pytest.mark.parametrize("name", ["timm:resnet18", "timm:test_vit"])
def test_nothing_is_dropped_in_training(name):
    model = make_classifier(name, (32, 32, 3), 2)
    rates = [getattr(module, "drop_rate", 0.0) for module in model.modules()]
    rates += [module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)]
    assert model.training and set(rates) == {0.0}
