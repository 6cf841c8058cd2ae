"""A student from a teacher."""

import shutil

from .. import distill as students
from .. import paths
from ..backbones import load
from ..params import Params, Run
from ..tangents import Tangents
from ..world import scenes
from .common import prepare, write_csv


def distill(run: Run, p: Params) -> dict:
    """Train student `run`; its folder, log and probes."""
    accelerator = prepare(p, p.distill.precision)
    backbone = load(run.backbone, p).to(accelerator.device)
    folder = paths.endpoints(run.backbone)
    train, test = (Tangents.load(folder / f"{k}.safetensors", backbone) for k in ("train", "probe"))
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
