"""What a result was made with: versions, hardware, threads. Part of every result file and of ``synthfast info``."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from typing import Any

import torch

from synthfast import __version__


def cpu_name() -> str:
    """The processor's name as the system tells it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass  # not Linux
    return platform.processor() or platform.machine()


def cpu_count() -> int:
    """Processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def package_version(name: str) -> str | None:
    """Version of an installed distribution, or None."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def dali_version() -> str | None:
    """Version of NVIDIA DALI, whichever CUDA release it was built for, or None where it is not installed."""
    found = (package_version(f"nvidia-dali-cuda{release}") for release in (130, 120, 110))
    return next((version for version in found if version), None)


def environment() -> dict[str, Any]:
    """Facts as JSON values: python, torch, numpy, synthfast, platform, cpu, cores, threads, gpus, cuda."""
    gpus = (
        [torch.cuda.get_device_name(k) for k in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    )
    return {
        "synthfast": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": package_version("numpy"),
        "platform": platform.platform(),
        "cpu": cpu_name(),
        "cores": cpu_count(),
        "threads": torch.get_num_threads(),
        "cuda": torch.version.cuda,
        "gpus": gpus,
    }
