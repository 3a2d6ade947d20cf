"""``synthfast info``."""

from __future__ import annotations

import click


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print the facts as JSON.")
def info(as_json: bool) -> None:
    """Show versions, device, what was built, the CPU instruction set in use, and whether DALI is there."""
    from synthfast import ops
    from synthfast.artifacts import json_bytes
    from synthfast.environment import dali_version, environment

    facts = environment()
    build = ops.build_facts()
    facts["cpu_capability"] = ops.cpu_capability()
    facts["build"] = build
    facts["cuda_kernels"] = "loaded" if ops.cuda_problem is None else f"not loaded: {ops.cuda_problem}"
    facts["dali"] = dali_version()
    if as_json:
        click.echo(json_bytes(facts).decode(), nl=False)
        return
    gpus = ", ".join(facts["gpus"]) or "none usable"
    rows = [
        ("synthfast", facts["synthfast"]),
        ("python", facts["python"]),
        ("torch", f"{facts['torch']} (CUDA {facts['cuda'] or 'none'})"),
        ("numpy", facts["numpy"]),
        ("platform", facts["platform"]),
        (
            "cpu",
            f"{facts['cpu']}, {facts['cores']} cores, {facts['threads']} threads, kernels for {facts['cpu_capability']}",
        ),
        ("gpu", gpus),
        ("native code", f"built by {build['compiler']} against torch {build['torch']}"),
        ("cuda kernels", f"{build['cuda']}; {facts['cuda_kernels']}"),
        ("dali", facts["dali"] or "not installed (pip install synthfast[dali])"),
    ]
    for name, value in rows:
        click.echo(f"{name:<13} {value}")
