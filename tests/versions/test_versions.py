"""One set of files under the ends and the awkward ones of the supported transformers releases (`make test-versions`)."""

import functools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny import SWITCHES, batch, mybert_config, mygpt2_config
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from mymodels import MyBertForMaskedLM, MyBertForSequenceClassification, MyGPT2ForCausalLM, quantize
from mymodels.hub.releases import PinnedRelease, install, resolve

ROOT = Path(__file__).parents[2]
CACHE = ROOT / ".cache" / "transformers"
RELEASES = resolve(["4.56", "4.57", "5.0", "5.2", "5.3", "5.4", "5.10", "5.23"])
TOO_OLD = PinnedRelease("4.55.4", "0.36.2", "0.21.4")
pytestmark = pytest.mark.versions


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders to load, each with its golden inputs and outputs beside it, made under the pinned release."""
    work = tmp_path_factory.mktemp("versions")
    torch.manual_seed(0)
    for name in ("stock", "modern", "everything", "sliding-mixed"):
        MyGPT2ForCausalLM(mygpt2_config(**SWITCHES[name])).save_pretrained(
            work / f"mygpt2-{name}", max_shard_size="20KB"
        )
    masked = MyBertForMaskedLM(mybert_config(pooling="attention"))
    torch.nn.init.normal_(masked.cls.predictions.bias)
    masked.save_pretrained(work / "mybert-masked", max_shard_size="20KB")
    for name, model in {
        "mygpt2": MyGPT2ForCausalLM(mygpt2_config()),
        "everything": MyGPT2ForCausalLM(mygpt2_config(**SWITCHES["everything"])),
        "mybert": MyBertForMaskedLM(mybert_config()),
    }.items():
        quantize(model.eval(), activation_bits=16).save_pretrained(work / f"int8-{name}", max_shard_size="20KB")
    masked = quantize(MyBertForMaskedLM(mybert_config()).eval())
    masked.base_model.config.architectures = ["MyBertModel"]
    masked.base_model.save_pretrained(work / "headless-base")
    quantize(MyBertForSequenceClassification(mybert_config()).eval()).save_pretrained(work / "headless-classifier")
    quantize(MyBertForSequenceClassification(mybert_config(num_labels=40)).eval()).save_pretrained(
        work / "eight-labels"
    )
    shutil.copytree(ROOT / "hub_repo" / "mygpt2", work / "mygpt2-demo")
    shutil.copytree(ROOT / "hub_repo" / "mybert", work / "mybert-classifier")
    for folder in [*work.glob("my*"), *work.glob("int8-*")]:
        record_golden(folder)
    text = "Oh! Toto ran — café"
    ids = AutoTokenizer.from_pretrained(work / "mygpt2-demo")(text).input_ids
    (work / "tokens.json").write_text(json.dumps({"text": text, "input_ids": ids}))
    return work


@torch.no_grad()
def record_golden(folder: Path) -> None:
    inputs = batch("left")
    if folder.name.startswith("mygpt2") or folder.name in ("int8-mygpt2", "int8-everything"):
        model = AutoModelForCausalLM.from_pretrained(folder)
    elif folder.name in ("mybert-masked", "int8-mybert"):
        model = MyBertForMaskedLM.from_pretrained(folder)
    else:
        model = AutoModelForSequenceClassification.from_pretrained(folder)
    golden = {**inputs, "logits": model(**inputs).logits}
    if model.can_generate():
        golden["greedy"] = model.generate(**inputs, do_sample=False, max_new_tokens=20)
    save_file(golden, folder.with_suffix(".safetensors"))


def run(release: Path, work: Path, scratch: Path, *modes: str) -> subprocess.CompletedProcess:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "PYTHON"))}
    environment.update(HF_HOME=str(scratch), HF_HUB_OFFLINE="1", HF_HUB_DISABLE_PROGRESS_BARS="1")
    script = Path(__file__).with_name("run_under_release.py")
    command = [sys.executable, "-I", script, release, work, *modes]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


MODES = ("remote", "package")


@pytest.fixture(scope="module")
def both_modes(work: Path, tmp_path_factory: pytest.TempPathFactory):
    """What was printed under a release, which is imported once for both modes."""
    return functools.cache(lambda release: run(install(release, CACHE), work, tmp_path_factory.mktemp("hf"), *MODES))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("release", RELEASES, ids=lambda release: release.transformers)
def test_release(release: PinnedRelease, mode: str, both_modes) -> None:
    process = both_modes(release)
    printed = process.stdout.splitlines()
    assert f"transformers {release.transformers} {mode} ok" in printed, process.stderr[-4000:]


def test_a_release_that_is_too_old_says_so(work: Path, tmp_path: Path) -> None:
    process = run(install(TOO_OLD, CACHE), work, tmp_path, "remote")
    assert "ok" not in process.stdout
    last = process.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: this model needs transformers 4.56 or newer (tested from 4.56 to 5.23), but ")
    assert "transformers 4.55.4 is installed" in last
