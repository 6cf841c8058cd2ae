"""The whole graph of `dvc.yaml`: what of it must run, stages side by side, and copies of it elsewhere."""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from pathlib import Path

import yaml

from . import paths, readme
from .params import ROOT, load

PROGRESS = re.compile(r": step \d+/\d+")  # the lines of gad.training that a terminal sees
LOCAL = "data/students/"  # outputs that are not shipped: missing is no reason to run a stage
PENDING = paths.resume("fresh")  # stages that an interrupted fresh run still owes
STUDENTS = ("distill", "evaluate", "chain", "use")
READERS = ("evaluate", "chain", "use")  # of students; figures also want a student's probes, which ship
TRIALS = "reports/tuning.csv"  # made by hand, trial by trial, and read by the tables
SCRATCH = ("__pycache__", ".ipynb_checkpoints")
ALONE = {  # no blocks beside the grid
    "baselines": {"paradigms": []}, "controls": {"variants": []}, "maps": {"variants": []},
    "rates": {"variants": []}, "lengths": {"variants": []}, "baseline_maps": {"variants": []},
    "replicas": {"seeds": []},
}
FRESH = {  # each has all of the one before
    None: (),
    "grid": STUDENTS,  # the paper's: of the grid and its baselines
    "students": STUDENTS,
    "all": ("autoencoder", "judge", "teacher", "diagnose", "nearby", "references", *STUDENTS, "tables", "figures",
            "page"),
}
MINUTES = {  # measured, one core each
    "autoencoder": 25, "judge": 12, "teacher": 120, "diagnose": 9, "nearby": 10, "references": 9, "distill": 6,
    "evaluate": 2, "chain": 1, "use": 3, "tables": 2,
}


class PipelineError(RuntimeError):
    """A user's mistake or a failed stage; the message is one line."""


def reproduce(jobs: int = 2, fresh: str | None = None):
    """Fetch what ships, then run what is missing or changed, `jobs` stages side by side.

    `fresh`: "grid", "students" or "all" runs those stages again although nothing changed; interrupted, the next call
    goes on with them. Raises PipelineError when a stage failed; what does not depend on it still ran.
    """
    p = load()  # a mistake in params.yaml shows before anything runs
    p.check_forms((*p.runs(), *p.replicas))
    _without_outputs()
    parents = _parents()
    changed, missing, lost, altered = _status()
    if fetch := (lost - changed) | altered:
        print(f"fetching the results of {len(fetch)} stages from data/store", flush=True)
        # What is not there runs below. To name all stages would take DVC minutes: only where some changed. Altered
        # outputs, of a run at other parameters, make what reads them look changed.
        _dvc("pull", "--allow-missing", *(sorted(fetch) if changed and not altered else ()), check=False)
        changed, missing, lost, altered = _status()
        changed |= altered
    forced = _forced(fresh, parents)
    todo = _closure(changed | lost | forced, parents, missing)
    failed = _run([s for s in parents if s in todo], parents, forced, jobs) if todo else []
    if failed:
        raise PipelineError(f"{len(failed)} of {len(todo)} stages failed or had to wait: {', '.join(failed)}")
    _dvc("repro", "--allow-missing")
    readme.fill(ROOT / "README.md")
    print("everything is up to date")


# What must run


def _without_outputs():
    """PipelineError where a stage's notebook was run in place: DVC would take its stages, and all that follows, for
    changed."""
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        try:
            cells = json.loads(path.read_text())["cells"]
            run = any(c.get("outputs") or c.get("execution_count") for c in cells)
        except (ValueError, KeyError, TypeError, AttributeError):
            name = path.relative_to(ROOT)
            raise PipelineError(f"{name} is not a notebook, or half of one: `git checkout {name}`") from None
        if run:
            name = path.relative_to(ROOT)
            raise PipelineError(f"{name} holds outputs, by which its stages would run anew: `make strip` empties it")


def _parents() -> dict[str, set[str]]:
    """Every stage, in the order of dvc.yaml, with the stages it needs."""
    parents = {name: set() for name in _dvc("stage", "list", "--name-only").split()}
    for parent, child in re.findall(r'"(.+?)" -> "(.+?)"', _dvc("dag", "--dot")):
        parents[child].add(parent)
    for stage in parents:  # DVC has no edge here: a miniature teacher reads no photographs' captions
        if _group(stage) == "teacher":
            parents[stage] |= {s for s in parents if _group(s) == "coco"}
    return parents


def _status() -> tuple[set[str], set[str], set[str], set[str]]:
    """Stages that changed, that miss outputs, that miss outputs which ship, and whose outputs are others."""
    changed, missing, lost, altered = set(), set(), set(), set()
    for stage, entries in json.loads(_dvc("status", "--json")).items():
        for entry in entries:
            if not isinstance(entry, dict):  # "changed command"
                changed.add(stage)
                continue
            for kind, items in entry.items():
                for path, state in items.items():
                    gone = not (ROOT / path).exists()
                    if state == "not in cache" and not gone:  # here, and right
                        continue
                    if kind == "changed outs" and state == "modified":
                        altered.add(stage)
                    elif state not in ("deleted", "not in cache"):
                        changed.add(stage)
                    elif kind == "changed outs":
                        missing.add(stage)
                        if not path.startswith(LOCAL):
                            lost.add(stage)
    return changed, missing, lost, altered


def _forced(fresh, parents) -> set[str]:
    """Stages to run although unchanged: those of `fresh`, or those an interrupted run still owes."""
    begun, *owed = _pending()
    order = [*FRESH]
    if begun and order.index(fresh) <= order.index(begun):
        print(f"going on with FRESH={begun}, which was interrupted (rm {PENDING} forgets it)")
        return set(owed) & set(parents)
    forced = {s for s in parents if _group(s) in FRESH[fresh]}
    if fresh == "grid":
        forced = {s for s in forced if re.fullmatch(r"\w+(-baselines)?", s.partition("@")[0])}
    if fresh:  # training must not go on from what an earlier run left
        names = {s.partition("@")[2] for s in forced if "@" in s}
        for found in PENDING.parent.glob("*"):
            if fresh == "all" or any(name in found.name for name in names):
                shutil.rmtree(found, ignore_errors=True)
    _owe(forced, fresh)
    return forced


def _pending() -> list[str | None]:
    """What an interrupted run was asked for, and the stages it still owes."""
    if not PENDING.exists():
        return [None]
    said = PENDING.read_text("utf-8", "replace").split()
    if said and said[0] in FRESH:
        return said
    print(f"{PENDING} does not say what was interrupted: left out of account", file=sys.stderr, flush=True)
    return [None]


def _owe(stages, fresh=None):
    """`fresh`: what the run was asked for, where it begins."""
    if stages:
        fresh = fresh or _pending()[0]
        PENDING.parent.mkdir(parents=True, exist_ok=True)
        part = PENDING.with_suffix(".part")
        part.write_text("\n".join([fresh, *sorted(stages)]) + "\n")
        os.replace(part, PENDING)
    else:
        PENDING.unlink(missing_ok=True)


def _closure(start, parents, missing=frozenset()) -> set[str]:
    """`start`, all that follows it, and whatever of their inputs is missing."""
    todo, queue = set(), list(start)
    while queue:
        if (stage := queue.pop()) not in todo:
            todo.add(stage)
            queue += [child for child, needs in parents.items() if stage in needs]
            if _group(stage) in READERS:
                queue += parents[stage] & missing
    return todo


# Running it


def _run(waiting, parents, forced, jobs) -> list[str]:
    """Run each stage of `waiting` once those it needs are done. Returns the failed and what follows them."""
    total, running, failed, owed = len(waiting), {}, [], set(forced)
    devices = _devices() if jobs > 1 else []
    left = _Left(jobs)
    print(f"{total} stages to run or check, {jobs} at a time: at most {left(waiting, running)}", flush=True)
    with ThreadPoolExecutor(jobs) as pool:
        while waiting or running:
            busy = {*waiting, *(stage for stage, *_ in running.values())}
            for stage in [s for s in waiting if not parents[s] & busy][:jobs - len(running)]:
                waiting.remove(stage)
                taken = [device for *_, device in running.values()]
                device = min(devices, key=taken.count, default=None)
                running[pool.submit(_stage, stage, stage in forced, device)] = stage, time.monotonic(), device
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                (stage, began, _), (outcome, error) = running.pop(future), future.result()
                minutes = (time.monotonic() - began) / 60
                if error:
                    after = _closure([stage], parents)
                    failed += [stage, *(s for s in waiting if s in after)]
                    waiting = [s for s in waiting if s not in after]
                    print(f"{stage}: {error}", file=sys.stderr, flush=True)
                else:
                    owed.discard(stage)
                    _owe(owed)
                    if outcome == "done":
                        left.measured.setdefault(_group(stage), []).append(minutes)
                ended, to_go = total - len(waiting) - len(running), left(waiting, running)
                told = f"[{ended}/{total}] {stage}: {outcome}, {_span(minutes)}"
                print(f"{told}; at most {to_go} to go" if waiting or running else told, flush=True)
    return failed


def _devices() -> list[str]:
    """The GPUs there are for stages, as CUDA_VISIBLE_DEVICES names them."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [device for device in named.split(",") if device]
    import torch  # takes seconds

    return [str(i) for i in range(torch.cuda.device_count())]


def _stage(name: str, force: bool, device: str | None = None) -> tuple[str, str | None]:
    """One `dvc repro` of one stage, on a GPU of its own: what became of it, and the error if it failed."""
    options = ("-s", "-f") if force else ("-s",)
    command = [sys.executable, "-m", "dvc", "--wait-for-lock", "repro", *options, name]
    lines = []
    with subprocess.Popen(command, **_process(device), stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        for line in process.stdout:
            lines.append(line)
            if PROGRESS.search(line):
                print(f"  {line}", end="", flush=True)
    text = "".join(lines)
    if process.returncode:
        return "failed", _reason(text)
    return ("unchanged" if "didn't change" in text else "restored" if "is cached" in text else "done"), None


class _Left:
    """Minutes to go: by the means measured in this run, typical ones until then."""

    def __init__(self, jobs):
        self.jobs, self.measured = jobs, {}

    def expected(self, stage):
        found = self.measured.get(_group(stage))
        return sum(found) / len(found) if found else MINUTES.get(_group(stage), 1)

    def __call__(self, waiting, running):
        now = time.monotonic()
        begun = sum(max(0.0, self.expected(s) - (now - t) / 60) for s, t, _ in running.values())
        return _span((begun + sum(map(self.expected, waiting))) / self.jobs)


def _span(minutes):
    return f"{minutes / 60:.1f} h" if minutes >= 90 else f"{minutes:.1f} min"


def _group(stage):
    """distill for distill@…, distill-controls@… and distill-maps@…"""
    return re.split("[@-]", stage)[0]


def _dvc(*args, check=True) -> str:
    done = subprocess.run([sys.executable, "-m", "dvc", *args], **_process(), capture_output=True)
    if check and done.returncode:
        reason = _reason(done.stdout + done.stderr)
        if "not a git repository" in reason:
            reason += " (clone it, or `dvc config --local core.no_scm true`)"
        raise PipelineError(f"dvc {args[0]}: {reason}")
    return done.stdout


def _process(device=None):
    """Stages say `python`: it must be the one that runs this."""
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", "")))
    own = {"CUDA_VISIBLE_DEVICES": device} if device else {}
    return {"cwd": ROOT, "text": True, "env": {**os.environ, "PATH": path, "DVC_NO_ANALYTICS": "1", **own}}


def _reason(text):
    """The line of DVC's output that says what went wrong."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    for mark in ("gad: ", "ERROR: ", ""):
        if found := [line for line in lines if line.startswith(mark)]:
            return found[-1].removeprefix(mark)
    return "no output"


# The graph elsewhere


def sandbox(folder: Path, overrides: dict, shared: bool = False) -> Path:
    """A copy of the pipeline in `folder`, params.yaml with `overrides` and no rows of others' checkpoints but those of
    `overrides`: from nothing, or `shared`, with the lock, cache and store of this repository."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("gad", "notebooks"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns(*SCRATCH), dirs_exist_ok=True)
    (folder / TRIALS).parent.mkdir(exist_ok=True)
    for name in ("dvc.yaml", ".dvcignore", "CITATION.cff", TRIALS, *(["dvc.lock"] if shared else [])):
        shutil.copy(ROOT / name, folder / name)
    params = yaml.safe_load((ROOT / "params.yaml").read_text()) | {"published": {}}
    (folder / "params.yaml").write_text(yaml.safe_dump(_merged(params, overrides), sort_keys=False))
    config = "[core]\n    no_scm = true\n    analytics = false\n"
    if shared:
        config += f"    remote = store\n['remote \"store\"']\n    url = {paths.DATA / 'store'}\n"
        config += f"[cache]\n    dir = {ROOT / '.dvc/cache'}\n"
    (folder / ".dvc").mkdir(exist_ok=True)
    (folder / ".dvc/config").write_text(config)
    return folder


def _written(folder: Path) -> dict[Path, bytes]:
    """What `sandbox` writes and no run changes, by its place in `folder`."""
    found = [folder / "dvc.yaml", folder / "params.yaml", *(folder / "gad").rglob("*"),
             *(folder / "notebooks").rglob("*")]
    places = [f.relative_to(folder) for f in found if f.is_file()]
    return {place: (folder / place).read_bytes() for place in places if not {*SCRATCH} & {*place.parts}}


def _merged(a: dict, b: dict) -> dict:
    nested = {k: _merged(a[k], v) for k, v in b.items() if isinstance(v, dict) and isinstance(a.get(k), dict)}
    return {**a, **b, **nested}


def _within(folder: Path, *args):
    """`python -m gad.pipeline …` in a sandbox."""
    command = [sys.executable, "-m", "gad.pipeline", *map(str, args)]
    if subprocess.run(command, cwd=folder, env={**os.environ, "PYTHONPATH": str(folder)}).returncode:
        raise PipelineError(f"{args[0]} failed in {folder}")


def smoke(jobs: int = 2, keep: Path | None = None):
    """The whole graph from nothing, at its smallest, in a temporary copy, or one that is kept in the folder `keep`."""
    load()  # as in `reproduce`
    if keep and keep.exists() and (not keep.is_dir() or any(keep.iterdir())):
        raise PipelineError(f"--keep {keep}: something is there already: name another folder")
    overrides = yaml.safe_load((ROOT / "tests/smoke.yaml").read_text())
    with tempfile.TemporaryDirectory() as name:
        _within(sandbox((keep or Path(name)).resolve(), overrides), "reproduce", "--jobs", jobs)


def demo(jobs: int = 2, backbone: str | None = None):
    """One student without and one with GAD from the shipped teacher, in `demo/`: a table and a picture. `backbone`:
    None for the grid's last."""
    p, folder = load(), ROOT / "demo"
    backbone = backbone or p.grid.backbones[-1]
    if backbone not in p.grid.backbones:
        raise PipelineError(f"--backbone {backbone}: the grid has {', '.join(p.grid.backbones)}")
    if not (ROOT / "dvc.lock").exists():
        raise PipelineError("there is no dvc.lock, so no teacher: run `make reproduce` first")
    _without_outputs()
    grid = {"backbones": [backbone], "paradigms": p.grid.paradigms[:1], "variants": ["base", "gad"]}
    only = {"grid": grid, "further": ALONE, "seeds": {"distill": p.seeds.distill[:1]}}
    with tempfile.TemporaryDirectory() as name:
        same = _written(folder) == _written(sandbox(Path(name), only, shared=True))
    begun = (folder / PENDING.relative_to(ROOT)).exists()
    if begun and not same:
        print("what was interrupted in demo/ is not what is asked for now: it starts over", flush=True)
    if not (begun and same):
        shutil.rmtree(folder, ignore_errors=True)
        sandbox(folder, only, shared=True)
    _within(folder, "reproduce", "--jobs", jobs, "--fresh", "students")
    print((folder / "reports/tables/table1.md").read_text())
    print("pictures: demo/reports/figures; the students, as Diffusers pipelines: demo/data/students")
