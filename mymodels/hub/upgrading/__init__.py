"""Old custom code made to run on today's transformers, and proven unchanged."""

from .upgrade import Upgrade, upgrade

__all__ = ["Upgrade", "upgrade"]
