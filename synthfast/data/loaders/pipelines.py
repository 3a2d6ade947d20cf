"""What every pipeline of DALI needs: the package, decoding as PIL decodes, tensors out of it, errors in words."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from synthfast.data.images import ImageSet
from synthfast.errors import SynthfastError, UsageError

AHEAD = 2  # batches in a pipeline


def import_dali() -> Any:
    """The package ``nvidia.dali``; UsageError where it is not installed."""
    try:
        import nvidia.dali.fn
        import nvidia.dali.types
    except ImportError as error:
        raise UsageError(
            "--loader dali: needs the package nvidia-dali-cuda130 (or -cuda120), which is not installed; "
            "pip install 'synthfast[dali]'"
        ) from error
    return nvidia.dali


def make_pipeline(batch_size: int, threads: int, device: torch.device, **options: Any) -> Any:
    """An empty pipeline, for a GPU where the device is one."""
    device_id = device.index or 0 if device.type == "cuda" else None
    return import_dali().Pipeline(
        batch_size=batch_size, num_threads=threads, device_id=device_id, prefetch_queue_depth=AHEAD, **options
    )


@contextlib.contextmanager
def refusals() -> Iterator[None]:
    """Around a function that makes a pipeline: DALI refuses where, for one, its CUDA is not for the machine's driver."""
    try:
        yield
    except RuntimeError as error:
        raise SynthfastError(
            f"--loader dali: DALI makes no pipeline ({_reason(error)}); take --loader torch"
        ) from error


def decode_files(files: Any, shape: tuple[int, int, int], device: torch.device) -> Any:
    """The node of a pipeline that decodes png and jpg files to images of ``shape`` (H, W, C), as PIL does on a CPU."""
    dali = import_dali()
    return dali.fn.decoders.image(
        files,
        device="mixed" if device.type == "cuda" else "cpu",
        output_type=dali.types.GRAY if shape[2] == 1 else dali.types.RGB,  # ANY_DATA is not safe with grey jpg
        adjust_orientation=False,
        jpeg_fancy_upsampling=True,
    )


def copy_out(found: Any, pixels: Tensor) -> None:
    """From DALI's memory, which it uses again, into a tensor."""
    from nvidia.dali.plugin.pytorch import feed_ndarray

    if pixels.device.type == "cpu":
        feed_ndarray(found, pixels)
        return
    stream = torch.cuda.current_stream(pixels.device)
    feed_ndarray(found, pixels, cuda_stream=stream)
    stream.synchronize()


def explained(error: RuntimeError, asked: Sequence[tuple[ImageSet, np.ndarray]]) -> SynthfastError:
    """What is wrong with an image, among those asked for, that DALI refuses, in the words of the set that it is from."""
    for images, items in asked:
        for item in items:
            try:
                images.read(np.array([item]))
            except SynthfastError as found:
                return found
    names = ", ".join(dict.fromkeys(images.name for images, _ in asked))
    return SynthfastError(f"{names}: DALI cannot read an image that others can ({_reason(error)}); take --loader torch")


def _reason(error: RuntimeError) -> str:
    return " ".join(str(error).rpartition("encountered:")[2].split())[:160]
