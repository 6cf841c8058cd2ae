"""Where the cosine of Table 1 is lost: a page beside the paper's tables."""

from itertools import pairwise

import numpy as np
import pandas as pd

from .. import paths
from ..evaluation.geometry import SUMMARY, bootstrap
from ..params import Params, Run
from .common import grouped, label, minus_base, pivot, prompts_of, read, records, save

NAME, UNTRAINED = "chains", "untrained student"
ALONE, PATH, OWN = "step {} alone", "all, on the teacher's path", "all, on its own path"
TEXT = (
    "Not the paper's: ours, to read Table 1 by, with 95 % bootstrap intervals over prompts. The Jacobian of a few-step "
    "map is the product of its steps', each at the state where the step begins. JVP cosines with the teacher: of each "
    "step alone, at the teacher's state and along the teacher's own response there; of all steps, one after another, "
    "each at the teacher's state; and of all at the student's own states, which is the endpoint's cosine of Table 1. "
    "What the own path has less than the teacher's is lost because the student's states are not its teacher's. Much of "
    "a step's response is its state's own, whatever the network says: the untrained student, the teacher's network in "
    "the student's steps without guidance, is the scale."
)
BINS = (0.01, 0.03, 0.1, 0.3)  # value errors
ALIKE = (
    "Noise by noise: mean JVP cosines of those whose own value error lies between the numbers above, students of all "
    "paradigms together (Table 1's noises), and the teacher against itself, of all ε together. – : fewer than ten such "
    "noises."
)
NEAR = (
    "The teacher against itself, along the same v: at z and at the noise √(1 − ε²) z + ε w, w another. So much of a "
    "cosine is lost at such a value error even where both maps are the same: a scale, not a bound, for a student's "
    "errors are not of this kind. Value errors: medians over noises, as in Table 1, and means."
)
GROUPS = {"base": "students", "gad": "students + GAD"}


def chains(p: Params, distilled: list[int] | None = None) -> pd.DataFrame:
    """Long form: backbone, model, metric, value, low, high. Of each student of the grid, and of an untrained one,
    cosines by ALONE, PATH and OWN; `… − base`: paired differences; of `teacher, ε = …` `cos`, `value` (median) and
    `value_mean`. `distilled`: the seeds of the students, all where None."""
    n, noises, rows = p.report.bootstrap, p.evaluation.noises, []
    for backbone in p.grid.backbones:
        def mean(x, seeds=1):
            prompts = prompts_of(len(x) // seeds, noises, seeds)
            return bootstrap(lambda i: np.mean(x[i], -1), prompts, n)

        for size, found in read(paths.nearby(backbone) / "teacher.json").items():
            cos, value = (np.array(found[k]) for k in ("cos", "value"))
            median = bootstrap(lambda i, x=value: SUMMARY["value"](x[i]), prompts_of(len(value), noises, 1), n)
            stats = {"cos": mean(cos), "value": median, "value_mean": mean(value)}
            rows += records(stats, backbone=backbone, model=f"teacher, ε = {size}")
        students = grouped(p.grid.runs(distilled or p.seeds.distill), backbone, paths.chain)
        cosines = {key: _cosines(results) for key, results in students.items()}
        untrained = _cosines([read(paths.nearby(backbone) / "untrained.json")])
        rows += records({k: mean(x) for k, x in untrained.items()}, backbone=backbone, model=UNTRAINED)
        for (paradigm, variant), found in cosines.items():
            seeds = len(students[paradigm, variant])
            name = label(Run(backbone, paradigm, variant, 0))
            rows += records({k: mean(x, seeds) for k, x in found.items()}, backbone=backbone, model=name)
            base = cosines.get((paradigm, "base"))
            if variant != "base" and base:
                less = {k: mean(x - base[k], seeds) for k, x in found.items()}
                rows += records(less, backbone=backbone, model=minus_base(p, paradigm, variant))
    return pd.DataFrame(rows)


def _cosines(results: list[dict]) -> dict[str, np.ndarray]:
    """(points of all seeds,) each."""
    step, path, own = (np.concatenate([np.array(r[k]) for r in results], 1) for k in ("step", "path", "own"))
    return {ALONE.format(k): x for k, x in enumerate(step, 1)} | {PATH: path[-1], OWN: own[-1]}


def alike(p: Params) -> pd.DataFrame:
    """Long form, of the teacher at noises nearby and of the grid's students by GROUPS: mean cosines of noises by their
    value error, as ALIKE says."""
    rows = []
    for backbone in p.grid.backbones:
        found = {"teacher, nearby": [*read(paths.nearby(backbone) / "teacher.json").values()]}
        for run in p.grid.runs(p.seeds.distill):
            if run.backbone == backbone:
                found.setdefault(GROUPS[run.variant], []).append(read(paths.result(run))["endpoint"])
        for model, results in found.items():
            cos, value = (np.concatenate([r[k] for r in results]) for k in ("cos", "value"))
            prompts = prompts_of(len(cos) // len(results), p.evaluation.noises, len(results))
            which = np.digitize(value, BINS)
            for k, name in enumerate(_bins()):
                inside = which == k
                if inside.sum() >= 10:
                    def mean(i, cos=cos, inside=inside):
                        return (cos * inside)[i].sum(-1) / np.maximum(inside[i].sum(-1), 1)

                    measured = {name: bootstrap(mean, prompts, p.report.bootstrap)}
                    rows += records(measured, backbone=backbone, model=model)
    return pd.DataFrame(rows, columns=["backbone", "model", "metric", "value", "low", "high"])


def _bins() -> list[str]:
    between = [f"{a:g} to {b:g}" for a, b in pairwise(BINS)]
    return [f"below {BINS[0]:g}", *between, f"{BINS[-1]:g} and more"]


def _steps(part: pd.DataFrame, spec: str) -> str:
    """Steps first, however many a backbone has."""
    table, last = pivot(part, "metric", spec=spec), [PATH, OWN]
    return table[[c for c in table if c not in last] + last].to_markdown(index=False)


def write(p: Params) -> pd.DataFrame:
    """reports/tables/chains.csv and .md; returns the long form."""
    long = chains(p)
    near, less = long["model"].str.startswith("teacher, "), long["model"].str.endswith(" − base")
    names = {"cos": "JVP cos ↑", "value": "value error, relative ↓", "value_mean": "value error, mean ↓"}
    text = ["# Where the cosine is lost", TEXT, "## JVP cosines, step by step", _steps(long[~near & ~less], ".3g")]
    if less.any():
        text += ["## Differences, paired", _steps(long[less], "+.3g")]
    text += ["## The teacher at noises nearby", NEAR,
             pivot(long[near], "metric").rename(columns=names).to_markdown(index=False)]
    same = alike(p)
    if len(same):
        table = pivot(same, "metric")
        text += ["## Noises of the same value error", ALIKE,
                 table[["backbone", "model", *(b for b in _bins() if b in table)]].to_markdown(index=False)]
    save(NAME, pd.concat([long, same]), text)
    return long
