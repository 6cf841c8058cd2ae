"""TDM, Trajectory Distribution Matching (Luo et al. 2025), deterministic in `z`.

The student runs the K sampling times; at one of them, t_k, its step to t_{k+1} is trained on what that gives, diffused
to τ in (t_{k+1}, t_k), where it is to have the teacher's distribution:

    x̂, ε̂ = G(x_{t_k}, t_k),   x_τ = diffuse(α x̂ + σ ε̂ at t_{k+1}, to τ)
    student:  Huber_c(x̂ − sg[x̂ + μ_real^w(x_τ) − μ_fake(x_τ)]) / mean|x̂ − μ_real^w|
    fake:     min(SNR_τ, 5) · (μ_fake(x_τ) − sg[x̂])²

The last step's has it. Those on the way come out wider, of Gaussian data by up to a quarter of their variance at K = 4:
the fake learns x̂, as the authors', but ε̂ depends on x̂, so that E[x̂ | x_τ] is not what goes with the score of x_τ.

Choices: each sub-interval has its own noise levels (the authors' `use_separate`); their importance weight, which is
within a few per cent of one, is left out; one fake step per student step, of the same t_k, τ and noise (theirs: new
ones), slower student; β1 is 0.9 (theirs: 0), and the first time is the sampler's own (theirs: 899 of 1000); both
networks' gradients are clipped and both rates fall alike (theirs: the student's alone).
"""

import torch

from ..diffusion import t_like
from .base import Batch, Paradigm, Point, pseudo_huber

T_MIN, MARGIN = 0.02, 0.01  # τ keeps off clean and off t_k


class TDM(Paradigm):
    form = "score"
    settings = ("lr", "fake_lr", "beta1", "huber")

    def __init__(self, backbone, steps, cfg, p, distill):
        super().__init__(backbone, steps, cfg, p, distill)
        self.roles = self.with_fake(distill, 0.95, 0.01)

    def losses(self, batch: Batch, step: int) -> dict[str, torch.Tensor]:
        backbone, levels, n = self.backbone, self.backbone.levels, len(batch.z)
        fake = self.roles["fake"].module
        x, t, s = self.start(batch)
        low = s.clamp(min=T_MIN)
        tau = low + (t - MARGIN - low).clamp(min=0) * batch.uniform(n)
        noise = batch.noise(x)

        def renoise(x, both=None):
            x0, eps = both or backbone.both(self.student, x, t, batch.cond)
            return self._diffuse(levels.step(x0, eps, s), s, tau, noise)

        x_hat, eps_hat = backbone.both(self.student, x, t, batch.cond)
        x_tau = renoise(x, (x_hat, eps_hat))
        self.point = Point(x, t, x_hat, x_tau, tau, batch.cond, renoise)
        with torch.no_grad():
            real = backbone.x0(self.teacher, x_tau, tau, batch.cond, self.cfg)
        guess = backbone.x0(fake, x_tau.detach(), tau, batch.cond)
        alpha, sigma = levels.alpha_sigma(tau)
        weight = t_like((alpha / sigma).square().clamp(max=5), x)
        fake_loss = (weight * (guess - x_hat.detach()).square()).mean()

        scale = (x_hat - real).detach().abs().flatten(1).mean(1)
        target = (x_hat + real - guess).detach()
        loss = (pseudo_huber(x_hat - target, self.p["huber"]) / t_like(scale, x)).mean()
        return {"fake": fake_loss, "student": loss, "gap": scale.mean()}

    def _diffuse(self, x, s, tau, noise):
        """From time `s` (below 0: clean) forward to `tau`."""
        levels = self.backbone.levels
        alpha_s, sigma_s = levels.alpha_sigma(s)
        alpha, sigma = levels.alpha_sigma(tau)
        ratio = alpha / alpha_s
        spread = (sigma**2 - (ratio * sigma_s) ** 2).clamp(min=0).sqrt()
        return t_like(ratio, x) * x + t_like(spread, x) * noise
