"""Pushing, loading and locking with the huggingface_hub of older transformers releases, against the Hub of `tests/hub`."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "tests" / "hub"))

from hub_server import Hub  # noqa: E402
from test_versions import CACHE  # noqa: E402

from mymodels.hub.releases import PinnedRelease, install, resolve  # noqa: E402

pytestmark = pytest.mark.versions
TOKEN = "hf_writer_of_me_0123456789"
CODE = f"""
import shutil, sys
from pathlib import Path
import huggingface_hub, torch, transformers
from mymodels.hub.lock import load, write_lock
from mymodels.hub.pushing import HubError, push
folder = Path("model")
shutil.copytree({str(ROOT / "hub_repo" / "mygpt2")!r}, folder)
first = push(folder, "me/model", no_verify=True, tag="v1")
assert len(first.uploaded) > 10 and not push(folder, "me/model", no_verify=True).uploaded
write_lock("me/model@" + first.commit, "lock")
model = load("me/model", lock="lock", auto_class="AutoModelForCausalLM")
plain = transformers.AutoModelForCausalLM.from_pretrained("me/model", revision=first.commit, trust_remote_code=True)
assert torch.equal(model.lm_head.weight, plain.lm_head.weight)
asked = push(folder, "me/model", no_verify=True, create_pr=True)
(folder / "README.md").write_text("changed")
(folder / "manifest.json").unlink()
asked = push(folder, "me/model", no_verify=True, create_pr=True)
assert asked.uploaded == ["README.md"] and asked.pr_url.endswith("/discussions/1")
try:
    push(folder, "other/model", no_verify=True)
except HubError as error:
    print("said:", error)
print(transformers.__version__, huggingface_hub.__version__, "ok")
"""


@pytest.mark.parametrize("release", resolve("4.56,5.0,5.10"), ids=lambda release: release.transformers)
def test_release(release: PinnedRelease, tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "PYTHON"))}
    path = os.pathsep.join([str(install(release, CACHE)), str(ROOT)])
    with Hub() as hub:
        environment.update(HF_ENDPOINT=hub.url, HF_HOME=str(tmp_path / "hf"), HF_HUB_DISABLE_XET="1", HF_TOKEN=TOKEN)
        process = subprocess.run(
            [sys.executable, "-c", CODE],
            env={**environment, "PYTHONPATH": path},
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
        assert process.returncode == 0, process.stderr[-4000:]
        assert process.stdout.splitlines()[-1] == f"{release.transformers} {release.huggingface_hub} ok"
        assert "said: " in process.stdout and "use one with write permission for it" in process.stdout
        assert TOKEN not in process.stdout + process.stderr and not hub.leaks
