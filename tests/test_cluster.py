"""The Slurm scripts, run by bash without Slurm: what they would start is what the commands take."""

import os
import shutil
import subprocess

import pytest
import yaml
from accelerate.commands.launch import launch_command_parser

from gad import __main__ as cli
from gad import params, stages
from gad.params import ROOT, Run

SCRIPTS = sorted((ROOT / "slurm").glob("*.sbatch"))
RECORD = """#!/usr/bin/env bash
printf '%s\\n' "${0##*/}" "$@" > "$CALLS/$(printf '%03d' "$(ls "$CALLS" | wc -l)")"
"""
SRUN = """#!/usr/bin/env bash
while [[ $1 == --* ]]; do shift; done
for ((SLURM_NODEID = 0; SLURM_NODEID < SLURM_JOB_NUM_NODES; SLURM_NODEID++)); do export SLURM_NODEID; "$@"; done
"""
SCONTROL = """#!/usr/bin/env bash
[[ $1 == show ]] && printf 'node7\\nnode8\\n' || printf '%s\\n' "$@" > requeued
"""


@pytest.fixture
def batch(tmp_path):
    """`batch(script, *arguments, **SLURM_…)`: the commands it starts, in order; stubs stand for what it calls."""
    stubs, calls = tmp_path / ".venv/bin", tmp_path / "calls"
    stubs.mkdir(parents=True)
    stub = {"accelerate": RECORD, "dvc": RECORD, "srun": SRUN, "scontrol": SCONTROL}
    for name, text in stub.items():
        (stubs / name).write_text(text)
        (stubs / name).chmod(0o755)

    def run(script, *arguments, code=0, **slurm):
        calls.mkdir(exist_ok=True)
        env = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_")}
        env |= {"CALLS": str(calls), "SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_JOB_ID": "1234567"}
        env |= {f"SLURM_{k}": str(v) for k, v in slurm.items()}
        command = ["bash", str(ROOT / "slurm" / script), *arguments]
        done = subprocess.run(command, env=env, cwd=tmp_path, text=True, capture_output=True)
        assert done.returncode == code, done.stderr
        return [f.read_text().splitlines() for f in sorted(calls.iterdir())] if code == 0 else done.stderr

    run.folder, run.stubs = tmp_path, stubs
    return run


@pytest.fixture
def distilled(monkeypatch):
    """`distilled(arguments of gad)`: the student that the command line trains, without training it."""
    made = []
    monkeypatch.setattr(stages, "distill", lambda run, p, track: made.append(run))

    def parse(arguments):
        assert cli.main(arguments) == 0
        return made[-1]

    return parse


def launched(call):
    """What `accelerate launch` makes of a call."""
    assert call[:2] == ["accelerate", "launch"]
    args = launch_command_parser().parse_args(call[2:])
    assert args.module and args.training_script == "gad"
    return args


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.stem)
def test_is_bash_and_names_no_cluster(path):
    subprocess.run(["bash", "-n", path], check=True)
    options = [line for line in path.read_text().splitlines() if line.startswith("#SBATCH")]
    assert options and not [o for o in options if "account" in o or "partition" in o]


@pytest.mark.parametrize("gpus", [1, 8])
def test_student_on_one_node(batch, distilled, gpus):
    [call] = batch("student.sbatch", "sd2", "tdm", "gad", JOB_NUM_NODES=1, GPUS_ON_NODE=gpus)
    args = launched(call)
    assert (args.num_machines, args.num_processes, args.multi_gpu) == (1, gpus, gpus > 1)
    run = distilled(args.training_script_args)
    assert run == Run("sd2", "tdm", "gad", 0) and run in params.load().runs()


@pytest.mark.parametrize("gpus", [1, 4])
def test_student_on_two_nodes(batch, distilled, gpus):
    slurm = {"JOB_NUM_NODES": 2, "GPUS_ON_NODE": gpus, "CPUS_PER_TASK": 16, "JOB_NODELIST": "node[7-8]"}
    calls = [launched(call) for call in batch("student.sbatch", "pixart", "ladd", "base", "0", **slurm)]
    assert [args.machine_rank for args in calls] == [0, 1]
    for args in calls:
        assert (args.num_machines, args.num_processes, args.multi_gpu) == (2, 2 * gpus, True)
        assert (args.main_process_ip, args.main_process_port) == ("node7", calls[0].main_process_port)
        assert distilled(args.training_script_args) in params.load().runs()


def test_student_without_a_name_is_one_line(batch):
    assert batch("student.sbatch", code=2, JOB_NUM_NODES=1, GPUS_ON_NODE=8).startswith("gad: give backbone")


def test_student_out_of_time_goes_back_into_the_queue(batch):
    """The signal of --signal reaches the script, not the training, which would take another minute."""
    slow = '#!/usr/bin/env bash\nkill -USR1 "$PPID"\nexec sleep 60\n'
    (batch.stubs / "accelerate").write_text(slow)
    batch("student.sbatch", "sd2", "tdm", "gad", JOB_NUM_NODES=1, GPUS_ON_NODE=1)
    assert (batch.folder / "requeued").read_text().split() == ["requeue", "1234567"]


def test_grid_runs_each_cell_its_evaluation_and_its_use(batch):
    p = params.load()
    shutil.copy(ROOT / "dvc.yaml", batch.folder)
    runs = {
        ("distill" if key == "grid" else f"distill-{key.removeprefix('further.')}") + f"@{run}"
        for key, block in p.blocks.items()
        for run in block.runs(p.seeds.distill)
    }  # test_repo.py holds these to dvc.yaml
    used = [stage for stage in yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"] if stage.startswith("use")]
    assert "use" in used and "use-controls" not in used
    for kind in ("distill@", "distill-baselines@", "distill-controls@"):
        cell = next(run for run in sorted(runs) if run.startswith(kind))
        cells = batch.folder / "cells"
        cells.write_text(f"another\n{cell}\n")
        stages = [cell.replace("distill", stage) for stage in ("distill", "evaluate", "use")]
        stages = stages if stages[2].split("@")[0] in used else stages[:2]
        calls = batch("grid.sbatch", str(cells), ARRAY_TASK_ID=2)[-len(stages):]
        assert calls == [["dvc", "--wait-for-lock", "repro", "-s", stage] for stage in stages]


def test_grid_beyond_its_list_is_one_line(batch):
    (batch.folder / "cells").write_text("one\n")
    assert batch("grid.sbatch", "cells", code=1, ARRAY_TASK_ID=2) == "gad: cells has no line 2\n"
