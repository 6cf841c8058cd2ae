"""SiD, score identity distillation (Zhou et al. 2024), with the guidance of SiD-LSG and the flow weight of SiD-DiT.

    student:  w · mean_i a_i [(μ_real − x̂) − α a]_i,   a = μ_real(x_τ) − μ_fake(x_τ)
    fake:     mean (ε̂_fake(x_τ') − ε)²  on sg[x̂]; a flow's in velocity; a tenth of the prompts dropped

The gradient passes through the teacher and the fake to x̂, so their Jacobians are in it. `α` = 1 is LSG's. `w` is
1 / mean|x̂ − μ_real|; for a flow 1 − τ (SiD-DiT's default), with log-odds of τ normal about ln 2. Guidance is the same
everywhere, also where the fake learns (LSG: "long and short guidance" κ1 = κ2 = κ3 = κ4).
Choices: states along the deterministic sampler (SiD-DiT's `ddim`) from t = 1, where LSG's start at 625 of 1000; τ in
TAU and prompts dropped for a flow too, where SiD-DiT does neither; means over elements, where the authors sum;
gradients are clipped; the fake's rate is its own (theirs: the student's).
"""

import math

import torch

from .base import TAU, Batch, Paradigm, dropped


class SiD(Paradigm):
    form = "score"
    guided_fake = True
    settings = ("lr", "fake_lr", "beta1", "alpha")

    def __init__(self, backbone, steps, cfg, p, distill):
        super().__init__(backbone, steps, cfg, p, distill)
        self.roles = self.with_fake(distill, 0.999, 0.0)

    def losses(self, batch: Batch, step: int) -> dict[str, torch.Tensor]:
        backbone, fake = self.backbone, self.roles["fake"].module
        point = self.point = self.diffused(batch, self._level(batch))
        unsaid = batch.uniform(len(batch.z)) < 0.1
        cond = dropped(backbone, batch.cond, unsaid)
        error = self.denoising(fake, point.x_hat.detach(), self._level(batch), batch, cond, self.cfg)

        real, guess = (
            backbone.x0(network, point.x_tau, point.tau, batch.cond, self.cfg) for network in (self.teacher, fake)
        )
        away = real - guess
        product = away * (real - point.x_hat - self.p["alpha"] * away)
        gap = (point.x_hat - real).detach().abs().flatten(1).mean(1)
        weight = 1 - point.tau.float() if backbone.levels.flow else 1 / gap.clamp(min=1e-5)
        loss = (weight * product.flatten(1).mean(1)).mean()
        return {"fake": error.mean(), "student": loss, "gap": gap.mean()}

    def _level(self, batch):
        if not self.backbone.levels.flow:
            return batch.level(*TAU)
        normal = batch.draws.normal(len(batch.z), dtype=torch.float64)
        return torch.sigmoid(math.log(2) + 1.6 * normal).clamp(*TAU)
