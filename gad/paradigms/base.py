"""What a paradigm is."""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..backbones import Backbone, Condition
from ..training import Role


@dataclass(frozen=True)
class Batch:
    """`z` (B, C, H, W): initial noises. `cond`: their prompts. `generator`: all further randomness."""

    z: Tensor
    cond: Condition
    generator: torch.Generator

    def uniform(self, n: int) -> Tensor:
        return torch.rand(n, generator=self.generator, device=self.z.device, dtype=torch.float64)

    def noise(self, like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=self.generator, device=like.device)


@dataclass(frozen=True)
class Point:
    """Where the last `losses` stood, for the score-based forms of GAD.

    `x` (B, C, H, W) the student's input at time `t`; `x_hat` its x̂0 and `x_tau` the re-noised sample at time
    `tau`, both with gradient; `renoise` is the map `x → x_tau` with its noise held fixed.
    """

    x: Tensor
    t: Tensor
    x_hat: Tensor
    x_tau: Tensor
    tau: Tensor
    cond: Condition
    renoise: Callable[[Tensor], Tensor]


class Paradigm:
    """A few-step distillation method on one backbone.

    `roles` are the modules it trains; "student" is always there. `form` is the paper's form of GAD for it.
    """

    form = "map"

    def __init__(self, backbone: Backbone, steps: int, cfg: float, p: dict, distill):
        self.backbone, self.steps, self.cfg, self.p = backbone, steps, cfg, p
        self.teacher = backbone.network
        self.student = self.copy_of_teacher()
        self.roles: dict[str, Role] = {}
        self.point: Point | None = None

    def copy_of_teacher(self) -> nn.Module:
        return copy.deepcopy(self.teacher).requires_grad_(True)

    def losses(self, batch: Batch, step: int) -> dict[str, Tensor]:
        """Scalar losses by role, and scalars to log. Leaves `point` where it has a fake."""
        raise NotImplementedError


def pseudo_huber(error: Tensor, c: float) -> Tensor:
    """`√(e² + c²) − c`, elementwise; `c = 0` is half the square instead."""
    return (error.square() + c * c).sqrt() - c if c else error.square() / 2
