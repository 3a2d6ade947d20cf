"""Generators of ``py:module:function``: what is taken from them, and whatever is wrong with them in one line."""

from __future__ import annotations

import itertools
import sys

import numpy as np
import pytest
import torch

from synthfast.artifacts import sha256_file
from synthfast.config import SampleConfig
from synthfast.data import ShardSet
from synthfast.errors import SynthfastError, UsageError
from synthfast.sampling import load_generator

CPU = torch.device("cpu")
NOISE = """
import torch
from synthfast import ops

class Noise:
    name, shape, classes = "noise", (4, 4, 3), 5

    def sample(self, index, labels, seed):
        x = ops.philox_normal_(torch.empty(len(index), 3, 4, 4), index, seed, ops.Stream.NOISE)
        return x * 0.1 + labels.view(-1, 1, 1, 1) * 0.4 - 0.8

def make(device):
    assert device.type == "cpu"
    return Noise()

class Unlabelled(Noise):
    classes = None
    def sample(self, index, labels, seed):
        assert labels is None
        return super().sample(index, index % 5, seed)

class WithFacts(Noise):
    fingerprint = "v1"
    facts = {"temperature": 0.5}

class Wrong(Noise):
    def sample(self, index, labels, seed):
        return super().sample(index, labels, seed)[:, :1]

class NaN(Noise):
    def sample(self, index, labels, seed):
        x = super().sample(index, labels, seed)
        x[index == 20] = float("nan")
        return x

class Array(Noise):
    def sample(self, index, labels, seed):
        return super().sample(index, labels, seed).numpy()

class Integers(Noise):
    def sample(self, index, labels, seed):
        return super().sample(index, labels, seed).to(torch.uint8)

class Bare:
    name, shape = "bare", (4, 4, 3)

class Flat(Noise):
    shape = (4, 4)

class NumPyClasses(Noise):
    import numpy
    classes = numpy.int64(5)

class Nameless(Noise):
    name = None

class Numbered(Noise):
    fingerprint = 7

class NaNFacts(Noise):
    facts = {"a": float("nan")}

class TensorFacts(Noise):
    facts = {"a": torch.zeros(1)}

class ListFacts(Noise):
    facts = ["a"]

class SeedFacts(Noise):
    facts = {"temperature": 1, "seed": 3}

class Raising(Noise):
    def sample(self, index, labels, seed):
        raise LookupError("two\\nlines")

class Frozen(Noise):
    __slots__ = ()
    def __setattr__(self, name, value):
        raise AttributeError(name)

def broken(device):
    return 1 / 0

def needs_more(device, path):
    return Noise()

def made_by_a_helper(device):
    import HELPER
    return Noise()

NUMBER = 3

for cls in (
    *(Unlabelled, WithFacts, Wrong, NaN, Array, Integers, Bare, Flat, NumPyClasses),
    *(Nameless, Numbered, NaNFacts, TensorFacts, ListFacts, SeedFacts, Raising, Frozen),
):
    globals()["make_" + cls.__name__.lower()] = lambda device, cls=cls: cls()
"""
_numbers = itertools.count()


@pytest.fixture
def module(tmp_path, monkeypatch) -> str:
    """The name of a module with generators, in the current folder and nowhere else."""
    name = f"generators_of_a_test_{next(_numbers)}"
    folder = tmp_path / "current"
    folder.mkdir()
    (folder / f"{name}.py").write_text(NOISE.replace("HELPER", f"{name}_helper"))
    (folder / f"{name}_helper.py").write_text("")
    (folder / f"{name}_wrong.py").write_text("def make(:")
    (folder / f"{name}_raising.py").write_text("raise OverflowError('too much')")
    monkeypatch.chdir(folder)
    yield name
    for suffix in ("", "_helper"):
        sys.modules.pop(name + suffix, None)


def test_a_python_generator_is_sampled(module, run, tmp_path):
    before = list(sys.path)
    folder = run(generator=f"py:{module}:make", n=23, shard_size=10)
    assert sys.path == before
    shards = ShardSet(folder)
    means = np.array([shards.read(np.flatnonzero(shards.labels == k)).mean() for k in range(5)])
    assert np.allclose(means, 127.5 + 127.5 * (np.arange(5) * 0.4 - 0.8), atol=3)
    assert np.array_equal(
        shards.read(np.arange(23)), ShardSet(run(generator=f"py:{module}:make", batch_size=3)).read(np.arange(23))
    )
    request = shards.manifest.request.values
    assert request["generator"] == {"name": "noise", "sha256": sha256_file(f"{module}.py")}
    assert "solver" not in request and (request["shape"], request["classes"]) == ([4, 4, 3], 5)


def test_a_python_generator_without_classes(module, run):
    assert ShardSet(run(generator=f"py:{module}:make_unlabelled")).labels is None


def test_a_generator_that_cannot_be_written_to(module, run):
    request = ShardSet(run(generator=f"py:{module}:make_frozen")).manifest.request.values
    assert request["generator"]["sha256"] == sha256_file(f"{module}.py")


def test_the_function_may_import_from_the_current_folder(module, monkeypatch):
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path not in ("", ".")])
    load_generator(SampleConfig(generator=f"py:{module}:made_by_a_helper"), CPU)
    assert f"{module}_helper" in sys.modules


def test_facts_cannot_hide_what_the_sampler_records(module, run, tmp_path):
    with pytest.raises(SynthfastError, match=r"^noise: its facts have the key 'seed', which the sampler uses; rename"):
        run(generator=f"py:{module}:make_seedfacts", out=str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("suffix", "message"), [("_wrong", "SyntaxError: "), ("_raising", "OverflowError: too much (/")]
)
def test_a_module_that_does_not_load_is_one_line(refused, module, suffix, message):
    spec = f"py:{module}{suffix}:make"
    found = refused(spec)
    assert found.startswith(f"--generator {spec}: {message}") and f"{module}{suffix}.py" in found


def test_fingerprint_and_facts_are_recorded(module, run):
    request = ShardSet(run(generator=f"py:{module}:make_withfacts")).manifest.request.values
    assert request["generator"]["sha256"] == "v1" and request["temperature"] == 0.5


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (
            "make_wrong",
            "noise: sample() must give a float tensor [8, 3, 4, 4], found torch.float32 [8, 1, 4, 4]; correct it",
        ),
        ("make_array", "noise: sample() must give a float tensor [8, 3, 4, 4], found ndarray; correct it"),
        ("make_integers", "noise: sample() must give a float tensor [8, 3, 4, 4], found torch.uint8 [8, 3, 4, 4]"),
        ("make_nan", "batch of image 16: expected finite pixels, found NaN or infinity"),
        ("make_raising", "--generator py:MODULE:make_raising: LookupError: two lines (/"),
    ],
)
def test_wrong_output_is_one_line_and_leaves_no_shard(module, run, tmp_path, function, message):
    out = tmp_path / "out"
    with pytest.raises(SynthfastError) as caught:
        run(generator=f"py:{module}:{function}", out=str(out))
    assert str(caught.value).startswith(message.replace("MODULE", module)) and "\n" not in str(caught.value)
    assert [path.name for path in out.iterdir()] == ["manifest.json"]


@pytest.mark.parametrize(
    ("spec", "kind", "message"),
    [
        ("py:", UsageError, "expected py:module:function"),
        ("py:MODULE", UsageError, "expected py:module:function"),
        ("py::make", UsageError, "expected py:module:function"),
        ("py:MODULE:", UsageError, "expected py:module:function"),
        ("py:MODULE:nothing", UsageError, "has no attribute 'nothing'"),
        ("py:MODULE_not:make", UsageError, "No module named"),
        ("py:MODULE:make_bare", SynthfastError, "what it returned lacks classes, sample"),
        ("py:MODULE:make_flat", SynthfastError, "expected three positive integers as shape (H, W, C), found (4, 4);"),
        (
            "py:MODULE:make_numpyclasses",
            SynthfastError,
            "expected a positive integer or None as classes, found ",
        ),
        ("py:MODULE:make_nameless", SynthfastError, "expected a string as name, found None; correct the generator"),
        ("py:MODULE:make_numbered", SynthfastError, "expected a string as fingerprint, found 7; correct the generator"),
        ("py:MODULE:make_nanfacts", SynthfastError, "expected a dictionary of JSON values as facts, found {'a': nan}"),
        ("py:MODULE:make_tensorfacts", SynthfastError, "expected a dictionary of JSON values as facts, found {'a': te"),
        ("py:MODULE:make_listfacts", SynthfastError, "expected a dictionary of JSON values as facts, found ['a']"),
        ("py:MODULE:broken", SynthfastError, "ZeroDivisionError: division by zero (/"),
        ("py:MODULE:NUMBER", SynthfastError, "TypeError: 'int' object is not callable (/"),
        ("py:MODULE:needs_more", SynthfastError, "TypeError: needs_more() missing 1 required positional argument"),
    ],
)
def test_what_is_no_generator_is_refused(refused, module, spec, kind, message):
    spec = spec.replace("MODULE", module)
    found = refused(spec, kind)
    assert found.startswith(f"--generator {spec}: ") and message in found


@pytest.mark.parametrize("options", [{"solver": "heun"}, {"steps": 3}, {"guidance": 1.0}, {"clip": 1.0}])
def test_solver_options_with_a_python_generator_are_refused(refused, module, options):
    flag = "--" + next(iter(options))
    assert refused(f"py:{module}:make", UsageError, **options).startswith(
        f"{flag}: py:{module}:make samples in its own way"
    )
