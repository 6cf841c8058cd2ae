"""What the repository says of itself in several places must agree."""

import json
import re
import subprocess
import tomllib

import nbformat
import pytest
import yaml

from gad import params
from gad.params import ROOT
from gad.pipeline import defaults

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
ALL_NOTEBOOKS = sorted((ROOT / "notebooks").rglob("*.ipynb"))
DVC = {k: s.get("do", s) for k, s in yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"].items()}


def name_of(requirement):
    return re.match(r"[A-Za-z0-9._-]+", requirement)[0].lower().replace("_", "-")


def pins(lines):
    """name → version of the pinned lines, markers left out."""
    found = (re.match(r"\s*([A-Za-z0-9._-]+)==([^\s;]+)", line) for line in lines)
    return {name_of(m[1]): m[2] for m in found if m}


def wanted():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return {name_of(r) for r in (*project["dependencies"], *project["optional-dependencies"]["dev"])}


def test_lock_pins_every_dependency():
    assert wanted() <= set(pins((ROOT / "requirements.lock").read_text().splitlines()))


def test_environment_has_the_versions_of_the_lock():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    pip = next(d["pip"] for d in environment["dependencies"] if isinstance(d, dict))
    assert pip == ["-r requirements.lock", "-e ."]


def test_notebooks_are_the_stages():
    used = {re.search(r"notebooks/\S+\.ipynb", s["cmd"])[0] for s in DVC.values()}
    assert used == {str(n.relative_to(ROOT)) for n in NOTEBOOKS}


@pytest.mark.parametrize("path", ALL_NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_is_clean(path):
    notebook = nbformat.read(path, 4)
    nbformat.validate(notebook)
    assert set(notebook.metadata) == {"kernelspec"} and notebook.metadata.kernelspec.name == "python3"
    for cell in notebook.cells:
        assert cell.cell_type != "code" or (not cell.outputs and cell.execution_count is None)
    text = json.dumps(notebook)
    for absolute in ("/home/", "/root/", "/tmp/", "/Users/", "C:\\\\", str(ROOT)):
        assert absolute not in text
    bare = r"""(open|Path|read_csv)\(["'](\.\.?/|data/|reports/)"""
    assert not re.search(bare, text.replace('\\"', '"'))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_parameters_are_those_of_the_stage(path):
    command = next(s["cmd"] for s in DVC.values() if f"notebooks/{path.name}" in s["cmd"])
    given = re.findall(r"(\w+)=\$\{", command)
    assert defaults(nbformat.read(path, 4)) == given


def test_graph_depends_on_modules_that_exist():
    p = params.load()
    for stage in DVC.values():
        for dep in stage["deps"]:
            if dep.startswith("gad/"):
                for paradigm in p.grid.paradigms:
                    assert (ROOT / dep.replace("${item.paradigm}", paradigm)).exists(), dep


def test_no_stage_depends_on_all_backbones():
    """Or a new backbone would run every column again."""
    for stage in DVC.values():
        deps = [d.rstrip("/") for d in stage["deps"]]
        assert not {"gad", "gad/backbones", "gad/backbones/__init__.py", "params.yaml"} & set(deps)


def test_another_judge_or_prompt_of_photographs_reruns_what_it_concerns():
    for name, stage in DVC.items():
        if {"gad/worlds.py", "gad/benches.py"} & set(stage["deps"]):
            assert "coco" in stage["params"], name


def test_stage_ids_are_the_runs():
    from dvc.repo import Repo

    names = {s.addressing for s in Repo(ROOT).index.stages}
    p = params.load()
    runs = {str(r) for r in p.runs()}
    again = {str(r) for r in p.replicas}
    for stage, wanted in (("distill", (runs | again) - {*p.published}), ("evaluate", runs | again)):
        # distill@…, distill-controls@…, …
        assert {n.partition("@")[2] for n in names if n.startswith(stage)} == wanted
        for block, what in p.further:
            own = {str(r) for r in what.runs(p.seeds.distill)}
            assert {n.partition("@")[2] for n in names if n.startswith(f"{stage}-{block}@")} == own
    for group in ("teacher", "diagnose"):
        assert {n.partition("@")[2] for n in names if n.startswith(f"{group}@")} == set(p.grid.backbones)


@pytest.mark.parametrize("given, said", [([], ""), (["BACKBONE=sd2"], "--backbone sd2")])
def test_the_demo_is_of_the_backbone_that_is_asked_for(given, said):
    dry = subprocess.run(["make", "--dry-run", "demo", *given], cwd=ROOT, capture_output=True, text=True, check=True)
    assert re.search(r"gad\.pipeline demo --jobs \d+ ?(.*)\n", dry.stdout)[1] == said


def test_expensive_stages_cache_every_output():
    """One uncached output switches off DVC's run cache for its stage."""
    for name in ("autoencoder", "teacher", "diagnose", "distill", "evaluate"):
        for out in DVC[name]["outs"]:
            assert isinstance(out, str) or all(v.get("cache", True) for v in out.values())
