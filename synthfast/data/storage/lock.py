"""A lock on a folder at a URL, as far as storages allow one."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import time
from typing import Any

from synthfast.data.storage.places import Missing, join, remote, remove
from synthfast.errors import SynthfastError

LOCK = ".synthfast-lock.json"


class RemoteLock:
    """Keeps other processes from writing a folder at a URL: an object ``.synthfast-lock.json`` with host, process and time.

    It is removed by ``close``. What a local lock gives and this one can not:

    - A killed process leaves it. A process on the same host takes it over if the one that it names is gone; from another host
      nobody can tell, and the error says how to remove it by hand.
    - Storages without an exclusive "create" (fsspec's ``pipe_file(mode="create")``) leave a moment between looking and writing.
      The object is read again afterwards, so that of two that came at once one gives up, unless the storage shows old content.
    - Nobody who removes the object, or does not look at it, is kept from writing.

    Two writers that get past it harm less than it seems: equal requests write equal bytes, and other requests are refused by the
    manifest.

    Raises:
        SynthfastError: another process holds it, or the storage refuses.
    """

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._owner = {
            **_process(),
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "token": secrets.token_hex(8),
        }
        self._held = False
        if not self._create():
            found = self._read()
            if found is not None and not _is_gone(found):
                raise self._refusal(found)
            remove(folder, LOCK)
            if not self._create():
                raise self._refusal(self._read() or {})
        self._held = True
        found = self._read()
        if found is None or found.get("token") != self._owner["token"]:
            self._held = False
            raise self._refusal(found or {})

    def close(self) -> None:
        """Let go of it, if it is still this one's."""
        if not self._held:
            return
        self._held = False
        with contextlib.suppress(SynthfastError):  # the work is done; the error would hide what ended it
            found = self._read()
            if found is not None and found.get("token") == self._owner["token"]:
                remove(self._folder, LOCK)

    def _create(self) -> bool:
        """Make the object; False if there is one."""
        data = json.dumps(self._owner).encode()
        with remote(self._folder) as (files, root):
            path = f"{root}/{LOCK}"
            try:
                files.pipe_file(path, data, mode="create")
                return True
            except FileExistsError:
                return False
            except (TypeError, ValueError, NotImplementedError):  # an older fsspec, or a storage that can not do this
                files.invalidate_cache(root)
                if files.exists(path):
                    return False
                files.pipe_file(path, data)
                return True

    def _read(self) -> dict[str, Any] | None:
        """Whose lock is there; None if none is, {} if it says nothing."""
        try:
            with remote(self._folder) as (files, root):
                data = files.cat_file(f"{root}/{LOCK}")
        except Missing:
            return None
        try:
            found = json.loads(data)
        except ValueError:
            return {}
        return found if isinstance(found, dict) else {}

    def _refusal(self, found: dict[str, Any]) -> SynthfastError:
        who = f"process {found.get('pid', '?')} on {found.get('host', 'another host')} since {found.get('time', '?')}"
        return SynthfastError(
            f"{self._folder}: another process is writing this folder ({' '.join(who.split())[:200]}); wait for it to end, or if "
            f"it is dead remove {join(self._folder, LOCK)}"
        )


def _process() -> dict[str, Any]:
    """This process as others may look for it: a number means the same on one host and in one namespace alone."""
    try:
        namespace = os.readlink("/proc/self/ns/pid")
    except OSError:
        namespace = ""
    return {"host": socket.gethostname(), "namespace": namespace, "pid": os.getpid()}


def _is_gone(found: dict[str, Any]) -> bool:
    """Whether the process that a lock names was one of this host and has ended."""
    here = _process()
    pid = found.get("pid")
    if any(found.get(key) != here[key] for key in ("host", "namespace")) or type(pid) is not int or pid <= 0:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):
        pass
    return False
