"""Selections: which images of a shard folder to use, and how often, without a copy of any image.

A selection ``chosen.npy`` is an int64 [m] array of the images' numbers in the folder, ascending and without repeats. Beside it
lie ``chosen.json``, the manifest, and, where images are to be drawn more or less often, ``chosen.weights.npy``: float32 [m],
positive, mean 1.

    {"format": 1,
     "source": {"path": "runs/samples", "fingerprint": "...", "count": 100000},
     "count": 20000, "images_per_class": [2000, 2000, ...],
     "indices": {"file": "chosen.npy", "sha256": "..."},
     "weights": null,
     "criteria": {"by": ["discriminator"], "keep": 0.2, ...}}

``images_per_class`` is null for a folder without labels. ``criteria`` is what ``synthfast select`` was asked for and looked at;
nothing here reads it. The source counts by its fingerprint: a folder that was moved is still the same.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from synthfast.artifacts import atomic_write_files, json_bytes, os_error, read_json, sha256_file
from synthfast.data.formats.npy import map_npy, npy_header
from synthfast.data.images import ImageSet
from synthfast.errors import SynthfastError, UsageError

SELECTION_FORMAT = 1
_REMAKE = "make it again with synthfast select"


@dataclass(frozen=True)
class Selection:
    """A selection that was read and checked.

    indices: int64 [m], ascending, without repeats, in [0, images of the folder).
    weights: float32 [m], finite and positive, or None where all count alike.
    sha256: of what is selected: of the indices and, where there are any, the weights.
    """

    path: Path
    indices: np.ndarray
    weights: np.ndarray | None
    sha256: str


def selection_files(path: str | Path) -> tuple[Path, Path, Path]:
    """The files of the selection ``path``: indices, weights, manifest. UsageError unless its name ends in .npy."""
    path = Path(path)
    if path.suffix != ".npy" or path.name.endswith(".weights.npy"):
        raise UsageError(f"{path}: expected a name like chosen.npy for a selection; change it")
    return path, path.with_suffix(".weights.npy"), path.with_suffix(".json")


def check_may_write(path: str | Path) -> None:
    """UsageError where the manifest of the selection ``path`` would overwrite something else."""
    manifest_file = selection_files(path)[2]
    if manifest_file.exists() and "indices" not in read_json(manifest_file, "selection's manifest"):
        raise UsageError(f"{manifest_file}: is no selection's manifest and would be overwritten; choose another --out")


def write_selection(
    path: str | Path, images: ImageSet, indices: np.ndarray, weights: np.ndarray | None, criteria: Mapping[str, Any]
) -> dict[str, Any]:
    """Write a selection and return its manifest.

    Args:
        path: the file of indices; the others lie beside it.
        images: the shard folder selected from.
        indices: int64 [m], ascending, without repeats, at least one.
        weights: float32 [m], positive, or None.
        criteria: JSON values that say how it came about.

    The manifest is put in place last: interrupted before that, the files do not fit each other and are refused.
    """
    file, weights_file, manifest_file = selection_files(path)
    problem = _problem(indices, len(images)) or (None if weights is None else _weights_problem(weights, len(indices)))
    if problem is not None:
        raise ValueError(problem)
    files: dict[Path, bytes] = {file: _npy(indices, "<i8")}
    if weights is not None:
        files[weights_file] = _npy(weights, "<f4")
    digests = [hashlib.sha256(data).hexdigest() for data in files.values()]
    per_class = None
    if images.labels is not None:
        per_class = np.bincount(images.labels[indices], minlength=images.classes or 0).tolist()
    manifest = {
        "format": SELECTION_FORMAT,
        "source": {"path": images.name, "fingerprint": images.fingerprint(), "count": len(images)},
        "count": len(indices),
        "images_per_class": per_class,
        "indices": {"file": file.name, "sha256": digests[0]},
        "weights": None if weights is None else {"file": weights_file.name, "sha256": digests[1]},
        "criteria": dict(criteria),
    }
    atomic_write_files({**files, manifest_file: json_bytes(manifest)})
    if weights is None:
        try:
            weights_file.unlink(missing_ok=True)  # of an earlier selection of this name
        except OSError as error:
            raise os_error(weights_file, error) from error
    return manifest


def read_selection(path: str | Path, images: ImageSet) -> Selection:
    """Read a selection of ``images`` and check all of it.

    Raises:
        UsageError: it was made from another folder, or the name is not that of a selection.
        SynthfastError: a file is missing, damaged or changed, or the numbers are not a selection.
    """
    file, weights_file, manifest_file = selection_files(path)
    manifest = read_json(manifest_file, "selection's manifest")
    count, digests = _parse(manifest, manifest_file)
    source = manifest["source"]
    if source["fingerprint"] != images.fingerprint():
        raise UsageError(
            f"{file}: was selected from {source['path']} ({source['count']} images), which is not what {images.name} holds "
            f"({len(images)} images); select from that folder"
        )
    indices = _read(file, "<i8", count, digests[0])
    problem = _problem(indices, len(images))
    if problem is not None:
        raise SynthfastError(f"{file}: {problem}; {_REMAKE}")
    weights = None
    if digests[1] is not None:
        weights = _read(weights_file, "<f4", count, digests[1])
        problem = _weights_problem(weights, count)
        if problem is not None:
            raise SynthfastError(f"{weights_file}: {problem}; {_REMAKE}")
    return Selection(file, indices, weights, hashlib.sha256(repr(digests).encode()).hexdigest())


def _parse(manifest: Mapping[str, Any], path: Path) -> tuple[int, tuple[str, str | None]]:
    """The number of images, and the SHA-256 of indices and weights (None if there are none)."""
    version = manifest.get("format")
    if type(version) is not int or version < 1:
        raise SynthfastError(f"{path}: 'format' must be {SELECTION_FORMAT}, found {version!r:.80}; {_REMAKE}")
    if version > SELECTION_FORMAT:
        raise SynthfastError(
            f"{path}: format {version} is newer than this synthfast reads ({SELECTION_FORMAT}); upgrade synthfast"
        )
    source, count = manifest.get("source"), manifest.get("count")
    facts = {"path": str, "fingerprint": str, "count": int}
    if not isinstance(source, dict) or any(type(source.get(key)) is not kind for key, kind in facts.items()):
        raise SynthfastError(
            f"{path}: 'source' must have a path, a fingerprint and a count, found {source!r:.80}; {_REMAKE}"
        )
    if type(count) is not int or count < 1:
        raise SynthfastError(f"{path}: 'count' must be an integer of at least 1, found {count!r:.80}; {_REMAKE}")
    digests = []
    for key in ("indices", "weights"):
        entry = manifest.get(key, "nothing")
        digest = entry.get("sha256") if isinstance(entry, dict) else None
        if not (entry is None and key == "weights") and not (
            isinstance(digest, str) and re.fullmatch("[0-9a-f]{64}", digest)
        ):
            raise SynthfastError(f"{path}: '{key}' must name a file and its SHA-256, found {entry!r:.80}; {_REMAKE}")
        digests.append(digest)
    return count, (digests[0], digests[1])


def _read(path: Path, dtype: str, count: int, sha256: str) -> np.ndarray:
    try:
        array = map_npy(path, dtype, (count,))
    except SynthfastError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            raise SynthfastError(f"{path}: missing, though the selection's manifest names it; {_REMAKE}") from error
        raise
    found = sha256_file(path)
    if found != sha256:
        raise SynthfastError(f"{path}: expected SHA-256 {sha256} as in the manifest, found {found}; {_REMAKE}")
    return array


def _problem(indices: np.ndarray, total: int) -> str | None:
    """What is wrong with int64 [m] as a selection from ``total`` images; None if nothing is."""
    if indices.dtype != np.int64 or indices.ndim != 1 or len(indices) == 0:
        return f"expected int64 [m] with m of at least 1, found {indices.dtype} {list(indices.shape)}"
    backwards = np.flatnonzero(indices[1:] <= indices[:-1])
    if len(backwards):
        at = int(backwards[0])
        return f"expected ascending numbers without repeats, found {indices[at]} before {indices[at + 1]}"
    if indices[0] < 0 or indices[-1] >= total:
        return f"expected numbers in [0, {total}), found {indices[0]} to {indices[-1]}"
    return None


def _weights_problem(weights: np.ndarray, count: int) -> str | None:
    if weights.dtype != np.float32 or weights.shape != (count,):
        return f"expected float32 [{count}], found {weights.dtype} {list(weights.shape)}"
    bad = np.flatnonzero(~((weights > 0) & (weights < np.inf)))
    return f"expected finite numbers above 0, found {weights[bad[0]]} for entry {bad[0]}" if len(bad) else None


def _npy(array: np.ndarray, dtype: str) -> bytes:
    return npy_header(dtype, array.shape) + np.ascontiguousarray(array, dtype).tobytes()
