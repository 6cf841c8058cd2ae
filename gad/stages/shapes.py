"""Full-size backbones that are shapes alone: their networks, of PyTorch's fake tensors, compute nothing and hold
nothing; all else about them is real. What enters a network or leaves it is there twice, tens of MB."""

from contextlib import ExitStack, contextmanager
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from .. import architectures
from ..backbones import Backbone, Condition

FAKE = FakeTensorMode(allow_non_fake_inputs=True)


def shapes(name: str) -> Backbone:
    """The full-size backbone `name`, whose networks take and give real tensors of the CPU, at random values."""
    model = architectures.build(name, "meta")
    with FAKE:
        for part in (model.network, model.pipeline.vae):
            part.to_empty(device="cpu")

    class Shapes(type(model)):
        device = torch.device("cpu")

        def raw(self, network, x_t, timestep, cond):
            cond = Condition(_Enter.apply(cond.embeds), _Enter.apply(cond.mask))
            return _Leave.apply(super().raw(network, _Enter.apply(x_t), _Enter.apply(timestep), cond))

        def features(self, network, x_t, t, cond):
            return [_Leave.apply(f) for f in super().features(network, x_t, t, cond)]

        def pixels(self, latents):
            return _Leave.apply(super().pixels(_Enter.apply(latents)))

    model.__class__ = Shapes
    return model


@contextmanager
def norms_as_on_gpus():
    """Norms take and give fp32 under autocast; a CPU's leaves them in bf16, which would be less memory. No torch
    function mode: it would not reach what the backward pass makes anew."""
    def wide(norm):
        return lambda x, *args, **kwargs: norm(
            x.float() if torch.is_autocast_enabled("cpu") else x, *args, **kwargs)

    with ExitStack() as stack:
        for name in ("layer_norm", "group_norm"):
            stack.enter_context(mock.patch.object(F, name, wide(getattr(F, name))))
        yield


def _fake(x):
    with FAKE:
        return torch.empty(x.shape, dtype=x.dtype)


class _Enter(torch.autograd.Function):
    """A tensor to where there are shapes alone; its gradient comes back as zeros."""

    @staticmethod
    def forward(x):
        return _fake(x)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, gradient):
        return torch.zeros(gradient.shape, dtype=gradient.dtype)

    @staticmethod
    def jvp(ctx, tangent):
        return _Enter.apply(tangent)


class _Leave(torch.autograd.Function):
    """And back, at random values."""

    @staticmethod
    def forward(x):
        return torch.randn(x.shape, dtype=x.dtype)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, gradient):
        return _fake(gradient)

    @staticmethod
    def jvp(ctx, tangent):
        return _Leave.apply(tangent)
