"""Run as `python -I enter.py POLICY.json SCRIPT [ARGUMENT…]`, or with `-c CODE` for the script: run it in the box.

Two processes, or three: this one, which stays outside and watches, the first process of the namespaces, where there
are any, and the confined one, which runs the script in this interpreter. It never starts a program: confined code could
not.
"""

import importlib.util
import json
import sys
from pathlib import Path

_spec = importlib.util.spec_from_file_location(
    "mymodels_confined",
    Path(__file__).with_name("__init__.py"),
    submodule_search_locations=[str(Path(__file__).parent)],
)
assert _spec is not None and _spec.loader is not None
if _spec.name not in sys.modules:
    sys.modules[_spec.name] = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(sys.modules[_spec.name])

from mymodels_confined import supervise  # type: ignore[import-not-found]  # noqa: E402

if __name__ == "__main__":
    with open(sys.argv[1], encoding="utf-8") as _file:
        _policy = json.load(_file)
    supervise.run(_policy, sys.argv[2:])
