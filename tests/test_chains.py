"""Where a cosine is lost: a student that is its teacher loses none, and the last of its own is Table 1's."""

import copy
import json
from itertools import pairwise

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import build, perturb
from safetensors.torch import load_file, save_file

from gad import params, paths, schema
from gad.evaluation import chains, geometry
from gad.geometry import jvp
from gad.stages import chains as stage
from gad.tables import chains as tables
from gad.tangents import Tangents

PROMPTS = ["a red circle", "a blue square and a green triangle", "a red square"]
STEPS = 4


@pytest.fixture(scope="module", params=["sd2", "sana"])
def place(request):
    """A backbone, and its own paths in as many steps as a student has."""
    backbone = build(request.param)
    z, v, cond = Tangents.inputs(backbone, PROMPTS, (1, 2))
    times = backbone.times(STEPS)
    states, responses = geometry.tangents(
        lambda c: lambda z: backbone.path(backbone.network, z, c, STEPS, 1.0, times), z, v, cond, 2
    )
    return backbone, Tangents(states, responses, cond)


def test_a_student_that_is_its_teacher_loses_nothing(place):
    backbone, teacher = place
    found = chains.chain(backbone, backbone.network, teacher, 2)
    assert set(found) == {"step", "path", "own"}
    for cosines in found.values():
        assert np.array(cosines) == pytest.approx(np.ones((STEPS, len(PROMPTS))), abs=1e-4)


def test_cosines_are_of_steps_and_of_their_products(place):
    backbone, teacher = place
    student = perturb(copy.deepcopy(backbone.network), seed=7)
    found = chains.chain(backbone, student, teacher, 2)
    _, response = geometry.tangents(
        lambda c: geometry.endpoint(backbone, student, c, STEPS), teacher.z, teacher.v, teacher.cond, 2
    )
    assert found["own"][-1] == pytest.approx(geometry.compare(response, teacher.jv)["cos"].tolist(), abs=1e-4)
    one, path = teacher[slice(1, 2)], teacher.v[1:2]
    for k, (t, s) in enumerate(pairwise(backbone.times(STEPS))):
        def step(x, t=t, s=s):
            return backbone.step(student, x, t.expand(1), s.expand(1), one.cond)

        at = one.states[:, k]
        _, alone = jvp(step, at, one.responses[:, k])
        _, path = jvp(step, at, path)
        for name, value in (("step", alone), ("path", path)):
            cos = geometry.compare(value, one.responses[:, k + 1])["cos"]
            assert found[name][k][1] == pytest.approx(cos.item(), abs=1e-3), name
    assert found["step"][0] == found["path"][0] == found["own"][0]
    assert found["path"][-1] != pytest.approx(found["own"][-1], abs=1e-3)


def test_a_teacher_nearby(place):
    backbone, teacher = place
    found = [chains.nearby(backbone, teacher, size, STEPS, 1.0, 2, 5) for size in (1e-4, 0.1, 0.5)]
    error = [np.mean(f["value"]) for f in found]
    assert error[0] < 1e-4 < error[1] < error[2] and np.mean(found[0]["cos"]) == pytest.approx(1, abs=1e-3)
    assert min(found[1]["cos"]) > np.mean(found[2]["cos"])
    moved = 0.75**0.5 * teacher.z + 0.5 * backbone.noise(len(teacher), 5)
    x0 = backbone.sample(backbone.network, moved, teacher.cond, STEPS)
    assert found[2]["value"] == pytest.approx(geometry.compare(x0, teacher.x0)["relative"].tolist(), rel=1e-4)


def test_files_are_the_same_bytes_again_and_older_ones_are_read(place, tmp_path):
    backbone, teacher = place
    files = [tmp_path / f"{k}.safetensors" for k in range(8)]  # of two keys of metadata the order would be random
    for file in files:
        teacher.save(file, PROMPTS, (1, 2))
    assert len({file.read_bytes() for file in files}) == 1 and Tangents.source(files[0]) == (PROMPTS, (1, 2))
    older = {"prompts": json.dumps(PROMPTS), "seeds": json.dumps((1, 2))}
    save_file(load_file(files[0]), tmp_path / "older.safetensors", older)
    for file in (files[0], tmp_path / "older.safetensors"):
        made = Tangents.load(file, backbone)
        assert torch.equal(made.states[:, 1:], teacher.states[:, 1:])
        assert torch.equal(made.responses[:, 1:], teacher.responses[:, 1:]) and len(made.z) == len(PROMPTS)


def test_stages(monkeypatch, tmp_path):
    """A student that is its teacher, by the stages; the paths are of Table 1's noises."""
    monkeypatch.setattr(paths, "DATA", tmp_path)
    which = {"world": "mini", "autoencoder": "kl", "teacher_steps": 2, "student_steps": 2, "cfg": 1.0}
    p = params.load(**{"backbones.sd2": which, "nearby.sizes": [0.1, 0.3], "evaluation.batch": 2})
    run, teacher = params.Run("sd2", "tdm", "base", 0), build("sd2")
    for folder in (paths.teacher("sd2"), paths.student(run)):
        teacher.pipeline.save_pretrained(folder)
    z, v, cond = Tangents.inputs(teacher, PROMPTS, (1, 2))
    found = geometry.tangents(
        lambda c: lambda z: teacher.path(teacher.network, z, c, 2, 1.0, teacher.times(2)[[0, -1]]), z, v, cond, 2
    )
    paths.diagnosis("sd2").mkdir(parents=True)
    Tangents(*found, cond).save(paths.diagnosis("sd2") / "test.safetensors", PROMPTS, (1, 2))
    assert [*stage.nearby("sd2", p)] == ["0.1", "0.3"]
    untrained = json.loads((paths.nearby("sd2") / "untrained.json").read_text())
    assert [*untrained] == ["step", "path", "own"]
    assert all([len(x) for x in steps] == [len(PROMPTS)] * 2 for steps in untrained.values())
    near = json.loads((paths.nearby("sd2") / "teacher.json").read_text())
    assert {len(x) for r in near.values() for x in r.values()} == {len(PROMPTS)}
    made = Tangents.load(paths.nearby("sd2") / "paths.safetensors", teacher)
    assert made.states.shape[1] == 3 and torch.equal(made.z, z) and torch.equal(made.v, v)
    torch.testing.assert_close(made.jv, found[1][:, -1], atol=0.01 * float(found[1].abs().max()), rtol=0)
    told = stage.chain(run, p)
    assert told == {k: pytest.approx([1, 1], abs=1e-3) for k in ("step", "path", "own")}
    assert len(json.loads(paths.chain(run).read_text())["own"][-1]) == len(PROMPTS)
    fewer = params.load(**{"backbones.sd2": which | {"student_steps": 1}})
    with pytest.raises(ValueError, match="takes 1 steps: data/nearby/sd2 holds the teacher's paths at the times of 2"):
        stage.chain(run, fewer)


def test_page(monkeypatch, tmp_path):
    for name in ("DATA", "TABLES"):
        monkeypatch.setattr(paths, name, tmp_path / name)
    only = {f"further.{b}.backbones": ["sana"] for b in schema.Further.model_fields}
    p = params.load(**{"grid.backbones": ["sana"], "grid.paradigms": ["tdm"], "report.bootstrap": 50, **only,
                       "evaluation.noises": 2, "seeds.distill": [0, 1], "further.replicas.seeds": []})
    paths.nearby("sana").mkdir(parents=True)
    near = {"0.1": {"cos": [0.5, 0.7, 0.5, 0.7], "value": [0.0, 0.1, 0.1, 0.8]}}
    (paths.nearby("sana") / "teacher.json").write_text(json.dumps(near))
    untrained = {"step": [[0.7] * 4, [0.5] * 4], "path": [[0.7] * 4, [0.4] * 4], "own": [[0.7] * 4, [0.1] * 4]}
    (paths.nearby("sana") / "untrained.json").write_text(json.dumps(untrained))
    paths.result(p.runs()[0]).parent.mkdir()
    paths.chain(p.runs()[0]).parent.mkdir()
    for run in p.grid.runs([0, 1]):
        own = 0.2 + 0.1 * (run.variant == "gad") + 0.1 * run.seed
        result = {"step": [[0.9] * 4, [0.8] * 4], "path": [[0.9] * 4, [0.6] * 4], "own": [[0.9] * 4, [own] * 4]}
        paths.chain(run).write_text(json.dumps(result))
        values = [0.02, 0.02, 0.02, 5.0] * 3  # of six prompts
        endpoint = {"cos": [0.8 + 0.1 * (run.variant == "gad")] * 12, "value": values}
        paths.result(run).write_text(json.dumps({"endpoint": endpoint}))
    long = tables.write(p).set_index(["model", "metric"])["value"]
    assert long["teacher, ε = 0.1", "cos"] == pytest.approx(0.6)
    assert long["teacher, ε = 0.1", "value"] == pytest.approx(0.1)
    assert long["teacher, ε = 0.1", "value_mean"] == pytest.approx(0.25)
    assert long[tables.UNTRAINED, tables.OWN] == pytest.approx(0.1)
    same = tables.alike(p).set_index(["model", "metric"])["value"]
    assert dict(same) == {("students", "0.01 to 0.03"): pytest.approx(0.8),
                          ("students + GAD", "0.01 to 0.03"): pytest.approx(0.9)}  # of others there are too few
    assert long["TDM", tables.ALONE.format(2)] == pytest.approx(0.8)
    assert long["TDM", tables.PATH] == pytest.approx(0.6) and long["TDM", tables.OWN] == pytest.approx(0.25)
    assert long["TDM + GAD − base", tables.OWN] == pytest.approx(0.1)
    assert long["TDM + GAD − base", tables.PATH] == pytest.approx(0)
    assert tables.chains(p, [1]).set_index(["model", "metric"])["value"]["TDM", tables.OWN] == pytest.approx(0.3)
    text = (paths.TABLES / "chains.md").read_text()
    assert "nan" not in text and "ε = 0.1" in text
    heads = [line for line in text.splitlines() if line.startswith("| backbone")]
    assert [c.strip() for c in heads[0].split("|")[3:-1]] == ["step 1 alone", "step 2 alone", tables.PATH, tables.OWN]
    assert {"backbone", "model", "metric", "value", "low", "high"} == set(pd.read_csv(paths.TABLES / "chains.csv"))
