"""Classifiers by name: making, describing and loading them.

A name is ``small-cnn``, ``preact-resnet-18`` or ``-34``, ``resnet-18`` or ``-34``, ``wrn-D-W`` (depth D = 6n + 4, width
factor W, such as ``wrn-28-10``), each also with ``-swish``, or ``timm:NAME``. All take images float [N, C, H, W] in [0, 1]
and return logits [N, classes]; the normalisation of pixels is part of the network.

A description, the JSON object that rebuilds a network and stands as "model" in a checkpoint's config.json, is

    {"name": "wrn-28-10", "shape": [32, 32, 3], "classes": 10, "mean": [0.0, 0.0, 0.0], "std": [1.0, 1.0, 1.0], ...}

with the details of its kind: "widths" (small-cnn), "variant" (preact-resnet, wrn) and "stem_stride" (resnet, preact-resnet,
wrn). Networks with ``-swish`` are by default DeepMind's variants (Gowal et al. 2020), so that what is trained with them fits
RobustBench's DMWideResNet and DMPreActResNet; their PreActResNet has 3x3 convolutions as shortcuts.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from synthfast.artifacts import load_checkpoint, load_tensors
from synthfast.errors import SynthfastError, UsageError
from synthfast.models.classifier_parts import default_stem_stride, initialize
from synthfast.models.classifier_weights import matrix_size, read_published_weights, unwrap_network
from synthfast.models.preact_resnet import PREACT_VARIANTS, PreActResNet
from synthfast.models.resnet import RESNET_BLOCKS, ResNet
from synthfast.models.small_cnn import SmallCNN
from synthfast.models.timm_classifier import TIMM_PREFIX, TimmClassifier, timm_config, timm_pixels
from synthfast.models.wide_resnet import WIDE_VARIANTS, WideResNet

CLASSIFIER_NAMES = (
    "small-cnn, preact-resnet-18, preact-resnet-34, resnet-18, resnet-34, wrn-D-W (such as wrn-28-10, wrn-34-10, wrn-70-16), "
    "each also with -swish, or timm:NAME"
)
_FILE_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")
_DEFAULT_SIZE = 32
_NAME = re.compile(r"(?:(small-cnn)|((?:preact-)?resnet)-(\d{1,4})|(wrn)-(\d{1,4})-(\d{1,4}))(-swish)?")


def make_classifier(
    name: str,
    shape: Sequence[int],
    classes: int,
    *,
    mean: float | Sequence[float] | None = None,
    std: float | Sequence[float] | None = None,
) -> nn.Module:
    """A network with random weights from torch's global generator, in training mode; ``description`` tells what it is.

    Args:
        name: see :mod:`synthfast.models.classifiers`.
        shape: (H, W, C) of the images. From 64 pixels on the stem has stride 2, from 128 on 4.
        classes: at least 2.
        mean, std: of pixels in [0, 1], one number or one per channel. By default 0 and 1, which costs nothing; 0.5 and 0.5 for
            small-cnn; timm's own for timm:NAME.

    Raises UsageError in one line for a name or sizes that cannot be.
    """
    return build_classifier(describe_classifier(name, shape, classes, mean=mean, std=std))


def default_classifier(shape: Sequence[int]) -> str:
    """The network for images of ``shape`` (H, W, C) where none is named: small-cnn up to 16 pixels, else preact-resnet-18."""
    return "small-cnn" if max(shape[0], shape[1]) <= 16 else "preact-resnet-18"


def describe_classifier(
    name: str,
    shape: Sequence[int],
    classes: int,
    *,
    mean: float | Sequence[float] | None = None,
    std: float | Sequence[float] | None = None,
    **details: Any,
) -> dict[str, Any]:
    """The description of a network, JSON values; see the module. ``details`` replace those that the name stands for.

    Raises UsageError in one line for a name or sizes that cannot be.
    """
    kind = _kind(name)
    height, width, channels = _checked_shape(shape)
    if (mean is None) != (std is None):
        raise UsageError(f"{name}: expected both mean and std of the pixels, or neither; give both")
    if mean is None or std is None:
        if kind.family == "timm":
            mean, std = timm_pixels(name.removeprefix(TIMM_PREFIX), channels)
        else:
            mean, std = (0.5, 0.5) if kind.family == "small-cnn" else (0.0, 1.0)
    description = {
        "name": name,
        "shape": [height, width, channels],
        "classes": classes,
        "mean": _numbers(mean, channels),
        "std": _numbers(std, channels),
        **kind.details(height, width),
        **details,
    }
    _check_description(description)
    return description


def build_classifier(description: Mapping[str, Any]) -> nn.Module:
    """The network of a description (see the module), with random weights from torch's global generator, in training mode.

    Raises UsageError in one line for a description that is not one.
    """
    _check_description(description)
    if _kind(description["name"]).family == "timm":
        return _bare_network(description)
    device = torch.get_default_device()
    with torch.device("meta"):
        model = _bare_network(description)
    initialize(model, device)
    return model


def _bare_network(description: Mapping[str, Any]) -> nn.Module:
    kind = _kind(description["name"])
    shape, classes = tuple(description["shape"]), description["classes"]
    pixels = {key: tuple(float(value) for value in description[key]) for key in ("mean", "std")}
    details = {key: tuple(v) if isinstance(v := description[key], list) else v for key in kind.details(*shape[:2])}
    if kind.family == "timm":
        model: nn.Module = TimmClassifier(description["name"].removeprefix(TIMM_PREFIX), shape, classes, **pixels)
    else:
        module = {"small-cnn": SmallCNN, "resnet": ResNet, "preact-resnet": PreActResNet, "wrn": WideResNet}[
            kind.family
        ]
        model = module(*kind.sizes, shape[2], classes, **pixels, activation=kind.activation, **details)
    model.description = {**description}
    return model


def load_classifier(
    path: str | Path,
    device: torch.device,
    *,
    model: str | None = None,
    shape: Sequence[int] | None = None,
    classes: int | None = None,
    mean: float | Sequence[float] | None = None,
    std: float | Sequence[float] | None = None,
    allow_pickle: bool = False,
) -> tuple[nn.Module, dict[str, Any]]:
    """A classifier in evaluation mode on ``device``, and its configuration: "model" (the description), "shape", "classes".

    Args:
        path: a checkpoint folder of ``synthfast train classifier``; or a file of weights, safetensors or with ``allow_pickle``
            ``.pt``/``.pth``, whose names are those of RobustBench's architectures, of timm (for timm:NAME) or of this package.
        device: where it goes.
        model: name of the network. A file does not tell it; what it does tell must agree.
        shape: (H, W, C) of the images. By default a file's are 32x32, with the channels that its first layer has.
        classes: by default those that the last layer has.
        mean, std: of pixels in [0, 1]; see :func:`make_classifier`. By default what the file holds; else CIFAR-10's or -100's
            for DeepMind's networks of 10 or 100 classes of colour images; else those of the network's name. A folder has them
            in its config.json.

    torch's global generator is left as it is. Raises UsageError for what does not agree with the request, SynthfastError for
    files that do not fit.
    """
    path = Path(path)
    if path.is_file() or (path.suffix in _FILE_SUFFIXES and not path.is_dir()):
        return _load_file(path, device, model, shape, classes, mean, std, allow_pickle)
    if mean is not None or std is not None:
        raise UsageError(f"{path}: mean and std stand in a checkpoint's config.json; leave them out")
    config, tensors = load_checkpoint(path, "classifier")
    try:
        network = _with_weights(config["model"], tensors)
        if (config["shape"], config["classes"]) != (network.description["shape"], network.description["classes"]):
            raise ValueError(f"images {config['shape']} in {config['classes']} classes")
    except (KeyError, TypeError, ValueError, RuntimeError, UsageError) as error:
        reason = str(error).splitlines()[0]
        raise SynthfastError(f"{path}: the weights do not fit config.json ({reason}); train again") from error
    _check_request(path, network.description, model, shape, classes)
    return network.to(device).eval(), config


def _load_file(
    path: Path,
    device: torch.device,
    name: str | None,
    shape: Sequence[int] | None,
    classes: int | None,
    mean: float | Sequence[float] | None,
    std: float | Sequence[float] | None,
    allow_pickle: bool,
) -> tuple[nn.Module, dict[str, Any]]:
    if name is None:
        raise UsageError(
            f"{path}: a file of weights needs the name of its network; pass --model, one of {CLASSIFIER_NAMES}"
        )
    kind = _kind(name)
    tensors = load_tensors(path, allow_pickle=allow_pickle)
    details: dict[str, Any] = {}
    if kind.family == "timm":
        tensors, channels, outputs, of_file = _timm_weights(tensors, name.removeprefix(TIMM_PREFIX), path)
    else:
        found = read_published_weights(tensors, path)
        if found.name != name.removesuffix("-swish"):
            raise UsageError(f"{path}: expected weights of {name}, found those of {found.name}; pass that as --model")
        tensors, details, of_file = found.tensors, found.details, (found.mean, found.std)
        channels, outputs = found.channels, found.classes
        if found.is_deepmind and found.mean is None and mean is None:
            raise UsageError(
                f"{path}: DeepMind's networks normalise their images, but the file holds no mean and std for {channels} channels "
                f"and {outputs} classes; pass mean and std"
            )
    if mean is None and std is None:
        mean, std = of_file
    size = (_DEFAULT_SIZE, _DEFAULT_SIZE) if shape is None else _checked_shape(shape)[:2]
    description = describe_classifier(name, (*size, channels), outputs, mean=mean, std=std, **details)
    _check_request(path, description, name, shape, classes)
    try:
        network = _with_weights(description, tensors)
    except ValueError as error:
        raise SynthfastError(
            f"{path}: the weights do not fit {name} ({error}); choose another network or file"
        ) from error
    config = {
        "name": name,
        "shape": description["shape"],
        "classes": outputs,
        "class_names": None,
        "model": description,
    }
    return network.to(device).eval(), config


def _timm_weights(
    tensors: dict[str, Tensor], name: str, path: Path
) -> tuple[dict[str, Tensor], int, int, tuple[tuple[float, ...] | None, tuple[float, ...] | None]]:
    """The state dict of a :class:`TimmClassifier` from a file with timm's names, then channels, classes, (mean, std)."""
    config = timm_config(name)
    stem, head = (
        (value[0] if isinstance(value, list | tuple) else value)
        for value in map(config.get, ("first_conv", "classifier"))
    )
    if stem is None or head is None:
        raise UsageError(
            f"{path}: timm does not say which are the first and last layers of {name}; load a checkpoint folder"
        )
    network, mean, std = unwrap_network(tensors, f"{stem}.weight", path)
    channels = matrix_size(network, f"{stem}.weight", path)[1]
    outputs = matrix_size(network, f"{head}.weight", path)[0]
    return {f"network.{key}": tensor for key, tensor in network.items()}, channels, outputs, (mean, std)


def _with_weights(description: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> nn.Module:
    """The network of a description with these weights; ValueError in one line if they are not its weights."""
    _check_description(description)
    if _kind(description["name"]).family == "timm":
        with torch.random.fork_rng(devices=[]):
            model = _bare_network(description)
    else:
        with torch.device("meta"):  # neither time nor random numbers for weights that are replaced
            model = _bare_network(description)
    expected = model.state_dict()
    counters = {key for key in expected if key.endswith("num_batches_tracked")}  # absent from old files, and not used
    tensors = {**dict.fromkeys(counters, torch.tensor(0)), **tensors}
    for key in tensors:
        if key not in expected:
            raise ValueError(f"'{key}' is not part of {description['name']}")
    for key, tensor in expected.items():
        if key not in tensors:
            raise ValueError(f"'{key}' is missing")
        if tensors[key].shape != tensor.shape:
            raise ValueError(f"'{key}': expected {list(tensor.shape)}, found {list(tensors[key].shape)}")
    # Clones, for tensors of a file may share memory; dtypes are those of the network, whatever the file was saved in.
    fitting = {key: tensors[key].to(tensor.dtype, copy=True) for key, tensor in expected.items()}
    model.load_state_dict(fitting, assign=True)
    return model.to(memory_format=torch.channels_last)


@dataclass(frozen=True)
class _Kind:
    """What a name stands for: its family, the positional sizes of its module, and the activation."""

    family: str
    sizes: tuple[int, ...] = ()
    activation: str = "relu"

    def details(self, height: int, width: int) -> dict[str, Any]:
        """The part of a description that belongs to the family, with its defaults."""
        swish = self.activation == "swish"
        match self.family:
            case "small-cnn":
                return {"widths": [32, 64, 128]}
            case "resnet":
                return {"stem_stride": default_stem_stride(height, width)}
            case "preact-resnet":
                return {
                    "variant": "deepmind" if swish else "final-norm",
                    "stem_stride": default_stem_stride(height, width),
                }
            case "wrn":
                return {"variant": "deepmind" if swish else "trades", "stem_stride": default_stem_stride(height, width)}
        return {}


def _kind(name: object) -> _Kind:
    if isinstance(name, str) and name.startswith(TIMM_PREFIX):
        return _Kind("timm")
    match = _NAME.fullmatch(name) if isinstance(name, str) else None
    if match is None:
        raise UsageError(f"{str(name)!r:.80}: no classifier has this name; expected {CLASSIFIER_NAMES}")
    small, resnet, resnet_depth, _, depth, width, swish = match.groups()
    activation = "swish" if swish else "relu"
    if small:
        return _Kind("small-cnn", (), activation)
    if resnet:
        if int(resnet_depth) not in RESNET_BLOCKS:
            raise UsageError(
                f"{name}: expected a depth of 18 or 34, found {int(resnet_depth)}; choose {CLASSIFIER_NAMES}"
            )
        return _Kind(resnet, (int(resnet_depth),), activation)
    if int(depth) < 10 or (int(depth) - 4) % 6:
        raise UsageError(
            f"{name}: expected a depth of 6n + 4 (10, 16, 22, 28, 34, ...), found {int(depth)}; choose {CLASSIFIER_NAMES}"
        )
    if int(width) < 1:
        raise UsageError(f"{name}: expected a width of at least 1, found {int(width)}; choose {CLASSIFIER_NAMES}")
    return _Kind("wrn", (int(depth), int(width)), activation)


def _is_count(value: object, least: int = 1) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < float("inf")


_CHECKS = {
    "shape": (lambda value: _is_sizes(value, 3), "three positive integers [H, W, C]"),
    "classes": (lambda value: _is_count(value, 2), "an integer of at least 2"),
    "mean": (lambda value: isinstance(value, list) and all(map(_is_number, value)), "a list of numbers"),
    "std": (
        lambda value: isinstance(value, list) and all(_is_number(v) and v > 0 for v in value),
        "a list of positive numbers",
    ),
    "widths": (lambda value: _is_sizes(value), "a list of positive integers"),
    "stem_stride": (lambda value: _is_count(value) and value in (1, 2, 4), "1, 2 or 4"),
}
_VARIANTS = {"preact-resnet": PREACT_VARIANTS, "wrn": WIDE_VARIANTS}


def _is_sizes(value: object, length: int | None = None) -> bool:
    return (
        isinstance(value, list) and len(value) in ((length,) if length else range(1, 17)) and all(map(_is_count, value))
    )


def _check_description(description: object) -> None:
    if not isinstance(description, Mapping) or "name" not in description:
        raise UsageError(f"expected the description of a classifier, an object with a name, found {description!r:.80}")
    kind = _kind(description["name"])
    expected = ["name", "shape", "classes", "mean", "std", *kind.details(1, 1)]
    if set(description) != set(expected):
        raise UsageError(f"{description['name']}: expected a description of {expected}, found {list(description)}")
    for key in expected[1:]:
        if key == "variant":
            fits, what = description[key] in _VARIANTS[kind.family], f"one of {', '.join(_VARIANTS[kind.family])}"
        else:
            check, what = _CHECKS[key]
            fits = check(description[key])
        if not fits:
            raise UsageError(f"{description['name']}: expected '{key}' to be {what}, found {description[key]!r:.80}")
    channels = description["shape"][2]
    if len(description["mean"]) != channels or len(description["std"]) != channels:
        raise UsageError(
            f"{description['name']}: expected mean and std of {channels} channels, found {len(description['mean'])} "
            f"and {len(description['std'])} numbers"
        )


def _checked_shape(shape: Sequence[int]) -> tuple[int, int, int]:
    sizes = list(shape)
    if not _is_sizes(sizes, 3):
        raise UsageError(f"expected the shape of images as three positive integers (H, W, C), found {sizes!r:.80}")
    return sizes[0], sizes[1], sizes[2]


def _numbers(value: float | Sequence[float], channels: int) -> list[float]:
    return [float(value)] * channels if isinstance(value, int | float) else [float(number) for number in value]


def _check_request(
    path: Path, description: Mapping[str, Any], name: str | None, shape: Sequence[int] | None, classes: int | None
) -> None:
    """What the caller asked for must be what the weights are."""
    for what, asked, found in (
        ("the network", name, description["name"]),
        ("images", None if shape is None else list(shape), description["shape"]),
        ("classes", classes, description["classes"]),
    ):
        if asked is not None and asked != found:
            raise UsageError(f"{path}: expected {what} {asked}, found {found}; ask for that, or choose other weights")
