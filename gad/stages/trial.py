"""Trials, by which the paradigms' settings were chosen."""

import shutil
import time
from pathlib import Path

import numpy as np
import pandas as pd

from .. import paths
from ..backbones import load_network
from ..evaluation.geometry import compare, endpoint, interval_columns, tangents
from ..params import Params, Run
from ..tables import cell
from ..tangents import Tangents
from ..training import identity_key
from ..world import teacher as teachers
from ..worlds import world_of
from .common import prepare, write_csv
from .distillation import student

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
    params.yaml), scene accuracy of student and teacher on `prompts` prompts, JVP cosine at `noises` noises, no more
    than `evaluation` has."""
    prompts, noises = min(prompts, p.evaluation.quality_prompts), min(noises, p.evaluation.prompts)
    which, seed, world = p.backbones[run.backbone], p.seeds.world + TRIAL, world_of(run.backbone, p)
    work = paths.resume(f"trial-{run}-{identity_key(p.model_dump())[:8]}")  # trials may run side by side
    began = time.monotonic()
    (log, _), backbone = student(run, p, work / "student", work, prepare(p, p.training(run.backbone).precision))
    seconds = time.monotonic() - began
    network = load_network(work / "student").to(backbone.device)
    row = {
        "backbone": run.backbone, "paradigm": run.paradigm, "variant": run.variant, "seed": run.seed,
        "settings": " ".join(f"{k}={v}" for k, v in sorted(settings.items())),
        "steps": p.steps(run.paradigm, run.variant),
    }
    for name, model, steps, cfg in (
        ("scene", network, which.student_steps, 1.0), ("teacher", backbone.network, which.teacher_steps, which.cfg)
    ):
        fits = teachers.quality(world, backbone, model, prompts, steps, cfg, seed)
        row |= interval_columns(name, np.array(fits[world.keys[0]]), p.report.bootstrap)
    captions = world.prompts(prompts, seed, "test")
    z, v, cond = Tangents.inputs(backbone, captions[:noises], (seed, seed + 1))
    (_, own), (_, its) = (
        tangents(lambda c, m=m: endpoint(backbone, m[0], c, m[1], m[2]), z, v, cond, p.evaluation.batch, str(run))
        for m in ((network, which.student_steps, 1.0), (backbone.network, which.teacher_steps, which.cfg))
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
