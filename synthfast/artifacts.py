"""Files that a stage leaves behind: atomic writes, hashes, JSON, safetensors weights.

A file is written under a temporary name in its own folder, flushed to disk and renamed, so a reader sees the old
content or the new one and never a part. Weights are safetensors; a pickle is refused unless the caller asks for it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import pickle
import stat
import warnings
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from synthfast.errors import SynthfastError, UsageError

TEMPORARY_PREFIX = ".tmp-"


def os_error(path: str | os.PathLike, error: OSError, hint: str = "") -> SynthfastError:
    """One line for a file system error on ``path``: what happened, where, and ``hint`` for what to do, where there is none what
    usually helps."""
    reasons = {
        errno.ENOSPC: "the disk is full",
        errno.EDQUOT: "the disk quota is used up",
        errno.EFBIG: "the file size limit is reached",
        errno.EACCES: "permission denied",
        errno.EPERM: "permission denied",
        errno.EROFS: "the file system is read-only",
        errno.EEXIST: "a file is in the way",
        errno.ENOENT: "no such file or folder",
        errno.ENOTDIR: "a part of the path is not a folder",
        errno.EISDIR: "a file was expected, a folder was found",
        errno.ENAMETOOLONG: "the name is too long",
        errno.EMFILE: "this process has too many files open, raise the limit with ulimit -n",
        errno.ENFILE: "the system has too many files open, close other programs",
        errno.ENODEV: "the device is gone, or its file system cannot map files into memory",
    }
    usual = {
        errno.ENOSPC: "free some space",
        errno.EDQUOT: "free some space, or have the quota raised",
        errno.EROFS: "choose a place that can be written",
        errno.ENAMETOOLONG: "choose a shorter one",
        errno.ENODEV: "copy the files to a local disk",
    }
    number = error.errno or 0
    advice = hint or usual.get(number)
    reason = reasons.get(number, error.strerror or str(error))
    return SynthfastError(f"{path}: {reason}" + (f"; {advice}" if advice else ""))


def require_file(path: str | os.PathLike) -> None:
    """SynthfastError for a pipe, socket or device, which who opens or reads it may wait for without end; OSError for nothing.

    A folder passes: opening it says what it is.
    """
    mode = os.stat(path).st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise SynthfastError(f"{path}: expected a file, found a pipe, a socket or a device; remove it")


def fsync_folder(folder: Path) -> None:
    """Make renames in ``folder`` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def temporary_path(path: Path) -> Path:
    """The temporary name, in the same folder, under which ``path`` is written. One writer per path at a time."""
    return path.with_name(TEMPORARY_PREFIX + path.name)


def open_temporary(path: Path) -> IO[bytes]:
    """The temporary file of ``path``, new and open for writing: what lies there, a link that leads elsewhere too, is removed."""
    temporary = temporary_path(path)
    temporary.unlink(missing_ok=True)
    return open(temporary, "xb")


def commit_temporary(path: Path) -> None:
    """Rename the finished temporary file of ``path`` to its final name, durably."""
    os.replace(temporary_path(path), path)
    fsync_folder(path.parent)


def atomic_write_bytes(path: str | os.PathLike, data: bytes) -> None:
    """Write ``data`` to ``path``: temporary name, flush, fsync, rename. Raises SynthfastError in one line."""
    atomic_write_files({path: data})


def atomic_write_files(files: Mapping[str | os.PathLike, bytes]) -> None:
    """Write files that belong together: all under temporary names first, then renamed one after the other, in their order.

    A disk that is full keeps the old ones, all of them; only a failure or a kill between two renames can part them. Raises
    SynthfastError in one line.
    """
    paths = [Path(path) for path in files]
    for path in paths:
        if path.is_dir():
            raise os_error(path, IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR)))
    path = paths[0]
    try:
        for path, data in zip(paths, files.values(), strict=True):
            with open_temporary(path) as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        for path in paths:
            commit_temporary(path)
    except OSError as error:
        for each in paths:
            with contextlib.suppress(OSError):  # the first error is the one to report
                temporary_path(each).unlink(missing_ok=True)
        raise os_error(path, error) from error


# What file systems without flock answer (some network ones): what lies there is then written without a lock.
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EBADF, errno.EINVAL)


class Lock:
    """Keeps other processes from writing a folder, or a file; a context manager, or until ``close``.

    The kernel lets go of it when the process ends, however it ends, so that a killed one leaves nothing to clean up. The lock of
    a folder is on the folder itself. That of a file, which need not be there yet, is on ``.tmp-NAME.lock`` beside it.

    Raises:
        SynthfastError: another process holds it, or the file system refuses.
    """

    def __init__(self, path: str | os.PathLike, hint: str = "choose another --out") -> None:
        path = Path(path)
        is_folder = path.is_dir()
        self._file = None if is_folder else temporary_path(path.with_name(path.name + ".lock"))
        self._descriptor: int | None = None
        try:
            while self._descriptor is None:
                self._descriptor = _locked(path if self._file is None else self._file, is_folder)
        except OSError as error:
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES) or error.filename is not None:
                raise os_error(path, error, hint) from error
            what = "folder" if is_folder else "file"
            raise SynthfastError(
                f"{path}: another process is writing this {what}; wait for it to end or {hint}"
            ) from error
        _held.add(self._descriptor)

    def close(self) -> None:
        """Let go of it."""
        if self._descriptor is None:
            return
        if self._file is not None:
            with contextlib.suppress(OSError):  # an empty file stays, which does no harm
                self._file.unlink(missing_ok=True)
        _held.discard(self._descriptor)
        os.close(self._descriptor)
        self._descriptor = None

    def __enter__(self) -> Lock:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


_held: set[int] = set()


def _forget_locks() -> None:
    """In a forked child, which would hold the parent's locks for as long as it lives: it may outlive a killed parent."""
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_forget_locks)


def _locked(path: Path, is_folder: bool) -> int | None:
    """A descriptor of ``path`` that holds its lock; None if another process removed it meanwhile. OSError as flock gives it."""
    descriptor = os.open(
        path, os.O_RDONLY | os.O_DIRECTORY if is_folder else os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666
    )
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
        try:
            if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                return descriptor
        except FileNotFoundError:
            if is_folder:
                raise
    except BaseException:
        os.close(descriptor)
        raise
    os.close(descriptor)
    return None


def json_bytes(value: Any) -> bytes:
    """Canonical JSON: two-space indent, key order as given, a newline at the end; NaN and infinity are refused."""
    text = json.dumps(value, indent=2, allow_nan=False, ensure_ascii=False) + "\n"
    return text.encode("utf-8", "backslashreplace")  # a path that is not UTF-8 has lone surrogates: JSON writes \udcff


def atomic_write_json(path: str | os.PathLike, value: Any) -> None:
    """Write ``value`` as canonical JSON, atomically."""
    atomic_write_bytes(path, json_bytes(value))


def read_json(path: str | os.PathLike, what: str) -> dict[str, Any]:
    """Read a JSON object. ``what`` names the file's role in the one-line errors ("manifest", "checkpoint").

    NaN and infinities are let through, because diffusers writes them.
    """
    try:
        require_file(path)
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise SynthfastError(f"{path}: no {what} here; check the path") from error
    except UnicodeDecodeError as error:
        raise SynthfastError(f"{path}: the {what} is not UTF-8 text; restore or remake it") from error
    except OSError as error:
        raise os_error(path, error) from error
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise SynthfastError(f"{path}: the {what} is not valid JSON ({error}); restore or remake it") from error
    if not isinstance(value, dict):
        raise SynthfastError(f"{path}: the {what} must be a JSON object, found {type(value).__name__}")
    return value


def sha256_file(path: str | os.PathLike) -> str:
    """SHA-256 of a file's content, in hexadecimal."""
    digest = hashlib.sha256()
    try:
        require_file(path)
        with open(path, "rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    except OSError as error:
        raise os_error(path, error) from error
    return digest.hexdigest()


def save_tensors(path: str | os.PathLike, tensors: dict[str, Any], metadata: dict[str, str] | None = None) -> None:
    """Write named tensors as safetensors, atomically. Channels-last weights are stored in their logical order.

    The metadata get a "digest" of them and of the tensors, by which :func:`load_kept` knows whether anything changed since.
    """
    from safetensors.torch import save

    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    metadata = metadata or {}
    atomic_write_bytes(path, save(plain, metadata={**metadata, _DIGEST: _digest(plain, metadata)}))


_DIGEST = "digest"


def _digest(tensors: Mapping[str, Any], metadata: Mapping[str, str]) -> str:
    import torch

    digest = hashlib.sha256(repr(sorted(metadata.items())).encode("utf-8", "backslashreplace"))
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name!r} {tensor.dtype} {list(tensor.shape)}".encode("utf-8", "backslashreplace"))
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def load_kept(path: str | os.PathLike) -> tuple[dict[str, Any], dict[str, str]]:
    """The tensors and the metadata of a file of :func:`save_tensors`; a bit that changed since is a SynthfastError."""
    from safetensors import SafetensorError, safe_open

    try:
        require_file(path)
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no dictionary)
    except SafetensorError as error:
        raise SynthfastError(f"{path}: not a valid safetensors file ({error}); restore or remake it") from error
    except OSError as error:
        raise os_error(path, error) from error
    expected = metadata.pop(_DIGEST, None)
    if expected is None:
        raise SynthfastError(
            f"{path}: has no '{_DIGEST}', so another program or an older synthfast wrote it; restore or remake it"
        )
    if expected != (found := _digest(tensors, metadata)):
        raise SynthfastError(f"{path}: damaged, expected the digest {expected}, found {found}; restore or remake it")
    return tensors, metadata


# What torch.load raises on damaged bytes, beyond the UnpicklingError and RuntimeError that it promises.
_UNPICKLING_ERRORS = (
    pickle.UnpicklingError,
    RuntimeError,
    OSError,
    EOFError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    AssertionError,
    OverflowError,
)


def load_tensors(path: str | os.PathLike, *, allow_pickle: bool = False) -> dict[str, Any]:
    """Read named tensors from safetensors; from a ``.pt``/``.pth``/``.bin`` pickle only with ``allow_pickle``.

    A pickle goes through ``torch.load(weights_only=True)``, which runs no code of the file. Where it holds the tensors one
    level down, as training scripts save them beside other values, they are taken from "state_dict" or "model_state_dict",
    or from the only entry that is a dictionary of tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise SynthfastError(f"{path}: no weights here, expected a safetensors file; check the path")
    if path.suffix == ".safetensors":
        return _load_safetensors(path)
    if not allow_pickle:
        raise SynthfastError(
            f"{path}: weights of kind '{path.suffix}' are pickles, which are refused; "
            "convert the file to safetensors, or pass --allow-pickle if you trust it"
        )
    import torch

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the pickle's protocol
            value = torch.load(path, map_location="cpu", weights_only=True)
    except _UNPICKLING_ERRORS as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        if "weights_only" in reason:  # torch advises to load it all the same, with the code that it holds
            reason = "it holds other things than tensors, or is damaged"
        raise SynthfastError(f"{path}: not a file of plain tensors ({reason}); convert it to safetensors") from error
    if _is_tensors(value):
        return value
    nested = {key: item for key, item in value.items() if _is_tensors(item)} if isinstance(value, dict) else {}
    chosen = [key for key in ("state_dict", "model_state_dict") if key in nested] or list(nested)
    if len(chosen) != 1:
        found = f"several ({', '.join(map(repr, chosen))})" if chosen else type(value).__name__
        raise SynthfastError(f"{path}: expected a dictionary of tensors, found {found}; save the weights alone")
    return dict(nested[chosen[0]])


def _is_tensors(value: object) -> bool:
    import torch

    if not isinstance(value, dict) or not value:
        return False
    return all(isinstance(key, str) and isinstance(item, torch.Tensor) for key, item in value.items())


def _load_safetensors(path: Path) -> dict[str, Any]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except SafetensorError as error:
        raise SynthfastError(f"{path}: not a valid safetensors file ({error}); restore or remake it") from error
    except OSError as error:
        raise os_error(path, error) from error


CHECKPOINT_FORMAT = 1
CHECKPOINT_CONFIG = "config.json"
CHECKPOINT_WEIGHTS = "model.safetensors"


def save_checkpoint(folder: str | os.PathLike, kind: str, config: dict[str, Any], tensors: dict[str, Any]) -> None:
    """Write a checkpoint folder: ``model.safetensors``, and ``config.json`` with its SHA-256.

    Args:
        folder: made if missing.
        kind: what the weights are, such as "diffusion" or "classifier".
        config: JSON values that rebuild the model.
        tensors: the weights by name.
    """
    from safetensors.torch import save

    folder = Path(folder)
    make_folder(folder)
    weights = save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
    header = {"format": CHECKPOINT_FORMAT, "kind": kind, "sha256": hashlib.sha256(weights).hexdigest()}
    files = {folder / CHECKPOINT_WEIGHTS: weights, folder / CHECKPOINT_CONFIG: json_bytes({**header, **config})}
    atomic_write_files(files)


def make_checkpoint_folder(folder: str | os.PathLike, kind: str) -> None:
    """Make a folder for a checkpoint of ``kind``; one that holds a ``config.json`` of anything else is refused."""
    folder = Path(folder)
    make_folder(folder)
    path = folder / CHECKPOINT_CONFIG
    if path.exists():
        found = read_json(path, "checkpoint").get("kind")
        if found != kind:
            what = "no checkpoint of synthfast" if found is None else f"a checkpoint of kind '{found}'"
            raise UsageError(f"{path}: {what}, this command would overwrite it; choose another --out")


def read_checkpoint_config(folder: str | os.PathLike, kind: str) -> dict[str, Any]:
    """``config.json`` of a checkpoint folder, after checking its format and ``kind``."""
    path = Path(folder) / CHECKPOINT_CONFIG
    config = read_json(path, "checkpoint")
    version = config.get("format")
    if type(version) is not int or version < 1:
        raise SynthfastError(
            f"{path}: not a synthfast checkpoint, 'format' must be {CHECKPOINT_FORMAT}, found {version!r}"
        )
    if version > CHECKPOINT_FORMAT:
        raise SynthfastError(
            f"{path}: format {version} is newer than this synthfast reads ({CHECKPOINT_FORMAT}); upgrade synthfast"
        )
    if config.get("kind") != kind:
        raise SynthfastError(
            f"{path}: expected a checkpoint of kind '{kind}', found {config.get('kind')!r}; check the path"
        )
    return config


def load_checkpoint(folder: str | os.PathLike, kind: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The configuration and the weights of a checkpoint folder; the weights must have the recorded SHA-256."""
    config = read_checkpoint_config(folder, kind)
    weights = Path(folder) / CHECKPOINT_WEIGHTS
    tensors = load_tensors(weights)
    found = sha256_file(weights)
    if config.get("sha256") != found:
        raise SynthfastError(
            f"{weights}: expected SHA-256 {config.get('sha256')}, found {found}; restore the file or train again"
        )
    return config, tensors


def make_folder(folder: Path, hint: str = "choose another --out") -> None:
    """Make a folder and its parents; one-line error, which ends with the hint, if that is not possible."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise os_error(folder, error, hint) from error
