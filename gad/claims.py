"""The paper's claims, each with a verdict by a rule fixed in params.yaml, applied by code.

A claim is about a difference, GAD minus base or minus a control, on the same prompts and noises, or about a student
without GAD. It is *reproduced* where the whole 95 % interval is on its side, *not reproduced* where none of it is, else
*undecided*; where the paper says that nothing is lost, its side begins `report.loss` or `report.clip` below zero.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

import pandas as pd

from . import paths
from .params import Params, Run
from .tables import cell, label


@dataclass(frozen=True)
class Claim:
    text: str
    paper: str  # what it reports, in the units of our tables
    table: str  # its name in what tables.write returns
    rows: Callable[[pd.DataFrame], pd.Series]  # which of the table's are this difference
    sign: int  # +1: more is claimed, −1: less
    margin: str = ""  # of "not lower" rather than "higher": its key in `report`
    against: tuple[str, ...] = ("base",)  # the variants that GAD is compared with; none: a student without GAD


def _metric(name):
    return lambda t: t["model"].str.endswith("− base") & (t["metric"] == name)


def _tangents(name):
    return lambda t: (t["map"] == "difference") & (t["metric"] == name)


CLAIMS = (
    Claim("Tangents: the JVP cosine with the teacher is higher with GAD", "0.012 → 0.014 (TDM, PixArt-α)", "table1",
          _tangents("cos"), 1),
    Claim("Tangents: their relative error is lower with GAD",
          "JVP MSE, not divided by the teacher's, 0.0003 → 0.0002 (TDM, PixArt-α)", "table1",
          _tangents("relative"), -1),
    Claim("Tangents: their norm is nearer to the teacher's with GAD (the log of the ratio nearer to 0)",
          "ratio 0.98 → 0.99 (TDM, PixArt-α)", "table1", _tangents("off"), -1),
    Claim("Tangents: their spectrum is nearer to the teacher's with GAD (KL)", "0.008 → 0.006 (TDM, PixArt-α)",
          "table1", _tangents("spectral_kl"), -1),
    Claim("Tangents are what helps: the cosine is higher with GAD than with a control in its place",
          "no such control", "table1", _tangents("cos"), 1,
          against=("unrelated", "augmentation", "rkd", "similarity", "longer")),
    Claim("Seeds: without GAD its own classifier names fewer of a student's than of its teacher's (linear, top-1)",
          "0.937 → 0.876 (LADD, SD2), 0.873 (TCD), 0.778 (SD-Turbo), 0.529 (SwiftBrush)", "table2",
          lambda t: t["model"].str.endswith("− teacher") & (t["metric"] == "self, linear, top-1"), -1, against=()),
    Claim("Seeds: the teacher's classifier names more of the student's with GAD (linear, top-1)",
          "0.837 → 0.874 (LADD, SD2)", "table2", _metric("teacher, linear, top-1"), 1),
    Claim("Seeds: its own classifier names more of the student's with GAD (linear, top-1)",
          "0.876 → 0.924 (LADD, SD2)", "table2", _metric("self, linear, top-1"), 1),
    Claim("Quality is not lost (scene accuracy, where the paper has PickScore)", "PickScore not lower", "table3",
          _metric("scene accuracy"), 1, "loss"),
    Claim("Quality is not lost (CLIP)", "CLIP not lower; 0.3275 → 0.3440 (SiD, SANA)", "table3", _metric("CLIP"), 1,
          "clip"),
    Claim("Trajectories: the error at their end is lower with GAD (relative change)",
          "0.491 → 0.427, −0.13 (TDM, PixArt-α)", "table4",
          lambda t: (t["metric"] == "change") & (t["step"] == t["step"].max()), -1),
    Claim("Layout control: AP50 is higher with GAD", "0.174 → 0.206 (LADD, SD2)", "table5", _metric("guided, AP50"), 1),
    Claim("Noise retrieval: without GAD, noises chosen by the teacher are of no use (no shift of attributes)",
          "of none", "table6", lambda t: ~t["model"].str.contains(" [−/] ") & (t["metric"] == "mean shift"), -1,
          against=()),
    Claim("Noise retrieval: attributes of noises chosen by the teacher shift further with GAD",
          "of use with GAD, of none without", "table6", _metric("mean shift"), 1),
    Claim("Noise retrieval: that shift is nearer to the teacher's own with GAD", "not said in these words", "table6",
          _metric("distance from the teacher's mean shift"), -1),
    Claim("Diversity: the Vendi score is nearer to the teacher's with GAD",
          "nearer to the teacher's corner on all backbones", "figure5", _metric("distance from the teacher's Vendi"),
          -1),
)


def verdict(low: float, high: float, sign: int, margin: float = 0.0) -> str:
    """Of an interval [low, high] of a difference that is claimed to have `sign`; `margin`: how far beyond zero still
    counts."""
    low, high = sorted(round(sign * x + margin, 12) for x in (low, high))  # rounding is no difference
    return "reproduced" if low > 0 else "not reproduced" if high < 0 else "undecided"


def judge(p: Params, results: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """A row for every claim, and backbone and paradigm with GAD, or without where the claim is about that. `results`:
    the long tables by name."""
    rows, runs = [], p.runs()
    for claim in CLAIMS:
        found, of = results[claim.table], "gad" if claim.against else "base"
        found = found[claim.rows(found)]
        for backbone, paradigm in dict.fromkeys((r.backbone, r.paradigm) for r in runs if r.variant == of):
            name = label(Run(backbone, paradigm, of, 0))
            others = [label(Run(backbone, paradigm, v, 0)) for v in claim.against if v != "base"]
            names = {f"{name} − ({o})" for o in others} or {name, f"{name} − base", f"{name} − teacher"}
            mine = found[(found["backbone"] == backbone) & found["model"].isin(names)]
            for row in mine.itertuples():
                margin = getattr(p.report, claim.margin) if claim.margin else 0.0
                student = row.model.removesuffix(" − base")
                rows.append({"claim": claim.text, "paper": claim.paper, "table": claim.table, "backbone": backbone,
                             "student": student, "difference": row.value, "low": row.low, "high": row.high,
                             "verdict": verdict(row.low, row.high, claim.sign, margin)})
    return pd.DataFrame(rows)


def write(p: Params, results: dict[str, pd.DataFrame]):
    """reports/claims.md, and the verdicts of each table's claims into its page."""
    found = judge(p, results)
    text = [
        "# The paper's claims, in miniature",
        "GAD minus base, or minus what stands in brackets, or a student without GAD, on the same test prompts and "
        "noises, with 95 % bootstrap intervals over prompts; one row a student. *Reproduced*: the whole "
        "interval is on the claimed side of zero; *not reproduced*: none of it; else *undecided*. Where nothing is "
        f"claimed to be lost, up to {p.report.loss:g} of scene accuracy (`report.loss`) and {p.report.clip:g} of CLIP "
        "(`report.clip`) count as none. A miniature can "
        "support a claim about the method; it cannot refute one about the paper's models.",
        f"Of {p.seeds.told}: no interval here has the variance of training in it. Nor are they corrected for their "
        "number: of twenty true zeros one looks like a difference.",
    ]
    for claim in CLAIMS:
        rows = found[found["claim"] == claim.text] if len(found) else found
        if len(rows):
            text += [f"## {claim.text}", f"The paper: {claim.paper}.", _shown(rows).to_markdown(index=False)]
    (paths.REPORTS / "claims.md").write_text("\n\n".join(text) + "\n")
    for table in dict.fromkeys(found["table"]) if len(found) else ():
        _into(paths.TABLES / f"{table}.md", found[found["table"] == table])
    return found


def _shown(rows: pd.DataFrame) -> pd.DataFrame:
    cells = [cell(*x, "+.3g") for x in rows[["difference", "low", "high"]].to_numpy()]
    return rows[["backbone", "student"]].assign(difference=cells, verdict=rows["verdict"])


def _into(page, rows: pd.DataFrame):
    """A section of verdicts before what the paper reports."""
    ours, paper = re.split(r"\n\n(?=## The paper's|The paper \()", page.read_text(), maxsplit=1)
    shown = _shown(rows)
    shown.insert(0, "claim", rows["claim"])
    page.write_text("\n\n".join([ours, "## Verdicts", shown.to_markdown(index=False), paper]))
