"""ADD, adversarial diffusion distillation (Sauer et al. 2023): the objective of SD-Turbo.

The student's x̂ from a sample noised to one of its times (pure noise at the first), no longer paired with it:

    student:        −mean D(x̂) + distill · α_τ mean (dec(x̂) − sg dec(μ_real^w(x̂ noised to τ)))²
    discriminator:  relu(1 − D(x0)) + relu(1 + D(sg x̂)) + r1 · R1

Choices: the teacher's samples stand in for real images, and its features for DINO's, so that nothing else is needed;
its samples are noised anew to t < 0.75 before D, which the paper's D does not need; the distillation term is in pixels,
by the pipeline's own decoder, a mean over them where the paper has a sum, with its exponential weight c(τ) = α_τ; w is
fixed (a public port draws it from 1 to 15). R1 is of a sample's mean logit, for which the paper's factor is as good as
nothing.
"""

import torch
from torch.nn import functional as F

from ..diffusion import t_like
from .base import Adversarial, Batch


class ADD(Adversarial):
    settings = ("lr", "disc_lr", "distill", "r1")

    def losses(self, batch: Batch, step: int) -> dict[str, torch.Tensor]:
        backbone = self.backbone
        k = (batch.uniform(len(batch.z)) * self.steps).long()
        t = self.times.to(k.device)[k]
        z, _ = batch.other
        x = torch.where(t_like(k, z) == 0, z, backbone.add_noise(batch.x0, z, t))
        x_hat = backbone.x0(self.student, x, t, batch.cond)
        fooled = -self.logits(self.features(x_hat, batch)).mean()
        tau = batch.level()
        with torch.no_grad():
            x_tau = backbone.add_noise(x_hat, batch.noise(x_hat), tau)
            taught = backbone.pixels(backbone.x0(self.teacher, x_tau, tau, batch.cond, self.cfg))
            real, fake = self.features(batch.x0, batch), self.features(x_hat.detach(), batch)
        alpha, _ = backbone.levels.alpha_sigma(tau)
        distilled = (alpha * (backbone.pixels(x_hat) - taught).square().flatten(1).mean(1)).mean()
        loss = F.relu(1 - self.logits(real)).mean() + F.relu(1 + self.logits(fake)).mean()
        return {
            "discriminator": self.regularised(loss, real),
            "student": fooled + self.p["distill"] * distilled,
            "fooled": fooled.detach(),
            "distilled": distilled.detach(),
        }
