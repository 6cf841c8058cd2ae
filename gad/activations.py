"""Activations that are not kept but made anew in the backward pass, those of exact tangents too."""

from functools import partial

import torch
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten
from torch.utils.checkpoint import checkpoint

from .geometry import pushforward


def anew(block, *args, **kwargs):
    """`block(*args, **kwargs)`, of which the backward pass keeps inputs alone: what a diffusers network is given for
    its blocks (`enable_gradient_checkpointing`). Inside `geometry.jvp` the same for values and tangents, which
    torch.utils.checkpoint alone does not bear: made anew outside of the transform, they would be none."""
    if isinstance(block, nn.Module):
        weights = {**dict(block.named_parameters()), **dict(block.named_buffers())}
        if not all(isinstance(w, nn.Parameter) for w in block.parameters()):  # of a functional call, gone by then
            block = partial(functional_call, block, weights)
            return _anew(lambda *args, **kwargs: block(args, kwargs), args, kwargs)
    return _anew(block, args, kwargs)


def _anew(block, args, kwargs):
    leaves, spec = tree_flatten((args, kwargs))
    duals = {i: forward_ad.unpack_dual(x) for i, x in enumerate(leaves) if isinstance(x, torch.Tensor)}
    moving = [i for i, dual in duals.items() if dual.tangent is not None]
    if not moving:
        return checkpoint(block, *args, use_reentrant=False, **kwargs)

    def both(x, v):
        def f(*moved):
            there = list(x)
            for i, y in zip(moving, moved, strict=True):
                there[i] = y
            args, kwargs = tree_unflatten(there, spec)
            return block(*args, **kwargs)

        return pushforward(f, tuple(x[i] for i in moving), tuple(v))

    x = [duals[i].primal if i in duals else leaf for i, leaf in enumerate(leaves)]
    out, tangents = checkpoint(both, x, [duals[i].tangent for i in moving], use_reentrant=False)
    return tree_map(forward_ad.make_dual, out, tangents)
