"""Mistakes in params.yaml and on the command line: one line with key, value and fix, before any work."""

import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
import yaml
from dvc.utils.hydra import apply_overrides

from gad import __main__ as main
from gad import graph, params, stages
from gad.paradigms import PARADIGMS
from gad.params import ROOT, ParamsError, Run

DATA = yaml.safe_load((ROOT / "params.yaml").read_text())


@pytest.mark.parametrize(
    "key, value, said",
    [
        ("gad.h", 0, "gad.h=0: input should be greater than 0"),
        ("gad.h", float("nan"), "gad.h=nan"),
        ("gad.h", "small", "gad.h='small'"),
        ("gad.h", True, "gad.h=True: input should be a valid number"),
        ("gad.h", "0.01", "gad.h='0.01': input should be a valid number (write 0.01, without quotes)"),
        ("gad.lam", True, "gad.lam=True: input should be a valid number"),
        ("gad.pairs", "8", "gad.pairs='8': input should be a valid integer (write 8, without quotes)"),
        ("gad.pairs", True, "gad.pairs=True: input should be a valid integer"),
        ("gad.pairs", 8.0, "gad.pairs=8.0: input should be a valid integer (write 8)"),
        ("gad.normalise", "no", "gad.normalise='no': input should be a valid boolean (write true or false)"),
        ("gad.robust", 1, "gad.robust=1: input should be a valid boolean (write true or false)"),
        ("controls.map.h", True, "controls.map.h=True: input should be a valid number"),
        ("controls.slower.rate", True, "controls.slower.rate=True: input should be a valid number"),
        ("seeds.distill", [True], "seeds.distill.0=True: input should be a valid integer"),
        ("uses.sweep", ["0.1"], "uses.sweep.0='0.1': input should be a valid number (write 0.1, without quotes)"),
        ("gad.lam", -1, "gad.lam=-1: input should be greater than or equal to 0"),
        ("gad.form", "jacobian", "gad.form='jacobian': input should be 'map'"),
        ("gad.every", 0, "gad.every=0"),
        ("grid.backbones", ["sdxl"], "grid.backbones: 'sdxl' is not in the backbones section"),
        ("grid.paradigms", ["lcm"], "grid.paradigms: 'lcm' is not in the paradigms section"),
        ("grid.variants", ["both"], "grid.variants.0='both'"),
        ("further.controls.variants", ["gad"], "further.controls.variants: 'gad' is not in the controls section"),
        ("further.baselines.paradigms", ["lcm"], "further.baselines.paradigms: 'lcm' is not in the paradigms section"),
        ("further.baselines.paradigms", ["tdm"], "further: sd2-tdm-base-0 is a student twice"),
        ("controls.map.longer", 0, "controls.map.longer=0: input should be greater than 0"),
        ("controls.slower.rate", 0, "controls.slower.rate=0: input should be greater than 0"),
        ("controls.slower", 0.5, "controls.slower=0.5: input should be a valid dictionary"),
        ("controls.slower", {"rate": 0.5}, "controls.slower.lam is missing"),
        ("controls.longer.longer", 0.001, "controls.longer.longer=0.001 leaves add no step: raise it"),
        ("controls.unrelated.pairs", 1, "controls.unrelated.pairs=1: `unrelated` is of several samples: make it 2"),
        ("controls.similarity.pairs", 1, "controls.similarity.pairs=1: `similarity` is of several samples: make it 2"),
        ("controls.rkd.pairs", 2, "controls.rkd.pairs=2: `rkd` is of several samples: make it 3 or more"),
        ("paradigms.tdm", {"fake_lr": 1.0}, "paradigms.tdm.lr is missing: add it"),
        ("paradigms.tdm.lr", -1, "paradigms.tdm.lr=-1 must be greater than 0"),
        ("paradigms.tdm.lr", True, "paradigms.tdm.lr=True: input should be a valid number"),
        ("paradigms.tdm.lr", "0.1", "paradigms.tdm.lr='0.1': input should be a valid number (write 0.1, without"),
        ("paradigms.tdm.foo", 1, "paradigms.tdm.foo=1 is not a key of this paradigm: it has lr, fake_lr, beta1, huber"),
        ("paradigms.sid", {"lr": 1.0e-4, "fake_lr": 5.0e-4, "beta1": 0}, "paradigms.sid.alpha is missing: add it"),
        ("paradigms.ladd.disc_lr", 0, "paradigms.ladd.disc_lr=0 must be greater than 0"),
        ("paradigms.tdm.huber", float("inf"), "paradigms.tdm.huber=inf must be a finite number"),
        ("paradigms.tdm.steps", 0, "paradigms.tdm.steps=0 must be a whole number, 1 or more"),
        ("paradigms.dmd.ratio", 2.5, "paradigms.dmd.ratio=2.5 must be a whole number"),
        ("paradigms.tcd.solver", 0, "paradigms.tcd.solver=0 must be a whole number"),
        ("paradigms.swiftbrush.rank", 0, "paradigms.swiftbrush.rank=0 must be a whole number"),
        ("paradigms.sid.beta1", 1.5, "paradigms.sid.beta1=1.5 must be at least 0 and less than 1"),
        ("uses.train", 1, "uses.train=1: input should be greater than or equal to 2"),
        ("uses.library", 7, "uses: library=7 is less than twice picks=4: make it 8 or more"),
        ("backbones.sana.teacher_steps", 30, "backbones.sana.teacher_steps=30 must divide 1000"),
        ("backbones.sana.teacher_steps", 25, "backbones.sana.teacher_steps=25 must be even"),
        ("backbones.sana.cfg", 0.5, "backbones.sana.cfg=0.5"),
        ("backbones.sana.family", "dalle", "backbones.*.family: 'dalle' is not in gad/backbones"),
        ("teacher.steps", 1.5, "teacher.steps=1.5"),
        ("teacher.refine", [{"steps": 0}], "teacher.refine.0.steps=0"),
        ("teacher.refine", [{"seed": -1}], "teacher.refine.0.seed=-1: input should be greater than or equal to 0"),
        ("teacher.refine", [{"stepz": 9}], "teacher.refine.0.stepz=9"),
        ("backbones.sana.pretrain", {"stepz": 9}, "backbones.sana.pretrain.stepz=9: extra inputs are not permitted"),
        ("backbones.sana.pretrain", {"refine": [{"lr": -1.0}]}, "backbones.sana.pretrain.refine.0.lr=-1.0: input"),
        ("backbones.sana.pretrain", {"steps": None}, "backbones.sana.pretrain.steps=None: input should be a valid int"),
        ("backbones.sana.pretrain", {"lr": True}, "backbones.sana.pretrain.lr=True: input should be a valid number"),
        ("backbones.sana.pretrain", {"batch": "8"}, "pretrain.batch='8': input should be a valid integer (write 8, "),
        ("seeds.distill", [], "seeds.distill=[]"),
        ("seeds.distill", [0, -1], "seeds.distill.1=-1: input should be greater than or equal to 0"),
        ("seeds.world", -1, "seeds.world=-1: input should be greater than or equal to 0"),
        ("seeds.world", 2**31, "seeds.world=2147483648: input should be less than 2147483648"),
        ("further.replicas.seeds", [-1], "further.replicas.seeds.0=-1: input should be greater than or equal to 0"),
        ("controls", DATA["controls"] | {"gad": {"lam": 0.0}}, "controls: 'gad' is no name for one: use letters"),
        ("controls", DATA["controls"] | {"a/b": {"lam": 0.0}}, "controls: 'a/b' is no name for one: use letters"),
        ("backbones", DATA["backbones"] | {"a/b": DATA["backbones"]["sd2"] | {"family": "sd2"}},
         "'a/b' is no name for a backbone or a student"),
        ("backbones", DATA["backbones"] | {"..": DATA["backbones"]["sd2"] | {"family": "sd2"}},
         "'..' is no name for a backbone or a student"),
        ("distill.precision", "int8", "distill.precision='int8'"),
        ("distill.fp32", ["sdxl"], "distill.fp32: 'sdxl' is not in the backbones section"),
        ("distill.precision", "fp16", "distill.precision='fp16': input should be 'no' or 'bf16'"),
        ("distill.ema", 0, "distill.ema=0: input should be greater than 0"),
        ("teacher.ema", 0.0, "teacher.ema=0.0: input should be greater than 0"),
        ("hardware.parts", 0, "hardware.parts=0: input should be greater than 0"),
        ("published", {"x": {"backbone": "sd2", "paradigm": "turbo"}}, "needs either path or lora: give one of them"),
        ("published", {"x": {"backbone": "sdxl", "paradigm": "turbo", "path": "a"}},
         f"published.x.backbone='sdxl' is not in grid.backbones ({', '.join(DATA['grid']['backbones'])})"),
        ("published", {"x": {"backbone": "sd2", "paradigm": "turbo", "path": "a"}},
         "published.x: its key must be its students' name: write sd2-turbo-base-0"),
        ("published", {"sd2-tdm-base-0": {"backbone": "sd2", "paradigm": "tdm", "lora": "a"}},
         "sd2-tdm-base-0 is a student twice"),
    ],
)
def test_wrong_value(key, value, said, tmp_path):
    data = yaml.safe_load((ROOT / "params.yaml").read_text())
    *parents, leaf = key.split(".")
    section = data
    for parent in parents:
        section = section[parent]
    section[leaf] = value
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(data))
    with pytest.raises(ParamsError) as error:
        params.load(tmp_path / "params.yaml")
    assert str(error.value).startswith("params.yaml: ") and said in str(error.value)
    assert "\n" not in str(error.value)


def test_a_form_that_needs_a_fake_is_of_those_that_have_one(capsys, monkeypatch):
    """Of what is to be trained, before any work: whatever else the grid has."""
    assert {name: not params._fakeless(name) for name in PARADIGMS} == {
        name: paradigm.form == "score" for name, paradigm in PARADIGMS.items()}
    p = params.load(**{"gad.form": "released", "controls.map.form": "paired-score"})
    p.check_forms([run for run in p.runs() if run.paradigm in ("tdm", "sid", "dmd", "swiftbrush")])
    for variant, said in (("gad", "gad.form='released'"), ("map", "controls.map.form='paired-score'")):
        with pytest.raises(ParamsError, match=f"^{re.escape(said)} needs a fake score, which ladd has not: use 'map'"):
            p.check_forms([Run("sd2", "tdm", "gad", 0), Run("sd2", "ladd", variant, 0)])
    assert main.main(["--set", "gad.form=score", "distill", "sd2", "ladd", "gad"]) == 1
    assert capsys.readouterr().err.startswith("gad: gad.form='score' needs a fake score, which ladd has not")
    monkeypatch.setattr(graph, "load", lambda: p)
    with pytest.raises(ParamsError, match="has not: use 'map' or 'step'"):
        graph.reproduce()


def test_a_key_that_is_there_twice_is_named(tmp_path):
    text = (ROOT / "params.yaml").read_text()
    (tmp_path / "params.yaml").write_text(text + "\ngad: {h: 0.5}\n")
    first, last = text[:text.index("\ngad:")].count("\n") + 2, text.count("\n") + 2
    with pytest.raises(ParamsError) as error:
        params.load(tmp_path / "params.yaml")
    assert str(error.value) == f"params.yaml: 'gad' is there twice, in lines {first} and {last}: keep one of them"
    text = text.replace("tcd: {lr: 1.0e-4,", "tcd: {lr: 1.0e-4, lr: 2.0e-4,")
    (tmp_path / "params.yaml").write_text(text)
    line = text[:text.index("tcd: {lr")].count("\n") + 1
    with pytest.raises(ParamsError, match=rf"^params\.yaml: 'lr' is there twice, in line {line}: keep one of them$"):
        params.load(tmp_path / "params.yaml")


def test_keys_that_are_merged_in_may_be_there_again_and_a_list_is_none(tmp_path):
    assert params.read("a: &a {h: 1}\nb: &b {<<: *a, <<: *a, h: 2}\nc: {<<: *b, h: 3}")["c"] == {"h": 3}
    for key in ("[h]", "{h: 1}"):
        (tmp_path / "params.yaml").write_text(f"? {key}\n: 1\n")
        with pytest.raises(ParamsError, match=r"is not YAML: .*unhashable key"):
            params.load(tmp_path / "params.yaml")


@pytest.mark.parametrize("seed", ["-5", "99999999999999999999999"])
@pytest.mark.parametrize("command", ["distill", "trial", "evaluate"])
def test_a_seed_of_the_command_line_is_checked_before_any_work(command, seed, capsys):
    assert main.main([command, "pixart", "tdm", "gad", "--", seed]) == 1
    assert capsys.readouterr().err == f"gad: seed={seed} is no seed: give 0 to 2147483647\n"


def test_what_takes_less_memory_is_said_where_it_runs_out(capsys, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total of 79 GiB")

    monkeypatch.setattr(stages, "distill", full)
    assert main.main(["distill", "pixart", "tdm", "gad"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("gad: CUDA out of memory; what takes less: hardware.parts, ") and error.count("\n") == 1
    assert {*re.findall(r"hardware\.(\w+)", error)} <= {*params.load().model_dump()["hardware"]}


@pytest.mark.parametrize("key, value, said", [
    ("distill.optimiser", "adamw8bit", "8-bit moments cannot be shared out: set distill.optimiser to adamw"),
    ("gad.scheme", "exact", "exact JVPs need whole networks: set it to false, or gad.scheme to forward"),
])
def test_what_shares_cannot_have(key, value, said):
    data = yaml.safe_load((ROOT / "params.yaml").read_text())
    section, leaf = key.split(".")
    data[section] = {**data[section], leaf: value}
    params.validate(data)
    data["hardware"]["shard"] = True
    with pytest.raises(ParamsError, match=said):
        params.validate(data)


def test_a_single_pair_is_enough_for_gad_itself():
    assert params.load(**{"gad.pairs": 1}).gad.pairs == 1


def test_unknown_key_missing_key_missing_file_and_not_yaml(tmp_path):
    path = tmp_path / "params.yaml"
    path.write_text(yaml.safe_dump(DATA | {"gadd": {"h": 1}}))
    with pytest.raises(ParamsError, match=r"gadd=.* is not a key"):
        params.load(path)
    path.write_text(yaml.safe_dump({k: v for k, v in DATA.items() if k != "gad"}))
    with pytest.raises(ParamsError, match="gad is missing: add it"):
        params.load(path)
    path.write_text("gad: [1, 2")
    with pytest.raises(ParamsError, match="is not YAML"):
        params.load(path)
    path.write_bytes("gad: {h: 0.01} # Größe".encode("latin-1"))
    with pytest.raises(ParamsError, match=r"^.*params\.yaml is not UTF-8 \(byte 19\): save it as UTF-8$"):
        params.load(path)
    with pytest.raises(ParamsError, match="does not exist"):
        params.load(tmp_path / "none.yaml")
    for key, said in (("gad.x", r"gad\.x=1 is not a key"), ("gad.x.y", r"gad\.x\.y=1: there is no such key"),
                      ("x", "x=1: there is no such key")):
        with pytest.raises(ParamsError, match=said):
            params.load(**{key: 1})
    with pytest.raises(ParamsError, match="cannot be read: Is a directory"):
        params.load(tmp_path)
    assert "optimiser" not in DATA["distill"]  # what the file leaves out can be given too
    assert params.load(**{"distill.optimiser": "adamw8bit"}).distill.optimiser == "adamw8bit"


def test_runs_are_the_grid():
    p = params.load(**{"seeds.distill": [0, 1], "further.replicas.seeds": [2]})
    expected = len(p.grid.backbones) * len(p.grid.paradigms) * len(p.grid.variants) * 2
    grid = p.grid.runs(p.seeds.distill)
    assert len(set(map(str, grid))) == expected and p.runs()[:expected] == grid
    assert str(Run("sana", "tdm", "gad", 1)) == "sana-tdm-gad-1"


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--set", "gad.h=0", "distill", "sana", "tdm", "gad"], "gad.h=0"),
        (["--set", "published={sd2-turbo-base-0: {backbone: sd2, paradigm: turbo, path: some/where}}", "distill", "sd2",
          "turbo", "base"], "paradigm='turbo' is unknown: there are "),
        (["teacher", "sdxl"], "backbone='sdxl' is unknown"),
        (["evaluate", "sana", "tdm", "best"], "variant='best' is unknown"),
        (["--params", "none.yaml", "teacher", "sana"], "none.yaml does not exist"),
        (["publish", "sd2", "turbo"], "paradigm='turbo' is unknown: there are none in params.yaml's published section"),
    ],
)
def test_command_line_mistakes_are_one_line(arguments, said):
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "gad", *arguments], cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 1 and not done.stdout
    lines = [line for line in done.stderr.splitlines() if "Warning" not in line]
    assert len(lines) == 1 and lines[0].startswith("gad: ") and said in lines[0]


def test_a_backbones_pretraining_lies_over_the_general_one(tmp_path):
    data = yaml.safe_load((ROOT / "params.yaml").read_text())
    data["teacher"] |= {"steps": 10, "lr": 0.1, "muon": 0.3}
    data["backbones"]["sana"]["pretrain"] = {"steps": 11, "refine": [{"steps": 21}, {"steps": 22, "focus": 0.5}]}
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(data))
    found = params.load(tmp_path / "params.yaml").teacher_of("sana")
    assert (found.steps, found.lr, found.refine[0].steps, found.refine[0].muon) == (11, 0.1, 21, 0.3)
    assert [c.focus for c in found.refine] == [0, 0.5]


def test_a_file_that_dvc_has_rewritten_says_the_same(tmp_path):
    """`dvc exp run -S` writes the whole file anew, as YAML 1.2."""
    path = tmp_path / "params.yaml"
    shutil.copy(ROOT / "params.yaml", path)
    apply_overrides(path, ["gad.lam=0.125"])
    assert "0.125" in path.read_text() and path.read_text() != (ROOT / "params.yaml").read_text()
    found, known = params.load(path).model_dump(), params.load(**{"gad.lam": 0.125}).model_dump()
    # Merged keys are written out: the controls no longer follow.
    assert {k for k in known if found[k] != known[k]} <= {"controls"}
    assert found["gad"]["lam"] == 0.125


def test_numbers_load_as_dvc_and_the_command_line_write_them(tmp_path):
    """DVC writes 1e-05, which is a string in YAML 1.1; so is the value of `--set gad.h=1e-5`."""
    path = tmp_path / "params.yaml"
    shutil.copy(ROOT / "params.yaml", path)
    apply_overrides(path, ["gad.h=1e-5", "gad.lam=1", "paradigms.tdm.lr=2.5e-7", "distill.clip=1e20",
                           "gad.normalise=False", "distill.precision=no", "+backbones.sana.pretrain.lr=1e-5"])
    assert "h: 1e-05" in path.read_text()
    again = tmp_path / "again.yaml"  # as a copy of the repository has it
    again.write_text(yaml.safe_dump(yaml.safe_load(path.read_text())))
    for p in (params.load(path), params.load(again)):
        assert (p.gad.h, p.gad.lam, p.gad.normalise, p.distill.precision) == (1e-5, 1.0, False, "no")
        assert (p.paradigms["tdm"]["lr"], p.distill.clip, p.teacher_of("sana").lr) == (2.5e-7, 1e20, 1e-5)
    given = params.load(**dict(main._assignment(text) for text in ("gad.h=1e-5", "gad.lam=1", "gad.normalise=no")))
    assert (given.gad.h, given.gad.lam, given.gad.normalise) == (1e-5, 1.0, False) and type(given.gad.lam) is float
    with pytest.raises(ParamsError, match=r"gad\.h='1e-4': input should be .* \(write 1\.0e-4, with the dot\)$"):
        params.validate(DATA | {"gad": DATA["gad"] | {"h": "1e-4"}})


def test_a_paradigms_keys_are_read_as_they_are_and_without_torch(tmp_path, monkeypatch):
    """And what a file does not say plainly is left to the stage."""
    assert {name: params._said(name, "settings") for name in PARADIGMS} == {n: c.settings for n, c in PARADIGMS.items()}
    (tmp_path / "gad/paradigms").mkdir(parents=True)
    with monkeypatch.context() as patch:
        patch.setattr(params, "ROOT", tmp_path)
        for text in ("", "settings = (*Base.settings, 'lr')", "settings = 'lr'", "class"):
            (tmp_path / "gad/paradigms/own.py").write_text(text)
            assert not isinstance(params._said("own", "settings"), tuple)
    code = "import sys; from gad import params; params.load(); assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_blocks_beside_the_grid_make_runs_with_terms_and_steps_of_their_own():
    p = params.load(**{
        "further.baselines": {"backbones": ["sd2"], "paradigms": ["dmd"], "variants": ["base"]},
        "further.maps.paradigms": [],
        "further.rates.paradigms": [],
        "further.lengths.paradigms": [],
        "further.baseline_maps.paradigms": [],
        "further.controls": {"backbones": ["sana"], "paradigms": ["tdm"], "variants": ["rkd", "longer"]},
        "paradigms.dmd": DATA["paradigms"]["dmd"] | {"steps": 60},
        "published": {},
    })
    grid = p.grid.runs(p.seeds.distill)
    more = [Run("sd2", "dmd", "base", 0), Run("sana", "tdm", "rkd", 0), Run("sana", "tdm", "longer", 0)]
    assert p.runs() == grid + more
    assert p.term("base") is None and p.term("longer") is None and p.term("gad") == p.gad
    assert p.term("rkd").form == "rkd" and p.term("rkd").h == p.gad.h
    assert p.steps("dmd", "base") == 60 and p.steps("tdm", "gad") == p.distill.steps
    own = p.paradigms["tdm"]
    assert p.settings("tdm", "slower") == own | {"lr": own["lr"] / 2} and p.settings("tdm", "gad") == own
    assert p.settings("tdm", "slower_gad") == p.settings("tdm", "slower") and p.term("slower_gad").lam == p.gad.lam
    assert [p.base_of(v) for v in ("gad", "rkd", "slower", "slower_gad", "longer")] == [*["base"] * 3, "slower", "base"]
    assert p.steps("tdm", "longer") == round(p.distill.steps * p.controls["longer"].longer)


def test_a_backbone_may_stay_in_fp32():
    p = params.load(**{"distill.precision": "bf16", "distill.fp32": ["pixart"]})
    assert {name: p.training(name).precision for name in p.backbones} == {"sd2": "bf16", "pixart": "no", "sana": "bf16"}
    alike = params.load()
    assert p.training("pixart").identity == alike.training("pixart").identity == alike.distill.identity


def test_smoke_trains_next_to_nothing():
    """A cycle that a backbone has of its own in params.yaml needs its own in the smoke run too."""
    smoke = yaml.safe_load((ROOT / "tests/smoke.yaml").read_text())
    p = params.validate(graph._merged(DATA | {"published": {}}, smoke))  # as a copy of the repository has it
    for name in p.backbones:
        teacher = p.teacher_of(name).model_dump()
        assert all(cycle["steps"] <= 2 for cycle in (teacher, *teacher["refine"])), name


@pytest.mark.parametrize("given, power", [(False, 0.0), (True, 1.0), (2, 2.0)])
def test_a_crowded_cycle_is_a_power_and_true_is_one(given, power):
    p = params.load(**{"teacher.refine": [DATA["teacher"]["refine"][0] | {"crowded": given}]})
    assert p.teacher.refine[0].crowded == power and type(p.teacher.refine[0].crowded) is float
