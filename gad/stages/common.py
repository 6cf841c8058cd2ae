"""What every stage does first and last."""

import hashlib
import importlib.util
import json
import os
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pandas as pd
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import InitProcessGroupKwargs
from safetensors.torch import load_file, save_file

from .. import geometry, paths
from ..backbones import Backbone, Condition, load
from ..embeddings import add_weights, keep
from ..params import Params
from ..tangents import Samples, Tangents
from ..worlds import world_of


def prepare(p: Params, precision: str = "no", track: str | None = None) -> Accelerator:
    """Threads, determinism and the accelerator of a stage. A CPU without bf16 arithmetic takes fp32 in its place:
    emulated it is many times slower. `track`: "tensorboard", "wandb" or "dvclive" see its training."""
    torch.set_num_threads(p.threads)
    if precision == "bf16" and not torch.cuda.is_available():
        able = torch.cpu.get_capabilities()
        if not any(able.get(k) for k in ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16")):
            print("this CPU has no bf16 arithmetic: going on in fp32", file=sys.stderr, flush=True)
            precision = "no"
    AcceleratorState._reset_state()  # several stages may share one notebook or session
    if track and importlib.util.find_spec(track) is None:
        raise ValueError(f"track={track!r} is not installed: pip install {track}")
    for kind in ("FSDP", "DEEPSPEED", "MEGATRON_LM"):  # by their launchers' names, before accelerate looks for them
        if os.environ.get(f"ACCELERATE_USE_{kind}", "false").lower() in ("true", "1"):
            raise ValueError(
                f"distributed_type={kind}: accelerate prepares one trained network so, and here are several; use "
                "MULTI_GPU, and where memory is short hardware.shard, checkpointing and parts"
            )
    made = Accelerator(
        cpu=not torch.cuda.is_available(), mixed_precision=precision, log_with=track, project_dir=paths.tracking(),
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=6))],  # others wait while one encodes prompts
    )
    torch.backends.cudnn.allow_tf32 = False  # the older name of the same: where the two differ, reading it fails
    for kind in geometry.TF32:
        kind.fp32_precision = "ieee"  # TF32 would leave finite differences little but rounding
    return made


def materials(device, backbone: str, p: Params) -> tuple[Backbone, Condition, Tangents, Samples]:
    """What the students of a backbone learn from: their teacher, training prompts, its paths with tangents, samples."""
    model, endpoints = placed(device, backbone, p), paths.endpoints(backbone)
    cond = model.encode(world_of(backbone, p).prompts(p.distill.prompts, p.seeds.world), device="cpu")
    tangents = Tangents.load(endpoints / "train.safetensors", model)
    return model, cond, tangents, Samples.load(endpoints / "samples.safetensors", model)


def placed(device, name: str, p: Params, anew: bool = False) -> Backbone:
    """Backbone `name` on `device`, its text encoder there only while it encodes what no stage has yet: T5 and Gemma
    would take more memory than the networks. ValueError where it is one given by its path and, but `anew`, no longer
    the one that was measured: DVC sees it only through the teacher's folder."""
    made, source = load(name, p), paths.teacher(name) / "source.json"
    if p.backbones[name].path and source.exists() and not anew:
        known = json.loads(source.read_text()).get("weights")
        if known and known != fingerprint(made):
            raise ValueError(f"the checkpoint at {p.backbones[name].path} is another than the one the teacher stage "
                             f"saw: run `dvc repro -f teacher@{name}`")
    return keep(made, paths.embeddings(), device)


def fingerprint(backbone: Backbone) -> str:
    """A hash of every weight of its pipeline, and of its parts' settings; seconds for T5-XXL."""
    found = hashlib.sha256()
    for part, module in sorted(backbone.pipeline.components.items()):
        config = getattr(module, "config", {})
        settings = config if isinstance(config, dict) else config.to_dict()
        own = {k: v for k, v in settings.items() if not k.startswith("_") and k != "transformers_version"}
        found.update(f"{part} {sorted(own.items(), key=lambda kv: kv[0])}".encode())
        if isinstance(module, torch.nn.Module):
            add_weights(found, module)
    return found.hexdigest()


def in_parts(
    make: Callable[[slice], dict[str, torch.Tensor]], n: int, batch: int, work: Path, accelerator
) -> dict[str, torch.Tensor] | None:
    """`make` of all of range(n), `batch` at a time, as one; None on processes beside the main one. Each makes its share
    of the parts and leaves them in `work`, where a later call finds them."""
    work.mkdir(parents=True, exist_ok=True)
    parts = {work / f"{i}.safetensors": slice(i, i + batch) for i in range(0, n, batch)}
    mine = [*parts][accelerator.process_index::accelerator.num_processes]
    todo = [file for file in mine if not file.exists()]
    began = told = time.monotonic()
    for k, file in enumerate(todo):
        made = {name: x.cpu().contiguous() for name, x in make(parts[file]).items()}
        partial = file.with_suffix(f".part{accelerator.process_index}")
        save_file(made, partial)
        os.replace(partial, file)  # whole or not there
        if accelerator.is_main_process and time.monotonic() - told > 30:
            told = time.monotonic()
            eta = (told - began) / (k + 1) * (len(todo) - k - 1)
            print(f"{work.name}: step {k + 1}/{len(todo)}, {eta / 60:.1f} min to go", file=sys.stderr, flush=True)
    accelerator.wait_for_everyone()
    if not accelerator.is_main_process:
        return None
    found = [load_file(file) for file in parts]
    return {name: torch.cat([part[name] for part in found]) for name in found[0]}


def write_json(path: Path, data) -> Path:
    """Without blanks: lists of measurements would be mostly these."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data, separators=(",", ":")) + "\n")
    return path


def write_csv(path: Path, frame: pd.DataFrame) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    frame.to_csv(path, index=False, float_format="%.6g", lineterminator="\n")
    return path
