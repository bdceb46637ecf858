"""Stages: the properties of a model that serving engines depend on, and a try of `torch.export`."""

import ast
import inspect
import textwrap
from collections.abc import Iterable
from typing import Any

import torch

from .golden_outputs import read_inputs
from .inputs import make_inputs
from .load_repo import build, config_of, load
from .stages import sentence


def run(job: dict[str, Any], events: Any) -> None:
    """Report properties of the class of `architectures`, built on the meta device, for `engine_readiness.py`."""
    config = config_of(job)
    with torch.device("meta"):
        model = build(job["classes"][0], config)
    parameters = inspect.signature(model.forward).parameters.values()
    base = getattr(model, "base_model", model)
    base_parameters = inspect.signature(base.forward).parameters.values()
    linears = {path: module for path, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    attention = [
        {
            "path": path,
            **{name: hasattr(module, name) for name in ("layer_idx", "scaling", "is_causal")},
            "children": [name for name, child in module.named_children() if _projects(child)],
            "kwargs": any(p.kind is p.VAR_KEYWORD for p in inspect.signature(module.forward).parameters.values()),
            "interface": _calls_interface(_source(module)),
        }
        for path, module in model.named_modules()
        if "Attention" in type(module).__name__ and sum(map(_projects, module.children())) > 1
    ]
    events.write(
        facts={
            "model_type": config.model_type,
            "forward": [p.name for p in base_parameters],
            "forward_kwargs": any(p.kind is p.VAR_KEYWORD for p in [*parameters, *base_parameters]),
            "attention_backend": bool(getattr(model, "_supports_attention_backend", False)),
            "attention": attention,
            "linears": target_module_names(
                path for path, module in linears.items() if not _is_head(model, path, module)
            ),
            "conv1d": sorted({p.rpartition(".")[2] for p, m in model.named_modules() if type(m).__name__ == "Conv1D"}),
            "heads": [name for name, _ in model.named_children()],
            "fused": [name for name, fuses in FUSIONS.items() if any(map(fuses, model.modules()))],
            "norms": sorted({type(m).__name__ for m in model.modules() if "Norm" in type(m).__name__}),
            "input_embeddings": _has_input_embeddings(model),
            "tp_plan": bool(getattr(config, "base_model_tp_plan", None) or getattr(model, "_tp_plan", None)),
            "config": [name for name in CONFIG_NAMES if getattr(config, name, None) is not None],
        }
    )


def target_module_names(paths: Iterable[str]) -> list[str]:
    """The `target_modules` that PEFT accepts for these paths: the last part, with the part before it if it is a number."""
    found = set()
    for path in paths:
        parts = path.split(".")
        first = next((i for i in range(len(parts) - 1, -1, -1) if not parts[i].isdigit()), 0)
        found.add(".".join(parts[first:]))
    return sorted(found)


def _is_head(model: Any, path: str, module: torch.nn.Module) -> bool:
    """Whether a layer is the model's head: its output embeddings, or a module outside of the base model."""
    try:
        if module is model.get_output_embeddings():
            return True
    except (AttributeError, NotImplementedError):
        pass
    base, prefix = getattr(model, "base_model", model), getattr(model, "base_model_prefix", "")
    return base is not model and not path.startswith(f"{prefix}.")


def _has_input_embeddings(model: Any) -> bool:
    try:
        return model.get_input_embeddings() is not None
    except (AttributeError, NotImplementedError):
        return False


def _projects(module: torch.nn.Module) -> bool:
    return isinstance(module, torch.nn.Linear) or type(module).__name__ == "Conv1D"


# ---- what vLLM looks for in the source of `forward`


def _source(module: torch.nn.Module) -> ast.AST:
    try:
        return ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(type(module).forward))))
    except (OSError, TypeError, SyntaxError):
        return ast.Module([], [])


def _calls_interface(source: ast.AST) -> bool:
    """Whether a function of `ALL_ATTENTION_FUNCTIONS` is assigned to a name and called once by that name."""
    names: set[str] = set()
    for node in ast.walk(source):
        if isinstance(node, ast.Assign | ast.AnnAssign) and any(map(_looks_up, _alternatives(node.value))):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names.update(target.id for target in targets if isinstance(target, ast.Name))
    calls = [n for n in ast.walk(source) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)]
    return sum(call.func.id in names for call in calls if isinstance(call.func, ast.Name)) == 1


def _alternatives(node: ast.AST | None) -> list[ast.AST | None]:
    """The branches of a conditional expression: `a` and `b` of `a if test else b`."""
    if isinstance(node, ast.IfExp):
        return [*_alternatives(node.body), *_alternatives(node.orelse)]
    return [node]


def _looks_up(node: ast.AST | None) -> bool:
    looked_up = node.func if isinstance(node, ast.Call) else node
    return isinstance(looked_up, ast.Attribute | ast.Subscript) and _is_name(looked_up.value, TABLE)


def _is_name(node: ast.AST | None, name: str) -> bool:
    return isinstance(node, ast.Name) and node.id == name


def _plain_self_call(node: ast.AST | None) -> tuple[str, ast.expr] | None:
    """`name` and `x` of a call `self.name(x)`."""
    if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and _is_name(node.func.value, "self")):
        return None
    return None if len(node.args) != 1 or node.keywords else (node.func.attr, node.args[0])


def _fuses_qkv(module: torch.nn.Module) -> bool:
    """Exactly three `nn.Linear`s are called, as `self.name(x)`, on the same expression."""
    linears = {name for name, child in module.named_children() if isinstance(child, torch.nn.Linear)}
    if len(linears) < 3:
        return False
    by_input: dict[str, list[str]] = {}
    for name, given in filter(None, map(_plain_self_call, ast.walk(_source(module)))):
        if name in linears:
            by_input.setdefault(ast.dump(given), []).append(name)
    return any(len(names) == len(set(names)) == 3 for names in by_input.values())


def _fuses_glu(module: torch.nn.Module) -> bool:
    """`self.act(self.gate(x)) * self.up(x)` is computed."""
    if sum(isinstance(child, torch.nn.Linear) for child in module.children()) < 2:
        return False
    for node in ast.walk(_source(module)):
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
            for one, other in ((node.left, node.right), (node.right, node.left)):
                act, up = _plain_self_call(one), _plain_self_call(other)
                gate = _plain_self_call(act[1]) if act else None
                if gate and up and ast.dump(gate[1]) == ast.dump(up[1]):
                    return True
    return False


def _fuses_norm(module: torch.nn.Module) -> bool:
    return type(module).__name__.endswith("RMSNorm")


FUSIONS = {"QKV": _fuses_qkv, "gate and up": _fuses_glu, "RMSNorm": _fuses_norm}
TABLE = "ALL_ATTENTION_FUNCTIONS"
CONFIG_NAMES = ("num_attention_heads", "num_key_value_heads", "hidden_size", "head_dim", "num_hidden_layers")


def run_export(job: dict[str, Any], events: Any) -> None:
    """Try `torch.export`, the first step of an ONNX export, with a dynamic batch size."""
    model, _ = load(job, job["classes"][0])
    inputs: dict[str, Any] = read_inputs(job) or make_inputs(model)
    free = {name: {0: torch.export.Dim.AUTO} for name in inputs}
    if "use_cache" in inspect.signature(model.forward).parameters:
        inputs["use_cache"], free["use_cache"] = False, None  # type: ignore[assignment]
    try:
        torch.export.export(model, (), kwargs=inputs, dynamic_shapes=free, strict=False)
        events.write(export="")
    except Exception as error:
        events.write(export=sentence(error))
