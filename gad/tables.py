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
    "colour_count": "colours and count ↑",
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
    return name + (" + GAD" if run.variant == "gad" else "")


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


def models(p: Params, backbone: str) -> dict[tuple[str, str], list[dict]]:
    """Results of a backbone's students by (paradigm, variant), one entry a seed."""
    out: dict[tuple[str, str], list[dict]] = {}
    for run in p.runs():
        if run.backbone == backbone:
            out.setdefault((run.paradigm, run.variant), []).append(read(paths.result(run)))
    return out


def table1(p: Params) -> pd.DataFrame:
    """Long form: backbone, model, map, metric, value, low, high; then GAD minus base, paired over prompts."""
    n, noises, rows = p.report.bootstrap, p.evaluation.noises, []

    def add(backbone, model, where, measured):
        rows.extend(
            {"backbone": backbone, "model": model, "map": where, "metric": k, "value": v, "low": a, "high": b}
            for k, (v, a, b) in measured.items()
        )

    for backbone in p.grid.backbones:
        for name, floor in read(paths.diagnosis(backbone) / "floors.json").items():
            add(backbone, name, "endpoint", measure([floor], n, noises))
        found = models(p, backbone)
        for (paradigm, variant), results in found.items():
            name = label(Run(backbone, paradigm, variant, 0))
            add(backbone, name, "endpoint", measure([r["endpoint"] for r in results], n, noises))
            for level in results[0]["local"]:
                add(backbone, name, f"local t={level}", measure([r["local"][level] for r in results], n, noises))
            add(backbone, name, "images", accuracy(results, n))
        for paradigm in p.grid.paradigms:
            if (paradigm, "base") in found and (paradigm, "gad") in found:
                base, gad = found[paradigm, "base"], found[paradigm, "gad"]
                add(backbone, f"{paradigm.upper()}: GAD − base", "difference", difference(base, gad, n, noises))
    return pd.DataFrame(rows)


def difference(base: list[dict], gad: list[dict], n: int, noises: int) -> dict[str, tuple[float, float, float]]:
    """GAD minus base on the same prompts and noises: the difference of the summaries, resampled together."""
    out = {}
    for where, each, keys in (
        ("endpoint", noises, ("cos", "ratio", "relative", "value")), ("quality", 1, ("scene", "colour_count"))
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
    part["cell"] = [f"{v:.3g} [{a:.3g}, {b:.3g}]" for v, a, b in part[["value", "low", "high"]].to_numpy()]
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


def write(p: Params) -> pd.DataFrame:
    """reports/tables/*, reports/metrics.json; returns Table 1 in long form."""
    paths.TABLES.mkdir(parents=True, exist_ok=True)
    long = table1(p)
    long.to_csv(paths.TABLES / "table1.csv", index=False, float_format="%.5g", lineterminator="\n")
    geometry, quality = ["cos", "ratio", "spectral_kl", "mse", "relative", "value"], ["scene", "colour_count"]
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
        "## GAD minus base, paired",
        wide(long, ["difference"], ["cos", "ratio", "relative", "value", *quality]).to_markdown(index=False),
        "## Local map x_t → x̂0", wide(long, levels, geometry).to_markdown(index=False),
        "## The paper's Table 1 (PixArt-α at full size; not comparable in scale)", PAPER.to_markdown(index=False),
    ]
    (paths.TABLES / "table1.md").write_text("\n\n".join(text) + "\n")
    summary = wide(long[long["model"].isin({label(r) for r in p.runs()})], ["endpoint", "images"],
                   ["cos", "ratio", "spectral_kl", "relative", "scene"]).to_markdown(index=False) + "\n"
    (paths.TABLES / "summary.md").write_text(summary)
    _into_readme(summary)
    teachers = pd.DataFrame([{"backbone": b} | read(paths.teacher_metrics(b)) for b in p.grid.backbones])
    teachers["spread / world's"] = teachers["spread"] / teachers["spread_world"]
    teachers.to_csv(paths.TABLES / "teachers.csv", index=False, float_format="%.4g", lineterminator="\n")
    (paths.TABLES / "teachers.md").write_text(
        f"# Teachers\n\nOn {p.teacher.prompts} test prompts, by the detector; spread in pixels over seeds of one "
        "prompt.\n\n"
        + teachers.to_markdown(index=False, floatfmt=".3f") + "\n"
    )
    metrics = {"teachers": {r["backbone"]: {k: round(v, 4) for k, v in r.items() if k != "backbone"}
                            for r in teachers.to_dict("records")}, "students": {}}
    for row in long[long["map"].isin(["endpoint", "images", "difference"])].itertuples():
        of = metrics["students"].setdefault(row.backbone, {}).setdefault(row.model, {})
        of[row.metric] = float(f"{row.value:.4g}")
    paths.METRICS.write_text(json.dumps(metrics, indent=2, ensure_ascii=False) + "\n")
    return long


def _into_readme(table: str, begin="<!-- summary -->\n", end="<!-- /summary -->"):
    """The README shows the table as it is made, never typed in."""
    path = paths.ROOT / "README.md"
    text = path.read_text() if path.exists() else ""
    if begin in text:
        head, rest = text.split(begin)
        path.write_text(head + begin + table + end + rest.split(end)[1])
