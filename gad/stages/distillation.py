"""A student from a teacher."""

import hashlib
import inspect
import shutil

from .. import diffusion, geometry, paths, training
from .. import distill as students
from ..backbones import load, with_lora
from ..paradigms import base, find, forms
from ..params import Params, Run
from ..tangents import Samples, Tangents
from ..worlds import world_of
from .common import placed, prepare, write_csv


def distill(run: Run, p: Params, track: str | None = None) -> dict:
    """Train student `run`; its folder, log and probes. `track`: a tracker's name, see `prepare`."""
    accelerator = prepare(p, p.training(run.backbone).precision, track)
    if track:
        # A place for each student; DVCLive leaves DVC's own files alone.
        live = {"dir": str(paths.tracking() / "dvclive" / str(run)), "dvcyaml": None, "save_dvc_exp": False}
        own = {"dvclive": live, "wandb": {"name": str(run), "dir": str(paths.tracking())}}
        name = str(run) if track == "tensorboard" else "gad"  # W&B's is the project's
        accelerator.init_trackers(name, {"run": str(run), **p.training(run.backbone).identity}, own)
    made, _ = student(run, p, paths.student(run), paths.resume(str(run)), accelerator)
    accelerator.end_training()
    if not made:
        return {}
    log, probes = made
    for path, frame in ((paths.log(run), log), (paths.probe(run), probes)):
        write_csv(path, frame)
    shutil.rmtree(paths.resume(str(run)))
    return probes.iloc[-1].to_dict()


def student(run: Run, p: Params, folder, work, accelerator):
    """Train `run` to `folder`; what `gad.distill.distill` returns, and the backbone."""
    students.shareable(run, p, accelerator.num_processes)
    paradigm, endpoints = find(run.paradigm), paths.endpoints(run.backbone)
    backbone = placed(accelerator.device, run.backbone, p)
    prompts = world_of(run.backbone, p).prompts(p.distill.prompts, p.seeds.world)
    with accelerator.main_process_first():  # which encodes all prompts there will be; the others read them
        cond = backbone.encode(prompts, device="cpu")  # of T5's, 2 GB for each 1000
        train, test = (Tangents.load(endpoints / f"{k}.safetensors", backbone) for k in ("train", "probe"))
        samples = Samples.load(endpoints / "samples.safetensors", backbone) if paradigm.paired else None
    term = p.term(run.variant)
    config = {
        "run": list(run), "distill": p.training(run.backbone).identity,
        "paradigm": p.settings(run.paradigm, run.variant),
        "backbone": p.backbones[run.backbone].model_dump(), "teacher": _digest(endpoints / "train.safetensors"),
        "gad": term.model_dump() if term else None, "steps": p.steps(run.paradigm, run.variant),
        "code": _code(training, students, geometry, diffusion, base, forms, *map(inspect.getmodule, (
            type(backbone).__base__, type(backbone), paradigm))),
    } | ({"samples": _digest(endpoints / "samples.safetensors")} if paradigm.paired else {})
    made = students.distill(run, p, backbone, cond, train, test, samples, folder, work, accelerator, config)
    return made, backbone


def _digest(file) -> str:
    with file.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def _code(*modules) -> str:
    """A hash of their source: an interrupted run does not go on under another objective."""
    return hashlib.sha256("".join(map(inspect.getsource, modules)).encode()).hexdigest()


def publish(run: Run, p: Params) -> dict:
    """Student `run` from the checkpoint of others that `published` names: its network in the backbone's pipeline.

    ValueError where it is not of the backbone's kind, or its latents, prompts or prediction are others.
    """
    prepare(p)
    if str(run) not in p.published:
        raise ValueError(f"published has no {run}: it has {', '.join(p.published) or 'no entries'}")
    entry, backbone = p.published[str(run)], load(run.backbone, p)
    if entry.lora:
        network = with_lora(backbone, entry.lora, entry.file, entry.revision)
    else:
        theirs = load(entry.path, revision=entry.revision, variant=entry.variant)
        network = theirs.network.float()
        for what in ("part", "latent_shape", "prediction"):
            ours, its = getattr(backbone, what), getattr(theirs, what)
            if ours != its:
                raise ValueError(f"published.{run}: {what} of {entry.path} is {its}, not {ours} as {run.backbone}'s")
    students.save_student(run, p, backbone, network, paths.student(run))
    return {"parameters": sum(w.numel() for w in network.parameters())}
