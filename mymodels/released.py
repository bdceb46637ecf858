"""Whether the code that a folder names is a released version of our own, byte for byte.

Such folders, and those without code, are loaded with the installed classes. In any other folder, the folder's custom code
determines what the weights mean: it is run if it is trusted, and no other code is used in its place.
"""

import hashlib
import os
import re
from collections.abc import Callable, Iterable, Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any

from .messages import first_line
from .models.configuration_mybert import MyBertConfig
from .models.configuration_mygpt2 import MyGPT2Config

CONFIGS = {config.model_type: config for config in (MyGPT2Config, MyBertConfig)}
_MODELS = Path(__file__).with_name("models")
_TABLE = Path(__file__).with_name("released_code.txt")
# the patterns that transformers uses
_RELATIVE = re.compile(r"^\s*import\s+\.(\S+)\s*$|^\s*from\s+\.(\S+)\s+import", re.MULTILINE)
_DOWNLOAD = ("cache_dir", "force_download", "proxies", "token", "local_files_only", "repo_type")

# (name, repo=None) → the content of a file of the folder, or of another repo; None if it does not exist
Read = Callable[..., bytes | None]


class OwnCodeError(ValueError):
    """A folder has custom code, so the installed classes must not be used for it."""


def is_installed(cls: type) -> bool:
    """Whether a class is of this installation of mymodels, and not remote code."""
    return cls.__module__.startswith(f"{__package__}.models.")


def names_of_ours() -> set[str]:
    """The names of the classes that our own `auto_map`s name."""
    return {target.rpartition(".")[2] for config in CONFIGS.values() for target in config.AUTO_MAP.values()}


def digest(files: Mapping[str, bytes]) -> str:
    """SHA-256 over the names and contents of code files."""
    listed = (f"{name}\0{hashlib.sha256(content).hexdigest()}\n" for name, content in sorted(files.items()))
    return hashlib.sha256("".join(listed).encode()).hexdigest()


def reached(modules: Iterable[str], read: Callable[[str], bytes | None]) -> dict[str, bytes | None]:
    """The files of modules and of their relative imports, by name; None for a missing file."""
    found: dict[str, bytes | None] = {}
    queue = list(modules)
    while queue:
        name = f"{queue.pop()}.py"
        if name not in found:
            found[name] = content = read(name) if re.fullmatch(r"\w+\.py", name) else None
            text = (content or b"").decode("utf-8", errors="replace")
            queue += [first or second for first, second in _RELATIVE.findall(text)]
    return found


def _installed_file(name: str) -> bytes | None:
    path = _MODELS / name
    return path.read_bytes() if path.is_file() else None


@cache
def released() -> frozenset[str]:
    """Digests of our code files: of earlier releases, and of this installation."""
    own = set(_TABLE.read_text(encoding="ascii").split())
    for config in CONFIGS.values():
        for modules in ({_module(config.AUTO_MAP["AutoConfig"])}, set(map(_module, config.AUTO_MAP.values()))):
            own.add(digest({name: content or b"" for name, content in reached(modules, _installed_file).items()}))
    return frozenset(own)


def _module(target: str) -> str:
    return target.rpartition(".")[0]


def own_code(config: Mapping[str, Any], read: Read, *, config_only: bool = False) -> str:
    """A phrase for custom code that a config names; empty if it names none, or only our own.

    Args:
        config: the content of a `config.json`.
        read: returns the content of a file of the folder.
        config_only: only check the code of the config class.
    """
    auto_map = config.get("auto_map")
    named = {str(auto): target for auto, target in auto_map.items()} if isinstance(auto_map, dict) else {}
    kinds = ("AutoConfig",) if config_only else ("AutoConfig", "AutoModel")
    named = {auto: target for auto, target in named.items() if auto.startswith(kinds)}
    family = CONFIGS.get(str(config.get("model_type")))
    modules: dict[str | None, set[str]] = {}
    for auto, target in named.items():
        prefix, _, reference = target.rpartition("--") if isinstance(target, str) else ("", "", "")
        if family is None or family.AUTO_MAP.get(auto) != reference:
            return f"auto_map names {target} for {auto}"
        modules.setdefault(prefix or None, set()).add(_module(reference))
    for repo, names in modules.items():
        try:
            read_there = partial(read, repo=repo)
            files = reached([name for name in names if read_there(f"{name}.py") is not None], read_there)
        except OSError as error:
            return f"its code cannot be read: {first_line(error)}"
        there = {name: content for name, content in files.items() if content is not None}
        if there and len(there) < len(files):
            return f"{min(files.keys() - there.keys())} is missing"
        if there and digest(there) not in released():
            return f"{', '.join(sorted(there))}: not in any release"
    return ""


def check_code(
    config: Mapping[str, Any],
    where: str | os.PathLike,
    hub: Mapping[str, Any] | None = None,
    *,
    config_only: bool = False,
    saved: bool = False,
) -> None:
    """Refuse a folder that the installed classes must not be used for.

    Args:
        config: its `config.json`.
        where: a folder, or the id of a Hub repo.
        hub: for a Hub repo, arguments of `from_pretrained` such as `revision`.
        config_only: only check the code of the config class.
        saved: also refuse a model of another class that was saved without its code.

    Raises:
        OwnCodeError: the folder has custom code, or lacks the code of its class.
    """
    if reason := own_code(config, reader(where, hub), config_only=config_only):
        raise OwnCodeError(
            f"{where} has code of its own ({reason}), and mymodels' classes cannot replace it: read it, then load it "
            "by an Auto class with trust_remote_code=True"
        )
    architectures = config.get("architectures")
    family = CONFIGS.get(str(config.get("model_type")))
    if saved and family is not None and isinstance(architectures, list) and architectures:
        ours = {target.rpartition(".")[2] for target in family.AUTO_MAP.values()}
        if not ours & set(map(str, architectures)):
            raise OwnCodeError(
                f"{where} was saved from the class {architectures[0]}, whose code is not in the folder: load it by "
                f"{architectures[0]}.from_pretrained, or save it with its code by mymodels.build_repo"
            )


def reader(where: str | os.PathLike, hub: Mapping[str, Any] | None = None) -> Read:
    """A function that reads code files of a folder, or of a Hub repo at the revision in `from_pretrained`'s arguments."""
    from transformers.utils import cached_file

    hub = hub or {}

    def read(name: str, repo: str | None = None) -> bytes | None:
        if repo is None and os.path.isdir(where):
            path = Path(where, name)
            return path.read_bytes() if path.is_file() else None
        same = repo in (None, str(where))
        revision = hub.get("code_revision") or (hub.get("revision") if same else None)
        how = {key: hub[key] for key in _DOWNLOAD if hub.get(key) is not None}
        how["_raise_exceptions_for_missing_entries"] = False
        found = cached_file(repo or str(where), name, revision=revision, **how)
        return None if found is None else Path(found).read_bytes()

    return read
