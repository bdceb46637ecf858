"""Batch prediction: a model's answers to lines of text, in constant memory."""

from .predict import Counts, predict

__all__ = ["Counts", "predict"]
