"""The world of photographs, from files of its formats to Table 1: tiny pipelines and judges of the real classes."""

import inspect
import json
import os
import random
import subprocess
import sys

import pandas as pd
import pytest
import yaml
from conftest import build, perturb
from diffusers import DDIMScheduler, StableDiffusionPipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from test_experts import dinov2, openclip, pickscore, rt_detr
from test_formats import sana as instructed_sana
from test_sprint import sprint_of

from gad import params, paths
from gad.graph import ALONE, sandbox
from gad.params import ROOT, ParamsError
from gad.stages import evaluation
from gad.stages import world as stage
from gad.stages.common import placed, write_json
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
    """Parameters of backbones that are there already, judged as photographs are; a LoRA on the first, SANA-Sprint."""
    backbones = {
        name: {**SMOKE["backbones"][name], "world": "coco", "path": str(folder / name), "pretrain": {}}
        for name in PIPELINES
    }
    lora = {"backbone": "sd2", "paradigm": "lora", "lora": str(folder / "lora")}
    sprint = {"backbone": "sana", "paradigm": "sprint", "path": str(folder / "sprint")}
    return {
        **SMOKE, "published": {"sd2-lora-base-0": lora, "sana-sprint-base-0": sprint},
        "grid": {"backbones": [*PIPELINES], "paradigms": ["tdm"], "variants": ["gad"]},
        "further": {**ALONE, "baselines": {"backbones": ["sana"], "paradigms": ["tdm"], "variants": ["base"]}},
        "backbones": backbones,
        "coco": {"archives": [], "judges": {kind: {"path": str(folder / kind)} for kind in JUDGES}},
    }


def v_prediction():
    scheduler = DDIMScheduler(prediction_type="v_prediction", beta_schedule="scaled_linear", beta_end=0.012)
    return build("sd2", scheduler=scheduler)


PIPELINES = {"sd2": v_prediction, "pixart": lambda: build("pixart"), "sana": instructed_sana}


@pytest.mark.slow
@pytest.mark.pipeline
def test_given_pipelines_go_all_the_way_on_photographs(tmp_path, forks):
    """The whole graph: v-prediction, learned sigma, an instruction; every table, LoRA and SANA-Sprint as rows."""
    for kind, make in JUDGES.items():
        (tmp_path / kind).mkdir()
        make(tmp_path / kind)
    for name, make in PIPELINES.items():
        made = make()
        made.pipeline.save_pretrained(tmp_path / name)
        if name == "sana":
            sprint_of(made).save_pretrained(tmp_path / "sprint")
        if name == "sd2":
            made.network.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k"], init_lora_weights=False))
            StableDiffusionPipeline.save_lora_weights(tmp_path / "lora", get_peft_model_state_dict(made.network))
    place = sandbox(tmp_path / "copy", given(tmp_path))
    photographs(tmp_path / "annotations")
    coco.build(tmp_path / "annotations", place / "data/coco", 0, test=20, unseen=10, layouts=5)
    environment = {**os.environ, "PYTHONPATH": str(place), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "gad.pipeline", "reproduce", "--jobs", "2"]
    out = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True)
    assert out.returncode == 0, out.stdout[-2000:] + out.stderr[-2000:]
    source = json.loads((place / "data/teachers/sd2/source.json").read_text())
    assert source["path"] == str(tmp_path / "sd2") and source["parameters"] > 1e5
    assert "photograph" in (place / "data/students/sd2-tdm-gad-0/README.md").read_text()
    names = "table1", "table2", "table3", "table4", "table5", "table6", "figure5"
    tables = {name: pd.read_csv(place / f"reports/tables/{name}.csv") for name in names}
    for name, table in tables.items():
        models = table.groupby("backbone")["model"].agg(set)
        assert set(models.index) == set(PIPELINES) and all("TDM + GAD" in found for found in models), name
        assert models["sana"] >= {"TDM", "SPRINT"} and "LORA" in models["sd2"], name
        assert table["value"].notna().all(), name
    metrics = {name: set(table["metric"]) for name, table in tables.items()}
    assert {"pickscore", "openclip", "cos"} <= metrics["table1"] and "scene" not in metrics["table1"]
    assert metrics["table3"] == {"CLIP", "PickScore"} and metrics["figure5"] >= {"Vendi", "CLIP"}
    assert {"guided, AP50", "shuffled, AP", "guided, PickScore"} <= metrics["table5"]
    assert {"shift, warmth", "mean shift"} <= metrics["table6"] and "shift, area" not in metrics["table6"]
    text = (place / "reports/tables/table5.md").read_text()
    assert "Photographs" in text and "analytic" not in text and "Miniature" not in text.split("The paper's")[0]
    assert "PickScore" in (place / "reports/tables/summary.md").read_text()
    assert (place / "reports/index.html").exists()


def test_captions_that_changed_since_the_teacher_was_measured_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "DATA", tmp_path)
    photographs(tmp_path / "annotations")
    coco.build(tmp_path / "annotations", tmp_path / "coco", 0, test=20, unseen=10, layouts=5)
    data = params.load().model_dump()
    own = tmp_path / "own.txt"
    own.write_text("a cat\n")
    data["backbones"]["sd2"] |= {"world": "coco", "path": "somewhere"}
    data["coco"] |= {"prompts": str(own), "judges": {kind: {"path": "somewhere"} for kind in JUDGES}}
    p = params.validate(data)
    files = world_of("sd2", p).hashes()
    code = {f"gad.world.{name}" for name in ("coco", "experts", "prompts")}
    assert set(files) == {"prompts.csv", "layouts.jsonl", "train: own.txt", *code}
    write_json(paths.teacher("sd2") / "source.json", {"files": files})
    world_of("sd2", p)
    own.write_text("a dog\n")
    with pytest.raises(ValueError, match=r"own\.txt has changed since .*: `dvc repro -f teacher@sd2`"):
        world_of("sd2", p)
    assert world_of("sd2", p, anew=True).prompts(1, 0) == ["a dog"]
    own.write_text("a cat\n")
    world_of("sd2", p)
    monkeypatch.setattr(inspect, "getsource", lambda module: f"another {module.__name__}")
    with pytest.raises(ValueError, match=r"gad\.world\.coco has changed since .*: `dvc repro -f teacher@sd2`"):
        world_of("sd2", p)


@pytest.mark.parametrize("name", PIPELINES)
def test_a_given_teacher_that_is_another_than_was_measured_is_refused(name, tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "DATA", tmp_path)
    made, folder = PIPELINES[name](), tmp_path / "given"
    made.pipeline.save_pretrained(folder)
    data = params.load().model_dump()
    data["backbones"][name] |= {"path": str(folder), "teacher_steps": 4, "pretrain": {"prompts": 2}}
    p = params.validate(data)
    stage.teacher(name, p)
    placed("cpu", name, p)
    perturb(made.pipeline.vae)
    made.pipeline.save_pretrained(folder)
    with pytest.raises(ValueError, match=rf"{folder} is another .* saw: run `dvc repro -f teacher@{name}`$"):
        placed("cpu", name, p)
    stage.teacher(name, p)  # which measures it anew
    placed("cpu", name, p)


def test_samples_are_drawn_as_many_at_once_as_the_memory_allows(monkeypatch):
    p, seen, teacher = params.load(**{"evaluation.batch": 1}), [], build("sana")
    raw = teacher.raw
    monkeypatch.setattr(teacher, "raw", lambda network, x, *rest: (seen.append(len(x)), raw(network, x, *rest))[1])
    prompts, which = ["a red circle"] * 5, p.backbones["sana"].model_copy(update={"teacher_steps": 2})
    images = evaluation.samples(teacher, teacher.network, prompts, 2, which, p.evaluation, 0)
    assert images.shape == (10, 3, 64, 64) and max(seen) == 2 * p.evaluation.drawn == 4  # with guidance, and without


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
