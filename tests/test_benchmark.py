"""The paper's networks at their published sizes, what a step costs, and the plan that follows."""

import importlib
import json
import types

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor

from gad import architectures, distill, paths
from gad.backbones import MINIATURES
from gad.paradigms.tdm import TDM
from gad.params import load
from gad.stages.benchmark import benchmark
from gad.stages.counting import Memory, Operations, count
from gad.stages.planning import SCHEDULES, Schedule, page, plan
from gad.stages.shapes import norms_as_on_gpus

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


@pytest.mark.slow
def test_miniatures_are_timed_and_planned(p, tmp_path, capsys):
    report = benchmark(p, ("pixart",), ("ladd", "tdm"), blocks=2, batch=2, checkpointing=True, miniature=True, gpus=4)
    assert json.loads((tmp_path / "benchmark.json").read_text()) == report
    assert {"device", "torch", "against", "compile", "parts", "rows", "plan"} <= report.keys()
    assert [r["paradigm"] for r in report["rows"]] == ["ladd", "tdm"]
    for row in report["rows"]:
        assert row["pairs"] == 1 and 1.4e6 < row["parameters"] < 1.6e6 and row["note"] == ""  # in proportion: 8 of 16
        assert row["ratio_low"] <= row["ratio"] <= row["ratio_high"]
        for k in ("base", "gad"):
            assert row[f"images_{k}"] * row[f"seconds_{k}"] == pytest.approx(2)
            assert row[f"memory_{k}"] > 100
    (its,) = report["targets"]
    seconds = its["samples"] * its["sample"] + its["paths"] * its["tangents"]
    assert its["device_hours"] * 3600 == pytest.approx(seconds) and min(its["sample"], its["tangents"]) > 0
    cells = {(c["backbone"], c["paradigm"], c["variant"]): c for c in report["plan"][:-1]}
    assert len(cells) == 4 and all(c["hours"] for c in cells.values())
    cell, row = cells["pixart", "tdm", "gad"], report["rows"][1]
    assert (cell["steps"], cell["batch"]) == (p.distill.steps, p.distill.batch)  # a miniature's schedule is its own
    assert cell["hours"] * 3600 == pytest.approx(p.distill.steps * row["seconds_gad"] * p.distill.batch / 2 / 4)
    assert cell["measured"].startswith("miniature")
    printed = capsys.readouterr().out
    assert printed.strip() == page(report).strip() and "Nothing was measured at full size" in printed
    assert printed.count("| pixart ") == 2 + 1 + 4


@pytest.mark.slow
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
    assert report["plan"][-1]["measured"] == "1 of 4 students"

    monkeypatch.setattr(stage, "_miniature", full)  # not even the weights
    (row,) = benchmark(p, ("pixart",), ("ladd",), blocks=2, batch=2, miniature=True)["rows"]
    assert row["note"] == "out of memory" and row["parameters"] is None
    assert report["plan"][-1]["backbone"] == "all"


class Small(torch.nn.Module):
    """A full-size network's stand-in with a known number of operations: two products at each of its places."""

    config = types.SimpleNamespace(sample_size=8, in_channels=4)

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.Tanh(), torch.nn.Linear(16, 4))

    @property
    def device(self):
        return self.layers[0].weight.device


@pytest.fixture
def small(monkeypatch):
    """SANA's full size in architectures.FULL, as a network of two products."""
    class Plain(architectures.BACKBONES["sana"]):
        def raw(self, network, x_t, timestep, cond):
            assert all(isinstance(torch.func.debug_unwrap(x), FakeTensor) for x in (x_t, cond.embeds, timestep))
            return network.layers(x_t.flatten(2).mT).mT.reshape(x_t.shape)

        def encode_text(self, prompts):
            embeds = torch.randn(len(prompts), 3, 5, device=self.device)
            return embeds, torch.ones(embeds.shape[:2], dtype=torch.long, device=self.device)

    def build(name, device):
        with torch.device(device):
            parts = {Plain.part: Small(), "vae": torch.nn.Identity(), "text_encoder": torch.nn.Identity()}
        return Plain(architectures._Parts(**parts, scheduler=architectures.FULL["sana"].scheduler()), name)

    monkeypatch.setattr(architectures, "build", build)


def test_operations_are_counted_by_hand(small, p):
    """TCD: of each image two of the teacher's calls, guided, one of the student without gradient and one with. GAD: two
    of the student with gradient for each pair. A call is 2 × 64 × (4 × 16 + 16 × 4) operations; backward to the weights
    as many, and to the first product's output half."""
    found = count("sana", "tcd", {"gad": p.gad}, p, images := 4, 3)
    call = 2 * 64 * 128
    trained = call * 2.5
    assert found.base == 3 * call + trained
    assert found.terms == {"gad": p.gad.pairs / images * 2 * trained}
    weights = 4 * 16 + 16 + 16 * 4 + 4
    data = 4 * 64 * 2 * (5 * p.endpoints.pairs + p.endpoints.samples)  # states and responses; noises and endpoints
    assert found.parameters == weights and found.held == 4 * weights * (1 + 1 + 3 + 1) + 4 * data  # teacher; student
    assert found.held < found.memory[None] < found.memory["gad"]


def test_attention_is_counted_as_a_gpu_does_it():
    """Two products forward; backward the first once more, and two for each of them."""
    q = torch.randn(2, 3, 64, 16, requires_grad=True)
    product = 2 * 2 * 3 * 64 * 64 * 16
    with Operations() as forward:
        out = torch.nn.functional.scaled_dot_product_attention(q, q, q)
    with Operations() as backward:
        out.sum().backward()
    assert (forward.total, backward.total) == (2 * product, 5 * product)


def test_norms_are_in_fp32_as_on_gpus():
    layers, x = (torch.nn.LayerNorm(8), torch.nn.GroupNorm(2, 8)), torch.randn(4, 8, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        with norms_as_on_gpus():
            assert all(layer(x).dtype == torch.float32 for layer in layers)
        assert all(layer(x).dtype == torch.bfloat16 for layer in layers)
    with norms_as_on_gpus():
        assert all(layer.bfloat16()(x).dtype == torch.bfloat16 for layer in layers)


def test_memory_is_that_of_what_lives():
    x = torch.zeros(1000)
    with Memory() as memory:
        y = (x.view(10, 100) + 1).T  # a view of what was there is nothing, nor one of what was made
        assert memory.now == memory.peak == 4000
        z = y.double()
        assert memory.now == memory.peak == 12000
        del y
        assert memory.now == 8000
        z.add_(1)
        del z
    assert memory.now == 0 and memory.peak == 12000


def test_memory_of_a_step_has_what_its_graph_keeps():
    """Of two layers: what the tanh returns, and the gradients of the weights; the input was there."""
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Tanh(), torch.nn.Linear(64, 1))
    x = torch.zeros(256, 64)
    with Memory() as memory:
        y = model(x)
        assert memory.now == 4 * (256 * 64 + 256)
        y.sum().backward()
        del y
    assert memory.now == 4 * sum(w.numel() for w in model.parameters())


@pytest.mark.slow
def test_activations_made_anew_take_less_memory_and_more_operations():
    def of(checkpointing):
        settings = {"gad.scheme": "exact", "hardware.checkpointing": checkpointing}
        p = load(paths.ROOT / "params.paper.yaml", **settings)
        return count("sana", "tcd", {"gad": p.gad}, p, 32, 1, "bf16")

    kept, anew = of(False), of(True)
    assert kept.held == anew.held and anew.memory[None] < kept.memory[None]
    assert (anew.memory["gad"] - anew.held) < (kept.memory["gad"] - kept.held) / 2
    assert kept.base < anew.base and kept.terms["gad"] < anew.terms["gad"]


@pytest.mark.parametrize("paradigm", ["tdm", "sid", "dmd"])
def test_operations_of_gad_are_in_proportion_to_its_pairs(small, p, paradigm):
    terms = {n: p.gad.model_copy(update={"pairs": n}) for n in (4, 8)}
    terms["exact"] = terms[4].model_copy(update={"scheme": "exact"})
    found = count("sana", paradigm, terms, p, 4, 1)
    assert 0 < found.terms[4] == found.terms[8] / 2 and found.terms["exact"] > 0
    assert found.memory[None] <= found.memory[4] <= found.memory[8]
    assert count("sana", paradigm, {4: terms[4]}, p, 4, 1).base == found.base


def test_without_a_gpu_full_size_is_counted_and_planned(small, p, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    report = benchmark(p, ("sana",), ("tdm", "sid"), precision="bf16", gpus=2, tflops=(100.0, 10.0))
    assert json.loads((tmp_path / "benchmark.json").read_text()) == report and report["device"] is None
    row = report["rows"][0]
    assert row["seconds_base"] is None and row["operations_gad"] > 0 and row["held"] > 0
    cells = {(c["paradigm"], c["variant"]): c for c in report["plan"] if c["backbone"] == "sana"}
    images = SCHEDULES["tdm"].steps * SCHEDULES["tdm"].batch
    base, gad = cells["tdm", "base"], cells["tdm", "gad"]
    assert base["device_hours"] * 3600 == pytest.approx(images * row["operations_base"] / 100e12)
    assert base["hours"] == base["device_hours"] / 2
    assert (gad["device_hours"] - base["device_hours"]) * 3600 == pytest.approx(images * row["operations_gad"] / 10e12)
    assert gad["exaflop"] == pytest.approx(images * (row["operations_base"] + row["operations_gad"]) / 1e18)
    exact = plan(report["rows"], SCHEDULES, 2, "by hand", (100.0, 10.0), exact=True)
    again = benchmark(load(**{"gad.scheme": "exact"}), ("sana",), ("tdm",), precision="bf16", tflops=(100.0, 10.0))
    assert again["rows"][0]["operations_gad"] == row["operations_exact"]
    gad, alike = (next(c for c in x if c["variant"] == "gad" and c["backbone"] == "sana" and c["paradigm"] == "tdm")
                  for x in (again["plan"], exact))
    assert gad["device_hours"] / gad["exaflop"] == pytest.approx(alike["device_hours"] / alike["exaflop"])
    capsys.readouterr()
    report = benchmark(p, ("sana",), ("tdm", "sid"), precision="bf16", gpus=2, tflops=(100.0, 10.0))
    printed = capsys.readouterr().out
    assert printed.strip() == page(report).strip()
    assert (tmp_path / "benchmark.md").read_text() == page(report)
    assert "**Nothing was timed**" in printed and "| bf16 " in printed and "images/s" not in printed


def test_the_teachers_own_is_counted_by_hand(small, p, monkeypatch):
    """A sample is of guided calls, of two rows each. A tangent's is of each product once more, or twice: torch also
    multiplies by the zeros that are the weights' own tangents."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    its, call = benchmark(p, ("sana",), ("tdm",), tflops=(100.0, 10.0))["targets"][0], 2 * 64 * 128
    assert its["operations_sample"] == p.backbones["sana"].teacher_steps * 2 * call
    assert 2 <= its["operations_tangents"] / its["operations_sample"] <= 3
    two, four = (benchmark(load(**{"hardware.tangents": n}), ("sana",), ("tdm",))["targets"][0] for n in (2, 4))
    assert two["operations_tangents"] == four["operations_tangents"] == its["operations_tangents"]
    weights = 4 * 16 + 16 + 16 * 4 + 4
    assert 2 * two["peak_tangents"] - four["peak_tangents"] == 4 * weights  # the rest is in proportion
    work = its["samples"] * its["operations_sample"] + its["paths"] * its["operations_tangents"]
    assert its["exaflop"] == pytest.approx(work / 1e18)
    assert its["device_hours"] * 3600 == pytest.approx(work / 10e12)  # in fp32, whatever students train in
    n, tests = p.endpoints, p.evaluation.prompts * p.evaluation.noises
    made = tests * (1 + 1 + 0.5), tests * (1 + len(p.nearby.sizes))  # diagnose's and nearby's
    assert its["paths"] == n.pairs + n.probes + sum(made)
    more = load(**{"endpoints.pairs": n.pairs + 1000, "endpoints.samples": n.samples + 2000,
                   "backbones.sana.teacher_steps": 20})
    other = benchmark(more, ("sana",), ("tdm",))["targets"][0]
    assert (other["paths"] - its["paths"], other["samples"] - its["samples"]) == (1000, 2000)
    assert other["operations_sample"] / its["operations_sample"] == 20 / p.backbones["sana"].teacher_steps
    assert "a path with tangents, TFLOP" in (paths.REPORTS / "benchmark.md").read_text()


@pytest.fixture
def counted(monkeypatch):
    """Of no network: an operation for each thing, on a machine without a GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    terms = "base", "gad", "exact", "forward"
    held = {"parameters": 1, "held": 1} | {f"peak_{k}": 1 for k in (*terms, "tangents")}
    for where, keys in (("_counted", terms), ("_teacher", ("sample", "tangents"))):
        monkeypatch.setattr(stage, where, lambda *args, keys=keys: held | {f"operations_{k}": 1.0 for k in keys})


def test_each_backbone_has_its_own_precision(counted, monkeypatch, tmp_path):
    """And its own assumed speed; one that is asked for is all backbones', which the page says."""
    monkeypatch.setattr(paths, "REPORTS", tmp_path)
    p = load(**{"distill.precision": "bf16", "distill.fp32": ["pixart"], "gad.scheme": "exact"})

    def speeds(**options):
        """10¹² operations a second, by backbone and variant."""
        report = benchmark(p, ("sana", "pixart"), ("tdm",), tflops=(100.0, 10.0), **options)
        assert [c["precision"] for c in report["plan"][::2]][:2] == [r["precision"] for r in report["rows"]]
        return report, {(c["backbone"], c["variant"]): c["exaflop"] * 1e6 / c["device_hours"] / 3600
                        for c in report["plan"][:-1]}

    report, found = speeds()
    assert [r["precision"] for r in report["rows"]] == ["bf16", "no"] and report["against"] == []
    sana, pixart = ({(name, k): x for k in ("base", "gad")} for name, x in (("sana", 100), ("pixart", 10)))
    assert found == pytest.approx(sana | pixart)
    rows = [line.split("|") for line in page(report).splitlines() if line.startswith("| ") and "| gad " in line]
    assert [[x.strip() for x in row[1:5:3]] for row in rows] == [["sana", "bf16"], ["pixart", "fp32"]]
    report, found = speeds(precision="bf16")
    assert found == pytest.approx(dict.fromkeys(found, 100)) and report["against"] == ["pixart"]
    assert "`--precision` has pixart in bf16, which `distill.fp32` keeps in fp32" in page(report)
    assert speeds(precision="no")[0]["against"] == []


def test_all_that_is_given_is_planned(counted, p):
    report = benchmark(p, ("sana-1.6b",), ("tcd", "tdm"))
    cells = {(c["backbone"], c["paradigm"], c["variant"]): c for c in report["plan"][:-1]}
    assert {*cells} == {("sana-1.6b", k, v) for k in ("tcd", "tdm") for v in ("base", "gad")}
    assert all(c["device_hours"] > 0 for c in report["plan"])
    assert report["plan"][-1]["measured"] == "4 of 4 students"
    assert cells["sana-1.6b", "tcd", "base"]["steps"] == p.distill.steps  # there is no published schedule
    text = page(report)
    assert "{sana-1.6b} × {tcd, tdm} × {base, gad}.\n" in text and "- tcd: params.yaml" in text
    assert "the paper's grid" not in text


def test_a_batch_is_taken_in_parts_as_in_training(p, monkeypatch):
    """Of which each has its share of GAD's pairs too."""
    class Timed:
        memory = 1.0

        def __init__(self, task, cycle, accelerator, parts=1):
            taken.append((task.batch, parts))

        def __call__(self):
            return 1.0

    taken = []
    monkeypatch.setattr(stage, "_Timed", Timed)
    monkeypatch.setattr(stage, "_targets", lambda *args: {"sample": None, "tangents": None})
    p = p.model_copy(update={"hardware": p.hardware.model_copy(update={"parts": 2})})
    report = benchmark(p, ("pixart",), ("tdm",), blocks=2, batch=4, miniature=True)
    assert taken == [(4, 2), (4, 2)]  # the base's and GAD's
    assert report["parts"] == 2 and "its batch in 2 part(s)" in page(report)
    for batch, told in ((3, "distill.batch=3"), (2, "gad.pairs=1")):
        with pytest.raises(ValueError, match=rf"^batch={batch}, .*{told} cannot be shared .*multiple of 2$"):
            benchmark(p, ("pixart",), ("tdm",), batch=batch, miniature=True)


def test_plan_is_steps_times_batch_over_images_a_second():
    schedules = SCHEDULES | {"ladd": Schedule(1000, 360, "by hand")}
    row = {"backbone": "sd2", "paradigm": "ladd", "images_base": 50.0, "images_gad": 40.0, "memory_base": 7.0,
           "memory_gad": 9.0}
    cells = plan([row], schedules, 4, "by hand")
    base, gad = cells[:2]
    assert (base["device_hours"], base["hours"], base["memory"]) == (2.0, 0.5, 7.0)  # 360,000 images, 50 a second
    assert (gad["device_hours"], gad["hours"], gad["memory"]) == (2.5, 0.625, 9.0)
    assert cells[-1] | {"device_hours": 4.5, "hours": 1.125, "memory": 9.0, "measured": "2 of 2 students"} == cells[-1]
    # The published schedules, in images: 100 k × 384, 10,001 × 32 and 10 M.
    images = {k: s.steps * s.batch for k, s in SCHEDULES.items()}
    assert images == {"ladd": 38_400_000, "tdm": 320_032, "sid": pytest.approx(10e6, rel=1e-4)}


@pytest.mark.parametrize("options, message", [
    ({"backbones": ("sd3",)}, "'sd3' has no miniature networks"),
    ({"backbones": ("sana-1.6b",)}, f"there are {', '.join(MINIATURES)}"),
    ({"paradigms": ("lcm",)}, "'lcm' is not in params.yaml"),
    ({"precision": "fp16"}, "use 'no' .fp32. or 'bf16'"),
    ({"blocks": 1}, "blocks=1 is too few"),
    ({"backbones": ()}, "backbones=0 is too few"),
    ({"batch": 0}, "batch=0 is too few"),
    ({"gpus": 0}, "gpus=0 is too few"),
    ({"tflops": (300.0, 0.0)}, "tflops=.300.0, 0.0.: give what a device sustains"),
])
def test_bad_input_is_one_line(p, options, message):
    with pytest.raises(ValueError, match=message) as error:
        benchmark(p, **{"miniature": True} | options)
    assert "\n" not in str(error.value)


def test_gad_needs_a_weight(p):
    with pytest.raises(ValueError, match="lam=0 leaves no GAD to time"):
        benchmark(load(**{"gad.lam": 0}), miniature=True)
