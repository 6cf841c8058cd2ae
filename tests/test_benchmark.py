"""The paper's networks at their published sizes, what a step costs, and the plan that follows."""

import importlib
import json

import pytest
import torch

from gad import architectures, distill, paths
from gad.backbones import MINIATURES
from gad.paradigms.tdm import TDM
from gad.params import load
from gad.stages.benchmark import SCHEDULES, Schedule, benchmark, page, plan

stage = importlib.import_module("gad.stages.benchmark")  # the package has the function by that name

PUBLISHED = {  # millions of parameters: of the fp32 files on the hub, 4 bytes each; SANA's as its paper says
    "sd2": (3460 / 4, 335 / 4), "pixart": (2450 / 4, 335 / 4), "sana": (590, 1250 / 4), "sana-1.6b": (1604, 1250 / 4),
}


@pytest.mark.parametrize("name", architectures.FULL)
def test_full_size_has_the_published_parameters_and_shapes(name):
    model = architectures.build(name, "meta")
    sizes = [sum(x.numel() for x in m.parameters()) / 1e6 for m in (model.network, model.pipeline.vae)]
    assert sizes == pytest.approx(PUBLISHED[name], rel=0.02)
    # A 512-px image: latents go in and out of the network, at both ends of guidance, and decode to it.
    z, cond = torch.randn(2, *model.latent_shape, device="meta"), model.encode(["a dog", "a cat"])
    out = model.output(model.network, z, torch.ones(2, device="meta"), cond, 2.0)
    assert out.shape == z.shape
    assert model.pipeline.vae.decode(z).sample.shape == (2, 3, 512, 512)


def test_full_size_noise_levels_are_the_published_schedules():
    last = {
        name: architectures.build(name, "meta").levels.alpha_sigma(torch.ones(1, dtype=torch.float64))[0].item()
        for name in ("sd2", "pixart", "sana")
    }
    # √ᾱ at the last of 1000 steps (Lin et al. 2024, Table 1: Stable Diffusion's and the linear schedule's).
    assert last == pytest.approx({"sd2": 0.068265, "pixart": 0.006353, "sana": 0}, abs=1e-6)


@pytest.fixture
def p(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "REPORTS", tmp_path)
    return load(**{"backbones.pixart.teacher_steps": 4, "distill.precision": "no"})


def test_miniatures_are_timed_and_planned(p, tmp_path, capsys):
    report = benchmark(p, ("pixart",), ("ladd", "tdm"), blocks=2, batch=2, checkpointing=True, miniature=True, gpus=4)
    assert json.loads((tmp_path / "benchmark.json").read_text()) == report
    assert {"device", "torch", "precision", "compile", "rows", "plan"} <= report.keys()
    assert [r["paradigm"] for r in report["rows"]] == ["ladd", "tdm"]
    for row in report["rows"]:
        assert row["pairs"] == 1 and 1.4e6 < row["parameters"] < 1.6e6 and row["note"] == ""  # in proportion: 8 of 16
        assert row["ratio_low"] <= row["ratio"] <= row["ratio_high"]
        for k in ("base", "gad"):
            assert row[f"images_{k}"] * row[f"seconds_{k}"] == pytest.approx(2)
            assert row[f"memory_{k}"] > 100
    assert all(report["targets"][0][k] > 0 for k in ("sample", "tangents"))
    cells = {(c["backbone"], c["paradigm"], c["variant"]): c for c in report["plan"][:-1]}
    assert len(cells) == 18 and sum(c["hours"] is not None for c in cells.values()) == 4
    cell, row = cells["pixart", "tdm", "gad"], report["rows"][1]
    assert (cell["steps"], cell["batch"]) == (p.distill.steps, p.distill.batch)  # a miniature's schedule is its own
    assert cell["hours"] * 3600 == pytest.approx(p.distill.steps * row["seconds_gad"] * p.distill.batch / 2 / 4)
    assert cell["measured"].startswith("miniature") and cells["sd2", "sid", "base"]["measured"] == "no"
    printed = capsys.readouterr().out
    assert printed.strip() == page(report).strip() and "Nothing was measured at full size" in printed
    assert printed.count("| pixart ") == 2 + 1 + 6


def test_what_does_not_fit_has_a_row_and_the_run_goes_on(p, monkeypatch):
    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(TDM, "losses", full)
    monkeypatch.setattr(distill, "gad_loss", full)
    monkeypatch.setattr(stage, "_targets", lambda *args: {"sample": None, "tangents": None})
    report = benchmark(p, ("pixart",), ("tdm", "ladd"), blocks=2, batch=2, miniature=True)
    tdm, ladd = report["rows"]
    assert tdm["note"] == "out of memory: base, gad" and tdm["seconds_base"] is None is tdm["ratio"]
    assert ladd["note"] == "out of memory: gad" and ladd["seconds_base"] > 0 and ladd["seconds_gad"] is None
    cells = {(c["paradigm"], c["variant"]): c for c in report["plan"] if c["backbone"] == "pixart"}
    assert cells["ladd", "base"]["hours"] > 0 and cells["ladd", "gad"]["measured"] == "no: out of memory"
    assert report["plan"][-1]["measured"] == "1 of 18 students"

    monkeypatch.setattr(stage, "_miniature", full)  # not even the weights
    (row,) = benchmark(p, ("pixart",), ("ladd",), blocks=2, batch=2, miniature=True)["rows"]
    assert row["note"] == "out of memory" and row["parameters"] is None
    assert report["plan"][-1]["backbone"] == "all"


def test_plan_is_steps_times_batch_over_images_a_second():
    schedules = SCHEDULES | {"ladd": Schedule(1000, 360, "by hand")}
    row = {"backbone": "sd2", "paradigm": "ladd", "images_base": 50.0, "images_gad": 40.0, "memory_base": 7.0,
           "memory_gad": 9.0}
    cells = plan([row], schedules, 4, "by hand")
    base, gad = cells[:2]
    assert (base["device_hours"], base["hours"], base["memory"]) == (2.0, 0.5, 7.0)  # 360,000 images, 50 a second
    assert (gad["device_hours"], gad["hours"], gad["memory"]) == (2.5, 0.625, 9.0)
    assert cells[2]["hours"] is None and cells[2]["measured"] == "no"
    assert cells[-1] | {"device_hours": 4.5, "hours": 1.125, "memory": 9.0, "measured": "2 of 18 students"} == cells[-1]
    # The published schedules, in images: 100 k × 384, 10,001 × 32 and 10 M.
    images = {k: s.steps * s.batch for k, s in SCHEDULES.items()}
    assert images == {"ladd": 38_400_000, "tdm": 320_032, "sid": pytest.approx(10e6, rel=1e-4)}


@pytest.mark.parametrize("options, message", [
    ({"backbones": ("sd3",)}, "'sd3' has no miniature networks"),
    ({"backbones": ("sana-1.6b",)}, f"there are {', '.join(MINIATURES)}"),
    ({"paradigms": ("lcm",)}, "'lcm' is not in params.yaml"),
    ({"precision": "fp16"}, "use 'no' .fp32. or 'bf16'"),
    ({"blocks": 1}, "blocks=1 is too few"),
    ({"batch": 0}, "batch=0 is too few"),
    ({"gpus": 0}, "gpus=0 is too few"),
])
def test_bad_input_is_one_line(p, options, message):
    with pytest.raises(ValueError, match=message) as error:
        benchmark(p, **{"miniature": True} | options)
    assert "\n" not in str(error.value)


def test_full_size_needs_a_gpu_and_gad_a_weight(p, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="miniature=False needs a GPU"):
        benchmark(p, miniature=False)
    with pytest.raises(ValueError, match="lam=0 leaves no GAD to time"):
        benchmark(load(**{"gad.lam": 0}), miniature=True)
