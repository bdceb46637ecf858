"""Checks of what a user should know before trusting code: network, processes, files, dynamic code, hidden text.

Names are resolved through imports, aliases, `getattr`, and modules that libraries import themselves, and compared with
lists of what model code needs (`policy.py`). This is not proof: well-hidden code is not found. A finding is `failed` in
code that transformers loads if no model needs it. It is a `warning` in files that are never loaded, under
`if __name__ == "__main__"`, and for plain file access.
"""

import ast
import re
import unicodedata
from collections.abc import Iterator

from .policy import DYNAMIC, HUB
from .reading import AT_IMPORT, Reader, readers
from .repo_snapshot import Finding, Folder, brief
from .used_names import is_super, used_names

_FILES = re.compile(
    r"(os\.(remove|unlink|rename|renames|replace|makedirs|mkdir|rmdir|removedirs|chmod|chown|symlink|link|truncate|open|"
    r"mkfifo|utime)|shutil\.(?!disk_usage$|which$|get_\w+$)\w+|tempfile\.\w+|numpy\.(save\w*|memmap)|torch\.save|sqlite3\.\w+|"
    r"zipfile\.ZipFile|tarfile\.open|safetensors(\.torch)?\.save_file|logging\.(handlers\.\w*|)FileHandler|io\.FileIO|"
    r"torch\.utils\.tensorboard(\.\w+)*)$"
)
_OPENERS = ("builtins.open", "io.open", "codecs.open")
_FILE_METHODS = {"write_text", "write_bytes", "unlink", "rmdir", "touch", "symlink_to", "hardlink_to", "extractall"}
_PROCESS_METHODS = {
    "system",
    "popen",
    "Popen",
    "check_output",
    "check_call",
    "execv",
    "execve",
    "spawnl",
    "posix_spawn",
}
_NETWORK_METHODS = {"urlopen", "urlretrieve"}
_SENDING_METHODS = {
    "push_to_hub",
    "upload_file",
    "upload_folder",
    "upload_large_folder",
    "create_repo",
    "create_commit",
}
_HUB_METHODS = {"hf_hub_download", "snapshot_download"}
_DECODERS = re.compile(
    r"(base64\.\w*decode\w*|binascii\.(unhexlify|a2b_\w+)|zlib\.decompress\w*|codecs\.decode|lzma\.\w+|"
    r"builtins\.(bytes|bytearray)\.fromhex)$"
)
_SECRET_NAMES = re.compile(
    r"HF_TOKEN|HUGGING_?FACE\w*TOKEN|HUGGINGFACEHUB|OPENAI_API|ANTHROPIC_API|AWS_(SECRET|ACCESS|SESSION)|GITHUB_TOKEN|"
    r"WANDB_API|GOOGLE_APPLICATION_CREDENTIALS|\.ssh(/|$)|\.(aws|gnupg|kube)(/|$)|\.netrc|id_rsa|id_ed25519|/etc/(passwd|shadow)|"
    r"\.git-credentials|\.kube/config|\.docker/config|huggingface/token|/proc/self|\.bash_history"
)
_ENCODED = re.compile(r"[A-Za-z0-9+/=_-]{400,}|(?:\\x[0-9a-fA-F]{2}){60,}|[0-9a-fA-F]{400,}")
_OF_HUB = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?$")


def network(folder: Folder) -> Iterator[Finding]:
    """Code that talks to other machines."""
    yield from used_names(folder, "network")
    for reader in readers(folder):
        for call, names, inside in reader.calls:
            if not isinstance(call, ast.Call):
                continue
            method = call.func.attr if isinstance(call.func, ast.Attribute) else ""
            asks = next((name for name in sorted(names) if HUB.match(name)), "")
            asks = asks or (method if method in _HUB_METHODS and not names else "")
            loads = method == "from_pretrained" or asks
            repo = _literal_repo(reader, call) if loads else ""
            when, at = reader.moment(inside), reader.file.at(call)
            if repo:
                by = asks or ast.unparse(call.func)[:60]
                what = f"{reader.file.name} fetches files of {brief(repo)}, another repo, by {by}, {when}"
                yield Finding(reader.status(inside), what, at, "put what it needs into this folder")
            elif asks:
                what = f"{reader.file.name} talks to the Hub, by {asks}, {when}"
                yield Finding("warning", what, at, "read what it downloads or sends")
            elif method in _SENDING_METHODS and _sends(reader, call, inside):
                what = f"{reader.file.name} sends to the Hub, by {method}, {when}"
                yield Finding(reader.status(inside), what, at, "leave it to the caller what is uploaded, and where")
            elif method in _NETWORK_METHODS and not names:
                what = f"{reader.file.name} reaches the network, by {method}, {when}"
                yield Finding(
                    reader.status(inside), what, at, "do not load it unless you know what it fetches or sends"
                )


def _sends(reader: Reader, call: ast.Call, inside: str) -> bool:
    """Whether a call uploads, and is not a method of that name that passes on its caller's request."""
    assert isinstance(call.func, ast.Attribute)
    own = {node.name for node, _ in reader.nodes if isinstance(node, ast.FunctionDef)}
    return inside != call.func.attr and not is_super(call.func.value) and call.func.attr not in own


def _literal_repo(reader: Reader, call: ast.Call) -> str:
    """The repo that a call names as a literal, or ""; local paths are not repos."""
    named = {keyword.arg: keyword.value for keyword in call.keywords}
    keys = ("pretrained_model_name_or_path", "path_or_repo_id", "repo_id", "model", "path_or_repo")
    given = next((named[key] for key in keys if key in named), call.args[0] if call.args else None)
    if isinstance(call.func, (ast.Name, ast.Attribute)) and ast.unparse(call.func).endswith("pipeline"):
        given = named.get("model", call.args[1] if len(call.args) > 1 else None)
    text = reader.meanings.text(given)
    return text if text and _OF_HUB.match(text) and "." not in text[:1] else ""


def processes(folder: Folder) -> Iterator[Finding]:
    """Code that starts programs."""
    yield from used_names(folder, "processes")
    for reader in readers(folder):
        own = {node.name for node, _ in reader.nodes if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
        for call, names, inside in reader.calls:
            method = call.func.attr if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) else ""
            if method in _PROCESS_METHODS - own and not names:
                what = f"{reader.file.name} starts programs, by {method} of something, {reader.moment(inside)}"
                yield Finding(reader.status(inside), what, reader.file.at(call), "do not load it")


def file_access(folder: Folder) -> Iterator[Finding]:
    """Code that writes, moves or removes files; methods that save are expected to."""
    for reader in readers(folder):
        for call, names, inside in reader.calls:
            if not isinstance(call, ast.Call):
                continue
            name = min(names, default="")
            attribute = call.func.attr if isinstance(call.func, ast.Attribute) else ""
            mode = next(
                (k.value for k in call.keywords if k.arg == "mode"), call.args[1] if len(call.args) > 1 else None
            )
            opens = name in _OPENERS or (attribute == "open" and not name.startswith("PIL."))
            if attribute == "open" and name not in _OPENERS:
                mode = next((k.value for k in call.keywords if k.arg == "mode"), call.args[0] if call.args else None)
            writes = opens and mode is not None and re.search(r"[wax+]", reader.meanings.text(mode) or "")
            if not (writes or _FILES.match(name) or attribute in _FILE_METHODS or attribute == "tofile"):
                continue
            used = reader.runs_at_import(inside) or inside in ("forward", "_init_weights", "generate")
            status = reader.status(inside) if used else "warning"
            what = f"{reader.file.name} writes or removes files, by {name.removeprefix('builtins.') or attribute}, {reader.moment(inside)}"
            yield Finding(status, what, reader.file.at(call), "read what it writes, and where")


def secrets_access(folder: Folder) -> Iterator[Finding]:
    """Code that reads tokens, keys, or all of the environment."""
    yield from used_names(folder, "secrets access")
    for reader in readers(folder):
        for node, inside in reader.nodes:
            if not isinstance(node, (ast.Constant, ast.BinOp, ast.JoinedStr, ast.Call)) or id(node) in reader.docs:
                continue
            text = reader.meanings.text(node)
            if text is not None and len(text) < 200 and (found := _SECRET_NAMES.search(text)):
                what = f"{reader.file.name} mentions {found[0]}, where tokens and keys are kept"
                yield Finding(reader.status(inside), what, reader.file.at(node), "do not load it")
        for node, names, inside in reader.uses:
            if _takes_the_environment(reader, node, names):
                what = f"{reader.file.name} reads the whole environment, {reader.moment(inside)}"
                yield Finding(reader.status(inside), what, reader.file.at(node), "do not load it")


def _takes_the_environment(reader: Reader, node: ast.AST, names: frozenset[str]) -> bool:
    if names & {"os.environ.copy", "os.environ.items", "os.environ.values"}:
        return True
    parent = reader.parent(node)
    if (
        "os.environ" not in names
        or isinstance(node, ast.ImportFrom)
        or isinstance(parent, (ast.Attribute, ast.Compare))
    ):
        return False
    return not (isinstance(parent, ast.Subscript) and parent.value is node) and isinstance(
        getattr(node, "ctx", ast.Load()), ast.Load
    )


def obfuscation(folder: Folder) -> Iterator[Finding]:
    """Code written to hide what it does."""
    for reader in readers(folder):
        file, status = reader.file, reader.status(AT_IMPORT)
        runs = any(DYNAMIC.match(name) for _, names, _ in reader.uses for name in names)
        for call, names, _ in reader.calls:
            name = next((name for name in sorted(names) if _DECODERS.match(name)), "").removeprefix("builtins.")
            if name:
                what = f"{file.name} decodes hidden data, by {name}" + (
                    ", and runs code made at run time" if runs else ""
                )
                yield Finding(status if runs else "warning", what, file.at(call), "decode it and read it first")
        for number, line in enumerate(file.text.split("\n"), 1):
            where = f"{file.name}:{number}"
            if found := _ENCODED.search(line):
                what = f"{file.name} has {len(found[0])} characters of encoded data in one line"
                yield Finding(status if runs else "warning", what, where, "decode it and read it first")
            if re.search(r"\S[^\S\n]{80,}[^\s#]", line):
                yield Finding(status, f"{file.name} has code far right of the window, behind spaces", where, "read it")
            if any(0x202A <= ord(c) <= 0x202E or 0x2066 <= ord(c) <= 0x2069 for c in line):
                what = f"{file.name} reverses the direction of its text, so that it is displayed differently from what runs"
                yield Finding(status, what, where, "do not load it")
        for node, _ in reader.nodes:
            word = getattr(node, "id", None) or getattr(node, "attr", None) or getattr(node, "name", None)
            if isinstance(word, str) and not word.isascii():
                scripts = {unicodedata.name(c, "?").split()[0] for c in word if c.isalpha()}
                if len(scripts) > 1 and scripts & {"CYRILLIC", "GREEK", "ARMENIAN", "CHEROKEE"} and "LATIN" in scripts:
                    what = f"{file.name} mixes alphabets in the name {brief(word)}"
                    yield Finding(status, what, file.at(node), "read it letter by letter")


CHECKS = {
    "network": network,
    "processes": processes,
    "file access": file_access,
    "secrets access": secrets_access,
    "obfuscation": obfuscation,
}
