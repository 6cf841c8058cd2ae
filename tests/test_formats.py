"""Pipelines in the formats of real checkpoints that the miniatures do not have."""

import pytest
import torch
from conftest import build, perturb
from diffusers import PixArtTransformer2DModel
from transformers import Gemma2Config, Gemma2Model

from gad.evaluation.layout import phrase_tokens


def pixart():
    """PixArt-α of 1024 pixels: told the image's size, of which its `sample_size` is the sign."""
    torch.manual_seed(0)
    network = PixArtTransformer2DModel(
        sample_size=128, num_layers=1, num_attention_heads=2, attention_head_dim=12, cross_attention_dim=24,
        caption_channels=96, in_channels=4, out_channels=8, patch_size=8, interpolation_scale=2,
    )
    assert network.use_additional_conditions
    return build("pixart", transformer=network)


def sana():
    """SANA with a text encoder that has room for the instruction before a prompt."""
    torch.manual_seed(0)
    small = build("sana").pipeline.text_encoder.config.to_dict() | {"max_position_embeddings": 4096}
    return build("sana", text_encoder=perturb(Gemma2Model(Gemma2Config(**small)), 0.02))


@torch.no_grad()
def test_pixart_that_is_told_the_size(prompts):
    backbone = pixart()
    z = backbone.noise(2, 0)
    assert z.shape == (2, 4, 128, 128)
    ours = backbone.sample(backbone.network, z, backbone.encode(prompts), 2, 2.0)
    theirs = backbone.pipeline(
        prompts, latents=z, num_inference_steps=2, guidance_scale=2.0, output_type="latent",
        use_resolution_binning=False, height=512, width=512,
    ).images
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    # It does listen.
    network = backbone.network
    network.adaln_single.emb.resolution_embedder.linear_2.bias.add_(1.0)
    assert (backbone.sample(network, z, backbone.encode(prompts), 2, 2.0) - ours).abs().max() > 1e-3


@torch.no_grad()
def test_sana_that_is_given_an_instruction(prompts):
    backbone = sana()
    assert "Enhanced prompt" in backbone.instruction and backbone.skipped > 100
    assert build("sana").instruction == ""
    z = backbone.noise(2, 0)
    ours = backbone.sample(backbone.network, z, backbone.encode(prompts), 2, 2.0)
    backbone.pipeline.scheduler = backbone.scheduler(2)
    theirs = backbone.pipeline(
        prompts, latents=z, num_inference_steps=2, guidance_scale=2.0, output_type="latent",
        use_resolution_binning=False, height=64, width=64,
    ).images
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_the_empty_prompt_has_no_instruction_in_whatever_company(prompts):
    backbone = sana()
    mixed = backbone.encode([prompts[0], "", prompts[1]])
    for k, alone in enumerate((prompts[0], "", prompts[1])):
        one = backbone.encode([alone])
        torch.testing.assert_close(mixed[[k]].embeds, one.embeds, atol=1e-5, rtol=1e-5)
        assert torch.equal(mixed[[k]].mask, one.mask)
    assert mixed.mask[1].sum() < 3 < mixed.mask[2].sum()


@torch.no_grad()
@pytest.mark.parametrize("phrase", ["red circle", "green square", "yellow triangle"])
def test_phrases_are_found_behind_an_instruction(prompts, phrase):
    """The embeddings of a phrase's tokens, and of no word before it, change with the phrase."""
    backbone = sana()
    (places,) = phrase_tokens(backbone, prompts[0], [phrase])
    colour, shape = phrase.split()
    changed = prompts[0].replace(phrase, f"{'blue' if colour != 'blue' else 'red'} {shape}")
    a, b = backbone.encode([prompts[0]]), backbone.encode([changed])
    moved = (a.embeds - b.embeds).abs().sum(-1)[0] * a.mask[0]
    assert moved[:places[0]].max() < 1e-5 < moved[places[0]]
