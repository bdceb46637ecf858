"""Default target modules of PEFT for both models, registered without importing PEFT."""

import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

_TABLES = "peft.utils.constants"
_NAMED_LIKE = {"mygpt2": "llama", "mybert": "bert"}  # model whose modules have the same names


def register_with_peft() -> None:
    """Add default target modules for `LoraConfig()` and PEFT's other methods, as for Llama and BERT: now if PEFT is
    loaded, else when it is imported."""
    if _TABLES in sys.modules:
        _register(sys.modules[_TABLES])
    else:
        sys.meta_path.insert(0, _PeftImportHook())


def _register(tables: ModuleType) -> None:
    for name, table in vars(tables).items():
        if name.startswith("TRANSFORMERS_MODELS_TO_") and name.endswith("_MODULES_MAPPING"):
            for ours, like in _NAMED_LIKE.items():
                if like in table:
                    table.setdefault(ours, table[like])


class _PeftImportHook(MetaPathFinder):
    """Finds the module with PEFT's tables once, and adds our entries after it has run."""

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
