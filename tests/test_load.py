"""gad.backbones.load: good folders load; every bad one is one line that names the path and the fix."""

import json
import shutil

import pytest
import torch

from gad import params
from gad.backbones import load


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


def test_missing_folder(tmp_path):
    refused(tmp_path / "none", "none is not there: run `dvc pull`")


def test_hub_id_while_offline():
    refused("someone/something", "someone/something is not there")


def test_not_a_pipeline(tmp_path):
    refused(tmp_path, "has no model_index.json")


def test_index_that_is_not_json(copy):
    (copy / "model_index.json").write_text("{")
    refused(copy, "model_index.json is not JSON")


def test_missing_part(copy):
    shutil.rmtree(copy / "vae")
    refused(copy, "lacks its part 'vae'")


def test_truncated_weights(copy):
    weights = next((copy / "unet").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-100])
    refused(copy, "unet/diffusion_pytorch_model.safetensors is damaged")


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
