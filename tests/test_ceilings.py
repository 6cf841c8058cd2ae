"""A student that is its teacher is at the ceiling of every measure, one deaf to its noise at the floor, and one that is
half deaf between the two, at a place that is known. Tables 2, 3 and 6's shifts and Figure 5 are in test_uses.py."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_uses import Heard, between

from gad import benches, params
from gad.backbones import BACKBONES, Condition
from gad.evaluation import noise_query, trajectory
from gad.evaluation.geometry import compare, endpoint, local_rows, row, spectral_kl, spectrum, tangents
from gad.stages import uses as stage
from gad.tables import geometry, trajectories
from gad.tables import uses as tables
from gad.tangents import Paths, Tangents
from gad.world import scenes

POINTS, SHAPE = 48, (4, 8, 8)
SHARES = (0.0, 0.5, 1.0)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# Table 1, of linear maps. The teacher turns its noise; students leave out what they are deaf to.


def turned(heard):
    """`z → Q (heard · z) + b`, Q orthogonal; `heard` (…) of zeros and ones, or None: the same image for all noises."""
    size = int(np.prod(SHAPE))
    q, b = torch.linalg.qr(normal(size, size, seed=1).double())[0], normal(*SHAPE, seed=2).double()

    def of(cond):
        if heard is None:
            return lambda z: b.expand(len(z), *SHAPE)
        own = heard[cond.mask[:, 0]] if len(heard) > 1 else heard
        return lambda z: ((z * own).flatten(1) @ q).view(-1, *SHAPE) + b

    return of


@pytest.fixture(scope="module")
def linear():
    """Rows by student: itself, deaf, deaf to half of each noise, to half of the noises; and the directions."""
    z, v = normal(POINTS, *SHAPE, seed=3).double(), normal(POINTS, *SHAPE, seed=4).double()
    cond = Condition(torch.zeros(POINTS, 1, 1), torch.arange(POINTS)[:, None])
    upper, every_other = torch.zeros(1, *SHAPE), (torch.arange(POINTS) % 2).view(-1, 1, 1, 1)
    upper[:, :2] = 1
    students = {"itself": torch.ones(1, 1, 1, 1), "deaf": None, "elements": upper, "noises": every_other}
    x0, jv = tangents(turned(students["itself"]), z, v, cond, 16)
    return {k: row(*tangents(turned(heard), z, v, cond, 16), x0, jv) for k, heard in students.items()}, v, jv


def measured(one):
    with np.errstate(divide="ignore"):  # the logarithm of a norm of zero
        found = geometry.measure([one], 60, 2)
    assert np.isfinite([*found.values()]).all() and all(low <= high for _, low, high in found.values())
    return {k: value for k, (value, _, _) in found.items()}


def flat_kl(spectra):
    """KL(P ‖ flat) of the mean P of spectra."""
    p = np.mean(spectra, 0)
    return np.log(len(p)) + (p * np.log(p)).sum()


def test_a_response_of_exactly_zero_is_a_number_everywhere(linear):
    students, _, jv = linear
    deaf = students["deaf"]
    json.dumps(deaf, allow_nan=False)
    assert set(deaf["cos"]) == set(deaf["ratio"]) == {0} and set(deaf["relative"]) == {1}
    assert deaf["mse"] == pytest.approx(jv.square().flatten(1).mean(1).tolist(), rel=1e-4)
    bins = len(deaf["spectrum"][0])
    assert np.allclose(deaf["spectrum"], 1 / bins, rtol=1e-4)  # that of nothing is flat
    silent = torch.cat([jv[:1], 0 * jv[:1]])
    assert torch.equal(spectrum(silent)[0], spectrum(jv[:1])[0])  # and what is beside it stays as it is
    assert spectrum(silent)[1].tolist() == pytest.approx([1 / bins] * bins, rel=1e-12)
    assert spectrum(silent.float()).isfinite().all() and spectrum(1e-30 * jv.float())[0, 3] != pytest.approx(1 / bins)
    assert compare(jv, jv)["relative"].max() == 0 and compare(0 * jv, jv)["cos"].abs().max() == 0


def test_spectra_are_shares_of_power():
    """Not of amplitude; and a student that lacks the one wave or the other altogether is off by a number."""
    slow, fast = (torch.cos(2 * torch.pi * k * torch.arange(16) / 16).expand(1, 4, 16, 16) for k in (1, 3))
    teacher = spectrum(slow + 2 * fast)
    assert teacher[0, [1, 3]].tolist() == pytest.approx([0.2, 0.8])
    half = spectrum(slow + fast).numpy()
    assert spectral_kl(half, teacher.numpy()) == pytest.approx(0.2 * np.log(0.2 / 0.5) + 0.8 * np.log(0.8 / 0.5))
    assert spectral_kl(teacher.numpy(), teacher.numpy()) == 0
    lost = [spectral_kl(spectrum(x).numpy(), teacher.numpy()) for x in (slow, fast)]
    assert np.isfinite(lost).all() and lost[0] > lost[1] > 1


def test_table1_has_its_ceiling_its_floor_and_what_is_between(linear):
    students, v, _ = linear
    itself, deaf, elements, noises = (measured(students[k]) for k in ("itself", "deaf", "elements", "noises"))
    assert [itself[k] for k in ("cos", "ratio")] == pytest.approx([1, 1])
    assert [itself[k] for k in ("relative", "mse", "value", "value_mean", "spectral_kl")] == pytest.approx([0] * 5)
    assert [deaf[k] for k in ("cos", "ratio", "relative")] == pytest.approx([0, 0, 1], abs=2 * geometry.LEAST)
    assert deaf["spectral_kl"] == pytest.approx(flat_kl(students["deaf"]["teacher_spectrum"]), rel=1e-3)
    # What is heard is at right angles to what is not: cos = ratio = the share of v's norm, relative the rest.
    share = v[:, :2].flatten(1).norm(dim=1) / v.flatten(1).norm(dim=1)
    assert students["elements"]["cos"] == pytest.approx(share.tolist(), rel=1e-4)
    assert students["elements"]["ratio"] == pytest.approx(share.tolist(), rel=1e-4)
    assert students["elements"]["relative"] == pytest.approx((1 - share**2).tolist(), rel=1e-3)
    assert elements["ratio"] == pytest.approx(share.log().mean().exp().item(), rel=1e-4)
    assert students["noises"]["cos"] == pytest.approx([0, 1] * (POINTS // 2), abs=1e-6)
    assert noises["cos"] == pytest.approx(0.5) and noises["relative"] == pytest.approx(0.5)
    for half in (elements, noises):
        between(deaf["cos"], half["cos"], itself["cos"])
        for key in ("relative", "mse", "value", "value_mean"):
            between(itself[key], half[key], deaf[key])
    s, t = (np.array(students["noises"][k]) for k in ("spectrum", "teacher_spectrum"))
    mixed = (np.full(s.shape[1], 1 / s.shape[1]) + t[1::2].mean(0)) / 2  # of half of them flat
    assert noises["spectral_kl"] == pytest.approx((t.mean(0) * np.log(t.mean(0) / mixed)).sum(), rel=1e-2)
    between(itself["spectral_kl"], noises["spectral_kl"], deaf["spectral_kl"])


def test_differences_of_table1_go_from_the_floor_to_the_ceiling(linear):
    results = {k: {"endpoint": x, "quality": {"scene": [1] * POINTS}} for k, x in linear[0].items()}

    def less(gad, base):
        return geometry.difference([results[base]], [results[gad]], 60, 2)

    whole, half, none = (less(k, "deaf") for k in ("itself", "elements", "deaf"))
    assert set(none.values()) == {(0, 0, 0)}  # a floor less a floor is no NaN
    assert np.isfinite([*whole.values(), *half.values()]).all()
    assert whole["cos"] == pytest.approx([1] * 3) and whole["relative"] == pytest.approx([-1] * 3)
    assert whole["off"] == pytest.approx([np.log(geometry.LEAST)] * 3)
    assert whole["spectral_kl"][0] == pytest.approx(-flat_kl(linear[0]["deaf"]["teacher_spectrum"]), rel=1e-3)
    assert whole["scene"] == (0, 0, 0)
    between(none["cos"][0], half["cos"][0], whole["cos"][0])
    for key in ("off", "mse", "relative", "value"):
        between(whole[key][0], half[key][0], none[key][0])
        assert half[key][2] < 0, key
    noises = less("noises", "deaf")
    assert noises["cos"][0] == pytest.approx(0.5)
    assert noises["off"][0] == pytest.approx(np.log(geometry.LEAST) / 2)  # as far off at every other noise
    between(whole["spectral_kl"][0], noises["spectral_kl"][0], 0)
    back = less("deaf", "itself")
    assert back["cos"] == pytest.approx([-1] * 3) and back["off"] == pytest.approx([-np.log(geometry.LEAST)] * 3)


# Tables 1 and 4, of a real network. A student here is its teacher led off to one image.


class Drawn:
    """A flow that hears a share of its teacher: x̂0 = share · its teacher's + (1 − share) · `end`."""

    def __init__(self, backbone, share, end):
        self.network, self.share, self.end = backbone.network, share, end
        self.dtype, self.config = backbone.network.dtype, backbone.network.config
        self.told = backbone.levels.train_steps * self.config.timestep_scale

    def __call__(self, x, timestep, **kwargs):
        its = self.network(x, timestep=timestep, **kwargs)[0]
        return (torch.lerp((x - self.end) / (timestep / self.told).view(-1, 1, 1, 1), its, self.share),)


@pytest.fixture(scope="module")
def drawn(mini):
    """SANA, its own paths in four steps without guidance, of two prompts, and students by share."""
    backbone, (prompts, steps) = mini("sana"), (["a red circle", "a blue square"], 4)
    z, v, cond = Tangents.inputs(backbone, prompts, (0, 1))
    t = Tangents(*tangents(
        lambda c: lambda z: backbone.path(backbone.network, z, c, steps, 1.0, backbone.times(steps)), z, v, cond, 4
    ), cond)
    return backbone, t, {share: Drawn(backbone, share, t.x0.mean(0)) for share in SHARES}


def test_local_maps_of_a_real_network_between_floor_and_ceiling(drawn, monkeypatch):
    """J of the half deaf is half the teacher's: its cosine is whole, and only the norm tells."""
    monkeypatch.setattr("gad.evaluation.geometry.LEVELS", (0.7,))
    backbone, teacher, students = drawn
    found = {share: local_rows(backbone, network, teacher, 1.0, 4) for share, network in students.items()}
    deaf, half, itself = (found[share]["0.7"] for share in SHARES)
    for share, one in ((0.5, half), (1, itself)):
        assert one["cos"] == pytest.approx([1] * 2, abs=1e-4)
        assert one["ratio"] == pytest.approx([share] * 2, rel=1e-3)
        assert one["relative"] == pytest.approx([(1 - share) ** 2] * 2, abs=1e-3)
    assert max(deaf["ratio"]) < 1e-4 and deaf["relative"] == pytest.approx([1] * 2, abs=1e-3)
    assert half["value"] == pytest.approx([x / 4 for x in deaf["value"]], rel=1e-3) and min(deaf["value"]) > 0.01
    assert max(itself["value"]) < 1e-6


def test_endpoints_of_a_real_network_between_floor_and_ceiling(drawn):
    backbone, t, students = drawn
    found = [
        row(*tangents(lambda c, s=s: endpoint(backbone, s, c, t.steps), t.z, t.v, t.cond, 4), t.x0, t.jv)
        for s in students.values()
    ]
    deaf, _, itself = found
    assert itself["cos"] == pytest.approx([1] * 2, abs=1e-4) and max(itself["relative"]) < 1e-6
    assert max(deaf["ratio"]) < 1e-4 and deaf["relative"] == pytest.approx([1] * 2, abs=1e-3)
    away = (t.x0.mean(0) - t.x0).square().flatten(1).sum(1) / t.x0.square().flatten(1).sum(1)
    assert deaf["value"] == pytest.approx(away.tolist(), rel=1e-3)
    for key, order in (("ratio", found), ("relative", found[::-1]), ("value", found[::-1])):
        for values in zip(*(one[key] for one in order), strict=True):
            between(*values)
    kl = [spectral_kl(np.array(one["spectrum"]), np.array(one["teacher_spectrum"])) for one in found]
    assert kl[2] < 1e-6 < kl[1] < kl[0]
    silent = Heard(SimpleNamespace(draw=lambda z, c: backbone.sample(backbone.network, z, c, 1)), 0.0)
    _, jv = tangents(lambda c: lambda z: silent.draw(z, c), t.z, t.v, t.cond, 4)
    assert not jv.any()  # of noise that reaches no network


def test_table4_has_its_ceiling_its_floor_and_what_is_between(drawn, monkeypatch):
    backbone, t, students = drawn
    teacher = Paths(t.states, t.cond)
    found = {share: trajectory.errors(backbone, network, teacher, 1) for share, network in students.items()}
    deaf, half, itself = ({k: np.array(x) for k, x in found[share].items()} for share in SHARES)
    assert max(x.max() for x in itself.values()) < 1e-5
    # However it comes there, the deaf one ends at its one image: all it errs at the end is its last step's own.
    gap = (t.x0.mean(0) - t.x0).flatten(1).norm(dim=1)
    away = gap / t.x0.flatten(1).norm(dim=1)
    assert deaf["relative"][:, -1] == pytest.approx(away.numpy(), rel=1e-3)
    assert deaf["local"][:, -1] == pytest.approx(away.numpy(), rel=1e-3)
    assert deaf["rmse"][:, -1] == pytest.approx((gap / t.x0[0].numel() ** 0.5).numpy(), rel=1e-3)
    # From the teacher's state half of the way is missing.
    assert half["local"] == pytest.approx(deaf["local"] / 2, rel=1e-3)
    assert half["relative"][:, 0] == pytest.approx(deaf["relative"][:, 0] / 2, rel=1e-3)
    for key in ("relative", "rmse"):
        assert (itself[key] < half[key]).all() and (half[key] < deaf[key]).all()
    own = {"base": found[0.0], "rkd": found[0.5], "gad": found[1.0]}
    monkeypatch.setattr(trajectories, "models", lambda p, b: {
        ("tdm", k): [{"trajectory": x}] for k, x in own.items()
    })
    long = trajectories.table4(SimpleNamespace(
        report=SimpleNamespace(bootstrap=50), grid=SimpleNamespace(backbones=["sana"]), base_of=params.load().base_of
    ))

    def at(model, metric):
        return long[(long["model"] == model) & (long["metric"] == metric)].set_index("step")[["value", "low", "high"]]

    assert np.isfinite(long[["value", "low", "high"]].to_numpy()).all()
    assert at("TDM + GAD", "change").to_numpy() == pytest.approx(np.full((4, 3), -1.0), abs=1e-4)
    assert at("TDM + RKD", "change").loc[1].tolist() == pytest.approx([-0.5] * 3, rel=1e-3)
    assert at("TDM + RKD", "change")["high"].max() < 0 and at("TDM + RKD", "change")["low"].min() > -1
    assert at("TDM", "inherited").loc[4].tolist() == pytest.approx([0] * 3, abs=1e-4)
    less = at("TDM + GAD − base", "relative").loc[4]
    assert less["value"] == pytest.approx(-away.mean().item(), rel=1e-3) and less["high"] < 0


# Table 5, of a model whose state is where it draws things.


class Placing(BACKBONES["sd2"]):
    """States (B, 1, 2, 2) are the centres (x, y), in widths of the image, at which the two objects of `world` are
    drawn; attention to an object's words is a blob around it. The network says how many of the two can be moved."""

    world = None

    def noise(self, n, seed):
        return 0.2 + 0.6 * torch.rand(n, 1, 2, 2, generator=torch.Generator().manual_seed(seed))

    def attention(self, network, x, t, cond, tokens):
        heard = (torch.arange(2) < network).view(1, 1, 2, 1)
        centres = torch.where(heard, x, x.detach() + 0 * x)[:, 0]
        cells = (torch.arange(16) + 0.5) / 16
        distance = (centres[..., None] - cells).square()  # (B, 2, xy, 16)
        # With long tails: what is far from its box would not be moved beside what is near.
        blobs = (1 + (distance[:, :, 1, :, None] + distance[:, :, 0, None]) / 0.1**2).flatten(2) ** -2
        assert tokens.shape[1] == 4  # a colour and a shape each
        return [blobs.repeat_interleave(2, 1)]

    def step(self, network, x_t, t, s, cond, cfg=1.0):
        return x_t

    def decode(self, latents, batch=64):
        centre = self.world.centre.copy()
        centre[:, :2] = scenes.SIZE * latents[:, 0].double().numpy()
        return replace(self.world, centre=centre).render()


@pytest.fixture(scope="module")
def layouts(mini):
    """What the stage measures of models that move both their objects, none, and one of two."""
    p, many = params.load(), scenes.sample(80, 7, "test")
    backbone = Placing(mini("sd2").pipeline, "sd2")
    backbone.world = world = many[np.flatnonzero(many.count == 2)[:16]]
    names = [world.objects(k) for k in range(len(world))]
    phrases = [[f"{colour} {shape}" for shape, colour in own] for own in names]
    boxes = [world.boxes(k) for k in range(len(world))]
    mini_world = benches.Mini("sd2", p, "cpu")
    mini_world.layouts = lambda backbone: benches.Layouts(world.captions(), phrases, names, boxes)
    uses = SimpleNamespace(evals=30, scale=0.015, sweep=[0.003], draws=10)
    bench = SimpleNamespace(
        u=uses, p=p, backbone=backbone, world=mini_world, which=SimpleNamespace(student_steps=4),
        decoded=backbone.decode, score=lambda images, prompts: torch.zeros(len(images)),
    )

    def kept(part, z, batch, *_):
        return torch.cat([part(slice(i, i + batch)) for i in range(0, len(z), batch)])

    return {k: stage._layout(bench, SimpleNamespace(network=k, steps=4, cfg=1.0, kept=kept)) for k in (0, 1, 2)}


def test_layouts_follow_their_boxes_do_not_or_half_of_them_do(layouts):
    deaf, half, obedient = layouts.values()
    assert deaf["free"] == half["free"] == obedient["free"]  # that nobody is asked for
    assert deaf["guided"] == deaf["shuffled"] == deaf["0.003"] == deaf["free"]
    free, guided = obedient["free"], obedient["guided"]
    assert free["ap50"] < 0.15 and guided["ap50"] > 0.95 and guided["ap"] > 0.6
    assert max(guided["centre"]) < 4 < min(free["centre"]) and np.mean(guided["iou"]) > 0.8
    assert np.mean(guided["scene"]) > 0.9
    assert obedient["shuffled"]["ap50"] < 0.3  # it follows boxes, though not its own
    for key in ("ap", "ap50", "iou", "scene"):
        between(*(np.mean(found["guided"][key]) for found in (deaf, half, obedient)))
    between(*(np.mean(found["guided"]["centre"]) for found in (obedient, half, deaf)))
    between(*(np.mean(obedient[how]["iou"]) for how in ("free", "0.003", "guided")))


def test_table5s_effect_of_guidance_is_nothing_for_the_deaf(layouts):
    found = [tables._table5({"layout": one}) for one in layouts.values()]
    for floor in tables.FLOORS:
        for metric in ("AP", "AP50"):
            deaf, half, whole = (tables.interval(one[f"guided − {floor}, {metric}"], 50) for one in found)
            assert deaf == (0, 0, 0)
            between(0, half[0], whole[0])
            assert half[1] > 0 and whole[1] > half[0]
        deaf, half, whole = (tables.interval(one[f"guided − {floor}, centre, px"], 50) for one in found)
        assert deaf == (0, 0, 0) and whole[2] < half[0] < 0
    assert whole[0] < -10


# Table 6's gain: of noises that lie nearest to a prompt.


class Summing:
    """Images that are the noise and its prompt's pattern added up."""

    def __init__(self, patterns):
        self.patterns = patterns | {"": torch.zeros(3, 4, 4)}

    def draw(self, z, prompts):
        return 0.5 + 0.01 * (z + torch.stack([self.patterns[p] for p in prompts]))


def test_the_gain_of_the_nearest_noise_is_all_the_teachers_none_of_the_deaf_and_some_of_the_half_deaf():
    bench, patterns = object.__new__(stage._Bench), {f"prompt {k}": normal(3, 4, 4, seed=k) for k in range(12)}
    bench.u = SimpleNamespace(seeds=16, query=3, picks=2)
    bench.noises, bench.prompts = normal(200, 3, 4, 4, seed=99), [*patterns]

    def unit(x):
        return x / x.norm(dim=1, keepdim=True)

    def texts(prompts):
        return unit(torch.stack([patterns[p] for p in prompts]).flatten(1))

    bench.world = SimpleNamespace(
        texts=texts, embed=lambda images: unit((images - 0.5).flatten(1)), attributes=noise_query.colours
    )
    bench.texts, teacher = texts(bench.prompts), Summing(patterns)
    bench.backbone, bench.which = SimpleNamespace(network=None), SimpleNamespace(teacher_steps=4)
    bench.model = lambda *made: teacher
    library = stage._library(bench, bench.matrix(teacher))

    def query(model):
        images = bench.matrix(model)
        usual = bench.score(images.flatten(0, 1), bench.prompts * 16).unflatten(0, (16, 12)).mean(0).tolist()
        return stage._query(bench, model, images, library, usual)

    deaf, half, whole = (np.array(query(Heard(teacher, share))["clip_gain"]) for share in SHARES)
    assert query(teacher)["clip_gain"] == whole.tolist()
    assert deaf == pytest.approx(np.zeros(12), abs=1e-6)
    z, p = bench.noises.flatten(1).double().numpy(), np.stack([x.double().numpy().ravel() for x in patterns.values()])
    nearest = (z @ p.T / np.linalg.norm(z, axis=1)[:, None]).argmax(0)
    cos = ((z[:, None] + p) * p).sum(-1) / np.linalg.norm(z[:, None] + p, axis=-1) / np.linalg.norm(p, axis=-1)
    assert whole == pytest.approx(cos[nearest, np.arange(12)] - cos[:16].mean(0), abs=1e-4)
    between(0, half.mean(), whole.mean())
    assert tables.interval(half, 50)[1] > 0.02 and (half < whole).mean() > 0.6
    shown = tables._table6({"query": query(Heard(teacher, 0.0))})["CLIP, nearest less usual"]
    assert np.abs(tables.interval(shown, 50)).max() < 1e-6
