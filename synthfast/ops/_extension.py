"""Loads the native extension. Only modules of ``synthfast.ops`` import this."""

from __future__ import annotations

import torch

from synthfast.errors import SynthfastError

try:
    from synthfast import _C, _host  # noqa: F401  (importing _C registers torch.ops.synthfast.*)
except ImportError as error:
    raise SynthfastError(
        f"the native code of synthfast is not usable ({error}); build it with: pip install --no-build-isolation -e ."
    ) from error

if not hasattr(torch.ops.synthfast, "winograd_conv3x3"):  # the operation that came last
    raise SynthfastError(
        "the native code of synthfast is older than its Python code; build it with: pip install --no-build-isolation -e ."
    )

cuda_problem: str | None = None
"""Why the CUDA kernels are not loaded; None when they are."""

if torch.version.cuda is None:
    cuda_problem = "this torch has no CUDA"
else:
    try:
        from synthfast import _cuda  # noqa: F401
    except ImportError as error:
        cuda_problem = str(error).splitlines()[0]


def build_facts() -> dict[str, str]:
    """Compiler, torch version and CUDA architectures that the native code was built with."""
    return dict(_host.build_facts())


def cpu_capability() -> str:
    """The instruction set that the CPU kernels use here: 'default', 'avx2' or 'avx512'."""
    return _host.cpu_capability()


philox4x32 = _host.philox4x32
