"""What every backbone offers, and all that paradigms and evaluations may know of one."""

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from ..diffusion import Levels


@dataclass(frozen=True)
class Condition:
    """Encoded prompts: `embeds` (B, L, D) and `mask` (B, L), 1 where a token counts. Indexed like a tensor."""

    embeds: Tensor
    mask: Tensor

    def __len__(self):
        return len(self.embeds)

    def __getitem__(self, index) -> "Condition":
        if not isinstance(index, slice) and torch.as_tensor(index).ndim == 0:
            index = [int(index)]
        return Condition(self.embeds[index], self.mask[index])

    def to(self, *args, **kwargs) -> "Condition":
        embeds = self.embeds.to(*args, **kwargs)
        return Condition(embeds, self.mask.to(embeds.device))

    def expand(self, n: int) -> "Condition":
        """One prompt, `n` times."""
        return Condition(self.embeds.expand(n, -1, -1), self.mask.expand(n, -1))

    @staticmethod
    def cat(parts: list["Condition"]) -> "Condition":
        return Condition(torch.cat([p.embeds for p in parts]), torch.cat([p.mask for p in parts]))

    def save(self, path: Path):
        save_file({"embeds": self.embeds.contiguous(), "mask": self.mask.contiguous()}, path)

    @staticmethod
    def load(path: Path) -> "Condition":
        return Condition(**load_file(path))


class Backbone:
    """One Diffusers text-to-image pipeline. A *network* (teacher, student, fake) is always an argument.

    Subclasses say which part of the pipeline is the network (`part`), how prompts are encoded, how the
    network is called (`raw`) and which scheduler samples it deterministically.
    """

    part: str  # name of the network in the pipeline folder
    pipeline_class: type
    others: tuple[type, ...] = ()  # pipelines of other classes, of published students whose network `raw` can call
    max_tokens: int | None = None
    call_hint = ""  # what a miniature's own pipeline call needs besides the prompt

    def __init__(self, pipeline, name: str):
        self.name, self.pipeline = name, pipeline
        for module in (pipeline.vae, pipeline.text_encoder, self.network):
            module.requires_grad_(False).eval()
        pipeline.scheduler = self.scheduler(self.default_steps)
        pipeline.set_progress_bar_config(disable=True)
        self.levels = Levels(pipeline.scheduler)
        self._null = None

    default_steps = 25
    adapted = ("to_q", "to_v")  # the linear layers that a LoRA is put on, by their names in diffusers
    instruction, skipped = "", 0  # text before each prompt, and how many of its tokens' embeddings are left out

    @property
    def network(self) -> nn.Module:
        return getattr(self.pipeline, self.part)

    @property
    def prediction(self) -> str:
        return self.levels.prediction

    @property
    def device(self) -> torch.device:
        return self.network.device

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        n = self.network.config.sample_size
        return (self.network.config.in_channels, n, n)

    def to(self, device) -> "Backbone":
        self.pipeline.to(device)
        return self

    def as_saved(self, network, steps: int) -> tuple:
        """The pipeline in whose folder `network` belongs, where it is the backbone's now; and how that is called."""
        return self.pipeline, {"num_inference_steps": steps, "guidance_scale": 1.0}

    # What a backbone's file fills in.

    def scheduler(self, steps: int):
        """The deterministic diffusers scheduler for `steps` steps, from the pipeline's own."""
        raise NotImplementedError

    def encode_text(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """Token embeddings (B, L, D) and mask (B, L), by the pipeline's own text encoder; keeps gradients."""
        raise NotImplementedError

    def raw(self, network, x_t: Tensor, timestep: Tensor, cond: Condition) -> Tensor:
        """The network's output (B, C, H, W), learned-sigma channels cut."""
        raise NotImplementedError

    # The rest is the same for all.

    @torch.no_grad()
    def encode(self, prompts: list[str], batch: int = 256, device=None) -> Condition:
        """Prompts to conditions, `batch` at a time, on the network's device or another; equal ones are encoded once."""
        if prompts != [""]:
            _ = self.null  # made now: first asked for in a `torch.func` transform, it would be a dead tensor of it
        unique = list(dict.fromkeys(prompts))
        made = self.encode_unlike(unique, batch)
        if unique != prompts:  # else it stays where it is: a file that all processes see
            index = {p: i for i, p in enumerate(unique)}
            made = made[[index[p] for p in prompts]]
        return made.to(device or self.device)

    def encode_unlike(self, prompts: list[str], batch: int) -> Condition:
        """What `encode` makes of prompts that are all different."""
        parts = [Condition(*self.encode_text(prompts[i:i + batch])) for i in range(0, len(prompts), batch)]
        return Condition.cat(parts)

    @property
    def null(self) -> Condition:
        """The empty prompt, one row."""
        if self._null is None or self._null.embeds.device != self.device:
            self._null = self.encode([""])
        return self._null

    def pixels(self, latents: Tensor) -> Tensor:
        """Scaled latents to the decoder's images (B, 3, H, W), about in [-1, 1]; keeps gradients."""
        vae = self.pipeline.vae
        return vae.decode(latents.to(vae.dtype) / vae.config.scaling_factor).sample.float()

    @torch.no_grad()
    def decode(self, latents: Tensor, batch: int = 64) -> Tensor:
        """Scaled latents to images (B, 3, H, W) in [0, 1]."""
        return (torch.cat([self.pixels(z) for z in latents.split(batch)]) / 2 + 0.5).clamp(0, 1)

    @torch.no_grad()
    def encode_images(self, images: Tensor, batch: int = 64) -> Tensor:
        """Images in [0, 1] to scaled latents (the posterior's mean)."""
        vae = self.pipeline.vae
        out = [vae.encode(x.to(vae.dtype) * 2 - 1) for x in images.split(batch)]
        z = [o.latent_dist.mean if hasattr(o, "latent_dist") else o.latent for o in out]
        return torch.cat(z).float() * vae.config.scaling_factor

    def output(self, network, x_t: Tensor, t: Tensor, cond: Condition, cfg: float = 1.0) -> Tensor:
        """Raw prediction with classifier-free guidance `uncond + cfg (cond − uncond)`, one forward. `t`: (B,)."""
        t = torch.as_tensor(t, device=x_t.device).expand(len(x_t))
        timestep = self.levels.timestep(t)
        if cfg == 1.0:
            return self.raw(network, x_t, timestep, cond)
        both = Condition.cat([_padded(self.null.expand(len(x_t)), cond), cond])
        out = self.raw(network, torch.cat([x_t, x_t]), torch.cat([timestep, timestep]), both)
        # Under autocast too: a scale of 4.5 makes half precision's rounding six times as large.
        uncond, text = out.to(torch.promote_types(out.dtype, torch.float32)).chunk(2)
        return uncond + cfg * (text - uncond)

    def x0(self, network, x_t: Tensor, t: Tensor, cond: Condition, cfg: float = 1.0) -> Tensor:
        """x̂0 (B, C, H, W) fp32."""
        t = torch.as_tensor(t, device=x_t.device).expand(len(x_t))
        return self.levels.x0(self.output(network, x_t, t, cond, cfg), x_t, t)

    def eps(self, network, x_t: Tensor, t: Tensor, cond: Condition, cfg: float = 1.0) -> Tensor:
        """ε̂ (B, C, H, W) fp32."""
        t = torch.as_tensor(t, device=x_t.device).expand(len(x_t))
        return self.levels.eps(self.output(network, x_t, t, cond, cfg), x_t, t)

    def both(self, network, x_t: Tensor, t: Tensor, cond: Condition, cfg: float = 1.0) -> tuple[Tensor, Tensor]:
        """(x̂0, ε̂) from one forward."""
        t = torch.as_tensor(t, device=x_t.device).expand(len(x_t))
        out = self.output(network, x_t, t, cond, cfg)
        return self.levels.x0(out, x_t, t), self.levels.eps(out, x_t, t)

    def noise(self, n: int, seed: int) -> Tensor:
        """The `n` noises of a seed: drawn on the CPU, so equal for every model and device."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(n, *self.latent_shape, generator=generator).to(self.device)

    def add_noise(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        return self.levels.add_noise(x0, eps, t)

    def times(self, steps: int) -> Tensor:
        """The `steps` sampling times, falling, then 0 or below for clean; (steps + 1,) float64."""
        if not self.levels.flow and self.levels.train_steps % steps:
            raise ValueError(f"steps={steps} must divide {self.levels.train_steps}: DDIM's times are even only then")
        scheduler = self.scheduler(steps)
        scheduler.set_timesteps(steps)
        if self.levels.flow:
            return scheduler.sigmas.double()
        t = torch.as_tensor(scheduler.timesteps).double() / (self.levels.train_steps - 1)
        return torch.cat([t, t.new_tensor([-1.0])])

    def step(self, network, x_t: Tensor, t: Tensor, s: Tensor, cond: Condition, cfg: float = 1.0) -> Tensor:
        """One deterministic sampling step from times `t` to `s`, (B,) each."""
        x0, eps = self.both(network, x_t, t, cond, cfg)
        return self.levels.step(x0, eps, s)

    def sample(
        self, network, z: Tensor, cond: Condition, steps: int, cfg: float = 1.0, return_trajectory: bool = False,
        first: tuple | None = None,
    ) -> Tensor:
        """Latents from noise `z` (B, C, H, W): a function of `z` alone. With `return_trajectory`, all states
        (steps + 1, B, C, H, W), `z` first. `first`: another (network, cfg) for the first step, the hybrid sampler
        of Gandikota & Bau (2025)."""
        times = self.times(steps).to(z.device)
        states = [z]
        for t, s in zip(times[:-1].unbind(), times[1:].unbind(), strict=True):
            one = z.new_ones(len(z), dtype=torch.float64)
            model = first if first and len(states) == 1 else (network, cfg)
            states.append(self.step(model[0], states[-1], t * one, s * one, cond, model[1]))
        return torch.stack(states) if return_trajectory else states[-1]

    def path(self, network, z: Tensor, cond: Condition, steps: int, cfg: float, times: Tensor) -> Tensor:
        """States (B, len(times), C, H, W) of the `steps`-step sampler at `times`, falling from the first: its
        moves are straight in (x̂0, ε̂), so a time between two of its own has a state too."""
        own = self.times(steps)
        states = self.sample(network, z, cond, steps, cfg, return_trajectory=True)
        found = []
        for time in times.tolist():
            k = int((own > time).sum().clamp(1, steps))  # from own[k − 1] to own[k]
            t, s, at = (z.new_full((len(z),), x, dtype=torch.float64) for x in (own[k - 1], own[k], time))
            found.append(self.levels.step(*self.levels.ends(states[k - 1], t, states[k], s), at))
        return torch.stack(found, 1)

    def features(self, network, x_t: Tensor, t: Tensor, cond: Condition) -> list[Tensor]:
        """Outputs of the network's blocks at about a quarter, a half and three quarters of its depth."""
        blocks = self.blocks(network)
        chosen = [blocks[len(blocks) * k // 4] for k in (1, 2, 3)]
        found: list[Tensor] = []
        # Where activations are made anew, a block's call must come to its end.
        whole = torch.is_grad_enabled() and getattr(network, "is_gradient_checkpointing", False)

        def keep(module, args, out):
            found.append(out[0] if isinstance(out, tuple) else out)
            if len(found) == len(chosen) and not whole:
                raise _Enough

        hooks = [b.register_forward_hook(keep) for b in chosen]
        try:
            with suppress(_Enough):
                self.output(network, x_t, t, cond)
        finally:
            for hook in hooks:
                hook.remove()
        return found

    def blocks(self, network) -> list[nn.Module]:
        return list(network.transformer_blocks)

    def cross_attentions(self, network) -> list[nn.Module]:
        """The cross-attention modules layout guidance reads: the middle half of the network."""
        found = [m for n, m in network.named_modules() if n.endswith("attn2")]
        return found[len(found) // 4: max(len(found) // 4 + 1, (3 * len(found) + 3) // 4)]

    def attention(self, network, x_t: Tensor, t: Tensor, cond: Condition, tokens: list[list[int]]) -> list[Tensor]:
        """Cross-attention maps, one (B, K, N) per module: for each of a sample's K token indices, the
        attention each of N places pays it, mean over heads. Differentiable in `x_t`."""
        modules = self.cross_attentions(network)
        maps: list[Tensor] = []
        kept = [m.processor for m in modules]
        index = torch.as_tensor(tokens, device=x_t.device)
        for module in modules:
            module.set_processor(_Capture(maps, index))
        try:
            self.output(network, x_t, t, cond)
        finally:
            for module, processor in zip(modules, kept, strict=True):
                module.set_processor(processor)
        return maps


class _Enough(Exception):
    """The network was called for what is there by now."""


class _Capture:
    """An attention processor that also keeps the probabilities (diffusers' eager attention)."""

    def __init__(self, maps, index):
        self.maps, self.index = maps, index

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, **kwargs):
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        if attention_mask is not None:
            attention_mask = attn.prepare_attention_mask(attention_mask, context.shape[1], len(hidden_states))
        query, key, value = map(attn.head_to_batch_dim, (
            _normed(attn.to_q(hidden_states), attn.norm_q, attn.heads),
            _normed(attn.to_k(context), attn.norm_k, attn.heads), attn.to_v(context),
        ))
        probabilities = attn.get_attention_scores(query, key, attention_mask)
        mean = probabilities.unflatten(0, (len(hidden_states), -1)).mean(1)  # (B, N, L)
        self.maps.append(mean.gather(2, self.index[:, None].expand(-1, mean.shape[1], -1)).transpose(1, 2))
        out = attn.to_out[1](attn.to_out[0](attn.batch_to_head_dim(probabilities @ value)))
        return out / attn.rescale_output_factor


def _normed(x: Tensor, norm, heads: int) -> Tensor:
    """Queries or keys (B, N, H·D) by their norm, if there is one: over all, as SANA's is, or over each head's."""
    if norm is None or norm.weight.numel() == x.shape[-1]:
        return x if norm is None else norm(x)
    return norm(x.unflatten(-1, (heads, -1))).flatten(-2)


def _padded(null: Condition, cond: Condition) -> Condition:
    """The empty prompt brought to the condition's length."""
    short = cond.embeds.shape[1] - null.embeds.shape[1]
    return Condition(F.pad(null.embeds, (0, 0, 0, short)), F.pad(null.mask, (0, short))) if short else null
