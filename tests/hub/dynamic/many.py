"""Run stages of the clean process on many folders from one process: each in its fork, the libraries imported once."""

import json
import os
import subprocess
import sys
from pathlib import Path

import warm_python

from mymodels.hub.checks import Check
from mymodels.hub.clean_process import CleanRun, describe_folder
from mymodels.hub.results_to_checks import judge

CLEAN = Path(__file__).parents[3] / "mymodels" / "hub" / "isolated"
SCRIPT = """
import importlib, importlib.util, json, sys
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
    for name in job["stages"]:
        module, function = stages.STAGES[name]
        run = getattr(importlib.import_module(f"mymodels_clean.{module}"), function)
        if not stages.run_stage(name, run, job, events):
            break
"""


def run_many(wanted: dict[Path, list[str]], scratch: Path, release: Path | None = None) -> dict[Path, list[Check]]:
    """Run the stages named for each folder; what `judge` makes of it. Folders must have names of their own.

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
    environment = {"PATH": os.environ["PATH"], "HF_HOME": str(scratch / "hf"), "HOME": str(scratch)}
    environment |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [
        sys.executable,
        "-I",
        str(scratch / "many.py"),
        str(scratch / "jobs.json"),
        str(CLEAN),
        str(release or ""),
    ]
    (subprocess.run if release else warm_python.run)(command, check=True, env=environment)
    found = {}
    for (folder, stages), job in zip(wanted.items(), jobs):
        events = [json.loads(line) for line in Path(job["events"]).read_text().splitlines()]
        run = CleanRun(events, "", Path(job["scratch"]), 0.0)
        if "record" in stages:
            made = Path(job["scratch"], "golden.safetensors")
            assert made.is_file(), (folder, events)
            made.replace(folder / "golden.safetensors")
        else:
            found[folder] = judge(run, folder, job["classes"][0])
    return found
