"""Figures of results."""

from synthfast.report.figures import inflection_figure

__all__ = ["inflection_figure"]
