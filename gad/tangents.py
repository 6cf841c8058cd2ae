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


def rows(cond: Condition, i: Tensor) -> Condition:
    """`cond[i]` on the device of `i`. Conditions are kept on the CPU: T5's would fill an accelerator."""
    return cond[i.to(cond.mask.device)].to(i.device)


@dataclass(frozen=True)
class Tangents:
    """N paths of a teacher from noise to image, at K + 1 times.

    states, responses (N, K + 1, C, H, W): each state of a path, and its exact response to a change of the noise.
    The first are the noise `z` and its direction `v`, the last the endpoint `x0` and `jv = J_T(z) v`.
    `cond`: the prompts' conditions, on the CPU; those of a part (`[i]`) are where its states are.
    """

    states: Tensor
    responses: Tensor
    cond: Condition

    z = property(lambda self: self.states[:, 0])
    v = property(lambda self: self.responses[:, 0])
    x0 = property(lambda self: self.states[:, -1])
    jv = property(lambda self: self.responses[:, -1])
    steps = property(lambda self: self.states.shape[1] - 1)  # between the times at which it has states

    def __len__(self):
        return len(self.states)

    def __getitem__(self, i) -> "Tangents":
        i = torch.arange(len(self), device=self.states.device)[i]
        return Tangents(self.states[i], self.responses[i], rows(self.cond, i))

    @staticmethod
    def inputs(backbone: Backbone, prompts: list[str], seeds: tuple[int, int]) -> tuple[Tensor, Tensor, Condition]:
        """(z, v, cond): what a file need not hold."""
        return *(backbone.noise(len(prompts), seed) for seed in seeds), backbone.encode(prompts, device="cpu")

    def save(self, path: Path, prompts: list[str], seeds: tuple[int, int], dtype=torch.float32):
        """All but `z`, `v` and `cond`, which follow from `seeds` and `prompts`, in `dtype`; in fp32 what that cannot
        hold: a few responses may be huge."""
        kept = {}
        for name in ("states", "responses"):
            whole = getattr(self, name)[:, 1:].cpu()
            if not torch.isfinite(whole).all():
                raise ValueError(f"the teacher's {name} have values that are not finite")
            low = whole.to(dtype)
            kept[name] = (low if torch.isfinite(low).all() else whole).contiguous()
        save_file(kept, path, _made(prompts=prompts, seeds=seeds))

    @staticmethod
    def source(path: Path) -> tuple[list[str], tuple[int, int]]:
        """The prompts and seeds of a file, of which `inputs` makes noises, directions and conditions."""
        how = made(path)
        return how["prompts"], tuple(how["seeds"])

    @staticmethod
    def load(path: Path, backbone: Backbone) -> "Tangents":
        """On the backbone's device, in fp32; noises from their seeds, prompts encoded anew."""
        kept, made = _read(path, backbone, "states", "responses")
        *first, cond = Tangents.inputs(backbone, made["prompts"], made["seeds"])
        return Tangents(*(torch.cat([a[:, None], b], 1) for a, b in zip(first, kept, strict=True)), cond)


@dataclass(frozen=True)
class Samples:
    """N noises `z` and where the teacher's sampler takes them, `x0`, (N, C, H, W) each; `cond`: their prompts, on the
    CPU."""

    z: Tensor
    x0: Tensor
    cond: Condition

    def __len__(self):
        return len(self.z)

    def save(self, path: Path, prompts: list[str], seed: int):
        """The endpoints, in fp16: noises and `cond` follow from `seed` and `prompts`."""
        save_file({"x0": self.x0.to("cpu", torch.float16)}, path, _made(prompts=prompts, seed=seed))

    @staticmethod
    def load(path: Path, backbone: Backbone) -> "Samples":
        """On the backbone's device, in fp32; noises from their seed, prompts encoded anew."""
        (x0,), made = _read(path, backbone, "x0")
        cond = backbone.encode(made["prompts"], device="cpu")
        return Samples(backbone.noise(len(x0), made["seed"]), x0, cond)


@dataclass(frozen=True)
class Paths:
    """N paths of a teacher's sampler, without tangents: `states` (N, K + 1, C, H, W) at the student's K + 1 times, the
    first of them the noise; `cond`: the prompts' conditions, on the CPU."""

    states: Tensor
    cond: Condition

    steps = property(lambda self: self.states.shape[1] - 1)

    def __len__(self):
        return len(self.states)

    @staticmethod
    @torch.no_grad()
    def of(
        backbone: Backbone, z: Tensor, cond: Condition, times: Tensor, steps: int, cfg: float, batch: int = 64
    ) -> "Paths":
        """Where the teacher's sampler, of `steps` steps under guidance `cfg`, takes noises z (N, C, H, W)."""
        parts = [
            backbone.path(backbone.network, z[j], cond[j].to(z.device), steps, cfg, times.to(z.device))
            for j in (slice(i, i + batch) for i in tqdm(range(0, len(z), batch), "the teacher's paths", disable=None))
        ]
        return Paths(torch.cat([z[:, None], torch.cat(parts)[:, 1:]], 1), cond)

    def save(self, path: Path, prompts: list[str], seed: int):
        """All but the noises and `cond`, which follow from `seed` and `prompts`. In fp32: errors may be small."""
        save_file({"states": self.states[:, 1:].cpu().contiguous()}, path, _made(prompts=prompts, seed=seed))

    @staticmethod
    def load(path: Path, backbone: Backbone) -> "Paths":
        """On the backbone's device; noises from their seed, prompts encoded anew."""
        (states,), made = _read(path, backbone, "states")
        z = backbone.noise(len(states), made["seed"])
        cond = backbone.encode(made["prompts"], device="cpu")
        return Paths(torch.cat([z[:, None], states], 1), cond)


def made(path: Path) -> dict:
    """What a file of these was made of: prompts and seeds."""
    with safe_open(path, "pt") as f:
        return _told(f.metadata())


def _made(**how) -> dict[str, str]:
    """A file's metadata, under one key: of several safetensors writes in any order, and bytes would differ."""
    return {"made": json.dumps(how)}


def _told(meta: dict[str, str] | None) -> dict:
    """What `_made` was given; files from before it have a key for each."""
    if not meta:
        raise SafetensorError("it does not say what it was made of")
    return json.loads(meta["made"]) if "made" in meta else {k: json.loads(v) for k, v in meta.items()}


def _read(path: Path, backbone: Backbone, *names: str) -> tuple[list[Tensor], dict]:
    """Tensors of a file, in fp32 on the backbone's device, and what is said of them."""
    try:
        with safe_open(path, "pt", str(backbone.device)) as f:
            return [f.get_tensor(name).float() for name in names], _told(f.metadata())
    except (OSError, SafetensorError) as error:
        stage = "nearby" if "nearby" in path.parts else "diagnose"
        raise ValueError(f"{path} cannot be read ({error}): run the {stage} stage again") from None
