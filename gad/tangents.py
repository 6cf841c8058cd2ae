"""What is computed of a teacher once and kept on disk: its exact responses along its paths, which GAD's output forms
learn from, samples, which some paradigms do, and paths that its students' are measured against."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm

from .backbones import Backbone, Condition


@dataclass(frozen=True)
class Tangents:
    """N paths of a teacher from noise to image, at K + 1 times.

    states, responses (N, K + 1, C, H, W): each state of a path, and its exact response to a change of the noise.
    The first are the noise `z` and its direction `v`, the last the endpoint `x0` and `jv = J_T(z) v`.
    `cond`: the prompts' conditions.
    """

    states: Tensor
    responses: Tensor
    cond: Condition

    z = property(lambda self: self.states[:, 0])
    v = property(lambda self: self.responses[:, 0])
    x0 = property(lambda self: self.states[:, -1])
    jv = property(lambda self: self.responses[:, -1])

    def __len__(self):
        return len(self.states)

    def __getitem__(self, i) -> "Tangents":
        return Tangents(self.states[i], self.responses[i], self.cond[i])

    @staticmethod
    def inputs(backbone: Backbone, prompts: list[str], seeds: tuple[int, int]) -> tuple[Tensor, Tensor, Condition]:
        """(z, v, cond): what a file need not hold."""
        return *(backbone.noise(len(prompts), seed) for seed in seeds), backbone.encode(prompts)

    def save(self, path: Path, prompts: list[str], seeds: tuple[int, int], dtype=torch.float32):
        """All but `z`, `v` and `cond`, which follow from `seeds` and `prompts`, in `dtype`."""
        kept = {k: getattr(self, k)[:, 1:].to("cpu", dtype).contiguous() for k in ("states", "responses")}
        for name, value in kept.items():
            if not torch.isfinite(value).all():
                raise ValueError(f"the teacher's {name} have values that {dtype} cannot hold")
        save_file(kept, path, {"prompts": json.dumps(prompts), "seeds": json.dumps(seeds)})

    @staticmethod
    def load(path: Path, backbone: Backbone) -> "Tangents":
        """On the backbone's device, in fp32; noises from their seeds, prompts encoded anew."""
        kept, meta = _read(path, backbone, "states", "responses")
        *first, cond = Tangents.inputs(backbone, json.loads(meta["prompts"]), json.loads(meta["seeds"]))
        return Tangents(*(torch.cat([a[:, None], b], 1) for a, b in zip(first, kept, strict=True)), cond)


@dataclass(frozen=True)
class Samples:
    """N noises `z` and where the teacher's sampler takes them, `x0`, (N, C, H, W) each; `cond`: their prompts."""

    z: Tensor
    x0: Tensor
    cond: Condition

    def __len__(self):
        return len(self.z)

    @staticmethod
    @torch.no_grad()
    def make(path: Path, backbone: Backbone, prompts: list[str], seed: int, steps: int, cfg: float, batch: int = 64):
        """Draw them and save the endpoints, in fp16."""
        z, cond, x0 = backbone.noise(len(prompts), seed), backbone.encode(prompts), []
        for i in tqdm(range(0, len(z), batch), "samples of the teacher", disable=None):
            x0.append(backbone.sample(backbone.network, z[i:i + batch], cond[i:i + batch], steps, cfg))
        meta = {"prompts": json.dumps(prompts), "seed": str(seed)}
        save_file({"x0": torch.cat(x0).to("cpu", torch.float16)}, path, meta)

    @staticmethod
    def load(path: Path, backbone: Backbone) -> "Samples":
        """On the backbone's device, in fp32; noises from their seed, prompts encoded anew."""
        (x0,), meta = _read(path, backbone, "x0")
        return Samples(backbone.noise(len(x0), int(meta["seed"])), x0, backbone.encode(json.loads(meta["prompts"])))


@dataclass(frozen=True)
class Paths:
    """N paths of a teacher's sampler, without tangents: `states` (N, K + 1, C, H, W) at the student's K + 1 times, the
    first of them the noise; `cond`: the prompts' conditions."""

    states: Tensor
    cond: Condition

    def __len__(self):
        return len(self.states)

    @staticmethod
    @torch.no_grad()
    def of(
        backbone: Backbone, z: Tensor, cond: Condition, times: Tensor, steps: int, cfg: float, batch: int = 64
    ) -> "Paths":
        """Where the teacher's sampler, of `steps` steps under guidance `cfg`, takes noises z (N, C, H, W)."""
        parts = [
            backbone.path(backbone.network, z[i:i + batch], cond[i:i + batch], steps, cfg, times.to(z.device))
            for i in tqdm(range(0, len(z), batch), "the teacher's paths", disable=None)
        ]
        return Paths(torch.cat([z[:, None], torch.cat(parts)[:, 1:]], 1), cond)

    def save(self, path: Path, prompts: list[str], seed: int):
        """All but the noises and `cond`, which follow from `seed` and `prompts`. In fp32: errors may be small."""
        meta = {"prompts": json.dumps(prompts), "seed": str(seed)}
        save_file({"states": self.states[:, 1:].cpu().contiguous()}, path, meta)

    @staticmethod
    def load(path: Path, backbone: Backbone) -> "Paths":
        """On the backbone's device; noises from their seed, prompts encoded anew."""
        (states,), meta = _read(path, backbone, "states")
        z = backbone.noise(len(states), int(meta["seed"]))
        return Paths(torch.cat([z[:, None], states], 1), backbone.encode(json.loads(meta["prompts"])))


def _read(path: Path, backbone: Backbone, *names: str) -> tuple[list[Tensor], dict[str, str]]:
    """Tensors of a file, in fp32 on the backbone's device, and what is said of them."""
    try:
        with safe_open(path, "pt", str(backbone.device)) as f:
            return [f.get_tensor(name).float() for name in names], f.metadata()
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} cannot be read ({error}): run the diagnose stage again") from None
