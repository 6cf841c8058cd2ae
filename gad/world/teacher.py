"""Pretraining of the miniature teachers: network and text encoder together, on cached latents of the world."""

from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import nn

from ..backbones import Condition, registered
from ..diffusion import t_like
from ..training import Role, train
from . import scenes
from .detector import centres

QUALITY = 13  # added to the world's seed: prompts and noises of scene accuracy, drawn anew


class TeacherTask:
    """Denoising score (or flow) matching with captions, a tenth of them dropped for guidance.

    ε-prediction: uniform t; v-prediction's weight truncated at γ = 5 (Hang et al. 2023), `min(SNR + 1, 5)` on x̂0,
    capped where SNR < 0.01. Layouts are decided at high noise, to which min-SNR's own weight gives little: there
    x̂0 is ε̂'s error times `1/α`, up to 157. Flow: t shifted as the sampler's. A share `focus` of the levels is drawn
    where the world's layouts and shapes are decided instead: log SNR normal about `focus_at`, at −3 layouts, at −1
    outlines. `crowded`: scenes in proportion to that power of their number of objects, since one object is easily
    drawn and three are not. `text`: T5 has norms without a mean and no biases; at the network's rates what it says of
    any word becomes one same vector but for a fiftieth of its power.
    """

    def __init__(self, backbone, latents, world, p):
        self.backbone, self.batch, self.drop = backbone, p["batch"], p["drop"]
        encoder, network = backbone.pipeline.text_encoder, backbone.network
        for module in (encoder, network):
            module.requires_grad_(True).train()
        self.roles = {"teacher": Role(
            nn.ModuleList([network, encoder]), p["lr"], (0.9, 0.98), 0.01, ema=p["ema"], muon=p["muon"],
            slowed=((encoder, p["text"]),),
        )}
        self.make_latents, captions = latents, world.captions()
        self.share = torch.from_numpy(world.count).double() ** p["crowded"] if p["crowded"] else None
        self.unique = ["", *dict.fromkeys(captions)]
        number = {c: i for i, c in enumerate(self.unique)}
        self.caption = torch.tensor([number[c] for c in captions])
        self.network = torch.compile(network) if p["compile"] else network
        self.focus, self.quantiles = p["focus"], _quantiles(backbone.levels, p["focus_at"], 1.5)

    @cached_property
    def latents(self):
        """(scenes, C, H, W): made when first wanted, so that a finished run costs nothing."""
        return self.make_latents()

    def losses(self, step, generator):
        device = self.backbone.device
        n = self.batch
        if self.share is None:
            i = torch.randint(len(self.latents), (n,), generator=generator, device=device)
        else:
            i = torch.multinomial(self.share.to(device), n, generator=generator)
        x0 = self.latents[i.to(self.latents.device)].to(device)
        eps = torch.randn(x0.shape, generator=generator, device=device)
        focused = round(self.focus * n)
        t = _stratified(n - focused, generator)
        dropped = torch.rand(n, generator=generator, device=device) < self.drop
        levels = self.backbone.levels
        if levels.flow:
            shift = self.backbone.pipeline.scheduler.config.shift
            t = shift * t / (1 + (shift - 1) * t)
        if focused:
            at = _stratified(focused, generator) * (len(self.quantiles) - 1)
            t = torch.cat([t, self.quantiles.to(device)[at.round().long()]])
        if levels.flow:
            weight = torch.ones_like(t)
        else:
            t = (t * levels.train_steps).floor() / (levels.train_steps - 1)
            alpha, sigma = levels.alpha_sigma(t)
            snr = (alpha / sigma) ** 2
            weight = ((snr + 1).clamp(max=5) / snr).clamp(max=100)
        text = [self.unique[k] for k in self.caption[i.cpu()].masked_fill(dropped.cpu(), 0)]
        cond = Condition(*self.backbone.encode_text(text))
        x_t = levels.add_noise(x0, eps, t)
        out = self.backbone.raw(self.network, x_t, levels.timestep(t), cond)
        error = (out.float() - levels.target(x0, eps, t)).square()
        return {"teacher": (t_like(weight, error) * error).mean(), "mse": error.mean().detach()}


def _stratified(n, generator):
    return (torch.arange(n, device=generator.device) + torch.rand(n, generator=generator, device=generator.device)) / n


def _quantiles(levels, mean: float, std: float, n: int = 1000) -> torch.Tensor:
    """(n,) times at which log SNR has the quantiles of a normal, as far as the schedule reaches."""
    t = torch.linspace(0, 1, 4 * n + 1)[1:-1]
    alpha, sigma = levels.alpha_sigma(t)
    cdf = torch.special.ndtr((mean - 2 * (alpha / sigma).log()) / std)  # rises with t
    wanted = torch.lerp(cdf[0], cdf[-1], (torch.arange(n) + 0.5) / n)
    return t[torch.searchsorted(cdf, wanted).clamp(max=len(t) - 1)]


def pretrain(name: str, vae, folder: Path, work: Path, p: dict, seed: int, accelerators=None):
    """Train the miniature teacher of backbone `name` and save it to `folder` as a pipeline.

    Cosine cycles (Loshchilov & Hutter 2017): each of `p["refine"]` sets out from the average of the one before.
    `accelerators`: makes the accelerator of a precision ("no", "bf16", "fp16").
    """
    torch.manual_seed(seed)
    backbone = registered(name)(registered(name, miniature=True)(vae, scenes.WORDS), name)
    world = scenes.sample(p["scenes"], seed)

    def latents(n):
        with torch.no_grad():
            return torch.cat([backbone.encode_images(world[i:i + 256].render()) for i in range(0, n, 256)])[:n]

    identity = {"teacher": name, "latents": latents(min(256, p["scenes"])).double().sum().item(), **p}
    for cycle, settings in enumerate([p, *({**p, **own} for own in p["refine"])]):
        task = TeacherTask(backbone, lambda: latents(p["scenes"]), world, settings)
        train(
            task, work / f"{work.name}-{cycle + 1}", settings["steps"], seed + settings["seed"], identity,
            settings["warmup"],
            accelerator=accelerators(settings["precision"]) if accelerators else None,
        )
        role = task.roles["teacher"]
        role.average.copy_to(role.params)
    backbone.pipeline.text_encoder.to("cpu").eval()
    halves = backbone.network.to("cpu").eval(), vae
    for module in halves:  # half precision is ample for weights, and halves what ships
        module.half()
    backbone.pipeline.save_pretrained(folder)
    for module in halves:
        module.float()
    return backbone


@torch.no_grad()
def evaluate(judge, backbone, network, steps: int, cfg: float, seed: int, prompts: int = 256, seeds: int = 24) -> dict:
    """Scene accuracies, by `judge`, the miniature world, on `prompts` test prompts: their means and each prompt's under
    "quality"; and the spread of the first object's centre over `seeds` noises (RMS distance from the mean, pixels)
    against the world's for the same prompts."""
    world = scenes.sample(prompts, seed + QUALITY, "test")
    objects = [world.objects(i) for i in range(prompts)]
    right = quality(judge, backbone, network, prompts, steps, cfg, seed + QUALITY)
    ours, theirs = [], []
    for i in range(min(8, prompts)):
        wanted = [objects[i]] * seeds
        images = generate(backbone, network, [world.captions()[i]] * seeds, steps, cfg, seed + 100 + i)
        ours.append(spread(centres(images, wanted)))
        theirs.append(spread(centres(scenes.relayout(world[i], 512, seed + i).render(), [objects[i]] * 512)))
    return {
        **{k: float(np.mean(v)) for k, v in right.items()},
        "spread": float(np.mean(ours)), "spread_world": float(np.mean(theirs)),
        "quality": right,
    }


def quality(world, backbone, network, prompts: int, steps: int, cfg: float, seed: int, first=None) -> dict[str, list]:
    """How well images fit, by the world's keys: of a seed's `prompts` test prompts with one noise each, the same for
    all models."""
    def draw(captions):
        return generate(backbone, network, captions, steps, cfg, seed, world.batch, first)

    return world.quality(draw, prompts, seed, backbone.device)


def spread(points: np.ndarray) -> float:
    """RMS distance (pixels) of `points` (n, 2) from their mean, absent ones left out."""
    points = points[~np.isnan(points).any(1)]
    return float(np.sqrt(((points - points.mean(0)) ** 2).sum(1).mean())) if len(points) > 1 else 0.0


def generate(
    backbone, network, prompts: list[str], steps, cfg, seed, batch: int = 128, first=None
) -> torch.Tensor:
    """Images (n, 3, H, W), one a prompt, from `backbone.noise(n, seed)`."""
    return draw(backbone, network, backbone.noise(len(prompts), seed), prompts, steps, cfg, batch, first)


@torch.no_grad()
def draw(
    backbone, network, z: torch.Tensor, prompts: list[str], steps, cfg, batch: int = 128, first=None
) -> torch.Tensor:
    """Images (n, 3, H, W), on the CPU, of noises z (n, C, h, w), one a prompt."""
    cond = backbone.encode(prompts, device="cpu")
    out = [
        backbone.decode(
            backbone.sample(network, z[i:i + batch], cond[i:i + batch].to(z.device), steps, cfg, first=first)
        ).cpu()
        for i in range(0, len(prompts), batch)
    ]
    return torch.cat(out)
