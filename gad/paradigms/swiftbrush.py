"""SwiftBrush (Nguyen & Tran 2024): variational score distillation, the fake a LoRA on the teacher.

    student:  ½ mean (x̂ − sg[x̂ − σ_τ² (ε_real^w(x_τ) − ε_fake^w(x_τ))])²
    fake:     α_τ² mean (ε̂_fake(x_τ') − ε)²  on sg[x̂]; a tenth of the batches without their prompts

Choices: both scores are guided by the same w and nothing is normalised, as the authors'; their student has one step,
ours trains one step of its sampler at a time. A flow's error is in velocity, with the same weight.
"""

import torch
from peft import LoraConfig, inject_adapter_in_model

from ..diffusion import t_like
from .base import TAU, Batch, Paradigm, dropped, toward


class SwiftBrush(Paradigm):
    form = "score"
    guided_fake = True
    settings = ("lr", "fake_lr", "beta1", "rank", "alpha")

    def __init__(self, backbone, steps, cfg, p, distill):
        super().__init__(backbone, steps, cfg, p, distill)
        fake = self.copy_of_teacher().requires_grad_(False)
        lora = LoraConfig(r=int(p["rank"]), lora_alpha=p["alpha"], target_modules=list(backbone.adapted))
        inject_adapter_in_model(lora, fake)  # trains what it adds and nothing else
        self.roles = self.with_fake(distill, 0.999, 0.0, fake)

    def losses(self, batch: Batch, step: int) -> dict[str, torch.Tensor]:
        backbone, fake = self.backbone, self.roles["fake"].module
        point = self.point = self.diffused(batch, batch.level(*TAU))
        with torch.no_grad():
            real, guess = (
                backbone.eps(network, point.x_tau, point.tau, batch.cond, self.cfg) for network in (self.teacher, fake)
            )
            _, sigma = backbone.levels.alpha_sigma(point.tau)
            gradient = t_like(sigma, real).square() * (real - guess)
        tau = batch.level()
        unsaid = torch.full((len(batch.z),), batch.draws.chance(0.1), device=batch.z.device)
        error = self.denoising(fake, point.x_hat.detach(), tau, batch, dropped(backbone, batch.cond, unsaid))
        weight = backbone.levels.alpha_sigma(tau)[0].square()
        return {
            "fake": (weight * error).mean(),
            "student": toward(point.x_hat, gradient).mean(),
            "gap": gradient.abs().mean(),
        }
