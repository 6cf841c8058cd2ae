"""The judge of prompts: its tokens, its wrong captions, its folder, and that it learns."""

import json

import numpy as np
import open_clip
import pytest
import torch
from safetensors.torch import load_file, save_file

from gad.training import train
from gad.world import judge, scenes

TINY = {
    "embed_dim": 8,
    "vision_cfg": {"image_size": scenes.SIZE, "patch_size": 16, "width": 32, "layers": 1, "head_width": 16},
    "text_cfg": judge.CONFIG["text_cfg"] | {"width": 32, "heads": 2, "layers": 1},
}
SPLITS = ("test", "unseen")


def tiny():
    torch.manual_seed(0)
    return open_clip.CLIP(**TINY)


@pytest.fixture(scope="module")
def world():
    return judge.join([scenes.sample(400, 3, split) for split in SPLITS])


@pytest.fixture
def folder(tmp_path):
    judge.save(tiny(), TINY, tmp_path / "judge")
    return tmp_path / "judge"


# Tokens


def test_each_word_has_a_token_and_the_end_the_highest():
    tokenizer = judge.build_tokenizer()
    ids = judge.tokenize(tokenizer, list(scenes.WORDS), 3)
    assert len(set(ids[:, 1].tolist())) == len(scenes.WORDS)
    assert (ids[:, 2] == tokenizer.eos_token_id).all() and (ids[:, 0] == judge.TOKENS.index("<start>")).all()
    assert tokenizer.eos_token_id == max(tokenizer.get_vocab().values()) == len(judge.TOKENS) - 1
    assert judge.CONFIG["text_cfg"]["vocab_size"] == len(tokenizer)


def test_captions_fit_and_are_read_word_by_word(world):
    length = judge.CONFIG["text_cfg"]["context_length"]
    three = [("triangle", "yellow"), ("circle", "green"), ("square", "blue")]
    captions = [scenes.caption(three, "white"), *world.captions()]
    tokenizer = judge.build_tokenizer()
    ids = judge.tokenize(tokenizer, captions, length)
    assert ids.shape == (len(captions), length)
    for caption, row in zip(captions, ids.tolist(), strict=True):
        words = ["<start>", *caption.replace(",", " ,").split(), "<end>"]
        assert row == [judge.TOKENS.index(w) for w in words] + [tokenizer.pad_token_id] * (length - len(words))
    assert (ids.argmax(1) == (ids == tokenizer.eos_token_id).int().argmax(1)).all()  # where the text tower reads


@pytest.mark.parametrize("prompt", ["a purple circle", "a red circle" + " and a red circle" * 5])
def test_prompts_it_cannot_read(folder, prompt):
    with pytest.raises(ValueError, match=f"not '{prompt}'"):
        judge.load(folder).texts(["a red circle", prompt])


# Wrong captions


@pytest.mark.parametrize("kind", judge.SWAPS)
def test_a_swap_changes_one_thing(world, kind):
    wrong, again = (judge.swapped(world, kind, np.random.default_rng(0)) for _ in range(2))
    assert wrong.captions() == again.captions()
    possible, changed = np.ones(len(world), dtype=bool), []
    for i in range(len(world)):
        ours, theirs = world.objects(i), wrong.objects(i)
        differ = [k for k in range(len(ours)) if ours[k] != theirs[k]]
        (shapes, colours), (shapes_now, colours_now) = zip(*ours, strict=True), zip(*theirs, strict=True)
        assert len(theirs) == len(ours) and len(set(colours_now)) == len(colours)
        assert (wrong.background[i], wrong.named[i]) == (world.background[i], world.named[i])
        if kind == "pairing":
            possible[i] = len(set(shapes)) > 1
            assert len(differ) == 2 * possible[i] and shapes_now == shapes and sorted(colours_now) == sorted(colours)
            continue
        assert possible[i] and len(differ) == 1
        kept, kept_now = (shapes, shapes_now) if kind == "colour" else (colours, colours_now)
        assert kept == kept_now
        changed.append((differ[0], theirs[differ[0]]))
    truth = judge.fits(world, wrong).diagonal()
    assert (truth == ~possible).all()
    if kind == "pairing":
        assert possible.sum() > 200
    else:  # any object, any value
        slots, values = zip(*changed, strict=True)
        assert set(slots) == {0, 1, 2} and len(set(values)) == len(scenes.SHAPES) * len(scenes.COLOURS)


def test_what_is_true_of_a_scene():
    red, blue = ("circle", "red"), ("square", "blue")
    shapes, colours, backgrounds = list(scenes.SHAPES), list(scenes.COLOURS), list(scenes.BACKGROUNDS)

    def scene(objects, background, named):
        full = [*objects, ("triangle", "green"), ("triangle", "yellow")][:3]  # slots beyond `count` hold anything
        return scenes.Scenes(
            np.array([len(objects)]), np.array([[shapes.index(s) for s, _ in full]]),
            np.array([[colours.index(c) for _, c in full]]), np.zeros((1, 3, 2)), np.ones((1, 3)),
            np.array([backgrounds.index(background)]), np.array([named]),
        )

    image = scene([red, blue], "white", False)
    true = [scene([red, blue], "black", False), scene([blue, red], "gray", False), scene([blue, red], "white", True)]
    false = [
        scene([red, blue], "black", True), scene([red], "white", False), scene([red, blue, blue], "white", False),
        scene([red, ("square", "green")], "white", True), scene([("circle", "blue"), ("square", "red")], "gray", False),
    ]
    assert judge.fits(image, judge.join(true)).tolist() == [[True] * 3]
    assert judge.fits(image, judge.join(false)).tolist() == [[False] * 5]


def test_true_texts_of_others_are_no_negatives():
    y, c = torch.nn.functional.normalize(torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(0)), dim=2)
    bias = torch.zeros(3, 4)
    loss = judge.ClipLoss()
    torch.testing.assert_close(loss(y[:3], c[:3], 7.0, bias[:, :3]), open_clip.ClipLoss()(y[:3], c[:3], 7.0))
    bias[0, 1] = bias[2, 3] = -torch.inf
    logits = 7 * y[:3] @ c.T
    keep = torch.ones(3, 4, dtype=bool)
    keep[0, 1] = keep[2, 3] = False
    images = [-logits[i, i] + logits[i][keep[i]].logsumexp(0) for i in range(3)]
    texts = [-logits[i, i] + logits[:, i][keep[:, i]].logsumexp(0) for i in range(3)]
    torch.testing.assert_close(loss(y[:3], c, 7.0, bias), (sum(images) + sum(texts)) / 6)


# The folder


def test_saved_and_loaded_judges_agree(folder, world):
    model = tiny().half().float()  # as saved
    ours, loaded = judge.Judge(model, judge.build_tokenizer()), judge.load(folder)
    images, captions = world[:300].render(), world[:300].captions()
    for a, b in ((ours.images(images), loaded.images(images)), (ours.texts(captions), loaded.texts(captions))):
        torch.testing.assert_close(b, a)
        assert b.shape == (300, 8) and b.dtype == torch.float32 and not b.requires_grad
        torch.testing.assert_close(b.norm(dim=1), torch.ones(300))
        assert b.std(0).min() > 1e-4  # not one embedding for all
    score = loaded.score(images, captions)
    torch.testing.assert_close(score[7:8], loaded.score(images[7:8], captions[7:8]), rtol=1e-4, atol=1e-5)


def test_open_clip_reads_the_folder(folder, world):
    """Without a line of this package, as anyone would."""
    model, transform = open_clip.create_model_from_pretrained(f"local-dir:{folder}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    ours, captions, image = judge.load(folder), world[:5].captions(), world[:1].render()
    with torch.no_grad():
        torch.testing.assert_close(model.encode_text(tokenizer(captions), normalize=True), ours.texts(captions))
        x = torch.stack([transform.transforms[-1](i) for i in image])
        torch.testing.assert_close(model.encode_image(x, normalize=True), ours.images(image))


def test_the_whole_judge_is_small(tmp_path):
    judge.save(open_clip.CLIP(**judge.CONFIG), judge.CONFIG, tmp_path)
    assert {f.name for f in tmp_path.iterdir()} == set(judge.FILES)
    assert sum(f.stat().st_size for f in tmp_path.iterdir()) < 3e6
    assert judge.load(tmp_path).images(torch.rand(2, 3, 64, 64)).shape == (2, 32)


def refused(folder, match):
    with pytest.raises(ValueError, match=match) as error:
        judge.load(folder)
    text = str(error.value)
    assert "\n" not in text and str(folder) in text and text.endswith("run its stage, `dvc repro judge`")


def test_missing_folder(tmp_path):
    refused(tmp_path / "none", "lacks open_clip_config.json")


@pytest.mark.parametrize("name", judge.FILES)
def test_missing_and_truncated_files(folder, name):
    whole = (folder / name).read_bytes()
    (folder / name).write_bytes(whole[: len(whole) // 2])
    refused(folder, "no readable judge")
    (folder / name).unlink()
    refused(folder, f"lacks {name}")


def test_weights_of_another_model(folder):
    weights = load_file(folder / "model.safetensors")
    save_file({k: v for k, v in weights.items() if k != "logit_scale"}, folder / "model.safetensors")
    refused(folder, "no readable judge")
    config = json.loads((folder / "open_clip_config.json").read_text())
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config["model_cfg"] | {"embed_dim": 9}}))
    save_file(weights, folder / "model.safetensors")
    refused(folder, "no readable judge")


# Training


def test_a_few_steps_of_training(tmp_path):
    task, steps = judge.JudgeTask(tiny(), 32, 3e-3), 25

    def loss():
        task.model.eval()
        with torch.no_grad():
            generators = [torch.Generator().manual_seed(k) for k in (1, 2)]
            return np.mean([task.losses(0, g)["judge"].item() for g in generators])

    before = loss()
    assert before == pytest.approx(loss())
    train(task, tmp_path, steps, 0, {"judge": "tiny"}, warmup=3)
    assert 0 < loss() < before - 0.3


def test_metrics_of_a_judge_that_knows_nothing_and_of_one_that_knows_all(folder):
    blind = judge.load(folder)
    out = judge.evaluate(blind, 0, 300)
    json.dumps(out, allow_nan=False)
    for split in SPLITS:
        assert set(out[split]) == {*judge.SWAPS, "matched", "shuffled"}
        for kind in judge.SWAPS:
            value, low, high = out[split][kind]
            assert 0.3 < low < value < high < 0.7

    class Oracle:
        """Embeds a scene and its caption alike, by the objects."""

        def __init__(self, split):
            self.world = scenes.sample(300, judge.HELD_OUT, split)

        def images(self, x):
            return self.texts([scenes.caption(self.world.objects(i)) for i in range(len(x))])

        def texts(self, prompts):
            rows = [[f"a {c} {s}" in p for c in scenes.COLOURS for s in scenes.SHAPES] for p in prompts]
            return torch.nn.functional.normalize(torch.tensor(rows).float())

    for split in SPLITS:
        out = judge.evaluate(Oracle(split), 0, 300)[split]
        assert all(out[kind] == [1, 1, 1] for kind in judge.SWAPS) and out["matched"] == pytest.approx(1)
        assert out["shuffled"] < 0.5
