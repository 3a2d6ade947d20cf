"""Values and bytes to feed parsers with, and what they may do with them."""

from __future__ import annotations

import json
import os
import random
import resource
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
from hypothesis import strategies as st

from synthfast.errors import SynthfastError

# Numbers, names and structures that break parsers.
HOSTILE = (
    *(0, -1, 1, 3, 2**31, 2**63, -(2**63) - 1, 10**30, 0.5, -0.0, 1e308, float("inf"), float("nan"), True, False, None),
    *(
        "",
        "x",
        "../x",
        "/etc/passwd",
        "\x00",
        "\ud800",
        "1",
        "nan",
        "9" * 5000,
        [],
        [[]],
        {},
        {"": {}},
        ["x"],
        [1, 2, 3],
        [0.1],
    ),
)


# One of each kind, for sweeps.
WORST = (
    0,
    -1,
    2**31,
    2**63,
    10**30,
    0.5,
    float("inf"),
    float("nan"),
    True,
    None,
    "",
    "../x",
    "\ud800",
    [],
    {},
    ["x"],
    [1, 2],
)
REMOVED = object()


class Fuzz:
    """Strategies for hypothesis."""

    values = st.one_of(
        st.sampled_from(HOSTILE).map(deepcopy),  # for they are altered further
        st.integers(-100, 5000),
        st.floats(allow_nan=True),
        st.text(max_size=8),
        st.lists(st.integers(-3, 300), max_size=4),
    )

    @staticmethod
    def altered_json(value: Any) -> st.SearchStrategy[Any]:
        """A JSON value with one to three of its parts replaced, removed, or added to."""

        @st.composite
        def alter(draw: Callable[..., Any]) -> Any:
            result = json.loads(json.dumps(value))
            for _ in range(draw(st.integers(1, 3))):
                result = change(draw, result)
            return result

        def change(draw: Callable[..., Any], value: Any) -> Any:
            inside = isinstance(value, (dict, list)) and value and draw(st.integers(0, 6))
            if not inside:
                return draw(Fuzz.values)
            keys = list(value) if isinstance(value, dict) else list(range(len(value)))
            key, how = draw(st.sampled_from(keys)), draw(st.sampled_from(("into", "into", "into", "remove", "add")))
            if how == "into":
                value[key] = change(draw, value[key])
            elif how == "remove":
                del value[key]
            elif isinstance(value, dict):
                value[draw(st.text(max_size=5))] = draw(Fuzz.values)
            else:
                value.append(draw(Fuzz.values))
            return value

        return alter()

    @staticmethod
    def every_part(value: Any, most: int) -> list[Any]:
        """The JSON value with one of its parts removed or replaced by a hostile value; ``most`` of these, drawn at random."""
        changes: list[tuple[tuple[Any, ...], Any]] = []

        def walk(part: Any, path: tuple[Any, ...]) -> None:
            changes.extend((path, hostile) for hostile in (*WORST, REMOVED))
            items = part.items() if isinstance(part, dict) else enumerate(part[:2]) if isinstance(part, list) else ()
            for key, inner in items:
                walk(inner, (*path, key))

        walk(value, ())
        changes = random.Random(0).sample(changes, min(most, len(changes)))
        return [Fuzz.replaced(value, path, hostile) for path, hostile in changes]

    @staticmethod
    def replaced(value: Any, path: tuple[Any, ...], hostile: Any) -> Any:
        if not path:
            return {} if hostile is REMOVED else deepcopy(hostile)
        result = deepcopy(value)
        inner = result
        for key in path[:-1]:
            inner = inner[key]
        inner[path[-1]] = deepcopy(hostile)
        if hostile is REMOVED:
            del inner[path[-1]]
        return result

    @staticmethod
    def altered_bytes(data: bytes) -> st.SearchStrategy[bytes]:
        """The bytes with a few of them replaced, a part cut out or doubled, or something in its place; or any bytes."""

        @st.composite
        def alter(draw: Callable[..., Any]) -> bytes:
            found = bytearray(data)
            for _ in range(draw(st.integers(1, 4))):
                # Headers stand in front.
                end = draw(st.sampled_from((16, 140, len(found))))
                place, length = draw(st.integers(0, max(0, min(end, len(found)) - 1))), draw(st.integers(1, 40))
                how = draw(st.sampled_from(("set", "set", "cut", "end", "double", "text")))
                if how == "set":
                    found[place : place + 1] = bytes([draw(st.integers(0, 255))])
                elif how == "cut":
                    del found[place : place + length]
                elif how == "end":
                    del found[place:]
                elif how == "double":
                    found[place:place] = found[place : place + length]
                else:
                    found[place : place + length] = draw(st.binary(max_size=40))
            return bytes(found)

        return st.one_of(alter(), alter(), alter(), st.binary(max_size=200))


@pytest.fixture(scope="session")
def fuzz() -> type[Fuzz]:
    return Fuzz


def check_harmless(function: Callable[..., object], *arguments: object, **options: object) -> None:
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[5]) * os.sysconf("SC_PAGE_SIZE")
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (used + (1 << 28), hard))
    try:
        function(*arguments, **options)
    except SynthfastError as error:
        message = str(error)
        assert message and "\n" not in message, message
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


@pytest.fixture(scope="session")
def harmless() -> Callable[..., None]:
    """``harmless(function, ...)``: it works, or raises a SynthfastError of one line, and takes at most 256 MB."""
    return check_harmless
