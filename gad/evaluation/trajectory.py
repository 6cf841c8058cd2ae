"""Table 4: how far the student's states stray from its teacher's on the way from one noise to the image.

The paper's norm is not known; ours: distances of states at the student's own times, in units of the teacher's state
(`relative`) and as RMS per element (`rmse`). `local` is what one step of the student adds by itself, from the teacher's
state: what the rest of `relative` is, it inherits.
"""

import torch
from tqdm.auto import tqdm

from ..backbones import Backbone
from ..tangents import Paths
from .geometry import rounded


@torch.no_grad()
def errors(backbone: Backbone, student, teacher: Paths, batch: int = 64) -> dict[str, list[list[float]]]:
    """For each of the teacher's N paths, at the student's K + 1 times, the errors after each of the student's K steps
    from the same noise: lists (N, K) of `relative`, `rmse` and `local` (relative too)."""
    times = backbone.times(teacher.steps).to(teacher.states.device)
    found: dict[str, list] = {"relative": [], "rmse": [], "local": []}
    for i in tqdm(range(0, len(teacher), batch), "trajectories", disable=None):
        its, c = teacher.states[i:i + batch], teacher.cond[i:i + batch].to(teacher.states.device)
        own = backbone.sample(student, its[:, 0], c, teacher.steps, return_trajectory=True).transpose(0, 1)
        alone = torch.stack([
            backbone.step(student, its[:, k], times[k].expand(len(its)), times[k + 1].expand(len(its)), c)
            for k in range(teacher.steps)
        ], 1)
        after = its[:, 1:]
        size = after.flatten(2).norm(dim=2)
        away = (own[:, 1:] - after).flatten(2).norm(dim=2)
        found["relative"] += (away / size).tolist()
        found["rmse"] += (away / its[0, 0].numel() ** 0.5).tolist()
        found["local"] += ((alone - after).flatten(2).norm(dim=2) / size).tolist()
    return rounded(found, 5)
