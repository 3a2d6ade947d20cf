"""``python -m bench [options]`` runs every benchmark, each in its own process, and ends with a table of all.

It stops at the first benchmark that fails. ``--ops`` leaves the pipelines out.
"""

from __future__ import annotations

import json
import subprocess
import sys

from bench import harness

OPERATIONS = (
    "philox_normal",
    "solver_step",
    "quantize_uint8",
    "gather_augment",
    "linf_step",
    "l2_step",
    "apgd_step",
    "ball_start",
)
CPU_OPERATIONS = ("winograd_conv3x3",)
CPU_PIPELINES = ("frechet", "prdc", "read", "write", "formats")
# bench.pipeline.autoattack and bench.pipeline.arc take ten minutes or more and are run by themselves.
PIPELINES = ("sample", "pgd_training_step", "bank")


def main() -> None:
    parser = harness.arguments(__doc__.splitlines()[0])
    parser.add_argument("--ops", action="store_true", help="the operations only")
    options = parser.parse_args()
    passed_on = [argument for argument in sys.argv[1:] if argument != "--ops"]
    operations = OPERATIONS + (CPU_OPERATIONS if options.device == "cpu" else ())
    modules = [f"bench.ops.{name}" for name in operations]
    if not options.ops:
        pipelines = PIPELINES + (CPU_PIPELINES if options.device == "cpu" else ())
        modules += [f"bench.pipeline.{name}" for name in pipelines]
    reports = []
    for module in modules:
        status = subprocess.run([sys.executable, "-m", module, *passed_on], check=False).returncode
        if status:
            sys.exit(status)
        name = module.rpartition(".")[2]
        reports.append(json.loads((options.out / f"{name}-{options.device}.json").read_text()))
        print(flush=True)
    print(harness.summary(reports))


main()
