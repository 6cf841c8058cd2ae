"""Paradigms by name. To add one: a file beside these, an entry here and one in params.yaml."""

from .tdm import TDM

PARADIGMS = {"tdm": TDM}
