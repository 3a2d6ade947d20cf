"""Scores of single images, in files beside the shards: what ``synthfast score samples`` writes and ``synthfast select`` reads.

The folder ``scores`` of a shard folder holds an npy file a column, with a number for each image in the images' order, and
``scores.json``:

    {"format": 1,
     "source": {"path": "runs/samples", "fingerprint": "...", "count": 100000},
     "scores": {"density": {"facts": {...}, "notes": {...},
                            "files": {"density_distance": {"file": "density_distance.npy", "sha256": "...", "dtype": "<f4",
                                                           "unit": "...", "meaning": "..."}, ...}}, ...}}

``facts`` are what the numbers depend on beside the images: where they are the same, the files are not made again. ``notes`` are
what was found while scoring and is needed to read the numbers, such as thresholds. A score's files are all there or it is not in
``scores.json``, which is written after them.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from synthfast.artifacts import (
    Lock,
    atomic_write_json,
    commit_temporary,
    make_folder,
    open_temporary,
    os_error,
    read_json,
    sha256_file,
    temporary_path,
)
from synthfast.data import ShardSet
from synthfast.data.formats.npy import map_npy, npy_header
from synthfast.distributed import Ranks
from synthfast.errors import SynthfastError, UsageError

SCORES_FORMAT = 1
SCORES_FOLDER = "scores"
SCORES_MANIFEST = "scores.json"
_AGAIN = "run synthfast score samples again"


@dataclass(frozen=True)
class Column:
    """A number for each image: its file is NAME.npy of ``dtype`` ("<f4" or "<i8"), [n]."""

    name: str
    dtype: str
    unit: str
    meaning: str


_COLUMNS = {
    "discriminator": (
        Column(
            "discriminator",
            "<f4",
            "logits",
            "worst margin real minus synthetic in the ball around the image, by a robust discriminator that was not trained on "
            "it; higher looks more real",
        ),
        Column("discriminator_clean", "<f4", "logits", "the margin at the image itself"),
    ),
    "density": (
        Column(
            "density_distance",
            "<f4",
            "distance of features",
            "distance to the k-th nearest real image; lower is denser",
        ),
        Column("density_count", "<i8", "images", "real images whose ball to their k-th real neighbour holds the image"),
    ),
    "confidence": (
        Column("confidence", "<f4", "probability", "of the image's own label, by a classifier"),
        Column("confidence_max", "<f4", "probability", "of the class that the classifier prefers"),
        Column("predicted", "<i8", "class", "that the classifier prefers"),
    ),
    "memorization": (
        Column("nearest_train", "<i8", "index", "of the nearest training image in the training set"),
        Column("nearest_distance", "<f4", "distance of features", "to the nearest training image"),
        Column(
            "nearest_ratio",
            "<f4",
            "ratio",
            "nearest_distance over the nearest training image's distance to its own k-th neighbour in the training set",
        ),
        Column(
            "memorization_p",
            "<f4",
            "probability",
            "that a new real image is as close to a training image, by distance and by ratio; lower is more suspicious",
        ),
    ),
}
SCORES = tuple(_COLUMNS)


def columns(score: str, labelled: bool) -> tuple[Column, ...]:
    """The columns of a score, for images with labels or without."""
    return tuple(column for column in _COLUMNS[score] if labelled or column.name != "confidence")


class ScoreFolder:
    """The scores of a shard folder.

    Args:
        images: the shard folder that is scored.
        path: where the scores lie; the folder ``scores`` within the shard folder if None.
    """

    def __init__(self, images: ShardSet, path: str | Path | None = None) -> None:
        self.images = images
        self.is_default = path is None
        if path is None and isinstance(images.path, str):
            raise UsageError(
                f"{images.name}: scores are not kept at URLs; give --scores-folder, a folder for them here"
            )
        self.path = images.path / SCORES_FOLDER if path is None else Path(path)
        if path is None and self.path.is_symlink():
            raise SynthfastError(f"{self.path}: a link that leads elsewhere; remove it, or give --scores-folder")
        self.source = {"path": images.name, "fingerprint": images.fingerprint(), "count": len(images)}

    def _load(self) -> dict[str, Any]:
        """``scores.json`` after its checks; without scores where there is none."""
        file = self.path / SCORES_MANIFEST
        if not file.exists():
            return {"format": SCORES_FORMAT, "source": self.source, "scores": {}}
        value = read_json(file, "scores' manifest")
        version, source, scores = value.get("format"), value.get("source"), value.get("scores")
        if type(version) is int and version > SCORES_FORMAT:
            raise SynthfastError(
                f"{file}: format {version} is newer than this synthfast reads ({SCORES_FORMAT}); upgrade synthfast"
            )
        valid = type(version) is int and version >= 1 and isinstance(source, dict) and isinstance(scores, dict)
        if not valid or not all(isinstance(source.get(key), str) for key in ("path", "fingerprint")):
            raise SynthfastError(f"{file}: not a manifest of scores; delete it and {_AGAIN}")
        return value

    def _is_of_images(self, manifest: Mapping[str, Any]) -> bool:
        return manifest["source"]["fingerprint"] == self.source["fingerprint"]

    def prepare(self) -> None:
        """Make the folder, or refuse one that was given by name and holds the scores of other images."""
        manifest = self._load()
        if not self.is_default and not self._is_of_images(manifest):
            raise UsageError(
                f"{self.path}: holds the scores of {manifest['source']['path']}, which is not what {self.images.name} holds; "
                "choose another --scores-folder"
            )
        make_folder(self.path)

    def prepare_alone(self) -> Lock:
        """:meth:`prepare`, and the folder's lock, to be closed when all is written."""
        self.prepare()
        return Lock(self.path, "choose another --scores-folder")

    def made(self, score: str, facts: Mapping[str, Any]) -> bool:
        """Whether a score of these images with these facts is there, with every file in its full length."""
        manifest = self._load()
        entry = manifest["scores"].get(score)
        if not self._is_of_images(manifest) or not isinstance(entry, dict) or entry.get("facts") != _json(facts):
            return False
        try:
            for column in columns(score, self.images.labels is not None):
                self._map(column)
                _sha256(entry, column, self.path)
        except SynthfastError:
            return False
        return True

    def notes(self, score: str) -> dict[str, Any]:
        """The notes of a score that is there."""
        notes = self._entry(score).get("notes")
        return notes if isinstance(notes, dict) else {}

    def null_share(self) -> float:
        """The p-value up to which an image counts as a copy of a training image."""
        share = self.notes("memorization").get("null_share")
        if not isinstance(share, float):
            file = self.path / SCORES_MANIFEST
            raise SynthfastError(f"{file}: memorization has no threshold; {self._command('memorization')}")
        return share

    def read(self, score: str, name: str, *, check: bool = True) -> np.ndarray:
        """A column, memory-mapped: float32 or int64 [n]. With ``check`` its content must have the recorded SHA-256.

        Raises SynthfastError, in one line that names the command that helps, where the score is missing, is of other images (the
        folder was changed since), or is damaged.
        """
        entry = self._entry(score)
        column = next(column for column in columns(score, self.images.labels is not None) if column.name == name)
        values, file = self._map(column), self.path / f"{name}.npy"
        if check and (found := sha256_file(file)) != (expected := _sha256(entry, column, self.path)):
            raise SynthfastError(
                f"{file}: expected SHA-256 {expected} as in {SCORES_MANIFEST}, found {found}; delete it and {_AGAIN}"
            )
        return values

    def sha256(self, score: str) -> dict[str, str]:
        """Column to SHA-256, as recorded."""
        entry = self._entry(score)
        wanted = columns(score, self.images.labels is not None)
        return {column.name: _sha256(entry, column, self.path) for column in wanted}

    def writer(self, score: str, facts: Mapping[str, Any], ranks: Ranks) -> ScoreWriter:
        return ScoreWriter(self, score, facts, ranks)

    def _command(self, score: str) -> str:
        where = "" if self.is_default else f" --scores-folder {self.path}"
        return f"run synthfast score samples --synthetic {self.images.name}{where} --scores {score}"

    def _entry(self, score: str) -> dict[str, Any]:
        manifest = self._load()
        entry = manifest["scores"].get(score)
        if not isinstance(entry, dict):
            raise SynthfastError(f"{self.path}: expected {score} scores, found none; {self._command(score)}")
        if not self._is_of_images(manifest):
            raise SynthfastError(
                f"{self.path}: the scores are of other images than {self.images.name} holds now; {self._command(score)}"
            )
        return entry

    def _map(self, column: Column) -> np.ndarray:
        return map_npy(self.path / f"{column.name}.npy", column.dtype, (len(self.images),))

    def add(self, score: str, facts: Mapping[str, Any], notes: Mapping[str, Any]) -> None:
        """Record a score whose files are in place."""
        manifest = self._load()
        if not self._is_of_images(manifest):  # the shards were made again: the scores of the old ones are worth nothing
            manifest = {"scores": {}}
        files = {
            column.name: {
                "file": f"{column.name}.npy",
                "sha256": sha256_file(self.path / f"{column.name}.npy"),
                "dtype": column.dtype,
                "unit": column.unit,
                "meaning": column.meaning,
            }
            for column in columns(score, self.images.labels is not None)
        }
        scores = {**manifest["scores"], score: {"facts": dict(facts), "notes": dict(notes), "files": files}}
        ordered = {name: scores[name] for name in SCORES if name in scores}
        manifest = {"format": SCORES_FORMAT, "source": self.source, "scores": ordered}
        atomic_write_json(self.path / SCORES_MANIFEST, manifest)

    def forget(self, score: str) -> None:
        """Take a score out of the manifest, before its files are replaced."""
        manifest = self._load()
        if manifest["scores"].pop(score, None) is not None:
            atomic_write_json(self.path / SCORES_MANIFEST, manifest)


class ScoreWriter:
    """Writes the columns of one score in pieces, each by whichever rank has it; a context manager that leaves no part behind.

    The files have their full length from the start and stand under temporary names until ``commit``.
    """

    def __init__(self, folder: ScoreFolder, score: str, facts: Mapping[str, Any], ranks: Ranks) -> None:
        self._folder, self._score, self._facts, self._ranks = folder, score, facts, ranks
        self._count = len(folder.images)
        self._columns = {column.name: column for column in columns(score, folder.images.labels is not None)}
        self._paths = {name: folder.path / f"{name}.npy" for name in self._columns}
        self._headers = {name: npy_header(column.dtype, (self._count,)) for name, column in self._columns.items()}
        self._files: dict[str, int] = {}
        try:
            if ranks.is_first:
                for name, path in self._paths.items():
                    self._create(name, path)
            ranks.barrier()
            for name, path in self._paths.items():
                self._files[name] = _open(path)
        except SynthfastError:
            self._discard()
            raise

    def _create(self, name: str, path: Path) -> None:
        size = len(self._headers[name]) + self._count * np.dtype(self._columns[name].dtype).itemsize
        try:
            with open_temporary(path) as file:
                file.write(self._headers[name])
                file.truncate(size)
        except OSError as error:
            raise os_error(path, error) from error

    def write(self, first: int, values: Mapping[str, np.ndarray]) -> None:
        """Set entries ``first`` to ``first + k - 1`` of every column, from arrays [k] of finite numbers."""
        assert values.keys() == self._columns.keys()
        for name, array in values.items():
            dtype = np.dtype(self._columns[name].dtype)
            data = np.ascontiguousarray(array, dtype)
            if not np.isfinite(data).all():
                at = first + int(np.flatnonzero(~np.isfinite(data))[0])
                raise SynthfastError(
                    f"{self._folder.images.name}: {name} of image {at} is not a finite number; check the network and the images"
                )
            position = len(self._headers[name]) + first * dtype.itemsize
            view = memoryview(data).cast("B")
            try:
                while view:
                    done = os.pwrite(self._files[name], view, position)
                    view, position = view[done:], position + done
            except OSError as error:
                raise os_error(self._paths[name], error, "free space and run the same command again") from error

    def commit(self, notes: Mapping[str, Any]) -> None:
        """Make the columns durable and visible; every rank calls this when its last piece is written."""
        for name, file in self._files.items():
            try:
                os.fsync(file)
            except OSError as error:
                raise os_error(self._paths[name], error) from error
        self._close()
        self._ranks.barrier()
        if self._ranks.is_first:
            self._folder.forget(self._score)
            for path in self._paths.values():
                try:
                    commit_temporary(path)
                except OSError as error:
                    raise os_error(path, error) from error
            self._folder.add(self._score, _json(self._facts), _json(notes))
        self._ranks.barrier()

    def _close(self) -> None:
        for file in self._files.values():
            with contextlib.suppress(OSError):
                os.close(file)
        self._files = {}

    def _discard(self) -> None:
        self._close()
        if self._ranks.is_first:
            for path in self._paths.values():
                with contextlib.suppress(OSError):
                    temporary_path(path).unlink(missing_ok=True)

    def __enter__(self) -> ScoreWriter:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._discard()


def _open(path: Path) -> int:
    try:
        return os.open(temporary_path(path), os.O_RDWR)
    except OSError as error:
        raise os_error(path, error) from error


def _sha256(entry: Mapping[str, Any], column: Column, path: Path) -> str:
    files = entry.get("files")
    file = files.get(column.name) if isinstance(files, dict) else None
    digest = file.get("sha256") if isinstance(file, dict) else None
    if not isinstance(digest, str) or not re.fullmatch("[0-9a-f]{64}", digest):
        raise SynthfastError(f"{path / SCORES_MANIFEST}: {column.name} has no SHA-256; delete the file and {_AGAIN}")
    return digest


def _json(value: Mapping[str, Any]) -> dict[str, Any]:
    """Through JSON and back, so that a tuple equals the list that was read."""
    return json.loads(json.dumps(dict(value), allow_nan=False))
