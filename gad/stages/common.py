"""What every stage does first and last."""

import json
from pathlib import Path

import pandas as pd
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from ..params import Params


def prepare(p: Params, precision: str = "no") -> Accelerator:
    """Threads, determinism and the accelerator of a stage."""
    torch.set_num_threads(p.threads)
    AcceleratorState._reset_state()  # several stages may share one notebook or session
    return Accelerator(cpu=not torch.cuda.is_available(), mixed_precision=precision)


def write_json(path: Path, data) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data, indent=2) + "\n")
    return path


def write_csv(path: Path, frame: pd.DataFrame) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    frame.to_csv(path, index=False, float_format="%.6g", lineterminator="\n")
    return path
