"""Builds the native code: CPU kernels always, CUDA kernels when a CUDA build of torch and an nvcc are found.

Environment: SYNTHFAST_CUDA=0 leaves CUDA out, SYNTHFAST_CUDA=1 insists on it; TORCH_CUDA_ARCH_LIST (default "8.0;9.0+PTX")
names the architectures. What was built, and why CUDA was not, is stored in the extension: `synthfast info` shows it.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from setuptools import Extension, setup

DEFAULT_ARCHITECTURES = "8.0;9.0+PTX"
STABLE_ABI = ["-DTORCH_TARGET_VERSION=0x020b000000000000"]  # torch 2.11
# -fno-wrapv: Python's own build flags bring -fwrapv, under which the loops do not vectorise (4.5 times slower normals).
# No contraction into fused multiply-adds, so that every CPU variant and the GPU give the same bits; no errno and no
# floating point traps, without which square roots and selects do not vectorise. No fast-math: bounds must hold exactly.
CXX = [
    "-std=c++20",
    "-O3",
    "-fno-wrapv",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=off",
    "-fvisibility=hidden",
    "-Wno-maybe-uninitialized",
]
NVCC = ["-std=c++20", "-O3", "-fmad=false", "-DUSE_CUDA", "--expt-relaxed-constexpr", "-Xptxas=-v"]


def toolkit_folder() -> Path | None:
    """The CUDA toolkit. An nvcc on PATH may be a wrapper, so it is asked for its own folder."""
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(variable):
            return Path(os.environ[variable])
    nvcc = shutil.which("nvcc") or ("/usr/local/cuda/bin/nvcc" if os.path.exists("/usr/local/cuda/bin/nvcc") else None)
    if nvcc is None:
        return None
    trial = subprocess.run([nvcc, "--dryrun", "x.cu"], capture_output=True, text=True, check=False)
    top = re.search(r"^#\$ TOP=(.+)$", trial.stderr, re.MULTILINE)
    return Path(top.group(1)).resolve() if top else Path(nvcc).resolve().parent.parent


def cuda_obstacle(toolkit: Path | None) -> str | None:
    """Why the CUDA kernels cannot be built; None when they can."""
    if os.environ.get("SYNTHFAST_CUDA") == "0":
        return "not built: SYNTHFAST_CUDA=0"
    if torch.version.cuda is None:
        return "not built: this torch has no CUDA"
    if toolkit is None or not (toolkit / "bin" / "nvcc").exists():
        return "not built: no nvcc found (set CUDA_HOME)"
    version = subprocess.run(
        [toolkit / "bin" / "nvcc", "--version"], capture_output=True, text=True, check=False
    ).stdout
    found = re.search(r"release (\d+)\.(\d+)", version)
    if found is None or found.group(1) != torch.version.cuda.split(".")[0]:
        release = found.group(0) if found else "unknown"
        return f"not built: nvcc is {release}, torch was built with CUDA {torch.version.cuda}; the major versions must agree"
    return None


def main() -> None:
    toolkit = toolkit_folder()
    obstacle = cuda_obstacle(toolkit)
    if obstacle is not None and os.environ.get("SYNTHFAST_CUDA") == "1":
        sys.exit(f"synthfast: SYNTHFAST_CUDA=1 asks for the CUDA kernels, but they were {obstacle}")
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", DEFAULT_ARCHITECTURES)
    if toolkit is not None:
        os.environ["CUDA_HOME"] = str(toolkit)
    # Read CUDA_HOME at import, so these come after it is set.
    import pybind11
    from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension

    cuda_fact = obstacle or "built for " + os.environ["TORCH_CUDA_ARCH_LIST"]
    print(f"synthfast: CPU kernels: built; CUDA kernels: {cuda_fact}", file=sys.stderr)

    cpu_sources = sorted(str(path) for path in Path("csrc").rglob("*.cpp") if path.name != "host.cpp")
    headers = sorted(str(path) for path in Path("csrc").rglob("*.h")) + sorted(
        str(p) for p in Path("csrc").rglob("*.cuh")
    )
    extensions = [
        CppExtension(
            "synthfast._C",
            cpu_sources,
            depends=headers,
            extra_compile_args={"cxx": CXX + STABLE_ABI},
            py_limited_api=True,
        ),
        Extension(
            "synthfast._host",
            ["csrc/host.cpp", "csrc/common/cpu_capability.cpp"],
            depends=headers,
            include_dirs=[pybind11.get_include()],
            language="c++",
            extra_compile_args={
                "cxx": [*CXX, f'-DSF_BUILD_CUDA="{cuda_fact}"', f'-DSF_BUILD_TORCH="{torch.__version__}"']
            },
        ),
    ]
    if obstacle is None:
        extensions.append(
            CUDAExtension(
                "synthfast._cuda",
                sorted(str(path) for path in Path("csrc").rglob("*.cu")),
                depends=headers,
                extra_compile_args={"cxx": CXX + STABLE_ABI, "nvcc": NVCC + STABLE_ABI},
                py_limited_api=True,
            )
        )
    setup(ext_modules=extensions, cmdclass={"build_ext": BuildExtension.with_options(use_ninja=True)})


main()
