"""Operations and memory of a step, counted: as it is done, or of full-size networks without doing it."""

import math
import warnings
import weakref
from dataclasses import dataclass

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import conv_flop_count, flop_registry

from .. import architectures
from ..backbones import Backbone, Condition
from ..distill import Distillation, checkpoint
from ..geometry import jvp
from ..paradigms import find
from ..params import Params
from ..tangents import Samples, Tangents
from ..training import step_generator
from .shapes import norms_as_on_gpus, shapes

ATTENTION = {  # a CPU's, which the registry lacks, by GPUs' of the same arguments
    getattr(torch.ops.aten, f"_scaled_dot_product_flash_attention_for_cpu{which}"):
        flop_registry[getattr(torch.ops.aten, f"_scaled_dot_product_flash_attention{which}")]
    for which in ("", "_backward")
}


class Operations(TorchDispatchMode):
    """`total`: operations of all matrix products, convolutions and attention called within, forward and backward
    (FlopCounterMode's own count, without its breakdown by module, which R1's gradient of a gradient does not bear; but
    for convolutions' backward passes, where that takes no notice of groups, by a factor of thousands in SANA)."""

    total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func._overloadpacket == torch.ops.aten.convolution_backward:
            (grad, x, w, *_, transposed, _, _, mask) = args
            self.total += sum(mask[:2]) * conv_flop_count(x.shape, w.shape, grad.shape, transposed)
        elif count := ATTENTION.get(func._overloadpacket) or flop_registry.get(func._overloadpacket):
            self.total += count(*args, **(kwargs or {}), out_val=out)
        return out


class Memory(TorchDispatchMode):
    """Bytes of all tensors made within that are still alive, `now`, and the most there were, `peak`."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.known = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        for x in tree_leaves(out):
            if not isinstance(x, torch.Tensor):
                continue
            held = x.untyped_storage()
            key, size = held._cdata, held.nbytes()
            if key not in self.known and key not in given:
                self.known.add(key)
                self.now += size
                weakref.finalize(held, self._freed, key, size)
        self.peak = max(self.peak, self.now)
        return out

    def _freed(self, key, size):
        self.known.discard(key)
        self.now -= size


@dataclass(frozen=True)
class Count:
    """Of one part of a batch.

    `base`: operations of a step without GAD, for each of its images; `terms`: those that each term adds.
    `memory`: a device's peak, in bytes, without GAD (`None`) and with each term. `held`: what of it is there whatever
    the part: all networks of a run with gradients, moments and averages, the autoencoder, the teacher's tangents and
    samples. `parameters`: a network's."""

    base: float
    terms: dict[str, float]
    memory: dict[str | None, int]
    held: int
    parameters: int


def count(
    name: str, paradigm: str, terms: dict, p: Params, batch: int, cycles: int = 8, precision: str = "no",
) -> Count:
    """Mean of a step of `paradigm` on the full-size backbone `name`, without and with each of `terms` (settings of GAD
    by any names), over the draws of `cycles` of its cycles: one of the parts (`hardware.parts`) in which a batch is
    taken on one device, in `precision` ("no" or "bf16"), with `hardware.checkpointing` or without."""
    model, which = shapes(name), p.backbones[architectures.FULL[name].family]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")  # deepcopy asks whether it is 0
        method = find(paradigm)(model, which.student_steps, which.cfg, p.paradigms[paradigm], p.distill)
    most = max([batch, *(term.pairs for term in terms.values())])
    tangents, samples = random_data(model, which.student_steps, 2 * most, p.seeds.world)
    steps = cycles * int(p.paradigms[paradigm].get("ratio", 1)) * math.lcm(*(term.every for term in terms.values()))
    made, memory, parts = {}, {}, p.hardware.accumulate(1)
    for key, term in {None: None, **terms}.items():
        task = Distillation(method, tangents.cond, tangents, term, batch, 0, samples)
        task.part = 0, parts
        if p.hardware.checkpointing:
            checkpoint(task)
        with norms_as_on_gpus(), Operations() as operations, Memory() as bytes_:
            for step in range(steps):
                with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
                    losses = task.losses(step, step_generator(0, step))
                for role in task.roles:
                    if role in losses:
                        losses[role].backward(inputs=task.roles[role].params)
                del losses
        made[key], memory[key] = operations.total * parts / batch / steps, bytes_.peak
        for role in task.roles.values():
            role.module.zero_grad(set_to_none=True)
    kept = _kept(method, which, p)
    gradients = 4 * sum(w.numel() for role in method.roles.values() for w in role.params)
    base = made.pop(None)
    return Count(
        base, {key: x - base for key, x in made.items()}, {key: x + kept for key, x in memory.items()},
        kept + gradients, sum(w.numel() for w in model.network.parameters()),
    )


def _kept(method, which, p) -> int:
    """Bytes on a device throughout, but for gradients: networks, AdamW's two moments and averages of what is trained in
    fp32, the decoder in its `dtype`, and what the diagnose stage left."""
    model = method.backbone
    found = 4 * sum(w.numel() for w in model.network.parameters())
    for role in method.roles.values():
        trained = sum(w.numel() for w in role.params)
        found += 4 * (sum(w.numel() for w in role.module.parameters()) + trained * (2 + bool(role.average)))
    found += sum(w.numel() for w in model.pipeline.vae.parameters()) * getattr(torch, which.dtype).itemsize
    latents = 2 * (which.student_steps + 1) * p.endpoints.pairs + 2 * p.endpoints.samples * method.paired
    return found + 4 * latents * math.prod(model.latent_shape)


def count_teacher(model: Backbone, which, cond: Condition) -> dict:
    """Operations of a sample of the teacher, and of one of its paths with exact tangents: of its steps, which are
    alike. The peak bytes, its network among them, of as many tangents at once as `cond` has prompts, where the model
    is."""
    n = len(cond)
    (z, v), t = torch.randn(2, n, *model.latent_shape, device=model.device), torch.ones(n, device=model.device)

    def step(z):
        return model.output(model.network, z, t, cond, which.cfg)

    with torch.no_grad():
        with Operations() as one:
            step(z)
        with Operations() as both, Memory() as memory:
            jvp(step, z, v)
    each = which.teacher_steps / n
    return {
        "operations_sample": one.total * each, "operations_tangents": both.total * each,
        "peak_tangents": memory.peak + 4 * sum(w.numel() for w in model.network.parameters()),
    }


def random_data(model: Backbone, steps: int, n: int, seed: int) -> tuple[Tangents, Samples]:
    """Random ones of the shapes that the diagnose stage leaves."""
    cond = model.encode([str(i) for i in range(n)], device="cpu")
    states, responses = torch.randn(2, n, steps + 1, *model.latent_shape, device=model.device)
    return Tangents(states, responses, cond), Samples(states[:, 0], states[:, -1], cond)
