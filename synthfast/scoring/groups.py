"""Groups of images, for tables: by class, and as a file says."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from synthfast.artifacts import os_error, require_file
from synthfast.data.formats.npy import map_npy, read_header
from synthfast.errors import SynthfastError, UsageError
from synthfast.evaluation.interval import mean_interval, share

MOST_GROUPS = 100_000
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


@dataclass(frozen=True)
class Grouping:
    """Which group each image is in.

    names: of the groups that occur.
    order: int64 [n], the images, group after group.
    ends: int64 [groups], where each group ends in ``order``.
    """

    names: tuple[str, ...]
    order: np.ndarray
    ends: np.ndarray

    @classmethod
    def of(cls, values: np.ndarray, names: tuple[str, ...] | None = None) -> Grouping:
        """From a whole number for each image; ``names`` of the numbers 0, 1, ..., else each is called what it is."""
        found, which, counts = np.unique(values, return_inverse=True, return_counts=True)
        called = tuple(str(value) if names is None else names[value] for value in found)
        return cls(called, np.argsort(which, kind="stable"), np.cumsum(counts))

    def parts(self, values: np.ndarray) -> list[np.ndarray]:
        """The numbers of each group, from those of all images."""
        return np.split(values[self.order], self.ends[:-1])


def read_groups(path: str | Path, count: int) -> Grouping:
    """Groups from a .npy of whole numbers [n], or a .csv with a name for each image, a line each, in their order.

    A first line "group" is a heading. Raises UsageError for anything else, in one line.
    """
    path = Path(path)
    if path.suffix == ".npy":
        grouping = Grouping.of(_read_numbers(path, count))
    elif path.suffix == ".csv":
        names = _read_names(path, count)
        found = sorted(set(names))
        number = {name: k for k, name in enumerate(found)}
        grouping = Grouping.of(np.array([number[name] for name in names]), tuple(found))
    else:
        raise UsageError(f"--groups {path}: expected a .npy of whole numbers or a .csv of names; convert it")
    if len(grouping.names) > MOST_GROUPS:
        raise UsageError(
            f"--groups {path}: expected at most {MOST_GROUPS:,} groups, found {len(grouping.names):,}; merge some"
        )
    return grouping


def _read_numbers(path: Path, count: int) -> np.ndarray:
    try:
        require_file(path)
        with open(path, "rb") as file:
            header = read_header(file, str(path))
    except OSError as error:
        raise os_error(path, error) from error
    if header.dtype.kind not in "iu" or header.shape != (count,) or not header.dtype.isnative:
        raise UsageError(
            f"--groups {path}: expected whole numbers [{count}], one for each image, found {header.dtype} "
            f"{list(header.shape)}; correct it"
        )
    return map_npy(path, header.dtype.str, (count,))


def _read_names(path: Path, count: int) -> list[str]:
    names: list[str] = []
    try:
        require_file(path)
        with open(path, encoding="utf-8", newline="") as file:
            for number, row in enumerate(csv.reader(file), start=1):
                if row in (["group"], []) and not names and number == 1:
                    continue
                if len(row) != 1 or not row[0].strip():
                    raise UsageError(
                        f"--groups {path}: line {number}: expected one name, found {len(row)} cells; leave one column"
                    )
                names.append(row[0].strip())
    except OSError as error:
        raise os_error(path, error) from error
    except (ValueError, csv.Error) as error:
        raise SynthfastError(f"--groups {path}: not a readable csv file in UTF-8 ({error}); convert it") from error
    if len(names) != count:
        raise UsageError(f"--groups {path}: expected {count} names, one for each image, found {len(names)}; correct it")
    return names


Metrics = dict[str, dict[str, Any]]


def summarize(values: Mapping[str, np.ndarray], groupings: Mapping[str, Grouping]) -> tuple[Metrics, dict[str, Any]]:
    """Summaries of what is known of each image, over all images and in each group.

    Args:
        values: by metric, a number for each image, [n]: bool for a share of images, else a mean with quantiles.
        groupings: by kind, such as "class".

    Returns:
        ({metric: {"value", "ci", "count"}}, {kind: {group: {metric: ...}}}); means have "quantiles" besides.
    """
    metrics = {name: _summary(each) for name, each in values.items()}
    groups: dict[str, Any] = {kind: {name: {} for name in grouping.names} for kind, grouping in groupings.items()}
    for kind, grouping in groupings.items():
        for metric, each in values.items():
            for name, part in zip(grouping.names, grouping.parts(each), strict=True):
                groups[kind][name][metric] = _summary(part)
    return metrics, groups


def _summary(values: np.ndarray) -> dict[str, Any]:
    if values.dtype == bool:
        return share(values)
    levels = np.quantile(values, QUANTILES).tolist()
    return {
        **mean_interval(values.astype(np.float64)),
        "quantiles": {f"{level:g}": value for level, value in zip(QUANTILES, levels, strict=True)},
    }
