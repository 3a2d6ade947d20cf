"""Configuration of the U-Net: the fields and defaults of a diffusers ``UNet2DModel`` config, and presets."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from synthfast.errors import SynthfastError, UsageError

DOWN_BLOCK_TYPES = ("DownBlock2D", "AttnDownBlock2D")
UP_BLOCK_TYPES = ("UpBlock2D", "AttnUpBlock2D")
_CHOICES = {
    "time_embedding_type": ("positional", "fourier"),
    "mid_block_type": ("UNetMidBlock2D", None),
    "downsample_type": ("conv", "resnet"),
    "upsample_type": ("conv", "resnet"),
    "act_fn": ("silu", "swish", "mish", "gelu", "relu"),
    "resnet_time_scale_shift": ("default", "scale_shift"),
    "class_embed_type": (None, "timestep", "identity"),
}
_MOST_LAYERS = 100  # layers are made one by one: a hostile file must not choose how many
_POSITIVE_INTEGERS = ("in_channels", "out_channels", "layers_per_block", "norm_num_groups")
_OPTIONAL_POSITIVE_INTEGERS = (
    "time_embedding_dim",
    "attention_head_dim",
    "attn_norm_num_groups",
    "num_class_embeds",
    "num_train_timesteps",
)
_FLAGS = ("center_input_sample", "flip_sin_to_cos", "add_attention")
_TUPLES = ("down_block_types", "up_block_types", "block_out_channels")


@dataclasses.dataclass(frozen=True)
class UNet2DConfig:
    """What a U-Net looks like; field names, meanings and defaults are those of diffusers' ``UNet2DModel``.

    ``block_out_channels``, ``down_block_types`` and ``up_block_types`` have one entry per resolution, the up
    blocks from the lowest resolution to the highest. ``attention_head_dim`` is the width of one head (None: a
    single head). ``num_class_embeds`` makes the model class-conditional with a learned embedding;
    ``class_embed_type`` "timestep" embeds labels as time steps are, "identity" takes ready-made vectors [N,
    time_embedding_dim] as labels. ``sample_size`` (pixels; one side or height and width) and
    ``num_train_timesteps`` are information only: the network takes any size that divides by
    ``downsampling_factor``.

    Raises SynthfastError for a value this U-Net does not support.
    """

    sample_size: int | tuple[int, int] | None = None
    in_channels: int = 3
    out_channels: int = 3
    center_input_sample: bool = False
    time_embedding_type: str = "positional"
    time_embedding_dim: int | None = None
    freq_shift: float = 0
    flip_sin_to_cos: bool = True
    down_block_types: tuple[str, ...] = (
        "DownBlock2D",
        "AttnDownBlock2D",
        "AttnDownBlock2D",
        "AttnDownBlock2D",
    )
    mid_block_type: str | None = "UNetMidBlock2D"
    up_block_types: tuple[str, ...] = ("AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D")
    block_out_channels: tuple[int, ...] = (224, 448, 672, 896)
    layers_per_block: int = 2
    mid_block_scale_factor: float = 1
    downsample_padding: int = 1
    downsample_type: str = "conv"
    upsample_type: str = "conv"
    dropout: float = 0.0
    act_fn: str = "silu"
    attention_head_dim: int | None = 8
    norm_num_groups: int = 32
    attn_norm_num_groups: int | None = None
    norm_eps: float = 1e-5
    resnet_time_scale_shift: str = "default"
    add_attention: bool = True
    class_embed_type: str | None = None
    num_class_embeds: int | None = None
    num_train_timesteps: int | None = None

    def __post_init__(self) -> None:
        for name in _TUPLES:
            value = getattr(self, name)
            if not isinstance(value, (list, tuple)) or not value:
                raise _unsupported(name, value, "a list with one entry per resolution")
            object.__setattr__(self, name, tuple(value))
        if isinstance(self.sample_size, list):
            object.__setattr__(self, "sample_size", tuple(self.sample_size))
        self._check_values()
        self._check_levels()

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> UNet2DConfig:
        """The configuration in a diffusers ``config.json``; keys that start with "_" are ignored.

        Raises SynthfastError for an unknown key or an unsupported value.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        used = {key: value for key, value in values.items() if not key.startswith("_")}
        unknown = sorted(used.keys() - known)
        if unknown:
            raise SynthfastError(
                f"U-Net configuration has the unknown key {unknown[0]!r} ({len(unknown)} unknown in all); "
                f"supported are {', '.join(sorted(known))}"
            )
        return cls(**used)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; ``UNet2DConfig.from_dict`` and ``diffusers.UNet2DModel(**d)`` accept them."""
        values = dataclasses.asdict(self)
        return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}

    @property
    def downsampling_factor(self) -> int:
        """Height and width of an image must be multiples of this number."""
        return 2 ** (len(self.block_out_channels) - 1)

    @property
    def embedding_dim(self) -> int:
        """Width of the time (and class) embedding."""
        return self.time_embedding_dim or 4 * self.block_out_channels[0]

    @property
    def takes_labels(self) -> bool:
        """Whether the network needs labels."""
        return self.class_embed_type is not None or self.num_class_embeds is not None

    def _check_values(self) -> None:
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise _unsupported(name, getattr(self, name), " or ".join(map(str, choices)))
        for name in _POSITIVE_INTEGERS:
            if not _is_positive_integer(getattr(self, name)):
                raise _unsupported(name, getattr(self, name), "a positive integer")
        for name in _OPTIONAL_POSITIVE_INTEGERS:
            if getattr(self, name) is not None and not _is_positive_integer(getattr(self, name)):
                raise _unsupported(name, getattr(self, name), "a positive integer or null")
        for name in _FLAGS:
            if not isinstance(getattr(self, name), bool):
                raise _unsupported(name, getattr(self, name), "true or false")
        if self.layers_per_block > _MOST_LAYERS:
            raise _unsupported("layers_per_block", self.layers_per_block, f"at most {_MOST_LAYERS}")
        if not (self.sample_size is None or _is_size(self.sample_size)):
            raise _unsupported("sample_size", self.sample_size, "a positive integer, a pair of them, or null")
        if not _is_number(self.dropout) or not 0 <= self.dropout < 1:
            raise _unsupported("dropout", self.dropout, "a number from 0 to below 1")
        if not _is_number(self.norm_eps) or not self.norm_eps > 0:
            raise _unsupported("norm_eps", self.norm_eps, "a positive number")
        if not _is_number(self.mid_block_scale_factor) or self.mid_block_scale_factor == 0:
            raise _unsupported("mid_block_scale_factor", self.mid_block_scale_factor, "a number other than 0")
        if not _is_number(self.freq_shift):
            raise _unsupported("freq_shift", self.freq_shift, "a number")
        if self.downsample_padding not in (0, 1):
            # Other paddings do not halve the size, and the skips would not fit.
            raise _unsupported("downsample_padding", self.downsample_padding, "0 or 1")
        if self.class_embed_type == "timestep" and self.time_embedding_type == "fourier":
            # The Fourier embedding takes a logarithm, and class 0 would become NaN.
            raise _unsupported("class_embed_type", "timestep", 'another one when time_embedding_type is "fourier"')

    def _check_levels(self) -> None:
        levels = len(self.block_out_channels)
        for name, choices in (("down_block_types", DOWN_BLOCK_TYPES), ("up_block_types", UP_BLOCK_TYPES)):
            types = getattr(self, name)
            if len(types) != levels:
                raise _unsupported(name, list(types), f"{levels} entries, as in block_out_channels")
            for block_type in types:
                if block_type not in choices:
                    raise _unsupported(name, block_type, " or ".join(choices))
        for channels in self.block_out_channels:
            if not _is_positive_integer(channels) or channels % self.norm_num_groups:
                raise _unsupported(
                    "block_out_channels", channels, f"multiples of norm_num_groups ({self.norm_num_groups})"
                )
        if self.attn_norm_num_groups is not None and self.block_out_channels[-1] % self.attn_norm_num_groups:
            raise _unsupported(
                "attn_norm_num_groups",
                self.attn_norm_num_groups,
                f"a divisor of {self.block_out_channels[-1]}",
            )
        for channels in self._attention_channels():
            if self.attention_head_dim is not None and self.attention_head_dim > channels:
                raise _unsupported("attention_head_dim", self.attention_head_dim, f"at most the {channels} channels")

    def _attention_channels(self) -> list[int]:
        """Channel counts at which attention is used."""
        channels = self.block_out_channels
        used = [c for c, kind in zip(channels, self.down_block_types, strict=True) if kind == "AttnDownBlock2D"]
        used += [c for c, kind in zip(reversed(channels), self.up_block_types, strict=True) if kind == "AttnUpBlock2D"]
        if self.mid_block_type is not None and self.add_attention:
            used.append(channels[-1])
        return used


def small_unet_config(image_size: int, channels: int, num_classes: int | None) -> UNet2DConfig:
    """A U-Net to train from scratch on square images of ``image_size`` pixels with ``channels`` colours.

    With ``num_classes`` the model is class-conditional, and embedding number ``num_classes`` (one more than
    the classes need) is reserved for "no label", which classifier-free guidance trains by dropping labels.

    - up to 16 pixels: small, for a CPU (8x8 grey: 0.7 M parameters), attention at the lowest resolution;
    - up to 32: 28x28 grey 7 M, 32x32 grey 9 M, attention at 14 and 7 (16 and 8); 32x32 colour: the 35.7 M
      network published for CIFAR-10, attention at 16, with the paper's dropout of 0.1 (DDPM, Ho et al. 2020,
      https://arxiv.org/abs/2006.11239, appendix B);
    - above: 64x64 colour 88 M, attention at 16 and below (64x64: 16 and 8) with heads of 64 channels.

    Raises UsageError for a size that does not halve evenly down to at most 16 pixels.
    """
    if image_size < 4:
        raise UsageError(f"image size {image_size} is too small for a U-Net; expected at least 4 pixels")
    if channels < 1 or (num_classes is not None and num_classes < 1):
        raise UsageError(
            f"expected at least 1 channel and 1 class, found {channels} and {num_classes}; "
            "pass num_classes=None for a model without labels"
        )
    resolutions = _resolutions(image_size)
    depth = len(resolutions)
    common: dict[str, Any] = {
        "sample_size": image_size,
        "in_channels": channels,
        "out_channels": channels,
        "num_class_embeds": None if num_classes is None else num_classes + 1,
    }
    if image_size <= 16:
        # Few groups, because PyTorch's channels-last group norm on a CPU is several times slower with fewer
        # than 8 channels in a group.
        return UNet2DConfig(
            **common,
            **_block_types([r == resolutions[-1] for r in resolutions]),
            block_out_channels=(32, 64, 128)[:depth] if depth > 1 else (64,),
            layers_per_block=1,
            attention_head_dim=32,
            norm_num_groups=4,
        )
    if image_size == 32 and channels == 3:
        return UNet2DConfig(
            **common,
            **_block_types([r == 16 for r in resolutions]),
            block_out_channels=(128, 256, 256, 256),
            layers_per_block=2,
            downsample_padding=0,
            flip_sin_to_cos=False,
            freq_shift=1,
            norm_eps=1e-6,
            dropout=0.1,
            attention_head_dim=None,
        )
    if image_size <= 32:
        return UNet2DConfig(
            **common,
            **_block_types([r <= 16 and r > 4 for r in resolutions]),
            block_out_channels=(64, 128, 128, 128)[:depth],
            layers_per_block=2,
            attention_head_dim=64,
            norm_num_groups=8,
        )
    return UNet2DConfig(
        **common,
        **_block_types([8 <= r <= 16 or r == resolutions[-1] for r in resolutions]),
        block_out_channels=tuple(min(128 * (level + 1), 512) for level in range(depth)),
        layers_per_block=2,
        attention_head_dim=64,
        dropout=0.1,
    )


def _resolutions(image_size: int) -> list[int]:
    """Image sizes from the full one down, halved while even and the half is not too small to be of use."""
    smallest = 4 if image_size <= 32 else 6
    sizes = [image_size]
    while sizes[-1] % 2 == 0 and sizes[-1] // 2 >= smallest:
        sizes.append(sizes[-1] // 2)
    if sizes[-1] > 16:
        factor = 2 ** math.ceil(math.log2(image_size / 16))
        raise UsageError(
            f"image size {image_size} cannot be halved evenly below {sizes[-1]}, and a U-Net needs a size "
            "that halves down to at most 16; resize or pad the images, "
            f"for example to {math.ceil(image_size / factor) * factor}"
        )
    return sizes


def _block_types(attention: list[bool]) -> dict[str, tuple[str, ...]]:
    """Block types with attention at the marked resolutions, highest resolution first."""
    return {
        "down_block_types": tuple(DOWN_BLOCK_TYPES[a] for a in attention),
        "up_block_types": tuple(UP_BLOCK_TYPES[a] for a in reversed(attention)),
    }


def _is_positive_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_size(value: Any) -> bool:
    if isinstance(value, tuple):
        return len(value) == 2 and all(map(_is_positive_integer, value))
    return _is_positive_integer(value)


def _unsupported(name: str, value: Any, expected: str) -> SynthfastError:
    return SynthfastError(f"U-Net configuration: {name} is {value!r}; supported: {expected}")
