"""What a student's training keeps off the accelerator: text encoders, and three quarters of its moments."""

import copy
import sys

import pytest
import torch
import yaml
from conftest import build
from safetensors.torch import load_file
from test_training import Killed, Regression, assert_equal, kill_at, run

from gad import embeddings, params
from gad.backbones import sana
from gad.distill import in_8bit
from gad.embeddings import keep
from gad.geometry import jvp
from gad.params import ROOT
from gad.training import Role
from gad.world import scenes

PROMPTS = ["a red circle and a blue square", "a blue square", "", "a red circle and a blue square"]


def files(folder):
    return sorted(folder.iterdir())


def refuse(*_, **__):
    raise AssertionError("the text encoder was asked again")


def assert_same(a, b):
    for x, y in ((a.embeds, b.embeds), (a.mask, b.mask)):
        assert x.dtype == y.dtype and torch.equal(x, y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["sd2", "pixart", "sana"])
def test_embeddings_have_the_same_bits_from_disk(name, dtype, tmp_path):
    plain, first, second = (build(name) for _ in range(3))
    for one in (plain, first, second):
        one.pipeline.text_encoder.to(dtype)
    expected, null = plain.encode(PROMPTS), plain.null
    assert expected.embeds.dtype == dtype
    keep(first, tmp_path, "cpu")
    assert_same(first.encode(PROMPTS), expected)
    assert_same(first.null, null)
    assert len(files(tmp_path)) == 2 and all(f.suffix == ".safetensors" for f in files(tmp_path))
    keep(second, tmp_path, "cpu").pipeline.text_encoder.forward = refuse
    assert_same(second.encode(PROMPTS), expected)
    assert_same(second.null, null)
    states = [one.pipeline.tokenizer.backend_tokenizer.to_str() for one in (plain, first, second)]
    assert states[0] == states[1] == states[2]  # students are saved with it


def test_the_text_encoder_is_on_the_device_while_it_encodes_alone(tmp_path, monkeypatch):
    """The device is torch's `meta`, which holds no numbers: what is seen is where things go."""
    made, moves = build("sana").encode(PROMPTS), []
    monkeypatch.setattr(embeddings, "load_file", lambda path: moves.append("read") or load_file(path))
    for expected in (["to meta", "encode", "to cpu", "read"], ["read"]):  # the empty prompt, the rest
        backbone = keep(build("sana"), tmp_path, "meta")
        encoder = backbone.pipeline.text_encoder
        assert encoder.device.type == "cpu"
        assert backbone.network.device.type == backbone.pipeline.vae.device.type == "meta"
        monkeypatch.setattr(encoder, "to", lambda device, e=encoder: moves.append(f"to {device}") or e)
        anew = backbone.encode_unlike
        monkeypatch.setattr(anew, "anew", lambda prompts, *_: moves.append("encode") or made[:len(prompts)])
        assert backbone.encode(PROMPTS).embeds.device.type == "meta"
        assert moves == expected * 2
        assert backbone.encode(PROMPTS, device="cpu").embeds.device.type == "cpu"  # what need not be there yet
        moves.pop()
        moves.clear()


def _weight(backbone):
    backbone.pipeline.text_encoder.get_parameter("layers.1.mlp.up_proj.weight").data[3, 5] += 1e-3


def _config(backbone):
    backbone.pipeline.text_encoder.config.query_pre_attn_scalar = 25


def _length(backbone):
    backbone.pipeline.tokenizer.model_max_length = 20


@pytest.mark.parametrize("change", [_weight, _config, _length])
def test_another_text_encoder_never_meets_old_embeddings(change, tmp_path):
    keep(build("sana"), tmp_path, "cpu").encode(PROMPTS)
    plain, other = build("sana"), build("sana")
    change(plain)
    change(other)
    assert_same(keep(other, tmp_path, "cpu").encode(PROMPTS), plain.encode(PROMPTS))
    assert len(files(tmp_path)) == 4  # of each the prompts, and the empty one


def test_other_prompts_and_another_tokeniser_are_other_embeddings(tmp_path):
    backbone = keep(build("sana"), tmp_path, "cpu")
    backbone.encode(PROMPTS)
    backbone.encode(PROMPTS[::-1])  # batched in another order
    backbone.encode(PROMPTS[:2])
    assert len(files(tmp_path)) == 4
    backbone.pipeline.tokenizer = sana._tokenizer(list(reversed(scenes.WORDS)))
    backbone.encode(PROMPTS)
    assert len(files(tmp_path)) == 5


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("name", ["sd2", "pixart", "sana"])
def test_the_empty_prompt_is_no_tensor_of_the_transform_it_is_first_used_in(name, kept, tmp_path):
    backbone = build(name)
    if kept:
        keep(backbone, tmp_path, "cpu")
    cond, z = backbone.encode(PROMPTS[:2]), backbone.noise(2, 0)
    jvp(lambda z: backbone.sample(backbone.network, z, cond, 1, 2.0), z, z)
    assert copy.deepcopy(backbone.null).embeds.numpy().shape[0] == 1


def test_two_stages_that_encode_at_once_leave_one_whole_file(tmp_path, monkeypatch):
    one, other = (keep(build("sd2"), tmp_path, "cpu") for _ in range(2))
    anew = one.encode_unlike.anew

    def meanwhile(*arguments):
        other.encode(PROMPTS)
        return anew(*arguments)

    monkeypatch.setattr(one.encode_unlike, "anew", meanwhile)
    assert_same(one.encode(PROMPTS), other.encode(PROMPTS))
    assert len(files(tmp_path)) == 2


def test_embeddings_that_cannot_be_read_are_named(tmp_path):
    backbone = keep(build("sd2"), tmp_path, "cpu")
    backbone.encode(PROMPTS)
    path = max(files(tmp_path), key=lambda f: f.stat().st_size)  # the other is the empty prompt's
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match=r"not readable.*delete it, and prompts are encoded anew") as error:
        backbone.encode(PROMPTS)
    assert path.name in str(error.value) and "\n" not in str(error.value)


# 8-bit moments


class Large(Regression):
    """With weights enough for 8 bits, and some of too few."""

    def __init__(self, eight=True):
        super().__init__()
        torch.manual_seed(8)
        net = torch.nn.Sequential(torch.nn.Linear(4, 1024), torch.nn.Tanh(), torch.nn.Linear(1024, 1))
        self.roles["student"] = Role(net, 1e-2, ema=0.9, weight_decay=0.01)
        if eight:
            for role in self.roles.values():
                in_8bit(role)


@pytest.fixture
def bitsandbytes():
    return pytest.importorskip("bitsandbytes", reason="pip install -e '.[8bit]'")


def test_a_run_in_8_bits_resumes_with_the_same_bits(bitsandbytes, tmp_path):
    whole, task = Large(), Large()
    log = run(tmp_path / "whole", whole)
    with pytest.raises(Killed):
        run(tmp_path / "part", Large(), on_step=kill_at(7))
    done = []
    assert run(tmp_path / "part", task, on_step=done.append).read_bytes() == log.read_bytes()
    assert done == [*range(6, 12)]
    assert_equal(*(load_file(tmp_path / f / "state.safetensors") for f in ("whole", "part")))
    role, other = whole.roles["student"], task.roles["student"]
    assert [role.state_of(p)["state1"].dtype for p in role.params] == [torch.uint8] + 3 * [torch.float32]
    assert all(r.state_of(p)["step"] == 12 for r in (role, other) for p in r.params)
    assert all(torch.equal(p, q) for p, q in zip(role.params, other.params, strict=True))


def test_8_bits_learn_as_32_do(bitsandbytes, tmp_path):
    """The same rates and decay, all but equal losses."""
    ends = []
    for eight in (False, True):
        log = run(tmp_path / str(eight), Large(eight), steps=60, log_every=59)
        header, first, last = (line.split(",") for line in log.read_text().splitlines())
        ends.append([float(row[header.index("student")]) for row in (first, last)])
    (start, plain), (same, eight) = ends
    assert start == same and plain < 0.2 * start and eight == pytest.approx(plain, rel=0.2)


def test_8_bits_without_the_library_say_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.delitem(sys.modules, "bitsandbytes.optim", raising=False)
    with pytest.raises(ValueError, match=r"distill\.optimiser=adamw8bit needs bitsandbytes: pip install") as error:
        in_8bit(Role(torch.nn.Linear(4, 4), 1e-3))
    assert "\n" not in str(error.value)


def test_the_default_optimiser_leaves_students_what_they_were():
    data = yaml.safe_load((ROOT / "params.yaml").read_text())
    assert params.validate(data).distill.identity == data["distill"]
    data["distill"]["optimiser"] = "adamw"
    assert "optimiser" not in params.validate(data).distill.identity
    data["distill"]["optimiser"] = "adamw8bit"
    assert params.validate(data).distill.identity == data["distill"]
    data["distill"]["optimiser"] = "sgd"
    with pytest.raises(params.ParamsError, match=r"distill\.optimiser='sgd': input should be 'adamw' or 'adamw8bit'"):
        params.validate(data)
