"""DMD, distribution matching distillation, in the form of DMD2 (Yin et al. 2024).

The student's x̂ at one of its steps, diffused to any τ, moves by the difference of the fake's and the guided
teacher's predictions there:

    student:  ½ mean (x̂ − sg[x̂ − g])²,   g = (μ_fake(x_τ) − μ_real^w(x_τ)) / mean|x̂ − μ_real^w|
    fake:     mean (ε̂_fake(x_τ') − ε)²  on sg[x̂], own τ' and noise; a flow's in velocity

Choices: the normaliser is per sample and takes the guided teacher, as the authors'; the fake learns at each step,
the student at each `ratio`-th (theirs: 5 to 10); states are the student's own along its deterministic sampler, where
DMD2 draws new noise between steps; β2 is 0.95 (theirs: 0.999), gradients are clipped at 1 (theirs: 10), rates fall
(theirs do not) and the fake's own may be higher (theirs are equal); τ of a flow is uniform, not shifted; DMD2's GAN
loss is left to LADD.
"""

import torch

from .base import TAU, Batch, Paradigm, guess_gradient, toward


class DMD(Paradigm):
    form = "score"
    settings = ("lr", "fake_lr", "beta1", "ratio")

    def __init__(self, backbone, steps, cfg, p, distill):
        super().__init__(backbone, steps, cfg, p, distill)
        self.roles = self.with_fake(distill, 0.95, 0.01)

    def turn(self, step):
        return step // int(self.p["ratio"])

    def losses(self, batch: Batch, step: int) -> dict[str, torch.Tensor]:
        backbone, fake = self.backbone, self.roles["fake"].module
        turn = step % int(self.p["ratio"]) == 0
        with torch.set_grad_enabled(turn):
            point = self.point = self.diffused(batch, batch.level(*TAU))
        out = {"fake": self.denoising(fake, point.x_hat.detach(), batch.level(), batch).mean()}
        if turn:
            with torch.no_grad():
                guess = backbone.x0(fake, point.x_tau, point.tau, batch.cond)
                real = backbone.x0(self.teacher, point.x_tau, point.tau, batch.cond, self.cfg)
                gradient, scale = guess_gradient(guess, real, point.x_hat)
            out |= {"student": toward(point.x_hat, gradient).mean(), "gap": scale.mean()}
        return out
