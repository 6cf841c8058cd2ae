"""A student from a teacher: the paradigm's losses, GAD beside them, probes over training, the finished folder."""

import json
import shutil
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor
from tqdm.auto import tqdm

from .backbones import Backbone, Condition
from .evaluation.geometry import compare, endpoint, tangents
from .paradigms import PARADIGMS
from .paradigms.base import Batch
from .paradigms.forms import gad_loss
from .params import Params, Run
from .tangents import Tangents
from .training import identity_key, step_generator, train


class Distillation:
    """The training task of one student. GAD draws from its own generator, so that `lam: 0` leaves every bit of
    the base method as it is."""

    def __init__(self, paradigm, cond: Condition, teacher: Tangents, gad, batch: int, seed: int, samples=None):
        self.paradigm, self.cond, self.teacher, self.gad = paradigm, cond, teacher, gad
        self.batch, self.seed, self.roles, self.samples = batch, seed, paradigm.roles, samples

    def draw(self, generator) -> Batch:
        """New noises and any prompts; for a paired paradigm, samples of the teacher and the noises they came from."""
        if self.paradigm.paired:
            z, x0 = self.samples
            i = torch.randint(len(z), (self.batch,), generator=generator, device=generator.device)
            return Batch(z[i], self.cond[i], generator, x0[i])
        shape, device = self.paradigm.backbone.latent_shape, generator.device
        z = torch.randn(self.batch, *shape, generator=generator, device=device)
        prompts = torch.randint(len(self.cond), (self.batch,), generator=generator, device=device)
        return Batch(z, self.cond[prompts], generator)

    def losses(self, step, generator):
        device = generator.device
        out = self.paradigm.losses(self.draw(generator), step)
        if self.gad and "student" in out:
            own = step_generator(self.seed, step, device, "gad")
            term = gad_loss(self.paradigm, self.teacher, self.gad, step, own)
            if term is not None:
                out["student"] = out["student"] + term
                out["gad"] = term.detach()
        return out


def distill(
    run: Run,
    p: Params,
    backbone: Backbone,
    prompts: list[str],
    teacher: Tangents,
    test: Tangents,
    folder: Path,
    work: Path,
    accelerator,
    identity: dict,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Train student `run`, save its pipeline to `folder`; returns its training log and its probes.

    `prompts`: the pool of training prompts; `teacher`: what GAD's output forms learn from; `test`: those the
    probes look at.
    """
    which, d = p.backbones[run.backbone], p.distill
    paradigm = PARADIGMS[run.paradigm](backbone, which.student_steps, which.cfg, p.paradigms[run.paradigm], d)
    gad = p.gad if run.variant == "gad" and p.gad.lam > 0 else None
    cond = backbone.encode(prompts)
    drawn = samples(backbone, cond[: d.samples], which.teacher_steps, which.cfg) if paradigm.paired else None
    task = Distillation(paradigm, cond, teacher, gad, d.batch, run.seed, drawn)
    probes, every = {}, max(1, d.steps // 8)
    probe_file = work / f"probes-{identity_key(identity)[:8]}.json"
    if probe_file.exists():
        probes = {int(k): v for k, v in json.loads(probe_file.read_text()).items()}

    def probe(step):
        if step % every == 0 and step not in probes:
            average = task.roles["student"].average
            average.store(task.roles["student"].params)
            average.copy_to(task.roles["student"].params)
            probes[step] = look(backbone, paradigm.student, test, which.student_steps)
            average.restore(task.roles["student"].params)
            probe_file.write_text(json.dumps(probes))

    log = train(
        task, work, d.steps, run.seed, identity, d.warmup, d.save_every, 10, accelerator, probe
    )
    student = task.roles["student"]
    student.average.copy_to(student.params)
    probes[d.steps] = look(backbone, paradigm.student, test, which.student_steps)
    save_student(run, p, backbone, paradigm.student, folder)
    rows = [{"step": k, **probes[k]} for k in sorted(probes)]
    return pd.read_csv(log), pd.DataFrame(rows)


@torch.no_grad()
def samples(backbone: Backbone, cond: Condition, steps: int, cfg: float, seed: int = 11) -> tuple[Tensor, Tensor]:
    """(z, x0), (N, C, H, W) each: noises, and where the teacher takes them for prompts `cond`."""
    z = backbone.noise(len(cond), seed)
    parts = tqdm(range(0, len(z), 64), "samples of the teacher", disable=None)
    return z, torch.cat([backbone.sample(backbone.network, z[i:i + 64], cond[i:i + 64], steps, cfg) for i in parts])


def look(backbone, student, test: Tangents, steps: int) -> dict[str, float]:
    """Values and tangents of the endpoint map on a few test noises: relative squared error, JVP cosine."""
    y, jv = tangents(lambda c: endpoint(backbone, student, c, steps), test.z, test.v, test.cond, len(test))
    value = compare(y, test.x0)
    response = compare(jv, test.jv)
    return {"error": value["relative"].median().item(), "cos": response["cos"].mean().item(),
            "ratio": response["ratio"].log().mean().exp().item()}


CARD = """---
library_name: diffusers
pipeline_tag: text-to-image
license: mit
tags: [distillation, few-step, geometry-aware-distillation]
---
# {run}

A {steps}-step student of `{backbone}` by {paradigm}, {how}, seed {seed}.

```python
import torch
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("{run}")
image = pipe("{prompt}", num_inference_steps={steps}, guidance_scale=1.0{extra}).images[0]
```

The image is a function of the prompt and the initial noise alone. `gad.json` holds the method, h, λ and the seed.
{scale}
"""


def save_student(run: Run, p: Params, backbone: Backbone, student, folder: Path):
    """The student as a pipeline folder of plain diffusers, with a model card and gad.json."""
    which = p.backbones[run.backbone]
    pipeline = backbone.pipeline
    teacher, scheduler = backbone.network, pipeline.scheduler
    shutil.rmtree(folder, ignore_errors=True)
    try:
        pipeline.register_modules(
            **{backbone.part: student.to("cpu")}, scheduler=backbone.scheduler(which.student_steps)
        )
        pipeline.save_pretrained(folder)
    finally:
        pipeline.register_modules(**{backbone.part: teacher}, scheduler=scheduler)
    with_gad = run.variant == "gad"
    info = {
        "backbone": run.backbone, "paradigm": run.paradigm, "variant": run.variant, "seed": run.seed,
        "steps": which.student_steps, "guidance_scale": 1.0,
        "gad": p.gad.model_dump() if with_gad else None,
        "training": {"distill": p.distill.model_dump(), run.paradigm: p.paradigms[run.paradigm]},
    }
    (folder / "gad.json").write_text(json.dumps(info, indent=2) + "\n")
    how = f"with GAD ({p.gad.form} form, h = {p.gad.h}, λ = {p.gad.lam})" if with_gad else "without GAD"
    mini = which.world == "mini"
    card = CARD.format(
        run=run, backbone=run.backbone, paradigm=run.paradigm.upper(), how=how, seed=run.seed,
        steps=which.student_steps, extra=backbone.call_hint,
        prompt="a red circle and a blue square" if mini else "a photograph of an astronaut riding a horse",
        scale="It draws a miniature world of 64 × 64 scenes; it is no model of photographs." if mini else "",
    )
    (folder / "README.md").write_text(card)
