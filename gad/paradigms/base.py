"""What a paradigm is, and what several of them share."""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import geometry
from ..backbones import Backbone, Condition
from ..training import Role

TAU = (0.02, 0.98)  # levels at which scores are compared: DMD's, SwiftBrush's and SiD's


@dataclass(frozen=True)
class Draws:
    """Random numbers of one part of a step's batch: drawn for all `parts` alike, of which part number `part` sees its
    own rows. However many processes share a batch, it is the same batch."""

    generator: torch.Generator
    part: int = 0
    parts: int = 1

    device = property(lambda self: self.generator.device)
    all = property(lambda self: Draws(self.generator))

    def uniform(self, n: int) -> Tensor:
        """(n,) in [0, 1), fp64."""
        return self.own(torch.rand(n * self.parts, generator=self.generator, device=self.device, dtype=torch.float64))

    def normal(self, n: int, *shape: int, dtype=None) -> Tensor:
        """(n, *shape)."""
        n *= self.parts
        return self.own(torch.randn(n, *shape, generator=self.generator, device=self.device, dtype=dtype))

    def integers(self, top: int, n: int) -> Tensor:
        """(n,) below `top`."""
        return self.own(torch.randint(top, (n * self.parts,), generator=self.generator, device=self.device))

    def direction(self, x: Tensor, kind: str = "gaussian") -> Tensor:
        """`geometry.direction`."""
        whole = x.detach().repeat(self.parts, *[1] * (x.ndim - 1))
        return self.own(geometry.direction(whole, kind, self.generator))

    def chance(self, p: float) -> bool:
        """One outcome for all parts."""
        return bool(torch.rand(1, generator=self.generator, device=self.device, dtype=torch.float64) < p)

    def own(self, x):
        """This part's rows."""
        return x.chunk(self.parts)[self.part]


@dataclass(frozen=True)
class Batch:
    """`z` (B, C, H, W): initial noises. `cond`: their prompts. `generator`: all further randomness. `x0`: where the
    teacher's sampler takes each `z`, for a paradigm that is `paired`; `other`: noises and prompts of other samples.
    `part` = (i, n): this is part i of n."""

    z: Tensor
    cond: Condition
    generator: torch.Generator
    x0: Tensor | None = None
    other: tuple[Tensor, Condition] | None = None
    part: tuple[int, int] = (0, 1)

    @property
    def draws(self) -> Draws:
        return Draws(self.generator, *self.part)

    def uniform(self, n: int) -> Tensor:
        return self.draws.uniform(n)

    def noise(self, like: Tensor) -> Tensor:
        return self.draws.normal(*like.shape)

    def level(self, low: float = 0.0, high: float = 1.0) -> Tensor:
        """A time for each sample, uniform."""
        return low + (high - low) * self.uniform(len(self.z))


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

    `roles` are the modules it trains; "student" is always there. `form` is the paper's form of GAD for it. One that is
    `paired` learns from samples of the teacher; where a fake's score is guided as the teacher's is, it has a
    `guided_fake`. All students are sampled alike, by DDIM (Euler for a flow) at `times`, so that an image is a function
    of `z`; a method trains one of those steps at a time, at the student's own states. All roles that move at a step do
    so by the losses of one call, where some authors let one move before the next. What is saved is an average of the
    student (TDM's is its last), and the teacher's guidance is the backbone's, whatever an author's own.
    """

    form = "map"
    paired = False
    guided_fake = False
    settings: tuple[str, ...] = ()  # its keys in params.yaml, all of them needed; any may have `steps`, of its training

    def __init__(self, backbone: Backbone, steps: int, cfg: float, p: dict, distill):
        name = type(self).__name__.lower()
        for key in {*p, *self.settings} - {"steps"}:
            if key not in p:
                raise ValueError(f"paradigms.{name}.{key} is missing: add it")
            if key not in self.settings:
                known = ", ".join(self.settings) or "no `settings`"
                raise ValueError(f"paradigms.{name}.{key}={p[key]!r} is not a key of this paradigm: it has {known}")
        self.backbone, self.steps, self.cfg, self.p = backbone, steps, cfg, p
        self.teacher = backbone.network
        self.student = self.copy_of_teacher()
        self.times = backbone.times(steps)
        self.roles: dict[str, Role] = {}
        self.point: Point | None = None

    def with_fake(self, distill, beta2: float, decay: float, fake: nn.Module | None = None) -> dict[str, Role]:
        """The roles of a score-based method: a fake, of its own learning rate, and the student."""
        betas = self.p["beta1"], beta2
        fake = self.copy_of_teacher() if fake is None else fake
        return {
            "fake": Role(fake, self.p["fake_lr"], betas, decay, distill.clip),
            "student": Role(self.student, self.p["lr"], betas, decay, distill.clip, distill.ema),
        }

    def copy_of_teacher(self) -> nn.Module:
        made = copy.deepcopy(self.teacher).requires_grad_(True)
        for module in made.modules():
            vars(module).pop("forward", None)  # of a compiled block: the original's
        return made

    def losses(self, batch: Batch, step: int) -> dict[str, Tensor]:
        """Scalar losses by role, and scalars to log. Leaves `point` where it has a fake."""
        raise NotImplementedError

    def turn(self, step: int) -> int:
        """Which of the student's updates a training step makes, if it makes one."""
        return step

    def start(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """One step of the student's sampler for each sample: its own state `x` there, from time `t` to `s`, (B,)."""
        draws, times = batch.draws, self.times.to(batch.z.device)
        k = (draws.all.uniform(len(batch.z) * draws.parts) * self.steps).long()
        calls, k = int(k.max()), draws.own(k)
        return self._states(batch, k, calls), times[k], times[k + 1]

    @torch.no_grad()
    def _states(self, batch, k, calls):
        """The student's own state at time t_k of each sample; only the samples still on their way are run, but all
        parts of a batch call the student equally often: where it is sharded they must."""
        x, times = batch.z.clone(), self.times.to(batch.z.device)
        for j in range(calls):
            on = (k > j).nonzero().flatten()
            i = on if len(on) else k.new_zeros(1)
            t = times[j].expand(len(i))
            moved = self.backbone.step(self.student, x[i], t, times[j + 1].expand(len(i)), batch.cond[i])
            x[on] = moved[:len(on)]
        return x

    def diffused(self, batch: Batch, tau: Tensor) -> Point:
        """The student's x̂0 at one of its steps, diffused to the times `tau` by new noise."""
        x, t, _ = self.start(batch)
        noise = batch.noise(x)

        def renoise(y, x_hat=None):
            x_hat = self.backbone.x0(self.student, y, t, batch.cond) if x_hat is None else x_hat
            return self.backbone.add_noise(x_hat, noise, tau)

        x_hat = self.backbone.x0(self.student, x, t, batch.cond)
        return Point(x, t, x_hat, renoise(x, x_hat), tau, batch.cond, renoise)

    def denoising(self, fake, x_hat: Tensor, tau: Tensor, batch: Batch, cond=None, cfg: float = 1.0) -> Tensor:
        """Mean squared error (B,) of a fake on the student's samples: of ε̂, or of a flow's velocity."""
        noise = batch.noise(x_hat)
        cond = batch.cond if cond is None else cond
        out = self.backbone.output(fake, self.backbone.add_noise(x_hat, noise, tau), tau, cond, cfg)
        levels = self.backbone.levels
        error = (out.float() - levels.target(x_hat, noise, tau)).square().flatten(1).mean(1)
        return levels.alpha_sigma(tau)[0].square() * error if levels.prediction == "v" else error  # v's is ε's over α


class Heads(nn.Module):
    """A discriminator on features: a small network for each block it reads, a logit for each of its places."""

    def __init__(self, features: list[Tensor], width: int = 64):
        super().__init__()
        self.heads = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(n), nn.Linear(n, width), nn.SiLU(), nn.Linear(width, 1))
            for n in (_tokens(f).shape[2] for f in features)
        )

    def forward(self, features: list[Tensor]) -> Tensor:
        """Logits (B, all places)."""
        found = [head(_tokens(f).float())[..., 0] for head, f in zip(self.heads, features, strict=True)]
        return torch.cat(found, 1)


def _tokens(f: Tensor) -> Tensor:
    return f.flatten(2).mT if f.ndim == 4 else f


class Adversarial(Paradigm):
    """A paradigm with a discriminator: heads on features of the frozen teacher, which know noise level and prompt. Ours
    for all of them: heads are small networks of each place; Adam's betas are (0.9, 0.95) for the student, with a decay
    of 0.01, and (0, 0.99) for the heads (LADD as in Nitro: (0.9, 0.999))."""

    paired = True

    def __init__(self, backbone, steps, cfg, p, distill):
        super().__init__(backbone, steps, cfg, p, distill)
        with torch.no_grad():
            z = backbone.noise(1, 0)
            features = backbone.features(self.teacher, z, z.new_ones(1), backbone.null)
        heads = Role(Heads(features), p["disc_lr"], (0.0, 0.99), 0.0, distill.clip)
        student = Role(self.student, p["lr"], (0.9, 0.95), 0.01, distill.clip, distill.ema)
        self.roles = {"discriminator": heads, "student": student}

    def features(self, x0: Tensor, batch: Batch, cond=None) -> list[Tensor]:
        """The teacher's of `x0`, noised anew to times in [0, 0.75)."""
        t = batch.level(0.0, 0.75)
        x_t = self.backbone.add_noise(x0, batch.noise(x0), t)
        return self.backbone.features(self.teacher, x_t, t, batch.cond if cond is None else cond)

    def logits(self, features: list[Tensor]) -> Tensor:
        return self.roles["discriminator"].module(features)

    def regularised(self, loss: Tensor, real: list[Tensor]) -> Tensor:
        """A discriminator's `loss` with its share of R1."""
        return loss + self.p["r1"] * self.penalty(real) if self.p["r1"] else loss

    def penalty(self, features: list[Tensor]) -> Tensor:
        """R1: squared gradient of a sample's mean logit with respect to the features of real samples, mean per sample;
        of n places in all blocks 1/n² of what it is for the sum of logits."""
        features = [f.detach().requires_grad_(True) for f in features]
        gradients = torch.autograd.grad(self.logits(features).mean(1).sum(), features, create_graph=True)
        return sum(g.square().flatten(1).sum(1).mean() for g in gradients)


def guess_gradient(fake: Tensor, real: Tensor, x_hat: Tensor) -> tuple[Tensor, Tensor]:
    """DMD's gradient in x̂0-predictions, `(fake − real) / mean|x̂ − real|` per sample, and that mean (B,)."""
    scale = (x_hat - real).abs().flatten(1).mean(1).clamp(min=1e-5)
    return (fake - real) / scale.view(-1, *[1] * (real.ndim - 1)), scale


def toward(x_hat: Tensor, gradient: Tensor) -> Tensor:
    """A loss (B,) whose gradient in `x_hat` is `gradient` over the number of elements."""
    return 0.5 * (x_hat - (x_hat - gradient).detach()).square().flatten(1).mean(1)


def dropped(backbone: Backbone, cond: Condition, mask: Tensor) -> Condition:
    """`cond` with the empty prompt where `mask` (B,) is true."""
    null = backbone.null
    short = cond.embeds.shape[1] - null.embeds.shape[1]
    embeds, kept = F.pad(null.embeds, (0, 0, 0, short)), F.pad(null.mask, (0, short))
    return Condition(torch.where(mask[:, None, None], embeds, cond.embeds), torch.where(mask[:, None], kept, cond.mask))


def pseudo_huber(error: Tensor, c: float) -> Tensor:
    """`√(e² + c²) − c`, elementwise; `c = 0` is half the square instead."""
    return (error.square() + c * c).sqrt() - c if c else error.square() / 2
