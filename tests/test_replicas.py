"""Students trained again: what training varies by, and intervals that know of it."""

import json

import numpy as np
import pandas as pd
import pytest
from scipy.stats import chi2

from gad import params, paths, plots, schema
from gad.evaluation.geometry import bootstrap
from gad.params import ParamsError
from gad.tables import replicas

ONLY = {f"further.{b}.backbones": ["sana"] for b in schema.Further.model_fields if b != "replicas"}
ONLY |= {"grid.backbones": ["sana"], "grid.paradigms": ["tdm"], "report.bootstrap": 200, "evaluation.noises": 2}
ONLY |= {f"further.replicas.{k}": v for k, v in (("backbones", ["sana"]), ("paradigms", ["tdm"]), ("seeds", [1, 2]))}


@pytest.fixture
def p(monkeypatch, tmp_path):
    """Of seeds 0, 1, 2 cosines of 0.4, 0.5, 0.6 without GAD and of 0.5, 0.6, 0.7 with it, alike at all points."""
    for name in ("DATA", "TABLES"):
        monkeypatch.setattr(paths, name, tmp_path / name)
    p = params.load(**ONLY)
    for run in p.grid.runs([0]) + p.replicas:
        cos, gad = 0.4 + 0.1 * run.seed, run.variant == "gad"
        endpoint = {"cos": [cos + 0.1 * gad] * 4, "relative": [0.5] * 4, "value": [0.1, 0.2, 0.3, 0.4]}
        scene, end = [1.0, 1.0, 0.0, 1.0 - gad], [0.2 * (1 - gad / 2)] * 3
        paths.result(run).parent.mkdir(exist_ok=True, parents=True)
        paths.result(run).write_text(json.dumps({
            "endpoint": endpoint, "quality": {"scene": scene}, "trajectory": {"relative": [[9.0, e] for e in end]}}))
    return p


def test_seeds_are_compared_with_their_like(p):
    long = replicas.write(p).set_index(["model", "seed", "metric"])[["value", "low", "high"]]
    assert [long.loc[("TDM", s, "cos"), "value"] for s in ("0", "1", "2", "all")] == pytest.approx([0.4, 0.5, 0.6, 0.5])
    less = long.loc["TDM + GAD − base"]
    assert [less.loc[(s, "cos"), "value"] for s in ("0", "1", "2", "all")] == pytest.approx([0.1] * 4)
    assert less.loc[("all", "fit"), "value"] == pytest.approx(-0.25)
    assert less.loc[("all", "end"), "value"] == pytest.approx(-0.5)  # relative, of the last step
    assert [*long.loc[(replicas.MEAN, "all", "cos")]] == pytest.approx([0.1] * 3)
    sd, low, high = long.loc[(replicas.STUDENTS, "all", "cos")]
    assert sd == pytest.approx(0.1)  # of two columns of three, 0.1 each
    assert (low, high) == pytest.approx([0.1 * (4 / chi2.ppf(q, 4)) ** 0.5 for q in (0.975, 0.025)])
    assert long.loc[(replicas.DIFFERENCES, "all", "cos"), "value"] == pytest.approx(0, abs=1e-12)
    # Prompts are all alike: the interval is training's alone.
    value, low, high = long.loc[("TDM", "all", "cos")]
    assert (high - value, value - low) == pytest.approx([2.776445 * 0.1 / 3**0.5] * 2)
    text = (paths.TABLES / "replicas.md").read_text()
    assert "nan" not in text and "| seed 2" in text and "trajectory error, relative change" in text
    assert len(pd.read_csv(paths.TABLES / "replicas.csv")) == len(long)
    figure = plots.trained_again(p)
    assert [t.get_text() for t in figure.axes[0].get_yticklabels()] == ["sana  TDM + GAD", f"all  {replicas.MEAN}"]
    plots.plt.close(figure)


def test_spread_is_pooled():
    assert replicas.spread([[1.0, 3.0], [10.0, 10.0, 13.0]]) == (pytest.approx(((2 + 6) / 3) ** 0.5), 3)
    assert replicas.spread([[1.0], [2.0]]) == (0.0, 0)


def test_intervals_hold_what_prompts_and_training_vary_by():
    """Of 96 prompts and 3 seeds of 9 columns: at least 95 %, and no more than all."""
    rng, held, prompts = np.random.default_rng(0), [], np.arange(96)
    for _ in range(60):
        common = 0.3 * rng.standard_normal(96)
        x = 0.05 + 0.03 * rng.standard_normal((9, 3, 1)) + common + 0.2 * rng.standard_normal((9, 3, 96))
        sd, dof = replicas.spread(x.mean(2).tolist())
        for own in x[::4]:
            each = bootstrap(lambda i, own=own: own[:, i].mean(-1).mean(0), prompts, 200)
            _, low, high = replicas.together(each[0], replicas.error(each), sd, dof, 3)
            held.append(low < 0.05 < high)
    assert 0.92 < np.mean(held) < 1


def test_none_trained_again_is_said(p):
    none = params.load(**ONLY | {"further.replicas.seeds": []})
    assert not len(replicas.write(none)) and "names no seeds" in (paths.TABLES / "replicas.md").read_text()
    figure = plots.trained_again(none)
    assert figure.axes[0].get_title() == "no student was trained again"
    plots.plt.close(figure)


def test_a_student_is_trained_once():
    with pytest.raises(ParamsError, match="sana-tdm-base-1 is a student twice"):
        params.load(**ONLY | {"seeds.distill": [0, 1]})
    p = params.load()
    assert not {*p.replicas} & {*p.runs()} and {r.seed for r in p.replicas} == {*p.further.replicas.seeds}
