"""What noise is good for: a model equal to the teacher scores the ceiling, one that ignores its noise the floor."""

import json
import re

import numpy as np
import open_clip
import pandas as pd
import pytest
import torch
from conftest import build, perturb
from scipy.linalg import sqrtm

from gad import benches, params, paths, schema
from gad.backbones.base import Backbone
from gad.evaluation import diversity, noise_query
from gad.params import ParamsError
from gad.stages import uses as stage
from gad.tables import pages, teachers
from gad.tables import uses as tables
from gad.world import detector, judge, scenes


def between(low, middle, high):
    assert low < middle < high


# Diversity


def features(seeds, prompts, shared):
    """(S, P, 8): a share `shared` of every image is the prompt's own."""
    rng = np.random.default_rng(0)
    own, prompt = rng.normal(size=(seeds, prompts, 8)), rng.normal(size=(1, prompts, 8))
    return shared * prompt + (1 - shared) * own


def test_vendi_counts_images():
    one, many = np.tile(np.eye(8)[:1, None], (6, 3, 1)), np.eye(8)[:6, None].repeat(3, 1)
    assert diversity.vendi(one) == pytest.approx(np.ones(3)) and diversity.vendi(many) == pytest.approx(6 * np.ones(3))
    between(*(diversity.vendi(features(12, 5, s)).mean() for s in (1.0, 0.5, 0.0)))


def test_layout_vendi_and_coverage():
    rng = np.random.default_rng(0)
    free, half = rng.uniform(10, 54, (32, 1, 2)), rng.uniform(10, 32, (32, 1, 2))
    stuck = np.full((32, 1, 2), 20.0)
    assert diversity.layout_vendi(stuck) == pytest.approx(1)
    between(*(diversity.layout_vendi(x) for x in (stuck, half, free)))
    prior = rng.uniform(10, 54, (512, 2))
    between(*(diversity.coverage(x[:, 0], prior) for x in (stuck, half, free)))
    assert diversity.coverage(prior, prior) == 1
    far = np.array([[[0.0, 0.0]], [[500.0, 0.0]]])
    assert diversity.layout_vendi(far) == pytest.approx(2)
    near = np.array([[[20.0, 20.0], [40.0, 40.0]], [[20.0 + 8, 20.0], [40.0, 40.0]]])  # one of two objects, by WIDTH
    k = np.exp(-(8**2 / 2) / (2 * diversity.WIDTH**2))
    shares = np.array([1 + k, 1 - k]) / 2
    assert diversity.layout_vendi(near) == pytest.approx(np.exp(-(shares * np.log(shares)).sum()))


def test_whole_images_have_all_their_objects():
    points = np.zeros((3, 2, 2))
    points[1, 1] = np.nan
    assert diversity.whole(points).tolist() == [True, False, True]


def test_layouts_are_compared_in_as_many_whole_images(monkeypatch):
    """Of 6 images the first 2 whole ones; a prompt with one alone has no score."""
    bench = benches.Mini("sana", params.load(**{"uses.prompts": 3, "uses.train": 2, "uses.query": 1}), "cpu")
    rng, points = np.random.default_rng(0), {}
    for k, names in enumerate(bench.names):
        points[k] = rng.uniform(10, 54, (6, len(names), 2))
    points[1][[0, 2, 5]] = np.nan
    points[2][1:] = np.nan
    monkeypatch.setattr(detector, "layouts", lambda images, names: points[int(images[0, 0, 0, 0])])
    found = bench.diversity(torch.arange(3.0).view(1, 3, 1, 1, 1).expand(6, 3, 3, 4, 4))
    assert found["whole"] == pytest.approx([1, 1 / 2, 1 / 6])
    kept = points[0][:2], points[1][[1, 3]]
    assert found["layout_vendi"][:2] == pytest.approx([diversity.layout_vendi(x) for x in kept])
    assert np.isnan(found["layout_vendi"][2]) and np.isnan(found["coverage"][2])
    for k, x in enumerate(kept):
        prior = scenes.relayout(bench.world[k], 512, k).centre[:, 0]
        assert found["coverage"][k] == diversity.coverage(x[:, 0], prior)


def test_layouts_are_read_from_images():
    world = scenes.sample(20, 3, "test")
    scene = world[[int(np.flatnonzero(world.count == 2)[0])]]
    many = scenes.relayout(scene, 5, 0)
    wanted = [many.objects(0)]
    found = detector.layouts(many.render(), wanted * 5)
    boxes = np.stack([many.boxes(i) for i in range(5)])
    assert found == pytest.approx((boxes[..., :2] + boxes[..., 2:]) / 2, abs=1.5)
    assert np.isnan(detector.layouts(torch.zeros(1, 3, 64, 64), wanted)).all()


def test_fid_and_kid_are_the_textbooks_and_draws_are_paired():
    rng = np.random.default_rng(0)
    real, same, moved = (rng.normal(size=(20, 30, 4)) + m for m in (0, 0, 0.5))
    a, b = (x.reshape(-1, 4) for x in (moved, real))
    s, t = np.cov(a.T), np.cov(b.T)
    known = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(s + t - 2 * sqrtm(s @ t).real)
    far, near = (diversity.distances(x, real, 10) for x in (moved, same))
    assert far["fid"] == pytest.approx(known, rel=1e-4)
    assert near["fid"] < 0.05 < far["fid"]
    kernels = [(u @ v.T / 4 + 1) ** 3 for u, v in ((a, a), (b, b), (a, b))]
    n = len(a)
    within = sum((k.sum() - np.trace(k)) / (n * (n - 1)) for k in kernels[:2])
    assert far["kid"] == pytest.approx(within - 2 * kernels[2].mean(), rel=1e-6) and near["kid"] < far["kid"]
    assert diversity.distances(moved, real, 10) == far
    for key in ("fid_draws", "kid_draws"):
        assert len(far[key]) == 10 and np.std(np.subtract(far[key], near[key])) > 0


# NoiseQuery


def test_attributes_of_known_images():
    world = scenes.sample(40, 5, "test")
    found = noise_query.attributes(world.render())
    one = np.flatnonzero(world.count == 1)
    assert found["centroid x"][one] * 64 == pytest.approx(world.centre[one, 0, 0], abs=1.5)
    sizes = {"circle": np.pi, "square": 1.8**2, "triangle": 1.8}
    factor = np.array([sizes[scenes.SHAPES[k]] for k in world.shape[one, 0]])
    assert found["area"][one] * 64**2 == pytest.approx(factor * world.radius[one, 0] ** 2, rel=0.15)
    plain = noise_query.attributes(torch.tensor([1.0, 0.0, 0.0]).view(1, 3, 1, 1).expand(1, 3, 64, 64))
    assert plain["saturation"] == pytest.approx([1]) and plain["warmth"] == pytest.approx([1])
    assert plain["brightness"] == pytest.approx([1 / 3])
    dark = noise_query.colours(torch.tensor([0.02, 0.0, 0.01]).view(1, 3, 1, 1).expand(1, 3, 64, 64))
    assert dark["saturation"] == pytest.approx([0.02])  # whose HSV saturation is 1
    assert np.isnan(noise_query.attributes(torch.ones(1, 3, 64, 64))["centroid x"]).all()


def test_extremes_leave_out_what_is_not_there():
    top, bottom = noise_query.extremes(np.array([3.0, np.nan, 1.0, 2.0, 5.0, 4.0]), 2)
    assert top.tolist() == [4, 5] and bottom.tolist() == [2, 3]
    with pytest.raises(ValueError, match=r"the library has 1 images .* 2 are wanted: enlarge it"):
        noise_query.extremes(np.array([1.0, np.nan]), 1)


def test_shift_and_rank_correlation_between_floor_and_ceiling():
    rng = np.random.default_rng(0)
    library, own = rng.normal(size=64), rng.normal(size=(64, 5))
    models = [share * library[:, None] + (1 - share) * own for share in (0.0, 0.5, 1.0)]
    top, bottom = noise_query.extremes(library, 8)
    between(*(noise_query.shift(x[top], x[bottom], 1.0).mean() for x in models))
    between(*(noise_query.rank_correlation(library, x).mean() for x in models))
    assert noise_query.rank_correlation(library, models[2]) == pytest.approx(np.ones(5))
    deaf = np.tile(own[:1], (64, 1))
    assert not noise_query.shift(deaf[top], deaf[bottom], 1.0).any()
    assert not noise_query.rank_correlation(library, deaf).any()
    few = models[2].copy()
    few[2:, 0], few[3:, 1] = np.nan, np.nan
    found = noise_query.rank_correlation(library, few)
    assert np.isnan(found[0]) and found[1:] == pytest.approx(np.ones(4))


# The stage


def test_no_prompt_is_on_both_sides():
    bench = benches.Mini("sana", params.load(), "cpu")
    assert len({tuple(sorted(own)) for own in bench.names}) == len(bench.world) == params.load().uses.prompts
    many = {"uses.prompts": 5000}
    with pytest.raises(ValueError, match=r"uses.prompts=5000: 40000 scenes have \d+ different sets of objects; lower"):
        benches.Mini("sana", params.load(**many), "cpu")


def test_numbers_are_kept_to_six_digits():
    data = {"a": [1 / 3, float("nan")], "b": {"n": 12345678, "s": "x", "ok": True}, "c": 2 / 3 * 1e-9}
    found = stage.rounded(data)
    assert str(found) == "{'a': [0.333333, nan], 'b': {'n': 12345678, 's': 'x', 'ok': True}, 'c': 6.66667e-10}"


def test_the_world_has_any_background_where_none_is_named():
    bench = benches.Mini("sana", params.load(), "cpu")
    for k, images in enumerate(bench.real.unbind(1)):
        shown = {detector.detect(image)[1] for image in images}
        own = [*scenes.BACKGROUNDS][bench.world.background[k]]
        assert shown == {own} if bench.world.named[k] else len(shown) > 1


def test_boxes_are_shuffled_among_prompts_of_as_many():
    boxes = [np.full((n, 4), float(i)) for i, n in enumerate((2, 1, 2, 1, 2))]
    assert [b[0, 0] for b in stage._others(boxes)] == [2, 3, 4, 1, 0]


@pytest.mark.parametrize("key, value", [("uses.train", 64), ("uses.seeds", 2), ("uses.query", 65), ("uses.scale", 0.0)])
def test_sizes_that_do_not_fit(key, value):
    with pytest.raises(ParamsError, match=key.split(".")[1]):
        params.load(**{key: value})


# The stages on real networks of random weights. A student here is its teacher with other noises.


class Heard:
    """A model that hears a share of its noise: the rest is one noise for all images."""

    def __init__(self, model, share):
        self.model, self.share = model, share

    def draw(self, z, prompts):
        fixed = torch.randn(z.shape[1:], generator=torch.Generator().manual_seed(5))
        return self.model.draw(self.share**0.5 * z + (1 - self.share) ** 0.5 * fixed, prompts)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """References of a random SD2, and the use of a student that is the same network."""
    small = {
        "backbones.sd2": {"world": "mini", "autoencoder": "kl", "teacher_steps": 2, "student_steps": 2, "cfg": 1.0},
        "uses": {"seeds": 6, "prompts": 6, "train": 4, "fit": 40, "library": 12, "picks": 2, "query": 3, "layouts": 3,
                 "evals": 1, "scale": 0.3, "sweep": [0.1], "draws": 3},
    }
    p, run = params.load(**small), params.Run("sd2", "tdm", "base", 0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(paths, "DATA", tmp_path_factory.mktemp("data"))
        teacher = build("sd2")
        for folder in (paths.teacher("sd2"), paths.student(run)):
            teacher.pipeline.save_pretrained(folder)
        paths.judge().mkdir()
        judge.save(perturb(open_clip.CLIP(**judge.CONFIG)), judge.CONFIG, paths.judge())
        stage.references("sd2", p)
        stage.use(run, p)
        yield p, json.loads((paths.references("sd2") / "teacher.json").read_text()), json.loads(
            paths.use(run).read_text()
        )


def text(data):
    """Equal where `data` is, NaN and all."""
    return json.dumps(data, sort_keys=True)


def test_a_student_that_is_its_teacher_is_of_the_same_use(place):
    _, teacher, student = place
    for part in ("quality", "distance", "diversity", "layout", "query"):
        assert text(student[part]) == text(teacher[part]), part
    assert student["seeds"]["self"] == student["seeds"]["teacher"] == teacher["seeds"]["self"]
    assert student["hybrid"]["quality"] == teacher["quality"]  # the teacher's first step, then its own others
    learnt_nothing = {k: v for k, v in student.items() if k not in ("run", "hybrid")}
    assert text(teacher["untrained"]) == text(learnt_nothing)
    guided, free = (np.array(teacher["layout"][k]["clip"]) for k in ("guided", "free"))
    assert (guided != free).all()  # guidance reaches the images


def test_an_interrupted_run_goes_on_with_the_latents_it_has(place, monkeypatch):
    """With the same bytes in the end, and nothing left on the way; what another student left is not taken."""
    p, run = place[0], params.Run("sd2", "tdm", "base", 0)
    whole, files = paths.use(run).read_bytes(), [paths.use(run), paths.use(run).with_suffix(".png")]
    for file in files:
        file.unlink()
    guided, drawn, sample = stage.layout.guided, [], Backbone.sample

    def stopped(*args):
        if args[-1]:  # the unguided are done
            raise KeyboardInterrupt
        return guided(*args)

    def sampled(self, network, z, *rest, **options):
        drawn.append(len(z))
        return sample(self, network, z, *rest, **options)

    monkeypatch.setattr(Backbone, "sample", sampled)
    monkeypatch.setattr(stage.layout, "guided", stopped)
    with pytest.raises(KeyboardInterrupt):
        stage.use(run, p)
    assert drawn and not files[0].exists() and len([*paths.resume("").glob(f"use-{run}-*")]) > 1
    network = stage.load_network(paths.student(run))
    bench = stage._Bench("sd2", p, f"use-{run}")
    drawn.clear()
    bench.matrix(bench.model(network, 2, 1.0))
    assert not drawn
    bench.matrix(bench.model(perturb(network), 2, 1.0))
    assert drawn
    drawn.clear()
    monkeypatch.setattr(stage.layout, "guided", guided)
    stage.use(run, p)
    query, hybrid = len(bench.prompts), p.uses.seeds * len(bench.prompts)
    assert sum(drawn) < 2 * hybrid + query + p.uses.query * p.uses.library  # all but the matrix
    assert paths.use(run).read_bytes() == whole and files[1].exists()
    assert {f.name for f in paths.resume("").glob("use-*")} == {bench.works[-1].name}


def test_a_student_deaf_to_its_noise_is_of_no_use_and_half_deaf_of_some(place):
    p, teacher, _ = place
    bench = stage._Bench("sd2", p, "test")
    library = json.loads((bench.folder / "library.json").read_text())
    its = {kind: stage.seeds.Classifier.load(bench.folder / f"{kind}.safetensors") for kind in stage.KINDS}
    model = bench.model(bench.backbone.network, 2, 1.0)
    found = {}
    for share in (0.0, 0.5, 1.0):
        heard = Heard(model, share)
        images = bench.matrix(heard)
        out = stage._images(bench, images) | {"seeds": stage._seeds(bench, images, its, its)}
        out["query"] = stage._query(bench, heard, images, library, out["quality"]["clip"])
        found[share] = out
    deaf, half, whole = found.values()
    between(*(np.mean(f["diversity"]["vendi"]) for f in (deaf, half, whole)))
    assert np.allclose(deaf["diversity"]["vendi"], 1)
    for key, ceiling in teacher["query"]["shift"].items():
        assert np.allclose(deaf["query"]["shift"][key], 0, atol=1e-4, equal_nan=True), key
        assert whole["query"]["shift"][key] == pytest.approx(ceiling, rel=1e-5, nan_ok=True), key
    brightness = [np.mean(np.abs(f["query"]["shift"]["brightness"])) for f in (deaf, half, whole)]
    between(*brightness)
    for kind in stage.KINDS:
        named = [np.mean(f["seeds"]["teacher"][kind]["top1"]) for f in (deaf, half, whole)]
        assert named[0] <= 1 / p.uses.seeds and named[0] < named[2] and named[0] <= named[1] <= named[2]


# The tables


def result(vendi=3.0, shift=1.0, ap=0.5):
    lists = {k: [0.5, 0.7, 0.6] for k in ("clip", "scene", "colour_count")}
    how = {
        h: {"ap": x, "ap_draws": [x, x + 0.1], "ap50": x, "ap50_draws": [x, x + 0.1], "iou": [0.1, 0.2],
            "centre": [10 * x, 10 * x + 1], "clip": [0.5, 0.6], "scene": [0, 1]}
        for h, x in {"free": 0.02, "shuffled": 0.4, "0.02": 0.2, "0.1": 0.99, "guided": ap}.items()
    }
    kinds = {k: {"top1": [0.5, 0.7], "top5": [0.9, 1.0]} for k in ("linear", "cnn")}
    return {
        "quality": lists, "distance": {"fid": 1.0, "fid_draws": [1.0, 1.2], "kid": 0.1, "kid_draws": [0.1, 0.2]},
        "diversity": {"vendi": [vendi] * 3, "layout_vendi": [2.0] * 3, "coverage": [0.5] * 3, "whole": [1.0] * 3},
        "seeds": {"self": kinds, "teacher": kinds, "prompts": {n: kinds["linear"] for n in ("9", "18", "36")}},
        "layout": how,
        "query": {"shift": {"area": [shift, 2 * shift]}, "rho": {"area": [0.1, 0.2, 0.3]},
                  "clip_gain": [0.1, 0.0, 0.1]},
    }


SMALL = {
    "grid.backbones": ["sana"],
    **{f"further.{b}.backbones": ["sana"] for b in schema.Further.model_fields},
    "report.bootstrap": 50,
}


@pytest.fixture
def long(monkeypatch):
    found = {"teacher": result(4.0, 2.0), "TDM": result(2.0, 0.5, 0.3), "TDM + GAD": result(3.0, 1.0, 0.4)}
    found["the world"] = {k: found["teacher"][k] for k in ("quality", "distance", "diversity")}
    monkeypatch.setattr(tables, "models", lambda p, backbone: found)
    return tables.long(params.load(**SMALL))


def at(frame, model, metric):
    row = frame[(frame["model"] == model) & (frame["metric"] == metric)]
    assert len(row) == 1
    return row.iloc[0]


def test_differences_are_gad_less_base(long):
    assert at(long["table5"], "TDM + GAD − base", "guided, AP50")["value"] == pytest.approx(0.1)
    assert at(long["table5"], "TDM + GAD − base", "guided, AP50")["low"] == pytest.approx(0.1)  # paired draws
    assert at(long["table6"], "TDM + GAD − base", "mean shift")["value"] == pytest.approx(0.75)
    assert at(long["table6"], "TDM / teacher", "mean shift")["value"] == pytest.approx(0.25)
    nearer = at(long["table6"], "TDM + GAD − base", "distance from the teacher's mean shift")
    assert nearer["value"] == pytest.approx(-0.75)
    assert at(long["figure5"], "TDM + GAD − base", "distance from the teacher's CLIP")["value"] == 0
    assert at(long["table2"], "TDM − teacher", "self, linear, top-1")["value"] == 0
    assert at(long["figure5"], "TDM + GAD − base", "distance from the teacher's Vendi")["value"] == pytest.approx(-1)
    assert "the world" not in set(long["table2"]["model"]) and "the world" in set(long["table3"]["model"])


def test_nearer_is_told_of_prompts_that_all_have_values_for():
    nan = float("nan")
    gad, base, teacher = ({"k": x} for x in ([1.0, nan, 3.0, 9.0], [2.0, 5.0, 3.0, nan], [0.0, 0.0, 1.0, 0.0]))
    found = tables._gap(gad, base, teacher, "k", 20)["distance from the teacher's k"]
    assert found[0] == pytest.approx(abs(2 - 0.5) - abs(2.5 - 0.5))
    assert tables._gap({"k": [nan]}, {"k": [1.0]}, {"k": [1.0]}, "k", 20) == {}


def test_layouts_are_counted(monkeypatch):
    sizes = {"sd2": 48, "pixart": 40, "sana": 44}
    monkeypatch.setattr(tables, "models", lambda p, b: {"teacher": {"layout": {"free": {"clip": [0.0] * sizes[b]}}}})
    assert tables.layouts(params.load()) == "40 to 48"
    sizes |= dict.fromkeys(sizes, 48)
    assert tables.layouts(params.load()) == "48"


def test_seeds_of_distillation_are_averaged():
    mean = tables.merged([result(2.0), result(4.0)])
    assert mean["diversity"]["vendi"] == pytest.approx([3.0] * 3)
    assert mean["layout"]["guided"]["ap"] == pytest.approx(0.5)


def test_intervals():
    about = tables.interval((1.0, np.linspace(0, 100, 101), 10**6), 10)  # draws that lean upward by 49
    assert about == pytest.approx((1.0, 1 - 47.5, 1 + 47.5), rel=1e-4)
    few = tables.interval((1.0, np.linspace(0, 100, 101), 12), 10)  # of few prompts they are wider, as others are
    assert few == pytest.approx((1.0, 1 - 48.924, 1 + 48.924), rel=1e-4)
    value, low, high = tables.interval([0.0, 1.0] * 50, 400)
    assert value == 0.5 and 0.35 < low < 0.5 < high < 0.65


def test_prompts_without_a_value_are_left_out_of_an_interval():
    few = [float("nan")] * 43 + [1.0, 2.0, 3.0, 4.0, 5.0]
    assert tables.interval(few, 2000) == tables.interval(few[43:], 2000) and tables.interval(few, 50)[0] == 3
    assert np.isnan(tables.interval([float("nan")] * 3, 50)).all()


def test_shares_stay_shares_and_differences_do_not(long):
    low, high = tables.interval((0.1, [0.0, 0.9], 48), 10)[1:]
    assert low < 0 and tables.interval((0.1, [0.0, 0.9], 48), 10, share=True)[1:] == (0, high)
    assert at(long["table5"], "TDM", "free, AP")["low"] == 0 and at(long["table5"], "TDM", "RMS 0.1, AP50")["high"] == 1
    for ap in ("AP", "AP50"):
        row = at(long["table5"], "TDM", f"guided − shuffled, {ap}")
        assert row[["value", "low", "high"]].tolist() == pytest.approx([-0.1] * 3)  # paired draws, below zero


def test_guidance_is_held_against_its_floors(long):
    for model, ap in {"teacher": 0.5, "TDM": 0.3, "TDM + GAD": 0.4}.items():
        for floor, its in {"free": 0.02, "shuffled": 0.4}.items():
            for metric, unit in {"AP": 1, "AP50": 1, "centre, px": 10}.items():
                row = at(long["table5"], model, f"guided − {floor}, {metric}")
                assert row[["value", "low", "high"]].tolist() == pytest.approx([unit * (ap - its)] * 3)


def test_no_multiple_of_what_may_be_nothing():
    student = {"shift, area": [1.0, 2.0], "shift, warmth": [1.0, 2.0], "shift, saturation": [-1.0, -2.0]}
    teacher = {"shift, area": [2.0, 4.0], "shift, warmth": [-1.0, 2.0], "shift, saturation": [-2.0, -4.0]}
    found = tables._retained(student, teacher, 50)
    assert set(found) == {"shift, area", "shift, saturation"}
    assert all(x == pytest.approx((0.5, 0.5, 0.5)) for x in found.values())


def test_accuracies_by_how_many_images_are_learnt_from(long):
    found = set(long["table2"]["metric"])
    assert {"216 images (9 prompts)", "432 images (18 prompts)", "864 images (36 prompts)"} <= found
    assert not any(m.startswith("of ") for m in found)


def test_every_attribute_is_explained():
    assert [*pages.ATTRIBUTES] == [*noise_query.attributes(torch.ones(1, 3, 64, 64))]


def test_pages_are_written(long, monkeypatch, tmp_path):
    monkeypatch.setattr(paths, "TABLES", tmp_path)
    monkeypatch.setattr(paths, "judge", lambda: tmp_path)
    right = {"matched": 0.9, "shuffled": 0.1, "colour": [0.9, 0.8, 0.95], "shape": [0.7, 0.6, 0.75]}
    judge = {"test": right | {"pairing": [0.5, 0.4, 0.6]}, "unseen": right | {"pairing": [0.3, 0.2, 0.4]}}
    (tmp_path / "metrics.json").write_text(json.dumps(judge))
    pages.write(params.load(**SMALL))
    written = {name: (tmp_path / f"{name}.md").read_text() for name in tables.TABLES}
    for name, text in written.items():
        first, second, *others = re.findall(r"^## (.+)$", text, re.M)
        assert "TDM + GAD" in text and "nan" not in text
        assert "The paper's" not in first and second.startswith("The paper's") and "Differences, paired" in others
        assert {"model", "value", "low", "high"} <= set(pd.read_csv(tmp_path / f"{name}.csv").columns)
    assert "Intervals rest on 12 test prompts" in written["table2"] and "| 864 images (36 prompts)" in written["table2"]
    assert "0.9 [0.8, 0.95]" in written["table3"] and "0.3 [0.2, 0.4]" in written["table3"]
    for column in ("guided − free, AP50", "guided − shuffled, centre, px", "shuffled, CLIP", "RMS 0.02, AP",
                   "RMS 0.1, AP50"):
        assert re.search(rf"^\|.* {re.escape(column)} ", written["table5"], re.M), column
    assert f"- area: {pages.ATTRIBUTES['area']}" in written["table6"] and "- warmth" not in written["table6"]


@pytest.mark.parametrize("spread", [{}, {"spread": 8.0, "spread_world": 16.0}])
def test_spread_of_teachers_is_told_without_interval(spread, monkeypatch, tmp_path):
    monkeypatch.setattr(paths, "TABLES", tmp_path)
    monkeypatch.setattr(paths, "teacher_metrics", lambda backbone: tmp_path / "teacher.json")
    made = {"quality": {"scene": [0, 1, 1, 1], "colour_count": [1, 1, 1, 1]}, **spread}
    (tmp_path / "teacher.json").write_text(json.dumps(made))
    assert teachers.write(params.load(**SMALL))["sana"]["scene"] == 0.75
    text = (tmp_path / "teachers.md").read_text()
    assert all((x in text) == bool(spread) for x in ("8 prompts", "no interval", "share"))
