"""Equality with diffusers, and reading its model folders."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from synthfast.errors import SynthfastError
from synthfast.models import (
    UNet2D,
    UNet2DConfig,
    load_diffusers_unet,
    read_scheduler_config,
    resolve_model_folder,
    small_unet_config,
)

WEIGHTS = "diffusion_pytorch_model.safetensors"

# As published in google/ddpm-cifar10-32.
DDPM_CIFAR10 = {
    "_class_name": "UNet2DModel",
    "_diffusers_version": "0.0.4",
    "act_fn": "silu",
    "attention_head_dim": None,
    "block_out_channels": [128, 256, 256, 256],
    "center_input_sample": False,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"],
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "in_channels": 3,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-06,
    "norm_num_groups": 32,
    "out_channels": 3,
    "sample_size": 32,
    "time_embedding_type": "positional",
    "up_block_types": ["UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
}
CONDITIONAL = {
    "sample_size": 16,
    "block_out_channels": [32, 48, 64],
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
    "layers_per_block": 1,
    "attention_head_dim": 16,
    "norm_num_groups": 8,
    "resnet_time_scale_shift": "scale_shift",
    "downsample_type": "resnet",
    "upsample_type": "resnet",
    "num_class_embeds": 7,
    "act_fn": "mish",
}
FOURIER = {
    "sample_size": [8, 16],
    "in_channels": 1,
    "out_channels": 2,
    "time_embedding_type": "fourier",
    "block_out_channels": [16, 32],
    "down_block_types": ["AttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "AttnUpBlock2D"],
    "layers_per_block": 2,
    "attention_head_dim": 8,
    "norm_num_groups": 8,
    "add_attention": False,
    "center_input_sample": True,
    "mid_block_scale_factor": 1.5,
    "act_fn": "gelu",
}
ODD = {
    "sample_size": 8,
    "block_out_channels": [15, 30],
    "norm_num_groups": 5,
    "attn_norm_num_groups": 10,
    "attention_head_dim": 8,  # does not divide the channels: 3 heads, 24 of 30
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
    "mid_block_scale_factor": 2.0,
    "class_embed_type": "timestep",
    "freq_shift": 0.5,
    "act_fn": "relu",
}
NO_MID = {**CONDITIONAL, "mid_block_type": None, "class_embed_type": "identity", "num_class_embeds": None}
SCALED = {**CONDITIONAL, "attn_norm_num_groups": 16, "time_embedding_dim": 40, "downsample_type": "conv"}
CONFIGS = {
    "ddpm-cifar10": DDPM_CIFAR10,
    "conditional": CONDITIONAL,
    "fourier": FOURIER,
    "odd": ODD,
    "no-mid": NO_MID,
    "scaled": SCALED,
    "preset-digits": small_unet_config(8, 1, 10).to_dict(),
    "preset-28": small_unet_config(28, 1, None).to_dict(),
}


def public(values: dict) -> dict:
    return {key: value for key, value in values.items() if not key.startswith("_")}


def random_like(state: dict, seed: int = 0) -> dict:
    """Weights of about the default size, biases and norms not at 0 and 1, so that a swapped pair shows."""
    generator = torch.Generator().manual_seed(seed)
    drawn = {}
    for key, value in state.items():
        noise = torch.randn(value.shape, generator=generator)
        if value.ndim > 1:
            drawn[key] = noise / value[0].numel() ** 0.5
        else:
            drawn[key] = 0.2 * noise + (1.0 if "norm" in key and key.endswith("weight") else 0.0)
    return drawn


def their_model(values: dict):
    diffusers = pytest.importorskip("diffusers")
    model = diffusers.UNet2DModel(**public(values)).eval()
    model.load_state_dict(random_like(model.state_dict()))
    return model


def labels_for(config: UNet2DConfig, n: int):
    if not config.takes_labels:
        return None
    if config.class_embed_type == "identity":
        return torch.randn(n, config.embedding_dim, generator=torch.Generator().manual_seed(3))
    return torch.arange(n) % (config.num_class_embeds or 4)


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_output_equals_that_of_diffusers(name):
    theirs = their_model(CONFIGS[name])
    config = UNet2DConfig.from_dict(CONFIGS[name])
    ours = UNet2D(config).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    n = 2
    size = config.sample_size if isinstance(config.sample_size, tuple) else (config.sample_size,) * 2
    x = torch.randn(n, config.in_channels, *size, generator=torch.Generator().manual_seed(2))
    labels = labels_for(config, n)
    # Continuous times, and a whole one for all; a Fourier network divides its output by the time.
    late = 3 if config.time_embedding_type == "fourier" else 801
    for t in (torch.tensor([0.37, late + 0.6]), torch.tensor(late)):
        expected = theirs(x, t, labels).sample
        assert expected.std() > 0.05
        assert (ours(x, t, labels) - expected).abs().max() < 1e-4
    if name == "ddpm-cifar10":
        assert ours.num_parameters == 35_746_307


def test_preset_for_32x32_colour_is_the_published_network():
    preset = small_unet_config(32, 3, None).to_dict()
    assert {key: preset[key] for key in public(DDPM_CIFAR10)} == public(DDPM_CIFAR10)


@pytest.mark.parametrize("name", CONFIGS)
def test_config_round_trip_through_diffusers(name, tmp_path):
    diffusers = pytest.importorskip("diffusers")
    config = UNet2DConfig.from_dict(CONFIGS[name])
    with torch.device("meta"):
        model = diffusers.UNet2DModel(**config.to_dict())
    model.save_config(tmp_path)
    assert UNet2DConfig.from_dict(json.loads((tmp_path / "config.json").read_text())) == config


@pytest.fixture
def small():
    torch.manual_seed(0)
    return UNet2D(UNet2DConfig.from_dict(CONDITIONAL)).eval()


def save(model: UNet2D, folder, rename=lambda key: key) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"_class_name": "UNet2DModel", **model.config.to_dict()}))
    save_file({rename(k): v.contiguous() for k, v in model.state_dict().items()}, folder / WEIGHTS)


def assert_same_weights(loaded: UNet2D, original: UNet2D) -> None:
    expected = original.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[key]) for key, value in loaded.state_dict().items())
    assert loaded.config == original.config


@pytest.mark.parametrize("max_shard_size", ["1GB", "300KB"])
@torch.no_grad()
def test_folder_saved_by_diffusers(tmp_path, max_shard_size):
    theirs = their_model(FOURIER)
    theirs.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    assert (tmp_path / (WEIGHTS + ".index.json")).exists() == (max_shard_size == "300KB")
    state = torch.random.get_rng_state()
    ours = load_diffusers_unet(tmp_path)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not ours.training
    assert ours.conv_in.weight.requires_grad and not ours.time_proj.weight.requires_grad
    assert ours.conv_out.weight.is_contiguous(memory_format=torch.channels_last)
    x, t = torch.randn(2, 1, 8, 16), torch.tensor([0.5, 30.0])
    assert (ours(x, t) - theirs(x, t).sample).abs().max() < 1e-4


@torch.no_grad()
def test_pipeline_folder_saved_by_diffusers(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    theirs = their_model(FOURIER)
    scheduler = diffusers.DDPMScheduler(num_train_timesteps=77)
    diffusers.DDPMPipeline(unet=theirs, scheduler=scheduler).save_pretrained(tmp_path)
    folder = resolve_model_folder(tmp_path)
    assert folder == tmp_path / "unet"
    assert read_scheduler_config(folder)["num_train_timesteps"] == 77
    x, t = torch.randn(2, 1, 8, 16), torch.tensor([0.5, 30.0])
    assert (load_diffusers_unet(tmp_path)(x, t) - theirs(x, t).sample).abs().max() < 1e-4


def test_folder_written_here_is_read_by_diffusers(small, tmp_path):
    diffusers = pytest.importorskip("diffusers")
    save(small, tmp_path)
    theirs = diffusers.UNet2DModel.from_pretrained(tmp_path)
    expected = small.state_dict()
    assert theirs.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[key]) for key, value in theirs.state_dict().items())


def old_name(key: str) -> str:
    for new, old in {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}.items():
        key = key.replace(f".{new}.", f".{old}.")
    return key


def test_old_attention_names(small, tmp_path):
    save(small, tmp_path, rename=old_name)
    stored = load_file(tmp_path / WEIGHTS)
    assert "mid_block.attentions.0.query.weight" in stored and not any(".to_" in key for key in stored)
    assert_same_weights(load_diffusers_unet(tmp_path), small)


def test_dtype(small, tmp_path):
    save(small.half(), tmp_path)
    assert load_diffusers_unet(tmp_path).conv_in.weight.dtype == torch.float32
    low = load_diffusers_unet(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in low.parameters()} == {torch.bfloat16}
    assert low.conv_in.weight.is_contiguous(memory_format=torch.channels_last)

    fourier = UNet2D(UNet2DConfig.from_dict(FOURIER))
    save(fourier, tmp_path / "fourier")
    low = load_diffusers_unet(tmp_path / "fourier", dtype=torch.bfloat16)
    assert torch.equal(low.time_proj.weight, fourier.time_proj.weight), "frequencies must stay exact"


def drop(weights):
    del weights["conv_in.weight"], weights["conv_in.bias"]


def add(weights):
    weights["extra.weight"] = torch.zeros(1)


def reshape(weights):
    weights["conv_in.weight"] = torch.zeros(3, 3)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (drop, r"2 of \d+ missing, first conv_in.weight"),
        (add, r"1 of \d+ unexpected, first extra.weight"),
        (
            reshape,
            r"1 of \d+ of another shape, first conv_in.weight \(expected \[32, 3, 3, 3\], found \[3, 3\]\)",
        ),
    ],
)
def test_weights_that_do_not_fit(small, tmp_path, damage, words):
    save(small, tmp_path)
    weights = load_file(tmp_path / WEIGHTS)
    damage(weights)
    save_file(weights, tmp_path / WEIGHTS)
    assert_one_line(words, load_diffusers_unet, tmp_path)


def assert_one_line(words, function, *args, **kwargs):
    with pytest.raises(SynthfastError, match=words) as error:
        function(*args, **kwargs)
    assert "\n" not in str(error.value)


def test_damaged_and_missing_files(small, tmp_path):
    assert_one_line("no model folder", load_diffusers_unet, tmp_path / "nowhere")
    assert_one_line("no config.json", load_diffusers_unet, tmp_path)
    (tmp_path / "config.json").write_text("{")
    assert_one_line("not valid JSON", load_diffusers_unet, tmp_path)
    (tmp_path / "config.json").write_text("[]")
    assert_one_line("must be a JSON object", load_diffusers_unet, tmp_path)
    (tmp_path / "config.json").write_text('{"_class_name": "UNet2DConditionModel"}')
    assert_one_line("UNet2DConditionModel", load_diffusers_unet, tmp_path)
    assert_one_line("is a file", load_diffusers_unet, tmp_path / "config.json")

    save(small, tmp_path)
    whole = (tmp_path / WEIGHTS).read_bytes()
    (tmp_path / WEIGHTS).write_bytes(whole[: len(whole) // 2])
    assert_one_line("not a valid safetensors file", load_diffusers_unet, tmp_path)
    (tmp_path / WEIGHTS).unlink()
    assert_one_line(f"has no {WEIGHTS}", load_diffusers_unet, tmp_path)
    index = tmp_path / (WEIGHTS + ".index.json")
    index.write_text("{}")
    assert_one_line("no weight_map", load_diffusers_unet, tmp_path)
    index.write_text('{"weight_map": {"conv_in.weight": 1}}')
    assert_one_line("no weight_map", load_diffusers_unet, tmp_path)
    index.write_text('{"weight_map": {"conv_in.weight": "../other.safetensors"}}')
    assert_one_line("same folder", load_diffusers_unet, tmp_path)
    index.write_text('{"weight_map": {"conv_in.weight": "other.safetensors"}}')
    assert_one_line("no weights here", load_diffusers_unet, tmp_path)


class Unsafe:
    def __reduce__(self):
        return print, ("code in a pickle ran",)


def test_pickled_weights(small, tmp_path, capfd):
    save(small, tmp_path)
    (tmp_path / WEIGHTS).unlink()
    pickled = tmp_path / "diffusion_pytorch_model.bin"
    torch.save(small.state_dict(), pickled)
    assert_one_line("pickles, which are refused.*--allow-pickle", load_diffusers_unet, tmp_path)
    assert_same_weights(load_diffusers_unet(tmp_path, allow_pickle=True), small)
    torch.save({"conv_in.weight": Unsafe()}, pickled)
    assert_one_line("not a file of plain tensors", load_diffusers_unet, tmp_path, allow_pickle=True)
    torch.save([1, 2], pickled)
    assert_one_line("expected a dictionary of tensors", load_diffusers_unet, tmp_path, allow_pickle=True)
    pickled.write_bytes(b"not a pickle")
    assert_one_line("not a file of plain tensors", load_diffusers_unet, tmp_path, allow_pickle=True)
    assert "code in a pickle ran" not in capfd.readouterr().out


def test_scheduler_config(tmp_path):
    folder = tmp_path / "unet"
    folder.mkdir()
    assert read_scheduler_config(folder) is None
    for place, value in ((tmp_path / "scheduler", 1), (folder / "scheduler", 2), (folder, 3)):
        place.mkdir(exist_ok=True)
        (place / "scheduler_config.json").write_text(json.dumps({"steps": value}))
        assert read_scheduler_config(folder) == {"steps": value}
    (folder / "scheduler_config.json").write_text("nonsense")
    assert_one_line("not valid JSON", read_scheduler_config, folder)


def test_hub_id_is_downloaded_without_pickles(small, tmp_path, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    asked = []

    def snapshot_download(repo_id, allow_patterns):
        asked.append((repo_id, allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr(hub, "snapshot_download", snapshot_download)
    save(small, tmp_path / "unet")
    assert_same_weights(load_diffusers_unet("someone/some-model"), small)
    assert resolve_model_folder("someone/some-model", allow_pickle=True) == tmp_path / "unet"
    (name, safe), (_, pickles) = asked
    assert name == "someone/some-model"
    assert "unet/" + WEIGHTS in safe and WEIGHTS in safe and "scheduler/scheduler_config.json" in safe
    assert not any(pattern.endswith((".bin", "*")) for pattern in safe)
    assert "diffusion_pytorch_model.bin" in pickles


def test_hub_without_network_or_library(monkeypatch):
    hub = pytest.importorskip("huggingface_hub")

    def offline(repo_id, allow_patterns):
        raise hub.errors.LocalEntryNotFoundError("cannot reach the hub\nand a second line")

    monkeypatch.setattr(hub, "snapshot_download", offline)
    assert_one_line("cannot reach the hub.*download the model elsewhere", load_diffusers_unet, "someone/some-model")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert_one_line("pip install huggingface_hub", load_diffusers_unet, "someone/some-model")
    assert_one_line("no model folder", load_diffusers_unet, "./someone/some-model")
