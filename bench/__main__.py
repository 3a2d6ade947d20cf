"""``python -m bench [options]`` runs every benchmark, each in its own process, and stops at the first that fails."""

from __future__ import annotations

import subprocess
import sys

BENCHMARKS = ("bench.ops.philox_normal", "bench.ops.solver_step", "bench.ops.quantize_uint8", "bench.pipeline.sample")

for module in BENCHMARKS:
    status = subprocess.run([sys.executable, "-m", module, *sys.argv[1:]], check=False).returncode
    print(flush=True)
    if status:
        sys.exit(status)
