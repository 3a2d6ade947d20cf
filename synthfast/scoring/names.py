"""The metrics of a comparison of generators."""

from __future__ import annotations

TARGET = "robust_accuracy"
# Metric to its title, whether more of it is better, and how its values are written.
METRICS = {
    "arc": ("ARC", False, ".4f"),
    "plain_accuracy": ("plain discriminator", False, ".3f"),
    "fid": ("FID", False, ".3f"),
    "kid": ("KID", False, ".5f"),
    "precision": ("precision", True, ".3f"),
    "recall": ("recall", True, ".3f"),
    "density": ("density", True, ".3f"),
    "coverage": ("coverage", True, ".3f"),
    "accuracy": ("accuracy", True, ".3f"),
    "robust_accuracy": ("robust accuracy", True, ".3f"),
}
SCORES = tuple(name for name in METRICS if name not in ("accuracy", TARGET))
