"""A model's answers to lines of text, in constant memory: what `mymodels predict` does."""

from .predict import Counts, predict

__all__ = ["Counts", "predict"]
