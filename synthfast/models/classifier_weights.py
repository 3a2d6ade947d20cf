"""Files of weights as the field publishes them: which network they belong to, and its state dict in the names used here.

Networks here have the names of RobustBench's ``ResNet``, ``PreActResNet`` and ``WideResNet``; DeepMind's have names of their
own. Published files wrap them in various ways: "module." of data parallel training, "model." or "1." behind a layer of
normalisation, whose mean and standard deviation lie in the file as "mu" and "sigma" or "mean" and "std".
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from synthfast.errors import SynthfastError

# Of pixels in [0, 1], by number of classes. RobustBench's DeepMind networks hold these in their code, not in their files.
DEEPMIND_PIXELS = {
    10: ((0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)),
    100: ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
}

_DEEPMIND_WIDE = (
    (r"init_conv\.", "conv1."),
    (r"layer\.0\.block\.", "block1.layer."),
    (r"layer\.1\.block\.", "block2.layer."),
    (r"layer\.2\.block\.", "block3.layer."),
    (r"(block\d\.layer\.\d+\.)batchnorm_0\.", r"\1bn1."),
    (r"(block\d\.layer\.\d+\.)conv_0\.", r"\1conv1."),
    (r"(block\d\.layer\.\d+\.)batchnorm_1\.", r"\1bn2."),
    (r"(block\d\.layer\.\d+\.)conv_1\.", r"\1conv2."),
    (r"(block\d\.layer\.\d+\.)shortcut\.", r"\1convShortcut."),
    (r"batchnorm\.", "bn1."),
    (r"logits\.", "fc."),
)
_DEEPMIND_PREACT = (
    (r"conv_2d\.", "conv1."),
    (r"layer_0\.", "layer1."),
    (r"layer_1\.", "layer2."),
    (r"layer_2\.", "layer3."),
    (r"layer_3\.", "layer4."),
    (r"(layer\d\.\d+\.)batchnorm_0\.", r"\1bn1."),
    (r"(layer\d\.\d+\.)conv_2d_1\.", r"\1conv1."),
    (r"(layer\d\.\d+\.)batchnorm_1\.", r"\1bn2."),
    (r"(layer\d\.\d+\.)conv_2d_2\.", r"\1conv2."),
    (r"(layer\d\.\d+\.)shortcut\.", r"\1shortcut.0."),
    (r"batchnorm\.", "bn."),
    (r"logits\.", "linear."),
)
_DEEPMIND_NAMES = {"deepmind-wide": _DEEPMIND_WIDE, "deepmind-preact": _DEEPMIND_PREACT}
# A key that tells the kind of network; what stands before it is the prefix of all its keys.
_ANCHORS = {
    "init_conv.weight": "deepmind-wide",
    "conv_2d.weight": "deepmind-preact",
    "block1.layer.0.conv1.weight": "wide",
    "layer1.0.conv1.weight": "resnet",
    "features.0.weight": "small-cnn",
}
_MEAN_NAMES, _STD_NAMES = ("mu", "mean"), ("sigma", "std")


@dataclass(frozen=True)
class PublishedWeights:
    """What a file of weights says about its network.

    Attributes:
        name: of the architecture, without "-swish", which no file tells: "wrn-28-10", "preact-resnet-18", ...
        details: what the description of a classifier holds besides, such as {"variant": "deepmind"}, as far as the file tells.
        is_deepmind: its names are those of DeepMind's networks, which always normalise their images.
        tensors: the state dict in the names used here.
        channels, classes: of images and logits.
        mean, std: of the pixels, one number per channel, or None where the file does not hold them.
    """

    name: str
    details: dict[str, Any]
    is_deepmind: bool
    tensors: dict[str, Tensor]
    channels: int
    classes: int
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None


def read_published_weights(tensors: Mapping[str, Tensor], path: object) -> PublishedWeights:
    """Find the network in a file's tensors. ``path`` is for the errors.

    Known are RobustBench's ``wide_resnet.WideResNet`` (its ``sub_block1``, which no forward pass uses, is dropped),
    ``resnet.ResNet`` and ``PreActResNet``, ``dm_wide_resnet.DMWideResNet`` and ``DMPreActResNet``, and small CNNs.
    A PreActResNet with a batch norm before the pooling is taken for one whose shortcuts project the activated input, one
    without for one whose shortcuts do not, as in all of RobustBench's models; DeepMind's files without mean and standard
    deviation get CIFAR's, where there are 3 channels and 10 or 100 classes.

    Raises SynthfastError if there is no such network, or more than one.
    """
    anchor = next((anchor for anchor in _ANCHORS if find_prefixes(tensors, anchor)), None)
    if anchor is None:
        found = ", ".join(list(tensors)[:3])
        raise SynthfastError(
            f"{path}: expected weights of a ResNet, PreActResNet or WideResNet named as in RobustBench, found {found}, ...; "
            "choose another file"
        )
    tensors, mean, std = unwrap_network(tensors, anchor, path)
    kind = _ANCHORS[anchor]
    is_deepmind = kind in _DEEPMIND_NAMES
    if is_deepmind:
        tensors = _rename(tensors, _DEEPMIND_NAMES[kind])
    details: dict[str, Any] = {"variant": "deepmind"} if is_deepmind else {}
    stem, head = "conv1.weight", "linear.weight"
    if kind in ("wide", "deepmind-wide"):
        tensors = {key: tensor for key, tensor in tensors.items() if not key.startswith("sub_block1.")}
        name, head = _wide_name(tensors), "fc.weight"
    elif kind == "small-cnn":
        name, stem, head = "small-cnn", anchor, "head.weight"
        details["widths"] = _small_cnn_widths(tensors)
    elif kind == "resnet" and "bn1.weight" in tensors:
        name = _resnet_name(tensors)
    else:
        name = f"preact-{_resnet_name(tensors)}"
        details["variant"] = _preact_variant(tensors)
    channels, classes = matrix_size(tensors, stem, path)[1], matrix_size(tensors, head, path)[0]
    if is_deepmind and mean is None and channels == 3:
        mean, std = DEEPMIND_PIXELS.get(classes, (None, None))
    mean, std = _per_channel(mean, std, channels, path)
    return PublishedWeights(name, details, is_deepmind, tensors, channels, classes, mean, std)


def find_prefixes(tensors: Mapping[str, Tensor], anchor: str) -> list[str]:
    """What stands before ``anchor`` in the names that end with it: "" or something that ends in a point."""
    return [key.removesuffix(anchor) for key in tensors if key == anchor or key.endswith(f".{anchor}")]


def unwrap_network(
    tensors: Mapping[str, Tensor], anchor: str, path: object
) -> tuple[dict[str, Tensor], tuple[float, ...] | None, tuple[float, ...] | None]:
    """The tensors of the network around ``anchor`` without their prefix, and the mean and standard deviation beside it."""
    prefixes = find_prefixes(tensors, anchor)
    if len(prefixes) != 1:
        raise SynthfastError(
            f"{path}: expected one network, found {len(prefixes)} ({', '.join(map(repr, prefixes))}); save one alone"
        )
    network, pixels = {}, {}
    for key, tensor in tensors.items():
        last = key.rpartition(".")[2]
        if key == "n_averaged":  # the counter of torch's AveragedModel
            continue
        if last in _MEAN_NAMES or last in _STD_NAMES:
            kind = "mean" if last in _MEAN_NAMES else "std"
            if kind in pixels:
                raise SynthfastError(f"{path}: expected one {kind} of pixels, found '{key}' besides; remove it")
            pixels[kind] = tuple(float(value) for value in tensor.flatten())
        elif not key.startswith(prefixes[0]):
            raise SynthfastError(
                f"{path}: expected all weights to start with '{prefixes[0]}', found '{key}'; save the network alone"
            )
        else:
            network[key.removeprefix(prefixes[0])] = tensor
    return network, pixels.get("mean"), pixels.get("std")


def matrix_size(tensors: Mapping[str, Tensor], key: str, path: object) -> tuple[int, int]:
    """The first two sizes, outputs and inputs, of a layer's weight."""
    if key not in tensors or tensors[key].dim() < 2:
        raise SynthfastError(f"{path}: expected the weight '{key}' of a layer, found none; choose another file")
    return tensors[key].shape[0], tensors[key].shape[1]


def _per_channel(
    mean: tuple[float, ...] | None, std: tuple[float, ...] | None, channels: int, path: object
) -> tuple[tuple[float, ...] | None, tuple[float, ...] | None]:
    if mean is None and std is None:
        return None, None
    if mean is None or std is None or len(mean) not in (1, channels) or len(std) not in (1, channels):
        raise SynthfastError(
            f"{path}: expected a mean and a standard deviation for each of {channels} channels, found {mean} and {std}"
        )
    return mean * (channels // len(mean)), std * (channels // len(std))


def _rename(tensors: Mapping[str, Tensor], rules: tuple[tuple[str, str], ...]) -> dict[str, Tensor]:
    renamed = {}
    for key, tensor in tensors.items():
        for pattern, replacement in rules:
            key = re.sub("^" + pattern, replacement, key)
        renamed[key] = tensor
    return renamed


def _wide_name(tensors: Mapping[str, Tensor]) -> str:
    blocks = {key.split(".")[2] for key in tensors if key.startswith("block1.layer.")}
    first = tensors.get("block1.layer.0.conv1.weight")
    return f"wrn-{6 * len(blocks) + 4}-{0 if first is None else len(first) // 16}"


def _resnet_name(tensors: Mapping[str, Tensor]) -> str:
    blocks = len({tuple(key.split(".")[:2]) for key in tensors if re.match(r"layer\d\.\d", key)})
    depth = blocks * (3 if "layer1.0.conv3.weight" in tensors else 2) + 2
    return f"resnet-{depth}"


def _preact_variant(tensors: Mapping[str, Tensor]) -> str:
    shortcut = tensors.get("layer2.0.shortcut.0.weight")
    if shortcut is not None and shortcut.dim() == 4 and shortcut.shape[2] == 3:
        return "deepmind"
    return "final-norm" if "bn.weight" in tensors else "plain"


def _small_cnn_widths(tensors: Mapping[str, Tensor]) -> list[int]:
    # Two convolutions a stage, each followed by a batch norm and an activation: 0 and 3, 6 and 9, ...
    numbers = sorted(int(key.split(".")[1]) for key in tensors if re.fullmatch(r"features\.\d+\.weight", key))
    convolutions = [tensor for number in numbers if (tensor := tensors[f"features.{number}.weight"]).dim() == 4]
    return [len(tensor) for tensor in convolutions[::2]]
