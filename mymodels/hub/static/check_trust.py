"""What a reader should see before trusting code: network, processes, files, code made at run time, hidden text.

Names are followed through imports, aliases, `getattr`, and the modules that libraries import for themselves; what is
then used is held against lists of what model code needs (`policy.py`). Reading is no proof: code that hides well enough
is not found. What is found in code that transformers loads is `failed` if no model needs it; in a file that nothing
loads, in `if __name__ == "__main__"`, and for plain file access, it is a `warning`.
"""

import ast
import re
import unicodedata
from collections.abc import Iterator

from .code_tree import constant
from .policy import DYNAMIC, FORBIDDEN_DUNDERS, HANDLED, HUB, INTERNAL_TEXT, PIECED, Verdict, judge_name
from .reading import AT_IMPORT, Reader, readers
from .repo_snapshot import Finding, Folder, brief

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
_LIBRARIES = ("torch", "transformers", "numpy", "os", "sys", "builtins")
_ENCODED = re.compile(r"[A-Za-z0-9+/=_-]{400,}|(?:\\x[0-9a-fA-F]{2}){60,}|[0-9a-fA-F]{400,}")
_OF_HUB = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?$")


def _lines(folder: Folder, check: str) -> Iterator[Finding]:
    """Each line that uses a name of which the policy says that it belongs to this check."""
    remedies = {
        "network": "do not load it unless you know what it fetches or sends",
        "processes": "do not load it",
        "dynamic code": "do not load it",
        "secrets access": "do not load it",
    }
    for reader in readers(folder):
        found: dict[int, tuple[str, str, Verdict, str]] = {}
        for node, names, inside in reader.uses:
            for name in names:
                verdict = judge_name(name)
                if verdict is None or verdict.check != check:
                    continue
                line = getattr(node, "lineno", 0)
                found[line] = max(found.get(line, ("", "", verdict, "")), (name, inside, verdict, reader.file.at(node)))
        for _, (name, inside, verdict, where) in sorted(found.items()):
            status = verdict.status if reader.status(inside) == "failed" else "warning"
            shown = name.removeprefix("builtins.")
            what = f"{reader.file.name} {verdict.does}, by {shown}, {reader.moment(inside)}"
            yield Finding(status, what, where, remedies[check])


def network(folder: Folder) -> Iterator[Finding]:
    """Code that talks to other machines."""
    yield from _lines(folder, "network")
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
    """Whether a call uploads by itself, and is not the method of that name handing on what its caller asked for."""
    assert isinstance(call.func, ast.Attribute)
    own = {node.name for node, _ in reader.nodes if isinstance(node, ast.FunctionDef)}
    return inside != call.func.attr and not _is_super(call.func.value) and call.func.attr not in own


def _literal_repo(reader: Reader, call: ast.Call) -> str:
    """The repo that a call names in so many words; a path of the file's own, `.` or "" is none."""
    named = {keyword.arg: keyword.value for keyword in call.keywords}
    keys = ("pretrained_model_name_or_path", "path_or_repo_id", "repo_id", "model", "path_or_repo")
    given = next((named[key] for key in keys if key in named), call.args[0] if call.args else None)
    if isinstance(call.func, (ast.Name, ast.Attribute)) and ast.unparse(call.func).endswith("pipeline"):
        given = named.get("model", call.args[1] if len(call.args) > 1 else None)
    text = reader.meanings.text(given)
    return text if text and _OF_HUB.match(text) and "." not in text[:1] else ""


def processes(folder: Folder) -> Iterator[Finding]:
    """Code that starts programs."""
    yield from _lines(folder, "processes")
    for reader in readers(folder):
        own = {node.name for node, _ in reader.nodes if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
        for call, names, inside in reader.calls:
            method = call.func.attr if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) else ""
            if method in _PROCESS_METHODS - own and not names:
                what = f"{reader.file.name} starts programs, by {method} of something, {reader.moment(inside)}"
                yield Finding(reader.status(inside), what, reader.file.at(call), "do not load it")


def dynamic_code(folder: Folder) -> Iterator[Finding]:
    """Code that makes or loads code at run time: what it will do, nobody can read here."""
    yield from _lines(folder, "dynamic code")
    for reader in readers(folder):
        for call, names, inside in reader.calls:
            if isinstance(call, ast.Call):
                for what, remedy, status in _loading_calls(reader, call, names):
                    worst = reader.status(inside) if status == "failed" else "warning"
                    text = f"{reader.file.name} {what}, {reader.moment(inside)}"
                    yield Finding(worst, text, reader.file.at(call), remedy)
        yield from _modules_as_values(reader)
        yield from _internals(reader)


def _loading_calls(reader: Reader, call: ast.Call, names: frozenset[str]) -> Iterator[tuple[str, str, str]]:
    """What is wrong with a call that depends on its arguments: (what it does, remedy, status)."""
    keywords = {keyword.arg: keyword.value for keyword in call.keywords}
    method = call.func.attr if isinstance(call.func, ast.Attribute) else ""
    if names & {"torch.load", "torch.serialization.load"}:
        if constant(keywords.get("weights_only")) is not True or "pickle_module" in keywords:
            yield (
                "unpickles, by torch.load without weights_only=True",
                "add weights_only=True, or read safetensors",
                "failed",
            )
    elif any(re.match(r"numpy\.(\w+\.)*(load|read_array|NpzFile|open_memmap)$", name) for name in names):
        allow = keywords.get("allow_pickle", call.args[2] if len(call.args) > 2 else None)
        if allow is not None and constant(allow) is not False:
            yield "unpickles, by numpy.load with allow_pickle", "do not load it", "failed"
    elif any(re.match(r"(ruamel\.)?yaml\.(unsafe_load|full_load|load)(_all)?$", name) for name in names):
        if "Safe" not in ast.unparse(call):
            yield f"lets YAML build objects, by {min(names)}", "use yaml.safe_load", "failed"
    elif names & {"importlib.import_module", "importlib.reload"} and call.args:
        text = reader.meanings.text(call.args[0])
        verdict = judge_name(text) if text else None
        plain = text is not None and verdict is None and text not in HANDLED
        shown = brief(text) if text else "what a variable names"
        if names & {"importlib.import_module"} or not text:
            yield f"imports {shown}", "write the import out", "warning" if plain else "failed"
    elif names & {"inspect.getmembers", "inspect.getmembers_static"} and call.args:
        if any(name.partition(".")[0] in _LIBRARIES for name in reader.meanings.names(call.args[0])):
            yield (
                f"takes all that {ast.unparse(call.args[0])[:40]} holds, by inspect.getmembers",
                "write it out",
                "failed",
            )
    elif names & {"builtins.globals", "builtins.vars", "builtins.locals"}:
        yield from _tables(reader, call, names)
    elif names & {"operator.methodcaller", "operator.attrgetter"} and call.args:
        text = reader.meanings.text(call.args[0])
        if text is None or INTERNAL_TEXT.search(text) or set(text.split(".")) & PIECED:
            yield f"takes {brief(text) if text else 'what a variable names'} by {min(names)}", "write it out", "failed"
    of_transformers = any(name.startswith("transformers.") for name in names)
    loads = of_transformers or method.endswith(("from_pretrained", "from_config"))
    if loads and _trusts(reader, call, keywords):
        remedy = "do not load it unless you trust that code too"
        yield "loads other code with trust_remote_code=True", remedy, "failed"
    if names & {"builtins.getattr"} and len(call.args) > 1 and reader.meanings.text(call.args[1]) is None:
        yield from _unknown_attribute(reader, call)


def _trusts(reader: Reader, call: ast.Call, keywords: dict[str | None, ast.expr]) -> bool:
    """Whether a call trusts remote code by itself: not by a variable, with which its caller decides."""
    given = [keywords["trust_remote_code"]] if "trust_remote_code" in keywords else []
    for table in (keyword.value for keyword in call.keywords if keyword.arg is None):
        values = [table, *reader.meanings.values.get(getattr(table, "id", ""), ())[:4]]
        for value in values:
            if isinstance(value, ast.Dict):
                given += [v for k, v in zip(value.keys, value.values) if reader.meanings.text(k) == "trust_remote_code"]
    for value in given:
        if isinstance(value, ast.Constant):
            if value.value:
                return True
        elif not any(isinstance(n, ast.Name) and n.id not in ("bool", "int", "all", "any") for n in ast.walk(value)):
            return True
    return False


def _tables(reader: Reader, call: ast.Call, names: frozenset[str]) -> Iterator[tuple[str, str, str]]:
    """`globals()[x]`, `vars(module)[x]`: harmless where x is written out, or where an object's own fields are read."""
    module = call.args and reader.meanings.names(call.args[0])
    if (call.args and not module) or names & {"builtins.locals"} or (not call.args and names & {"builtins.vars"}):
        return
    parent = reader.parent(call)
    key: ast.AST | None = None
    if isinstance(parent, ast.Subscript) and parent.value is call:
        key = parent.slice
    elif isinstance(parent, ast.Attribute) and parent.attr in ("get", "pop", "__getitem__"):
        caller = reader.parent(parent)
        key = caller.args[0] if isinstance(caller, ast.Call) and caller.args else None
    elif isinstance(parent, ast.Compare):
        return
    text = reader.meanings.text(key)
    if text is None:
        shown = ast.unparse(call)[:60]
        how = "failed" if key is None or module or _is_pieced(reader, key) else "warning"
        yield f"takes what a variable names out of {shown}", "write out what it may take", how


def _unknown_attribute(reader: Reader, call: ast.Call) -> Iterator[tuple[str, str, str]]:
    """`getattr(torch, x)`: which x there may be, nobody can read; two of them in a row reach anything."""
    bases = sorted(
        n for n in reader.meanings.names(call.args[0]) if n.partition(".")[0] in ("torch", "transformers", "numpy")
    )
    modules = [base for base in bases if not base.rpartition(".")[2][:1].isupper()]
    inner, parent = call.args[0], reader.parent(call)
    nested = isinstance(inner, ast.Call) and "builtins.getattr" in reader.meanings.names(inner.func)
    further = isinstance(parent, ast.Attribute) or (
        isinstance(parent, ast.Call)
        and parent.func is not call
        and "builtins.getattr" in reader.meanings.names(parent.func)
    )
    shown = ast.unparse(call)[:80]
    if (nested and not reader.meanings.names(inner)) or (modules and (_is_pieced(reader, call.args[1]) or further)):
        yield f"takes what a variable names out of a module, by {brief(shown)}", "write it out", "failed"
    elif modules and not re.search(r"dtype|act|type|norm", ast.unparse(call.args[1])):
        yield (
            f"takes what a variable names out of {modules[0]}, by {brief(shown)}",
            "write out what it may take",
            "warning",
        )


def _is_pieced(reader: Reader, node: ast.AST, depth: int = 0) -> bool:
    """Whether a text is put together from pieces, and not just read from a config or a parameter."""
    for inner in ast.walk(node):
        if isinstance(inner, ast.Call):
            name = inner.func.attr if isinstance(inner.func, ast.Attribute) else getattr(inner.func, "id", "")
            if name in (
                "chr",
                "bytes",
                "bytearray",
                "decode",
                "fromhex",
                "join",
                "reversed",
                "b64decode",
                "translate",
                "swapcase",
                "format",
            ):
                return True
        elif (isinstance(inner, ast.BinOp) and isinstance(inner.op, (ast.Add, ast.Mod, ast.BitXor))) or (
            isinstance(inner, ast.Slice) and inner.step is not None
        ):
            return True
        elif isinstance(inner, ast.Name) and depth < 3:
            values = reader.meanings.values.get(inner.id, ())[:4]
            if any(_is_pieced(reader, value, depth + 1) for value in values):
                return True
    return False


def _modules_as_values(reader: Reader) -> Iterator[Finding]:
    """A module of the machine that is passed around: what is taken from it then, nobody can read."""
    for node, names, inside in reader.uses:
        parent = reader.parent(node)
        if "builtins.getattr" in names and isinstance(parent, ast.Call) and node in parent.args:
            others = [argument for argument in parent.args if argument is not node]
            given = {name.partition(".")[0] for argument in others for name in _within(reader, argument)}
            if given & {*_LIBRARIES}:
                what = f"{reader.file.name} hands getattr on together with a module, {reader.moment(inside)}"
                yield Finding(reader.status(inside), what, reader.file.at(node), "write out what it takes")
        if isinstance(node, (ast.Import, ast.ImportFrom)) or isinstance(parent, ast.Attribute):
            continue
        module, table = min(names & HANDLED, default=""), min(filter(_is_table, names), default="")
        if module and not _is_getter(reader, node, parent):
            does = f"handles the module {ast.unparse(node)[:40]} as a value"
        elif table and not module and not _is_plain_look_up(reader, node, parent):
            does = f"handles {table}, a table of modules or of what a module holds"
        else:
            continue
        remedy = "do not load it: plain code writes out what it takes from a module"
        what = f"{reader.file.name} {does}, {reader.moment(inside)}"
        yield Finding(reader.status(inside), what, reader.file.at(node), remedy)


def _within(reader: Reader, node: ast.AST) -> Iterator[str]:
    """The modules that an argument is or, as a list, holds."""
    for inner in getattr(node, "elts", [node]):
        yield from (name for name in reader.meanings.names(inner) if name.rpartition(".")[2].islower())


def _is_table(name: str) -> bool:
    library = name.startswith(("torch.", "transformers.", "numpy."))
    return name == "sys.modules" or (library and name.endswith(".__dict__"))


def _is_getter(reader: Reader, node: ast.AST, parent: ast.AST | None) -> bool:
    """`getattr(os, "sep")`, which is judged by the name that it stands for."""
    if not (isinstance(parent, ast.Call) and parent.args[:1] == [node] and len(parent.args) > 1):
        return False
    getter = reader.meanings.names(parent.func) & {"builtins.getattr", "builtins.hasattr"}
    return bool(getter) and reader.meanings.text(parent.args[1]) is not None


def _is_plain_look_up(reader: Reader, node: ast.AST, parent: ast.AST | None) -> bool:
    """`sys.modules[__name__]`, `"x" in sys.modules`, or an entry that is judged by its own name."""
    if isinstance(parent, ast.Compare):
        return True
    if not isinstance(parent, ast.Subscript) or parent.value is not node:
        return False
    own = ast.unparse(parent.slice).endswith(("__name__", "__module__"))
    text = reader.meanings.text(parent.slice)
    return own or (text is not None and text not in HANDLED)


def _internals(reader: Reader) -> Iterator[Finding]:
    """Python's internals, by attribute or by text, and modules by their names on things that are not known."""
    for node, inside in reader.nodes:
        does, remedy = "", "do not load it"
        if isinstance(node, ast.Attribute):
            if _is_internal(reader, node):
                does = f"reaches into Python's internals, by {node.attr}"
            elif _is_module_of_something(reader, node):
                does, remedy = (
                    f"takes .{node.attr} of something",
                    "do not load it: plain code imports a module by its name",
                )
        elif isinstance(node, _TEXTS) and id(node) not in reader.docs:
            text = reader.meanings.text(node)
            if text is not None and INTERNAL_TEXT.search(text):
                does = f"reaches into Python's internals, by the text {brief(text)}"
            elif text in PIECED and not isinstance(node, ast.Constant):
                does, remedy = f"puts the text {text!r} together from pieces", "do not load it: this hides what it does"
        if does:
            what = f"{reader.file.name} {does}, {reader.moment(inside)}"
            yield Finding(reader.status(inside), what, reader.file.at(node), remedy)


_TEXTS = (ast.Constant, ast.BinOp, ast.JoinedStr, ast.Call, ast.Subscript)
_TELLING = {"os", "subprocess", "builtins", "importlib", "ctypes", "socket", "pickle", "shutil", "pty"}


def _is_internal(reader: Reader, node: ast.Attribute) -> bool:
    if node.attr in FORBIDDEN_DUNDERS:
        return not (node.attr.startswith("__reduce") and _is_super(node.value))
    if node.attr in ("__mro__", "__self__", "__dict__"):
        subscript = node.attr == "__mro__" and isinstance(reader.parent(node), ast.Subscript)
        return subscript or any(base.startswith("builtins.") for base in reader.meanings.names(node.value))
    if node.attr == "__getattribute__":
        return not _is_super(node.value) and not _on_self(reader, node)
    return node.attr == "from_address" and "ctypes" in reader.file.text


def _is_module_of_something(reader: Reader, node: ast.Attribute) -> bool:
    """`x.os` where nothing is known of x, and the file itself puts nothing there."""
    unknown = not reader.meanings.names(node.value) and f".{node.attr}" not in reader.meanings.values
    return node.attr in _TELLING and unknown and isinstance(node.ctx, ast.Load)


def _is_super(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "super"


def _on_self(reader: Reader, node: ast.Attribute) -> bool:
    call = reader.parent(node)
    first = call.args[0] if isinstance(call, ast.Call) and call.args else None
    text = reader.meanings.text(call.args[1]) if isinstance(call, ast.Call) and len(call.args) > 1 else None
    plain = text is None or text not in FORBIDDEN_DUNDERS
    return plain and isinstance(first, ast.Name) and first.id in ("self", "cls")


def file_access(folder: Folder) -> Iterator[Finding]:
    """Code that writes, moves or removes files; it is expected in methods that save."""
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
    yield from _lines(folder, "secrets access")
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
    """Code written so that a reader does not see what it does."""
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
                what = f"{file.name} turns the direction of its text, so that it is shown otherwise than it runs"
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
    "dynamic code": dynamic_code,
    "file access": file_access,
    "secrets access": secrets_access,
    "obfuscation": obfuscation,
}
