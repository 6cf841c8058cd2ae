"""The world's two autoencoders, factor 4, latents 4 × 16 × 16: AutoencoderKL (SD2, PixArt) and AutoencoderDC
(SANA). Both end with latents of unit variance, so that noise levels mean the same for all three teachers."""

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderDC, AutoencoderKL

from ..training import Role, train
from . import scenes
from .detector import judge


def build(kind: str) -> torch.nn.Module:
    """A random-weight autoencoder of kind "kl" or "dc"."""
    if kind == "kl":
        return AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            block_out_channels=(8, 16, 64),
            layers_per_block=1,
            latent_channels=4,
            norm_num_groups=8,
            sample_size=scenes.SIZE,
            mid_block_add_attention=False,
            scaling_factor=1.0,
        )
    if kind == "dc":
        shape = {"block_out_channels": (16, 32, 64), "layers_per_block": (0, 2, 2), "qkv_multiscales": ((),) * 3}
        return AutoencoderDC(
            latent_channels=4,
            attention_head_dim=16,
            **{f"{side}_{k}": v for side in ("encoder", "decoder") for k, v in shape.items()},
        )
    raise ValueError(f"autoencoder kind={kind!r} is unknown: use 'kl' or 'dc'")


def encode(vae, images: torch.Tensor) -> torch.Tensor:
    """Images (B, 3, H, W) in [0, 1] to scaled latents; the posterior's mean for AutoencoderKL."""
    out = vae.encode(images.to(vae.dtype) * 2 - 1)
    z = out.latent_dist.mean if hasattr(out, "latent_dist") else out.latent
    return z * vae.config.scaling_factor


class AutoencoderTask:
    """L1 + 2 MSE, latents drawn towards zero mean and unit variance and disturbed by noise of 0.1, so that
    the decoder forgives a teacher's small errors."""

    def __init__(self, vae, batch, lr, seed, noise=0.1, compiled=True):
        self.vae, self.batch, self.seed, self.noise = vae, batch, seed, noise
        self.roles = {"autoencoder": Role(vae.to(memory_format=torch.channels_last), lr, ema=0.998)}
        self.forward = torch.compile(self._forward) if compiled else self._forward

    def _forward(self, images, noise):
        z = encode(self.vae, images)
        y = (self.vae.decode((z + noise) / self.vae.config.scaling_factor).sample + 1) / 2
        error = y.float() - images
        z = z.float()
        moments = z.mean((0, 2, 3)).square().sum() + (z.var((0, 2, 3)) - 1).square().sum()
        return error.abs().mean(), error.square().mean(), moments

    def losses(self, step, generator):
        device = next(self.vae.parameters()).device
        seed = int(torch.randint(2**31, (1,), generator=generator, device=device))
        images = scenes.sample(self.batch, seed).render().to(device, memory_format=torch.channels_last)
        n = scenes.SIZE // 4
        noise = self.noise * torch.randn(self.batch, 4, n, n, generator=generator, device=device)
        l1, mse, moments = self.forward(images, noise)
        return {"autoencoder": 2 * l1 + 4 * mse + 0.01 * moments, "mse": mse.detach(), "moments": moments.detach()}


def pretrain(kind: str, folder: Path, work: Path, p: dict, seed: int, accelerator=None) -> dict:
    """Train an autoencoder, save it to `folder`, return its metrics on test scenes."""
    torch.manual_seed(seed)
    vae = build(kind)
    task = AutoencoderTask(vae, p["batch"], p["lr"], seed, compiled=p["compile"])
    train(task, work, p["steps"], seed, {"autoencoder": kind, **p}, accelerator=accelerator)
    task.roles["autoencoder"].average.copy_to(task.roles["autoencoder"].params)
    vae = vae.to("cpu", memory_format=torch.contiguous_format).eval()
    _standardise(vae, seed)
    vae.save_pretrained(folder)
    return evaluate(vae, seed)


@torch.no_grad()
def _standardise(vae, seed, n=1024):
    """Make the latents' spread one: per channel, exactly, in AutoencoderKL's 1 × 1 convolutions; for
    AutoencoderDC through its scaling factor."""
    z = torch.cat([encode(vae, x) for x in scenes.sample(n, seed + 1).render().split(128)])
    if not hasattr(vae, "quant_conv"):
        vae.register_to_config(scaling_factor=round(1 / z.std().item(), 4))
        return
    mean, std = z.mean((0, 2, 3)), z.std((0, 2, 3))
    channels = len(mean)
    after = vae.post_quant_conv.weight[:, :, 0, 0]
    vae.post_quant_conv.bias += after @ mean
    vae.post_quant_conv.weight *= std[None, :, None, None]
    vae.quant_conv.weight[:channels] /= std[:, None, None, None]
    vae.quant_conv.bias[:channels] = (vae.quant_conv.bias[:channels] - mean) / std
    vae.quant_conv.bias[channels:] -= 2 * std.log()  # log-variance


@torch.no_grad()
def evaluate(vae, seed: int, n: int = 512) -> dict:
    """PSNR (dB) and what the detector reads from reconstructions of `n` test scenes."""
    world = scenes.sample(n, seed + 2, "test")
    images = world.render()
    z = torch.cat([encode(vae, x) for x in images.split(64)])
    y = torch.cat([vae.decode(x / vae.config.scaling_factor).sample for x in z.split(64)])
    y = ((y + 1) / 2).clamp(0, 1)
    mse = (y - images).square().mean((1, 2, 3))
    seen = judge(y, [world.objects(i) for i in range(n)])
    return {
        "psnr": float(np.mean(-10 * np.log10(mse.numpy()))),
        "latent_std": z.std().item(),
        **{k: float(v.mean()) for k, v in seen.items()},
    }
