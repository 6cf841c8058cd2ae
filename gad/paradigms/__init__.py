"""Paradigms by name. To add one:

1. A file beside these, NAME.py, with a subclass of `Paradigm` (base.py). NAME is the class's in lower case, the key of
   `PARADIGMS` below, and what runs and params.yaml call it.
2. Its `settings`: the keys under `paradigms.NAME` in params.yaml, all of them numbers and `lr` among them.
3. Its `roles`, made in `__init__`: "student", with the average that is saved, and whatever trains beside it.
4. Its `losses`, a scalar for each role that moves at a step; `form`, the form of GAD that is the paper's for it; and
   `paired`, `guided_fake` and `turn` where they differ from the base's.
5. An entry in `PARADIGMS`, `paradigms.NAME` in params.yaml, and NAME in `grid.paradigms` there.

tests/test_paradigms.py and tests/test_objectives.py then run on it; its own closed form belongs in the latter. A stage
depends on the paradigm's own file, base.py and forms.py alone: what two paradigms share has its place in base.py.
"""

from .add import ADD
from .base import Paradigm
from .dmd import DMD
from .ladd import LADD
from .sid import SiD
from .swiftbrush import SwiftBrush
from .tcd import TCD
from .tdm import TDM

PARADIGMS = {"ladd": LADD, "add": ADD, "dmd": DMD, "tdm": TDM, "swiftbrush": SwiftBrush, "sid": SiD, "tcd": TCD}


def find(name: str) -> type[Paradigm]:
    """The paradigm `name`, which params.yaml knows by its file; ValueError where it has no entry here."""
    if name not in PARADIGMS:
        there = f"gad/paradigms/{name}.py is there, but PARADIGMS in gad/paradigms/__init__.py has no entry for it"
        raise ValueError(f"paradigms.{name}: {there}: add one")
    return PARADIGMS[name]
