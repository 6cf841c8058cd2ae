"""Table 4: how far a student's path leaves its teacher's, and how much of that each step adds."""

import numpy as np
import pandas as pd

from ..evaluation.geometry import bootstrap
from ..params import Params, Run
from .common import distinct, label, minus_base, models, pivot, prompts_of, records, save, worlds

PAPER = "The paper (PixArt-α, 200 unseen prompts, norm not known), at t = 0: 0.491 without and 0.427 with GAD, −13 %."
PARTS = ("relative", "local", "inherited")
TRACKED = {  # of the last step, in reports/metrics.json
    "relative": "trajectory_error", "local": "trajectory_own", "inherited": "trajectory_inherited",
    "change": "trajectory_change",
}


def table4(p: Params) -> pd.DataFrame:
    """Long form: backbone, model, step, t, metric, value, low, high. `inherited` is what `local` leaves of `relative`;
    models named `… − …` are paired differences of the three, and `change` is a variant's mean relative error over
    its base's, less one, paired too."""
    n, rows = p.report.bootstrap, []
    for backbone in p.grid.backbones:
        found = {k: rs for k, rs in models(p, backbone).items() if "trajectory" in rs[0]}
        for (paradigm, variant), results in found.items():
            name, errors = label(Run(backbone, paradigm, variant, 0)), _errors(results)
            base = found.get((paradigm, p.base_of(variant))) if variant != "base" else None
            base = base and _errors(base)
            points, steps = errors["rmse"].shape
            prompts = prompts_of(points // len(results), 1, len(results))
            for k in range(steps):
                at = {"backbone": backbone, "step": k + 1, "t": round(1 - (k + 1) / steps, 4)}

                def mean(x, k=k, prompts=prompts):
                    return bootstrap(lambda i: x[i, k].mean(-1), prompts, n)

                stats = {m: mean(x) for m, x in errors.items()}
                if base is not None:
                    a, b = errors["relative"][:, k], base["relative"][:, k]
                    stats["change"] = bootstrap(lambda i, a=a, b=b: a[i].mean(-1) / b[i].mean(-1) - 1, prompts, n)
                    less = {m: mean(errors[m] - base[m]) for m in PARTS}
                    rows += records(less, model=minus_base(p, paradigm, variant), **at)
                rows += records(stats, model=name, **at)
    return pd.DataFrame(rows)


def is_end(long: pd.DataFrame) -> pd.Series:
    """Which rows are of the last step: backbones' students may take more or fewer."""
    return long["step"] == long.groupby("backbone")["step"].transform("max")


def _errors(results) -> dict[str, np.ndarray]:
    """(points, steps) of each error, over all seeds."""
    out = {k: np.concatenate([np.array(r["trajectory"][k]) for r in results]) for k in ("relative", "rmse", "local")}
    return out | {"inherited": out["relative"] - out["local"]}


def write(p: Params) -> pd.DataFrame:
    long, there = table4(p), worlds(p)
    recur = f" (the miniature world has few: {distinct(p, 'unseen')} different ones)" if "mini" in there else ""
    text = [
        "# Table 4, trajectories",
        "Distance of a student's state from its teacher's after each of its steps, from the same noise, on "
        f"{p.evaluation.trajectory_prompts} draws of unseen prompts{recur}, in units of the teacher's state; 95 % "
        "bootstrap intervals over prompts. t: the time that the step leads to, 1 noise and 0 the image, on the "
        "sampler's even grid (a flow's shift, SANA's, is not in it). A step's own error: what it adds by itself, from "
        "the teacher's state; inherited: the rest, which comes of the steps before and may be below zero, where errors "
        "make up for one another; of the first step it is zero. Differences are paired and "
        "add up. As RMS per element: `rmse` in table4.csv.",
    ]
    own, first = ~long["model"].str.contains(" − "), long["step"] == 1
    for metric, rows, title, spec in (
        ("relative", own, "Accumulated error", ".3g"),
        ("change", own, "Accumulated error, change by what was added, paired", "+.1%"),
        ("local", own, "A step's own error", ".3g"), ("local", ~own, "A step's own error, minus base, paired", "+.3g"),
        ("inherited", own & ~first, "Inherited error", ".3g"),
        ("inherited", ~own & ~first, "Inherited error, minus base, paired", "+.3g"),
    ):
        part = long[rows & (long["metric"] == metric)]
        if len(part):
            table = pivot(part.assign(t=[f"t = {t:g}" for t in part["t"]]), "t", spec=spec)
            text += [f"## {title}", table.to_markdown(index=False), *([PAPER] if metric == "relative" else ())]
    save("table4", long, text)
    return long
