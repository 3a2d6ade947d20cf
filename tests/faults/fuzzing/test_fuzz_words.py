"""What is written on the command line and in TOML files, at random: it means something, or is refused in one line."""

from __future__ import annotations

import dataclasses
import os
from types import SimpleNamespace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from synthfast import config
from synthfast.config import make_config, number, read_toml, to_toml
from synthfast.data import open_images
from synthfast.data.transfer.splitting import part_sizes
from synthfast.distributed import pick_device
from synthfast.errors import SynthfastError, UsageError
from synthfast.evaluation.inflection import Plan
from synthfast.sampling.labels import LabelPlan
from synthfast.scoring.arc_grid import parse_radii
from synthfast.scoring.rank import parse_sources
from synthfast.training.gan import _policy

FUZZED = settings(
    max_examples=150 * int(os.environ.get("SYNTHFAST_SOAK", "1")),
    deadline=5000,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
CLASSES = [getattr(config, name) for name in config.__all__ if name.endswith("Config")]


def given_sizes(text: str) -> None:
    part_sizes(config.SplitConfig(source=("a",), sizes=text, out="b"), 100)


def plan(text: str) -> None:
    Plan.of(SimpleNamespace(methods="standard", counts=text, seeds=1), 1000)
    Plan.of(SimpleNamespace(methods=text, counts=None, seeds=1), 1000)


def a_number(text: str) -> None:
    try:
        number(text)
    except ValueError as error:  # whoever asks for the number says where it stands
        assert "\n" not in str(error) or "\n" in text


# What is parsed, and words of its language.
PARSERS = {
    "labels": (
        lambda text: LabelPlan.parse(text, 10),
        ("balanced", "uniform", "weights:", "3", ",", "0.1", "-1", "10"),
    ),
    "eps": (
        lambda text: parse_radii(text, "l2"),
        ("auto", "0", "0.5", ":", ",", "8/255", "1e9", "inf", "nan", "-1", "9"),
    ),
    "linf": (lambda text: parse_radii(text, "linf"), ("auto", "0", "8", ":", ",", "8/255", "1/0", "1e308", "99999999")),
    "number": (a_number, ("1", "/", "255", "e", "9", "-", ".", "inf", "nan", "_")),
    "counts": (plan, ("standard", "pgd", "trades", ",", "1000", "0", "-5", " ")),
    "sizes": (given_sizes, ("50", ",", "0.5", "1", "-1", "nan", "1e400", "99999999999999999999", "/")),
    "augment": (lambda text: _policy(text, (8, 8, 1)), ("none", ",", "color", "translation", "cutout")),
    "source": (
        open_images,
        ("digits", ":", "test", "folder:", "npz:", "shards:", "cifar-binary:", "/", "..", "a", "\0"),
    ),
    "generators": (lambda text: parse_sources([text, "b=b"]), ("a", "=", "/", ":", "py:", "..", "real", "b")),
    "device": (pick_device, ("cpu", "cuda", ":", "0", "99999999999999999999", "auto", "-")),
    "scores": (lambda text: config.SamplesConfig(synthetic="a", scores=text), ("density", ",", "memorization", " ")),
}


@pytest.mark.parametrize("name", PARSERS)
@given(data=st.data())
@FUZZED
def test_words(harmless, tmp_path, monkeypatch, name, data):
    """Words of each language in any order, and any text."""
    monkeypatch.chdir(tmp_path)
    parse, words = PARSERS[name]
    spoken = st.lists(st.sampled_from(words), max_size=8).map("".join)
    text = data.draw(st.one_of(spoken, spoken, spoken, st.text(max_size=30), st.sampled_from(("9" * 5000, "," * 5000))))
    with_lines = "\n" in text
    try:
        harmless(parse, text)
    except AssertionError:
        if not with_lines:  # a line break that was given may be said; the command line makes one line of it
            raise


LARGE = {
    "eps": ("0:1:999999999", "0:1:" + "9" * 30, "0:1e308:3", ",".join(["0.1"] * 10_000)),
    "linf": ("0:8:999999999", "9" * 400),
    "labels": (
        ",".join(["3"] * 100_000),
        "weights:" + ",".join(["1"] * 100_000),
        "weights:" + ",".join(["1e308"] * 10),
    ),
    "counts": (",".join(["9"] * 100_000), "9" * 4000),
    "sizes": (",".join(["1"] * 100_000), "9" * 4000, ",".join(["0.5"] * 3)),
    "source": ("digits:" + "x" * 100_000, "npz:" + "x" * 100_000, "x/" * 50_000),
    "generators": ("a" * 100_000 + "=b", "=" * 100_000),
    "scores": (",".join(["density"] * 100_000),),
}


@pytest.mark.parametrize("name", LARGE)
def test_large_words(harmless, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    for text in LARGE[name]:
        harmless(PARSERS[name][0], text)


def test_absurdly_many_parts(harmless):
    for parts in (101, 10**9, 10**18, 10**30):
        harmless(lambda parts=parts: part_sizes(config.SplitConfig(source=("a",), parts=parts, out="b"), 100))


TOML_WORDS = (
    *(
        "n = 3\n",
        "[a]\n",
        "[[a]]\n",
        "a.b = 1\n",
        "steps = ",
        '"x"\n',
        "'''",
        '"""',
        "1e400\n",
        "nan\n",
        "2024-01-01\n",
        "\0",
        "{",
    ),
    *(
        "[",
        "]",
        "}",
        "=",
        "\n",
        "# x",
        "\\u0000",
        "0x",
        "9" * 5000,
        "out",
        "generator = 'digits'\n",
        "seed = -1\n",
        "\ufeff",
    ),
)


@given(text=st.one_of(st.lists(st.sampled_from(TOML_WORDS), max_size=12).map("".join), st.text(max_size=60)))
@FUZZED
def test_toml(harmless, tmp_path, text):
    path = tmp_path / "a.toml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))

    def read() -> None:
        values = read_toml(path)
        for kind in (config.SampleConfig, config.ClassifierConfig):
            try:
                make_config(kind, values, str(path))
            except UsageError as error:
                assert "\n" not in repr(str(error))

    try:
        harmless(read)
    except AssertionError:
        with pytest.raises(SynthfastError):  # only what the file itself says, such as a key with a line break
            read()


@given(data=st.binary(max_size=80))
@FUZZED
def test_toml_of_any_bytes(harmless, tmp_path, data):
    (tmp_path / "a.toml").write_bytes(data)
    harmless(read_toml, tmp_path / "a.toml")


def test_nested_toml_is_one_line(harmless, tmp_path):
    for text in ("a = " + "[" * 100_000, "a." * 50_000 + "b = 1", "[" * 10_000, "a = '''" + "x" * 100_000):
        (tmp_path / "a.toml").write_text(text)
        harmless(read_toml, tmp_path / "a.toml")


@pytest.mark.parametrize("kind", CLASSES)
@given(data=st.data())
@FUZZED
def test_settings(fuzz, harmless, kind, data):
    """Values of any type for any key: a configuration that is accepted is also written and read back equal."""
    names = [field.name for field in dataclasses.fields(kind)]
    values = data.draw(st.dictionaries(st.sampled_from(names), fuzz.values, max_size=4))
    harmless(make_config, kind, values)
    try:
        made = make_config(kind, values)
    except UsageError:
        return
    text = to_toml(made)
    try:
        text.encode()
    except UnicodeEncodeError:  # a name with a lone surrogate, which TOML cannot say
        return
    back = make_config(kind, config.tomllib.loads(text))
    assert str(dataclasses.asdict(back)) == str(dataclasses.asdict(made))  # as text: nan is not equal to itself
