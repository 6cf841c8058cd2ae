"""What a student could learn of its teacher, and what a measurement can see."""

import torch

from .. import paths
from ..evaluation import geometry, precision
from ..params import Params
from ..tangents import Paths, Samples, Tangents
from ..worlds import world_of
from .common import placed, prepare, write_csv, write_json


def diagnose(backbone: str, p: Params) -> dict:
    """The teacher's endpoints and exact tangents at training and test noises, what a student can and can't
    reach (floors), and what finite differences report in each precision."""
    which, e, seed = p.backbones[backbone], p.evaluation, p.seeds.world
    accelerator, world = prepare(p), world_of(backbone, p)
    teacher = placed(accelerator.device, backbone, p)
    folder, endpoints = paths.diagnosis(backbone), paths.endpoints(backbone)
    for made in (folder, endpoints):
        made.mkdir(parents=True, exist_ok=True)

    def tangents(z, v, cond, steps, cfg, batch=e.batch):
        return geometry.tangents(
            lambda c: geometry.endpoint(teacher, teacher.network, c, steps, cfg), z, v, cond, batch, backbone
        )

    def save(path, prompts, seeds, times, batch=p.hardware.tangents, dtype=torch.float32):
        """The teacher's path, and how it turns with the noise, at the first and last of `times` and between."""
        z, v, cond = Tangents.inputs(teacher, prompts, seeds)
        found = geometry.tangents(
            lambda c: lambda z: teacher.path(teacher.network, z, c, which.teacher_steps, which.cfg, times),
            z, v, cond, batch, backbone,
        )
        Tangents(*found, cond).save(path, prompts, seeds, dtype)
        return Tangents.load(path, teacher)

    times = teacher.times(which.student_steps)
    ends = times[[0, -1]]
    n = p.endpoints
    # Half precision is ample for a target, and the store is small.
    prompts = world.prompts(n.pairs, seed)
    save(endpoints / "train.safetensors", prompts, (seed + 6, seed + 7), times, dtype=torch.float16)
    prompts = world.prompts(n.probes, seed + 9, "test")
    save(endpoints / "probe.safetensors", prompts, (seed + 9, seed + 10), ends)
    prompts = world.prompts(n.samples, seed + 11)
    path = endpoints / "samples.safetensors"
    Samples.make(path, teacher, prompts, seed + 11, which.teacher_steps, which.cfg, e.drawn)
    prompts = [c for c in world.prompts(e.prompts, seed + 14, "test") for _ in range(e.noises)]
    test = save(folder / "test.safetensors", prompts, (seed + 14, seed + 15), ends, e.batch)
    _unseen(teacher, world, times, which, e, seed + 16, folder / "unseen.safetensors")
    other = {
        "teacher, CFG + 1": (which.teacher_steps, which.cfg + 1),
        "teacher, half the steps": (which.teacher_steps // 2, which.cfg),
        "untrained student": (which.student_steps, 1.0),
    }
    floors = {}
    for name, (steps, cfg) in other.items():
        y, response = tangents(test.z, test.v, test.cond, steps, cfg)
        floors[name] = geometry.row(y, response, test.x0, test.jv)
    shifted = (torch.roll(a, e.noises, 0) for a in (test.x0, test.jv))
    floors[geometry.OTHERS] = geometry.row(*shifted, test.x0, test.jv)
    write_json(folder / "floors.json", floors)
    size = p.hardware.tangents
    write_csv(folder / "precision.csv", precision.sweep(teacher, test[slice(0, 8)], which.cfg, size))
    write_csv(folder / "published.csv", precision.known_students(teacher, test[slice(0, 16)], seed, size))
    shown = {k: geometry.SUMMARY[k] for k in ("cos", "ratio", "relative")}
    return {name: {k: float(summary(r[k])) for k, summary in shown.items()} for name, r in floors.items()}


def _unseen(teacher, world, times, which, e, seed, path):
    """The teacher's side of Table 4."""
    prompts = world.prompts(e.trajectory_prompts, seed, "unseen")
    z, cond = teacher.noise(len(prompts), seed), teacher.encode(prompts, device="cpu")
    Paths.of(teacher, z, cond, times, which.teacher_steps, which.cfg, e.drawn).save(path, prompts, seed)
