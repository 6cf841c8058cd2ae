"""Table 5's guidance on random miniatures, and its scores on clean renders whose layout is known."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torchmetrics.detection import MeanAveragePrecision
from transformers import T5Tokenizer

from gad.evaluation import layout
from gad.world import scenes
from gad.world.detector import detect

PHRASES = ["red circle", "green square", "yellow triangle"]
BOXES = [np.array([[2.0, 2, 30, 30], [34, 2, 62, 30], [2, 34, 30, 62]]), np.array([[30.0, 28, 60, 62]])]


class Slow:
    """A tokenizer that knows no offsets."""

    is_fast = False

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def __getattr__(self, name):
        return getattr(self.tokenizer, name)

    def __call__(self, *args, return_offsets_mapping=False, **kwargs):
        assert not return_offsets_mapping
        return self.tokenizer(*args, **kwargs)


def both(tokenizer, caption, phrases, most=None):
    """A phrase's tokens as text, and their number, with offsets; the same is found without."""
    fast, slow = (
        layout.phrase_tokens(
            SimpleNamespace(pipeline=SimpleNamespace(tokenizer=t), max_tokens=most, instruction="", skipped=0),
            caption, phrases,
        )
        for t in (tokenizer, Slow(tokenizer))
    )
    assert fast == slow
    ids = tokenizer(caption.lower())["input_ids"]
    return [("".join(tokenizer.decode([ids[j] for j in places]).split()), len(places)) for places in fast]


def test_phrases_are_their_tokens(backbone, prompts):
    found = both(backbone.pipeline.tokenizer, prompts[0], PHRASES, backbone.max_tokens)
    assert found == [(p.replace(" ", ""), 2) for p in PHRASES]
    # As the encoder reads them: another colour changes no embedding before its token.
    place = layout.phrase_tokens(backbone, prompts[0], ["green square"])[0][0]
    a, b = backbone.encode([prompts[0], prompts[0].replace("green", "blue")]).embeds
    changed = (a - b).abs().sum(1) > 1e-6
    assert changed[place] and (backbone.name == "pixart" or not changed[:place].any())


def test_phrases_of_words_in_pieces_at_the_end_twice_and_in_capitals(backbone):
    tokenizer = backbone.pipeline.tokenizer
    if backbone.name == "pixart":  # whose miniature knows whole words only
        pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -4.0), ("▁a", -2.0), ("ar", -2.0)]
        pieces += [(c, -3.0) for c in "abcdefghijklmnopqrstuvwxyz,"]
        tokenizer = T5Tokenizer(pieces, extra_ids=0, model_max_length=64)
    caption = "A round red circle, a red square and a Round circle"
    found = both(tokenizer, caption, ["square", "circle", "circle", "Round circle", "round"])
    assert [text for text, _ in found] == ["square", "circle", "circle", "roundcircle", "round"]
    assert found[-1][1] > 1
    places = layout.phrase_tokens(backbone, "a circle and a circle", ["circle", "circle"])
    assert places[0][-1] < places[1][0]


@pytest.mark.parametrize("phrase", ["blue circle", "circ", "", "gray background"])
def test_a_phrase_that_is_not_there_is_one_line(backbone, prompts, phrase):
    caption = prompts[0] if phrase != "gray background" else 3 * (prompts[0] + " and ") + "a gray background"
    caption = caption.replace("gray", "white", 3)  # cut before the phrase comes
    with pytest.raises(ValueError) as error:
        layout.phrase_tokens(backbone, caption, [phrase])
    assert "\n" not in str(error.value) and repr(phrase) in str(error.value)


def test_energy_is_what_attention_is_outside():
    left = torch.tensor([0.0, 0, 32, 64]).expand(1, 1, 4)
    one, grid = torch.ones(1, 1, 1), torch.zeros(8, 8)
    grid[:, :4] = torch.rand(8, 4)
    there, away = grid.reshape(1, 1, 64), grid.flip(1).reshape(1, 1, 64)
    finer = torch.kron(grid, torch.ones(2, 2)).reshape(1, 1, 256)
    assert layout.energy([there, finer], one, left).item() == pytest.approx(0, abs=1e-10)
    assert layout.energy([away], one, left).item() == layout.energy([0 * away], one, left).item() == 1
    assert layout.energy([there, away], one, left).item() == pytest.approx(0.5)
    assert layout.energy([torch.full((1, 1, 64), 0.3)], one, left / 2).item() == pytest.approx((1 - 1 / 8) ** 2)
    # Words count by the attention they are paid, objects count alike; each sample for itself.
    places, words, where = layout.rows([[[1, 2], [4]], [[3]]], [np.array([[0, 0, 32, 64]] * 2), np.ones((1, 4)) * 5])
    assert places.tolist() == [[1, 2, 4], [3, 0, 0]] and where[1].tolist() == [[5] * 4, [0] * 4]
    assert words.tolist() == [[[1, 1, 0], [0, 0, 1]], [[1, 0, 0], [0, 0, 0]]]
    maps = torch.cat([3 * there, away, away], 1)
    assert layout.energy([maps[[0, 0]]], words, where).tolist() == pytest.approx([(0.25**2 + 1) / 2, 1])


def test_a_box_counts_by_the_area_it_covers():
    odd = torch.tensor([[[3.0, 5, 50.5, 21]]])
    assert layout.inside(odd, 8).sum().item() == pytest.approx(47.5 * 16 / 64) and layout.inside(odd, 8).max() == 1
    assert layout.inside(torch.tensor([8.0, 0, 16, 8]), 8).nonzero().tolist() == [[1]]  # right of the first, not below


@pytest.fixture
def asked(backbone, prompts):
    names = [PHRASES, ["blue square"]]
    tokens = [layout.phrase_tokens(backbone, c, p) for c, p in zip(prompts, names, strict=True)]
    return backbone.encode(prompts), tokens


def test_a_move_lowers_the_energy_by_its_size(backbone, asked, z):
    cond, tokens = asked
    goal, t = layout.rows(tokens, BOXES), torch.full((2,), 0.8)
    network = backbone.network
    processors = [m.processor for m in backbone.cross_attentions(network)]

    def energies(x):
        return layout.energy(backbone.attention(network, x, t, cond, goal[0]), *goal[1:])

    after = layout.move(backbone, network, z, t, cond, goal, 0.02)
    assert (energies(after) < energies(z)).all() and not after.requires_grad
    assert (after - z).square().mean((1, 2, 3)).sqrt().tolist() == pytest.approx([0.02] * 2, rel=1e-3)
    assert all(p.grad is None and not p.requires_grad for p in network.parameters())
    assert [m.processor for m in backbone.cross_attentions(network)] == processors
    # Nothing asked, nothing moved, and what another sample is asked does not matter.
    some = layout.move(backbone, network, z, t, cond, layout.rows([tokens[0], []], [BOXES[0], np.zeros((0, 4))]), 0.02)
    assert torch.equal(some[1], z[1])
    torch.testing.assert_close(some[0], after[0], atol=1e-4, rtol=0)
    broken = z.clone()
    broken[1] = float("nan")
    moved = layout.move(backbone, network, broken, t, cond, goal, 0.02)
    torch.testing.assert_close(moved[0], after[0], atol=1e-4, rtol=0)


def test_guided_samples(backbone, asked, z, monkeypatch):
    cond, tokens = asked
    network, times = backbone.network, backbone.times(4)[:2].tolist()
    plain = backbone.sample(network, z, cond, 4, 2.0)
    assert torch.equal(layout.guided(backbone, network, z, cond, tokens, BOXES, 4, 2.0, times, 1, 0.0), plain)
    found = layout.guided(backbone, network, z, cond, tokens, BOXES, 4, 2.0, times, 1, 0.05)
    alone = layout.guided(backbone, network, z[1:], cond[[1]], tokens[1:], BOXES[1:], 4, 2.0, times, 1, 0.05)
    assert not torch.allclose(found, plain, atol=1e-2)
    torch.testing.assert_close(alone[0], found[1], atol=1e-3 * float(found.abs().max()), rtol=0)
    # A teacher of more steps moves as often, at the same noise.
    seen, attention = [], backbone.attention
    monkeypatch.setattr(backbone, "attention", lambda n, x, t, *r: seen.append(float(t)) or attention(n, x, t, *r))
    layout.guided(backbone, network, z, cond, tokens, BOXES, 20, 1.0, times, 2, 0.05)
    assert seen == pytest.approx([times[0]] * 2 + [times[1]] * 2, abs=2e-3)
    seen.clear()  # one of fewer steps has all moves where both times are nearest
    layout.guided(backbone, network, z, cond, tokens, BOXES, 1, 1.0, times, 2, 0.05)
    assert seen == [1.0] * 4


@pytest.fixture(scope="module")
def renders():
    """Scenes' boxes with their own renders, with other layouts of the same objects, and with half of each."""
    world = scenes.sample(64, 0, "test")
    own = world.render()
    other = torch.cat([scenes.relayout(world[i], 1, 100 + i).render() for i in range(64)])
    half = torch.where((torch.arange(64) % 2 == 0).view(-1, 1, 1, 1), own, other)
    return [world.objects(i) for i in range(64)], [world.boxes(i) for i in range(64)], (own, other, half)


def test_scores_have_the_ceiling_the_floor_and_what_is_between(renders):
    wanted, boxes, images = renders
    own, other, half = (layout.score(layout.seen(x), wanted, boxes) for x in images)
    assert min(own["iou"]) > 0.8 and max(own["centre"]) < 1.5 and len(own["iou"]) == 64
    assert np.mean(other["iou"]) < 0.2 and np.mean(other["centre"]) > 10
    assert half["iou"] == [(own, other)[i % 2]["iou"][i] for i in range(64)]
    empty = layout.score(layout.seen(torch.full((1, 3, 64, 64), 0.55)), wanted[:1], boxes[:1])
    assert empty == {"iou": [0], "centre": [layout.FAR]} and max(other["centre"]) <= layout.FAR
    # The right boxes of wrong objects are worth nothing.
    others = [[(s, "red" if c != "red" else "blue") for s, c in w] for w in wanted]
    wrong = layout.score(layout.seen(images[0]), others, boxes)
    assert np.mean(wrong["iou"]) < 0.2
    sure = layout.score([[(n, box, v / 2) for n, box, v in x] for x in layout.seen(images[0])], wanted, boxes, 0.6)
    assert max(sure["iou"]) == 0  # nothing is there for sure
    a, b, c = (layout.average_precision(layout.seen(x), wanted, boxes, 0) for x in images)
    assert a["ap50"] > 0.99 and a["ap"] > 0.6 and b["ap50"] < 0.2 and b["ap50"] + 0.1 < c["ap50"] < a["ap50"] - 0.1


def test_average_precision_is_torchmetrics(renders):
    wanted, boxes, images = renders
    metric = MeanAveragePrecision(backend="pycocotools")
    names = [*layout.CLASSES, *(("blob", c) for c in scenes.COLOURS)]
    noisy = (images[2] + 0.25 * torch.randn(images[2].shape, generator=torch.Generator().manual_seed(0))).clamp(0, 1)
    for image, names_here, own in zip(noisy, wanted, boxes, strict=True):
        found = detect(image)[0]
        metric.update([{
            "boxes": torch.tensor([f.box for f in found]).reshape(-1, 4),
            "scores": torch.tensor([f.score for f in found]),
            "labels": torch.tensor([names.index((f.shape, f.colour)) for f in found], dtype=torch.long),
        }], [{"boxes": torch.tensor(own).float(), "labels": torch.tensor([names.index(n) for n in names_here])}])
    theirs, ours = metric.compute(), layout.average_precision(layout.seen(noisy), wanted, boxes, 0)
    assert 0.05 < ours["ap"] < 0.95 and ours["ap_draws"] == []
    assert ours["ap"] == pytest.approx(theirs["map"].item(), abs=1e-6)
    assert ours["ap50"] == pytest.approx(theirs["map_50"].item(), abs=1e-6)


def test_draws_are_paired(renders):
    wanted, boxes, images = renders
    seen = layout.seen(images[2])

    def draws(found, seed=1):
        return layout.average_precision(found, wanted, boxes, 20, seed=seed)

    half, again, own = draws(seen), draws(seen), draws(layout.seen(images[0]))
    assert half == again and len(half["ap_draws"]) == len(half["ap50_draws"]) == 20
    assert np.std(half["ap_draws"]) > 0.005 and half != draws(seen, 2)
    assert min(half["ap_draws"]) < half["ap"] < max(half["ap_draws"])
    assert min(np.subtract(own["ap_draws"], half["ap_draws"])) > 0
    # One draw by hand: its prompts, one by one.
    order = np.random.default_rng(1).integers(0, 64, (20, 64))[0]
    by_hand = layout.average_precision(*([x[i] for i in order] for x in (seen, wanted, boxes)), 0)
    assert by_hand["ap"] == pytest.approx(half["ap_draws"][0])
    assert by_hand["ap50"] == pytest.approx(half["ap50_draws"][0])
