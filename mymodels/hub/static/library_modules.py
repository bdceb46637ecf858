"""Resolve modules reached through libraries: `torch.os` is `os`."""

import sys
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType


def words(text: str) -> frozenset[str]:
    """The words of a text."""
    return frozenset(text.split())


# modules with access to the machine or to other code; an attribute of a library with such a name is this module
SENSITIVE_MODULES = words(
    "os posix nt sys builtins subprocess socket ssl shutil importlib ctypes pickle _pickle marshal pty "
    "signal runpy code codeop imp inspect gc multiprocessing threading asyncio tempfile pathlib io glob "
    "urllib http ftplib smtplib webbrowser telnetlib xmlrpc socketserver platform zipimport pkgutil "
    "shelve dbm sqlite3 atexit concurrent cffi requests httpx aiohttp urllib3 huggingface_hub joblib dill "
    "cloudpickle"
)


@lru_cache(maxsize=65536)
def canonical(dotted: str) -> str:
    """A full name with modules reached through libraries replaced by their own names: `torch.os.x` → `os.x`."""
    parts = dotted.split(".")
    if parts[0] == "":
        return dotted
    for i in range(1, min(len(parts), 12)):
        home = _foreign(".".join(parts[:i]), parts[i])
        if home is not None:
            return canonical(".".join([home, *parts[i + 1 :]]))
    return dotted


@lru_cache(maxsize=65536)
def _foreign(module: str, attribute: str) -> str | None:
    """The full name of what a library's module has imported under this name, or None."""
    if module == "os" and attribute == "path":
        return None
    live, top = sys.modules.get(module), module.partition(".")[0]
    value = vars(live).get(attribute) if isinstance(live, ModuleType) else None
    if isinstance(value, ModuleType):
        name = vars(value).get("__name__")
        if not isinstance(name, str) or name in ("posixpath", "ntpath"):
            return "os.path" if name in ("posixpath", "ntpath") else None
        return name if name.partition(".")[0] != top or name.rpartition(".")[2] != attribute else None
    if value is not None:
        home = getattr(value, "__module__", None)
        foreign = (
            top != "os" and isinstance(home, str) and home.partition(".")[0].lstrip("_") in SENSITIVE_MODULES - {top}
        )
        if not foreign or not isinstance(getattr(value, "__name__", None), str):
            return None
        return f"{'os' if home in ('posix', 'nt') else home}.{value.__name__}"
    name = attribute.lstrip("_") or attribute
    if name not in SENSITIVE_MODULES or not is_module(module):
        return None
    return None if is_module(f"{module}.{attribute}") else name


@lru_cache(maxsize=4096)
def is_module(dotted: str) -> bool:
    """Whether an installed library has this module, looked up among its files; every name without a dot counts."""
    top, *rest = dotted.split(".")
    if sys.modules.get(dotted) is not None:
        return True
    try:
        spec = find_spec(top)
    except (ImportError, ValueError):
        spec = None
    if spec is None or not rest:
        return not rest
    places = [Path(place) for place in spec.submodule_search_locations or ()]
    for part in rest[:-1]:
        places = [place / part for place in places if (place / part).is_dir()]
    return any((p / rest[-1]).is_dir() or any(p.glob(f"{rest[-1]}.*")) for p in places)
