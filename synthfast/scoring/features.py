"""Features of images: the vectors that FID, KID, precision, recall, density and coverage compare.

A specification names them:

- ``pixels``: the image itself, scaled to [0, 1], H x W x C numbers in that order.
- ``classifier``: what the last linear layer of the embedded digits classifier takes in, 128 numbers (8x8 grey images);
  ``classifier:DIR``: the same of a checkpoint folder of ``synthfast train classifier``.
- ``inception``, ``inception:FILE``: Inception-v3 as FID has it (Heusel et al. 2017), 2,048 numbers, through torch-fidelity;
  its weights are downloaded once, or read from FILE.
- ``dinov2``: timm's ``vit_small_patch14_dinov2.lvd142m`` (Oquab et al. 2023), 384 numbers.
- ``timm:NAME``: any network of timm with its pretrained weights, before its classifier. Images are resized and normalised as
  timm says for the network. ``dinov2:FILE`` and ``timm:NAME:FILE`` read the weights from a file.

Grey images are repeated to three channels where a network wants colour.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import logging
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from synthfast.artifacts import load_tensors
from synthfast.assets import DIGITS_CLASSIFIER
from synthfast.data import ImageSet, loaders
from synthfast.data.loaders import Batch
from synthfast.distributed import Ranks
from synthfast.errors import SynthfastError, UsageError
from synthfast.models.classifiers import load_classifier
from synthfast.models.frozen import freeze
from synthfast.models.timm_classifier import timm_config
from synthfast.parallel import in_order
from synthfast.training.batches import to_unit

FEATURES = "pixels, classifier, classifier:DIR, inception, inception:FILE, dinov2, timm:NAME"
DINOV2 = "vit_small_patch14_dinov2.lvd142m"
DIGITS_SHAPE = (8, 8, 1)
_INCEPTION_DIM = 2048
_INSTALL = "pip install 'synthfast[metrics]'"

Function = Callable[[Tensor], Tensor]


class Features:
    """A function from images to vectors.

    Attributes:
        name: the specification.
        shape: (H, W, C) of the images that it takes.
        dim: length of a vector.
        fingerprint: SHA-256 of what the function is: kind, weights and preprocessing. Equal ones give equal vectors up to
            rounding.
        device: where it computes.
        batch_size: images in a batch where the caller does not say.
    """

    def __init__(
        self,
        name: str,
        shape: Sequence[int],
        dim: int,
        fingerprint: str,
        device: torch.device,
        function: Function,
        batch_size: int = 128,
    ) -> None:
        self.name, self.shape, self.dim = name, (shape[0], shape[1], shape[2]), dim
        self.fingerprint, self.device, self.batch_size = fingerprint, device, batch_size
        self._function = function

    def __call__(self, pixels: Tensor) -> Tensor:
        """Features of images: uint8 [N, H, W, C] to float32 [N, dim] on the device."""
        with torch.inference_mode():
            found = self._function(pixels.to(self.device, non_blocking=True))
        # Out of inference mode, so that what others do with them has no bounds.
        return found.float().clone()

    def stream(
        self, images: ImageSet, batches: Sequence[np.ndarray], ranks: Ranks | None = None
    ) -> Iterator[tuple[int, Tensor]]:
        """Features of batches of images (indices int64 [k]): (number of the batch, float32 [k, dim]) in order.

        With ``ranks`` every one gets its share of the batches: number r, r + world size, and so on. On a CPU a thread computes
        a batch.
        """
        if images.shape != self.shape:
            raise UsageError(
                f"{images.name}: expected images {_times(self.shape)} for the features {self.name}, found "
                f"{_times(images.shape)}; choose a source that fits"
            )
        mine = range(len(batches)) if ranks is None else range(ranks.rank, len(batches), ranks.world_size)
        threads = torch.get_num_threads() if self.device.type == "cpu" else 1

        def make(part: tuple[int, Batch]) -> tuple[int, Tensor]:
            number, batch = part
            found = self(batch.images)
            if not bool(found.isfinite().all()):
                first, last = batches[number][0], batches[number][-1]
                raise SynthfastError(
                    f"images {first} to {last} of {images.name}: expected finite features {self.name}, found NaN or infinity; "
                    "check the weights"
                )
            return number, found

        with contextlib.closing(loaders.stream(images, [batches[number] for number in mine], self.device)) as read:
            yield from in_order(make, zip(mine, read, strict=True), threads)

    def compute(
        self,
        images: ImageSet,
        ranks: Ranks | None = None,
        batch_size: int | None = None,
        report: Callable[[int], None] | None = None,
    ) -> Tensor:
        """Features of all images: float32 [n, dim] on the CPU; with ``ranks`` they share the work, and each gets all.

        ``report`` is called with the number of images after every batch.
        """
        batches = split(np.arange(len(images)), batch_size or self.batch_size)
        found = torch.zeros(len(images), self.dim)
        several = ranks is not None and ranks.world_size > 1
        if several:
            found.view(torch.int32).fill_(torch.iinfo(torch.int32).min)
        for number, part in self.stream(images, batches, ranks):
            found[batches[number]] = part.cpu()
            if report is not None:
                report(len(part))
        if several:
            # Every row was written by one rank: the largest bit pattern is that rank's, whatever its sign.
            assert ranks is not None
            ranks.maximum(found.view(torch.int32))
        return found


def split(items: np.ndarray, batch_size: int) -> list[np.ndarray]:
    """Items in batches, in order."""
    return [items[first : first + batch_size] for first in range(0, len(items), batch_size)]


def default_features(shape: Sequence[int]) -> str:
    """The specification for images of ``shape`` (H, W, C) where none is given."""
    return "classifier" if tuple(shape) == DIGITS_SHAPE else "inception"


def load_features(
    spec: str | None,
    shape: Sequence[int],
    device: torch.device,
    *,
    allow_pickle: bool = False,
    pretrained: bool = True,
) -> Features:
    """The features that a specification names.

    Args:
        spec: see the module; None for :func:`default_features`.
        shape: (H, W, C) of the images.
        device: where they are computed.
        allow_pickle: read a file of weights that is a pickle (through ``torch.load(weights_only=True)``).
        pretrained: False gives networks of timm and Inception fixed random weights: for tests and comparisons.

    Raises:
        UsageError: no such features, or images that they do not take.
        SynthfastError: weights that cannot be read or downloaded.
    """
    spec = default_features(shape) if spec is None else spec
    kind, _, rest = spec.partition(":")
    if kind == "pixels" and not rest:
        return _pixels(shape, device)
    if kind == "classifier":
        return _classifier(spec, Path(rest) if rest else DIGITS_CLASSIFIER, shape, device)
    if kind == "inception":
        return _inception(spec, rest or None, shape, device, allow_pickle, pretrained)
    if kind == "dinov2":
        return _timm(spec, DINOV2, rest or None, shape, device, allow_pickle, pretrained)
    if kind == "timm" and rest:
        name, _, file = rest.partition(":")
        return _timm(spec, name, file or None, shape, device, allow_pickle, pretrained)
    raise UsageError(f"--features {spec}: no such features; expected {FEATURES}")


def _pixels(shape: Sequence[int], device: torch.device) -> Features:
    def function(pixels: Tensor) -> Tensor:
        return pixels.flatten(1).float().div_(255)

    dim = shape[0] * shape[1] * shape[2]
    return Features("pixels", shape, dim, _sha256("pixels"), device, function, batch_size=1024)


def _classifier(spec: str, path: Path, shape: Sequence[int], device: torch.device) -> Features:
    model, config = load_classifier(path, device)
    if list(config["shape"]) != list(shape):
        raise UsageError(
            f"--features {spec}: expected images {_times(config['shape'])} as the classifier was trained on, found "
            f"{_times(shape)}; choose other features"
        )
    fingerprint = _sha256("classifier", config["model"], _digest(model))
    _cut_head(model)
    frozen = freeze(model)

    def function(pixels: Tensor) -> Tensor:
        return frozen(to_unit(pixels, device)).flatten(1)

    dim = function(torch.zeros(1, *shape, dtype=torch.uint8, device=device)).shape[1]
    return Features(spec, shape, dim, fingerprint, device, function, batch_size=256)


def _cut_head(model: nn.Module) -> None:
    """Replace the last linear layer of a classifier of the package by nothing."""
    if hasattr(model, "network"):  # timm's
        model.network.reset_classifier(0)
        return
    name = [name for name, module in model.named_children() if isinstance(module, nn.Linear)][-1]
    setattr(model, name, nn.Identity())


def _inception(
    spec: str, file: str | None, shape: Sequence[int], device: torch.device, allow_pickle: bool, pretrained: bool
) -> Features:
    try:
        from torch_fidelity import feature_extractor_inceptionv3 as fidelity
    except ImportError as error:
        raise UsageError(
            f"--features {spec}: needs the package torch-fidelity, which is not installed; {_INSTALL}"
        ) from error
    _check_channels(spec, shape)
    if file is not None:
        tensors = load_tensors(file, allow_pickle=allow_pickle)
    elif pretrained:
        tensors = _downloaded(spec, fidelity.URL_INCEPTION_V3)
    else:
        tensors = random_inception_weights()
    model = _inception_model(fidelity.FeatureExtractorInceptionV3, tensors, file or spec).to(device)

    def function(pixels: Tensor) -> Tensor:
        return model(_colour(pixels).permute(0, 3, 1, 2))[0]

    # On a CPU a thread takes a batch, and the first layers need 10 MB an image.
    batch_size = 16 if device.type == "cpu" else 128
    fingerprint = _sha256("inception-v3 of torch-fidelity", _digest(model))
    return Features(spec, shape, _INCEPTION_DIM, fingerprint, device, function, batch_size)


def _inception_model(make: Callable[..., nn.Module], tensors: dict[str, Tensor], where: str) -> nn.Module:
    # torch-fidelity reads weights from a pickle alone, and trusts it: so it gets one that was written here.
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "weights.pth")
        torch.save(tensors, path)
        try:
            with torch.random.fork_rng(devices=[]):
                return make("inception-v3-compat", [str(_INCEPTION_DIM)], feature_extractor_weights_path=path)
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:120]
            raise SynthfastError(
                f"{where}: expected the weights of torch-fidelity's Inception-v3 (weights-inception-2015-12-05), found others "
                f"({reason}); choose another file"
            ) from error


def random_inception_weights(seed: int = 0) -> dict[str, Tensor]:
    """Random weights with the names and shapes of torch-fidelity's file, whose features are of a usable size."""
    from torch_fidelity import feature_extractor_inceptionv3 as fidelity

    random = torch.Generator().manual_seed(seed % 2**63)
    shapes: dict[str, Tensor] = {}

    class Shapes(fidelity.FeatureExtractorInceptionV3):
        def load_state_dict(self, state_dict: Any, *args: Any, **kwargs: Any) -> None:
            shapes.update(self.state_dict())

    with tempfile.TemporaryDirectory() as folder, torch.random.fork_rng(devices=[]):
        torch.save({}, os.path.join(folder, "none.pth"))
        Shapes("shapes", [str(_INCEPTION_DIM)], feature_extractor_weights_path=os.path.join(folder, "none.pth"))
    tensors = {}
    for name, value in shapes.items():
        if value.ndim == 4:  # He et al. (2015): activations keep their size
            tensors[name] = torch.randn(value.shape, generator=random) * (2 / value[0].numel()) ** 0.5
        else:
            tensors[name] = value.clone()
    return tensors


def _downloaded(spec: str, url: str) -> dict[str, Tensor]:
    """Published weights from torch's cache, or the network; checked against the SHA-256 in the file's name."""
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            return torch.hub.load_state_dict_from_url(url, map_location="cpu", check_hash=True, weights_only=True)
    except Exception as error:  # no network, a full disk, a broken file
        reason = " ".join(str(error).split())[:120]
        raise SynthfastError(
            f"--features {spec}: cannot get the weights from {url} ({reason}); fetch them where there is a network and write "
            f"--features {spec}:FILE"
        ) from error


def _timm(
    spec: str,
    name: str,
    file: str | None,
    shape: Sequence[int],
    device: torch.device,
    allow_pickle: bool,
    pretrained: bool,
) -> Features:
    config = timm_config(name)  # says so where timm or the network is missing
    import timm
    from timm.data import resolve_data_config

    _check_channels(spec, shape)
    try:
        with torch.random.fork_rng(devices=[]), _quiet("huggingface_hub"):
            torch.manual_seed(0)
            model = timm.create_model(name, pretrained=pretrained and file is None, num_classes=0)
    except Exception as error:  # timm has many ways to say that it found no weights
        reason = " ".join(str(error).split())[:120]
        raise SynthfastError(
            f"--features {spec}: cannot get the weights of {name} ({reason}); fetch them where there is a network and write "
            f"--features {spec}:FILE"
        ) from error
    if file is not None:
        _load_timm(model, load_tensors(file, allow_pickle=allow_pickle), str(config["classifier"]), file, name)
    model = model.eval().to(device)
    data = resolve_data_config({}, model=model)
    prepare = _timm_preparation(data, device)

    def function(pixels: Tensor) -> Tensor:
        return model(prepare(_colour(pixels).permute(0, 3, 1, 2))).flatten(1)

    facts = {key: data[key] for key in ("input_size", "interpolation", "mean", "std", "crop_pct", "crop_mode")}
    fingerprint = _sha256("timm", name, facts, _digest(model))
    batch_size = 16 if device.type == "cpu" else 128
    # timm's num_features is not always what comes out (mobilenetv3 and vgg have a hidden layer in their heads).
    with torch.inference_mode():
        dim = function(torch.zeros(1, *shape, dtype=torch.uint8, device=device)).shape[1]
    return Features(spec, shape, dim, fingerprint, device, function, batch_size)


@contextlib.contextmanager
def _quiet(name: str) -> Iterator[None]:
    """Without the messages of a logger, such as those of every retry."""
    logger = logging.getLogger(name)
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(before)


def _load_timm(model: nn.Module, tensors: dict[str, Tensor], head: str, file: str, name: str) -> None:
    kept = {key: value for key, value in tensors.items() if not key.startswith(f"{head}.")}
    try:
        found = model.load_state_dict(kept, strict=False)
        problem = ", ".join([*found.missing_keys, *found.unexpected_keys][:3])
    except RuntimeError as error:
        problem = " ".join(str(error).split())[:120]
    if problem:
        raise SynthfastError(
            f"{file}: expected the weights of timm's {name}, found others ({problem}); choose another file"
        )


def _timm_preparation(data: dict[str, Any], device: torch.device) -> Function:
    """uint8 [N, 3, H, W] to what a network of timm takes: resized so that the crop fits, cropped, normalised."""
    from torchvision.transforms.v2 import InterpolationMode
    from torchvision.transforms.v2 import functional as transforms

    height, width = data["input_size"][1:]
    mode = InterpolationMode(data["interpolation"])
    target = [int(height / data["crop_pct"]), int(width / data["crop_pct"])]
    mean, std = (torch.tensor(data[key], device=device).view(1, -1, 1, 1) for key in ("mean", "std"))

    def prepare(images: Tensor) -> Tensor:
        # timm keeps the ratio of the sides: the shorter one fits unless the network's images are to be squashed.
        sides = target
        if data["crop_mode"] != "squash":
            ratio = max(target[0] / images.shape[2], target[1] / images.shape[3])
            sides = [round(images.shape[2] * ratio), round(images.shape[3] * ratio)]
        resized = transforms.resize(images, sides, mode, antialias=True)
        return (transforms.center_crop(resized, [height, width]).float().div_(255) - mean) / std

    return prepare


def _colour(pixels: Tensor) -> Tensor:
    return pixels.expand(-1, -1, -1, 3) if pixels.shape[3] == 1 else pixels


def _check_channels(spec: str, shape: Sequence[int]) -> None:
    if shape[2] not in (1, 3):
        raise UsageError(
            f"--features {spec}: expected grey or RGB images, found {_times(shape)}; choose pixels or a classifier"
        )


def _digest(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _sha256(*facts: object) -> str:
    return hashlib.sha256(repr(facts).encode()).hexdigest()


def _times(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))
