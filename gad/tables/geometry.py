"""Table 1: exact tangents, and how well models draw."""

import numpy as np
import pandas as pd

from .. import paths
from ..evaluation.geometry import OTHERS, SUMMARY, bootstrap, mean, spectral_kl
from ..params import Params, Run
from .common import HYBRID, distinct, label, minus, minus_base, models, pivot, prompts_of, read, records, save, worlds

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
    "off": "Jac norm off 1 ↓", "relative": "JVP error, relative ↓", "value": "value error, relative ↓",
    "value_mean": "value error, mean ↓",
    "scene": "scene accuracy ↑", "colour_count": "colours and count ↑", "share": "of its teacher's scenes",
    "pickscore": "PickScore ↑", "openclip": "CLIP ↑",
}
LEAST = 1e-6  # a norm of which a logarithm is taken: of a student that does not respond at all
QUALITY = ("scene", "share", "colour_count", "pickscore", "openclip")
DIFFERENCES = ("cos", "off", "spectral_kl", "mse", "relative", "value")


def _off(x):
    """How far norms are from the teacher's, either way."""
    return np.abs(mean(np.log(np.maximum(x, LEAST))))


def measure(rows: list[dict], n: int, noises: int) -> dict[str, tuple[float, float, float]]:
    """Each metric of one model as (value, low, high). `rows`: one result per seed, over the same points, `noises`
    of them a prompt."""
    prompts = prompts_of(len(rows[0]["cos"]), noises, len(rows))
    out = {}
    for key, summary in SUMMARY.items():
        x = np.concatenate([r[key] for r in rows])
        out[key] = bootstrap(lambda i, x=x, summary=summary: summary(x[i]), prompts, n)
    values = np.concatenate([r["value"] for r in rows])
    out["value_mean"] = bootstrap(lambda i: mean(values[i]), prompts, n)
    s, t = (np.concatenate([r[k] for r in rows]) for k in ("spectrum", "teacher_spectrum"))
    value, low, high = bootstrap(lambda i: spectral_kl(s[i], t[i]), prompts, n, centred=True)
    return out | {"spectral_kl": (value, max(low, 0.0), high)}


def accuracy(results: list[dict], n: int) -> dict[str, tuple[float, float, float]]:
    out = {}
    for key in results[0]["quality"]:
        x = np.concatenate([r["quality"][key] for r in results])
        prompts = prompts_of(len(x) // len(results), 1, len(results))
        out[key] = bootstrap(lambda i, x=x: x[i].mean(-1), prompts, n)
    return out


def share(results: list[dict], teacher: dict, n: int) -> dict[str, tuple[float, float, float]]:
    """Scene accuracy in units of the teacher's on the same prompts and noises; nothing where those are not the same, or
    it is not of the miniature world."""
    if "scene" not in teacher["quality"]:
        return {}
    x, its = np.concatenate([r["quality"]["scene"] for r in results]), np.array(teacher["quality"]["scene"])
    if len(x) != len(its) * len(results) or not its.any():
        return {}
    prompts, its = prompts_of(len(its), 1, len(results)), np.tile(its, len(results))
    return {"share": bootstrap(lambda i: x[i].mean(-1) / np.maximum(its[i].mean(-1), 1e-9), prompts, n)}


def table1(p: Params) -> pd.DataFrame:
    """Long form: backbone, model, map, metric, value, low, high; each variant minus its base, and GAD minus each
    control and minus the base with the hybrid sampler, are paired over prompts."""
    n, noises, rows = p.report.bootstrap, p.evaluation.noises, []

    def add(backbone, model, where, measured):
        rows.extend(records(measured, backbone=backbone, model=model, map=where))

    for backbone in p.grid.backbones:
        for name, floor in read(paths.diagnosis(backbone) / "floors.json").items():
            measured = measure([floor], n, noises)
            if name == OTHERS:
                del measured["spectral_kl"]  # the teacher's own spectra, in another order
            add(backbone, name, "endpoint", measured)
            for level, row in floor.get("local", {}).items():
                add(backbone, name, f"local t={level}", measure([row], n, noises))
        teacher, found = read(paths.teacher_metrics(backbone)), models(p, backbone)
        add(backbone, "teacher", "images", accuracy([teacher], n))
        for (paradigm, variant), results in found.items():
            name, gad = (label(Run(backbone, paradigm, v, 0)) for v in (variant, "gad"))
            add(backbone, name, "endpoint", measure([r["endpoint"] for r in results], n, noises))
            for level in results[0]["local"]:
                add(backbone, name, f"local t={level}", measure([r["local"][level] for r in results], n, noises))
            add(backbone, name, "images", accuracy(results, n) | share(results, teacher, n))
            if variant == "base" and "hybrid" in results[0]:
                hybrid, mixed = [r["hybrid"] for r in results], name + HYBRID
                if (paradigm, "gad") in found:
                    add(backbone, minus(gad, mixed), "difference",
                        difference(hybrid, found[paradigm, "gad"], n, noises))
                add(backbone, mixed, "endpoint", measure([r["endpoint"] for r in hybrid], n, noises))
                add(backbone, mixed, "images", accuracy(hybrid, n) | share(hybrid, teacher, n))
            base = found.get((paradigm, p.base_of(variant)))
            if variant != "base" and base:
                add(backbone, minus_base(p, paradigm, variant), "difference", difference(base, results, n, noises))
            if variant in p.controls and (paradigm, "gad") in found:
                add(backbone, minus(gad, name), "difference", difference(results, found[paradigm, "gad"], n, noises))
    return pd.DataFrame(rows)


def difference(base: list[dict], gad: list[dict], n: int, noises: int) -> dict[str, tuple[float, float, float]]:
    """A variant minus its base on the same prompts and noises: the difference of the summaries, resampled together."""
    out = {}
    own = {key: ("endpoint", key, SUMMARY[key]) for key in DIFFERENCES if key in SUMMARY}
    own |= {"off": ("endpoint", "ratio", _off)} | {key: ("quality", key, mean) for key in base[0]["quality"]}
    for name, (where, key, summary) in own.items():
        b, g = (np.concatenate([r[where][key] for r in rows]) for rows in (base, gad))
        prompts = prompts_of(len(b) // len(base), noises if where == "endpoint" else 1, len(base))
        out[name] = bootstrap(lambda i, b=b, g=g, summary=summary: summary(g[i]) - summary(b[i]), prompts, n)
    b, g, t = (
        np.concatenate([r["endpoint"][key] for r in rows])
        for rows, key in ((base, "spectrum"), (gad, "spectrum"), (gad, "teacher_spectrum"))
    )
    prompts = prompts_of(len(b) // len(base), noises, len(base))
    out["spectral_kl"] = bootstrap(
        lambda i: spectral_kl(g[i], t[i]) - spectral_kl(b[i], t[i]), prompts, n, centred=True
    )
    return out


def _short(long: pd.DataFrame, p: Params, more: dict | None = None) -> list[str]:
    """The section on students that draw fewer of their teacher's scenes than a usable one, and what was tried of it:
    by this table or by `more`, the shares of Table 3 by (backbone, model)."""
    usable, more = p.report.usable, more or {}
    there = (long["map"] == "images") & (long["metric"] == "share")
    by_more = pd.Series([more.get(at, 1.0) for at in zip(long["backbone"], long["model"], strict=True)], long.index)
    part = long[there & (np.minimum(long["value"], by_more) < usable)]
    rows = [*zip(part["backbone"], part["model"], strict=True)]
    if not len(part):
        return []
    runs = {(run.backbone, label(run)): run for run in p.runs()}
    shown = pivot(part, "metric").rename(columns=COLUMNS)
    shown["whole interval below"] = np.where(part["high"] < usable, "yes", "no")
    shown["by Table 3"] = [f"{more[row]:.3g}" if row in more else "–" for row in rows]
    shares = long[there].set_index(["backbone", "model"])["value"]
    base = [runs.get((b, m.removesuffix(HYBRID))) for b, m in rows]
    shown["its base at other settings"] = [_others(shares[b], run, p) for (b, _), run in zip(rows, base, strict=True)]
    shown["its base in trials"] = [_tried(run) for run in base]
    return [
        f"## Students that draw less than {usable:.0%} of their teacher's scenes",
        f"At {usable:.0%} (`report.usable`) a student counts as usable: here are those that draw less by this table or "
        "by Table 3, of more images. In the last columns the same share of its paradigm without GAD at other settings: "
        "of this table, and in trials, as it is and otherwise, on other prompts and noises (`reports/tuning.md`; of an "
        "earlier teacher are left out). They say whether it is for want of steps or of another rate that these "
        "students fall short.",
        shown.to_markdown(index=False),
    ]


def _others(shares: pd.Series, run: Run | None, p: Params) -> str:
    """The shares of a run's paradigm without a term, by what else is said of them."""
    plain = [v for v in p.variants if run and v != run.variant and not p.term(v)]
    names = {v: label(Run(run.backbone, run.paradigm, v, run.seed)) for v in plain}
    told = [f"{name.partition(', ')[2] or 'as it is'}: {shares[name]:.2f}" for name in names.values() if name in shares]
    return ", ".join(told) or "–"


def _tried(run: Run | None) -> str:
    """Each trial of a run's backbone and paradigm without GAD: its settings, and the share of its teacher's scenes."""
    path = paths.REPORTS / "tuning.csv"
    if run is None or not path.exists():
        return "–"
    of = pd.read_csv(path, keep_default_na=False)
    of = of[of["teacher"] == of.groupby("backbone")["teacher"].transform("max")]  # an earlier one drew less well
    of = of[(of["backbone"] == run.backbone) & (of["paradigm"] == run.paradigm) & (of["variant"] == "base")]
    found = of["scene"] / of["teacher"]
    told = of["settings"].str.replace(r"[\w.]+\.(?=\w+=)", "", regex=True).where(of["settings"] != "", "as it is")
    return ", ".join(f"{what}: {x:.2f}" for what, x in zip(told, found, strict=True)) or "–"


def wide(long: pd.DataFrame, maps: list[str], metrics: list[str], spec: str = ".3g") -> pd.DataFrame:
    """One row a model, cells `value [low, high]`."""
    part = long[long["map"].isin(maps) & long["metric"].isin(metrics)]
    index = ["backbone", "map", "model"] if len(maps) > 1 and maps[0].startswith("local") else ["backbone", "model"]
    table = pivot(part, "metric", index, spec)
    return table[index + [m for m in metrics if m in table]].rename(columns=COLUMNS)


def _weighted(p: Params) -> str:
    """What λ multiplies, since it is not always the paper's."""
    if p.gad.form in ("map", "step") and p.gad.normalise:
        error = "the relative squared error of responses"
        return (f"log(1 + {error})" if p.gad.robust else error) + ", which no λ of the paper's corresponds to"
    return ("the mean square of responses divided by h; the paper's λ, of differences not divided, is "
            f"λ / h² = {p.gad.lam / p.gad.h**2:g}, over the number of elements if their squares are summed")


def write(p: Params, shares: dict | None = None) -> pd.DataFrame:
    """reports/tables/table1.* and summary.md; returns the long form. `shares`: of the teacher's scenes, by Table 3."""
    long = table1(p)
    geometry = ["cos", "ratio", "spectral_kl", "mse", "relative", "value"]
    levels = sorted({m for m in long["map"] if m.startswith("local")}, reverse=True)
    there = worlds(p)
    what = "Miniature teachers and students; exact" if there == {"mini"} else "Exact"
    drawn = "the world" if there == {"mini"} else "the miniature world"
    recur = f" (as {drawn} draws them: {distinct(p, 'test')} different ones)" if "mini" in there else ""
    text = [
        "# Table 1, geometry",
        f"{what} JVPs in fp32, {p.evaluation.prompts} test prompts{recur}, "
        f"{p.evaluation.noises} noise{'s' if p.evaluation.noises > 1 else ''} each; 95 % bootstrap intervals over "
        f"prompts; {p.seeds.told}. Cosines are means, norm ratios geometric means, errors medians over noises: a few "
        "noises lie where the map is all but discontinuous, and rule means (of the value error that stands too). Spec "
        "KL: of tangents' power by radial frequency, averaged over noises, the divergence of the student's from the "
        "teacher's; its intervals are the spread of resampled prompts about the value, cut at 0. How the paper "
        "measures any of these is not published: the definitions are ours. "
        "A teacher compared with itself is 1, 1, 0, 0 by definition. Rows before the students are floors and "
        "ceilings: the teacher at another guidance scale or in half its steps; the untrained student, which is the "
        "teacher's own network in the student's steps without guidance; the teacher's own of other noises and prompts. "
        "JVP MSE is per element of a latent, and not on the paper's scale.",
        f"GAD: form `{p.gad.form}`, h = {p.gad.h}, λ = {p.gad.lam} on {_weighted(p)}.",
        "## Endpoint map z → x0, and images",
        wide(long, ["endpoint", "images"], [*geometry, "value_mean", *QUALITY]).to_markdown(index=False),
        "## The paper's Table 1 (PixArt-α at full size; not comparable in scale)", PAPER.to_markdown(index=False),
        "## Differences, paired",
        "Jac norm off 1: by how much the log of the ratio of norms, averaged over noises, is off 0, either way.",
        wide(long, ["difference"], [*DIFFERENCES, *QUALITY], "+.3g").to_markdown(index=False),
        *_short(long, p, shares),
        "## Local map x_t → x̂0", wide(long, levels, geometry).to_markdown(index=False),
    ]
    save("table1", long, text)
    grid = {label(r) for r in p.grid.runs(p.seeds.distill)}
    between = ("teacher, CFG + 1", "untrained student")  # a ceiling and a floor
    summary = wide(long[long["model"].isin(grid.union(between))], ["endpoint", "images"],
                   ["cos", "ratio", "spectral_kl", "relative", "scene", "pickscore"]).to_markdown(index=False) + "\n"
    (paths.TABLES / "summary.md").write_text(summary)
    return long
