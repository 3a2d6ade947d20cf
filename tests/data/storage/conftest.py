"""An empty ``memory://`` and an empty cache for every test of URLs."""

from __future__ import annotations

import fsspec
import pytest

from synthfast.data.storage import cache as remote_cache
from synthfast.data.storage import lock as remote_lock


@pytest.fixture(autouse=True)
def memory(tmp_path, monkeypatch):
    """An empty memory:// and an empty cache."""
    files = fsspec.filesystem("memory")
    files.store.clear()
    files.pseudo_dirs[:] = [""]
    monkeypatch.setenv("SYNTHFAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("SYNTHFAST_CACHE_LIMIT", raising=False)
    monkeypatch.setattr(remote_cache, "_asked_for", set())
    monkeypatch.setattr(remote_cache, "_in_use", {})
    monkeypatch.setattr(remote_lock, "_MOST_SECONDS", 0.01)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    yield files
    assert not list(tmp_path.glob("synthfast-*")), "staging folders were left"


@pytest.fixture(params=["npy", "wds"])
def format_values(request, request_values) -> dict:
    """The toy request in either format."""
    return request_values if request.param == "npy" else {**request_values, "format": "wds", "codec": "png"}


@pytest.fixture
def there():
    """``there(memory)``: what lies in the folder at the URL, by name."""

    def contents(memory, folder: str = "/bucket/set") -> dict[str, bytes]:
        return {path.removeprefix(f"{folder}/"): memory.cat_file(path) for path in sorted(memory.find(folder))}

    return contents
