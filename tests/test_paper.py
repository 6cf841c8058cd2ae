"""params.paper.yaml: the paper's scale, of which no test can train anything. What it says must be right and whole."""

import os
import re
import shutil
import subprocess
import sys
from functools import cache

import pytest
import yaml

from gad import architectures, distill, params
from gad.graph import sandbox
from gad.params import ROOT, Run

PAPER = ROOT / "params.paper.yaml"
TEXT = PAPER.read_text("utf-8")
DATA, MINIATURE = yaml.safe_load(TEXT), yaml.safe_load((ROOT / "params.yaml").read_text("utf-8"))
ROW = re.compile(r"^#  (\w+-\w+-base-0: \{.*\})$", re.MULTILINE)
ROWS = {name: row for line in ROW.findall(TEXT) for name, row in yaml.safe_load(line).items()}
BACKBONES, PARADIGMS, BASELINES = ("sd2", "pixart", "sana"), ("tdm", "ladd", "sid"), ("add", "swiftbrush", "tcd", "dmd")
GRID = {Run(b, m, v, 0) for b in BACKBONES for m in PARADIGMS for v in ("base", "gad")}
STUDENTS = GRID | {Run("sd2", m, "base", 0) for m in BASELINES}


@cache
def paper(**settings):
    return params.load(PAPER, **settings)


def keys(section, at=""):
    """Of all sections within, dotted."""
    for key, value in section.items():
        yield f"{at}{key}"
        if isinstance(value, dict):
            yield from keys(value, f"{at}{key}.")


def dvc(place, *args):
    environment = {**os.environ, "DVC_NO_ANALYTICS": "1"}
    command = [sys.executable, "-m", "dvc", *args]
    done = subprocess.run(command, cwd=place, env=environment, text=True, capture_output=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """The graph with these parameters, of which nothing ran."""
    made = sandbox(tmp_path_factory.mktemp("paper"), {})
    shutil.copy(PAPER, made / "params.yaml")
    return made


def test_its_students_are_the_papers():
    p = paper()
    assert set(p.runs()) == STUDENTS and len(p.runs()) == 22 and not p.replicas
    for name in BACKBONES:
        which = p.backbones[name]
        assert (which.world, which.revision, which.pretrain) == ("coco", None, {})
        assert which.teacher_steps % which.student_steps == 0  # a student's times are among its teacher's
        if name != "sd2":  # by a kept copy
            assert which.path in architectures.__doc__


def test_no_key_is_missing():
    own = re.compile(r"backbones\.\w+\.(autoencoder|pretrain)\b")  # of miniatures
    assert not [key for key in keys(MINIATURE) if key not in set(keys(DATA)) and not own.match(key)]


def test_every_number_says_where_it_is_from():
    for line in TEXT.splitlines():
        assert len(line) <= 160, line
        said, _, comment = line.partition("#")
        assert comment or not re.search(r"(?<![\w-])\d", said), line


def test_what_ships_of_the_miniature_world_is_not_trained_again():
    """Stages depend on its autoencoders and judge, whatever the world of their backbones."""
    for key in ("threads", "autoencoder", "judge"):
        assert DATA[key] == MINIATURE[key], key
    assert DATA["seeds"]["world"] == MINIATURE["seeds"]["world"]
    assert DATA["teacher"] | {"prompts": 0} == MINIATURE["teacher"] | {"prompts": 0}


@pytest.mark.parametrize("processes, settings", [(1, {}), (8, {}), (16, {"gad.pairs": 16})])
def test_every_student_can_be_shared(processes, settings):
    p = paper(**settings)
    for run in p.runs():
        distill.shareable(run, p, processes)


def test_prompts_are_enough():
    p = paper()
    assert p.evaluation.trajectory_prompts <= p.coco.unseen and p.uses.layouts <= p.coco.layouts
    assert max(p.evaluation.prompts, p.evaluation.quality_prompts, p.teacher.prompts, p.uses.prompts) <= p.coco.test


def test_rows_of_others_are_right_as_they_stand():
    assert {row["paradigm"] for row in ROWS.values()} == {"turbo", "tcdlora", "lcm", "sprint"}
    p = params.validate(DATA | {"published": ROWS})
    assert [str(run) for run in p.runs() if str(run) not in map(str, STUDENTS)] == [*ROWS]


def test_dvc_resolves_its_graph(place):
    names = set(dvc(place, "stage", "list", "--name-only").split())
    for group in ("teacher", "diagnose", "nearby", "references"):
        assert {n for n in names if n.startswith(f"{group}@")} == {f"{group}@{b}" for b in BACKBONES}
    assert {n for n in names if n.startswith("coco")} == {"coco@val2014"}
    for group, runs in (("distill", STUDENTS), ("evaluate", STUDENTS), ("use", STUDENTS), ("chain", GRID)):
        assert {n.partition("@")[2] for n in names if re.match(f"{group}[@-]", n)} == {*map(str, runs)}
        beside = {n.partition("@")[0] for n in names if re.match(f"{group}-", n)}
        assert beside == ({f"{group}-baselines"} if runs == STUDENTS else set())
    assert {"judge", "tables", "figures", "page"} <= names


def test_dvc_resolves_rows_of_others(place, tmp_path):
    there = shutil.copytree(place, tmp_path / "copy")
    (there / "params.yaml").write_text(yaml.safe_dump(DATA | {"published": ROWS}, sort_keys=False))
    names = dvc(there, "stage", "list", "--name-only").split()
    for stage in ("publish", "evaluate-published", "use-published"):
        assert {n for n in names if n.startswith(f"{stage}@")} == {f"{stage}@{name}" for name in ROWS}


def test_a_student_trained_by_hand_can_be_taken_into_the_graph(place):
    """As README says: else `dvc repro` trains it again, and `dvc pull` deletes it."""
    name = "sd2-tdm-gad-0"
    for folder in ("teachers/sd2", "endpoints/sd2", f"students/{name}", "logs", "probes", "notebooks"):
        (place / "data" / folder).mkdir(parents=True)
    for file in ("teachers/sd2/source.json", "endpoints/sd2/train.safetensors", f"students/{name}/gad.json",
                 f"logs/{name}.csv", f"probes/{name}.csv"):
        (place / "data" / file).write_text("by hand\n")
    shutil.copy(place / "notebooks/03_distill.ipynb", place / f"data/notebooks/03_distill-{name}.ipynb")
    dvc(place, "commit", "--force", f"distill@{name}")
    assert "up to date" in dvc(place, "status", f"distill@{name}")
    assert (place / f"data/students/{name}/gad.json").read_text() == "by hand\n"
