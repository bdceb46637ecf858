"""Load weights of one model into another, modified one, and report what became of every tensor."""

from .checking import Check
from .report import Row, WarmStartReport
from .warm_start_model import NotAllowedError, warm_start

__all__ = ["Check", "NotAllowedError", "Row", "WarmStartReport", "warm_start"]
