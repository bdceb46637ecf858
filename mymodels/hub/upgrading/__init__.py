"""Old custom code made to run on today's transformers, and proven unchanged."""

from ...extras import install_command

try:
    from .upgrade import Upgrade, upgrade
except ModuleNotFoundError as error:
    if error.name is None or error.name.split(".")[0] != "libcst":
        raise
    raise ImportError(f"upgrade needs libcst, which edits the code: {install_command('upgrade')}") from error

__all__ = ["Upgrade", "upgrade"]
