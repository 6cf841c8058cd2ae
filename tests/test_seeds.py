"""Table 2's classifiers on images of known answer: a model is a function of (seed, prompt), here one made by hand."""

from functools import partial

import numpy as np
import pytest
import torch
from scipy.stats import binom

from gad.evaluation import noise_query, seeds
from gad.evaluation.images import eight_bits, unit
from gad.evaluation.seeds import Classifier, accuracies, curve

fit = partial(seeds.fit, steps=80)
KINDS = ("linear", "cnn")
SEEDS, PROMPTS, TESTS = 8, 10, 8


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(seeds, "BATCH", 32)


def images(seen: float, prompts=PROMPTS, draw=0, size=32):
    """(SEEDS, prompts, 3, size, size): a bright square on the prompt's background, at the seed's place in a share
    `seen` of images and anywhere else in the others."""
    rng = np.random.default_rng(draw)
    x = torch.from_numpy(rng.uniform(0.2, 0.6, (1, prompts, 3, 1, 1))).repeat(SEEDS, 1, 1, size, size).float()
    places = np.random.default_rng(99).permutation((size // 4) ** 2)[:SEEDS]
    for s in range(SEEDS):
        for q in range(prompts):
            place = places[s] if rng.random() < seen else rng.integers((size // 4) ** 2)
            i, j = 4 * (place // (size // 4)), 4 * (place % (size // 4))
            x[s, q, :, i:i + 4, j:j + 4] += 0.4
    return (x + 0.02 * torch.from_numpy(rng.normal(size=x.shape)).float()).clamp(0, 1)


def top1(train, test, kind):
    return np.mean(accuracies(fit(train, kind).ranks(test)))


@pytest.mark.parametrize("kind", KINDS)
def test_ceiling_chance_and_between(kind):
    """Chance: of 64 images, at most as many are right as a binomial with 1/8 exceeds once in a thousand."""
    ceiling, half, none = (top1(images(s), images(s, TESTS, 1), kind) for s in (1, 0.5, 0))
    bound = binom.isf(1e-3, SEEDS * TESTS, 1 / SEEDS) / (SEEDS * TESTS)
    assert ceiling >= 0.95 and none <= bound < half < 0.9


@pytest.mark.parametrize("kind", KINDS)
def test_a_student_that_is_its_teacher_is_aligned_as_well_as_itself(kind):
    teacher, test = images(0.7), images(0.7, TESTS, 1)
    found = fit(teacher, kind)
    assert (found.ranks(test.clone()) == fit(teacher.clone(), kind).ranks(test)).all()  # fit is its seed's function
    shuffled = test.roll(1, 0)  # a student as sensitive as its teacher, but with other images for the same noises
    assert np.mean(accuracies(found.ranks(shuffled))) < 0.2 < np.mean(accuracies(found.ranks(test)))


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_learnt_of_training_prompts_is_worth_nothing_on_others(kind):
    """Each image has a pattern of its own: the training set is learnt by heart, test prompts are at chance."""
    train, test = (torch.rand(SEEDS, n, 3, 32, 32, generator=torch.Generator().manual_seed(n)) for n in (6, 24))
    found = fit(train, kind)
    assert np.mean(accuracies(found.ranks(train))) > 0.9
    n = SEEDS * 24
    assert np.mean(accuracies(found.ranks(test))) <= binom.isf(1e-3, n, 1 / SEEDS) / n


def test_curve_grows_and_never_sees_later_prompts():
    train, test = images(0.5), images(1, TESTS, 1)
    found = curve(train, test, [1, 2, PROMPTS])
    assert found[2].shape == (SEEDS, TESTS)
    grows = [np.mean(accuracies(found[n])) for n in found]
    assert grows[0] < grows[1] < grows[2] and grows[2] > 0.9
    assert (found[PROMPTS] == fit(train, "linear").ranks(test)).all()
    spoilt = torch.cat([train[:, :2], 1 - train[:, 2:]], 1)
    assert (curve(spoilt, test, [2])[2] == found[2]).all()
    with pytest.raises(ValueError, match=r"^sizes=\[2, 11\]: there are 10 training prompts only$"):
        curve(train, test, [2, 11])


@pytest.mark.parametrize("kind", KINDS)
def test_saved_and_loaded_it_ranks_the_same(kind, tmp_path):
    test, found = images(0.5, TESTS, 1), fit(images(0.5), kind)
    found.save(tmp_path / "c.safetensors")
    again = Classifier.load(tmp_path / "c.safetensors")
    assert again.kind == kind and (again.ranks(test) == found.ranks(test)).all()
    written = set()
    for _ in range(10):
        found.save(tmp_path / "again.safetensors")
        written.add((tmp_path / "again.safetensors").read_bytes())
    assert len(written) == 1


def test_a_network_is_its_seeds_and_leaves_the_global_generator_alone():
    train = images(0.5)
    before = torch.random.get_rng_state()
    a = fit(train, "cnn").network.state_dict()
    assert (torch.random.get_rng_state() == before).all()
    torch.manual_seed(5)
    b, c = (fit(train, "cnn", s).network.state_dict() for s in (0, 1))
    assert all((a[k] == b[k]).all() for k in a) and any((a[k] != c[k]).any() for k in a)


def test_damaged_files_are_one_line(tmp_path):
    path = tmp_path / "c.safetensors"
    fit(images(1, 2), "linear").save(path)
    whole = path.read_bytes()
    other = seeds.save_file
    for spoil in (lambda: path.write_bytes(whole[:-40]), lambda: path.write_bytes(b"no"), path.unlink,
                  lambda: other({"a": torch.zeros(1)}, path),
                  lambda: other({}, path, {"classifier": '{"kind": "x", "seeds": 3}'}),
                  lambda: other({}, path, {"classifier": '{"kind": "cnn", "seeds": 3}'})):
        spoil()
        with pytest.raises(ValueError, match="holds no seed classifier") as e:
            Classifier.load(path)
        assert "\n" not in str(e.value)


def test_wrong_kinds_and_numbers_of_seeds_are_refused():
    with pytest.raises(ValueError, match="kind='svm' is unknown: use 'linear' or 'cnn'"):
        fit(images(1, 2), "svm")
    with pytest.raises(ValueError, match="images of 2 seeds: a classifier needs three or more"):
        fit(images(1, 2)[:2], "linear")
    with pytest.raises(ValueError, match="images of 5 seeds for a classifier of 8"):
        fit(images(1, 2), "linear").ranks(images(1, 2)[:5])


def test_ranks_and_accuracies_by_hand():
    """Logits are the three pixels themselves; ties and NaN count against the right seed."""
    class Pixels(torch.nn.Module):
        def forward(self, x):
            return x.flatten(1)

    logits = torch.tensor([
        [[0.9, 0.5, 0.1], [0.1, 0.5, 0.9]],
        [[0.9, 0.5, 0.1], [0.5, 0.5, 0.5]],
        [[0.1, 0.2, 0.3], [0.3, 0.2, float("nan")]],
    ])
    ranks = Classifier("linear", Pixels()).ranks(logits.view(3, 2, 3, 1, 1))
    assert ranks.tolist() == [[0, 2], [1, 2], [0, 2]] and ranks.dtype == np.int64
    assert accuracies(ranks) == pytest.approx([2 / 3, 0]) and accuracies(ranks, 2) == [1, 0]


def test_images_of_8_bits_are_those_in_unit_range():
    images = eight_bits(torch.rand(3, 5, 3, 40, 40, generator=torch.Generator().manual_seed(0)))
    assert images.dtype == torch.uint8 and eight_bits(images) is images
    with pytest.raises(ValueError, match="not finite"):
        eight_bits(torch.full((1, 3, 4, 4), torch.nan))
    whole = unit(images)
    assert whole.max() <= 1 and torch.equal(eight_bits(whole), images)
    for kind in ("linear", "cnn"):
        low, high = (seeds.fit(x[:, :4], kind, steps=3) for x in (images, whole))
        assert (low.ranks(images[:, 4:]) == high.ranks(whole[:, 4:])).all()
        assert all(torch.equal(a, b) for a, b in zip(low.network.parameters(), high.network.parameters(), strict=True))
    low, high = (noise_query.colours(x.flatten(0, 1)) for x in (images, whole))
    assert all((low[k] == high[k]).all() and low[k].shape == (15,) for k in ("brightness", "saturation", "warmth"))
