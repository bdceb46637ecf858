"""Run as `python -I run.py JOB.json`: lock the process down, import the libraries once, run each stage in a fork.

A stage starts from a process that has never loaded the folder's code, so each is a clean process of its own, without
paying seconds of imports. What a stage finds it appends to the job's file of events; that it crashed, hung or was
killed is noted here. The same lines run again in workers that a stage spawns, up to `main`.
"""

import importlib.util
import json
import sys
from pathlib import Path

JOB = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
sys.modules["mymodels"] = None  # type: ignore[assignment]  # from here on `import mymodels` fails, installed or not
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
    stages.import_libraries(events)
    stages.run_stages(JOB, events)


if __name__ == "__main__":
    main()
