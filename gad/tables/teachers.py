"""How well the teachers draw."""

import pandas as pd

from .. import paths
from ..params import Params
from .common import cell, read, save, worlds
from .geometry import COLUMNS, accuracy

JUDGES = {"mini": "the detector", "coco": "PickScore and CLIP"}


def write(p: Params) -> dict[str, dict]:
    """reports/tables/teachers.*: how well images fit, with intervals over prompts, and how far layouts spread."""
    rows, cells, found = [], [], {}
    for backbone in p.grid.backbones:
        made, which = read(paths.teacher_metrics(backbone)), p.backbones[backbone]
        row = {}
        shown = {"backbone": backbone, "steps": which.teacher_steps, "guidance scale": which.cfg}
        for key, interval in accuracy([made], p.report.bootstrap).items():
            row |= dict(zip((key, f"{key}_low", f"{key}_high"), interval, strict=True))
            shown[COLUMNS[key]] = cell(*interval, ".3f")
        if "spread" in made:
            row |= {k: made[k] for k in ("spread", "spread_world")}
            row["spread_share"] = row["spread"] / row["spread_world"]
            shown |= {"spread, px": f"{row['spread']:.1f}", "the world's": f"{row['spread_world']:.1f}",
                      "share": f"{row['spread_share']:.2f}"}
        rows.append({"backbone": backbone, "steps": which.teacher_steps, "cfg": which.cfg} | row)
        cells.append(shown)
        found[backbone] = {k: round(v, 4) for k, v in row.items()}
    numbers = {b: p.teacher_of(b).prompts for b in p.grid.backbones}
    judges = " or ".join(JUDGES[world] for world in sorted(worlds(p), reverse=True))
    text = (
        f"On {_told(numbers.values())} test prompts, by {judges}, with 95 % bootstrap intervals over prompts. Steps "
        "and guidance scale: of the teacher's sampler, here and wherever it teaches."
    )
    if spread := [min(8, numbers[row["backbone"]]) for row in rows if "spread" in row]:
        text += (
            " Spread: RMS distance of the first object's centre from its mean over seeds of one prompt, beside the "
            f"world's; the mean over {_told(spread)} prompts, whose own values are not stored, so that it has no "
            "interval."
        )
    save("teachers", pd.DataFrame(rows), ["# Teachers", text, pd.DataFrame(cells).fillna("–").to_markdown(index=False)])
    return found


def _told(numbers) -> str:
    """The different ones in words."""
    return " or ".join(map(str, sorted(set(numbers))))
