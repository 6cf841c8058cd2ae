"""The world of photographs, from files of its formats to Table 1: tiny pipelines and judges of the real classes."""

import json
import os
import random
import subprocess
import sys

import pandas as pd
import pytest
import yaml
from conftest import build
from test_experts import dinov2, openclip, pickscore, rt_detr

from gad import params
from gad.graph import ALONE, sandbox
from gad.params import ROOT, ParamsError
from gad.world import coco, scenes
from gad.worlds import Mini, world_of

JUDGES = {"openclip": openclip, "pickscore": pickscore, "dinov2": dinov2, "rt-detr": rt_detr}

SMOKE = yaml.safe_load((ROOT / "tests/smoke.yaml").read_text())


def test_the_miniature_world_judges_its_own_scenes_right():
    world = world_of("sd2", params.load())
    assert isinstance(world, Mini)
    drawn = scenes.sample(6, 3, "test")
    assert world.prompts(6, 3, "test") == drawn.captions()
    assert world.quality(lambda prompts: drawn.render(), 6, 3) == {"colour_count": [1] * 6, "scene": [1] * 6}
    wrong = world.quality(lambda prompts: drawn.render().flip(0), 6, 3)["scene"]
    assert sum(wrong) < 6


def photographs(folder):
    """A few dozen captions and boxes in COCO's format."""
    rng, nouns = random.Random(0), ("fox", "couch", "tv")
    images = [{"id": i, "width": 64, "height": 64} for i in range(60)]
    captions, boxes = [], []
    for i in range(60):
        noun = rng.choice(nouns)
        captions.append({"id": i, "image_id": i, "caption": f"A {noun} in the year {1900 + i}."})
        boxes.append({"id": i, "image_id": i, "category_id": nouns.index(noun), "bbox": [8, 8, 40, 40], "iscrowd": 0})
    categories = [{"id": k, "name": n} for k, n in enumerate(nouns)]
    folder.mkdir(parents=True)
    (folder / coco.CAPTIONS).write_text(json.dumps({"annotations": captions}))
    (folder / coco.INSTANCES).write_text(json.dumps(
        {"images": images, "annotations": boxes, "categories": categories}))


def given(folder):
    """Parameters of a backbone that is there already, judged as photographs are."""
    backbone = {**SMOKE["backbones"]["sd2"], "world": "coco", "path": str(folder / "pipeline")}
    return {
        **SMOKE, "published": {},
        "grid": {"backbones": ["sd2"], "paradigms": ["tdm"], "variants": ["base", "gad"]},
        "further": ALONE,
        "backbones": {"sd2": backbone},
        "coco": {"archives": [], "judges": {kind: {"path": str(folder / kind)} for kind in JUDGES}},
    }


WAY = """
import json
from gad import claims, params, plots, stages, tables
p = params.load()
told = {"teacher": stages.teacher("sd2", p)}
stages.diagnose("sd2", p)
stages.references("sd2", p)
for variant in ("base", "gad"):
    run = params.Run("sd2", "tdm", variant, 0)
    stages.distill(run, p)
    told[variant] = stages.evaluate(run, p)
    stages.use(run, p)
claims.write(p, tables.write(p))
plots.write(p)
print(json.dumps(told))
"""


@pytest.mark.slow
def test_a_given_pipeline_goes_all_the_way_on_photographs(tmp_path):
    for kind, make in JUDGES.items():
        (tmp_path / kind).mkdir()
        make(tmp_path / kind)
    build("sd2").pipeline.save_pretrained(tmp_path / "pipeline")
    place = sandbox(tmp_path / "copy", given(tmp_path))
    photographs(tmp_path / "annotations")
    coco.build(tmp_path / "annotations", place / "data/coco", 0, test=20, unseen=10, layouts=5)
    environment = {**os.environ, "PYTHONPATH": str(place), "MPLBACKEND": "agg", "OMP_NUM_THREADS": "1"}
    out = subprocess.run([sys.executable, "-c", WAY], cwd=place, env=environment, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    told = json.loads(out.stdout.splitlines()[-1])
    assert set(told["teacher"]) == {"pickscore", "openclip"}
    assert all(set(told[v]) == {"cos", "pickscore", "openclip"} for v in ("base", "gad"))
    source = json.loads((place / "data/teachers/sd2/source.json").read_text())
    assert source["path"] == str(tmp_path / "pipeline") and source["parameters"] > 1e5
    assert "photograph" in (place / "data/students/sd2-tdm-gad-0/README.md").read_text()
    long = pd.read_csv(place / "reports/tables/table1.csv")
    assert {"pickscore", "openclip", "cos"} <= set(long["metric"]) and "scene" not in set(long["metric"])
    assert "PickScore" in (place / "reports/tables/summary.md").read_text()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"path": None}, "backbones.sd2.path is missing: world 'coco' needs a pipeline folder or hub id"),
        ({"world": "moon"}, "backbones.sd2.world='moon'"),
    ],
)
def test_a_photographic_backbone_that_lacks_something_is_named(change, said, tmp_path):
    data = params.load().model_dump()
    data["backbones"]["sd2"] |= {"world": "coco", "path": "somewhere", **change}
    with pytest.raises(ParamsError, match=said):
        params.validate(data)
    data["backbones"]["sd2"] |= {"world": "coco", "path": "somewhere"}
    data["coco"]["judges"] = {}
    with pytest.raises(ParamsError, match=r"coco\.judges=\[\]: backbones\.sd2 needs openclip too"):
        params.validate(data)


def test_captions_that_are_not_there_say_how_to_get_them():
    data = params.load().model_dump()
    data["backbones"]["sd2"] |= {"world": "coco", "path": "somewhere"}
    with pytest.raises(ValueError, match=r"prompts\.csv does not exist: set coco\.archives"):
        world_of("sd2", params.validate(data))
