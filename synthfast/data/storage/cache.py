"""Files of shard folders at URLs, fetched when they are first needed and kept on the local disk.

A file lies at ``<cache>/shards/<its SHA-256>/<its name>``, where ``<cache>`` is $SYNTHFAST_CACHE or ``~/.cache/synthfast``: two
URLs with the same shard share it, and a shard that is made anew has another place. It is compared with the size and SHA-256 of
the manifest while it arrives, and gets its name only then, so several processes may fetch it at once. With
$SYNTHFAST_CACHE_LIMIT (bytes, or such as 200GB) files that were not used for longest are removed after a fetch that passes it,
but none that this process has asked for.

What all files take is counted in ``<cache>/shards/.bytes``, to which every process adds what it fetches; they are listed only
when that passes the limit, and then so many are removed that it takes a sixteenth of the limit to pass it again. A count that is
wrong, because somebody removed files or a process was killed, is right again after the next listing.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import secrets
import time
from pathlib import Path
from typing import Any, Protocol

from synthfast.artifacts import TEMPORARY_PREFIX, make_folder, os_error
from synthfast.data.storage.places import Missing, join, remote
from synthfast.errors import SynthfastError, UsageError

_CHUNK = 1 << 20
_STALE = 24 * 3600  # seconds after which a file that a killed process was fetching is removed
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_COUNT = ".bytes"
_SLACK = 1 / 16  # of the limit, between two listings
_HINT = "free some space, or set SYNTHFAST_CACHE to a folder elsewhere"

_asked_for: set[Path] = set()
# By cache, what it held when no more could be removed, because this process uses the rest.
_in_use: dict[Path, float] = {}


class Wanted(Protocol):
    """What a manifest says of a file."""

    file: str
    sha256: str
    bytes: int


def fetch(folder: str, wanted: Wanted) -> Path:
    """The local copy of a file of the folder at a URL.

    Raises SynthfastError if it is missing, has another size or SHA-256 than wanted, or the disk is full.
    """
    root = cache_root()
    path = root / wanted.sha256 / wanted.file
    _asked_for.add(path)
    if _has(path, wanted.bytes):
        with contextlib.suppress(OSError):
            os.utime(path)  # used now, for the limit
        return path
    make_folder(path.parent, _HINT)
    _remove_stale(path.parent)
    temporary = path.parent / f"{TEMPORARY_PREFIX}{os.getpid()}-{secrets.token_hex(4)}"
    try:
        try:
            _download(folder, wanted, temporary)
        except FileNotFoundError:  # another process that keeps the limit removed the folder while it was empty
            make_folder(path.parent, _HINT)
            _download(folder, wanted, temporary)
        os.replace(temporary, path)
    except OSError as error:
        raise os_error(path, error, _HINT) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
    _count(root, wanted.bytes)
    return path


def copy(folder: str, name: str, target: Path) -> None:
    """A copy of a file of the folder at a URL, whatever it holds; storage.Missing if it is not there."""
    with remote(folder) as (files, root):
        files.get_file(f"{root}/{name}", str(target))


def cache_root() -> Path:
    """Where fetched files lie."""
    given = os.environ.get("SYNTHFAST_CACHE")
    return (Path(given) if given else Path.home() / ".cache" / "synthfast") / "shards"


def _has(path: Path, size: int) -> bool:
    try:
        return path.stat().st_size == size
    except OSError:
        return False


def _download(folder: str, wanted: Wanted, target: Path) -> None:
    where = join(folder, wanted.file)
    digest, size = hashlib.sha256(), 0
    try:
        with open(target, "xb") as local:
            for chunk in _chunks(folder, wanted.file):
                size += len(chunk)
                if size > wanted.bytes:
                    break
                digest.update(chunk)
                local.write(chunk)
            local.flush()
            os.fsync(local.fileno())
    except Missing as error:
        raise SynthfastError(f"{where}: missing, though the manifest names it; make the folder again") from error
    if size != wanted.bytes:
        found = f"more than {wanted.bytes}" if size > wanted.bytes else size
        raise SynthfastError(f"{where}: expected {wanted.bytes} bytes, found {found}; make the folder again")
    if digest.hexdigest() != wanted.sha256:
        raise SynthfastError(
            f"{where}: its SHA-256 is {digest.hexdigest()}, the manifest says {wanted.sha256}; make the folder again"
        )


def _chunks(folder: str, name: str) -> Any:
    """The content of a file at a URL; what the local disk raises while it is used is none of the storage's."""
    with remote(folder) as (files, root):
        opened = files.open(f"{root}/{name}", "rb")
    with contextlib.closing(opened):
        while True:
            with remote(folder):
                chunk = opened.read(_CHUNK)
            if not chunk:
                return
            yield chunk


def _remove_stale(folder: Path) -> None:
    with contextlib.suppress(OSError):
        for leftover in folder.glob(f"{TEMPORARY_PREFIX}*"):
            if leftover.stat().st_mtime < time.time() - _STALE:
                leftover.unlink()


def _count(root: Path, added: int) -> None:
    """Add what was fetched to the count of all processes, and keep the limit. A count that cannot be kept is no error; one of a
    file that another process has listed already is too high until the next listing."""
    limit = _limit()
    if limit is None and not (root / _COUNT).exists():
        return
    with contextlib.suppress(OSError), open(root / _COUNT, "a+b") as file:
        with contextlib.suppress(OSError):  # without locks on files a count may be lost, until the next listing
            fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        text = file.read(32)
        total = int(text) + added if text.isdigit() else None
        if limit is not None and (total is None or total > max(limit, _in_use.get(root, 0) + _SLACK * limit)):
            total = _trim(root, limit)
            if total > limit:
                _in_use[root] = total
        file.truncate(0)
        file.write(b"" if total is None else b"%d" % total)
        file.flush()
        with contextlib.suppress(OSError):  # now: a process that was forked meanwhile has the descriptor, too
            fcntl.flock(file, fcntl.LOCK_UN)


def _trim(root: Path, limit: float) -> int:
    """List all files and, if they take more than the limit, remove what was not used for longest, as far as what is in use
    allows; what is left in bytes."""
    found = []
    for path in root.glob("*/*"):
        with contextlib.suppress(OSError):  # whoever cleans up removes files, too
            status = path.stat()
            found.append((status.st_mtime, status.st_size, path))
    total = sum(size for _, size, _ in found)
    if total <= limit:
        return total
    for _, size, path in sorted(found):
        if total <= (1 - _SLACK) * limit:
            break
        if path in _asked_for or path.name.startswith(TEMPORARY_PREFIX):
            continue
        with contextlib.suppress(OSError):
            path.unlink()
            total -= size
            path.parent.rmdir()
    return total


def _limit() -> float | None:
    text = os.environ.get("SYNTHFAST_CACHE_LIMIT", "").strip()
    if not text:
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)B?", text, re.IGNORECASE)
    if match is None:
        raise UsageError(f"SYNTHFAST_CACHE_LIMIT={text}: expected bytes, or a size such as 200GB; correct it")
    return float(match[1]) * _UNITS[match[2].upper()]
