"""Tables 2, 3, 5 and 6 and Figure 5's numbers: what a model's noise is good for."""

from collections.abc import Callable

import numpy as np
import pandas as pd

from .. import paths
from ..evaluation.geometry import bootstrap, cut
from ..params import Params, Run
from .common import HYBRID, grouped, label, read, records

KINDS = {"linear": "linear", "cnn": "CNN"}
TRACKED = {  # in reports/metrics.json, for `dvc metrics diff`
    "teacher, linear, top-1": "seed_top1", "self, linear, top-1": "seed_top1_self", "CLIP": "clip",
    "scene accuracy": "scene_table3", "FID": "fid", "KID": "kid",
    "guided, AP": "layout_ap", "guided, AP50": "layout_ap50", "guided, IoU": "layout_iou",
    "mean shift": "noise_query_shift", "mean ρ": "noise_query_rho", "Vendi": "vendi", "layout Vendi": "layout_vendi",
}


# Each result as lists over prompts, or as (value, bootstrap draws, number of prompts), by the name a table shows.


def _table2(r: dict) -> dict:
    sides = {s: r["seeds"][s] for s in ("self", "teacher") if s in r["seeds"]}
    named = {
        f"{side}, {KINDS[kind]}, top-{k}": found[f"top{k}"]
        for side, kinds in sides.items() for kind, found in kinds.items() for k in (1, 5)
    }
    return named | {f"of {n} prompts": found["top1"] for n, found in r["seeds"]["prompts"].items()}


QUALITY = {"clip": "CLIP", "pickscore": "PickScore", "scene": "scene accuracy", "colour_count": "colours and count"}
RIGHT, SHARE = QUALITY["scene"], "of its teacher's scenes"
DISTANCES = {"fid": "FID", "kid": "KID"}
DIVERSITY = {
    "vendi": "Vendi", "layout_vendi": "layout Vendi", "coverage": "coverage", "whole": "images with all colours",
}
LAYOUT = {"iou": "IoU", "centre": "centre, px", "clip": "CLIP", "pickscore": "PickScore", "scene": "scene accuracy"}
NAMED = ("free", "shuffled", "guided")  # settings of Table 5; others are sizes of a move
FLOORS, EFFECT = ("free", "shuffled"), ("AP", "AP50", "centre, px")  # what guidance is held against, and in what


def _named(found: dict, names: dict) -> dict:
    """What of `names` was measured: not all of it is, of either world."""
    return {name: found[key] for key, name in names.items() if key in found}


def _table3(r: dict) -> dict:
    d = r["distance"]
    prompts = len(r["quality"]["clip"])
    distances = {name: (d[k], d[f"{k}_draws"], prompts) for k, name in DISTANCES.items() if k in d}
    return _named(r["quality"], QUALITY) | distances


def _table5(r: dict) -> dict:
    out = {}
    for how, found in r["layout"].items():
        how = how if how in NAMED else f"RMS {how}"
        out |= {f"{how}, {k.upper()}": (found[k], found[f"{k}_draws"], len(found["clip"])) for k in ("ap", "ap50")}
        out |= {f"{how}, {name}": x for name, x in _named(found, LAYOUT).items()}
    for how in FLOORS:
        out |= {f"guided − {how}, {k}": less(out[f"guided, {k}"], out[f"{how}, {k}"]) for k in EFFECT}
    return out


def _table6(r: dict) -> dict:
    q = r["query"]
    out = {f"shift, {k}": v for k, v in q["shift"].items()} | {f"ρ, {k}": v for k, v in q["rho"].items()}
    for name, part in (("shift", q["shift"]), ("ρ", q["rho"])):
        out[f"mean {name}"] = np.nanmean(np.array(list(part.values()), float), 0)
    return out | {"CLIP, nearest less usual": q["clip_gain"]}


def _figure5(r: dict) -> dict:
    return _named(r["diversity"], DIVERSITY) | {"CLIP": r["quality"]["clip"]}


TABLES: dict[str, tuple[str, Callable[[dict], dict]]] = {  # with the part of a result that each is of: not all have all
    "table2": ("seeds", _table2), "table3": ("quality", _table3), "table5": ("layout", _table5),
    "table6": ("query", _table6), "figure5": ("diversity", _figure5),
}


def merged(results: list):
    """The mean of equal structures over distillation seeds, number by number; strings are the first's."""
    first = results[0]
    if isinstance(first, dict):
        return {k: merged([r[k] for r in results]) for k in first}
    if isinstance(first, list):
        return np.mean(np.array(results, float), 0)
    return float(np.mean(results)) if isinstance(first, (int, float)) else first


def interval(x, n: int, share: bool = False) -> tuple[float, float, float]:
    """(value, low, high) of a list over prompts, or of (value, draws, number of prompts). Draws repeat prompts, which
    for FID and AP is not what as many different ones would give: their spread is taken, about the value, and cut to
    what a `share` can be."""
    if isinstance(x, tuple):
        tail = cut(x[2])
        bounds = x[0] + np.quantile(x[1] - np.mean(x[1]), [tail, 1 - tail])
        return float(x[0]), *map(float, bounds.clip(0, 1) if share else bounds)
    x = np.asarray(x, float)
    x = x[~np.isnan(x)]  # of prompts that have a value
    return bootstrap(lambda i: x[i].mean(-1), np.arange(len(x)), n) if len(x) else (np.nan,) * 3


def less(a, b):
    """a − b of two models on the same prompts, in either form."""
    if isinstance(a, tuple):
        return a[0] - b[0], np.asarray(a[1]) - np.asarray(b[1]), a[2]
    return np.asarray(a, float) - np.asarray(b, float)


def ratio(a, b, n: int) -> tuple[float, float, float]:
    """The mean of `a` over that of `b`, lists over the same prompts, which are resampled together."""
    a, b = np.asarray(a, float), np.asarray(b, float)
    return bootstrap(lambda i: np.nanmean(a[i], -1) / np.nanmean(b[i], -1), np.arange(len(a)), n)


def models(p: Params, backbone: str) -> dict[str, dict]:
    """Results by a model's name: the world's own images, where there are any, the teacher, what a student is before it
    learns, each student, and a base student's with the hybrid sampler. Students with something else in GAD's place have
    no such results."""
    teacher = read(paths.references(backbone) / "teacher.json")
    out = {"the world": teacher["world"]} if "world" in teacher else {}
    out |= {"teacher": teacher, "untrained student": teacher["untrained"]}
    beside = [run for block in p.further.controlled for run in block.runs(p.seeds.distill)]
    runs = [run for run in p.runs() if run not in beside]
    for (paradigm, variant), results in grouped(runs, backbone, paths.use).items():
        name = label(Run(backbone, paradigm, variant, 0))
        out[name] = merged(results)
        if "hybrid" in results[0]:
            out[name + HYBRID] = merged([r["hybrid"] for r in results])
    return out


def moves(p: Params) -> dict[float, str]:
    """What Table 5 calls each size of a guided move, the smallest first."""
    return dict(sorted(({0: "free"} | {s: f"RMS {s}" for s in p.uses.sweep} | {p.uses.scale: "guided"}).items()))


def long(p: Params, names=tuple(TABLES)) -> dict[str, pd.DataFrame]:
    """Each of the tables `names` in long form: backbone, model, metric, value, low, high; models named
    `… + GAD − base` are paired differences, `… − teacher` too, `… / teacher` multiples of the teacher's."""
    n, rows = p.report.bootstrap, {name: [] for name in names}
    for backbone in p.grid.backbones:
        found = models(p, backbone)
        for table in names:
            part, flat = TABLES[table]
            shown = {name: flat(r) for name, r in found.items() if part in r}

            def add(model, metrics, backbone=backbone, table=table):
                known = {k: x for k, x in metrics.items() if not np.isnan(x[0])}
                rows[table] += records(known, backbone=backbone, model=model)

            if table == "table3":
                for name in DISTANCES.values():
                    shown.get("the world", {}).pop(name, None)  # from itself
            for name, metrics in shown.items():
                add(name, {k: interval(x, n, _is_share(k)) for k, x in metrics.items()})
                if table == "table3" and name not in ("the world", "teacher") and RIGHT in metrics:
                    add(name, {SHARE: ratio(metrics[RIGHT], shown["teacher"][RIGHT], n)})
            for name, metrics in shown.items():
                base = shown.get(name.removesuffix(" + GAD"))
                if name.endswith(" + GAD") and base:
                    add(f"{name} − base", {k: interval(less(x, base[k]), n) for k, x in metrics.items()})
                    for key in NEARER.get(table, ()):
                        add(f"{name} − base", _gap(metrics, base, shown["teacher"], key, n))
                if table in LESS and name != "teacher":
                    add(f"{name} − teacher", {
                        k: interval(less(x, shown["teacher"][k]), n) for k, x in metrics.items() if LESS[table](k)
                    })
                if table == "table6" and name != "teacher":
                    add(f"{name} / teacher", _retained(metrics, shown["teacher"], n))
    columns = ["backbone", "model", "metric", "value", "low", "high"]
    return {name: pd.DataFrame(r, columns=columns).replace({"metric": learnt(p)}) for name, r in rows.items()}


LESS = {  # what students are said to have less of than their teacher
    "table2": lambda k: k.startswith("self"), "table5": lambda k: k in ("guided, AP", "guided, AP50"),
    "figure5": lambda k: k in ("Vendi", "layout Vendi"),
}
NEARER = {  # of what the teacher's is the aim
    "table6": ("mean shift", "mean ρ"), "figure5": ("Vendi", "layout Vendi", "CLIP"),
}


def _is_share(metric):
    return metric.endswith((", AP", ", AP50")) and "−" not in metric


def layouts(p: Params) -> str:
    """How many draws of prompts Table 5 is of: a world may have fewer than are asked for."""
    teachers = [models(p, backbone)["teacher"] for backbone in p.grid.backbones]
    found = sorted({len(t["layout"]["free"]["clip"]) for t in teachers if "layout" in t})
    return " to ".join(map(str, found[:1] + found[1:][-1:]))


def learnt(p: Params) -> dict[str, str]:
    """What a table calls the accuracies after fewer prompts: by their images."""
    numbers = p.uses.train // 4, p.uses.train // 2, p.uses.train
    return {f"of {n} prompts": f"{n * p.uses.seeds} images ({n} prompts)" for n in numbers if n}


def _gap(gad, base, teacher, key, n):
    """How much nearer to the teacher's `key` (below zero) GAD has come."""
    if key not in gad:
        return {}
    a, b, t = (np.asarray(x[key], float) for x in (gad, base, teacher))
    a, b, t = (x[~np.isnan(a + b + t)] for x in (a, b, t))  # prompts that all three have a value for
    if not len(t):
        return {}

    def change(i):
        return abs(a[i].mean(-1) - t[i].mean(-1)) - abs(b[i].mean(-1) - t[i].mean(-1))

    return {f"distance from the teacher's {key}": bootstrap(change, np.arange(len(a)), n)}


def _retained(student, teacher, n):
    """Shifts as multiples of the teacher's, the prompts of both resampled together; none of a shift that in the teacher
    may be zero."""
    out = {}
    for key in (k for k in student if k.startswith("shift") or k == "mean shift"):
        a, b = np.asarray(student[key], float), np.asarray(teacher[key], float)
        _, low, high = interval(b, n)
        if not (low > 0 or high < 0):
            continue
        out[key] = ratio(a, b, n)
    return out
