"""What a reader should see before trusting code: network, processes, files, code made at run time, hidden text.

A name is followed through the file's imports (`from os import system as s`), not through variables (but a module that
is put into one is told): code that hides well enough is not found. What is found in code that transformers loads is `failed` if no model needs it; in a file that
nothing loads, and for plain file access, it is a `warning`.
"""

import ast
import re
import unicodedata
from collections.abc import Iterator

from .code_tree import constant, reachable
from .folder import CodeFile, Finding, Folder, brief

_NETWORK = re.compile(
    r"(socket|ssl|urllib\.request|urllib\.urlopen|urllib3|http\.(client|server)|requests|httpx|aiohttp|ftplib|smtplib|"
    r"poplib|imaplib|telnetlib|xmlrpc|paramiko|websockets?|boto3|botocore|pycurl|grpc|zmq|dns|asyncio\.open_connection|"
    r"torch\.hub\.(load|download_url_to_file|load_state_dict_from_url)|"
    r"torch\.utils\.model_zoo|webbrowser|wget)(\.|$)"
)
_HUB = re.compile(r"huggingface_hub\.(\w*download|upload_\w+|HfApi|create_repo|login|get_token|InferenceClient)(\.|$)")
_PROCESS = re.compile(
    r"(subprocess|pty|pexpect|sh|plumbum|fabric|multiprocessing\.Process|"
    r"os\.(system|popen|exec\w+|spawn\w+|fork|forkpty|posix_spawnp?|startfile|kill|killpg|setuid|chroot)|"
    r"asyncio\.create_subprocess_\w+|commands|platform\.popen)(\.|$)"
)
_DYNAMIC = re.compile(
    r"(builtins\.)?(eval|exec|compile|__import__|execfile)$|__builtins__|(os|builtins|sys)\.\*$|builtins\.__dict__|"
    r"(pickle|_pickle|cPickle|dill|cloudpickle|joblib|shelve|jsonpickle)\.(loads?|Unpickler|open|decode)$|pandas\.read_pickle$|"
    r"(marshal|ctypes|cffi|code|codeop|imp|runpy|zipimport)(\.|$)|types\.(FunctionType|CodeType|LambdaType)$|"
    r"importlib\.util\.(spec_from_file_location|module_from_spec)$|importlib\.machinery\.\w+Loader$|"
    r"torch\.(ops\.load_library|classes\.load_library|utils\.cpp_extension(\.\w+)?|jit\.load|package\.\w+)$|"
    r"(os|sys|builtins|importlib|subprocess)\.__\w+__|sys\.(settrace|setprofile|addaudithook|modules)$"
)
_REACHES = re.compile(
    r"(os|sys|builtins|subprocess|socket|ctypes|pickle|marshal|requests|urllib|shutil|pty|http)(\.|$)"
)
_HANDLED = {"os", "sys", "builtins", "subprocess", "socket", "importlib", "shutil", "pickle", "marshal", "ctypes"}
_BUILT_IN = {"eval", "exec", "compile", "__import__", "__builtins__", "execfile"}
_FILES = re.compile(
    r"(os\.(remove|unlink|rename|renames|replace|makedirs|mkdir|rmdir|removedirs|chmod|chown|symlink|link|truncate|open)|"
    r"shutil\.\w+|tempfile\.\w+|numpy\.(save\w*|memmap)|torch\.save|sqlite3\.\w+|zipfile\.ZipFile|tarfile\.open|"
    r"safetensors(\.torch)?\.save_file)$"
)
_FILE_METHODS = {"write_text", "write_bytes", "unlink", "rmdir", "touch", "symlink_to", "hardlink_to", "extractall"}
_DUNDERS = {"__subclasses__", "__globals__", "__builtins__", "__code__", "__reduce__", "__reduce_ex__", "__bases__"}
_DECODERS = re.compile(
    r"(base64\.\w*decode\w*|binascii\.(unhexlify|a2b_\w+)|zlib\.decompress\w*|codecs\.decode|lzma\.\w+)$"
)
_SECRET_NAMES = re.compile(
    r"HF_TOKEN|HUGGING_?FACE\w*TOKEN|HUGGINGFACEHUB|OPENAI_API|ANTHROPIC_API|AWS_(SECRET|ACCESS|SESSION)|GITHUB_TOKEN|"
    r"WANDB_API|GOOGLE_APPLICATION_CREDENTIALS|\.ssh(/|$)|\.aws/|\.netrc|id_rsa|id_ed25519|/etc/(passwd|shadow)|"
    r"\.git-credentials|\.kube/config|\.docker/config|huggingface/token|/proc/self|\.bash_history"
)
_ENCODED = re.compile(r"[A-Za-z0-9+/=_-]{400,}|(?:\\x[0-9a-fA-F]{2}){60,}|[0-9a-fA-F]{400,}")


class _Reader:
    """One pass over a file: every call and import with where it happens."""

    def __init__(self, file: CodeFile):
        self.file = file
        self.imports: list[tuple[ast.AST, str, str]] = []  # node, full name, function it is in
        self.uses: list[tuple[ast.AST, str, str]] = []
        self.calls: list[tuple[ast.Call, str, str]] = []
        self.internals: list[tuple[ast.Attribute, str]] = []
        self.handed: list[tuple[ast.Name, str]] = []  # modules that are passed around like values
        bases: set[int] = set()
        waiting: list[tuple[ast.AST, str]] = [(file.tree, "")]
        while waiting:
            node, inside = waiting.pop()
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                inside = node.name
            elif isinstance(node, ast.Lambda):
                inside = inside or "lambda"
            elif isinstance(node, ast.Import):
                self.imports += [(node, alias.name, inside) for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                self.imports += [(node, f"{node.module}.{alias.name}", inside) for alias in node.names]
            elif isinstance(node, ast.Call):
                self.calls += [(node, name, inside) for name in sorted(file.meanings(node.func))]
            elif isinstance(node, ast.Attribute):
                bases.add(id(node.value))  # a node comes before its children
                if _is_outside(file, node):
                    self.uses += [(node, name, inside) for name in sorted(file.meanings(node))]
            elif isinstance(node, ast.Name) and _is_outside(file, node):
                self.uses += [(node, name, inside) for name in sorted(file.meanings(node))]
                if id(node) not in bases and file.meanings(node) & _HANDLED:
                    self.handed.append((node, inside))
            if isinstance(node, ast.Attribute) and node.attr in _DUNDERS:
                self.internals.append((node, inside))
            waiting += [(child, inside) for child in ast.iter_child_nodes(node)]


def _is_outside(file: CodeFile, node: ast.AST) -> bool:
    """Whether a name is imported or built in, not a variable that happens to be called so."""
    while isinstance(node, ast.Attribute):
        node = node.value
    return isinstance(node, ast.Name) and (node.id in file.names or node.id in _BUILT_IN)


def _files(folder: Folder) -> Iterator[tuple[_Reader, bool]]:
    if "readers" not in folder.memo:
        live = reachable(folder)
        folder.memo["readers"] = [(_Reader(file), name in live) for name, file in sorted(folder.code.items())]
    yield from folder.memo["readers"]


def _moment(inside: str, live: bool) -> str:
    if not live:
        return "in a file that transformers does not load"
    return f"in {inside}" if inside else "as soon as it is imported"


def _report(folder: Folder, pattern: re.Pattern[str], does: str, remedy: str) -> Iterator[Finding]:
    for reader, live in _files(folder):
        told: set[int] = set()
        found = [*reader.imports, *reader.uses]
        for node, name, inside in sorted(found, key=lambda entry: getattr(entry[0], "lineno", 0)):
            line = getattr(node, "lineno", 0)
            if not pattern.match(name) or line in told:
                continue
            told.add(line)
            what = f"{reader.file.name} {does}, by {name}, {_moment(inside, live)}"
            yield Finding("failed" if live else "warning", what, reader.file.at(node), remedy)


def network(folder: Folder) -> Iterator[Finding]:
    """Code that talks to other machines."""
    yield from _report(
        folder, _NETWORK, "reaches the network", "do not load it unless you know what it fetches or sends"
    )
    for reader, live in _files(folder):
        for node, name, inside in reader.calls:
            if _HUB.match(name):
                what = f"{reader.file.name} talks to the Hub, by {name}, {_moment(inside, live)}"
                yield Finding("warning", what, reader.file.at(node), "read what it downloads or sends")


def processes(folder: Folder) -> Iterator[Finding]:
    """Code that starts programs."""
    yield from _report(folder, _PROCESS, "starts programs", "do not load it")


def dynamic_code(folder: Folder) -> Iterator[Finding]:
    """Code that makes or loads code at run time: what it will do, nobody can read here."""
    yield from _report(folder, _DYNAMIC, "makes or loads code at run time", "do not load it")
    for reader, live in _files(folder):
        status, at = "failed" if live else "warning", reader.file.at
        for call, name, inside in reader.calls:
            when = _moment(inside, live)
            keywords = {keyword.arg: keyword.value for keyword in call.keywords}
            if name == "torch.load" and constant(keywords.get("weights_only")) is not True:
                what = f"{reader.file.name} unpickles, by torch.load without weights_only=True, {when}"
                yield Finding(status, what, at(call), "add weights_only=True, or read safetensors")
            elif name == "numpy.load" and constant(keywords.get("allow_pickle")) is True:
                yield Finding(
                    status, f"{reader.file.name} unpickles, by numpy.load, {when}", at(call), "do not load it"
                )
            elif name in ("yaml.load", "yaml.unsafe_load", "yaml.full_load") and "Safe" not in ast.unparse(call):
                what = f"{reader.file.name} lets YAML build objects, by {name}, {when}"
                yield Finding(status, what, at(call), "use yaml.safe_load")
            elif name in ("importlib.import_module", "importlib.reload") and call.args:
                text = constant(call.args[0])
                plain = isinstance(text, str) and not _REACHES.match(text)
                what = f"{reader.file.name} imports {brief(text) if text else 'what a variable names'}, {when}"
                yield Finding("warning" if plain else status, what, at(call), "write the import out")
            elif name.endswith("from_pretrained") and constant(keywords.get("trust_remote_code")) is True:
                what = f"{reader.file.name} loads other code with trust_remote_code=True, {when}"
                yield Finding(status, what, at(call), "do not load it unless you trust that code too")
        for module, inside in reader.handed:
            what = f"{reader.file.name} handles the module {module.id} as a value, {_moment(inside, live)}"
            yield Finding(status, what, at(module), "do not load it: plain code writes out what it takes from a module")
        for node in ast.walk(reader.file.tree):
            if isinstance(node, ast.Constant) and node.value in ("__builtins__", "__import__", "__subclasses__"):
                what = f"{reader.file.name} reaches into Python's internals, by the text {node.value!r}"
                yield Finding(status, what, at(node), "do not load it")
        for attribute, inside in reader.internals:
            what = f"{reader.file.name} reaches into Python's internals, by {attribute.attr}, {_moment(inside, live)}"
            yield Finding(status, what, at(attribute), "do not load it")


def file_access(folder: Folder) -> Iterator[Finding]:
    """Code that writes, moves or removes files; it is expected in methods that save."""
    for reader, live in _files(folder):
        for call, name, inside in reader.calls:
            attribute = call.func.attr if isinstance(call.func, ast.Attribute) else ""
            mode = next(
                (k.value for k in call.keywords if k.arg == "mode"), call.args[1] if len(call.args) > 1 else None
            )
            opens = name in ("open", "io.open", "codecs.open") or (attribute == "open" and not name.startswith("PIL."))
            if attribute == "open" and name not in ("io.open", "codecs.open"):
                mode = next((k.value for k in call.keywords if k.arg == "mode"), call.args[0] if call.args else None)
            writes = opens and mode is not None and re.search(r"[wax+]", str(constant(mode) or ""))
            if not (writes or _FILES.match(name) or attribute in _FILE_METHODS):
                continue
            status = "warning" if inside or not live else "failed"
            what = f"{reader.file.name} writes or removes files, by {name or attribute}, {_moment(inside, live)}"
            yield Finding(status, what, reader.file.at(call), "read what it writes, and where")


def secrets_access(folder: Folder) -> Iterator[Finding]:
    """Code that reads tokens, keys, or all of the environment."""
    for reader, live in _files(folder):
        status = "failed" if live else "warning"
        for node in ast.walk(reader.file.tree):
            text = constant(node)
            if isinstance(text, str) and len(text) < 200 and (found := _SECRET_NAMES.search(text)):
                what = f"{reader.file.name} mentions {found[0]}, where tokens and keys are kept"
                yield Finding(status, what, reader.file.at(node), "do not load it")
        for call, name, inside in reader.calls:
            if name.startswith("os.environ.") and name.rpartition(".")[2] in ("copy", "items", "values"):
                what = f"{reader.file.name} reads the whole environment, {_moment(inside, live)}"
                yield Finding(status, what, reader.file.at(call), "do not load it")


def obfuscation(folder: Folder) -> Iterator[Finding]:
    """Code written so that a reader does not see what it does."""
    for reader, live in _files(folder):
        file, status = reader.file, "failed" if live else "warning"
        runs = any(_DYNAMIC.match(name) for _, name, _ in [*reader.calls, *reader.imports])
        for call, name, _ in reader.calls:
            if _DECODERS.match(name) or name == "bytes.fromhex":
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
        for node in ast.walk(file.tree):
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
