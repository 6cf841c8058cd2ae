"""What a finite difference is worth: its agreement with the exact JVP over h and precision, and what the
published setting (fp16, h = 1e-2 as the L2 norm of the whole direction) reports for a student whose true
cosine is known. Both on the network's raw output: x̂0 holds a multiple of x_t itself, whose response any two
models share."""

import copy

import numpy as np
import pandas as pd
import torch

from ..backbones import Backbone
from .geometry import compare, interval_columns, row, spectral_kl, tangents

TIME = torch.tensor(0.7)
PUBLISHED = 1e-2 / (4 * 64 * 64) ** 0.5  # the released h, per element of the 512-px latents it is meant for
DRAWS = 2000  # resamples behind an interval
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def lowered(f, dtype):
    """`f` as it comes out when its input is stored and the network runs in `dtype` (autocast): just what `gad.geometry`
    avoids. fp32 is plain arithmetic."""
    def run(x):
        with torch.autocast(x.device.type, dtype=dtype, enabled=dtype != torch.float32):
            return f(x.to(dtype).float()).float()

    return run


def difference(f, x, v, h, scheme="forward", base=None):
    """`f`'s along v over h; `base` is f(x), where it is known."""
    if scheme == "central":
        return (f(x + h * v) - f(x - h * v)) / (2 * h)
    return (f(x + h * v) - (f(x) if base is None else base)) / h


def _interval(name, x):
    """Columns of a mean over noises and its 95 % bootstrap interval over them: NaN where one of x is."""
    return interval_columns(name, np.asarray(x, float), DRAWS)


def _maps(backbone, network, cond, batch, cfg=1.0):
    """The network's output at TIME as a map of a part's prompts, and as one of all samples, `batch` at a time."""
    def output(c):
        return lambda x: backbone.output(network, x, TIME, c, cfg)

    def whole(x):
        parts = [slice(i, i + batch) for i in range(0, len(x), batch)]
        return torch.cat([output(cond[j].to(x.device))(x[j]) for j in parts])

    return output, whole


@torch.no_grad()
def sweep(backbone: Backbone, test, cfg: float, batch: int, sizes: list[float]) -> pd.DataFrame:
    """Cosine and relative error of differences of the teacher's output at x_t, of `sizes` (h, RMS per element), against
    the exact JVP."""
    x_t = backbone.add_noise(test.x0, test.z, TIME.expand(len(test)))

    output, f = _maps(backbone, backbone.network, test.cond, batch, cfg)
    exact = tangents(output, x_t, test.v, test.cond, batch)[1]
    rows = []
    for name, dtype in DTYPES.items():
        low = lowered(f, dtype)
        base = low(x_t)
        for scheme in ("forward", "central"):
            for h in sizes:
                got = compare(difference(low, x_t, test.v, h, scheme, base), exact)
                rows.append(
                    {"precision": name, "scheme": scheme, "h": h, **_interval("cos", got["cos"]),
                     "relative": got["relative"].sqrt().mean().item()}
                )
    return pd.DataFrame(rows)


@torch.no_grad()
def known_students(backbone: Backbone, test, seed: int, batch: int, noises: list[float]) -> pd.DataFrame:
    """Students that are the teacher plus noise on its weights, in units of each one's spread, so that their exact JVP
    cosine is known; then Table 1's columns as the released setting measures them."""
    x_t = backbone.add_noise(test.x0, test.z, TIME.expand(len(test)))
    sphere = test.v / test.v.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    settings = {
        "released": (sphere, 1e-2, torch.float16),
        "released_element": (test.v, PUBLISHED, torch.float16),
        "ours": (test.v, 1e-2, torch.float32),
    }

    def measured(network):
        """Its exact tangents, and its differences by name."""
        output, f = _maps(backbone, network, test.cond, batch)
        found = {name: difference(lowered(f, dtype), x_t, v, h) for name, (v, h, dtype) in settings.items()}
        return tangents(output, x_t, test.v, test.cond, batch)[1], found

    exact_t, found_t = measured(backbone.network)
    rows = []
    for noise in noises:
        student = copy.deepcopy(backbone.network)
        generator = torch.Generator().manual_seed(seed)
        for w in student.parameters():
            w += noise * w.std(correction=0) * torch.randn(w.shape, generator=generator).to(w.device)
        exact, found = measured(student)
        known = row(exact, exact, exact_t, exact_t)
        entry = {"weight_noise": noise, **_interval("exact_cos", known["cos"])}
        for name, s in found.items():
            t = found_t[name]
            got = row(s, s, t, t)
            entry |= _interval(f"{name}_cos", got["cos"])
            entry |= {f"{name}_{k}": sum(got[k]) / len(got[k]) for k in ("ratio", "mse")}
            spectra = [pd.DataFrame(got[k]).to_numpy() for k in ("spectrum", "teacher_spectrum")]
            entry[f"{name}_spectral_kl"] = spectral_kl(*spectra)
        rows.append(entry)
    return pd.DataFrame(rows)
