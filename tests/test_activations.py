"""gad.activations.anew on plain blocks: values, tangents and gradients are those of the block itself."""

import torch
from torch import nn
from torch.func import functional_call

from gad.activations import anew
from gad.geometry import jvp


class Block(nn.Module):
    """As diffusers' are: of several inputs, one by name, which does not move; what it returns has a None."""

    def __init__(self):
        super().__init__()
        self.inner, self.outer, self.calls = nn.Linear(4, 8), nn.Linear(8, 4), 0

    def forward(self, x, skip, scale=None):
        self.calls += 1
        return self.outer(torch.tanh(self.inner(x)) * scale) + skip.sin(), None


def found(block, call, x, v, scale):
    block.zero_grad()
    block.calls = 0
    y, jv = jvp(lambda x: call(x, 2 * x, scale=scale)[0], x, v)
    (y.square().sum() + jv.pow(3).sum()).backward()
    return y.detach(), jv.detach(), [w.grad.clone() for w in block.parameters()]


def test_values_tangents_and_gradients_are_the_blocks_own():
    torch.manual_seed(0)
    block, (x, v) = Block(), torch.randn(2, 3, 4)
    scale = torch.randn(8)
    (y, jv, gradients), calls = found(block, block, x, v, scale), block.calls
    assert calls == 1
    again = found(block, lambda *args, **kwargs: anew(block, *args, **kwargs), x, v, scale)
    assert block.calls == 2  # once more in the backward pass
    assert torch.equal(again[0], y) and torch.equal(again[1], jv)
    for a, b in zip(again[2], gradients, strict=True):
        torch.testing.assert_close(a, b)
    plain, none = anew(block, x, 2 * x, scale=scale)
    assert torch.equal(plain, y) and none is None


def test_weights_of_a_functional_call_are_those_made_anew():
    torch.manual_seed(0)
    block, (x, v) = Block(), torch.randn(2, 3, 4)
    scale = torch.randn(8)

    class Outer(nn.Module):
        def __init__(self, call):
            super().__init__()
            self.block, self.call = block, call

        def forward(self, *args, **kwargs):
            return self.call(self.block, *args, **kwargs)

    def halved(call):
        outer = Outer(call)
        weights = {k: w / 2 for k, w in outer.named_parameters()}
        return found(block, lambda *args, **kwargs: functional_call(outer, weights, args, kwargs), x, v, scale)

    kept, made = halved(lambda block, *args, **kwargs: block(*args, **kwargs)), halved(anew)
    assert torch.equal(made[1], kept[1])
    for a, b in zip(made[2], kept[2], strict=True):
        torch.testing.assert_close(a, b)
    assert not torch.equal(kept[0], found(block, block, x, v, scale)[0])
