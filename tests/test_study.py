"""The study notebooks run, from where JupyterLab starts them and from the root, and what they say is so."""

import json
import os
import subprocess
import sys

import nbformat
import pytest
import yaml
from nbclient import NotebookClient
from traitlets.config import Config

from gad.params import ROOT

STUDY = ROOT / "notebooks" / "study"


def run(name, cwd, facts, **parameters):
    """Executes a notebook with other parameters; returns `facts`, an expression in its variables, through JSON."""
    notebook = nbformat.read(STUDY / f"{name}.ipynb", 4)
    cell = next(c for c in notebook.cells if "parameters" in c.metadata.get("tags", ()))
    cell.source += "".join(f"\n{key} = {value!r}" for key, value in parameters.items())
    notebook.cells.append(nbformat.v4.new_code_cell(f"import json, sys\nprint(json.dumps({facts}))"))
    config = Config({"KernelManager": {"transport_encryption": "auto"}})
    client = NotebookClient(notebook, timeout=900, kernel_name="python3", config=config,
                            resources={"metadata": {"path": str(cwd)}})
    client.execute()
    return json.loads(notebook.cells[-1].outputs[0].text)


@pytest.fixture(scope="module")
def toy(forks):
    facts = """{
        "results": {form: {key: value.tolist() for key, value in result.items()} for form, result in results.items()},
        "random": starts.index("identity"),
        "transport": transport.values.tolist(),
        "on a mode": (distance < 3).float().mean().item(),
        "remains": remains,
        "precision": {"/".join(key): [c[0] for c in curve] for key, curve in precision.items()},
        "sizes": sizes.tolist(),
        "directions": directions,
        "seconds": time.process_time(),
    }"""
    return run("toy_2d", ROOT, facts)


@pytest.mark.slow
def test_the_exact_ode_carries_noise_to_the_mixture(toy):
    for weight, share, spread in toy["transport"]:
        assert share == pytest.approx(weight, abs=0.015) and spread == pytest.approx(0.3, abs=0.02)
    assert toy["on a mode"] > 0.97


@pytest.mark.slow
def test_the_map_form_brings_the_teachers_tangents(toy):
    base, with_map = (toy["results"][form] for form in ("base", "map"))
    n = toy["random"]
    assert min(with_map["JVP cosine"]) > 0.97 and max(with_map["folded"]) < 0.02
    assert sum(base["JVP cosine"][:n]) / n < 0.6  # from random weights
    assert all(b < m - 0.02 for b, m in zip(base["JVP cosine"], with_map["JVP cosine"], strict=True))
    assert sum(base["folded"]) / len(base["folded"]) > 0.05 + max(with_map["folded"])  # a lucky seed may not fold
    assert all(m > b - 0.03 for b, m in zip(base["mode coverage"], with_map["mode coverage"], strict=True))


@pytest.mark.slow
def test_regression_on_unpaired_samples_collapses_and_the_map_form_turns_it_back(toy):
    collapsed, with_map, strong = (toy["results"][form] for form in ("unpaired", "unpaired-map", "unpaired-map-100"))
    assert max(collapsed["norm ratio"]) < 0.15 and max(collapsed["distance to mean"]) < 0.2
    assert max(collapsed["mode coverage"]) == 0
    assert sum(collapsed["JVP cosine"]) / len(collapsed["JVP cosine"]) < 0.5
    assert min(with_map["JVP cosine"]) > 0.8 and max(with_map["norm ratio"]) < 0.4  # its way, not its size
    assert max(with_map["mode coverage"]) < 0.05
    assert min(strong["JVP cosine"]) > 0.95 and min(strong["norm ratio"]) > 0.8
    assert min(strong["mode coverage"]) > 0.2


@pytest.mark.slow
def test_the_whole_story_takes_about_a_minute_at_most(toy):
    assert toy["seconds"] < 90  # of the kernel's CPU, with room for a busy machine: the notebook says less than 60


@pytest.mark.slow
def test_the_score_form_has_no_mean_and_the_paired_one_has(toy):
    assert toy["remains"]["score"] < 2 / toy["directions"] ** 0.5
    assert toy["remains"]["paired-score"] > 0.3
    n = toy["random"]
    for base, score in zip(*(toy["results"][form]["JVP cosine"][n:] for form in ("base", "score")), strict=True):
        assert score == pytest.approx(base, abs=0.1)


@pytest.mark.slow
def test_half_precision_leaves_little_of_a_small_difference(toy):
    fine = [c for c, h in zip(toy["precision"]["fp32/forward"], toy["sizes"], strict=True) if h < 0.05]
    coarse = [c for c, h in zip(toy["precision"]["fp16/forward"], toy["sizes"], strict=True) if h < 2e-4]
    assert min(fine) > 0.99 and max(coarse) < 0.7


@pytest.mark.parametrize("name", ["toy_2d", "gad_in_ten_lines"])
def test_what_ships_with_outputs_is_of_this_notebook(name):
    """README has the command; outputs depend on the machine's rounding, and are not compared."""
    source, shown = (nbformat.read(f, 4) for f in (STUDY / f"{name}.ipynb", ROOT / f"reports/notebooks/{name}.ipynb"))
    assert [c.source for c in shown.cells] == [c.source for c in source.cells]
    outputs = [output for cell in shown.cells for output in cell.get("outputs", [])]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert not any(output.output_type == "error" for output in outputs)


def _teacher_is_there():
    if not (ROOT / "data/teachers/sd2/model_index.json").is_file():
        if "teacher@sd2" not in yaml.safe_load((ROOT / "dvc.lock").read_text())["stages"]:
            pytest.skip("needs the miniature SD2, which dvc.lock has not")
        pull = [sys.executable, "-m", "dvc", "--wait-for-lock", "pull", "data/teachers/sd2"]  # no more: see .ci/run
        subprocess.run(pull, cwd=ROOT, check=True, env=os.environ | {"DVC_NO_ANALYTICS": "1"})


@pytest.fixture(scope="module")
def ten_lines(forks):
    """As the notebook stands."""
    _teacher_is_there()
    facts = """{
        "rows": [[row["JVP cosine"], row["value error"]] for row in rows.values()],
        "logs": [log.values.tolist() for log in (log_without, log_with)],
        "cosines": {name: c.tolist() for name, c in cosines.items()},
        "modules": sorted(m for m in sys.modules if m.startswith("gad.")),
    }"""
    return run("gad_in_ten_lines", STUDY, facts)


@pytest.mark.slow
def test_ten_lines_do_what_their_notebook_says(ten_lines):
    """The base loss costs tangents and values, GAD gives part of both back, at the same base loss."""
    (cos, value), (cos_base, value_base), (cos_gad, value_gad) = ten_lines["rows"]
    assert cos - cos_base > 0.03 and cos_gad - cos_base > 0.5 * (cos - cos_base)
    assert value_base - value > 0.1 and value_base - value_gad > 0.3 * (value_base - value)
    without, with_gad = (sum(base for base, _ in log[-20:]) / 20 for log in ten_lines["logs"])
    assert with_gad == pytest.approx(without, rel=0.1)


@pytest.mark.slow
def test_ten_lines_take_geometry_alone(ten_lines):
    assert ten_lines["modules"] == ["gad.geometry"]
    without, with_gad = ten_lines["logs"]
    assert without[0] == with_gad[0] and without[1] != with_gad[1]  # the same draws; other students after a step
    start, *trained = ten_lines["cosines"].values()
    assert all(0 < sum(c) / len(c) < 1 and c != start for c in trained)


def test_ten_lines_are_ten():
    notebook = nbformat.read(STUDY / "gad_in_ten_lines.ipynb", 4)
    cell = next(c for c in notebook.cells if "def gad_term" in c.source)
    assert sum(bool(line.strip()) for line in cell.source.splitlines()) <= 10
