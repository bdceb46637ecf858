"""Parameters that a constructor freezes, and that transformers 5 makes trainable while it loads."""

import ast

import libcst as cst
import libcst.matchers as m

from ...static.check_init import run_by
from ...static.code_tree import Code, Klass, is_self
from ..parts import with_parts
from ..rule import Context, Rewriter, Rule, rewrites, source_of, statements

_HELPER = '''
def freeze_as_built(model):
    """Freezes the parameters that the constructor freezes: from_pretrained of transformers 5 makes all it loads trainable."""
    import torch

    with torch.device("meta"):
        built = type(model)(model.config)
    frozen = {name for name, parameter in built.named_parameters() if not parameter.requires_grad}
    for name, parameter in model.named_parameters():
        if name in frozen:
            parameter.requires_grad_(False)
'''
_METHOD = """
def tie_weights(self, *args, **kwargs):
    super().tie_weights(*args, **kwargs)
    if "missing_keys" in kwargs:
        freeze_as_built(self)
"""
_PARENT = m.Call(func=m.Attribute(value=m.Call(func=m.Name("super")), attr=m.Name("tie_weights")))


def _freezes(code: Code, klass: Klass) -> bool:
    """Whether the constructor of a class makes parameters that are not trained, by itself or by what it calls."""
    init = klass.method("__init__")
    run: list[ast.AST] = [init] if init is not None else []
    functions = {step.name: step for step in klass.file.tree.body if isinstance(step, ast.FunctionDef)}
    for call in run_by(code, klass, init) if init is not None else ():
        name = call.func.attr if isinstance(call.func, ast.Attribute) else ""
        if is_self(call.func) and (found := code.method(klass, name)) is not None:
            run.append(found[1])
        elif isinstance(call.func, ast.Name) and call.func.id in functions:  # freeze(self.encoder)
            run.append(functions[call.func.id])
    return any(_freezes_here(klass, node) for function in run for node in ast.walk(function))


def _freezes_here(klass: Klass, node: ast.AST) -> bool:
    """`p.requires_grad = False`, `p.requires_grad_(False)` or `nn.Parameter(…, requires_grad=False)`."""
    if isinstance(node, ast.Assign):
        goals = (goal.attr for goal in node.targets if isinstance(goal, ast.Attribute))
        return _is_false(node.value) and "requires_grad" in goals
    if not isinstance(node, ast.Call):
        return False
    given = [*node.args, *(keyword.value for keyword in node.keywords if keyword.arg == "requires_grad")]
    if isinstance(node.func, ast.Attribute) and node.func.attr == "requires_grad_":
        return any(map(_is_false, given))
    return klass.file.dotted(node.func).endswith(("nn.Parameter", "nn.parameter.Parameter")) and any(
        map(_is_false, given)
    )


def _is_false(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and node.value is False


class _Frozen(Rewriter):
    """A call at the end of each `tie_weights` that calls no other one of the folder, and such a method where there is none."""

    def leave_FunctionDef(self, original_node: cst.FunctionDef, updated_node: cst.FunctionDef) -> cst.FunctionDef:
        scope = self.context.scope(original_node)
        if original_node.name.value != "tie_weights" or len(scope) != 1 or not self.context.is_model(scope[0]):
            return updated_node
        if "freeze_as_built" in source_of(original_node) or not isinstance(updated_node.body, cst.IndentedBlock):
            return updated_node
        if m.findall(original_node, _PARENT) and not self._is_first(scope[0]):
            return updated_node
        parameters = updated_node.params
        if any(one.name.value == "missing_keys" for one in parameters.params):
            condition = "missing_keys is not None"
        elif parameters.star_kwarg is not None:
            condition = f'"missing_keys" in {parameters.star_kwarg.name.value}'
        else:
            return updated_node
        self._note(original_node)
        added = statements(f"if {condition}:\n    freeze_as_built(self)\n")
        body = updated_node.body.with_changes(body=[*updated_node.body.body, *added])
        return updated_node.with_changes(body=body)

    def leave_ClassDef(self, original_node: cst.ClassDef, updated_node: cst.ClassDef) -> cst.ClassDef:
        name = original_node.name.value
        klass = self.context.klass(name)
        if klass is None or self.context.scope(original_node) or not self.context.is_model(name):
            return updated_node
        if not self._is_first(name) or klass.method("tie_weights") is not None:
            return updated_node
        if not isinstance(updated_node.body, cst.IndentedBlock):
            return updated_node
        self._note(original_node)
        method = statements(_METHOD)[0].with_changes(leading_lines=[cst.EmptyLine(indent=False)])  # type: ignore[call-arg]
        steps = [step for step in updated_node.body.body if not m.matches(step, _PASS)]
        return updated_node.with_changes(body=updated_node.body.with_changes(body=[*steps, method]))

    def _is_first(self, name: str) -> bool:
        """Whether a model's class is not a subclass of another model of the folder."""
        klass, code = self.context.klass(name), self.context.code
        return klass is not None and not any(code.is_model(base) for base in code.lineage(klass)[1:])

    def _note(self, node: cst.CSTNode) -> None:
        self.context.define("freeze_as_built", _HELPER)
        self.context.note(node, "parameters that the constructor freezes are frozen again after loading")


_PASS = m.SimpleStatementLine(body=[m.Pass()])


def _apply(tree: cst.Module, context: Context) -> cst.Module:
    code = context.code
    models = [klass for klass in code.classes if code.is_model(klass)]
    made = (one for klass in with_parts(code, models) for one in code.lineage(klass))
    if not any(_freezes(code, klass) for klass in made):
        return tree
    return rewrites(_Frozen, ("PreTrainedModel", "tie_weights"))(tree, context)


_BEFORE = """
    from torch import nn
    from transformers import PreTrainedModel


    class ToyModel(PreTrainedModel):
        def __init__(self, config):
            super().__init__(config)
            self.position = nn.Embedding(config.n_positions, config.hidden_size)
            self.position.weight.requires_grad = False
            self.post_init()
"""
_INDENTED = "".join(f"    {line}" if line.strip() else line for line in _HELPER.strip("\n").splitlines(keepends=True))

RULE = Rule(
    name="frozen parameters",
    reason="transformers 5 makes every parameter that it loads trainable, also those that the constructor freezes",
    releases="5.0 and newer",
    before=_BEFORE,
    after=_BEFORE.replace(
        "PreTrainedModel\n\n",
        f"""PreTrainedModel

    # --- transformers releases: what differs between them, and what newer ones no longer have ---
    # [freeze_as_built]
{_INDENTED}
    # --- end of transformers releases ---

""",
        1,
    ).rstrip(" ")
    + """
        def tie_weights(self, *args, **kwargs):
            super().tie_weights(*args, **kwargs)
            if "missing_keys" in kwargs:
                freeze_as_built(self)
""",
    apply=_apply,
    order=70,
)
