"""Table 4: how far the student's states stray from its teacher's on the way from one noise to the image.

The paper's norm is not known; ours: distances of states at the student's own times, in units of the teacher's state
(`relative`) and as RMS per element (`rmse`). `local` is what one step of the student adds by itself, from the teacher's
state: what the rest of `relative` is, it inherits.
"""

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..backbones import Backbone, Condition


@torch.no_grad()
def errors(
    backbone: Backbone, student, z: Tensor, cond: Condition, steps: int, teacher_steps: int, cfg: float, batch: int = 64
) -> dict[str, list[list[float]]]:
    """For each of N noises the errors after each of the student's K = `steps` steps: lists (N, K) of `relative`,
    `rmse` and `local` (relative too). The teacher is `backbone.network` with its own steps and guidance."""
    times = backbone.times(steps).to(z.device)
    found: dict[str, list] = {"relative": [], "rmse": [], "local": []}
    for i in tqdm(range(0, len(z), batch), "trajectories", disable=None):
        x, c = z[i:i + batch], cond[i:i + batch]
        teacher = backbone.path(backbone.network, x, c, teacher_steps, cfg, times)
        own = backbone.sample(student, x, c, steps, return_trajectory=True).transpose(0, 1)
        alone = torch.stack([
            backbone.step(student, teacher[:, k], times[k].expand(len(x)), times[k + 1].expand(len(x)), c)
            for k in range(steps)
        ], 1)
        after = teacher[:, 1:]
        size = after.flatten(2).norm(dim=2)
        away = (own[:, 1:] - after).flatten(2).norm(dim=2)
        found["relative"] += (away / size).tolist()
        found["rmse"] += (away / z[0].numel() ** 0.5).tolist()
        found["local"] += ((alone - after).flatten(2).norm(dim=2) / size).tolist()
    return {k: [[float(f"{x:.5g}") for x in row] for row in rows] for k, rows in found.items()}
