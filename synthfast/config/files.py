"""From plain values, TOML files and recipes to the dataclasses, and back."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import sys
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from synthfast.config.classifier import ClassifierConfig, unused_by
from synthfast.errors import UsageError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Config = TypeVar("Config")


def make_config(cls: type[Config], values: Mapping[str, Any], where: str = "") -> Config:
    """An instance of a stage's dataclass from plain values.

    Args:
        cls: one of the dataclasses above.
        values: field name to value; missing ones take their defaults.
        where: starts the messages, such as the path of a TOML file.

    A recipe that ``values`` name (``recipe``) gives the values that are missing there. Raises UsageError for unknown keys, wrong
    types and bad values, in one line.
    """
    checked = _checked_values(cls, values, where)
    if cls is ClassifierConfig and checked.get("recipe") is not None:
        checked = {**_suitable(recipe_values(checked["recipe"]), checked), **checked}
    try:
        return cls(**checked)
    except UsageError as error:
        raise UsageError(f"{where}: {error}" if where else str(error)) from None


def _checked_values(cls: type, values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """``values`` with the types of the fields of ``cls``; UsageError for unknown keys, wrong types and choices."""
    prefix = f"{where}: " if where else ""
    fields = {item.name: item for item in dataclasses.fields(cls)}
    hints = typing.get_type_hints(cls)
    checked = {}
    for name, value in values.items():
        if name not in fields:
            raise UsageError(f"{prefix}unknown key {name!r}; expected one of {', '.join(fields)}")
        checked[name] = _checked(hints[name], value, f"{prefix}{name}")
        choices = fields[name].metadata.get("choices")
        if choices and checked[name] is not None and checked[name] not in choices:
            raise UsageError(f"{prefix}{name}: expected one of {', '.join(choices)}, found {value!r}")
    return checked


RECIPES = Path(__file__).parent.parent / "training" / "recipes"


def recipe_values(recipe: str) -> dict[str, Any]:
    """What a recipe of ``synthfast train classifier`` sets: field name of :class:`ClassifierConfig` to value.

    ``recipe``: the name of a file of the package (``proxy``, ``edm``) or the path of a TOML file.
    """
    names = sorted(path.stem for path in RECIPES.glob("*.toml"))
    path = RECIPES / f"{recipe}.toml" if recipe in names else Path(recipe)
    if path.suffix != ".toml":
        raise UsageError(f"--recipe {recipe}: no such recipe; expected {', '.join(names)} or a TOML file")
    if not path.exists():
        raise UsageError(f"--recipe {recipe}: no such file; check the path, or take one of {', '.join(names)}")
    values = _checked_values(ClassifierConfig, read_toml(path), str(path))
    if "recipe" in values:
        raise UsageError(f"{path}: recipe: a recipe names no other; take its values over")
    try:
        # Synthetic folders are the user's matter; everything else must be valid by itself.
        ClassifierConfig(**{"synthetic": ("DIR",), **values})
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from None
    return values


def _suitable(recipe: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a recipe without those that belong to another method, norm, radius or schedule than the one given."""
    final = {**recipe, **given}
    method = final.get("method", ClassifierConfig.method)
    without = unused_by(method)
    if "norm" in given and given["norm"] != recipe.get("norm", ClassifierConfig.norm):
        without |= {"eps", "step_size"}
    if "eps" in given and given["eps"] != recipe.get("eps"):
        without |= {"step_size"}
    if "schedule" in given and given["schedule"] != recipe.get("schedule", ClassifierConfig.schedule):
        without |= {"warmup"}
    return {name: value for name, value in recipe.items() if name not in without}


def number(text: str) -> float:
    """A number from text such as "0.5" or "8/255"; ValueError with what was expected."""
    above, _, below = text.partition("/")
    try:
        value = float(above) / float(below) if below else float(above)
    except (ValueError, ZeroDivisionError):
        value = math.nan
    if math.isnan(value):
        raise ValueError(f"expected a number such as 0.5 or 8/255, found {text!r}")
    return value


def _checked(hint: Any, value: Any, where: str) -> Any:
    """``value`` as the annotated type: str, int, float, bool, tuple[str, ...], tuple[float, ...], or one of these or None."""
    alternatives = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if value is None and type(None) in alternatives:
        return None
    kind = next(item for item in alternatives if item is not type(None))
    if typing.get_origin(kind) is tuple and typing.get_args(kind)[0] is float:
        if isinstance(value, (list, tuple)):
            return tuple(_checked(float, item, where) for item in value)
        raise UsageError(f"{where}: expected a list of numbers, found {value!r}")
    if typing.get_origin(kind) is tuple:
        if isinstance(value, (list, tuple)) and all(isinstance(item, str) for item in value):
            return tuple(value)
        raise UsageError(f"{where}: expected a list of strings, found {value!r}")
    if kind is float and type(value) is int and abs(value) <= sys.float_info.max:
        return float(value)
    if kind is float and isinstance(value, str):
        try:
            return number(value)
        except ValueError as error:
            raise UsageError(f"{where}: {error}") from None
    if type(value) is not kind:
        names = {str: "a string", int: "a whole number", float: "a number", bool: "true or false"}
        raise UsageError(f"{where}: expected {names[kind]}, found {value!r}")
    return value


# tomllib takes memory for a key with dots by the square of its parts.
_LONG_KEY = re.compile(r"^[ \t\[]*(?:[\w\-\"' ]*\.){1000}", re.MULTILINE)


def read_toml(path: str | Path) -> dict[str, Any]:
    """The values of a TOML file; one-line UsageError if it is missing or broken."""
    try:
        text = Path(path).read_text(encoding="utf-8")
        if _LONG_KEY.search(text):
            raise ValueError("a key of a thousand parts")
        return tomllib.loads(text)
    except FileNotFoundError:
        raise UsageError(f"{path}: no such configuration file; check the path") from None
    except (OSError, ValueError, RecursionError) as error:  # ValueError: not TOML, not UTF-8, an endless integer
        raise UsageError(f"{path}: not a readable TOML file ({error}); correct it") from None


def to_toml(config: Any) -> str:
    """The dataclass as TOML text, which ``read_toml`` and ``make_config`` turn back into an equal one. None is left out."""
    lines = []
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        if value is not None:
            lines.append(f"{item.name} = {_toml_value(value)}")
    return "\n".join(lines) + "\n"


def _toml_value(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_toml_value(item) for item in value) + "]"
    if isinstance(value, float):
        return repr(value)  # inf and nan are written alike in both languages
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
