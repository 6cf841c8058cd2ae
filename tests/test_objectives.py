"""Every paradigm's objective against closed forms. Data are Gaussian (or a mixture), so each score, posterior mean and
ODE map is known; the student is linear. The code under test is the backbones' own, around these networks."""

import math
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
from gad.paradigms.base import Batch, Heads, Paradigm

D, N = 3, 64
P = params.load()
VP = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
V = DDIMScheduler.from_config(VP.config, prediction_type="v_prediction")
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
    """Two equal components, N(c ± mean, 0.09 I)."""

    def forward(self, x, alpha, sigma, c):
        x, var = x - alpha * c, 0.09 * alpha**2 + sigma**2
        side = torch.tanh(alpha * (x @ self.mean)[:, None] / var)
        return c + side * self.mean + alpha * 0.09 / var * (x - alpha * side * self.mean)


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
        scale = {"flow": (1, 1), "epsilon": (1, alpha), "v": (alpha, 1)}[self.prediction]
        return (scale[0] * x_t - scale[1] * x0) / sigma

    def features(self, network, x_t, t, cond):
        assert network is self.network  # the teacher
        return list(places(x_t, cond.embeds[:, 0], t).unbind(1))


def places(x, c, t):
    """What a teacher's two blocks know in two places each, no two of them the same: (B, 2, 2, 2 D)."""
    scale = torch.stack([1 + t, t - 0.5, 1 - t, 2 * t], 1).to(x.dtype)
    return scale.view(-1, 2, 2, 1) * torch.cat([x, c], 1)[:, None, None]


@pytest.fixture(params=["vp", "flow"])
def backbone(request):
    return Known(VP if request.param == "vp" else FLOW, Posterior())


@pytest.fixture(params=[Posterior, Mixture])
def either(request, backbone):
    """Gaussian data or a mixture."""
    return Known(backbone._scheduler, request.param())


def make(name, backbone, steps=1, cfg=1.0, fake=None, student=None, **settings):
    paradigm = PARADIGMS[name](backbone, steps, cfg, P.paradigms[name] | settings, P.distill)
    paradigm.student = student or Linear()
    if fake is not None:
        paradigm.roles["fake"].module = fake
    return paradigm


def batch(n=N, seed=0, shift=0.0, x0=None):
    g = torch.Generator().manual_seed(seed)
    z, cond = torch.randn(n, D, generator=g), Condition(torch.zeros(n, 1, D) + shift, torch.ones(n, 1))
    return Batch(z, cond, g, x0, before(z, cond))


def before(z, cond):
    """Of each sample, another's noise and prompt."""
    i = torch.arange(len(z)).roll(1)
    return z[i], cond[i]


def normal(*shape, seed=9):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


SHIFTS = 0.5 * normal(N, 1, D, seed=7)  # a prompt for each sample


def gradient_in_x_hat(paradigm, loss):
    return torch.autograd.grad(loss, paradigm.point.x_hat, retain_graph=True)[0]


FAKE = Posterior(torch.tensor([0.1, 0.2, -0.3]), 0.5 * I + 0.1)


def levels(backbone, t):
    return (a.double()[:, None] for a in backbone.levels.alpha_sigma(t))


def gaussian(network, x, alpha, sigma):
    """A Gaussian's posterior mean at x and its Jacobian there, by matrices."""
    mean, root, one = network.mean.detach().double(), network.root.detach().double(), I.double()
    cov, alpha, sigma = root @ root.T, alpha[..., None], sigma[..., None]
    gain = alpha * cov @ torch.linalg.inv(alpha**2 * cov + sigma**2 * one)
    return mean + (gain @ (x - alpha[..., 0] * mean)[..., None])[..., 0], gain


def mixture(x, alpha, sigma):
    """The same of the mixture, by Tweedie's μ = (x + σ² ∇ log p) / α, log p of the diffused mixture by autograd."""
    x, var = x.requires_grad_(True), 2 * (0.09 * alpha**2 + sigma**2)
    logs = [-((x - side * alpha * MEAN.double()).square() / var).sum(1) for side in (1, -1)]
    score = torch.autograd.grad(torch.logsumexp(torch.stack(logs), 0).sum(), x, create_graph=True)[0]
    hessian = torch.stack([torch.autograd.grad(s.sum(), x, retain_graph=True)[0] for s in score.unbind(1)], 1)
    x, score = x.detach(), score.detach()
    return (x + sigma**2 * score) / alpha, (I.double() + sigma[..., None] ** 2 * hessian) / alpha[..., None]


def prediction(backbone, network, x, tau, c, cfg=1.0):
    """A network's guided x̂0 at x and its Jacobian there, in fp64 and by other means than the network's own."""
    alpha, sigma = levels(backbone, tau)

    def given(c):
        away = x.detach().double() - alpha * c
        mean, slope = mixture(away, alpha, sigma) if type(network) is Mixture else gaussian(network, away, alpha, sigma)
        return c + mean, slope

    null, said = given(torch.zeros_like(c)), given(c)
    return tuple(n + cfg * (s - n) for n, s in zip(null, said, strict=True))


def predictions(backbone, point, cfg=1.0, fake_cfg=1.0):
    """(μ, its Jacobian) at x_τ, of the teacher and of FAKE."""
    at = point.x_tau, point.tau, point.cond.embeds[:, 0].double()
    return prediction(backbone, backbone.network, *at, cfg), prediction(backbone, FAKE, *at, fake_cfg)


@pytest.mark.parametrize("cfg", [1.0, 3.0])
def test_dmd_moves_samples_by_the_normalised_difference_of_posteriors(either, cfg):
    """Guidance is the teacher's alone."""
    dmd = make("dmd", either, cfg=cfg, fake=FAKE)
    found = gradient_in_x_hat(dmd, dmd.losses(batch(shift=SHIFTS), 0)["student"])
    (real, _), (fake, _) = predictions(either, dmd.point, cfg)
    scale = (dmd.point.x_hat.detach().double() - real).abs().mean(1, keepdim=True)
    assert torch.allclose(found.double(), (fake - real) / scale / (N * D), rtol=5e-3, atol=1e-5)


@pytest.fixture
def learnt(monkeypatch):
    """What fakes are given to learn: (fake, x̂, τ, batch, …) of each call."""
    calls, denoising = [], Paradigm.denoising
    monkeypatch.setattr(Paradigm, "denoising", lambda self, *args: calls.append(args) or denoising(self, *args))
    return calls


@pytest.mark.parametrize("name", ["dmd", "sid", "swiftbrush"])
def test_levels_and_noises_are_new_for_each_use(backbone, learnt, name):
    """Scores are compared where τ is in [0.02, 0.98], a flow's by SiD with log-odds of N(ln 2, 1.6²); SiD's fake learns
    there too, other fakes at all levels."""
    paradigm, at = make(name, backbone, steps=4, fake=FAKE), batch(4096)
    paradigm.losses(at, 0)
    point, [(_, _, own, *_)] = paradigm.point, learnt
    quarters = torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
    odds = torch.sigmoid(math.log(2) + 1.6 * torch.special.ndtri(quarters))
    for tau, low in ((point.tau, 0.02), (own, 0.02 if name == "sid" else 0.0)):
        assert low <= tau.min() < low + 0.01 and 0.99 - low < tau.max() <= 1 - low
        wanted = odds if name == "sid" and backbone.levels.flow else low + (1 - 2 * low) * quarters
        assert torch.allclose(tau.quantile(quarters), wanted, atol=0.03)
    assert torch.corrcoef(torch.stack([point.tau, own]))[0, 1].abs() < 0.08
    alpha, sigma = levels(backbone, point.tau)
    noise = ((point.x_tau - alpha * point.x_hat) / sigma).detach()
    assert noise.mean().abs() < 0.05 and noise.std().item() == pytest.approx(1, abs=0.05)
    assert all((noise * other).mean().abs() < 0.05 for other in (at.z, point.x))


@pytest.mark.parametrize("name", ["sid", "swiftbrush"])
def test_fakes_learn_a_tenth_without_prompts(learnt, name):
    """SwiftBrush's of a batch all or none."""
    paradigm = make(name, Known(VP, Posterior()))
    for seed in range(300):
        paradigm.losses(batch(4, seed, shift=1.0), 0)
    unsaid = torch.stack([(cond.embeds == 0).all(2)[:, 0] for _, _, _, _, cond, *_ in learnt])
    assert unsaid.double().mean().item() == pytest.approx(0.1, abs=0.04)
    assert (unsaid.all(1) == unsaid.any(1)).all() == (name == "swiftbrush")


@pytest.mark.parametrize("scheduler", [VP, V, FLOW], ids=["epsilon", "v", "flow"])
def test_a_fakes_error_is_the_same_however_it_says_noise(scheduler):
    """That of ε̂, which is x̂0's times α / σ, of a network in ε or in v; a flow's is its velocity's, times 1 / σ."""
    backbone, x_hat, c = Known(scheduler, Posterior()), normal(N, D), SHIFTS[:, 0].double()
    tau = torch.linspace(0.02, 1, N, dtype=torch.float64)
    found = make("dmd", backbone).denoising(FAKE, x_hat, tau, batch(shift=SHIFTS))
    alpha, sigma = levels(backbone, tau)
    guess, _ = prediction(backbone, FAKE, alpha * x_hat + sigma * batch().noise(x_hat), tau, c)
    expected = ((1 if backbone.levels.flow else alpha) / sigma * (guess - x_hat)).square().mean(1)
    assert torch.allclose(found.double(), expected, rtol=1e-3)


ADVERSARIAL = {"student": (0.1, (0.9, 0.95), 0.01), "discriminator": (0.3, (0.0, 0.99), 0.0)}
DMDS, SIDS = (
    {role: (lr, (0.4, beta2), decay) for role, lr in (("student", 0.1), ("fake", 0.2))}
    for beta2, decay in ((0.95, 0.01), (0.999, 0.0))
)
RATES = {  # rate, betas and decay of each role
    "ladd": ADVERSARIAL, "add": ADVERSARIAL, "dmd": DMDS, "tdm": DMDS, "swiftbrush": SIDS, "sid": SIDS,
    "tcd": {"student": (0.1, (0.9, 0.999), 0.0)},
}


@pytest.mark.parametrize("name", RATES)
def test_roles_have_the_rates_of_their_paradigm(backbone, name):
    given = {"lr": 0.1, "fake_lr": 0.2, "disc_lr": 0.3, "beta1": 0.4}
    paradigm = make(name, backbone, **{k: v for k, v in given.items() if k in P.paradigms[name]})
    groups = {k: role.optimisers[0].param_groups for k, role in paradigm.roles.items()}
    assert {k: (g["lr"], g["betas"], g["weight_decay"]) for k, (g,) in groups.items()} == RATES[name]
    assert {role.clip for role in paradigm.roles.values()} == {P.distill.clip}
    assert {k: role.ema for k, role in paradigm.roles.items() if role.average} == {"student": P.distill.ema}


def test_dmds_student_learns_at_each_ratioth_step(backbone):
    dmd = make("dmd", backbone, ratio=3)
    assert ["student" in dmd.losses(batch(), step) for step in range(4)] == [True, False, False, True]


@pytest.mark.parametrize("cfg", [1.0, 3.0])
def test_swiftbrush_moves_samples_by_the_weighted_difference_of_noises(either, cfg):
    """ε_real − ε_fake = α / σ (μ_fake − μ_real), both guided alike."""
    brush = make("swiftbrush", either, cfg=cfg, fake=FAKE)
    found = gradient_in_x_hat(brush, brush.losses(batch(shift=SHIFTS), 0)["student"])
    (real, _), (fake, _) = predictions(either, brush.point, cfg, cfg)
    alpha, sigma = levels(either, brush.point.tau)
    assert torch.allclose(found.double(), sigma * alpha * (fake - real) / (N * D), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("cfg", [1.0, 3.0])
@pytest.mark.parametrize("huber", [0.0, 0.3])
def test_tdm_moves_samples_by_the_pseudo_huber_of_the_difference(either, huber, cfg):
    """e / √(e² + c²) for each element of e = μ_fake − μ_real^w, over the sample's own mean |x̂ − μ_real^w|."""
    tdm = make("tdm", either, steps=2, cfg=cfg, fake=FAKE, huber=huber)
    found = gradient_in_x_hat(tdm, tdm.losses(batch(shift=SHIFTS), 0)["student"])
    (real, _), (fake, _) = predictions(either, tdm.point, cfg)
    e, scale = fake - real, (tdm.point.x_hat.detach().double() - real).abs().mean(1, keepdim=True)
    expected = (e / (e**2 + huber**2).sqrt() if huber else e) / scale / (N * D)
    assert torch.allclose(found.double(), expected, rtol=5e-3, atol=1e-5)


def test_tdms_fake_learns_by_snr_up_to_five(backbone):
    """μ_fake moves with its mean by I − α J: the gradient there is 2 min(SNR, 5) (I − α J)ᵀ (μ_fake − x̂), averaged."""
    tdm = make("tdm", backbone, steps=2, cfg=3.0, fake=FAKE)
    found = torch.autograd.grad(tdm.losses(batch(shift=SHIFTS), 0)["fake"], FAKE.mean)[0]
    _, (fake, slope) = predictions(backbone, tdm.point)
    alpha, sigma = levels(backbone, tdm.point.tau)
    snr = (alpha / sigma) ** 2
    assert (snr < 4).any() and (snr > 6).any()
    pull = 2 * snr.clamp(max=5) * (fake - tdm.point.x_hat.detach())
    expected = ((I.double() - alpha[..., None] * slope).mT @ pull[..., None])[..., 0].sum(0) / (N * D)
    assert torch.allclose(found.double(), expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", ["dmd", "sid", "swiftbrush"])
def test_fakes_learn_by_the_error_of_their_output(backbone, name):
    """Of ε̂, or a flow's velocity: x̂0's times (α / σ)² or 1 / σ²; SwiftBrush's times α² more. SiD's is guided."""
    paradigm = make(name, backbone, cfg=3.0, fake=FAKE)
    found = torch.autograd.grad(paradigm.losses(batch(shift=SHIFTS), 0)["fake"], FAKE.mean)[0]
    again, x_hat, c = batch(), paradigm.point.x_hat.detach().double(), SHIFTS[:, 0].double()

    def level():
        if name == "sid" and backbone.levels.flow:
            normal = again.draws.normal(N, dtype=torch.float64)
            return torch.sigmoid(math.log(2) + 1.6 * normal).clamp(0.02, 0.98)
        return again.level(0.02, 0.98) if name == "sid" else again.level()

    level(), again.uniform(N), again.noise(again.z)  # τ of the scores, the step and x_τ's noise
    if name == "sid":
        c = torch.where(again.uniform(N)[:, None] < 0.1, 0, c)
    tau = level()
    assert name != "swiftbrush" or not again.draws.chance(0.1)  # of no prompts
    alpha, sigma = levels(backbone, tau)
    x_tau = alpha * x_hat + sigma * again.noise(again.z)
    fake, slope = prediction(backbone, FAKE, x_tau, tau, c, 3.0 if name == "sid" else 1.0)
    weight = (1 if backbone.levels.flow else alpha**2) * (alpha**2 if name == "swiftbrush" else 1) / sigma**2
    pull = 2 * weight * (fake - x_hat)
    expected = ((I.double() - alpha[..., None] * slope).mT @ pull[..., None])[..., 0].sum(0) / (N * D)
    assert torch.allclose(found.double(), expected, rtol=1e-3, atol=1e-5)


def test_swiftbrushs_fake_begins_as_the_teacher_and_trains_lora_alone(backbone):
    brush = make("swiftbrush", backbone, rank=2, alpha=3)
    fake = brush.roles["fake"]
    at = batch(), torch.full((N,), 0.5, dtype=torch.float64)
    pair = [backbone.x0(m, at[0].z, at[1], at[0].cond) for m in (fake.module, backbone.network)]
    assert torch.allclose(*pair)
    trained = {n for n, p in fake.module.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in n for n in trained) and len(fake.params) == len(trained)
    down, up = fake.params
    nn.init.normal_(up, generator=torch.Generator().manual_seed(0))
    moved = backbone.x0(fake.module, at[0].z, at[1], at[0].cond) - pair[1]
    assert torch.allclose(moved, 3 / 2 * at[0].z @ (up @ down).T, atol=1e-4)


@pytest.mark.parametrize("cfg", [1.0, 3.0])
@pytest.mark.parametrize("alpha", [0.5, 1.0, 1.2])
def test_sid_differentiates_through_both_scores(either, alpha, cfg):
    """∇ aᵀ(b − α a) = J_aᵀ (b − 2 α a) + J_bᵀ a, with a = μ_real − μ_fake, b = μ_real − x̂, both guided alike."""
    sid = make("sid", either, cfg=cfg, fake=FAKE, alpha=alpha)
    found = gradient_in_x_hat(sid, sid.losses(batch(shift=SHIFTS), 0)["student"])
    (real, k_real), (fake, k_fake) = predictions(either, sid.point, cfg, cfg)
    x_hat, scale = sid.point.x_hat.detach().double(), next(levels(either, sid.point.tau))[..., None]
    a, b = real - fake, real - x_hat
    j_a, j_b = scale * (k_real - k_fake), scale * k_real - I.double()
    expected = (j_a.mT @ (b - 2 * alpha * a)[..., None] + j_b.mT @ a[..., None])[..., 0]
    if either.levels.flow:
        expected = (1 - sid.point.tau)[:, None] * expected
    else:
        expected = expected / (x_hat - real).abs().mean(1, keepdim=True)
    assert torch.allclose(found.double(), expected / (N * D), rtol=2e-3, atol=2e-6)


def own_states(backbone, student, z, c, steps):
    """(steps, B, D): where a linear student's sampler stands before each step, in fp64."""
    alpha, sigma = (a.double() for a in backbone.levels.alpha_sigma(backbone.times(steps)))
    states = [z.double()]
    for k in range(steps - 1):
        x_hat = answer(student, states[-1], c)
        states.append(alpha[k + 1] * x_hat + sigma[k + 1] / sigma[k] * (states[-1] - alpha[k] * x_hat))
    return torch.stack(states)


def answer(student, x, c):
    """A linear student's x̂0, in fp64."""
    return x @ student.a.detach().double().T + student.b.detach().double() + c


def reaches(loss, student, slope, x):
    """The loss's gradient in A and b is that of x̂ = A x + b, where the loss has gradient `slope` in x̂."""
    a, b = torch.autograd.grad(loss, [student.a, student.b])
    return all(torch.allclose(f.double(), e.double(), rtol=1e-3, atol=1e-5)
               for f, e in ((a, slope.double().T @ x), (b, slope.sum(0))))


@pytest.mark.parametrize("name", ["dmd", "sid", "swiftbrush", "tdm"])
def test_each_step_learns_at_the_students_own_state(backbone, name):
    """x is where its sampler has come to under the sample's own prompt; the gradient reaches that one step."""
    student, at = Linear(torch.linalg.cholesky(COV), MEAN), batch(shift=SHIFTS)
    paradigm = make(name, backbone, steps=4, fake=FAKE, student=student)
    loss = paradigm.losses(at, 0)["student"]
    point, times, c = paradigm.point, backbone.times(4), SHIFTS[:, 0].double()
    k = (point.t[:, None] - times).abs().argmin(1)
    assert torch.equal(times[k], point.t) and k.unique().tolist() == [0, 1, 2, 3]
    x = own_states(backbone, student, at.z, c, 4)[k, torch.arange(N)]
    assert torch.allclose(point.x.double(), x, atol=1e-4)
    assert torch.allclose(point.x_hat.double(), answer(student, x, c), atol=1e-4)
    assert reaches(loss, student, gradient_in_x_hat(paradigm, loss), x)


@pytest.mark.parametrize("name", ["dmd", "tdm"])
def test_points_turn_with_the_students_input_and_weights(backbone, name):
    """What GAD's score forms differentiate: the way from the student's input, by its step at that input's own time, to
    the diffused sample. Jacobians by matrices; DMD's are SwiftBrush's and SiD's."""
    paradigm = make(name, backbone, steps=2, fake=FAKE, student=Posterior(MEAN + 0.3, COV + 0.2 * I))
    paradigm.losses(batch(), 0)
    point, v, w = paradigm.point, normal(N, D), normal(N, D, seed=3)
    found, turned = torch.func.jvp(point.renoise, (point.x,), (v,))
    torch.testing.assert_close(found, point.x_tau)
    (alpha, sigma), (alpha_tau, _) = levels(backbone, point.t), levels(backbone, point.tau)
    _, gain = gaussian(paradigm.student, point.x.detach().double(), alpha, sigma)
    of_x0, of_x = alpha_tau, 0 * alpha  # x_τ = of_x0 · x̂0 + of_x · x + noise
    if name == "tdm":
        alpha_s, sigma_s = levels(backbone, torch.where(point.t == paradigm.times[0], *paradigm.times[1:]))
        of_x0, of_x = alpha_tau * (1 - alpha * sigma_s / sigma / alpha_s), alpha_tau / alpha_s * sigma_s / sigma
    expected = of_x0 * (gain @ v.double()[..., None])[..., 0] + of_x * v
    torch.testing.assert_close(turned.double(), expected, rtol=2e-3, atol=2e-4)
    found = torch.autograd.grad((w * point.x_tau).sum(), paradigm.student.mean)[0]  # ∂x̂0/∂mean = I − α gain
    expected = of_x0 * (w - alpha * (gain.mT @ w.double()[..., None])[..., 0])
    torch.testing.assert_close(found.double(), expected.sum(0), rtol=2e-3, atol=2e-3)


def test_tdm_diffuses_from_where_its_step_ends(backbone):
    """From x_s to τ in (s, t): α/α_s x_s + √(σ² − (α/α_s σ_s)²) n."""
    student, at = Linear(torch.linalg.cholesky(COV), MEAN), batch(shift=SHIFTS)
    tdm = make("tdm", backbone, steps=4, fake=FAKE, student=student)
    tdm.losses(at, 0)
    again, times, c = batch(), backbone.times(4), SHIFTS[:, 0].double()  # the same draws
    k = (4 * again.uniform(N)).long()
    t, s, low = times[k], times[k + 1], times[k + 1].clamp(min=0.02)
    tau, n = low + (t - 0.01 - low) * again.uniform(N), again.noise(at.z).double()
    x = own_states(backbone, student, at.z, c, 4)[k, torch.arange(N)]
    (alpha_t, sigma_t), (alpha_s, sigma_s), (alpha, sigma) = (levels(backbone, u) for u in (t, s, tau))
    x_hat = answer(student, x, c)
    x_s = alpha_s * x_hat + sigma_s / sigma_t * (x - alpha_t * x_hat)
    x_tau = alpha / alpha_s * x_s + (sigma**2 - (alpha / alpha_s * sigma_s) ** 2).sqrt() * n
    assert torch.equal(tdm.point.tau, tau) and torch.allclose(tdm.point.x_tau.double(), x_tau, atol=1e-4)


@pytest.mark.parametrize("name", ["dmd", "sid", "swiftbrush", "tdm"])
def test_the_true_posterior_is_the_fakes_optimum(backbone, name):
    """For a one-step student A z + b the fake's best is N(b, A Aᵀ)'s posterior: there, and not elsewhere, its
    gradient has no mean. Whatever the teacher's guidance, but for SiD's, which is its own too."""
    student = Linear(torch.linalg.cholesky(COV), MEAN)
    cfg, spread = (1.0, 0.0) if name == "sid" else (3.0, 0.7)

    def slope(fake):
        paradigm = make(name, backbone, cfg=cfg, fake=fake, student=student)
        return t_values(paradigm, [fake.mean, fake.root], spread)

    assert slope(Posterior()).max() < 5.5 < slope(Posterior(MEAN + 0.2, 1.3 * COV)).max()


def t_values(paradigm, wanted, spread=0.0):
    """Of the fake's mean gradient, over draws; prompts are shifts of N(0, spread² I)."""
    draws = []
    for seed in range(12):
        shift = spread * normal(2000, 1, D, seed=100 + seed)
        grads = torch.autograd.grad(paradigm.losses(batch(2000, seed, shift), 0)["fake"], wanted)
        draws.append(torch.cat([g.flatten() if g.ndim == 1 else g.tril().flatten() for g in grads]))
    draws = torch.stack(draws)
    return (draws.mean(0) / (draws.std(0) / len(draws) ** 0.5).clamp(min=1e-6)).abs()


class Unguided(nn.Module):
    """Answers the empty prompt by `null`, and others so that guided by `cfg` it is `said`."""

    def __init__(self, null, said, cfg):
        super().__init__()
        self.null, self.said, self.cfg = null, said, cfg

    def forward(self, x, alpha, sigma, c):
        null = self.null(x, alpha, sigma, 0 * c)
        said = null + (self.said(x, alpha, sigma, c) - null) / self.cfg
        return torch.where((c == 0).all(1, keepdim=True), null, said)


def test_sids_fake_is_right_when_guided(backbone):
    """Its optimum at w ≠ 1: guided it is the posterior for the prompt. Prompts are dropped, so without one it is that
    for all prompts: for shifts of N(0, S), of N(b, A Aᵀ + S)."""
    student, cfg, spread = Linear(torch.linalg.cholesky(COV), MEAN), 2.0, 0.7
    everything = COV + spread**2 * I

    def slope(null, said):
        fake = Unguided(null, said, cfg)
        paradigm = make("sid", backbone, cfg=cfg, fake=fake, student=student)
        return t_values(paradigm, [null.mean, null.root, said.mean, said.root], spread).max()

    assert slope(Posterior(MEAN, everything), Posterior()) < 5.5
    assert slope(Posterior(MEAN + 0.2, 1.3 * everything), Posterior()) > 5.5
    assert slope(Posterior(MEAN, everything), Posterior(MEAN + 0.2, 1.3 * COV)) > 5.5


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


def learn(paradigm, student, steps, z, x0, shift=0.0):
    wanted = [p for p in student.parameters() if p.requires_grad]
    optimiser = torch.optim.Adam(wanted, 0.03)
    rates = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    for step in range(steps):
        i = torch.randint(len(z), (256,), generator=torch.Generator().manual_seed(step))
        at = batch(256, step, shift)
        at = Batch(z[i], at.cond, at.generator, x0[i], before(z[i], at.cond))
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


def test_ladds_paired_student_keeps_to_its_answer(backbone):
    """With more steps each of them must lead to the teacher's sample from the student's own state, affine in z too."""
    z, steps = normal(4096, D, seed=5), 2
    x0 = backbone.sample(backbone.network, z, prompts(len(z)), 20)
    ladd = make("ladd", backbone, steps, student=ByTime(backbone, steps), recon=50.0)
    silence(ladd)
    learn(ladd, ladd.student, 400, z, x0)
    states, (alpha, sigma) = [z], backbone.levels.alpha_sigma(backbone.times(steps))
    for k in range(steps):
        a, b = fitted(states[k], x0)
        found = ladd.student.table[k], ladd.student.shift[k]
        assert torch.allclose(found[0], a, atol=0.05) and torch.allclose(found[1], b, atol=0.05), k
        states.append(alpha[k + 1] * x0 + sigma[k + 1] / sigma[k] * (states[k] - alpha[k] * x0))


def silence(paradigm):
    """Heads that answer zero to all."""
    for head in paradigm.roles["discriminator"].module.heads:
        nn.init.zeros_(head[-1].weight)
        nn.init.zeros_(head[-1].bias)


def linear_heads(paradigm):
    """D's logits become w_b · f + 0.2 in all places of block b. Returns the weights of each block, (1, 2 D)."""
    heads = paradigm.roles["discriminator"].module.heads
    for i, w in enumerate(([1.0, -2.0, 0.5, 0.3, 0.7, -0.4], [0.6, 0.9, -1.1, -0.5, 0.2, 0.8])):
        heads[i] = nn.Linear(2 * D, 1)
        heads[i].weight.data.copy_(torch.tensor([w]))
        nn.init.constant_(heads[i].bias, 0.2)
    return [head.weight for head in heads]


def seen(backbone, again, x, c):
    """What heads see of x, at the batch's next draws, (B, 2, 2, 2 D); and how it moves with x, (B, 2, 2, 1)."""
    t = 0.75 * again.uniform(N)
    alpha, sigma = levels(backbone, t)
    return places(alpha * x + sigma * again.noise(x), c, t), slopes(backbone, t)


def slopes(backbone, t):
    """α times the scale of each place."""
    alpha, _ = levels(backbone, t)
    one = torch.ones(len(t), 1, dtype=torch.float64)
    return alpha[..., None, None] * places(one, one[:, :0], t)


def test_ladds_gradients_where_logits_are_linear(backbone):
    """softplus' is a sigmoid; that of SmoothL1 is the error, cut at ±1; R1 is Σ_b 2 |w_b / 4|². All four places count
    alike, each by its own logit. Of the fakes, one is a real sample with another's prompt."""
    student, x0, c = Linear(torch.linalg.cholesky(COV), MEAN), 2 * normal(N, D), SHIFTS[:, 0].double()
    ladd = make("ladd", backbone, steps=4, student=student, recon=0.7, r1=0.3)
    heads, at, again = linear_heads(ladd), batch(shift=SHIFTS, x0=x0), batch()
    losses, w = ladd.losses(at, 0), torch.stack(heads).detach().double()  # (2, 1, 2 D)
    k, x0 = (4 * again.uniform(N)).long(), x0.double()
    x = own_states(backbone, student, at.z, c, 4)[k, torch.arange(N)]
    x_hat = answer(student, x, c)
    (fooled, up), *others = (
        seen(backbone, again, y, p) for y, p in ((x_hat, c), (x0, c), (x_hat, c), (x0, c.roll(1, 0)))
    )

    def odds(f, sign=1):
        return torch.sigmoid(sign * ((f * w).sum(-1, keepdim=True) + 0.2))

    error = (x_hat - x0).clamp(-1, 1)
    assert 0 < (error.abs() == 1).sum() < error.numel()
    slope = -(odds(fooled, -1) * up * w[..., :D]).mean((1, 2)) / N + 0.7 * error / (N * D)
    assert reaches(losses["student"], student, slope, x)
    expected = sum(
        ((odds(f) - is_real) * f).sum((0, 2)) / (4 * N) for (f, _), is_real in zip(others, (1, 0, 0), strict=True)
    )
    found = torch.cat(torch.autograd.grad(losses["discriminator"], heads))
    assert torch.allclose(found.double(), expected + 0.3 * 4 * w[:, 0] / 16, rtol=1e-3, atol=1e-5)


def test_adds_gradients_where_logits_are_linear(backbone):
    """D's hinge takes the places within its margin; x̂ goes up along α w, and to the guided teacher's answer (in pixels,
    which are 6 times the latents here) without a way through the teacher. x is another noise, or x0 noised by it."""
    student, x0, c = Linear(torch.linalg.cholesky(COV), MEAN), normal(N, D), SHIFTS[:, 0].double()
    add = make("add", backbone, steps=4, cfg=3.0, student=student, distill=0.7, r1=0.3)
    heads, at, again = linear_heads(add), batch(shift=SHIFTS, x0=x0), batch()
    losses, w = add.losses(at, 0), torch.stack(heads).detach().double()  # (2, 1, 2 D)
    k, x0, z = (4 * again.uniform(N)).long(), x0.double(), at.z.roll(1, 0).double()
    alpha_t, sigma_t = levels(backbone, backbone.times(4)[k])
    x = torch.where(k[:, None] == 0, z, alpha_t * x0 + sigma_t * z)
    x_hat = answer(student, x, c)
    _, up = seen(backbone, again, x_hat, c)
    tau = again.uniform(N)
    alpha, sigma = levels(backbone, tau)
    taught, _ = prediction(backbone, backbone.network, alpha * x_hat + sigma * again.noise(x_hat), tau, c, 3.0)
    slope = -(up * w[..., :D]).mean((1, 2)) / N + 0.7 * 2 * 6.0**2 * alpha * (x_hat - taught) / (N * D)
    assert reaches(losses["student"], student, slope, x)
    real, fake = (seen(backbone, again, y, c)[0] for y in (x0, x_hat))
    below = ((real * w).sum(-1, keepdim=True) + 0.2 < 1).double()
    above = ((fake * w).sum(-1, keepdim=True) + 0.2 > -1).double()
    assert 0 < below.mean() < 1 and 0 < above.mean() < 1
    expected = (above * fake - below * real).sum((0, 2)) / (4 * N) + 0.3 * 4 * w[:, 0] / 16  # R1 as LADD's
    found = torch.cat(torch.autograd.grad(losses["discriminator"], heads))
    assert torch.allclose(found.double(), expected, rtol=1e-3, atol=1e-5)


class Energy(nn.Module):
    """A logit ½ |f|²."""

    def forward(self, f):
        return f.square().sum(-1, keepdim=True) / 2


@pytest.mark.parametrize("name", ["ladd", "add"])
def test_r1_is_taken_at_real_samples(backbone, name):
    """½ |f|² has gradient f, so the mean over four places has f / 4 in each."""
    x0, c, again = 2 * normal(N, D), SHIFTS[:, 0].double(), batch()

    def loss(r1):
        paradigm = make(name, backbone, r1=r1)
        paradigm.roles["discriminator"].module.heads = nn.ModuleList([Energy(), Energy()])
        return paradigm.losses(batch(shift=SHIFTS, x0=x0), 0)["discriminator"]

    again.uniform(N), seen(backbone, again, x0, c)  # the step, and of x̂
    if name == "add":
        again.uniform(N), again.noise(x0)  # where it is taught
    real, _ = seen(backbone, again, x0.double(), c)
    assert (loss(3.0) - loss(0.0)).item() == pytest.approx(3 * real.square().sum().item() / 16 / N, rel=1e-4)


def test_add_rests_where_its_two_pulls_balance(backbone):
    """Distillation pulls by 0.4 · 2 · 6² / D E[α (I − α J)] (x̂ − m − w c), alone it would gather all at the guided
    mean; linear heads pull by their weights times E[α times each place's scale]."""
    student, c, cfg = Linear(), 0.2, 3.0
    add = make("add", backbone, cfg=cfg, student=student, distill=0.4)
    w = torch.stack(linear_heads(add)).detach().double()
    middles = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
    alpha, sigma = levels(backbone, middles)
    _, slope = gaussian(backbone.network, MEAN.double().expand(4000, D), alpha, sigma)
    back = 0.4 * 2 * 6.0**2 / D * (alpha[..., None] * (I.double() - alpha[..., None] * slope)).mean(0)
    away = torch.linalg.solve(back, (slopes(backbone, 0.75 * middles) * w[..., :D]).mean((0, 1, 2)))
    assert away.abs().max() > 0.1
    learn(add, student, 300, normal(4096, D, seed=5), data(normal(4096, D, seed=6)), c)
    wanted = MEAN + (cfg - 1) * c + away.float()  # the student adds a c of its own
    assert torch.allclose(student.b, wanted, atol=0.03) and torch.allclose(student.a, 0 * I, atol=0.03)


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
        self.levels = backbone.levels.alpha_sigma(backbone.times(steps)[:-1])[1]
        self.table = nn.Parameter(0.5 * I.repeat(steps, 1, 1))
        self.shift = nn.Parameter(torch.zeros(steps, D))
        for p in (self.mean, self.root, self.to_q.weight):
            p.requires_grad_(False)

    def forward(self, x, alpha, sigma, c):
        k = (sigma - self.levels).abs().argmin(1)
        return (self.table[k] @ x[..., None])[..., 0] + self.shift[k]


class OnTheWay(Posterior):
    """The best fake of a student `ByTime` of Gaussian data, which has Gaussian states: E[x̂ | x_τ], which TDM's fake
    learns; or, `by_score`, the x̂0 that goes with the score of x_τ."""

    def __init__(self, student, backbone, steps, by_score):
        super().__init__()
        self.own, self.by_score = [student], by_score
        self.alpha, self.sigma = backbone.levels.alpha_sigma(backbone.times(steps))

    def states(self):
        """(mean, covariance) of the student's states, its noise first, and each step x → M x + d."""
        mean, cov, found = torch.zeros(D), I, []
        for k, (a, b) in enumerate(zip(self.own[0].table.detach(), self.own[0].shift.detach(), strict=True)):
            (alpha, ahead), (sigma, after) = self.alpha[k:k + 2], self.sigma[k:k + 2]
            m, d = ahead * a + after / sigma * (I - alpha * a), (ahead - after / sigma * alpha) * b
            found.append((mean, cov, a, b, m, d))
            mean, cov = m @ mean + d, m @ cov @ m.T
        return found, (mean, cov)

    def forward(self, x, alpha, sigma, c):
        out, (found, _) = torch.zeros_like(x), self.states()
        step = (sigma < self.sigma[:-1]).sum(1) - 1  # τ is between this of the sampler's times and the next
        for k, (mean, cov, a, b, m, d) in enumerate(found):
            i = step == k
            ratio = (alpha[i] / self.alpha[k + 1])[..., None]
            spread = (sigma[i][..., None] ** 2 - (ratio * self.sigma[k + 1]) ** 2).clamp(min=0)
            off = x[i][..., None] - ratio * (m @ mean + d)[:, None]
            off = torch.linalg.solve(ratio**2 * (m @ cov @ m.T) + spread * I, off)
            score = (x[i] - sigma[i] ** 2 * off[..., 0]) / alpha[i]
            out[i] = score if self.by_score else a @ mean + b + (ratio * (a @ cov @ m.T) @ off)[..., 0]
        return out


@pytest.mark.parametrize("by_score", [False, True])
def test_tdms_last_state_is_the_teachers_and_those_on_the_way_are_wider(backbone, by_score):
    """As its docstring says of its fake. With the score of what is diffused in its place all are the teacher's."""
    torch.manual_seed(0)
    student = ByTime(backbone, 4)
    fake = OnTheWay(student, backbone, 4, by_score)
    tdm = make("tdm", backbone, steps=4, fake=fake, student=student, huber=0.0)
    weights = [student.table, student.shift]
    optimiser = torch.optim.Adam(weights, 0.02)
    falling = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, 600)
    for step in range(600):
        optimiser.zero_grad()
        torch.autograd.backward(tdm.losses(batch(256, step), step)["student"], inputs=weights)
        optimiser.step()
        falling.step()
    (_, *found), last = fake.states()
    wide, off = [], []
    for k, (mean, cov, *_) in enumerate([*found, last], 1):
        alpha, sigma = fake.alpha[k], fake.sigma[k]
        wide.append((cov.trace() / (alpha**2 * COV + sigma**2 * I).trace()).item())
        off.append((mean - alpha * MEAN).norm().item())
    if by_score:
        assert wide == pytest.approx([1] * 4, abs=0.02) and max(off) < 0.02
    else:
        assert 1.15 < wide[-2] < 1.35 and min(wide) > 0.98
    assert wide[-1] == pytest.approx(1, abs=0.02) and off[-1] < 0.02
    assert (last[1] - COV).norm() < 0.03 * COV.norm()


@pytest.mark.parametrize("solver", [1, 4])
def test_tcds_jump_ends_where_the_guided_solver_and_another_jump_lead(backbone, solver):
    """At any later time of the grid: from where a step of the solver leads, and there itself where that is the end."""
    student, x0, c = Linear(torch.linalg.cholesky(COV), MEAN), normal(N, D), SHIFTS[:, 0].double()
    tcd = make("tcd", backbone, cfg=3.0, student=student, solver=solver, huber=0.3)
    loss = tcd.losses(batch(shift=SHIFTS, x0=x0), 0)["student"]
    again, times = batch(), backbone.times(solver)  # the same draws
    k = (solver * again.uniform(N)).long()
    end = k + 1 + ((solver - k) * again.uniform(N)).long()
    assert len({*zip(k.tolist(), end.tolist(), strict=True)}) == solver * (solver + 1) / 2
    t, after, s = (tuple(levels(backbone, times[i])) for i in (k, k + 1, end))
    x = t[0] * x0 + t[1] * again.noise(x0)

    def move(x, x_hat, start, to):
        return to[0] * x_hat + to[1] / start[1] * (x - start[0] * x_hat)

    there = move(x, prediction(backbone, backbone.network, x, times[k], c, 3.0)[0], t, after)
    beyond = move(there, answer(student, there, c), after, s)
    error = move(x, answer(student, x, c), t, s) - torch.where((end == k + 1)[:, None], there, beyond)
    assert torch.allclose(loss.double(), ((error**2 + 0.3**2).sqrt() - 0.3).mean(), rtol=1e-3)


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
    silence(add)
    x0 = torch.zeros(N, D)
    found = add.losses(batch(x0=x0), 0)
    again = batch(x0=x0)
    again.uniform(N), again.uniform(N), again.noise(x0)  # k, then D's level and noise
    alpha, _ = backbone.levels.alpha_sigma(again.level())
    expected = alpha.mean() * 6.0**2 * (b - MEAN).square().mean()
    assert found["student"].item() == pytest.approx(expected.item(), rel=1e-3)


def test_heads_answer_each_place():
    """Heads that read the normalised first channel alone: 2 SiLU(of it) + the block's number, row by row."""
    image, tokens = normal(2, 8, 4, 4), normal(2, 10, 6)
    heads = Heads([image, tokens])
    for i, (_, first, _, last) in enumerate(heads.heads):
        for p in (first.weight, first.bias, last.weight):
            nn.init.zeros_(p)
        first.weight.data[0, 0], last.weight.data[0, 0], last.bias.data[0] = 1, 2, i
    found = heads([image, tokens])
    assert found.shape == (2, 26)
    for sample in range(2):
        places = [image[sample, :, i, j] for i in range(4) for j in range(4)] + list(tokens[sample])
        for at, f in enumerate(places):
            y = (f[0] - f.mean()) / f.std(unbiased=False)
            assert found[sample, at].item() == pytest.approx((2 * y / (1 + (-y).exp()) + (at >= 16)).item(), abs=1e-4)


@pytest.mark.parametrize("name", PARADIGMS)
def test_settings_are_checked_by_name(backbone, name):
    good = P.paradigms[name]
    first = next(iter(good))
    with pytest.raises(ValueError, match=rf"paradigms\.{name}\.{first} is missing"):
        PARADIGMS[name](backbone, 1, 1.0, {k: v for k, v in good.items() if k != first}, P.distill)
    with pytest.raises(ValueError, match=rf"paradigms\.{name}\.lrr=1 is not a key"):
        PARADIGMS[name](backbone, 1, 1.0, good | {"lrr": 1}, P.distill)
