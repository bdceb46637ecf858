"""What model code may use: allow-lists for modules with access to the machine, and patterns of dangerous names.

Names are checked after resolving aliases and modules reached through libraries (see `meanings.py`). Names of packages
that are on no list here are not checked; `other imports` reports the packages.
"""

import re
import sys
from typing import NamedTuple

from .library_modules import SENSITIVE_MODULES, words


class Verdict(NamedTuple):
    """The check that reports a name, what the name does, and the status of the finding."""

    check: str
    does: str
    status: str = "failed"


NETWORK = re.compile(
    r"(_?socket|ssl|urllib\.(request|robotparser|urlopen|urlretrieve)|urllib3|http\.(client|server|cookiejar)|requests|"
    r"httpx|httpcore|aiohttp|ftplib|smtplib|poplib|imaplib|nntplib|telnetlib|xmlrpc|paramiko|websockets?|websocket_client|"
    r"boto3|botocore|pycurl|grpc|zmq|dns|asyncio\.(open_connection|start_server|open_unix_connection)|socketserver|"
    r"wsgiref|torch\.hub|torch\.utils\.model_zoo|torch\.distributed\.rpc|webbrowser|wget|gdown|kagglehub|modelscope\.hub|"
    r"pooch|fsspec|s3fs|gcsfs|smart_open|cloudpathlib|google\.cloud|azure|playwright|selenium|scapy|openai|anthropic|"
    r"nltk\.download(er)?|spacy\.cli|datasets\.load_dataset|(tensorflow\.)?keras\.utils\.get_file|numpy\.(lib\.\w+\.)?DataSource|"
    r"huggingface_hub\.(\w+\.)*(upload_\w+|create_(repo|commit|branch|tag)|delete_\w+|push_to_hub\w*)$|"
    r"torch\.distributed\.(\w+\.)*(TCPStore|HashStore|FileStore|rendezvous|init_process_group)$|deepspeed\.init\w*$|"
    r"logging\.handlers\.(HTTP|SMTP|Socket|Datagram|SysLog)Handler$|kernels\.(get_kernel|install_kernel)|transformers\.utils(\.hub)?\.http_get)(\.|$)"
)
# functions that fetch files from the Hub: checked at the call, by the repo named there
HUB = re.compile(
    r"(huggingface_hub\.(\w+\.)*(\w*download\w*|HfApi|HfFileSystem|login|"
    r"whoami|InferenceClient|ModelHubMixin|list_\w+|save_pretrained_\w+|get_session)|"
    r"transformers\.(\w+\.)*(cached_files?|get_file_from_repo|has_file|get_from_cache|hf_bucket_url|download_url|"
    r"push_to_hub|list_repo_\w+|hf_hub_download|snapshot_download|get_checkpoint_shard_files|pipeline|load_tool))$"
)
PROCESSES = re.compile(
    r"(_?posixsubprocess|subprocess|pty|tty|pexpect|sh|plumbum|fabric|invoke|execnet|docker|pip|multiprocessing(\.\w+)*\."
    r"(\w*Process|Pool)|torch\.multiprocessing\.(spawn|start_processes|\w*Process|Pool)|psutil\.Popen|"
    r"(os|posix|nt)\.(system|popen|exec\w+|spawn\w+|fork|forkpty|posix_spawnp?|startfile|kill|killpg|setuid|setgid|chroot)|"
    r"asyncio\.(create_subprocess_\w+|subprocess)|commands|platform\.popen|concurrent\.futures\.(\w+\.)?ProcessPoolExecutor|"
    r"transformers\.(testing_utils|commands)|torch\.distributed\.(run|launch|launcher|elastic)|torch\.utils\.collect_env|"
    r"accelerate\.(notebook_launcher|debug_launcher|launchers|commands))(\.|$)"
)
DYNAMIC = re.compile(
    r"builtins\.(eval|exec|compile|__import__|execfile|__dict__|breakpoint)$|"
    r"(dill|cloudpickle|joblib|shelve|jsonpickle|sklearn\.externals\.joblib)\.(\w+\.)*(loads?|Unpickler|open|decode)$|"
    r"(\w+\.)*(ForkingPickler|Unpickler|_Unpickler)(\.|$)|pandas\.(\w+\.)*(read_pickle|read_hdf|eval)$|"
    r"torch\.(ops|classes)\.load_library$|torch\.utils\.(cpp_extension|_cpp_extension_versioner)(\.|$)|torch\.package(\.|$)|"
    r"torch\.(jit|_C)\.(load|jit_module_from_flatbuffer|import_ir_module\w*|_load_for_lite_interpreter|CompilationUnit)$|"
    r"torch\._C\._(import|dlopen|load)\w*$|torch\.(_inductor\.(codecache|aoti_load_package|package)|_export\.aot_load)(\.|$)|"
    r"torch\.cuda\._compile_kernel$|numpy\.(ctypeslib\.(load_library|ctypes_load_library)|f2py|distutils)(\.|$)|"
    r"cupy\.(\w+\.)*(RawKernel|RawModule|ElementwiseKernel)$|pycuda(\.|$)|(cffi|cppyy|weave|pyximport|cython)(\.|$)|"
    r"timeit\.(timeit|repeat|main|Timer)(\.|$)|(cProfile|profile)\.(runctx|run|(Profile\.)run(ctx)?)$|doctest\.\w+|"
    r"trace\.Trace(\.|$)|torch\.fx\.(\w+\.)*_?exec_with_source$|torch\.storage\._load_from_bytes$|"
    r"(string|_string)\.(Formatter\.(get_field|vformat)|formatter_field_name_split)$|typing\.(_eval_type|get_type_hints|ForwardRef)(\.|$)|"
    r"typing_extensions\.(get_type_hints|evaluate_forward_ref)$|annotationlib(\.|$)|torch\.ops\.import_module$|"
    r"(sympy\.(sympify|parsing)|numexpr\.evaluate|asteval|simpleeval)(\.|$)|"
    r"transformers\.dynamic_module_utils(\.|$)|transformers\.(agents|tools)(\.|$)|transformers\.(\w+\.)*"
    r"(get_class_from_dynamic_module|get_imported_module|custom_object_save)$|"
    r"(setuptools|pkg_resources|distutils|site|sitecustomize|usercustomize)(\.|$)|numpy\.(\w+\.)*loads$"
)
SECRETS = re.compile(
    r"huggingface_hub\.(\w+\.)*(HfFolder|get_token|get_token_to_send|_get_token\w*)(\.|$)|"
    r"(keyring|secretstorage|browser_cookie3|pynput|pyperclip|mss|winreg|win32\w*|pwd|spwd|getpass|netrc)(\.|$)|"
    r"(os|posix)\.environb$"
)

ASKS = re.compile(r"builtins\.input$|(code|codeop|cmd|readline)\.|pdb\.|click\.(prompt|confirm)$")

_SAFE_OS = (
    r"path(\..*)?|environ(\..*)?|getenv|sep|linesep|pathsep|altsep|extsep|curdir|pardir|devnull|name|PathLike|fspath|"
    r"fsencode|fsdecode|getcwd|cpu_count|process_cpu_count|sched_getaffinity|getpid|getppid|listdir|scandir|DirEntry|walk|"
    r"f?stat|lstat|access|[FRWX]_OK|O_\w+|urandom|uname|get_terminal_size|error|strerror|supports_\w+|sysconf|getloadavg|"
    r"remove|unlink|rename|renames|replace|makedirs|mkdir|rmdir|removedirs|chmod|chown|symlink|link|readlink|truncate|"
    r"open|close|read|write|fdopen|fsync|utime|mkfifo|chdir|umask|putenv|unsetenv|nice|register_at_fork|getuid|getlogin"
)
# modules of which model code needs a part; any other use of them is a finding
ALLOWED: dict[str, re.Pattern[str]] = {
    module: re.compile(rf"({names})$")
    for module, names in {
        "os": _SAFE_OS,
        "sys": r"version|version_info|hexversion|maxsize|maxunicode|platform|byteorder|implementation|float_info|int_info|"
        r"std(out|err|in)(\..*)?|argv|path(\..*)?|modules(\..*)?|exit|exc_info|getsizeof|getrefcount|getdefaultencoding|"
        r"executable|flags(\..*)?|intern|(get|set)recursionlimit|(version_info|implementation|float_info)\..*|"
        r"meta_path(\..*)?|path_hooks(\..*)?|excepthook|displayhook|is_finalizing|getfilesystemencoding|warnoptions",
        "builtins": r"\w+(\..*)?",  # the dangerous ones are in DYNAMIC
        "importlib": r"metadata(\..*)?|resources(\..*)?|util|util\.find_spec|import_module|reload|invalidate_caches",
        "inspect": r"signature|Signature(\..*)?|Parameter(\..*)?|BoundArguments|getfullargspec|isclass|isfunction|ismethod|"
        r"isabstract|isroutine|ismodule|isgeneratorfunction|iscoroutinefunction|getsource|getdoc|cleandoc|unwrap|getmembers|_empty|"
        r"getfile|getsourcefile|getmro|isbuiltin|isgenerator",
        "types": r"SimpleNamespace|MethodType|ModuleType|GeneratorType|NoneType|MappingProxyType|UnionType|GenericAlias|"
        r"EllipsisType|BuiltinFunctionType|TracebackType|DynamicClassAttribute|new_class|FunctionType|LambdaType|coroutine",
        "gc": r"collect|disable|enable|isenabled|freeze|get_threshold|set_threshold|get_count",
        "ctypes": r"c_\w+|Structure|Union|Array|BigEndian\w+|LittleEndian\w+|sizeof|byref|POINTER|pointer|alignment|addressof|"
        r"ArgumentError|py_object|(c_\w+|Structure|Union)\.(?!from_address$)\w+|wintypes(\..*)?",
        "pickle": r"dumps?|HIGHEST_PROTOCOL|DEFAULT_PROTOCOL|PickleError|PicklingError|UnpicklingError",
        "multiprocessing": r"cpu_count|get_context|Lock|RLock|Value|Array|Queue|Manager|current_process|shared_memory(\..*)?|"
        r"pool|pool\.ThreadPool|synchronize(\..*)?|get_start_method|set_start_method|set_sharing_strategy",
        "asyncio": r"\w+",
        "platform": r"system|machine|processor|python_version\w*|platform|release|node|architecture|python_implementation|"
        r"mac_ver|version|uname",
        "urllib": r"parse(\..*)?|error(\..*)?|request",
        "http": r"HTTPStatus(\..*)?|HTTPMethod",
        "operator": r"\w+",
        "copyreg": r"__newobj__",
        "signal": r"\w+",
        "torch.serialization": r"safe_globals|add_safe_globals|load|save|get_safe_globals|MAP_LOCATION|FILE_LIKE",
    }.items()
}
_MODULE_NAMES = {"os.path", "multiprocessing.context", "urllib.request", "multiprocessing.pool", "importlib.util"}
# modules of the standard library without restrictions
_PURE = words(
    "__future__ abc argparse array ast base64 binascii bisect bz2 calendar cmath codecs collections "
    "colorsys configparser concurrent contextlib contextvars copy csv dataclasses datetime decimal "
    "difflib email encodings enum errno faulthandler filecmp fnmatch fractions functools getopt gettext "
    "glob graphlib gzip hashlib heapq hmac html io itertools json keyword linecache locale logging lzma "
    "math mimetypes numbers opcode pathlib pprint profile cProfile pstats queue random re reprlib "
    "resource sched secrets select shlex shutil sqlite3 stat statistics string stringprep struct "
    "sysconfig tarfile tempfile textwrap this threading time timeit token tokenize tomllib trace "
    "traceback tracemalloc typing unicodedata unittest uuid warnings wave weakref xml zipfile zlib "
    "zoneinfo atexit doctest audioop plistlib quopri sndhdr imghdr symtable posixpath ntpath dis _thread "
    "_collections_abc _weakref _operator _io genericpath ipaddress cgi nturl2path optparse copyreg"
)
# modules of torch that models use, without its hub, compilers and launchers
_TORCH = words(
    "nn utils cuda amp backends distributed autograd jit fx onnx compiler _dynamo _inductor linalg fft "
    "special random distributions func types library mps xpu cpu sparse nested masked optim profiler "
    "version export ao quantization _C overrides testing accelerator futures signal _higher_order_ops "
    "_utils functional storage _jit_internal return_types torch serialization multiprocessing ops classes "
    "_prims _refs _decomp _functorch _subclasses _tensor _ops _VF mtia"
)
# modules that plain code does not use as values, but only takes attributes from
HANDLED = {"posix", "nt", "importlib.util"} | (
    SENSITIVE_MODULES
    - {"io", "pathlib", "glob", "tempfile", "concurrent", "threading", "atexit", "platform", "sqlite3", "signal"}
)
FORBIDDEN_DUNDERS = words(
    "__subclasses__ __globals__ __builtins__ __code__ __closure__ __base__ __bases__ __import__ "
    "__loader__ __spec__ __reduce__ __reduce_ex__ f_globals f_builtins f_locals f_back f_code gi_frame "
    "gi_code cr_frame ag_frame tb_frame tb_next _getframe func_globals func_code co_code co_consts"
)
INTERNAL_TEXT = re.compile(
    r"^(__(globals|builtins|subclasses|import|code|closure|mro|bases?|reduce(_ex)?|loader|spec)__|f_globals|f_builtins)$|"
    r"\{[^{}]*\.__\w+__|__class__[\s\S]*__(mro|bases?|subclasses|init|globals)__"
)
# words that no honest code concatenates from pieces
PIECED = SENSITIVE_MODULES - {"code", "platform", "glob", "io", "http", "signal"} | words(
    "system popen eval exec compile __import__ getattr Popen check_output urlopen import_module loads load_library CDLL"
)


def verdict_on(name: str) -> Verdict | None:
    """The `Verdict` on using a full name, or None if it is allowed or unknown."""
    for pattern, check, does in (
        (NETWORK, "network", "reaches the network"),
        (PROCESSES, "processes", "starts programs"),
        (DYNAMIC, "dynamic code", "makes or loads code at run time"),
        (SECRETS, "secrets access", "reads what users keep secret"),
        (ASKS, "dynamic code", "reads from the terminal"),
    ):
        if pattern.match(name):
            return Verdict(check, does)
    module, allowed = _allow_list(name.replace("multiprocessing.context.", "multiprocessing."))
    if allowed is not None:
        rest = name.replace("multiprocessing.context.", "multiprocessing.")[len(module) + 1 :]
        if rest and name not in _MODULE_NAMES and not allowed.match(rest):
            loads = module in ("pickle", "ctypes", "importlib", "builtins")
            does = "makes or loads code at run time" if loads else "uses what model code does not need"
            return Verdict("dynamic code", does)
        return None
    top, _, rest = name.partition(".")
    if top in sys.stdlib_module_names and top not in _PURE:
        return Verdict("dynamic code", "uses what model code does not need")
    if top == "torch" and rest:
        first = rest.partition(".")[0]
        if first not in _TORCH and _is_torch_module(first):
            return Verdict("dynamic code", "uses a part of torch that models do not need", "warning")
    return None


def _allow_list(name: str) -> tuple[str, re.Pattern[str] | None]:
    for module in (name, name.rpartition(".")[0], ".".join(name.split(".")[:2]), name.partition(".")[0]):
        if module in ALLOWED:
            return module, ALLOWED[module]
    return "", None


def _is_torch_module(name: str) -> bool:
    return f"torch.{name}" in sys.modules
