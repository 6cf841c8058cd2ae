"""How well the teachers draw."""

import pandas as pd

from .. import paths
from ..params import Params
from .common import cell, read, save
from .geometry import COLUMNS, accuracy


def write(p: Params) -> dict[str, dict]:
    """reports/tables/teachers.*: scene accuracies with intervals over prompts, and how far layouts spread."""
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
    text = (
        f"On {p.teacher.prompts} test prompts, by the detector, with 95 % bootstrap intervals over prompts. Steps and "
        "guidance scale: of the teacher's sampler, here and wherever it teaches."
    )
    if any("spread" in row for row in rows):
        text += (
            " Spread: RMS distance of the first object's centre from its mean over seeds of one prompt, beside the "
            f"world's; the mean over {min(8, p.teacher.prompts)} prompts, whose own values are not stored, so that it "
            "has no interval."
        )
    save("teachers", pd.DataFrame(rows), ["# Teachers", text, pd.DataFrame(cells).to_markdown(index=False)])
    return found
