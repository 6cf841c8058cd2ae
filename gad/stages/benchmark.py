"""What the paper's scale costs: a step of base and of GAD at full architecture size, what the teacher makes once a
backbone, and from them a plan of the grid.

Weights and data are random: a step's time and memory don't depend on what they are. Without a GPU nothing is timed:
operations and memory are counted, by shapes alone.
"""

import gc
import sys
import time
from dataclasses import asdict
from functools import partial

import numpy as np
import pandas as pd
import torch

from .. import architectures, paths
from ..backbones import BACKBONES, MINIATURES, Backbone
from ..distill import Distillation, checkpoint, compile_blocks, shareable
from ..evaluation import geometry, noise_query
from ..paradigms import find
from ..params import Params, Run
from ..world import autoencoder, scenes
from .common import prepare, write_json
from .cost import _Timed
from .counting import count, count_teacher, random_data
from .planning import GRID, SCHEDULES, Schedule, other_scheme, page, plan
from .shapes import shapes


def benchmark(
    p: Params,
    backbones: tuple[str, ...] = GRID[0],
    paradigms: tuple[str, ...] = GRID[1],
    blocks: int = 8,
    batch: int | None = None,
    precision: str | None = None,
    compiled: bool | None = None,
    checkpointing: bool | None = None,
    miniature: bool = False,
    schedules: dict[str, Schedule] | None = None,
    gpus: int = 8,
    tflops: tuple[float, float] = (300.0, 40.0),
) -> dict:
    """Count the operations and memory of `paradigms` on `backbones` at full size; where there is a GPU time them too,
    base and GAD taking turns; the same of what the teacher makes; and plan these students by it. Prints a page, kept
    in reports/benchmark.md, and writes reports/benchmark.json: {device, torch, compile, …, rows, targets, plan};
    returns the same.

    `batch`: images a step on this one device (`distill.batch`), which takes them in `hardware.parts`, as training does;
    GAD's pairs keep their proportion to it. `precision`: "no" (fp32) or "bf16", of all `backbones`; else each has its
    own (`distill.precision`, `distill.fp32`). Weights are fp32. `compiled`: each block by torch.compile
    (`hardware.compile`). `checkpointing`: of all networks that are differentiated (`hardware.checkpointing`).
    `miniature`: time the pipeline's small networks, on any machine. `schedules`, by paradigm: other ones than those of
    params.yaml, or, where its backbones are miniatures and full size is asked for, than SCHEDULES. `gpus`: on how many
    the plan's hours are counted; `tflops`: what a device sustains in bf16 and in fp32, 10¹² operations a second, by
    which they are where nothing was timed.
    What does not fit in memory has a row that says so. Raises ValueError for what cannot be measured.
    """
    batch = p.distill.batch if batch is None else batch
    compiled = p.hardware.compile if compiled is None else compiled
    checkpointing = p.hardware.checkpointing if checkpointing is None else checkpointing
    _check(p, backbones, paradigms, blocks, batch, precision, miniature, gpus, tflops)
    pairs = max(1, round(p.gad.pairs * batch / p.distill.batch))
    gad = p.gad.model_copy(update={"pairs": pairs})
    _check_parts(p, Run(_family(backbones[0]), paradigms[0], "gad", 0), batch, gad)
    own = {k: Schedule(p.steps(k, "base"), p.distill.batch, "params.yaml") for k in paradigms}
    published = not miniature and not all(p.backbones[_family(name)].path for name in backbones)
    known = own | (SCHEDULES if published else {}) | (schedules or {})
    schedules = {k: known[k] for k in paradigms}
    timed = miniature or torch.cuda.is_available()
    rows, targets, against = [], [], []
    for name in backbones:
        model = data = None
        which = p.backbones[_family(name)]
        trained = precision or p.training(_family(name)).precision
        accelerator = prepare(p, trained if timed else "no")
        device = accelerator.device
        trained = accelerator.mixed_precision if timed else trained  # a CPU without bf16 takes fp32
        if trained == "bf16" and _family(name) in p.distill.fp32:
            against.append(name)
        if timed:
            make = partial(_miniature, p=p) if miniature else architectures.build
            model = _fits(partial(make, name, device=device))
            data = model and random_data(model, which.student_steps, 4 * max(batch, pairs), p.seeds.world)
        found = {"sample": None, "tangents": None}
        if model:
            found = _targets(model, which, data, batch, p.hardware.tangents)
        found |= {} if miniature else _teacher(name, which, p.hardware.tangents)
        targets.append({"backbone": name, "steps": which.teacher_steps} | found | _made(found, timed, p, name, tflops))
        for paradigm in paradigms:
            row = {"backbone": name, "paradigm": paradigm, "precision": trained, "batch": batch, "pairs": pairs}
            row["parameters"] = model and sum(x.numel() for x in model.network.parameters())
            if timed:
                row |= _row(model, paradigm, which, data, gad, p, batch, blocks, compiled, checkpointing, accelerator)
                found = row["note"] or f"GAD {row['ratio']:.2f} times the base"
            else:
                row |= NOTHING
            if not miniature:
                row |= _counted(name, paradigm, p, batch, gad, trained, checkpointing)
                told = f"{1 + row['operations_gad'] / row['operations_base']:.2f} times the base's operations with GAD"
                found = f"{found}; {told}" if timed else told
            rows.append(row)
            print(f"{name} {paradigm}: {found}", file=sys.stderr, flush=True)
        del model, data
        _free()
    named = torch.cuda.get_device_name() if device.type == "cuda" else f"{p.threads} CPU thread(s)"
    measured = f"{'miniature' if miniature else 'full size'}, {named if timed else 'operations counted'}"
    report = {
        "device": named if timed else None, "torch": torch.__version__, "against": against,
        "compile": compiled, "checkpointing": checkpointing, "parts": p.hardware.parts,
        "tangents": p.hardware.tangents, "measured": measured,
        "form": p.gad.form, "scheme": p.gad.scheme, "blocks": blocks, "tflops": list(tflops), "rows": rows,
        "targets": targets, "plan": plan(rows, schedules, gpus, measured, tflops, p.gad.scheme == "exact"),
        "schedules": {k: asdict(s) for k, s in schedules.items()},
    }
    write_json(paths.REPORTS / "benchmark.json", report)
    (paths.REPORTS / "benchmark.md").write_text(page(report))
    print(page(report))
    return report


ATTRIBUTES = {"mini": noise_query.attributes, "coco": noise_query.colours}
NOTHING = {f"{key}_{k}": None for k in GRID[2] for key in ("seconds", "images", "memory")}
NOTHING |= {"ratio": None, "ratio_low": None, "ratio_high": None, "note": ""}


def _counted(name, paradigm, p, batch, gad, precision, checkpointing) -> dict:
    """Operations an image: of a step without GAD, of GAD alone, of GAD by the other scheme. And the bytes of a device:
    held throughout, and the peak of each."""
    other = other_scheme(gad.scheme)
    terms = {"gad": gad, other: gad.model_copy(update={"scheme": other})}
    p = p.model_copy(update={"hardware": p.hardware.model_copy(update={"checkpointing": checkpointing})})
    found = count(name, paradigm, terms, p, batch, 2, precision)
    return {
        "parameters": found.parameters, "held": found.held,
        "operations_base": found.base, **{f"operations_{key}": x for key, x in found.terms.items()},
        **{f"peak_{key or 'base'}": x for key, x in found.memory.items()},
    }


def _teacher(name, which, n) -> dict:
    model = shapes(name)
    return count_teacher(model, which, model.encode(["a prompt"], device="cpu").expand(n))


def _made(found, timed, p, name, tflops) -> dict:
    """How many samples and paths with tangents the stages take of a teacher, in whole ones, their operations and the
    device-hours of both: by the seconds that were `found` for each, or by operations at the speed assumed in fp32."""
    e, n, u = p.evaluation, p.endpoints, p.uses
    attributes = ATTRIBUTES[p.backbones[_family(name)].world](torch.zeros(1, 3, 8, 8))  # Table 6's
    many = {
        "samples": p.teacher_of(_family(name)).prompts + n.samples + e.trajectory_prompts  # then references
        + u.seeds * u.prompts + u.library // 2 + u.prompts  # unprompted is without guidance: half a sample
        + 2 * len(attributes) * u.picks * u.query + u.layouts * (3 + len(u.sweep)),
        # Test noises: their own, at CFG + 1 and in half the steps; along the path, and at the noises nearby.
        "paths": n.pairs + n.probes + round(e.prompts * e.noises * (3.5 + len(p.nearby.sizes))),
    }

    def total(*each):
        return None if None in each else sum(x * k for x, k in zip(each, many.values(), strict=True))

    work = total(found.get("operations_sample"), found.get("operations_tangents"))
    seconds = total(found["sample"], found["tangents"]) if timed else work / (1e12 * tflops[1])
    return many | {"exaflop": work and work / 1e18, "device_hours": seconds and seconds / 3600}


def _check(p, backbones, paradigms, blocks, batch, precision, miniature, gpus, tflops):
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
    if precision not in (None, "no", "bf16"):
        raise ValueError(f"precision={precision!r} is not timed: use 'no' (fp32) or 'bf16'")
    given = (("backbones", len(backbones), 1), ("paradigms", len(paradigms), 1))
    for key, value, least in (*given, ("blocks", blocks, 2), ("batch", batch, 1), ("gpus", gpus, 1)):
        if value < least:
            raise ValueError(f"{key}={value} is too few: use {least} or more")
    if not all(x > 0 for x in tflops):
        raise ValueError(f"tflops={tflops}: give what a device sustains in bf16 and in fp32, above 0")
    if p.gad.lam == 0:
        raise ValueError("gad.lam=0 leaves no GAD to time: set a positive weight")


def _check_parts(p, run, batch, gad):
    distill = p.distill.model_copy(update={"batch": batch})
    try:
        shareable(run, p.model_copy(update={"distill": distill, "gad": gad}), 1)
    except ValueError as error:
        raise ValueError(f"batch={batch}, with {gad.pairs} pairs: {error}") from None


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
    row = NOTHING | {"note": "out of memory"}
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
    paradigm = find(name)(model, which.student_steps, which.cfg, p.paradigms[name], p.distill)
    tangents, samples = data
    tasks = {
        k: Distillation(paradigm, tangents.cond, tangents, term, batch, 0, samples)
        for k, term in (("base", None), ("gad", gad))
    }
    if checkpointing:
        checkpoint(tasks["base"])  # the networks are GAD's too
    compile_blocks(tasks["base"], compiled)
    cycle = int(p.paradigms[name].get("ratio", 1)) * gad.every
    return {k: _Timed(task, cycle, accelerator, p.hardware.parts) for k, task in tasks.items()}
