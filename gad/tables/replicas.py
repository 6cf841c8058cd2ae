"""Students trained again from other seeds: what training itself varies by, and what GAD gains beyond that. A page
beside the paper's tables."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy.stats import chi2, norm, t

from .. import paths
from ..evaluation.geometry import SUMMARY, bootstrap, mean
from ..params import Params, Run
from .common import fit, fits, label, minus_base, pivot, prompts_of, read, records, save

NAME, ALL = "replicas", "all"
STUDENTS, DIFFERENCES, MEAN = "a student", "a variant − its base", "the mean of these"
TEXT = (
    "Not the paper's: ours. Elsewhere intervals know of prompts alone. Here students are trained again from other "
    "seeds, and measured on the same prompts and noises. Of one seed: 95 % bootstrap intervals over prompts, paired "
    "where two are compared. Of all: the mean over seeds, with a t interval whose variance is that over prompts plus "
    "training's, divided by the number of seeds; training's is pooled over all rows of its kind, which are taken to "
    "vary alike. What prompts and training do together is in both parts: such intervals are rather too wide."
)
COLUMNS = {
    "cos": "JVP cos ↑", "relative": "JVP error, relative ↓", "value": "value error, relative ↓",
    "fit": "fit ↑", "end": "trajectory error ↓",
}


class Column(NamedTuple):
    """One number of a student, or of two that are compared: a statistic of rows of points for each seed."""

    by_seed: dict[int, Callable]
    prompts: np.ndarray  # of the points

    @property
    def values(self) -> list[float]:
        return [float(f(np.arange(len(self.prompts)))) for f in self.by_seed.values()]

    def mean(self, rows):
        return np.mean([f(rows) for f in self.by_seed.values()], 0)


def points(result: dict) -> dict[str, tuple[np.ndarray, Callable]]:
    """What is compared, point by point, and how it is summed up."""
    found = {key: (np.array(result["endpoint"][key]), SUMMARY[key]) for key in ("cos", "relative", "value")}
    found["fit"] = np.array(fit(result)), mean
    if "trajectory" in result:
        found["end"] = np.array(result["trajectory"]["relative"])[:, -1], mean
    return found


def _columns(p: Params) -> dict[tuple[str, str, str], Column]:
    """By backbone, model and metric. Models named `… − …` are paired differences, of `end` relative ones."""
    again, found, columns = {tuple(run)[:3] for run in p.replicas}, {}, {}
    for run in p.runs() + p.replicas:
        if tuple(run)[:3] in again:
            found.setdefault(tuple(run)[:3], {})[run.seed] = points(read(paths.result(run)))
    for (backbone, paradigm, variant), seeds in found.items():
        base = found.get((backbone, paradigm, p.base_of(variant)), {}) if variant != "base" else {}
        for seed, own in seeds.items():
            for key, (x, summary) in own.items():
                prompts = prompts_of(len(x), p.evaluation.noises if key in SUMMARY else 1, 1)
                named = {label(Run(backbone, paradigm, variant, 0)): _of(x, summary)}
                if seed in base:
                    less_base = less(x, summary, base[seed][key][0], key == "end")
                    named[minus_base(p, paradigm, variant)] = less_base
                for model, statistic in named.items():
                    columns.setdefault((backbone, model, key), Column({}, prompts)).by_seed[seed] = statistic
    return columns


def _of(x, summary) -> Callable:
    return lambda i: summary(x[i])


def less(x, summary, base, relative=False) -> Callable:
    """A statistic of rows of points: `x` less `base`, summed up; or its change in units of that."""
    if relative:
        return lambda i: summary(x[i]) / summary(base[i]) - 1
    return lambda i: summary(x[i]) - summary(base[i])


def spread(columns: list[list[float]]) -> tuple[float, int]:
    """Standard deviation within `columns` of several numbers each, pooled, and its degrees of freedom."""
    dof = sum(len(c) - 1 for c in columns)
    squares = sum(np.square(np.array(c) - np.mean(c)).sum() for c in columns)
    return float(np.sqrt(squares / dof)) if dof else 0.0, dof


def error(interval: tuple[float, float, float]) -> float:
    """The standard error that a 95 % interval (value, low, high) speaks of."""
    return (interval[2] - interval[1]) / (2 * norm.isf(0.025))


def together(value: float, over_prompts: float, sd: float, dof: int, n: int) -> tuple[float, float, float]:
    """A mean of `n` trainings with its 95 % interval, of prompts (a standard error) and of training, whose standard
    deviation `sd` is known by `dof` degrees of freedom."""
    reach = float(t.isf(0.025, dof) * np.hypot(over_prompts, sd / n**0.5))
    return value, value - reach, value + reach


def training(p: Params) -> dict[str, tuple[float, int]]:
    """The standard deviation of a difference between trainings, and its degrees of freedom, by metric; nothing where no
    student was trained again."""
    columns = _columns(p)
    spreads = {metric: spread([c.values for c in _alike(columns, DIFFERENCES, metric).values()]) for metric in COLUMNS}
    return {metric: (sd, dof) for metric, (sd, dof) in spreads.items() if dof}


def _alike(columns: dict, which: str, metric: str) -> dict:
    """Those of one metric that are students, or differences."""
    kinds = {k: DIFFERENCES if " − " in k[1] else STUDENTS for k in columns}
    return {k: c for k, c in columns.items() if k[2] == metric and kinds[k] == which}


def replicas(p: Params) -> pd.DataFrame:
    """Long form: backbone, model, seed, metric, value, low, high. `seed`: a number, or ALL. Of ALL backbones: of the
    models STUDENTS and DIFFERENCES the standard deviation of a training, of MEAN the mean of all differences."""
    n, rows, columns = p.report.bootstrap, [], _columns(p)

    for which in (STUDENTS, DIFFERENCES):
        for metric in COLUMNS:
            own = _alike(columns, which, metric)
            sd, dof = spread([c.values for c in own.values()])
            if not dof:
                continue
            low, high = (sd * (dof / chi2.ppf(q, dof)) ** 0.5 for q in (0.975, 0.025))
            rows += records({metric: (sd, float(low), float(high))}, backbone=ALL, model=which, seed=ALL)
            for (backbone, model, _), column in own.items():
                at = {"backbone": backbone, "model": model}
                for seed, statistic in column.by_seed.items():
                    rows += records({metric: bootstrap(statistic, column.prompts, n)}, **at, seed=str(seed))
                if (seeds := len(column.by_seed)) > 1:
                    each = bootstrap(column.mean, column.prompts, n)
                    whole = together(each[0], error(each), sd, dof, seeds)
                    rows += records({metric: whole}, **at, seed=ALL)
            if which == DIFFERENCES:
                rows += records({metric: _mean([*own.values()], sd, dof, n)}, backbone=ALL, model=MEAN, seed=ALL)
    return pd.DataFrame(rows, columns=["backbone", "model", "seed", "metric", "value", "low", "high"])


def _mean(columns: list[Column], sd, dof, n) -> tuple[float, float, float]:
    """Of all columns alike: test prompts are the same for all backbones."""
    each = bootstrap(lambda i: np.mean([c.mean(i) for c in columns], 0), columns[0].prompts, n)
    return together(each[0], error(each), sd, dof, sum(len(c.by_seed) for c in columns))


def write(p: Params) -> pd.DataFrame:
    """reports/tables/replicas.csv and .md; returns the long form."""
    long, text = replicas(p), ["# Students trained again", TEXT]
    names = COLUMNS | {"fit": f"{fits(p)} ↑"}
    spreads, less, whole = (
        long["model"].isin([STUDENTS, DIFFERENCES]), long["model"].str.contains(f" − |{MEAN}"), long["seed"] == ALL
    )

    def by_seed(part, spec=".3g"):
        seeds = [f"seed {s}" if s != ALL else ALL for s in part["seed"]]
        return pivot(part.assign(seed=seeds), "seed", spec=spec).to_markdown(index=False)

    if not len(long):
        text.append("None was: `further.replicas` in params.yaml names no seeds.")
    else:
        text += [
            "## What training varies by",
            "Standard deviation between trainings that differ in their seed alone, with a 95 % interval (χ²).",
            pivot(long[spreads], "metric").rename(columns=names).to_markdown(index=False),
            "## JVP cosines", by_seed(long[~spreads & ~less & (long["metric"] == "cos")]),
        ]
    if (~spreads & less).any():
        changes = {k: v.removesuffix(" ↑").removesuffix(" ↓") for k, v in names.items()}
        changes["end"] += ", relative change"
        table = pivot(long[~spreads & less & whole], "metric", spec="+.3g").rename(columns=changes)
        text += [
            "## JVP cosines, differences", by_seed(long[~spreads & less & (long["metric"] == "cos")], "+.3g"),
            "## All seeds together, differences", table.to_markdown(index=False),
        ]
    save(NAME, long, text)
    return long
