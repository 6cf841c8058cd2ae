"""Table 1's measures on responses whose agreement is known, and its intervals."""

import json
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import save_file

from gad import claims, params, paths, tables
from gad.evaluation import trajectory
from gad.evaluation.geometry import bootstrap, compare, local_rows, row, spectral_kl, spectrum, tangents
from gad.params import Run
from gad.tables import chains, common, geometry, gradients, means, pages, replicas, teachers, trajectories, uses
from gad.tangents import Paths, Tangents


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_compare_has_the_ceiling_the_floor_and_what_is_between():
    teacher, other = normal(64, 4, 8, 8), normal(64, 4, 8, 8, seed=1)
    same, none = compare(teacher, teacher), compare(other, teacher)
    assert torch.allclose(same["cos"], torch.ones(64).double()) and (same["relative"] == 0).all()
    assert none["cos"].mean().abs() < 0.02 and none["relative"].mean().item() == pytest.approx(2, rel=0.05)
    # Orthogonal parts of known size: cos = a / √(a² + b²).
    other -= (other * teacher).flatten(1).sum(1).view(-1, 1, 1, 1) / teacher.square().flatten(1).sum(1).view(
        -1, 1, 1, 1) * teacher
    size = teacher.flatten(1).norm(dim=1) / other.flatten(1).norm(dim=1)
    mixed = compare(0.6 * teacher + 0.8 * size.view(-1, 1, 1, 1) * other, teacher)
    assert torch.allclose(mixed["cos"], torch.full((64,), 0.6).double(), atol=1e-5)
    assert torch.allclose(mixed["ratio"], torch.ones(64).double(), atol=1e-5)
    assert torch.allclose(mixed["relative"], torch.full((64,), 0.16 + 0.64).double(), atol=1e-5)
    half = compare(0.5 * teacher, teacher)
    assert torch.allclose(half["ratio"], torch.full((64,), 0.5).double())
    assert torch.allclose(half["mse"], 0.25 * teacher.double().square().flatten(1).mean(1))


def test_spectrum_puts_a_wave_into_its_bin():
    x = torch.arange(16) / 16
    wave = torch.cos(2 * torch.pi * 3 * x)[None, None, None, :].expand(2, 4, 16, 16)
    found = spectrum(wave)
    assert found[:, 3].tolist() == pytest.approx([1, 1]) and found.sum(1).tolist() == pytest.approx([1, 1])
    turned = spectrum(wave.transpose(-1, -2))
    assert torch.allclose(found, turned)


def test_spectral_kl_is_the_textbooks():
    p, q = np.array([[0.5, 0.25, 0.25]]), np.array([[0.25, 0.5, 0.25]])
    assert spectral_kl(q, p) == pytest.approx(0.5 * np.log(2) - 0.25 * np.log(2))
    assert spectral_kl(p, p) == 0


def test_bootstrap_resamples_prompts_whole():
    """Rows of a prompt are equal: counted one by one they would pass for ten times as many prompts."""
    rng = np.random.default_rng(0)
    values = rng.normal(size=200)
    x = np.repeat(values, 10)
    value, low, high = bootstrap(lambda i: x[i].mean(-1), np.repeat(np.arange(200), 10), 2000)
    width = 2 * 1.96 * values.std() / 200**0.5
    assert value == pytest.approx(values.mean()) and low < value < high
    assert high - low == pytest.approx(width, rel=0.1)
    with pytest.raises(ValueError, match="1 to 2 rows"):
        bootstrap(lambda i: x[i].mean(-1), np.array([0, 0, 1]), 10)


@pytest.mark.parametrize("n, least", [(6, 910), (12, 930)])
def test_intervals_of_few_prompts_hold_what_they_say(n, least):
    """A plain percentile interval of twelve holds the mean in 91 % of cases, not in 95 %; of six in 86 %."""
    rng, held = np.random.default_rng(0), {True: 0, False: 0}
    for x in rng.normal(size=(1000, n)):
        for expanded in held:
            _, low, high = bootstrap(lambda i, x=x: x[i].mean(-1), np.arange(n), 1000, expanded=expanded)
            held[expanded] += low < 0 < high
    assert held[False] < least <= held[True] <= 970


def test_centred_intervals_have_their_value_in_them():
    """Of a square, which resampling makes larger: of a mean that is zero all draws but one lie above it."""
    x = np.tile([-1.0, 1.0], 20)
    for centred in (False, True):
        value, low, high = bootstrap(lambda i: x[i].mean(-1) ** 2, np.arange(40), 2000, centred=centred)
        assert value == 0 and (low < 0 < high) == centred
        assert high == pytest.approx(1.96**2 / 40 * (1.3 if not centred else 0.8), rel=0.5)


def result(cos, scene):
    flat = np.ones_like(cos)
    spectra = np.tile([0.5, 0.5], (len(cos), 1))
    endpoint = {"cos": cos, "ratio": flat, "mse": flat, "relative": flat, "value": flat,
                "spectrum": spectra, "teacher_spectrum": spectra}
    return {"endpoint": endpoint, "quality": {"scene": scene, "colour_count": scene}}


def test_difference_is_paired_and_tighter_than_the_models_own():
    rng = np.random.default_rng(0)
    cos, scene = rng.uniform(0, 0.8, 96), rng.integers(0, 2, 96)
    base, gad = result(cos, scene), result(cos + 0.1, scene)
    found = geometry.difference([base], [gad], 500, 1)
    assert found["cos"] == pytest.approx((0.1, 0.1, 0.1)) and found["scene"] == (0, 0, 0)
    assert found["off"] == found["spectral_kl"] == (0, 0, 0)
    far = result(cos, scene)
    far["endpoint"] |= {"ratio": np.full(96, 0.5), "spectrum": np.tile([0.75, 0.25], (96, 1))}
    worse = geometry.difference([base], [far], 500, 1)
    assert worse["off"] == pytest.approx([np.log(2)] * 3)  # half the norm is as far off as twice
    assert worse["spectral_kl"] == pytest.approx([0.5 * np.log(4 / 3)] * 3)
    own = geometry.measure([base["endpoint"]], 500, 1)["cos"]
    assert own[2] - own[1] > 0.05


def test_share_is_the_ratio_on_the_same_prompts():
    rng = np.random.default_rng(0)
    teacher = result(np.zeros(200), (rng.random(200) < 0.8).astype(int))
    same = geometry.share([teacher, teacher], teacher, 500)["share"]
    assert same == (1, 1, 1)
    half = result(np.zeros(200), teacher["quality"]["scene"] * (np.arange(200) % 2))
    value, low, high = geometry.share([half], teacher, 500)["share"]
    assert low < value < high and value == pytest.approx(0.5, abs=0.05)
    assert geometry.share([result(np.zeros(10), np.ones(10))], teacher, 500) == {}  # other prompts


def test_students_that_draw_too_little_show_what_was_tried(monkeypatch, tmp_path):
    monkeypatch.setattr(paths, "REPORTS", tmp_path)
    trials = [
        ("sana", "sid", "base", "", 0.72, 0.9),
        ("sana", "sid", "base", "distill.steps=600 paradigms.sid.lr=0.0005", 0.63, 0.9),
        ("sana", "sid", "gad", "", 0.1, 0.9), ("sd2", "sid", "base", "", 0.2, 0.9),
    ]
    columns = ["backbone", "paradigm", "variant", "settings", "scene", "teacher"]
    pd.DataFrame(trials, columns=columns).to_csv(tmp_path / "tuning.csv", index=False)
    rows = [("sana", "SiD", 0.8, 0.9), ("sana", "SiD + GAD", 0.7, 0.8), ("pixart", "LADD", 0.84, 0.86),
            ("sd2", "SiD", 0.85, 0.9)]
    long = pd.DataFrame([
        {"backbone": b, "model": m, "map": "images", "metric": "share", "value": x, "low": x, "high": high}
        for b, m, x, high in rows
    ])
    text = "\n".join(geometry._short(long, params.load()))
    tried = "as it is: 0.80, steps=600 lr=0.0005: 0.70"
    assert text.count(tried) == 2 and "| pixart " in text and "| sd2 " not in text  # GAD's row has its base's
    (sid, gad, ladd) = [line for line in text.splitlines() if line.startswith(("| sana", "| pixart"))]
    assert "no " in sid and "yes" in gad and "no " in ladd and ladd.split("|")[-2].strip() == "–"
    assert geometry._short(long[long["value"] >= 0.85], params.load()) == []
    more = {("sd2", "SiD"): 0.8, ("sana", "SiD"): 0.9}  # by the table of more images
    lines = "\n".join(geometry._short(long, params.load(), more)).splitlines()
    assert [line.count(" 0.8 ") for line in lines if line.startswith("| sd2")] == [1]
    assert sum(line.startswith("| sana") for line in lines) == 2


def test_noises_of_a_prompt_are_not_prompts():
    rng = np.random.default_rng(0)
    one = result(rng.uniform(0, 1, 96), np.zeros(96))["endpoint"]
    many = {k: np.repeat(v, 4, axis=0) for k, v in one.items()}
    single, repeated = (geometry.measure([r], 1000, n)["cos"] for r, n in ((one, 1), (many, 4)))
    assert single == pytest.approx(repeated, abs=0.01)
    careless = geometry.measure([many], 1000, 1)["cos"]
    assert careless[2] - careless[1] < 0.7 * (single[2] - single[1])


def test_a_student_that_is_the_teacher_scores_the_ceiling(mini, prompts):
    backbone = mini("sana")
    z, v, cond = Tangents.inputs(backbone, prompts, (0, 1))
    found = tangents(lambda c: lambda z: backbone.path(backbone.network, z, c, 4, 1.0, backbone.times(4)[[0, -1]]),
                     z, v, cond, 2)
    t = Tangents(*found, cond)
    y, jv = tangents(lambda c: lambda z: backbone.sample(backbone.network, z, c, 4), z, v, cond, 1)
    own = row(y, jv, t.x0, t.jv)
    assert own["cos"] == pytest.approx([1, 1], abs=1e-4) and max(own["value"]) < 1e-6
    for level in local_rows(backbone, backbone.network, t, 1.0, 2).values():
        assert level["cos"] == pytest.approx([1, 1], abs=1e-4) and max(level["relative"]) < 1e-6


@torch.no_grad()
def test_the_local_map_is_held_against_the_guided_teachers(mini, prompts):
    """At the teacher's endpoint, noised again by the noise it came from; the student is not guided."""
    backbone = mini("sana")
    z, v, cond = Tangents.inputs(backbone, prompts, (0, 1))
    t = Tangents(torch.stack([z, z / 2], 1), torch.stack([v, v], 1), cond)
    rows = local_rows(backbone, backbone.network, t, 3.0, 2)
    x = backbone.add_noise(t.x0, t.z, torch.full((2,), 0.5))
    own, guided = (backbone.x0(backbone.network, x, torch.tensor(0.5), cond, cfg).flatten(1) for cfg in (1.0, 3.0))
    expected = (own - guided).square().sum(1) / guided.square().sum(1)
    assert rows["0.5"]["value"] == pytest.approx(expected.tolist(), rel=1e-3)
    same, more = (local_rows(backbone, backbone.network, t, 3.0, 2, own)["0.5"] for own in (3.0, 4.0))
    assert max(same["value"]) < 1e-6 < min(more["value"]) and same["cos"] == pytest.approx([1, 1], abs=1e-4)


@pytest.mark.parametrize("name", ["sd2", "pixart"])
def test_trajectory_of_a_diffusion_ends_before_its_first_time(mini, prompts, name):
    """ε-prediction: the last of the sampler's times is not one of the schedule's."""
    backbone = mini(name)
    z, cond, times = backbone.noise(len(prompts), 0), backbone.encode(prompts), backbone.times(4)
    itself = Paths.of(backbone, z, cond, times, 4, 1.0)
    assert max(map(max, trajectory.errors(backbone, backbone.network, itself)["relative"])) < 1e-5
    torch.testing.assert_close(itself.states[:, -1], backbone.sample(backbone.network, z, cond, 4))


def test_trajectory_of_the_teacher_itself_has_no_error_and_another_adds_its_steps_up(mini, prompts):
    """The teacher with as many steps and no guidance strays nowhere; a student's first step is its own error alone;
    one that always returns what is given to it is away by the teacher's own move."""
    backbone = mini("sana")
    z, cond, times = backbone.noise(len(prompts), 0), backbone.encode(prompts), backbone.times(4)
    itself, guide = Paths.of(backbone, z, cond, times, 4, 1.0, 1), Paths.of(backbone, z, cond, times, 20, 3.0)
    same = trajectory.errors(backbone, backbone.network, itself, 1)
    assert max(map(max, same["relative"])) < 1e-6 and np.shape(same["rmse"]) == (len(prompts), 4)
    guided = trajectory.errors(backbone, backbone.network, guide)
    assert [r[0] for r in guided["relative"]] == pytest.approx([r[0] for r in guided["local"]])
    assert min(map(min, guided["local"])) > 0

    class Still:
        """A flow that does not move."""
        dtype, config = backbone.network.dtype, backbone.network.config

        def __call__(self, x, **kwargs):
            return (torch.zeros_like(x),)

    still = trajectory.errors(backbone, Still(), guide)
    end = backbone.sample(backbone.network, z, cond, 20, 3.0)
    away = ((z - end).flatten(1).norm(dim=1) / end.flatten(1).norm(dim=1)).tolist()
    assert [r[-1] for r in still["relative"]] == pytest.approx(away, rel=1e-3)
    before, after = guide.states[:, :-1].flatten(2), guide.states[:, 1:].flatten(2)
    moves = (before - after).norm(dim=2) / after.norm(dim=2)  # what the teacher does in each step, it leaves out
    assert np.array(still["local"]) == pytest.approx(moves.numpy(), rel=1e-3)


def test_paths_come_back_from_disk_to_the_bit(mini, prompts, tmp_path):
    backbone = mini("sana")
    cond, file = backbone.encode(prompts), tmp_path / "unseen.safetensors"
    made = Paths.of(backbone, backbone.noise(len(prompts), 5), cond, backbone.times(4), 8, 2.0)
    made.save(file, prompts, 5)
    found = Paths.load(file, backbone)
    assert torch.equal(found.states, made.states) and torch.equal(found.cond.embeds, cond.embeds)
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(ValueError, match="run the diagnose stage again"):
        Paths.load(file, backbone)


def test_table4_is_against_the_base_and_its_parts_add_up(monkeypatch, tmp_path):
    rng = np.random.default_rng(0)
    base = rng.uniform(0.5, 1, (50, 2))
    errors = {
        "base": (base, base * [1, 0.5]), "gad": (0.9 * base, base * [0.9, 0.3]),
        "slower": (0.8 * base, 0.8 * base), "slower_gad": (0.6 * base, 0.6 * base),
    }
    monkeypatch.setattr(trajectories, "models", lambda p, b: {
        ("tdm", v): [{"trajectory": {"relative": x.tolist(), "rmse": x.tolist(), "local": own.tolist()}}]
        for v, (x, own) in errors.items()
    })
    monkeypatch.setattr(paths, "TABLES", tmp_path)
    monkeypatch.setattr(trajectories, "distinct", lambda p, name: "7")
    p = SimpleNamespace(report=SimpleNamespace(bootstrap=200), grid=SimpleNamespace(backbones=["sana"]),
                        backbones={"sana": SimpleNamespace(world="mini")},
                        evaluation=SimpleNamespace(trajectory_prompts=50), base_of=params.load().base_of)
    long = trajectories.write(p)
    assert dict(zip(long["step"], long["t"], strict=True)) == {1: 0.5, 2: 0}
    change = long[long["metric"] == "change"]
    assert {m: part["value"].tolist() for m, part in change.groupby("model")} == {
        "TDM + GAD": pytest.approx([-0.1, -0.1]), "TDM, half the rate": pytest.approx([-0.2, -0.2]),
        "TDM + GAD, half the rate": pytest.approx([-0.25, -0.25]),  # of what the same rate gives without
    }
    assert change["low"].to_numpy() == pytest.approx(change["value"].to_numpy())

    def at(model, metric):
        return long[(long["model"] == model) & (long["metric"] == metric)][["value", "low", "high"]].to_numpy()

    assert at("TDM", "inherited")[:, 0] == pytest.approx([0, 0.5 * base[:, 1].mean()])
    less = {m: at("TDM + GAD − base", m) for m in trajectories.PARTS}
    assert less["local"][:, 0] == pytest.approx(-base.mean(0) * [0.1, 0.2])
    assert less["inherited"][:, 0] == pytest.approx(base.mean(0) * [0, 0.1])
    assert less["relative"][:, 0] == pytest.approx(less["local"][:, 0] + less["inherited"][:, 0])
    own = at("TDM + GAD", "local")  # pairs are tighter than either
    assert (np.ptp(less["local"][:, 1:], axis=1) < np.ptp(own[:, 1:], axis=1)).all()
    text = (tmp_path / "table4.md").read_text()
    named = "TDM + GAD, half the rate − (TDM, half the rate)"
    assert at(named, "relative")[:, 0] == pytest.approx(-0.2 * base.mean(0)) and named in text
    assert text.count("## ") == 6 and text.index("t = 0.5") < text.index("t = 0 ")
    assert text.index("t = 0 ") < text.index(trajectories.PAPER) < text.index("change by what was added")


PHOTOGRAPHS = {"backbones.sd2.world": "coco", "backbones.sd2.path": "somewhere"}
ALL_PHOTOGRAPHS = {k.replace("sd2", b): v for b in ("sd2", "pixart", "sana") for k, v in PHOTOGRAPHS.items()}


def test_different_prompts_are_counted(monkeypatch, tmp_path):
    monkeypatch.setattr(paths, "DATA", tmp_path)
    told = {"prompts": ["a", "b", "a"]}
    for name, meta in (("sd2", {"made": json.dumps(told)}), ("sana", {k: json.dumps(v) for k, v in told.items()})):
        paths.diagnosis(name).mkdir(parents=True)
        save_file({"x": torch.zeros(1)}, paths.diagnosis(name) / "test.safetensors", meta)
    drawn = {"sd2": SimpleNamespace(world="mini"), "sana": SimpleNamespace(world="mini")}
    drawn["pixart"] = SimpleNamespace(world="coco")  # whose captions are all different
    assert common.distinct(SimpleNamespace(grid=SimpleNamespace(backbones=[*drawn]), backbones=drawn), "test") == "2"


@pytest.mark.parametrize("given, said", [
    ({}, ("(as the world draws them: 7 different ones)", "(the miniature world has few: 7 different ones)")),
    (PHOTOGRAPHS, ("(as the miniature world draws them: 7 different ones)", "has few: 7 different ones)")),
    (ALL_PHOTOGRAPHS, ()),
])
def test_prompts_that_recur_are_the_miniature_worlds(given, said, monkeypatch, tmp_path):
    """Test and unseen captions of photographs are all different."""
    monkeypatch.setattr(paths, "TABLES", tmp_path)
    rows = [("sana", "TDM", where, "scene" if where == "images" else "cos", 1.0, 0.9, 1.1)
            for where in ("endpoint", "local t=0.5", "difference", "images")]
    keys = ["value", "low", "high"]
    table1 = pd.DataFrame(rows, columns=["backbone", "model", "map", "metric", *keys])
    table4 = pd.DataFrame([("sana", "TDM", 1, 0.0, "relative", 1.0, 0.9, 1.1)],
                          columns=["backbone", "model", "step", "t", "metric", *keys])
    monkeypatch.setattr(geometry, "table1", lambda p: table1)
    monkeypatch.setattr(trajectories, "table4", lambda p: table4)
    for module in (geometry, trajectories):
        monkeypatch.setattr(module, "distinct", lambda p, name: "7")
    for module in (geometry, trajectories):
        module.write(params.load(**given))
    texts = [(tmp_path / f"{name}.md").read_text() for name in ("table1", "table4")]
    assert [text.count("different ones") for text in texts] == [len(said) // 2] * 2
    assert all(x in text for x, text in zip(said, texts, strict=False))


def test_teachers_are_told_by_what_judged_them_and_on_how_many_prompts(monkeypatch, tmp_path):
    monkeypatch.setattr(paths, "TABLES", tmp_path)
    monkeypatch.setattr(paths, "teacher_metrics", lambda backbone: tmp_path / f"{backbone}.json")
    photographs, scenes = {"pickscore": [20.0, 21.0], "openclip": [0.2, 0.3]}, {"scene": [0, 1], "colour_count": [1, 1]}
    spread = {"spread": 8.0, "spread_world": 16.0}
    for backbone, made in (("sd2", {"quality": photographs}), ("pixart", {"quality": scenes, **spread}),
                           ("sana", {"quality": scenes, **spread})):
        (tmp_path / f"{backbone}.json").write_text(json.dumps(made))
    teachers.write(params.load(**PHOTOGRAPHS, **{"backbones.sana.pretrain": {"prompts": 4}}))
    text = (tmp_path / "teachers.md").read_text()
    assert "On 4 or 256 test prompts, by the detector or PickScore and CLIP, with" in text
    assert "over 4 or 8 prompts" in text and "nan" not in text
    for backbone in ("pixart", "sana"):
        (tmp_path / f"{backbone}.json").write_text(json.dumps({"quality": photographs}))
    teachers.write(params.load(**ALL_PHOTOGRAPHS))
    assert "On 256 test prompts, by PickScore and CLIP, with" in (tmp_path / "teachers.md").read_text()


STEPS = pd.DataFrame([  # the students of one backbone take two, of the other four
    (backbone, model, step, metric, value, value - 0.01, value + 0.01)
    for backbone, steps in (("sd2", 2), ("sana", 4)) for step in range(1, steps + 1)
    for model, metric, value in (("TDM + GAD", "change", -step / 10), ("TDM", "relative", step / 10))
], columns=["backbone", "model", "step", "metric", "value", "low", "high"])


def test_each_backbones_trajectories_have_their_own_end():
    empty = pd.DataFrame(columns=[*STEPS.columns, "map", "seed"])
    runs = [Run(b, "tdm", v, 0) for b in ("sd2", "sana") for v in ("base", "gad")]
    p = SimpleNamespace(runs=lambda: runs, report=params.load().report)
    found = claims.judge(p, {c.table: empty for c in claims.CLAIMS} | {"table4": STEPS})
    assert [(*row,) for row in found[["backbone", "student", "difference"]].to_numpy()] == [
        ("sd2", "TDM + GAD", -0.2), ("sana", "TDM + GAD", -0.4),
        *((b, f"TDM + GAD, step {k}", -k / 10) for b, steps in (("sd2", 2), ("sana", 4)) for k in range(1, steps)),
    ]


def test_metrics_have_the_end_of_each_backbones_trajectories(monkeypatch, tmp_path):
    monkeypatch.setattr(paths, "METRICS", tmp_path / "metrics.json")
    rows = pd.DataFrame(columns=[*STEPS.columns, "map"])
    shares = [("sd2", "TDM", uses.SHARE, 0.8), ("sd2", "TDM", uses.RIGHT, 0.7)]
    table3 = pd.DataFrame(shares, columns=["backbone", "model", "metric", "value"])
    given = []
    for module, made in (
        (geometry, rows), (teachers, {}), (pages, {"table3": table3}), (trajectories, STEPS), (chains, rows),
        (replicas, rows), (means, rows), (gradients, rows),
    ):
        monkeypatch.setattr(module, "write", lambda p, *more, made=made: given.extend(more) or made)
    tables.write(None)
    assert given == [{("sd2", "TDM"): 0.8}]  # by which Table 1 too sees who draws too little
    found = json.loads(paths.METRICS.read_text())["students"]
    assert {b: (own["TDM"], own["TDM + GAD"]) for b, own in found.items()} == {
        "sd2": ({"trajectory_error": 0.2, "scene_table3": 0.7}, {"trajectory_change": -0.2}),
        "sana": ({"trajectory_error": 0.4}, {"trajectory_change": -0.4}),
    }


@pytest.mark.parametrize(
    "low, high, sign, margin, said",
    [
        (0.1, 0.2, 1, 0, "reproduced"), (-0.1, 0.2, 1, 0, "undecided"), (-0.2, -0.1, 1, 0, "not reproduced"),
        (-0.2, -0.1, -1, 0, "reproduced"), (0.1, 0.2, -1, 0, "not reproduced"),
        (-0.04, 0.01, 1, 0.05, "reproduced"), (-0.09, 0.01, 1, 0.05, "undecided"),
        (-0.09, -0.06, 1, 0.05, "not reproduced"), (1e-17, 0.1, 1, 0, "undecided"), (1e-17, 0.1, -1, 0, "undecided"),
        (-0.04, 0.01, 0, 0.05, "reproduced"), (-0.04, 0.1, 0, 0.05, "undecided"),
        (0.06, 0.1, 0, 0.05, "not reproduced"), (-0.2, -0.06, 0, 0.05, "not reproduced"),
        (-0.2, 0.2, 0, 0.05, "undecided"),
    ],
)
def test_verdicts(low, high, sign, margin, said):
    assert claims.verdict(low, high, sign, margin) == said


@pytest.mark.parametrize(
    "verdicts, said",
    [
        ("rrr", "reproduced"), ("rru", "reproduced"), ("ruu", "undecided"), ("ru", "undecided"), ("rrrrn", "mixed"),
        ("nnu", "not reproduced"), ("nuu", "undecided"), ("uuu", "undecided"), ("r", "reproduced"),
    ],
)
def test_verdict_on_a_claim_as_a_whole(verdicts, said):
    names = {"r": "reproduced", "u": "undecided", "n": "not reproduced"}
    assert claims.whole([names[v] for v in verdicts], 0.5) == said
    assert (claims.whole([names[v] for v in verdicts], 0.5, every=True) == "reproduced") == (set(verdicts) == {"r"})


def test_claims_are_judged_by_the_grids_own_rows():
    keys = ["backbone", "model", "map", "metric", "value", "low", "high"]
    table1 = pd.DataFrame([
        ("sana", "TDM + GAD − base", "difference", "cos", 0.1, 0.05, 0.15),
        ("sana", "TDM + RKD − base", "difference", "cos", 0.2, 0.15, 0.25),
        ("sana", "TDM + GAD", "endpoint", "cos", 0.5, 0.4, 0.6),
        ("sana", "TDM + GAD", "endpoint", "relative", 0.3, 0.2, 0.4),
        ("sana", "TDM", "endpoint", "ratio", 1.2, 1.1, 1.3),
        ("sana", "TDM", "endpoint", "value", 0.05, 0.02, 0.08), ("sana", "TDM", "endpoint", "relative", 1.0, 0.05, 1.5),
        ("sana", "TDM + GAD − (TDM + unrelated tangents)", "difference", "cos", 0.01, -0.02, 0.04),
        ("sana", "TDM + GAD − (TDM + RKD)", "difference", "cos", 0.1, 0.05, 0.15),
        ("sana", "TDM + GAD, half the rate − (TDM, half the rate)", "difference", "cos", -0.1, -0.2, -0.05),
    ], columns=keys)
    table4 = pd.DataFrame([
        ("sana", "TDM + GAD", 1, "change", 0.1, 0.05, 0.15), ("sana", "TDM + GAD", 2, "change", -0.1, -0.2, -0.05),
        ("sana", "TDM + GAD, half the rate", 2, "change", -0.3, -0.4, 0.1),
    ], columns=["backbone", "model", "step", "metric", "value", "low", "high"])
    table3, table6 = (pd.DataFrame(rows, columns=["backbone", "model", "metric", "value", "low", "high"]) for rows in (
        [("sana", "TDM + GAD − base", "scene accuracy", -0.1, -0.13, -0.06), ("sana", "TDM", "CLIP", 1, 1, 1),
         ("sana", "TDM + GAD − base", "PickScore", -0.1, -0.15, -0.05)],
        [("sana", "TDM", "mean shift", 0.5, 0.4, 0.6), ("sana", "TDM / teacher", "mean shift", 2, 1.5, 2.5)],
    ))
    table2 = pd.DataFrame(
        [("sana", "TDM + GAD − base", "self, CNN, top-1", -0.01, -0.02, 0.01)], columns=table3.columns
    )
    again = pd.DataFrame([("sana", "TDM + GAD − base", "0", "cos", 0.1, 0.05, 0.15),
                          ("sana", "TDM + GAD − base", "all", "cos", 0.05, -0.01, 0.1)],
                         columns=["backbone", "model", "seed", "metric", "value", "low", "high"])
    runs = [Run("sana", "tdm", v, 0) for v in ("base", "gad", "rkd", "unrelated", "slower", "slower_gad")]
    p = SimpleNamespace(runs=lambda: runs, report=SimpleNamespace(
        loss=0.05, clip=0.02, pickscore=0.2, match=0.1, shift=0.1))
    others = {claim.table: table4 for claim in claims.CLAIMS}
    found = claims.judge(p, others | {"table1": table1, "table2": table2, "table3": table3, "table4": table4,
                                      "table5": table3, "table6": table6, "figure5": table3, "replicas": again})
    assert [(*row,) for row in found[["difference", "student", "verdict"]].to_numpy()] == [
        (1.2, "TDM", "not reproduced"),  # it responds by more than its teacher
        (0.05, "TDM", "reproduced"),  # values match, below 0.1
        (1.0, "TDM", "undecided"),  # tangents do not, above it
        (0.3, "TDM + GAD", "not reproduced"),  # nor with GAD
        (0.1, "TDM + GAD", "reproduced"),
        (-0.01, "TDM + GAD, self, CNN, top-1", "undecided"),
        (-0.1, "TDM + GAD", "not reproduced"),  # of Table 3's scenes
        (-0.1, "TDM + GAD", "reproduced"),  # no less of its PickScore than counts
        (-0.1, "TDM + GAD", "reproduced"),  # at the trajectory's end
        (0.1, "TDM + GAD, step 1", "not reproduced"),
        (0.5, "TDM", "not reproduced"),  # that without GAD there is no shift
        (0.01, "TDM + GAD − (TDM + unrelated tangents)", "undecided"),
        (0.1, "TDM + GAD − (TDM + RKD)", "reproduced"),
        (0.05, "TDM + GAD", "undecided"),  # of all trainings
        (-0.1, "TDM + GAD, half the rate − (TDM, half the rate)", "not reproduced"),
        (-0.3, "TDM + GAD, half the rate − (TDM, half the rate)", "undecided"),
    ]


def test_what_rounding_left_of_zero_is_zero():
    assert tables.cell(1.67e-07, -0.0243, 0.0208) == "0 [-0.0243, 0.0208]"
    assert tables.cell(-0.02, -0.05, -2.1e-08, "+.3g") == "-0.02 [-0.05, +0]"
    assert tables.cell(2e-05, 1e-06, 4e-05) == "2e-05 [1e-06, 4e-05]"  # beside its own interval it is something
