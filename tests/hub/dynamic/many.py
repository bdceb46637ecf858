"""Run stages of the clean process on many folders from one process: each in its fork, the libraries imported once."""

import json
import subprocess
import sys
from pathlib import Path

import warm_python

from mymodels.hub.checks import Check
from mymodels.hub.clean_process import CleanRun, describe_folder, environment
from mymodels.hub.results_to_checks import checks_of_run

CLEAN = Path(__file__).parents[3] / "mymodels" / "hub" / "isolated"
SCRIPT = """
import importlib.util, json, sys
from pathlib import Path

jobs, clean, release = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]), sys.argv[3]
sys.dont_write_bytecode = True
if release:
    sys.path.insert(0, release)
spec = importlib.util.spec_from_file_location("mymodels_clean", clean / "__init__.py", submodule_search_locations=[str(clean)])
sys.modules[spec.name] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sys.modules[spec.name])
from mymodels_clean import stages

for number, job in enumerate(jobs):
    events = stages.Events(job["events"])
    if number == 0:
        stages.import_libraries(events)
    stages.run_stages(job, events)
"""


def run_many(wanted: dict[Path, list[str]], scratch: Path, release: Path | None = None) -> dict[Path, list[Check]]:
    """Run the stages named for each folder; what `checks_of_run` makes of it. Folders must have names of their own.

    A `golden.safetensors` in a folder is compared with; the stage "record" leaves one in it.
    """
    jobs = []
    for folder, stages in wanted.items():
        own = scratch / folder.name
        own.mkdir(parents=True)
        (own / "events.jsonl").touch()
        golden = folder / "golden.safetensors"
        jobs.append(
            describe_folder(folder)
            | {
                "folder": str(folder),
                "scratch": str(own),
                "saved": str(own / "saved" / f"{folder.name}-saved"),
                "events": str(own / "events.jsonl"),
                "golden": str(golden) if golden.is_file() else None,
                "time_limit": 60.0,
                "stages": stages,
                "worker_methods": ["fork"],
            }
        )
    (scratch / "jobs.json").write_text(json.dumps(jobs))
    (scratch / "many.py").write_text(SCRIPT)
    command = [
        sys.executable,
        "-I",
        str(scratch / "many.py"),
        str(scratch / "jobs.json"),
        str(CLEAN),
        str(release or ""),
    ]
    (subprocess.run if release else warm_python.run)(command, check=True, env=environment(scratch))
    found = {}
    for (folder, stages), job in zip(wanted.items(), jobs):
        events = [json.loads(line) for line in Path(job["events"]).read_text().splitlines()]
        run = CleanRun(events, "", Path(job["scratch"]), 0.0)
        if "record" in stages:
            made = Path(job["scratch"], "golden.safetensors")
            assert made.is_file(), (folder, events)
            made.replace(folder / "golden.safetensors")
        else:
            found[folder] = checks_of_run(run, folder, job["classes"][0])
    return found
