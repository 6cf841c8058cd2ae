"""Table 4: how far a student's path leaves its teacher's."""

import numpy as np
import pandas as pd

from ..evaluation.geometry import bootstrap
from ..params import Params, Run
from .common import label, models, pivot, prompts_of, records, save

PAPER = "The paper (PixArt-α, 200 unseen prompts, norm not known), at t = 0: 0.491 without and 0.427 with GAD, −13 %."


def table4(p: Params) -> pd.DataFrame:
    """Long form: backbone, model, step, metric, value, low, high; `change` is a variant's mean relative error over its
    base's, less one, paired over prompts."""
    n, rows = p.report.bootstrap, []
    for backbone in p.grid.backbones:
        found = models(p, backbone)
        for (paradigm, variant), results in found.items():
            name = label(Run(backbone, paradigm, variant, 0))
            errors = {k: _trajectories(results, k) for k in ("relative", "rmse", "local")}
            base = _trajectories(found[paradigm, "base"], "relative") if (paradigm, "base") in found else None
            prompts = prompts_of(len(errors["rmse"]) // len(results), 1, len(results))
            for k in range(errors["rmse"].shape[1]):
                stats = {m: bootstrap(lambda i, x=x[:, k]: x[i].mean(-1), prompts, n) for m, x in errors.items()}
                if variant != "base" and base is not None:
                    a, b = errors["relative"][:, k], base[:, k]
                    stats["change"] = bootstrap(lambda i, a=a, b=b: a[i].mean(-1) / b[i].mean(-1) - 1, prompts, n)
                rows += records(stats, backbone=backbone, model=name, step=k + 1)
    return pd.DataFrame(rows)


def _trajectories(results, key) -> np.ndarray:
    return np.concatenate([np.array(r["trajectory"][key]) for r in results])


def write(p: Params) -> pd.DataFrame:
    long = table4(p)
    text = [
        "# Table 4, trajectories",
        f"Distance of a student's state from its teacher's after each of its steps, from the same noise, on "
        f"{p.evaluation.trajectory_prompts} unseen prompts (miniature); 95 % bootstrap intervals over prompts. "
        "Relative: in units of the teacher's state; local: of one step by itself, from the teacher's state; change: of "
        "the relative error, against the base.",
    ]
    for metric, title in (("relative", "Accumulated, relative"), ("change", "Change by what was added, paired"),
                          ("local", "Local, relative"), ("rmse", "Accumulated, RMS per element")):
        part = long[long["metric"] == metric]
        if len(part):
            part = part.assign(step=[f"after step {k}" for k in part["step"]])
            table = pivot(part, "step", spec="+.1%" if metric == "change" else ".3g")
            text += [f"## {title}", table.to_markdown(index=False)]
    save("table4", long, [*text, PAPER])
    return long
