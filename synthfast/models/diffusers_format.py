"""Reading model folders in the layout of diffusers, from disk or from the Hugging Face hub.

A model folder holds ``config.json`` and ``diffusion_pytorch_model.safetensors`` (or several shards and their
index); a pipeline folder holds the model in ``unet/`` and its noise schedule in ``scheduler/``.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from synthfast.artifacts import load_tensors, read_json
from synthfast.errors import SynthfastError
from synthfast.models.unet import UNet2D, UNet2DConfig

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"
INDEX_NAME = "diffusion_pytorch_model.safetensors.index.json"
PICKLE_NAME = "diffusion_pytorch_model.bin"
SCHEDULER_NAME = "scheduler_config.json"
UNET_FOLDER = "unet"

_MODEL_CLASSES = ("UNet2DModel", "UNet2D")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_HUB_FILES = (CONFIG_NAME, WEIGHTS_NAME, "diffusion_pytorch_model-*.safetensors", INDEX_NAME)
# Attention layers had other names before diffusers 0.12, and google/ddpm-cifar10-32 still has those.
_OLD_ATTENTION_KEY = re.compile(r"(.*\battentions\.\d+\.)(query|key|value|proj_attn)\.(weight|bias)")
_NEW_ATTENTION_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def resolve_model_folder(path_or_id: str | Path, *, allow_pickle: bool = False) -> Path:
    """The folder that holds ``config.json`` of a U-Net.

    path_or_id: a model folder, a pipeline folder (its ``unet`` is taken), or a hub id such as
    "google/ddpm-cifar10-32", which is downloaded to the hub's cache once (configurations and safetensors
    only; ``.bin`` too with ``allow_pickle``). An existing folder goes before a hub id of the same name.

    Raises SynthfastError if there is no such folder, it has no config.json, or the download fails.
    """
    folder = Path(path_or_id)
    if not folder.is_dir():
        if folder.exists():
            raise SynthfastError(f"{folder} is a file; expected a model folder with {CONFIG_NAME} in it")
        if not _HUB_ID.fullmatch(str(path_or_id)):
            raise SynthfastError(
                f"no model folder {folder}; expected a folder with {CONFIG_NAME} and {WEIGHTS_NAME}, "
                "or a hub id such as google/ddpm-cifar10-32"
            )
        folder = _download(str(path_or_id), allow_pickle)
    for candidate in (folder, folder / UNET_FOLDER):
        if (candidate / CONFIG_NAME).is_file():
            return candidate
    raise SynthfastError(f"{folder} has no {CONFIG_NAME}, neither in it nor in {UNET_FOLDER}/: not a model folder")


def load_diffusers_unet(
    path_or_id: str | Path, *, allow_pickle: bool = False, dtype: torch.dtype = torch.float32
) -> UNet2D:
    """A U-Net from a diffusers ``UNet2DModel`` folder, in evaluation mode, on the CPU, as ``dtype``.

    path_or_id: see :func:`resolve_model_folder`. ``allow_pickle`` lets a ``.bin`` be read where there is no
    safetensors file, through ``torch.load(weights_only=True)``.

    Raises SynthfastError, always in one line, for an unsupported configuration, a missing or broken weights
    file, and weights that are missing, unexpected or of another shape.
    """
    folder = resolve_model_folder(path_or_id, allow_pickle=allow_pickle)
    values = read_json(folder / CONFIG_NAME, "model configuration")
    model_class = values.get("_class_name", _MODEL_CLASSES[0])
    if model_class not in _MODEL_CLASSES:
        raise SynthfastError(f"{folder / CONFIG_NAME} describes a {model_class}; supported: {_MODEL_CLASSES[0]}")
    config = UNet2DConfig.from_dict(values)
    # Through float32, and to dtype by the model, which knows what must stay exact (Fourier frequencies).
    weights = {key: tensor.float() for key, tensor in _read_weights(folder, allow_pickle).items()}
    # On the meta device no memory is filled twice, and the global random generator is left alone.
    try:
        with torch.device("meta"):
            model = UNet2D(config)
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:  # sizes that no tensor has
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise SynthfastError(f"{folder / CONFIG_NAME}: describes no network ({reason}); restore the file") from error
    assign_weights(model, weights, source=folder)
    return model.to(dtype).eval()


def assign_weights(model: UNet2D, weights: dict[str, Tensor], *, source: str | Path) -> None:
    """Make ``weights`` (diffusers' keys, new or old; not copied) those of ``model``, also on the meta device.

    source: named in messages. The types of the weights become those of the model. Raises SynthfastError with
    the first key that does not fit and their number.
    """
    weights = {_current_key(key): tensor for key, tensor in weights.items()}
    expected = {key: tensor.shape for key, tensor in model.state_dict().items()}
    problems = {
        "missing": [key for key in expected if key not in weights],
        "unexpected": [key for key in weights if key not in expected],
        "of another shape": [key for key in expected if key in weights and weights[key].shape != expected[key]],
    }
    for problem, keys in problems.items():
        if keys:
            first = keys[0]
            if problem == "of another shape":
                first += f" (expected {list(expected[first])}, found {list(weights[first].shape)})"
            raise SynthfastError(
                f"weights in {source} do not fit the configuration beside them: "
                f"{len(keys)} of {len(expected)} {problem}, first {first}"
            )
    model.load_state_dict(weights, strict=True, assign=True)
    model.to(memory_format=torch.channels_last)


def read_scheduler_config(folder: str | Path) -> dict[str, Any] | None:
    """The noise schedule that belongs to a model folder, or None if there is none.

    Looks for ``scheduler_config.json`` in the folder, in ``folder/scheduler`` and in ``folder/../scheduler``.
    Raises SynthfastError if the file is not JSON.
    """
    folder = Path(folder)
    for place in (folder, folder / "scheduler", folder.parent / "scheduler"):
        if (place / SCHEDULER_NAME).is_file():
            return read_json(place / SCHEDULER_NAME, "noise schedule")
    return None


def _download(hub_id: str, allow_pickle: bool) -> Path:
    try:
        import huggingface_hub
        from huggingface_hub.errors import HfHubHTTPError
    except ImportError:
        raise SynthfastError(
            f"no folder {hub_id}, and huggingface_hub, which could download it, is not installed; "
            "pip install huggingface_hub, or pass a model folder"
        ) from None
    names = _HUB_FILES + ((PICKLE_NAME,) if allow_pickle else ())
    patterns = [prefix + name for prefix in ("", f"{UNET_FOLDER}/") for name in names]
    patterns += [SCHEDULER_NAME, f"scheduler/{SCHEDULER_NAME}"]
    # The base class of the hub's HTTP error is that of its HTTP library (requests, httpx or httpx2, by
    # version), which also covers timeouts and broken transfers.
    http_error = HfHubHTTPError.__bases__[0]
    try:
        return Path(huggingface_hub.snapshot_download(hub_id, allow_patterns=patterns))
    except (http_error, OSError, ValueError) as error:
        # No network, no such repository, no permission, full disk. Hub errors have several lines.
        reason = " ".join(str(error).split("\n")[0].split()) or type(error).__name__
        raise SynthfastError(
            f"no folder {hub_id}, and it cannot be downloaded ({reason}); check the name and the network, "
            "or download the model elsewhere and pass its folder"
        ) from None


def _read_weights(folder: Path, allow_pickle: bool) -> dict[str, Tensor]:
    if (folder / WEIGHTS_NAME).is_file():
        return load_tensors(folder / WEIGHTS_NAME)
    if (folder / INDEX_NAME).is_file():
        return _read_shards(folder)
    pickled = folder / PICKLE_NAME
    if not pickled.is_file():
        raise SynthfastError(
            f"{folder} has no {WEIGHTS_NAME}; if the model is published as {PICKLE_NAME} only, convert it to "
            "safetensors or allow pickled weights"
        )
    return load_tensors(pickled, allow_pickle=allow_pickle)


def _read_shards(folder: Path) -> dict[str, Tensor]:
    weight_map = read_json(folder / INDEX_NAME, "index of weights").get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise SynthfastError(f"{folder / INDEX_NAME} has no weight_map; expected weight names and their files")
    weights: dict[str, Tensor] = {}
    for name in sorted(set(weight_map.values())):
        if Path(name).name != name:
            raise SynthfastError(f"{folder / INDEX_NAME} points to {name!r}; expected a file in the same folder")
        weights.update(load_tensors(folder / name))
    return weights


def _current_key(key: str) -> str:
    match = _OLD_ATTENTION_KEY.fullmatch(key)
    return f"{match[1]}{_NEW_ATTENTION_NAMES[match[2]]}.{match[3]}" if match else key
