"""What a paradigm is, and GAD's four forms, which any paradigm may carry."""

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .. import geometry
from ..backbones import Backbone, Condition
from ..diffusion import t_like
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


@dataclass(frozen=True)
class Tangents:
    """Noises with the teacher's exact response: `z`, `v`, endpoint `x0` and `jv = J_T(z) v`, (N, C, H, W)
    each, and the prompts' conditions."""

    z: Tensor
    v: Tensor
    x0: Tensor
    jv: Tensor
    cond: Condition

    def __len__(self):
        return len(self.z)

    def __getitem__(self, i) -> "Tangents":
        return Tangents(self.z[i], self.v[i], self.x0[i], self.jv[i], self.cond[i])

    @staticmethod
    def inputs(backbone: Backbone, prompts: list[str], seeds: tuple[int, int]) -> tuple[Tensor, Tensor, Condition]:
        """(z, v, cond): what a file need not hold."""
        return *(backbone.noise(len(prompts), seed) for seed in seeds), backbone.encode(prompts)

    @staticmethod
    def save(path: Path, x0: Tensor, jv: Tensor, prompts: list[str], seeds: tuple[int, int]):
        meta = {"prompts": json.dumps(prompts), "seeds": json.dumps(seeds)}
        save_file({"x0": x0.cpu().contiguous(), "jv": jv.cpu().contiguous()}, path, meta)

    @staticmethod
    def load(path: Path, backbone: Backbone) -> "Tangents":
        """On the backbone's device; noises from their seeds, prompts encoded anew."""
        try:
            with safe_open(path, "pt", str(backbone.device)) as f:
                x0, jv, meta = f.get_tensor("x0"), f.get_tensor("jv"), f.metadata()
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{path} cannot be read ({error}): run the diagnose stage again") from None
        z, v, cond = Tangents.inputs(backbone, json.loads(meta["prompts"]), json.loads(meta["seeds"]))
        return Tangents(z, v, x0, jv, cond)


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


def gad_loss(paradigm: Paradigm, tangents: Tangents, gad, step: int, generator) -> Tensor | None:
    """The GAD term of this step, weighted by λ, as a scalar; None where it does not apply.

    `map`: the student's endpoint map against the teacher's (paper eq. of L_GAD, endpoint form).
    `score`: `(Δfake − Δreal) ∂x_τ/∂θ` as the paper prints it. `v` is symmetric and independent of x_τ, so its
    mean over `v` is zero up to O(h²): kept to measure. `paired-score`: the same through the student's own
    response, whose mean is `⟨J_fake − J_real, ∂_θ J_S⟩_F`. `released`: what the published script computes.
    """
    if gad.lam == 0 or step % gad.every:
        return None
    if gad.form != "map" and paradigm.point is None:
        raise ValueError(f"gad.form={gad.form!r} needs a paradigm with a fake score: use 'map'")
    form = {"map": _map, "score": _score, "paired-score": _paired_score, "released": _released}[gad.form]
    loss = sum(form(paradigm, tangents, gad, generator) for _ in range(gad.directions)) / gad.directions
    return gad.lam * gad.every * loss.mean()


def _map(paradigm, tangents, gad, generator):
    i = torch.randint(len(tangents), (gad.pairs,), generator=generator, device=generator.device)
    at = tangents[i]
    backbone, student = paradigm.backbone, paradigm.student

    def endpoint(z):
        return backbone.sample(student, z, at.cond, paradigm.steps)

    def tangent(z):  # the teacher's endpoint map, linear about the stored noise along v
        along = ((z - at.z) * at.v).flatten(1).sum(1) / at.v.square().flatten(1).sum(1)
        return at.x0 + t_like(along, at.jv) * at.jv

    base = at.x0 if gad.scheme == "forward" else None
    loss = geometry.output_loss(
        endpoint, tangent, at.z, at.v, gad.h, gad.scheme, teacher_base=base, normalise=gad.normalise
    )
    return loss.log1p() if gad.robust else loss


def _score_maps(paradigm, point):
    backbone, fake = paradigm.backbone, paradigm.roles["fake"].module
    return (
        lambda x: backbone.x0(fake, x, point.tau, point.cond),
        lambda x: backbone.x0(paradigm.teacher, x, point.tau, point.cond, paradigm.cfg),
    )


def _score(paradigm, tangents, gad, generator):
    point = paradigm.point
    x_tau = point.x_tau.detach()
    v = geometry.direction(x_tau, generator=generator)
    gradient = geometry.score_gradient(*_score_maps(paradigm, point), x_tau, v, gad.h, gad.scheme)
    return geometry.surrogate(point.x_tau, gradient) / gradient[0].numel()


def _paired_score(paradigm, tangents, gad, generator):
    point = paradigm.point
    v = geometry.direction(point.x, generator=generator)
    gradient = geometry.score_gradient(
        *_score_maps(paradigm, point), point.x_tau.detach(), v, gad.h, gad.scheme
    )
    own = geometry.response(point.renoise, point.x, v, gad.h, gad.scheme)
    return geometry.surrogate(own, gradient) / gradient[0].numel()


def _released(paradigm, tangents, gad, generator):
    """The published script (TDM on PixArt-α): its student difference spans two inputs and two times, so it is
    no derivative; `h` is the L2 norm of the whole perturbation, and the update a sign by a Huber of 1e-3."""
    point, backbone = paradigm.point, paradigm.backbone
    x = point.x_tau
    v = geometry.direction(x, "sphere", generator)
    fake, guided = _score_maps(paradigm, point)
    with torch.no_grad():
        at = x.detach()
        d_fake = (fake(at + gad.h * v) - fake(at)) / gad.h
        d_real = (guided(at + gad.h * v) - guided(at)) / gad.h
    ahead = backbone.x0(paradigm.student, x + gad.h * v, point.tau, point.cond)
    d_student = (ahead - point.x_hat) / gad.h
    target = (d_student + d_real - d_fake).detach()
    norm = (d_student - d_real).detach().abs().flatten(1).mean(1) + 1e-8
    return (pseudo_huber(d_student - target, 1e-3) / t_like(norm, x)).flatten(1).mean(1)


def pseudo_huber(error: Tensor, c: float) -> Tensor:
    """`√(e² + c²) − c`, elementwise; `c = 0` is half the square instead."""
    return (error.square() + c * c).sqrt() - c if c else error.square() / 2
