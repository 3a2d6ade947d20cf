"""--config and --print-config: settings from and to TOML."""

from __future__ import annotations

import dataclasses
import json

import pytest

from synthfast.config import ClassifierConfig, GeneratorConfig, SampleConfig, make_config, read_toml, tomllib

COMMANDS = {"sample": SampleConfig, "train generator": GeneratorConfig, "train classifier": ClassifierConfig}
# A value other than the default for an option of each kind.
GIVEN = {
    "sample": ["--n", 7, "--solver", "heun", "--clip", "inf", "--churn", "1/4", "--compile", "--out", 'a "b" \\ é\t'],
    "train generator": ["--lr", "3e-4", "--no-conditional", "--flip", "--image-size", 32, "--seed", -5],
    "train classifier": ["--synthetic", "a", "--synthetic", "b", "--fraction", 1, "--method", "pgd", "--eps", "8/255"],
}
EXPECTED = {
    "sample": {"n": 7, "solver": "heun", "clip": float("inf"), "churn": 0.25, "compile": True, "out": 'a "b" \\ é\t'},
    "train generator": {"lr": 3e-4, "conditional": False, "flip": True, "image_size": 32, "seed": -5},
    "train classifier": {"synthetic": ("a", "b"), "fraction": 1.0, "method": "pgd", "eps": 8 / 255},
}


@pytest.mark.parametrize("command", COMMANDS)
def test_printed_settings_are_a_file_that_says_the_same(cli, tmp_path, command):
    cls, file = COMMANDS[command], tmp_path / "settings.toml"
    printed = cli(*command.split(), *GIVEN[command], "--print-config")
    assert (printed.status, printed.err) == (0, "")
    file.write_text(printed.out, encoding="utf-8")
    settings = make_config(cls, read_toml(file))
    assert settings == cls(**EXPECTED[command]) and settings != cls()
    assert cli(*command.split(), "--config", file, "--print-config").out == printed.out


@pytest.mark.parametrize("command", COMMANDS)
def test_without_options_the_defaults_are_printed_and_nothing_is_done(cli, tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    printed = cli(*command.split(), "--print-config").out
    names = {line.partition(" = ")[0] for line in printed.splitlines()}
    assert names == {f.name for f in dataclasses.fields(COMMANDS[command]) if f.default is not None}
    assert not list(tmp_path.iterdir())


def test_the_file_decides_and_options_go_first(cli, sample, tmp_path):
    file = tmp_path / "sample.toml"
    file.write_text('n = 12\nseed = 3\nlabels = "4"\nguidance = 2\n# a remark\nshard_size = 5\n')
    ran = cli("sample", "--config", file, "--seed", 9, "--out", tmp_path / "out", "--steps", 1, "--n", 6)
    assert ran.status == 0, ran.err
    request = json.loads((tmp_path / "out" / "manifest.json").read_text())["request"]
    assert [request[key] for key in ("n", "seed", "labels", "guidance", "shard_size")] == [6, 9, "4", 2.0, 5]


def test_an_option_may_mend_what_the_file_asks_for(cli, tmp_path):
    file = tmp_path / "settings.toml"
    file.write_text("fraction = 0.5\n")
    alone = cli("train", "classifier", "--config", file, "--print-config")
    assert alone.status == 2 and alone.error.startswith(f"{file}: --fraction 0.5: expected --synthetic DIR beside it")
    assert cli("train", "classifier", "--config", file, "--synthetic", "a", "--print-config").status == 0


def test_a_recipe_then_the_file_then_options(cli, tmp_path):
    """Each goes before what stands left of it; a recipe may be named in the file or by an option."""
    recipe, file = tmp_path / "mine.toml", tmp_path / "settings.toml"
    recipe.write_text("lr = 0.3\nsteps = 30\nseed = 3\nema = 0.3\n")
    file.write_text(f'recipe = "{tmp_path / "other.toml"}"\nlr = 0.2\nsteps = 20\n')
    (tmp_path / "other.toml").write_text("crop = 5\n")
    command = ("train", "classifier", "--config", file, "--lr", "0.1", "--print-config")
    values = tomllib.loads(cli(*command, "--recipe", recipe).out)
    assert [values[key] for key in ("lr", "steps", "seed", "ema", "momentum")] == [0.1, 20, 3, 0.3, 0.9]
    assert "crop" not in values
    assert tomllib.loads(cli(*command).out)["crop"] == 5


def test_a_recipe_by_name(cli):
    printed = cli(
        "train", "classifier", "--recipe", "proxy", "--synthetic", "a", "--eps", "4/255", "--print-config"
    ).out
    values = tomllib.loads(printed)
    assert (values["eps"], values["batch_size"], "step_size" in values) == (4 / 255, 256, False)
    ran = cli("train", "classifier", "--recipe", "prxy")
    assert ran.status == 2 and ran.error == "--recipe prxy: no such recipe; expected edm, proxy or a TOML file"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stpes = 3", "unknown key 'stpes'; expected one of n, generator, out"),
        ('"batch-size" = 3', "unknown key 'batch-size'; expected one of n, generator, out"),
        ("[sample]\nn = 3", "unknown key 'sample'; expected one of n"),
        ('n = "3"', "n: expected a whole number, found '3'"),
        ("n = 3.0", "n: expected a whole number, found 3.0"),
        ("n = true", "n: expected a whole number, found True"),
        ("n = [3]", "n: expected a whole number, found [3]"),
        ('guidance = "much"', "guidance: expected a number such as 0.5 or 8/255, found 'much'"),
        ("guidance = true", "guidance: expected a number, found True"),
        ("out = 3", "out: expected a string, found 3"),
        ("compile = 1", "compile: expected true or false, found 1"),
        ('solver = "dpm"', "solver: expected one of ddpm, ddim, euler, heun, dpmpp-2m, dpmpp-2m-sde, found 'dpm'"),
        ("n = 0", "--n 0: expected a whole number of at least 1"),
        ("guidance = nan", "--guidance nan: expected a finite number"),
        ("n = ", "not a readable TOML file ("),
        ("n = 3\nn = 4", "not a readable TOML file ("),
        (b"\xff\xfe", "not a readable TOML file ("),
        ("x = " + "[" * 100_000, "not a readable TOML file ("),
    ],
)
def test_a_mistake_in_the_file_is_one_line_that_names_it(cli, tmp_path, text, message):
    file = tmp_path / "sample.toml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    ran = cli("sample", "--config", file, "--print-config")
    assert ran.status == 2 and ran.out == "" and ran.error.startswith(f"{file}: {message}")


def test_a_list_must_hold_strings(cli, tmp_path):
    file = tmp_path / "settings.toml"
    for text in ('synthetic = "a"', "synthetic = [1]", 'synthetic = ["a", 1]'):
        file.write_text(text)
        ran = cli("train", "classifier", "--config", file)
        assert ran.status == 2 and ran.error.startswith(f"{file}: synthetic: expected a list of strings, found ")


@pytest.mark.parametrize(
    ("name", "message"), [("none.toml", "no such configuration file"), ("", "not a readable TOML")]
)
def test_a_file_that_is_not_there(cli, tmp_path, name, message):
    ran = cli("sample", "--config", tmp_path / name)
    assert ran.status == 2 and message in ran.error
