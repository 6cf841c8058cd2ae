"""Table 6: noises chosen by what the teacher makes of them without a prompt, handed to other models with one
(NoiseQuery)."""

import numpy as np
from scipy.stats import spearmanr
from torch import Tensor

from ..world.scenes import BACKGROUNDS, COLOURS
from .images import unit

_PALETTE = np.array([*COLOURS.values(), *BACKGROUNDS.values()], dtype=np.float32)


def colours(images: Tensor) -> dict[str, np.ndarray]:
    """Of any images (n, 3, H, W) in [0, 1] or of 8 bits, (n,) each: `brightness` and `saturation` in [0, 1], `warmth`
    (red less blue) in [−1, 1]. Ours: NoiseQuery's saturation is HSV's, a quotient that is large in what is all but
    black; here it is the largest channel less the smallest."""
    return {k: np.concatenate(v) for k, v in zip(
        ("brightness", "saturation", "warmth"),
        zip(*(_colours(unit(few).cpu().numpy()) for few in images.split(64)), strict=True), strict=True,
    )}


def _colours(x):
    return x.mean((1, 2, 3)), np.ptp(x, 1).mean((1, 2)), (x[:, 0] - x[:, 2]).mean((1, 2))


def attributes(images: Tensor) -> dict[str, np.ndarray]:
    """Of the miniature world's images (n, 3, H, W) in [0, 1], (n,) each: their `colours`, the `area` of objects as a
    share of the image, and the x and y of their mass's `centroid`, in [0, 1], NaN without objects."""
    x = images.float().cpu().numpy()
    thing = ((x[:, None] - _PALETTE[None, :, :, None, None]) ** 2).sum(2).argmin(1) < len(COLOURS)  # (n, H, W)
    mass = thing.sum((1, 2)).astype(float)
    mass[mass == 0] = np.nan
    height, width = thing.shape[1:]
    return {
        **colours(images),
        "area": thing.mean((1, 2)),
        "centroid x": (thing * (np.arange(width) + 0.5)).sum((1, 2)) / mass / width,
        "centroid y": (thing * (np.arange(height) + 0.5)[:, None]).sum((1, 2)) / mass / height,
    }


def extremes(values: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the k largest and the k smallest of a library's `values` (n,); NaN is neither."""
    there = np.flatnonzero(~np.isnan(values))
    if len(there) < 2 * k:
        raise ValueError(f"the library has {len(there)} images with this attribute, {2 * k} are wanted: enlarge it")
    order = there[np.argsort(values[there], kind="stable")]
    return order[::-1][:k], order[:k]


def shift(top: np.ndarray, bottom: np.ndarray, spread: float) -> np.ndarray:
    """How far an attribute moves between the noises that should raise it and those that should lower it, in units of
    its `spread` over random noises: (P,) from (k, P) each. 0 for a model that ignores its noise."""
    return (np.nanmean(top, 0) - np.nanmean(bottom, 0)) / spread


def rank_correlation(library: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Spearman's ρ over S noises between what the teacher makes of them unprompted (S,) and a model's images of each
    prompt (S, P): (P,) in [−1, 1]; 0 where a model's value never changes, NaN where fewer than three are known."""
    out = np.zeros(values.shape[1])
    for k, column in enumerate(values.T):
        keep = ~np.isnan(library) & ~np.isnan(column)
        if keep.sum() < 3:
            out[k] = np.nan
        elif np.ptp(column[keep]) > 0 and np.ptp(library[keep]) > 0:
            out[k] = spearmanr(library[keep], column[keep]).statistic
    return out
