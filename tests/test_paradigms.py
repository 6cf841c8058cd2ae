"""GAD's forms against closed forms on linear-Gaussian models, and paradigms on the real networks."""

import gc
import inspect
from functools import cache
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from conftest import build, perturb
from diffusers import DDIMScheduler, TCDScheduler
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

from gad import distill, params
from gad.activations import anew
from gad.backbones import Condition, load_network
from gad.diffusion import Levels
from gad.distill import Distillation, look
from gad.evaluation.geometry import tangents
from gad.evaluation.precision import sweep
from gad.evaluation.trajectory import errors
from gad.paradigms import PARADIGMS
from gad.paradigms.base import Batch, Draws, Paradigm, Point, dropped
from gad.paradigms.forms import FORMS, NEED_A_FAKE, _relations, gad_loss
from gad.params import Run
from gad.tangents import Paths, Samples, Tangents
from gad.training import DivergedError, step_generator, train, update

D = 4
P = params.load()


class Linear:
    """A backbone all of whose maps are matrices: x̂0 = W x, and W z is the endpoint."""

    levels = Levels(DDIMScheduler())

    def x0(self, network, x, t, cond, cfg=1.0):
        return network(x)

    def sample(self, network, z, cond, steps, cfg=1.0):
        return network(z)

    def times(self, steps):
        return torch.tensor([0.9, 0.6, -1.0], dtype=torch.float64)


class Curved(Linear):
    """x̂0 = w t c W (x + x² / 2), x² by element: c is the prompt and w its guidance, against an empty prompt of 0."""

    def x0(self, network, x, t, cond, cfg=1.0):
        return cfg * t[:, None] * cond.embeds[:, 0] * network(x + x.square() / 2)


def matrix(w):
    layer = nn.Linear(D, D, bias=False, dtype=torch.float64)
    layer.weight.data.copy_(w)
    return layer


def posterior(cov, alpha, sigma):
    """The x0-posterior mean's matrix for x_t = α x0 + σ ε, x0 ~ N(0, cov)."""
    return alpha * cov @ torch.linalg.inv(alpha**2 * cov + sigma**2 * torch.eye(D, dtype=torch.float64))


@pytest.fixture
def linear():
    """A student W, a fake and a real Gaussian score, and a point with N samples."""
    g = torch.Generator().manual_seed(0)
    alpha, sigma, n = 0.8, 0.6, 40_000

    def random(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    covs = [a @ a.T / D + 0.2 * torch.eye(D, dtype=torch.float64) for a in (random(D, D), random(D, D))]
    k_fake, k_real = (posterior(c, alpha, sigma) for c in covs)
    student, noise, x = matrix(random(D, D)), random(n, D), random(n, D)

    def renoise(y):
        return alpha * student(y) + sigma * noise

    point = Point(x, torch.ones(n), student(x), renoise(x), torch.full((n,), 0.5), None, renoise)
    paradigm = SimpleNamespace(
        backbone=Linear(), student=student, teacher=matrix(k_real), cfg=1.0, steps=1, point=point, guided_fake=False,
        roles={"fake": SimpleNamespace(module=matrix(k_fake))},
    )
    return SimpleNamespace(p=paradigm, k_fake=k_fake, k_real=k_real, alpha=alpha, x=x, n=n, random=random)


@pytest.fixture
def curved(linear):
    """Those networks where x̂0 knows place, time, prompt and guidance, which differ by sample."""
    p, n = linear.p, 6
    x, noise, (t, tau, c) = linear.random(n, D), linear.random(n, D), linear.random(3, n).sigmoid()
    cond = Condition(c[:, None, None], torch.ones(n, 1))
    p.backbone, p.cfg = Curved(), 3.0

    def renoise(y):
        return linear.alpha * p.backbone.x0(p.student, y, t, cond) + 0.6 * noise

    p.point = Point(x, t, p.backbone.x0(p.student, x, t, cond), renoise(x), tau, cond, renoise)
    linear.n, linear.c = n, c
    return linear


def term(paradigm, tangents, generator=None, **over):
    gad = P.gad.model_copy(update={"lam": 1.0, "every": 1, "normalise": False, "robust": False, **over})
    return gad_loss(paradigm, tangents, gad, 0, generator or torch.Generator().manual_seed(0))


def gradient(paradigm, *args, **kwargs):
    return torch.autograd.grad(term(paradigm, *args, **kwargs), paradigm.student.weight, retain_graph=True)[0]


def paths(z, v, *steps):
    """Tangents of a teacher whose steps are matrices."""
    states, responses = [z], [v]
    for w in steps:
        states.append(states[-1] @ w.T)
        responses.append(responses[-1] @ w.T)
    cond = Condition(torch.zeros(len(z), 1, 1), torch.ones(len(z), 1))
    return Tangents(torch.stack(states, 1), torch.stack(responses, 1), cond)


@pytest.mark.parametrize("scheme", ["forward", "central", "exact"])
def test_map_form_has_the_jacobians_difference_as_mean_gradient(linear, scheme):
    target = linear.random(D, D)
    z, v = linear.random(linear.n, D), linear.random(linear.n, D)
    t = paths(z, v, target)
    found = gradient(linear.p, t, form="map", pairs=linear.n, scheme=scheme)
    expected = 2 / D * (linear.p.student.weight - target)
    assert torch.allclose(found, expected, atol=0.06 * expected.abs().max().item())


def test_robust_map_form_grows_as_a_logarithm(linear):
    target = linear.random(D, D)
    z, v = linear.random(8, D), linear.random(8, D)
    for i in range(8):
        one = paths(z, v, target)[i:i + 1]
        plain, robust = (term(linear.p, one, form="map", pairs=1, robust=r) for r in (False, True))
        assert torch.allclose(robust, plain.log1p())


def test_directions_are_averaged_and_normalised_by_the_teachers_response(linear):
    one = paths(*(linear.random(1, D) for _ in range(2)), linear.random(D, D))
    plain = term(linear.p, one, form="map", pairs=1)
    assert torch.allclose(term(linear.p, one, form="map", pairs=1, normalise=True), plain / one.jv.square().mean())
    some, g = paths(*(linear.random(12, D) for _ in range(2)), linear.random(D, D)), torch.Generator().manual_seed(0)
    draws = torch.stack([term(linear.p, some, g, form="map", pairs=2) for _ in range(3)])
    assert len(draws.unique()) == 3
    assert torch.allclose(term(linear.p, some, form="map", pairs=2, directions=3), draws.mean())


@pytest.mark.parametrize("scheme", ["forward", "central", "exact"])
def test_step_form_has_each_steps_difference_as_mean_gradient(linear, scheme):
    """A step is x_s = a x_t + b x̂0 with b = α_s − α_t σ_s / σ_t and a = σ_s / σ_t: the teacher's step A asks for
    x̂0 = (A − a) / b, along the teacher's response there."""
    linear.p.steps, linear.p.times, n = 2, Linear().times(2), linear.n
    a, b = 0.5 * linear.random(D, D), linear.random(D, D)
    t = paths(linear.random(n, D), linear.random(n, D), a, b)
    found = gradient(linear.p, t, form="step", pairs=n, scheme=scheme)
    expected = 0
    for k, step in enumerate((a, b)):
        (at, st), (as_, ss) = (
            [x.double().item() for x in Linear.levels.alpha_sigma(time[None])] for time in Linear().times(2)[k:k + 2]
        )
        x0 = (step - ss / st * torch.eye(D)) / (as_ - at * ss / st)
        u = t.responses[:, k]
        u = u / u.square().mean(1, keepdim=True).sqrt()
        expected = expected + (linear.p.student.weight - x0) @ (u.T @ u / n) / D  # 2 / D, each step half of the time
    assert torch.allclose(found, expected, atol=0.06 * expected.abs().max().item())


@pytest.fixture
def one_step(linear):
    """The linear student at the first of one step, along a teacher's path by the matrix `target`."""
    linear.p.steps, linear.p.times = 1, Linear().times(2)[[0, 2]]
    target, n = linear.random(D, D), 12
    return linear.p, paths(linear.random(n, D), linear.random(n, D), target)


def drawn(t, pairs):
    """What a form draws: (x, u, x0, ju), u of unit RMS."""
    i = torch.randint(len(t), (pairs,), generator=torch.Generator().manual_seed(0))
    size = t.v[i].square().mean(1, keepdim=True).sqrt()
    # One step to clean: x̂0 is the endpoint itself.
    return t.z[i], t.v[i] / size, t.x0[i], t.jv[i] / size


def test_unrelated_form_asks_for_another_samples_response_at_its_own_size(one_step):
    paradigm, t = one_step
    _, u, _, ju = drawn(t, 6)
    other = ju.roll(1, 0) * (ju.norm(dim=1) / ju.roll(1, 0).norm(dim=1))[:, None]
    expected = (paradigm.student(u) - other).square().mean()
    assert torch.allclose(term(paradigm, t, form="unrelated", pairs=6, scheme="exact"), expected, rtol=1e-5)


def test_augmentation_form_asks_for_the_unmoved_point(one_step):
    paradigm, t = one_step
    x, u, x0, _ = drawn(t, 6)
    expected = (paradigm.student(x + 0.3 * u) - x0).square().mean()
    assert torch.allclose(term(paradigm, t, form="augmentation", pairs=6, h=0.3), expected, rtol=1e-5)


@pytest.mark.parametrize("form", ["rkd", "similarity"])
def test_relational_forms_ignore_what_keeps_relations(one_step, form):
    """A student that is the teacher turned by an orthogonal matrix has all its relations (distances, angles, products),
    though none of its values; another student has not."""
    paradigm, t = one_step
    target = torch.linalg.lstsq(t.z, t.x0).solution.T
    turned = torch.linalg.qr(torch.randn(D, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64))[0]
    other = term(paradigm, t, form=form, pairs=6)
    with torch.no_grad():
        paradigm.student.weight.copy_(turned @ target)
    assert term(paradigm, t, form=form, pairs=6).abs() < 1e-8 < 1e-3 < other


def test_relational_terms_by_hand(one_step):
    """RKD over pairs and triples, SP over rows of Gram matrices."""
    paradigm, t = one_step
    x, _, x0, _ = drawn(t, 4)
    y = paradigm.student(x)
    ids = range(4)

    def same(form, expected):
        found = term(paradigm, t, form=form, pairs=4)
        assert torch.allclose(found, expected, rtol=1e-6)
        w = paradigm.student.weight
        ours, theirs = (torch.autograd.grad(a, w, retain_graph=True)[0] for a in (found, expected))
        assert torch.allclose(ours, theirs, rtol=1e-6, atol=1e-9)

    def pairs(a):
        found = torch.stack([(a[i] - a[j]).norm() for i in ids for j in ids if i != j])
        return found / found.mean()

    def triples(a):
        unit = [[F.normalize(a[j] - a[i], dim=0) for j in ids] for i in ids]
        return torch.stack([unit[i][j] @ unit[i][k] for i in ids for j in ids for k in ids])

    def huber(a, b):
        e = (a - b).abs()
        return torch.where(e < 1, e * e / 2, e - 0.5).mean()

    rkd = huber(pairs(y), pairs(x0)) + 2 * huber(triples(y), triples(x0))
    same("rkd", rkd)
    gram = [torch.stack([F.normalize(row, dim=0) for row in a @ a.T]) for a in (y, x0)]
    similarity = (gram[0] - gram[1]).square().sum() / 16
    same("similarity", similarity)


def test_normalised_augmentation_is_a_relative_error(one_step):
    paradigm, t = one_step
    x, u, x0, _ = drawn(t, 6)
    with torch.no_grad():
        error = (paradigm.student(x + 0.3 * u) - x0).square().sum(1) / x0.square().sum(1)
    found = term(paradigm, t, form="augmentation", pairs=6, h=0.3, normalise=True)
    assert torch.allclose(found, error.mean(), rtol=1e-5)


def test_distances_and_angles_of_a_right_triangle():
    y = torch.zeros(3, D, dtype=torch.float64)
    y[1, 0], y[2, 1] = 3, 4
    distances, angles = _relations(y)
    assert torch.allclose(distances, torch.tensor([3, 4, 3, 5, 4, 5], dtype=torch.float64) / 4)
    assert torch.allclose(angles[0, 1, 2], torch.tensor(0.0, dtype=torch.float64))
    assert torch.allclose(angles[1, 0, 2], torch.tensor(0.6, dtype=torch.float64))


def test_paired_score_form_matches_jacobians_in_the_mean(linear):
    found = gradient(linear.p, None, form="paired-score")
    expected = linear.alpha * (linear.k_fake - linear.k_real) / D
    assert torch.allclose(found, expected, atol=0.05 * expected.abs().max().item())


def test_score_form_as_printed_has_no_mean(linear):
    """Each draw has (J_fake − J_real) v on the way from x_τ to the student."""
    paired = linear.alpha * (linear.k_fake - linear.k_real).norm() / D
    draws = torch.stack([gradient(linear.p, None, torch.Generator().manual_seed(s), form="score") for s in range(20)])
    error = draws.std(0) / 20**0.5
    assert (draws.mean(0).abs() < 4.5 * error).all()
    assert draws.mean(0).norm() < 0.05 * paired
    v = torch.randn(linear.n, D, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = linear.alpha / D / linear.n * (linear.k_fake - linear.k_real) @ v.T @ linear.x
    assert torch.allclose(draws[0], expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("form", ["score", "paired-score"])
def test_score_forms_compare_responses_at_x_tau_its_time_and_prompt(curved, form, guided):
    """J v = w τ c W (1 + x_τ) v of each network; x_τ is α x̂0 of the student at x, its time and the same prompt."""
    curved.p.guided_fake, point = guided, curved.p.point
    v = torch.randn(curved.n, D, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    moved = (point.tau * curved.c)[:, None] * (1 + point.x_tau.detach()) * v
    away = moved @ ((3 if guided else 1) * curved.k_fake - 3 * curved.k_real).T
    own = (1 + point.x) * v if form == "paired-score" else point.x + point.x.square() / 2
    expected = curved.alpha * away.T @ ((point.t * curved.c)[:, None] * own) / D / curved.n
    assert torch.allclose(gradient(curved.p, None, form=form, scheme="exact"), expected, rtol=1e-6)


def test_released_form_is_the_published_arithmetic(curved):
    """Its gradient is a sign's, on both ends of the student's difference."""
    h, point, weight = 0.01, curved.p.point, curved.p.student.weight
    found = term(curved.p, None, form="released", h=h)
    g = torch.Generator().manual_seed(0)
    v = torch.randn(point.x_tau.shape, generator=g, dtype=torch.float64)
    v = v / v.norm(dim=1, keepdim=True)
    at, scale = point.x_tau + h * v, (point.tau * curved.c)[:, None]
    d_student = (scale * curved.p.student(at + at.square() / 2) - point.x_hat) / h
    moved = scale * (v + point.x_tau.detach() * v + h * v.square() / 2)
    away = moved @ (3 * curved.k_real - curved.k_fake).T
    norm = (d_student - moved @ (3 * curved.k_real).T).abs().mean(1) + 1e-8
    expected = (((away**2 + 1e-6).sqrt() - 1e-3).mean(1) / norm).mean()
    assert torch.allclose(found, expected, rtol=1e-5)
    slope = (-away / (away**2 + 1e-6).sqrt() / norm[:, None] / (curved.n * D)).detach()
    found, expected = (torch.autograd.grad(x, weight, retain_graph=True)[0] for x in (found, (slope * d_student).sum()))
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-8)


def test_forms_that_need_a_fake_say_so(linear):
    linear.p.point = None
    with pytest.raises(ValueError, match=r"gad\.form='score' needs a paradigm with a fake"):
        term(linear.p, None, form="score")


def test_lam_and_every_scale_and_every_skips(linear):
    gad = P.gad.model_copy(update={"lam": 2.0, "every": 3, "form": "paired-score"})
    values = [gad_loss(linear.p, None, gad, s, torch.Generator().manual_seed(0)) for s in range(4)]
    assert values[1] is None and values[2] is None and torch.equal(values[0], values[3])
    assert torch.allclose(values[0], 2 * 3 * term(linear.p, None, form="paired-score"))


@pytest.mark.parametrize("parts", [2, 4])
def test_directions_of_parts_make_the_wholes(parts):
    whole, *own = (
        Draws(torch.Generator().manual_seed(0), *part).direction(torch.zeros(8 // part[1], 3))
        for part in ((0, 1), *((k, parts) for k in range(parts)))
    )
    assert torch.equal(torch.cat(own), whole)


def drawn_of(n, paired):
    """A batch of n out of n samples, all of whose values tell which they are."""
    number = torch.arange(float(n))[:, None].expand(n, 3)
    samples = Samples(number, 10 * number, Condition(100 * number[:, None], torch.ones(n, 1)))
    paradigm = SimpleNamespace(paired=paired, roles={}, backbone=SimpleNamespace(latent_shape=(3,)))
    return Distillation(paradigm, samples.cond, None, None, n, 0, samples).draw(torch.Generator().manual_seed(0))


def test_pairs_stay_pairs():
    at = drawn_of(6, paired=True)
    z, cond = at.other
    assert torch.equal(at.x0, 10 * at.z) and torch.equal(at.cond.embeds[:, 0], 100 * at.z)
    assert torch.equal(z, at.z.roll(1, 0)) and torch.equal(cond.embeds[:, 0], 100 * z)


@pytest.mark.parametrize("paired", [True, False])
def test_any_prompt_is_drawn(paired):
    assert len(drawn_of(64, paired).cond.embeds[:, 0, 0].unique()) > 30


class Away(Condition):
    """A condition that is elsewhere until `to` is called."""

    def __getitem__(self, i):
        return Away(**vars(super().__getitem__(i)))

    def to(self, *_):
        return Condition(self.embeds, self.mask)


def test_prompts_come_to_the_latents_where_they_are_used(mini, monkeypatch, tmp_path):
    """T5's of all samples would fill an accelerator."""
    at, seen = prepared(mini("sana")), []
    backbone, output = at.backbone, at.backbone.output

    def watched(network, x, t, cond, cfg=1.0):
        seen.append(type(cond))
        return output(network, x, t, cond, cfg)

    monkeypatch.setattr(backbone, "output", watched)
    encode = backbone.encode
    monkeypatch.setattr(backbone, "encode", lambda texts, device: Away(**vars(encode(texts, device=device))))
    cond = Away(**vars(at.cond))
    t, paths = Tangents(at.tangents.states, at.tangents.responses, cond), Paths(at.tangents.states, cond)
    for name, form in (("tdm", "step"), ("ladd", "map")):
        task = task_of(name, SimpleNamespace(backbone=backbone, cond=cond, tangents=t), form)
        task.losses(0, step_generator(0, 0))
    with torch.no_grad():
        look(backbone, backbone.network, t, 4, 2)
        errors(backbone, backbone.network, paths)
        sweep(backbone, t, 1.0, 2, [0.01])
        Paths.of(backbone, t.z, cond, backbone.times(4), 4, 1.0)
    assert set(seen) == {Condition}


def test_prompts_of_what_is_kept_are_encoded_to_the_cpu(mini, monkeypatch, tmp_path):
    at, texts = prepared(mini("sana")), ["a red circle", "a green square and a blue triangle"]
    at.tangents.save(tmp_path / "tangents.safetensors", texts, (0, 1))
    Paths(at.tangents.states, at.cond).save(tmp_path / "paths.safetensors", texts, 0)
    Samples(at.tangents.z, at.tangents.x0, at.cond).save(tmp_path / "samples.safetensors", texts, 0)
    devices = []
    monkeypatch.setattr(at.backbone, "encode", lambda texts, device=None: devices.append(device) or at.cond)
    for kind in (Tangents, Paths, Samples):
        kind.load(tmp_path / f"{kind.__name__.lower()}.safetensors", at.backbone)
    assert devices == ["cpu"] * 3


@pytest.mark.parametrize("name", ["pixart", "sana"])
def test_dropped_prompts_are_the_empty_one(mini, name):
    backbone = mini(name)
    cond = backbone.encode(["a red circle and a blue square", "a blue square"])
    found = dropped(backbone, cond, torch.tensor([True, False]))
    for one, expected in ((found[0], backbone.null), (found[1], cond[1])):
        assert torch.equal(one.embeds, expected.embeds) and torch.equal(one.mask, expected.mask)


@cache
def prepared(backbone):
    """Two prompts, the teacher's exact tangents for them, once a backbone, and all its weights as they were."""
    cond = backbone.encode(["a red circle", "a green square and a blue triangle"])
    z, v = backbone.noise(2, 0), backbone.noise(2, 1)
    t = Tangents(*found(backbone, z, v, cond, 2.0), cond)
    return SimpleNamespace(backbone=backbone, cond=cond, tangents=t, weights=copies(*parts(backbone)))


def parts(backbone):
    return backbone.network, backbone.pipeline.vae, backbone.pipeline.text_encoder


def copies(*modules):
    return [v.clone() for module in modules for v in module.state_dict().values()]


@pytest.fixture
def setting(backbone):
    return prepared(backbone)


def found(backbone, z, v, cond, cfg):
    times = backbone.times(4)
    return tangents(lambda c: lambda z: backbone.path(backbone.network, z, c, 4, cfg, times), z, v, cond, 2)


@pytest.mark.parametrize("form", ["map", "step"])
def test_output_forms_vanish_for_the_teacher_itself(setting, form):
    backbone, t = setting.backbone, setting.tangents
    own = Tangents(*found(backbone, t.z, t.v, t.cond, 1.0), t.cond)  # as a student samples: the same 4 steps, unguided
    gad = P.gad.model_copy(update={"form": form, "lam": 1.0, "pairs": 2, "every": 1, "scheme": "exact"})
    same, other = (gad_loss(tdm(backbone), x, gad, 0, torch.Generator().manual_seed(0)) for x in (own, t))
    assert same < 1e-6 < 1e-3 < other


@pytest.mark.parametrize("name", ["sd2", "sana"])
@pytest.mark.parametrize("form", ["step", "map"])
def test_exact_tangents_are_in_the_precision_of_training(mini, name, form):
    """In bf16 they and their gradient are nearly what they are in fp32, as a difference's would not be: that stays in
    fp32. Of PixArt-α, with α = 0.006 at its first time, this cannot be."""
    setting = prepared(mini(name))
    paradigm = tdm(setting.backbone)

    def term(scheme, low):
        gad = P.gad.model_copy(update={"form": form, "lam": 1.0, "pairs": 2, "every": 1, "scheme": scheme})
        paradigm.student.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            loss = gad_loss(paradigm, setting.tangents, gad, 0, torch.Generator().manual_seed(0))
        loss.backward()
        return loss.item(), torch.cat([w.grad.flatten() for w in paradigm.student.parameters() if w.grad is not None])

    (loss, whole), (low, halved) = term("exact", False), term("exact", True)
    assert halved.dtype == torch.float32 and low != loss and low == pytest.approx(loss, rel=0.05)
    assert torch.cosine_similarity(whole, halved, 0) > 0.97
    assert term("forward", True)[0] == term("forward", False)[0]


@pytest.mark.parametrize("low", [False, True])
@pytest.mark.parametrize("form", ["step", "map"])
def test_exact_tangents_are_made_anew_in_the_backward_pass(setting, form, low):
    paradigm = tdm(setting.backbone)
    student = paradigm.student
    gad = P.gad.model_copy(update={"form": form, "lam": 1.0, "pairs": 2, "every": 1, "scheme": "exact"})
    kept = []

    def gradient():
        sizes = []

        def pack(x):
            sizes.append(x.numel())
            return x

        student.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
                loss = gad_loss(paradigm, setting.tangents, gad, 0, torch.Generator().manual_seed(0))
            kept.append(sum(sizes))
        loss.backward()
        return loss.detach(), {n: w.grad.clone() for n, w in student.named_parameters() if w.grad is not None}

    loss, whole = gradient()
    student.enable_gradient_checkpointing(anew)
    again, made = gradient()
    assert torch.equal(again, loss) and made.keys() == whole.keys()
    away = {n: (made[n] - whole[n]).norm() / whole[n].norm() for n in whole}
    assert max(away.values()) < (0.03 if low else 1e-5)  # sums in another order, in bf16's rounding
    assert kept[1] < kept[0] / 2


def test_tangents_survive_the_disk(setting, tmp_path):
    backbone, prompts = setting.backbone, ["a red circle", "a green square and a blue triangle"]
    z, v, cond = Tangents.inputs(backbone, prompts, (0, 1))
    t = Tangents(*found(backbone, z, v, cond, 2.0), cond)
    t.save(tmp_path / "t.safetensors", prompts, (0, 1), torch.float16)
    back = Tangents.load(tmp_path / "t.safetensors", backbone)
    assert torch.equal(back.z, z) and torch.equal(back.v, v) and torch.equal(back.cond.embeds, cond.embeds)
    assert torch.allclose(back.states, t.states, rtol=1e-3, atol=1e-5)
    assert torch.allclose(back.responses, t.responses, rtol=1e-3, atol=1e-5)
    huge = Tangents(t.states, 1e9 * t.responses, cond)  # more than fp16 holds
    huge.save(tmp_path / "t.safetensors", prompts, (0, 1), torch.float16)
    back = Tangents.load(tmp_path / "t.safetensors", backbone)
    assert torch.equal(back.responses[:, 1:], huge.responses[:, 1:])
    assert torch.equal(back.states[:, 1:], t.states[:, 1:].half().float())
    with pytest.raises(ValueError, match="responses have values that are not finite"):
        Tangents(t.states, torch.inf * t.responses, cond).save(tmp_path / "t.safetensors", prompts, (0, 1))


@pytest.mark.parametrize("stage, place", [("diagnose", "endpoints"), ("nearby", "nearby")])
def test_tangents_of_unknown_origin_name_the_stage_to_run(mini, tmp_path, stage, place):
    file = tmp_path / place / "t.safetensors"
    file.parent.mkdir()
    save_file({k: torch.zeros(1, 1, 4, 16, 16) for k in ("states", "responses")}, file)
    with pytest.raises(ValueError, match=rf"t\.safetensors cannot be read \(.*\): run the {stage} stage again"):
        Tangents.load(file, mini("sd2"))


@torch.no_grad()
def test_samples_come_back_with_their_noises(mini, tmp_path):
    backbone, file = mini("sana"), tmp_path / "samples.safetensors"
    prompts = ["a red circle", "a blue square", "a green triangle"]
    z, cond = backbone.noise(3, 5), backbone.encode(prompts)
    x0 = backbone.sample(backbone.network, z, cond, 4, 2.0)
    Samples(z, x0, cond).save(file, prompts, 5)
    back = Samples.load(file, backbone)
    assert torch.equal(back.z, z) and torch.equal(back.cond.embeds, cond.embeds)
    assert (back.x0 - x0).abs().max() < 1e-3 * x0.abs().max()


def tdm(backbone, cfg=2.0):
    return PARADIGMS["tdm"](backbone, 4, cfg, P.paradigms["tdm"], P.distill)


CASES = [
    pytest.param(name, form, marks=[] if form in (None, "step") or name == "tdm" else pytest.mark.slow)
    for name, paradigm in PARADIGMS.items()
    for form in (None, *FORMS)
    if form not in NEED_A_FAKE or paradigm.form == "score"
]


def task_of(name, setting, form):
    paradigm = PARADIGMS[name](setting.backbone, 4, 2.0, P.paradigms[name], P.distill)
    relational = form in ("rkd", "similarity")  # of which two samples have next to none, and four small ones
    over = {"form": form, "lam": 1e3 if relational else 1.0, "pairs": 4 if relational else 2}
    gad = P.gad.model_copy(update=over) if form else None
    samples = Samples(setting.tangents.z, setting.tangents.x0, setting.tangents.cond)
    return Distillation(paradigm, setting.cond, setting.tangents, gad, 2, 0, samples)


def stepped(name, setting, form):
    """One optimiser step as training makes it: (task, weights of its roles before, what it logs)."""
    torch.manual_seed(0)  # of what a role begins with: heads, a LoRA
    task = task_of(name, setting, form)
    accelerator = Accelerator(cpu=True)
    for k, role in task.roles.items():
        if k == "fake":  # which begins as the teacher, where some students rest
            perturb(nn.ParameterList(role.params))
        role.optimisers = [accelerator.prepare(o) for o in role.optimisers]
    before = {k: {n: v.clone() for n, v in role.module.state_dict().items()} for k, role in task.roles.items()}
    return task, before, update(task, 0, 0, 1.0, accelerator)


@cache
def based(name, backbone):
    """What a step without GAD logs, and the student after it."""
    task, _, row = stepped(name, prepared(backbone), None)
    return row, copies(task.roles["student"].module)


@pytest.mark.parametrize(("name", "form"), CASES)
def test_one_step_moves_what_it_should(setting, name, form):
    """Each role moves by its learning rate, which weight decay alone does not; GAD changes the student's gradient and
    nothing else; what no role trains keeps every bit: teacher, VAE and text encoder, and the weights under a LoRA."""
    task, before, row = stepped(name, setting, form)
    assert all(np.isfinite(v) for v in row.values()) and ("gad" in row) == bool(form)
    for k, role in task.roles.items():
        trained = {n for n, p in role.module.named_parameters() if p.requires_grad}
        moves = {n: (v - before[k][n]).abs().max() for n, v in role.module.state_dict().items()}
        moved = [n for n in trained if moves[n] > role.lr / 2]
        assert len(moved) > 0.8 * len(trained), k  # the hinge may leave biases alone
        assert all(moves[n] == 0 for n in moves.keys() - trained), k
        assert (len(trained) < len(moves)) == (name == "swiftbrush" and k == "fake")
    for module in parts(setting.backbone):
        assert not any(p.requires_grad or p.grad is not None for p in module.parameters())
    assert all(map(torch.equal, copies(*parts(setting.backbone)), setting.weights))
    if form:
        base, student = based(name, setting.backbone)
        # Beside a large gradient the norm may hide GAD's; the weights do not.
        assert {k for k in row if row[k] != base.get(k)} - {"student_norm"} == {"gad", "student"}
        assert not all(map(torch.equal, student, copies(task.roles["student"].module)))


@pytest.mark.parametrize("name", [name for name, paradigm in PARADIGMS.items() if paradigm.form == "score"])
def test_scores_are_guided_as_the_paradigm_has_them(mini, name):
    """A fake that still is the teacher answers a move as the teacher does where both have the same guidance."""
    task = task_of(name, prepared(mini("sana")), "paired-score")
    task.losses(0, step_generator(0, 0))
    loss = gad_loss(task.paradigm, None, task.gad, 0, torch.Generator().manual_seed(0))
    student = task.roles["student"].params
    moved = any(g.abs().max() > 0 for g in torch.autograd.grad(loss, student, materialize_grads=True))
    assert moved != PARADIGMS[name].guided_fake


@pytest.mark.parametrize("name", PARADIGMS)
def test_activations_made_anew_give_the_same_gradients(setting, name):
    """Those of the frozen teacher too, where a loss is differentiated through it."""
    backbone = setting.backbone

    def gradients(anew):
        torch.manual_seed(0)
        task, calls = task_of(name, setting, "step"), []
        if anew:
            distill.checkpoint(task)
        module = backbone.cross_attentions(backbone.network)[0]
        with module.register_forward_pre_hook(lambda *_: calls.append(0)):
            losses = task.losses(0, step_generator(0, 0))
            found = [torch.autograd.grad(losses[k], role.params, retain_graph=True, materialize_grads=True)
                     for k, role in task.roles.items()]
        return [g for role in found for g in role], len(calls)

    try:
        (kept, once), (anew, twice) = gradients(False), gradients(True)
    finally:
        backbone.network.disable_gradient_checkpointing()
        backbone.pipeline.vae.disable_gradient_checkpointing()
    for a, b in zip(anew, kept, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * b.abs().max().item())
    assert (twice > once) == (name in ("ladd", "add", "sid"))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "method", "scheme"), [
    ("sana", "ladd", "forward"), ("pixart", "tdm", "forward"), ("sana", "tdm", "exact"), ("pixart", "tdm", "exact"),
])
def test_compiled_blocks_give_the_same_gradients(mini, monkeypatch, name, method, scheme):
    """What compiles is the block, so that hooks on it see what they did; copies of the teacher are as it was. With
    exact tangents, which run as without, activations are made anew too."""
    graphs, compile = [], torch.compile

    def backend(graph, _):
        graphs.append(graph)
        return graph

    monkeypatch.setattr(torch, "compile", lambda f: compile(f, backend=backend))
    setting = prepared(mini(name))
    network, blocks = setting.backbone.network, setting.backbone.blocks

    def gradients(on):
        torch.manual_seed(0)
        task = task_of(method, setting, "step")
        task.gad = task.gad.model_copy(update={"scheme": scheme})
        if scheme == "exact":
            distill.checkpoint(task)
        distill.compile_blocks(task, on)
        alike = [m for m in (network, *(role.module for role in task.roles.values())) if isinstance(m, type(network))]
        assert all(("forward" in vars(block)) == on for m in alike for block in blocks(m))
        assert not any("forward" in vars(block) for block in blocks(task.paradigm.copy_of_teacher()))
        losses = task.losses(0, step_generator(0, 0))
        found = [torch.autograd.grad(losses[k], role.params, retain_graph=True, materialize_grads=True)
                 for k, role in task.roles.items()]
        return [g for role in found for g in role]

    try:
        kept, compiled = gradients(False), gradients(True)
    finally:
        distill.compile_blocks(task_of(method, setting, None), False)
        network.disable_gradient_checkpointing()
    assert 0 < len(graphs) < 12  # of a kind of block one for each way in which it is called: blocks share them
    assert not any("forward" in vars(block) for block in blocks(network))
    for a, b in zip(compiled, kept, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * b.abs().max().item())


@pytest.mark.parametrize("parts", [2, 4])
@pytest.mark.parametrize("name", PARADIGMS)
def test_parts_of_a_batch_make_the_whole(mini, name, parts):
    """Whoever computes which part, another's noise or prompt is another's: a part of one sample has it too."""
    backbone = mini("sana")
    cond = backbone.encode(["a red circle", "a blue square", "a green triangle", "a red square"])
    z, v = (torch.randn(4, 5, *backbone.latent_shape, generator=torch.Generator().manual_seed(k)) for k in (1, 2))
    paths = Tangents(z, v, cond)
    torch.manual_seed(0)
    paradigm = PARADIGMS[name](backbone, 4, 2.0, P.paradigms[name], P.distill)
    task = Distillation(paradigm, cond, paths, P.gad.model_copy(update={"pairs": 4}), 4, 0,
                        Samples(paths.z, paths.x0, cond))

    def gradients(part):
        task.part = part
        losses = task.losses(0, step_generator(0, 0))
        return {k: torch.cat([g.flatten() for g in torch.autograd.grad(losses[k], role.params, retain_graph=True,
                                                                       materialize_grads=True)])
                for k, role in task.roles.items() if k in losses}

    whole, own = gradients((0, 1)), [gradients((k, parts)) for k in range(parts)]
    for k, g in whole.items():
        assert ((sum(o[k] for o in own) / parts - g).norm() / g.norm()).item() < 1e-3, k


@pytest.mark.parametrize("name", ["sd2", "pixart", "sana"])
def test_swiftbrushs_lora_is_on_queries_and_values(mini, name):
    fake = PARADIGMS["swiftbrush"](mini(name), 2, 2.0, P.paradigms["swiftbrush"], P.distill).roles["fake"].module
    lora = {n.partition(".lora_A")[0] for n, _ in fake.named_modules() if n.endswith("lora_A")}
    layers = {n for n, _ in mini(name).network.named_modules() if n.endswith((".to_q", ".to_v"))}
    assert layers and lora == layers


def test_role_without_a_loss_stays(mini):
    """DMD's student learns at each `ratio`-th step only; its fake at each."""
    task, _, _ = stepped("dmd", prepared(mini("sana")), "step")
    before = {k: copies(role.module) for k, role in task.roles.items()}
    row = update(task, 1, 0, 1.0, Accelerator(cpu=True))
    same = {k: all(map(torch.equal, before[k], copies(role.module))) for k, role in task.roles.items()}
    assert same == {"fake": False, "student": True} and "student" not in row


@pytest.fixture
def frozen():
    """Objects of before are not looked at, which takes seconds."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.usefixtures("frozen")
@pytest.mark.parametrize(("name", "form", "on"), [
    *((name, form, "sana") for name, paradigm in PARADIGMS.items() for form in ("step", "paired-score")
      if form not in NEED_A_FAKE or paradigm.form == "score"),
    *(("tdm", form, "sana") for form in FORMS if form not in ("step", "paired-score")),
    *((name, "step", on) for name in ("tdm", "ladd") for on in ("sd2", "pixart")),
])
def test_steps_leave_no_memory_behind(mini, name, form, on):
    """A step's graph goes with it, though the paradigm keeps the last `point`, of which the forms with scores need the
    graph. Steps 0 and 5 are turns of DMD's student, 1 is not."""
    task, _, _ = stepped(name, prepared(mini(on)), form)
    accelerator = Accelerator(cpu=True)

    def live(step):
        update(task, step, 0, 1.0, accelerator)
        gc.collect()
        return sum(o.numel() for o in gc.get_objects() if issubclass(type(o), torch.Tensor))

    first = live(0)
    assert (task.paradigm.point is not None) == (PARADIGMS[name].form == "score")
    assert live(1) <= first and live(5) <= first


@pytest.mark.parametrize("name", ["sd2", "pixart"])
def test_steps_are_those_of_tcds_sampler_at_gamma_0(mini, name):
    """What TCD students are measured with against diffusers' own TCD sampler, whose η is the paper's γ; with γ > 0 it
    moves elsewhere. Its last move ends at the first level of the schedule, ours goes on to clean."""
    backbone = mini(name)
    cond = backbone.encode(["a red circle", "a blue square"])
    ours = backbone.noise(2, 0)
    theirs = TCDScheduler.from_config(backbone.pipeline.scheduler.config)
    theirs.set_timesteps(4, original_inference_steps=1000)
    times = backbone.times(4)
    assert torch.equal(theirs.timesteps, (999 * times[:-1]).round().long())
    with torch.no_grad():
        for k, index in enumerate(theirs.timesteps):
            t, s = (a.clamp(min=0).expand(2) for a in times[k:k + 2])
            output = backbone.output(backbone.network, ours, t, cond)
            moved = backbone.step(backbone.network, ours, t, s, cond)
            theirs._step_index = k
            expected = theirs.step(output, index, ours, eta=0.0).prev_sample
            torch.testing.assert_close(moved, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())
            if k < 3:  # it adds no noise to the last
                theirs._step_index = k
                other = theirs.step(output, index, ours, 0.3, torch.Generator().manual_seed(0)).prev_sample
                assert (other - moved).abs().max() > 0.1
            ours = moved


def test_student_rests_where_fake_and_real_agree(setting):
    paradigm = tdm(setting.backbone, cfg=1.0)  # the fake begins as the teacher
    z = setting.backbone.noise(2, 3)
    losses = paradigm.losses(Batch(z, setting.cond, torch.Generator().manual_seed(0)), 0)
    student, fake = paradigm.roles["student"], paradigm.roles["fake"]
    assert max(g.abs().max() for g in torch.autograd.grad(losses["student"], student.params, allow_unused=True)
               if g is not None) < 1e-3
    assert max(g.abs().max() for g in torch.autograd.grad(losses["fake"], fake.params, allow_unused=True)
               if g is not None) > 0


@pytest.mark.parametrize("s", [-1.0, 0.3])
def test_diffuse_ends_on_the_marginal(setting, s):
    """From N(α_s m, σ_s²) at s to exactly N(α_τ m, σ_τ²) at τ."""
    paradigm, levels, n, m = tdm(setting.backbone), setting.backbone.levels, 20_000, 0.7
    g = torch.Generator().manual_seed(0)
    alpha, sigma = (1.0, 0.0) if s < 0 else (a.item() for a in levels.alpha_sigma(torch.tensor([s])))
    x = alpha * m + sigma * torch.randn(n, 1, 1, 1, generator=g)
    tau = torch.tensor([0.6])
    y = paradigm._diffuse(x, torch.tensor([s], dtype=torch.float64), tau, torch.randn(n, 1, 1, 1, generator=g))
    alpha, sigma = (a.item() for a in levels.alpha_sigma(tau))
    assert y.mean().item() == pytest.approx(alpha * m, abs=4 * sigma / n**0.5)
    assert y.std().item() == pytest.approx(sigma, rel=0.03)


@pytest.mark.parametrize("form", FORMS)
def test_output_forms_refuse_paths_at_other_times(mini, form):
    at = prepared(mini("sana"))
    gad, paradigm = P.gad.model_copy(update={"form": form}), tdm(at.backbone)
    fewer = Tangents(at.tangents.states[:, ::2], at.tangents.responses[:, ::2], at.cond)
    Distillation(paradigm, at.cond, fewer, None, 2, 0)
    if form in NEED_A_FAKE:
        Distillation(paradigm, at.cond, fewer, gad, 2, 0)
        return
    with pytest.raises(ValueError, match=r"\.student_steps=4: data/endpoints/sana holds .* of 2 steps: run its "):
        Distillation(paradigm, at.cond, fewer, gad, 2, 0)


def test_a_term_that_is_no_number_is_divergence(mini):
    """Beside losses that are no numbers themselves, these are what is told."""
    task = task_of("tdm", prepared(mini("sana")), "step")
    task.roles["student"].params[0].data.fill_(torch.nan)
    assert not task.losses(3, step_generator(0, 3))["fake"].isfinite()
    task.paradigm.losses = lambda *_: {"student": torch.tensor(0.0)}
    with pytest.raises(DivergedError, match=r"the gad term is not finite at step 3 \(student\(x\) has values"):
        task.losses(3, step_generator(0, 3))
    task.gad, task.paradigm.point = task.gad.model_copy(update={"form": "score"}), None
    with pytest.raises(ValueError, match="needs a paradigm with a fake score"):  # a mistake is none
        task.losses(3, step_generator(0, 3))


def test_lam_zero_is_the_base_bit_for_bit(setting, tmp_path):
    def run(gad, name):
        torch.manual_seed(0)
        paradigm = tdm(setting.backbone)
        task = Distillation(paradigm, setting.cond, setting.tangents, gad, 2, 0)
        train(task, tmp_path / name, 3, 0, {}, warmup=1)
        return torch.cat([p.detach().flatten() for p in paradigm.roles["student"].params])

    base = run(None, "base")
    assert torch.equal(base, run(P.gad.model_copy(update={"lam": 0.0}), "zero"))
    assert not torch.equal(base, run(P.gad.model_copy(update={"lam": 1.0, "pairs": 2, "every": 1}), "one"))


class Handed(Exception):
    """To the training."""


def test_a_run_is_trained_as_its_parameters_say(monkeypatch, tmp_path):
    """Guidance, steps, rates, decay of the average, hardware; GAD's term, whose draws are the run's seed's."""
    def hand(*args):
        raise Handed(inspect.signature(train).bind(*args).arguments)

    monkeypatch.setattr(distill, "train", hand)
    at, gad = prepared(build("sana")), set()  # its own: checkpointing stays on
    hardware = P.hardware.model_copy(update={"parts": 2, "shard": True, "checkpointing": True, "compile": True})
    p = P.model_copy(update={"distill": P.distill.model_copy(update={"batch": 2, "ema": 0.7}), "hardware": hardware})
    which = p.backbones["sana"]
    assert which.cfg != 1
    for seed in (7, 8):
        with pytest.raises(Handed) as error:
            distill.distill(Run("sana", "tdm", "slower_gad", seed), p, at.backbone, at.cond, at.tangents, at.tangents,
                            None, tmp_path, tmp_path, Accelerator(cpu=True), {"a": 1})
        given = error.value.args[0]
        task, student = given["task"], given["task"].roles["student"]
        assert given["seed"] == task.seed == seed and given["identity"] == {"a": 1}
        assert all(given[k] == getattr(p.distill, k) for k in ("steps", "warmup", "save_every"))
        assert given["accumulate"] == 2 and given["shard"] is True
        networks = [role.module for role in task.roles.values()]
        for network in (*networks, at.backbone.network):
            assert network.is_gradient_checkpointing
            assert all("forward" in vars(block) for block in at.backbone.blocks(network))
        distill.compile_blocks(task, False)  # eager again: what follows would compile for a minute
        assert task.gad == p.controls["slower_gad"] and task.batch == 2
        assert (task.paradigm.cfg, task.paradigm.steps) == (which.cfg, which.student_steps)
        assert student.lr == 0.5 * p.paradigms["tdm"]["lr"] and student.average.decay == 0.7
        gad.add(task.losses(0, step_generator(0, 0))["gad"].item())
    assert len(gad) == 2


def test_the_saved_student_is_the_average(monkeypatch, tmp_path):
    backbone = build("sana")  # its own: saving a pipeline leaves marks on it
    at = prepared(backbone)

    def trained(task, work, *_):
        role = task.roles["student"]
        for p, average in zip(role.params, role.average.shadow_params, strict=True):
            average.copy_(p + 1)
        (work / "log.csv").write_text("step\n0\n")
        return work / "log.csv"

    monkeypatch.setattr(distill, "train", trained)
    monkeypatch.setattr(distill, "look", lambda *_: {"cos": 1.0})
    distill.distill(Run("sana", "tdm", "base", 0), P, backbone, at.cond, at.tangents, at.tangents, None,
                    tmp_path / "student", tmp_path, Accelerator(cpu=True), {})
    saved = dict(load_network(tmp_path / "student").named_parameters())
    for name, p in backbone.network.named_parameters():
        assert torch.equal(saved[name], p + 1), name


@pytest.mark.parametrize("roles", ["none", "other", "unaveraged"])
def test_a_paradigm_without_a_student_to_save_says_so(mini, monkeypatch, tmp_path, roles):
    class Lame(PARADIGMS["tcd"]):
        def __init__(self, *args):
            super().__init__(*args)
            student = self.roles.pop("student")
            student.average = None
            self.roles = {"none": {}, "other": {"generator": student}, "unaveraged": {"student": student}}[roles]

    monkeypatch.setitem(PARADIGMS, "tcd", Lame)
    at = prepared(mini("sana"))
    with pytest.raises(ValueError, match=r'paradigms\.tcd: its roles lack a "student" with an average, which is saved'):
        distill.distill(Run("sana", "tcd", "base", 0), P, at.backbone, at.cond, at.tangents, at.tangents, None,
                        tmp_path, tmp_path, Accelerator(cpu=True), {})


def test_a_paradigm_that_names_no_settings_says_so(mini):
    class Bare(Paradigm):
        pass

    with pytest.raises(ValueError, match=r"paradigms\.bare\.lr=0\.1 is not a key .*: it has no `settings`"):
        Bare(mini("sana"), 4, 1.0, {"lr": 0.1}, P.distill)


def test_every_counts_the_students_updates_not_the_fakes(setting):
    task = task_of("dmd", setting, "step")
    task.gad = task.gad.model_copy(update={"every": 2})
    ratio = int(P.paradigms["dmd"]["ratio"])
    logged = [task.losses(step, step_generator(0, step)) for step in range(2 * ratio + 1)]
    assert [k for k, row in enumerate(logged) if "student" in row] == [0, ratio, 2 * ratio]
    assert [k for k, row in enumerate(logged) if "gad" in row] == [0, 2 * ratio]
