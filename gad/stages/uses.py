"""What a model's noise is good for: Tables 2, 3, 5 and 6 and Figure 5, of teachers and of students."""

import shutil
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torchvision.utils import save_image

from .. import paths, tables
from ..backbones import Backbone, load
from ..evaluation import diversity, layout, noise_query, seeds
from ..params import Params, Run
from ..world import detector, scenes
from ..world import judge as judges
from ..world import teacher as teachers
from .common import prepare, write_json

KINDS = ("linear", "cnn")


def judge(p: Params) -> dict:
    """Train the world's OpenCLIP model; its folder and metrics."""
    accelerator = prepare(p)
    work = paths.resume("judge")
    metrics = judges.pretrain(paths.judge(), work, p.judge.model_dump(), p.seeds.world, accelerator)
    write_json(paths.judge() / "metrics.json", metrics)
    shutil.rmtree(work)
    return metrics


@dataclass(frozen=True)
class _Model:
    """One model as the tables see it: how it draws from given noises."""

    backbone: Backbone
    network: torch.nn.Module
    steps: int
    cfg: float
    first: tuple | None = None

    def draw(self, z, prompts: list[str]) -> torch.Tensor:
        """Images (n, 3, 64, 64) of n noises and prompts."""
        images = teachers.draw(self.backbone, self.network, z, prompts, self.steps, self.cfg, first=self.first)
        return images.cpu()


class _Bench:
    """What all models of a backbone are measured on and by: prompts, noises, the world's own images, the judge."""

    def __init__(self, name: str, p: Params):
        self.p, self.u, device = p, p.uses, prepare(p).device
        self.which, self.folder = p.backbones[name], paths.references(name)
        self.backbone = load(name, p).to(device)
        self.judge = judges.load(paths.judge(), device)
        self.world = _world(p)
        self.prompts = self.world.captions()
        self.names = [self.world.objects(k) for k in range(len(self.world))]
        self.texts = self.judge.texts(self.prompts)
        # The library; its first are the seeds.
        self.noises = self.backbone.noise(max(self.u.library, self.u.seeds), p.seeds.world + 22)

    @cached_property
    def real(self) -> torch.Tensor:
        """(S, P, 3, 64, 64): the world's own layouts of the same prompts."""
        own = [scenes.relayout(self.world[k], self.u.seeds, k).render() for k in range(len(self.world))]
        return torch.stack(own, 1)

    @cached_property
    def real_features(self) -> torch.Tensor:
        return self.features(self.real)

    def features(self, images) -> torch.Tensor:
        """The judge's, (S, P, D), of images (S, P, …)."""
        return self.judge.images(images.flatten(0, 1)).unflatten(0, images.shape[:2])

    def matrix(self, model) -> torch.Tensor:
        """Images (S, P, 3, 64, 64): every seed under every prompt."""
        z, n = self.noises[:self.u.seeds], len(self.prompts)
        return model.draw(z.repeat_interleave(n, 0), self.prompts * len(z)).unflatten(0, (len(z), n))


def references(backbone: str, p: Params) -> dict:
    """The teacher's side, once a backbone: its own measures, classifiers of its seeds, and its library of noises.
    Of the miniature world alone: of another there is nothing yet, and its backbones have no rows."""
    if p.backbones[backbone].world != "mini":
        return _nothing(paths.references(backbone) / "teacher.json")
    bench = _Bench(backbone, p)
    teacher, which = bench.backbone, bench.which
    model = _Model(teacher, teacher.network, which.teacher_steps, which.cfg)
    bench.folder.mkdir(parents=True, exist_ok=True)
    images = bench.matrix(model)
    classifiers = _classifiers(bench, images)
    for kind, classifier in classifiers.items():
        classifier.save(bench.folder / f"{kind}.safetensors")
    library = _library(bench, images)
    write_json(bench.folder / "library.json", library)
    found = _images(bench, images)
    out = {**found, "seeds": _seeds(bench, images, classifiers, {}), "layout": _layout(bench, model)}
    out["query"] = _query(bench, model, images, library, found["quality"]["clip"])
    out["world"] = _images(bench, bench.real)
    write_json(bench.folder / "teacher.json", out)
    _show(images, bench.folder / "teacher.png")
    return _told(out)


def use(run: Run, p: Params) -> dict:
    """The same measures of student `run`, and of a base student's images with the hybrid sampler."""
    if p.backbones[run.backbone].world != "mini":
        save_image(torch.ones(3, 8, 8), _made(paths.use(run).with_suffix(".png")))
        return _nothing(paths.use(run))
    bench = _Bench(run.backbone, p)
    teacher, which = bench.backbone, bench.which
    student = load(paths.student(run)).to(teacher.device).network
    classifiers = {kind: seeds.Classifier.load(bench.folder / f"{kind}.safetensors") for kind in KINDS}
    library = tables.read(bench.folder / "library.json")

    def measured(images):
        return _images(bench, images) | {"seeds": _seeds(bench, images, _classifiers(bench, images), classifiers)}

    model = _Model(teacher, student, which.student_steps, 1.0)
    images = bench.matrix(model)
    out = {"run": str(run), **measured(images), "layout": _layout(bench, model)}
    out["query"] = _query(bench, model, images, library, out["quality"]["clip"])
    if run.variant == "base" and which.student_steps > 1:
        hybrid = _Model(teacher, student, which.student_steps, 1.0, (teacher.network, which.cfg))
        out["hybrid"] = measured(bench.matrix(hybrid))
    write_json(paths.use(run), out)
    _show(images, paths.use(run).with_suffix(".png"))
    return _told(out)


def _nothing(path) -> dict:
    write_json(path, {})
    return {"measured": "nothing: these tables are of the miniature world"}


def _made(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _world(p) -> scenes.Scenes:
    """One scene a prompt, no two captions alike: no prompt is on both sides of Table 2's split."""
    many = scenes.sample(8 * p.uses.prompts, p.seeds.world + 21, "test")
    first = {caption: i for i, caption in reversed(list(enumerate(many.captions())))}
    return many[np.array(sorted(first.values())[:p.uses.prompts])]


def _library(bench, images) -> dict:
    """What the teacher makes of the library's noises unprompted; the noise nearest to each prompt by it; and each
    attribute's spread over noises, within a prompt."""
    teacher, z = bench.backbone, bench.noises
    drawn = _Model(teacher, teacher.network, bench.which.teacher_steps, 1.0).draw(z, [""] * len(z))
    known = noise_query.attributes(images.flatten(0, 1))
    within = {k: np.nanvar(v.reshape(images.shape[:2]), axis=0) for k, v in known.items()}
    return {
        "attributes": {k: v.tolist() for k, v in noise_query.attributes(drawn).items()},
        "nearest": (bench.texts @ bench.judge.images(drawn).T).argmax(1).tolist(),
        "spread": {k: float(np.sqrt(np.nanmean(v))) for k, v in within.items()},
    }


# Measures: lists over prompts, so that tables can resample them.


def _images(bench, images) -> dict:
    """Table 3 and Figure 5 of images (S, P, …)."""
    shape, features = images.shape[:2], bench.features(images)
    right = detector.judge(images.flatten(0, 1), bench.names * shape[0])
    points = [detector.layouts(images[:, k], [names] * shape[0]) for k, names in enumerate(bench.names)]
    prior = [scenes.relayout(bench.world[k], 512, k).centre[:, 0] for k in range(shape[1])]
    return {
        "quality": {
            "clip": (features * bench.texts).sum(-1).mean(0).tolist(),
            **{k: v.reshape(shape).mean(0).tolist() for k, v in right.items()},
        },
        "distance": diversity.distances(features.numpy(), bench.real_features.numpy(), bench.u.draws),
        "diversity": {
            "vendi": diversity.vendi(features.numpy()).tolist(),
            "layout_vendi": [diversity.layout_vendi(x) for x in points],
            "coverage": [diversity.coverage(x[:, 0], its) for x, its in zip(points, prior, strict=True)],
        },
    }


def _classifiers(bench, images) -> dict[str, seeds.Classifier]:
    return {kind: seeds.fit(images[:, :bench.u.train], kind) for kind in KINDS}


def _seeds(bench, images, own: dict, its: dict) -> dict:
    """Table 2 of images (S, P, …): `self` by classifiers of their `own`, `teacher` by the teacher's, `its`,
    `prompts` by the linear one from fewer prompts."""
    n = bench.u.train
    train, test = images[:, :n], images[:, n:]
    out = {"self": {k: _named(c.ranks(test)) for k, c in own.items()}}
    if its:
        out["teacher"] = {k: _named(c.ranks(test)) for k, c in its.items()}
    fewer = seeds.curve(train, test, [k for k in (n // 4, n // 2) if k])
    return out | {"prompts": {k: _named(r) for k, r in fewer.items()} | {n: out["self"]["linear"]}}


def _named(ranks) -> dict[str, list[float]]:
    return {f"top{k}": seeds.accuracies(ranks, k) for k in (1, 5)}


def _layout(bench, model) -> dict:
    """Table 5: images of two objects each, free, guided into boxes at each scale, and guided into another prompt's."""
    u, seed, backbone = bench.u, bench.p.seeds.world + 23, bench.backbone
    many = scenes.sample(8 * u.layouts, seed, "test")
    world = many[np.flatnonzero(many.count == 2)[:u.layouts]]
    names, captions = [world.objects(k) for k in range(len(world))], world.captions()
    boxes = [scenes.relayout(world[k], 1, k).boxes(0) for k in range(len(world))]
    z, cond = backbone.noise(len(world), seed), backbone.encode(captions)
    tokens = [
        layout.phrase_tokens(backbone, caption, [f"{colour} {shape}" for shape, colour in objects])
        for caption, objects in zip(captions, names, strict=True)
    ]
    times = backbone.times(bench.which.student_steps)[:-1][:2]

    def measured(boxes_seen, scale):
        latents = [
            layout.guided(backbone, model.network, z[i:i + 32], cond[i:i + 32], tokens[i:i + 32], boxes_seen[i:i + 32],
                          model.steps, model.cfg, times, u.evals if scale else 0, scale)
            for i in range(0, len(z), 32)
        ]
        images = backbone.decode(torch.cat(latents)).cpu()
        return {
            **layout.score(images, names, boxes), **layout.average_precision(images, names, boxes, u.draws),
            "clip": bench.judge.score(images, captions).tolist(),
            "scene": detector.judge(images, names)["scene"].astype(int).tolist(),
        }

    out = {"free": measured(boxes, 0.0), "shuffled": measured(boxes[1:] + boxes[:1], u.scale)}
    return out | {str(s): measured(boxes, s) for s in u.sweep} | {"guided": measured(boxes, u.scale)}


def _query(bench, model, images, library, usual: list[float]) -> dict:
    """Table 6: what a model makes, prompted, of noises chosen by what the teacher makes of them unprompted. `usual`:
    each prompt's CLIP over the seeds."""
    z, prompts, shape = bench.noises, bench.prompts, images.shape[:2]
    n, values = bench.u.query, {k: np.array(v, float) for k, v in library["attributes"].items()}
    ends = {k: noise_query.extremes(v, bench.u.picks) for k, v in values.items()}
    chosen = np.unique(np.concatenate([np.concatenate(e) for e in ends.values()]))
    drawn = model.draw(z[chosen].repeat_interleave(n, 0), prompts[:n] * len(chosen))
    made = {k: v.reshape(len(chosen), n) for k, v in noise_query.attributes(drawn).items()}
    seen = {k: v.reshape(shape) for k, v in noise_query.attributes(images.flatten(0, 1)).items()}
    at = {index: row for row, index in enumerate(chosen)}
    shift = {
        k: noise_query.shift(*(made[k][[at[i] for i in end]] for end in ends[k]), library["spread"][k]).tolist()
        for k in ends
    }
    rho = {k: noise_query.rank_correlation(v[:shape[0]], seen[k]).tolist() for k, v in values.items()}
    gain = bench.judge.score(model.draw(z[library["nearest"]], prompts), prompts) - torch.tensor(usual)
    return {"shift": shift, "rho": rho, "clip_gain": gain.tolist()}


def _show(images, path):
    """Six seeds down, four prompts across."""
    shown = images[:6, :4]
    save_image(shown.flatten(0, 1), path, nrow=shown.shape[1], padding=2, pad_value=1.0)


def _told(out) -> dict:
    """A few means, for the notebook."""
    return {
        "clip": float(np.mean(out["quality"]["clip"])), "scene": float(np.mean(out["quality"]["scene"])),
        "vendi": float(np.mean(out["diversity"]["vendi"])),
        "seed named, top-1": float(np.mean(out["seeds"]["self"]["linear"]["top1"])),
        "AP50 free": out["layout"]["free"]["ap50"], "AP50 guided": out["layout"]["guided"]["ap50"],
        "area, shift": float(np.nanmean(out["query"]["shift"]["area"])),
    }
