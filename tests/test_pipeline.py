"""The notebook runner, and the graph at its smallest size in a copy of the repository."""

import json
import os
import shutil
import subprocess
import sys
import threading

import nbformat
import pytest
import yaml
from nbformat.v4 import new_code_cell, new_notebook, new_output

from gad import graph, params, paths, pipeline, tables
from gad.params import ROOT, Run

SMOKE = yaml.safe_load((ROOT / "tests/smoke.yaml").read_text())


@pytest.fixture
def own_place(monkeypatch, tmp_path):
    """Nothing of the runner's leaves the test: scratch files go to tmp_path, the environment is restored."""
    monkeypatch.setattr(paths, "DATA", tmp_path / "data")
    monkeypatch.setattr(pipeline, "ROOT", tmp_path)
    monkeypatch.setattr(graph, "ROOT", tmp_path)
    monkeypatch.setattr(graph, "PENDING", tmp_path / "data/.resume/fresh")
    before = dict(os.environ)
    yield tmp_path
    os.environ.clear()
    os.environ.update(before)


def notebook(folder, *sources, name="n.ipynb", default="seed = 0"):
    cells = [new_code_cell(default, metadata={"tags": ["parameters"]}), *map(new_code_cell, sources)]
    nbformat.write(new_notebook(cells=cells), folder / name)
    return folder / name


def test_executed_notebook_is_byte_stable(own_place):
    loop = "    print(i, seed, flush=True)\n    print('to stderr', file=sys.stderr, flush=True)"
    source = notebook(own_place, f"import sys\nfor i in range(3):\n{loop}", "seed")
    for name in ("a.ipynb", "b.ipynb"):
        pipeline.execute(source, own_place / "out" / name, {"seed": 7})
    assert (own_place / "out/a.ipynb").read_bytes() == (own_place / "out/b.ipynb").read_bytes()
    made = nbformat.read(own_place / "out/a.ipynb", 4)
    nbformat.validate(made)
    assert made.cells[2].outputs[0].text == "0 7\n1 7\n2 7\n" and len(made.cells[2].outputs) == 1
    assert made.cells[3].outputs[0].data["text/plain"] == "7"
    assert not list((own_place / "data").rglob("*.ipynb"))


@pytest.mark.parametrize(("raised", "said"), [
    ("ValueError('first line\\nthe last line')", r"^ValueError: the last line \(see data"),
    ("type('OutOfMemoryError', (RuntimeError,), {})('CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has')",
     r"^CUDA out of memory; what takes less: hardware\.parts, .* \(see data"),
])
def test_failed_notebook_is_one_line_and_kept(own_place, raised, said):
    source = notebook(own_place, f"raise {raised}")
    with pytest.raises(pipeline.PipelineError, match=said) as error:
        pipeline.execute(source, own_place / "out.ipynb", {})
    assert "\n" not in str(error.value) and not (own_place / "out.ipynb").exists()
    kept = nbformat.read(own_place / "data/.resume/notebooks/out.ipynb", 4)
    assert any(o.output_type == "error" for c in kept.cells for o in c.get("outputs", []))


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["notebooks/none.ipynb", "x.ipynb"], "does not exist"),
        (["notebooks/03_distill.ipynb", "x.ipynb", "--set", "h=1"], "backbone, paradigm, variant, seed"),
        (["notebooks/03_distill.ipynb", "x.ipynb", "--set", "backbone=none"],
         f"there are {', '.join(params.load().backbones)}"),
        (["notebooks/03_distill.ipynb", "x.ipynb", "--set", "seed"], "KEY=VALUE"),
        (["notebooks/03_distill.ipynb", "x.ipynb", "--set", "seed=-1"], "seed=-1 is no seed: give 0 to 2147483647"),
    ],
)
def test_mistakes_are_one_line_before_a_kernel_starts(arguments, said, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert pipeline.main(arguments) == 1
    error = capsys.readouterr().err
    assert said in error and error.startswith("gad: ") and error.count("\n") == 1


def test_wrong_params_stop_everything(capsys, monkeypatch):
    def refuse():
        raise params.ParamsError("params.yaml: gad.h=-1: input should be greater than 0")

    monkeypatch.setattr(graph, "load", refuse)
    assert pipeline.main(["reproduce"]) == 1
    assert capsys.readouterr().err == "gad: params.yaml: gad.h=-1: input should be greater than 0\n"


def test_a_smoke_run_of_no_parameters_is_one_line(capsys, monkeypatch, tmp_path):
    (tmp_path / "params.yaml").write_text("gad: [1, 2")
    monkeypatch.setattr(graph, "load", lambda: params.load(tmp_path / "params.yaml"))
    monkeypatch.setattr(graph, "sandbox", lambda *_: pytest.fail("a copy is made"))
    assert pipeline.main(["smoke"]) == 1
    error = capsys.readouterr().err
    assert "is not YAML" in error and error.startswith("gad: ") and error.count("\n") == 1


def test_a_smoke_run_is_kept_where_nothing_is(capsys, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setattr(graph, "sandbox", lambda *_: pytest.fail("a copy is made"))
    for there in (tmp_path, tmp_path / "file"):
        assert pipeline.main(["smoke", "--keep", str(there)]) == 1
        said = f"gad: --keep {there}: something is there already: name another folder\n"
        assert capsys.readouterr().err == said


def test_scrub_keeps_what_a_reader_sees():
    cell = new_code_cell("1", metadata={"tags": ["t"], "papermill": {"duration": 1.2}, "execution": {}})
    cell.outputs = [
        new_output("stream", name="stdout", text="a"),
        new_output("stream", name="stderr", text="warning"),
        new_output("stream", name="stdout", text="b"),
        new_output("display_data", {"text/plain": "<Grid at 0x7f8aa06e6210>"}),
    ]
    made = pipeline.scrub(new_notebook(cells=[cell], metadata={"papermill": {}, "language_info": {"name": "python"}}))
    assert set(made.metadata) == {"kernelspec"} and made.cells[0].metadata == {"tags": ["t"]}
    assert [o.get("text") or o.data["text/plain"] for o in made.cells[0].outputs] == ["ab", "<Grid>"]


PARENTS = {"a": set(), "b@1": {"a"}, "b@2": {"a"}, "use@1": {"b@1"}, "use@2": {"b@2"}, "d": {"use@1", "use@2", "b@1"}}


@pytest.mark.parametrize(
    "start, missing, todo",
    [
        ({"b@1"}, set(), {"b@1", "use@1", "d"}),
        ({"use@1"}, {"b@1", "b@2"}, {"b@1", "use@1", "d"}),  # use@2's input is missing, but use@2 need not run
        ({"d"}, {"b@1"}, {"d"}),  # what a report wants of b@1 is there: it is students that are missing
        (set(), {"b@1"}, set()),
    ],
)
def test_closure(start, missing, todo):
    assert graph._closure(start, PARENTS, missing) == todo


def test_stages_wait_for_what_they_need_and_failures_stay_in_their_column(monkeypatch, capsys, own_place):
    order = []

    def stage(name, force, device):
        order.append(name)
        return ("failed", "why") if name == "b@1" else ("done", None)

    monkeypatch.setattr(graph, "_stage", stage)
    assert set(graph._run(list(PARENTS), PARENTS, set(), 2)) == {"b@1", "use@1", "d"}
    assert order[0] == "a" and order.index("b@2") < order.index("use@2") and "use@1" not in order
    assert "b@1: why" in capsys.readouterr().err


def test_what_another_setting_left_is_fetched_and_not_run(monkeypatch, own_place, capsys):
    """params.yaml and dvc.lock are back at what they were, outputs are those of the other λ; its student is gone."""
    there = {"distill@a": [{"changed outs": {"data/students/a": "not in cache", "data/logs/a.csv": "modified"}}],
             "evaluate@a": [{"changed deps": {"data/students/a": "modified"}},
                            {"changed outs": {"data/results/a.json": "modified"}}]}
    fetched = {"distill@a": [{"changed outs": {"data/students/a": "deleted"}}],
               "evaluate@a": [{"changed deps": {"data/students/a": "deleted"}}]}
    states, called = [there, fetched], []

    def dvc(*args, check=True):
        called.append(args)
        if args[0] == "status":
            return json.dumps(states.pop(0))
        return '"distill@a" -> "evaluate@a"' if args[0] == "dag" else "distill@a\nevaluate@a\n"

    monkeypatch.setattr(graph, "_dvc", dvc)
    monkeypatch.setattr(graph, "_run", lambda *args: pytest.fail(f"runs {args[0]}"))
    graph.reproduce()
    assert ("pull", "--allow-missing") in called and "up to date" in capsys.readouterr().out


@pytest.mark.parametrize("command", [graph.reproduce, graph.demo])
def test_a_notebook_that_was_run_in_place_is_named(command, own_place, monkeypatch):
    (own_place / "notebooks").mkdir()
    (own_place / "dvc.lock").touch()
    cell = new_code_cell("1", outputs=[new_output("stream", text="1")])
    nbformat.write(new_notebook(cells=[cell]), own_place / "notebooks/04_evaluate.ipynb")
    monkeypatch.setattr(graph, "_dvc", lambda *args, **_: pytest.fail("DVC is asked"))
    with pytest.raises(graph.PipelineError, match=r"^notebooks/04_evaluate\.ipynb holds outputs.*: `make strip`"):
        command()


@pytest.mark.parametrize("text", [
    "", '{"cells": [', "[]", "{}", *(json.dumps({"nbformat": 4, "nbformat_minor": 5, "metadata": {}, "cells": cells})
                                     for cells in (1, [1])),
])
def test_half_a_notebook_is_named(own_place, monkeypatch, text):
    (own_place / "notebooks").mkdir()
    (own_place / "dvc.lock").touch()
    (own_place / "notebooks/04_evaluate.ipynb").write_text(text)
    monkeypatch.setattr(graph, "_dvc", lambda *args, **_: pytest.fail("DVC is asked"))
    with pytest.raises(graph.PipelineError, match=r"^notebooks/04_evaluate\.ipynb is not a notebook, .*`git checkout"):
        graph.reproduce()
    with pytest.raises(graph.PipelineError, match=r"04_evaluate\.ipynb is not a notebook, or half of one"):
        pipeline._read(own_place / "notebooks/04_evaluate.ipynb")


@pytest.fixture
def here(own_place, monkeypatch):
    """A repository of few files, with another grid and a checkpoint of others."""
    files = ("gad/geometry.py", "notebooks/05_tables.ipynb", "dvc.yaml", ".dvcignore", "CITATION.cff", graph.TRIALS)
    for name in files:
        (own_place / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, own_place / name)
    (own_place / "dvc.lock").touch()
    row = {"sd2-turbo-base-0": {"backbone": "sd2", "paradigm": "turbo", "path": "x"}}
    grid = {"grid": {"backbones": ["sd2", "pixart"]}, "further": graph.ALONE, "published": row}
    data = graph._merged(yaml.safe_load((ROOT / "params.yaml").read_text()), grid)
    (own_place / "params.yaml").write_text(yaml.safe_dump(data))
    monkeypatch.setattr(graph, "load", lambda: params.load(own_place / "params.yaml"))
    return own_place


def test_a_copy_has_no_published_rows_but_its_own(here):
    assert params.load(graph.sandbox(here / "copy", {}) / "params.yaml").published == {}
    own = {"published": {"sd2-own-base-0": {"backbone": "sd2", "paradigm": "own", "path": "y"}}}
    assert [*params.load(graph.sandbox(here / "copy", own) / "params.yaml").published] == ["sd2-own-base-0"]


def test_an_interrupted_demo_goes_on_only_with_what_is_asked_for(here, monkeypatch, capsys):
    began, pending = [], here / "demo/data/.resume/fresh"

    def stopped(folder, *_):
        began.append(not pending.exists())
        pending.parent.mkdir(parents=True, exist_ok=True)
        pending.write_text("students\n")
        raise graph.PipelineError("stopped")

    def demo(**options):
        with pytest.raises(graph.PipelineError, match="stopped"):
            graph.demo(**options)
        return began[-1], "it starts over" in capsys.readouterr().out

    monkeypatch.setattr(graph, "_within", stopped)
    anew, goes_on, starts_over = (True, False), (False, False), (True, True)
    assert demo() == anew and demo() == goes_on
    assert params.load(here / "demo/params.yaml").grid.backbones == ["pixart"]  # the grid's last
    assert demo(backbone="sd2") == starts_over and demo(backbone="sd2") == goes_on
    (here / "demo/gad/__pycache__").mkdir()
    (here / "demo/gad/__pycache__/geometry.pyc").touch()
    assert demo(backbone="sd2") == goes_on
    for name in ("gad/geometry.py", "params.yaml"):
        text = (here / name).read_text()
        new = text + "\n# new\n" if name.endswith("py") else text.replace("threads: 1", "threads: 2")
        (here / name).write_text(new)
        assert demo(backbone="sd2") == starts_over and demo(backbone="sd2") == goes_on
    pending.unlink()  # it was done
    assert demo(backbone="sd2") == anew
    with pytest.raises(graph.PipelineError, match="--backbone sana: the grid has sd2, pixart"):
        graph.demo(backbone="sana")


def test_each_stage_has_a_gpu_of_its_own(monkeypatch, own_place):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5")
    both, seen = threading.Barrier(2, timeout=60), {}

    def stage(name, force, device):
        if name != "a":
            both.wait()  # two at a time
        seen[name] = graph._process(device)["env"]["CUDA_VISIBLE_DEVICES"]
        return "done", None

    monkeypatch.setattr(graph, "_stage", stage)
    parents = {"a": set(), "b@1": {"a"}, "b@2": {"a"}}
    assert graph._run(list(parents), parents, set(), 2) == []
    assert {seen["b@1"], seen["b@2"]} == {"2", "5"}


def test_teachers_wait_for_captions(monkeypatch):
    dag = '"autoencoder@kl" -> "teacher@sd2"'
    names = "coco@val2014\nteacher@sd2\nautoencoder@kl\n"
    monkeypatch.setattr(graph, "_dvc", lambda *args: names if args[0] == "stage" else dag)
    assert graph._parents()["teacher@sd2"] == {"coco@val2014", "autoencoder@kl"}


def test_interrupted_fresh_run_goes_on(own_place, capsys):
    names = ("teacher@sd2", "distill@sd2-tdm-gad-0", "evaluate@sd2-tdm-gad-0", "tables")
    parents = {name: set() for name in names}
    (own_place / "data/.resume/sd2-tdm-gad-0").mkdir(parents=True)
    (own_place / "data/.resume/teacher-sd2").mkdir()
    students = {"distill@sd2-tdm-gad-0", "evaluate@sd2-tdm-gad-0"}
    assert graph._forced("students", parents) == students
    assert [f.name for f in (own_place / "data/.resume").iterdir() if f.is_dir()] == ["teacher-sd2"]
    graph._owe({"evaluate@sd2-tdm-gad-0"})  # the first one is done; then the machine stops
    for again in (None, "students"):
        assert graph._forced(again, parents) == {"evaluate@sd2-tdm-gad-0"}
        assert f"(rm {own_place}/data/.resume/fresh forgets it)" in capsys.readouterr().out  # from any folder
    assert graph._forced("all", parents) == {"teacher@sd2", *students, "tables"}  # is more than what was begun
    assert graph._forced("students", parents) == {"teacher@sd2", *students, "tables"}  # and has all of this
    graph._owe(set())
    assert graph._forced(None, parents) == set()


@pytest.mark.parametrize("text", ["", "\n", "weird distill@sd2", "\xff"])
def test_what_an_interrupted_run_left_unreadable_is_told_and_left_out(own_place, capsys, text):
    (own_place / "data/.resume").mkdir(parents=True)
    (own_place / "data/.resume/fresh").write_text(text, "latin-1")
    parents = {"distill@sd2-tdm-gad-0": set()}
    assert graph._forced(None, parents) == set()
    assert "fresh does not say what was interrupted: left out of account" in capsys.readouterr().err
    assert graph._forced("students", parents) == set(parents) == graph._forced(None, parents)


def test_the_papers_students_can_be_made_anew_alone(own_place):
    theirs = {f"{stage}@sana-tdm-gad-0" for stage in ("distill", "chain", "use")} | {"use-baselines@sd2-add-base-0"}
    beside = {"distill-controls@pixart-tdm-rkd-0", "distill-replicas@sana-tdm-gad-1", "evaluate-published@sd2-x-base-0"}
    parents = {name: set() for name in (*theirs, *beside, "teacher@sana", "tables")}
    for name in ("sana-tdm-gad-0", "use-sana-tdm-gad-0-1f", "pixart-tdm-rkd-0", "sana-tdm-gad-1"):
        (own_place / "data/.resume" / name).mkdir(parents=True)
    assert graph._forced("grid", parents) == theirs
    left = {f.name for f in (own_place / "data/.resume").iterdir() if f.is_dir()}
    assert left == {"pixart-tdm-rkd-0", "sana-tdm-gad-1"}
    assert graph._forced("students", parents) == theirs | beside  # is more than what was begun
    assert graph._forced("grid", parents) == theirs | beside


# The graph itself


class Copy:
    def __init__(self, folder):
        self.folder = folder

    def python(self, *arguments, cwd=None, forks=True):
        """Kernels are forked (tests/forks.py), or start as they do for anyone."""
        env = {**os.environ, "PYTHONPATH": str(cwd or self.folder), "DVC_NO_ANALYTICS": "1"}
        env["PATH"] = os.pathsep.join((os.path.dirname(sys.executable), env["PATH"]))
        if not forks:
            del env["JUPYTER_PATH"]
        done = subprocess.run(
            [sys.executable, "-m", *arguments], cwd=cwd or self.folder, env=env, text=True, capture_output=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def pipeline(self, command, **options):
        """Two stages at a time; returns the stages that ran."""
        lines = self.python("gad.pipeline", *command, "--jobs", "2", **options).splitlines()
        return {line.split()[1].rstrip(":") for line in lines if line.startswith("[") and ": done" in line}

    def reproduce(self):
        return self.pipeline(["reproduce"])

    def changed(self):
        """Stages that DVC would run for their own sake, not for what runs before them."""
        return set(json.loads(self.python("dvc", "status", "--json")))

    def commit(self):
        """From here on under git, without which DVC compares nothing."""
        for name in (".gitignore", ".dvc/.gitignore"):
            shutil.copy(ROOT / name, self.folder / name)
        config = self.folder / ".dvc/config"
        config.write_text(config.read_text().replace("no_scm = true", "no_scm = false"))
        who = ("-c", "user.name=t", "-c", "user.email=t@t")
        for command in (("init", "-q"), ("add", "-A"), (*who, "commit", "-qm", "all")):
            subprocess.run(["git", *command], cwd=self.folder, check=True)

    def edit(self, overrides):
        path = self.folder / "params.yaml"
        path.write_text(yaml.safe_dump(graph._merged(yaml.safe_load(path.read_text()), overrides), sort_keys=False))

    def notebooks(self):
        return [f for name in ("data", "reports") for f in (self.folder / name / "notebooks").glob("*.ipynb")]


def students(backbone, paradigm):
    stages = "distill", "evaluate", "chain", "use"
    return {f"{s}@{backbone}-{paradigm}-{v}-0" for s in stages for v in ("base", "gad")}


def column(backbone):
    return {f"{s}@{backbone}" for s in ("teacher", "diagnose", "nearby", "references")} | students(backbone, "tdm")


REPORTS = {"tables", "figures", "page"}


@pytest.fixture(scope="module")
def copy(tmp_path_factory, forks):
    """What `make smoke` makes from nothing."""
    made = Copy(tmp_path_factory.mktemp("smoke") / "copy")
    made.first = made.pipeline(["smoke", "--keep", str(made.folder)], cwd=ROOT)
    return made


@pytest.mark.pipeline
@pytest.mark.slow
class TestGraph:
    """In this order: later tests change the copy."""

    def test_from_nothing(self, copy):
        assert copy.first == {*copy.python("dvc", "stage", "list", "--name-only").split()}
        assert copy.first > {"autoencoder@kl", "autoencoder@dc", "judge", *column("pixart"), *column("sana"), *REPORTS}
        for name in ("results/sana-tdm-gad-0.json", "samples/pixart-tdm-base-0.png", "metrics/teacher-sana.json"):
            assert (copy.folder / "data" / name).stat().st_size
        for name in ("tables/table1.md", "tables/table5.csv", "metrics.json", "figures/figure5.png", "index.html"):
            assert (copy.folder / "reports" / name).stat().st_size

    def test_executed_notebooks_hold_nothing_of_the_machine(self, copy):
        assert len(copy.notebooks()) == len(copy.first)
        for path in copy.notebooks():
            text = path.read_text()
            assert str(copy.folder) not in text and str(ROOT) not in text and "at 0x" not in text, path.name

    def test_second_repro_does_nothing(self, copy):
        assert "Running stage" not in copy.python("dvc", "repro")

    def test_stage_forced_again_gives_the_same_bytes(self, copy):
        lock = (copy.folder / "dvc.lock").read_text()
        copy.python("dvc", "repro", "--force", "--single-item", "evaluate@sana-tdm-gad-0", forks=False)
        assert (copy.folder / "dvc.lock").read_text() == lock

    def test_missing_result_is_an_error_with_its_name(self, copy, monkeypatch):
        monkeypatch.setattr(paths, "DATA", copy.folder / "data")
        monkeypatch.setattr(paths, "ROOT", copy.folder)
        result = paths.result(Run("sana", "tdm", "gad", 0))
        kept = result.rename(result.with_suffix(".kept"))
        try:
            with pytest.raises(FileNotFoundError, match=r"results/sana-tdm-gad-0\.json"):
                tables.write(params.load(copy.folder / "params.yaml"))
        finally:
            kept.rename(result)

    def test_plots_are_shown(self, copy, tmp_path):
        copy.python("dvc", "plots", "show", "-o", str(tmp_path))
        page = (tmp_path / "index.html").read_text()
        assert "JVP cosine with the teacher while training" in page and "sana-tdm-gad-0" in page
        assert {f.name.split("_")[-1] for f in (tmp_path / "static").iterdir()} >= {"figure2.png", "figure5.png"}

    def test_change_runs_what_it_concerns_alone(self, copy):
        student = "distill@sana-tdm-gad-0"
        copy.edit({"grid": {"backbones": ["sana"]}, "further": graph.ALONE})
        assert copy.reproduce() == REPORTS
        copy.commit()
        copy.edit({"gad": {"lam": 0.125}})
        assert copy.changed() == {student, "tables", "page"}
        copy.edit({"grid": {"backbones": ["sana", "sd2"]}})
        assert copy.changed() == {student, *column("sd2"), *REPORTS}
        copy.edit({"grid": {"backbones": ["sana"], "paradigms": ["tdm", "ladd"]}})
        assert copy.changed() == {student, *students("sana", "ladd"), *REPORTS}
        copy.edit({"grid": {"paradigms": ["tdm"]}})
        assert copy.changed() == {student, "tables", "page"}
        followers = {f"{s}@sana-tdm-gad-0" for s in ("evaluate", "chain", "use")}
        assert copy.reproduce() == {student, *followers, *REPORTS}
        changed = json.loads(copy.python("dvc", "metrics", "diff", "--json"))["reports/metrics.json"]
        assert changed and all(key.startswith("students.sana.TDM + GAD") for key in changed)

    def test_rows_beside_the_grid_run_alone(self, copy):
        """Another term in GAD's place, and a checkpoint of others, which needs no training."""
        block = {"backbones": ["sana"], "paradigms": ["tdm"], "variants": ["rkd"]}
        copy.edit({"further": {"controls": block}})
        control = {f"{s}-controls@sana-tdm-rkd-0" for s in ("distill", "evaluate")}
        assert copy.changed() == {*control, *REPORTS}
        run = "sana-itself-base-0"  # any pipeline of the backbone's kind will do
        copy.edit({"published": {run: {"backbone": "sana", "paradigm": "itself", "path": "data/teachers/sana",
                                         "steps": 1}}})
        published = {f"publish@{run}", f"evaluate-published@{run}", f"use-published@{run}"}
        assert copy.changed() == {*control, *published, *REPORTS}
        assert copy.reproduce() == {*control, *published, *REPORTS}
        assert "TDM + RKD − base" in (copy.folder / "reports/tables/table1.md").read_text()
        for name in ("table1", "table2"):
            assert "ITSELF" in (copy.folder / f"reports/tables/{name}.md").read_text()
        # Of one step: it never is where the teacher's path is known on the way.
        assert "ITSELF" not in (copy.folder / "reports/tables/table4.md").read_text()
