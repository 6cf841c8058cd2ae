"""The miniature world's autoencoders and teachers."""

import shutil

import numpy as np
from diffusers import AutoencoderDC, AutoencoderKL

from .. import paths
from ..params import Params
from ..world import autoencoder as autoencoders
from ..world import teacher as teachers
from ..worlds import world_of
from .common import fingerprint, placed, prepare, write_json


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
    """Train the miniature teacher of `backbone`, or take the one at its `path`, and measure it on test prompts."""
    which, world = p.backbones[backbone], world_of(backbone, p, anew=True)
    if which.path:
        return _given(backbone, p, world)
    folder = paths.autoencoder(which.autoencoder)
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} holds no autoencoder: `python -m gad autoencoder {which.autoencoder}` trains it")
    try:
        vae = (AutoencoderDC if which.autoencoder == "dc" else AutoencoderKL).from_pretrained(folder)
    except (OSError, ValueError, RuntimeError) as error:
        line = str(error).strip().splitlines()[0]
        fix = f"`dvc pull` it, or `python -m gad autoencoder {which.autoencoder}` trains it"
        raise ValueError(f"{folder} cannot be loaded ({line}): {fix}") from None
    vae.register_to_config(_name_or_path=which.autoencoder)  # or the folder's path would go into what is saved
    training, seed = p.teacher_of(backbone), p.seeds.world
    config = training.model_dump()
    work = paths.resume(f"teacher-{backbone}")
    made = teachers.pretrain(
        which.family or backbone, vae, paths.teacher(backbone), work, config, seed, lambda x: prepare(p, x)
    )
    metrics = teachers.evaluate(world, made, made.network, which.teacher_steps, which.cfg, seed, training.prompts)
    write_json(paths.teacher_metrics(backbone), metrics)
    shutil.rmtree(work)
    return {k: v for k, v in metrics.items() if k != "quality"}


def _given(backbone, p, world) -> dict:
    """A teacher that is there already is used where it is; its folder here says which one it was."""
    which, device = p.backbones[backbone], prepare(p).device
    made = placed(device, backbone, p, anew=True)
    n, seed = p.teacher_of(backbone).prompts, p.seeds.world + teachers.QUALITY
    fits = teachers.quality(world, made, made.network, n, which.teacher_steps, which.cfg, seed)
    write_json(paths.teacher(backbone) / "source.json", {
        "path": which.path, "revision": which.revision, "parameters": sum(w.numel() for w in made.network.parameters()),
        "weights": fingerprint(made), "files": world.hashes(),
    })
    metrics = {k: float(np.mean(v)) for k, v in fits.items()}
    write_json(paths.teacher_metrics(backbone), metrics | {"quality": fits})
    return metrics
