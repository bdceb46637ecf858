"""Stock weights into a modified architecture, with every tensor accounted for."""

from .report import Row, WarmStartReport
from .warming import NotAllowedError, warm_start

__all__ = ["NotAllowedError", "Row", "WarmStartReport", "warm_start"]
