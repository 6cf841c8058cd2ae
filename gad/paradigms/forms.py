"""GAD's forms, which any paradigm may carry: where responses are compared, and what the gradient reaches."""

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional as F

from .. import geometry
from ..diffusion import t_like
from ..params import NEED_A_FAKE
from ..tangents import Tangents, rows
from .base import Draws, Paradigm, pseudo_huber


def gad_loss(
    paradigm: Paradigm, tangents: Tangents, gad, turn: int, generator, part: tuple[int, int] = (0, 1)
) -> Tensor | None:
    """The GAD term at the student's update number `turn`, weighted by λ, as a scalar; None where it does not apply.
    `part` = (i, n): of part i of n of its draws.

    `map`: the student's endpoint map `z → x0` against the teacher's, the output form (paper, L_GAD).
    `step`: the same one step at a time, at the latents of the teacher's path and along its own responses there: the
    student's x̂0 against the one that leads the teacher's path to the student's next time. The Jacobian of a few-step
    map is the product of its steps'; a student that also keeps to the path and matches each step's response matches
    the map's, at a fraction of the cost and without the variance of differentiating through the whole sampler.
    Both learn from stored noises, one direction `v` each: `directions` draws more of those.
    `score`: `(Δfake − Δreal) ∂x_τ/∂θ` as the paper prints it, in x̂0-predictions, which differ by σ²/α times as much as
    scores. `v` is symmetric and independent of x_τ, so its mean over `v` is zero, O(h) with forward differences: kept
    to measure.
    `paired-score`: the same through the student's own response, whose mean is `⟨J_fake − J_real, ∂_θ J_S⟩_F`.
    `released`: what the published script computes.

    Controls, at the same latents as `step`, which must do worse if the teacher's tangents are what helps:
    `unrelated`: another sample's response, of its own noise, prompt and time, brought to this one's size.
    `augmentation`: no tangents; the student moved by `h u` must give what the teacher gives unmoved.
    `rkd` (Park et al. 2019) and `similarity` (Tung & Mori 2019): relations between the samples of a draw.
    """
    if gad.lam == 0 or turn % gad.every:
        return None
    if gad.form in NEED_A_FAKE and paradigm.point is None:
        raise ValueError(f"gad.form={gad.form!r} needs a paradigm with a fake score: use 'map' or 'step'")
    form, draws = FORMS[gad.form], Draws(generator, *part)
    loss = sum(form(paradigm, tangents, gad, draws) for _ in range(gad.directions)) / gad.directions
    return gad.lam * gad.every * loss.mean()


class _Cast:
    """A network with its weights in `dtype`, as autocast has them, which torch.func.jvp does not bear; gradients reach
    its own."""

    def __init__(self, network, dtype):
        self._network, self.dtype = network, dtype
        self._weights = {k: w.to(dtype) if w.is_floating_point() else w
                         for k, w in (*network.named_parameters(), *network.named_buffers())}

    def __getattr__(self, name):
        return getattr(self._network, name)

    def __call__(self, *args, **kwargs):
        return functional_call(self._network, self._weights, args, kwargs)


def _student(paradigm, gad, device):
    """The student, for exact tangents in the precision it trains in: rounding there is of a tangent's own size, where
    a difference divides it by h and needs fp32."""
    if gad.scheme == "exact" and torch.is_autocast_enabled(device.type):
        return _Cast(paradigm.student, torch.get_autocast_dtype(device.type))
    return paradigm.student


def _map(paradigm, tangents, gad, draws):
    at = tangents[draws.integers(len(tangents), gad.pairs // draws.parts)]
    student = _student(paradigm, gad, at.z.device)

    def endpoint(z):
        return paradigm.backbone.sample(student, z, at.cond, paradigm.steps)

    return _output_loss(endpoint, at.z, at.v, at.x0, at.jv, gad)


def _step(paradigm, tangents, gad, draws):
    student, x, u, x0, ju, _ = _along_the_path(paradigm, tangents, gad, draws)
    return _output_loss(student, x, u, x0, ju, gad)


def _along_the_path(paradigm, tangents, gad, draws):
    """(student's x̂0 as a map, x, u, x0, ju, t) at random times of the student along random paths of the teacher."""
    backbone = paradigm.backbone
    n, k = (draws.integers(top, gad.pairs // draws.parts) for top in (len(tangents), paradigm.steps))
    t, s = (paradigm.times.to(k.device)[j] for j in (k, k + 1))
    # x̂0 that takes the teacher's path, and its response, to the next of the student's times in one move.
    (x, x0), (u, ju) = ((a[n, k], backbone.levels.ends(a[n, k], t, a[n, k + 1], s)[0])
                        for a in (tangents.states, tangents.responses))
    size = u.flatten(1).square().mean(1).sqrt()  # so that h is per element here too
    u, ju, cond = u / t_like(size, u), ju / t_like(size, u), rows(tangents.cond, n)
    student = _student(paradigm, gad, x.device)
    return lambda y: backbone.x0(student, y, t, cond), x, u, x0, ju, t


def _unrelated(paradigm, tangents, gad, draws):
    student, x, u, x0, ju, _ = _along_the_path(paradigm, tangents, gad, draws)
    other = ju.roll(1, 0)
    own, its = (a.flatten(1).norm(dim=1) for a in (ju, other))
    return _output_loss(student, x, u, x0, other * t_like(own / its, other), gad)


def _augmentation(paradigm, tangents, gad, draws):
    student, x, u, x0, _, _ = _along_the_path(paradigm, tangents, gad, draws)
    error = (student(x + gad.h * u) - x0).flatten(1).square().mean(1)
    return error / x0.flatten(1).square().mean(1) if gad.normalise else error


def _rkd(paradigm, tangents, gad, draws):
    """Distances in units of their mean, and angles of triples, by smooth L1, weighed 1 to 2 as by the authors."""
    student, x, _, x0, _, _ = _along_the_path(paradigm, tangents, gad, draws)
    (d, a), (d0, a0) = (_relations(y) for y in (student(x), x0))
    return F.smooth_l1_loss(d, d0) + 2 * F.smooth_l1_loss(a, a0)


def _relations(y):
    away = y.flatten(1)[None] - y.flatten(1)[:, None]
    distance = away.square().sum(-1).clamp(min=1e-12).sqrt()
    unit = away / distance[..., None]
    off = ~torch.eye(len(y), dtype=torch.bool, device=y.device)
    return distance[off] / distance[off].mean(), unit @ unit.mT


def _similarity(paradigm, tangents, gad, draws):
    student, x, _, x0, _, _ = _along_the_path(paradigm, tangents, gad, draws)
    own, its = (F.normalize(y.flatten(1) @ y.flatten(1).T, dim=1) for y in (student(x), x0))
    return (own - its).square().mean()


def _output_loss(student, x, v, y, jv, gad):
    """GAD's output loss of `student` at `x` along `v`, for a teacher known to give `y` and to respond by `jv`."""
    def teacher(at):  # linear about x along v
        along = ((at - x) * v).flatten(1).sum(1) / v.square().flatten(1).sum(1)
        return y + t_like(along, jv) * jv

    base = y if gad.scheme == "forward" else None
    loss = geometry.output_loss(
        student, teacher, x, v, gad.h, gad.scheme, teacher_base=base, normalise=gad.normalise
    )
    return loss.log1p() if gad.robust else loss


def _score_maps(paradigm, point):
    backbone, fake = paradigm.backbone, paradigm.roles["fake"].module
    own = paradigm.cfg if paradigm.guided_fake else 1.0  # as where the paradigm compares them
    return (
        lambda x: backbone.x0(fake, x, point.tau, point.cond, own),
        lambda x: backbone.x0(paradigm.teacher, x, point.tau, point.cond, paradigm.cfg),
    )


def _score(paradigm, tangents, gad, draws):
    point = paradigm.point
    x_tau = point.x_tau.detach()
    v = draws.direction(x_tau)
    gradient = geometry.score_gradient(*_score_maps(paradigm, point), x_tau, v, gad.h, gad.scheme)
    return geometry.surrogate(point.x_tau, gradient) / gradient[0].numel()


def _paired_score(paradigm, tangents, gad, draws):
    point = paradigm.point
    v = draws.direction(point.x)
    gradient = geometry.score_gradient(
        *_score_maps(paradigm, point), point.x_tau.detach(), v, gad.h, gad.scheme
    )
    own = geometry.response(point.renoise, point.x, v, gad.h, gad.scheme)
    return geometry.surrogate(own, gradient) / gradient[0].numel()


def _released(paradigm, tangents, gad, draws):
    """The published script (TDM on PixArt-α): its student difference spans two inputs and two times, so it is
    no derivative; `h` is the L2 norm of the whole perturbation, and the update a sign by a Huber of 1e-3."""
    point, backbone = paradigm.point, paradigm.backbone
    x = point.x_tau
    v = draws.direction(x, "sphere")
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


FORMS = {
    "map": _map, "step": _step, "score": _score, "paired-score": _paired_score, "released": _released,
    "unrelated": _unrelated, "augmentation": _augmentation, "rkd": _rkd, "similarity": _similarity,
}
