"""Manifests with anything in them: one line, no other exception, and no memory taken for what is not there."""

from __future__ import annotations

import copy
import json
import tracemalloc
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from synthfast.data import ShardSet, summary, verify
from synthfast.errors import SynthfastError

STORAGES = {
    "npy": {},
    "png": {"format": "wds", "codec": "png"},
    "jpg": {"format": "wds", "codec": "jpg", "quality": 95},
}
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 300),
    st.sampled_from([2**31, 2**63, 10**15, 10**30, -(10**30)]),
    st.floats(allow_nan=False),
    st.text(max_size=12),
    st.sampled_from(["wds", "npy", "jpg", "png", "../x", "/etc/passwd", "shard-000001.tar", "0" * 64]),
)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
)


def places(value: Any) -> list[tuple]:
    """The way to every value inside a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [way for key, item in items for way in ((key,), *((key, *rest) for rest in places(item)))]


@pytest.fixture(scope="module")
def folders(tmp_path_factory, write_module):
    made = {}
    for name, storage in STORAGES.items():
        made[name] = tmp_path_factory.mktemp("fuzz") / name
        write_module(made[name], storage)
    return made


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_manifest_raises_anything_else(folders, data):
    name = data.draw(st.sampled_from(list(STORAGES)))
    path = folders[name] / "manifest.json"
    whole = path.read_text()
    manifest = copy.deepcopy(json.loads(whole))
    for _ in range(data.draw(st.integers(1, 3))):
        way = data.draw(st.sampled_from(places(manifest)))
        place = manifest
        for key in way[:-1]:
            place = place[key]
        if data.draw(st.booleans()) and isinstance(place, dict):
            place[data.draw(st.sampled_from(["format", "codec", "quality", "labels", "tar", way[-1]]))] = data.draw(
                VALUES
            )
        elif data.draw(st.integers(0, 3)):
            place[way[-1]] = data.draw(VALUES)
        else:
            del place[way[-1]]
    path.write_text(json.dumps(manifest))
    tracemalloc.start()
    try:
        for look in (ShardSet, verify, summary):
            try:
                look(folders[name])
            except SynthfastError as error:
                assert "\n" not in str(error)
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        path.write_text(whole)
    assert peak < 30e6


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(max_size=80) | VALUES.map(json.dumps), cut=st.integers(0, 400))
def test_no_text_raises_anything_else(folders, text, cut):
    path = folders["png"] / "manifest.json"
    whole = path.read_text()
    path.write_bytes((text if cut % 2 else whole[:cut] + text).encode("utf-8", "surrogatepass"))
    try:
        for look in (ShardSet, verify, summary):
            with pytest.raises(SynthfastError, match=r"^.*manifest\.json"):
                look(folders["png"])
    finally:
        path.write_text(whole)
