"""What a model's noise is good for: Tables 2, 3, 5 and 6 and Figure 5, of teachers and of students.

Latents, whose sampling takes nearly all of the time, are made in parts, with which an interrupted run goes on.
"""

import hashlib
import shutil
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torchvision.utils import save_image

from .. import paths, tables
from ..backbones import load_network
from ..benches import BENCHES, LAYOUTS, small
from ..embeddings import add_weights
from ..evaluation import diversity, layout, noise_query, seeds
from ..evaluation.geometry import rounded
from ..evaluation.images import unit
from ..params import Params, Run
from ..training import identity_key
from ..world import judge as judges
from .common import fingerprint, in_parts, placed, prepare, write_json

KINDS = ("linear", "cnn")
FIT = ("scene", "pickscore")  # how well an image fits, beside CLIP, in the one world or the other


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

    bench: "_Bench"
    network: torch.nn.Module
    steps: int
    cfg: float
    first: tuple | None = None

    @cached_property
    def weights(self) -> str:
        """A hash of the network's, taken once: at full size it is of gigabytes."""
        found = hashlib.sha256()
        add_weights(found, self.network)
        return found.hexdigest()

    @torch.no_grad()
    def draw(self, z, prompts: list[str]) -> torch.Tensor:
        """Images (n, 3, H, W), on the CPU and as their world keeps them, of n noises and prompts."""
        backbone, batch = self.bench.backbone, self.bench.world.batch
        unique = list(dict.fromkeys(prompts))
        cond, row = backbone.encode(unique, device="cpu"), {prompt: k for k, prompt in enumerate(unique)}
        rows = torch.tensor([row[prompt] for prompt in prompts])

        def part(j):
            own = cond[rows[j]].to(z.device)
            return backbone.sample(self.network, z[j], own, self.steps, self.cfg, first=self.first)

        return self.bench.decoded(self.kept(part, z, batch, prompts), batch)

    def kept(self, part, z, batch, *own) -> torch.Tensor:
        """Latents, on the CPU, that `part` makes of noises z, `batch` at a time; `own`: what else they depend on."""
        noises, first = hashlib.sha256(z.cpu().contiguous().numpy()).hexdigest(), self.first and self.first[1]
        return self.bench.kept(part, len(z), batch, self.weights, noises, self.steps, self.cfg, first, *own)


class _Bench:
    """What all models of a backbone are measured on and by. `work`: the name of what is kept on the way."""

    def __init__(self, name: str, p: Params, work: str):
        self.p, self.u, self.accelerator = p, p.uses, prepare(p)
        if (n := self.accelerator.num_processes) > 1:
            raise ValueError(f"{work} is made by one process, not {n}: start it by `python -m gad`")
        device = self.accelerator.device
        self.which, self.folder = p.backbones[name], paths.references(name)
        self.backbone = placed(device, name, p)
        self.world = BENCHES[self.which.world](name, p, device)
        self.prompts, self.texts = self.world.prompts, self.world.texts(self.world.prompts)
        # The library; its first are the seeds.
        self.noises = self.backbone.noise(max(self.u.library, self.u.seeds), p.seeds.world + 22)
        self.work, self.weights, self.works = work, fingerprint(self.backbone), []

    def model(self, network, steps: int, cfg: float, first: tuple | None = None) -> _Model:
        return _Model(self, network, steps, cfg, first)

    def kept(self, part, n: int, batch: int, *own) -> torch.Tensor:
        """`part` of all of range(n), `batch` at a time, as one; what an interrupted run made of it is there."""
        key = identity_key((self.weights, self.p.threads, batch, *own))
        self.works.append(paths.resume(f"{self.work}-{key[:16]}"))
        return in_parts(lambda j: {"x": part(j)}, n, batch, self.works[-1], self.accelerator)["x"]

    def decoded(self, latents, batch: int) -> torch.Tensor:
        """Images (n, 3, H, W) of latents, `batch` at a time, on the CPU and as their world keeps them."""
        images = None
        for i in range(0, len(latents), batch):
            made = self.world.keep(self.backbone.decode(latents[i:i + batch].to(self.backbone.device)))
            if images is None:  # once: of thousands of photographs, two copies would be all of a machine's memory
                images = torch.empty(len(latents), *made.shape[1:], dtype=made.dtype)
            images[i:i + batch] = made
        return images

    def done(self):
        """Forget what was kept."""
        for work in self.works:
            shutil.rmtree(work, ignore_errors=True)

    def matrix(self, model) -> torch.Tensor:
        """Images (S, P, 3, H, W): every seed under every prompt."""
        z, n = self.noises[:self.u.seeds], len(self.prompts)
        return model.draw(z.repeat_interleave(n, 0), self.prompts * len(z)).unflatten(0, (len(z), n))

    def score(self, images, prompts: list[str]) -> torch.Tensor:
        """CLIP's cosine (n,) of each image with its prompt."""
        return (self.world.embed(images) * self.world.texts(prompts)).sum(1)


def references(backbone: str, p: Params) -> dict:
    """The teacher's side, once a backbone: its own measures, classifiers of its seeds, and its library of noises."""
    bench = _Bench(backbone, p, f"references-{backbone}")
    model = bench.model(bench.backbone.network, bench.which.teacher_steps, bench.which.cfg)
    bench.folder.mkdir(parents=True, exist_ok=True)
    images = bench.matrix(model)
    classifiers = _classifiers(bench, images)
    for kind, classifier in classifiers.items():
        classifier.save(bench.folder / f"{kind}.safetensors")
    library = rounded(_library(bench, images))  # as students will read it
    write_json(bench.folder / "library.json", library)
    found = _images(bench, images)
    out = {**found, "seeds": _seeds(bench, images, classifiers, {}), "layout": _layout(bench, model)}
    out["query"] = _query(bench, model, images, library, found["quality"]["clip"])
    # The teacher's own network in the student's steps, unguided: what a student is before it learns.
    untrained = bench.model(bench.backbone.network, bench.which.student_steps, 1.0)
    out["untrained"] = _student(bench, untrained, bench.matrix(untrained), classifiers, library)
    if bench.world.real is not None:
        out["world"] = _images(bench, bench.world.real)
    write_json(bench.folder / "teacher.json", rounded(out))
    _show(images, bench.folder / "teacher.png")
    bench.done()
    return _told(out)


def use(run: Run, p: Params) -> dict:
    """The same measures of student `run`, and of a base student's images with the hybrid sampler."""
    bench = _Bench(run.backbone, p, f"use-{run}")
    teacher, which = bench.backbone, bench.which
    student, steps = load_network(paths.student(run), teacher).to(teacher.device), p.student_steps(run)
    classifiers = {kind: seeds.Classifier.load(bench.folder / f"{kind}.safetensors") for kind in KINDS}
    library = tables.read(bench.folder / "library.json")
    model = bench.model(student, steps, 1.0)
    images = bench.matrix(model)
    out = {"run": str(run), **_student(bench, model, images, classifiers, library)}
    if run.variant == "base" and steps > 1:
        hybrid = bench.model(student, steps, 1.0, (teacher.network, which.cfg))
        out["hybrid"] = _of_images(bench, bench.matrix(hybrid), classifiers)
    write_json(paths.use(run), rounded(out))
    _show(images, paths.use(run).with_suffix(".png"))
    bench.done()
    return _told(out)


def _student(bench, model, images, classifiers, library) -> dict:
    """All measures of a student `model`, whose matrix is `images`, against the teacher's classifiers and library."""
    out = {**_of_images(bench, images, classifiers), "layout": _layout(bench, model)}
    return out | {"query": _query(bench, model, images, library, out["quality"]["clip"])}


def _of_images(bench, images, classifiers) -> dict:
    return _images(bench, images) | {"seeds": _seeds(bench, images, _classifiers(bench, images), classifiers)}


def _library(bench, images) -> dict:
    """What the teacher makes of the library's noises unprompted; the noise nearest to each prompt by it; and each
    attribute's spread over noises, within a prompt."""
    z, attributes = bench.noises, bench.world.attributes
    drawn = bench.model(bench.backbone.network, bench.which.teacher_steps, 1.0).draw(z, [""] * len(z))
    known = attributes(images.flatten(0, 1))
    within = {k: np.nanvar(v.reshape(images.shape[:2]), axis=0) for k, v in known.items()}
    return {
        "attributes": {k: v.tolist() for k, v in attributes(drawn).items()},
        "nearest": (bench.texts @ bench.world.embed(drawn).T).argmax(1).tolist(),
        "spread": {k: float(np.sqrt(np.nanmean(v))) for k, v in within.items()},
    }


# Measures: lists over prompts, so that tables can resample them.


def _images(bench, images) -> dict:
    """Table 3 and Figure 5 of images (S, P, …)."""
    shape, world, flat = images.shape[:2], bench.world, images.flatten(0, 1)
    embedded = world.embed(flat)
    features = world.features(flat, embedded).unflatten(0, shape).numpy()
    right = world.fits(flat, world.names * shape[0], bench.prompts * shape[0])
    return {
        "quality": {
            "clip": (embedded.unflatten(0, shape) * bench.texts).sum(-1).mean(0).tolist(),
            **{k: v.reshape(shape).mean(0).tolist() for k, v in right.items()},
        },
        "distance": world.distances(features),
        "diversity": {"vendi": diversity.vendi(features).tolist(), **world.diversity(images)},
    }


def _classifiers(bench, images) -> dict[str, seeds.Classifier]:
    return {kind: seeds.fit(images[:, :bench.u.train], kind, steps=bench.u.fit) for kind in KINDS}


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
    """Table 5: images of prompts with boxes, free, guided into them at each scale, and guided into another prompt's."""
    u, backbone, world, size = bench.u, bench.backbone, bench.world, min(32, bench.world.batch)
    laid = world.layouts(backbone)
    z, cond = backbone.noise(len(laid), bench.p.seeds.world + LAYOUTS), backbone.encode(laid.captions)
    tokens = [layout.phrase_tokens(backbone, *each) for each in zip(laid.captions, laid.phrases, strict=True)]
    times = backbone.times(bench.which.student_steps)[:-1][:2]
    evals = 2 * u.evals // len(times)  # as many for students of one step

    def measured(boxes, scale):
        def part(j):
            return layout.guided(backbone, model.network, z[j], cond[j], tokens[j], boxes[j], model.steps, model.cfg,
                                 times, evals if scale else 0, scale)

        where = [b.tolist() for b in boxes]
        latents = model.kept(part, z, size, laid.captions, tokens, where, times.tolist(), evals, scale)
        images = bench.decoded(latents, 2 * size)
        found = world.detect(images, laid.names)
        return {
            **layout.score(found, laid.names, laid.boxes, world.sure),
            **layout.average_precision(found, laid.names, laid.boxes, u.draws, world.classes),
            "clip": bench.score(images, laid.captions).tolist(),
            **{k: v.tolist() for k, v in world.fits(images, laid.names, laid.captions).items() if k in FIT},
        }

    out = {"free": measured(laid.boxes, 0.0), "shuffled": measured(_others(laid.boxes), u.scale)}
    return out | {str(s): measured(laid.boxes, s) for s in u.sweep} | {"guided": measured(laid.boxes, u.scale)}


def _others(boxes: list[np.ndarray]) -> list[np.ndarray]:
    """Each prompt's boxes in the next one's place, among prompts of as many."""
    out = list(boxes)
    for n in {len(b) for b in boxes}:
        own = [i for i, b in enumerate(boxes) if len(b) == n]
        for i, other in zip(own, own[1:] + own[:1], strict=True):
            out[i] = boxes[other]
    return out


def _query(bench, model, images, library, usual: list[float]) -> dict:
    """Table 6: what a model makes, prompted, of noises chosen by what the teacher makes of them unprompted. `usual`:
    each prompt's CLIP over the seeds."""
    z, prompts, shape = bench.noises, bench.prompts, images.shape[:2]
    n, values = bench.u.query, {k: np.array(v, float) for k, v in library["attributes"].items()}
    ends = {k: noise_query.extremes(v, bench.u.picks) for k, v in values.items()}
    chosen = np.unique(np.concatenate([np.concatenate(e) for e in ends.values()]))
    drawn = model.draw(z[chosen].repeat_interleave(n, 0), prompts[:n] * len(chosen))
    made = {k: v.reshape(len(chosen), n) for k, v in bench.world.attributes(drawn).items()}
    seen = {k: v.reshape(shape) for k, v in bench.world.attributes(images.flatten(0, 1)).items()}
    at = {index: row for row, index in enumerate(chosen)}
    shift = {
        k: noise_query.shift(*(made[k][[at[i] for i in end]] for end in ends[k]), library["spread"][k]).tolist()
        for k in ends
    }
    rho = {k: noise_query.rank_correlation(v[:shape[0]], seen[k]).tolist() for k, v in values.items()}
    gain = bench.score(model.draw(z[library["nearest"]], prompts), prompts) - torch.tensor(usual)
    return {"shift": shift, "rho": rho, "clip_gain": gain.tolist()}


def _show(images, path):
    """Six seeds down, four prompts across."""
    shown = unit(images[:6, :4])
    save_image(small(shown.flatten(0, 1)), path, nrow=shown.shape[1], padding=2, pad_value=1.0)


def _told(out) -> dict:
    """A few means, for the notebook."""
    fit = next(k for k in FIT if k in out["quality"])
    moved = next(k for k in ("area", "warmth") if k in out["query"]["shift"])
    return {
        "clip": float(np.mean(out["quality"]["clip"])), fit: float(np.mean(out["quality"][fit])),
        "vendi": float(np.mean(out["diversity"]["vendi"])),
        "seed named, top-1": float(np.mean(out["seeds"]["self"]["linear"]["top1"])),
        "AP50 free": out["layout"]["free"]["ap50"], "AP50 guided": out["layout"]["guided"]["ap50"],
        f"{moved}, shift": float(np.nanmean(out["query"]["shift"][moved])),
    }
