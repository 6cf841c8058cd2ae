"""The paper's networks at full size, by their published configs alone, with random weights: for what depends on sizes
only, as the time and memory of a step. Nothing is downloaded.

Configs: unet/config.json of stabilityai/stable-diffusion-2-1-base, transformer/config.json of
PixArt-alpha/PixArt-XL-2-512x512 and of Efficient-Large-Model/Sana_600M_512px_diffusers and Sana_1600M_512px_diffusers,
with their autoencoders. What is not given here is diffusers' default, which is the published value.
"""

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    PixArtTransformer2DModel,
    SanaTransformer2DModel,
    UNet2DConditionModel,
)
from torch import nn

from .backbones import BACKBONES, Backbone


@dataclass(frozen=True)
class Architecture:
    """`family`: the backbone it is one of; `network`, `vae`, `scheduler` make its parts; `tokens`: (L, D) of the
    embeddings of a prompt."""

    family: str
    network: Callable[[], nn.Module]
    vae: Callable[[], nn.Module]
    scheduler: Callable
    tokens: tuple[int, int]


def _unet():
    return UNet2DConditionModel(
        sample_size=64,
        block_out_channels=(320, 640, 1280, 1280),
        attention_head_dim=(5, 10, 20, 20),  # SD2 names the number of heads so
        cross_attention_dim=1024,
        use_linear_projection=True,
    )


def _dit():
    return PixArtTransformer2DModel(sample_size=64, caption_channels=4096)  # XL: 28 layers, 16 heads × 72


def _linear_dit(heads, layers, cross_heads, cross_dim):
    return SanaTransformer2DModel(
        sample_size=16,
        num_attention_heads=heads,
        attention_head_dim=32,
        num_layers=layers,
        num_cross_attention_heads=cross_heads,
        cross_attention_head_dim=cross_dim,
        cross_attention_dim=cross_heads * cross_dim,
    )


def _kl():
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        sample_size=512,
    )


def _dc():
    blocks = ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3
    return AutoencoderDC(
        encoder_block_types=blocks,
        decoder_block_types=blocks,
        upsample_block_type="interpolate",
        downsample_block_type="Conv",
        scaling_factor=0.41407,
    )


def _ddim(**betas):
    return DDIMScheduler(timestep_spacing="trailing", clip_sample=False, **betas)


FULL = {
    "sd2": Architecture(
        "sd2", _unet, _kl,
        lambda: _ddim(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"), (77, 1024),
    ),
    "pixart": Architecture(
        "pixart", _dit, _kl, lambda: _ddim(beta_start=0.0001, beta_end=0.02, beta_schedule="linear"), (120, 4096)
    ),
    "sana": Architecture(
        "sana", lambda: _linear_dit(36, 28, 16, 72), _dc,
        lambda: FlowMatchEulerDiscreteScheduler(shift=3.0), (300, 2304),
    ),
    "sana-1.6b": Architecture(
        "sana", lambda: _linear_dit(70, 20, 20, 112), _dc,
        lambda: FlowMatchEulerDiscreteScheduler(shift=3.0), (300, 2304),
    ),
}


class _Parts(SimpleNamespace):
    """As much of a pipeline as a Backbone needs."""

    def to(self, device):
        for part in vars(self).values():
            if isinstance(part, nn.Module):
                part.to(device)

    def set_progress_bar_config(self, **_):
        pass


def build(name: str, device) -> Backbone:
    """The backbone `name` of FULL, made on `device` in fp32. Its `encode` gives random embeddings of the right shape,
    new ones at each call: a training run has its own in a cache, and no text encoder in a step."""
    which = FULL[name]

    class Full(BACKBONES[which.family]):
        def encode_text(self, prompts):
            embeds = torch.randn(len(prompts), *which.tokens, device=self.device)
            return embeds, torch.ones(embeds.shape[:2], dtype=torch.long, device=self.device)

    with torch.device(device):
        parts = {Full.part: which.network(), "vae": which.vae(), "text_encoder": nn.Identity()}
    return Full(_Parts(**parts, scheduler=which.scheduler()), name)
