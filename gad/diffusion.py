"""Noise levels and conversions. Time `t` is in [0, 1] for every backbone: 0 clean, 1 the first sampling step.
A DDPM schedule's 0 still holds a little noise: below 0 is clean.

`x_t = α_t x0 + σ_t ε`. VP: `α_t = √ᾱ` of a DDPM schedule of T steps, `t = i / (T − 1)`, log ᾱ linear in between.
Flow: `α_t = 1 − t`, `σ_t = t`, and the network predicts `ε − x0`. All arithmetic in fp32 at least.
"""

import torch
from torch import Tensor


class Levels:
    """Noise levels of a diffusers scheduler.

    `prediction`: "epsilon", "v" or "flow". Raises ValueError for another `prediction_type`.
    """

    def __init__(self, scheduler):
        config = scheduler.config
        self.train_steps = config.num_train_timesteps
        self.flow = "flow" in (config.get("prediction_type") or "") or hasattr(scheduler, "sigma_min")
        kind = "flow" if self.flow else config.prediction_type
        names = {"epsilon": "epsilon", "v_prediction": "v", "flow": "flow"}
        if kind not in names:
            raise ValueError(f"prediction_type={kind!r} is not supported: use one of {', '.join(names)}")
        self.prediction = names[kind]
        if not self.flow:
            alpha_bar = scheduler.alphas_cumprod.double()
            if alpha_bar[-1] == 0 and kind == "epsilon":
                raise ValueError("prediction_type='epsilon' with ᾱ = 0 at t = 1: ε tells nothing of x0 there; use v")
            self._log_alpha_bar = alpha_bar.clamp(min=1e-12).log()  # zero terminal SNR: α is 1e-6

    def timestep(self, t: Tensor) -> Tensor:
        """What the network is told (B,): the flow's t · T, or the VP index."""
        if self.flow:
            return (t.double() * self.train_steps).float()
        return (t.double() * (self.train_steps - 1)).float()

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """`α_t` and `σ_t`, (B,) fp32, for `t` (B,) in [0, 1]; 1 and 0 below."""
        if self.flow:
            t = t.float().clamp(min=0)
            return 1 - t, t
        table = self._log_alpha_bar.to(t.device)
        index = self.timestep(t).double()
        low = index.floor().long().clamp(0, self.train_steps - 2)
        alpha_bar = torch.where(t < 0, 1, torch.lerp(table[low], table[low + 1], index - low).exp())
        return alpha_bar.sqrt().float(), (1 - alpha_bar).sqrt().float()

    def add_noise(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = self._like(x0, t)
        return alpha * x0.float() + sigma * eps.float()

    def x0(self, output: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """x̂0 of a network's raw output."""
        alpha, sigma = self._like(x_t, t)
        output, x_t = _wide(output), _wide(x_t)
        if self.prediction == "epsilon":
            return (x_t - sigma * output) / alpha
        return x_t - t_like(t, x_t) * output if self.flow else alpha * x_t - sigma * output

    def eps(self, output: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """ε̂ of a network's raw output."""
        alpha, sigma = self._like(x_t, t)
        output, x_t = _wide(output), _wide(x_t)
        if self.prediction == "epsilon":
            return output
        return x_t + alpha * output if self.flow else sigma * x_t + alpha * output

    def target(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """What a perfect network returns where `x0` and `eps` are known."""
        alpha, sigma = self._like(x0, t)
        if self.prediction == "epsilon":
            return eps
        return eps - x0 if self.flow else alpha * eps - sigma * x0

    def eps_from_x0(self, x0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = self._like(x_t, t)
        return (_wide(x_t) - alpha * _wide(x0)) / sigma

    def step(self, x0: Tensor, eps: Tensor, s: Tensor) -> Tensor:
        """The deterministic move to time `s` (DDIM; Euler for a flow)."""
        alpha, sigma = self._like(x0, s)
        return alpha * x0 + sigma * eps

    def ends(self, x_t: Tensor, t: Tensor, x_s: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        """(x̂0, ε̂) for which `step` moves `x_t` at time `t` to `x_s` at `s < t`. Linear in both."""
        (alpha_t, sigma_t), (alpha_s, sigma_s) = self._like(x_t, t), self._like(x_s, s)
        area = alpha_s * sigma_t - alpha_t * sigma_s
        return (sigma_t * x_s - sigma_s * x_t) / area, (alpha_s * x_t - alpha_t * x_s) / area

    def _like(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        return tuple(t_like(a, x) for a in self.alpha_sigma(t))


def t_like(t: Tensor, x: Tensor) -> Tensor:
    """(B,) or () shaped to broadcast against `x` (B, *dims), on its device and in its precision."""
    return t.to(x.device, _wide(x).dtype).reshape(-1, *[1] * (x.ndim - 1))


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
