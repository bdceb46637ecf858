"""Read a pickle without running its code: plain data and tensors are created, objects of other classes are not.

Such an object becomes an `Unopened` with the name of the class and the pickled data. No class is imported, and no
function that the file names is called. `torch.load(weights_only=True)` refuses such files entirely.
"""

import _compat_pickle
import argparse
import codecs
import collections
import datetime
import decimal
import io
import pathlib
import pickle
import struct
import sys
import types
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from .checkpoint import CheckpointError
from .pickle_bounds import BoundedReader, dtype_state

# Types that training scripts save besides weights: plain data, which runs no code when unpickled.
_NUMPY: list[Any] = [np.zeros(1).__reduce__()[0], np.float64(1).__reduce__()[0]]
PLAIN_TYPES: list[Any] = [
    argparse.Namespace,
    types.SimpleNamespace,
    *(
        (getattr(pathlib, f"Pure{kind}"), f"{module}.{pure}{kind}")
        for kind in ("PosixPath", "WindowsPath")
        for pure in ("", "Pure")
        for module in ("pathlib", "pathlib._local")  # the latter is Python 3.13's
    ),
    np.ndarray,
    np.dtype,
    *(type(np.dtype(code)) for code in "?bhilqBHILQefdgSU"),
    *((f, f"numpy.{core}.multiarray.{f.__name__}") for f in _NUMPY for core in ("core", "_core")),
]


FIELDS = (argparse.Namespace, types.SimpleNamespace)
_UINT64 = struct.Struct("<Q")


# None of these is ever called. A file that names `os.system` is refused, and not read like a file of weights.
_STDLIB = set(sys.stdlib_module_names)
_UNSAFE_BUILTINS = {
    "eval",
    "exec",
    "execfile",
    "compile",
    "open",
    "file",
    "input",
    "breakpoint",
    "apply",
    "reload",
    "__import__",
}
_UNSAFE_BUILTINS |= {"setattr", "delattr", "globals", "locals", "vars", "memoryview"}
_SAFE_STDLIB = {
    *(
        "abc",
        "array",
        "bisect",
        "calendar",
        "cmath",
        "collections",
        "contextlib",
        "copy",
        "copyreg",
        "dataclasses",
        "datetime",
        "decimal",
    ),
    *("enum", "fractions", "functools", "heapq", "ipaddress", "itertools", "logging", "math", "numbers", "operator"),
    *("queue", "random", "re", "statistics", "string", "time", "types", "typing", "uuid", "zoneinfo"),
}


class UnsafeGlobal(pickle.UnpicklingError):
    """A pickle names a function of the standard library, such as `os.system`; the message is that name."""


class Unopened:
    """An object whose class was not imported.

    Attributes:
        qualified: the class or function that the pickle names, `module.name`.
        args: the arguments of that class or function.
        state, items, elements: the pickled attributes, dict items and list elements.
    """

    qualified = "?"
    dump_patches = False  # read by torch's reader of the file format before 1.6

    def __init__(self, *args: Any, **kwargs: Any):
        self.args = (*args, *kwargs.values())
        self.state: Any = None
        self.items: list[tuple[Any, Any]] = []
        self.elements: list[Any] = []

    def contents(self) -> Iterator[Any]:
        """All pickled data of this object."""
        yield from (self.args, self.state, self.elements)
        yield dict(enumerate(value for pair in self.items for value in pair))

    def __setitem__(self, key: Any, value: Any) -> None:
        self.items.append((key, value))

    def append(self, value: Any) -> None:
        self.elements.append(value)

    def extend(self, values: Any) -> None:
        self.elements.extend(values)

    def __repr__(self) -> str:
        return self._repr_within(0)

    def _repr_within(self, depth: int) -> str:
        """Its class and first contents, to a limited depth, as it may contain itself; tensors are not read."""
        states = self.state if isinstance(self.state, tuple) else (self.state,)  # a tuple if there are slots
        fields = [field for state in states if isinstance(state, dict) for field in state.items()]
        if depth > 2:
            return f"{self.qualified}(…)"
        parts = [_repr_within(value, depth) for value in (*self.args, *self.elements)[:_REPR_ITEMS]]
        parts += [f"{key}={_repr_within(value, depth)}" for key, value in fields[:_REPR_ITEMS]]
        more = ["…"] if max(len(self.args) + len(self.elements), len(fields)) > _REPR_ITEMS else []
        return f"{self.qualified}({', '.join(parts + more)})"


_REPR_ITEMS = 12  # most attributes of an object that its repr shows


def _repr_within(value: Any, depth: int) -> str:
    if isinstance(value, torch.Tensor):
        return f"tensor {tuple(value.shape)}"
    if isinstance(value, Unopened):
        return value._repr_within(depth + 1)
    if isinstance(value, (dict, list, tuple, set, collections.deque)) and (len(value) > _REPR_ITEMS or depth > 1):
        return f"{type(value).__name__} of {len(value)}"
    if isinstance(value, dict):
        inner = [f"{_repr_within(key, depth + 1)}: {_repr_within(item, depth + 1)}" for key, item in value.items()]
        return f"{{{', '.join(inner)}}}"
    if isinstance(value, (list, tuple)):
        inner = [_repr_within(item, depth + 1) for item in value]
        return f"[{', '.join(inner)}]" if isinstance(value, list) else f"({', '.join(inner)}{',' * (len(inner) == 1)})"
    return repr(value)


class UnopenedTensor(Unopened):
    """A tensor of a subclass, such as a quantised one, whose values need the code of that class."""


def find_unopened(node: Any) -> Iterator[Unopened]:
    """Every `Unopened` in a nested object, each once."""
    seen: set[int] = set()
    waiting = [node]
    while waiting:
        value = waiting.pop()
        if id(value) in seen or not isinstance(value, (dict, list, tuple, set, collections.deque, Unopened, *FIELDS)):
            continue
        seen.add(id(value))
        if isinstance(value, Unopened):
            yield value
            waiting += value.contents()
        elif isinstance(value, dict):
            waiting += [*value.keys(), *value.values()]
        else:
            waiting += vars(value).values() if isinstance(value, FIELDS) else value


def _encode(text: str, encoding: str = "latin1") -> bytes:
    """`codecs.encode`, by which protocol 2 writes bytes; another encoding would import a module."""
    if encoding not in ("latin1", "latin-1"):
        raise pickle.UnpicklingError(f"it needs the encoding {encoding!r}")
    return codecs.encode(text, "latin1")


def _bytes(data: Any = b"", encoding: str = "latin1") -> bytes:
    """`bytes`, except of a number, which would allocate any amount of memory."""
    return _encode(data, encoding) if isinstance(data, str) else bytes(list(data))


def _defaultdict(factory: Any = None, *rest: Any) -> collections.defaultdict:
    return collections.defaultdict(factory if factory in _BUILTINS.values() else None, *rest)


def _reconstructor(cls: Any, base: Any, state: Any) -> Any:
    """`copyreg._reconstructor`, by which protocols 0 and 1 create objects."""
    return cls() if base is object or state is None else cls(state)


def _getattr(owner: Any, name: str) -> Any:
    """`getattr`, by which pickle writes methods, and protocol 2 nested classes; for unopened objects only."""
    if not isinstance(name, str) or not (
        isinstance(owner, Unopened) or (isinstance(owner, type) and issubclass(owner, Unopened))
    ):
        raise UnsafeGlobal("builtins.getattr")
    return _stand_in_class(f"{owner.qualified}.{name}")


def _stand_in_class(qualified: str) -> type["Unopened"]:
    """A subclass of `Unopened` in place of the class of this name."""
    return type(qualified.rpartition(".")[2], (Unopened,), {"qualified": qualified})


def _newobj(cls: Any, *args: Any) -> Any:
    return cls(*args)


def _from_type(func: Any, new_type: Any, args: tuple, state: Any) -> Any:
    """`torch._tensor._rebuild_from_type_v2`: a tensor of a subclass, or with attributes."""
    made = func(*args)
    if isinstance(made, UnopenedTensor):
        made.state = state
    elif new_type not in (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer):
        tensor = made
        made = UnopenedTensor(tensor)
        made.qualified = getattr(new_type, "qualified", new_type.__name__)
        made.state = state
    return made


def _parameter(data: Any, requires_grad: bool, *hooks_and_state: Any) -> Any:
    return data if isinstance(data, Unopened) else torch.nn.Parameter(data, requires_grad)


def _wrapper(cls: Any, *args: Any) -> Unopened:
    made = UnopenedTensor(*args)
    made.qualified = getattr(cls, "qualified", getattr(cls, "__name__", "?"))
    return made


def _frombuffer(data: Any, dtype: np.dtype, shape: tuple[int, ...], order: str, axes: Any = None) -> np.ndarray:
    """NumPy's `_frombuffer`, by which protocol 5 creates arrays; it copies, as torch needs writable memory."""
    array = np.frombuffer(bytearray(data), dtype)
    if order == "K" and axes is not None:
        return array.reshape(shape).transpose(axes)
    return array.reshape(shape, order=order)  # type: ignore[call-overload]


_BUILTINS: dict[str, Any] = {
    f"builtins.{made.__name__}": made
    for made in (
        bytearray,
        list,
        dict,
        tuple,
        set,
        frozenset,
        int,
        float,
        str,
        bool,
        bytes,
        complex,
        range,
        slice,
        object,
    )
}


def _known_globals() -> dict[str, Any]:
    known: dict[str, Any] = dict(_ALLOWED_BY_TORCH()) | _BUILTINS
    for entry in PLAIN_TYPES:
        plain, name = entry if isinstance(entry, tuple) else (entry, f"{entry.__module__}.{entry.__name__}")
        known[name] = plain
    known |= {
        f"{made.__module__}.{made.__qualname__}": made
        for made in (
            collections.deque,
            decimal.Decimal,
            datetime.datetime,
            datetime.date,
            datetime.time,
            datetime.timedelta,
            datetime.timezone,
        )
    }
    try:
        import ml_dtypes
    except ImportError:
        pass
    else:
        kinds = [kind for kind in vars(ml_dtypes).values() if isinstance(kind, type) and issubclass(kind, np.generic)]
        known |= {f"ml_dtypes.{kind.__name__}": kind for kind in kinds}
    known |= {f"numpy.{core}.numeric._frombuffer": _frombuffer for core in ("core", "_core")}
    return known | {
        "_codecs.encode": _encode,
        "collections.defaultdict": _defaultdict,
        "builtins.getattr": _getattr,
        "builtins.bytes": _bytes,
        "builtins.bytearray": lambda *args: bytearray(_bytes(*args)),
        "copyreg._reconstructor": _reconstructor,
        "copyreg.__newobj__": _newobj,
        "torch._tensor._rebuild_from_type_v2": _from_type,
        "torch._utils._rebuild_wrapper_subclass": _wrapper,
        "torch._utils._rebuild_parameter": _parameter,
        "torch._utils._rebuild_parameter_with_state": _parameter,
        "torch.storage._load_from_bytes": _storage_from_bytes,
    }


_ALLOWED_BY_TORCH = torch._weights_only_unpickler._get_allowed_globals


def _storage_from_bytes(data: bytes) -> Any:
    """A storage in a pickle that was not written by `torch.save`: it contains a file of `torch.save`."""
    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


class PlainUnpickler(pickle._Unpickler):  # type: ignore[name-defined, misc]
    """Creates plain data and tensors; any other class or function that the pickle names becomes an `Unopened`."""

    dispatch = dict(pickle._Unpickler.dispatch)  # type: ignore[attr-defined]

    def __init__(self, file: Any, **options: Any):
        super().__init__(BoundedReader(file), **options)
        self.known = _known_globals()
        self.callable = {id(made) for made in self.known.values()}
        self.stand_ins: dict[str, type[Unopened]] = {}

    def find_class(self, module: str, name: str) -> Any:
        module, name = _compat_pickle.NAME_MAPPING.get(
            (module, name), (module, name)
        )  # Python 2 names, which protocols
        module = _compat_pickle.IMPORT_MAPPING.get(module, module)  # 0 to 2 use
        full = f"{module}.{name}"
        if full in self.known:
            return self.known[full]
        if name in _UNSAFE_BUILTINS if module == "builtins" else module.split(".")[0] in _STDLIB - _SAFE_STDLIB:
            raise UnsafeGlobal(full)
        return self.stand_ins.setdefault(full, _stand_in_class(full))

    def get_extension(self, code: int) -> None:
        raise pickle.UnpicklingError("it names a class by a code of the extension registry")

    def _may_call(self, made: Any) -> bool:
        return id(made) in self.callable or (isinstance(made, type) and issubclass(made, Unopened))

    def _make(self, made: Any, args: tuple, options: dict[str, Any] | None = None) -> Any:
        """Call `made` if it is allowed; an `Unopened` gives another `Unopened`."""
        if isinstance(made, Unopened):  # such as a bound method of an unopened object
            result = Unopened(*args)
            result.qualified = made.qualified
            return result
        if not self._may_call(made):
            raise pickle.UnpicklingError(f"it calls {made!r}, which does not create plain data")
        return made(*args, **(options or {}))

    def load_reduce(self) -> None:
        args = self.stack.pop()  # type: ignore[attr-defined]
        self.stack[-1] = self._make(self.stack[-1], args)  # type: ignore[attr-defined]

    def load_newobj(self) -> None:
        args = self.stack.pop()  # type: ignore[attr-defined]
        self.stack[-1] = self._make(self.stack[-1], args)  # type: ignore[attr-defined]

    def load_newobj_ex(self) -> None:
        options, args = self.stack.pop(), self.stack.pop()  # type: ignore[attr-defined]
        self.stack[-1] = self._make(self.stack[-1], args, options)  # type: ignore[attr-defined]

    def _instantiate(self, klass: Any, args: Any) -> None:
        self.append(self._make(klass, tuple(args)))  # type: ignore[attr-defined]

    def load_build(self) -> None:
        made = self.stack[-2]  # type: ignore[attr-defined]
        if isinstance(made, Unopened):
            made.state = self.stack.pop()  # type: ignore[attr-defined]
        elif callable(made) or not isinstance(made, _MAY_SET_STATE):
            raise pickle.UnpicklingError(f"it sets attributes of a {type(made).__name__}")
        elif isinstance(made, dict):
            vars(made).update(self.stack.pop()) if hasattr(made, "__dict__") else self.stack.pop()  # type: ignore[attr-defined]
        else:
            if isinstance(made, np.dtype):
                self.stack[-1] = dtype_state(made, self.stack[-1])  # type: ignore[attr-defined]
            super().load_build()  # type: ignore[misc]

    def load_persid(self) -> None:
        raise CheckpointError(
            "it was saved with pickle protocol 0, which torch cannot read: save it with a newer protocol"
        )

    def load_bytearray8(self) -> None:
        (length,) = _UINT64.unpack(self.read(8))  # type: ignore[attr-defined]
        self.append(bytearray(self.read(length)))  # type: ignore[attr-defined]

    dispatch[pickle.REDUCE[0]] = load_reduce  # type: ignore[assignment]
    dispatch[pickle.NEWOBJ[0]] = load_newobj  # type: ignore[assignment]
    dispatch[pickle.NEWOBJ_EX[0]] = load_newobj_ex  # type: ignore[assignment]
    dispatch[pickle.BUILD[0]] = load_build  # type: ignore[assignment]
    dispatch[pickle.PERSID[0]] = load_persid  # type: ignore[assignment]
    dispatch[pickle.BYTEARRAY8[0]] = load_bytearray8  # type: ignore[assignment]


_MAY_SET_STATE = (torch.Tensor, dict, np.ndarray, np.dtype, *FIELDS)


def load(file: Any, **options: Any) -> Any:
    """`pickle.load` of plain data."""
    return PlainUnpickler(file, **options).load()


Unpickler = PlainUnpickler  # with `load`, the interface that torch.load needs of a `pickle_module`
