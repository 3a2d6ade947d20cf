"""The result file of every scoring command."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from synthfast.artifacts import sha256_file
from synthfast.data import ImageSet
from synthfast.environment import environment

RESULT_FORMAT = 1


def result_json(
    command: str,
    config: Mapping[str, Any],
    inputs: Mapping[str, ImageSet | Path],
    scores: Mapping[str, Any],
    seconds: float,
) -> dict[str, Any]:
    """A result as JSON values: format, command, config, environment, inputs, then ``scores`` and seconds.

    Args:
        command: such as "score accuracy".
        config: the options that decided it.
        inputs: sets of images and files by role; recorded as name or path, SHA-256 and count.
        scores: ``metrics`` and, where there are any, ``groups`` and ``curves``.
        seconds: how long it took.
    """
    return {
        "format": RESULT_FORMAT,
        "command": command,
        "config": dict(config),
        "environment": environment(),
        "inputs": {role: _input(value) for role, value in inputs.items()},
        **scores,
        "seconds": round(seconds, 3),
    }


def _input(value: ImageSet | Path) -> dict[str, Any]:
    if isinstance(value, ImageSet):
        return {"path": value.name, "sha256": value.fingerprint(), "count": len(value)}
    return {"path": str(value), "sha256": sha256_file(value), "count": None}
