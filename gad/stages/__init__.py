"""The pipeline's stages as functions, a file for each kind. Notebooks and `python -m gad` call these alone."""

from .diagnosis import diagnose
from .distillation import distill, trial
from .evaluation import evaluate
from .world import autoencoder, teacher

__all__ = ["autoencoder", "diagnose", "distill", "evaluate", "teacher", "trial"]
