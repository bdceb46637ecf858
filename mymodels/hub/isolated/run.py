"""Run as `python -I run.py JOB.json`: lock the process down, import the libraries once, run each stage in a fork.

A stage starts from a process that has never loaded the folder's code, so each stage is a clean process without the
seconds that imports take. A stage appends its results to the job's file of events; crashes, timeouts and kills are
recorded here. Workers that a stage spawns run this module too, except for `main`.
"""

import importlib.util
import json
import sys
from pathlib import Path

JOB = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
sys.modules["mymodels"] = None  # type: ignore[assignment]  # `import mymodels` fails from here on, even if installed
sys.dont_write_bytecode = True
if JOB["release"]:
    sys.path.insert(0, JOB["release"])

_spec = importlib.util.spec_from_file_location(
    "mymodels_clean", Path(__file__).with_name("__init__.py"), submodule_search_locations=[str(Path(__file__).parent)]
)
assert _spec is not None and _spec.loader is not None
sys.modules[_spec.name] = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(sys.modules[_spec.name])

from mymodels_clean import lockdown  # type: ignore[import-not-found]  # noqa: E402

lockdown.lock(JOB)


def main() -> None:
    from mymodels_clean import stages

    events = stages.Events(JOB["events"])
    stages.import_libraries(events, confined=JOB["confined"])
    found = str(sys.modules["transformers"].__file__)
    if JOB["release"] and not found.startswith(JOB["release"]):  # never the results of another release
        raise ImportError(f"transformers was to be imported from {JOB['release']}, but came from {found}")
    stages.run_stages(JOB, events)


if __name__ == "__main__":
    main()
