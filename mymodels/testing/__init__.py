"""Tests for a model of your own: subclass `ModelBattery` in a pytest file."""

from .battery import ModelBattery

__all__ = ["ModelBattery"]
