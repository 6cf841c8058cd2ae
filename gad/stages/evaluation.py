"""What a student keeps of its teacher."""

import numpy as np
import torch
from torchvision.utils import save_image

from .. import paths
from ..backbones import load
from ..evaluation import geometry
from ..params import Params, Run
from ..tangents import Tangents
from ..world import scenes
from ..world import teacher as teachers
from ..world.detector import judge
from .common import prepare, write_json


def evaluate(run: Run, p: Params) -> dict:
    """Measure student `run`: Table 1's geometry point by point, scene accuracy prompt by prompt."""
    which, e, seed = p.backbones[run.backbone], p.evaluation, p.seeds.world
    accelerator = prepare(p)
    teacher = load(run.backbone, p).to(accelerator.device)
    student = load(paths.student(run)).to(accelerator.device)
    test = Tangents.load(paths.diagnosis(run.backbone) / "test.safetensors", teacher)
    steps = which.student_steps
    y, jv = geometry.tangents(
        lambda c: geometry.endpoint(teacher, student.network, c, steps), test.z, test.v, test.cond, e.batch, str(run)
    )
    out = {"run": str(run), "endpoint": geometry.row(y, jv, test.x0, test.jv)}
    out["local"] = geometry.local_rows(teacher, student.network, test, which.cfg, e.batch)
    out["quality"] = quality(teacher, student.network, p, steps, 1.0)
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


def quality(backbone, network, p: Params, steps: int, cfg: float) -> dict[str, list]:
    """Per-prompt scene accuracies on `evaluation.quality_prompts` test prompts, one noise each."""
    n, seed = p.evaluation.quality_prompts, p.seeds.world + 3
    world = scenes.sample(n, seed, "test")
    images = teachers.generate(backbone, network, world.captions(), steps, cfg, p.seeds.world)
    return {k: v.astype(int).tolist() for k, v in judge(images, [world.objects(i) for i in range(n)]).items()}
