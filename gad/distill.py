"""A student from a teacher: the paradigm's losses, GAD beside them, probes over training, the finished folder."""

import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from .activations import anew
from .backbones import Backbone, Condition
from .evaluation.geometry import compare, endpoint, interval_columns, tangents
from .paradigms import find
from .paradigms.base import Batch, Draws
from .paradigms.forms import NEED_A_FAKE, gad_loss
from .params import TOGETHER, Params, Run
from .tangents import Samples, Tangents, rows
from .training import DivergedError, Role, identity_key, step_generator, train


class Distillation:
    """The training task of one student. GAD draws from its own generator, so that `lam: 0` leaves every bit of
    the base method as it is. `part` = (i, n): `losses` are of part i of n of a step's batch and of GAD's pairs.
    ValueError where GAD would learn from a teacher's paths at other times than the student's."""

    def __init__(self, paradigm, cond: Condition, teacher: Tangents, gad, batch: int, seed: int, samples=None):
        if gad and gad.lam and gad.form not in NEED_A_FAKE and teacher.steps != paradigm.steps:
            name = paradigm.backbone.name
            raise ValueError(
                f"backbones.{name}.student_steps={paradigm.steps}: data/endpoints/{name} holds the teacher's paths at "
                f"the times of {teacher.steps} steps: run its diagnose stage again"
            )
        self.paradigm, self.cond, self.teacher, self.gad = paradigm, cond, teacher, gad
        self.batch, self.seed, self.roles, self.samples = batch, seed, paradigm.roles, samples
        self.part = (0, 1)

    def draw(self, generator) -> Batch:
        """New noises and any prompts; for a paired paradigm, samples of the teacher and the noises they came from."""
        draws = Draws(generator, *self.part)
        n = self.batch // draws.parts
        if self.paradigm.paired:
            of, whole = self.samples, draws.all.integers(len(self.samples), self.batch)
            i, k = draws.own(whole), draws.own(whole.roll(1))
            return Batch(of.z[i], rows(of.cond, i), generator, of.x0[i], (of.z[k], rows(of.cond, k)), self.part)
        z = draws.normal(n, *self.paradigm.backbone.latent_shape)
        return Batch(z, rows(self.cond, draws.integers(len(self.cond), n)), generator, part=self.part)

    def losses(self, step, generator):
        device = generator.device
        out = self.paradigm.losses(self.draw(generator), step)
        if self.gad and "student" in out:
            own = step_generator(self.seed, step, device, "gad")
            try:
                term = gad_loss(self.paradigm, self.teacher, self.gad, self.paradigm.turn(step), own, self.part)
            except ValueError as error:
                if "not finite" not in str(error):
                    raise
                if not all(out[name].isfinite() for name in self.roles if name in out):
                    return out  # by which training stops, as without the term
                raise DivergedError(f"the gad term is not finite at step {step} ({error})") from None
            if term is not None:
                out["student"] = out["student"] + term
                out["gad"] = term.detach()
        return out


def shareable(run: Run, p: Params, processes: int):
    """ValueError where a step of `run` cannot be shared out among as many processes, before any work."""
    each = p.hardware.accumulate(processes)
    parts = processes * each
    gad, shared = p.term(run.variant), {"distill.batch": p.distill.batch}
    if gad:
        shared["gad.pairs" if run.variant == "gad" else f"controls.{run.variant}.pairs"] = gad.pairs
    for key, value in shared.items():
        if value % parts:
            raise ValueError(
                f"{key}={value} cannot be shared by {processes} process(es) in {each} part(s) each (hardware.parts="
                f"{p.hardware.parts}): make it a multiple of {parts}"
            )
    if gad and gad.form in TOGETHER and parts > 1:
        raise ValueError(
            f"controls.{run.variant}: `{gad.form}` is of all samples of a step, which {parts} parts do not see: use "
            "one process and hardware.parts=1"
        )


def distill(
    run: Run,
    p: Params,
    backbone: Backbone,
    cond: Condition,
    teacher: Tangents,
    test: Tangents,
    samples: Samples | None,
    folder: Path,
    work: Path,
    accelerator,
    identity: dict,
) -> tuple[pd.DataFrame, pd.DataFrame] | None:
    """Train student `run`, save its pipeline to `folder`; returns its training log and its probes, on the main process.

    `cond`: the pool of training prompts; `teacher`: what GAD's output forms learn from; `test`: those the
    probes look at; `samples`: the teacher's, for a paradigm that is `paired`.
    """
    which, d, hardware, gad = p.backbones[run.backbone], p.training(run.backbone), p.hardware, p.term(run.variant)
    small = backbone.levels.alpha_sigma(torch.ones(1))[0].item()
    if accelerator.mixed_precision != "no" and small < 0.02 and not backbone.levels.flow:
        print(
            f"distill.precision={d.precision}: {run.backbone} predicts ε and has α = {small:.3f} at its first time, by "
            "which rounding is divided there: add it to distill.fp32", file=sys.stderr, flush=True,
        )
    torch.manual_seed(run.seed)  # heads and adapters start alike in every process
    settings = p.settings(run.paradigm, run.variant)
    paradigm = find(run.paradigm)(backbone, which.student_steps, which.cfg, settings, d)
    if not getattr(paradigm.roles.get("student"), "average", None):
        fix = "add Role(self.student, …, ema=distill.ema)"
        raise ValueError(f'paradigms.{run.paradigm}: its roles lack a "student" with an average, which is saved: {fix}')
    steps = p.steps(run.paradigm, run.variant)
    task = Distillation(paradigm, cond, teacher, gad, d.batch, run.seed, samples)
    if d.optimiser == "adamw8bit":
        for role in task.roles.values():
            in_8bit(role)
    if hardware.checkpointing:
        checkpoint(task)
    if hardware.compile:
        compile_blocks(task)
    probes, every = {}, max(1, steps // 8)
    probe_file = work / f"probes-{identity_key(identity)[:8]}.json"
    if probe_file.exists():
        probes = {int(k): v for k, v in json.loads(probe_file.read_text()).items()}

    def averaged():
        """The student as it will be saved, on the main process."""
        weights = task.roles["student"].averaged()
        if not accelerator.is_main_process:
            return None
        student = paradigm.copy_of_teacher()
        student.load_state_dict(weights)
        return student

    def seen(step, student):
        probes[step] = look(backbone, student, test, which.student_steps, hardware.tangents)
        if accelerator.trackers:
            shown = cond[:8].to(backbone.device)
            _show(backbone, student, shown, which.student_steps, step, probes[step], accelerator)

    def probe(step):
        if step % every == 0 and (step not in probes or hardware.shard):
            student = averaged()
            if student is None or step in probes:
                return
            seen(step, student)
            part = probe_file.with_suffix(".part")
            part.write_text(json.dumps(probes))
            os.replace(part, probe_file)

    log = train(
        task, work, steps, run.seed, identity, d.warmup, d.save_every, 10, accelerator, probe,
        hardware.accumulate(accelerator.num_processes), hardware.shard,
    )
    compile_blocks(task, False)
    student = averaged()
    if student is None:
        return None
    seen(steps, student)
    save_student(run, p, backbone, student, folder)
    rows = [{"step": k, **probes[k]} for k in sorted(probes)]
    return pd.read_csv(log), pd.DataFrame(rows)


def look(backbone, student, test: Tangents, steps: int, batch: int) -> dict[str, float]:
    """Values and tangents of the endpoint map on a few test noises: relative squared error, JVP cosine, ratio of norms,
    the first two with 95 % bootstrap intervals over the noises (`_low`, `_high`), of which each has its own prompt."""
    y, jv = tangents(lambda c: endpoint(backbone, student, c, steps), test.z, test.v, test.cond, batch)
    error, response = compare(y, test.x0)["relative"], compare(jv, test.jv)
    return {
        **interval_columns("error", error.cpu().numpy(), 1000, np.median),
        **interval_columns("cos", response["cos"].cpu().numpy(), 1000),
        "ratio": response["ratio"].log().mean().exp().item(),
    }


def checkpoint(task: Distillation):
    """Activations are made anew for the backward pass: those of what is trained, and of the frozen teacher and decoder,
    through which some losses are differentiated."""
    backbone = task.paradigm.backbone
    for module in (*(role.module for role in task.roles.values()), backbone.network, backbone.pipeline.vae):
        if getattr(module, "_supports_gradient_checkpointing", False):  # AutoencoderDC and heads do not
            module.enable_gradient_checkpointing(anew)


def compile_blocks(task: Distillation, on: bool = True):
    """Each block of the teacher and of what is trained by torch.compile, or no longer. Not whole networks: hooks on
    blocks, by which discriminators read them, stay outside. Exact tangents run as without."""
    backbone = task.paradigm.backbone
    if on:  # with and without gradient, autocast, fixed weights: each is another
        torch._dynamo.config.recompile_limit = 64
    for network in (backbone.network, *(role.module for role in task.roles.values())):
        for block in backbone.blocks(network) if isinstance(network, type(backbone.network)) else ():
            vars(block).pop("forward", None)
            if on:
                block.forward = torch.compile(block.forward)


def in_8bit(role: Role):
    """AdamW's moments in 8 bits, with a scale for each 256 of them (Dettmers et al. 2022): a quarter of their memory.
    Weights of fewer than 4096 elements keep theirs in fp32. ValueError where bitsandbytes is not installed."""
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError:
        fix = "pip install -e '.[8bit]', or leave it at adamw"
        raise ValueError(f"distill.optimiser=adamw8bit needs bitsandbytes: {fix}") from None

    class Resuming(AdamW8bit):
        def update_step(self, group, p, *where):
            state = self.state[p]
            state["step"] = int(state["step"])  # out of a checkpoint it is a tensor
            super().update_step(group, p, *where)

    params = role.optimisers[0].param_groups[0]["params"]
    role.optimisers[0] = Resuming(params, role.lr, betas=role.betas, weight_decay=role.weight_decay)
    role.optimisers[0].param_groups[0]["base_lr"] = role.lr


@torch.no_grad()
def _show(backbone, student, cond, steps, step, probe, accelerator):
    """The same prompts and noises at each probe, for trackers."""
    latents = backbone.sample(student, backbone.noise(len(cond), 0), cond, steps)
    images = (255 * backbone.decode(latents).permute(0, 2, 3, 1)).byte().cpu().numpy()
    accelerator.log({f"probe/{k}": v for k, v in probe.items()}, step)
    for tracker in accelerator.trackers:
        if hasattr(tracker, "log_images"):
            layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            tracker.log_images({"samples": images}, step, **layout)


CARD = """---
library_name: diffusers
pipeline_tag: text-to-image
{terms}
tags: [distillation, few-step, geometry-aware-distillation]
---
# {run}

{what}

```python
import torch
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("{run}"{dtype})
image = pipe("{prompt}", {call}{extra}).images[0]
```

{drawn} `gad.json` holds the method, h, λ and the seed.
{scale}
"""


def save_student(run: Run, p: Params, backbone: Backbone, student, folder: Path):
    """The student as a pipeline folder of plain diffusers, with a model card and gad.json."""
    which, steps = p.backbones[run.backbone], p.student_steps(run)
    pipeline = backbone.pipeline
    teacher, scheduler = backbone.network, pipeline.scheduler
    shutil.rmtree(folder, ignore_errors=True)
    try:
        pipeline.register_modules(
            **{backbone.part: student.to("cpu")}, scheduler=backbone.scheduler(steps)
        )
        for part in (pipeline, *pipeline.components.values()):
            if hasattr(part, "register_to_config"):
                part.register_to_config(_name_or_path=run.backbone)  # not the path it was loaded from
        saved, call = backbone.as_saved(student, steps)
        saved.save_pretrained(folder)
    finally:
        pipeline.register_modules(**{backbone.part: teacher}, scheduler=scheduler)
    gad = p.term(run.variant)
    published = p.published.get(str(run))
    info = {
        "backbone": run.backbone, "paradigm": run.paradigm, "variant": run.variant, "seed": run.seed,
        "steps": steps, "guidance_scale": call["guidance_scale"],
        "gad": gad.model_dump() if gad else None,
        "training": {"published": published.model_dump()} if published else {
            "distill": p.training(run.backbone).identity | {"steps": p.steps(run.paradigm, run.variant)},
            run.paradigm: p.settings(run.paradigm, run.variant),
        },
    }
    (folder / "gad.json").write_text(json.dumps(info, indent=2) + "\n")
    term = "GAD" if run.variant == "gad" else f"the control `{run.variant}`"
    how = f"with {term} ({gad.form} form, h = {gad.h}, λ = {gad.lam})" if gad else "without GAD"
    name = run.paradigm.upper()
    what = f"A {steps}-step student of `{run.backbone}` by {name}, {how}, seed {run.seed}."
    source = which.path
    if published:
        source = published.path or published.lora
        named = source if published.path else f"the LoRA {source}"
        what = f"Published: the network of {named}, to be sampled in {steps} step{'s' if steps > 1 else ''}."
    mini = which.world == "mini"
    card = CARD.format(
        run=run, what=what, call=", ".join(f"{k}={v}" for k, v in call.items()),
        extra=backbone.call_hint if mini else "",
        # The network is in fp32, other parts as they were loaded: a pipeline wants one for all.
        dtype="" if which.dtype == "float32" else f", dtype=torch.{which.dtype}",
        drawn="The image is a function of the prompt and the initial noise alone."
        if steps == 1 or saved is pipeline else
        "Between steps this pipeline draws new noises; the report's samples, a function of the first alone, have none.",
        terms="license: mit" if mini else f"base_model: {source}",  # whose licence is the student's too
        prompt="a red circle and a blue square" if mini else "a photograph of an astronaut riding a horse",
        scale="It draws a miniature world of 64 × 64 scenes; it is no model of photographs." if mini else "",
    )
    (folder / "README.md").write_text(card)
