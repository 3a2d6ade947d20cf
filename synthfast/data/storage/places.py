"""Folders on this machine and at URLs (``memory://x``, ``s3://bucket/x``) through one set of functions.

A folder is a Path, or for a URL its text: :func:`place` tells which, the functions below take both. URLs are fsspec's: whatever
protocol has its package installed (s3fs for s3://, gcsfs for gs://, ...), with the credentials that this package finds.
"""

from __future__ import annotations

import contextlib
import errno
import importlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from synthfast.artifacts import atomic_write_bytes, json_bytes, make_folder, os_error, read_json
from synthfast.errors import SynthfastError, UsageError

Folder = Path | str

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*(://|::)")
_LOCAL = ("file://", "local://")
# What is said where fsspec does not know which package a protocol needs.
_KNOWN = "expected a local path, or one such as s3://bucket/folder, gs://bucket/folder or memory://folder"


def is_url(path: str | os.PathLike) -> bool:
    """Whether a path is a URL; ``file://`` ones are local paths written in another way."""
    return isinstance(path, str) and _URL.match(path) is not None and not path.startswith(_LOCAL)


def place(path: str | os.PathLike) -> Folder:
    """A folder as the functions here take it: a Path, or a URL without a slash at its end."""
    if is_url(path):
        stripped = str(path).rstrip("/")
        return stripped if not stripped.endswith(":") else str(path)
    text = os.fspath(path)
    for start in _LOCAL:
        text = text.removeprefix(start)
    return Path(text)


def join(folder: Folder, name: str) -> Folder:
    """The path of ``name`` in ``folder``."""
    return folder / name if isinstance(folder, Path) else f"{folder.rstrip('/')}/{name}"


def make(folder: Folder) -> None:
    """Make a folder and its parents. Where folders are only parts of names there is nothing to make."""
    if isinstance(folder, Path):
        make_folder(folder)
        return
    with remote(folder) as (files, root):
        files.makedirs(root, exist_ok=True)


def sizes(folder: Folder) -> dict[str, int]:
    """The files directly in ``folder``, with their bytes; none if it is not there. A local folder's entries of any kind."""
    if isinstance(folder, Path):
        try:
            with os.scandir(folder) as entries:
                return dict(_sizes(entries))
        except FileNotFoundError:
            return {}
        except OSError as error:
            raise os_error(folder, error) from error
    try:
        with remote(folder) as (files, root):
            files.invalidate_cache(root)
            entries = files.ls(root, detail=True)
    except Missing:
        return {}
    return {
        entry["name"].rstrip("/").rpartition("/")[2]: int(entry.get("size") or 0)
        for entry in entries
        if entry.get("type") != "directory"
    }


def _sizes(entries: Iterable[os.DirEntry[str]]) -> Iterator[tuple[str, int]]:
    for entry in entries:
        with contextlib.suppress(FileNotFoundError):  # renamed or removed since, as temporary files are
            yield entry.name, entry.stat(follow_symlinks=False).st_size


def read_object(folder: Folder, name: str, what: str) -> dict[str, Any]:
    """A JSON object in ``folder``; one-line errors as :func:`synthfast.artifacts.read_json` has them."""
    if isinstance(folder, Path):
        return read_json(folder / name, what)
    where = join(folder, name)
    try:
        with remote(folder) as (files, root):
            data = files.cat_file(f"{root}/{name}")
    except Missing as error:
        raise SynthfastError(f"{where}: no {what} here; check the path") from error
    return parse_object(data, str(where), what)


def read_objects(folder: Folder, names: Iterable[str], what: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Those of the named JSON objects that can be read; many at once where the storage can."""
    if isinstance(folder, Path):
        for name in names:
            with contextlib.suppress(SynthfastError):
                yield name, read_json(folder / name, what)
        return
    names = list(names)
    with remote(folder) as (files, root):
        found = files.cat([f"{root}/{name}" for name in names], on_error="omit") if names else {}
        by_name = {path.rpartition("/")[2]: data for path, data in found.items()}
    for name in names:
        with contextlib.suppress(SynthfastError, KeyError):
            yield name, parse_object(by_name[name], f"{folder}/{name}", what)


def parse_object(data: bytes, where: str, what: str) -> dict[str, Any]:
    """A JSON object from bytes; ``where`` starts the one-line errors."""
    try:
        value = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise SynthfastError(f"{where}: the {what} is not valid JSON ({error}); restore or remake it") from error
    if not isinstance(value, dict):
        raise SynthfastError(f"{where}: the {what} must be a JSON object, found {type(value).__name__}")
    return value


def write_bytes(folder: Folder, name: str, data: bytes) -> None:
    """Write a file into ``folder``, atomically where the storage can (a local disk and object stores can)."""
    if isinstance(folder, Path):
        atomic_write_bytes(folder / name, data)
        return
    with remote(folder) as (files, root):
        files.pipe_file(f"{root}/{name}", data)


def write_object(folder: Folder, name: str, value: Mapping[str, Any]) -> None:
    """Write a JSON object into ``folder``; see :func:`write_bytes`."""
    write_bytes(folder, name, json_bytes(value))


def upload(file: Path, folder: str) -> None:
    """Copy a local file into the folder at a URL, under its own name."""
    with remote(folder) as (files, root):
        files.put_file(str(file), f"{root}/{file.name}")


def remove(folder: Folder, name: str) -> None:
    """Remove a file from ``folder``, if it is there."""
    if isinstance(folder, Path):
        (folder / name).unlink(missing_ok=True)
        return
    with contextlib.suppress(Missing), remote(folder) as (files, root):
        files.rm_file(f"{root}/{name}")


class Missing(SynthfastError):
    """Nothing is at the URL."""


@contextlib.contextmanager
def remote(url: str) -> Iterator[tuple[Any, str]]:
    """The fsspec file system of a URL and the path in it; within, whatever the storage raises becomes one line.

    Raises:
        UsageError: a protocol that nobody knows.
        Missing: nothing is there, the bucket included.
        SynthfastError: no permission, no connection, or a package that is not installed.
    """
    try:
        fsspec = importlib.import_module("fsspec")
    except ImportError as error:
        raise SynthfastError(f"{url}: needs the package fsspec; install it with pip install fsspec") from error
    protocol, _, rest = url.partition("://")
    if "::" in url or not rest:
        raise UsageError(f"{url}: not a URL of one protocol and a path; {_KNOWN}")
    try:
        files, root = fsspec.core.url_to_fs(url)
    except ImportError as error:
        raise SynthfastError(f"{url}: {protocol}:// needs a package that is not installed ({_line(error)})") from error
    except ValueError as error:
        if "not known" in str(error):
            raise UsageError(f"{url}: the protocol '{protocol}' is not known; {_KNOWN}") from error
        raise UsageError(f"{url}: not a URL of {protocol} ({_line(error)}); correct it") from error
    except Exception as error:
        raise _explained(url, error) from error
    try:
        yield files, root.rstrip("/")
    except (SynthfastError, MemoryError):
        raise
    except Exception as error:  # each storage has exceptions of its own
        raise _explained(url, error) from error


def _explained(url: str, error: Exception) -> SynthfastError:
    if isinstance(error, FileNotFoundError):
        return Missing(f"{url}: no such file, folder or bucket; check the URL")
    if isinstance(error, PermissionError):
        return SynthfastError(f"{url}: permission denied ({_line(error)}); check the credentials")
    if isinstance(error, OSError) and error.errno in errno.errorcode and error.strerror:
        return os_error(url, error)
    if isinstance(error, NotImplementedError):
        return SynthfastError(f"{url}: this storage can not be written to; take another")
    return SynthfastError(f"{url}: {_line(error)}; check the URL, the connection and the credentials")


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
