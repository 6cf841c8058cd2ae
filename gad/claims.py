"""The paper's claims, each with a verdict by a rule fixed in params.yaml, applied by code.

A claim is about a difference, GAD minus base or minus a control, on the same prompts and noises. It is *reproduced*
where the whole 95 % interval is on its side, *not reproduced* where none of it is, else *undecided*; where the paper
says that nothing is lost, its side begins `report.loss` or `report.clip` below zero.
"""

from collections.abc import Callable
from dataclasses import dataclass

import pandas as pd

from . import paths
from .params import Params, Run
from .tables import cell, label


@dataclass(frozen=True)
class Claim:
    text: str
    paper: str  # what it reports
    table: str  # its name in what tables.write returns
    rows: Callable[[pd.DataFrame], pd.Series]  # which of the table's are this difference
    sign: int  # +1: more is claimed, −1: less
    margin: str = ""  # of "not lower" rather than "higher": its key in `report`
    against: tuple[str, ...] = ("base",)  # the variants that GAD is compared with


def _metric(name):
    return lambda t: t["model"].str.endswith("− base") & (t["metric"] == name)


CLAIMS = (
    Claim("Tangents: the JVP cosine with the teacher is higher with GAD", "0.012 → 0.014 (TDM, PixArt-α)", "table1",
          lambda t: (t["map"] == "difference") & (t["metric"] == "cos"), 1),
    Claim("Tangents: their error is lower with GAD", "JVP MSE 0.0003 → 0.0002 (TDM, PixArt-α)", "table1",
          lambda t: (t["map"] == "difference") & (t["metric"] == "relative"), -1),
    Claim("Tangents are what helps: the cosine is higher with GAD than with a control in its place",
          "no such control", "table1", lambda t: (t["map"] == "difference") & (t["metric"] == "cos"), 1,
          against=("unrelated", "augmentation", "rkd", "similarity", "longer")),
    Claim("Seeds: the teacher's classifier names more of the student's (linear, top-1)", "83.70 → 87.40 % (LADD, SD2)",
          "table2", _metric("teacher, linear, top-1"), 1),
    Claim("Seeds: its own classifier names more of the student's (linear, top-1)", "87.60 → 92.40 % (LADD, SD2)",
          "table2", _metric("self, linear, top-1"), 1),
    Claim("Quality is not lost (scene accuracy, where the paper has PickScore)", "PickScore not lower", "table1",
          lambda t: (t["map"] == "difference") & (t["metric"] == "scene"), 1, "loss"),
    Claim("Quality is not lost (CLIP)", "CLIP not lower; 32.75 → 34.40 (SiD, SANA)", "table3", _metric("CLIP"), 1,
          "clip"),
    Claim("Trajectories: the error at their end is lower with GAD", "0.491 → 0.427, −13 % (TDM, PixArt-α)", "table4",
          lambda t: (t["metric"] == "change") & (t["step"] == t["step"].max()), -1),
    Claim("Layout control: AP50 is higher with GAD", "17.4 → 20.6 (LADD, SD2)", "table5", _metric("guided, AP50"), 1),
    Claim("Noise retrieval: attributes of noises chosen by the teacher shift further with GAD",
          "of use with GAD, of none without", "table6", _metric("mean shift"), 1),
    Claim("Diversity: the Vendi score is nearer to the teacher's with GAD",
          "nearer to the teacher's corner on all backbones", "figure5", _metric("distance from the teacher's Vendi"),
          -1),
)


def verdict(low: float, high: float, sign: int, margin: float = 0.0) -> str:
    """Of an interval [low, high] of a difference that is claimed to have `sign`; `margin`: how far beyond zero still
    counts."""
    low, high = sorted((sign * low + margin, sign * high + margin))
    return "reproduced" if low > 0 else "not reproduced" if high < 0 else "undecided"


def judge(p: Params, results: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """A row for every claim, and backbone and paradigm with GAD. `results`: the long tables by name."""
    rows, students = [], dict.fromkeys((r.backbone, r.paradigm) for r in p.runs() if r.variant == "gad")
    for claim in CLAIMS:
        found = results[claim.table]
        found = found[claim.rows(found)]
        for backbone, paradigm in students:
            name = label(Run(backbone, paradigm, "gad", 0))
            others = (label(Run(backbone, paradigm, v, 0)) for v in claim.against)
            names = {name, f"{name} − base"} if claim.against == ("base",) else {f"{name} − ({o})" for o in others}
            mine = found[(found["backbone"] == backbone) & found["model"].isin(names)]
            for row in mine.itertuples():
                margin = getattr(p.report, claim.margin) if claim.margin else 0.0
                student = row.model.removesuffix(" − base")
                rows.append({"claim": claim.text, "paper": claim.paper, "backbone": backbone, "student": student,
                             "difference": row.value, "low": row.low, "high": row.high,
                             "verdict": verdict(row.low, row.high, claim.sign, margin)})
    return pd.DataFrame(rows)


def write(p: Params, results: dict[str, pd.DataFrame]):
    """reports/claims.md."""
    found = judge(p, results)
    text = [
        "# The paper's claims, in miniature",
        "GAD minus base, or minus what stands in brackets, on the same test prompts and noises, with 95 % bootstrap "
        "intervals over prompts; one row a student, distillation seeds "
        f"{', '.join(map(str, p.seeds.distill))}. *Reproduced*: the whole "
        "interval is on the claimed side of zero; *not reproduced*: none of it; else *undecided*. Where nothing is "
        f"claimed to be lost, up to {p.report.loss:g} of scene accuracy (`report.loss`) and {p.report.clip:g} of CLIP "
        "(`report.clip`) count as none. A miniature can "
        "support a claim about the method; it cannot refute one about the paper's models.",
    ]
    for claim in CLAIMS:
        rows = found[found["claim"] == claim.text] if len(found) else found
        if len(rows):
            cells = [cell(*x, "+.3g") for x in rows[["difference", "low", "high"]].to_numpy()]
            shown = rows[["backbone", "student"]].assign(difference=cells, verdict=rows["verdict"])
            text += [f"## {claim.text}", f"The paper: {claim.paper}.", shown.to_markdown(index=False)]
    (paths.REPORTS / "claims.md").write_text("\n\n".join(text) + "\n")
    return found
