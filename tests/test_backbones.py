"""The contract every backbone keeps, checked on miniature pipelines of the real classes."""

import copy
import inspect
import math

import numpy as np
import pytest
import torch
from conftest import build, perturb
from diffusers import DDIMScheduler, DiffusionPipeline, DPMSolverMultistepScheduler, LCMScheduler, PNDMScheduler
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from diffusers.models.transformers.sana_transformer import SanaAttnProcessor2_0

from gad.backbones import BACKBONES, Condition
from gad.backbones.base import _Capture
from gad.world import scenes


def said(backbone):
    """The arguments that a student's card gives its pipeline."""
    return eval(f"dict({backbone.call_hint.lstrip(', ')})")


@pytest.fixture
def cond(backbone, prompts):
    return backbone.encode(prompts)


def call(backbone, prompts, z, steps, cfg, output_type="latent", **change):
    """The pipeline's own answer."""
    pipeline = backbone.pipeline
    kept, pipeline.scheduler = pipeline.scheduler, backbone.scheduler(steps)
    general = {"clean_caption": False, "max_sequence_length": 24}  # the tokenizers end at 24
    takes = inspect.signature(pipeline.__call__).parameters
    arguments = said(backbone) | {k: v for k, v in general.items() if k in takes} | change
    try:
        return pipeline(
            prompts,
            num_inference_steps=steps,
            guidance_scale=cfg,
            latents=z.clone(),
            output_type=output_type,
            **{k: v for k, v in arguments.items() if v != "default"},
        ).images
    finally:
        pipeline.scheduler = kept


def assert_same(ours, expected, tolerance=1e-4):
    """Within `tolerance` of the largest value: random networks at t = 1 give latents in the hundreds."""
    assert ours.shape == expected.shape
    assert torch.isfinite(ours).all()
    assert (ours - expected).abs().max() <= tolerance * max(1.0, expected.abs().max().item())


# Sampling


@pytest.mark.parametrize("cfg", [1.0, 3.0])
@pytest.mark.parametrize("steps", [1, 4, 20])
@torch.no_grad()
def test_sample_is_the_pipelines(backbone, cond, prompts, z, steps, cfg):
    ours = backbone.sample(backbone.network, z, cond, steps, cfg)
    assert_same(ours, call(backbone, prompts, z, steps, cfg))


@pytest.mark.parametrize("steps", [3, 7])
@torch.no_grad()
def test_sample_is_the_pipelines_at_steps_that_do_not_divide(backbone, cond, prompts, z, steps):
    if not backbone.levels.flow:  # DDIM's own step then misses its next time
        with pytest.raises(ValueError, match=f"steps={steps} must divide 1000"):
            backbone.sample(backbone.network, z, cond, steps, 3.0)
        return
    ours = backbone.sample(backbone.network, z, cond, steps, 3.0)
    assert_same(ours, call(backbone, prompts, z, steps, 3.0))


@pytest.mark.parametrize("name", ["pixart", "sana"])
@torch.no_grad()
def test_padding_to_the_pipelines_default_length_changes_nothing(mini, name, prompts, z):
    backbone = mini(name)
    ours = backbone.sample(backbone.network, z, backbone.encode(prompts), 4, 3.0)
    assert_same(ours, call(backbone, prompts, z, 4, 3.0, max_sequence_length="default"))


@torch.no_grad()
def test_sample_of_a_v_prediction_model(prompts, z):
    scheduler = DDIMScheduler(prediction_type="v_prediction", beta_schedule="scaled_linear", beta_end=0.012)
    backbone = build("sd2", scheduler=scheduler)
    assert backbone.prediction == "v"
    ours = backbone.sample(backbone.network, z, backbone.encode(prompts), 4, 3.0)
    assert_same(ours, call(backbone, prompts, z, 4, 3.0))


@pytest.mark.parametrize(
    ("name", "scheduler"),
    [
        ("sd2", lambda: PNDMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)),
        ("pixart", lambda: DPMSolverMultistepScheduler(beta_start=0.0001, beta_end=0.02)),
        ("pixart", lambda: LCMScheduler(beta_start=0.0001, beta_end=0.02, beta_schedule="linear")),
        (
            "sana",
            lambda: DPMSolverMultistepScheduler(
                prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
            ),
        ),
    ],
    ids=["sd2", "pixart", "pixart-lcm", "sana"],
)
def test_the_schedulers_on_the_hub_give_the_same_levels(mini, name, scheduler):
    """The published pipelines come with other samplers of the same noise levels."""
    ours, theirs = mini(name), build(name, scheduler=scheduler())
    assert ours.prediction == theirs.prediction
    t = torch.linspace(0, 1, 11)
    for a, b in zip(ours.levels.alpha_sigma(t), theirs.levels.alpha_sigma(t), strict=True):
        torch.testing.assert_close(a, b)
    for steps in (1, 4, 20):
        torch.testing.assert_close(ours.times(steps), theirs.times(steps))


@torch.no_grad()
def test_hybrid_sample_takes_its_first_step_by_another_network(backbone, cond, z):
    """Its own network first changes nothing; with another, its first state is that network's."""
    network = backbone.network
    plain = backbone.sample(network, z, cond, 4, 2.0, return_trajectory=True)
    assert torch.equal(backbone.sample(network, z, cond, 4, 2.0, first=(network, 2.0)), plain[-1])
    other = perturb(copy.deepcopy(network))
    mixed = backbone.sample(other, z, cond, 4, return_trajectory=True, first=(network, 2.0))
    assert torch.equal(mixed[1], plain[1])
    times, one = backbone.times(4), torch.ones(len(z), dtype=torch.float64)
    second = backbone.step(other, plain[1], times[1] * one, times[2] * one, cond)
    assert torch.equal(mixed[2], second) and not torch.allclose(second, plain[2])


def test_sample_is_a_function_of_the_noise_alone(backbone, cond, z):
    torch.manual_seed(1)
    first = backbone.sample(backbone.network, z, cond, 4, 3.0)
    torch.manual_seed(2)
    states = backbone.sample(backbone.network, z, cond, 4, 3.0, return_trajectory=True)
    assert states.shape == (5, *z.shape)
    assert torch.equal(states[0], z) and torch.equal(states[-1], first)
    # One by one, as in a batch; and another noise gives another answer.
    for i in range(2):
        assert_same(backbone.sample(backbone.network, z[i : i + 1], cond[i], 4, 3.0), first[i : i + 1])
    assert (backbone.sample(backbone.network, z.flip(0), cond, 4, 3.0) - first).abs().mean() > 0.1


@torch.no_grad()
def test_path_meets_the_samplers_states(backbone, cond, z):
    network, levels = backbone.network, backbone.levels
    own = backbone.times(4)
    states = backbone.sample(network, z, cond, 4, 3.0, return_trajectory=True)
    assert_same(backbone.path(network, z, cond, 4, 3.0, own).transpose(0, 1), states)
    between = (own[1] + own[2]) / 2
    found = backbone.path(network, z, cond, 4, 3.0, torch.stack([own[0], between, own[-1]]))
    one = torch.ones(2, dtype=torch.float64)
    x0, eps = backbone.both(network, states[1], own[1] * one, cond, 3.0)
    assert_same(found[:, 1], levels.step(x0, eps, between * one))
    assert_same(found[:, 2], states[-1])


def test_times_fall_from_one(backbone):
    for steps in (1, 4, 20):
        times = backbone.times(steps)
        assert times.shape == (steps + 1,) and times.dtype == torch.float64
        assert times[0] == 1 and (times.diff() < 0).all() and times[-2] > 0 >= times[-1]


def test_the_last_step_of_a_flow_begins_where_trailing_times_would(mini):
    assert mini("sana").times(4)[-2].item() == pytest.approx(3 * 0.25 / (1 + 2 * 0.25), abs=1e-5)


@torch.no_grad()
def test_a_saved_pipeline_is_loaded_with_the_same_bits(backbone, prompts, z, tmp_path):
    backbone.pipeline.save_pretrained(tmp_path)
    pipeline = DiffusionPipeline.from_pretrained(tmp_path)
    assert type(pipeline) is type(backbone.pipeline) is backbone.pipeline_class
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline.tokenizer.model_max_length == backbone.pipeline.tokenizer.model_max_length
    loaded = BACKBONES[backbone.name](pipeline, backbone.name)
    ours, theirs = (call(b, prompts, z, 4, 3.0, output_type="pt") for b in (backbone, loaded))
    assert ours.shape == (2, 3, 64, 64)
    assert torch.equal(ours, theirs)
    # As a person would: nothing set but what its card says.
    images = DiffusionPipeline.from_pretrained(tmp_path)(prompts, num_inference_steps=2, **said(backbone)).images
    assert len(images) == 2 and images[0].size == (64, 64)


# Conditions


@torch.no_grad()
def test_encode_is_batched(backbone, prompts, cond):
    many = [*prompts, prompts[0], ""]
    batched = backbone.encode(many, batch=2)
    assert len(batched) == 4 and batched.embeds.shape[:2] == batched.mask.shape
    assert torch.equal(batched.embeds[0], batched.embeds[2])
    for i, prompt in enumerate(many):
        one = backbone.encode([prompt])
        torch.testing.assert_close(batched[i].embeds, one.embeds, rtol=1e-4, atol=1e-5)
        assert torch.equal(batched[i].mask, one.mask)
    assert (cond.embeds[0] - cond.embeds[1]).abs().max() > 0.1
    torch.testing.assert_close(backbone.null.embeds, batched[3].embeds, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "index",
    [1, -1, np.int64(1), torch.tensor(1), slice(1, 2), [1], torch.tensor([1]), torch.tensor([False, True])],
    ids=repr,
)
def test_one_condition_is_a_batch_of_one(index):
    cond = Condition(torch.randn(2, 3, 4), torch.tensor([[1, 1, 0], [1, 0, 0]]))
    part = cond[index]
    assert torch.equal(part.embeds, cond.embeds[1:]) and torch.equal(part.mask, cond.mask[1:])


def test_conditions_are_handled_like_tensors(cond):
    assert torch.equal(cond[[1, 0]].embeds, cond.embeds.flip(0))
    assert torch.equal(Condition.cat([cond[0], cond[1]]).embeds, cond.embeds)
    assert torch.equal(cond[1].expand(3).embeds, cond.embeds[[1, 1, 1]])
    half = cond.to(torch.float16)
    assert half.embeds.dtype == torch.float16 and torch.equal(half.mask, cond.mask)


def test_conditions_are_saved(cond, tmp_path):
    for c in (cond, cond[0].expand(3), cond[[1, 0]]):
        c.save(tmp_path / "c.safetensors")
        back = Condition.load(tmp_path / "c.safetensors")
        assert torch.equal(back.embeds, c.embeds) and torch.equal(back.mask, c.mask)
        assert back.mask.dtype == c.mask.dtype


# The network


@torch.no_grad()
def test_guidance(backbone, cond, z):
    t = torch.tensor([0.3, 0.8])
    timestep = backbone.levels.timestep(t)
    text = backbone.raw(backbone.network, z, timestep, cond)
    uncond = backbone.raw(backbone.network, z, timestep, backbone.null.expand(2))
    assert (text - uncond).abs().max() > 0.01
    assert_same(backbone.output(backbone.network, z, t, cond, 3.0), uncond + 3 * (text - uncond), 1e-5)
    assert torch.equal(backbone.output(backbone.network, z, t, cond), text)
    # The empty prompt is padded to a condition cut or encoded at another length.
    longer = Condition(*(torch.cat([a, torch.zeros_like(a)], 1) for a in (cond.embeds, cond.mask)))
    padded = backbone.output(backbone.network, z, t, longer, 3.0)
    if backbone.name != "sd2":  # which takes no mask
        assert_same(padded, uncond + 3 * (text - uncond), 1e-5)


@torch.no_grad()
def test_guidance_under_autocast_is_in_fp32(backbone, cond, z, monkeypatch):
    answers, raw = [], backbone.raw
    monkeypatch.setattr(backbone, "raw", lambda *a: answers.append(raw(*a)) or answers[-1])
    with torch.autocast("cpu", torch.bfloat16):
        guided = backbone.output(backbone.network, z, torch.tensor([0.3, 0.8]), cond, 4.5)
    assert answers[0].dtype == torch.bfloat16 and guided.dtype == torch.float32
    uncond, text = answers[0].float().chunk(2)
    assert torch.equal(guided, uncond + 4.5 * (text - uncond))


@torch.no_grad()
def test_conversions_agree_with_the_levels(backbone, cond, z):
    network, t = backbone.network, torch.tensor([0.3, 0.8])
    x0, eps = backbone.both(network, z, t, cond, 3.0)
    assert torch.equal(x0, backbone.x0(network, z, t, cond, 3.0))
    assert torch.equal(eps, backbone.eps(network, z, t, cond, 3.0))
    assert_same(backbone.add_noise(x0, eps, t), z, 1e-5)
    same = torch.full((2,), 0.3, dtype=torch.float64)
    torch.testing.assert_close(backbone.x0(network, z, 0.3, cond), backbone.x0(network, z, same, cond))
    half = copy.deepcopy(network).to(torch.bfloat16)
    assert backbone.x0(half, z, t, cond).dtype == torch.float32


@torch.no_grad()
def test_learned_sigma_is_cut(mini, prompts, z):
    backbone = mini("pixart")
    network, cond = backbone.network, backbone.encode(prompts)
    assert network.config.out_channels == 2 * network.config.in_channels
    full = network(
        z,
        encoder_hidden_states=cond.embeds,
        encoder_attention_mask=cond.mask,
        timestep=torch.full((2,), 500.0),
        added_cond_kwargs={"resolution": None, "aspect_ratio": None},
    ).sample
    ours = backbone.raw(network, z, torch.full((2,), 500.0), cond)
    assert full.shape[1] == 8 and torch.equal(ours, full[:, :4])


@torch.no_grad()
def test_images_and_latents(backbone):
    z = 3 * torch.randn(3, *backbone.latent_shape, generator=torch.Generator().manual_seed(0))
    images = backbone.decode(z, batch=2)
    assert images.shape == (3, 3, 64, 64) and images.dtype == torch.float32
    assert images.min() >= 0 and images.max() <= 1 and images.std() > 0.01
    latents = backbone.encode_images(images, batch=2)
    assert latents.shape == z.shape
    vae = backbone.pipeline.vae
    torch.testing.assert_close(latents[:1], backbone.encode_images(images[:1]), rtol=1e-4, atol=1e-5)
    kept = vae.config.scaling_factor
    try:
        vae.register_to_config(scaling_factor=2 * kept)
        torch.testing.assert_close(backbone.encode_images(images), 2 * latents)
        torch.testing.assert_close(backbone.decode(2 * z), images)
    finally:
        vae.register_to_config(scaling_factor=kept)


def test_features(backbone, cond, z):
    x = z.clone().requires_grad_()
    features = backbone.features(backbone.network, x, torch.tensor([0.3, 0.8]), cond)
    assert len(features) == 3
    assert all(torch.isfinite(f).all() and len(f) == 2 and f.std() > 0 for f in features)
    assert not torch.equal(*[f.flatten(1)[:, :64] for f in features[:2]])
    for f in features:
        assert torch.autograd.grad(f.square().mean(), x, retain_graph=True)[0].abs().max() > 0
    with pytest.raises(Exception):  # noqa: B017 - whatever the network says of a wrong input
        backbone.features(backbone.network, z[:, :2], 0.3, cond)
    assert not any(m._forward_hooks for m in backbone.network.modules())


@torch.no_grad()
@pytest.mark.parametrize("name, names", [
    ("sd2", ("down_blocks.1", "mid_block", "up_blocks.0")),
    *((name, [f"transformer_blocks.{k}" for k in (1, 2, 3)]) for name in ("pixart", "sana")),  # of five
])
def test_features_are_of_blocks_at_each_quarter(mini, prompts, name, names):
    backbone, outputs = mini(name), []
    cond, z = backbone.encode(prompts), backbone.noise(len(prompts), 0)

    def keep(module, inputs, output):
        outputs.append(output[0] if isinstance(output, tuple) else output)

    hooks = [backbone.network.get_submodule(name).register_forward_hook(keep) for name in names]
    after = backbone.blocks(backbone.network)[-1]  # of which they know nothing
    hooks.append(after.register_forward_pre_hook(lambda *_: pytest.fail("the network went on")))
    try:
        features = backbone.features(backbone.network, z, torch.full((len(z),), 0.3), cond)
    finally:
        for hook in hooks:
            hook.remove()
    assert len(features) == len(outputs) == 3 and all(map(torch.equal, features, outputs))


def test_attention_maps(backbone, cond, z):
    network, t = backbone.network, torch.tensor([0.3, 0.8])
    modules = backbone.cross_attentions(network)
    before = [m.processor for m in modules]
    x = z.clone().requires_grad_()
    length = cond.embeds.shape[1]
    every = backbone.attention(network, x, t, cond, [list(range(length))] * 2)
    assert len(every) == len(modules) > 0
    for probabilities in every:
        assert probabilities.shape[:2] == (2, length)
        assert math.isqrt(probabilities.shape[2]) ** 2 == probabilities.shape[2]
        total = probabilities.sum(1)
        torch.testing.assert_close(total, torch.ones_like(total))
        assert probabilities[(cond.mask == 0)].abs().sum() == 0
        assert torch.autograd.grad(probabilities.square().sum(), x, retain_graph=True)[0].abs().max() > 0
    # The tokens asked for, in their order and each sample its own.
    some = backbone.attention(network, z, t, cond, [[2, 1], [3, 0]])
    for probabilities, all_of_them in zip(some, every, strict=True):
        torch.testing.assert_close(probabilities[0], all_of_them[0, [2, 1]])
        torch.testing.assert_close(probabilities[1], all_of_them[1, [3, 0]])
    with pytest.raises(Exception):  # noqa: B017
        backbone.attention(network, z, t, cond, [[length], [length]])
    assert all(m.processor is p for m, p in zip(modules, before, strict=True))


def test_sd2_is_guided_where_its_guidance_was_published():
    backbone = build("sd2")
    network = backbone.network
    names = {id(m): n for n, m in network.named_modules()}
    found = [names[id(m)] for m in backbone.cross_attentions(network)]
    assert found == [f"{block}.attentions.{k}.transformer_blocks.0.attn2" for block, k in
                     (("mid_block", 0), ("up_blocks.0", 0), ("up_blocks.0", 1))]


@torch.no_grad()
def test_capturing_attention_changes_nothing(backbone, cond, z):
    t, seen = torch.tensor([0.3, 0.8]), []
    hook = backbone.network.register_forward_hook(lambda m, i, o: seen.append(o[0]))
    try:
        backbone.output(backbone.network, z, t, cond)
        backbone.attention(backbone.network, z, t, cond, [[0], [0]])
    finally:
        hook.remove()
    assert_same(seen[1], seen[0], 1e-5)


@torch.no_grad()
@pytest.mark.parametrize("norm, processor", [
    ("rms_norm_across_heads", SanaAttnProcessor2_0()), ("layer_norm", AttnProcessor2_0()), (None, AttnProcessor2_0()),
])
def test_captured_attention_is_of_normed_queries_and_keys(norm, processor):
    """Some checkpoints of SANA's kind have norms, over all heads together; others over each."""
    attn = Attention(8, 6, heads=2, kv_heads=2, dim_head=4, qk_norm=norm, processor=processor)
    perturb(attn)
    x, context, maps = torch.randn(3, 9, 8), torch.randn(3, 5, 6), []
    expected = attn(x, context)
    attn.set_processor(_Capture(maps, torch.arange(5).expand(3, 5)))
    assert_same(attn(x, context), expected, 1e-6)
    torch.testing.assert_close(maps[0].sum(1), torch.ones(3, 9))


def test_what_is_frozen_and_what_is_said(backbone):
    pipeline = backbone.pipeline
    for module in (pipeline.vae, pipeline.text_encoder, backbone.network):
        assert not module.training and not any(p.requires_grad for p in module.parameters())
    assert backbone.latent_shape == (4, 16, 16)
    assert backbone.prediction == ("epsilon" if backbone.name in ("sd2", "pixart") else "flow")


# Texts


def test_each_word_is_one_token(backbone):
    tokenizer = backbone.pipeline.tokenizer
    captions = {c for split in ("train", "unseen") for c in scenes.sample(400, 0, split).captions()}
    words = set()
    for caption in captions:
        split = caption.replace(",", " ,").split()
        tokens = tokenizer.tokenize(caption)
        assert [t.replace("▁", "").replace("</w>", "") for t in tokens] == split
        words.update(split)
        ids = tokenizer(caption, add_special_tokens=False).input_ids
        assert tokenizer.unk_token_id not in ids
        assert len(set(ids)) == len(set(tokens))
    assert words == set(scenes.WORDS)


def test_untrained_text_encoders_read_whose_colour_is_whose(backbone):
    prompts = ["a red circle and a blue square", "a blue circle and a red square"]
    tokenizer = backbone.pipeline.tokenizer
    tokens = tokenizer.convert_ids_to_tokens(tokenizer(prompts[0]).input_ids)
    at = next(i for i, t in enumerate(tokens) if "circle" in t)
    one, other = backbone.encode(prompts).embeds[:, at]
    assert (one - other).norm() > 0.2 * one.norm()  # T5 without a head that sees the word before: 0.03


def test_the_longest_caption_is_not_cut(backbone):
    text = scenes.caption([("circle", "red"), ("square", "blue"), ("triangle", "green")], "white")
    tokenizer = backbone.pipeline.tokenizer
    assert len(tokenizer(text).input_ids) <= tokenizer.model_max_length == 24
    assert backbone.encode([text]).embeds.shape[1] == 24
    last = backbone.encode([text, text.replace("white", "black")])
    assert (last.embeds[0] - last.embeds[1]).abs().max() > 1e-3
