"""Load a Hub repo folder as a stranger would: in a new process without mymodels, with an empty cache, offline."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

SCRIPT = Path(__file__).with_name("load_script.py")


def load_in_clean_process(
    path: str | os.PathLike,
    auto_classes: list[str],
    *,
    texts: list[str],
    prompt: str | None = None,
    max_new_tokens: int = 40,
    device_map: str | None = "auto",
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Run `load_script.py` on a folder and return what it saw.

    Args:
        path: a folder, loaded with `trust_remote_code=True` through each of `auto_classes`.
        auto_classes: names such as `"AutoModelForCausalLM"`.
        texts: run through every model as one padded batch.
        prompt: continued by every model that can generate, greedily, by up to `max_new_tokens` tokens.

    Returns:
        The script's report, and by Auto class the first output for `texts`: logits, or the last hidden states.

    Raises:
        RuntimeError: the process failed; the message ends with what it printed.
    """
    with tempfile.TemporaryDirectory(prefix="mymodels-clean-") as scratch:
        outputs, report = Path(scratch) / "outputs.safetensors", Path(scratch) / "report.json"
        job = {
            "path": str(Path(path).resolve()),
            "auto_classes": auto_classes,
            "texts": texts,
            "prompt": prompt,
            "max_new_tokens": max_new_tokens,
            "device_map": device_map,
            "outputs": str(outputs),
            "report": str(report),
        }
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "PYTHON"))}
        environment.update(HF_HOME=scratch, HF_HUB_OFFLINE="1", HF_HUB_DISABLE_PROGRESS_BARS="1", TQDM_DISABLE="1")
        # -I: no PYTHONPATH, no user packages, nothing from the script's own folder
        process = subprocess.run(
            [sys.executable, "-I", str(SCRIPT)],
            input=json.dumps(job),
            capture_output=True,
            text=True,
            env=environment,
            cwd=scratch,
        )
        if process.returncode:
            raise RuntimeError(f"{path} did not load in a clean process:\n{process.stderr.strip()[-2000:]}")
        return json.loads(report.read_text(encoding="utf-8")), load_file(outputs)
