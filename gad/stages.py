"""The pipeline's stages as functions. Notebooks and `python -m gad` call these and nothing below them."""

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from diffusers import AutoencoderDC, AutoencoderKL
from torchvision.utils import save_image

from . import distill as students
from . import paths
from .backbones import load
from .evaluation import geometry, precision
from .paradigms.base import Tangents
from .params import Params, Run
from .world import autoencoder as autoencoders
from .world import scenes
from .world import teacher as teachers
from .world.detector import judge


def prepare(p: Params, precision: str = "no") -> Accelerator:
    """Threads, determinism and the accelerator of a stage."""
    torch.set_num_threads(p.threads)
    AcceleratorState._reset_state()  # several stages may share one notebook or session
    return Accelerator(cpu=not torch.cuda.is_available(), mixed_precision=precision)


def write_json(path: Path, data) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data, indent=2) + "\n")
    return path


def write_csv(path: Path, frame: pd.DataFrame) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    frame.to_csv(path, index=False, float_format="%.6g", lineterminator="\n")
    return path


def autoencoder(kind: str, p: Params) -> dict:
    """Train autoencoder `kind`; its folder and metrics."""
    config = p.autoencoder[kind].model_dump()
    accelerator = prepare(p, "bf16")
    work = paths.resume(f"autoencoder-{kind}")
    metrics = autoencoders.pretrain(kind, paths.autoencoder(kind), work, config, p.seeds.world, accelerator)
    write_json(paths.autoencoder(kind) / "metrics.json", metrics)
    shutil.rmtree(work)
    return metrics


def teacher(backbone: str, p: Params) -> dict:
    """Train the miniature teacher of `backbone` and measure it on test prompts."""
    which = p.backbones[backbone]
    folder = paths.autoencoder(which.autoencoder)
    vae = (AutoencoderDC if which.autoencoder == "dc" else AutoencoderKL).from_pretrained(folder)
    training, seed = p.teacher_of(backbone), p.seeds.world
    accelerator, config = prepare(p, training.precision), training.model_dump()
    work = paths.resume(f"teacher-{backbone}")
    made = teachers.pretrain(which.family or backbone, vae, paths.teacher(backbone), work, config, seed, accelerator)
    metrics = teachers.evaluate(made, made.network, which.teacher_steps, which.cfg, seed, training.prompts)
    write_json(paths.teacher_metrics(backbone), metrics)
    shutil.rmtree(work)
    return metrics


def diagnose(backbone: str, p: Params) -> dict:
    """The teacher's endpoints and exact tangents at training and test noises, what a student can and can't
    reach (floors), and what finite differences report in each precision."""
    which, e, seed = p.backbones[backbone], p.evaluation, p.seeds.world
    accelerator = prepare(p)
    teacher = load(backbone, p).to(accelerator.device)
    folder = paths.diagnosis(backbone)
    folder.mkdir(parents=True, exist_ok=True)

    def tangents(network, z, v, cond, steps, cfg):
        return geometry.tangents(
            lambda c: geometry.endpoint(teacher, network, c, steps, cfg), z, v, cond, e.batch, str(backbone)
        )

    test_prompts = scenes.sample(e.prompts, seed + 4, "test").captions()
    for name, prompts, seeds in (
        ("train", scenes.sample(p.endpoints.pairs, seed, "train").captions(), (seed + 6, seed + 7)),
        ("test", [c for c in test_prompts for _ in range(e.noises)], (seed + 4, seed + 5)),
    ):
        z, v, cond = Tangents.inputs(teacher, prompts, seeds)
        x0, jv = tangents(teacher.network, z, v, cond, which.teacher_steps, which.cfg)
        Tangents.save(folder / f"{name}.safetensors", x0, jv, prompts, seeds)
    test = Tangents(z, v, x0, jv, cond)
    other = {
        "teacher, CFG + 1": (which.teacher_steps, which.cfg + 1),
        "teacher, half the steps": (which.teacher_steps // 2, which.cfg),
        "untrained student": (which.student_steps, 1.0),
    }
    floors = {}
    for name, (steps, cfg) in other.items():
        y, response = tangents(teacher.network, z, v, cond, steps, cfg)
        floors[name] = geometry.row(y, response, x0, jv)
    shuffled = torch.roll(jv, e.noises, 0)
    floors["another noise's tangent"] = geometry.row(torch.roll(x0, e.noises, 0), shuffled, x0, jv)
    write_json(folder / "floors.json", floors)
    write_csv(folder / "precision.csv", precision.sweep(teacher, test[slice(0, 8)], which.cfg))
    write_csv(folder / "published.csv", precision.known_students(teacher, test[slice(0, 16)], seed))
    return {name: {k: float(np.mean(r[k])) for k in ("cos", "ratio", "relative")} for name, r in floors.items()}


def distill(run: Run, p: Params) -> dict:
    """Train student `run`; its folder, log and probes."""
    accelerator = prepare(p, p.distill.precision)
    backbone = load(run.backbone, p).to(accelerator.device)
    folder = paths.diagnosis(run.backbone)
    train, test = (Tangents.load(folder / f"{k}.safetensors", backbone) for k in ("train", "test"))
    config = {
        "run": list(run), "distill": p.distill.model_dump(), "paradigm": p.paradigms[run.paradigm],
        "backbone": p.backbones[run.backbone].model_dump(), "teacher": train.x0.double().sum().item(),
        "gad": p.gad.model_dump() if run.variant == "gad" else None,
    }
    prompts = scenes.sample(p.distill.prompts, p.seeds.world, "train").captions()
    places = paths.student(run), paths.resume(str(run))
    log, probes = students.distill(run, p, backbone, prompts, train, test, *places, accelerator, config)
    for path, frame in ((paths.log(run), log), (paths.probe(run), probes)):
        write_csv(path, frame)
    shutil.rmtree(paths.resume(str(run)))
    return probes.iloc[-1].to_dict()


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
