"""Table 1: do student and teacher answer a change of the noise alike? By exact JVPs in fp32 (ours to define:
the paper's evaluation code is not public)."""

import numpy as np
import torch
from scipy.special import rel_entr
from scipy.stats import norm, t
from torch import Tensor
from tqdm.auto import tqdm

from .. import geometry
from ..backbones import Backbone, Condition

LEVELS = (0.9, 0.7, 0.5, 0.3, 0.1)  # times t of the local map
OTHERS = "tangents of other noises and prompts"  # a floor: the teacher's own


def endpoint(backbone: Backbone, network, cond: Condition, steps: int, cfg: float = 1.0, first=None):
    """The endpoint map `z → x0` (paper: Φ) for one batch of prompts."""
    return lambda z: backbone.sample(network, z, cond, steps, cfg, first=first)


def tangents(make_map, x: Tensor, v: Tensor, cond: Condition, batch: int, name: str = "") -> tuple[Tensor, Tensor]:
    """`(f(x), J_f v)` over (N, …), `batch` at a time; `make_map(cond)` gives the map of a batch's prompts, which come
    to the device of `x` with it."""
    parts = []
    with torch.no_grad():
        for i in tqdm(range(0, len(x), batch), desc=f"tangents {name}", disable=None):
            j = slice(i, i + batch)
            parts.append(geometry.jvp(make_map(cond[j].to(x.device)), x[j], v[j]))
    y, jv = zip(*parts, strict=True)
    return torch.cat(y), torch.cat(jv)


def compare(student: Tensor, teacher: Tensor) -> dict[str, Tensor]:
    """Per-sample agreement of two responses (N, C, H, W): `cos`; `ratio` = ‖J_S v‖ / ‖J_T v‖; `mse` per element;
    `relative` = ‖J_S v − J_T v‖² / ‖J_T v‖²."""
    s, t = student.flatten(1).double(), teacher.flatten(1).double()
    gap = (s - t).square()
    return {
        "cos": torch.cosine_similarity(s, t),
        "ratio": s.norm(dim=1) / t.norm(dim=1),
        "mse": gap.mean(1),
        "relative": gap.sum(1) / t.square().sum(1),
    }


def spectrum(x: Tensor) -> Tensor:
    """Radially binned power (N, bins) of (N, C, H, W), channels averaged, each row summing to one; that of nothing is
    flat."""
    power = torch.fft.fft2(x.double()).abs().square().mean(1)
    h, w = power.shape[-2:]
    fy, fx = torch.fft.fftfreq(h) * h, torch.fft.fftfreq(w) * w
    radius = torch.sqrt(fy[:, None] ** 2 + fx[None] ** 2).round().long().flatten()
    bins = torch.zeros(len(x), int(radius.max()) + 1, dtype=torch.double)
    bins.index_add_(1, radius, power.flatten(1).cpu())
    bins += torch.finfo(bins.dtype).tiny  # 0 / 0 else
    return bins / bins.sum(1, keepdim=True)


def mean(x):
    return np.mean(x, -1)


def _median(x):
    return np.median(x, -1)


# How points are summed up, over the last axis. A few noises lie where the map is all but discontinuous, and their huge
# tangents would be all that a mean of norms or squares shows.
SUMMARY = {
    "cos": mean,
    "ratio": lambda x: np.exp(mean(np.log(x))),
    "mse": _median,
    "relative": _median,
    "value": _median,
}


def row(y: Tensor, jv: Tensor, x0: Tensor, teacher_jv: Tensor) -> dict[str, list]:
    """One model's measurements, point by point, ready for JSON: `compare` of the responses, `value` = relative
    squared error of the values, and both spectra. Five digits are kept of each."""
    out = compare(jv, teacher_jv) | {"value": compare(y, x0)["relative"]}
    out |= {"spectrum": spectrum(jv), "teacher_spectrum": spectrum(teacher_jv)}
    return {k: rounded(v.tolist(), 5) for k, v in out.items()}


def rounded(data, digits: int = 6):
    """Lists and dicts of numbers with their floats to as many significant digits."""
    if isinstance(data, dict):
        return {k: rounded(v, digits) for k, v in data.items()}
    if isinstance(data, list):
        return [rounded(v, digits) for v in data]
    return float(f"{data:.{digits}g}") if isinstance(data, float) else data


def local_rows(
    backbone: Backbone, network, test, cfg: float, batch: int, own: float = 1.0
) -> dict[str, dict[str, list]]:
    """The local map `x_t → x̂0` at each of LEVELS, a network guided by `own` against the teacher guided by `cfg` at the
    same (x_t, t, c); x_t is the teacher's endpoint, noised with the noise it came from."""
    out = {}
    for level in LEVELS:
        x_t = backbone.add_noise(test.x0, test.z, torch.full((len(test),), level, device=test.z.device))
        both = []
        for net, scale in ((network, own), (backbone.network, cfg)):
            def local(c, net=net, scale=scale, level=level):
                return lambda x: backbone.x0(net, x, torch.tensor(level), c, scale)

            both += tangents(local, x_t, test.v, test.cond, batch)
        out[str(level)] = row(both[0], both[1], both[2], both[3])
    return out


def spectral_kl(student: np.ndarray, teacher: np.ndarray) -> np.ndarray:
    """KL(P_T ‖ P_S) of the mean spectra of (…, N, bins) rows, (…)."""
    return np.maximum(0.0, rel_entr(teacher.mean(-2), student.mean(-2)).sum(-1))  # rounding may leave −1e-16; NaN stays


def bootstrap(
    statistic, prompts: np.ndarray, n: int, seed: int = 0, centred: bool = False, expanded: bool = True
) -> tuple[float, float, float]:
    """Value and 95 % percentile interval of `statistic(rows)` under resampling of prompts with all their rows.
    `expanded`: at the percentiles that make up for what a plain interval lacks of a t interval's width (Hesterberg
    2015, arXiv 1411.5279): 15 % with 12 prompts, 1 % with 96.

    `prompts` (N,): the prompt each row belongs to, as many rows each; `statistic` maps row indices (…, N) to numbers
    (…). `centred`: the spread of the draws about the value instead, for a statistic that resampling itself makes
    larger, such as a divergence.
    """
    _, index, rows = np.unique(prompts, return_inverse=True, return_counts=True)
    if len(set(rows)) != 1:
        raise ValueError(f"prompts have {min(rows)} to {max(rows)} rows: give each as many")
    groups = np.argsort(index, kind="stable").reshape(-1, rows[0])
    chosen = np.random.default_rng(seed).integers(0, len(groups), (n, len(groups)))
    value, draws = statistic(np.arange(len(prompts))), statistic(groups[chosen].reshape(n, -1))
    tail = cut(len(groups)) if expanded else 0.025
    low, high = np.quantile(draws - np.mean(draws) + value if centred else draws, [tail, 1 - tail])
    return float(value), float(low), float(high)


def cut(n: int) -> float:
    """The share of draws that a 95 % interval leaves out at either end, of n prompts."""
    return float(norm.sf((n / (n - 1)) ** 0.5 * t.isf(0.025, n - 1))) if n > 1 else 0.025


def interval_columns(name: str, x: np.ndarray, n: int, mean=np.mean) -> dict[str, float]:
    """Columns `name`, `name_low` and `name_high` of a row: the `mean` of x (N,) and its plain percentile interval, each
    entry resampled on its own."""
    stats = bootstrap(lambda i: mean(x[i], axis=-1), np.arange(len(x)), n, expanded=False)
    return dict(zip((name, f"{name}_low", f"{name}_high"), stats, strict=True))
