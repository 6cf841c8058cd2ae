"""The paper's claims, each with a verdict by a rule whose numbers stand in params.yaml (`report`), applied by code.

A claim is about a difference, GAD minus base or minus a control, on the same prompts and noises, or about a student
without GAD. For one student it is *reproduced* where the whole 95 % interval is on its side, *not reproduced* where
none of it is, else *undecided*. Its side begins at zero; where the paper says that nothing is lost, `report.loss`,
`report.pickscore` or `report.clip` below it; where it speaks of a level, at that level (`report.match`). That nothing
happens is reproduced where the whole interval is within `report.shift` of zero. As a whole a claim is *reproduced*
where more than `report.most` of its students reproduce it and none contradicts it, *not reproduced* the other way
round, else *mixed* where there are both, and *undecided* where neither is so.
"""

from collections.abc import Callable
from dataclasses import dataclass

import pandas as pd

from . import paths
from .params import Params, Run
from .tables import cell, is_end, label, minus, worlds, zeroed


@dataclass(frozen=True)
class Claim:
    text: str
    paper: str  # what it reports, in the units of our tables; "" where the claim is ours
    table: str  # its name in what tables.write returns
    rows: Callable[[pd.DataFrame], pd.Series]  # which of the table's are this difference
    sign: int  # +1: more is claimed, −1: less, 0: neither
    margin: str = ""  # of "not lower" rather than "higher", or of "nothing": its key in `report`
    level: str | float = ""  # what a value is compared with in zero's place: a number, or its key in `report`
    against: tuple[str, ...] = ("base",)  # the variants that GAD is compared with; none: a student without GAD
    each: str = ""  # a student has a row for each value of this column
    own: tuple[str, str] | None = None  # the backbone and paradigm of the paper's number
    variant: str = ""  # what is compared: with GAD, unless told otherwise; without, where it is with nothing
    only: bool = False  # it is claimed of that one alone
    all: bool = False  # as a whole it needs every row: a control that does as well does without tangents

    def rule(self, p: Params) -> tuple[float, float]:
        """`margin` and `level` as numbers."""
        return tuple(getattr(p.report, x) if x and isinstance(x, str) else x or 0.0 for x in (self.margin, self.level))

    @property
    def of(self) -> str:
        return self.variant or ("gad" if self.against else "base")

    def edges(self, p: Params) -> list[float]:
        """Where the claimed side begins; of "nothing", either end of what still counts as that."""
        margin, level = self.rule(p)
        return [level - self.sign * margin] if self.sign else [-margin, margin]


def _metric(name):
    return lambda t: t["model"].str.endswith("− base") & (t["metric"] == name)


def _tangents(name):
    return lambda t: (t["map"] == "difference") & (t["metric"] == name)


def _than_teacher(name):
    return lambda t: t["model"].str.endswith("− teacher") & (t["metric"] == name)


def _seeds(side, ending):
    names = [f"{side}, {kind}, top-1" for kind in ("linear", "CNN")]
    return lambda t: t["model"].str.endswith(ending) & t["metric"].isin(names)


def _endpoint(name):
    return lambda t: (t["map"] == "endpoint") & (t["metric"] == name)


def _end(t):
    return (t["metric"] == "change") & is_end(t)


def _again(name):
    return lambda t: _metric(name)(t) & (t["seed"] == "all")


PIXART, SD2, SANA = ("pixart", "tdm"), ("sd2", "ladd"), ("sana", "sid")
CLAIMS = (
    Claim("Sensitivity is lost without GAD: a student responds less than its teacher (norm ratio below 1)",
          "collapses; ratio 0.98 (TDM, PixArt-α)", "table1", _endpoint("ratio"), -1, level=1.0, against=(), own=PIXART),
    Claim("Values match without GAD (relative squared error, median over noises)",
          "pointwise error is low with and without GAD (Figure 2)", "table1", _endpoint("value"), -1, level="match",
          against=(), own=PIXART),
    Claim("Values match with GAD (relative squared error, median over noises)",
          "pointwise error is low with and without GAD (Figure 2)", "table1", _endpoint("value"), -1, level="match",
          against=(), own=PIXART, variant="gad"),
    Claim("Tangents do not match without GAD (relative squared error, median over noises)",
          "only GAD aligns the responses (Figure 2)", "table1", _endpoint("relative"), 1, level="match", against=(),
          own=PIXART),
    Claim("Tangents match with GAD (relative squared error, median over noises)",
          "only GAD aligns the responses (Figure 2)", "table1", _endpoint("relative"), -1, level="match", against=(),
          own=PIXART, variant="gad"),
    Claim("Tangents: the JVP cosine with the teacher is higher with GAD", "0.012 → 0.014 (TDM, PixArt-α)", "table1",
          _tangents("cos"), 1, own=PIXART),
    Claim("Tangents: their relative error is lower with GAD (median over noises)",
          "JVP MSE, not divided by the teacher's, 0.0003 → 0.0002 (TDM, PixArt-α)", "table1",
          _tangents("relative"), -1, own=PIXART),
    Claim("Tangents: their norm is nearer to the teacher's with GAD (the log of the ratio nearer to 0)",
          "ratio 0.98 → 0.99 (TDM, PixArt-α)", "table1", _tangents("off"), -1, own=PIXART),
    Claim("Tangents: their spectrum is nearer to the teacher's with GAD (KL)", "0.008 → 0.006 (TDM, PixArt-α)",
          "table1", _tangents("spectral_kl"), -1, own=PIXART),
    Claim("Seeds: without GAD its own classifier names fewer of a student's than of its teacher's (top-1)",
          "0.937 → 0.876 (LADD, SD2), 0.873 (TCD), 0.778 (SD-Turbo), 0.529 (SwiftBrush)", "table2",
          _seeds("self", "− teacher"), -1, against=(), each="metric", own=SD2),
    Claim("Seeds: the teacher's classifier names more of the student's with GAD (top-1)",
          "0.837 → 0.874 (LADD, SD2)", "table2", _seeds("teacher", "− base"), 1, each="metric", own=SD2),
    Claim("Seeds: its own classifier names more of the student's with GAD (top-1)",
          "0.876 → 0.924 (LADD, SD2)", "table2", _seeds("self", "− base"), 1, each="metric", own=SD2),
    Claim("Quality is not lost (scene accuracy, where the paper has PickScore)", "PickScore not lower", "table3",
          _metric("scene accuracy"), 1, "loss"),
    Claim("Quality is not lost (scene accuracy of Table 1: other prompts, a fifth of the images)", "", "table1",
          _tangents("scene"), 1, "loss"),
    Claim("Quality is not lost (PickScore)", "PickScore not lower", "table3", _metric("PickScore"), 1, "pickscore"),
    Claim("Quality is not lost (CLIP)", "CLIP not lower", "table3", _metric("CLIP"), 1, "clip"),
    Claim("Quality: CLIP is higher with GAD for SiD on SANA", "0.3275 → 0.3440", "table3", _metric("CLIP"), 1, own=SANA,
          only=True),
    Claim("Trajectories: the error at their end is lower with GAD (relative change)",
          "0.491 → 0.427, −0.13 (TDM, PixArt-α)", "table4", _end, -1, own=PIXART),
    Claim("Trajectories: so is the error on the way, after each step before the last",
          "lower in all four intervals (TDM, PixArt-α)", "table4",
          lambda t: (t["metric"] == "change") & ~is_end(t), -1, each="step", own=PIXART),
    Claim("Layout control: without GAD it is worse than the teacher's (AP)",
          "0.066 → 0.050 (LADD, SD2), 0.030 (SD-Turbo)", "table5", _than_teacher("guided, AP"), -1, against=(),
          own=SD2),
    Claim("Layout control: AP is higher with GAD", "0.050 → 0.058 (LADD, SD2)", "table5", _metric("guided, AP"), 1,
          own=SD2),
    Claim("Layout control: AP50 is higher with GAD", "0.174 → 0.206 (LADD, SD2)", "table5", _metric("guided, AP50"), 1,
          own=SD2),
    Claim("Layout control: guided images fit their prompts no less with GAD (CLIP)", "0.3187 → 0.3184 (LADD, SD2)",
          "table5", _metric("guided, CLIP"), 1, "clip", own=SD2),
    Claim("Noise retrieval: without GAD, noises chosen by the teacher are of no use (no shift of attributes)",
          "they are of use with GAD and of none without", "table6",
          lambda t: ~t["model"].str.contains(" [−/] ") & (t["metric"] == "mean shift"), 0, "shift", against=()),
    Claim("Noise retrieval: attributes of noises chosen by the teacher shift further with GAD",
          "they are of use with GAD and of none without", "table6", _metric("mean shift"), 1),
    Claim("Diversity is lost without GAD: the Vendi score is below the teacher's",
          "collapses (Figure 5, without numbers)", "figure5", _than_teacher("Vendi"), -1, against=()),
    Claim("Diversity: the Vendi score is nearer to the teacher's with GAD",
          "nearer to the teacher's corner on all backbones", "figure5", _metric("distance from the teacher's Vendi"),
          -1),
    Claim("Fidelity: CLIP is nearer to the teacher's with GAD", "nearer to the teacher's corner on all backbones",
          "figure5", _metric("distance from the teacher's CLIP"), -1),
    Claim("Tangents are what helps: the cosine is higher with GAD than with a control in its place", "", "table1",
          _tangents("cos"), 1, all=True,
          against=("unrelated", "augmentation", "rkd", "similarity", "longer", "slower")),
    Claim("Tangents: the cosine is higher with GAD, of several trainings (in its interval too)", "", "replicas",
          _again("cos"), 1),
    Claim("Quality is not lost, of several trainings (how well Table 1's images fit their prompts)", "", "replicas",
          _again("fit"), 1, "loss"),
    Claim("Trajectories: the error at their end is lower with GAD, of several trainings (relative change)", "",
          "replicas", _again("end"), -1),
    Claim("Tangents: the cosine is higher with GAD at half the learning rate too, than at half without", "", "table1",
          _tangents("cos"), 1, variant="slower_gad", against=("slower",)),
    Claim("Trajectories: the error at their end is lower with GAD at half the learning rate too, than at half without "
          "(relative change)", "", "table4", _end, -1, variant="slower_gad", against=("slower",)),
    Claim("Tangents: the cosine is higher with GAD in three times the steps too, than in as many without", "",
          "table1", _tangents("cos"), 1, variant="thrice_gad", against=("thrice",)),
    Claim("Trajectories: the error at their end is lower with GAD in three times the steps too, than in as many "
          "without (relative change)", "", "table4", _end, -1, variant="thrice_gad", against=("thrice",)),
    Claim("Quality is not lost in three times the steps either (scene accuracy of Table 1)", "", "table1",
          _tangents("scene"), 1, "loss", variant="thrice_gad", against=("thrice",)),
    Claim("Noise retrieval: the shift is nearer to the teacher's own with GAD", "", "table6",
          _metric("distance from the teacher's mean shift"), -1),
    Claim("Diversity of layouts: their Vendi score is nearer to the teacher's with GAD", "", "figure5",
          _metric("distance from the teacher's layout Vendi"), -1),
    Claim("Diversity of layouts is lost without GAD: their Vendi score is below the teacher's", "", "figure5",
          _than_teacher("layout Vendi"), -1, against=()),
)


def verdict(low: float, high: float, sign: int, margin: float = 0.0) -> str:
    """Of an interval [low, high] of a difference that is claimed to have `sign`; `margin`: how far beyond zero still
    counts, on either side where `sign` is 0."""
    if sign == 0:
        within = max(-low, high) < margin
        return "reproduced" if within else "not reproduced" if max(low, -high) > margin else "undecided"
    low, high = sorted(round(sign * x + margin, 12) for x in (low, high))  # rounding is no difference
    return "reproduced" if low > 0 else "not reproduced" if high < 0 else "undecided"


def whole(verdicts: list[str], most: float, every: bool = False) -> str:
    """The verdict on a claim from those of its students."""
    yes, no = (verdicts.count(v) for v in ("reproduced", "not reproduced"))
    if yes and no:
        return "mixed"
    need = len(verdicts) - 1 if every else most * len(verdicts)
    return "reproduced" if yes > need else "not reproduced" if no > need else "undecided"


def judge(p: Params, results: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """A row for every claim, and backbone and paradigm with GAD, or without where the claim is about that. `results`:
    the long tables by name."""
    rows, runs = [], p.runs()
    for claim in CLAIMS:
        found, of = results[claim.table], claim.of
        found = found[claim.rows(found)]
        margin, level = claim.rule(p)
        for where in dict.fromkeys((r.backbone, r.paradigm) for r in runs if r.variant == of):
            if claim.only and where != claim.own:
                continue
            name = label(Run(*where, of, 0))
            others = [label(Run(*where, v, 0)) for v in claim.against if v != "base"]
            names = {name, *([minus(name, o) for o in others] or [f"{name} − base", f"{name} − teacher"])}
            mine = found[(found["backbone"] == where[0]) & found["model"].isin(names)]
            for row in mine.itertuples():
                _, low, high = zeroed(row.value, row.low - level, row.high - level)
                student = minus(name, others[0]) if others and row.model == name else row.model.removesuffix(" − base")
                if claim.each:
                    of_it = getattr(row, claim.each)
                    student += f", {of_it if isinstance(of_it, str) else f'{claim.each} {of_it}'}"
                rows.append({"claim": claim.text, "paper": claim.paper, "table": claim.table, "backbone": where[0],
                             "student": student, "own": where == claim.own, "difference": row.value, "low": row.low,
                             "high": row.high, "verdict": verdict(low, high, claim.sign, margin),
                             "spec": ".3g" if claim.level else "+.3g"})
    return pd.DataFrame(rows)


def write(p: Params, results: dict[str, pd.DataFrame]):
    """reports/claims.md, and the verdicts of each table's claims at the end of its page."""
    found, r, there = judge(p, results), p.report, worlds(p)
    none = {"coco": f"{r.pickscore:g} of PickScore (`report.pickscore`)", "mini": f"{r.loss:g} of scene accuracy "
            "(`report.loss`)"}
    text = [
        "# The paper's claims" + (", in miniature" if there == {"mini"} else ""),
        "GAD minus base, or minus what stands in brackets, or a student without GAD, on the same test prompts and "
        "noises, with 95 % bootstrap intervals over prompts; one row a student. *Reproduced*: the whole interval is "
        "on the claimed side of zero; *not reproduced*: none of it; else *undecided*. Where nothing is claimed to be "
        f"lost, up to {', '.join(none[w] for w in sorted(there))} and {r.clip:g} of CLIP (`report.clip`) count as "
        f"none; that a noise is of no use needs a shift within {r.shift:g} of zero (`report.shift`); values or "
        f"tangents match where their relative squared error, the median over noises, is below {r.match:g} "
        f"(`report.match`). A claim as a whole is reproduced where more than {r.most:g} of its students "
        "(`report.most`) reproduce it and none contradicts it, and the other way round; *mixed*: some do, others "
        "contradict it; that of controls needs every one. Table 2's students count twice, by either classifier. "
        "Verdicts are of bounds before they are rounded. *Lower at all*: where nothing is claimed to be lost, rows "
        "whose whole interval is below zero, be it within what counts as none."
        + (" A miniature can support a claim about the method; it cannot refute one about the paper's models."
           if "mini" in there else ""),
        f"Of {p.seeds.told}: no interval here has the variance of training in it, but where a claim is of several "
        "trainings. Nor are they corrected for their number: of twenty true zeros one looks like a difference. The "
        "rules were written as results came in, not registered before them; those on several trainings stood before "
        "all but the first, those on three times the steps before any of these.",
    ]
    if len(found):
        text += ["## All of them", _overview(found, p).to_markdown(index=False)]
    for claim in CLAIMS:
        rows = found[found["claim"] == claim.text] if len(found) else found
        if len(rows):
            said = f"The paper: {claim.paper}." if claim.paper else "Not a claim of the paper's: ours."
            text += [f"## {claim.text}", said, _shown(rows).to_markdown(index=False)]
    (paths.REPORTS / "claims.md").write_text("\n\n".join(text) + "\n")
    for table, rows in found.groupby("table", sort=False) if len(found) else ():
        shown = _shown(rows)
        shown.insert(0, "claim", rows["claim"])
        page = paths.TABLES / f"{table}.md"
        text = [page.read_text().rstrip(), "## Verdicts", shown.to_markdown(index=False)]
        page.write_text("\n\n".join(text) + "\n")
    return found


def _overview(found: pd.DataFrame, p: Params) -> pd.DataFrame:
    """A line a claim: what becomes of it in the paper's own case, in how many students, and as a whole."""
    lines, every, most = [], {claim.text for claim in CLAIMS if claim.all}, p.report.most
    nothing_lost = {claim.text: claim.rule(p)[0] for claim in CLAIMS if claim.margin and claim.sign}
    for claim, rows in found.groupby("claim", sort=False):
        verdicts = rows["verdict"].tolist()
        counts = " / ".join(str(verdicts.count(v)) for v in ("reproduced", "undecided", "not reproduced"))
        highs = [zeroed(*x)[2] for x in rows[["difference", "low", "high"]].to_numpy()]
        lower = str(sum(high < 0 for high in highs)) if claim in nothing_lost else "–"
        own = rows.loc[rows["own"], "verdict"].tolist()
        paper, verdict = rows["paper"].iloc[0], whole(verdicts, most, claim in every)
        if claim in nothing_lost and verdict == "reproduced":
            verdict += f" within {nothing_lost[claim]:g}"
        lines.append({
            "claim": claim, "as a whole": verdict,
            "rows: reproduced / undecided / not": counts, "lower at all": lower,
            "in the paper's own case": whole(own, most) if own else "–", "the paper": paper or "no claim of it",
        })
    return pd.DataFrame(lines)


def _shown(rows: pd.DataFrame) -> pd.DataFrame:
    cells = [cell(*x) for x in rows[["difference", "low", "high", "spec"]].to_numpy()]
    return rows[["backbone", "student"]].assign(difference=cells, verdict=rows["verdict"])
