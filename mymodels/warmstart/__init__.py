"""Stock weights into a modified architecture, with every tensor accounted for."""

from .checking import Check
from .report import Row, WarmStartReport
from .warm_start_model import NotAllowedError, warm_start

__all__ = ["Check", "NotAllowedError", "Row", "WarmStartReport", "warm_start"]
