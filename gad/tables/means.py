"""Each comparison's mean over students: what the test prompts of one leave undecided, those of all may not. A page
beside the paper's tables."""

import numpy as np
import pandas as pd

from .. import paths
from ..evaluation.geometry import SUMMARY, bootstrap, mean
from ..params import Params, Run
from . import replicas
from .common import HYBRID, fit, fits, label, pivot, prompts_of, read, records, save

NAME = "means"
TEXT = (
    "Not the paper's: ours. Tables 1 and 4 compare students one by one, with intervals as wide as their test prompts "
    "are few. Here is each comparison's mean over all students that have it, of the same seeds; test prompts are the "
    "same for all, and are resampled for all together. {training} The last column is of more images, under fewer "
    "prompts."
)
TRAINING = (
    "Intervals (95 %) hold what training varies by as well: the standard deviation of a difference between trainings "
    "(`replicas`), taken to be that of every comparison, divided by the root of the number of students. Not so the "
    "last column's, nor those of a student against itself after the teacher's first step: these are of prompts alone."
)
COLUMNS = replicas.COLUMNS | {"many": "Table 3: {} ↑"}


def name(variant: str) -> str:
    """What a variant adds to its paradigm."""
    return (variant if variant == HYBRID else label(Run("", "", variant, 0))).lstrip(" +,") or "base"


def comparisons(p: Params) -> dict[str, list[tuple[str, str]]]:
    """Pairs of variants by what a row is called: the second is taken from the first, the second pair's from the
    first's."""
    out = {}
    for variant in (*p.variants[1:], HYBRID):
        base = p.base_of(variant)
        own = f"{name(variant)} − {name(base)}"
        out[own] = [(variant, base)]
        if base != "base":
            out[f"({own}) − (GAD − base)"] = [(variant, base), ("gad", "base")]
            out[f"{name(variant)} − GAD"] = [(variant, "gad")]
        elif variant != "gad":
            out[f"GAD − {name(variant)}"] = [("gad", variant)]
    return out


def _points(p: Params) -> dict[tuple, dict[str, dict]]:
    """By (backbone, paradigm, seed) and variant: what `replicas.points` has, and `many`."""
    grid, found = p.grid.runs(p.seeds.distill), {}
    for run in p.runs():
        if str(run) in p.published:
            continue
        result, of = read(paths.result(run)), found.setdefault((run.backbone, run.paradigm, run.seed), {})
        of[run.variant] = replicas.points(result)
        use = read(paths.use(run)) if run in grid else {}
        if "quality" in use:
            of[run.variant]["many"] = np.array(fit(use)), mean
        if "hybrid" in result:
            of[HYBRID] = replicas.points(result["hybrid"])
            if "quality" in use.get("hybrid", {}):
                of[HYBRID]["many"] = np.array(fit(use["hybrid"])), mean
    return found


def means(p: Params, training: dict[str, tuple[float, int]]) -> pd.DataFrame:
    """Long form: model (a comparison), students, metric, value, low, high; comparisons of two students or more.
    `training`: what `replicas.training` found."""
    rows, found = [], _points(p)
    for model, pairs in comparisons(p).items():
        needed, measured = {v for pair in pairs for v in pair}, {}
        students = [of for of in found.values() if needed <= of.keys()]
        for key in COLUMNS:
            have = [of for of in students if all(key in of[v] for v in needed)]
            if len(have) < 2:
                continue

            def statistic(i, key=key, have=have, pairs=pairs):
                terms = [[replicas.less(*of[a][key], of[b][key][0], key == "end")(i) for a, b in pairs] for of in have]
                return np.mean([t[0] - sum(t[1:]) for t in terms], 0)

            points = len(have[0][pairs[0][0]][key][0])
            prompts = prompts_of(points, p.evaluation.noises if key in SUMMARY else 1, 1)
            each = measured[key] = bootstrap(statistic, prompts, p.report.bootstrap)
            if key in training and pairs != [(HYBRID, "base")]:
                sd, dof = training[key]
                sd *= len(pairs) ** 0.5
                measured[key] = replicas.together(each[0], replicas.error(each), sd, dof, len(have))
        rows += records(measured, model=model, students=len(students))
    return pd.DataFrame(rows, columns=["model", "students", "metric", "value", "low", "high"])


def write(p: Params) -> pd.DataFrame:
    """reports/tables/means.csv and .md; returns the long form."""
    training = replicas.training(p)
    long = means(p, training)
    text = ["# Means over students", TEXT.format(training=TRAINING if training else (
        "Intervals (95 %) are of prompts alone: no student was trained again."))]
    if len(long):
        titles = {k: v.removesuffix(" ↑").removesuffix(" ↓").format(fits(p)) for k, v in COLUMNS.items()}
        titles |= {"fit": fits(p), "end": titles["end"] + ", relative change", "model": "comparison"}
        table = pivot(long, "metric", ("model", "students"), "+.3g")
        text.append(table[["model", "students", *(k for k in COLUMNS if k in table)]]
                    .rename(columns=titles).to_markdown(index=False))
    else:
        text.append("There are none: no two students have the same comparison.")
    save(NAME, long, text)
    return long
