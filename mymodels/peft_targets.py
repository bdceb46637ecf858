"""PEFT's default targets for both models, without importing PEFT before anybody else does."""

import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

_TABLES = "peft.utils.constants"
_NAMED_LIKE = {"mygpt2": "llama", "mybert": "bert"}  # their matrices and norms have these models' names


def register_with_peft() -> None:
    """Let `LoraConfig()` and PEFT's other methods find what to adapt by themselves, as for Llama and BERT: now, if PEFT is
    loaded, else when it will be."""
    if _TABLES in sys.modules:
        _register(sys.modules[_TABLES])
    else:
        sys.meta_path.insert(0, _WhenPeftLoads())


def _register(tables: ModuleType) -> None:
    for name, table in vars(tables).items():
        if name.startswith("TRANSFORMERS_MODELS_TO_") and name.endswith("_MODULES_MAPPING"):
            for ours, like in _NAMED_LIKE.items():
                if like in table:
                    table.setdefault(ours, table[like])


class _WhenPeftLoads(MetaPathFinder):
    """Finds PEFT's tables where they are, once, and fills in ours when they have been made."""

    def find_spec(self, fullname: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname != _TABLES:
            return None
        sys.meta_path.remove(self)
        spec = PathFinder.find_spec(fullname, path)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                execute(module)
                _register(module)

            spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec
