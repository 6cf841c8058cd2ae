"""The tables, from the results of the grid's runs and no others: ids come from params.yaml, a missing one is an
error. Every number carries a 95 % bootstrap interval over prompts."""

import json
from pathlib import Path

import numpy as np
import pandas as pd

from . import paths
from .evaluation.geometry import bootstrap, spectral_kl
from .params import Params, Run

PAPER = pd.DataFrame(  # Table 1 of the paper, PixArt-α at full size
    [
        ("Teacher", 1.000, 1.000, 0.000, 0.000),
        ("TDM", 0.012, 0.98, 0.008, 0.0003),
        ("TDM + GAD", 0.014, 0.99, 0.006, 0.0002),
    ],
    columns=["model", "JVP cos ↑", "Jac norm → 1", "Spec KL ↓", "JVP MSE ↓"],
)
COLUMNS = {
    "cos": "JVP cos ↑", "ratio": "Jac norm → 1", "spectral_kl": "Spec KL ↓", "mse": "JVP MSE ↓",
    "relative": "JVP error, relative ↓", "value": "value error, relative ↓", "scene": "scene accuracy ↑",
    "colour_count": "colours and count ↑", "share": "of its teacher's scenes",
}


DIFFERENCES = ("cos", "ratio", "relative", "value")
VARIANTS = {
    "base": "", "gad": " + GAD", "map": " + GAD, map form", "every4": " + GAD each 4th step",
    "unrelated": " + unrelated tangents", "augmentation": " + noise augmentation", "rkd": " + RKD",
    "similarity": " + SP", "longer": ", longer",
}


# How points are summed up. A few noises lie where the map is all but discontinuous, and their huge tangents would
# be all that a mean of norms or squares shows.
SUMMARY = {
    "cos": np.mean,
    "ratio": lambda x: np.exp(np.mean(np.log(x))),
    "mse": np.median,
    "relative": np.median,
    "value": np.median,
}


def read(path: Path) -> dict:
    if not path.exists():
        raise FileNotFoundError(f"{path.relative_to(paths.ROOT)} is missing: run its stage, `dvc repro`")
    return json.loads(path.read_text())


def label(run: Run) -> str:
    name = {"sid": "SiD", "swiftbrush": "SwiftBrush"}.get(run.paradigm, run.paradigm.upper())
    return name + VARIANTS.get(run.variant, f" + {run.variant}")


def cell(value: float, low: float, high: float, spec: str = ".3g") -> str:
    """A number with its interval, as tables show it."""
    return f"{value:{spec}} [{low:{spec}}, {high:{spec}}]"


def _prompts(points: int, noises: int, seeds: int) -> np.ndarray:
    """The prompt of each of `seeds` runs' points, `noises` a prompt."""
    return np.tile(np.arange(points) // noises, seeds)


def measure(rows: list[dict], n: int, noises: int) -> dict[str, tuple[float, float, float]]:
    """Each metric of one model as (value, low, high). `rows`: one result per seed, over the same points, `noises`
    of them a prompt."""
    prompts = _prompts(len(rows[0]["cos"]), noises, len(rows))
    out = {}
    for key, summary in SUMMARY.items():
        x = np.concatenate([r[key] for r in rows])
        out[key] = bootstrap(lambda i, x=x, summary=summary: summary(x[i]), prompts, n)
    s, t = (np.concatenate([r[k] for r in rows]) for k in ("spectrum", "teacher_spectrum"))
    out["spectral_kl"] = bootstrap(lambda i: spectral_kl(s[i], t[i]), prompts, n)
    return out


def accuracy(results: list[dict], n: int) -> dict[str, tuple[float, float, float]]:
    out = {}
    for key in ("scene", "colour_count"):
        x = np.concatenate([r["quality"][key] for r in results])
        prompts = _prompts(len(x) // len(results), 1, len(results))
        out[key] = bootstrap(lambda i, x=x: x[i].mean(), prompts, n)
    return out


def share(results: list[dict], teacher: dict, n: int) -> dict[str, tuple[float, float, float]]:
    """Scene accuracy in units of the teacher's on the same prompts and noises; nothing where those are not the same."""
    x, its = np.concatenate([r["quality"]["scene"] for r in results]), np.array(teacher["quality"]["scene"])
    if len(x) != len(its) * len(results) or not its.any():
        return {}
    prompts, its = _prompts(len(its), 1, len(results)), np.tile(its, len(results))
    return {"share": bootstrap(lambda i: x[i].mean() / max(its[i].mean(), 1e-9), prompts, n)}


def models(p: Params, backbone: str) -> dict[tuple[str, str], list[dict]]:
    """Results of a backbone's students by (paradigm, variant), one entry a seed."""
    out: dict[tuple[str, str], list[dict]] = {}
    for run in p.runs():
        if run.backbone == backbone:
            out.setdefault((run.paradigm, run.variant), []).append(read(paths.result(run)))
    return out


def table1(p: Params) -> pd.DataFrame:
    """Long form: backbone, model, map, metric, value, low, high; each variant minus its base, and GAD minus
    each control, are paired over prompts."""
    n, noises, rows = p.report.bootstrap, p.evaluation.noises, []

    def add(backbone, model, where, measured):
        rows.extend(
            {"backbone": backbone, "model": model, "map": where, "metric": k, "value": v, "low": a, "high": b}
            for k, (v, a, b) in measured.items()
        )

    for backbone in p.grid.backbones:
        for name, floor in read(paths.diagnosis(backbone) / "floors.json").items():
            add(backbone, name, "endpoint", measure([floor], n, noises))
        teacher, found = read(paths.teacher_metrics(backbone)), models(p, backbone)
        add(backbone, "teacher", "images", accuracy([teacher], n))
        for (paradigm, variant), results in found.items():
            name = label(Run(backbone, paradigm, variant, 0))
            add(backbone, name, "endpoint", measure([r["endpoint"] for r in results], n, noises))
            for level in results[0]["local"]:
                add(backbone, name, f"local t={level}", measure([r["local"][level] for r in results], n, noises))
            add(backbone, name, "images", accuracy(results, n) | share(results, teacher, n))
            if variant == "base" and "hybrid" in results[0]:
                hybrid, mixed = [r["hybrid"] for r in results], f"{name}, first step by the teacher"
                add(backbone, mixed, "endpoint", measure([r["endpoint"] for r in hybrid], n, noises))
                add(backbone, mixed, "images", accuracy(hybrid, n) | share(hybrid, teacher, n))
            if variant != "base" and (paradigm, "base") in found:
                base = found[paradigm, "base"]
                add(backbone, f"{name} − base", "difference", difference(base, results, n, noises))
            if variant in p.controls and (paradigm, "gad") in found:
                gad = found[paradigm, "gad"]
                add(backbone, f"{label(Run(backbone, paradigm, 'gad', 0))} − ({name})", "difference",
                    difference(results, gad, n, noises))
    return pd.DataFrame(rows)


def difference(base: list[dict], gad: list[dict], n: int, noises: int) -> dict[str, tuple[float, float, float]]:
    """A variant minus its base on the same prompts and noises: the difference of the summaries, resampled together."""
    out = {}
    for where, each, keys in (
        ("endpoint", noises, DIFFERENCES), ("quality", 1, ("scene", "colour_count"))
    ):
        for key in keys:
            b, g = (np.concatenate([r[where][key] for r in rows]) for rows in (base, gad))
            prompts = _prompts(len(b) // len(base), each, len(base))
            summary = SUMMARY.get(key, np.mean)
            out[key] = bootstrap(lambda i, b=b, g=g, summary=summary: summary(g[i]) - summary(b[i]), prompts, n)
    return out


def wide(long: pd.DataFrame, maps: list[str], metrics: list[str]) -> pd.DataFrame:
    """One row a model, cells `value [low, high]`."""
    part = long[long["map"].isin(maps) & long["metric"].isin(metrics)].copy()
    part["cell"] = [cell(*x) for x in part[["value", "low", "high"]].to_numpy()]
    index = ["backbone", "map", "model"] if len(maps) > 1 and maps[0].startswith("local") else ["backbone", "model"]
    order = part[index].drop_duplicates()
    table = part.pivot(index=index, columns="metric", values="cell").loc[list(map(tuple, order.to_numpy()))]
    return table[[m for m in metrics if m in table]].rename(columns=COLUMNS).fillna("–").reset_index()


def _weighted(p: Params) -> str:
    """What λ multiplies, since it is not always the paper's."""
    if p.gad.form in ("map", "step") and p.gad.normalise:
        error = "the relative squared error of responses"
        return (f"log(1 + {error})" if p.gad.robust else error) + ", which no λ of the paper's corresponds to"
    return f"responses divided by h; the paper's λ, of differences not divided, is λ / h² = {p.gad.lam / p.gad.h**2:g}"


def write(p: Params) -> dict[str, pd.DataFrame]:
    """reports/tables/*, reports/metrics.json; returns the tables in long form, by name."""
    paths.TABLES.mkdir(parents=True, exist_ok=True)
    long = table1(p)
    long.to_csv(paths.TABLES / "table1.csv", index=False, float_format="%.5g", lineterminator="\n")
    geometry, quality = ["cos", "ratio", "spectral_kl", "mse", "relative", "value"], ["scene", "share", "colour_count"]
    levels = sorted({m for m in long["map"] if m.startswith("local")}, reverse=True)
    text = [
        "# Table 1, geometry",
        f"Miniature teachers and students; exact JVPs in fp32, {p.evaluation.prompts} test prompts, "
        f"{p.evaluation.noises} noise(s) each; 95 % bootstrap intervals over prompts; distillation seeds "
        f"{', '.join(map(str, p.seeds.distill))}. Cosines are means, norm ratios geometric means, "
        "errors medians over noises: a few noises lie where the map is all but discontinuous. "
        "A teacher compared with itself is 1, 1, 0, 0 by definition.",
        f"GAD: form `{p.gad.form}`, h = {p.gad.h}, λ = {p.gad.lam} on {_weighted(p)}.",
        "## Endpoint map z → x0, and images",
        wide(long, ["endpoint", "images"], [*geometry, *quality]).to_markdown(index=False),
        "## Differences, paired",
        wide(long, ["difference"], [*DIFFERENCES, "scene", "colour_count"]).to_markdown(index=False),
        "## Local map x_t → x̂0", wide(long, levels, geometry).to_markdown(index=False),
        "## The paper's Table 1 (PixArt-α at full size; not comparable in scale)", PAPER.to_markdown(index=False),
    ]
    (paths.TABLES / "table1.md").write_text("\n\n".join(text) + "\n")
    grid = {label(r) for r in p.grid.runs(p.seeds.distill)}
    summary = wide(long[long["model"].isin(grid)], ["endpoint", "images"],
                   ["cos", "ratio", "spectral_kl", "relative", "scene"]).to_markdown(index=False) + "\n"
    (paths.TABLES / "summary.md").write_text(summary)
    trajectories = _write_table4(p)
    teachers = _teachers(p)
    metrics = {"teachers": teachers, "students": {}}
    for row in long[long["map"].isin(["endpoint", "images", "difference"])].itertuples():
        of = metrics["students"].setdefault(row.backbone, {}).setdefault(row.model, {})
        of[row.metric] = float(f"{row.value:.4g}")
    paths.METRICS.write_text(json.dumps(metrics, indent=2, ensure_ascii=False) + "\n")
    return {"table1": long, "table4": trajectories}


def _teachers(p: Params) -> dict[str, dict]:
    """reports/tables/teachers.*: scene accuracies with intervals over prompts, and how far layouts spread."""
    rows, cells, found = [], [], {}
    for backbone in p.grid.backbones:
        made = read(paths.teacher_metrics(backbone))
        row, shown = {"backbone": backbone}, {"backbone": backbone}
        for key, interval in accuracy([made], p.report.bootstrap).items():
            row |= dict(zip((key, f"{key}_low", f"{key}_high"), interval, strict=True))
            shown[COLUMNS[key]] = cell(*interval, ".3f")
        row |= {k: made[k] for k in ("spread", "spread_world")}
        row["spread_share"] = row["spread"] / row["spread_world"]
        shown |= {"spread, px": f"{row['spread']:.1f}", "the world's": f"{row['spread_world']:.1f}",
                  "share": f"{row['spread_share']:.2f}"}
        rows.append(row)
        cells.append(shown)
        found[backbone] = {k: round(v, 4) for k, v in row.items() if k != "backbone"}
    pd.DataFrame(rows).to_csv(paths.TABLES / "teachers.csv", index=False, float_format="%.4g", lineterminator="\n")
    text = (
        f"# Teachers\n\nOn {p.teacher.prompts} test prompts, by the detector, with 95 % bootstrap intervals over "
        "prompts; spread: of the first object's centre over seeds of one prompt, beside the world's.\n\n"
    )
    (paths.TABLES / "teachers.md").write_text(text + pd.DataFrame(cells).to_markdown(index=False) + "\n")
    return found


PAPER4 = "The paper (PixArt-α, 200 unseen prompts, norm not known), at t = 0: 0.491 without and 0.427 with GAD, −13 %."


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
            prompts = _prompts(len(errors["rmse"]) // len(results), 1, len(results))
            for k in range(errors["rmse"].shape[1]):
                stats = {m: bootstrap(lambda i, x=x[:, k]: x[i].mean(), prompts, n) for m, x in errors.items()}
                if variant != "base" and base is not None:
                    a, b = errors["relative"][:, k], base[:, k]
                    stats["change"] = bootstrap(lambda i, a=a, b=b: a[i].mean() / b[i].mean() - 1, prompts, n)
                rows += [{"backbone": backbone, "model": name, "step": k + 1, "metric": m, "value": v, "low": x,
                          "high": y} for m, (v, x, y) in stats.items()]
    return pd.DataFrame(rows)


def _trajectories(results, key) -> np.ndarray:
    return np.concatenate([np.array(r["trajectory"][key]) for r in results])


def _write_table4(p: Params) -> pd.DataFrame:
    long = table4(p)
    long.to_csv(paths.TABLES / "table4.csv", index=False, float_format="%.5g", lineterminator="\n")
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
        spec = "+.1%" if metric == "change" else ".3g"
        cells = [cell(*x, spec) for x in part[["value", "low", "high"]].to_numpy()]
        part = part.assign(cell=cells, step=[f"after step {k}" for k in part["step"]])
        order = part[["backbone", "model"]].drop_duplicates()
        if len(order):
            table = part.pivot(index=["backbone", "model"], columns="step", values="cell")
            table = table.loc[list(map(tuple, order.to_numpy()))].reset_index()
            text += [f"## {title}", table.to_markdown(index=False)]
    (paths.TABLES / "table4.md").write_text("\n\n".join([*text, PAPER4]) + "\n")
    return long
