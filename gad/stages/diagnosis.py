"""What a student could learn of its teacher, and what a measurement can see."""

import shutil

import torch

from .. import paths
from ..evaluation import geometry, precision
from ..geometry import jvp
from ..params import Params
from ..tangents import Paths, Samples, Tangents
from ..training import identity_key
from ..worlds import world_of
from .common import fingerprint, in_parts, placed, prepare, write_csv, write_json


def diagnose(backbone: str, p: Params) -> dict:
    """The teacher's endpoints and exact tangents at training and test noises, what a student can and can't
    reach (floors), and what finite differences report in each precision.

    Tangents and samples, which take nearly all of the time, are shared by the processes of `accelerate launch`, and an
    interrupted run goes on with those it has."""
    which, e, seed = p.backbones[backbone], p.evaluation, p.seeds.world
    accelerator, world = prepare(p), world_of(backbone, p)
    teacher = placed(accelerator.device, backbone, p)
    folder, endpoints = paths.diagnosis(backbone), paths.endpoints(backbone)
    for place in (folder, endpoints):
        place.mkdir(parents=True, exist_ok=True)

    def tangents(z, v, cond, steps, cfg, batch=e.batch):
        return geometry.tangents(
            lambda c: geometry.endpoint(teacher, teacher.network, c, steps, cfg), z, v, cond, batch, backbone
        )

    weights, works = fingerprint(teacher), []

    def made(part, path, n, batch, *own):
        """`part` of all of n, of which the main process gets the whole. Parts are kept until the stage is done: DVC
        removes its files before it runs again."""
        own = weights, which.model_dump(), batch, p.threads, *own
        works.append(paths.resume(f"diagnose-{backbone}-{path.stem}-{identity_key(own)[:8]}"))
        return in_parts(part, n, batch, works[-1], accelerator)

    def save(path, prompts, seeds, times, batch=p.hardware.tangents, dtype=torch.float32):
        """The teacher's path, and how it turns with the noise, at the first and last of `times` and between."""
        with accelerator.main_process_first():  # which encodes them for all
            z, v, cond = Tangents.inputs(teacher, prompts, seeds)

        @torch.no_grad()
        def part(j):
            c = cond[j].to(z.device)
            states, responses = jvp(
                lambda z: teacher.path(teacher.network, z, c, which.teacher_steps, which.cfg, times), z[j], v[j]
            )
            return {"states": states, "responses": responses}

        if found := made(part, path, len(z), batch, prompts, seeds, times.tolist()):
            Tangents(found["states"], found["responses"], cond).save(path, prompts, seeds, dtype)

    times = teacher.times(which.student_steps)
    ends = times[[0, -1]]
    n = p.endpoints
    # Half precision is ample for a target, and the store is small.
    prompts = world.prompts(n.pairs, seed)
    save(endpoints / "train.safetensors", prompts, (seed + 6, seed + 7), times, dtype=torch.float16)
    prompts = world.prompts(n.probes, seed + 9, "test")
    save(endpoints / "probe.safetensors", prompts, (seed + 9, seed + 10), ends)
    prompts = [c for c in world.prompts(e.prompts, seed + 14, "test") for _ in range(e.noises)]
    save(folder / "test.safetensors", prompts, (seed + 14, seed + 15), ends, e.batch)
    prompts, path = world.prompts(n.samples, seed + 11), endpoints / "samples.safetensors"
    with accelerator.main_process_first():
        z, cond = teacher.noise(len(prompts), seed + 11), teacher.encode(prompts, device="cpu")

    @torch.no_grad()
    def sample(j):
        return {"x0": teacher.sample(teacher.network, z[j], cond[j].to(z.device), which.teacher_steps, which.cfg)}

    found = made(sample, path, len(z), e.drawn, prompts, seed + 11)
    if not found:
        return {}
    Samples(z, found["x0"], cond).save(path, prompts, seed + 11)
    _unseen(teacher, world, times, which, e, seed + 16, folder / "unseen.safetensors")
    test = Tangents.load(folder / "test.safetensors", teacher)
    other = {
        "teacher, CFG + 1": (which.teacher_steps, which.cfg + 1),
        "teacher, half the steps": (which.teacher_steps // 2, which.cfg),
        "untrained student": (which.student_steps, 1.0),
    }
    floors = {}
    for name, (steps, cfg) in other.items():
        y, response = tangents(test.z, test.v, test.cond, steps, cfg)
        floors[name] = geometry.row(y, response, test.x0, test.jv)
    for name, own in (("teacher, CFG + 1", which.cfg + 1), ("untrained student", 1.0)):
        floors[name]["local"] = geometry.local_rows(teacher, teacher.network, test, which.cfg, e.batch, own)
    shifted = (torch.roll(a, e.noises, 0) for a in (test.x0, test.jv))
    floors[geometry.OTHERS] = geometry.row(*shifted, test.x0, test.jv)
    write_json(folder / "floors.json", floors)
    size, few = p.hardware.tangents, test[slice(0, 16)]
    write_csv(folder / "precision.csv", precision.sweep(teacher, few, which.cfg, size, p.differences.sizes))
    write_csv(folder / "published.csv", precision.known_students(teacher, few, seed, size, p.differences.noises))
    for work in works:
        shutil.rmtree(work)
    shown = {k: geometry.SUMMARY[k] for k in ("cos", "ratio", "relative")}
    return {name: {k: float(summary(r[k])) for k, summary in shown.items()} for name, r in floors.items()}


def _unseen(teacher, world, times, which, e, seed, path):
    """The teacher's side of Table 4."""
    prompts = world.prompts(e.trajectory_prompts, seed, "unseen")
    z, cond = teacher.noise(len(prompts), seed), teacher.encode(prompts, device="cpu")
    Paths.of(teacher, z, cond, times, which.teacher_steps, which.cfg, e.drawn).save(path, prompts, seed)
