"""The repairs, one per file: each module of this folder defines `RULE`, or several in `RULES`."""

from functools import lru_cache
from importlib import import_module
from pkgutil import iter_modules

from ..rule import Rule


@lru_cache(maxsize=1)
def all_rules() -> tuple[Rule, ...]:
    """Every rule of this folder in the order of application.

    Raises:
        ValueError: two rules have one name.
    """
    found: list[Rule] = []
    for module in iter_modules(__path__):
        loaded = import_module(f"{__name__}.{module.name}")
        found += loaded.RULES if hasattr(loaded, "RULES") else [loaded.RULE]
    names = [rule.name for rule in found]
    if len(set(names)) < len(names):
        raise ValueError(f"two rules have one name: {sorted(n for n in names if names.count(n) > 1)[0]}")
    return tuple(sorted(found, key=lambda rule: (rule.order, rule.name)))
