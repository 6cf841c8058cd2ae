"""The guide to a new backbone: what it writes into a copy of the repository keeps the contract and is little."""

import difflib
import hashlib
import math
import os
import subprocess
import sys

import pytest
import yaml
from test_study import STUDY, run

from gad import params
from gad.graph import ALONE
from gad.params import ROOT

pytestmark = pytest.mark.slow
PARTS = ("gad", "notebooks", "tests", "params.yaml", "dvc.yaml", "pyproject.toml")
FACTS = """{
    "report": report, "stages": stages, "differences": differences,
    "losses": table.loc["loss"].to_dict(), "moved": table.loc["share of weights moved"].to_dict(),
}"""


def files(root):
    """What is in the parts of `root` that the guide copies, by name."""
    found = [f for part in PARTS for f in ((root / part).rglob("*") if (root / part).is_dir() else [root / part])]
    kept = [f for f in found if f.is_file() and not {"__pycache__", ".ipynb_checkpoints"} & set(f.parts)]
    return {str(f.relative_to(root)): hashlib.sha256(f.read_bytes()).hexdigest() for f in kept}


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    return tmp_path_factory.mktemp("fork") / "copy"


@pytest.fixture(scope="module")
def made(copy, forks):
    before = files(ROOT)
    facts = run("add_a_backbone", STUDY, FACTS, folder=str(copy))
    return facts | {"before": before, "after": files(ROOT)}


def within(copy, *arguments):
    """`python -m …` in the copy."""
    environment = {**os.environ, "PYTHONPATH": str(copy)}
    command = [sys.executable, "-m", *arguments]
    return subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True)


def contract(copy, *which):
    return within(copy, "pytest", "-q", "-p", "no:cacheprovider", *which)


def test_the_new_backbone_keeps_the_contract(made):
    assert " passed" in made["report"] and "failed" not in made["report"] and "SKIPPED" not in made["report"]
    assert max(made["differences"][k] for k in ("images", "latents", "patches")) < 1e-4
    assert made["differences"]["tangents"] < 1e-4


def test_the_working_tree_is_unchanged(made):
    assert made["after"] == made["before"]


def test_it_is_one_file_one_entry_and_one_line(made, copy):
    ours, theirs = files(ROOT), files(copy)
    new = "gad/backbones/lumina2.py"
    assert {n for n in ours.keys() | theirs.keys() if ours.get(n) != theirs.get(n)} == {
        new, "gad/backbones/__init__.py", "params.yaml", "tests/smoke.yaml",
    }
    for name, most in (("gad/backbones/__init__.py", 3), ("params.yaml", 2)):
        texts = [(root / name).read_text().splitlines() for root in (ROOT, copy)]
        assert 0 < sum(line.startswith("+ ") for line in difflib.ndiff(*texts)) <= most
    lint = subprocess.run([sys.executable, "-m", "ruff", "check", new], cwd=copy, capture_output=True, text=True)
    assert lint.returncode == 0, lint.stdout


def test_its_stages_are_its_column(made):
    p = params.load()
    runs = [f"lumina2-{q}-{v}-{s}" for q in p.grid.paradigms for v in p.grid.variants for s in p.seeds.distill]
    column = {f"{stage}@lumina2" for stage in ("teacher", "diagnose", "nearby", "references")}
    assert set(made["stages"]) == column | {f"{s}@{r}" for s in ("distill", "evaluate", "chain", "use") for r in runs}


@pytest.mark.pipeline
def test_the_smoke_run_makes_its_column(made, copy, forks):
    """The graph at its smallest, by the guide's last command but without the others' columns: nothing of the pipeline
    knows the name."""
    smoke = copy / "tests/smoke.yaml"
    data = yaml.safe_load(smoke.read_text())
    assert "lumina2" in data["grid"]["backbones"]
    smoke.write_text(yaml.safe_dump({**data, "grid": {**data["grid"], "backbones": ["lumina2"]}, "further": ALONE}))
    ran = within(copy, "gad.pipeline", "smoke")
    assert ran.returncode == 0, ran.stderr[-3000:]
    column = [s for s in made["stages"] if "@lumina2-" not in s or "@lumina2-tdm" in s]
    for stage in (*column, "tables", "figures", "page"):
        assert f"] {stage}: done" in ran.stdout, stage
    assert ran.stdout.rstrip().endswith("everything is up to date")


def test_a_step_of_gad_moves_what_it_trains(made):
    frozen = {"teacher", "text encoder", "autoencoder"}
    for name, other in (("tdm", "fake"), ("ladd", "discriminator")):
        moved = {k: v for k, v in made["moved"][name].items() if not math.isnan(v)}
        assert moved == {"student": 1, other: 1} | dict.fromkeys(frozen, 0)
        assert all(math.isfinite(made["losses"][name][k]) for k in ("student", "gad", other))
        assert made["losses"][name]["gad"] > 0


def test_the_contract_sees_a_wrong_sign(made, copy):
    file = copy / "gad/backbones/lumina2.py"
    text = file.read_text()
    which = "tests/test_backbones.py::test_sample_is_the_pipelines[lumina2-1-1.0]"
    try:
        file.write_text(text.replace("return -out", "return out"))
        assert contract(copy, which).returncode == pytest.ExitCode.TESTS_FAILED  # no such test would be another code
    finally:
        file.write_text(text)
