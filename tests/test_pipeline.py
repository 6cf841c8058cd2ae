"""The notebook runner, and the graph at its smallest size in a copy of the repository."""

import json
import os
import subprocess
import sys

import nbformat
import pytest
import yaml
from nbformat.v4 import new_code_cell, new_notebook, new_output

from gad import graph, params, paths, pipeline
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


def test_failed_notebook_is_one_line_and_kept(own_place):
    source = notebook(own_place, "raise ValueError('first line\\nthe last line')")
    with pytest.raises(pipeline.PipelineError, match=r"^ValueError: the last line ") as error:
        pipeline.execute(source, own_place / "out.ipynb", {})
    assert "\n" not in str(error.value) and not (own_place / "out.ipynb").exists()
    kept = nbformat.read(own_place / "data/.resume/notebooks/out.ipynb", 4)
    assert any(o.output_type == "error" for c in kept.cells for o in c.get("outputs", []))


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["notebooks/none.ipynb", "x.ipynb"], "does not exist"),
        (["notebooks/03_distill.ipynb", "x.ipynb", "--set", "h=1"], "backbone, paradigm, variant, seed"),
        (["notebooks/03_distill.ipynb", "x.ipynb", "--set", "backbone=none"], "there are sd2, pixart, sana"),
        (["notebooks/03_distill.ipynb", "x.ipynb", "--set", "seed"], "KEY=VALUE"),
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


def test_scrub_keeps_what_a_reader_sees():
    cell = new_code_cell("1", metadata={"tags": ["t"], "papermill": {"duration": 1.2}, "execution": {}})
    cell.outputs = [
        new_output("stream", name="stdout", text="a"),
        new_output("stream", name="stderr", text="warning"),
        new_output("stream", name="stdout", text="b"),
        new_output("display_data", {"text/plain": "c"}),
    ]
    made = pipeline.scrub(new_notebook(cells=[cell], metadata={"papermill": {}, "language_info": {"name": "python"}}))
    assert set(made.metadata) == {"kernelspec"} and made.cells[0].metadata == {"tags": ["t"]}
    assert [o.get("text") or o.data["text/plain"] for o in made.cells[0].outputs] == ["ab", "c"]


PARENTS = {"a": set(), "b@1": {"a"}, "b@2": {"a"}, "c@1": {"b@1"}, "c@2": {"b@2"}, "d": {"c@1", "c@2"}}


@pytest.mark.parametrize(
    "start, missing, todo",
    [
        ({"b@1"}, set(), {"b@1", "c@1", "d"}),
        ({"c@1"}, {"b@1", "b@2"}, {"b@1", "c@1", "d"}),  # c@2's input is missing, but c@2 need not run
        ({"c@1"}, {"a", "b@1"}, set(PARENTS)),
        (set(), {"b@1"}, set()),
    ],
)
def test_closure(start, missing, todo):
    assert graph._closure(start, PARENTS, missing) == todo


def test_stages_wait_for_what_they_need_and_failures_stay_in_their_column(monkeypatch, capsys, own_place):
    order = []

    def stage(name, force):
        order.append(name)
        return ("failed", "why") if name == "b@1" else ("done", None)

    monkeypatch.setattr(graph, "_stage", stage)
    assert set(graph._run(list(PARENTS), PARENTS, set(), 2)) == {"b@1", "c@1", "d"}
    assert order[0] == "a" and order.index("b@2") < order.index("c@2") and "c@1" not in order
    assert "b@1: why" in capsys.readouterr().err


def test_interrupted_fresh_run_goes_on(own_place):
    p = params.load()
    names = ("teacher@sd2", "distill@sd2-tdm-gad-0", "evaluate@sd2-tdm-gad-0", "tables")
    parents = {name: set() for name in names}
    (own_place / "data/.resume/sd2-tdm-gad-0").mkdir(parents=True)
    (own_place / "data/.resume/teacher-sd2").mkdir()
    students = {"distill@sd2-tdm-gad-0", "evaluate@sd2-tdm-gad-0"}
    assert graph._forced("students", parents, p) == students
    assert [f.name for f in (own_place / "data/.resume").iterdir() if f.is_dir()] == ["teacher-sd2"]
    graph._owe({"evaluate@sd2-tdm-gad-0"})  # the first one is done; then the machine stops
    assert graph._forced(None, parents, p) == {"evaluate@sd2-tdm-gad-0"}
    graph._owe(set())
    assert graph._forced(None, parents, p) == set()


# The graph itself


class Copy:
    def __init__(self, folder):
        self.folder = folder

    def python(self, *arguments):
        env = {**os.environ, "PYTHONPATH": str(self.folder), "DVC_NO_ANALYTICS": "1"}
        env["PATH"] = os.pathsep.join((os.path.dirname(sys.executable), env["PATH"]))
        return subprocess.run(
            [sys.executable, "-m", *arguments], cwd=self.folder, env=env, text=True, capture_output=True
        )

    def dvc(self, *arguments):
        done = self.python("dvc", *arguments)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def changed(self):
        """Stages that DVC would run for their own sake, not for what runs before them."""
        return set(json.loads(self.dvc("status", "--json")))

    def edit(self, overrides):
        """params.yaml with `overrides`; returns its text before."""
        path = self.folder / "params.yaml"
        before = path.read_text()
        path.write_text(yaml.safe_dump(graph._merged(yaml.safe_load(before), overrides), sort_keys=False))
        return before


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """One column of the grid, made from nothing."""
    folder = tmp_path_factory.mktemp("copy")
    made = Copy(graph.sandbox(folder, {**SMOKE, "grid": {"backbones": ["sd2"]}}))
    done = made.python("gad.pipeline", "reproduce", "--jobs", "2")
    assert done.returncode == 0, done.stdout + done.stderr
    return made


def column(backbone, variants=("base", "gad")):
    runs = [Run(backbone, "tdm", v, 0) for v in variants]
    return {f"{stage}@{run}" for stage in ("distill", "evaluate") for run in runs}


pipeline_test = [pytest.mark.pipeline, pytest.mark.slow]


class TestGraph:
    pytestmark = pipeline_test

    def test_from_nothing(self, copy):
        for name in ("results/sd2-tdm-gad-0.json", "samples/sd2-tdm-base-0.png", "metrics/teacher-sd2.json"):
            assert (copy.folder / "data" / name).stat().st_size
        for name in ("tables/table1.md", "tables/teachers.csv", "metrics.json", "figures/figure2.png"):
            assert (copy.folder / "reports" / name).stat().st_size

    def test_second_repro_does_nothing(self, copy):
        assert "Running stage" not in copy.dvc("repro")

    def test_stage_forced_again_gives_the_same_bytes(self, copy):
        stage = "evaluate@sd2-tdm-gad-0"
        lock = (copy.folder / "dvc.lock").read_text()
        copy.dvc("repro", "--force", "--single-item", stage)
        assert (copy.folder / "dvc.lock").read_text() == lock

    def test_lam_concerns_gad_students_and_what_follows(self, copy):
        before = copy.edit({"gad": {"lam": 0.5}})
        assert copy.changed() == {"distill@sd2-tdm-gad-0", "tables"}
        (copy.folder / "params.yaml").write_text(before)
        assert copy.changed() == set()

    def test_missing_result_is_an_error_with_its_name(self, copy):
        path = copy.folder / "data/results/sd2-tdm-gad-0.json"
        kept = path.read_bytes()
        path.unlink()
        done = copy.python("gad.pipeline", "notebooks/05_tables.ipynb", "reports/x.ipynb")
        path.write_bytes(kept)
        assert done.returncode == 1 and "sd2-tdm-gad-0" in done.stderr.splitlines()[-1]

    def test_new_backbone_runs_its_column_alone(self, copy):
        copy.edit({"grid": {"backbones": ["sd2", "sana"]}})
        own = {"teacher@sana", "diagnose@sana", *column("sana")}
        assert copy.changed() == {*own, "tables", "figures"}
        done = copy.python("gad.pipeline", "reproduce", "--jobs", "2")
        assert done.returncode == 0, done.stdout + done.stderr
        ran = {line.split()[1].rstrip(":") for line in done.stdout.splitlines() if line.startswith("[")}
        assert ran == {*own, "tables", "figures"}
        assert "sana" in (copy.folder / "reports/tables/table1.md").read_text()
