"""The tables, from the results of the grid's runs and no others: ids come from params.yaml, a missing one is an
error. Every number carries a 95 % bootstrap interval over prompts."""

import json

import pandas as pd

from .. import paths
from ..params import Params
from . import chains, geometry, gradients, means, pages, replicas, teachers, trajectories, uses
from .common import HYBRID, cell, fit, fits, label, minus, models, read, worlds, zeroed
from .geometry import SUMMARY
from .trajectories import is_end

__all__ = ["HYBRID", "SUMMARY", "cell", "fit", "fits", "is_end", "label", "minus", "models", "read", "worlds", "write",
           "zeroed"]


def write(p: Params) -> dict[str, pd.DataFrame]:
    """reports/tables/*, reports/metrics.json; returns the tables in long form, by name."""
    found = pages.write(p)
    shares = found["table3"].query("metric == @uses.SHARE").set_index(["backbone", "model"])["value"].to_dict()
    table1 = geometry.write(p, shares)
    metrics = {"teachers": teachers.write(p), "students": {}}
    for row in table1[table1["map"].isin(["endpoint", "images", "difference"])].itertuples():
        of = metrics["students"].setdefault(row.backbone, {}).setdefault(row.model, {})
        of[row.metric] = float(f"{row.value:.4g}")
    table4 = trajectories.write(p)
    tracked = uses.TRACKED | trajectories.TRACKED
    for row in pd.concat([*found.values(), table4[is_end(table4)]]).query("metric in @tracked").itertuples():
        of = metrics["students"].setdefault(row.backbone, {}).setdefault(row.model, {})
        of[tracked[row.metric]] = float(f"{row.value:.4g}")
    paths.METRICS.write_text(json.dumps(metrics, indent=2, ensure_ascii=False) + "\n")
    beside = {t.NAME: t.write(p) for t in (chains, replicas, means, gradients)}
    return {"table1": table1, "table4": table4, **beside, **found}
