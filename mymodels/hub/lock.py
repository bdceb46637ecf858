"""Locks: the hashes of the code that was reviewed, and a `load` that runs no other code."""

import hashlib
import json
import os
import re
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import transformers
from huggingface_hub import snapshot_download

from ..checkpoints import replace_file
from ..checkpoints.opening import locate
from ..checkpoints.safetensors_files import inside, parse_json, read_json
from ..messages import printable
from .isolated_model import load_isolated
from .remote import REPO_ID, Remote

LOCK_NAME = "mymodels.lock"
# configs too, because they name the classes to load; `configuration_files` may name `config.5.0.0.json`
_CODE = re.compile(r".*\.(py|so|pyd)|(.*/)?[^/]*config[^/]*\.json", re.IGNORECASE | re.DOTALL)
_PATTERNS = ["*.py", "*.so", "*.pyd", "*config*.json"]
_ATTENTION = ("attn_implementation", "_attn_implementation", "_attn_implementation_internal", "experts_implementation")
_AT_COMMIT = re.compile(rf"({REPO_ID})@([0-9a-f]{{40}})", re.ASCII)
_COPIES: list[tempfile.TemporaryDirectory] = []  # kept until the process ends, because offloaded weights are read later


class LockError(ValueError):
    """A folder or repo differs from its lock; none of its code was executed."""


class Lock(NamedTuple):
    """The reviewed code: a Hub repo and commit, or None for a folder, and name → (size, SHA-256) of each code file."""

    repo_id: str | None
    commit: str | None
    files: dict[str, tuple[int, str]]


def write_lock(
    source: str | os.PathLike, file: str | os.PathLike = LOCK_NAME, *, token: str | bool | None = None
) -> Lock:
    """Record the hashes of the code in a folder or commit, after it has been reviewed. The code is not executed.

    Includes all `.py` files, and all `…config.json`, which name the classes to load.

    Args:
        source: a folder, or `user/name@SHA` with the 40 digits of the commit.
        file: the JSON file to write.
        token: as in `huggingface_hub`.

    Raises:
        LockError: some of the code is in another repo, which a lock cannot cover; or there is no code.
        ValueError: `source` is neither a folder nor a commit.
        HubError: the commit could not be read.

    Examples:
        >>> write_lock("my-model", "mymodels.lock")
    """
    found = _AT_COMMIT.fullmatch(str(source))
    if Path(source).expanduser().is_dir():
        lock = Lock(None, None, _hashes(_read_code(Path(source).expanduser())))
    elif found:
        repo_id, commit = found.groups()
        with tempfile.TemporaryDirectory(prefix="mymodels-lock-") as scratch:
            folder = Remote(repo_id, token=token).request(
                lambda: snapshot_download(
                    repo_id, revision=commit, allow_patterns=_PATTERNS, cache_dir=scratch, token=token
                )
            )
            lock = Lock(repo_id, commit, _hashes(_read_code(Path(folder))))
    else:
        raise ValueError(
            f"{printable(str(source))} is neither a folder nor a commit: write user/name@SHA with all 40 digits of the "
            "reviewed commit, because branches and tags can move"
        )
    if not lock.files:
        raise LockError(f"{source} has no code and no config, so there is nothing to lock: name the model's folder")
    table = {name: {"sha256": digest, "size": size} for name, (size, digest) in lock.files.items()}
    with replace_file(file) as path:
        content = {"repo_id": lock.repo_id, "commit": lock.commit, "files": table}
        path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return lock


def read_lock(file: str | os.PathLike) -> Lock:
    """The lock in `file`.

    Raises:
        LockError: the file is not a valid lock.
        FileNotFoundError: the file does not exist.
    """
    path = Path(file).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"there is no lock {path}: write it with `mymodels lock`")
    content = read_json(path)
    repo_id, commit, table = content.get("repo_id"), content.get("commit"), content.get("files")
    table = table if isinstance(table, dict) else {}
    files = {}
    for name, entry in table.items():
        size, digest = (entry.get("size"), entry.get("sha256")) if isinstance(entry, dict) else (None, None)
        if isinstance(size, int) and isinstance(digest, str) and len(digest) == 64:
            files[name] = (size, digest)
    of_a_commit = _AT_COMMIT.fullmatch(f"{repo_id}@{commit}") is not None
    if not files or len(files) < len(table) or not (of_a_commit or repo_id is commit is None):
        raise LockError(f"{path} is not a valid lock: review the code again, and write a new one with `mymodels lock`")
    return Lock(repo_id, commit, files)


def load(
    path_or_repo_id: str | os.PathLike,
    *,
    lock: str | os.PathLike | None = None,
    auto_class: str = "AutoModel",
    isolated: bool = False,
    **kwargs: Any,
) -> Any:
    """`auto_class.from_pretrained`, which with a lock runs only the reviewed code, or runs it in a confined process.

    With a lock, a Hub repo is fetched at the lock's commit. The code files are read once, compared with the lock, and
    written to a private folder from which the model is loaded, so that later changes of the repo, the cache or the
    folder have no effect. Weights are linked, not copied. `trust_remote_code=True` is implied. MyGPT2 and MyBert are
    registered by this package, so their classes in this package are used.

    With `isolated=True` the model's code lives in a process that the kernel confines, see `sandbox`: it reads the folder
    and writes nowhere else. The result is an `IsolatedModel`, for inference. `trust_remote_code` is not needed. A lock
    is checked first.

    Args:
        path_or_repo_id: a folder or `user/name`.
        lock: a file written by `write_lock`; None loads as transformers does.
        auto_class: name of the class in transformers, such as `"AutoModelForCausalLM"` or `"AutoTokenizer"`.
        isolated: run the model's code in a confined process.
        kwargs: passed to `from_pretrained`. With a lock, `revision` and `code_revision` must equal its commit. With
            `isolated`, also `memory_limit` in bytes, `time_limit` in seconds for loading and each call, and `cuda=True`
            to pass GPUs through.

    Raises:
        LockError: a code file differs from the lock, is not in it, or is missing; nothing was executed.
        HubError: the repo could not be fetched.
        NotIsolated: `isolated`, and this machine cannot confine a process.
        IsolatedError: `isolated`, and the model does not load.

    Examples:
        >>> model = load("me/my-model", lock="mymodels.lock", auto_class="AutoModelForCausalLM")
        >>> model = load("someone/strange-model", isolated=True)
    """
    loader = getattr(transformers, auto_class, None) if re.fullmatch(r"Auto\w+", auto_class) else None
    if not hasattr(loader, "from_pretrained"):
        raise ValueError(f"{auto_class} is not an Auto class of transformers: name one, such as AutoModelForCausalLM")
    assert loader is not None
    if isolated and not auto_class.startswith("AutoModel"):
        raise ValueError(f"isolated=True loads models, and {auto_class} loads none: name a class such as AutoModel")
    if lock is None and isolated:
        return load_isolated(path_or_repo_id, auto_class, **kwargs)
    if lock is None:
        return loader.from_pretrained(path_or_repo_id, **kwargs)
    locked = read_lock(lock)
    folder = Path(path_or_repo_id).expanduser()
    is_local = folder.is_dir()
    _check_options(kwargs, locked, is_local)
    token = kwargs.pop("token", None)
    revision = locked.commit or kwargs.get("revision")
    kwargs = {name: value for name, value in kwargs.items() if name not in ("revision", "code_revision")}
    if not is_local:
        repo_id = str(path_or_repo_id)
        if locked.repo_id not in (None, repo_id):
            raise LockError(
                f"the lock {lock} is for {locked.repo_id}, not for {printable(repo_id)}: write a lock for it"
            )
        folder = Remote(repo_id, token=token).request(lambda: locate(repo_id, revision=revision, token=token))
    copy = _checked_copy(folder, locked, Path(lock))
    if isolated:
        model = load_isolated(copy, auto_class, **kwargs)
        model.config.name_or_path = str(path_or_repo_id)
        return model
    loaded = loader.from_pretrained(copy, **{"trust_remote_code": True, **kwargs})
    result = loaded[0] if isinstance(loaded, tuple) else loaded  # output_loading_info, return_unused_kwargs
    for owner in (result, getattr(result, "config", None)):
        if hasattr(owner, "name_or_path"):
            owner.name_or_path = str(path_or_repo_id)  # type: ignore[union-attr]
    return loaded


def _check_options(kwargs: dict[str, Any], locked: Lock, is_local: bool) -> None:
    for name in ("revision", "code_revision"):
        asked = kwargs.get(name)
        if asked is not None and locked.commit is not None and asked != locked.commit:
            raise LockError(f"{name}={asked!r} is not the commit of the lock, {locked.commit}: leave it out")
    if isinstance(kwargs.get("config"), (str, os.PathLike)):
        raise LockError("config= is a path or repo, which the lock does not cover: pass a config object or none")
    for name in () if is_local else ("cache_dir", "force_download", "local_files_only", "proxies"):
        if name in kwargs:
            raise ValueError(
                f"{name} has no effect with a lock: set huggingface_hub's environment variables (HF_HUB_CACHE, …)"
            )


def _checked_copy(folder: Path, locked: Lock, lock: Path) -> Path:
    """A private folder with copies of the code of `folder`, checked against the lock, and links to its other files."""
    files = _walk(folder)
    code = _read_code(folder, files)
    found = _hashes(code)
    for name in sorted(set(found) | set(locked.files)):
        if name not in locked.files:
            problem = "was not reviewed"
        elif name not in found:
            problem = "was reviewed and is missing"
        elif found[name] != locked.files[name]:
            (size, digest), (locked_size, locked_digest) = found[name], locked.files[name]
            problem = (
                f"differs from the reviewed file: {size:,} bytes with SHA-256 {digest[:16]}…, in the lock "
                f"{locked_size:,} bytes with {locked_digest[:16]}…"
            )
        else:
            continue
        raise LockError(
            f"{folder / printable(name)} {problem}; nothing was loaded: use the version in {lock}, or review this one and "
            "write a new lock"
        )
    holder = tempfile.TemporaryDirectory(prefix="mymodels-locked-", ignore_cleanup_errors=True)
    _COPIES.append(holder)
    # transformers names modules after the folder, so folders with different code need different names
    copy = Path(holder.name) / f"locked_{hashlib.sha256(repr(sorted(found.items())).encode()).hexdigest()[:24]}"
    for name in files:
        target = copy / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(code[name]) if name in code else target.symlink_to(inside(folder, name, folder).resolve())
    return copy


def _walk(folder: Path) -> list[str]:
    """The `/`-separated names of a folder's files, without caches and hidden folders."""
    files = []
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in sorted(folders) if name != "__pycache__" and not name.startswith(".")]
        files += [Path(parent, name).relative_to(folder).as_posix() for name in sorted(names)]
    return files


def _read_code(folder: Path, files: list[str] | None = None) -> dict[str, bytes]:
    """Name → content of the code files among `files` (default: all files of the folder), each read once.

    Raises:
        LockError: a config names code of another repo, or a file is not regular.
        CheckpointError: a link leads out of the folder.
    """
    code = {}
    for name in filter(_CODE.fullmatch, _walk(folder) if files is None else files):
        path = inside(folder, name, folder)
        if not path.is_file():
            raise LockError(f"{path} is not a regular file, so it cannot be read as code: remove it")
        code[name] = path.read_bytes()
        if not name.lower().endswith(".json"):
            continue
        other_repo = _other_repo(parse_json(code[name], path))
        if name.rsplit("/", 1)[-1] == "adapter_config.json":
            other_repo = "the repo of its base model"
        if other_repo:
            raise LockError(
                f"{path} loads code from {printable(other_repo)}, which a lock of this folder does not "
                "cover: copy that code into the folder"
            )
    return code


def _other_repo(config: dict[str, Any]) -> str:
    """The value in a config that names code of another repo; "" if there is none."""
    values: list[tuple[str, Any]] = [("", config)]
    while values:
        key, value = values.pop()
        if isinstance(value, dict):
            values += [(key if key == "auto_map" else name, item) for name, item in value.items()]
        elif isinstance(value, list):
            values += [(key, item) for item in value]
        elif isinstance(value, str) and ((key == "auto_map" and "--" in value) or (key in _ATTENTION and "/" in value)):
            return value
    return ""


def _hashes(code: dict[str, bytes]) -> dict[str, tuple[int, str]]:
    return {name: (len(content), hashlib.sha256(content).hexdigest()) for name, content in code.items()}
