"""What ``--generator`` may name, and how what is broken is refused: in one line, before a folder is made."""

from __future__ import annotations

import itertools
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from synthfast import diffusion, ops
from synthfast.artifacts import sha256_file
from synthfast.config import SampleConfig
from synthfast.data import ShardSet
from synthfast.errors import SynthfastError, UsageError
from synthfast.sampling import load_generator

CPU = torch.device("cpu")


@pytest.fixture
def copy(checkpoints, tmp_path) -> Path:
    """A copy of the tiny checkpoint, to be broken."""
    return Path(shutil.copytree(checkpoints(), tmp_path / "copy"))


def refused(spec: object, kind: type[SynthfastError] = SynthfastError, **options: object) -> str:
    with pytest.raises(kind) as caught:
        load_generator(SampleConfig(generator=str(spec), **options), CPU)
    message = str(caught.value)
    assert "\n" not in message
    return message


def edit(path: Path, **values: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_a_checkpoint_is_a_generator(checkpoints):
    generator = load_generator(SampleConfig(generator=str(checkpoints())), CPU)
    assert (generator.name, generator.shape, generator.classes) == ("tiny edm", (8, 8, 1), 10)
    assert generator.fingerprint == sha256_file(checkpoints() / "model.safetensors")
    index = torch.tensor([5, 2**40])
    images = generator.sample(index, torch.tensor([0, 9]), 3)
    assert images.shape == (2, 1, 8, 8) and images.dtype == torch.float32
    swapped = generator.sample(index.flip(0), torch.tensor([9, 0]), 3)
    torch.testing.assert_close(swapped.flip(0), images, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", None, "has no config.json"),
        ("config.json", b"{,", "the checkpoint is not valid JSON"),
        ("config.json", b"[]", "the checkpoint must be a JSON object, found list"),
        ("config.json", b"\xff", "the checkpoint is not UTF-8 text"),
        ("model.safetensors", None, "no weights here"),
        ("model.safetensors", b"", "not a valid safetensors file"),
        ("model.safetensors", b"\x40" + bytes(7) + b"{" * 64, "not a valid safetensors file"),
    ],
)
def test_a_missing_or_broken_file_is_named(copy, name, content, message):
    (copy / name).unlink()
    if content is not None:
        (copy / name).write_bytes(content)
    found = refused(copy)
    assert message in found and str(copy) in found


def test_truncated_and_altered_weights_are_refused(copy):
    path = copy / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert refused(copy).startswith(f"{path}: not a valid safetensors file")
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert refused(copy).startswith(f"{path}: expected SHA-256")


@pytest.mark.parametrize(
    "values",
    [
        {"format": 2},
        {"kind": "classifier"},
        {"shape": [8, 8]},
        {"shape": [16, 16, 1]},
        {"shape": [8, 8, 3]},
        {"shape": "8x8"},
        {"shape": None},
        {"classes": "10"},
        {"classes": 20},
        {"classes": 0},
        {"classes": None},
        {"classes": 10.0},
        {"null_label": 11},
        {"null_label": 9},
        {"null_label": "10"},
        {"name": 3},
        {"unet": [1]},
        {"unet": None},
        {"unet": {}},
        {"parameterization": {"kind": "flow"}},
        {"parameterization": {"kind": "edm", "sigma_data": "half"}},
        {"parameterization": [1]},
        {"sampler": {"name": "rk4"}},
        {"sampler": {"name": "heun", "step": 3}},
        {"sampler": {"name": "heun", "steps": "3"}},
        {"sampler": [1]},
        {"sampler": None},
    ],
)
def test_a_configuration_that_cannot_be_is_refused(copy, values):
    edit(copy / "config.json", **values)
    assert any(word in refused(copy) for word in (str(copy), "parameterization"))


@pytest.mark.parametrize("key", ["name", "shape", "classes", "null_label", "unet", "parameterization", "sampler"])
def test_a_missing_key_is_named(copy, key):
    path = copy / "config.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != key}))
    assert refused(copy) == f"{path}: missing or wrong ('{key}'); train again"


def test_weights_of_another_architecture_are_refused(copy):
    header = json.loads((copy / "config.json").read_text())
    edit(copy / "config.json", unet={**header["unet"], "block_out_channels": [8, 24]})
    assert "do not fit the configuration beside them" in refused(copy)


def test_weights_that_are_not_finite_are_found_at_the_first_batch(copy, run):
    path = copy / "model.safetensors"
    weights = load_file(path)
    weights["conv_out.bias"][:] = float("nan")
    save_file(weights, path)
    edit(copy / "config.json", sha256=sha256_file(path))
    with pytest.raises(
        SynthfastError, match=r"^batch of image 0: expected finite pixels, found NaN or infinity; check"
    ):
        run(generator=str(copy))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("nowhere", "no model folder nowhere; expected a folder with config.json"),
        ("/dev/null", "/dev/null is a file"),
    ],
)
def test_a_name_of_nothing_is_refused(spec, message):
    assert refused(spec).startswith(message)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "--steps 0: expected a whole number of at least 1"),
        ({"solver": "ddim", "eta": 1.5}, "--eta 1.5: expected a number from 0 to 1"),
        ({"solver": "ddim", "eta": -0.5}, "--eta -0.5: expected"),
        ({"eta": 0.5}, "--eta 0.5: expected --solver ddim with it, found dpmpp-2m"),
        ({"churn": 1.0}, "--churn 1.0: expected --solver euler or heun with it, found dpmpp-2m"),
        ({"solver": "heun", "churn": -1.0}, "--churn -1.0: expected"),
        ({"solver": "heun", "s_tmin": -1.0}, "--s-tmin -1.0: expected"),
        ({"solver": "heun", "s_tmin": 2.0, "s_tmax": 1.0}, "--s-tmax 1.0: expected a number of at least --s-tmin 2.0"),
        ({"solver": "heun", "s_noise": -1.0}, "--s-noise -1.0: expected"),
        ({"variance": "fixed_large"}, "--variance fixed_large: expected --solver ddpm with it, found dpmpp-2m"),
        ({"spacing": "leading"}, "--spacing leading: expected karras, because an EDM model has no timesteps"),
        ({"rho": 0.0}, "--rho 0.0: expected a positive number"),
        ({"sigma_min": 0.0}, "--sigma-min 0.0: expected a positive number"),
        ({"sigma_min": 90.0}, "--sigma-min 90: expected less than --sigma-max 80"),
        ({"sigma_max": -1.0}, "--sigma-max -1.0: expected a positive number"),
        ({"clip": 0.0}, "--clip 0.0: expected a positive number, or inf for no clipping"),
    ],
)
def test_a_bad_solver_option_is_named(checkpoints, options, message):
    assert refused(checkpoints(), UsageError, **options).startswith(message)


def test_more_steps_than_timesteps_are_refused(checkpoints):
    assert refused(checkpoints("vp"), UsageError, steps=1001).startswith("--steps 1001: expected")


# Model folders of diffusers.


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> tuple[Path, object]:
    """A pipeline folder as diffusers saves it (unet/, scheduler/), and its network."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    network = diffusers.UNet2DModel(
        sample_size=8,
        in_channels=3,
        out_channels=3,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=8,
    ).eval()
    folder = tmp_path_factory.mktemp("diffusers")
    scheduler = diffusers.DDPMScheduler(num_train_timesteps=200, beta_schedule="squaredcos_cap_v2")
    diffusers.DDPMPipeline(unet=network, scheduler=scheduler).save_pretrained(folder)
    return folder, network


def flat(pipeline: Path, folder: Path) -> Path:
    """The layout of google/ddpm-cifar10-32: everything in one folder."""
    shutil.copytree(pipeline / "unet", folder)
    shutil.copy(pipeline / "scheduler" / "scheduler_config.json", folder)
    return folder


@pytest.mark.parametrize("layout", ["pipeline", "unet of a pipeline", "flat"])
def test_a_diffusers_folder_is_sampled_as_its_network_would_be(saved, run, tmp_path, layout):
    pipeline, network = saved
    folder = {"pipeline": pipeline, "unet of a pipeline": pipeline / "unet"}.get(layout) or flat(
        pipeline, tmp_path / "f"
    )
    samples = ShardSet(run(generator=str(folder), n=6, solver="ddim", steps=5))
    parameterization = diffusion.VP(timesteps=200, schedule="squaredcos_cap_v2", spacing="leading")
    table = diffusion.make_table(parameterization, diffusion.SolverConfig("ddim", steps=5))
    index = torch.arange(6)
    expected = diffusion.sample(lambda x, t, labels: network(x, t).sample, table, index, shape=(3, 8, 8), seed=0)
    off = np.abs(samples.read(np.arange(6)).astype(int) - ops.quantize_uint8(expected).numpy())
    assert samples.labels is None and off.max() <= 1 and (off > 0).mean() < 0.01
    assert expected.std() > 0.1


def test_weights_of_a_diffusers_folder_are_in_the_manifest(saved, run, tmp_path):
    folder = flat(saved[0], tmp_path / "flat")
    out = run(generator=str(folder), n=2, steps=1)
    weights = load_file(folder / "diffusion_pytorch_model.safetensors")
    weights["conv_out.bias"] += 0.1
    save_file(weights, folder / "diffusion_pytorch_model.safetensors")
    with pytest.raises(UsageError, match=r"^--generator \(its weights\): "):
        run(generator=str(folder), n=2, steps=1, out=str(out))


def test_a_folder_without_a_noise_schedule_is_refused(saved, tmp_path):
    folder = Path(shutil.copytree(saved[0] / "unet", tmp_path / "alone"))
    assert refused(folder).startswith(f"{folder}: no scheduler_config.json")


def test_pickled_weights_need_permission(saved, run, tmp_path):
    folder = flat(saved[0], tmp_path / "flat")
    expected = ShardSet(run(generator=str(folder), n=4, steps=2)).read(np.arange(4))
    safetensors = folder / "diffusion_pytorch_model.safetensors"
    torch.save(load_file(safetensors), folder / "diffusion_pytorch_model.bin")
    safetensors.unlink()
    assert "pass --allow-pickle" in refused(folder)
    allowed = run(generator=str(folder), n=4, steps=2, allow_pickle=True)
    assert np.array_equal(ShardSet(allowed).read(np.arange(4)), expected)


def test_broken_diffusers_weights_are_one_line(saved, tmp_path):
    folder = flat(saved[0], tmp_path / "flat")
    path = folder / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    assert refused(folder).startswith(f"{path}: not a valid safetensors file")
    path.unlink()
    assert refused(folder).startswith(f"{folder} has no diffusion_pytorch_model.safetensors")


# Generators in Python.

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
def test_a_module_that_does_not_load_is_one_line(module, suffix, message):
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
def test_what_is_no_generator_is_refused(module, spec, kind, message):
    spec = spec.replace("MODULE", module)
    found = refused(spec, kind)
    assert found.startswith(f"--generator {spec}: ") and message in found


@pytest.mark.parametrize("options", [{"solver": "heun"}, {"steps": 3}, {"guidance": 1.0}, {"clip": 1.0}])
def test_solver_options_with_a_python_generator_are_refused(module, options):
    flag = "--" + next(iter(options))
    assert refused(f"py:{module}:make", UsageError, **options).startswith(
        f"{flag}: py:{module}:make samples in its own way"
    )
