"""Table 2: does an image still tell which seed (initial noise) made it?

A classifier names one of S seeds, each the same `z` under every prompt; it is tested on prompts it never saw. *Self*:
trained and tested on one model's images. *Teacher alignment*: trained on the teacher's, tested on the student's from
the same `z`. The paper's classifier, seeds and prompts are not known; all are ours. With images enough, distilled
models' seeds are named almost surely too (Xu et al. 2025, arXiv 2405.14828), so the training budget is part of the
measure: `curve`.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn
from torch.nn import functional as F

from .images import unit

C = 0.1  # inverse strength of the probe's penalty; accuracy is flat from 0.03 to 10
BATCH, LR, DECAY = 64, 2e-3, 0.05  # of the network


@dataclass(frozen=True)
class Classifier:
    """Names the seed of an image: `network` maps images (B, 3, H, W) in [0, 1] to logits (B, S)."""

    kind: str
    network: nn.Module

    @torch.no_grad()
    def ranks(self, images: Tensor) -> np.ndarray:
        """Rank (S, Q) int of the right seed for images (S, Q, 3, H, W), [s, q] made by seed s under test prompt q:
        0 is top-1. Ties count against it, so that a classifier that knows nothing cannot be right."""
        seeds, prompts = images.shape[:2]
        logits = torch.cat([self.network(unit(x)) for x in images.flatten(0, 1).split(256)])
        if logits.shape[1] != seeds:
            raise ValueError(f"images of {seeds} seeds for a classifier of {logits.shape[1]}: give the same seeds")
        right = logits.gather(1, _labels(images))
        return ((~(logits < right)).sum(1) - 1).view(seeds, prompts).numpy()

    def save(self, path: Path):
        made = {"kind": self.kind, "seeds": self.network[-1].out_features}
        save_file(self.network.state_dict(), path, {"classifier": json.dumps(made)})  # of two keys the order is random

    @staticmethod
    def load(path: Path) -> "Classifier":
        """ValueError, one line, if the file is missing, damaged or of something else."""
        try:
            with safe_open(path, "pt") as f:
                meta, state = f.metadata(), {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118
            made = json.loads(meta["classifier"])
            network = _network(**made)
            network.load_state_dict(state)
        except (OSError, SafetensorError, RuntimeError, KeyError, TypeError, ValueError) as error:
            line = str(error).splitlines()[0]
            raise ValueError(f"{path} holds no seed classifier ({line}): run the references stage again") from None
        return Classifier(made["kind"], network.eval())


def fit(images: Tensor, kind: str, seed: int = 0, steps: int = 600) -> Classifier:
    """A classifier of the S seeds of images (S, P, 3, H, W), in [0, 1] or of 8 bits, [s, p] made by seed s under
    training prompt p.

    `kind`: "linear", multinomial logistic regression on pooled pixels, which `seed` leaves alone; or "cnn", a small
    network of `steps` training steps, whose start and order `seed` decides. Nothing is flipped or moved in training:
    place is the signal.
    Fewer than three seeds raise ValueError.
    """
    if len(images) < 3:
        raise ValueError(f"images of {len(images)} seeds: a classifier needs three or more")
    x, y = images.flatten(0, 1), _labels(images)[:, 0]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = _network(kind, len(images))
        _fit_probe(network, x, y) if kind == "linear" else _fit_network(network, x, y, steps)
    return Classifier(kind, network.eval())


def curve(train: Tensor, test: Tensor, sizes: list[int]) -> dict[int, np.ndarray]:
    """Ranks (S, Q) of the linear probe on `test` (S, Q, 3, H, W), fitted on the first n prompts of `train`
    (S, P, 3, H, W), for each n of `sizes`."""
    if max(sizes) > train.shape[1]:
        raise ValueError(f"sizes={sizes}: there are {train.shape[1]} training prompts only")
    return {n: fit(train[:, :n], "linear").ranks(test) for n in sizes}


def accuracies(ranks: np.ndarray, k: int = 1) -> list[float]:
    """Top-k accuracy of each of Q test prompts, mean over seeds of ranks (S, Q): what a bootstrap over prompts needs.
    Chance is k / S."""
    return (ranks < k).mean(0).tolist()


def _labels(images: Tensor) -> Tensor:
    """The seed (S·P, 1) of each of images (S, P, …), flattened."""
    return torch.arange(images.shape[0]).repeat_interleave(images.shape[1])[:, None]


def _network(kind: str, seeds: int) -> nn.Sequential:
    if kind == "linear":
        return nn.Sequential(nn.AdaptiveAvgPool2d(16), nn.Flatten(), nn.Linear(3 * 16**2, seeds))
    if kind != "cnn":
        raise ValueError(f"kind={kind!r} is unknown: use 'linear' or 'cnn'")
    layers: list[nn.Module] = [nn.AdaptiveAvgPool2d(32)]
    for i, o in ((3, 32), (32, 64), (64, 128)):
        layers += [nn.Conv2d(i, o, 3, 2, 1), nn.GroupNorm(8, o), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Dropout(0.5), nn.Linear(128 * 4**2, seeds))


def _fit_probe(network, x: Tensor, y: Tensor):
    pixels = torch.cat([network[:-1](unit(few)) for few in x.split(256)]).double()
    mean, std = pixels.mean(0), pixels.std(0) + 1e-3  # pixels that never change stay small
    found = LogisticRegression(C=C, max_iter=1000).fit(((pixels - mean) / std).numpy(), y.numpy())
    weight = torch.from_numpy(found.coef_) / std  # standardising becomes part of the weights
    with torch.no_grad():
        network[-1].weight.copy_(weight)
        network[-1].bias.copy_(torch.from_numpy(found.intercept_) - weight @ mean)


def _fit_network(network, x: Tensor, y: Tensor, steps: int):
    optimiser = torch.optim.AdamW(network.parameters(), LR, weight_decay=DECAY)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    for _ in range(steps):
        i = torch.randint(len(x), (BATCH,))
        F.cross_entropy(network(unit(x[i])), y[i]).backward()
        optimiser.step()
        optimiser.zero_grad()
        schedule.step()
