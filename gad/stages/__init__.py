"""The pipeline's stages as functions, a file for each kind. Notebooks and `python -m gad` call these alone."""

from .benchmark import benchmark
from .chains import chain, nearby
from .cost import cost
from .diagnosis import diagnose
from .distillation import distill, publish
from .evaluation import evaluate
from .trial import trial
from .uses import judge, references, use
from .weigh import weigh
from .world import autoencoder, teacher

__all__ = ["autoencoder", "benchmark", "chain", "cost", "diagnose", "distill", "evaluate", "judge", "nearby", "publish",
           "references", "teacher", "trial", "use", "weigh"]
