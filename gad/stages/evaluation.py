"""What a student keeps of its teacher."""

import numpy as np
import torch
from torchvision.utils import save_image

from .. import paths
from ..backbones import load_network
from ..evaluation import geometry, trajectory
from ..params import Params, Run
from ..tangents import Paths, Tangents
from ..world import teacher as teachers
from ..worlds import world_of
from .common import placed, prepare, write_json


def evaluate(run: Run, p: Params) -> dict:
    """Measure student `run`: Table 1's geometry point by point, scene accuracy prompt by prompt, Table 4's
    trajectories; of a base student also the first two with the hybrid sampler."""
    which, e, seed = p.backbones[run.backbone], p.evaluation, p.seeds.world
    accelerator, world = prepare(p), world_of(run.backbone, p)
    teacher = placed(accelerator.device, run.backbone, p)
    student = load_network(paths.student(run), teacher).to(accelerator.device)
    test = Tangents.load(paths.diagnosis(run.backbone) / "test.safetensors", teacher)
    steps = p.student_steps(run)

    def measured(first=None):
        y, jv = geometry.tangents(
            lambda c: geometry.endpoint(teacher, student, c, steps, first=first),
            test.z, test.v, test.cond, e.batch, str(run),
        )
        fits = teachers.quality(
            world, teacher, student, e.quality_prompts, steps, 1.0, seed + teachers.QUALITY, first
        )
        return {"endpoint": geometry.row(y, jv, test.x0, test.jv), "quality": fits}

    out = {"run": str(run), **measured()}
    out["local"] = geometry.local_rows(teacher, student, test, which.cfg, e.batch)
    if steps == which.student_steps:  # the times at which the teacher's paths are known
        unseen = Paths.load(paths.diagnosis(run.backbone) / "unseen.safetensors", teacher)
        out["trajectory"] = trajectory.errors(teacher, student, unseen, e.drawn)
    if run.variant == "base" and steps > 1:
        out["hybrid"] = measured((teacher.network, which.cfg))  # the teacher's first step, then the student
    write_json(paths.result(run), out)
    paths.sample_grid(run).parent.mkdir(parents=True, exist_ok=True)
    prompts = world.prompts(8, seed + 8, "test")
    save_image(samples(teacher, student, prompts, steps, which, e, seed + 8), paths.sample_grid(run), nrow=8)
    told = {k: float(np.mean(out["quality"][k])) for k in world.keys}
    return {"cos": float(np.mean(out["endpoint"]["cos"])), **told}


def samples(teacher, student, prompts, steps, which, e, seed) -> torch.Tensor:
    """Images of the teacher, then of the student, one a prompt each, of the same noises."""
    return torch.cat([
        teachers.generate(teacher, network, prompts, n, cfg, seed, e.drawn)
        for network, n, cfg in ((teacher.network, which.teacher_steps, which.cfg), (student, steps, 1.0))
    ])
