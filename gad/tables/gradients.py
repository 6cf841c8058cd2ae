"""What a term weighs beside its paradigm's own loss: gradients at the student, from the logs of training. A page beside
the paper's tables."""

import numpy as np
import pandas as pd

from .. import paths
from ..params import Params
from .common import label, save

NAME = "gradients"
TEXT = (
    "Not the paper's: ours. Base losses differ in scale by orders of magnitude. Adam hides that as long as each is "
    "alone, but a term is added to it, and both share one clip of the whole gradient's norm. Medians, over a "
    "training's logged steps, of that norm before it is clipped, and the share of steps at which it was "
    "(`distill.clip`). Where a term brings it up many times over, what the student follows is mostly the term; where "
    "nearly all steps are clipped, a term also makes the base's part of each step smaller, and of a term at each k-th "
    "step (`every`) not all of its k times as much arrives. `python -m gad weigh BACKBONE PARADIGM` has the parts one "
    "by one, where training begins."
)
COLUMNS = {"norm": "gradient norm, median", "times": "times its base's", "clipped": "steps clipped"}


def gradients(p: Params) -> pd.DataFrame:
    """Long form: backbone, model, metric, value; of every student that is trained, of the first seed."""
    found, rows = {}, []
    for run in p.runs():
        if run.seed == p.seeds.distill[0] and str(run) not in p.published:
            norms = pd.read_csv(paths.log(run))["student_norm"]
            norms = norms[norms > 0]  # the student may move at some steps only
            found[run] = float(np.median(norms)), float((norms > p.distill.clip).mean())
    for run, (norm, clipped) in found.items():
        base = found.get((*run[:2], p.base_of(run.variant), run.seed)) if run.variant != "base" else None
        measured = {"norm": norm} | ({"times": norm / base[0]} if base else {}) | {"clipped": clipped}
        rows += [{"backbone": run.backbone, "model": label(run), "metric": k, "value": v} for k, v in measured.items()]
    return pd.DataFrame(rows, columns=["backbone", "model", "metric", "value"])


def write(p: Params) -> pd.DataFrame:
    """reports/tables/gradients.csv and .md; returns the long form."""
    long, text = gradients(p), ["# What a term weighs", TEXT]
    if len(long):
        cells = long.assign(value=[f"{v:.0%}" if m == "clipped" else f"{v:.3g}" for m, v in
                                   zip(long["metric"], long["value"], strict=True)])
        order = cells[["backbone", "model"]].drop_duplicates()
        table = cells.pivot(index=["backbone", "model"], columns="metric", values="value").fillna("–")
        table = table.loc[list(map(tuple, order.to_numpy()))][[c for c in COLUMNS if c in table]]
        text.append(table.rename(columns=COLUMNS).reset_index().to_markdown(index=False))
    save(NAME, long, text)
    return long
