"""What all tables share: results by their runs, names, cells."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd

from .. import paths
from ..params import Params, Run
from ..tangents import made

VARIANTS = {
    "base": "", "gad": " + GAD", "map": " + GAD, map form", "every4": " + GAD each 4th step",
    "unrelated": " + unrelated tangents", "augmentation": " + noise augmentation", "rkd": " + RKD",
    "similarity": " + SP", "longer": ", longer", "slower": ", half the rate",
    "slower_gad": " + GAD, half the rate", "thrice": ", 3 × the steps", "thrice_gad": " + GAD, 3 × the steps",
}
HYBRID = ", first step by the teacher"


def read(path: Path) -> dict:
    if not path.exists():
        raise FileNotFoundError(f"{path.relative_to(paths.ROOT)} is missing: run its stage, `dvc repro`")
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path.relative_to(paths.ROOT)} is not JSON ({error}): run its stage again") from None


def fit(result: dict) -> list[float]:
    """How well images fit their prompts, one by one, by the first measure of the model's world."""
    quality = result["quality"]
    return quality["scene"] if "scene" in quality else quality["pickscore"]


def fits(p: Params) -> str:
    """What `fit` is called."""
    names = {"mini": "scene accuracy", "coco": "PickScore"}
    return " or ".join(names[world] for world in sorted(worlds(p), reverse=True))


def worlds(p: Params) -> set[str]:
    """What the grid's backbones draw."""
    return {p.backbones[b].world for b in p.grid.backbones}


def distinct(p: Params, name: str) -> str:
    """How many different prompts are behind a file of the miniatures' diagnoses: fewer than were drawn."""
    small = [b for b in p.grid.backbones if p.backbones[b].world == "mini"]
    found = {len(set(made(paths.diagnosis(b) / f"{name}.safetensors")["prompts"])) for b in small}
    return " to ".join(map(str, sorted({min(found), max(found)})))


def label(run: Run) -> str:
    name = {"sid": "SiD", "swiftbrush": "SwiftBrush"}.get(run.paradigm, run.paradigm.upper())
    return name + VARIANTS.get(run.variant, f" + {run.variant}")


def minus(one: str, other: str) -> str:
    """What a row is called that compares a model with another than its base."""
    return f"{one} − ({other})"


def minus_base(p: Params, paradigm: str, variant: str) -> str:
    """What a row is called that compares a variant with its base."""
    base, name = p.base_of(variant), label(Run("", paradigm, variant, 0))
    return f"{name} − base" if base == "base" else minus(name, label(Run("", paradigm, base, 0)))


def zeroed(value: float, low: float, high: float) -> tuple[float, ...]:
    """What is next to nothing beside its interval's width, as zero: results are kept to so many digits."""
    least = max(1e-12, 1e-5 * (high - low))
    return tuple(0.0 if abs(x) < least else x for x in (value, low, high))


def cell(value: float, low: float, high: float, spec: str = ".3g") -> str:
    """A number with its interval, as tables show it; what rounding left of zero is zero."""
    value, low, high = zeroed(value, low, high)
    return f"{value:{spec}} [{low:{spec}}, {high:{spec}}]"


def prompts_of(points: int, noises: int, seeds: int) -> np.ndarray:
    """The prompt of each of `seeds` runs' points, `noises` a prompt."""
    return np.tile(np.arange(points) // noises, seeds)


def grouped(runs: list[Run], backbone: str, place: Callable[[Run], Path]) -> dict[tuple[str, str], list[dict]]:
    """Results of a backbone's students by (paradigm, variant), one entry a seed; `place`: the file of a run."""
    out: dict[tuple[str, str], list[dict]] = {}
    for run in runs:
        if run.backbone == backbone:
            out.setdefault((run.paradigm, run.variant), []).append(read(place(run)))
    return out


def models(p: Params, backbone: str) -> dict[tuple[str, str], list[dict]]:
    """Every student's results of the evaluate stage, as `grouped` has them."""
    return grouped(p.runs(), backbone, paths.result)


def records(measured: dict[str, tuple[float, float, float]], **keys) -> list[dict]:
    """Rows of a long form: `keys`, then metric, value, low and high."""
    return [keys | {"metric": k, "value": v, "low": a, "high": b} for k, (v, a, b) in measured.items()]


def save(name: str, long: pd.DataFrame, text: list[str]):
    """reports/tables/<name>.csv, the long form, and .md, its paragraphs."""
    paths.TABLES.mkdir(parents=True, exist_ok=True)
    long.to_csv(paths.TABLES / f"{name}.csv", index=False, float_format="%.5g", lineterminator="\n")
    (paths.TABLES / f"{name}.md").write_text("\n\n".join(text) + "\n")


def pivot(part: pd.DataFrame, columns: str, index=("backbone", "model"), spec: str = ".3g") -> pd.DataFrame:
    """One row a model in the order of `part`, whose rows' intervals become cells under the values of `columns`."""
    index, part = list(index), part.assign(cell=[cell(*x, spec) for x in part[["value", "low", "high"]].to_numpy()])
    order, across = part[index].drop_duplicates(), list(dict.fromkeys(part[columns]))
    table = part.pivot(index=index, columns=columns, values="cell").loc[list(map(tuple, order.to_numpy()))]
    return table[across].fillna("–").reset_index()
