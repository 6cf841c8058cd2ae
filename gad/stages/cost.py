"""What GAD costs: a step's time and memory beside the base's, for every paradigm, in the same run."""

import ctypes
import gc
import resource
import sys
import time

import numpy as np
import pandas as pd
import torch

from .. import paths
from ..distill import Distillation, checkpoint, compile_blocks
from ..evaluation.geometry import interval_columns
from ..paradigms import find
from ..params import Params
from ..tables import cell
from ..training import update
from .common import materials, prepare, write_csv
from .counting import Operations, count_teacher

NOTE = """# What a step costs

`python -m gad cost {backbone} {blocks}`: {device}, batch {batch}, `{form}` form with {pairs} pairs{map}.
Base and GAD take turns, {blocks} blocks each; medians of a step, and of the ratio of neighbouring blocks, with a 95 %
bootstrap interval over blocks. A row is of one run, and so are its ratios; seconds of different rows (`--paradigms`
renews some) need not be. Memory is the peak of the process (CPU) or of what is allocated (GPU), with the networks
and moments of all columns in it: the columns' differences are what a term needs. Operations are those of matrix
products, convolutions and attention, counted in the first block: a ratio that no machine changes, and nearly that of
larger networks of the same kind, whose calls are as many. A paradigm whose student moves at some steps only (DMD's at
each fifth) has a term there alone: its ratios are means over steps. The teacher's exact tangents, at {kept} noises
once a backbone, are in none of it but the last column, which sets them against a whole training without GAD; all
students of a backbone share them.

"""
MOST = 1.5  # times the base's step, what GAD may cost
TITLES = {"gad": "GAD", "every": "GAD each 4th step", "map": "GAD, map form"}


def cost(backbone: str, p: Params, blocks: int = 8, only: list[str] | None = None) -> list[dict]:
    """Time every paradigm's step without GAD, with it, with it at each 4th step (`gad.every`) and with `controls.map`
    where there is one, on `backbone`, and count its operations; a row each, kept in reports/cost.csv, where of `only`
    some the others' rows stay. A block is as many steps as a cycle of all that takes turns is long."""
    if blocks < 1:
        raise ValueError(f"blocks={blocks} is too few: give 1 or more, of which an interval needs several")
    for name in only or ():
        if name not in p.paradigms:
            raise ValueError(f"paradigms={name!r} is unknown: there are {', '.join(p.paradigms)}")
    accelerator = prepare(p, p.training(backbone).precision)
    paradigms = {name: find(name) for name in only or p.paradigms}
    model, cond, tangents, samples = materials(accelerator.device, backbone, p)
    which = p.backbones[backbone]
    once = count_teacher(model, which, cond[:1].to(model.device))["operations_tangents"] * p.endpoints.pairs
    terms = {"base": None, "gad": p.gad, "every": p.gad.model_copy(update={"every": 4})}
    if "map" in p.controls:
        terms["map"] = p.controls["map"]
    rows = []
    for name, method in paradigms.items():
        paradigm = method(model, which.student_steps, which.cfg, p.paradigms[name], p.distill)
        tasks = {
            k: Distillation(paradigm, cond, tangents, term, p.distill.batch, 0, samples) for k, term in terms.items()
        }
        if p.hardware.checkpointing:
            checkpoint(tasks["base"])  # the networks are those of all
        compile_blocks(tasks["base"], p.hardware.compile)
        cycle = int(p.paradigms[name].get("ratio", 1)) * 4
        timed = {k: _Timed(task, cycle, accelerator, p.hardware.parts) for k, task in tasks.items()}
        operations = {}
        for k in timed:  # warm up
            with Operations() as counted:
                timed[k]()
            operations[k] = counted.total / cycle
        seconds = pd.DataFrame([{k: timed[k]() for k in timed} for _ in range(blocks)])
        row = {"backbone": backbone, "paradigm": name, "seconds": seconds["base"].median()}
        for k in [k for k in TITLES if k in terms]:
            ratio = (seconds[k] / seconds["base"]).to_numpy()
            row |= interval_columns(k, ratio, p.report.bootstrap, np.median)
        row |= {f"memory_{k}": timed[k].memory for k in timed}
        row |= {"operations": operations["base"]}
        row |= {f"operations_{k}": operations[k] / operations["base"] for k in TITLES if k in terms}
        row["tangents"] = once / (operations["base"] * p.steps(name, "base"))
        rows.append(row)
        told = ", ".join(f"{title} {row[k]:.2f}" for k, title in TITLES.items() if k in terms)
        told = f"{name}, times the base: {told}"
        print(told, file=sys.stderr, flush=True)
        del paradigm, tasks, timed
        gc.collect()
    _write(_beside(pd.DataFrame(rows), p), p, backbone, blocks, accelerator.device)
    return rows


def _beside(frame, p):
    """With the rows that are there of the backbone's other paradigms."""
    path = paths.REPORTS / "cost.csv"
    if not path.exists():
        return frame
    there = pd.read_csv(path)
    same = (there["backbone"] == frame["backbone"][0]) & there["paradigm"].isin([*p.paradigms])
    kept = there[same & ~there["paradigm"].isin(frame["paradigm"])]
    order = [*p.paradigms]
    return pd.concat([frame, kept]).sort_values("paradigm", key=lambda x: x.map(order.index), ignore_index=True)


class _Timed:
    """Mean seconds of a step over one block, at each call; `memory`: the highest peak so far, in MB. `parts`: those in
    which a step's batch is taken."""

    def __init__(self, task, cycle, accelerator, parts=1):
        self.task, self.cycle, self.accelerator, self.step, self.memory = task, cycle, accelerator, 0, 0.0
        self.parts = parts
        for role in task.roles.values():
            role.module.to(accelerator.device)

    def __call__(self):
        device = self.accelerator.device
        gc.collect()
        _forget_peak(device)
        began = time.perf_counter()
        for _ in range(self.cycle):
            # At a rate of zero: what is timed stays where training begins.
            update(self.task, self.step, 0, 0.0, self.accelerator, self.parts)
            self.step += 1
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds = (time.perf_counter() - began) / self.cycle
        self.memory = max(self.memory, _peak(device))
        return seconds


def _forget_peak(device):
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    elif sys.platform == "linux":  # what is freed goes back, or the peak would stay; then it starts anew
        ctypes.CDLL(None).malloc_trim(0)
        with open("/proc/self/clear_refs", "w") as f:
            f.write("5")


def _peak(device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    if sys.platform != "linux":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # of the whole run
    with open("/proc/self/status") as f:
        return int(next(line for line in f if line.startswith("VmHWM")).split()[1]) / 1024


def _write(frame, p, backbone, blocks, device):
    path = paths.REPORTS / "cost.csv"
    write_csv(path, frame)
    cells = pd.DataFrame({"paradigm": frame["paradigm"], "base, s": frame["seconds"].map("{:.3g}".format)})
    titles = {k: title for k, title in TITLES.items() if k in frame}
    for key, title in titles.items():
        cells[f"{title} / base"] = [cell(*x, ".2f") for x in frame[[key, f"{key}_low", f"{key}_high"]].to_numpy()]
    cells["base, GFLOP"] = (frame["operations"] / 1e9).map("{:.1f}".format)
    for key, title in titles.items():
        cells[f"{title} / base, operations"] = frame[f"operations_{key}"].map("{:.2f}".format)
    if "tangents" in frame:
        cells["the tangents once / a training of base, operations"] = frame["tangents"].map("{:.2f}".format)
    for key, title in {"base": "base", **titles}.items():
        if key != "every":  # its peak is GAD's
            cells[f"{title}, MB"] = frame[f"memory_{key}"].round().astype(int)
    what = torch.cuda.get_device_name() if device.type == "cuda" else f"{p.threads} CPU thread(s)"
    note = NOTE.format(
        backbone=backbone, blocks=blocks, device=what, batch=p.distill.batch, form=p.gad.form, pairs=p.gad.pairs,
        kept=p.endpoints.pairs,
        map=f" (`map`: {p.controls['map'].pairs})" if "map" in titles else "",
    )
    over = {title: ", ".join(frame.loc[frame[key] > MOST, "paradigm"]) for key, title in titles.items()}
    told = "; ".join(f"{title}: {names}" for title, names in over.items() if names) or "none"
    told = f"Of more than {MOST:g} times the base's time, {told}."
    path.with_suffix(".md").write_text(f"{note}{cells.to_markdown(index=False)}\n\n{told}\n")
