"""Checks of initialisation: `_init_weights`, buffers, and what `__init__` does on the meta device."""

import ast
import re
from collections.abc import Iterator

from .api_availability import Span, level_for
from .check_model import FROM_5, live_code
from .code_tree import Code, Klass, attributes, calls, constant, depth, is_self
from .kept_buffers import kept_buffers
from .repo_snapshot import Finding, Folder
from .walking import walk

_INIT_MODULES = re.compile(r"(torch\.nn\.init|transformers\.initialization|nn\.init|init)(\.|$)")
_WALKS = ("named_parameters", "parameters", "modules", "named_modules", "apply")
_SINGLE = re.compile(r"(LSTM|GRU|RNN|MultiheadAttention)")
# from 5.3, `_initialize_weights` skips modules of custom code whose tensors were all loaded
UNPROTECTED = Span((5, 0), (5, 2))


def init_weights(folder: Folder) -> Iterator[Finding]:
    """`_init_weights` initialises only the module it receives, through `nn.init`, so that loaded weights are kept."""
    code = live_code(folder)
    unsaved = {name for klass in code.classes for name, _ in _unsaved_buffers(klass)}
    for klass in code.classes:
        method = klass.method("_init_weights")
        if method is None:
            continue
        guards = _guards(method)
        single = bool(_SINGLE.search(ast.unparse(method)))
        tensors = _tensors(method)
        for node in walk(method):
            for finding in _faults(klass, node, unsaved, tensors, single) if id(node) not in guards else ():
                if finding.status != "failed":
                    yield finding
                    continue
                # the loader does not protect a module with a non-persistent buffer
                span = FROM_5 if unsaved and _of_a_child(node) else UNPROTECTED
                status = level_for(span, folder.releases)
                yield finding._replace(status=status, what=f"{finding.what}: weights are lost {span}")


def _faults(klass: Klass, node: ast.AST, unsaved: set[str], tensors: set[str], single: bool) -> Iterator[Finding]:
    where = klass.file.at(node)
    if isinstance(node, ast.Attribute) and node.attr == "data" and not is_self(node):
        yield _past_guard(f"writes {ast.unparse(node)}", where)
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        yield from _call_faults(klass, node, node.func, unsaved, tensors, single)
    elif isinstance(node, ast.Call) and klass.file.dotted(node.func).startswith("torch.nn.init."):
        what = f"_init_weights calls {ast.unparse(node.func)} under another name, which the loader cannot guard"
        yield Finding("failed", what, where, f"write nn.init.{ast.unparse(node.func)}")
    elif isinstance(node, (ast.Assign, ast.AugAssign)):
        for goal in node.targets if isinstance(node, ast.Assign) else [node.target]:
            if isinstance(goal, ast.Subscript) and re.search(r"\.(weight|bias)\b(?!\.data)", ast.unparse(goal)):
                yield _past_guard(f"writes {ast.unparse(goal)}", where)


def _of_a_child(node: ast.AST) -> bool:
    """Whether a write goes to a module below the one that is given, or to whatever a loop comes by."""
    inner = [n for n in walk(node) if isinstance(n, ast.Attribute)]
    looped = any(n.attr == "data" and isinstance(n.value, ast.Name) for n in inner)
    return looped or any(n.attr in ("weight", "bias") and depth(n) >= 3 for n in inner)


def _call_faults(
    klass: Klass, call: ast.Call, func: ast.Attribute, unsaved: set[str], tensors: set[str], single: bool
) -> Iterator[Finding]:
    where, text = klass.file.at(call), ast.unparse(func)
    mark = "mark the leaf in __init__, and read the mark here"
    first = call.args[0] if call.args else None
    if _INIT_MODULES.match(klass.file.dotted(func).rpartition(".")[0]):
        if isinstance(first, ast.Subscript) and isinstance(first.value, ast.Attribute):
            what = f"_init_weights writes a part, {ast.unparse(first)}, which lacks the mark of loaded tensors"
            yield Finding("failed", what, where, "check getattr(weight, '_is_hf_initialized', False) first")
        elif isinstance(first, ast.Attribute) and first.attr != "data" and depth(first) >= 3:
            what = f"_init_weights initialises {ast.unparse(first)} from its parent, which newer releases skip"
            yield Finding("warning", what, where, mark)
    elif re.search(r"[a-z]_$", func.attr) and func.attr != "requires_grad_" and ".data" not in text:
        kept = isinstance(func.value, ast.Attribute) and func.value.attr not in unsaved
        if kept or (isinstance(func.value, ast.Name) and func.value.id in tensors):
            yield _past_guard(f"calls {text}", where)
    elif func.attr in _WALKS and not single and not _alone(call):
        what = f"_init_weights goes through {text}() of a parent, which newer releases skip"
        yield Finding("warning", what, where, mark)


def _past_guard(does: str, where: str) -> Finding:
    what = f"_init_weights {does}, without the guard that keeps loaded weights"
    return Finding("failed", what, where, "use nn.init on the parameter itself; the loader guards exactly these calls")


def _guards(method: ast.AST) -> set[int]:
    """The `id` of nodes that run only if the tensor was not loaded."""
    found: set[int] = set()
    for node in walk(method):
        if isinstance(node, ast.If) and "_is_hf_initialized" in ast.unparse(node.test):
            found |= {id(inner) for inner in walk(node)}
    return found


def _tensors(method: ast.AST) -> set[str]:
    """The variables that hold parameters, from a loop over them or from a module."""
    found: set[str] = set()
    for node in walk(method):
        if isinstance(node, ast.For) and "parameters()" in ast.unparse(node.iter):
            found |= {n.id for n in walk(node.target) if isinstance(n, ast.Name)}
        elif isinstance(node, ast.Assign) and re.search(r"\.(weight|bias)$", ast.unparse(node.value)):
            found |= {goal.id for goal in node.targets if isinstance(goal, ast.Name)}
    return found


def _alone(call: ast.Call) -> bool:
    return any(k.arg == "recurse" and isinstance(k.value, ast.Constant) and not k.value.value for k in call.keywords)


def _unsaved_buffers(klass: Klass) -> Iterator[tuple[str, ast.Call]]:
    for call in calls(klass.node):
        if is_self(call.func, "register_buffer") and _is_false(call, "persistent", 2):
            yield str(constant(call.args[0]) if call.args else None), call


def buffers(folder: Folder) -> Iterator[Finding]:
    """Non-persistent buffers are computed again after loading, which otherwise leaves garbage in them."""
    code = live_code(folder)
    kept = kept_buffers(folder, code)
    refilled = _refilled(code)
    starts = [ast.unparse(m) for k in code.classes for m in [k.method("_init_weights")] if m is not None]
    by_parent = not starts or any("super()._init_weights" in text for text in starts)
    for klass in code.classes if folder.code else ():
        rotary = "RotaryEmbedding" in klass.name and "original_inv_freq" in ast.unparse(klass.node)
        if id(klass.node) in kept:
            continue  # made persistent by the model, so they are in the file
        if not code.is_module(klass) or (rotary and by_parent):
            continue  # transformers 5 refills buffers that look like its own rotary embedding
        lazy = _made_in_forward(code, klass)
        for name, call in _unsaved_buffers(klass):
            if id(call) not in lazy and name not in refilled and not refilled_by_init_weights(code, klass, name):
                what = f"the buffer {name} of {klass.name} is in no file, and nothing computes it again after loading"
                remedy = "compute it in forward, refill it in _init_weights, or keep it in the file (persistent=True)"
                yield Finding(level_for(FROM_5, folder.releases), what, klass.file.at(call), remedy)


def run_by(code: Code, klass: Klass, function: ast.AST) -> Iterator[ast.Call]:
    """The calls that a method makes, those of methods of its own class and of ancestors' constructors included."""
    waiting, seen = [function], set[int]()
    while waiting:
        current = waiting.pop()
        if id(current) in seen:
            continue
        seen.add(id(current))
        for call in calls(current):
            yield call
            method = call.func.attr if isinstance(call.func, ast.Attribute) else ""
            if is_self(call.func):
                found = code.method(klass, method)
                waiting += [found[1]] if found is not None else []
            elif method == "__init__":
                inits = (base.method("__init__") for base in code.lineage(klass))
                waiting += [base for base in inits if base is not None]


def _made_in_forward(code: Code, klass: Klass) -> set[int]:
    """The calls that forward makes and the constructor does not: what they register is not there while weights load."""
    forward, init = code.method(klass, "forward"), code.method(klass, "__init__")
    if forward is None or init is None:
        return set()
    return {id(call) for call in run_by(code, klass, forward[1])} - {id(call) for call in run_by(code, klass, init[1])}


def refilled_by_init_weights(code: Code, klass: Klass, name: str) -> bool:
    """Whether an `_init_weights` that asks for the class computes its buffer, itself or by what it calls."""
    named = re.compile(rf"\b({'|'.join(one.name for one in code.lineage(klass))})\b")
    for owner in code.classes:
        method = owner.method("_init_weights")
        if method is None or not named.search(ast.unparse(method)):
            continue
        texts = [ast.unparse(method)]
        for call in calls(method):
            called = call.func.attr if isinstance(call.func, ast.Attribute) else ast.unparse(call.func)
            found = code.method(klass, called)
            texts += [ast.unparse(found[1])] if found is not None and called != "_init_weights" else []
            texts += [
                ast.unparse(s) for s in owner.file.tree.body if isinstance(s, ast.FunctionDef) and s.name == called
            ]
        if any(re.search(rf"\b{name}\b|buffers\(|_non_persistent_buffers_set", text) for text in texts):
            return True
    return False


def _refilled(code: Code) -> set[str]:
    """The attributes that loading or a forward pass sets, and not from their old value."""
    found: set[str] = set()
    for klass in code.classes:
        for method in klass.methods():
            if method.name not in ("_init_weights", "reset_parameters", "forward"):
                continue
            for node in walk(method):
                if isinstance(node, ast.Assign):
                    goals, value = node.targets, ast.unparse(node.value)
                    found |= {g.attr for g in goals if isinstance(g, ast.Attribute) and f".{g.attr}" not in value}
                elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                    if node.func.attr == "register_buffer" and node.args:
                        found.add(str(constant(node.args[0])))
                    elif node.func.attr in ("copy_", "constant_", "zeros_", "ones_"):
                        found |= {a.attr for part in [node.func.value, *node.args[:1]] for a in attributes(part)}
    return found


def _is_false(call: ast.Call, name: str, position: int) -> bool:
    value = next((k.value for k in call.keywords if k.arg == name), None)
    if value is None and len(call.args) > position:
        value = call.args[position]
    return isinstance(value, ast.Constant) and value.value is False


_FACTORIES = {
    *("tensor", "arange", "linspace", "logspace", "zeros", "ones", "full", "empty", "eye", "rand", "randn", "randint"),
    *("randperm", "tril", "triu", "outer", "cat", "stack", "pow", "exp", "as_tensor", "from_numpy", "zeros_like"),
    *("ones_like", "full_like", "hann_window", "hamming_window", "meshgrid"),
}
_READS = {"item", "tolist", "numpy"}


def init_data(folder: Folder) -> Iterator[Finding]:
    """`__init__` creates no plain tensors and reads no values, as it runs on the meta device."""
    code = live_code(folder)
    for klass in code.classes:
        init = klass.method("__init__") if code.is_module(klass) else None
        if init is None:
            continue
        sources = _loop_sources(init)
        for node in walk(init):
            text, where = ast.unparse(node) if isinstance(node, (ast.Call, ast.Assign)) else "", klass.file.at(node)
            if not text or "cpu" in text:
                continue  # explicitly created on the CPU, so it has data
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in _READS:
                source = sources.get(ast.unparse(node.func.value), text)
                if not node.args and "cpu" not in source and _is_tensor(klass, node.func.value, source):
                    # newer releases run linspace on the CPU
                    span = Span((5, 0), (5, 9)) if "torch.linspace" in source else FROM_5
                    what = f"{klass.name}.__init__ calls .{node.func.attr}(), but it runs without data (on meta)"
                    yield Finding(
                        level_for(span, folder.releases), what, where, "compute the number with Python or math"
                    )
            elif isinstance(node, ast.Assign) and any(is_self(g) for g in node.targets) and _factory(klass, node.value):
                what = f"{ast.unparse(node.targets[0])} of {klass.name} is a plain tensor: it stays on meta"
                remedy = "compute it in forward, or register it as a buffer that is saved"
                yield Finding(level_for(FROM_5, folder.releases), what, where, remedy)


def _factory(klass: Klass, node: ast.AST) -> bool:
    """Whether an expression is a tensor created by torch: `torch.arange(8)`, `torch.ones(2).tril()`, `1 / torch…`."""
    if isinstance(node, ast.Call):
        if isinstance(node.func, ast.Attribute):
            if node.func.attr in _READS:
                return False
            dotted = klass.file.dotted(node.func)
            return (
                dotted.startswith("torch.") and dotted.count(".") == 1 and node.func.attr in _FACTORIES
            ) or _factory(klass, node.func.value)
        return False
    if isinstance(node, ast.BinOp):
        return _factory(klass, node.left) or _factory(klass, node.right)
    if isinstance(node, ast.UnaryOp):
        return _factory(klass, node.operand)
    return isinstance(node, ast.Subscript) and _factory(klass, node.value)


def _loop_sources(init: ast.AST) -> dict[str, str]:
    """What each loop variable goes through, as text; of a local name, what it is set to."""
    loops = [node for node in walk(init) if isinstance(node, (ast.comprehension, ast.For))]
    local = {
        goal.id: ast.unparse(node.value)
        for node in walk(init)
        if isinstance(node, ast.Assign)
        for goal in node.targets
        if isinstance(goal, ast.Name)
    }
    texts = {ast.unparse(loop.target): ast.unparse(loop.iter) for loop in loops}
    return {target: local.get(text, text) for target, text in texts.items()}


def _is_tensor(klass: Klass, node: ast.AST, source: str) -> bool:
    """Whether `.item()` or similar is called on a tensor: on anything not clearly from NumPy or a config."""
    if re.search(r"\b(np|numpy|torch\.(Float|Long)?Tensor)\b", source):
        return False  # `torch.Tensor(…)`, unlike `torch.tensor(…)`, is on the CPU whatever the default device
    names = {klass.file.dotted(n).split(".")[0] for n in walk(node) if isinstance(n, (ast.Name, ast.Attribute))}
    return "config" not in names or "torch" in names


CHECKS = {"init weights": init_weights, "buffers": buffers, "data in __init__": init_data}
