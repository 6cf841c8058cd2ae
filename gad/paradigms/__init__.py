"""Paradigms by name. To add one: a file beside these, an entry here and one in params.yaml."""

from .add import ADD
from .dmd import DMD
from .ladd import LADD
from .sid import SiD
from .swiftbrush import SwiftBrush
from .tcd import TCD
from .tdm import TDM

PARADIGMS = {"ladd": LADD, "add": ADD, "dmd": DMD, "tdm": TDM, "swiftbrush": SwiftBrush, "sid": SiD, "tcd": TCD}
