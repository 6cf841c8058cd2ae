"""Means over students of what is compared."""

import json

import pytest

from gad import params, paths, schema
from gad.tables import HYBRID, means

COSINES = {  # by variant: TDM's and LADD's
    "base": (0.4, 0.5), "gad": (0.5, 0.7), "slower": (0.45, 0.5), "slower_gad": (0.6, 0.6), HYBRID: (0.4, 0.6),
    "rkd": (0.9, None),
}
BLOCK = {"backbones": ["sana"], "paradigms": ["tdm", "ladd"]}


def result(cos, end=None, scene=1.0):
    out = {"endpoint": {"cos": [cos] * 4, "relative": [0.5] * 4, "value": [0.1] * 4}, "quality": {"scene": [scene] * 6}}
    return out if end is None else out | {"trajectory": {"relative": [[9.0, end]] * 3}}


@pytest.fixture
def p(monkeypatch, tmp_path):
    for name in ("DATA", "TABLES"):
        monkeypatch.setattr(paths, name, tmp_path / name)
    only = {f"further.{b}.backbones": [] for b in schema.Further.model_fields}
    only |= {f"grid.{k}": v for k, v in BLOCK.items()} | {"report.bootstrap": 100, "evaluation.noises": 2}
    only |= {f"further.rates.{k}": v for k, v in BLOCK.items()}
    only |= {"further.controls.backbones": ["sana"], "further.controls.variants": ["rkd"]}
    only |= {f"further.replicas.{k}": v for k, v in BLOCK.items()} | {"further.replicas.seeds": []}
    p = params.load(**only)
    for run in p.runs():
        of, k = run.variant, p.grid.paradigms.index(run.paradigm)
        made = result(COSINES[of][k], 0.1 if "gad" in of else 0.2 + 0.2 * k)
        if of == "base":
            made["hybrid"] = result(COSINES[HYBRID][k])
        if of in ("base", "gad"):
            scene = [1.0, 0.5] if of == "base" else [0.5, 0.5]
            use = {"quality": {"scene": scene}} | ({"hybrid": {"quality": {"scene": [0, 1]}}} if of == "base" else {})
            paths.use(run).parent.mkdir(exist_ok=True, parents=True)
            paths.use(run).write_text(json.dumps(use))
        paths.result(run).parent.mkdir(exist_ok=True, parents=True)
        paths.result(run).write_text(json.dumps(made))
    return p


def test_each_comparison_is_its_students_mean(p):
    long = means.write(p).set_index(["model", "metric"])
    cos = long.xs("cos", level="metric")["value"]
    assert cos.to_dict() == pytest.approx({
        "GAD − base": 0.15, "half the rate − base": 0.025, "GAD − half the rate": 0.125,
        "GAD, half the rate − half the rate": 0.125, "GAD, half the rate − GAD": 0,
        "(GAD, half the rate − half the rate) − (GAD − base)": -0.025,
        "first step by the teacher − base": 0.05, "GAD − first step by the teacher": 0.1,
    })  # not RKD's: it is one student's
    assert set(long["students"]) == {2}
    end = long.xs("end", level="metric")["value"]
    assert end["GAD − base"] == pytest.approx((-0.5 - 0.75) / 2)  # relative, of the last step
    assert "GAD − first step by the teacher" not in end
    many = long.xs("many", level="metric")
    assert [*many.loc["GAD − base", ["value", "low", "high"]]] == [-0.25, -0.5, 0]
    assert many["value"].to_dict() == {
        "GAD − base": -0.25, "first step by the teacher − base": -0.25, "GAD − first step by the teacher": 0,
    }
    text = (paths.TABLES / "means.md").read_text()
    assert "of prompts alone: no student" in text and "| Table 3: scene accuracy" in text and "nan" not in text


def test_training_is_in_the_intervals(p):
    """Prompts are all alike here: what is left is training's, of two students, and of twice as many in a difference of
    differences."""
    long = means.means(p, {"cos": (0.02, 4)}).set_index(["model", "metric"])
    for name, terms in {"GAD − base": 1, "(GAD, half the rate − half the rate) − (GAD − base)": 2}.items():
        row = long.loc[name, "cos"]
        assert row["high"] - row["value"] == pytest.approx(2.776445 * 0.02 * (terms / 2) ** 0.5)
    row = long.loc["first step by the teacher − base", "cos"]
    assert row["low"] == pytest.approx(row["high"])  # the same students


def test_without_two_students_there_are_none(p):
    one = params.load(**{f"further.{b}.backbones": [] for b in schema.Further.model_fields}
                      | {"grid.backbones": ["sana"], "grid.paradigms": ["tdm"]})
    assert not len(means.write(one)) and "There are none" in (paths.TABLES / "means.md").read_text()
