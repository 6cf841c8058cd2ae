"""Noise levels and conversions against diffusers' own schedulers."""

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

from gad.diffusion import Levels

VP = {"timestep_spacing": "trailing", "clip_sample": False, "set_alpha_to_one": True}
SCHEDULERS = {
    "epsilon": lambda: DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, **VP),
    "v": lambda: DDIMScheduler(prediction_type="v_prediction", **VP),
    "flow": lambda: FlowMatchEulerDiscreteScheduler(shift=3.0),
}


@pytest.fixture(params=list(SCHEDULERS))
def kind(request):
    return request.param


@pytest.fixture
def levels(kind):
    return Levels(SCHEDULERS[kind]())


def pair(n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(n, 2, 3, 3, generator=generator) for _ in range(2))


@pytest.mark.parametrize("kind", ["epsilon", "v"], indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_vp_levels_are_the_schedulers(kind, dtype):
    scheduler = SCHEDULERS[kind]()
    levels = Levels(scheduler)
    index = torch.arange(1000)
    t = index.to(dtype) / 999
    assert torch.equal(levels.timestep(t), index.float())  # exactly whole
    alpha, sigma = levels.alpha_sigma(t)
    torch.testing.assert_close(alpha**2, scheduler.alphas_cumprod, rtol=1e-5, atol=0)
    torch.testing.assert_close(sigma**2, 1 - scheduler.alphas_cumprod, rtol=1e-5, atol=1e-7)


def test_vp_levels_between_indices():
    levels = Levels(SCHEDULERS["epsilon"]())
    t = torch.linspace(0, 1, 5001, dtype=torch.float64)
    alpha, sigma = levels.alpha_sigma(t)
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones(5001))
    assert (alpha.diff() < 0).all() and (sigma.diff() > 0).all()
    middle, ends = torch.tensor([300.5]) / 999, torch.tensor([300.0, 301.0]) / 999
    assert levels.timestep(middle).item() == pytest.approx(300.5, abs=1e-3)
    low, high = levels.alpha_sigma(ends)[0].tolist()
    assert levels.alpha_sigma(middle)[0].item() == pytest.approx((low * high) ** 0.5, rel=1e-6)  # log-linear


def test_flow_levels():
    levels = Levels(SCHEDULERS["flow"]())
    t = torch.tensor([0.0, 0.25, 1.0], dtype=torch.float64)
    alpha, sigma = levels.alpha_sigma(t)
    assert torch.equal(alpha, 1 - t.float()) and torch.equal(sigma, t.float())
    assert levels.timestep(t).tolist() == [0.0, 250.0, 1000.0]


def test_zero_terminal_snr():
    """Pure noise at t = 1, where a network that predicts v still says what x0 is."""
    levels = Levels(DDIMScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True))
    x0, eps = pair(3)
    t = torch.tensor([1.0, 0.99995, 998 / 999])
    x_t = levels.add_noise(x0, eps, t)
    assert torch.isfinite(x_t).all()
    torch.testing.assert_close(x_t[0], eps[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(levels.x0(levels.target(x0, eps, t), x_t, t), x0, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="ε tells nothing of x0 there"):
        Levels(DDIMScheduler(rescale_betas_zero_snr=True))


def test_times_may_lie_on_another_device(levels):
    """A constant time on the CPU, latents on a GPU, for which "meta" stands here."""
    x = torch.zeros(2, 4, 8, 8, device="meta")
    assert levels.add_noise(x, x, torch.full((2,), 0.7)).device.type == "meta"


def test_round_trips(kind, levels):
    """A perfect network's output gives back what the noisy latent was made of."""
    assert levels.prediction == kind
    x0, eps = pair(5)
    t = torch.tensor([0.05, 0.2, 0.5, 0.7, 0.9])
    x_t = levels.add_noise(x0, eps, t)
    alpha, sigma = levels.alpha_sigma(t)
    torch.testing.assert_close(x_t, alpha.view(-1, 1, 1, 1) * x0 + sigma.view(-1, 1, 1, 1) * eps)
    output = levels.target(x0, eps, t)
    torch.testing.assert_close(levels.x0(output, x_t, t), x0, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(levels.eps(output, x_t, t), eps, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(levels.eps_from_x0(x0, x_t, t), eps, rtol=1e-4, atol=1e-5)


def test_target_is_the_textbooks():
    x0, eps = pair(1)
    scheduler, t = SCHEDULERS["v"](), torch.tensor([400 / 999])
    velocity = scheduler.get_velocity(x0, eps, torch.tensor([400]))
    torch.testing.assert_close(Levels(scheduler).target(x0, eps, t), velocity)
    assert torch.equal(Levels(SCHEDULERS["epsilon"]()).target(x0, eps, t), eps)
    assert torch.equal(Levels(SCHEDULERS["flow"]()).target(x0, eps, t), eps - x0)


def test_conversions_of_half_outputs_are_in_fp32(levels):
    x0, eps = pair(2)
    t = torch.full((2,), 0.5)
    x_t, output = levels.add_noise(x0, eps, t), levels.target(x0, eps, t).half()
    for convert in (levels.x0, levels.eps):
        assert convert(output, x_t.half(), t).dtype == torch.float32
        assert convert(output.double(), x_t.double(), t).dtype == torch.float64


@pytest.mark.parametrize("steps", [1, 2, 4, 8, 20, 25])
def test_step_is_the_schedulers(kind, levels, steps):
    scheduler = SCHEDULERS[kind]()
    scheduler.set_timesteps(steps)
    if levels.flow:
        times = scheduler.sigmas.double()
    else:
        times = torch.cat([scheduler.timesteps.double() / 999, torch.tensor([-1.0], dtype=torch.float64)])
    x, _ = pair(2, seed=1)
    for i, timestep in enumerate(scheduler.timesteps):
        output, _ = pair(2, seed=10 + i)
        t, s = times[i].expand(2), times[i + 1].expand(2)
        torch.testing.assert_close(levels.timestep(t), timestep.float().expand(2), rtol=1e-6, atol=0)
        ours = levels.step(levels.x0(output, x, t), levels.eps(output, x, t), s)
        expected = scheduler.step(output, timestep, x).prev_sample
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4 * max(1, expected.abs().max().item()))
        x = expected


def test_clean_is_exactly_x0(levels):
    x0, eps = pair(2)
    assert torch.equal(levels.step(x0, eps, torch.full((2,), 0.0 if levels.flow else -1.0)), x0)
    mixed = levels.step(x0, eps, torch.tensor([0.0 if levels.flow else -1.0, 0.5]))
    assert torch.equal(mixed[0], x0[0]) and not torch.allclose(mixed[1], x0[1], atol=0.1)


def test_ends_undo_step(levels):
    x0, eps = pair(4)
    t = torch.tensor([1.0, 0.8, 0.5, 0.3])
    s = torch.tensor([0.7, 0.2, 0.4, 0.0 if levels.flow else -1.0])
    found = levels.ends(levels.add_noise(x0, eps, t), t, levels.step(x0, eps, s), s)
    torch.testing.assert_close(found[0], x0, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(found[1], eps, rtol=1e-3, atol=1e-4)


def test_unknown_prediction_is_refused():
    with pytest.raises(ValueError, match="prediction_type='sample'"):
        Levels(DDIMScheduler(prediction_type="sample"))
