"""Checks that a checkpoint is complete: its index, headers and manifest, and on request every byte."""

import hashlib
import json
import os
import re
import zipfile
from importlib.metadata import version
from pathlib import Path

import torch
from tqdm import tqdm

from .atomic_write import replace_file
from .checkpoint import Checkpoint, CheckpointError, widened
from .kinds import is_zip
from .opening import has_all_shards, locate, open_checkpoint, open_file, weight_files
from .safetensors_files import ADVICE, Problem, inside, read_json, scan_index

MANIFEST = "manifest.json"
_MADE_WITH = ("mymodels", "torch", "transformers", "safetensors")


def _files(folder: Path) -> list[str]:
    """The files of a folder as `/`-separated names, without the manifest, links and hidden files."""
    names: list[Path] = []
    for parent, folders, found in os.walk(folder):
        folders[:] = [
            name
            for name in folders
            if not re.match(r"\.|checkpoint-\d+$", name) and not Path(parent, name, MANIFEST).exists()
        ]
        names += [Path(parent, name) for name in found if not name.startswith(".") or name == ".metadata"]
    files = (path.relative_to(folder).as_posix() for path in names if path.is_file() and not path.is_symlink())
    return sorted(name for name in files if name != MANIFEST)


def sha256(path: Path, progress: tqdm | None = None) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
            if progress is not None:
                progress.update(len(chunk))
    return digest.hexdigest()


def _hash_progress(total: int) -> tqdm:
    return tqdm(total=total, unit="B", unit_scale=True, desc="hashing", leave=False, disable=None)


_SAVED_MODEL = re.compile(r"(model|pytorch_model)(-\d{5}-of-\d{5})?\.(safetensors|bin)(\.index\.json)?")


def is_weight_file(name: str) -> bool:
    """Whether saving a model to its folder replaces a file of this name: weights, index and manifest."""
    return name == MANIFEST or _SAVED_MODEL.fullmatch(name) is not None


def write_manifest(folder: Path) -> None:
    """Write `manifest.json`: size and SHA-256 of every file of `folder`, and the versions of packages that made it.

    Links, hidden files and folders of other checkpoints (`checkpoint-500`, or with a manifest of their own) are left out.

    Raises:
        CheckpointError: `folder` is not a folder.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder, so it has no manifest: name the folder of the checkpoint")
    sizes = {name: (folder / name).stat().st_size for name in _files(folder)}
    with _hash_progress(sum(sizes.values())) as progress:
        files = {name: {"sha256": sha256(folder / name, progress), "size": size} for name, size in sizes.items()}
    manifest = {"files": files, "made_with": {package: version(package) for package in _MADE_WITH}}
    if (folder / MANIFEST).is_symlink():
        (folder / MANIFEST).unlink()
    with replace_file(folder / MANIFEST) as file:
        file.write_text(json.dumps(manifest, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def update_manifest(folder: Path, name: str) -> None:
    """Update the entry of one file in `manifest.json`, if there is one; other entries are kept.

    Raises:
        CheckpointError: the manifest is damaged.
    """
    path = folder / MANIFEST
    if not path.is_file():
        return
    read_manifest(folder)
    manifest = read_json(path)
    manifest["files"][name] = {"sha256": sha256(folder / name), "size": (folder / name).stat().st_size}
    manifest["files"] = dict(sorted(manifest["files"].items()))
    with replace_file(path) as file:
        file.write_text(json.dumps(manifest, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_manifest(folder: Path) -> dict[str, tuple[int, str]]:
    """The manifest's files, name → (size, SHA-256).

    Raises:
        CheckpointError: it is damaged, or names files outside the folder.
    """
    path = folder / MANIFEST
    files = read_json(path).get("files")
    if not isinstance(files, dict):
        raise CheckpointError(f"{path}: it has no table of files; {ADVICE}, or write it again")
    result = {}
    for name, entry in files.items():
        inside(folder, name, path)
        size, digest = (entry.get("size"), entry.get("sha256")) if isinstance(entry, dict) else (None, None)
        if type(size) is not int or size < 0 or not isinstance(digest, str) or len(digest) != 64:
            raise CheckpointError(f"{path}: {name!r} has no size and SHA-256; {ADVICE}, or write it again")
        result[name] = (size, digest)
    return result


def check_checkpoint(path: str | os.PathLike, *, full: bool = False, allow_pickle: bool = False) -> list[Problem]:
    """Problems of a checkpoint, found by comparing its index, headers and manifest without reading tensors.

    Args:
        path: a folder or file that `open_checkpoint` opens.
        full: also read every byte: hashes against the manifest, checksums of zip files, NaN and infinite weights.
        allow_pickle: as for `open_checkpoint`.

    Returns:
        The problems; an empty list for a complete checkpoint.

    Raises:
        FileNotFoundError: there is no such file or folder.
    """
    path = locate(path)
    problems = check_manifest(path, full) if path.is_dir() and (path / MANIFEST).is_file() else []
    checkpoint = None
    try:
        found = [problem for index in _indexes(path) for problem in _check_index(index)]
        problems += found
        if not found:
            checkpoint = open_checkpoint(path, allow_pickle=allow_pickle)
            if checkpoint.part_of and not has_all_shards(path):
                problems.append(Problem(path.name, checkpoint.part_of))
    except CheckpointError as error:
        problems.append(Problem(path.name, str(error)))
    if full and checkpoint is not None:
        problems += _check_data(checkpoint)
    return problems


def _indexes(path: Path) -> list[Path]:
    files = weight_files(path) if path.is_dir() else [path] if path.is_file() else []
    return [file for file in files if file.suffix == ".json"]


def check_manifest(folder: Path, full: bool) -> list[Problem]:
    """Differences between a folder and its `manifest.json`: files, sizes and, if `full`, hashes."""
    try:
        manifest = read_manifest(folder)
    except CheckpointError as error:
        return [Problem(MANIFEST, str(error))]
    problems = []
    with _hash_progress(sum(size for size, _ in manifest.values()) if full else 0) as progress:
        for name, (size, digest) in manifest.items():
            file = folder / name
            if not file.is_file():
                problems.append(Problem(name, f"{file} is missing; {MANIFEST} lists it: {ADVICE}"))
            elif file.stat().st_size != size:
                message = f"{file} has {file.stat().st_size:,} bytes, {MANIFEST} says {size:,}: {ADVICE}"
                problems.append(Problem(name, message))
            elif full and sha256(file, progress) != digest:
                problems.append(Problem(name, f"{file} was changed: its SHA-256 is not that in {MANIFEST}: {ADVICE}"))
    for name in sorted(set(_files(folder)) - set(manifest)):
        problems.append(Problem(name, f"{folder / name} is not in {MANIFEST}: remove it, or write the manifest again"))
    return problems


def _check_index(index: Path) -> list[Problem]:
    homes, problems = scan_index(index, open_file)
    data = read_json(index)
    total = data.get("metadata", {}).get("total_size") if isinstance(data.get("metadata"), dict) else None
    stored = {name: shard for name, shard in homes.items() if name not in shard.aliases}
    actual = sum(shard.info[name].nbytes for name, shard in stored.items())
    if total is not None and total != actual and not problems:
        message = f"{index}: total_size is {total!r}, but the tensors have {actual:,} bytes; write the index again"
        problems.append(Problem(index.name, message))
    named = {file for file in data["weight_map"].values() if isinstance(file, str)}
    stem, suffix = index.name.split(".")[0], Path(index.name.removesuffix(".index.json")).suffix
    for file in sorted(index.parent.iterdir()):
        if file.name.startswith(stem) and file.suffix == suffix and file.name not in named:
            message = f"{file} is not named by {index.name}, but other tools may read it: remove it, or {ADVICE}"
            problems.append(Problem(file.name, message))
    return problems


def _check_data(checkpoint: Checkpoint) -> list[Problem]:
    problems = []
    root = checkpoint.path if checkpoint.path.is_dir() else checkpoint.path.parent
    for name in sorted({info.file for info in checkpoint.info.values()}):
        file = root / name
        if file.is_file() and is_zip(file):
            try:
                with zipfile.ZipFile(file) as archive:
                    damaged = archive.testzip()
            except Exception as error:  # zipfile raises many kinds
                damaged = str(error) or type(error).__name__
            if damaged:
                problems.append(Problem(name, f"{file}: its member {damaged} has a wrong checksum; {ADVICE}"))
    for name in tqdm(checkpoint, desc="reading", unit="tensor", disable=None):
        try:
            tensor = checkpoint[name]
        except CheckpointError as error:
            problems.append(Problem(checkpoint.info[name].file, str(error), name))
            continue
        if tensor.layout != torch.strided or not (tensor.is_floating_point() or tensor.is_complex()):
            continue
        values = widened(tensor)
        finite = values.isfinite()
        if bool(finite.all()) or (
            values.is_floating_point() and bool((finite & (values == 0) | values.isneginf()).all())
        ):
            continue  # a mask of 0 and -inf
        nan, infinite = int(values.isnan().sum()), int((~finite & ~values.isnan()).sum())
        message = (
            f"{root / checkpoint.info[name].file}: tensor {name!r} has {nan:,} NaN and {infinite:,} infinite of "
            f"{tensor.numel():,} values; use a checkpoint from before the training diverged"
        )
        problems.append(Problem(checkpoint.info[name].file, message, name))
    return problems
