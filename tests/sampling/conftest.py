"""A tiny generator with random weights, and runs of the sampler in this process."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from synthfast import diffusion
from synthfast.artifacts import save_checkpoint
from synthfast.config import SampleConfig
from synthfast.distributed import Ranks
from synthfast.errors import SynthfastError
from synthfast.models.unet import UNet2D
from synthfast.models.unet_config import UNet2DConfig
from synthfast.sampling import generate, load_generator

CLASSES = 10
PARAMETERIZATIONS = {"edm": diffusion.EDM(), "vp": diffusion.VP()}


def tiny_config(labels: int | None) -> UNet2DConfig:
    """8x8 grey images, about 20,000 weights; ``labels`` embeddings."""
    return UNet2DConfig(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(8, 16),
        layers_per_block=1,
        attention_head_dim=8,
        norm_num_groups=4,
        num_class_embeds=labels,
    )


def write_checkpoint(
    folder: Path, kind: str = "edm", *, classes: int | None = CLASSES, null_label: bool = True, seed: int = 0
) -> Path:
    """A checkpoint as ``synthfast train generator`` leaves it, with random weights, none of them 0."""
    unet = UNet2D(tiny_config(None if classes is None else classes + 1))
    random = torch.Generator().manual_seed(seed)
    weights = {
        name: torch.randn(value.shape, generator=random) * (0.3 if value.ndim > 1 else 0.1)
        + (1.0 if "norm" in name and name.endswith("weight") else 0.0)
        for name, value in unet.state_dict().items()
    }
    description = {
        "name": f"tiny {kind}",
        "shape": [8, 8, 1],
        "classes": classes,
        "class_names": None,
        "null_label": classes if null_label else None,
        "parameterization": diffusion.to_dict(PARAMETERIZATIONS[kind]),
        "sampler": {"name": "dpmpp-2m", "steps": 4},
        "unet": unet.config.to_dict(),
        "training": {},
    }
    save_checkpoint(folder, "diffusion", description, weights)
    return folder


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``checkpoints(kind, classes=..., null_label=..., seed=...)``: the folder of a tiny generator, made once each."""
    made: dict[object, Path] = {}

    def get(kind: str = "edm", **options: object) -> Path:
        key = (kind, *sorted(options.items()))
        if key not in made:
            made[key] = write_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny", kind, **options)
        return made[key]

    return get


@pytest.fixture(scope="session")
def sample_into(checkpoints: Callable[..., Path]) -> Callable[..., Path]:
    """``sample_into(out, n=..., ...)``: sample on the CPU from the tiny generator, or another; returns the folder."""

    def sample(out: Path, **options: object) -> Path:
        values = {"n": 23, "generator": str(checkpoints()), "device": "cpu", "batch_size": 8, **options}
        with Ranks("cpu") as ranks:
            return generate(SampleConfig(out=str(out), **values), ranks).path

    return sample


@pytest.fixture
def run(tmp_path: Path, sample_into: Callable[..., Path]) -> Callable[..., Path]:
    """``run(n=..., ...)``: :func:`sample_into` a new folder, or ``out``."""
    numbers = itertools.count()

    def sample(out: str | None = None, **options: object) -> Path:
        return sample_into(Path(out) if out is not None else tmp_path / f"samples-{next(numbers)}", **options)

    return sample


@pytest.fixture(scope="session")
def contents() -> Callable[[Path], dict[str, bytes]]:
    """Every file of a folder by name."""
    return lambda folder: {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="session")
def refused() -> Callable[..., str]:
    """``refused(spec, UsageError, steps=3)``: the one-line message of the error that loading this generator raises."""

    def load(spec: object, kind: type[SynthfastError] = SynthfastError, **options: object) -> str:
        with pytest.raises(kind) as caught:
            load_generator(SampleConfig(generator=str(spec), **options), torch.device("cpu"))
        message = str(caught.value)
        assert "\n" not in message
        return message

    return load
