"""The command line at smoke size, in a copy of the package: teacher to student, and a student killed on its way."""

import filecmp
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pandas as pd
import psutil
import pytest
import torch
import yaml
from diffusers import DiffusionPipeline
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from gad.graph import sandbox
from gad.params import ROOT

SMOKE = yaml.safe_load((ROOT / "tests/smoke.yaml").read_text())
RUN = "sana-tdm-gad-0"


def gad(folder, *arguments, **options):
    command = [sys.executable, "-W", "ignore", "-m", "gad", *arguments]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(folder), "TQDM_DISABLE": "1"}
    return subprocess.Popen(command, cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            **options)


def done(folder, *arguments):
    process = gad(folder, *arguments)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return out


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = sandbox(tmp_path_factory.mktemp("gad") / "copy", SMOKE)
    for arguments in (("autoencoder", "dc"), ("teacher", "sana"), ("diagnose", "sana")):
        done(folder, *arguments)
    return folder


DISTILL = ("--set", "distill.steps=40", "--set", "distill.save_every=2", "distill", "sana", "tdm", "gad")


def kill_on_its_way(place):
    """Start the student and SIGKILL it after its first checkpoint; returns the checkpoint."""
    state = place / "data/.resume" / RUN / "state.safetensors"
    assert not state.exists()  # a finished run leaves none
    process = gad(place, *DISTILL)
    while not state.exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    return state


@pytest.mark.slow
def test_killed_student_resumes_with_the_same_bits(place):
    done(place, *DISTILL)
    kept = place / "whole"
    kept.mkdir()
    for part in ("students", "logs", "probes"):
        shutil.move(place / "data" / part, kept / part)
    kill_on_its_way(place)
    assert not (place / "data/students" / RUN).exists()
    done(place, *DISTILL)
    for part in ("students", "logs", "probes"):
        files = [f.relative_to(kept) for f in (kept / part).rglob("*") if f.is_file()]
        assert files
        same, different, missing = filecmp.cmpfiles(kept, place / "data", files, shallow=False)
        assert not different and not missing and len(same) == len(files)

    student = DiffusionPipeline.from_pretrained(place / "data/students" / RUN, local_files_only=True)
    image = student("a red circle", num_inference_steps=2, guidance_scale=1.0, height=64, width=64, output_type="pt",
                    use_resolution_binning=False, complex_human_instruction=None).images
    assert image.shape == (1, 3, 64, 64) and torch.isfinite(image).all()
    info = json.loads((place / "data/students" / RUN / "gad.json").read_text())
    assert info["paradigm"] == "tdm" and info["seed"] == 0 and {"form", "h", "lam"} <= info["gad"].keys()
    assert (place / "data/students" / RUN / "README.md").read_text().startswith("---\nlibrary_name: diffusers")

    state = kill_on_its_way(place)
    state.write_bytes(state.read_bytes()[:-10])
    process = gad(place, *DISTILL)
    _, error = process.communicate(timeout=300)
    assert process.returncode == 1 and "is not a readable checkpoint" in error and "Traceback" not in error


SHARED = ("--set", "distill.steps=3", "--set", "distill.batch=4", "--set", "gad.pairs=4", "--set",
          "distill.save_every=1", "distill", "sana", "tdm", "gad")


def launch(folder, *arguments):
    """Two processes of one machine. On GPUs `accelerate launch` starts them; on CPUs it would want MPI."""
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port",
               "29511", "-m", "gad", *arguments]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(folder), "TQDM_DISABLE": "1",
           "ACCELERATE_USE_CPU": "true"}
    return subprocess.Popen(command, cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def take(place):
    """The student's weights and log, moved out of the way."""
    weights = load_file(next((place / "data/students" / RUN / "transformer").glob("*.safetensors")))
    log = pd.read_csv(place / "data/logs" / f"{RUN}.csv")
    for part in ("students", "logs", "probes"):
        shutil.rmtree(place / "data" / part)
    return weights, log


def gap(a, b):
    """Largest difference of two sets of weights. Softmax is blind to the biases of keys: their gradients are rounding,
    which Adam makes into whole steps."""
    return max((a[k] - b[k].float()).abs().max().item() for k in a if not k.endswith("to_k.bias"))


@pytest.mark.slow
def test_shared_batches_give_the_same_student(place):
    """One process; one in two parts, activations made anew; two processes; and these with one killed on the way."""
    shutil.rmtree(place / "data/.resume" / RUN, ignore_errors=True)
    done(place, *SHARED)
    alone, log = take(place)
    teacher = load_file(next((place / "data/teachers/sana/transformer").glob("*.safetensors")))
    assert gap(alone, teacher) > 5e-5  # it did train
    done(place, "--set", "hardware.accumulate=2", "--set", "hardware.checkpointing=true", *SHARED)
    parts, _ = take(place)
    assert gap(alone, parts) < 1e-5

    process = launch(place, *SHARED)
    out, error = process.communicate(timeout=300)
    assert process.returncode == 0, error
    assert json.loads(out[out.index("{"):])["step"] == 3  # told once
    two, shared = take(place)
    assert gap(alone, two) < 1e-5
    pd.testing.assert_frame_equal(log, shared, rtol=1e-3)

    process = launch(place, *SHARED)
    state = place / "data/.resume" / RUN / "state.safetensors"
    while not state.exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    workers = [c for c in psutil.Process(process.pid).children(recursive=True) if "gad" in c.cmdline()]
    next(w for w in workers if w.environ()["RANK"] == "1").kill()
    _, error = process.communicate(timeout=300)
    assert process.returncode != 0 and state.exists()
    assert "Signal 9 (SIGKILL) received" in error  # the launcher says who died
    process = launch(place, *SHARED)
    assert process.communicate(timeout=300) and process.returncode == 0
    resumed, _ = take(place)
    assert gap(two, resumed) == 0


@pytest.mark.slow
def test_batches_that_cannot_be_shared_stop_before_work(place):
    process = gad(place, "--set", "hardware.accumulate=3", *SHARED)
    _, error = process.communicate(timeout=300)
    assert process.returncode == 1 and "distill.batch=4 cannot be shared" in error and "multiple of 3" in error
    assert "Traceback" not in error
    process = gad(place, "--set", "hardware.accumulate=2", "--set", "controls.map.pairs=3", *SHARED[:-1], "map")
    _, error = process.communicate(timeout=300)
    assert process.returncode == 1 and "controls.map.pairs=3 cannot be shared" in error


@pytest.mark.slow
def test_a_tracker_sees_losses_probes_and_samples(place):
    done(place, *SHARED, "--track", "tensorboard")
    take(place)
    seen = EventAccumulator(str(place / "data/tracking/gad"), size_guidance={"images": 0}).Reload().Tags()
    assert {"student", "fake", "gad", "student_norm", "probe/cos"} <= {*seen["scalars"]}
    assert any("samples" in tag for tag in seen["images"])
    process = gad(place, *SHARED, "--track", "wandb")
    _, error = process.communicate(timeout=300)
    assert process.returncode == 1 and "track='wandb' is not installed: pip install wandb" in error


@pytest.mark.slow
def test_divergence_stops_with_one_line_and_keeps_the_checkpoint(place):
    process = gad(place, "--set", "paradigms.tdm.lr=1.0e+30", "--set", "distill.steps=20", "--set",
                  "distill.save_every=1", "distill", "sana", "tdm", "base")
    _, error = process.communicate(timeout=300)
    assert process.returncode == 1 and "loss is nan" in error and "Traceback" not in error
    assert (place / "data/.resume/sana-tdm-base-0/state.safetensors").exists()
    assert not (place / "data/students/sana-tdm-base-0").exists()


@pytest.mark.slow
def test_cost_has_a_row_for_every_paradigm(place):
    rows = json.loads(done(place, "--set", "paradigms.dmd.ratio=2", "cost", "sana", "2"))
    assert [r["paradigm"] for r in rows] == list(yaml.safe_load((ROOT / "params.yaml").read_text())["paradigms"])
    for row in rows:
        assert row["seconds"] > 0 and row["gad_low"] <= row["gad"] <= row["gad_high"]
        assert min(row["memory_base"], row["memory_gad"], row["memory_every"]) > 0
    assert (place / "reports/cost.md").read_text().count("\n| ") == 1 + len(rows)


@pytest.mark.slow
def test_trials_keep_a_row_each_and_no_student(place):
    trial = ("--set", "distill.steps=2", "trial", "sana", "ladd", "base")
    first = json.loads(done(place, *trial))
    assert first["scene_low"] <= first["scene"] <= first["scene_high"] and abs(first["cos"]) <= 1
    done(place, *trial)  # again: the same row
    done(place, "--set", "paradigms.ladd.recon=0.5", *trial)
    rows = (place / "reports/tuning.csv").read_text().splitlines()
    assert len(rows) == 3 and "paradigms.ladd.recon=0.5" in rows[2]
    assert (place / "reports/tuning.md").read_text().count("| ladd ") == 2
    assert not (place / "data/students/sana-ladd-base-0").exists()
    assert not (place / "data/.resume/trial-sana-ladd-base-0").exists()
