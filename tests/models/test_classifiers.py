"""Classifiers by name: what is made, from which random numbers, what is refused."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
from torch import fx, nn

from synthfast.errors import UsageError
from synthfast.models import build_classifier, default_classifier, describe_classifier, make_classifier
from synthfast.models.classifier_parts import Normalize, SamePad, default_stem_stride

# One of each kind of network, small where the kind allows it.
SMALL = ("small-cnn", "resnet-18", "preact-resnet-18", "wrn-10-2")
KINDS = (*SMALL, *(f"{name}-swish" for name in SMALL))


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def one_line(function, *arguments, **options) -> str:
    with pytest.raises(UsageError) as caught:
        function(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("preact-resnet-18", 11_172_170),
        ("preact-resnet-18-swish", 12_548_426),
        ("resnet-18", 11_173_962),
        ("wrn-28-10", 36_479_194),
        ("wrn-28-10-swish", 36_479_194),
        ("wrn-34-10", 46_160_474),
        ("wrn-70-16", 266_796_506),
    ],
)
def test_parameters_are_as_many_as_published(name, parameters):
    with torch.device("meta"):
        model = make_classifier(name, (32, 32, 3), 10)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters


@pytest.mark.parametrize("shape", [(28, 28, 1), (7, 10, 3), (1, 1, 2), (64, 48, 3)])
@pytest.mark.parametrize("name", KINDS)
def test_images_of_any_size_and_layout(name, shape, generator):
    height, width, channels = shape
    model = make_classifier(name, shape, 3, mean=0.4, std=0.3).eval()
    images = torch.rand(2, channels, height, width, generator=generator)
    with torch.inference_mode():
        logits = model(images)
        assert logits.shape == (2, 3) and logits.dtype == torch.float32 and logits.isfinite().all()
        torch.testing.assert_close(model(images.contiguous(memory_format=torch.channels_last)), logits)
        torch.testing.assert_close(torch.cat([model(image[None]) for image in images]), logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", SMALL)
def test_pixels_are_normalised_inside(name, generator):
    """Equal weights with and without a mean: the one gets the images, the other what they are normalised to."""
    plain = make_classifier(name, (8, 8, 3), 4, mean=0, std=1).eval()
    mean, std = [0.1, 0.5, 0.7], [0.5, 0.25, 0.3]
    inside = make_classifier(name, (8, 8, 3), 4, mean=mean, std=std).eval()
    inside.load_state_dict(plain.state_dict())
    images = torch.rand(2, 3, 8, 8, generator=generator)
    normalised = (images - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    with torch.inference_mode():
        torch.testing.assert_close(inside(images), plain(normalised), atol=1e-5, rtol=1e-5)


def test_nothing_is_computed_for_mean_0_and_std_1(generator):
    images = torch.rand(2, 3, 4, 4, generator=generator).contiguous(memory_format=torch.channels_last)
    assert Normalize((0.0,) * 3, (1.0,) * 3)(images) is images
    assert Normalize((0.0, 0.0, 0.1), (1.0,) * 3)(images) is not images


@pytest.mark.parametrize(
    ("name", "mean", "std"), [("small-cnn", 0.5, 0.5), ("wrn-10-1", 0.0, 1.0), ("wrn-10-1-swish", 0.0, 1.0)]
)
def test_default_mean_and_std(name, mean, std):
    description = describe_classifier(name, (8, 8, 2), 10)
    assert (description["mean"], description["std"]) == ([mean] * 2, [std] * 2)


@pytest.mark.parametrize("name", KINDS)
def test_a_description_is_json_and_rebuilds_the_network(name):
    model = make_classifier(name, (9, 8, 2), 5, mean=(0.2, 0.3), std=0.5)
    description = json.loads(json.dumps(model.description))
    assert description == model.description
    again = build_classifier(description)
    assert again.description == description and str(again) == str(model)
    again.load_state_dict(model.state_dict())
    copied = copy.deepcopy(model)
    assert copied.description == description
    images = torch.rand(2, 2, 9, 8)
    assert torch.equal(again.eval()(images), model.eval()(images))


def test_descriptions_say_what_they_always_said():
    """Checkpoints hold these: a change here makes old ones unreadable."""
    pixels = {"mean": [0.5], "std": [0.5]}
    first = {"shape": [8, 8, 1], "classes": 10, **pixels}
    assert describe_classifier("small-cnn", (8, 8, 1), 10) == {"name": "small-cnn", **first, "widths": [32, 64, 128]}
    pixels = {"mean": [0.0], "std": [1.0]}
    first = {"shape": [64, 8, 1], "classes": 10, **pixels}
    for name, details in {
        "resnet-18": {"stem_stride": 2},
        "preact-resnet-34": {"variant": "final-norm", "stem_stride": 2},
        "preact-resnet-18-swish": {"variant": "deepmind", "stem_stride": 2},
        "wrn-28-10": {"variant": "trades", "stem_stride": 2},
        "wrn-28-10-swish": {"variant": "deepmind", "stem_stride": 2},
    }.items():
        assert describe_classifier(name, (64, 8, 1), 10) == {"name": name, **first, **details}


@pytest.mark.parametrize("name", SMALL)
def test_weights_depend_on_torchs_global_generator_alone(name):
    torch.manual_seed(3)
    first = make_classifier(name, (8, 8, 3), 10).state_dict()
    torch.manual_seed(3)
    second = make_classifier(name, (8, 8, 3), 10).state_dict()
    third = make_classifier(name, (8, 8, 3), 10).state_dict()
    assert all(torch.equal(tensor, second[key]) for key, tensor in first.items())
    assert not any(torch.equal(tensor, third[key]) for key, tensor in first.items() if tensor.dim() > 1)


@pytest.mark.parametrize("name", SMALL)
def test_initial_weights(name):
    torch.manual_seed(0)
    model = make_classifier(name, (8, 8, 3), 10)
    assert model.training
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    for module in convolutions:
        assert module.bias is None
        assert module.weight.is_contiguous(memory_format=torch.channels_last)
        expected = math.sqrt(2 / (module.out_channels * module.kernel_size[0] * module.kernel_size[1]))
        count = module.weight.numel()
        assert float(module.weight.detach().std()) == pytest.approx(expected, rel=5 / math.sqrt(2 * count))
        assert abs(float(module.weight.detach().mean())) < 5 * expected / math.sqrt(count)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert (
                (module.weight == 1).all() and (module.bias == 0).all() and (module.eps, module.momentum) == (1e-5, 0.1)
            )
        elif isinstance(module, nn.Linear):
            assert (module.bias == 0).all()
    assert len(convolutions) >= 6


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", [*SMALL, "wrn-10-2-swish"])
def test_every_feature_map_is_channels_last(name, channels):
    """No layer falls back to the other layout, not even for grey images."""
    model = make_classifier(name, (16, 16, channels), 10)
    maps = []
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.BatchNorm2d):
            module.register_forward_hook(lambda module, inputs, output: maps.append(output))
    model(torch.rand(2, channels, 16, 16))
    maps = [x for x in maps if x.shape[2] > 1]
    assert len(maps) > 6 and all(x.is_contiguous(memory_format=torch.channels_last) for x in maps)


@pytest.mark.parametrize("name", [*KINDS, "wrn-10-1"])
@pytest.mark.parametrize("shape", [(7, 8, 1), (64, 64, 1)])
def test_the_forward_pass_can_be_traced(name, shape, generator):
    model = make_classifier(name, shape, 10, mean=0.3, std=0.3).eval()
    traced = fx.symbolic_trace(model)
    images = torch.rand(2, 1, *shape[:2], generator=generator)
    with torch.inference_mode():
        assert torch.equal(traced(images), model(images))


@pytest.mark.parametrize("name", KINDS)
def test_gradients_reach_images_and_weights(name, generator):
    """In-place activations spoil nothing that autograd needs: numerical and analytical slope agree."""
    model = make_classifier(name, (6, 6, 2), 3).double()
    images = torch.rand(4, 2, 6, 6, generator=generator, dtype=torch.float64)
    x = images.clone().requires_grad_()
    model(x).square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())
    direction = torch.randn(x.shape, generator=generator, dtype=torch.float64)
    step = 1e-8  # small enough for no activation to change its side
    with torch.no_grad():
        up, down = (model(images + sign * step * direction).square().sum() for sign in (1, -1))
    assert float((up - down) / (2 * step)) == pytest.approx(float((x.grad * direction).sum()), rel=1e-4, abs=1e-4)


@pytest.mark.parametrize(("size", "stride"), [(1, 1), (32, 1), (63, 1), (64, 2), (127, 2), (128, 4), (224, 4)])
def test_the_stem_takes_larger_images_in_larger_steps(size, stride):
    assert default_stem_stride(size, 1) == default_stem_stride(1, size) == stride


@pytest.mark.parametrize(("size", "first"), [(32, 32), (64, 32), (96, 48), (128, 32)])
@pytest.mark.parametrize("name", ["resnet-18", "preact-resnet-18", "wrn-10-1", "wrn-10-1-swish"])
def test_what_the_first_stage_sees(name, size, first):
    model = make_classifier(name, (size, size, 3), 2).eval()
    seen = []
    stage = model.block1 if name.startswith("wrn") else model.layer1
    stage.register_forward_hook(lambda module, inputs, output: seen.append((inputs[0].shape[2:], output.shape[2:])))
    with torch.inference_mode():
        assert model(torch.rand(1, 3, size, size)).shape == (1, 2)
    assert seen == [((first, first), (first, first))]


@pytest.mark.parametrize(("height", "width"), [(4, 4), (5, 5), (4, 5), (7, 4), (1, 1)])
def test_padding_as_tensorflow_does_it(height, width):
    """ "SAME": out = ceil(in / stride), and of the padding that this takes the smaller half goes before."""
    x = torch.ones(1, 1, height, width)
    padded = SamePad()(x)
    before = []
    for size, dim in ((height, 2), (width, 3)):
        total = max((math.ceil(size / 2) - 1) * 2 + 3 - size, 0)
        assert padded.shape[dim] == size + total
        before.append(total // 2)
    assert torch.equal(padded[:, :, before[0] : before[0] + height, before[1] : before[1] + width], x)
    assert padded.sum() == x.sum()


@pytest.mark.parametrize(
    ("shape", "name"),
    [
        ((8, 8, 1), "small-cnn"),
        ((16, 16, 3), "small-cnn"),
        ((8, 17, 1), "preact-resnet-18"),
        ((32, 32, 3), "preact-resnet-18"),
    ],
)
def test_the_network_where_none_is_named(shape, name):
    assert default_classifier(shape) == name


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("wrn-27-10", "wrn-27-10: expected a depth of 6n + 4 (10, 16, 22, 28, 34, ...), found 27; choose small-cnn, "),
        ("wrn-4-10", "wrn-4-10: expected a depth of 6n + 4"),
        ("wrn-28-0", "wrn-28-0: expected a width of at least 1, found 0; choose "),
        ("resnet-50", "resnet-50: expected a depth of 18 or 34, found 50; choose "),
        ("preact-resnet-50-swish", "preact-resnet-50-swish: expected a depth of 18 or 34, found 50; choose "),
        ("wrn-28", "'wrn-28': no classifier has this name; expected small-cnn, preact-resnet-18, "),
        ("WRN-28-10", "'WRN-28-10': no classifier has this name; expected "),
        ("wrn-28-10-swish-swish", "'wrn-28-10-swish-swish': no classifier has this name; expected "),
        ("small-cnn\n", "'small-cnn\\n': no classifier has this name; expected "),
        ("", "no classifier has this name; expected "),
        (None, "'None': no classifier has this name; expected "),
    ],
)
def test_a_name_that_does_not_exist_is_answered_with_those_that_do(name, message):
    found = one_line(make_classifier, name, (32, 32, 3), 10)
    assert message in found and found.endswith("each also with -swish, or timm:NAME")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"shape": (32, 32)}, "expected the shape of images as three positive integers (H, W, C), found [32, 32]"),
        ({"shape": (32, 0, 3)}, "expected the shape of images as three positive integers (H, W, C), found [32, 0, 3]"),
        ({"shape": (32, 32, True)}, "expected the shape of images as three positive integers (H, W, C)"),
        ({"shape": (32.0, 32, 3)}, "expected the shape of images as three positive integers (H, W, C)"),
        ({"classes": 1}, "wrn-10-1: expected 'classes' to be an integer of at least 2, found 1"),
        ({"classes": 2.0}, "wrn-10-1: expected 'classes' to be an integer of at least 2, found 2.0"),
        ({"classes": None}, "wrn-10-1: expected 'classes' to be an integer of at least 2, found None"),
        ({"mean": 0.5}, "wrn-10-1: expected both mean and std of the pixels, or neither; give both"),
        ({"mean": 0.5, "std": 0}, "wrn-10-1: expected 'std' to be a list of positive numbers, found [0.0, 0.0, 0.0]"),
        ({"mean": [0.5], "std": 1}, "wrn-10-1: expected mean and std of 3 channels, found 1 and 3 numbers"),
        ({"mean": math.nan, "std": 1}, "wrn-10-1: expected 'mean' to be a list of numbers, found [nan, nan, nan]"),
        ({"mean": 0, "std": math.inf}, "wrn-10-1: expected 'std' to be a list of positive numbers"),
    ],
)
def test_sizes_and_pixels_that_cannot_be_are_refused(values, message):
    assert one_line(make_classifier, **{"name": "wrn-10-1", "shape": (32, 32, 3), "classes": 10, **values}).startswith(
        message
    )


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"variant": "other"}, "wrn-10-1: expected 'variant' to be one of trades, deepmind, found 'other'"),
        ({"variant": ["trades"]}, "wrn-10-1: expected 'variant' to be one of trades, deepmind, found ['trades']"),
        ({"stem_stride": 3}, "wrn-10-1: expected 'stem_stride' to be 1, 2 or 4, found 3"),
        ({"stem_stride": True}, "wrn-10-1: expected 'stem_stride' to be 1, 2 or 4, found True"),
        ({"mean": 0.5}, "wrn-10-1: expected 'mean' to be a list of numbers, found 0.5"),
        ({"shape": "large"}, "wrn-10-1: expected 'shape' to be three positive integers [H, W, C], found 'large'"),
        ({"name": "wrn-11-1"}, "wrn-11-1: expected a depth of 6n + 4"),
        ({"depth": 10}, "wrn-10-1: expected a description of ['name', 'shape', 'classes', "),
        (
            {"name": "small-cnn"},
            "small-cnn: expected a description of ['name', 'shape', 'classes', 'mean', 'std', 'widths']",
        ),
    ],
)
def test_a_description_that_is_none_is_refused(values, message):
    description = {**describe_classifier("wrn-10-1", (32, 32, 3), 10), **values}
    assert one_line(build_classifier, description).startswith(message)


@pytest.mark.parametrize("widths", [[], [0], ["8"], 8, None, [8] * 17])
def test_widths_that_cannot_be_are_refused(widths):
    found = one_line(describe_classifier, "small-cnn", (8, 8, 1), 10, widths=widths)
    assert found.startswith("small-cnn: expected 'widths' to be a list of positive integers, found ")


@pytest.mark.parametrize("description", [None, [], "small-cnn", {}, {"shape": [8, 8, 1]}])
def test_a_description_without_a_name_is_refused(description):
    assert one_line(build_classifier, description).startswith(
        "expected the description of a classifier, an object with a name"
    )


def test_a_missing_part_of_a_description_is_shown():
    description = describe_classifier("wrn-10-1", (32, 32, 3), 10)
    del description["stem_stride"]
    assert "'stem_stride'], found ['name', " in one_line(build_classifier, description)
