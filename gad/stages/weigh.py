"""How much of a student's gradient is its term's, by which λ can be chosen: base losses differ in scale by orders of
magnitude, and Adam hides it until two are added up."""

import statistics

import torch

from ..distill import Distillation, checkpoint, shareable
from ..paradigms import find
from ..paradigms.forms import NEED_A_FAKE, gad_loss
from ..params import TOGETHER, Params, Run
from ..schema import Gad
from ..training import step_generator
from .common import materials, prepare


def weigh(run: Run, p: Params, draws: int = 12) -> dict[str, float]:
    """Norms of the gradient at the student where its training begins, the teacher's weights: of the paradigm's own loss
    (`base`) and of every variant's term with its λ, medians of `draws` steps' draws each. Not of forms that need a
    fake, which is yet to learn there, nor, where `hardware.parts` is more than 1, of those of samples together."""
    parts, terms = p.hardware.parts, {name: p.term(name) for name in p.variants}
    terms = {k: v.model_copy(update={"every": 1}) for k, v in terms.items()
             if v and v.form not in (*NEED_A_FAKE, *(TOGETHER if parts > 1 else ()))}
    for name in ("base", *terms):
        shareable(Run(run.backbone, run.paradigm, name, run.seed), p, 1)
    accelerator, which = prepare(p), p.backbones[run.backbone]
    backbone, cond, tangents, samples = materials(accelerator.device, run.backbone, p)
    paradigm = find(run.paradigm)(backbone, which.student_steps, which.cfg, p.settings(run.paradigm, "base"), p.distill)
    task = Distillation(paradigm, cond, tangents, None, p.distill.batch, run.seed, samples)
    for role in task.roles.values():
        role.module.to(accelerator.device)
    if p.hardware.checkpointing:
        checkpoint(task)

    def generator(step, *name):
        return step_generator(run.seed, step, accelerator.device, *name)

    def base(step, k):
        task.part = k, parts
        return paradigm.losses(task.draw(generator(step)), step).get("student")

    losses = {"base": base}
    for name, term in terms.items():
        def own(step, k, term=term):
            return gad_loss(paradigm, tangents, term, 0, generator(step, "gad"), (k, parts))

        losses[name] = own
    found = {}  # variants that differ in when their term applies, how long or how fast, have the same one
    keys = {"base": "base"} | {k: tuple(getattr(v, field) for field in Gad.model_fields) for k, v in terms.items()}
    for name, key in keys.items():
        if key not in found:
            found[key] = statistics.median(_norms(paradigm.student, losses[name], draws, parts))
    return {name: found[key] for name, key in keys.items()}


def _norms(student, loss, draws, parts):
    found, step = [], 0
    while len(found) < draws:
        student.zero_grad()
        for k in range(parts):
            if (value := loss(step, k)) is not None:  # a student that moves at some steps only
                (value / parts).backward()
        grads = [w.grad.norm() for w in student.parameters() if w.grad is not None]
        if grads:
            found.append(float(torch.stack(grads).norm()))
        step += 1
    return found
