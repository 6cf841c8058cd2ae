"""What the paper's scale costs: a step of base and of GAD at full architecture size, and from it a plan of the grid.

Weights and data are random: a step's time and memory don't depend on what they are.
"""

import gc
import sys
import time
from dataclasses import asdict, dataclass
from itertools import product

import numpy as np
import pandas as pd
import torch

from .. import architectures, paths
from ..backbones import BACKBONES, MINIATURES, Backbone
from ..distill import Distillation
from ..evaluation import geometry
from ..paradigms import find
from ..params import Params
from ..tables import cell
from ..tangents import Samples, Tangents
from ..world import autoencoder, scenes
from .common import prepare, write_json
from .cost import _Timed

GRID = ("sd2", "pixart", "sana"), ("ladd", "tdm", "sid"), ("base", "gad")  # the paper's students


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

Measured: {measured}; precision {precision}{options}; PyTorch {torch}. Base and GAD (`{form}` form) take turns, {blocks}
blocks each; medians of a step, and of the ratio of neighbouring blocks, with a 95 % bootstrap interval over blocks.
Images/s counts the base's batch in both. Memory is the peak of the process (CPU) or of what is allocated (GPU).

{rows}

## Before training, once a backbone

Seconds for each sample of the teacher, for paradigms that learn from them, and for each of its paths with exact
tangents, for GAD; in fp32.

{targets}

## Plan

{scope}

{plan}

Hours follow from the images/s above, `steps × batch / (images/s) / 3600`, on all devices alike and none lost between
them; where memory is short for a device's share of a batch, it takes that in parts (`hardware.accumulate`). Not in it:
the probes, exact tangents of `hardware.tangents` noises at once beside what is trained. Schedules:

{sources}
"""


def benchmark(
    p: Params,
    backbones: tuple[str, ...] = GRID[0],
    paradigms: tuple[str, ...] = GRID[1],
    blocks: int = 8,
    batch: int | None = None,
    precision: str | None = None,
    compiled: bool = False,
    checkpointing: bool | None = None,
    miniature: bool | None = None,
    schedules: dict[str, Schedule] | None = None,
    gpus: int = 8,
) -> dict:
    """Time `paradigms` on `backbones`, base and GAD taking turns, and plan the paper's grid by it. Prints a page and
    writes reports/benchmark.json: {device, torch, precision, compile, …, rows, targets, plan}; returns the same.

    `batch`: images a step on this one device (`distill.batch`); GAD's pairs keep their proportion to it. `precision`:
    "no" (fp32) or "bf16" (`distill.precision`); weights are fp32. `compiled`: each block by torch.compile.
    `checkpointing`: of the trained networks (`hardware.checkpointing`). `miniature`: the pipeline's small networks,
    not the full ones; without a GPU there are no others. `schedules`: other ones than SCHEDULES, or than that of
    params.yaml for miniatures, by paradigm. `gpus`: on how many the plan's hours are counted.
    What does not fit in memory has a row that says so. Raises ValueError for what cannot be measured.
    """
    miniature = not torch.cuda.is_available() if miniature is None else miniature
    batch = p.distill.batch if batch is None else batch
    precision = p.distill.precision if precision is None else precision
    checkpointing = p.hardware.checkpointing if checkpointing is None else checkpointing
    _check(p, backbones, paradigms, blocks, batch, precision, miniature, gpus)
    own = {k: Schedule(p.steps(k, "base"), p.distill.batch, "params.yaml") for k in GRID[1]}
    schedules = (own if miniature else SCHEDULES) | (schedules or {})
    accelerator = prepare(p, precision)
    device = accelerator.device
    pairs = max(1, round(p.gad.pairs * batch / p.distill.batch))
    gad = p.gad.model_copy(update={"pairs": pairs})
    rows, targets = [], []
    for name in backbones:
        model = _fits(lambda name=name: _miniature(name, p, device) if miniature else architectures.build(name, device))
        which = p.backbones[_family(name)]
        data = model and _data(model, which, 4 * max(batch, pairs), p.seeds.world)
        if model:
            steps = which.teacher_steps
            found = _targets(model, which, data, batch, p.hardware.tangents)
            targets.append({"backbone": name, "steps": steps} | found)
        for paradigm in paradigms:
            row = {"backbone": name, "paradigm": paradigm, "batch": batch, "pairs": pairs}
            row["parameters"] = model and sum(x.numel() for x in model.network.parameters())
            row |= _row(model, paradigm, which, data, gad, p, batch, blocks, compiled, checkpointing, accelerator)
            rows.append(row)
            found = row["note"] or f"GAD {row['ratio']:.2f} times the base"
            print(f"{name} {paradigm}: {found}", file=sys.stderr, flush=True)
        del model, data
        _free()
    named = torch.cuda.get_device_name() if device.type == "cuda" else f"{p.threads} CPU thread(s)"
    measured = f"{'miniature' if miniature else 'full size'}, {named}"
    report = {
        "device": named, "torch": torch.__version__, "precision": accelerator.mixed_precision, "compile": compiled,
        "checkpointing": checkpointing, "measured": measured, "form": p.gad.form, "blocks": blocks,
        "rows": rows, "targets": targets, "plan": plan(rows, schedules, gpus, measured),
        "schedules": {k: asdict(s) for k, s in schedules.items()},
    }
    write_json(paths.REPORTS / "benchmark.json", report)
    print(page(report))
    return report


def _check(p, backbones, paradigms, blocks, batch, precision, miniature, gpus):
    if not miniature and not torch.cuda.is_available():
        raise ValueError("miniature=False needs a GPU, and there is none: leave it out to time the miniatures")
    known = MINIATURES if miniature else architectures.FULL
    for name in backbones:
        if name not in known:
            size = "miniature" if miniature else "full-size"
            raise ValueError(f"backbones: {name!r} has no {size} networks; there are {', '.join(known)}")
        if _family(name) not in p.backbones:
            raise ValueError(f"backbones: {_family(name)!r} is not in the backbones section of params.yaml: add it")
    for name in paradigms:
        if name not in p.paradigms:
            raise ValueError(f"paradigms: {name!r} is not in params.yaml; there are {', '.join(p.paradigms)}")
        find(name)
    if precision not in ("no", "bf16"):
        raise ValueError(f"precision={precision!r} is not timed: use 'no' (fp32) or 'bf16'")
    for key, value, least in (("blocks", blocks, 2), ("batch", batch, 1), ("gpus", gpus, 1)):
        if value < least:
            raise ValueError(f"{key}={value} is too few: use {least} or more")
    if p.gad.lam == 0:
        raise ValueError("gad.lam=0 leaves no GAD to time: set a positive weight")


def _family(name):
    return name if name in BACKBONES else architectures.FULL[name].family


def _fits(make):
    """What `make()` returns, or None where memory runs out."""
    try:
        return make()
    except torch.OutOfMemoryError:
        pass
    _free()  # not before the error, and the frames that it holds, are gone
    return None


def _free():
    gc.collect()
    torch.cuda.empty_cache()


def _miniature(name, p, device) -> Backbone:
    pipeline = MINIATURES[name](autoencoder.build(p.backbones[name].autoencoder), scenes.WORDS)
    return BACKBONES[name](pipeline, name).to(device)


def _data(model, which, n, seed) -> tuple[Tangents, Samples]:
    """Random ones of the shapes that the diagnose stage leaves."""
    cond = model.encode(scenes.sample(n, seed, "train").captions(), device="cpu")
    states, responses = torch.randn(2, n, which.student_steps + 1, *model.latent_shape, device=model.device)
    return Tangents(states, responses, cond), Samples(states[:, 0], states[:, -1], cond)


def _targets(model, which, data, batch, size) -> dict:
    """Seconds for a sample of the teacher, and for one of its paths with tangents, of which at most `size` are computed
    at once; None where memory runs out."""
    at, times = data[0][slice(0, batch)], model.times(which.student_steps)

    @torch.no_grad()
    def sample():
        model.sample(model.network, at.z, at.cond, which.teacher_steps, which.cfg)

    def path():
        geometry.tangents(
            lambda c: lambda z: model.path(model.network, z, c, which.teacher_steps, which.cfg, times),
            at.z, at.v, at.cond, min(batch, size), model.name,
        )

    def seconds(run):
        for _ in range(2):  # the first warms up
            began = time.perf_counter()
            run()
            if model.device.type == "cuda":
                torch.cuda.synchronize()
        return (time.perf_counter() - began) / batch

    return {"sample": _fits(lambda: seconds(sample)), "tangents": _fits(lambda: seconds(path))}


def _row(model, name, which, data, gad, p, batch, blocks, compiled, checkpointing, accelerator) -> dict:
    """Step seconds, images/s and MB of base and GAD, and their ratio; None, and a note, where memory runs out."""
    row = {f"{key}_{k}": None for k in GRID[2] for key in ("seconds", "images", "memory")}
    row |= {"ratio": None, "ratio_low": None, "ratio_high": None, "note": "out of memory"}
    timed = model and _fits(
        lambda: _tasks(model, name, which, data, gad, p, batch, compiled, checkpointing, accelerator)
    )
    if not timed:
        return row
    for k in list(timed):  # warm up: the first steps also make the optimisers' states, and compile
        if not all(_fits(timed[k]) for _ in range(4 if compiled else 1)):
            for role in timed.pop(k).task.roles.values():
                role.module.zero_grad(set_to_none=True)
    seconds = pd.DataFrame([{k: _fits(timed[k]) for k in timed} for _ in range(blocks)]).astype(float)
    for k in timed:
        if seconds[k].notna().all():
            median = seconds[k].median()
            row |= {f"seconds_{k}": median, f"images_{k}": batch / median, f"memory_{k}": timed[k].memory}
    lost = [k for k in GRID[2] if row[f"seconds_{k}"] is None]
    row["note"] = f"out of memory: {', '.join(lost)}" if lost else ""
    if not lost:
        each = (seconds["gad"] / seconds["base"]).to_numpy()
        row |= geometry.interval_columns("ratio", each, p.report.bootstrap, np.median)
    return row


def _tasks(model, name, which, data, gad, p, batch, compiled, checkpointing, accelerator) -> dict[str, _Timed]:
    for block in model.blocks(model.network):
        vars(block).pop("forward", None)  # compiled for the paradigm before: a copy would call the original's
    paradigm = find(name)(model, which.student_steps, which.cfg, p.paradigms[name], p.distill)
    tangents, samples = data
    tasks = {
        k: Distillation(paradigm, tangents.cond, tangents, term, batch, 0, samples)
        for k, term in (("base", None), ("gad", gad))
    }
    trained = [r.module for r in paradigm.roles.values() if hasattr(r.module, "enable_gradient_checkpointing")]
    for network in trained if checkpointing else []:
        network.enable_gradient_checkpointing()
    for network in [model.network, *trained] if compiled else []:
        torch._dynamo.config.recompile_limit = 64  # with and without gradient, autocast, fixed weights: each is another
        for block in model.blocks(network):  # not the whole network: hooks on blocks stay outside
            block.forward = torch.compile(block.forward)
    cycle = int(p.paradigms[name].get("ratio", 1)) * gad.every
    return {k: _Timed(task, cycle, accelerator) for k, task in tasks.items()}


def plan(rows: list[dict], schedules: dict[str, Schedule], gpus: int, measured: str) -> list[dict]:
    """Device-hours, hours on `gpus` devices and the MB that were measured on one, of every student of the paper's grid,
    then of all: from the images/s of `rows`, which were `measured` so. None where there are none."""
    found = {(row["backbone"], row["paradigm"]): row for row in rows}
    cells = []
    for backbone, paradigm, variant in product(*GRID):
        row, schedule = found.get((backbone, paradigm), {}), schedules[paradigm]
        rate = row.get(f"images_{variant}")
        hours = schedule.steps * schedule.batch / rate / 3600 if rate else None
        cells.append({
            "backbone": backbone, "paradigm": paradigm, "variant": variant,
            "steps": schedule.steps, "batch": schedule.batch, "device_hours": hours,
            "gpus": gpus, "hours": hours and hours / gpus, "memory": row.get(f"memory_{variant}"),
            "measured": measured if rate else "no: out of memory" if row else "no",
        })
    known = [c for c in cells if c["device_hours"]]
    hours = sum(c["device_hours"] for c in known) if known else None
    total = dict.fromkeys(cells[0]) | {
        "backbone": "all", "device_hours": hours, "gpus": gpus, "hours": hours and hours / gpus,
        "memory": max((c["memory"] for c in known), default=None),
        "measured": f"{len(known)} of {len(cells)} students",
    }
    return [*cells, total]


def page(report: dict) -> str:
    """The report as Markdown."""
    rows = [r | {
        "millions": r["parameters"] and r["parameters"] / 1e6,
        "ratio": r["ratio"] and cell(r["ratio"], r["ratio_low"], r["ratio_high"], ".2f"),
    } for r in report["rows"]]
    titles = {"backbone": "backbone", "paradigm": "paradigm"}
    shown = _table(rows, titles | {
        "millions": "parameters, M", "batch": "batch", "pairs": "pairs", "seconds_base": "base, s",
        "seconds_gad": "GAD, s", "ratio": "GAD / base", "images_base": "base, images/s", "images_gad": "GAD, images/s",
        "memory_base": "base, MB", "memory_gad": "GAD, MB", "note": "",
    })
    targets = _table(report["targets"], {
        "backbone": "backbone", "steps": "steps", "sample": "a sample, s", "tangents": "a path with tangents, s"
    })
    cells = _table(report["plan"], titles | {
        "variant": "variant", "steps": "steps", "batch": "batch", "device_hours": "device-hours",
        "hours": f"hours on {report['plan'][0]['gpus']}", "memory": f"MB, {report['rows'][0]['batch']} images on one",
        "measured": "measured",
    })
    scope = f"The paper's grid, {' × '.join('{' + ', '.join(x) + '}' for x in GRID)}."
    if report["measured"].startswith("miniature"):
        scope += "\n**Nothing was measured at full size**: the hours are those of the miniatures."
    sources = "\n".join(f"- {k}: {report['schedules'][k]['source']}" for k in GRID[1])
    options = ", compiled" * report["compile"] + ", gradient checkpointing" * report["checkpointing"]
    return PAGE.format(**report | {
        "rows": shown, "targets": targets, "plan": cells, "scope": scope, "sources": sources, "options": options,
    })


def _table(records, titles):
    frame = pd.DataFrame(records, columns=list(titles), dtype=object).map(_shown)
    return frame.rename(columns=titles).to_markdown(index=False, disable_numparse=True)


def _shown(x):
    """Three digits of a float; a dash where there is nothing."""
    if isinstance(x, float):
        return f"{x:.0f}" if x >= 100 else f"{x:.3g}"
    return "–" if x is None else str(x)
