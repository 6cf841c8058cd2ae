"""TCD, trajectory consistency distillation (Zheng et al. 2024), measured at γ = 0, where its sampler is DDIM.

A teacher's sample noised to t moves by one step of the guided teacher's solver to t'. From both, the student's jump to
the same time s ≤ t' must end at the same place:

    student:  pseudo-Huber_c(f(x_t, t → s) − sg f(x_t', t' → s)),   f: the DDIM move along the student's own x̂0, ε̂

Choices: t is on a grid of `solver` times, s any of the later ones or clean; the target network is the student itself,
without gradient (as improved consistency training found best), so that a checkpoint is weights and moments alone; w is
fixed and not told to the network; a shifted flow's grid misses the student's own times by up to 0.02. No training code
is public: this is the paper's, by way of its unofficial trainers.
"""

import torch

from ..training import Role
from .base import Batch, Paradigm, pseudo_huber


class TCD(Paradigm):
    paired = True
    settings = ("lr", "solver", "huber")

    def __init__(self, backbone, steps, cfg, p, distill):
        super().__init__(backbone, steps, cfg, p, distill)
        self.grid = backbone.times(int(p["solver"]))
        self.roles = {"student": Role(self.student, p["lr"], (0.9, 0.999), 0.0, distill.clip, distill.ema)}

    def losses(self, batch: Batch, step: int) -> dict[str, torch.Tensor]:
        backbone, n = self.backbone, len(batch.z)
        grid, solver = self.grid.to(batch.z.device), len(self.grid) - 1
        k = (batch.uniform(n) * solver).long()
        end = k + 1 + (batch.uniform(n) * (solver - k)).long()  # k + 1 … solver
        t, after, s = grid[k], grid[k + 1], grid[end]
        x = backbone.add_noise(batch.x0, batch.noise(batch.x0), t)
        jump = self._jump(x, t, s, batch.cond)
        with torch.no_grad():
            moved = backbone.step(self.teacher, x, t, after, batch.cond, self.cfg)
            there = (end == k + 1).nonzero().flatten()  # no way left to go
            target = self._jump(moved, after.clamp(min=0), s, batch.cond)
            target[there] = moved[there]
        return {"student": pseudo_huber(jump - target, self.p["huber"]).mean()}

    def _jump(self, x, t, s, cond):
        return self.backbone.step(self.student, x, t, s, cond)
