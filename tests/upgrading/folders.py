"""The miniature folders: old custom code in the manner of families that people publish, with weights made from a seed."""

import json
import shutil
from pathlib import Path
from zlib import crc32

import torch
from safetensors.torch import save_file

FOLDERS = Path(__file__).parent / "folders"
UNSEEN = Path(__file__).parent / "unseen"  # written before the rules had met them


def names(of: Path = FOLDERS) -> list[str]:
    """The folders, each of which has a `config.json`."""
    return sorted(path.parent.name for path in of.glob("*/config.json"))


def path(name: str) -> Path:
    """Where a folder is, whichever of the two it belongs to."""
    return FOLDERS / name if (FOLDERS / name).is_dir() else UNSEEN / name


def make(name: str, target: Path) -> Path:
    """A copy of a folder with weights, made from a seed for the names and shapes in its `shapes.json`."""
    shutil.copytree(path(name), target, ignore=shutil.ignore_patterns("shapes.json", "inputs.json", "__pycache__"))
    save_file(weights(name), target / "model.safetensors", {"format": "pt"})
    return target


def inputs(name: str) -> Path | None:
    """The folder's arguments of `forward`, where they cannot be generated."""
    file = path(name) / "inputs.json"
    return file if file.is_file() else None


def weights(name: str) -> dict[str, torch.Tensor]:
    """Random tensors that give every folder different tokens; the values of buffers are kept in `shapes.json`."""
    shapes = json.loads((path(name) / "shapes.json").read_text())
    made = {}
    for key, entry in shapes.items():
        if isinstance(entry, dict):
            made[key] = torch.tensor(entry["values"], dtype=getattr(torch, entry["dtype"]))
            continue
        noise = torch.randn(entry, generator=torch.Generator().manual_seed(crc32(key.encode())))
        made[key] = noise * 0.1 + 1 if len(entry) == 1 and key.endswith("weight") else noise * 0.3
    return made
