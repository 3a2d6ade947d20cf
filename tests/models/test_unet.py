"""The U-Net by itself: shapes, memory layout, number types, compilation, initialisation, presets."""

from __future__ import annotations

import copy
import dataclasses
import json

import pytest
import torch
from torch import nn

from synthfast.errors import SynthfastError, UsageError
from synthfast.models import UNet2D, UNet2DConfig, small_unet_config

TINY = UNet2DConfig(
    sample_size=8,
    in_channels=2,
    out_channels=2,
    down_block_types=("DownBlock2D", "AttnDownBlock2D"),
    up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    block_out_channels=(8, 16),
    layers_per_block=1,
    attention_head_dim=8,
    norm_num_groups=4,
    num_class_embeds=5,
)
FOURIER = dataclasses.replace(TINY, time_embedding_type="fourier", num_class_embeds=None)
RICH = dataclasses.replace(
    TINY,
    resnet_time_scale_shift="scale_shift",
    downsample_type="resnet",
    upsample_type="resnet",
    attn_norm_num_groups=4,
    mid_block_scale_factor=2.0,
)


def build(config: UNet2DConfig = TINY) -> UNet2D:
    torch.manual_seed(0)
    return UNet2D(config).eval()


def batch(n: int = 3, size: tuple[int, int] = (8, 8), channels: int = 2):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, channels, *size, generator=generator)
    t = torch.rand(n, generator=generator) * 999 + 1
    return x, t, torch.arange(n) % 5


@torch.no_grad()
def test_one_time_for_all_equals_the_same_time_for_each():
    model = build()
    x, _, labels = batch()
    each = model(x, torch.full((3,), 17.25), labels)
    for t in (17.25, torch.tensor(17.25), torch.tensor([17.25]), torch.tensor(17.25, dtype=torch.float64)):
        torch.testing.assert_close(model(x, t, labels), each, rtol=0, atol=1e-5)
    torch.testing.assert_close(model(x, 17, labels), model(x, torch.tensor(17), labels))
    assert (model(x, 17, labels) - each).abs().max() > 1e-4, "the fraction of a continuous time is lost"


@torch.no_grad()
def test_sample_depends_on_its_own_inputs_only():
    model = build()
    x, t, labels = batch(4)
    whole = model(x, t, labels)
    parts = torch.cat([model(x[i : i + 1], t[i], labels[i : i + 1]) for i in range(4)])
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-5)
    assert model(x[:0], t[:0], labels[:0]).shape == (0, 2, 8, 8)
    assert (model(x, t, (labels + 1) % 5) - whole).abs().max() > 1e-3, "labels make no difference"


@pytest.mark.parametrize("config", [TINY, RICH, FOURIER], ids=["tiny", "rich", "fourier"])
@torch.no_grad()
def test_memory_stays_channels_last(config):
    model = build(config)
    found = {}

    def is_channels_last(tensor):
        return tensor.is_contiguous(memory_format=torch.channels_last)

    for name, module in model.named_modules():
        if isinstance(module, (nn.Conv2d, nn.GroupNorm)):
            module.register_forward_pre_hook(
                lambda module, inputs, name=name: found.update({name: is_channels_last(inputs[0])})
            )
    x, t, labels = batch()
    labels = labels if config.takes_labels else None
    out = model(x, t, labels)
    assert len(found) > 20
    assert not [name for name, ok in found.items() if not ok]
    assert all(is_channels_last(p) for p in model.parameters() if p.ndim == 4)
    assert is_channels_last(out)
    torch.testing.assert_close(out, model(x.contiguous(memory_format=torch.channels_last), t, labels))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("config", [TINY, RICH, FOURIER], ids=["tiny", "rich", "fourier"])
@torch.no_grad()
def test_half_precision_weights_and_autocast(config, dtype):
    model = build(config)
    x, t, labels = batch()
    labels = labels if config.takes_labels else None
    exact = model(x, t, labels)
    half = copy.deepcopy(model).to(dtype)
    low = half(x, t, labels)
    assert low.dtype == torch.float32, "the output has the type of the input, not of the weights"
    assert half(x.to(dtype), t, labels).dtype == dtype
    with torch.autocast("cpu", dtype=dtype):
        mixed = model(x, t, labels)
    tolerance = 0.1 * exact.abs().max() if dtype == torch.bfloat16 else 0.02 * exact.abs().max()
    assert (low - exact).abs().max() < tolerance
    assert (mixed - exact).abs().max() < tolerance


def test_time_frequencies_stay_exact_in_half_precision():
    model = build(FOURIER)
    exact = model.time_proj.weight.clone()
    assert torch.equal(model.to(torch.bfloat16).time_proj.weight, exact)
    assert torch.equal(model.half().float().time_proj.weight, exact)
    # The sinusoid of a large time needs float32: neighbouring times are equal in bfloat16.
    positional = build().to(torch.bfloat16)
    assert not torch.equal(positional.time_proj(torch.tensor([998.0])), positional.time_proj(torch.tensor([999.0])))


@pytest.mark.parametrize("config", [TINY, RICH], ids=["tiny", "rich"])
def test_gradient_reaches_every_parameter(config):
    model = build(config).train()
    x, t, labels = batch(5)
    model(x, t, labels).square().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        # A constant added to all keys changes no softmax, so that gradient alone is zero by nature.
        if not name.endswith("to_k.bias"):
            assert parameter.grad.abs().max() > 0, name


def test_gradient_is_that_of_finite_differences():
    model = build(RICH).double()
    x, t, labels = batch(1, size=(2, 2))
    x = x.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: model(x, t, labels), (x,), fast_mode=True)


@pytest.mark.parametrize("config", [TINY, RICH, FOURIER], ids=["tiny", "rich", "fourier"])
def test_compiles_as_one_graph(config):
    torch._dynamo.reset()
    model = build(config)
    x, t, labels = batch()
    labels = labels if config.takes_labels else None
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, t, labels), model(x, t, labels), rtol=0, atol=1e-5)
    with torch._dynamo.config.patch(error_on_recompile=True):
        torch.testing.assert_close(compiled(x, t / 2, labels), model(x, t / 2, labels), rtol=0, atol=1e-5)


def test_init_weights_depends_on_its_seed_alone():
    torch.manual_seed(1)
    first = UNet2D(FOURIER).init_weights(7).state_dict()
    state = torch.random.get_rng_state()
    model = UNet2D(FOURIER)
    torch.random.set_rng_state(state)
    second = model.init_weights(7).state_dict()
    assert torch.equal(torch.random.get_rng_state(), state), "init_weights used the global generator"
    assert all(torch.equal(first[key], second[key]) for key in first)
    other = UNet2D(FOURIER).init_weights(8).state_dict()
    assert not torch.equal(first["conv_in.weight"], other["conv_in.weight"])
    assert not torch.equal(first["time_proj.weight"], other["time_proj.weight"])
    assert first["conv_in.weight"].is_contiguous(memory_format=torch.channels_last)


def test_zero_init_starts_from_zero_and_can_be_trained():
    model = UNet2D(TINY).init_weights(0)
    x, t, labels = batch()
    assert torch.equal(model(x, t, labels), torch.zeros_like(x))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(12):
        loss = (model(x, t, labels) - x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert all(p.abs().max() > 0 for name, p in model.named_parameters() if name.endswith("conv2.weight"))


@pytest.mark.parametrize(
    ("shape", "labels", "words"),
    [
        ((2, 3, 8, 8), torch.zeros(2, dtype=torch.int64), "[N, 2, H, W]"),
        ((2, 2, 8, 7), torch.zeros(2, dtype=torch.int64), "multiples of 2"),
        ((2, 2, 8, 8), None, "needs a label"),
        ((2, 2, 8, 8), torch.zeros(3, dtype=torch.int64), "one label for each of 2"),
    ],
)
def test_inputs_that_do_not_fit(shape, labels, words):
    with pytest.raises(SynthfastError, match=words.replace("[", r"\[")) as error:
        build()(torch.zeros(shape), 1.0, labels)
    assert "\n" not in str(error.value)


def test_labels_for_an_unconditional_model_and_wrong_times():
    with pytest.raises(SynthfastError, match="takes no labels"):
        build(FOURIER)(torch.zeros(2, 2, 8, 8), 1.0, torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match="t must be"):
        build(FOURIER)(torch.zeros(2, 2, 8, 8), torch.ones(3))


@pytest.mark.parametrize("config", [TINY, FOURIER, RICH, UNet2DConfig(sample_size=(16, 24))])
def test_config_round_trip(config):
    through_json = json.loads(json.dumps(config.to_dict()))
    assert UNet2DConfig.from_dict(through_json) == config
    assert UNet2DConfig.from_dict({**through_json, "_class_name": "UNet2DModel", "_anything": 1}) == config


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"down_block_types": ["SkipDownBlock2D", "DownBlock2D"]}, "SkipDownBlock2D.*AttnDownBlock2D"),
        ({"up_block_types": ["UpBlock2D"]}, "up_block_types.*2 entries"),
        ({"block_out_channels": "8"}, "block_out_channels.*list"),
        ({"block_out_channels": [8, 18]}, "18.*multiples of norm_num_groups"),
        ({"time_embedding_type": "learned"}, "learned.*positional or fourier"),
        ({"act_fn": "tanh"}, "tanh.*silu"),
        ({"mid_block_type": "UNetMidBlock2DCrossAttn"}, "mid_block_type"),
        ({"downsample_type": None}, "downsample_type"),
        ({"downsample_padding": 2}, "downsample_padding"),
        ({"class_embed_type": "projection"}, "class_embed_type"),
        ({"class_embed_type": "timestep", "time_embedding_type": "fourier"}, "class_embed_type"),
        ({"resnet_time_scale_shift": "spatial"}, "spatial"),
        ({"attention_head_dim": 32}, "attention_head_dim"),
        ({"attention_head_dim": 0}, "attention_head_dim"),
        ({"attn_norm_num_groups": 3}, "attn_norm_num_groups"),
        ({"layers_per_block": True}, "layers_per_block"),
        ({"norm_num_groups": None}, "norm_num_groups"),
        ({"sample_size": [8]}, "sample_size"),
        ({"dropout": 1.0}, "dropout"),
        ({"norm_eps": 0}, "norm_eps"),
        ({"mid_block_scale_factor": 0}, "mid_block_scale_factor"),
        ({"freq_shift": "1"}, "freq_shift"),
        ({"add_attention": 1}, "add_attention"),
        ({"cross_attention_dim": 768}, "cross_attention_dim.*supported"),
    ],
)
def test_unsupported_config(change, words):
    with pytest.raises(SynthfastError, match=words) as error:
        UNet2DConfig.from_dict({**TINY.to_dict(), **change})
    assert "\n" not in str(error.value)


def parameters(config: UNet2DConfig) -> int:
    with torch.device("meta"):
        return UNet2D(config).num_parameters


def attention_sizes(config: UNet2DConfig) -> set[int]:
    down = enumerate(config.down_block_types)
    return {config.sample_size >> level for level, kind in down if kind == "AttnDownBlock2D"}


@pytest.mark.parametrize(
    ("size", "channels", "attention", "least", "most"),
    [
        (8, 1, {4}, 0.5e6, 1e6),
        (16, 1, {4}, 1e6, 5e6),
        (28, 1, {14, 7}, 5e6, 10e6),
        (32, 1, {16, 8}, 5e6, 36e6),
        (32, 3, {16}, 35.7e6, 35.8e6),
        (64, 3, {16, 8}, 60e6, 120e6),
        (7, 1, {7}, 0.1e6, 1e6),
        (48, 3, {12, 6}, 60e6, 120e6),
    ],
)
def test_presets(size, channels, attention, least, most):
    config = small_unet_config(size, channels, 10)
    assert (config.in_channels, config.out_channels, config.sample_size) == (channels, channels, size)
    assert size % config.downsampling_factor == 0
    assert attention_sizes(config) == attention
    assert least < parameters(config) < most
    assert config.num_class_embeds == 11, "10 classes and the null label"
    assert not small_unet_config(size, channels, None).takes_labels


@torch.no_grad()
def test_preset_for_digits_runs_with_the_null_label():
    model = UNet2D(small_unet_config(8, 1, 10)).eval()
    assert model(torch.zeros(2, 1, 8, 8), 1.0, torch.tensor([0, 10])).shape == (2, 1, 8, 8)


def test_preset_for_any_size_fits_or_says_why():
    refused = 0
    for size in range(4, 600):
        try:
            config = small_unet_config(size, 3, None)
        except UsageError as error:
            refused += 1
            assert "resize or pad" in str(error) and "\n" not in str(error)
            advised = int(str(error).split()[-1])
            assert size < advised < 1.2 * size
            assert small_unet_config(advised, 3, None), "the advice must work"
        else:
            assert size % config.downsampling_factor == 0
            assert size // config.downsampling_factor <= 16
    assert refused > 100


@pytest.mark.parametrize("values", [(3, 1, 10), (8, 0, 10), (8, 1, 0)])
def test_preset_refuses_nonsense(values):
    with pytest.raises(UsageError):
        small_unet_config(*values)
