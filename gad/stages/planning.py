"""The plan of a grid at the paper's scale, by what its steps cost, and the page of what `benchmark` found."""

from dataclasses import dataclass
from itertools import product

import pandas as pd

from ..tables import cell

GRID = ("sd2", "pixart", "sana"), ("ladd", "tdm", "sid"), ("base", "gad")  # the paper's students
TOLD = {"no": "fp32", "bf16": "bf16"}


@dataclass(frozen=True)
class Schedule:
    """A student's training: `steps` updates of `batch` images over all GPUs, and where that is from."""

    steps: int
    batch: int
    source: str


SCHEDULES = {
    "ladd": Schedule(100_000, 384, "AMD's open LADD, Nitro-1: 8 × 8 × 6 images a step"),
    "tdm": Schedule(10_001, 32, "TDM's released script: 2 × 16 images a step, 10,001 steps at most; its README: 500"),
    "sid": Schedule(19_531, 512, "SiD-LSG's run script: 10 M images, 512 at a time"),
}

PAGE = """# What the paper's scale costs

{measured}

{rows}
{counts}{targets}
## Plan

Students: {grid}.{warning}

{plan}

{hours}

All devices are alike and none is lost between them; where memory is short for a device's share of a batch, it takes
that in parts (`hardware.parts: {parts}`). Not in it: the probes between steps, exact tangents of {tangents}
noises at once (`hardware.tangents`). Schedules:

{sources}
"""
TIMED = """Measured: {measured}{options}; PyTorch {torch}. A step takes its batch in {parts} part(s) (`hardware.parts`).
Base and GAD (`{form}` form) take turns, {blocks} blocks each; medians of a step, and of the ratio of neighbouring
blocks, with a 95 % bootstrap interval over blocks. Images/s counts the base's batch in both. Memory is the peak of the
process (CPU) or of what is allocated (GPU)."""
COUNTED = """## Operations and memory

Of matrix products, convolutions and attention, forward and backward, for each image of the base's batch, counted at
full size by shapes alone (PyTorch's fake tensors): a number that no machine changes. Memory is counted so too, of one
device that takes {batch} images, and {pairs} of GAD's pairs, in {parts} part(s){options}.
Held: weights, gradients, moments and averages of all networks of a run, in fp32, the autoencoder, and the teacher's
tangents and samples. The peak has the activations too. It was not checked on a GPU, and is without what libraries keep
for themselves and what their operations work in.

{table}

"""
ANEW = ", with activations made anew\n(`hardware.checkpointing`), and counted again"
TARGETS = """
## The teacher's own, once a backbone

By the numbers of params.yaml, in fp32: samples for the stages teacher, diagnose and references (no more than that:
noises that are chosen twice are drawn once), and paths with exact tangents, of which GAD's students learn, for diagnose
and nearby. Not in it: gradients of layout guidance, and what takes few steps.{how}

{targets}

"""


def other_scheme(scheme: str) -> str:
    """What a scheme of GAD's is shown beside."""
    return "forward" if scheme == "exact" else "exact"


def plan(
    rows: list[dict], schedules: dict[str, Schedule], gpus: int, measured: str,
    tflops: tuple[float, float] = (300, 40), exact: bool = False,
) -> list[dict]:
    """Device-hours, hours on `gpus` devices, operations and the MB that were measured on one, of every row's student
    without and with GAD, then of all: from the images/s of `rows`, which were `measured` so, or where there are none
    from their operations, at `tflops` in bf16 and in fp32, by each row's precision; GAD's in fp32 unless they are
    `exact`. None where there is neither."""
    cells = []
    for row, variant in product(rows, GRID[2]):
        precision, schedule = row.get("precision", "no"), schedules[row["paradigm"]]
        rate, images = row.get(f"images_{variant}"), schedule.steps * schedule.batch
        work = [row.get("operations_base"), row.get("operations_gad") if variant == "gad" else 0]
        own = tflops[precision != "bf16"]
        speeds = own, own if exact else tflops[1]
        hours = None
        if rate:
            hours = images / rate / 3600
        elif work[0] and not row.get("note"):
            hours = images * sum(w / (1e12 * speed) for w, speed in zip(work, speeds, strict=True)) / 3600
        cells.append({
            "backbone": row["backbone"], "paradigm": row["paradigm"], "variant": variant, "precision": precision,
            "steps": schedule.steps, "batch": schedule.batch, "exaflop": work[0] and images * sum(work) / 1e18,
            "device_hours": hours, "gpus": gpus, "hours": hours and hours / gpus,
            "memory": row.get(f"memory_{variant}"), "peak": row.get(f"peak_{variant}"),
            "measured": measured if hours else "no: out of memory",
        })
    known = [c for c in cells if c["device_hours"]]
    hours = sum(c["device_hours"] for c in known) if known else None
    total = dict.fromkeys(cells[0]) | {
        "backbone": "all", "device_hours": hours, "gpus": gpus, "hours": hours and hours / gpus,
        "exaflop": sum(c["exaflop"] or 0 for c in cells) or None,
        "memory": max((c["memory"] for c in known if c["memory"]), default=None),
        "peak": max((c["peak"] for c in cells if c["peak"]), default=None),
        "measured": f"{len(known)} of {len(cells)} students",
    }
    return [*cells, total]


def page(report: dict) -> str:
    """The report as Markdown."""
    rows = [r | {"precision": TOLD[r["precision"]]} for r in report["rows"]]
    counted, timed = any("operations_base" in r for r in rows), report["device"] is not None
    titles = {"backbone": "backbone", "paradigm": "paradigm"}
    gpus, images = report["plan"][0]["gpus"], rows[0]["batch"]
    (high, low), how, other = report["tflops"], "", other_scheme(report["scheme"])
    options = ", compiled" * report["compile"] + ", gradient checkpointing" * report["checkpointing"]
    if timed:
        measured = TIMED.format(**report, options=options)
        shown = _table([r | {
            "millions": r["parameters"] and r["parameters"] / 1e6,
            "ratio": r["ratio"] and cell(r["ratio"], r["ratio_low"], r["ratio_high"], ".2f"),
        } for r in rows], titles | {
            "millions": "parameters, M", "precision": "precision", "batch": "batch", "pairs": "pairs",
            "seconds_base": "base, s", "seconds_gad": "GAD, s", "ratio": "GAD / base", "images_base": "base, images/s",
            "images_gad": "GAD, images/s", "memory_base": "base, MB", "memory_gad": "GAD, MB", "note": "",
        })
        each = {"sample": "a sample, s", "tangents": "a path with tangents, s"}
        hours = "Hours follow from the images/s above, `steps × batch / (images/s) / 3600`."
    else:
        measured, shown = "**Nothing was timed**: there is no GPU.", ""
        each = {"sample": "a sample, TFLOP", "tangents": "a path with tangents, TFLOP"}
        how = f" Hours are by the **assumed** speed in fp32, {low:g} TFLOP/s."
        hours = (
            f"Hours are by **assumed** speeds (`--tflops`): {high:g} TFLOP/s in bf16, {low:g} in fp32, by each row's "
            f"precision; `gad.scheme: {report['scheme']}`. A difference is in fp32 whatever the precision, dividing "
            "rounding by h: beside a base in bf16 its share of time exceeds that of operations. Exact tangents are in "
            "the base's precision."
        )
    if report["against"]:
        measured += f" `--precision` has {', '.join(report['against'])} in bf16, which `distill.fp32` keeps in fp32."
    targets = TARGETS.format(how=how, targets=_table([
        t | ({} if timed else {k: t[f"operations_{k}"] / 1e12 for k in each})
        | ({"peak": t["peak_tangents"] / 2**30} if counted else {}) for t in report["targets"]
    ], {
        "backbone": "backbone", "steps": "steps", **each,
        **({"peak": f"tangents of {report['tangents']} at once, GiB"} if counted else {}),
        "samples": "samples", "paths": "paths",
        **({"exaflop": "10¹⁸ operations"} if counted else {}), "device_hours": "device-hours",
    }))
    counts = _table([r | {
        "millions": r["parameters"] / 1e6, "base": r["operations_base"] / 1e12, "precision": r["precision"],
        **{key: f"{1 + r[f'operations_{key}'] / r['operations_base']:.2f}" for key in ("gad", other)},
        **{key: r[key] / 2**30 for key in ("held", "peak_base", "peak_gad", f"peak_{other}")},
    } for r in rows], titles | {
        "millions": "parameters, M", "precision": "precision", "base": "base, TFLOP",
        "gad": f"GAD, {report['scheme']} / base", other: f"GAD, {other} / base", "held": "held, GiB",
        "peak_base": "base, GiB", "peak_gad": f"GAD, {report['scheme']}, GiB", f"peak_{other}": f"GAD, {other}, GiB",
    }) if counted else ""
    cells = _table([
        c | {"precision": TOLD.get(c["precision"]), "peak": c["peak"] and c["peak"] / 2**30} for c in report["plan"]
    ], titles | {
        "variant": "variant", "precision": "precision", "steps": "steps", "batch": "batch",
        **({"exaflop": "10¹⁸ operations"} if counted else {}),
        "device_hours": "device-hours", "hours": f"hours on {gpus}", **({"peak": "peak, GiB"} if counted else {}),
        **({"memory": f"MB, {images} images on one", "measured": "measured"} if timed else {}),
    })
    warning = ""
    if report["measured"].startswith("miniature"):
        warning = "\n**Nothing was measured at full size**: the hours are those of the miniatures."
    given = *(tuple(dict.fromkeys(r[k] for r in rows)) for k in titles), GRID[2]
    return PAGE.format(
        measured=measured, rows=shown, counts=COUNTED.format(
            table=counts, batch=images, pairs=rows[0]["pairs"], parts=report["parts"],
            options=report["checkpointing"] * ANEW,
        ) if counted else "", targets=targets,
        grid=" × ".join("{" + ", ".join(x) + "}" for x in given) + ", the paper's grid" * (given == GRID),
        warning=warning, plan=cells, hours=hours, parts=report["parts"], tangents=report["tangents"],
        sources="\n".join(f"- {k}: {s['source']}" for k, s in report["schedules"].items()),
    )


def _table(records, titles):
    frame = pd.DataFrame(records, columns=list(titles), dtype=object).map(_shown)
    return frame.rename(columns=titles).to_markdown(index=False, disable_numparse=True)


def _shown(x):
    """Three digits of a float; a dash where there is nothing."""
    if isinstance(x, float):
        return f"{x:.0f}" if x >= 100 else f"{x:.3g}"
    return "–" if x is None else str(x)
