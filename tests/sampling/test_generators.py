"""What ``--generator`` may name, and how what is broken is refused: in one line, before a folder is made."""

from __future__ import annotations

import json
import shutil
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
def test_a_missing_or_broken_file_is_named(refused, copy, name, content, message):
    (copy / name).unlink()
    if content is not None:
        (copy / name).write_bytes(content)
    found = refused(copy)
    assert message in found and str(copy) in found


def test_truncated_and_altered_weights_are_refused(refused, copy):
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
def test_a_configuration_that_cannot_be_is_refused(refused, copy, values):
    edit(copy / "config.json", **values)
    assert any(word in refused(copy) for word in (str(copy), "parameterization"))


@pytest.mark.parametrize("key", ["name", "shape", "classes", "null_label", "unet", "parameterization", "sampler"])
def test_a_missing_key_is_named(refused, copy, key):
    path = copy / "config.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != key}))
    assert refused(copy) == f"{path}: missing or wrong ('{key}'); train again"


def test_weights_of_another_architecture_are_refused(refused, copy):
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
def test_a_name_of_nothing_is_refused(refused, spec, message):
    assert refused(spec).startswith(message)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "--steps 0: expected a whole number from 1 to 100000"),
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
def test_a_bad_solver_option_is_named(refused, checkpoints, options, message):
    assert refused(checkpoints(), UsageError, **options).startswith(message)


def test_more_steps_than_timesteps_are_refused(refused, checkpoints):
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


def test_a_folder_without_a_noise_schedule_is_refused(refused, saved, tmp_path):
    folder = Path(shutil.copytree(saved[0] / "unet", tmp_path / "alone"))
    assert refused(folder).startswith(f"{folder}: no scheduler_config.json")


def test_pickled_weights_need_permission(refused, saved, run, tmp_path):
    folder = flat(saved[0], tmp_path / "flat")
    expected = ShardSet(run(generator=str(folder), n=4, steps=2)).read(np.arange(4))
    safetensors = folder / "diffusion_pytorch_model.safetensors"
    torch.save(load_file(safetensors), folder / "diffusion_pytorch_model.bin")
    safetensors.unlink()
    assert "pass --allow-pickle" in refused(folder)
    allowed = run(generator=str(folder), n=4, steps=2, allow_pickle=True)
    assert np.array_equal(ShardSet(allowed).read(np.arange(4)), expected)


def test_broken_diffusers_weights_are_one_line(refused, saved, tmp_path):
    folder = flat(saved[0], tmp_path / "flat")
    path = folder / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    assert refused(folder).startswith(f"{path}: not a valid safetensors file")
    path.unlink()
    assert refused(folder).startswith(f"{folder} has no diffusion_pytorch_model.safetensors")
