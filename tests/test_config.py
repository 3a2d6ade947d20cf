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

from synthfast.config import (
    RECIPES,
    ClassifierConfig,
    GeneratorConfig,
    SampleConfig,
    for_method,
    make_config,
    read_toml,
    recipe_values,
    to_toml,
    tomllib,
)
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
    (ClassifierConfig, "attack_steps", 0),
    (ClassifierConfig, "checkpoint_every", 0),
    (ClassifierConfig, "momentum", 0.0),
    (ClassifierConfig, "momentum", 1.0),
    (ClassifierConfig, "warmup", 1.0),
    (ClassifierConfig, "warmup", -0.1),
    (ClassifierConfig, "eps", 0.0),
    (ClassifierConfig, "eps", math.inf),
    (ClassifierConfig, "step_size", -0.1),
    (ClassifierConfig, "beta", -1.0),
    (ClassifierConfig, "beta", math.nan),
    (ClassifierConfig, "ema", 1.0),
    (ClassifierConfig, "label_smoothing", 1.0),
    (ClassifierConfig, "crop", -1),
    (ClassifierConfig, "cutmix", 1.1),
    (ClassifierConfig, "cutmix", math.nan),
    (ClassifierConfig, "validation", -0.1),
    (ClassifierConfig, "validation", 1.5),
    (ClassifierConfig, "validation", math.inf),
    (ClassifierConfig, "synthetic_n", 10),  # without synthetic folders
    (ClassifierConfig, "pseudo_labels", "DIR"),
]
WRONG_TYPES = [
    (SampleConfig, "n", "5", "a whole number"),
    (SampleConfig, "n", 5.0, "a whole number"),
    (SampleConfig, "n", True, "a whole number"),
    (SampleConfig, "n", None, "a whole number"),
    (SampleConfig, "guidance", "two", "a number such as 0.5 or 8/255"),
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


# Where any value of the type would not do.
OTHER_VALUES = {
    "fraction": 0.25,
    "method": "trades",
    "recipe": "proxy",
    "momentum": 0.3,
    "format": "wds",
    "codec": "jpg",
    "synthetic_weight": (0.5, 1e-3, 3.0),  # one for each folder
}


def other_value(field: dataclasses.Field, hint: object) -> object:
    """A valid value that is not the default, of the kind that ``hint`` says."""
    if field.name in OTHER_VALUES:
        return OTHER_VALUES[field.name]
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


NAMES = ("edm", "proxy")
SYNTHETIC = {"synthetic": ["a"]}


def test_the_recipes_are_these():
    assert sorted(path.name for path in RECIPES.iterdir() if path.suffix) == [f"{name}.toml" for name in NAMES]


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_says_where_each_number_comes_from(name):
    for line in (RECIPES / f"{name}.toml").read_text().splitlines():
        assert not line or line.startswith("#") or "  # " in line, line


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "proxy",
            {"method": "pgd", "norm": "linf", "eps": 8 / 255, "attack_steps": 10, "step_size": 2 / 255, "batch_size": 256,
             "fraction": 0.5, "lr": 0.1, "schedule": "cosine", "weight_decay": 5e-4, "ema": 0.0, "beta": None},
        ),
        (
            "edm",
            {"method": "trades", "beta": 5.0, "eps": 8 / 255, "attack_steps": 10, "step_size": 2 / 255, "batch_size": 512,
             "fraction": 0.7, "label_smoothing": 0.1, "ema": 0.995, "lr": 0.2, "schedule": "onecycle", "momentum": 0.9,
             "weight_decay": 5e-4, "model": "wrn-28-10-swish", "validation": 1024.0},
        ),
    ],
)  # fmt: skip
def test_a_recipe_by_name(name, expected):
    config = make_config(ClassifierConfig, {"recipe": name, **SYNTHETIC})
    assert {field: getattr(config, field) for field in expected} == expected
    assert config.recipe == name and config.steps > 30_000
    assert config == ClassifierConfig(recipe=name, synthetic=("a",), **recipe_values(name))


def test_values_that_are_given_go_before_those_of_the_recipe(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text('lr = 0.5\nsteps = 7\nmodel = "resnet-18"\n')
    config = make_config(
        ClassifierConfig, {"recipe": str(path), "lr": 0.1, "batch_size": 16}
    )  # lr is the default's value
    assert (config.lr, config.steps, config.model, config.batch_size) == (0.1, 7, "resnet-18", 16)
    assert config.momentum == ClassifierConfig().momentum


@pytest.mark.parametrize(
    ("given", "left_out"),
    [
        ({"method": "standard"}, {"eps", "step_size", "beta"}),
        ({"method": "pgd"}, {"beta"}),
        ({"norm": "l2"}, {"eps", "step_size"}),
        ({"norm": "l2", "eps": 1.0}, {"eps", "step_size"}),
        ({"eps": 0.1}, {"eps", "step_size"}),
        ({"eps": 8 / 255}, set()),
        ({"norm": "linf", "method": "trades", "schedule": "onecycle"}, set()),
        ({"schedule": "cosine"}, {"warmup"}),
        ({"lr": 0.3, "steps": 5}, set()),
    ],
)
def test_a_recipe_leaves_out_what_belongs_to_another_choice_than_the_one_given(given, left_out):
    config, recipe = make_config(ClassifierConfig, {"recipe": "edm", **SYNTHETIC, **given}), recipe_values("edm")
    for name, value in recipe.items():
        default = getattr(ClassifierConfig(), name)
        assert getattr(config, name) == given.get(name, default if name in left_out else value), name
    assert make_config(ClassifierConfig, tomllib.loads(to_toml(config))) == config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lrr = 0.1", "unknown key 'lrr'; expected one of dataset, "),
        ('lr = "fast"', "lr: expected a number such as 0.5 or 8/255, found 'fast'"),
        ("lr = -1.0", "--lr -1.0: expected a positive number"),
        ('recipe = "edm"', "recipe: a recipe names no other; take its values over"),
        ("eps = 0.1", "--eps 0.1: method standard does not use it; add --method pgd or trades"),
        ("lr = ", "not a readable TOML file ("),
    ],
)
def test_a_mistake_in_a_recipe_is_one_line_that_names_its_file(tmp_path, text, message):
    path = tmp_path / "mine.toml"
    path.write_text(text)
    with pytest.raises(UsageError) as caught:
        make_config(ClassifierConfig, {"recipe": str(path)})
    assert str(caught.value).startswith(f"{path}: {message}") and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("ddpm", "--recipe ddpm: no such recipe; expected edm, proxy or a TOML file"),
        ("edm.json", "--recipe edm.json: no such recipe; expected edm, proxy or a TOML file"),
        ("none.toml", "--recipe none.toml: no such file; check the path, or take one of edm, proxy"),
    ],
)
def test_a_recipe_that_is_not_there(recipe, message):
    with pytest.raises(UsageError) as caught:
        make_config(ClassifierConfig, {"recipe": recipe})
    assert str(caught.value) == message


def test_a_recipe_with_synthetic_images_needs_some():
    with pytest.raises(
        UsageError,
        match=r"^--fraction 0\.7 \(of --recipe edm\): expected --synthetic DIR beside it, found none; add one$",
    ):
        make_config(ClassifierConfig, {"recipe": "edm"})
    assert make_config(ClassifierConfig, {"recipe": "edm", "fraction": 0}).fraction == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eps": 0.1}, "--eps 0.1: method standard does not use it; add --method pgd or trades"),
        ({"step_size": 0.1}, "--step-size 0.1: method standard does not use it; add --method pgd or trades"),
        ({"beta": 3.0}, "--beta 3.0: method standard does not use it; add --method trades"),
        ({"beta": 3.0, "method": "pgd"}, "--beta 3.0: method pgd does not use it; add --method trades"),
        ({"synthetic_n": 0, "synthetic": ("a",)}, "--synthetic-n 0: expected a whole number of at least 1"),
    ],
)
def test_options_of_a_classifier_that_do_not_fit_each_other(options, message):
    with pytest.raises(UsageError) as caught:
        ClassifierConfig(**options)
    assert str(caught.value) == message


def test_the_same_settings_for_another_method():
    config = ClassifierConfig(method="trades", eps=0.1, step_size=0.01, beta=2.0, lr=0.3)
    assert for_method(config, "trades") == config
    assert for_method(config, "pgd") == ClassifierConfig(method="pgd", eps=0.1, step_size=0.01, lr=0.3)
    assert for_method(config, "standard") == ClassifierConfig(lr=0.3)


def test_the_usual_radius_of_each_norm():
    assert ClassifierConfig(method="pgd").radius == 8 / 255
    assert ClassifierConfig(method="pgd", norm="l2").radius == 0.5
    assert ClassifierConfig(method="pgd", norm="l2", eps=0.1).radius == 0.1


def test_the_module_needs_no_torch():
    code = "import synthfast.config, sys; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_number_may_be_a_fraction_in_quotes():
    made = make_config(ClassifierConfig, {"method": "pgd", "eps": "8/255", "lr": "0.05"})
    assert made.eps == 8 / 255 and made.lr == 0.05
    with pytest.raises(UsageError, match=r"^file: eps: expected a number such as 0\.5 or 8/255, found '8/0'$"):
        make_config(ClassifierConfig, {"method": "pgd", "eps": "8/0"}, "file")
