"""Figure 5 and Table 3: how many different images a prompt has over seeds, and how near they lie to the world's.

Everything is of `features` or `layouts` of S seeds under P prompts, the same noises for every model.
"""

import warnings

import numpy as np
import torch
from torch import nn
from vendi_score import vendi as scores

WIDTH = 8.0  # pixels: layouts this far apart are half-way to being different ones
NEAR = 5.0  # pixels within which a centre of the prior counts as covered


def vendi(features: np.ndarray) -> np.ndarray:
    """Vendi score (Friedman & Dieng 2023) of each prompt's images, (P,) in [1, S]; `features` (S, P, D) are compared
    by their cosine."""
    return np.array([scores.score_X(features[:, k].astype(np.float64)) for k in range(features.shape[1])])


def whole(points: np.ndarray) -> np.ndarray:
    """(S,) bool of layouts (S, K, 2), NaN where an object is absent: does the image have all K of them?"""
    return ~np.isnan(points).any((1, 2))


def layout_vendi(points: np.ndarray) -> float:
    """Vendi score of layouts (m, K, 2) under a Gaussian kernel, in [1, m]: only scores of as many compare."""
    distance = np.linalg.norm(points[:, None] - points[None], axis=-1)  # (S, S, K)
    return float(scores.score_K(np.exp(-(distance**2).mean(-1) / (2 * WIDTH**2))))


def coverage(points: np.ndarray, prior: np.ndarray) -> float:
    """Share of the prior's centres (M, 2) that have one of a model's (m, 2) within NEAR pixels, in [0, 1]; the more
    there are, the larger."""
    return float((np.linalg.norm(prior[:, None] - points[None], axis=-1).min(1) < NEAR).mean())


def distances(features: np.ndarray, real: np.ndarray, draws: int, seed: int = 0) -> dict[str, float | list[float]]:
    """FID and KID between a model's features (S, P, D) and those of the world's own scenes of the same prompts, with
    `draws` bootstrap draws of each over prompts. Draws depend on (P, seed) alone, so two models' are paired."""
    rng, number = np.random.default_rng(seed), features.shape[1]
    chosen = [rng.integers(0, number, number) for _ in range(draws)]
    out = {}
    for name, distance in (("fid", _fid), ("kid", _kid)):
        out[name] = distance(features, real)
        out[f"{name}_draws"] = [distance(features[:, i], real[:, i]) for i in chosen]
    return out


class _AsIs(nn.Module):
    """In Inception's place: torchmetrics gets features that are there already."""

    def __init__(self, size):
        super().__init__()
        self.num_features = size

    def forward(self, x):
        return x


def _compute(metric, features, real) -> float:
    metric.set_dtype(torch.float64)
    for x, is_real in ((real, True), (features, False)):
        metric.update(torch.as_tensor(x).double().flatten(0, 1), real=is_real)
    value = metric.compute()
    return float(value[0] if isinstance(value, tuple) else value)


def _fid(features, real):
    from torchmetrics.image.fid import FrechetInceptionDistance  # here: else each stage would import it, for a second

    return _compute(FrechetInceptionDistance(_AsIs(features.shape[-1])), features, real)


def _kid(features, real):
    """Of all images at once: random subsets, which many images need, would add a chance of their own."""
    from torchmetrics.image.kid import KernelInceptionDistance

    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        torch.manual_seed(0)  # it adds up in random order, so that the last digits would differ
        warnings.filterwarnings("ignore", "Metric `Kernel Inception Distance` will save all")
        number = features.shape[0] * features.shape[1]
        metric = KernelInceptionDistance(_AsIs(features.shape[-1]), subsets=1, subset_size=number)
        return _compute(metric, features, real)
