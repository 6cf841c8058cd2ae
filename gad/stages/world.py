"""The miniature world's autoencoders and teachers."""

import shutil

from diffusers import AutoencoderDC, AutoencoderKL

from .. import paths
from ..params import Params
from ..world import autoencoder as autoencoders
from ..world import teacher as teachers
from .common import prepare, write_json


def autoencoder(kind: str, p: Params) -> dict:
    """Train autoencoder `kind`; its folder and metrics."""
    config = p.autoencoder[kind].model_dump()
    accelerator = prepare(p, "bf16")
    work = paths.resume(f"autoencoder-{kind}")
    metrics = autoencoders.pretrain(kind, paths.autoencoder(kind), work, config, p.seeds.world, accelerator)
    write_json(paths.autoencoder(kind) / "metrics.json", metrics)
    shutil.rmtree(work)
    return metrics


def teacher(backbone: str, p: Params) -> dict:
    """Train the miniature teacher of `backbone` and measure it on test prompts."""
    which = p.backbones[backbone]
    folder = paths.autoencoder(which.autoencoder)
    vae = (AutoencoderDC if which.autoencoder == "dc" else AutoencoderKL).from_pretrained(folder)
    vae.register_to_config(_name_or_path=which.autoencoder)  # or the folder's path would go into what is saved
    training, seed = p.teacher_of(backbone), p.seeds.world
    config = training.model_dump()
    work = paths.resume(f"teacher-{backbone}")
    made = teachers.pretrain(
        which.family or backbone, vae, paths.teacher(backbone), work, config, seed, lambda x: prepare(p, x)
    )
    metrics = teachers.evaluate(made, made.network, which.teacher_steps, which.cfg, seed, training.prompts)
    write_json(paths.teacher_metrics(backbone), metrics)
    shutil.rmtree(work)
    return {k: v for k, v in metrics.items() if k != "quality"}
