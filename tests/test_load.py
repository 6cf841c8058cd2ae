"""gad.backbones.load: good folders load; every bad one is one line that names the path and the fix."""

import copy as copies
import gc
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from conftest import build, perturb
from diffusers import DDIMScheduler
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from gad import backbones, params, paths, stages
from gad.backbones import load, load_network, with_lora
from gad.distill import save_student
from gad.embeddings import keep
from gad.params import Run
from gad.world import teacher as teachers


@pytest.fixture(scope="module")
def folder(mini, tmp_path_factory):
    path = tmp_path_factory.mktemp("sd2") / "pipeline"
    mini("sd2").pipeline.save_pretrained(path)
    return path


@pytest.fixture
def copy(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "pipeline")


def refused(path, match, p=None):
    with pytest.raises(ValueError, match=match) as error:
        load(path, p)
    assert "\n" not in str(error.value)


def test_a_good_folder_is_the_same_backbone(folder, mini, prompts, z):
    ours, original = load(folder), mini("sd2")
    with torch.no_grad():
        outputs = [b.sample(b.network, z, b.encode(prompts), 2, 2.0) for b in (ours, original)]
    weights, kept = ours.network.state_dict(), original.network.state_dict()
    assert ours.name == "sd2" and all(torch.equal(weights[k], kept[k]) for k in kept)
    # The same bits, yet where they lie in memory may choose another kernel.
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-4)


def test_a_half_precision_entry_leaves_the_network_whole(folder):
    """Differences of a network in half precision are mostly rounding, and no student can be trained in it."""
    data = yaml.safe_load((params.ROOT / "params.yaml").read_text())
    data["backbones"]["sd2"] |= {"path": str(folder), "dtype": "bfloat16"}
    backbone = load("sd2", params.validate(data))
    parts = backbone.pipeline.components.items()
    dtypes = {k: next(m.parameters()).dtype for k, m in parts if hasattr(m, "parameters")}
    assert dtypes == {"unet": torch.float32, "vae": torch.bfloat16, "text_encoder": torch.bfloat16}


@pytest.mark.skipif(sys.platform != "linux", reason="it asks /proc")
def test_a_text_encoder_in_its_files_dtype_stays_in_the_file_that_all_processes_share(copy):
    file = next((copy / "text_encoder").glob("*.safetensors"))
    backbone = load(copy)
    assert str(file.resolve()) in Path("/proc/self/maps").read_text()
    data = yaml.safe_load((params.ROOT / "params.yaml").read_text())
    data["backbones"]["sd2"] |= {"path": str(copy), "dtype": "bfloat16"}
    del backbone
    gc.collect()
    other = load("sd2", params.validate(data))
    assert str(file.resolve()) not in Path("/proc/self/maps").read_text()
    assert other.pipeline.text_encoder.dtype == torch.bfloat16


def test_missing_folder(tmp_path):
    refused(tmp_path / "none", "none is not there: run `dvc pull`")


def test_missing_student_says_what_trains_it():
    refused(paths.student(Run("sd2", "tdm", "none", 0)), "none ship; `dvc repro` its distill stage")


def test_hub_id_that_is_nowhere():
    refused("someone/something", "someone/something cannot be loaded as a pipeline: .* give a folder")


@pytest.mark.slow
def test_a_hub_id_is_read_from_the_cache_offline(folder, tmp_path):
    """Of a kind that only its own index tells, as a published checkpoint's; and what was not fetched is one line."""
    at = tmp_path / "hub/models--someone--something"
    shutil.copytree(folder, at / "snapshots/0123456789abcdef0123456789abcdef01234567")
    (at / "refs").mkdir()
    (at / "refs/main").write_text("0123456789abcdef0123456789abcdef01234567")
    code = (
        "from gad.backbones import load\n"
        "print(load('someone/something').name)\n"
        "try:\n    load('someone/else')\nexcept ValueError as error:\n    print(error)\n"
    )
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "HF_HUB_CACHE": str(tmp_path / "hub")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    name, said = done.stdout.splitlines()[-2:]
    assert name == "sd2" and said.startswith("someone/else cannot be loaded") and "HF_HUB_OFFLINE is 1" in said


def test_the_network_alone(folder, copy, mini):
    """Without the rest of the folder being read, which at full size is many times as large."""
    network, whole = load_network(folder), mini("sd2").network
    assert type(network) is type(whole) and not any(w.requires_grad for w in network.parameters())
    assert all(torch.equal(v, whole.state_dict()[k]) for k, v in network.state_dict().items())
    (copy / "text_encoder/config.json").write_text("{}")
    load_network(copy)
    (copy / "unet/config.json").write_text("{")
    with pytest.raises(ValueError, match="unet cannot be loaded as a UNet2DConditionModel"):
        load_network(copy)
    with pytest.raises(ValueError, match="none is not there"):
        load_network(copy / "none")


def test_not_a_pipeline(tmp_path):
    refused(tmp_path, "has no model_index.json")


def test_index_that_is_not_json(copy):
    for text in (b"{", b"\xff"):
        (copy / "model_index.json").write_bytes(text)
        refused(copy, "pipeline/model_index.json is not JSON: restore the folder")


@pytest.mark.parametrize("index", [{}, [], {"_class_name": None}, {"unet": ["diffusers", "UNet2DConditionModel"]}])
def test_index_that_names_no_pipeline(index, tmp_path):
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    refused(tmp_path, f"^{tmp_path}/model_index.json has no _class_name: restore the folder$")
    with pytest.raises(ValueError, match="has no _class_name"):
        load_network(tmp_path)


@pytest.mark.parametrize("named", [None, [], ["diffusers"], ["diffusers", "NoNetwork"]])
def test_index_that_names_no_network(copy, named):
    index = json.loads((copy / "model_index.json").read_text())
    if named is None:
        del index["unet"]
    else:
        index["unet"] = named
    (copy / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"model_index\.json names no class of its part 'unet': restore the folder"):
        load_network(copy)


def test_missing_part(copy):
    shutil.rmtree(copy / "vae")
    refused(copy, "lacks its part 'vae'")


def test_truncated_weights(copy):
    weights = next((copy / "unet").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-100])
    refused(copy, "unet/diffusion_pytorch_model.safetensors is damaged")


def rewritten(folder, part, change):
    file = next((folder / part).glob("*.safetensors"))
    weights = load_file(file)
    change(weights)
    save_file(weights, file, {"format": "pt"})


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_weights_that_lack_some(copy, part):
    rewritten(copy, part, lambda weights: [weights.pop(k) for k in sorted(weights)[:3]])
    refused(copy, f"pipeline/{part} lacks 3 of the weights its config has .*: restore the folder")
    if part == "unet":
        with pytest.raises(ValueError, match="unet lacks 3 of the weights its config has"):
            load_network(copy)


def test_a_network_with_weights_that_its_config_has_not(copy):
    rewritten(copy, "unet", lambda weights: weights.update({"more.weight": torch.zeros(3)}))
    with pytest.raises(ValueError, match=r"unet has weights that its config has not \(more\.weight"):
        load_network(copy)


@pytest.mark.parametrize("name", ["sd2", "pixart", "sana"])
def test_a_tokenizer_without_its_vocabulary(mini, tmp_path, name):
    """It would load, and take all prompts for the same."""
    mini(name).pipeline.save_pretrained(tmp_path)
    load(tmp_path)
    (tmp_path / "tokenizer/tokenizer.json").unlink()
    refused(tmp_path, "tokenizer cannot tell prompts apart, .*: restore the folder")


def test_a_network_of_another_backbone(folder, mini):
    load_network(folder, mini("sd2"))
    with pytest.raises(ValueError, match="is a StableDiffusionPipeline: its network is none of 'pixart'; make it anew"):
        load_network(folder, mini("pixart"))


def test_a_text_encoder_that_overflows_is_named(mini, tmp_path):
    """Gemma-2 does in fp16; a loss that is NaN would be blamed on its rate."""
    backbone = build("sana")
    with torch.no_grad():
        backbone.pipeline.text_encoder.embed_tokens.weight[:] = torch.inf
    keep(backbone, tmp_path, "cpu")
    fix = r"sana gives values that are not finite in torch\.float32: set backbones\.sana\.dtype to bfloat16"
    with pytest.raises(ValueError, match=fix):
        backbone.encode(["a red circle"])
    assert not list(tmp_path.iterdir())


def test_pickled_weights_are_not_read(copy):
    weights = next((copy / "unet").glob("*.safetensors"))
    weights.rename(weights.with_name("diffusion_pytorch_model.bin"))
    refused(copy, "unet has no safetensors weights")


def test_another_class(copy):
    data = params.load().model_dump()
    data["backbones"]["pixart"]["path"] = str(copy)
    refused("pixart", "is a StableDiffusionPipeline: backbone 'pixart' needs a PixArtAlphaPipeline",
            params.validate(data))
    index = json.loads((copy / "model_index.json").read_text())
    (copy / "model_index.json").write_text(json.dumps(index | {"_class_name": "FluxPipeline"}))
    refused(copy, "is a FluxPipeline: there are backbones for")


@pytest.mark.parametrize("table", ["BACKBONES", "MINIATURES"])
def test_a_backbone_that_is_not_registered_is_named(table, tmp_path, monkeypatch):
    """Its file is there, so params.yaml may name it."""
    monkeypatch.delitem(getattr(backbones, table), "sana")
    said = rf"^backbone 'sana' is not in {table}: add it there, in gad/backbones/__init__\.py$"
    if table == "BACKBONES":
        refused("sana", said, params.load())
    with pytest.raises(ValueError, match=said):
        teachers.pretrain("sana", None, tmp_path, tmp_path, {}, 0)


# Checkpoints of others


@pytest.mark.parametrize("name", ["sd2", "sana"])
def test_lora_is_in_the_copys_weights_and_not_in_the_backbones(mini, name, tmp_path, prompts, z):
    """Saved by the pipeline's own writer from an adapter; the copy gives what the adapter does."""
    backbone = mini(name)
    kept = {k: v.clone() for k, v in backbone.network.state_dict().items()}
    adapted = copies.deepcopy(backbone.network)
    adapted.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=["to_q", "to_v"]))
    perturb(torch.nn.ParameterList([p for n, p in adapted.named_parameters() if "lora" in n]), 0.1)
    type(backbone.pipeline).save_lora_weights(
        tmp_path, **{f"{backbone.part}_lora_layers": get_peft_model_state_dict(adapted)},
    )
    network = with_lora(backbone, str(tmp_path))
    cond, t = backbone.encode(prompts), torch.full((2,), 0.5)
    with torch.no_grad():
        ours, theirs, plain = (backbone.x0(m, z, t, cond) for m in (network, adapted, backbone.network))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert (ours - plain).abs().max() > 1e-2
    assert all(torch.equal(v, kept[k]) for k, v in backbone.network.state_dict().items())
    assert network.state_dict().keys() == kept.keys()  # a plain network: no adapter is left


def test_what_is_no_lora_is_named(mini, tmp_path):
    (tmp_path / "pytorch_lora_weights.bin").write_bytes(b"a pickle")
    for name, said in (("sd2", "cannot be loaded as a LoRA of sd2"), ("pixart", "takes no LoRA")):
        with pytest.raises(ValueError, match=said) as error:
            with_lora(mini(name), str(tmp_path))
        assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)
    assert isinstance(mini("sd2").network, type(mini("sd2").pipeline.unet))


def published(tmp_path, monkeypatch, mini, backbone="sd2", **entry):
    """Parameters with one published row of a backbone, whose teacher is the miniature; its students go to tmp_path."""
    monkeypatch.setattr(paths, "DATA", tmp_path / "data")
    mini(backbone).pipeline.save_pretrained(paths.teacher(backbone))
    data = params.load().model_dump()
    data["published"] = {f"{backbone}-own-base-0": {"backbone": backbone, "paradigm": "own", **entry}}
    return params.validate(data)


def test_a_published_pipeline_becomes_a_student(mini, tmp_path, monkeypatch):
    theirs = build("sd2")
    perturb(theirs.network, seed=5)
    theirs.pipeline.save_pretrained(tmp_path / "theirs")
    p = published(tmp_path, monkeypatch, mini, path=str(tmp_path / "theirs"))
    run = Run("sd2", "own", "base", 0)
    assert run in p.runs()
    stages.publish(run, p)
    student = load(paths.student(run))
    assert all(torch.equal(a, b) for a, b in zip(
        student.network.parameters(), theirs.network.parameters(), strict=True))
    info = json.loads((paths.student(run) / "gad.json").read_text())
    assert info["gad"] is None and info["training"]["published"]["path"] == str(tmp_path / "theirs")
    assert "Published" in (paths.student(run) / "README.md").read_text()


def test_a_published_pipeline_may_have_files_of_a_variant_alone(mini, tmp_path, monkeypatch):
    theirs = build("sd2")
    theirs.pipeline.to(torch.float16).save_pretrained(tmp_path / "theirs", variant="fp16")
    p = published(tmp_path, monkeypatch, mini, path=str(tmp_path / "theirs"), variant="fp16")
    stages.publish(run := Run("sd2", "own", "base", 0), p)
    found = load_network(paths.student(run)).state_dict()
    assert all(w.dtype == torch.float32 and torch.equal(w, theirs.network.state_dict()[k].float())
               for k, w in found.items())


def test_a_published_pipeline_of_one_step_is_sampled_in_one(mini, tmp_path, monkeypatch):
    build("sd2").pipeline.save_pretrained(tmp_path / "theirs")
    p = published(tmp_path, monkeypatch, mini, path=str(tmp_path / "theirs"), steps=1)
    run, own = Run("sd2", "own", "base", 0), Run("sd2", "tdm", "base", 0)
    stages.publish(run, p)
    assert (p.student_steps(run), p.student_steps(own)) == (1, p.backbones["sd2"].student_steps)
    info = json.loads((paths.student(run) / "gad.json").read_text())
    assert info["steps"] == 1 and "in 1 step." in (paths.student(run) / "README.md").read_text()


def test_what_is_not_published_is_named(mini, tmp_path, monkeypatch):
    p = published(tmp_path, monkeypatch, mini, path=str(tmp_path / "theirs"))
    with pytest.raises(ValueError, match="published has no sd2-tdm-base-0: it has sd2-own-base-0"):
        stages.publish(Run("sd2", "tdm", "base", 0), p)


def test_a_full_size_student_names_its_source_and_no_licence(mini, tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "DATA", tmp_path / "data")
    data = params.load().model_dump()
    data["backbones"]["sana"] |= {"world": "coco", "path": "someone/something"}
    run, backbone = Run("sana", "tdm", "base", 0), mini("sana")
    for p, terms in ((params.load(), "license: mit"), (params.validate(data), "base_model: someone/something")):
        save_student(run, p, backbone, copies.deepcopy(backbone.network), tmp_path / "student")
        card = (tmp_path / "student/README.md").read_text()
        assert terms in card.split("---")[1] and ("license" in card) == ("height=64" in card) == ("mit" in terms)


@pytest.mark.parametrize("name", ["sd2", "pixart", "sana"])
def test_a_card_draws_where_parts_are_in_half_precision(folder, mini, tmp_path, monkeypatch, name):
    """By the lines that it gives, the student's network being in fp32."""
    mini(name).pipeline.save_pretrained(tmp_path / "teacher")
    data = params.load().model_dump()
    data["backbones"][name] |= {"path": str(tmp_path / "teacher"), "dtype": "bfloat16"}
    p, run = params.validate(data), Run(name, "tdm", "base", 0)
    backbone = load(name, p)
    save_student(run, p, backbone, copies.deepcopy(backbone.network), tmp_path / str(run))
    monkeypatch.chdir(tmp_path)
    card, drawn = (tmp_path / str(run) / "README.md").read_text(), {}
    exec(card.split("```python")[1].split("```")[0], drawn)
    assert drawn["image"].size == (64, 64) and drawn["pipe"].dtype == torch.bfloat16


def test_a_published_pipeline_of_another_prediction_is_refused(mini, tmp_path, monkeypatch):
    scheduler = DDIMScheduler(prediction_type="v_prediction", beta_schedule="scaled_linear", beta_end=0.012)
    build("sd2", scheduler=scheduler).pipeline.save_pretrained(tmp_path / "theirs")
    p = published(tmp_path, monkeypatch, mini, path=str(tmp_path / "theirs"))
    with pytest.raises(ValueError, match=r"published\.sd2-own-base-0: prediction of .*theirs is v, not epsilon"):
        stages.publish(Run("sd2", "own", "base", 0), p)
