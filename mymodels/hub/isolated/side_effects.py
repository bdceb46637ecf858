"""Stage: what importing the folder's code, loading the model and its first forward change in the process.

Settings, the environment, random seeds, and the classes, functions and registries of other packages are compared
before and after. Drawing random numbers is allowed; seeding a generator is reported.
"""

import ast
import atexit
import builtins
import contextlib
import gc
import importlib
import io
import json
import locale
import logging
import os
import random
import signal
import socket
import sys
import threading
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import numpy
import torch
import transformers

from .comparing import run_model
from .generating import generate
from .inputs import NoSuitableInputs, generates, kept_inputs, make_inputs
from .load_repo import load
from .processors import processed_inputs, processor_names

SEED = 0x5EED_0F_7E57  # unlikely to be set by other code
MAX_LISTED = 12
BLOCKS = 2000  # of 624 numbers each: the most draws that are distinguished from seeding
_PACKAGES = ("torch", "transformers", "numpy", "accelerate", "tokenizers", "safetensors", "huggingface_hub")


def run(job: dict[str, Any], events: Any) -> None:
    """Report by name what has changed."""
    name = job["classes"][0]
    import_what_the_code_imports(Path(job["folder"]))
    transformers.dynamic_module_utils.init_hf_modules()  # adds its module cache to sys.path
    with events.check("side effects", "import and load") as check:
        seeds, before, foreign = set_probe_seeds(), snapshot(), library_objects()
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            model, _ = load(job, name, seed=None)
        found = changed_settings(before, snapshot()) + reseeded_generators(seeds) + replaced_objects(foreign)
        report(check, found, printed.getvalue(), "importing the code and loading the model")
    if check.failed:
        return
    with events.check("side effects", "forward") as check:
        try:
            inputs = kept_inputs(job) or make_inputs(model)
        except NoSuitableInputs as error:
            check.skip(str(error))
            return
        observe(check, lambda: run_model(model, inputs), "the first forward")
    if check.status != "ok":
        return
    with events.check("side effects", "training and generation") as check:
        observe(check, lambda: _train_and_generate(model, inputs), "a forward in train mode, or generate,")
    if not check.failed and _own_processor(job):
        with events.check("side effects", "processor") as check:
            observe(check, lambda: processed_inputs(job), "the processor")


def observe(check: Any, call: Callable[[], Any], moment: str) -> None:
    """Report what a call changes in the process; an error of the call itself is left to its own check."""
    seeds, before, foreign = set_probe_seeds(), snapshot(), library_objects()
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        try:
            call()
        except Exception as error:
            check.skip(f"not checked, because {moment.rstrip(',')} raises {type(error).__name__}")
            return
    found = changed_settings(before, snapshot()) + reseeded_generators(seeds) + replaced_objects(foreign)
    report(check, found, printed.getvalue(), moment)


def _train_and_generate(model: Any, inputs: dict[str, torch.Tensor]) -> None:
    """A forward in train mode and a short generation; their errors are reported by other checks."""
    with contextlib.suppress(Exception):
        model.train()(**inputs)
    model.eval()
    if generates(model):
        with contextlib.suppress(Exception):
            generate(model, inputs, max_new_tokens=2, min_new_tokens=2)


def _own_processor(job: dict[str, Any]) -> bool:
    """Whether the folder has code of a processor; side effects of a library's processor are not the folder's."""
    own = set(job["companions"])
    for file in ("preprocessor_config.json", "processor_config.json"):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            own |= set(json.loads(Path(job["folder"], file).read_text(encoding="utf-8")).get("auto_map", {}))
    return any(name in own for name in processor_names(job))


def report(check: Any, found: list[str], printed: str, moment: str) -> None:
    if found:
        more = f", and {len(found) - MAX_LISTED} more" if len(found) > MAX_LISTED else ""
        check.fail(f"{moment} changes the process: {'; '.join(found[:MAX_LISTED])}{more}")
    elif printed.strip():
        check.warn(f"{moment} prints {printed.strip().splitlines()[0][:80]!r}")


def import_what_the_code_imports(folder: Path) -> None:
    """Import the packages that the folder's code imports; their own side effects are not the folder's."""
    for file in sorted(folder.rglob("*.py")):
        with contextlib.suppress(SyntaxError, ValueError, OSError, RecursionError):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                names += [str(node.module)] if isinstance(node, ast.ImportFrom) and not node.level else []
                for name in names:
                    if name.partition(".")[0] != "transformers_modules" and name not in sys.modules:
                        with contextlib.suppress(Exception):
                            importlib.import_module(name)


def snapshot() -> dict[str, Any]:
    """Name → value of the process's settings, for comparison."""
    backends = torch.backends
    state: dict[str, Any] = {
        "torch's default dtype": torch.get_default_dtype(),
        "torch's default device": str(torch.get_default_device()),
        "gradients (torch.is_grad_enabled)": torch.is_grad_enabled(),
        "torch's inference mode": torch.is_inference_mode_enabled(),
        "torch's anomaly mode": torch.is_anomaly_enabled(),
        "torch's deterministic algorithms": (
            torch.are_deterministic_algorithms_enabled(),
            torch.get_deterministic_debug_mode(),
        ),
        "torch's float32 matmul precision": torch.get_float32_matmul_precision(),
        "torch's number of threads": torch.get_num_threads(),
        "torch's printing options": str(vars(torch._tensor_str.PRINT_OPTS)),
        "NumPy's error handling": numpy.geterr(),
        "NumPy's printing options": str(numpy.get_printoptions()),
        "the working directory": _cwd(),
        "sys.path": list(sys.path),
        "sys.argv": list(sys.argv),
        "sys.meta_path": list(map(id, sys.meta_path)),
        "sys.path_hooks": list(map(id, sys.path_hooks)),
        "sys.excepthook": id(sys.excepthook),
        "sys.stdin": id(sys.stdin),
        "sys.stderr": id(sys.stderr),
        "the recursion limit": sys.getrecursionlimit(),
        "the trace or profile function": (id(sys.gettrace()), id(sys.getprofile())),
        "functions that run at the end of the process": atexit._ncallbacks(),
        "warnings filters": [repr(entry) for entry in warnings.filters],
        "warnings.showwarning": id(warnings.showwarning),
        "the root logger": (
            logging.root.level,
            [type(h).__name__ for h in logging.root.handlers],
            logging.root.manager.disable,
        ),
        "the level of transformers' logger": transformers.utils.logging.get_verbosity(),
        "the garbage collector": (gc.isenabled(), gc.get_threshold()),
        "the locale": locale.setlocale(locale.LC_ALL),
        "the default timeout of sockets": socket.getdefaulttimeout(),
        "threads": _threads(),
        "child processes": _children(),
        "the start method of processes": __import__("multiprocessing").get_start_method(allow_none=True),
        "umask": _umask(),
    }
    state |= {f"the environment variable {name}": value for name, value in os.environ.items()}
    state |= {
        f"the handler of {s.name}": repr(signal.getsignal(s)) for s in signal.valid_signals() if hasattr(s, "name")
    }
    for path in (
        "cudnn.enabled", "cudnn.benchmark", "cudnn.deterministic", "cudnn.allow_tf32", "cuda.matmul.allow_tf32",
        "cuda.matmul.allow_fp16_reduced_precision_reduction", "cuda.matmul.allow_bf16_reduced_precision_reduction",
        "mkldnn.enabled", "mkldnn.deterministic", "mkldnn.allow_tf32", "opt_einsum.enabled",
    ):  # fmt: skip
        with contextlib.suppress(Exception):
            value: Any = backends
            for part in path.split("."):
                value = getattr(value, part)
            state[f"torch.backends.{path}"] = value
    for kind in ("flash", "math", "mem_efficient", "cudnn"):
        with contextlib.suppress(Exception):
            state[f"{kind} attention (torch.backends.cuda)"] = getattr(backends.cuda, f"{kind}_sdp_enabled")()
    return state


def _cwd() -> str:
    with contextlib.suppress(OSError):
        return os.getcwd()
    return "one that no longer exists"


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _threads() -> list[str]:
    """Names of the threads, without those of thread pools and progress bars, which loading starts."""
    names = [thread.name for thread in threading.enumerate()]
    return sorted(name for name in names if not name.startswith(("ThreadPoolExecutor", "tqdm", "asyncio")))


def _children() -> list[str]:
    with contextlib.suppress(OSError):
        return Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    return []


_PLAIN = (bool, int, float, str, torch.dtype)


def changed_settings(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """The names of the settings that changed, short values included; values of environment variables are omitted."""
    found = []
    for name in before.keys() | after.keys():
        old, new = before.get(name), after.get(name)
        if old == new:
            continue
        plain = isinstance(old, _PLAIN) and isinstance(new, _PLAIN) and "environment" not in name
        short = plain and not name.startswith(("sys.", "warnings.", "torch's printing", "NumPy's printing"))
        found.append(f"{name} ({str(old)[:60]} became {str(new)[:60]})" if short else name)
    return sorted(found)


# ---- random seeds


def set_probe_seeds() -> tuple[Any, Any]:
    """Seed all generators with `SEED`; returns the states of Python's and NumPy's."""
    torch.manual_seed(SEED)
    random.seed(SEED)
    numpy.random.seed(SEED % 2**32)
    return random.getstate(), numpy.random.get_state()


def reseeded_generators(states: tuple[Any, Any]) -> list[str]:
    """The generators whose state cannot be reached from the earlier one by drawing numbers."""
    found = []
    if torch.initial_seed() != SEED:
        found.append(f"torch's random seed (set to {torch.initial_seed()})")
    python, array = states
    numbers: Any = numpy.random.get_state()
    if not _reached_by_drawing(python[1][:-1], random.getstate()[1][:-1]):
        found.append("the random seed of Python's random")
    if not _reached_by_drawing(tuple(array[1].tolist()), tuple(numbers[1].tolist())):
        found.append("NumPy's random seed")
    return found


def _reached_by_drawing(before: tuple[int, ...], after: tuple[int, ...]) -> bool:
    """Whether drawing numbers takes a Mersenne Twister from one state to the other."""
    if before == after:
        return True
    other = random.Random()
    other.setstate((3, (*before, 624), None))
    for _ in range(BLOCKS):
        other.getrandbits(32)  # the first draw computes a block of 624 numbers
        state = other.getstate()[1]
        if state[:-1] == after:
            return True
        other.setstate((3, (*state[:-1], 624), None))
    return False


# ---- classes, functions and registries of other packages


def library_objects() -> dict[str, tuple[Any, dict[str, Any]]]:
    """Functions and classes of each module and class of the libraries, and the entries of transformers' registries."""
    found: dict[str, tuple[Any, dict[str, Any]]] = {}
    kinds: dict[type, bool] = {}  # made anew each time: the code may have changed a class
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] in _PACKAGES and isinstance(module, ModuleType):
            held = dict(vars(module))
            found[name] = (module, _callables(held, kinds))
            for key, value in held.items():
                if issubclass(type(value), type) and value.__module__ == name:
                    found[f"{name}.{key}"] = (value, _callables(dict(vars(value)), kinds))
                elif name.startswith("transformers.") and (table := _table(value)):
                    found[f"{name}.{key}[]"] = (value, table)
    found["builtins"] = (builtins, _callables(dict(vars(builtins)), kinds))
    return found


def _callables(held: Mapping[str, Any], callable_types: dict[type, bool]) -> dict[str, Any]:
    """The functions, classes and other callables in `held`; `callable_types` remembers the answer for each type."""
    found = {}
    for key, value in held.items():
        kind = type(value)
        if kind not in callable_types:
            callable_types[kind] = _is_callable(kind)
        if callable_types[kind]:
            found[key] = value
    return found


_KINDS = (FunctionType, type, classmethod, staticmethod, property, ModuleType)


def _is_callable(kind: type) -> bool:
    return issubclass(kind, _KINDS) or any(
        "__call__" in vars(base) for base in kind.__mro__
    )  # `callable` would trigger the warnings of lazy attributes


def _table(value: Any) -> dict[str, Any]:
    """The entries of a registry of functions or classes, such as `ALL_ATTENTION_FUNCTIONS` and `ACT2FN`."""
    inner = getattr(value, "_global_mapping", None) if not isinstance(value, dict) else value
    if not isinstance(inner, dict) or len(inner) > 5000:
        return {}
    return {
        key: entry
        for key, entry in dict.items(inner)
        if isinstance(key, str) and (callable(entry) or isinstance(entry, tuple))
    }


def replaced_objects(before: dict[str, tuple[Any, dict[str, Any]]]) -> list[str]:
    """The functions, classes and registry entries of other packages that were replaced, and methods that were added."""
    found = []
    for name, (owner, old) in before.items():
        now = sys.modules.get(name)
        if isinstance(owner, ModuleType) and getattr(now, "__file__", None) != getattr(owner, "__file__", None):
            found.append(f"sys.modules[{name!r}] was replaced")
        new: dict[str, Any] = _table(owner) if name.endswith("[]") else dict(vars(owner))
        for key, value in old.items():
            if new.get(key) is not value and not (
                isinstance(value, ModuleType) and isinstance(new.get(key), ModuleType)
            ):
                place = f"{name.removesuffix('[]')}[{key!r}]" if name.endswith("[]") else f"{name}.{key}"
                found.append(f"{place} was replaced{_origin(new.get(key))}")
        if isinstance(owner, type) and not name.endswith("[]"):
            added = [key for key, value in new.items() if key not in old and _origin(value)]
            found += [f"{name}.{key} was added{_origin(new[key])}" for key in added]
    return found


def _origin(value: Any) -> str:
    """File and line of a function of the folder's code, in parentheses; empty for other functions."""
    code = getattr(getattr(value, "__func__", value), "__code__", None)
    if code is not None and "transformers_modules" in code.co_filename:
        return f" ({Path(code.co_filename).name}:{code.co_firstlineno})"
    return ""
