"""The scenes, their captions and the judge that reads them back."""

import copy
import re
import time

import numpy as np
import pytest
import torch

from gad.world import autoencoder, scenes
from gad.world import teacher as teachers
from gad.world.detector import centres, detect, judge

N = 1000


def objects(world):
    return [world.objects(i) for i in range(len(world))]


@pytest.fixture(scope="module")
def world():
    return scenes.sample(N, 5, "test")


@pytest.fixture(scope="module")
def images(world):
    return world.render()


@pytest.fixture(scope="module")
def found(images):
    return [detect(image) for image in images]


# Scenes


def test_scenes_follow_from_seed_and_split():
    one, same = scenes.sample(64, 3), scenes.sample(64, 3)
    assert one.captions() == same.captions() and torch.equal(one.render(), same.render())
    for other in (scenes.sample(64, 4), scenes.sample(64, 3, "test"), scenes.sample(64, 3, "unseen")):
        assert not torch.equal(one.render(), other.render())
    with pytest.raises(ValueError, match="split='valid'"):
        scenes.sample(4, 0, "valid")


def test_images_and_indexing(world, images):
    assert images.shape == (N, 3, 64, 64) and images.dtype == torch.float32
    assert images.min() >= 0 and images.max() <= 1
    assert torch.equal(world[3:6].render(), images[3:6]) and world[3:6].captions() == world.captions()[3:6]
    few = np.array([5, 0])
    assert torch.equal(world[few].render(), images[few]) and world[few].objects(0) == world.objects(5)


def test_one_scene_is_a_batch_of_one(world, images):
    one = world[7]
    assert len(one) == 1 and one.captions() == [world.captions()[7]]
    assert torch.equal(one.render(), images[7:8])
    assert scenes.relayout(one, 4, 0).captions() == 4 * one.captions()


def test_at_least_500_scenes_a_second():
    rates = []
    for seed in range(3):
        began = time.process_time()  # not wall time: other work may share the core
        batch = scenes.sample(512, seed)
        batch.render(), batch.captions()
        rates.append(512 / (time.process_time() - began))
    assert max(rates) > 500


@pytest.mark.parametrize("split", ["train", "test", "unseen"])
def test_unseen_pairs(split):
    world = scenes.sample(4000, 1, split)
    held_out = [sum(pair in scenes.UNSEEN for pair in pairs) for pairs in objects(world)]
    if split == "unseen":
        assert min(held_out) >= 1
        shown = {pair for pairs in objects(world) for pair in pairs} & set(scenes.UNSEEN)
        assert shown == set(scenes.UNSEEN)
    else:
        assert max(held_out) == 0
        seen = {pair for pairs in objects(world) for pair in pairs}
        assert len(seen) == len(scenes.SHAPES) * len(scenes.COLOURS) - len(scenes.UNSEEN)
    assert all(len({c for _, c in pairs}) == len(pairs) for pairs in objects(world))  # no colour twice
    share = np.bincount(world.count, minlength=4)[1:] / 4000
    assert np.abs(share - scenes.COUNTS).max() < 4 * 0.5 / 4000**0.5


def test_objects_lie_inside_and_apart():
    world = scenes.sample(2000, 2)
    for i in range(len(world)):
        boxes = world.boxes(i)
        assert boxes.shape == (world.count[i], 4)
        assert boxes.min() >= 0 and boxes.max() <= scenes.SIZE
        for a in range(len(boxes)):
            for b in range(a):
                distance = np.linalg.norm(world.centre[i, a] - world.centre[i, b])
                assert distance >= world.radius[i, a] + world.radius[i, b]


def test_corners_overlap_in_few_crowded_scenes():
    """Circles of the objects' radii never do; squares and triangles reach beyond theirs."""
    world = scenes.sample(2000, 2, "test")
    crowded = world[np.flatnonzero(world.count > 1)]
    x, y = np.meshgrid(np.arange(scenes.SIZE) + 0.5, np.arange(scenes.SIZE) + 0.5)
    covered = np.zeros((len(crowded), scenes.SIZE, scenes.SIZE), dtype=int)
    for i in range(len(crowded)):
        for k in range(crowded.count[i]):
            (cx, cy), shape = crowded.centre[i, k], scenes.SHAPES[crowded.shape[i, k]]
            covered[i] += scenes.coverage(shape, x - cx, y - cy, crowded.radius[i, k]) > 0.5
    assert 0 < (covered > 1).any(axis=(1, 2)).mean() < 0.05


def test_captions_name_the_objects_and_nothing_of_the_layout(world):
    backgrounds = 0
    for caption, wanted in zip(world.captions(), objects(world), strict=True):
        assert set(re.findall(r"\w+|,", caption)) <= set(scenes.WORDS)
        pairs = re.findall(rf"({'|'.join(scenes.COLOURS)}) ({'|'.join(scenes.SHAPES)})", caption)
        assert [(shape, colour) for colour, shape in pairs] == wanted
        backgrounds += "background" in caption
    assert 0.42 < backgrounds / N < 0.58
    # One caption, many layouts.
    again = scenes.relayout(world[:1], 500, 1)
    assert len(set(again.captions())) == 1
    assert again.centre[:, 0].std(0).min() > 5


def test_caption_text():
    three = [("circle", "red"), ("square", "blue"), ("triangle", "green")]
    assert scenes.caption(three, "white") == (
        "a red circle, a blue square and a green triangle on a white background"
    )
    assert scenes.caption(three[:2]) == "a red circle and a blue square"
    assert scenes.caption(three[:1]) == "a red circle"


def test_relayout_keeps_the_objects(world):
    for i in range(20):
        again = scenes.relayout(world[i : i + 1], 32, i)
        assert len(again) == 32 and set(again.captions()) == {world.captions()[i]}
        assert all(pairs == world.objects(i) for pairs in objects(again))
        assert (again.background == world.background[i]).all()
        assert len(np.unique(again.centre[:, 0, 0])) == 32
        assert judge(again.render(), objects(again))["scene"].mean() > 0.95
    one, same, other = (scenes.relayout(world[:1], 8, seed).centre for seed in (1, 1, 2))
    assert np.array_equal(one, same) and not np.array_equal(one, other)


# The detector


def test_detector_reads_clean_scenes(world, images, found):
    assert judge(images, objects(world))["scene"].mean() >= 0.99
    backgrounds = list(scenes.BACKGROUNDS)
    assert np.mean([b == backgrounds[k] for (_, b), k in zip(found, world.background, strict=True)]) >= 0.99


def test_detected_boxes_are_within_two_pixels(world, found):
    errors = []
    for i, (seen, _) in enumerate(found):
        by_colour = {f.colour: f for f in seen}
        for (_, colour), box in zip(world.objects(i), world.boxes(i), strict=True):
            if colour in by_colour:
                errors.append(np.abs(np.array(by_colour[colour].box) - box).max())
    assert len(errors) >= 0.99 * world.count.sum()
    assert max(errors) <= 2


def test_unseen_scenes_are_read_too():
    world = scenes.sample(300, 9, "unseen")
    assert judge(world.render(), objects(world))["scene"].mean() >= 0.99


def test_judge_is_false_for_whatever_is_wrong(world, images):
    images, named = images[:200], objects(world)[:200]
    good = np.flatnonzero(judge(images, named)["scene"])
    assert len(good) > 190
    images, named = images[good], [named[i] for i in good]
    shapes, colours = list(scenes.SHAPES), list(scenes.COLOURS)

    def other(value, values):
        return values[(values.index(value) + 1) % len(values)]

    right = judge(images, named)
    assert right["scene"].all() and right["colour_count"].all()
    wrong_shape = judge(images, [[(other(p[0][0], shapes), p[0][1]), *p[1:]] for p in named])
    assert not wrong_shape["scene"].any() and wrong_shape["colour_count"].all()
    changes = {
        "colour": [[(p[0][0], other(p[0][1], colours)), *p[1:]] for p in named],
        "one too many in the image": [p[1:] for p in named],
        "one too few": [[*p, p[0]] for p in named],
    }
    for wrong in changes.values():
        verdict = judge(images, wrong)
        assert not verdict["scene"].any() and not verdict["colour_count"].any()
    assert not judge(torch.rand(4, 3, 64, 64), named[:4])["scene"].any()


def test_judge_ignores_the_order_of_names(world, images):
    several = np.flatnonzero(world.count > 1)[:100]
    assert judge(images[several], [world.objects(i)[::-1] for i in several])["scene"].mean() >= 0.98


def test_a_cross_has_no_shape():
    x, y = np.meshgrid(np.arange(64) - 31.5, np.arange(64) - 31.5)
    image = torch.tensor(scenes.BACKGROUNDS["white"])[:, None, None].repeat(1, 64, 64)
    cross = torch.tensor((abs(x) < 3) & (abs(y) < 20) | (abs(y) < 3) & (abs(x) < 20))
    image[:, cross] = torch.tensor(scenes.COLOURS["red"])[:, None]
    (seen,), background = detect(image)
    assert (seen.shape, seen.colour, background) == ("blob", "red", "white")
    assert detect(torch.ones(3, 64, 64)) == ([], "white")


def test_centres(world, images):
    points = centres(images[:300], objects(world)[:300])
    boxes = np.stack([world.boxes(i)[0] for i in range(300)])
    middle = (boxes[:, :2] + boxes[:, 2:]) / 2
    assert np.mean(np.abs(points - middle).max(1) <= 1.5) >= 0.99
    assert np.isnan(centres(torch.ones(1, 3, 64, 64), [[("circle", "red")]])).all()


def test_detector_refuses_other_sizes():
    with pytest.raises(ValueError, match="shape"):
        detect(torch.zeros(3, 32, 32))


# Autoencoders


@pytest.mark.parametrize("kind", ["kl", "dc"])
@torch.no_grad()
def test_autoencoders(kind, images):
    torch.manual_seed(0)
    vae = autoencoder.build(kind).eval()
    z = autoencoder.encode(vae, images[:2])
    assert z.shape == (2, 4, 16, 16)
    assert vae.decode(z).sample.shape == (2, 3, 64, 64)
    # Standardising changes the latents' scale, and nothing that comes out.
    before = vae.decode(autoencoder.encode(vae, images[:8]) / vae.config.scaling_factor).sample
    autoencoder._standardise(vae, seed=0, n=256)
    after = vae.decode(autoencoder.encode(vae, images[:8]) / vae.config.scaling_factor).sample
    torch.testing.assert_close(after, before, rtol=1e-3, atol=1e-3 * before.abs().max().item())
    z = autoencoder.encode(vae, scenes.sample(256, 1).render())
    if kind == "kl":
        torch.testing.assert_close(z.mean((0, 2, 3)), torch.zeros(4), rtol=0, atol=1e-3)
        torch.testing.assert_close(z.std((0, 2, 3)), torch.ones(4), rtol=1e-3, atol=0)
    assert z.std().item() == pytest.approx(1, abs=1e-2)


def test_unknown_autoencoder():
    with pytest.raises(ValueError, match="kind='vq'"):
        autoencoder.build("vq")


CYCLE = {
    "batch": 600, "drop": 0.0, "lr": 1.0e-3, "ema": 0.9, "muon": 1.0e-3, "compile": False,
    "focus": 0.5, "focus_at": -3.0, "crowded": 0.0, "text": 1.0,
}


@pytest.mark.parametrize("at", [-3.0, -1.0])
def test_half_the_noise_levels_lie_about_the_focus(backbone, at):
    backbone = copy.deepcopy(backbone)
    task = teachers.TeacherTask(backbone, lambda: None, scenes.sample(8, 0), CYCLE | {"focus_at": at})
    alpha, sigma = backbone.levels.alpha_sigma(task.quantiles)
    snr = 2 * (alpha / sigma).log()
    for share, deviations in ((0.5, 0), (0.84, 1)):  # below, SD2's schedule ends
        assert snr.quantile(share).item() == pytest.approx(at + 1.5 * deviations, abs=0.15)


@pytest.mark.parametrize("crowded, share", [(0.0, 0.2), (1.0, 1 / 3), (2.0, 0.48)])
def test_a_crowded_cycle_draws_scenes_by_a_power_of_their_objects(mini, monkeypatch, crowded, share):
    backbone, world, seen = copy.deepcopy(mini("pixart")), scenes.sample(4000, 0), []
    kept = backbone.encode_text
    monkeypatch.setattr(backbone, "encode_text", lambda text: (seen.extend(text), kept(text))[1])
    latents = torch.zeros(4000, *backbone.latent_shape)
    task = teachers.TeacherTask(backbone, lambda: latents, world, CYCLE | {"crowded": crowded})
    with torch.no_grad():
        loss = task.losses(0, torch.Generator().manual_seed(0))["teacher"]
    assert torch.isfinite(loss) and len(seen) == 600
    three = sum(len([w for w in text.replace(",", "").split() if w in scenes.SHAPES]) == 3 for text in seen)
    assert three / 600 == pytest.approx(share, abs=0.05)
