"""The U-Net of diffusion models, weight-compatible with diffusers' ``UNet2DModel``."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from synthfast.errors import SynthfastError
from synthfast.models.unet_blocks import (
    ACTIVATIONS,
    Attention,
    DownBlock,
    EmbeddingMLP,
    FourierEmbedding,
    GroupNormAct,
    MidBlock,
    ResnetBlock,
    SinusoidalEmbedding,
    UpBlock,
)
from synthfast.models.unet_config import UNet2DConfig, small_unet_config

__all__ = ["UNet2D", "UNet2DConfig", "small_unet_config"]


class UNet2D(nn.Module):
    """Maps a noisy image, a time and (if the configuration says so) a label to an image of the same size.

    ``state_dict()`` has the keys and shapes of diffusers' ``UNet2DModel`` with the same configuration.
    Convolution weights are kept in channels_last memory. A new model has PyTorch's default initialisation,
    drawn from the global generator; to train from scratch call :meth:`init_weights`, which depends on its
    seed alone.
    """

    def __init__(self, config: UNet2DConfig) -> None:
        super().__init__()
        self.config = config
        channels = config.block_out_channels
        last = len(channels) - 1
        self.conv_in = nn.Conv2d(config.in_channels, channels[0], 3, padding=1)
        if config.time_embedding_type == "fourier":
            self.time_proj: nn.Module = FourierEmbedding(channels[0])
            features = 2 * channels[0]
        else:
            self.time_proj = SinusoidalEmbedding(channels[0], config.freq_shift, config.flip_sin_to_cos)
            features = channels[0]
        self.time_embedding = EmbeddingMLP(features, config.embedding_dim)
        self.class_embedding = _class_embedding(config, features)

        self.down_blocks = nn.ModuleList()
        for i, block_type in enumerate(config.down_block_types):
            attention = block_type == "AttnDownBlock2D"
            above = channels[max(i - 1, 0)]
            self.down_blocks.append(DownBlock(config, above, channels[i], attention, downsample=i < last))
        self.mid_block = None if config.mid_block_type is None else MidBlock(config)
        self.up_blocks = nn.ModuleList()
        for i, block_type in zip(range(last, -1, -1), config.up_block_types, strict=True):
            attention = block_type == "AttnUpBlock2D"
            above, below = channels[max(i - 1, 0)], channels[min(i + 1, last)]
            self.up_blocks.append(UpBlock(config, below, above, channels[i], attention, upsample=i > 0))
        # The last activation is SiLU whatever act_fn says, as in diffusers.
        self.conv_norm_out = GroupNormAct(config.norm_num_groups, channels[0], config.norm_eps, "silu")
        self.conv_out = nn.Conv2d(channels[0], config.out_channels, 3, padding=1)
        self.to(memory_format=torch.channels_last)

    @property
    def num_parameters(self) -> int:
        """Number of trained values."""
        return sum(p.numel() for p in self.parameters())

    def forward(self, x: Tensor, t: Tensor | float, labels: Tensor | None = None) -> Tensor:
        """One evaluation of the network.

        x: [N, in_channels, H, W], any float type and layout; H and W multiples of ``downsampling_factor``.
        t: number, tensor [] or tensor [N], integer or continuous (above 0 for a Fourier embedding). Under
           torch.compile pass a tensor: a Python number is compiled in, and each new one compiles again.
        labels: int64 [N] in [0, num_class_embeds); numbers [N] for class_embed_type "timestep"; vectors
           [N, embedding_dim] for "identity"; None for a model without labels.
        Returns [N, out_channels, H, W] in channels_last memory and the type of x, not of the weights.

        Raises SynthfastError for an image size that does not divide, or labels missing or not wanted.
        """
        config = self.config
        self._check_inputs(x, labels)
        dtype = self.conv_in.weight.dtype
        t = self._time(x, t)
        embedding = self._embedding(t, labels, dtype)

        h = x.to(dtype=dtype, memory_format=torch.channels_last)
        if config.center_input_sample:
            h = 2 * h - 1
        h = self.conv_in(h)
        skips = [h]
        for block in self.down_blocks:
            h = block(h, embedding, skips)
        if self.mid_block is not None:
            h = self.mid_block(h, embedding)
        for block in self.up_blocks:
            h = block(h, embedding, skips)
        h = self.conv_out(self.conv_norm_out(h)).to(x.dtype)
        if config.time_embedding_type == "fourier":
            # Such networks estimate the score times the noise level (Song & Ermon 2020), hence the division.
            h = h / t[:, None, None, None].to(h.dtype)
        return h

    @torch.no_grad()
    def init_weights(self, seed: int) -> UNet2D:
        """Initialise for training, from ``seed`` alone and not the global generator; returns the model.

        Weights uniform with variance 2 / (fan_in + fan_out), biases 0, as in DDPM (Ho et al. 2020); class
        embeddings N(0, 1), Fourier frequencies N(0, 16^2); then :meth:`zero_init`.
        """
        generator = torch.Generator().manual_seed(seed)
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                # Drawn on the CPU, so that the same seed gives the same weights on every device.
                drawn = torch.empty(module.weight.shape)
                nn.init.xavier_uniform_(drawn, generator=generator)
                module.weight.copy_(drawn)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.GroupNorm):
                module.reset_parameters()
            elif isinstance(module, (nn.Embedding, FourierEmbedding)):
                scale = module.scale if isinstance(module, FourierEmbedding) else 1.0
                module.weight.copy_(torch.randn(module.weight.shape, generator=generator) * scale)
        return self.zero_init()

    @torch.no_grad()
    def zero_init(self) -> UNet2D:
        """Set the last layer of each residual branch and of the network to zero; returns the model.

        Training then starts from residual blocks that pass their input through and an output of 0 (DDPM's and
        ADM's initialisation).
        """
        last_layers = [self.conv_out]
        last_layers += [module.conv2 for module in self.modules() if isinstance(module, ResnetBlock)]
        last_layers += [module.to_out[0] for module in self.modules() if isinstance(module, Attention)]
        for layer in last_layers:
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        return self

    def _check_inputs(self, x: Tensor, labels: Tensor | None) -> None:
        config = self.config
        if x.ndim != 4 or x.shape[1] != config.in_channels:
            raise SynthfastError(f"the U-Net takes images [N, {config.in_channels}, H, W]; found shape {list(x.shape)}")
        factor = config.downsampling_factor
        if x.shape[2] % factor or x.shape[3] % factor:
            raise SynthfastError(
                f"the U-Net halves images {len(config.block_out_channels) - 1} times, so height and width "
                f"must be multiples of {factor}; found {x.shape[2]} x {x.shape[3]}: resize or pad the images"
            )
        if labels is None and config.takes_labels:
            raise SynthfastError("the U-Net is class-conditional and needs a label for each image; found none")
        if labels is not None and not config.takes_labels:
            raise SynthfastError("the U-Net is not class-conditional and takes no labels; leave them out")
        if labels is not None and labels.shape[0] != x.shape[0]:
            raise SynthfastError(f"the U-Net needs one label for each of {x.shape[0]} images; found {labels.shape[0]}")

    def _time(self, x: Tensor, t: Tensor | float) -> Tensor:
        """t as float32 [1] or [N]; one time for all stays one row, so that its embedding is computed once."""
        if not isinstance(t, Tensor):
            return torch.full((1,), float(t), dtype=torch.float32, device=x.device)
        if t.numel() not in (1, x.shape[0]):
            raise ValueError(f"t must be a number or have shape [] or [{x.shape[0]}], got {list(t.shape)}")
        return t.reshape(-1).to(device=x.device, dtype=torch.float32)

    def _embedding(self, t: Tensor, labels: Tensor | None, dtype: torch.dtype) -> Tensor:
        """The activated embedding [1 or N, embedding_dim] that all residual blocks share."""
        embedding = self.time_embedding(self.time_proj(t).to(dtype))
        if labels is not None:
            if self.config.class_embed_type == "timestep":
                labels = self.time_proj(labels.float()).to(dtype)
            embedding = embedding + self.class_embedding(labels).to(dtype)
        return ACTIVATIONS[self.config.act_fn](embedding)


def _class_embedding(config: UNet2DConfig, features: int) -> nn.Module | None:
    if config.class_embed_type == "timestep":
        return EmbeddingMLP(features, config.embedding_dim)
    if config.class_embed_type == "identity":
        return nn.Identity()
    if config.num_class_embeds is not None:
        # What nn.Embedding does, but for the meta device, where normal_ would import torch._dynamo: more than a second.
        weight = torch.empty(config.num_class_embeds, config.embedding_dim)
        return nn.Embedding.from_pretrained(weight if weight.is_meta else weight.normal_(), freeze=False)
    return None
