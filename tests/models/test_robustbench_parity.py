"""Networks of RobustBench, with random weights, against ours that have read their files."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from synthfast.artifacts import save_tensors
from synthfast.models import build_classifier, describe_classifier, load_classifier
from synthfast.models.classifier_weights import DEEPMIND_PIXELS

CPU = torch.device("cpu")


def dm(module, **options):
    return lambda rb, classes: getattr(rb.dm_wide_resnet, module)(num_classes=classes, **options)


def dm_swish(module, **options):
    return lambda rb, classes: dm(module, activation_fn=rb.dm_wide_resnet.Swish, **options)(rb, classes)


# Name here, and RobustBench's module of so many classes.
FAMILIES = {
    "wide": ("wrn-16-2", lambda rb, n: rb.wide_resnet.WideResNet(16, n, 2)),
    "wide with a block that is not used": (
        "wrn-10-3",
        lambda rb, n: rb.wide_resnet.WideResNet(10, n, 3, sub_block1=True),
    ),
    "wide without a wider first stage": ("wrn-10-1", lambda rb, n: rb.wide_resnet.WideResNet(10, n, 1)),
    "resnet": ("resnet-18", lambda rb, n: rb.resnet.ResNet(rb.resnet.BasicBlock, [2, 2, 2, 2], n)),
    "deeper resnet": ("resnet-34", lambda rb, n: rb.resnet.ResNet(rb.resnet.BasicBlock, [3, 4, 6, 3], n)),
    "preact": ("preact-resnet-18", lambda rb, n: rb.resnet.PreActResNet(rb.resnet.PreActBlock, [2, 2, 2, 2], n)),
    "preact with final norm": (
        "preact-resnet-18",
        lambda rb, n: rb.resnet.PreActResNet(
            rb.resnet.PreActBlock, [2, 2, 2, 2], n, bn_before_fc=True, out_shortcut=True
        ),
    ),
    "preact of the second kind": (
        "preact-resnet-18",
        lambda rb, n: rb.resnet.PreActResNet(rb.resnet.PreActBlockV2, [2, 2, 2, 2], n, bn_before_fc=True),
    ),
    "DeepMind's wide": ("wrn-16-2", dm("DMWideResNet", depth=16, width=2)),
    "DeepMind's wide with Swish": ("wrn-10-3-swish", dm_swish("DMWideResNet", depth=10, width=3)),
    "DeepMind's preact": ("preact-resnet-18", dm("DMPreActResNet", depth=18)),
    "DeepMind's preact with Swish": ("preact-resnet-18-swish", dm_swish("DMPreActResNet", depth=18)),
    "DeepMind's deeper preact": ("preact-resnet-34-swish", dm_swish("DMPreActResNet", depth=34)),
}


def logits_agree(ours: nn.Module, theirs: nn.Module, images: torch.Tensor) -> None:
    with torch.inference_mode():
        expected, found = theirs(images), ours(images)
    assert expected.std() > 0.01 and (expected[0] - expected[1]).abs().max() > 1e-3  # they do depend on the image
    assert (found - expected).abs().max() <= 1e-5 * max(1.0, float(expected.abs().max()))


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_robustbench(family, robustbench, randomize, generator, tmp_path):
    name, make = FAMILIES[family]
    theirs = randomize(make(robustbench, 10))
    save_tensors(tmp_path / "x.safetensors", theirs.state_dict())
    ours, config = load_classifier(tmp_path / "x.safetensors", CPU, model=name)
    assert (config["shape"], config["classes"]) == ([32, 32, 3], 10)
    logits_agree(ours, theirs, torch.rand(2, 3, 32, 32, generator=generator))


@pytest.mark.parametrize("channels", [1, 5])
@pytest.mark.parametrize("family", ["wide", "resnet", "preact with final norm"])
def test_other_channels_and_classes(family, channels, robustbench, randomize, generator, tmp_path):
    name, make = FAMILIES[family]
    theirs = make(robustbench, 23)
    theirs.conv1 = nn.Conv2d(channels, theirs.conv1.out_channels, 3, 1, 1, bias=False)
    torch.save(randomize(theirs).state_dict(), tmp_path / "x.pt")
    ours, config = load_classifier(tmp_path / "x.pt", CPU, model=name, allow_pickle=True)
    assert (config["shape"], config["classes"]) == ([32, 32, channels], 23)
    logits_agree(ours, theirs, torch.rand(2, channels, 32, 32, generator=generator))


@pytest.mark.parametrize("module", ["DMWideResNet", "DMPreActResNet"])
@pytest.mark.parametrize("channels", [1, 2])
def test_other_channels_and_pixels_of_deepmind(module, channels, robustbench, randomize, generator, tmp_path):
    mean, std = (0.3, 0.6)[:channels], (0.5, 0.2)[:channels]
    options = {"depth": 10, "width": 1} if module == "DMWideResNet" else {}
    theirs = randomize(dm(module, mean=mean, std=std, num_input_channels=channels, **options)(robustbench, 4))
    save_tensors(tmp_path / "x.safetensors", theirs.state_dict())
    name = "wrn-10-1" if module == "DMWideResNet" else "preact-resnet-18"
    ours, _ = load_classifier(tmp_path / "x.safetensors", CPU, model=name, mean=mean, std=std)
    logits_agree(ours, theirs, torch.rand(2, channels, 32, 32, generator=generator))


@pytest.mark.parametrize(("classes", "prefix"), [(10, "CIFAR10"), (100, "CIFAR100")])
def test_pixels_that_robustbench_keeps_in_its_code(classes, prefix, robustbench, randomize, tmp_path):
    theirs = robustbench.dm_wide_resnet
    assert DEEPMIND_PIXELS[classes] == (getattr(theirs, f"{prefix}_MEAN"), getattr(theirs, f"{prefix}_STD"))
    save_tensors(tmp_path / "x.safetensors", dm("DMWideResNet", depth=10, width=1)(robustbench, classes).state_dict())
    ours, config = load_classifier(tmp_path / "x.safetensors", CPU, model="wrn-10-1")
    assert (ours.normalize.mean, ours.normalize.std) == DEEPMIND_PIXELS[classes]
    assert config["model"]["mean"] == list(DEEPMIND_PIXELS[classes][0])


def test_swish_in_a_wide_network_of_the_other_kind(robustbench, randomize, generator):
    theirs = randomize(robustbench.wide_resnet.WideResNet(10, 10, 2))
    for module in [*theirs.modules()]:
        for name, child in module.named_children():
            if isinstance(child, nn.ReLU):
                setattr(module, name, nn.SiLU())
    ours = build_classifier(describe_classifier("wrn-10-2-swish", (32, 32, 3), 10, variant="trades")).eval()
    ours.load_state_dict(theirs.state_dict())
    logits_agree(ours, theirs, torch.rand(2, 3, 32, 32, generator=generator))


@pytest.mark.parametrize("family", ["wide", "resnet", "preact", "preact of the second kind"])
def test_our_weights_go_into_robustbench(family, robustbench, randomize, generator):
    name, make = FAMILIES[family]
    details = {"variant": "plain"} if family == "preact" else {}
    ours = randomize(build_classifier(describe_classifier(name, (32, 32, 3), 10, **details)))
    theirs = make(robustbench, 10).eval()
    theirs.load_state_dict(ours.state_dict())
    logits_agree(ours, theirs, torch.rand(2, 3, 32, 32, generator=generator))


@pytest.mark.parametrize("family", ["resnet", "preact of the second kind", "DeepMind's wide"])
def test_gradients_in_training_are_those_of_robustbench(family, robustbench, randomize, generator, tmp_path):
    name, make = FAMILIES[family]
    theirs = randomize(make(robustbench, 10))
    save_tensors(tmp_path / "x.safetensors", theirs.state_dict())
    ours, _ = load_classifier(tmp_path / "x.safetensors", CPU, model=name)
    images, gradients = torch.rand(2, 3, 32, 32, generator=generator).double(), []
    for model in (ours.train().double(), theirs.train().double()):  # in float32 a sign decided by rounding spoils it
        x = images.clone().requires_grad_()
        nn.functional.cross_entropy(model(x), torch.tensor([0, 9])).backward()
        gradients.append((x.grad, next(model.parameters()).grad))
    for found, expected in zip(*gradients, strict=True):
        assert expected.abs().max() > 0
        assert (found - expected).abs().max() <= 1e-6 * expected.abs().max()


class Normalized(nn.Module):
    """A network behind a layer of its own, as RobustBench wraps some."""

    def __init__(self, names, network, layer, inside):
        super().__init__()
        at = nn.Module()
        for name, values in zip(names, ((0.4, 0.5, 0.6), (0.2, 0.25, 0.3)), strict=True):
            at.register_buffer(name, torch.tensor(values).view(1, 3, 1, 1))
        self.add_module(layer, at)
        self.add_module(inside, network)
        self.parts = (at, names, network)

    def forward(self, x):
        at, (mean, std), network = self.parts
        return network((x - getattr(at, mean)) / getattr(at, std))


@pytest.mark.parametrize(
    ("names", "layer", "inside"),
    [(("mu", "sigma"), "0", "1"), (("mean", "std"), "normalize", "model"), (("mean", "std"), "normalize", "module")],
)
@pytest.mark.parametrize("outer", ["", "module."])
def test_a_layer_of_normalisation_is_read(names, layer, inside, outer, robustbench, randomize, generator, tmp_path):
    theirs = Normalized(names, randomize(robustbench.wide_resnet.WideResNet(10, 10, 1)), layer, inside).eval()
    state = {outer + key: tensor for key, tensor in theirs.state_dict().items()}
    torch.save({"state_dict": state, "epoch": 7}, tmp_path / "x.pt")
    ours, config = load_classifier(tmp_path / "x.pt", CPU, model="wrn-10-1", allow_pickle=True)
    assert config["model"]["std"] == pytest.approx([0.2, 0.25, 0.3])
    logits_agree(ours, theirs, torch.rand(2, 3, 32, 32, generator=generator))


@pytest.mark.parametrize("prefix", ["", "module.", "model.", "module.model.", "_orig_mod."])
def test_pixels_beside_the_weights_and_prefixes_before_them(prefix, robustbench, randomize, generator, tmp_path):
    theirs = randomize(robustbench.resnet.PreActResNet(robustbench.resnet.PreActBlock, [2, 2, 2, 2]))
    pixels = {"mu": torch.tensor([0.4, 0.5, 0.6]).view(3, 1, 1), "sigma": torch.tensor(0.25)}
    state = {prefix + key: tensor for key, tensor in {**theirs.state_dict(), **pixels}.items()}
    save_tensors(tmp_path / "x.safetensors", {**state, "n_averaged": torch.tensor(5)})
    ours, _ = load_classifier(tmp_path / "x.safetensors", CPU, model="preact-resnet-18")
    images = torch.rand(2, 3, 32, 32, generator=generator)
    logits_agree(ours, lambda x: theirs((x - pixels["mu"]) / pixels["sigma"]), images)


def test_weights_of_other_dtypes_and_without_counters(robustbench, randomize, generator, tmp_path):
    theirs = randomize(robustbench.wide_resnet.WideResNet(10, 10, 1)).half().float()
    state = {key: tensor.half() for key, tensor in theirs.state_dict().items() if "num_batches_tracked" not in key}
    save_tensors(tmp_path / "x.safetensors", state)
    ours, _ = load_classifier(tmp_path / "x.safetensors", CPU, model="wrn-10-1")
    assert {tensor.dtype for tensor in ours.parameters()} == {torch.float32}
    logits_agree(ours, theirs, torch.rand(2, 3, 32, 32, generator=generator))
