"""Where a student's cosine with its teacher is lost."""

import numpy as np
import torch

from .. import paths
from ..backbones import load_network
from ..evaluation import chains, geometry
from ..params import Params, Run
from ..tangents import Tangents
from .common import placed, prepare, write_json


def nearby(backbone: str, p: Params) -> dict:
    """The teacher's side, once a backbone: its paths from the noises of Table 1, with their tangents at the student's
    times, the steps of what a student is before it learns, and itself at other noises nearby."""
    which, batch = p.backbones[backbone], p.evaluation.batch
    teacher = placed(prepare(p).device, backbone, p)
    measured = paths.diagnosis(backbone) / "test.safetensors"
    test = Tangents.load(measured, teacher)
    folder, times = paths.nearby(backbone), teacher.times(which.student_steps)
    folder.mkdir(parents=True, exist_ok=True)
    found = geometry.tangents(
        lambda c: lambda z: teacher.path(teacher.network, z, c, which.teacher_steps, which.cfg, times),
        test.z, test.v, test.cond, batch, backbone,
    )
    Tangents(*found, test.cond).save(folder / "paths.safetensors", *Tangents.source(measured), dtype=torch.float16)
    its = Tangents.load(folder / "paths.safetensors", teacher)
    write_json(folder / "untrained.json", geometry.rounded(chains.chain(teacher, teacher.network, its, batch)))
    made = which.teacher_steps, which.cfg, batch, p.seeds.world + 26
    out = {str(size): chains.nearby(teacher, test, size, *made) for size in p.nearby.sizes}
    write_json(folder / "teacher.json", geometry.rounded(out))
    return {size: {"cos": float(np.mean(r["cos"])), "value": float(np.median(r["value"]))} for size, r in out.items()}


def chain(run: Run, p: Params) -> dict:
    """The steps of student `run`, one by one and one after another, on its teacher's paths and on its own."""
    device = prepare(p).device
    teacher = placed(device, run.backbone, p)
    student = load_network(paths.student(run), teacher).to(device)
    its = Tangents.load(paths.nearby(run.backbone) / "paths.safetensors", teacher)
    if its.steps != (steps := p.student_steps(run)):
        name = f"data/nearby/{run.backbone}"
        raise ValueError(f"{run} takes {steps} steps: {name} holds the teacher's paths at the times of {its.steps}")
    out = chains.chain(teacher, student, its, p.evaluation.batch)
    write_json(paths.chain(run), geometry.rounded({"run": str(run), **out}))
    return {name: [float(np.mean(x)) for x in steps] for name, steps in out.items()}
