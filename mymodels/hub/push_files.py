"""The files of a Hub repo folder that may be pushed, by kind, with their sizes and hashes."""

import hashlib
import os
from collections.abc import Iterable, Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

from ..checkpoints.integrity import MANIFEST, read_manifest
from ..messages import printable

# kind → patterns for a file's name, in any subfolder; files that match none are not pushed
KINDS = {
    "code": ("*.py",),
    "weights": ("*.safetensors", "*.safetensors.index.json"),
    "config": (
        "config.json",
        "config.*.json",
        "generation_config.json",
        "preprocessor_config.json",
        "video_preprocessor_config.json",
        "processor_config.json",
        "adapter_config.json",
        "quantize_config.json",
        "sentence_bert_config.json",
        "config_sentence_transformers.json",
        "modules.json",
    ),
    "tokenizer": (
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "vocab.json",
        "vocab.bpe",
        "normalizer.json",
        "tekken.json",
        "vocab.txt",
        "merges.txt",
        "dict.txt",
        "bpe.codes",
        "*.model",
        "*.spm",
        "*.tiktoken",
        "*.jinja",
        "chat_template.json",
    ),
    "record": (MANIFEST, "warm_start.json", "upgrade.json", "upgrade.diff"),
    "document": (
        "*.md",
        "LICENSE*",
        "NOTICE*",
        "USE_POLICY*",
        "CITATION.cff",
        "requirements.txt",
        ".gitattributes",
        "*.png",
        "*.jpg",
        "*.jpeg",
        "*.gif",
        "*.svg",
        "*.webp",
    ),
    "other format": ("*.gguf", "*.onnx", "*.onnx_data", "*.onnx.data"),
}
LOADED = ("code", "weights", "config", "tokenizer", "record")  # files that loaders read, and records of them
PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.pickle", "*.ckpt", "*.joblib", "*.dill", "*.npy", "*.npz", "*.msgpack")
_SECRETS = (
    ".env",
    ".env.*",
    "*.pem",
    "*.key",
    "*.p12",
    "*.pfx",
    "id_rsa*",
    "id_ed25519*",
    "*netrc",
    ".pypirc",
    ".npmrc",
    ".git-credentials",
    "*credential*",
    "*secret*",
    "token",
    "*.token",
    "*token*.txt",
    "stored_tokens",
)
_LEFTOVERS = ("*.pyc", "*.ipynb", ".DS_Store", "Thumbs.db", "*.log", "*.tmp", "*~", "*tfevents*", "trainer_state.json")
_LEFTOVER_FOLDERS = ("__pycache__", ".ipynb_checkpoints", "runs", "wandb", "checkpoint-*", ".*")
_NEVER = (".git", ".cache")  # of git and `hf download --local-dir`; huggingface_hub ignores them too
_TEXT_BYTES = 10_000_000


class LocalFile(NamedTuple):
    """A file of the folder: path, size in bytes, SHA-256, and git's object id of its content."""

    path: Path
    size: int
    sha256: str
    git_oid: str


def kind_of(name: str) -> str | None:
    """The kind of a file, a key of `KINDS`; None for files that are not pushed."""
    base = name.rsplit("/", 1)[-1]
    return next((kind for kind, patterns in KINDS.items() if _matches_any(base, patterns)), None)


def scan(folder: Path, allow: Iterable[str] = ()) -> dict[str, LocalFile]:
    """Name → size and hashes of every file in `folder`; names are `/`-separated.

    Args:
        allow: patterns of further file names to include; pickles and secrets are never allowed.

    Raises:
        ValueError: the folder has pickles, secrets, links, temporary files, or unknown kinds; the message lists them.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder, so there is nothing to push: name the folder of the model")
    names, refused = [], []
    for name, is_regular in _walk(folder):
        reason = _reason_not_pushed(name, tuple(allow)) if is_regular else "a link or no regular file"
        refused.append(f"{printable(name)} ({reason})") if reason else names.append(name)
    if refused:
        more = f" and {len(refused) - 20} more" if len(refused) > 20 else ""
        raise ValueError(
            f"{folder} is not pushed because of {', '.join(refused[:20])}{more}: remove files that do not belong to the "
            "model, and allow other kinds of files by name (--allow PATTERN)"
        )
    if not names:
        raise ValueError(f"{folder} is empty, so there is nothing to push: name the folder of the model")
    return {name: hash_file(folder / name) for name in sorted(names)}


def check_manifest(folder: Path, files: dict[str, LocalFile]) -> None:
    """Compare the files with `manifest.json`, if there is one.

    Raises:
        ValueError: a file differs from the manifest, is missing, or is not listed.
    """
    if MANIFEST not in files:
        return
    listed = read_manifest(folder)
    for name in sorted(set(listed) | set(files) - {MANIFEST, ".gitattributes"}):
        if name not in files:
            problem = f"lists {printable(name)}, which is missing"
        elif name not in listed:
            problem = f"does not list {printable(name)}"
        elif listed[name] != (files[name].size, files[name].sha256):
            problem = (
                f"records another {printable(name)}, of {listed[name][0]:,} bytes and SHA-256 {listed[name][1][:16]}…"
            )
        else:
            continue
        raise ValueError(
            f"{folder / MANIFEST} {problem}: if the folder is correct, write a new manifest with "
            "`mymodels check --write-manifest`"
        )


def check_no_secret_inside(files: dict[str, LocalFile], secrets: list[str]) -> None:
    """Check that no file of up to 10 MB contains one of `secrets`, the user's tokens.

    Raises:
        ValueError: a file does; the message names the file, not the secret.
    """
    for name, file in files.items():
        if file.size <= _TEXT_BYTES:
            content = file.path.read_bytes()
            if any(secret.encode() in content for secret in secrets):
                raise ValueError(f"{printable(name)} contains your Hub token: remove it there, and create a new token")


def hash_file(path: Path) -> LocalFile:
    """Size, SHA-256 and git's object id of a file, from one read."""
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        digest, blob = hashlib.sha256(), hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
        while chunk := file.read(1 << 20):
            digest.update(chunk)
            blob.update(chunk)
    return LocalFile(path, size, digest.hexdigest(), blob.hexdigest())


def _walk(folder: Path) -> Iterator[tuple[str, bool]]:
    """Every entry of a folder, recursively, except folders: `/`-separated name, and whether it is a regular file."""
    for parent, folders, files in os.walk(folder):
        folders[:] = [name for name in sorted(folders) if name not in _NEVER or Path(parent) != folder]
        for name in [*folders, *files]:
            path = Path(parent, name)
            if path.is_symlink() or name in files:
                yield path.relative_to(folder).as_posix(), path.is_file() and not path.is_symlink()


def _reason_not_pushed(name: str, allow: tuple[str, ...]) -> str:
    """Why a file is not pushed; empty if it is."""
    *folders, base = name.split("/")
    if not name.isprintable() or "\\" in name:
        return "a name with control characters or backslashes"
    if _matches_any(base.lower(), PICKLES):
        return "a pickle or similar format, which can run code when it is loaded"
    if _matches_any(base.lower(), _SECRETS):
        return "the name of a secret"
    if any(_matches_any(part, _LEFTOVER_FOLDERS) for part in folders) or _matches_any(base, _LEFTOVERS):
        return "a temporary file"
    if kind_of(name) is None and not _matches_any(base, allow) and not _matches_any(name, allow):
        return "not a known kind of model file"
    return ""


def _matches_any(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)
