"""Activations that are not kept but made anew in the backward pass, those of exact tangents too."""

from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.checkpoint import checkpoint

from .geometry import pushforward


def anew(block, *args, **kwargs):
    """`block(*args, **kwargs)`, of which the backward pass keeps inputs alone: what a diffusers network is given for
    its blocks (`enable_gradient_checkpointing`). Inside `geometry.jvp` the same for values and tangents, which
    torch.utils.checkpoint alone does not bear: made anew outside of the transform, they would be none. There the
    tensors that `block` returns must be of floating point; it may return None beside them."""
    call = block
    if isinstance(block, nn.Module) and not all(isinstance(w, nn.Parameter) for w in block.parameters()):
        weights = {**dict(block.named_parameters()), **dict(block.named_buffers())}  # of a functional call, soon gone

        def call(*args, **kwargs):
            return functional_call(block, weights, args, kwargs)

    leaves, spec = tree_flatten((args, kwargs))
    duals = {i: forward_ad.unpack_dual(x) for i, x in enumerate(leaves) if isinstance(x, Tensor)}
    moving = [i for i, dual in duals.items() if dual.tangent is not None]
    if not moving:
        return checkpoint(call, *args, use_reentrant=False, **kwargs)
    returned = {}

    def values_and_tangents(*flat):
        inputs, v = list(flat[:len(leaves)]), flat[len(leaves):]

        def f(*values):
            for i, value in zip(moving, values, strict=True):
                inputs[i] = value
            args, kwargs = tree_unflatten(inputs, spec)
            out, returned["spec"] = tree_flatten(call(*args, **kwargs))
            returned["leaves"] = [... if isinstance(y, Tensor) else y for y in out]  # None is a leaf too
            return tuple(y for y in out if isinstance(y, Tensor))

        return pushforward(f, tuple(inputs[i] for i in moving), v)

    x = [duals[i].primal if i in duals else leaf for i, leaf in enumerate(leaves)]
    out, tangents = checkpoint(values_and_tangents, *x, *(duals[i].tangent for i in moving), use_reentrant=False)
    made = map(forward_ad.make_dual, out, tangents)
    return tree_unflatten([next(made) if y is ... else y for y in returned["leaves"]], returned["spec"])
