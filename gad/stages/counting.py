"""Operations of a step, counted: as it is done, or of full-size networks without doing them."""

import math
from dataclasses import dataclass

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import conv_flop_count, flop_registry

from .. import architectures
from ..backbones import Backbone, Condition
from ..distill import Distillation
from ..geometry import jvp
from ..paradigms import find
from ..params import Params
from ..tangents import Samples, Tangents
from ..training import Role, step_generator


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
        elif count := flop_registry.get(func._overloadpacket):
            self.total += count(*args, **(kwargs or {}), out_val=out)
        return out


@dataclass(frozen=True)
class Count:
    """A step's operations without GAD, and of each term alone; the bytes of all networks of a run with their gradients,
    moments and averages, in fp32; and a network's parameters."""

    base: float
    terms: dict[str, float]
    held: int
    parameters: int


def count(name: str, paradigm: str, terms: dict, p: Params, batch: int, cycles: int = 8) -> Count:
    """Mean of a step of `paradigm` on the full-size backbone `name`, without and with each of `terms` (settings of GAD
    by any names), over the draws of `cycles` of its cycles. The networks are on PyTorch's meta device, which knows
    shapes alone; all else is as in training, at random values."""
    model, which = shapes(name), p.backbones[architectures.FULL[name].family]
    method = find(paradigm)(model, which.student_steps, which.cfg, p.paradigms[paradigm], p.distill)
    most = max([batch, *(term.pairs for term in terms.values())])
    tangents, samples = random_data(model, which.student_steps, 2 * most, p.seeds.world)
    steps = cycles * int(p.paradigms[paradigm].get("ratio", 1)) * math.lcm(*(term.every for term in terms.values()))
    found = {}
    for key, term in {None: None, **terms}.items():
        task = Distillation(method, tangents.cond, tangents, term, batch, 0, samples)
        with Operations() as counted:
            for step in range(steps):
                losses = task.losses(step, step_generator(0, step))
                for role in task.roles:
                    if role in losses:
                        losses[role].backward(inputs=task.roles[role].params)
        found[key] = counted.total / steps
    parameters = sum(w.numel() for w in model.network.parameters())
    held = sum(map(_held, method.roles.values())) + 4 * parameters
    base = found.pop(None)
    return Count(base, {key: x - base for key, x in found.items()}, held, parameters)


def count_teacher(model: Backbone, which, cond: Condition) -> dict:
    """Operations of a sample of the teacher, and of one of its paths with exact tangents: of its steps, which are
    alike. `cond`: of one prompt, where the model is."""
    (z, v), t = torch.randn(2, 1, *model.latent_shape, device=model.device), torch.ones(1, device=model.device)

    def step(z):
        return model.output(model.network, z, t, cond, which.cfg)

    with torch.no_grad():
        with Operations() as one:
            step(z)
        with Operations() as both:
            jvp(step, z, v)
    steps = which.teacher_steps
    return {"operations_sample": one.total * steps, "operations_tangents": both.total * steps}


def random_data(model: Backbone, steps: int, n: int, seed: int) -> tuple[Tangents, Samples]:
    """Random ones of the shapes that the diagnose stage leaves."""
    cond = model.encode([str(i) for i in range(n)], device="cpu")
    states, responses = torch.randn(2, n, steps + 1, *model.latent_shape, device=model.device)
    return Tangents(states, responses, cond), Samples(states[:, 0], states[:, -1], cond)


def _held(role: Role) -> int:
    """Weights in fp32; of what is trained also gradients, AdamW's two moments and, where there is one, the average."""
    trained = sum(w.numel() for w in role.params)
    return 4 * (sum(w.numel() for w in role.module.parameters()) + trained * (3 + bool(role.average)))


class _Enter(torch.autograd.Function):
    """A tensor to where there are shapes alone; its gradient comes back as zeros."""

    @staticmethod
    def forward(x):
        return x.to("meta")

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, gradient):
        return torch.zeros(gradient.shape)

    @staticmethod
    def jvp(ctx, tangent):
        return _Enter.apply(tangent)


class _Leave(torch.autograd.Function):
    """And back, at random values."""

    @staticmethod
    def forward(x):
        return torch.randn(x.shape)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, gradient):
        return gradient.to("meta")

    @staticmethod
    def jvp(ctx, tangent):
        return _Leave.apply(tangent)


def shapes(name: str) -> Backbone:
    """The full-size backbone `name`, whose networks take and give tensors of the CPU."""
    model = architectures.build(name, "meta")

    class Shapes(type(model)):
        device = torch.device("cpu")

        def raw(self, network, x_t, timestep, cond):
            return _Leave.apply(super().raw(network, _Enter.apply(x_t), timestep.to("meta"), cond.to("meta")))

        def features(self, network, x_t, t, cond):
            return [_Leave.apply(f) for f in super().features(network, x_t, t, cond)]

        def pixels(self, latents):
            return _Leave.apply(super().pixels(_Enter.apply(latents)))

    model.__class__ = Shapes
    return model
