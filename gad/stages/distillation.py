"""A student from a teacher; and trials, by which the paradigms' settings were chosen."""

import shutil
import time
from pathlib import Path

import numpy as np
import pandas as pd

from .. import distill as students
from .. import paths
from ..backbones import load, load_network, with_lora
from ..evaluation.geometry import compare, endpoint, interval_columns, tangents
from ..paradigms import PARADIGMS
from ..params import Params, Run
from ..tables import cell
from ..tangents import Samples, Tangents
from ..world import teacher as teachers
from ..worlds import world_of
from .common import placed, prepare, write_csv


def distill(run: Run, p: Params, track: str | None = None) -> dict:
    """Train student `run`; its folder, log and probes. `track`: a tracker's name, see `prepare`."""
    accelerator = prepare(p, p.distill.precision, track)
    if track:
        live = {"dir": str(paths.tracking() / "dvclive"), "dvcyaml": None, "save_dvc_exp": False}  # not DVC's own files
        accelerator.init_trackers("gad", {"run": str(run), **p.distill.identity}, {"dvclive": live})
    made, _ = _student(run, p, paths.student(run), paths.resume(str(run)), accelerator)
    accelerator.end_training()
    if not made:
        return {}
    log, probes = made
    for path, frame in ((paths.log(run), log), (paths.probe(run), probes)):
        write_csv(path, frame)
    shutil.rmtree(paths.resume(str(run)))
    return probes.iloc[-1].to_dict()


def _student(run, p, folder, work, accelerator):
    backbone = placed(accelerator.device, run.backbone, p)
    endpoints, paired = paths.endpoints(run.backbone), PARADIGMS[run.paradigm].paired
    prompts = world_of(run.backbone, p).prompts(p.distill.prompts, p.seeds.world)
    with accelerator.main_process_first():  # which encodes all prompts there will be; the others read them
        cond = backbone.encode(prompts, device="cpu")  # of T5's, 2 GB for each 1000
        train, test = (Tangents.load(endpoints / f"{k}.safetensors", backbone) for k in ("train", "probe"))
        samples = Samples.load(endpoints / "samples.safetensors", backbone) if paired else None
    term = p.term(run.variant)
    config = {
        "run": list(run), "distill": p.distill.identity, "paradigm": p.settings(run.paradigm, run.variant),
        "backbone": p.backbones[run.backbone].model_dump(), "teacher": train.x0.double().sum().item(),
        "gad": term.model_dump() if term else None, "steps": p.steps(run.paradigm, run.variant),
    } | ({"samples": samples.x0.double().sum().item()} if paired else {})
    made = students.distill(run, p, backbone, cond, train, test, samples, folder, work, accelerator, config)
    return made, backbone


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
        theirs = load(entry.path, revision=entry.revision)
        network = theirs.network
        for what in ("part", "latent_shape", "prediction"):
            ours, its = getattr(backbone, what), getattr(theirs, what)
            if ours != its:
                raise ValueError(f"published.{run}: {what} of {entry.path} is {its}, not {ours} as {run.backbone}'s")
    students.save_student(run, p, backbone, network, paths.student(run))
    return {"parameters": sum(w.numel() for w in network.parameters())}


NOTE = """# What was tried

Miniature students at settings that were tried; where none stand, those of `params.yaml`. Each row is made by
`python -m gad --set KEY=VALUE … trial BACKBONE PARADIGM VARIANT`, on prompts and noises drawn anew (in so small a
world some prompts are the tables' too), with a 95 % bootstrap interval over prompts. `seed`: of distillation, a further
argument of `trial`; rows that differ in it alone show what training itself varies by. A row's teacher is the one there
was then: where it draws less well than the tables say, an earlier one.

"""
TRIAL = 20  # added to the world's seed: trials have noises of their own, and prompts drawn anew


def trial(run: Run, p: Params, settings: dict, prompts: int = 128, noises: int = 48) -> dict:
    """Train student `run` and throw it away, keeping a row in reports/tuning.csv: `settings` (what differs from
    params.yaml), scene accuracy of student and teacher on `prompts` prompts, JVP cosine at `noises` noises."""
    which, seed, world = p.backbones[run.backbone], p.seeds.world + TRIAL, world_of(run.backbone, p)
    work = paths.resume(f"trial-{run}")
    began = time.monotonic()
    (log, _), backbone = _student(run, p, work / "student", work, prepare(p, p.distill.precision))
    seconds = time.monotonic() - began
    student = load_network(work / "student").to(backbone.device)
    row = {
        "backbone": run.backbone, "paradigm": run.paradigm, "variant": run.variant, "seed": run.seed,
        "settings": " ".join(f"{k}={v}" for k, v in sorted(settings.items())),
        "steps": p.steps(run.paradigm, run.variant),
    }
    for name, network, steps, cfg in (
        ("scene", student, which.student_steps, 1.0), ("teacher", backbone.network, which.teacher_steps, which.cfg)
    ):
        fits = teachers.quality(world, backbone, network, prompts, steps, cfg, seed)
        row |= interval_columns(name, np.array(fits[world.keys[0]]), p.report.bootstrap)
    captions = world.prompts(prompts, seed, "test")
    z, v, cond = Tangents.inputs(backbone, captions[:noises], (seed, seed + 1))
    (_, own), (_, its) = (
        tangents(lambda c, m=m: endpoint(backbone, m[0], c, m[1], m[2]), z, v, cond, p.evaluation.batch, str(run))
        for m in ((student, which.student_steps, 1.0), (backbone.network, which.teacher_steps, which.cfg))
    )
    row |= interval_columns("cos", compare(own, its)["cos"].cpu().numpy(), p.report.bootstrap)
    row |= {"gap": log["gap"].dropna().iloc[-1] if "gap" in log else np.nan, "seconds": round(seconds)}
    shutil.rmtree(work)
    _append(paths.REPORTS / "tuning.csv", row)
    return row


def _append(path: Path, row: dict):
    """One more row; of equal trials the newest stays."""
    known = [pd.read_csv(path, keep_default_na=False, na_values=[""], dtype={"settings": str})] if path.exists() else []
    frame = pd.concat([*known, pd.DataFrame([row])], ignore_index=True)
    frame["settings"] = frame["settings"].fillna("")
    keys = ["backbone", "paradigm", "variant", "seed", "settings", "steps"]
    frame = frame.drop_duplicates(keys, keep="last").sort_values(keys, kind="stable")
    write_csv(path, frame)
    cells = frame[["backbone", "paradigm", "variant", "seed", "settings", "steps"]].copy()
    for key, name in (("scene", "scene accuracy"), ("teacher", "its teacher's"), ("cos", "JVP cos")):
        cells[name] = [cell(*x) for x in frame[[key, f"{key}_low", f"{key}_high"]].to_numpy()]
    path.with_suffix(".md").write_text(NOTE + cells.to_markdown(index=False) + "\n")
