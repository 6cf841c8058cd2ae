"""The command line at smoke size, in a copy of the package: teacher to student, and a student killed on its way."""

import contextlib
import copy
import filecmp
import importlib
import json
import os
import shutil
import signal
import subprocess
import time
from types import SimpleNamespace

import pandas as pd
import psutil
import pytest
import torch
import yaml
from accelerate import Accelerator
from diffusers import DiffusionPipeline
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from gad import distill, paths
from gad.graph import sandbox
from gad.paradigms import PARADIGMS
from gad.params import ROOT, Run, load
from gad.stages import distillation, weigh
from gad.stages.counting import Operations

# the package has functions by these names
cost, trials = (importlib.import_module(f"gad.stages.{name}") for name in ("cost", "trial"))
SMOKE = yaml.safe_load((ROOT / "tests/smoke.yaml").read_text())
RUN = "sana-tdm-gad-0"


class Place:
    """A copy of the package, and commands in it."""

    def __init__(self, folder, python):
        self.folder, self.python = folder, python

    def __truediv__(self, name):
        return self.folder / name

    def open(self, *arguments):
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(self.folder), "TQDM_DISABLE": "1",
               "ACCELERATE_USE_CPU": "true"}
        return subprocess.Popen([*self.python, "-m", *arguments], cwd=self.folder, env=env, text=True,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    def start(self, *arguments):
        """`python -m gad arguments`."""
        return self.open("gad", *arguments)

    def launch(self, *arguments):
        """The same by two processes. On GPUs `accelerate launch` starts them; on CPUs it would want MPI."""
        return self.open("torch.distributed.run", "--nproc_per_node", "2", "--standalone", "--no-python", *self.python,
                         "-m", "gad", *arguments)

    def rank(self, number):
        """One of the launched processes."""
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                its = process.environ()
                if its.get("RANK") == str(number) and its.get("PYTHONPATH") == str(self.folder):
                    return process

    def run(self, *arguments, start=None):
        """Exit code, output and errors."""
        process = (start or self.start)(*arguments)
        out, error = process.communicate(timeout=300)
        return process.returncode, out, error

    def done(self, *arguments, start=None):
        code, out, error = self.run(*arguments, start=start)
        assert code == 0, error
        return out


@pytest.fixture(scope="module")
def place(tmp_path_factory, forks):
    place = Place(sandbox(tmp_path_factory.mktemp("gad") / "copy", SMOKE), forks.python)
    code, _, error = place.run("teacher", "sana")
    assert code == 1 and "holds no autoencoder: `python -m gad autoencoder dc` trains it" in error
    assert "Traceback" not in error
    for arguments in (("autoencoder", "dc"), ("teacher", "sana"), ("diagnose", "sana")):
        place.done(*arguments)
    return place


DISTILL = ("--set", "distill.steps=16", "--set", "distill.save_every=2", "distill", "sana", "tdm", "gad")


def kill_on_its_way(place):
    """Start the student and SIGKILL it after its first checkpoint; returns the checkpoint."""
    state = place / "data/.resume" / RUN / "state.safetensors"
    assert not state.exists()  # a finished run leaves none
    process = place.start(*DISTILL)
    while not state.exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    return state


@pytest.mark.slow
def test_killed_student_resumes_with_the_same_bits(place):
    place.done(*DISTILL)
    kept = place / "whole"
    kept.mkdir()
    for part in ("students", "logs", "probes"):
        shutil.move(place / "data" / part, kept / part)
    kill_on_its_way(place)
    assert not (place / "data/students" / RUN).exists()
    place.done(*DISTILL)
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
    code, _, error = place.run(*DISTILL)
    assert code == 1 and "is not a readable checkpoint" in error and "Traceback" not in error


SHARED = ("--set", "distill.steps=3", "--set", "distill.batch=4", "--set", "gad.pairs=4", "--set",
          "distill.save_every=1", "distill", "sana", "tdm", "gad")


def take(place, run=RUN):
    """The student's weights and log, moved out of the way."""
    weights = load_file(next((place / "data/students" / run / "transformer").glob("*.safetensors")))
    log = pd.read_csv(place / "data/logs" / f"{run}.csv")
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
    place.done(*SHARED)
    alone, log = take(place)
    teacher = load_file(next((place / "data/teachers/sana/transformer").glob("*.safetensors")))
    assert gap(alone, teacher) > 5e-5  # it did train
    place.done("--set", "hardware.parts=2", "--set", "hardware.checkpointing=true", *SHARED)
    parts, split = take(place)
    assert gap(alone, parts) < 1e-5
    pd.testing.assert_frame_equal(log, split, rtol=1e-3)  # Adam hides a gradient's scale; its norm does not

    out = place.done(*SHARED, start=place.launch)
    assert json.loads(out[out.index("{"):])["step"] == 3  # told once
    two, shared = take(place)
    assert gap(alone, two) < 1e-5
    pd.testing.assert_frame_equal(log, shared, rtol=1e-3)

    process = place.launch(*SHARED)
    state = place / "data/.resume" / RUN / "state.safetensors"
    while not state.exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    place.rank(1).kill()
    _, error = process.communicate(timeout=300)
    assert process.returncode != 0 and state.exists()
    assert "Signal 9 (SIGKILL) received" in error  # the launcher says who died
    place.done(*SHARED, start=place.launch)
    resumed, _ = take(place)
    assert gap(two, resumed) == 0


@pytest.mark.slow
def test_heads_start_alike_in_every_process(place):
    """A discriminator is new, no copy of the teacher: of one seed it is the same, on whichever process."""
    ladd = (*SHARED[:-4], "distill", "sana", "ladd", "base")
    place.done(*ladd)
    _, log = take(place, "sana-ladd-base-0")
    place.done(*ladd, start=place.launch)
    _, shared = take(place, "sana-ladd-base-0")
    assert log["discriminator"].gt(0).all()
    pd.testing.assert_frame_equal(log, shared, rtol=1e-3)


@pytest.mark.slow
def test_batches_that_cannot_be_shared_stop_before_work(place):
    code, _, error = place.run("--set", "hardware.parts=3", *SHARED)
    assert code == 1 and "distill.batch=4 cannot be shared" in error and "multiple of 3" in error
    assert "Traceback" not in error
    code, _, error = place.run("--set", "hardware.parts=2", "--set", "controls.map.pairs=3", *SHARED[:-1], "map")
    assert code == 1 and "controls.map.pairs=3 cannot be shared" in error


@pytest.mark.slow
def test_a_tracker_sees_losses_probes_and_samples(place):
    place.done(*SHARED, "--track", "tensorboard")
    take(place)
    found = EventAccumulator(str(place / "data/tracking" / RUN), size_guidance={"images": 0}).Reload()
    seen = found.Tags()
    assert {"student", "fake", "gad", "student_norm", "probe/cos"} <= {*seen["scalars"]}
    assert any("samples" in tag for tag in seen["images"])
    assert found.Scalars("probe/cos")[-1].step == 3  # the finished student too
    code, _, error = place.run(*SHARED, "--track", "wandb")
    assert code == 1 and "track='wandb' is not installed: pip install wandb" in error


def test_samples_for_trackers_have_no_graph(mini, monkeypatch):
    """Else that of a whole sampler for eight images stays beside the training: at full size tens of GB."""
    backbone, seen = mini("sd2"), []
    student, cond = copy.deepcopy(backbone.network).requires_grad_(True), backbone.encode(["a red circle"])
    decode = backbone.decode
    monkeypatch.setattr(backbone, "decode", lambda z: seen.append((len(z), z.requires_grad)) or decode(z))
    told = SimpleNamespace(trackers=[], log=lambda probe, step: seen.append(probe))
    distill._show(backbone, student, cond, 2, 0, {"cos": 1.0}, told)
    assert seen == [(1, False), {"probe/cos": 1.0}]


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["base", "gad"])
def test_divergence_stops_with_one_line_and_keeps_the_checkpoint(place, variant):
    run = f"sana-tdm-{variant}-0"
    shutil.rmtree(place / "data/.resume" / run, ignore_errors=True)
    code, _, error = place.run("--set", "paradigms.tdm.lr=1.0e+30", "--set", "distill.steps=20", "--set",
                               "distill.save_every=1", "distill", "sana", "tdm", variant)
    assert code == 1 and "the fake loss is nan at step 1: lower its lr or gad.lam" in error
    assert "Traceback" not in error
    assert (place / "data/.resume" / run / "state.safetensors").exists()
    assert not (place / "data/students" / run).exists()


@pytest.mark.slow
def test_diagnosis_is_shared_by_two_processes(place):
    """The same bytes as of one, whose parts are as large; what stopped at its end has all of it still to go on with."""
    arguments = ("--set", "hardware.tangents=1", "--set", "evaluation.batch=1", "diagnose", "sana")
    names = ("endpoints/sana/train", "endpoints/sana/probe", "endpoints/sana/samples", "diagnosis/sana/test")
    files = [place / f"data/{name}.safetensors" for name in names] + [place / "data/diagnosis/sana/floors.json"]
    told = json.loads(place.done(*arguments))
    alone = [f.read_bytes() for f in files]
    for f in files:
        f.unlink()
    last = place / "data/diagnosis/sana/published.csv"
    last.unlink()
    last.mkdir()
    assert place.run(*arguments, start=place.launch)[0] != 0
    begun = {f.name.split("-")[2]: len([*f.iterdir()]) for f in (place / "data/.resume").glob("diagnose-sana-*")}
    assert begun.keys() == {"train", "probe", "samples", "test"} and all(begun.values())
    last.rmdir()
    out = place.done(*arguments, start=place.launch)
    assert [f.read_bytes() for f in files] == alone and json.loads(out[out.index("{"):]) == told  # and it is told once
    assert not list((place / "data/.resume").glob("diagnose-*"))


@pytest.mark.slow
def test_paths_of_another_number_of_steps_stop_before_training(place):
    """Base students learn nothing from them."""
    code, _, error = place.run("--set", "backbones.sana.student_steps=4", *SHARED)
    assert code == 1 and "backbones.sana.student_steps=4: data/endpoints/sana holds the teacher's paths at" in error
    assert "times of 2 steps: run its diagnose stage again" in error and "Traceback" not in error
    place.done("--set", "backbones.sana.student_steps=4", *SHARED[:-1], "base")
    take(place, "sana-tdm-base-0")


@pytest.fixture
def within(place, monkeypatch):
    """`within(KEY=VALUE, …)`: the copy's parameters, in a process whose data are the copy's too."""
    monkeypatch.setattr(paths, "DATA", place / "data")
    return lambda **over: load(place / "params.yaml", **over)


@pytest.mark.slow
def test_terms_are_weighed_beside_their_paradigm(within):
    own = within().model_dump()["controls"]
    few = {k: own[k] for k in ("longer", "map", "rkd", "every4", "slower", "slower_gad", "thrice")}
    over = {"paradigms.dmd.ratio": 2, "controls": few, "gad.lam": 0.5}
    run = Run("sana", "dmd", "base", 0)
    found = weigh(run, within(**over), 3)
    assert {*found} == {"base", "gad", "map", "rkd", "every4", "slower_gad"} and min(found.values()) > 0
    assert found["every4"] == found["slower_gad"] != found["gad"]  # which smoke.yaml gives fewer pairs
    fitted = {"hardware.parts": 2, "hardware.checkpointing": True, "controls.map.pairs": 2}
    parts = weigh(run, within(**over | fitted | {"gad.lam": 1.0}), 3)
    assert "rkd" not in parts and parts["base"] == pytest.approx(found["base"], rel=1e-3)
    assert parts["gad"] == pytest.approx(2 * found["gad"], rel=1e-3)


def test_operations_are_those_of_products_forward_and_backward():
    w, x = torch.randn(5, 7, requires_grad=True), torch.randn(3, 5, requires_grad=True)
    with Operations() as counted:
        (x @ w).tanh().sum().backward()
    assert counted.total == 3 * 2 * 3 * 5 * 7  # the product and its two gradients


@pytest.mark.parametrize("groups", [1, 2, 8])
def test_operations_of_a_convolution_know_its_groups(groups):
    convolution, x = torch.nn.Conv2d(8, 16, 3, stride=2, groups=groups), torch.randn(2, 8, 9, 9, requires_grad=True)
    with Operations() as counted:
        convolution(x).sum().backward()
    assert counted.total == 3 * 2 * (2 * 16 * 4 * 4) * (8 // groups * 9)  # each output's products, and both gradients


@pytest.mark.slow
def test_cost_has_a_row_for_every_paradigm(place):
    own = yaml.safe_load((ROOT / "params.yaml").read_text())["paradigms"]
    few = {"tdm": own["tdm"], "dmd": own["dmd"] | {"ratio": 1}}
    rows = []
    for given, only in (({"tdm": few["tdm"]}, ()), (few, ("--paradigms", "dmd"))):
        rows += json.loads(place.done("--set", f"paradigms={json.dumps(given)}", "cost", "sana", "1", *only))
    assert [r["paradigm"] for r in rows] == [*few]
    for row in rows:
        assert row["seconds"] > 0 and row["gad_low"] <= row["gad"] <= row["gad_high"]
        assert min(row["memory_base"], row["memory_gad"], row["memory_every"]) > 0
        assert row["operations"] > 0 and 1 < row["operations_every"] < row["operations_gad"] < row["operations_map"]
    kept = pd.read_csv(place / "reports/cost.csv").set_index("paradigm")["seconds"]
    assert [*kept.index] == [*few]  # the row that was there too
    assert [*kept] == [pytest.approx(row["seconds"], rel=1e-5) for row in rows]
    page = (place / "reports/cost.md").read_text()
    assert page.count("\n| ") == 1 + len(rows) and "Of more than 1.5 times the base's time, " in page


@pytest.mark.slow
def test_trials_keep_a_row_each_and_no_student(place):
    trial = ("--set", "distill.steps=2", "trial", "sana", "ladd", "base")
    (place / "reports/tuning.csv").unlink()
    first = json.loads(place.done(*trial))
    assert first["scene_low"] <= first["scene"] <= first["scene_high"] and abs(first["cos"]) <= 1
    place.done("--set", "paradigms.ladd.recon=0.5", *trial)
    rows = (place / "reports/tuning.csv").read_text().splitlines()
    assert len(rows) == 3 and "paradigms.ladd.recon=0.5" in rows[2]
    trials._append(place / "reports/tuning.csv", first | {"scene": 0.25})  # again: the same row
    assert pd.read_csv(place / "reports/tuning.csv")["scene"].tolist()[0] == 0.25
    assert (place / "reports/tuning.md").read_text().count("| ladd ") == 2
    assert not (place / "data/students/sana-ladd-base-0").exists()
    assert not list((place / "data/.resume").glob("trial-*"))


def test_trials_of_other_settings_have_other_folders(monkeypatch):
    def seen(run, p, folder, work, accelerator):
        raise KeyError(work)

    monkeypatch.setattr(trials, "student", seen)
    made = []
    for lr in (1e-4, 1e-4, 2e-4):
        with pytest.raises(KeyError) as error:
            trials.trial(Run("sana", "ladd", "base", 0), load(**{"paradigms.ladd.lr": lr}), {})
        made.append(error.value.args[0])
    assert made[0] == made[1] != made[2] and "sana-ladd-base-0" in made[2].name


def test_a_paradigm_without_an_entry_stops_before_anything_is_loaded(monkeypatch, tmp_path):
    monkeypatch.delitem(PARADIGMS, "ladd")
    monkeypatch.setattr(distillation, "placed", None)
    fix = r"paradigms\.ladd: gad/paradigms/ladd\.py is there, but PARADIGMS in .* has no entry for it: add one"
    with pytest.raises(ValueError, match=fix):
        distillation.student(Run("sana", "ladd", "base", 0), load(), tmp_path, tmp_path, Accelerator(cpu=True))
