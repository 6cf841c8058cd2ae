"""LADD, latent adversarial diffusion distillation (Sauer et al. 2024), on samples of the teacher.

The student's x̂ from the noise of a teacher's sample x0, against that sample. D: heads on the frozen teacher's
features of either, noised anew to t < 0.75.

    student:        softplus(−D(x̂)) + recon · SmoothL1(x̂, x0)
    discriminator:  softplus(D(sg x̂)) + softplus(−D(x0)) + softplus(D(x0 of another prompt)) + r1 · R1

Choices: the paper names no paired term; `recon` is that of AMD's Nitro, which makes this output matching, and 0 leaves
it out. As there, misaligned pairs can count as fake and D's times are uniform, where the paper's are logit-normal; each
kind of fake weighs as much as the real samples, where Nitro's two share that weight; softplus is Nitro's cross-entropy,
where SANA-Sprint's LADD has a hinge. The student starts from its own
states along its sampler, where both noise x0. Real and generated samples have noises and times of their own.
"""

import torch
from torch.nn import functional as F

from .base import Adversarial, Batch


class LADD(Adversarial):
    settings = ("lr", "disc_lr", "recon", "r1")

    def losses(self, batch: Batch, step: int) -> dict[str, torch.Tensor]:
        x, t, _ = self.start(batch)
        x_hat = self.backbone.x0(self.student, x, t, batch.cond)
        paired = F.smooth_l1_loss(x_hat, batch.x0)
        fooled = F.softplus(-self.logits(self.features(x_hat, batch))).mean()
        with torch.no_grad():
            _, other = batch.other
            real = self.features(batch.x0, batch)
            fakes = [self.features(x_hat.detach(), batch), self.features(batch.x0, batch, other)]
        loss = F.softplus(-self.logits(real)).mean() + sum(F.softplus(self.logits(f)).mean() for f in fakes)
        return {
            "discriminator": self.regularised(loss, real),
            "student": fooled + self.p["recon"] * paired,
            "fooled": fooled.detach(),
            "paired": paired.detach(),
        }
