"""Checks for code that changes its process: torch settings, seeds, the environment, classes of other packages.

A model is loaded into a process that also does other things. Global changes on import, construction or call affect
these too, and are hard to trace back to the model. These checks read the code; `isolated/side_effects.py` compares the
state of a process before and after.
"""

import ast
import re
from collections.abc import Iterator

from .code_tree import constant
from .reading import Reader, readers
from .replacements import assignments, effect, given_to_patchers
from .repo_snapshot import Finding, Folder
from .walking import walk

# full name of the function → what it changes, and the remedy
_CALLS: list[tuple[str, str, str]] = [
    (
        r"torch\.(random\.)?(manual_seed|seed|set_rng_state)|torch\.(cuda|mps|xpu)\.(random\.)?(manual_seed|seed|set_rng_state)(_all)?|"
        r"numpy\.random\.(seed|set_state)|random\.(seed|setstate)|transformers\.(\w+\.)*(set_seed|enable_full_determinism)|"
        r"accelerate\.(\w+\.)*set_seed|(pytorch_)?lightning\.(\w+\.)*seed_everything|torch\.default_generator\.(manual_seed|seed|set_state)",
        "sets the random seed of the whole process",
        "leave seeds to the caller, or draw from a torch.Generator of your own",
    ),
    (
        r"torch\.(set_default_dtype|set_default_tensor_type|set_default_device)",
        "changes the default dtype or device of the whole process",
        "pass dtype= and device= where tensors are made",
    ),
    (
        r"torch\.(autograd\.(grad_mode\.)?)?(set_grad_enabled|set_detect_anomaly)|torch\._C\._set_grad_enabled|"
        r"torch\.(autograd\.grad_mode\.)?(no_grad|inference_mode|enable_grad)(\(\))?\.__enter__",
        "switches gradients on or off for the whole process",
        "use `with torch.no_grad():` around what needs it",
    ),
    (
        r"torch\.(set_num_threads|set_num_interop_threads)|(mkl|numexpr)\.set_num_threads",
        "sets the number of threads of the whole process",
        "leave it to the caller",
    ),
    (
        r"torch\.(use_deterministic_algorithms|set_deterministic_debug_mode|set_float32_matmul_precision|set_flush_denormal|"
        r"set_printoptions|set_warn_always|set_autocast\w*|set_vital)|numpy\.(seterr|setbufsize|set_printoptions|seterrcall)|"
        r"torch\.backends\.(\w+\.)*(enable_\w+|set_\w+|allow_\w+|fp32_\w+)|torch\._C\.(_jit_set_\w+|_set_\w+|_jit_override\w+)|"
        r"torch\.jit\.(set_fusion_strategy|enable_onednn_fusion)|torch\.cuda\.(set_device|set_per_process_memory_fraction|"
        r"memory\.\w*set\w*)|torch\.multiprocessing\.set_\w+|torch\._dynamo\.(reset|config\.\w+)|torch\._logging\.set_logs|"
        r"decimal\.(setcontext)|tensorflow\.(config\.\w+\.set_\w+|random\.set_seed)",
        "changes a setting of torch or NumPy for the whole process",
        "leave it to the caller",
    ),
    (
        r"os\.(putenv|unsetenv)|os\.environ\.(update|setdefault|pop|popitem|clear|__setitem__|__delitem__)",
        "changes environment variables",
        "leave them to the caller",
    ),
    (
        r"contextlib\.chdir|os\.(chdir|fchdir|umask|nice|setpgid|setsid|setpriority)|resource\.setrlimit|locale\.setlocale|time\.tzset|"
        r"socket\.setdefaulttimeout|multiprocessing\.set_\w+|sys\.set\w+|gc\.(disable|freeze|set_threshold)|"
        r"asyncio\.set_event_loop\w*|faulthandler\.\w+|tracemalloc\.start",
        "changes the state of the process",
        "leave it to the caller",
    ),
    (
        r"warnings\.(filterwarnings|simplefilter|resetwarnings)",
        "changes which warnings the whole process shows",
        "use `with warnings.catch_warnings():` around what warns",
    ),
    (
        r"logging\.(basicConfig|disable|captureWarnings|setLoggerClass|addLevelName|config\.\w+)|logging\.root\.\w+|"
        r"transformers\.(\w+\.)*logging\.(set_verbosity\w*|disable_\w+|enable_\w+|add_handler|remove_handler)|"
        r"datasets\.(\w+\.)*(set_verbosity\w*|disable_\w+)|absl\.logging\.set_\w+|loguru\.logger\.(add|remove|disable)",
        "changes the logging of the whole process",
        "use logging.get_logger(__name__), and leave levels to the caller",
    ),
    (
        r"sys\.(path|meta_path|path_hooks|modules|argv)\.(append|insert|extend|remove|pop|clear|update|setdefault|__setitem__)|"
        r"site\.addsitedir",
        "changes what the whole process imports",
        "import siblings by `from .name import …`",
    ),
    (
        r"signal\.(signal|alarm|setitimer|pthread_sigmask|set_wakeup_fd|siginterrupt)|atexit\.(un)?register|os\.register_at_fork|"
        r"threading\.(settrace|setprofile|excepthook|stack_size)|weakref\.finalize",
        "registers code that runs at a signal, a fork or the end of the process",
        "remove it: a model does not need it",
    ),
    (
        r"torch\.nn\.modules\.module\.register_module_\w+|torch\.nn\.modules\.lazy\.register_\w+|"
        r"torch\.optim\.optimizer\.register_optimizer_\w+",
        "hooks every module or optimizer of the whole process",
        "register hooks on the modules of this model",
    ),
    (
        r"threading\.(Thread|Timer)|_thread\.start_new(_thread)?|concurrent\.futures\.(thread\.)?ThreadPoolExecutor|"
        r"multiprocessing\.(pool\.)?(ThreadPool|Manager|dummy\.Pool)|queue\.Queue\.start|asyncio\.(run|new_event_loop|get_event_loop)",
        "starts threads",
        "remove them: a model does not need them",
    ),
]
_EFFECTS = [(re.compile(rf"({pattern})$"), does, remedy) for pattern, does, remedy in _CALLS]
_SCOPED = re.compile(  # as context managers, these undo their effect
    r"torch\.(autograd\.(grad_mode\.)?)?(set_grad_enabled|set_detect_anomaly|set_default_device)$|contextlib\.chdir$|concurrent\.futures\.|multiprocessing\."
)
_GUARDS = re.compile(r"warnings\.catch_warnings$|torch\.(random\.)?fork_rng$|torch\.\w+\.\w+\.flags$|\.fork_rng$")
_MODES = re.compile(r"torch\.(\w+\.)*(device|autocast|set_default_device|\w+Mode|sdpa_kernel)$|contextlib\.chdir$")
_WORK = re.compile(
    r"transformers\.(Trainer|Seq2SeqTrainer|pipeline)$|accelerate\.Accelerator$|torch\.(autograd\.backward|distributed\.init_process_group)$|"
    r"time\.sleep$|builtins\.(input|exit|quit|breakpoint)$|sys\.exit$|torch\.optim\.\w+$|datasets\.load_dataset$"
)
_WORK_METHODS = {
    "backward",
    "step",
    "train_batch",
    "fit",
    "from_pretrained",
    "zero_grad",
    "save_pretrained",
    "push_to_hub",
}
_RANDOM = re.compile(
    r"torch\.(rand|randn|randint|randperm|normal|multinomial|bernoulli)(_like)?$|(numpy\.random|random)\.(?!(seed|setstate|set_state|"
    r"Random|SystemRandom|default_rng|Generator|RandomState|SeedSequence|getstate|get_state)$)[a-z]\w*$|torch\.nn\.init\.\w+_$"
)
_LAYER = re.compile(
    r"torch\.nn\.(Linear|Bilinear|Conv\w+|Embedding(Bag)?|LSTM|GRU|RNN|\w+Cell|MultiheadAttention|Transformer\w*)$"
)


def side_effects(folder: Folder) -> Iterator[Finding]:
    """Changes of the process on import, on construction of a model, and on calls."""
    own = {node.name for reader in readers(folder) for node, _ in reader.nodes if isinstance(node, ast.ClassDef)}
    for reader in readers(folder):
        if reader.live:
            yield from _settings(reader)
            yield from assignments(reader)
            yield from given_to_patchers(reader)
            yield from _threads(reader)
            yield from _inputs_changed(reader)
            yield from _work(reader, own)


def _settings(reader: Reader) -> Iterator[Finding]:
    for call, names, inside in reader.calls:
        if isinstance(call, ast.Call) and (name := _replaced_kernel(reader, call, names)):
            does = f"replaces an operator of torch for the whole process, by {name}"
            yield effect(reader, call, inside, does, "define an operator under a namespace of its own")
        known = next(((name, e) for name in sorted(names) for e in _EFFECTS if e[0].match(name)), None)
        if isinstance(call, ast.Call) and known and not _undone(reader, call, known[0]):
            name, (_, does, remedy) = known
            yield effect(reader, call, inside, f"{does}, by {name}", remedy)
        elif isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute):
            yield from _methods(reader, call, inside)
    for (
        node,
        inside,
    ) in reader.nodes:  # decorators are calls too, such as @atexit.register, but not all change something
        for decorator in getattr(node, "decorator_list", []):
            for name in reader.meanings.names(decorator) if not isinstance(decorator, ast.Call) else ():
                for pattern, does, remedy in _EFFECTS:
                    if pattern.match(name) and not _SCOPED.match(name):
                        yield effect(reader, decorator, inside, f"{does}, by {name}", remedy)


def _replaced_kernel(reader: Reader, call: ast.Call, names: frozenset[str]) -> str:
    """The function of torch.library that replaces one of torch's own operators; "" if none does."""
    first = reader.meanings.text(call.args[0]) if call.args else None
    if first is None or not re.match(r"(aten|prim|prims|quantized)(::|$)", first):
        return ""
    return next((n for n in sorted(names) if re.match(r"torch\.library\.(impl|Library|register_\w+)$", n)), "")


def _methods(reader: Reader, call: ast.Call, inside: str) -> Iterator[Finding]:
    """Calls of methods on the result of a call: `torch.no_grad().__enter__()`, `getLogger().setLevel()`."""
    assert isinstance(call.func, ast.Attribute)
    of, method = call.func.value, call.func.attr
    if method == "enter_context":
        yield from _entered(reader, call, inside)
    sources = [of, *reader.meanings.values.get(of.id, ())[:4]] if isinstance(of, ast.Name) else [of]
    for source in sources:
        if not isinstance(source, ast.Call):
            continue
        made = reader.meanings.names(source.func)
        if method == "__enter__" and (mode := next((n for n in sorted(made) if _MODES.match(n)), "")):
            does = f"switches {mode} on for the whole process, by __enter__"
            yield effect(reader, call, inside, does, f"use `with {mode}(…):` around what needs it")
        elif method == "__enter__" and any(
            re.match(r"torch\.(\w+\.)*(no_grad|inference_mode|set_grad_enabled)$", n) for n in made
        ):
            remedy = "use `with torch.no_grad():` around what needs it"
            yield effect(
                reader, call, inside, "switches gradients on or off for the whole process, by __enter__", remedy
            )
        elif method == "start" and any(re.match(r"unittest\.mock\.patch", n) for n in made):
            target = reader.meanings.text(source.args[0]) if source.args else None
            does = f"replaces {target or 'an attribute of another module'} for the whole process, by mock.patch"
            yield effect(reader, call, inside, does, "derive a class of your own instead of changing another's")
        elif method in ("setLevel", "addHandler", "removeHandler", "addFilter") and any(
            re.match(r"logging\.getLogger$|transformers\.(\w+\.)*get_logger$", name) for name in made
        ):
            given = source.args[0] if source.args else None
            if given is None or isinstance(constant(given), str):
                remedy = "leave the levels of other loggers to the caller"
                yield effect(reader, call, inside, f"changes another logger, by {method}", remedy)


def _entered(reader: Reader, call: ast.Call, inside: str) -> Iterator[Finding]:
    """`stack.enter_context(torch.no_grad())` on a stack without a `with`."""
    assert isinstance(call.func, ast.Attribute)
    of, first = call.func.value, call.args[0] if call.args else None
    if not isinstance(first, ast.Call) or not isinstance(of, ast.Name):
        return
    closed = {
        ast.unparse(item.optional_vars)
        for node, _ in reader.nodes
        if isinstance(node, ast.With)
        for item in node.items
        if item.optional_vars is not None
    }
    made = reader.meanings.names(first.func)
    mode = next(
        (n for n in sorted(made) if _MODES.match(n) or re.match(r"torch\.(\w+\.)*(no_grad|inference_mode)$", n)), ""
    )
    if mode and of.id not in closed:
        does = f"switches {mode} on for the whole process, by enter_context"
        yield effect(reader, call, inside, does, f"use `with {mode}(…):` around what needs it")


def _undone(reader: Reader, call: ast.Call, name: str) -> bool:
    """Whether a `with` around the call undoes its effect, or the call itself is the context manager."""
    node: ast.AST | None = call
    while node is not None:
        parent = reader.parent(node)
        if isinstance(parent, ast.withitem) and node is call and _SCOPED.match(name):
            return True
        if isinstance(parent, (ast.With, ast.AsyncWith)) and not isinstance(node, ast.withitem):
            for item in parent.items:
                guard = item.context_expr
                for made in reader.meanings.names(guard.func if isinstance(guard, ast.Call) else guard):
                    if _GUARDS.search(made):
                        return True
        if isinstance(parent, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) and node in parent.decorator_list:
            return node is call and bool(_SCOPED.match(name))
        node = parent if not isinstance(parent, (ast.FunctionDef, ast.AsyncFunctionDef)) else None
    return False


_THREADS = re.compile(r"threading\.(Thread|Timer)$|multiprocessing\.(\w+\.)*\w*Process$")


def _threads(reader: Reader) -> Iterator[Finding]:
    for node, inside in reader.nodes:
        if not isinstance(node, ast.ClassDef):
            continue
        for base in node.bases:
            if name := next((n for n in sorted(reader.meanings.names(base)) if _THREADS.match(n)), ""):
                does = f"has a class of threads or processes of its own, {node.name}, derived from {name}"
                yield effect(reader, node, inside, does, "remove it: a model does not need threads")


_INPUTS = {"input_ids", "attention_mask", "position_ids", "token_type_ids", "labels", "pixel_values", "input_features"}


def _inputs_changed(reader: Reader) -> Iterator[Finding]:
    """Statements of `forward` that modify the caller's tensors or the model."""
    for node, _ in reader.nodes:
        if not isinstance(node, ast.FunctionDef) or node.name != "forward":
            continue
        own = {n.id for n in walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
        given = {a.arg for a in [*node.args.args, *node.args.kwonlyargs]} & _INPUTS - own
        remedy = "clone it first, or write the result to a tensor of its own"
        for step in walk(node):
            if isinstance(step, ast.Call) and isinstance(step.func, ast.Attribute):
                of, method = step.func.value, step.func.attr
                in_place = bool(re.search(r"[a-z]_$", method)) and method != "requires_grad_"
                if in_place and isinstance(of, ast.Name) and of.id in given:
                    yield effect(
                        reader, step, "forward", f"changes its caller's {of.id}, by {method}", remedy, "warning"
                    )
                elif method == "train" and isinstance(of, ast.Name) and of.id == "self":
                    does = "switches the model between training and evaluation, by self.train"
                    yield effect(reader, step, "forward", does, "leave the mode to the caller", "warning")
            elif (
                isinstance(step, ast.Subscript)
                and isinstance(step.ctx, ast.Store)
                and getattr(step.value, "id", "") in given
            ):
                does = f"changes its caller's {ast.unparse(step.value)}, by an assignment to a part of it"
                yield effect(reader, step, "forward", does, remedy, "warning")


def _work(reader: Reader, own: set[str]) -> Iterator[Finding]:
    """What a file does on import, besides definitions."""
    remedy = "keep only definitions at the top level of the file"
    for node, inside in reader.nodes:
        if not reader.runs_at_import(inside):
            continue
        if isinstance(node, ast.While) and isinstance(node.test, ast.Constant) and node.test.value:
            yield effect(reader, node, inside, "runs a loop with no visible end", remedy)
        if not isinstance(node, ast.Call):
            continue
        names, method = reader.meanings.names(node.func), getattr(node.func, "attr", "")
        name = min((n for n in names if _WORK.match(n)), default="")
        made = isinstance(node.func, ast.Name) and node.func.id in own and _is_model(reader, node.func.id)
        layer = min((n for n in names if _LAYER.match(n)), default="")
        drawn = min((n for n in names if _RANDOM.match(n)), default="")
        if (
            name
            or made
            or layer
            or (method in _WORK_METHODS and not any(n.startswith(("itertools", "time")) for n in names))
        ):
            yield effect(reader, node, inside, f"does work: {ast.unparse(node.func)[:60]}()", remedy)
        elif drawn:
            yield effect(reader, node, inside, f"draws random numbers, by {drawn}", remedy)
        elif names & {"builtins.print"}:
            yield effect(reader, node, inside, "prints", "use logging.get_logger(__name__)", "warning")
        elif names & {"builtins.open", "io.open", "json.load", "torch.load"} and "builtins.open" in names:
            yield effect(
                reader, node, inside, "opens a file", "open it where a model is made, from its folder", "warning"
            )


def _is_model(reader: Reader, name: str) -> bool:
    for node, _ in reader.nodes:
        if isinstance(node, ast.ClassDef) and node.name == name:
            bases = {reader.file.dotted(base).rpartition(".")[2] for base in node.bases}
            return any(re.search(r"(Module|Model|For[A-Z]\w+)$", base) for base in bases)
    return re.search(r"(Model|For[A-Z]\w+)$", name) is not None


CHECKS = {"side effects": side_effects}
