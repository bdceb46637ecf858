"""Checks of the files: names, links, archives, pickles, stray files, sizes, and integrity of the weights."""

import io
import os
import pickletools
import re
import tarfile
import unicodedata
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ...checkpoints import CheckpointError, check_checkpoint
from ...checkpoints.integrity import MANIFEST, is_weight_file
from ...checkpoints.kinds import is_zip, kind_of
from ...checkpoints.opening import weight_files
from .repo_snapshot import MAX_FILES, Finding, Folder, brief, strings

HUB_FILE_LIMIT = 50 * 10**9  # the largest file that the Hub accepts
TEXT_LIMIT = 10_000_000  # larger texts have to go through git-lfs
MAX_PICKLE_BYTES = 50_000_000

_DIRECTION = set("\u200b\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2060\u2066\u2067\u2068\u2069\ufeff")


def file_names(folder: Folder) -> Iterator[Finding]:
    """Names that a terminal, another system or a person would misread."""
    lower: dict[str, str] = {}
    for name in [*folder.files, *folder.odd, *folder.folders]:
        bad = [c for c in name if unicodedata.category(c) in ("Cc", "Cs", "Co", "Zl", "Zp") or c in _DIRECTION]
        if bad:
            what = f"the name {name!a} contains the invisible character U+{ord(bad[0]):04X}"
            yield Finding("failed", what, ascii(name), "rename it; do not use a folder with hidden names")
        elif "\\" in name or ":" in name or any(part.endswith((" ", ".")) for part in name.split("/")):
            what = f"the name {brief(name)} is another file, or none, on Windows"
            yield Finding("warning", what, name, "use letters, digits, dots, dashes and underscores")
        other = lower.setdefault(name.lower(), name)
        if other != name:
            what = f"{name} and {other} are the same file on macOS and Windows"
            yield Finding("failed", what, name, "rename one of them")


def links(folder: Folder) -> Iterator[Finding]:
    """Links and special files, whose content is outside the folder."""
    for name, path in folder.odd.items():
        try:
            if not path.is_symlink():
                what = f"{name} is neither a file nor a folder but a pipe, socket or device"
                yield Finding("failed", what, name, "remove it")
                continue
            target, end = os.readlink(path), Path(os.path.realpath(path))
        except OSError as error:
            yield Finding("failed", f"{name} cannot be read: {error.strerror}", name, "remove it")
            continue
        inside = end.is_relative_to(os.path.realpath(folder.path)) and end.exists()
        kind = "within the folder, so its content would be there twice" if inside else "out of the folder, or nowhere"
        yield Finding("failed", f"{name} is a link to {brief(target)}: {kind}", name, "put the file itself there")


# keys whose value a loader opens as a file
_OPENED = re.compile(r"(_file|_files|_path|_dir|filename|transformers_weights|chat_template_file)(\[|\.|$)")
_PATH = re.compile(r"^(/|~|[A-Za-z]:[\\/]|\\\\|file:)|(^|[\\/])\.\.([\\/]|$)")
# parts of a config that hold tokens or templates, which may look like paths
_TEXTS = re.compile(r"(^|\.)(\w*_tokens?|added_tokens_decoder|chat_template|\w*special_tokens\w*|id2label|label2id)\b")


def paths(folder: Folder) -> Iterator[Finding]:
    """Paths in configs that lead out of the folder. (`weights` checks the paths in indexes.)"""
    for name, value in folder.values.items():
        for key, text in strings(value):
            if (
                key.startswith("auto_map")
                or not _PATH.search(text)
                or _TEXTS.search(key)
                or len(text) > 1000
                or "\n" in text
            ):
                continue
            where = f"{name}: {key[:80]}"
            if _OPENED.search(key) and not key.startswith(("_name_or_path", "name_or_path")):
                what = f"{name} has a loader open {brief(text)}, outside the folder"
                yield Finding("failed", what, where, "name a file of the folder, without any path")
            else:
                what = f"{name} mentions {brief(text)}, a path on the machine that saved it"
                yield Finding("warning", what, where, "remove the key")


_ARCHIVE = re.compile(r"\.(zip|tar|tgz|tbz2?|txz|gz|bz2|xz|7z|rar|whl|egg|jar|nemo|mar)$", re.IGNORECASE)
_TAR = re.compile(r"\.(tar|tgz|tbz2?|txz|nemo)(\.\w+)?$", re.IGNORECASE)
MAX_RATIO = 200
MAX_MEMBERS = 100_000


def archives(folder: Folder) -> Iterator[Finding]:
    """Archives: members that unpack outside the folder, links, zip bombs, and archives in general, as they hide content."""
    for name, path in folder.files.items():
        zipped = is_zip(path)
        if not zipped and not _ARCHIVE.search(name):
            continue
        try:
            members = list(_zip_members(path) if zipped else _tar_members(path) if _TAR.search(name) else ())
        except Exception as error:  # zipfile, tarfile and the decompressors raise errors of many types
            what = f"{name} cannot be read as the archive that it claims to be ({type(error).__name__})"
            yield Finding("warning" if is_weight_file(name) else "failed", what, name, "remove it, or make it again")
            continue
        bad = next((m for m in members if m[0].startswith(("/", "\\")) or ".." in re.split(r"[\\/]", m[0])), None)
        packed = path.stat().st_size
        if bad:
            what = f"{name} has a member {brief(bad[0])} that unpacks outside its folder"
            yield Finding("failed", what, name, "do not unpack it")
        elif link := next((m for m in members if m[2]), None):
            what = f"{name} has a member {brief(link[0])} that is a link or a device"
            yield Finding("failed", what, name, "do not unpack it")
        elif len(members) >= MAX_MEMBERS or sum(m[1] for m in members) > MAX_RATIO * packed + 10**7:
            total = sum(m[1] for m in members)
            what = f"{name} has {packed:,} bytes and would unpack to {total:,} in {len(members):,} files"
            yield Finding("failed", what, name, "do not unpack it")
        elif _ARCHIVE.search(name):
            yield Finding("warning", f"{name} is an archive, whose content was not checked", name, "unpack it")


def _zip_members(path: Path) -> Iterator[tuple[str, int, bool]]:
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist()[:MAX_MEMBERS]:
            yield member.filename, member.file_size, (member.external_attr >> 16) & 0o170000 == 0o120000


def _tar_members(path: Path) -> Iterator[tuple[str, int, bool]]:
    with tarfile.open(path) as archive:
        for i, member in enumerate(archive):
            if i >= 1000:
                break
            yield member.name, member.size, not (member.isfile() or member.isdir())


_PICKLE_NAME = re.compile(r"\.(pkl|pickle|joblib|dill|bin|pt|pth|ckpt)$", re.IGNORECASE)
_HARMLESS = re.compile(
    r"collections OrderedDict|torch(\.storage)? \w*(Storage|Size|device)|torch\._utils _rebuild_\w+|torch \w+(8|16|32|64)|"
    r"numpy(\.\w+)* (_reconstruct|ndarray|dtype|scalar)|argparse Namespace|pathlib(\._local)? (Pure)?(Posix|Windows)?Path|_codecs encode|"
    r"__torch__\S* \w+|torch\._tensor _rebuild_from_type_v2|torch\.serialization _get_layout|(builtins|__builtin__) (set|frozenset|bytearray|complex|int|float|slice|range)"
)


def pickles(folder: Folder) -> Iterator[Finding]:
    """Files that run code when unpickled; their imports are read from the pickle instructions, nothing is unpickled."""
    for name, path in folder.files.items():
        for data in _pickle_bytes(name, path):
            asked, broken = pickle_globals(data)
            strange = sorted(entry for entry in asked if not _HARMLESS.fullmatch(entry))
            if strange:
                what = f"{name} is a pickle that calls {brief(strange[0].replace(' ', '.'))} when it is loaded"
                yield Finding("failed", what, name, "do not load it; ask for safetensors")
            elif broken and data.startswith(b"\x80"):
                what = f"{name} begins like a pickle, but cannot be read completely, so what it calls is unknown"
                yield Finding("failed", what, name, "do not load it; ask for safetensors")
            elif asked or not broken:
                what = f"{name} is a pickle, a format that can run code; this one asks for tensors and plain data only"
                yield Finding("warning", what, name, "convert it: mymodels convert FOLDER NEW_FOLDER")


def _pickle_bytes(name: str, path: Path) -> Iterator[bytes]:
    """The pickles in a file: its entire content, or the `.pkl` members of torch's zip files."""
    if is_zip(path):
        try:
            with zipfile.ZipFile(path) as archive:
                for member in archive.namelist()[:MAX_MEMBERS]:
                    if member.endswith((".pkl", ".pickle")):
                        with archive.open(member) as file:
                            yield file.read(MAX_PICKLE_BYTES)
                    elif member.endswith(".npy"):
                        with archive.open(member) as file:
                            yield from array_pickle(file.read(MAX_PICKLE_BYTES))
        except Exception:  # zipfile raises errors of many types; `weights` and `archives` report them
            return
    else:
        with path.open("rb") as file:
            data = file.read(2)
            if name.endswith(".safetensors") and kind_of(path) == "safetensors":
                return  # the length of a safetensors header can look like the start of a pickle
            if data == ARRAY_MAGIC[:2]:
                yield from array_pickle(data + file.read(MAX_PICKLE_BYTES))
            elif data in (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05") or _PICKLE_NAME.search(name):
                yield data + file.read(MAX_PICKLE_BYTES)


ARRAY_MAGIC = b"\x93NUMPY"


def array_pickle(data: bytes) -> Iterator[bytes]:
    """The pickle behind the header of a NumPy file that holds an array of objects."""
    if not data.startswith(ARRAY_MAGIC) or len(data) < 12:
        return
    long = data[6] > 1  # from format version 2, the length of the header has four bytes instead of two
    start = 12 if long else 10
    end = start + int.from_bytes(data[8:start], "little")
    if re.search(rb"descr'\s*:\s*'?\|?O|'\|?O\d*'", data[start:end]):
        yield data[end:]


_PUTS, _GETS = ("MEMOIZE", "BINPUT", "LONG_BINPUT", "PUT"), ("BINGET", "LONG_BINGET", "GET")


def pickle_globals(data: bytes) -> tuple[set[str], bool]:
    """The `module name` of everything that a stream of pickles imports, and whether the first pickle is unreadable."""
    asked: set[str] = set()
    stream = io.BytesIO(data)
    for number in range(5):  # torch's old format: five pickles, then raw data
        pushed: list[str] = []  # the texts on top of the stack that were pushed consecutively
        memo: dict[Any, str] = {}
        try:
            for opcode, argument, _ in pickletools.genops(stream):
                if opcode.name in _PUTS:
                    memo[len(memo) if argument is None else argument] = pushed[-1] if pushed else ""
                elif opcode.name in _GETS:
                    pushed.append(memo.get(argument, ""))
                elif opcode.name.endswith(("UNICODE", "STRING", "UNICODE8")) and isinstance(argument, str):
                    pushed.append(argument)
                elif opcode.name not in ("PROTO", "FRAME"):
                    if opcode.name in ("GLOBAL", "INST"):
                        asked.add(str(argument))
                    elif opcode.name == "STACK_GLOBAL":
                        plain = len(pushed) > 1 and all(pushed[-2:])
                        asked.add(" ".join(pushed[-2:]) if plain else "something hidden")
                    elif opcode.name.startswith("EXT"):
                        asked.add("something registered")
                    pushed.clear()
        except Exception:  # pickletools raises errors of many types
            return asked, number == 0
    return asked, False


# name of a file or folder → what it is, and whether it may stay
_STRAY: list[tuple[str, str, str]] = [
    (r"(^|/)\.git$", "failed", "a git repository: its configuration may hold a token, its history what was removed"),
    (r"(^|/)__pycache__$|\.py[co]$", "failed", "compiled Python code, which cannot be reviewed"),
    (r"(^|/)\.ipynb_checkpoints$", "failed", "older copies of files, kept by Jupyter"),
    (r"(^|/)(\.DS_Store|Thumbs\.db|desktop\.ini|__MACOSX|\._[^/]+)$", "failed", "left by a file browser"),
    (
        r"(^|/)(\.idea|\.vscode|\.pytest_cache|\.mypy_cache|\.ruff_cache|\.venv|venv|node_modules)$",
        "failed",
        "a tool's",
    ),
    (
        r"\.(swp|swo|tmp|temp|bak|orig|rej|part|incomplete|lock)$|~$|(^|/)#[^/]*#$",
        "failed",
        "left by an unfinished write",
    ),
    (r"(^|/)(core|nohup\.out|[^/]*\.log)$", "failed", "output of a program"),
    (
        r"(^|/)(\.env(\.\w+)?|\.netrc|_netrc|\.git-credentials|id_(rsa|dsa|ecdsa|ed25519)|\.htpasswd)$",
        "failed",
        "secrets",
    ),
    (r"\.(so|dll|dylib|exe|msi|bat|cmd|com|scr|ps1)$", "failed", "a program in machine code, which cannot be reviewed"),
    (r"(^|/)\.cache$", "warning", "a cache, as huggingface_hub keeps one beside its downloads"),
    (
        r"(^|/)(optimizer|scheduler|scaler|rng_state\w*)\.(pt|bin|pth)$|(^|/)(trainer_state\.json|training_args\.bin)$|"
        r"(^|/)(checkpoint-\d+|wandb|runs|events\.out\.tfevents[^/]*)$",
        "warning",
        "a training run's",
    ),
]


def stray_files(folder: Folder) -> Iterator[Finding]:
    """Files that do not belong in a Hub repo; of a stray folder, only the folder is reported."""
    reported: list[str] = []
    for name in [*sorted(folder.folders), *folder.files]:
        if any(name.startswith(f"{parent}/") for parent in reported):
            continue
        for pattern, status, what in _STRAY:
            if re.search(pattern, name, re.IGNORECASE):
                reported.append(name)
                yield Finding(status, f"{name} does not belong into a Hub repo: {what}", name, "remove it")
                break


def file_sizes(folder: Folder) -> Iterator[Finding]:
    """Sizes above the limits of the Hub and of git, and implausible sizes."""
    if folder.crowded:
        what = f"the folder has more than {MAX_FILES:,} files; the rest was not checked"
        yield Finding("failed", what, "", "verify the folder of one model")
    for name, path in folder.files.items():
        size = path.stat().st_size
        if size > HUB_FILE_LIMIT:
            what = f"{name} has {size / 1e9:.1f} GB, more than the Hub takes as one file"
            yield Finding("failed", what, name, 'save in shards: max_shard_size="5GB"')
        elif size > TEXT_LIMIT and re.search(r"\.(py|md|txt|jinja)$|(^|/)config\.json$", name):
            what = f"{name} has {size / 1e6:.1f} MB, too large for a file of its kind"
            yield Finding("failed", what, name, "check its content")
        elif size == 0 and re.search(r"\.(json|safetensors|bin|model)$", name):
            yield Finding("failed", f"{name} is empty", name, "copy or download it again")


def _problems(folder: Folder) -> list[tuple[str, str]]:
    """The problems found by `check_checkpoint`, as (file, message); cached, because two checks need them."""
    if folder.problems is None:
        try:
            has_weights = weight_files(folder.path) or MANIFEST in folder.files
            found = check_checkpoint(folder.path, full=True) if has_weights else []
            folder.problems = [(problem.file, problem.message) for problem in found]
        except (CheckpointError, OSError) as error:
            folder.problems = [("", str(error))]
    return folder.problems


def _sentence(folder: Folder, message: str) -> tuple[str, str]:
    """A message of `check_checkpoint` without the folder's path, split into fault and remedy."""
    message = message.replace(f"{folder.path}{os.sep}", "").replace(str(folder.path), "the folder")
    for mark in ("; ", ": remove", ": copy"):
        what, found, remedy = message.rpartition(mark)
        if found and len(remedy) < 120:
            return what, found.strip("; :") + remedy if mark != "; " else remedy
    return message, "copy or download it again"


def weights(folder: Folder) -> Iterator[Finding]:
    """The weights match their index and headers; every byte is read."""
    if folder.odd:
        yield Finding("skipped", "not read, because there are links or special files in the folder")
        return
    if not weight_files(folder.path):
        yield Finding("warning", "there are no weights in the folder", "", "save them beside the config")
        return
    for file, message in _problems(folder):
        if MANIFEST not in message:
            what, remedy = _sentence(folder, message)
            yield Finding("failed", what, file if file in folder.files else what.split(": ")[0].split(" ")[0], remedy)
    if {"model.safetensors", "model.safetensors.index.json"} <= folder.files.keys():
        what = "model.safetensors and model.safetensors.index.json are two checkpoints; loaders take the first one"
        yield Finding("failed", what, "model.safetensors", "remove the one that is out of date")


def manifest(folder: Folder) -> Iterator[Finding]:
    """The files match the manifest: sizes, SHA-256, and no unlisted files."""
    if MANIFEST not in folder.files or folder.odd:
        if folder.odd:
            yield Finding("skipped", "not read, because of the links in the folder")
        else:
            yield Finding("n/a", "there is none")
        return
    for file, message in _problems(folder):
        if MANIFEST in message:
            what, remedy = _sentence(folder, message)
            yield Finding("failed", what, file, remedy)


CHECKS = {
    "file names": file_names,
    "links": links,
    "paths": paths,
    "archives": archives,
    "pickles": pickles,
    "stray files": stray_files,
    "file sizes": file_sizes,
    "weights": weights,
    "manifest": manifest,
}
