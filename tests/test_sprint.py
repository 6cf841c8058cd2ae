"""SANA-Sprint's checkpoints: another pipeline's folder, whose network is a student of the SANA backbone."""

import json

import pytest
import torch
from conftest import build, perturb
from diffusers import DiffusionPipeline, SanaSprintPipeline, SanaTransformer2DModel, SCMScheduler
from test_load import published

from gad import geometry, paths, stages
from gad.backbones import load, load_network
from gad.distill import save_student
from gad.params import Run
from gad.params import load as load_params

SMALL = {"height": 64, "width": 64, "use_resolution_binning": False, "complex_human_instruction": None}


def sprint_of(made):
    """As it is published, with the parts of a SANA backbone: guidance embedded, queries and keys normed."""
    config = {k: v for k, v in made.network.config.items() if not k.startswith("_")} | {
        "guidance_embeds": True, "guidance_embeds_scale": 0.1, "qk_norm": "rms_norm_across_heads",
        "timestep_scale": 3.0,  # what its pipeline never reads
    }
    torch.manual_seed(0)
    network = SanaTransformer2DModel.from_config(config)
    perturb(network, seed=5)
    return SanaSprintPipeline(**made.pipeline.components | {"transformer": network, "scheduler": SCMScheduler()})


@pytest.fixture(scope="module")
def sprint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sprint") / "theirs"
    sprint_of(build("sana")).save_pretrained(folder)
    return folder


@torch.no_grad()
def test_a_step_is_its_own_pipelines(sprint, prompts, z):
    """From noise in one; and from a state on the way, in TrigFlow's terms there and a flow's here."""
    ours, theirs = load(sprint), DiffusionPipeline.from_pretrained(sprint)
    theirs.set_progress_bar_config(disable=True)
    cond = ours.encode(prompts)
    one = theirs(prompts, latents=z.clone(), num_inference_steps=1, intermediate_timesteps=None, output_type="latent",
                 **SMALL).images
    torch.testing.assert_close(ours.sample(ours.network, z, cond, 1), one, rtol=1e-4, atol=1e-4)
    angle = torch.tensor(1.1)
    t = (angle.sin() / (angle.sin() + angle.cos())).double().expand(len(z))
    there = theirs(prompts, latents=z.clone(), num_inference_steps=1, max_timesteps=angle.item(),
                   intermediate_timesteps=None, output_type="latent", **SMALL).images
    here = ours.x0(ours.network, z / (angle.sin() + angle.cos()), t, cond)
    torch.testing.assert_close(here, there, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(one, there, atol=1e-2)


def test_it_becomes_a_student_that_its_own_pipeline_draws(sprint, mini, tmp_path, monkeypatch, prompts, z):
    p = published(tmp_path, monkeypatch, mini, "sana", path=str(sprint), steps=1)
    run = Run("sana", "own", "base", 0)
    stages.publish(run, p)
    folder, backbone = paths.student(run), mini("sana")
    pipeline = DiffusionPipeline.from_pretrained(folder)
    assert isinstance(pipeline, SanaSprintPipeline)
    pipeline.set_progress_bar_config(disable=True)
    card, info = (folder / "README.md").read_text(), json.loads((folder / "gad.json").read_text())
    call = "num_inference_steps=1, guidance_scale=4.5, intermediate_timesteps=None"
    assert call in card and "function of the prompt" in card and info["guidance_scale"] == 4.5
    network = load_network(folder)
    with torch.no_grad():
        drawn = backbone.decode(backbone.sample(network, z, backbone.encode(prompts), 1))
        images = pipeline(prompts, latents=z.clone(), num_inference_steps=1, intermediate_timesteps=None,
                          output_type="pt", **SMALL).images
    torch.testing.assert_close(drawn, images, rtol=1e-3, atol=1e-3)


def test_saving_it_leaves_the_backbone_as_it_was(sprint, tmp_path):
    backbone = build("sana")
    network, pipeline, scheduler = backbone.network, backbone.pipeline, backbone.pipeline.scheduler
    save_student(Run("sana", "tdm", "base", 0), load_params(), backbone, load_network(sprint), tmp_path / "student")
    assert type(backbone.pipeline.transformer) is type(network) and not backbone.network.config.guidance_embeds
    assert backbone.network is network and backbone.pipeline is pipeline and pipeline.scheduler is scheduler
    assert isinstance(DiffusionPipeline.from_pretrained(tmp_path / "student"), SanaSprintPipeline)


def test_of_several_steps_its_card_says_what_differs(sprint, mini, tmp_path, monkeypatch):
    p = published(tmp_path, monkeypatch, mini, "sana", path=str(sprint), steps=2)
    run = Run("sana", "own", "base", 0)
    stages.publish(run, p)
    card = (paths.student(run) / "README.md").read_text()
    assert "num_inference_steps=2, guidance_scale=4.5" in card and "draws new noises" in card


def test_its_tangents_are_exact(sprint, z, prompts):
    """What Table 1 takes of a student: through normed queries and keys too."""
    ours = load(sprint)
    cond, v = ours.encode(prompts), ours.noise(len(z), 3)
    with torch.no_grad():
        _, exact = geometry.jvp(lambda x: ours.sample(ours.network, x, cond, 2), z, v)
        near = geometry.response(lambda x: ours.sample(ours.network, x, cond, 2), z, v, 1e-3, "central")
    assert torch.cosine_similarity(exact.flatten(), near.flatten(), 0) > 0.999


def test_it_is_no_teacher(sprint, mini, tmp_path, monkeypatch):
    p = published(tmp_path, monkeypatch, mini, "sana", path=str(sprint))
    data = p.backbones["sana"].model_copy(update={"path": str(sprint)})
    p = p.model_copy(update={"backbones": {**p.backbones, "sana": data}})
    with pytest.raises(ValueError, match="is a SanaSprintPipeline: backbone 'sana' needs a SanaPipeline"):
        load("sana", p)
