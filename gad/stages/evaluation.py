"""What a student keeps of its teacher."""

import numpy as np
import torch
from torchvision.utils import save_image

from .. import paths
from ..backbones import load
from ..evaluation import geometry, trajectory
from ..params import Params, Run
from ..tangents import Tangents
from ..world import scenes
from ..world import teacher as teachers
from .common import prepare, write_json


def evaluate(run: Run, p: Params) -> dict:
    """Measure student `run`: Table 1's geometry point by point, scene accuracy prompt by prompt, Table 4's
    trajectories; of a base student also the first two with the hybrid sampler."""
    which, e, seed = p.backbones[run.backbone], p.evaluation, p.seeds.world
    accelerator = prepare(p)
    teacher = load(run.backbone, p).to(accelerator.device)
    student = load(paths.student(run)).to(accelerator.device)
    test = Tangents.load(paths.diagnosis(run.backbone) / "test.safetensors", teacher)
    steps = which.student_steps

    def measured(first=None):
        y, jv = geometry.tangents(
            lambda c: geometry.endpoint(teacher, student.network, c, steps, first=first),
            test.z, test.v, test.cond, e.batch, str(run),
        )
        right = teachers.quality(
            teacher, student.network, e.quality_prompts, steps, 1.0, seed + teachers.QUALITY, first
        )
        return {"endpoint": geometry.row(y, jv, test.x0, test.jv), "quality": right}

    out = {"run": str(run), **measured()}
    out["local"] = geometry.local_rows(teacher, student.network, test, which.cfg, e.batch)
    prompts = scenes.sample(e.trajectory_prompts, seed + 16, "unseen").captions()
    z, cond = teacher.noise(len(prompts), seed + 16), teacher.encode(prompts)
    out["trajectory"] = trajectory.errors(teacher, student.network, z, cond, steps, which.teacher_steps, which.cfg)
    if run.variant == "base" and steps > 1:
        out["hybrid"] = measured((teacher.network, which.cfg))  # the teacher's first step, then the student
    write_json(paths.result(run), out)
    world = scenes.sample(8, seed + 8, "test")
    rows = [
        teachers.generate(teacher, network, world.captions(), n, cfg, seed + 8)
        for network, n, cfg in ((teacher.network, which.teacher_steps, which.cfg), (student.network, steps, 1.0))
    ]
    paths.sample_grid(run).parent.mkdir(parents=True, exist_ok=True)
    save_image(torch.cat(rows), paths.sample_grid(run), nrow=8)
    return {
        "cos": float(np.mean(out["endpoint"]["cos"])),
        "scene": float(np.mean(out["quality"]["scene"])),
        "colour_count": float(np.mean(out["quality"]["colour_count"])),
    }

