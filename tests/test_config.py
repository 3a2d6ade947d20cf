"""Stage dataclasses: what values they take, and their TOML form."""

from __future__ import annotations

import dataclasses
import math
import subprocess
import sys
import typing

import pytest
from hypothesis import given
from hypothesis import strategies as st

from synthfast.config import ClassifierConfig, GeneratorConfig, SampleConfig, make_config, read_toml, to_toml, tomllib
from synthfast.errors import UsageError

STAGES = (SampleConfig, GeneratorConfig, ClassifierConfig)
BAD_VALUES = [
    (SampleConfig, "n", 0),
    (SampleConfig, "shard_size", 0),
    (SampleConfig, "batch_size", 0),
    (SampleConfig, "seed", 2**63),
    (SampleConfig, "seed", -(2**63) - 1),
    (SampleConfig, "guidance", math.inf),
    (SampleConfig, "guidance", math.nan),
    (GeneratorConfig, "steps", 0),
    (GeneratorConfig, "batch_size", -1),
    (GeneratorConfig, "checkpoint_every", 0),
    (GeneratorConfig, "lr", 0.0),
    (GeneratorConfig, "lr", math.inf),
    (GeneratorConfig, "lr", math.nan),
    (GeneratorConfig, "warmup", -1),
    (GeneratorConfig, "weight_decay", -0.1),
    (GeneratorConfig, "weight_decay", math.inf),
    (GeneratorConfig, "clip_norm", 0.0),
    (GeneratorConfig, "clip_norm", math.inf),
    (GeneratorConfig, "ema", 1.0),
    (GeneratorConfig, "ema", -0.1),
    (GeneratorConfig, "sigma_data", 0.0),
    (GeneratorConfig, "label_dropout", 1.0),
    (GeneratorConfig, "seed", 2**63),
    (ClassifierConfig, "steps", 0),
    (ClassifierConfig, "batch_size", 1),
    (ClassifierConfig, "lr", -1.0),
    (ClassifierConfig, "lr", math.inf),
    (ClassifierConfig, "weight_decay", -1.0),
    (ClassifierConfig, "fraction", 1.01),
    (ClassifierConfig, "fraction", -0.01),
    (ClassifierConfig, "fraction", math.nan),
    (ClassifierConfig, "fraction", 0.5),  # without synthetic folders
    (ClassifierConfig, "seed", -(2**64)),
]
WRONG_TYPES = [
    (SampleConfig, "n", "5", "a whole number"),
    (SampleConfig, "n", 5.0, "a whole number"),
    (SampleConfig, "n", True, "a whole number"),
    (SampleConfig, "n", None, "a whole number"),
    (SampleConfig, "guidance", "2", "a number"),
    (SampleConfig, "guidance", True, "a number"),
    (GeneratorConfig, "lr", 10**400, "a number"),  # too large for one
    (GeneratorConfig, "flip", "yes", "true or false"),
    (GeneratorConfig, "image_size", 8.0, "a whole number"),
    (SampleConfig, "generator", 3, "a string"),
    (SampleConfig, "compile", 1, "true or false"),
    (SampleConfig, "out", ["a"], "a string"),
    (ClassifierConfig, "synthetic", "folder", "a list of strings"),
    (ClassifierConfig, "synthetic", ["a", 1], "a list of strings"),
]


@pytest.mark.parametrize("cls", STAGES)
def test_every_field_has_help_and_a_default_that_is_valid(cls):
    for field in dataclasses.fields(cls):
        assert field.metadata["help"].endswith("."), field.name
        assert field.default is not dataclasses.MISSING
        choices = field.metadata.get("choices")
        assert choices is None or field.default is None or field.default in choices
    assert make_config(cls, {}) == cls()


@pytest.mark.parametrize(("cls", "name", "value"), BAD_VALUES)
def test_a_bad_value_is_refused_in_one_line_that_names_the_option(cls, name, value):
    with pytest.raises(UsageError) as caught:
        make_config(cls, {name: value}, "file.toml")
    message = str(caught.value)
    assert message.startswith(f"file.toml: --{name.replace('_', '-')} {value}: expected ") and "\n" not in message


@pytest.mark.parametrize(("cls", "name", "value", "expected"), WRONG_TYPES)
def test_a_wrong_type_is_refused_by_file_and_key(cls, name, value, expected):
    for where, start in (("", ""), ("set.toml", "set.toml: ")):
        with pytest.raises(UsageError) as caught:
            make_config(cls, {name: value}, where)
        assert str(caught.value) == f"{start}{name}: expected {expected}, found {value!r}"


@pytest.mark.parametrize("key", ["batchsize", "", "batch-size", "a\nb"])
def test_an_unknown_key_is_refused_with_the_known_ones(key):
    with pytest.raises(UsageError) as caught:
        make_config(SampleConfig, {key: 3}, "set.toml")
    assert str(caught.value).startswith(f"set.toml: unknown key {key!r}; expected one of n, generator, ")
    assert ", batch_size, " in str(caught.value) and "\n" not in str(caught.value)


def test_choices_are_checked():
    with pytest.raises(UsageError, match=r"^solver: expected one of ddpm, .*dpmpp-2m-sde, found 'rk4'$"):
        make_config(SampleConfig, {"solver": "rk4"})


def test_a_whole_number_serves_as_a_number():
    guidance = make_config(SampleConfig, {"guidance": 2}).guidance
    assert guidance == 2.0 and type(guidance) is float


def test_limits_of_the_seed_are_valid():
    for seed in (-(2**63), 2**63 - 1):
        assert all(make_config(cls, {"seed": seed}).seed == seed for cls in STAGES)


def test_none_is_a_value_only_where_the_default_is_none():
    for cls in STAGES:
        for field in dataclasses.fields(cls):
            if field.default is None:
                assert getattr(make_config(cls, {field.name: None}), field.name) is None
            else:
                with pytest.raises(UsageError, match=f"^{field.name}: expected .*, found None$"):
                    make_config(cls, {field.name: None})


def other_value(field: dataclasses.Field, hint: object) -> object:
    """A valid value that is not the default, of the kind that ``hint`` says."""
    if field.name == "fraction":
        return 0.25
    if field.metadata.get("choices"):
        return next(choice for choice in field.metadata["choices"] if choice != field.default)
    kind = next(kind for kind in (*typing.get_args(hint), hint) if kind is not type(None) and kind is not Ellipsis)
    if hint == tuple[str, ...]:
        return ("a", "b, c", "")
    return {bool: not field.default, int: 7, float: 0.1 + 0.2, str: 'a "quoted" \\ path\n\t\x7f é 字 \U0001f600'}[kind]


@pytest.mark.parametrize("cls", STAGES)
def test_a_file_gives_back_every_field(cls, tmp_path):
    hints = typing.get_type_hints(cls)
    filled = cls(**{field.name: other_value(field, hints[field.name]) for field in dataclasses.fields(cls)})
    path = tmp_path / "set.toml"
    for config in (cls(), filled):
        path.write_text(to_toml(config), encoding="utf-8")
        values = read_toml(path)
        assert make_config(cls, values, str(path)) == config
        assert None not in values.values()
    assert values.keys() == {field.name for field in dataclasses.fields(cls)}
    assert all(getattr(filled, field.name) != field.default for field in dataclasses.fields(cls))


@pytest.mark.parametrize(
    "config",
    [
        SampleConfig(clip=math.inf, s_tmax=math.inf, guidance=-1e-300, eta=0.0),
        GeneratorConfig(seed=-(2**63), lr=1 / 3, conditional=False, flip=False),
        ClassifierConfig(synthetic=("a",), fraction=1.0, lr=5e300),
    ],
)
def test_toml_holds_the_ends_of_numbers(config):
    assert make_config(type(config), tomllib.loads(to_toml(config))) == config


@given(st.text(st.characters(exclude_categories=["Cs"])), st.floats(allow_nan=False, allow_infinity=False))
def test_toml_holds_any_text_and_number(text, number):
    config = SampleConfig(out=text, guidance=number)
    assert make_config(SampleConfig, tomllib.loads(to_toml(config))) == config


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"n = ", "not a readable TOML file"),
        (b"\xff", "not a readable TOML file"),
        (b"n = 1\nn = 2", "not a readable TOML file"),
        (b"x = " + b"[" * 100_000, "not a readable TOML file"),
        (b"n = " + b"9" * 10_000, "not a readable TOML file"),
        (None, "no such configuration file"),
    ],
)
def test_a_broken_file_is_reported_in_one_line(tmp_path, content, message):
    path = tmp_path / "set.toml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UsageError) as caught:
        read_toml(path)
    assert str(caught.value).startswith(f"{path}: {message}") and "\n" not in str(caught.value)


def test_a_folder_is_no_configuration_file(tmp_path):
    with pytest.raises(UsageError, match="not a readable TOML file"):
        read_toml(tmp_path)


def test_the_module_needs_no_torch():
    code = "import synthfast.config, sys; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
