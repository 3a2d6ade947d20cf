"""What can be sampled from, and where it is loaded from.

Anything with the few attributes and the one method of :class:`Generator` is a generator. ``--generator py:module:function``
calls ``function(device)`` of an importable module (the current folder included) and samples from what it returns::

    class Noise:
        name, shape, classes = "noise", (8, 8, 1), 10          # (H, W, C)

        def sample(self, index, labels, seed):                  # int64 [N], int64 [N] or None, int
            x = torch.empty(len(index), 1, 8, 8)
            return ops.philox_normal_(x, index, seed, ops.Stream.NOISE)   # float [N, C, H, W], about in [-1, 1]

    def make(device):
        return Noise()

``sample`` must give image i from (seed, index i, label i) alone; that is what makes a run independent of its batches and
ranks. ``synthfast.ops`` has the random numbers for it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib
import json
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from synthfast import assets, diffusion
from synthfast.artifacts import CHECKPOINT_CONFIG, load_checkpoint, read_json, sha256_file
from synthfast.config import SampleConfig
from synthfast.errors import SynthfastError, UsageError
from synthfast.models.diffusers_format import (
    assign_weights,
    load_diffusers_unet,
    read_scheduler_config,
    resolve_model_folder,
)
from synthfast.models.gan import GANConfig, draw_images
from synthfast.models.gan import Generator as GANNetwork
from synthfast.models.unet import UNet2D
from synthfast.models.unet_config import UNet2DConfig

_SOLVER_OPTIONS = tuple(field.name for field in dataclasses.fields(diffusion.SolverConfig) if field.name != "name")
_PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Generator(Protocol):
    """A source of images.

    Attributes:
        name: for manifests and reports.
        shape: (H, W, C).
        classes: number of classes, or None for a generator without labels.

    A ``fingerprint`` (a string that changes with the weights) and ``facts`` (JSON values for the manifest) are taken
    where they exist. ``concurrent`` = True says that several threads may call ``sample`` at once; on a CPU each batch is
    then computed by one thread, and results do not depend on how many there are.
    """

    name: str
    shape: tuple[int, int, int]
    classes: int | None

    def sample(self, index: Tensor, labels: Tensor | None, seed: int) -> Tensor:
        """Images float [N, C, H, W] in [-1, 1] (what lies outside is clamped) for ``index`` int64 [N] on the device."""
        ...


@dataclasses.dataclass
class DiffusionGenerator:
    """A diffusion network with its solver.

    unet: any network ``(x, t, labels) -> output``, see :data:`synthfast.diffusion.Model`.
    table: the solver, see :func:`synthfast.diffusion.make_table`.
    null_label: the label for no class, which guidance needs; None where there is none.
    guidance: classifier-free guidance weight, or None.
    """

    name: str
    shape: tuple[int, int, int]
    classes: int | None
    fingerprint: str
    unet: diffusion.Model
    table: diffusion.SolverTable
    null_label: int | None = None
    guidance: float | None = None
    precision: torch.dtype = torch.float32
    concurrent: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.guidance not in (None, 1) and self.null_label is None:
            raise UsageError(
                f"--guidance {self.guidance:g}: expected a class-conditional model trained with label dropout, found "
                f"{self.name} without; leave --guidance out"
            )

    def sample(self, index: Tensor, labels: Tensor | None, seed: int) -> Tensor:
        height, width, channels = self.shape
        return diffusion.sample(
            self.unet,
            self.table,
            index,
            shape=(channels, height, width),
            seed=seed,
            labels=labels,
            null_label=self.null_label,
            guidance=self.guidance,
            autocast=None if self.precision == torch.float32 else self.precision,
        )

    @property
    def facts(self) -> dict[str, Any]:
        """The solver and the guidance as the manifest records them; infinity is written "inf"."""
        solver = dataclasses.asdict(self.table.config)
        return {"solver": {k: "inf" if v == float("inf") else v for k, v in solver.items()}, "guidance": self.guidance}


@dataclasses.dataclass
class GANGenerator:
    """The generator of a GAN.

    network: a :class:`synthfast.models.gan.Generator`, or what torch.compile made of it.
    """

    name: str
    shape: tuple[int, int, int]
    classes: int | None
    fingerprint: str
    network: GANNetwork
    precision: torch.dtype = torch.float32
    concurrent: ClassVar[bool] = True

    def sample(self, index: Tensor, labels: Tensor | None, seed: int) -> Tensor:
        with torch.autocast(index.device.type, self.precision, enabled=self.precision != torch.float32):
            return draw_images(self.network, index, labels, seed)


def load_generator(config: SampleConfig, device: torch.device) -> Generator:
    """The generator that ``config.generator`` names, on ``device``, with the solver that ``config`` asks for.

    Raises:
        UsageError: solver options that the generator does not have.
        SynthfastError: missing, broken or unfitting weights.
    """
    spec = config.generator
    if spec.startswith("py:"):
        return _from_python(config, device)
    if spec == "digits":
        return _from_checkpoint(assets.DIGITS_GENERATOR, config, device)
    folder = Path(spec)
    path = folder / CHECKPOINT_CONFIG
    if not path.is_file():
        return _from_diffusers(config, device)
    header = read_json(path, "checkpoint")
    if "kind" not in header:
        return _from_diffusers(config, device)
    load = {"diffusion": _from_checkpoint, "gan": _from_gan}.get(str(header["kind"]))
    if load is None:
        raise SynthfastError(
            f"{path}: expected a checkpoint of kind 'diffusion' or 'gan', found {header['kind']!r}; check the path"
        )
    return load(folder, config, device)


def _from_gan(folder: Path, config: SampleConfig, device: torch.device) -> GANGenerator:
    _refuse_solver(config)
    header, weights = load_checkpoint(folder, "gan")
    try:
        description = GANConfig(**header["network"])
        name, shape, classes = header["name"], header["shape"], header["classes"]
        if not isinstance(name, str):
            raise ValueError(f"'name' is {name!r}")
        expected = [description.image_size, description.image_size, description.channels]
        if shape != expected:
            raise ValueError(f"'shape' is {shape!r}, the network's is {expected}")
        if type(classes) is not type(description.num_classes) or classes != description.num_classes:
            raise ValueError(f"'classes' is {classes!r}, the network has {description.num_classes}")
        with torch.device("meta"):
            network = GANNetwork(description)
    except _WRONG as error:
        raise _wrong(folder, error) from error
    assign_weights(network, weights, source=folder)
    return GANGenerator(
        name=name,
        shape=tuple(shape),
        classes=classes,
        fingerprint=header["sha256"],
        network=_ready(network, config, device),
        precision=_PRECISIONS[config.precision],
    )


def _from_checkpoint(folder: Path, config: SampleConfig, device: torch.device) -> DiffusionGenerator:
    header, weights = load_checkpoint(folder, "diffusion")
    try:
        network = UNet2DConfig.from_dict(dict(header["unet"]))
        parameterization = diffusion.from_dict(dict(header["parameterization"]))
        default = dataclasses.asdict(diffusion.SolverConfig(**header["sampler"]))
        name, shape, classes, null_label = header["name"], header["shape"], header["classes"], header["null_label"]
        _require_fit(network, name, shape, classes, null_label)
        with torch.device("meta"):
            unet = UNet2D(network)
    except _WRONG as error:
        raise _wrong(folder, error) from error
    assign_weights(unet, weights, source=folder)
    return DiffusionGenerator(
        name=name,
        shape=tuple(shape),
        classes=classes,
        fingerprint=header["sha256"],
        unet=_ready(unet, config, device),
        table=diffusion.make_table(parameterization, _solver(config, default)),
        null_label=null_label,
        guidance=config.guidance,
        precision=_PRECISIONS[config.precision],
    )


# What a configuration raises that is not one: RuntimeError where the sizes of a network overflow.
_WRONG = (KeyError, TypeError, ValueError, OverflowError, RuntimeError, UsageError)


def _wrong(folder: Path, error: Exception) -> SynthfastError:
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return SynthfastError(f"{folder / CHECKPOINT_CONFIG}: missing or wrong ({reason}); train again")


def _require_fit(network: UNet2DConfig, name: object, shape: object, classes: object, null_label: object) -> None:
    """ValueError unless these values of a checkpoint's configuration belong to its network."""
    embeddings, side = network.num_class_embeds or 0, network.sample_size
    size = [side, side] if isinstance(side, int) else list(side or ())
    if not isinstance(name, str):
        raise ValueError(f"'name' is {name!r}")
    if shape != [*size, network.in_channels]:
        raise ValueError(f"'shape' is {shape!r}, the network's is {[*size, network.in_channels]}")
    if (classes is not None and type(classes) is not int) or not bool(embeddings) <= (classes or 0) <= embeddings:
        raise ValueError(f"'classes' is {classes!r}, the network has {embeddings}")
    if null_label is not None and (type(null_label) is not int or not (classes or 0) <= null_label < embeddings):
        raise ValueError(f"'null_label' is {null_label!r}, the network has {embeddings} labels and {classes} classes")


def _from_diffusers(config: SampleConfig, device: torch.device) -> DiffusionGenerator:
    folder = resolve_model_folder(config.generator, allow_pickle=config.allow_pickle)
    schedule = read_scheduler_config(folder)
    if schedule is None:
        raise SynthfastError(
            f"{folder}: no scheduler_config.json, which says what noise the model was trained with; put it beside config.json"
        )
    parameterization = diffusion.from_scheduler_config(schedule)
    unet = load_diffusers_unet(folder, allow_pickle=config.allow_pickle)
    size = unet.config.sample_size
    if size is None:
        raise SynthfastError(f"{folder / 'config.json'}: no sample_size, so the image size is unknown; add it")
    height, width = (size, size) if isinstance(size, int) else size
    classes = unet.config.num_class_embeds
    weights = sorted(
        path for path in folder.glob("diffusion_pytorch_model*") if path.suffix in (".safetensors", ".bin")
    )
    return DiffusionGenerator(
        name=config.generator,
        shape=(height, width, unet.config.in_channels),
        classes=classes,
        fingerprint=hashlib.sha256("".join(map(sha256_file, weights)).encode()).hexdigest(),
        unet=_ready(unet, config, device),
        table=diffusion.make_table(parameterization, _solver(config, {"name": "dpmpp-2m", "steps": 25})),
        guidance=config.guidance,
        precision=_PRECISIONS[config.precision],
    )


def _ready(network: nn.Module, config: SampleConfig, device: torch.device) -> Any:
    network = network.to(device).eval().requires_grad_(False)
    return torch.compile(network, dynamic=False) if config.compile else network


def _solver(config: SampleConfig, default: dict[str, Any]) -> diffusion.SolverConfig:
    """The solver asked for; options that were not given come from ``default`` where that is the same solver."""
    name = config.solver or default["name"]
    given = {key: getattr(config, key) for key in _SOLVER_OPTIONS if getattr(config, key) is not None}
    base = {key: value for key, value in default.items() if key != "name"} if name == default["name"] else {}
    if "steps" not in given and "steps" in default:
        base["steps"] = default["steps"]
    return diffusion.SolverConfig(name=name, **{**base, **given})


def _refuse_solver(config: SampleConfig) -> None:
    """UsageError if an option for solvers is given."""
    given = [key for key in ("solver", "guidance", *_SOLVER_OPTIONS) if getattr(config, key) is not None]
    if given:
        flag = "--" + given[0].replace("_", "-")
        raise UsageError(f"{flag}: {config.generator} samples in its own way, expected no solver options; leave it out")


def _from_python(config: SampleConfig, device: torch.device) -> Generator:
    _, _, rest = config.generator.partition(":")
    module_name, colon, function_name = rest.partition(":")
    if not colon or not module_name or not function_name:
        raise UsageError(f"--generator {config.generator}: expected py:module:function")
    _refuse_solver(config)
    where = f"--generator {config.generator}"
    with _current_folder_importable(), _code_of_others(where):
        try:
            module = importlib.import_module(module_name)
            function = getattr(module, function_name)
        except (ImportError, AttributeError) as error:
            raise UsageError(f"{where}: cannot be imported ({error}); check the name") from error
        made = function(device)
        source = getattr(module, "__file__", None)
        return PythonGenerator(where, made, sha256_file(source) if source else "unknown")


class PythonGenerator:
    """What ``py:module:function`` returned: attributes checked, what its code raises in one line.

    Args:
        where: starts the messages.
        made: see :class:`Generator`.
        fingerprint: where ``made`` has none of its own.

    Raises SynthfastError for attributes that are missing or wrong.
    """

    def __init__(self, where: str, made: Generator, fingerprint: str) -> None:
        missing = [name for name in ("name", "shape", "classes", "sample") if not hasattr(made, name)]
        if missing:
            raise SynthfastError(
                f"{where}: what it returned lacks {', '.join(missing)}; "
                "see synthfast.sampling.generators for the protocol"
            )
        self._where, self._made = where, made
        self.name, self.shape, self.classes = made.name, made.shape, made.classes
        self.fingerprint, self.facts = getattr(made, "fingerprint", fingerprint), getattr(made, "facts", {})
        self.concurrent = bool(getattr(made, "concurrent", False))
        self._require("a string as name", self.name, isinstance(self.name, str))
        is_shape = isinstance(self.shape, (tuple, list)) and len(self.shape) == 3
        is_shape = is_shape and all(type(side) is int and side > 0 for side in self.shape)
        self._require("three positive integers as shape (H, W, C)", self.shape, is_shape)
        is_classes = self.classes is None or (type(self.classes) is int and self.classes > 0)
        self._require("a positive integer or None as classes", self.classes, is_classes)
        self._require("a string as fingerprint", self.fingerprint, isinstance(self.fingerprint, str))
        self._require("a dictionary of JSON values as facts", self.facts, _is_json_object(self.facts))

    def _require(self, expected: str, found: object, condition: bool) -> None:
        if not condition:
            raise SynthfastError(f"{self._where}: expected {expected}, found {found!r}; correct the generator")

    def sample(self, index: Tensor, labels: Tensor | None, seed: int) -> Tensor:
        with _code_of_others(self._where):
            return self._made.sample(index, labels, seed)


def _is_json_object(value: object) -> bool:
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError):
        return False
    return isinstance(value, dict) and all(isinstance(key, str) for key in value)


@contextlib.contextmanager
def _code_of_others(where: str) -> Iterator[None]:
    """Around code that is not ours and may raise anything: one line that says what, and in which line of which file."""
    try:
        yield
    except (SynthfastError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        # A syntax error says itself where it is; its last frame is Python's importer.
        place = "" if isinstance(error, SyntaxError) else f" ({frame.filename}, line {frame.lineno})"
        what = " ".join(f"{type(error).__name__}: {error}".split())
        raise SynthfastError(f"{where}: {what}{place}; correct the generator") from error


@contextlib.contextmanager
def _current_folder_importable() -> Iterator[None]:
    sys.path.insert(0, "")
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):  # the module may have put a path of its own there
            sys.path.remove("")
