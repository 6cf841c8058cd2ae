"""Every paradigm's objective against closed forms. Data are Gaussian (or a mixture), so each score, posterior mean and
ODE map is known; the student is linear. The code under test is the backbones' own, around these networks."""

from types import SimpleNamespace

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from torch import nn

from gad import params
from gad.backbones import Condition
from gad.backbones.base import Backbone
from gad.diffusion import Levels
from gad.paradigms import PARADIGMS
from gad.paradigms.base import Batch, Heads

D, N = 3, 64
P = params.load()
VP = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
FLOW = FlowMatchEulerDiscreteScheduler(shift=3.0)
COV = torch.tensor([[1.0, 0.5, 0.0], [0.5, 0.7, 0.1], [0.0, 0.1, 0.3]])
MEAN = torch.tensor([0.6, -0.4, 0.2])


class Posterior(nn.Module):
    """x̂0 of N(mean + c, cov) data at x_t = α x0 + σ ε, for prompt c: a perfect denoiser. `to_q` is for LoRA."""

    dtype = torch.float32

    def __init__(self, mean=MEAN, cov=COV):
        super().__init__()
        self.mean, self.root = nn.Parameter(mean.clone()), nn.Parameter(torch.linalg.cholesky(cov))
        self.to_q = nn.Linear(D, D, bias=False)
        nn.init.zeros_(self.to_q.weight)

    def forward(self, x, alpha, sigma, c):
        cov = self.root @ self.root.T
        gain = alpha[:, :, None] * cov @ torch.linalg.inv(alpha[:, :, None] ** 2 * cov + sigma[:, :, None] ** 2 * I)
        mean = self.mean + c
        return mean + (gain @ (x - alpha * mean)[:, :, None])[:, :, 0] + self.to_q(x)


class Mixture(Posterior):
    """Two equal components, N(±mean, 0.09 I)."""

    def forward(self, x, alpha, sigma, c):
        var = 0.09 * alpha**2 + sigma**2
        side = torch.tanh(alpha * (x @ self.mean)[:, None] / var)
        return side * self.mean + alpha * 0.09 / var * (x - alpha * side * self.mean)


class Linear(Posterior):
    """A student: x̂0 = A x_t + b + c at every time."""

    def __init__(self, a=None, b=None):
        super().__init__()
        self.a = nn.Parameter(0.8 * I.clone() if a is None else a.clone())
        self.b = nn.Parameter(torch.zeros(D) if b is None else b.clone())

    def forward(self, x, alpha, sigma, c):
        return x @ self.a.T + self.b + c


I = torch.eye(D)  # noqa: E741


class Known(Backbone):
    """A backbone around such networks, with the real conversions, guidance and sampler. A prompt is a shift (D,)."""

    def __init__(self, scheduler, teacher):
        self._scheduler, self._teacher, self.levels, self._null = scheduler, teacher, Levels(scheduler), None
        self.pipeline = SimpleNamespace(vae=SimpleNamespace(
            dtype=torch.float32, config=SimpleNamespace(scaling_factor=0.5),
            decode=lambda z: SimpleNamespace(sample=3 * z),
        ))

    network = property(lambda self: self._teacher)
    device = torch.device("cpu")
    latent_shape = (D,)

    def scheduler(self, steps):
        if self.levels.flow:
            last = 3 / steps / (1 + 2 / steps)
            return FlowMatchEulerDiscreteScheduler(shift=3.0, shift_terminal=last if steps > 1 else None)
        return DDIMScheduler.from_config(self._scheduler.config, timestep_spacing="trailing", set_alpha_to_one=True)

    def encode_text(self, prompts):
        return torch.zeros(len(prompts), 1, D), torch.ones(len(prompts), 1)

    def raw(self, network, x_t, timestep, cond):
        t = timestep.double() / (self.levels.train_steps - (not self.levels.flow))
        alpha, sigma = (a[:, None] for a in self.levels.alpha_sigma(t))
        x0 = network(x_t, alpha, sigma, cond.embeds[:, 0])
        return (x_t - x0) / sigma if self.levels.flow else (x_t - alpha * x0) / sigma

    def features(self, network, x_t, t, cond):
        return [torch.cat([x_t, cond.embeds[:, 0]], 1)[:, None]]


@pytest.fixture(params=["vp", "flow"])
def backbone(request):
    return Known(VP if request.param == "vp" else FLOW, Posterior())


def make(name, backbone, steps=1, cfg=1.0, fake=None, student=None, **settings):
    paradigm = PARADIGMS[name](backbone, steps, cfg, P.paradigms[name] | settings, P.distill)
    paradigm.student = student or Linear()
    if fake is not None:
        paradigm.roles["fake"].module = fake
    return paradigm


def batch(n=N, seed=0, shift=0.0, x0=None):
    g = torch.Generator().manual_seed(seed)
    return Batch(torch.randn(n, D, generator=g), Condition(torch.full((n, 1, D), shift), torch.ones(n, 1)), g, x0)


def gradient_in_x_hat(paradigm, loss):
    return torch.autograd.grad(loss, paradigm.point.x_hat, retain_graph=True)[0]


def matrices(backbone, tau, cov):
    alpha, sigma = (a.double() for a in backbone.levels.alpha_sigma(tau))
    cov = cov.double()
    gains = [
        a * cov @ torch.linalg.inv(a**2 * cov + s**2 * I.double()) for a, s in zip(alpha, sigma, strict=True)
    ]
    return alpha, sigma, gains


FAKE = Posterior(torch.tensor([0.1, 0.2, -0.3]), 0.5 * I + 0.1)


def predictions(backbone, point):
    """μ_real and μ_fake at x_τ, in fp64, by the formula of a Gaussian's posterior, and their matrices."""
    found = []
    for network in (backbone.network, FAKE):
        mean = network.mean.detach().double()
        alpha, _, gains = matrices(backbone, point.tau, (network.root @ network.root.T).detach())
        away = point.x_tau.detach().double() - alpha[:, None] * mean
        found.append((mean + torch.stack([k @ x for k, x in zip(gains, away, strict=True)]), torch.stack(gains)))
    return alpha, *found


def test_dmd_moves_samples_by_the_normalised_difference_of_posteriors(backbone):
    dmd = make("dmd", backbone, fake=FAKE)
    found = gradient_in_x_hat(dmd, dmd.losses(batch(), 0)["student"])
    _, (real, _), (fake, _) = predictions(backbone, dmd.point)
    scale = (dmd.point.x_hat.detach().double() - real).abs().mean(1, keepdim=True)
    assert torch.allclose(found.double(), (fake - real) / scale / (N * D), rtol=1e-3, atol=1e-6)


def test_dmd_follows_a_mixtures_score():
    """Tweedie's μ = (x + σ² ∇ log p) / α, with ∇ log p of the diffused mixture by autograd in fp64."""
    backbone = Known(VP, Mixture())
    dmd = make("dmd", backbone, fake=FAKE)
    found = gradient_in_x_hat(dmd, dmd.losses(batch(), 0)["student"])
    alpha, sigma = (a.double()[:, None] for a in backbone.levels.alpha_sigma(dmd.point.tau))
    x = dmd.point.x_tau.detach().double().requires_grad_(True)
    logs = [-((x - s * alpha * MEAN.double()).square() / (2 * (0.09 * alpha**2 + sigma**2))).sum(1) for s in (1, -1)]
    score = torch.autograd.grad(torch.logsumexp(torch.stack(logs), 0).sum(), x)[0]
    real = (x.detach() + sigma**2 * score) / alpha
    _, _, (fake, _) = predictions(backbone, dmd.point)
    scale = (dmd.point.x_hat.detach().double() - real).abs().mean(1, keepdim=True)
    assert torch.allclose(found.double(), (fake - real) / scale / (N * D), rtol=5e-3, atol=1e-5)


def test_dmds_student_learns_at_each_ratioth_step(backbone):
    dmd = make("dmd", backbone, ratio=3)
    assert ["student" in dmd.losses(batch(), step) for step in range(4)] == [True, False, False, True]


def test_swiftbrush_moves_samples_by_the_weighted_difference_of_noises(backbone):
    brush = make("swiftbrush", backbone, fake=FAKE)
    found = gradient_in_x_hat(brush, brush.losses(batch(), 0)["student"])
    alpha, (real, _), (fake, _) = predictions(backbone, brush.point)
    _, sigma = (a.double()[:, None] for a in backbone.levels.alpha_sigma(brush.point.tau))
    expected = sigma**2 * alpha[:, None] / sigma * (fake - real)  # ε_real − ε_fake = α / σ (μ_fake − μ_real)
    assert torch.allclose(found.double(), expected / (N * D), rtol=1e-3, atol=1e-6)


def test_swiftbrushs_fake_begins_as_the_teacher_and_trains_lora_alone(backbone):
    brush = make("swiftbrush", backbone)
    fake = brush.roles["fake"]
    at = batch(), torch.full((N,), 0.5, dtype=torch.float64)
    pair = [backbone.x0(m, at[0].z, at[1], at[0].cond) for m in (fake.module, backbone.network)]
    assert torch.allclose(*pair)
    trained = {n for n, p in fake.module.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in n for n in trained) and len(fake.params) == len(trained)


@pytest.mark.parametrize("alpha", [0.5, 1.0, 1.2])
def test_sid_differentiates_through_both_scores(backbone, alpha):
    """∇ aᵀ(b − α a) = J_aᵀ (b − 2 α a) + J_bᵀ a, with a = μ_real − μ_fake, b = μ_real − x̂."""
    sid = make("sid", backbone, fake=FAKE, alpha=alpha)
    found = gradient_in_x_hat(sid, sid.losses(batch(), 0)["student"])
    scale, (real, k_real), (fake, k_fake) = predictions(backbone, sid.point)
    x_hat = sid.point.x_hat.detach().double()
    a, b = real - fake, real - x_hat
    j_a, j_b = scale[:, None, None] * (k_real - k_fake), scale[:, None, None] * k_real - I.double()
    expected = (j_a.mT @ (b - 2 * alpha * a)[..., None] + j_b.mT @ a[..., None])[..., 0]
    if backbone.levels.flow:
        expected = (1 - sid.point.tau)[:, None] * expected
    else:
        expected = expected / (x_hat - real).abs().mean(1, keepdim=True)
    assert torch.allclose(found.double(), expected / (N * D), rtol=2e-3, atol=2e-6)


@pytest.mark.parametrize("name", ["dmd", "sid", "swiftbrush", "tdm"])
def test_the_true_posterior_is_the_fakes_optimum(backbone, name):
    """For a one-step student A z + b the fake's best is N(b, A Aᵀ)'s posterior: there, and not elsewhere, its
    gradient has no mean."""
    student = Linear(torch.linalg.cholesky(COV), MEAN)

    def slope(fake):
        paradigm = make(name, backbone, fake=fake, student=student)
        draws = []
        for seed in range(12):
            losses = paradigm.losses(batch(2000, seed), 0)
            grads = torch.autograd.grad(losses["fake"], [fake.mean, fake.root])
            draws.append(torch.cat([g.flatten() for g in (grads[0], grads[1].tril())]))
        draws = torch.stack(draws)
        return (draws.mean(0) / (draws.std(0) / len(draws) ** 0.5).clamp(min=1e-6)).abs()

    assert slope(Posterior()).max() < 5.5 < slope(Posterior(MEAN + 0.2, 1.3 * COV)).max()


class Perfect(Posterior):
    """A fake that is always right about a one-step linear student."""

    def __init__(self, student):
        super().__init__()
        self._student = [student]

    def forward(self, x, alpha, sigma, c):
        student = self._student[0]
        a, b = student.a.detach(), student.b.detach() + c
        cov = a @ a.T
        gain = alpha[:, :, None] * cov @ torch.linalg.inv(alpha[:, :, None] ** 2 * cov + sigma[:, :, None] ** 2 * I)
        return b + (gain @ (x - alpha * b)[:, :, None])[:, :, 0]


@pytest.mark.parametrize("name", ["dmd", "sid", "swiftbrush", "tdm"])
def test_a_linear_student_reaches_the_teachers_distribution(backbone, name):
    student = Linear()
    paradigm = make(name, backbone, fake=Perfect(student), student=student, **({"ratio": 1} if name == "dmd" else {}))
    optimiser = torch.optim.Adam([student.a, student.b], 0.02)
    rates = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, 400)
    for step in range(400):
        optimiser.zero_grad()
        torch.autograd.backward(paradigm.losses(batch(256, step), step)["student"], inputs=[student.a, student.b])
        optimiser.step()
        rates.step()
    with torch.no_grad():
        assert torch.allclose(student.b, MEAN, atol=0.06)
        assert torch.allclose(student.a @ student.a.T, COV, atol=0.1)


def prompts(n):
    return Condition(torch.zeros(n, 1, D), torch.ones(n, 1))


def fitted(x, y):
    """(A, b) of an affine map."""
    ones = torch.ones(len(x), 1)
    solution = torch.linalg.lstsq(torch.cat([x, ones], 1), y).solution
    assert (torch.cat([x, ones], 1) @ solution - y).abs().max() < 1e-3
    return solution[:D].T, solution[D]


def learn(paradigm, student, steps, z, x0):
    wanted = [p for p in student.parameters() if p.requires_grad]
    optimiser = torch.optim.Adam(wanted, 0.03)
    rates = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    for step in range(steps):
        i = torch.randint(len(z), (256,), generator=torch.Generator().manual_seed(step))
        at = batch(256, step)
        at = Batch(z[i], at.cond, at.generator, x0[i])
        optimiser.zero_grad()
        torch.autograd.backward(paradigm.losses(at, step)["student"], inputs=wanted)
        optimiser.step()
        rates.step()


def test_ladds_paired_student_reaches_the_teachers_map():
    """From Gaussian noise to Gaussian data the teacher's sampler is an affine map, which a one-step student can be."""
    backbone = Known(FLOW, Posterior())
    z = torch.randn(4096, D, generator=torch.Generator().manual_seed(5))
    x0 = backbone.sample(backbone.network, z, prompts(len(z)), 20)
    student = Linear(0.8 * I)
    for p in (student.mean, student.root, student.to_q.weight):
        p.requires_grad_(False)
    learn(make("ladd", backbone, student=student, recon=50.0), student, 300, z, x0)
    a, b = fitted(z, x0)
    assert torch.allclose(student.a, a, atol=0.05) and torch.allclose(student.b, b, atol=0.05)


def test_tcd_reaches_its_fixed_point():
    """From each time the student has one x̂0 for all its jumps, so its optimum is the mean of what each of them asks
    for, weighed by that jump's share of x̂0 squared; backwards from the last time, all of them are known."""
    backbone, solver = Known(FLOW, Posterior()), 3
    times, levels = backbone.times(solver), backbone.levels
    x = torch.randn(4096, D, generator=torch.Generator().manual_seed(5))
    student = ByTime(backbone, solver)
    learn(make("tcd", backbone, student=student, solver=solver, huber=0.0), student, 1200, x, data(x))

    def best(k, x):
        def at(j):
            return times[j].expand(len(x))

        moved = backbone.step(backbone.network, x, at(k), at(k + 1), prompts(len(x)))
        wanted, weights = [], []
        for end in range(k + 1, solver + 1):
            target = moved
            if end > k + 1:
                x0 = best(k + 1, moved)
                target = levels.step(x0, levels.eps_from_x0(x0, moved, at(k + 1)), at(end))
            wanted.append(levels.ends(x, at(k), target, at(end))[0])
            (alpha_t, sigma_t), (alpha_s, sigma_s) = levels.alpha_sigma(at(k)), levels.alpha_sigma(at(end))
            weights.append(((alpha_s - alpha_t * sigma_s / sigma_t) ** 2)[0])
        return sum(w * y for w, y in zip(weights, wanted, strict=True)) / sum(weights)

    for k in range(solver):
        a, b = fitted(x, best(k, x).detach())
        assert torch.allclose(student.table[k], a, atol=0.05) and torch.allclose(student.shift[k], b, atol=0.05), k


def data(z):
    """Samples of the teacher's data."""
    return MEAN + z @ torch.linalg.cholesky(COV).T


class ByTime(Posterior):
    """x̂0 = A_k x_t + b_k at the k-th time of a solver's grid."""

    def __init__(self, backbone, steps):
        super().__init__()
        self.times = backbone.times(steps)[:-1]
        self.table = nn.Parameter(0.5 * I.repeat(steps, 1, 1))
        self.shift = nn.Parameter(torch.zeros(steps, D))
        for p in (self.mean, self.root, self.to_q.weight):
            p.requires_grad_(False)

    def forward(self, x, alpha, sigma, c):
        k = (sigma[:, 0, None].double() - self.times).abs().argmin(1)
        return (self.table[k] @ x[..., None])[..., 0] + self.shift[k]


def test_tcds_target_is_the_solvers_point_where_the_jump_ends_there(backbone):
    tcd = make("tcd", backbone, solver=1, huber=0.0)
    at = batch(x0=torch.randn(N, D, generator=torch.Generator().manual_seed(9)))
    loss = tcd.losses(at, 0)["student"]
    at = batch(x0=at.x0)  # the same draws again
    at.uniform(N), at.uniform(N)
    t = backbone.times(1)[:1].expand(N)
    x = backbone.add_noise(at.x0, at.noise(at.x0), t)
    teacher, student = (backbone.x0(m, x, t, at.cond) for m in (backbone.network, tcd.student))
    assert torch.allclose(loss, 0.5 * (student - teacher).square().mean(), rtol=1e-4)


def test_discriminator_losses_at_known_logits(backbone):
    """Heads that answer a constant c: softplus for LADD (two fakes to one real), hinge for ADD."""
    x0 = torch.randn(N, D, generator=torch.Generator().manual_seed(9))
    for name in ("ladd", "add"):
        paradigm = make(name, backbone, recon=0.0) if name == "ladd" else make(name, backbone, distill=0.0, r1=0.0)
        for head in paradigm.roles["discriminator"].module.heads:
            nn.init.zeros_(head[-1].weight)
            nn.init.constant_(head[-1].bias, 0.3)
        losses = paradigm.losses(batch(x0=x0), 0)
        c = torch.tensor(0.3, dtype=torch.float64)
        soft = torch.nn.functional.softplus
        wanted = (soft(-c) + 2 * soft(c), soft(-c)) if name == "ladd" else ((1 - c) + (1 + c), -c)
        for key, value in zip(("discriminator", "student"), wanted, strict=True):
            assert losses[key].item() == pytest.approx(value.item(), rel=1e-5), (name, key)


def test_r1_is_the_squared_gradient_in_the_features(backbone):
    """For a linear head w·f the penalty is |w|² / places²: its mean logit's gradient at each place is w / places."""
    ladd = make("ladd", backbone)
    head, w = nn.Linear(5, 1), torch.arange(5.0)
    head.weight.data.copy_(w[None])
    ladd.roles["discriminator"].module = lambda features: head(features[0])[..., 0]
    found = ladd.penalty([torch.randn(7, 4, 5)])
    assert found.item() == pytest.approx(w.square().sum().item() / 4, rel=1e-5)


def test_adds_distillation_is_the_decoded_error_weighed_by_alpha():
    """x̂ = b and a teacher that always says m: α_τ · (scale · decoder gain)² · mean (b − m)²."""
    backbone = Known(VP, Posterior(MEAN, 1e-8 * I))
    b = torch.tensor([1.0, 2.0, 3.0])
    add = make("add", backbone, student=Linear(0 * I, b), distill=1.0, r1=0.0)
    for head in add.roles["discriminator"].module.heads:
        nn.init.zeros_(head[-1].weight)
        nn.init.zeros_(head[-1].bias)
    x0 = torch.zeros(N, D)
    found = add.losses(batch(x0=x0), 0)
    again = batch(x0=x0)
    again.uniform(N), again.uniform(N), again.noise(x0)  # k, then D's level and noise
    alpha, _ = backbone.levels.alpha_sigma(again.level())
    expected = alpha.mean() * 6.0**2 * (b - MEAN).square().mean()
    assert found["student"].item() == pytest.approx(expected.item(), rel=1e-3)


def test_guidance_reaches_the_real_score_of_every_method_that_has_one():
    """Prompts shift the mean by c and the empty one by 0: guided by w, the teacher's mean moves by w c."""
    backbone, c = Known(VP, Posterior()), 0.5
    for name in ("dmd", "sid", "swiftbrush", "tdm"):
        values = []
        for cfg in (1.0, 3.0):
            paradigm = make(name, backbone, cfg=cfg, fake=FAKE)
            losses = paradigm.losses(batch(shift=c), 0)
            values.append(losses["student"].item())
        assert abs(values[0] - values[1]) > 1e-4, name


def test_heads_answer_each_place():
    heads = Heads([torch.zeros(1, 8, 4, 4), torch.zeros(1, 10, 6)])
    assert heads([torch.randn(2, 8, 4, 4), torch.randn(2, 10, 6)]).shape == (2, 26)


@pytest.mark.parametrize("name", PARADIGMS)
def test_settings_are_checked_by_name(backbone, name):
    good = P.paradigms[name]
    first = next(iter(good))
    with pytest.raises(ValueError, match=rf"paradigms\.{name}\.{first} is missing"):
        PARADIGMS[name](backbone, 1, 1.0, {k: v for k, v in good.items() if k != first}, P.distill)
    with pytest.raises(ValueError, match=rf"paradigms\.{name}\.lrr=1 is not a key"):
        PARADIGMS[name](backbone, 1, 1.0, good | {"lrr": 1}, P.distill)
