"""Geometry-Aware Distillation: few-step students that answer their initial noise as their teacher does."""

__version__ = "0.1.0"
