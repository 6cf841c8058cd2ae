"""What a model's noise is good for: Tables 2, 3, 5 and 6 and Figure 5, of teachers and of students."""

import json
import shutil
from dataclasses import dataclass

import numpy as np
import torch
from torchvision.utils import save_image

from .. import paths
from ..backbones import load
from ..evaluation import diversity, layout, noise_query, seeds
from ..params import Params, Run
from ..world import judge as judges
from ..world import scenes
from ..world.detector import judge as read
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

    backbone: object
    network: torch.nn.Module
    steps: int
    cfg: float
    first: tuple | None = None
    batch: int = 128

    @torch.no_grad()
    def draw(self, z, prompts: list[str]) -> torch.Tensor:
        """Images (n, 3, 64, 64) of n noises and prompts."""
        cond, out = self.backbone.encode(prompts), []
        for i in range(0, len(z), self.batch):
            part = slice(i, i + self.batch)
            latents = self.backbone.sample(
                self.network, z[part], cond[part], self.steps, self.cfg, first=self.first
            )
            out.append(self.backbone.decode(latents).cpu())
        return torch.cat(out)


def references(backbone: str, p: Params) -> dict:
    """The teacher's side, once a backbone: its own measures, classifiers of its seeds, and its library of noises."""
    which = p.backbones[backbone]
    accelerator = prepare(p)
    teacher, judge = _loaded(backbone, p, accelerator)
    model, folder = _Model(teacher, teacher.network, which.teacher_steps, which.cfg), paths.references(backbone)
    folder.mkdir(parents=True, exist_ok=True)
    world = _world(p)
    images = _matrix(model, world, p)
    classifiers = {kind: seeds.fit(images[:, :p.uses.train], kind) for kind in KINDS}
    for kind, classifier in classifiers.items():
        classifier.save(folder / f"{kind}.safetensors")
    library = _library(teacher, p, images, world, judge)
    write_json(folder / "library.json", library)
    out = _images(images, world, judge, p) | {"seeds": _seeds(images, {}, p)}
    out |= {"layout": _layout(model, judge, p), "query": _query(model, images, world, judge, library, p)}
    out["world"] = _images(_real(world, p), world, judge, p)
    write_json(folder / "teacher.json", out)
    _show(images, folder / "teacher.png")
    return _told(out)


def use(run: Run, p: Params) -> dict:
    """The same measures of student `run`, and of a base student's images with the hybrid sampler."""
    which = p.backbones[run.backbone]
    accelerator = prepare(p)
    teacher, judge = _loaded(run.backbone, p, accelerator)
    student = load(paths.student(run)).to(accelerator.device).network
    folder, world = paths.references(run.backbone), _world(p)
    classifiers = {kind: seeds.Classifier.load(folder / f"{kind}.safetensors") for kind in KINDS}
    library = json.loads((folder / "library.json").read_text())

    def measured(model):
        images = _matrix(model, world, p)
        return images, _images(images, world, judge, p) | {"seeds": _seeds(images, classifiers, p)}

    model = _Model(teacher, student, which.student_steps, 1.0)
    images, found = measured(model)
    out = {"run": str(run), **found}
    out |= {"layout": _layout(model, judge, p), "query": _query(model, images, world, judge, library, p)}
    if run.variant == "base" and which.student_steps > 1:
        hybrid = _Model(teacher, student, which.student_steps, 1.0, (teacher.network, which.cfg))
        out["hybrid"] = measured(hybrid)[1]
    write_json(paths.use(run), out)
    _show(images, paths.use(run).with_suffix(".png"))
    return _told(out)


def _loaded(backbone, p, accelerator):
    return load(backbone, p).to(accelerator.device), judges.load(paths.judge(), accelerator.device)


# What is drawn: the same noises and prompts for every model.


def _world(p) -> scenes.Scenes:
    """One scene a prompt, no two captions alike: no prompt is on both sides of Table 2's split."""
    many = scenes.sample(8 * p.uses.prompts, p.seeds.world + 21, "test")
    first = {caption: i for i, caption in reversed(list(enumerate(many.captions())))}
    return many[np.array(sorted(first.values())[:p.uses.prompts])]


def _noises(backbone, p):
    """The library; its first are the seeds."""
    return backbone.noise(max(p.uses.library, p.uses.seeds), p.seeds.world + 22)


def _matrix(model, world, p) -> torch.Tensor:
    """Images (S, P, 3, 64, 64): every seed under every prompt."""
    z, n = _noises(model.backbone, p)[:p.uses.seeds], len(world)
    images = model.draw(z.repeat_interleave(n, 0), world.captions() * len(z))
    return images.unflatten(0, (len(z), n))


def _real(world, p) -> torch.Tensor:
    """(S, P, 3, 64, 64): the world's own layouts of the same prompts."""
    return torch.stack([scenes.relayout(world[k], p.uses.seeds, k).render() for k in range(len(world))], 1)


def _library(teacher, p, images, world, judge) -> dict:
    """What the teacher makes of the library's noises unprompted; the noise nearest to each prompt by it; and each
    attribute's spread over noises, within a prompt."""
    which = p.backbones[teacher.name]
    z = _noises(teacher, p)
    drawn = _Model(teacher, teacher.network, which.teacher_steps, 1.0).draw(z, [""] * len(z))
    known = noise_query.attributes(images.flatten(0, 1))
    within = {k: np.nanvar(v.reshape(images.shape[:2]), axis=0) for k, v in known.items()}
    return {
        "attributes": {k: v.tolist() for k, v in noise_query.attributes(drawn).items()},
        "nearest": (judge.texts(world.captions()) @ judge.images(drawn).T).argmax(1).tolist(),
        "spread": {k: float(np.sqrt(np.nanmean(v))) for k, v in within.items()},
    }


# What is measured: lists over prompts, so that tables can resample them.


def _images(images, world, judge, p) -> dict:
    """Table 3 and Figure 5 of images (S, P, …)."""
    shape, captions = images.shape[:2], world.captions()
    names = [world.objects(k) for k in range(len(world))]
    features = judge.images(images.flatten(0, 1))
    clip = (features.unflatten(0, shape) * judge.texts(captions)).sum(-1)
    right = read(images.flatten(0, 1), names * shape[0])
    points = [diversity.layouts(images[:, k], names[k]) for k in range(shape[1])]
    prior = [scenes.relayout(world[k], 512, k).centre[:, 0] for k in range(shape[1])]
    features = features.unflatten(0, shape).numpy()
    real = judge.images(_real(world, p).flatten(0, 1)).unflatten(0, shape).numpy()
    return {
        "quality": {"clip": clip.mean(0).tolist(), **{k: v.reshape(shape).mean(0).tolist() for k, v in right.items()}},
        "distance": diversity.distances(features, real, p.uses.draws),
        "diversity": {
            "vendi": diversity.vendi(features).tolist(),
            "layout_vendi": [diversity.layout_vendi(x) for x in points],
            "coverage": [diversity.coverage(x[:, 0], its) for x, its in zip(points, prior, strict=True)],
        },
    }


def _seeds(images, teachers: dict, p) -> dict:
    """Table 2 of images (S, P, …): `self` by classifiers of their own, `teacher` by the teacher's, `prompts` by
    the linear one from fewer prompts."""
    train, test = images[:, :p.uses.train], images[:, p.uses.train:]
    own = {kind: seeds.fit(train, kind) for kind in KINDS}
    out = {"self": {k: _named(c.ranks(test)) for k, c in own.items()}}
    if teachers:
        out["teacher"] = {k: _named(c.ranks(test)) for k, c in teachers.items()}
    fewer = seeds.curve(train, test, [n for n in (p.uses.train // 4, p.uses.train // 2) if n])
    return out | {"prompts": {n: _named(r) for n, r in fewer.items()} | {p.uses.train: out["self"]["linear"]}}


def _named(ranks) -> dict[str, list[float]]:
    return {f"top{k}": seeds.accuracies(ranks, k) for k in (1, 5)}


def _layout(model, judge, p) -> dict:
    """Table 5: images of two objects each, free, guided into boxes at each scale, and guided into another prompt's."""
    many = scenes.sample(8 * p.uses.layouts, p.seeds.world + 23, "test")
    world = many[np.flatnonzero(many.count == 2)[:p.uses.layouts]]
    names, captions = [world.objects(k) for k in range(len(world))], world.captions()
    boxes = [scenes.relayout(world[k], 1, k).boxes(0) for k in range(len(world))]
    backbone, cond = model.backbone, model.backbone.encode(captions)
    tokens = [
        layout.phrase_tokens(backbone, caption, [f"{colour} {shape}" for shape, colour in objects])
        for caption, objects in zip(captions, names, strict=True)
    ]
    z = backbone.noise(len(world), p.seeds.world + 23)
    times = backbone.times(p.backbones[backbone.name].student_steps)[:-1][:2]

    def measured(boxes_seen, scale):
        latents = [
            layout.guided(backbone, model.network, z[i:i + 32], cond[i:i + 32], tokens[i:i + 32], boxes_seen[i:i + 32],
                          model.steps, model.cfg, times, p.uses.evals, scale)
            for i in range(0, len(z), 32)
        ]
        images = backbone.decode(torch.cat(latents)).cpu()
        clip = (judge.images(images) * judge.texts(captions)).sum(-1)
        return {
            **layout.score(images, names, boxes), **layout.average_precision(images, names, boxes, p.uses.draws),
            "clip": clip.tolist(), "scene": read(images, names)["scene"].astype(int).tolist(),
        }

    out = {"free": measured(boxes, 0.0), "shuffled": measured(boxes[1:] + boxes[:1], p.uses.scale)}
    return out | {str(s): measured(boxes, s) for s in p.uses.sweep} | {"guided": measured(boxes, p.uses.scale)}


def _query(model, images, world, judge, library, p) -> dict:
    """Table 6: what a model makes, prompted, of noises chosen by what the teacher makes of them unprompted."""
    z, prompts = _noises(model.backbone, p), world.captions()
    n, shape = p.uses.query, images.shape[:2]
    ends = {k: noise_query.extremes(np.array(v, float), p.uses.picks) for k, v in library["attributes"].items()}
    chosen = np.unique(np.concatenate([np.concatenate(e) for e in ends.values()]))
    drawn = model.draw(z[chosen].repeat_interleave(n, 0), prompts[:n] * len(chosen))
    made = {k: v.reshape(len(chosen), n) for k, v in noise_query.attributes(drawn).items()}
    at = {index: row for row, index in enumerate(chosen)}
    shift = {
        k: noise_query.shift(*(made[k][[at[i] for i in end]] for end in ends[k]), library["spread"][k]).tolist()
        for k in ends
    }
    seen = {k: v.reshape(shape) for k, v in noise_query.attributes(images.flatten(0, 1)).items()}
    rho = {
        k: noise_query.rank_correlation(np.array(v, float)[:shape[0]], seen[k]).tolist()
        for k, v in library["attributes"].items()
    }
    nearest, texts = model.draw(z[library["nearest"]], prompts), judge.texts(prompts)
    usual = (judge.images(images.flatten(0, 1)).unflatten(0, shape) * texts).sum(-1).mean(0)
    gain = (judge.images(nearest) * texts).sum(-1) - usual
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
