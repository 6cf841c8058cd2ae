"""Geometry-Aware Distillation in one page: match how maps *change*, not only what they return.

A map is any callable `f(x) -> y` on batches `(B, *dims)`. The paper's response `f(x + h v) − f(x)` is about `h J_f v`;
here every response is already divided by `h` and losses are means over `m` elements, so the paper's weight of a squared
norm is `λ_paper = λ / (h² m)`. With `v` Gaussian, `h` is the RMS perturbation *per element* (the released code's
unit-norm direction is "sphere"). Differences are taken in fp32 at least: maps need weights in it, and run without
autocast and TF32, since in bf16 rounding is nearly as large as a response at the usual `h`. What is trained through
them should have TF32 off in its backward pass too (`torch.backends.cudnn.allow_tf32 = False`), as this pipeline does.
"""

import math
from collections.abc import Callable
from contextlib import contextmanager
from numbers import Real

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

Map = Callable[[Tensor], Tensor]
TF32 = (torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.cudnn.rnn)  # what may have it for fp32
LAYERS = (F.linear, F.conv1d, F.conv2d, F.conv3d)  # linear in their first argument


def direction(x: Tensor, kind: str = "gaussian", generator: torch.Generator | None = None) -> Tensor:
    """A random direction `v` with the shape of `x` (B, *dims), in fp32 at least.

    "gaussian" and "rademacher" have `E[v vᵀ] = I` (Hutchinson); "sphere" has unit L2 norm per sample."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    if kind == "rademacher":
        return torch.randint(0, 2, x.shape, generator=generator, device=x.device).to(dtype) * 2 - 1
    if kind not in ("gaussian", "sphere"):
        raise ValueError(f"kind={kind!r} is unknown: use 'gaussian', 'rademacher' or 'sphere'")
    v = torch.randn(x.shape, generator=generator, device=x.device, dtype=dtype)
    return v if kind == "gaussian" else v / v.flatten(1).norm(dim=1).view(-1, *[1] * (x.ndim - 1))


def jvp(f: Map, x: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """`(f(x), J_f(x) v)`, exact, by forward-mode AD; attention runs in its math form, which supports it.

    It takes about two calls of `f`: layers are told that their weights don't move."""
    x, v = _check(x, v)
    try:
        return pushforward(f, (x,), (v,))
    except (NotImplementedError, RuntimeError) as error:
        if not any(s in str(error) for s in ("forward AD", "forward mode AD", "forward-mode", "functorch")):
            raise
        raise RuntimeError(
            "an operation in f has no forward-mode derivative (as custom autograd functions and fused attention "
            f"processors): replace it, or use response(scheme='central'). {error}"
        ) from error


def pushforward(f: Callable, x: tuple[Tensor, ...], v: tuple[Tensor, ...]):
    """`torch.func.jvp(f, x, v)` as `jvp` takes it: for `f` of several arguments, in any precision."""
    with _precise(x[0]), sdpa_kernel(SDPBackend.MATH), _ConstantWeights():
        return torch.func.jvp(f, x, v)


def response(f: Map, x: Tensor, v: Tensor, h: float, scheme: str = "forward", base: Tensor | None = None) -> Tensor:
    """Estimate of `J_f(x) v`, (B, *dims of f).

    "forward" has error O(h) and uses `base = f(x)` when the caller has it (computed with autocast off);
    "central" has error O(h²); "exact" is `jvp`. Gradients flow through `f`."""
    return _response(f, x, v, h, scheme, base, "f", "x", "base")


def _response(f, x, v, h, scheme, base, of: str, at: str, given: str):
    """`response`, and what the caller calls `f`, `x` and `base`."""
    x, v = _check(x, v, at)
    number = isinstance(h, Real) and not isinstance(h, bool)
    if not ((number or (isinstance(h, Tensor) and h.ndim == 0)) and math.isfinite(h) and h > 0):
        raise ValueError(f"h={h!r} must be a positive finite number")
    h = float(h)
    if scheme not in ("forward", "central", "exact"):
        raise ValueError(f"scheme={scheme!r} is unknown: use 'forward', 'central' or 'exact'")
    if scheme == "exact":
        return jvp(f, x, v)[1]
    with _precise(x):
        ahead = _wide(f(x + h * v))
        behind = f(x - h * v) if scheme == "central" else f(x) if base is None else base
        if behind.shape != ahead.shape:
            raise ValueError(f"{given} has shape {tuple(behind.shape)}, {of} returns {tuple(ahead.shape)}")
        _finite(behind, given if scheme == "forward" and base is not None else f"{of}({at})")
        return (ahead - _wide(behind)) / (2 * h if scheme == "central" else h)


def output_loss(
    student: Map, teacher: Map, x: Tensor, v: Tensor, h: float, scheme: str = "forward",
    student_base: Tensor | None = None, teacher_base: Tensor | None = None, normalise: bool = False,
) -> Tensor:
    """GAD by output matching (paper, L_GAD): per-sample mean of `(J_S v − J_T v)²`, shape (B,).

    Over Gaussian `v` its mean is `‖J_S − J_T‖_F² / m` with `m` output elements. No gradient flows to the
    teacher. `normalise` divides by the teacher's mean `(J_T v)²`."""
    with torch.no_grad():
        target = _response(teacher, x, v, h, scheme, teacher_base, "teacher", "x", "teacher_base")
    own = _response(student, x, v, h, scheme, student_base, "student", "x", "student_base")
    _same(own, target, "student", "teacher")
    loss = (own - target).square().flatten(1).mean(1)
    return loss / target.square().flatten(1).mean(1) if normalise else loss


@torch.no_grad()
def score_gradient(
    fake: Map, real: Map, x_t: Tensor, v: Tensor, h: float, scheme: str = "forward",
    fake_base: Tensor | None = None, real_base: Tensor | None = None,
) -> Tensor:
    """GAD for score-based paradigms (paper, ∇_θ L_GAD): `J_fake v − J_real v`, no gradient.

    `fake` and `real` are scores or x̂0-predictions; for noise predictions the sign is the opposite."""
    j_fake = _response(fake, x_t, v, h, scheme, fake_base, "fake", "x_t", "fake_base")
    j_real = _response(real, x_t, v, h, scheme, real_base, "real", "x_t", "real_base")
    _same(j_fake, j_real, "fake", "real")
    return j_fake - j_real


def surrogate(x: Tensor, gradient: Tensor) -> Tensor:
    """A loss (B,) whose gradient with respect to `x` is `gradient`."""
    _same(gradient, x, "gradient", "x")
    _finite(gradient, "gradient")
    return (_wide(x) * gradient.detach()).flatten(1).sum(1)


class _ConstantWeights(TorchFunctionMode):
    """Applies layers to tangents too. Forward mode would also multiply by the weights' tangents, which are zero: it
    would take three calls' operations."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        return _layer(func, *args, **kwargs) if func in LAYERS and args else func(*args, **kwargs)


def _layer(func, x, weight, bias=None, *rest, **options):
    (value, tangent), *others = (forward_ad.unpack_dual(a) for a in (x, weight, bias) if a is not None)
    if tangent is None or any(other.tangent is not None for other in others):
        return func(x, weight, bias, *rest, **options)
    ahead = func(tangent, weight, None, *rest, **options)
    return forward_ad.make_dual(func(value, weight, bias, *rest, **options), ahead)


def _same(a: Tensor, b: Tensor, name_a: str, name_b: str):
    if a.shape != b.shape:
        raise ValueError(f"{name_a} has shape {tuple(a.shape)}, {name_b} has {tuple(b.shape)}: they must agree")


def _wide(y: Tensor) -> Tensor:
    return y.to(torch.promote_types(y.dtype, torch.float32))


@contextmanager
def _precise(x: Tensor):
    """Neither autocast nor TF32, whose ten bits a GPU's convolutions have in fp32's place unless told otherwise."""
    before = [kind.fp32_precision for kind in TF32]
    try:
        for kind in TF32:
            kind.fp32_precision = "ieee"
        with torch.autocast(x.device.type, enabled=False):
            yield
    except RuntimeError as error:
        if not any(s in str(error) for s in ("same dtype", "type (", "expected scalar type")):
            raise
        raise RuntimeError(
            f"maps are called in {x.dtype} here, whatever the precision around: give them weights in it "
            f"(network.float()). {error}"
        ) from error
    finally:
        for kind, precision in zip(TF32, before, strict=True):
            kind.fp32_precision = precision


def _finite(value: Tensor, name: str):
    if not torch.isfinite(value).all():
        raise ValueError(f"{name} has values that are not finite")


def _check(x: Tensor, v: Tensor, name: str = "x") -> tuple[Tensor, Tensor]:
    _same(v, x, "v", name)
    _finite(x, name)
    _finite(v, "v")
    return (x := _wide(x)), v.to(x.dtype)
