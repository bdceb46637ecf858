"""Buffers that are in no file: computed again where transformers 5 leaves them without data."""

import ast
import copy
from collections.abc import Iterator
from typing import NamedTuple

import libcst as cst

from ...static.check_init import refilled_by_init_weights, run_by
from ...static.code_tree import Klass, constant, is_self
from ...static.headers import tensor_headers
from ...static.kept_buffers import kept_buffers
from ..into_init_weights import IntoInitWeights
from ..rule import Context, Rule, rewrites, source_of

_HELPERS = '''
def keep_arguments(init):
    """Keeps what a module was built with, for `refill_buffers`."""
    import functools

    @functools.wraps(init)
    def wrapper(self, *args, **kwargs):
        init(self, *args, **kwargs)
        self.__dict__["_built_with"] = (type(self), args, kwargs)  # the outermost constructor is the last

    return wrapper


def refill_buffers(module):
    """Computes the buffers that are in no file again: transformers 5 builds models without data and leaves them empty."""
    import torch
    import transformers

    built = module.__dict__.get("_built_with")
    if built is None or built[0] is not type(module):
        return
    newer = int(transformers.__version__.split(".")[0]) >= 5  # it marks the tensors that it loaded
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        fresh = built[0](*built[1], **built[2])
    for name, value in fresh.named_buffers(recurse=False):
        unsaved = name in module._non_persistent_buffers_set
        buffer = getattr(module, name, None)
        missing = newer and not getattr(buffer, "_is_hf_initialized", False)
        if (unsaved or missing) and buffer is not None and buffer.shape == value.shape:
            buffer.copy_(value)
'''


class _Refilled(NamedTuple):
    """A class with buffers that are in no file."""

    klass: Klass
    names: list[str]
    init: ast.FunctionDef | ast.AsyncFunctionDef


def _unsaved(context: Context) -> Iterator[_Refilled]:
    """The modules of the folder with buffers that are in no file and that nothing computes again."""
    code = context.code
    kept = kept_buffers(context.folder, code)
    headers = tensor_headers(context.folder)
    for klass in code.classes:
        init = klass.method("__init__")
        if init is None or not code.is_module(klass) or id(klass.node) in kept:
            continue
        names = []
        for call in run_by(code, klass, init):  # what a method registers later is not there while weights load
            name = constant(call.args[0]) if is_self(call.func, "register_buffer") and call.args else None
            value = (
                call.args[1]
                if len(call.args) > 1
                else next((k.value for k in call.keywords if k.arg == "tensor"), None)
            )
            if not isinstance(name, str) or value is None or (isinstance(value, ast.Constant) and value.value is None):
                continue
            in_file = not _not_persistent(call) and (not headers or any(_ends(key, name) for key in headers))
            if not in_file and not refilled_by_init_weights(code, klass, name):
                names.append(name)
        if names:
            yield _Refilled(klass, list(dict.fromkeys(names)), init)


def _ends(key: str, name: str) -> bool:
    return key == name or key.endswith(f".{name}")


def _not_persistent(call: ast.Call) -> bool:
    value = next(
        (k.value for k in call.keywords if k.arg == "persistent"), call.args[2] if len(call.args) > 2 else None
    )
    return isinstance(value, ast.Constant) and value.value is False


class _Edit(IntoInitWeights):
    """Adds the decorator to constructors of this file, and the call to each `_init_weights` of it."""

    def __init__(self, context: Context, found: list[_Refilled]):
        super().__init__(context)
        self.found = found
        self.own = {one.klass.name: one for one in found if one.klass.file.name == context.file.name}

    def leave_FunctionDef(self, original_node: cst.FunctionDef, updated_node: cst.FunctionDef) -> cst.FunctionDef:
        scope = self.context.scope(original_node)
        one = self.own.get(scope[0]) if len(scope) == 1 else None
        kept = any(source_of(decorator.decorator) == "keep_arguments" for decorator in original_node.decorators)
        if original_node.name.value != "__init__" or one is None or kept or self.context.is_model(scope[0]):
            return super().leave_FunctionDef(original_node, updated_node)
        what = f"{', '.join(one.names)} of {scope[0]}, in no file, can be computed again after loading"
        self.context.note(original_node, what)
        self.context.define("refill_buffers", _HELPERS)
        decorator = cst.Decorator(cst.Name("keep_arguments"))
        return updated_node.with_changes(decorators=[decorator, *updated_node.decorators])

    def added(self, owner: str, node: cst.CSTNode, model: str, module: str) -> list[str]:
        steps = []
        parts = [one for one in self.found if not self.context.code.is_model(one.klass)]
        here = [one.klass.name for one in parts if self.context.klass(one.klass.name) is not None]
        elsewhere = [one.klass.name for one in parts if one.klass.name not in here]
        if here:
            shown = here[0] if len(here) == 1 else f"({', '.join(here)})"
            steps.append(f"if isinstance({module}, {shown}):\n    refill_buffers({module})\n")
        if elsewhere:
            shown = ", ".join(f'"{name}"' for name in elsewhere)
            steps.append(f"if type({module}).__name__ in ({shown},):\n    refill_buffers({module})\n")
        if steps:
            self.context.define("refill_buffers", _HELPERS)
        for one in self.found:
            if self.context.code.is_model(one.klass) and self.context.klass(one.klass.name) is not None:
                text = _own_statements(one, module)
                if text is None:
                    self.context.refuse(
                        one.init.lineno, f"how {one.klass.name} computes {', '.join(one.names)} was not understood"
                    )
                else:
                    steps.append(text)
        if steps:
            names = ", ".join(one.klass.name for one in self.found)
            self.context.note(node, f"_init_weights computes the buffers of {names} again")
        return steps


class _ToModule(ast.NodeTransformer):
    """`self` and `config` of a constructor as they are seen from `_init_weights`."""

    def __init__(self, module: str, config: str):
        self.module, self.config = module, config

    def visit_Name(self, node: ast.Name) -> ast.expr:
        if node.id == "self":
            return ast.Name(self.module, node.ctx)
        if node.id == self.config:
            return ast.Attribute(ast.Name(self.module, ast.Load()), "config", ast.Load())
        return node

    def source(self, node: ast.AST) -> str:
        return ast.unparse(self.visit(copy.deepcopy(node)))  # other rules read the tree, too


def _own_statements(one: _Refilled, module: str) -> str | None:
    """The statements that compute a model's own buffers, from those of its constructor, or None."""
    parameters = {argument.arg for argument in one.init.args.args} - {"self"}
    config = one.init.args.args[1].arg if len(one.init.args.args) > 1 else ""
    if parameters - {config}:
        return None
    lines: list[str] = []
    taken: list[ast.stmt] = []
    for name in one.names:
        values = {
            (constant(step.value.args[0]) if step.value.args else None): step.value.args[1]
            for step in one.init.body
            if isinstance(step, ast.Expr)
            and isinstance(step.value, ast.Call)
            and is_self(step.value.func, "register_buffer")
            and len(step.value.args) > 1
        }
        if name not in values:
            return None
        for step in _needed(one.init.body, values[name]):
            if step not in taken:
                taken.append(step)
        lines.append(f"    {module}.{name}.copy_({_ToModule(module, config).source(values[name])})\n")
    before = [f"    {_ToModule(module, config).source(step)}\n" for step in taken]
    return f"if isinstance({module}, {one.klass.name}):\n" + "".join([*before, *lines])


def _needed(body: list[ast.stmt], value: ast.AST) -> list[ast.stmt]:
    """The plain assignments to local variables that an expression needs, in order."""
    wanted = {node.id for node in ast.walk(value) if isinstance(node, ast.Name)}
    found: list[ast.stmt] = []
    for step in reversed(body):
        if isinstance(step, ast.Assign) and any(
            isinstance(goal, ast.Name) and goal.id in wanted for goal in step.targets
        ):
            found.insert(0, step)
            wanted |= {node.id for node in ast.walk(step.value) if isinstance(node, ast.Name)}
    return found


def _apply(tree: cst.Module, context: Context) -> cst.Module:
    found = list(_unsaved(context))
    if not found:
        return tree
    names = tuple(one.klass.name for one in found)
    edit = rewrites(lambda context: _Edit(context, found), ("_init_weights", "PreTrainedModel", *names))
    return edit(tree, context)


RULE = Rule(
    name="buffers",
    reason="transformers 5 builds models without data and leaves buffers that are in no file as garbage, without a word",
    releases="5.0 and newer",
    before="""
        import torch
        from torch import nn
        from transformers import PreTrainedModel


        class ToyRotary(nn.Module):
            def __init__(self, dim):
                super().__init__()
                inv_freq = 1.0 / 10000 ** (torch.arange(0, dim, 2) / dim)
                self.register_buffer("inv_freq", inv_freq, persistent=False)


        class ToyModel(PreTrainedModel):
            def __init__(self, config):
                super().__init__(config)
                self.rotary = ToyRotary(config.head_dim)
                mask = torch.ones(config.n_positions, config.n_positions)
                self.register_buffer("causal", torch.tril(mask), persistent=False)
                self.post_init()

            def _init_weights(self, module):
                if isinstance(module, nn.Linear):
                    nn.init.normal_(module.weight, std=0.02)
    """,
    after=f"""
        import torch
        from torch import nn
        from transformers import PreTrainedModel

        # --- transformers releases: what differs between them, and what newer ones no longer have ---
        # [refill_buffers]
{"".join(f"        {line}" if line.strip() else line for line in _HELPERS.strip(chr(10)).splitlines(keepends=True))}
        # --- end of transformers releases ---


        class ToyRotary(nn.Module):
            @keep_arguments
            def __init__(self, dim):
                super().__init__()
                inv_freq = 1.0 / 10000 ** (torch.arange(0, dim, 2) / dim)
                self.register_buffer("inv_freq", inv_freq, persistent=False)


        class ToyModel(PreTrainedModel):
            def __init__(self, config):
                super().__init__(config)
                self.rotary = ToyRotary(config.head_dim)
                mask = torch.ones(config.n_positions, config.n_positions)
                self.register_buffer("causal", torch.tril(mask), persistent=False)
                self.post_init()

            def _init_weights(self, module):
                if isinstance(module, ToyRotary):
                    refill_buffers(module)
                if isinstance(module, ToyModel):
                    mask = torch.ones(module.config.n_positions, module.config.n_positions)
                    module.causal.copy_(torch.tril(mask))
                if isinstance(module, nn.Linear):
                    nn.init.normal_(module.weight, std=0.02)
    """,
    apply=_apply,
    words=("register_buffer", "_init_weights", "PreTrainedModel"),
    order=60,
)
